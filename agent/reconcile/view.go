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
// locals and interfaces are what attest found; of them only what belongs to the snapshot's own workloads counts. A
// pending or revoked node has its own node address and nothing else. The View shares the snapshot's rulesets.
func BuildView(s *mesh.Snapshot, locals map[policy.LocalKey]identity.Number, interfaces map[uint32]identity.Number, mode OnLeaseEnd,
	now time.Time) *policy.View {
	v := &policy.View{Overlay4: s.Self.Overlay4, Overlay6: s.Self.Overlay6, Revision: s.Manifest.PolicyRevision,
		Lease: mode.lease(s.Manifest.LeaseEnds), Addresses: map[netip.Addr]policy.Address{},
		Locals: map[policy.LocalKey]identity.Number{}, Rulesets: map[identity.Number]policy.Ruleset{},
		Traits: map[identity.Number]policy.Traits{}, Interfaces: map[uint32]identity.Number{}}
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
		if w.Traits != (policy.Traits{}) {
			v.Traits[w.Number] = w.Traits
		}
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
	for index, n := range interfaces {
		if numbers[n] {
			v.Interfaces[index] = n
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
