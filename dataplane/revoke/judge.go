package revoke

import (
	"time"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policy"
)

// Opener is who opened a socket's flow, as the judge has tracked it.
type Opener uint8

// The openers. OpenerUnknown means that the judge does not track the flow.
const (
	OpenerUnknown Opener = iota
	OpenerLocal
	OpenerRemote
)

// Socket is one connected socket with at least one overlay address.
type Socket struct {
	Tuple  flow.Tuple // from this host to the other end; mapped addresses are unmapped
	Opener Opener
	// Opening: nothing needs to be tracked yet. It is set for a TCP socket in SYN_SENT, and for every UDP socket.
	Opening bool
	UID     uint32
}

// Judge decides in Go, where the kernel's own code cannot be used: true leaves the socket alone.
type Judge func(Socket) bool

// Allowed is whether v still lets a socket's flow pass at now. It is the twin of bpf/revoke.c, with the same steps; a nil
// View takes nothing back. Callers make their Judge of it, with the View that the enforcer has made real.
func Allowed(v *policy.View, s Socket, now time.Time) bool {
	if v == nil {
		return true
	}
	// 4. Lease.
	if v.Lease.Mode == policy.LeaseDenyAll && !now.Before(v.Lease.Ends) {
		return false
	}
	// 6. Own end. 7. Peer.
	here, there := v.Addresses[s.Tuple.Src.Addr()], v.Addresses[s.Tuple.Dst.Addr()]
	if !here.Local || there.Revoked || there.Number == identity.NumberUnknown || !there.NotAfter.IsZero() && !now.Before(there.NotAfter) {
		return false
	}
	// 9. Tracked.
	switch s.Opener {
	case OpenerLocal:
		return allows(v, s.Tuple, now)
	case OpenerRemote:
		return allows(v, s.Tuple.Reverse(), now)
	}
	// 10. Untracked.
	if !s.Opening {
		return false
	}
	return allows(v, s.Tuple, now) || s.Tuple.Proto == flow.UDP && allows(v, s.Tuple.Reverse(), now)
}

// allows is step 11 for the tuple of a flow's first packet. What is only audited passes.
func allows(v *policy.View, t flow.Tuple, now time.Time) bool {
	src, dst := v.Addresses[t.Src.Addr()], v.Addresses[t.Dst.Addr()]
	if src.Local && v.Lookup(src.Number, dst.Number, policy.Egress, t, now).Verdict == flow.Deny {
		return false
	}
	if dst.Local && v.Lookup(dst.Number, src.Number, policy.Ingress, t, now).Verdict == flow.Deny {
		return false
	}
	return src.Local || dst.Local
}

// Due is the first instant after now at which v by itself may take something back, by the end of a rule, of a Binding or
// of the lease, or by the start of a rule that denies: when Sweep is to be called again though no View has changed. The
// zero time means never. It looks at every entry of v: once for each View, not for each packet.
func Due(v *policy.View, now time.Time) time.Time {
	var first time.Time
	if v == nil {
		return first
	}
	at := func(t time.Time) {
		if t.After(now) && (first.IsZero() || t.Before(first)) {
			first = t
		}
	}
	if v.Lease.Mode == policy.LeaseDenyAll {
		at(v.Lease.Ends)
	}
	for _, a := range v.Addresses {
		at(a.NotAfter)
	}
	for _, rs := range v.Rulesets {
		for _, val := range rs {
			at(val.Allow.NotAfter)
			at(val.Deny.NotBefore)
		}
	}
	return first
}
