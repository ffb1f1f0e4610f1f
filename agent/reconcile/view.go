package reconcile

import (
	"maps"
	"net/netip"
	"time"

	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/internal/policy"
)

// OnLeaseEnd is the agent's key on_lease_end: what happens when no coordinator was heard for the whole lease.
type OnLeaseEnd string

// What the key can say.
const (
	DenyAll OnLeaseEnd = "deny-all"
	// DenyNew lets live flows go on until the Binding of their peer ends: a Binding is never stretched for it.
	DenyNew OnLeaseEnd = "deny-new"
	// Static lets everything go on for StaticGrace more, Bindings included, then denies all.
	Static OnLeaseEnd = "static"
)

// StaticGrace is how much longer on_lease_end: static believes what it holds.
const StaticGrace = 7 * 24 * time.Hour

// Node statuses that get neither workloads nor peers, whatever else a snapshot says.
const (
	statusPending = "pending"
	statusRevoked = "revoked"
)

// Shut reports whether the node's standing lets nothing through.
func Shut(self mesh.Self) bool { return self.Status == statusPending || self.Status == statusRevoked }

func (o OnLeaseEnd) grace() time.Duration {
	if o == Static {
		return StaticGrace
	}
	return 0
}

func (o OnLeaseEnd) lease(ends time.Time) policy.Lease {
	l := policy.Lease{Ends: ends.Add(o.grace()), Mode: policy.LeaseDenyAll}
	if o == DenyNew {
		l.Mode = policy.LeaseDenyNew
	}
	return l
}

// BuildView says what the judge must know, and changes nothing. In order, because an address has one owner:
//
//  1. the host's own addresses: the node's and its workloads', marked Local;
//  2. the addresses of Bindings that are valid at now, each with its end;
//  3. tombstones, where nothing above claims the address.
//
// A pending or revoked node has its own node address and nothing else.
func BuildView(s *mesh.Snapshot, locals map[policy.LocalKey]identity.Number, mode OnLeaseEnd, now time.Time) *policy.View {
	v := &policy.View{Overlay4: s.Self.Overlay4, Overlay6: s.Self.Overlay6, Revision: s.Manifest.PolicyRevision,
		Lease: mode.lease(s.Manifest.LeaseEnds), Addresses: map[netip.Addr]policy.Address{},
		Locals: map[policy.LocalKey]identity.Number{}, Rulesets: map[identity.Number]policy.Ruleset{}}
	// 1.
	own := func(n identity.Number, addrs []netip.Addr) {
		for _, a := range addrs {
			v.Addresses[a] = policy.Address{Number: n, Local: true}
		}
	}
	own(s.Self.Number, s.Self.Addresses)
	if Shut(s.Self) {
		return v
	}
	numbers := map[identity.Number]bool{}
	for _, w := range s.Workloads {
		own(w.Number, w.Addresses)
		numbers[w.Number] = true
	}
	// 2.
	for _, b := range usable(s, mode, now) {
		for _, a := range b.Addresses {
			if _, taken := v.Addresses[a]; !taken {
				v.Addresses[a] = policy.Address{Number: b.Number, NotAfter: b.NotAfter}
			}
		}
	}
	// 3.
	for a, n := range s.Revoked {
		if _, taken := v.Addresses[a]; !taken && v.InOverlay(a) {
			v.Addresses[a] = policy.Address{Number: n, Revoked: true}
		}
	}
	for k, n := range locals {
		// attest may still answer for a workload that the snapshot has just taken away.
		if numbers[n] {
			v.Locals[k] = n
		}
	}
	maps.Copy(v.Rulesets, s.Rulesets)
	return v
}

// Empty is the View that denies everything in the overlay: nobody has an address, and the lease ended in 1970. (The zero
// time could be read as no end at all.)
func Empty(overlay4, overlay6 netip.Prefix) *policy.View {
	return &policy.View{Overlay4: overlay4, Overlay6: overlay6, Lease: policy.Lease{Ends: time.Unix(1, 0), Mode: policy.LeaseDenyAll}}
}

// usable returns the Bindings that count at now, stretched by the grace of mode, without those that contradict others.
func usable(s *mesh.Snapshot, mode OnLeaseEnd, now time.Time) []mesh.Binding {
	valid := make([]mesh.Binding, 0, len(s.Bindings))
	for _, b := range s.Bindings {
		b.NotAfter = b.NotAfter.Add(mode.grace())
		if b.Valid(now) {
			valid = append(valid, b)
		}
	}
	_, rejected := mesh.Peers(valid, nil, now)
	if len(rejected) == 0 {
		return valid
	}
	bad := map[string]bool{}
	for _, b := range rejected {
		bad[name(b)] = true
	}
	kept := valid[:0]
	for _, b := range valid {
		if !bad[name(b)] {
			kept = append(kept, b)
		}
	}
	return kept
}

func name(b mesh.Binding) string { return b.Number.String() + "/" + b.Node }

// nextChange is when the same inputs will first give another View, or the same one another meaning: a Binding, a rule's
// window or the lease begins or ends. The zero time means never.
func nextChange(s *mesh.Snapshot, mode OnLeaseEnd, now time.Time) time.Time {
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
	for _, rules := range s.Rulesets {
		for _, v := range rules {
			for _, slot := range [...]policy.Slot{v.Allow, v.Deny} {
				consider(slot.NotBefore)
				consider(slot.NotAfter)
			}
		}
	}
	return first
}

// sameView compares all but the generation, which belongs to the enforcer.
func sameView(a, b *policy.View) bool {
	return a != nil && b != nil && a.Overlay4 == b.Overlay4 && a.Overlay6 == b.Overlay6 && a.Revision == b.Revision &&
		a.Lease.Mode == b.Lease.Mode && a.Lease.Ends.Equal(b.Lease.Ends) &&
		maps.EqualFunc(a.Addresses, b.Addresses, func(x, y policy.Address) bool {
			return x.Number == y.Number && x.Local == y.Local && x.Revoked == y.Revoked && x.NotAfter.Equal(y.NotAfter)
		}) &&
		maps.Equal(a.Locals, b.Locals) && maps.EqualFunc(a.Rulesets, b.Rulesets, sameRuleset)
}

func sameRuleset(a, b policy.Ruleset) bool {
	slot := func(x, y policy.Slot) bool {
		return x.Rule == y.Rule && x.NotBefore.Equal(y.NotBefore) && x.NotAfter.Equal(y.NotAfter)
	}
	return maps.EqualFunc(a, b, func(x, y policy.Value) bool { return slot(x.Allow, y.Allow) && slot(x.Deny, y.Deny) })
}
