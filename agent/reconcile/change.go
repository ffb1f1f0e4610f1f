package reconcile

import (
	"maps"
	"reflect"
	"slices"
	"time"

	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/internal/policy"
)

// turns keeps, for each ruleset of the last snapshot that was looked at, when its rules begin and end. Rulesets are never
// changed and are shared between snapshots, so that a large one is read once. What the last snapshot does not have is
// forgotten: there are at most policy.MaxRulesets.
type turns struct{ of map[identity.Number]turn }

type turn struct {
	rules policy.Ruleset
	times []time.Time // each once, growing
}

// nextChange is when the same inputs will first give another View, or the same one another meaning: a Binding, a rule's
// window or the lease begins or ends. The zero time means never.
func (t *turns) nextChange(s *mesh.Snapshot, mode OnLeaseEnd, now time.Time) time.Time {
	var first time.Time
	consider := func(t time.Time) {
		if t.After(now) && (first.IsZero() || t.Before(first)) {
			first = t
		}
	}
	consider(s.Manifest.LeaseEnds.Add(mode.grace()))
	for _, b := range s.Bindings {
		consider(b.NotBefore)
		consider(b.NotAfter.Add(mode.grace()))
	}
	t.keep(s.Rulesets)
	for _, turn := range t.of {
		after, found := slices.BinarySearchFunc(turn.times, now, time.Time.Compare)
		if found {
			after++
		}
		if after < len(turn.times) {
			consider(turn.times[after])
		}
	}
	return first
}

// keep makes t that of exactly these rulesets.
func (t *turns) keep(rulesets map[identity.Number]policy.Ruleset) {
	if t.of == nil {
		t.of = map[identity.Number]turn{}
	}
	maps.DeleteFunc(t.of, func(n identity.Number, have turn) bool {
		rules, ok := rulesets[n]
		return !ok || !identical(rules, have.rules)
	})
	for n, rules := range rulesets {
		if _, ok := t.of[n]; !ok {
			t.of[n] = turn{rules, times(rules)}
		}
	}
}

// times lists when rules begin and end.
func times(rules policy.Ruleset) []time.Time {
	// By the instant: equal times can differ in their zones.
	seen := map[int64]time.Time{}
	for _, v := range rules {
		for _, slot := range [...]policy.Slot{v.Allow, v.Deny, v.Audit} {
			for _, at := range [...]time.Time{slot.NotBefore, slot.NotAfter} {
				if !at.IsZero() {
					seen[at.UnixNano()] = at
				}
			}
		}
	}
	return slices.SortedFunc(maps.Values(seen), time.Time.Compare)
}

// identical reports whether two rulesets are one and the same, which is known without reading them.
func identical(a, b policy.Ruleset) bool {
	return reflect.ValueOf(a).UnsafePointer() == reflect.ValueOf(b).UnsafePointer()
}

// sameView compares all but the generation, which belongs to the enforcer.
func sameView(a, b *policy.View) bool {
	return a != nil && b != nil && a.Overlay4 == b.Overlay4 && a.Overlay6 == b.Overlay6 && a.Revision == b.Revision &&
		a.Lease.Mode == b.Lease.Mode && a.Lease.Ends.Equal(b.Lease.Ends) &&
		maps.EqualFunc(a.Addresses, b.Addresses, func(x, y policy.Address) bool {
			return x.Number == y.Number && x.Local == y.Local && x.Revoked == y.Revoked && x.NotAfter.Equal(y.NotAfter)
		}) &&
		maps.Equal(a.Locals, b.Locals) && maps.Equal(a.Traits, b.Traits) && maps.Equal(a.Interfaces, b.Interfaces) &&
		maps.EqualFunc(a.Rulesets, b.Rulesets, sameRuleset)
}

func sameRuleset(a, b policy.Ruleset) bool {
	if identical(a, b) {
		return true
	}
	slot := func(x, y policy.Slot) bool {
		return x.Rule == y.Rule && x.NotBefore.Equal(y.NotBefore) && x.NotAfter.Equal(y.NotAfter) && x.Audit == y.Audit
	}
	return maps.EqualFunc(a, b, func(x, y policy.Value) bool {
		return slot(x.Allow, y.Allow) && slot(x.Deny, y.Deny) && slot(x.Audit, y.Audit)
	})
}
