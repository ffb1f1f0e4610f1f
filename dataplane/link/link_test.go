package link

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func applyUp(s *space, d Spec) func() error {
	return func() error {
		return errors.Join(Apply(s.t.Context(), d), Up(s.t.Context(), d))
	}
}

func TestApply(t *testing.T) {
	h := newHost(t)
	h.must(func() error { return Apply(t.Context(), spec) })
	if out := h.ip("-o link show " + tunnel); strings.Contains(out, "UP") || !strings.Contains(out, "mtu 1400") {
		t.Errorf("after Apply the link is %s", out)
	}
	for _, p := range spec.Overlay {
		if out := h.ip(fmt.Sprintf("%s route show type unreachable %s", familyFlag(p.Addr()), p)); !strings.Contains(out, "metric 4294967295") {
			t.Errorf("no fallback for %s: %q", p, out)
		}
	}
	h.must(func() error { return Up(t.Context(), spec) })
	out := h.ip("-o addr show dev " + tunnel)
	for _, a := range spec.all() {
		want := fmt.Sprintf(" %s/%d scope global", a, a.BitLen())
		if a.Is6() {
			want += " nodad noprefixroute"
		} else {
			want += " noprefixroute"
		}
		if !strings.Contains(out, want) {
			t.Errorf("no %q in %s", want, out)
		}
	}
	if strings.Contains(out, "fe80") {
		t.Errorf("the kernel made a link-local address: %s", out)
	}
	for to, source := range map[string]netip.Addr{"198.19.7.7": spec.Node[0], "fd5e::ffff:fffe": spec.Node[1]} {
		out := h.ip("route get " + to)
		if !strings.Contains(out, "dev "+tunnel) || !strings.Contains(out, fmt.Sprintf("src %s ", source)) {
			t.Errorf("route to %s: %s", to, out)
		}
	}
}

func familyFlag(a netip.Addr) string {
	if a.Is4() {
		return "-4"
	}
	return "-6"
}

// TestApplyTwiceChangesNothing looks at what the kernel announces: after the second round the next change is the
// marker's.
func TestApplyTwiceChangesNothing(t *testing.T) {
	h := newHost(t)
	first := h.watch()
	h.must(applyUp(h, spec))
	for _, a := range spec.all() { // the kernel announces IPv6 addresses late
		await(t, first, a.String(), func(e Event) bool { return e.Kind == AddressChanged && e.Prefix.Addr() == a })
	}
	events := h.watch()
	for range 2 {
		h.must(applyUp(h, spec))
		h.must(func() error { return Prune(t.Context(), spec) })
	}
	h.ip("link add marker type veth peer name marker-far")
	e := await(t, events, "marker", func(Event) bool { return true })
	if out := h.ip("-o link show"); !strings.Contains(out, fmt.Sprintf("\n%d: marker", e.Index)) {
		t.Errorf("a repeated Apply changed something: %+v", e)
	}
}

func TestApplyRepairs(t *testing.T) {
	h := newHost(t)
	h.must(applyUp(h, spec))
	before := state(h)
	for _, damage := range []string{
		"link set " + tunnel + " down", "addr flush dev " + tunnel, "link set " + tunnel + " mtu 1300", "route flush proto 83",
		"-6 route flush proto 83", "route replace 198.18.0.0/15 dev signet0 proto 83 metric 1 src 198.18.0.10",
	} {
		h.ip(damage)
		if state(h) == before {
			t.Errorf("%s did no damage", damage)
		}
		h.must(applyUp(h, spec))
		if now := state(h); now != before {
			t.Errorf("after %s:\n%s\nwant\n%s", damage, now, before)
		}
	}
}

