package policy

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
)

func TestParseService(t *testing.T) {
	for text, want := range map[string]Service{
		"any":           {},
		"icmp":          {Proto: flow.ICMP},
		"tcp":           {Proto: flow.TCP},
		"udp":           {Proto: flow.UDP},
		"tcp/1":         {flow.TCP, 1, 1},
		"udp/65535":     {flow.UDP, 65535, 65535},
		"tcp/1-65535":   {flow.TCP, 1, 65535},
		"udp/5000-5010": {flow.UDP, 5000, 5010},
	} {
		got, err := ParseService(text)
		if err != nil || got != want || got.String() != text {
			t.Errorf("%q: got %+v (%v), %v", text, got, got, err)
		}
		var back Service
		if b, err := got.MarshalText(); err != nil || back.UnmarshalText(b) != nil || back != got {
			t.Errorf("%q reads back as %v, %v", text, back, err)
		}
	}
}

func TestParseServiceRefuses(t *testing.T) {
	for _, text := range []string{
		"", "TCP/1", "tcp/", "tcp/0", "tcp/65536", "tcp/-1", "tcp/+1", "tcp/01", "tcp/1-", "tcp/-", "tcp/2-1", "tcp/0-5", "tcp/1-65536", "tcp/1-2-3",
		"tcp/1/2", "tcp /1", "tcp/1 ", "any/1", "any/", "icmp/8", "icmp/", "icmpv6", "sctp/0", "dccp/1", "6/80", "tcp/http", "tcp/*",
	} {
		if s, err := ParseService(text); !errors.Is(err, ErrService) || s != (Service{}) {
			t.Errorf("%q: got %v, %v", text, s, err)
		}
	}
}

func FuzzParseService(f *testing.F) {
	f.Add("tcp/1-2")
	f.Fuzz(func(t *testing.T, text string) {
		s, err := ParseService(text)
		if err != nil {
			return
		}
		if back, err := ParseService(s.String()); err != nil || back != s {
			t.Fatalf("%q: %v reads back as %v, %v", text, s, back, err)
		}
	})
}

// TestSlotActive: the zero Slot is absent, NotAfter is too late.
func TestSlotActive(t *testing.T) {
	now := time.Date(2027, 1, 31, 0, 0, 0, 0, time.UTC)
	for _, row := range []struct {
		slot Slot
		want bool
	}{
		{Slot{}, false},
		{Slot{NotBefore: now.Add(-1), NotAfter: now.Add(1)}, false},
		{Slot{Rule: 1}, true},
		{Slot{Rule: 1, NotAfter: now}, false},
		{Slot{Rule: 1, NotAfter: now.Add(1)}, true},
		{Slot{Rule: 1, NotBefore: now}, true},
		{Slot{Rule: 1, NotBefore: now.Add(1)}, false},
	} {
		if got := row.slot.Active(now); got != row.want {
			t.Errorf("%+v: %v", row.slot, got)
		}
	}
}

func TestViewValidate(t *testing.T) {
	good := func() *View {
		return &View{
			Overlay4: netip.MustParsePrefix("198.18.0.0/15"), Overlay6: netip.MustParsePrefix("fd00::/48"),
			Addresses: map[netip.Addr]Address{netip.MustParseAddr("198.19.255.255"): {Number: 300}, netip.MustParseAddr("fd00::1"): {Number: 300}},
			Rulesets:  map[identity.Number]Ruleset{300: {{Peer: 301, Proto: flow.TCP, Port: 80}: {Allow: Slot{Rule: 1}}}},
		}
	}
	if err := good().Validate(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(v *View){
		"no prefixes":          func(v *View) { v.Overlay4 = netip.Prefix{} },
		"prefixes exchanged":   func(v *View) { v.Overlay4, v.Overlay6 = v.Overlay6, v.Overlay4 },
		"address outside":      func(v *View) { v.Addresses[netip.MustParseAddr("192.0.2.1")] = Address{Number: 300} },
		"mapped address":       func(v *View) { v.Addresses[netip.MustParseAddr("::ffff:198.18.0.1")] = Address{Number: 300} },
		"port without proto":   func(v *View) { v.Rulesets[300][Key{Peer: 301, Port: 80}] = Value{Allow: Slot{Rule: 1}} },
		"entry without a rule": func(v *View) { v.Rulesets[300][Key{Peer: 302}] = Value{} },
		"too many rulesets": func(v *View) {
			for i := range MaxRulesets {
				v.Rulesets[identity.Number(1000+i)] = nil
			}
		},
		"too many selectors": func(v *View) {
			v.Locals = map[LocalKey]identity.Number{}
			for i := range MaxLocals + 1 {
				v.Locals[LocalKey{Cgroup: uint64(i)}] = 300
			}
		},
	} {
		v := good()
		change(v)
		if err := v.Validate(); !errors.Is(err, ErrView) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestNames(t *testing.T) {
	if (Action(0)).String() != "deny" || ActionAllow.String() != "allow" || Egress.String() != "egress" || Ingress.String() != "ingress" {
		t.Error("the names of actions or directions have changed; records depend on them")
	}
}
