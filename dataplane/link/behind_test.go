package link

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
)

// legTo makes a device in s whose other end is in another namespace.
func (s *space) legTo(name string, other *space) int {
	s.t.Helper()
	s.ip(fmt.Sprintf("link add %s type veth peer name far0 netns /proc/%d/fd/%d", name, os.Getpid(), other.fd))
	other.ip("link set far0 up")
	var index int
	s.must(func() error {
		i, err := net.InterfaceByName(name)
		if err == nil {
			index = i.Index
		}
		return err
	})
	return index
}

func TestLegs(t *testing.T) {
	h, box := newHost(t), newSpace(t)
	index := h.legTo("leg0", box)
	h.ip("link add br0 type bridge")
	h.ip("link add port0 type veth peer name port0-far")
	h.ip("link set port0 master br0")
	var legs []Leg
	number, none, own := NoSpace, 0, 0
	h.must(func() (err error) {
		if legs, err = Legs(); err != nil {
			return err
		}
		if number, err = SpaceOf(box.fd); err != nil {
			return err
		}
		if none, err = SpaceOf(newSpace(t).fd); err != nil {
			return err
		}
		own, err = SpaceOf(h.fd)
		return err
	})
	if number == NoSpace || none != NoSpace || own != NoSpace {
		t.Errorf("the namespace behind leg0 has number %d, one that nothing leads to %d, the own one %d", number, none, own)
	}
	find := func(name string) Leg {
		i := slices.IndexFunc(legs, func(l Leg) bool { return l.Name == name })
		if i < 0 {
			t.Fatalf("no device %s in %+v", name, legs)
		}
		return legs[i]
	}
	if l := find("leg0"); l.Index != index || l.Kind != "veth" || l.Space != number || l.Default || l.Master != "" {
		t.Errorf("leg0 is %+v", l)
	}
	if l := find("port0"); l.Space != NoSpace || l.Master != "br0" {
		t.Errorf("port0 is %+v", l)
	}
	if l := find("under0"); !l.Default || l.Space != NoSpace {
		t.Errorf("under0 is %+v", l)
	}
	if l := find("lo"); !l.Loopback {
		t.Errorf("lo is %+v", l)
	}
}

func TestBehind(t *testing.T) {
	h, box := newHost(t), newSpace(t)
	index := h.legTo("leg0", box)
	s := newSpec()
	v4, v6 := netip.MustParseAddr("198.18.0.77"), netip.MustParseAddr("fd5e::77")
	s.Behind = map[netip.Addr]int{v4: index, v6: index}
	apply := func(s Spec) {
		t.Helper()
		h.must(applyUp(h, s))
		h.must(func() error { return Prune(t.Context(), s) })
		h.must(func() error {
			if told, err := Differences(t.Context(), s); err != nil || len(told) > 0 {
				return fmt.Errorf("differences %q, %w", told, err)
			}
			return nil
		})
	}
	routes := func() string { return h.ip("route show dev leg0") + h.ip("-6 route show dev leg0 proto 83") }
	// A device that is down has no route yet, and one that is up has.
	apply(s)
	if got := routes(); strings.Contains(got, "198.18.0.77") {
		t.Errorf("a device that is down has %q", got)
	}
	h.ip("link set leg0 up")
	apply(s)
	for _, want := range []string{"198.18.0.77 proto 83 scope link src 198.18.0.1 metric 1", "fd5e::77 src fd5e::1 metric 1"} {
		if got := routes(); !strings.Contains(got, want) {
			t.Errorf("no %q in %q", want, got)
		}
	}
	if out := h.ip("-o addr show dev " + tunnel); strings.Contains(out, "198.18.0.77") || strings.Contains(out, "fd5e::77") {
		t.Errorf("the tunnel device has addresses that are behind another: %s", out)
	}
	if out := h.ip("route get 198.18.0.78"); !strings.Contains(out, "dev "+tunnel) {
		t.Errorf("its neighbour goes to %s", out)
	}
	// What stands in its place is told, and put right where it is ours.
	h.ip("route replace 198.18.0.77 dev under0 proto 83 metric 1")
	h.must(func() error {
		told, err := Differences(t.Context(), s)
		if err != nil || len(told) != 1 || !strings.Contains(told[0], "was changed to the route 198.18.0.77/32 through under0") {
			return fmt.Errorf("differences %q, %w", told, err)
		}
		return nil
	})
	apply(s)
	// Without it the route goes, and only ours.
	h.ip("route add 198.18.0.99 dev leg0 proto 4")
	s.Behind = nil
	apply(s)
	if got := routes(); strings.Contains(got, "198.18.0.77") || strings.Contains(got, "fd5e::77") || !strings.Contains(got, "198.18.0.99") {
		t.Errorf("afterwards there are %q", got)
	}
	// A device that is gone is no error.
	s.Behind = map[netip.Addr]int{v4: index}
	h.ip("link del leg0")
	apply(s)
}

func TestBehindIsRefused(t *testing.T) {
	h, box := newHost(t), newSpace(t)
	index := h.legTo("leg0", box)
	h.ip("link set leg0 up")
	for name, behind := range map[string]map[netip.Addr]int{
		"outside the overlay": {netip.MustParseAddr("192.0.2.1"): index},
		"no device":           {netip.MustParseAddr("198.18.0.77"): 0},
		"the host's own":      {spec.Addresses[0]: index},
		"the node's":          {spec.Node[0]: index},
	} {
		s := newSpec()
		s.Behind = behind
		h.must(func() error {
			if err := Apply(t.Context(), s); !errors.Is(err, ErrSpec) {
				return fmt.Errorf("%s: %w", name, err)
			}
			return nil
		})
	}
	// Somebody else's route is theirs.
	s := newSpec()
	s.Behind = map[netip.Addr]int{netip.MustParseAddr("198.18.0.77"): index}
	h.ip("route add 198.18.0.77 dev under0 proto static metric 1")
	h.must(func() error {
		if err := Apply(t.Context(), s); !errors.Is(err, ErrConflict) {
			return fmt.Errorf("another's route: %w", err)
		}
		return nil
	})
}

func TestForwarding(t *testing.T) {
	h := newSpace(t)
	var got []string
	for _, c := range []struct {
		v4, v6 string
		want   int
	}{{"0", "0", 2}, {"1", "0", 1}, {"0", "1", 1}, {"1", "1", 0}} {
		h.must(func() error {
			err := errors.Join(os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte(c.v4), 0), os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte(c.v6), 0))
			got = Forwarding()
			return err
		})
		if len(got) != c.want {
			t.Errorf("with %s and %s it names %q", c.v4, c.v6, got)
		}
	}
}
