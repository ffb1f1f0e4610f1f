package policy

import (
	"net/netip"
	"time"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
)

// Answer is what one ruleset says of a flow.
type Answer struct {
	Verdict flow.Verdict
	Reason  flow.Reason
	Rule    uint32 // that decided; with verdict Audit, the one that would have denied
	Under   uint32 // the rule that lets the flow pass; 0 where it is denied
}

// probes are the Keys that a flow is looked up by, the most specific first.
func (rs Ruleset) probes(peer identity.Number, dir Direction, t flow.Tuple) []Key {
	k := Key{Peer: peer, Dir: dir, Proto: t.Proto.Policy(), Port: t.Dst.Port()}
	if k.Proto == flow.ICMP {
		k.Port = 0
	}
	out := []Key{k}
	if k.Port != 0 {
		for bits := uint8(MaxRangeBits); bits > 0; bits-- {
			if r := k.InRange(bits); rs[r].Present() {
				out = append(out, r)
			}
		}
	}
	k.Port = 0
	return append(out, k, Key{Peer: peer, Dir: dir})
}

// Lookup asks one workload's ruleset about a flow: every probe is made, deny counts before allow, and among those the
// most specific wins. An allow outside its time gives EXPIRED, and passes on record when it is in mode audit; so does
// what only a deny in mode audit forbids.
func (v *View) Lookup(own, peer identity.Number, dir Direction, t flow.Tuple, now time.Time) Answer {
	rs := v.Rulesets[own]
	var allow, lenient, stale Slot
	var audit uint32
	for _, k := range rs.probes(peer, dir, t) {
		val := rs[k]
		if val.Deny.Active(now) {
			return Answer{Reason: flow.PolicyDeny, Rule: val.Deny.Rule}
		}
		if audit == 0 && val.Audit.Active(now) {
			audit = val.Audit.Rule
		}
		switch {
		case !val.Allow.Present():
		case val.Allow.Active(now):
			allow = first(allow, val.Allow)
		case val.Allow.Audit:
			lenient = first(lenient, val.Allow)
		default:
			stale = first(stale, val.Allow)
		}
	}
	a := Answer{Reason: flow.NoRule}
	switch {
	case allow.Present():
		a = Answer{Verdict: flow.Allow, Reason: flow.PolicyAllow, Rule: allow.Rule, Under: allow.Rule}
	case lenient.Present():
		a = Answer{Verdict: flow.Audit, Reason: flow.Expired, Rule: lenient.Rule, Under: lenient.Rule}
	case stale.Present():
		return Answer{Reason: flow.Expired, Rule: stale.Rule}
	}
	if audit != 0 && a.Verdict != flow.Deny {
		a.Verdict, a.Reason, a.Rule = flow.Audit, flow.PolicyDeny, audit
	}
	return a
}

func first(a, b Slot) Slot {
	if a.Present() {
		return a
	}
	return b
}

// windowEnd lists every instant at which the ruleset's answer for the flow may change.
func (v *View) windowEnd(own, peer identity.Number, dir Direction, t flow.Tuple) []time.Time {
	rs := v.Rulesets[own]
	var out []time.Time
	for _, k := range rs.probes(peer, dir, t) {
		for _, s := range [...]Slot{rs[k].Allow, rs[k].Deny, rs[k].Audit} {
			out = append(out, s.NotBefore, s.NotAfter)
		}
	}
	return out
}

func (j *judge) track(key, orig flow.Tuple, rule uint32) {
	j.t.Conns[key] = Conn{Orig: orig, Rule: rule, Generation: j.v.Generation, Expires: j.until(orig)}
}

// until is when a connection must be judged again: the earliest end of the rule, the peers' Bindings and, in mode
// deny-all, the lease.
func (j *judge) until(orig flow.Tuple) time.Time {
	var ends []time.Time
	for _, a := range []netip.Addr{orig.Src.Addr(), orig.Dst.Addr()} {
		ends = append(ends, j.v.Addresses[a].NotAfter)
	}
	if j.v.Lease.Mode == LeaseDenyAll {
		ends = append(ends, j.v.Lease.Ends)
	}
	src, dst := j.v.Addresses[orig.Src.Addr()], j.v.Addresses[orig.Dst.Addr()]
	if src.Local {
		ends = append(ends, j.v.windowEnd(src.Number, dst.Number, Egress, orig)...)
	}
	if dst.Local {
		ends = append(ends, j.v.windowEnd(dst.Number, src.Number, Ingress, orig)...)
	}
	var first time.Time
	for _, e := range ends {
		if !e.IsZero() && e.After(j.now) && (first.IsZero() || e.Before(first)) {
			first = e
		}
	}
	return first
}
