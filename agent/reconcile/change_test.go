package reconcile

import (
	"maps"
	"net/netip"
	"testing"
	"time"

	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/internal/policy"
)

var noon = time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)

func at(hours int) time.Time { return noon.Add(time.Duration(hours) * time.Hour) }

// TestNextChange: every slot's ends count, once they lie ahead.
func TestNextChange(t *testing.T) {
	s := &mesh.Snapshot{Manifest: mesh.Manifest{LeaseEnds: at(9)}, Rulesets: map[identity.Number]policy.Ruleset{
		300: {
			{Peer: 301}: {Allow: policy.Slot{Rule: 1, NotBefore: at(1), NotAfter: at(8), Audit: true}},
			{Peer: 302}: {Deny: policy.Slot{Rule: 2, NotAfter: at(4)}, Audit: policy.Slot{Rule: 3, NotAfter: at(2)}},
			{Peer: 303}: {Deny: policy.Slot{Rule: 2, NotAfter: at(4).In(time.FixedZone("", 3600))}},
		},
		301: {{Peer: 300}: {Audit: policy.Slot{Rule: 4, NotBefore: at(3), NotAfter: at(10)}}},
	}}
	var kept turns
	for hours, want := range map[int]int{-5: 1, 0: 1, 1: 2, 2: 3, 3: 4, 4: 8, 7: 8, 8: 9, 9: 10} {
		if got := kept.nextChange(s, DenyAll, at(hours)); !got.Equal(at(want)) {
			t.Errorf("at hour %d: %v, expected hour %d", hours, got, want)
		}
	}
	if got := kept.nextChange(s, DenyAll, at(10)); !got.IsZero() {
		t.Errorf("at the end: %v", got)
	}
	if n := len(kept.of[300].times); n != 4 {
		t.Errorf("%d times are kept of the first ruleset, expected each once", n)
	}
}

// TestNextChangeReadsARulesetOnce: one that is shared is not read again, and one that is gone is forgotten.
func TestNextChangeReadsARulesetOnce(t *testing.T) {
	rules := policy.Ruleset{{Peer: 301}: {Allow: policy.Slot{Rule: 1, NotAfter: at(1)}}}
	s := &mesh.Snapshot{Manifest: mesh.Manifest{LeaseEnds: at(9)}, Rulesets: map[identity.Number]policy.Ruleset{300: rules}}
	var kept turns
	kept.nextChange(s, DenyAll, noon)
	large := policy.Ruleset{}
	for i := range 100_000 {
		large[policy.Key{Peer: identity.Number(i + 300)}] = policy.Value{Allow: policy.Slot{Rule: 1, NotAfter: at(2)}}
	}
	next := &mesh.Snapshot{Manifest: s.Manifest, Rulesets: map[identity.Number]policy.Ruleset{300: rules, 301: large}}
	if got := kept.nextChange(next, DenyAll, at(1)); !got.Equal(at(2)) {
		t.Errorf("got %v", got)
	}
	if n := testing.AllocsPerRun(10, func() { kept.nextChange(next, DenyAll, at(1)) }); n > 20 {
		t.Errorf("%v allocations for what was read already", n)
	}
	before := &kept.of[301].times[0]
	kept.nextChange(next, DenyAll, at(1))
	if before != &kept.of[301].times[0] {
		t.Error("the ruleset was read again")
	}
	// Equal content in another map is another ruleset.
	next.Rulesets = map[identity.Number]policy.Ruleset{301: maps.Clone(large)}
	kept.nextChange(next, DenyAll, at(1))
	if len(kept.of) != 1 || before == &kept.of[301].times[0] {
		t.Errorf("%d rulesets are kept", len(kept.of))
	}
}

// TestSameView: every field counts but the generation, and rulesets are compared by what they say.
func TestSameView(t *testing.T) {
	k := policy.Key{Peer: 301, Proto: 6, Port: 1024, Bits: 6}
	slot := policy.Slot{Rule: 1, NotAfter: at(1)}
	view := func(change func(*policy.View)) *policy.View {
		v := &policy.View{Overlay4: netip.MustParsePrefix("198.18.0.0/15"), Overlay6: netip.MustParsePrefix("fd00::/48"),
			Addresses:  map[netip.Addr]policy.Address{netip.MustParseAddr("198.18.0.1"): {Number: 300}},
			Locals:     map[policy.LocalKey]identity.Number{{Cgroup: 1}: 300},
			Rulesets:   map[identity.Number]policy.Ruleset{300: {k: {Allow: slot, Deny: slot, Audit: slot}}},
			Traits:     map[identity.Number]policy.Traits{300: {Confined: true}},
			Interfaces: map[uint32]identity.Number{7: 300}}
		change(v)
		return v
	}
	value := func(v policy.Value) func(*policy.View) {
		return func(w *policy.View) { w.Rulesets[300][k] = v }
	}
	audit := slot
	audit.Audit = true
	same := view(func(*policy.View) {})
	for name, c := range map[string]struct {
		change func(*policy.View)
		want   bool
	}{
		"nothing":         {func(*policy.View) {}, true},
		"generation":      {func(v *policy.View) { v.Generation++ }, true},
		"shared ruleset":  {func(v *policy.View) { v.Rulesets = maps.Clone(same.Rulesets) }, true},
		"revision":        {func(v *policy.View) { v.Revision++ }, false},
		"a trait":         {func(v *policy.View) { v.Traits[300] = policy.Traits{OverlayOnly: true} }, false},
		"no traits":       {func(v *policy.View) { v.Traits = nil }, false},
		"a device":        {func(v *policy.View) { v.Interfaces[8] = 300 }, false},
		"a device's":      {func(v *policy.View) { v.Interfaces[7] = 301 }, false},
		"audit of allow":  {value(policy.Value{Allow: audit, Deny: slot, Audit: slot}), false},
		"no audit rule":   {value(policy.Value{Allow: slot, Deny: slot}), false},
		"audit, not deny": {value(policy.Value{Allow: slot, Audit: slot}), false},
		"bits": {func(v *policy.View) {
			v.Rulesets[300] = policy.Ruleset{{Peer: 301, Proto: 6, Port: 1024, Bits: 7}: {Allow: slot, Deny: slot, Audit: slot}}
		}, false},
		"one ruleset more": {func(v *policy.View) { v.Rulesets[301] = nil }, false},
	} {
		if got := sameView(same, view(c.change)); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
