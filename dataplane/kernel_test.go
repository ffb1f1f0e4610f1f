package dataplane

import (
	"bytes"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/signet-overlay/signet/dataplane/link"
	"github.com/signet-overlay/signet/internal/mesh"
)

// TestKernelMissing: without WireGuard in the kernel, auto falls back and says why, and kernel is refused.
func TestKernelMissing(t *testing.T) {
	cfg := newHostConfig(t)
	err := link.ProbeWireGuard()
	if err == nil {
		return // TestKernelChange is about such a kernel
	}
	if os.Getenv("SIGNET_VM_GUEST") != "" || !errors.Is(err, link.ErrNoWireGuard) {
		t.Fatal(err)
	}
	d, _ := openHost(t, cfg)
	s := d.Status()
	if s.TunnelKind != TunnelUserspace || !slices.ContainsFunc(s.Warnings, func(w string) bool {
		return strings.HasPrefix(w, "kernel has no WireGuard: ") && strings.HasSuffix(w, "; using the embedded engine")
	}) {
		t.Errorf("kind %s, warnings %q", s.TunnelKind, s.Warnings)
	}
	cfg.Tunnel = TunnelKernel
	if err := Preflight(cfg); !errors.Is(err, link.ErrNoWireGuard) {
		t.Errorf("preflight: %v", err)
	}
	cfg.Tunnel = "other"
	if err := Preflight(cfg); err == nil {
		t.Error("an unknown kind passed")
	}
}

// TestKernelChange starts one kind after the other on the same host: the device is replaced, is not up before the judge is
// attached, and the log says so.
func TestKernelChange(t *testing.T) {
	cfg := newHostConfig(t)
	if err := link.ProbeWireGuard(); err != nil {
		if os.Getenv("SIGNET_VM_GUEST") != "" || !errors.Is(err, link.ErrNoWireGuard) {
			t.Fatal(err)
		}
		t.Skipf("needs the kernel's WireGuard, which the guests of make test-vm have: %v", err)
	}
	var log bytes.Buffer
	cfg.Logger = slog.New(slog.NewTextHandler(&log, nil))
	before := ""
	for _, kind := range []string{TunnelUserspace, TunnelAuto, TunnelKernel, TunnelUserspace, TunnelKernel} {
		log.Reset()
		cfg.Tunnel = kind
		d, err := Open(t.Context(), cfg)
		must(t, err, "open "+kind)
		runs := map[string]string{TunnelAuto: TunnelKernel}[kind]
		if runs == "" {
			runs = kind
		}
		changed := before != "" && before != runs
		if said := strings.Contains(log.String(), "changed its kind"); said != changed {
			t.Errorf("from %s to %s: log %q", before, kind, log.String())
		}
		i, err := net.InterfaceByName(cfg.Interface)
		must(t, err, "find device")
		if (changed || before == "") && i.Flags&net.FlagUp != 0 {
			t.Errorf("%s: the device is up before its addresses are set", kind)
		}
		for _, h := range d.Status().Hooks {
			if !h.Attached {
				t.Errorf("%s: hook %s: %s", kind, h.Name, h.Error)
			}
		}
		self := mesh.Self{Addresses: []netip.Addr{netip.MustParseAddr("198.18.0.1")}, Overlay4: cfg.Overlay4, Overlay6: cfg.Overlay6}
		must(t, d.UpdateHost(t.Context(), self, nil), "update host")
		s := d.Status()
		limits := slices.ContainsFunc(s.Warnings, func(w string) bool { return strings.Contains(w, "kernel WireGuard does not look a second time") })
		if s.TunnelKind != runs || !s.Healthy || s.Port != cfg.ListenPort || limits != (runs == TunnelKernel) {
			t.Errorf("%s: status %+v", kind, s)
		}
		if out, err := exec.Command("ip", "-d", "link", "show", cfg.Interface).CombinedOutput(); err != nil || strings.Contains(string(out), "wireguard") != (runs == TunnelKernel) {
			t.Errorf("%s: %v: %s", kind, err, out)
		}
		must(t, d.Close(), "close")
		before = runs
	}
	must(t, Release(cfg), "release")
	if _, err := net.InterfaceByName(cfg.Interface); err == nil {
		t.Error("the device outlived the release")
	}
}