// state is what Apply cares for, in an order that does not depend on the order of changes.
func state(h *space) string {
	var lines []string
	for _, c := range []string{"-o addr show dev " + tunnel, "-4 route show", "-6 route show proto 83", "link show " + tunnel} {
		lines = append(lines, strings.Split(h.ip(c), "\n")...)
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// TestOverlayNeverFallsToTheDefaultRoute tries to connect while the device is down, and when it is gone: the error
// comes at once, and nothing leaves by the default route.
func TestOverlayNeverFallsToTheDefaultRoute(t *testing.T) {
	h := newHost(t)
	h.must(applyUp(h, spec))
	for _, state := range []string{"link set " + tunnel + " down", "link del " + tunnel} {
		h.ip(state)
		for _, to := range []string{"198.18.5.5:80", "[fd5e::5:5]:80"} {
			var err error
			start := time.Now()
			h.do(func() { _, err = net.DialTimeout("tcp", to, 5*time.Second) })
			if !errors.Is(err, unix.EHOSTUNREACH) && !errors.Is(err, unix.ENETUNREACH) {
				t.Errorf("after %s: connect to %s: %v", state, to, err)
			}
			if took := time.Since(start); took > time.Second {
				t.Errorf("after %s: connect to %s took %v", state, to, took)
			}
		}
	}
	if out := h.ip("route get 10.200.0.1"); !strings.Contains(out, "dev under0") {
		t.Errorf("the default route does not work, so the test shows nothing: %s", out)
	}
}

// TestFallbackComesFirst applies without a device: the error names it, and the overlay is closed already.
func TestFallbackComesFirst(t *testing.T) {
	h := newSpace(t)
	h.underlay()
	var err error
	h.do(func() { err = Apply(t.Context(), spec) })
	if !errors.Is(err, ErrNoInterface) {
		t.Errorf("apply: %v", err)
	}
	if out := h.ip("route show type unreachable"); !strings.Contains(out, "198.18.0.0/15") {
		t.Errorf("no fallback: %q", out)
	}
}

func TestPrune(t *testing.T) {
	h := newHost(t)
	h.must(applyUp(h, spec))
	h.ip("addr add 192.0.2.7/24 dev " + tunnel) // somebody else's doing
	h.ip("addr add fe80::7/64 dev " + tunnel)
	less := newSpec()
	less.Addresses = less.Addresses[:1]
	less.Overlay[0] = netip.MustParsePrefix("198.18.0.0/16")
	h.must(applyUp(h, less))
	h.must(func() error { return Prune(t.Context(), less) })
	out := h.ip("-o addr show dev " + tunnel)
	for _, a := range spec.all() {
		if got, want := strings.Contains(out, a.String()+"/"), slices.Contains(less.all(), a); got != want {
			t.Errorf("address %s there: %v, want %v", a, got, want)
		}
	}
	if strings.Contains(out, "192.0.2.7") || strings.Contains(out, "fe80") {
		t.Errorf("foreign addresses stay: %s", out)
	}
	if out := h.ip("route show proto 83"); strings.Contains(out, "/15") || strings.Count(out, "198.18.0.0/16") != 2 {
		t.Errorf("routes: %s", out)
	}
	if out := h.ip("addr show dev under0"); !strings.Contains(out, "10.1.0.1/24") {
		t.Errorf("another interface was touched: %s", out)
	}
}

func TestRelease(t *testing.T) {
	h := newHost(t)
	h.must(applyUp(h, spec))
	foreign := h.ip("route show proto boot") + h.ip("-6 route show proto boot")
	for range 2 {
		h.must(func() error { return Release(t.Context(), spec) })
	}
	if out := h.ip("route show proto 83") + h.ip("-6 route show proto 83") + h.ip("-o addr show dev "+tunnel); strings.TrimSpace(out) != "" {
		t.Errorf("left behind: %s", out)
	}
	if now := h.ip("route show proto boot") + h.ip("-6 route show proto boot"); now != foreign {
		t.Errorf("other routes changed: %s, before %s", now, foreign)
	}
	h.ip("link del " + tunnel)
	h.must(func() error { return Release(t.Context(), spec) })
}

func TestForeignRouteIsNotReplaced(t *testing.T) {
	h := newHost(t)
	h.ip("route add 198.18.0.0/15 dev under0 metric 1")
	var err error
	h.do(func() { err = applyUp(h, spec)() })
	if !errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), "under0") {
		t.Errorf("%v", err)
	}
	if out := h.ip("route show 198.18.0.0/15 metric 1"); !strings.Contains(out, "dev under0") {
		t.Errorf("the route was replaced: %s", out)
	}
}

func TestNoPermission(t *testing.T) {
	h := newHost(t)
	var err error
	h.do(func() { // the thread ends with this, and its lack of capabilities too
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		if err = unix.Capset(&header, &none[0]); err == nil {
			err = Apply(t.Context(), spec)
		}
	})
	if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "CAP_NET_ADMIN") {
		t.Errorf("%v", err)
	}
}

func TestWithoutIPv6OnTheHost(t *testing.T) {
	h := newHost(t)
	h.must(func() error { return writeSysctl("default", "disable_ipv6", "1") })
	h.ip("link del " + tunnel)
	h.ip("tuntap add dev " + tunnel + " mode tun")
	h.must(applyUp(h, spec))
	if out := h.ip("-o addr show dev " + tunnel); !strings.Contains(out, "fd5e::10/128") {
		t.Errorf("no IPv6 on our own interface: %s", out)
	}
}

func TestRefusesSpecs(t *testing.T) {
	for name, change := range map[string]func(*Spec){
		"all interfaces":   func(s *Spec) { s.Interface = "all" },
		"default":          func(s *Spec) { s.Interface = "default" },
		"path":             func(s *Spec) { s.Interface = "../all" },
		"loopback":         func(s *Spec) { s.Interface = "lo" },
		"no name":          func(s *Spec) { s.Interface = "" },
		"MTU":              func(s *Spec) { s.MTU = 1000 },
		"default route":    func(s *Spec) { s.Overlay = append(s.Overlay, netip.MustParsePrefix("0.0.0.0/0")) },
		"host bits":        func(s *Spec) { s.Overlay[0] = netip.MustParsePrefix("198.18.0.1/15") },
		"no prefix":        func(s *Spec) { s.Overlay[0] = netip.Prefix{} },
		"outside":          func(s *Spec) { s.Addresses = append(s.Addresses, netip.MustParseAddr("10.0.0.1")) },
		"zone":             func(s *Spec) { s.Addresses = append(s.Addresses, netip.MustParseAddr("fd5e::7%x")) },
		"two of a family":  func(s *Spec) { s.Node = []netip.Addr{s.Node[0], s.Addresses[0]} },
		"no address":       func(s *Spec) { s.Addresses = append(s.Addresses, netip.Addr{}) },
		"many":             func(s *Spec) { s.Addresses = make([]netip.Addr, maxAddresses+1) },
		"many prefixes":    func(s *Spec) { s.Overlay = make([]netip.Prefix, maxOverlay+1) },
		"name is too long": func(s *Spec) { s.Interface = "sixteen-letters-" },
	} {
		bad := newSpec()
		change(&bad)
		for _, f := range []func() error{
			func() error { return Apply(t.Context(), bad) }, func() error { return Up(t.Context(), bad) }, func() error { return Prune(t.Context(), bad) },
		} {
			if err := f(); !errors.Is(err, ErrSpec) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}
