package link

import (
	"strings"
	"testing"
)

// differences reads them inside the namespace.
func (s *space) differences() (out []string) {
	s.t.Helper()
	s.must(func() (err error) {
		out, err = Differences(s.t.Context(), spec)
		return err
	})
	return out
}

// TestDifferences: each damage is named, and nothing else; Apply, Up and Prune leave none.
func TestDifferences(t *testing.T) {
	h := newHost(t)
	mend := func() {
		h.must(applyUp(h, spec))
		h.must(func() error { return Prune(t.Context(), spec) })
		if left := h.differences(); len(left) > 0 {
			t.Fatalf("nothing is wrong, and told are %q", left)
		}
	}
	mend()
	for _, c := range []struct {
		damage []string
		says   []string
	}{
		{[]string{"link set " + tunnel + " down"}, []string{
			tunnel + " was set down", "the route 198.18.0.0/15 through signet0 in table 254 is gone", "the route fd5e::/48 through signet0 in table 254 is gone"}},
		{[]string{"link set " + tunnel + " mtu 1300"}, []string{"MTU of signet0 was set to 1300"}},
		{[]string{"addr del 198.18.0.10/32 dev " + tunnel}, []string{"address 198.18.0.10 of signet0 is gone"}},
		{[]string{"addr add 192.0.2.7/24 dev " + tunnel}, []string{"address 192.0.2.7/24 was added to signet0"}},
		{[]string{"route del unreachable 198.18.0.0/15 metric 4294967295"}, []string{"the denying route 198.18.0.0/15 in table 254 is gone"}},
		{[]string{"-6 route del fd5e::/48 dev signet0"}, []string{"the route fd5e::/48 through signet0 in table 254 is gone"}},
		{[]string{"route replace 198.18.0.0/15 dev signet0 proto 83 metric 1 src 198.18.0.10"}, []string{"was changed to the route 198.18.0.0/15 through signet0"}},
	} {
		for _, d := range c.damage {
			h.ip(d)
		}
		told := h.differences()
		if len(told) != len(c.says) {
			t.Errorf("after %q: %q", c.damage, told)
		}
		for i, says := range c.says[:min(len(c.says), len(told))] {
			if !strings.Contains(told[i], says) {
				t.Errorf("after %q: %q, want %q", c.damage, told[i], says)
			}
		}
		mend()
	}
	// Somebody else's route in the place of ours is named with who made it; it is not ours to remove.
	h.ip("route del 198.18.0.0/15 dev signet0")
	h.ip("route add 198.18.0.0/15 dev under0 metric 1 proto static")
	told := strings.Join(h.differences(), "; ")
	if !strings.Contains(told, "in its place is the route 198.18.0.0/15 through under0 in table 254, made by an administrator") {
		t.Errorf("told %q", told)
	}
	h.ip("route del 198.18.0.0/15 dev under0 metric 1")
	h.ip("link del " + tunnel)
	if told := h.differences(); len(told) != 1 || told[0] != "device signet0 is gone" {
		t.Errorf("without the device: %q", told)
	}
}
