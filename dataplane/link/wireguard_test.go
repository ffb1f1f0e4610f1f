package link

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"
)

// needWireGuard skips where the kernel has none. The guests of the matrix have it: there it must work.
func needWireGuard(t *testing.T, s *space) {
	t.Helper()
	var err error
	s.do(func() { err = ProbeWireGuard() })
	switch {
	case err == nil:
	case os.Getenv("SIGNET_VM_GUEST") != "" || !errors.Is(err, ErrNoWireGuard):
		t.Fatal(err)
	default:
		t.Skipf("needs the kernel's WireGuard, which the guests of make test-vm have: %v", err)
	}
}

// TestKernelProbe leaves nothing behind, and says plainly why there is no WireGuard.
func TestKernelProbe(t *testing.T) {
	s := newSpace(t)
	var err error
	s.do(func() { err = ProbeWireGuard() })
	if out := s.ip("-o link"); strings.Contains(out, "sigprobe") {
		t.Errorf("the probe left a device: %s", out)
	}
	if err == nil {
		return
	}
	if !errors.Is(err, ErrNoWireGuard) || !strings.HasPrefix(err.Error(), "kernel has no WireGuard: the module wireguard is neither built in nor could it be loaded") {
		t.Error(err)
	}
	s.do(func() {
		if _, err := OpenWireGuard("signet0", 1420); !errors.Is(err, ErrNoWireGuard) {
			t.Errorf("open: %v", err)
		}
	})
}

func TestKernelDevice(t *testing.T) {
	s := newSpace(t)
	needWireGuard(t, s)
	open := func(mtu int) (w *WireGuard) {
		t.Helper()
		s.must(func() (err error) {
			w, err = OpenWireGuard("signet0", mtu)
			return err
		})
		return w
	}
	w := open(1420)
	if out := s.ip("-o -d link show signet0"); !strings.Contains(out, "mtu 1420") || !strings.Contains(out, "wireguard") || !strings.Contains(out, "alias signet") || strings.Contains(out, ",UP") {
		t.Errorf("new device: %s", out)
	}
	for range 2 {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := w.Refused(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("counters after close: %v", err)
	}
	s.ip("link set signet0 up")
	again := open(1400)
	defer again.Close()
	if again.index != w.index {
		t.Errorf("device changed: index %d, then %d", w.index, again.index)
	}
	if up, downs := again.State(); !up || downs != 0 {
		t.Errorf("up %v, downs %d", up, downs)
	}
	if out := s.ip("-o link show signet0"); !strings.Contains(out, "mtu 1400") {
		t.Errorf("adopted device: %s", out)
	}
	s.ip("link set signet0 down")
	s.ip("link set signet0 up")
	awaitState(t, "the flap is seen", func() bool { up, downs := again.State(); return up && downs == 1 })
	if n, err := again.Refused(); n != 0 || err != nil {
		t.Errorf("refused: %d, %v", n, err)
	}
	for _, want := range []bool{true, false} {
		s.do(func() {
			if removed, err := RemoveWireGuard("signet0"); removed != want || err != nil {
				t.Errorf("remove: %v, %v", removed, err)
			}
		})
	}
	select {
	case <-again.Done():
	case <-time.After(5 * time.Second):
		t.Error("the removal was not seen")
	}
}

// awaitState polls a condition of the kernel until it holds.
func awaitState(t *testing.T, what string, ok func() bool) {
	t.Helper()
	limit := time.NewTimer(5 * time.Second)
	defer limit.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-limit.C:
			t.Fatalf("not within 5s: %s", what)
		case <-tick.C:
		}
	}
}

// TestKernelDeviceOfOthers: a device that is not ours is neither taken over nor removed.
func TestKernelDeviceOfOthers(t *testing.T) {
	s := newSpace(t)
	s.ip("link add veth0 type veth peer name veth1")
	s.ip("tuntap add dev tun0 mode tun")
	refused := map[string]error{"veth0": ErrForeign, "tun0": ErrTUN}
	removed := map[string]error{"veth0": nil, "tun0": nil, "nothing0": nil}
	var have error
	s.do(func() { have = ProbeWireGuard() })
	if have == nil {
		s.ip("link add wg0 type wireguard")
		refused["wg0"], removed["wg0"] = ErrForeign, ErrForeign
	}
	s.do(func() {
		for name, want := range refused {
			if _, err := OpenWireGuard(name, 1420); !errors.Is(err, want) {
				t.Errorf("open %s: %v", name, err)
			}
		}
		for name, want := range removed {
			if ok, err := RemoveWireGuard(name); ok || !errors.Is(err, want) {
				t.Errorf("remove %s: %v, %v", name, ok, err)
			}
		}
	})
	out := s.ip("-o link")
	for name := range refused {
		if !strings.Contains(out, name) {
			t.Errorf("%s is gone: %s", name, out)
		}
	}
}
