package policy

import (
	"net/netip"
	"time"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
)

// Hook is the place in the kernel where a packet or a call is judged.
type Hook uint8

// The hooks.
const (
	HookConnect       Hook = iota // connect and sendmsg: a process names a destination
	HookBind                      // bind: a process claims a source address
	HookEgressSocket              // cgroup_skb egress
	HookIngressSocket             // cgroup_skb ingress
	HookEgressDevice              // tcx egress on the tunnel
	HookIngressDevice             // tcx ingress on the tunnel
	HookGuard                     // tcx, both ways, on every device but the tunnel and loopback
	HookLoopback                  // tcx egress on loopback
)

// Device is what a packet arrives at or leaves by.
type Device uint8

// The devices.
const (
	DeviceTunnel Device = iota
	DeviceLoopback
	DeviceOther
)

// Socket is what the kernel knows of the socket that sends or receives. The zero Socket is the kernel itself (resets,
// echo replies, ICMP errors).
type Socket struct {
	Cgroups []uint64 // the socket's own cgroup, then its ancestors up to the root
	UID     uint32
}

// TCP flags that the judge reads (RFC 9293, section 3.1).
const (
	FlagFIN = 0x01
	FlagSYN = 0x02
	FlagRST = 0x04
	FlagACK = 0x10
)

// Packet is one packet, or one connect or bind call, as a hook sees it. IPv4-mapped addresses are unmapped before.
type Packet struct {
	Hook      Hook
	Device    Device
	Tuple     flow.Tuple // for HookConnect an unset source is unspecified; for HookBind only Src counts
	TCPFlags  uint8
	EchoReq   bool        // ICMP echo request
	Quoted    *flow.Tuple // the tuple inside an ICMP error, as it was sent; nil for anything else
	Fragment  bool
	Malformed bool
	Socket    Socket
}

// Decision is a verdict with everything that led to it.
type Decision struct {
	Verdict  flow.Verdict
	Reason   flow.Reason
	Rule     uint32 // the deciding rule's number; 0 where no rule decided
	Src, Dst identity.Number
}

// Conn is one tracked connection, named in Table by its canonical tuple.
type Conn struct {
	Orig       flow.Tuple // as the first packet had it
	Rule       uint32
	Generation uint64
	Expires    time.Time // zero: never
}

// Table tracks connections. Idle ones are removed by its owner.
type Table struct {
	Conns map[flow.Tuple]Conn
	Max   int // 0 means no bound
}

// Judge decides on one packet. It may add to, refresh or remove from t, and reads nothing else but its arguments.
//
// The steps, which bpf/judge.c numbers in the same way; the first that decides, decides:
//
//  1. Scope: neither address is the overlay's: ignore, but on the tunnel device deny.
//  2. Form: malformed, fragment, unknown protocol: deny.
//  3. Place: overlay addresses pass the tunnel or loopback and no other device.
//  4. Lease: ended in mode deny-all: deny.
//  5. Owner: the socket's cgroup (or an ancestor) and user name exactly one workload, or none.
//  6. Own end: the sender owns the source, the receiver owns the destination.
//  7. Peer: the other address belongs to a known, unexpired, unrevoked identity.
//  8. ICMP errors pass with the tracked connection that they quote.
//  9. Tracked and judged under this generation: allow; under an older one: judge the first packet's direction again.
//  10. Untracked: only what opens a connection, at a hook that may open one, goes on.
//  11. Policy: deny before allow, in the ruleset of each end that is on this host.
//  12. Track: a full table denies.
func Judge(v *View, t *Table, p Packet, now time.Time) Decision {
	j := judge{v: v, t: t, p: p, now: now}
	return j.run()
}

// judge is the state of one Judge call.
type judge struct {
	v        *View
	t        *Table
	p        Packet
	now      time.Time
	src, dst Address
	owner    identity.Number // of the socket; NumberUnknown for none
}

func (j *judge) run() Decision {
	p, v := &j.p, j.v
	srcIn, dstIn := v.InOverlay(p.Tuple.Src.Addr()), v.InOverlay(p.Tuple.Dst.Addr())
	j.src, j.dst = v.Addresses[p.Tuple.Src.Addr()], v.Addresses[p.Tuple.Dst.Addr()]
	// 1. Scope.
	if p.Hook == HookBind {
		return j.bind(srcIn)
	}
	if p.Hook == HookConnect && !dstIn || !srcIn && !dstIn {
		if p.Hook == HookEgressDevice || p.Hook == HookIngressDevice {
			return j.deny(flow.UnknownPeer)
		}
		return Decision{Verdict: flow.Ignore}
	}
	// 2. Form.
	if r := j.form(); r != flow.ReasonNone {
		return j.deny(r)
	}
	// 3. Place.
	if p.Hook == HookGuard || p.Device == DeviceOther && p.Hook != HookConnect {
		return j.deny(flow.NotTunnel)
	}
	// 4. Lease.
	if v.Lease.Mode == LeaseDenyAll && !j.now.Before(v.Lease.Ends) {
		return j.deny(flow.LeaseEnded)
	}
	// 5. Owner.
	j.owner = v.Owner(p.Socket)
	// 6. Own end.
	if r := j.ownEnd(); r != flow.ReasonNone {
		return j.deny(r)
	}
	// 7. Peer.
	if r := j.peer(); r != flow.ReasonNone {
		return j.deny(r)
	}
	if p.Hook == HookConnect {
		return j.call() // 9 and 11
	}
	// 8. ICMP errors.
	if p.Quoted != nil {
		return j.quoted()
	}
	// 9 to 12.
	return j.tracked()
}

func (j *judge) form() flow.Reason {
	switch {
	case j.p.Malformed:
		return flow.Malformed
	case j.p.Fragment:
		return flow.Fragment
	}
	switch j.p.Tuple.Proto {
	case flow.TCP, flow.UDP, flow.ICMP, flow.ICMPv6:
		return flow.ReasonNone
	}
	return flow.UnknownProto
}

// bind allows an overlay address only to the workload that owns it.
func (j *judge) bind(overlay bool) Decision {
	if !overlay {
		return Decision{Verdict: flow.Ignore}
	}
	j.owner = j.v.Owner(j.p.Socket)
	switch {
	case j.owner == identity.NumberUnknown:
		return j.deny(flow.NoIdentity)
	case !j.src.Local || j.src.Number != j.owner:
		return j.deny(flow.SpoofedSource)
	}
	return Decision{Verdict: flow.Allow, Reason: flow.PolicyAllow, Src: j.owner}
}

// Owner is the workload of a socket: the one whose selectors hold its cgroup, or an ancestor, and its user. A socket
// that matches two different workloads has neither.
func (v *View) Owner(s Socket) identity.Number {
	found := identity.NumberUnknown
	for _, cg := range s.Cgroups {
		for _, uid := range [...]uint32{AnyUID, s.UID} {
			n, ok := v.Locals[LocalKey{cg, uid}]
			if !ok || n == found {
				continue
			}
			if found != identity.NumberUnknown {
				return identity.NumberUnknown
			}
			found = n
		}
	}
	return found
}

func (j *judge) ownEnd() flow.Reason {
	switch j.p.Hook {
	case HookConnect:
		return j.connectSource()
	case HookIngressSocket:
		switch {
		case j.owner == identity.NumberUnknown:
			return flow.NoIdentity
		case !j.dst.Local || j.dst.Number != j.owner:
			return flow.WrongReceiver
		}
	case HookIngressDevice:
		switch {
		case j.src.Local || !j.v.InOverlay(j.p.Tuple.Src.Addr()):
			return flow.SpoofedSource
		case !j.dst.Local:
			return flow.UnknownPeer
		}
	default: // egress hooks
		switch {
		case len(j.p.Socket.Cgroups) == 0: // the kernel itself; step 10 lets it only reply
			if !j.src.Local {
				return flow.SpoofedSource
			}
		case j.owner == identity.NumberUnknown:
			return flow.NoIdentity
		case !j.src.Local || j.src.Number != j.owner:
			return flow.SpoofedSource
		}
	}
	return flow.ReasonNone
}

// connectSource: an unbound socket is given the owner's address by the hook; a bound one must have it already. A
// socket bound to a port alone cannot be given an address any more.
func (j *judge) connectSource() flow.Reason {
	src := j.p.Tuple.Src
	unset := !src.Addr().IsValid() || src.Addr().IsUnspecified()
	switch {
	case j.owner == identity.NumberUnknown:
		return flow.NoIdentity
	case unset && src.Port() != 0:
		return flow.SourceBound
	case !unset && (!j.src.Local || j.src.Number != j.owner):
		return flow.SpoofedSource
	}
	j.src = Address{Number: j.owner, Local: true}
	return flow.ReasonNone
}

func (j *judge) peer() flow.Reason {
	peer := j.dst
	if j.p.Hook == HookIngressSocket || j.p.Hook == HookIngressDevice {
		peer = j.src
	}
	switch {
	case peer.Revoked:
		return flow.Revoked
	case peer.Number == identity.NumberUnknown:
		return flow.UnknownPeer
	case !peer.NotAfter.IsZero() && !j.now.Before(peer.NotAfter):
		return flow.Expired
	}
	return flow.ReasonNone
}

// call judges a connect or sendmsg early, so that the process learns at once; nothing is tracked for it. A datagram that
// answers a tracked flow is judged as that flow: a server that answers by sendto needs no rule of its own.
func (j *judge) call() Decision {
	key, _ := j.p.Tuple.Canonical()
	c, ok := j.t.Conns[key]
	if !ok || c.Orig == j.p.Tuple || j.p.Tuple.Proto == flow.TCP {
		return j.policy(j.p.Tuple, j.src, j.dst)
	}
	d := j.policy(c.Orig, j.dst, j.src)
	d.Src, d.Dst = j.src.Number, j.dst.Number
	return d
}

// quoted passes an ICMP error with the connection that it quotes; it never opens or refreshes one. The error must
// travel against the packet that it quotes (RFC 792, RFC 4443). The overlay has no routers, so one that arrives comes
// from the very host that the quoted packet was sent to.
func (j *judge) quoted() Decision {
	q := *j.p.Quoted
	arrives := j.p.Hook == HookIngressDevice || j.p.Hook == HookIngressSocket
	if q.Src.Addr() != j.p.Tuple.Dst.Addr() || arrives && q.Dst.Addr() != j.p.Tuple.Src.Addr() {
		return j.deny(flow.CTInvalid)
	}
	key, _ := q.Canonical()
	c, ok := j.t.Conns[key]
	if !ok || c.Generation != j.v.Generation || c.expired(j.now) {
		return j.deny(flow.CTInvalid)
	}
	return j.allow(c.Rule)
}

func (c Conn) expired(now time.Time) bool { return !c.Expires.IsZero() && !now.Before(c.Expires) }

func (j *judge) tracked() Decision {
	key, _ := j.p.Tuple.Canonical()
	c, ok := j.t.Conns[key]
	if ok {
		reply := c.Orig != j.p.Tuple
		// A bare SYN against the first packet's direction opens a connection of its own, which was never judged.
		if reply && j.p.Tuple.Proto == flow.TCP && j.p.TCPFlags&(FlagSYN|FlagACK) == FlagSYN {
			return j.deny(flow.CTInvalid)
		}
		if reply && j.p.EchoReq {
			return j.deny(flow.CTInvalid)
		}
		// 9. Tracked.
		if c.Generation == j.v.Generation && !c.expired(j.now) {
			return j.allow(c.Rule)
		}
		d := j.policy(c.Orig, j.v.Addresses[c.Orig.Src.Addr()], j.v.Addresses[c.Orig.Dst.Addr()])
		if d.Verdict != flow.Allow {
			delete(j.t.Conns, key)
			return j.deny(d.Reason).withRule(d.Rule)
		}
		j.track(key, c.Orig, d.Rule)
		return j.allow(d.Rule)
	}
	// 10. Untracked.
	if !j.opens() {
		return j.deny(flow.CTInvalid)
	}
	if j.v.Lease.Mode == LeaseDenyNew && !j.now.Before(j.v.Lease.Ends) {
		return j.deny(flow.LeaseEnded)
	}
	// 11. Policy.
	d := j.policy(j.p.Tuple, j.src, j.dst)
	if d.Verdict != flow.Allow {
		return d
	}
	// 12. Track.
	if j.t.Max > 0 && len(j.t.Conns) >= j.t.Max {
		return j.deny(flow.CTFull)
	}
	j.track(key, j.p.Tuple, d.Rule)
	return d
}

// opens reports whether the packet may open a connection here. Sockets receive, and loopback carries, only what an
// earlier hook of this host has tracked; the kernel itself only replies.
func (j *judge) opens() bool {
	switch j.p.Hook {
	case HookIngressSocket, HookLoopback:
		return false
	case HookEgressSocket, HookEgressDevice:
		if len(j.p.Socket.Cgroups) == 0 {
			return false
		}
	}
	switch j.p.Tuple.Proto {
	case flow.TCP:
		return j.p.TCPFlags&(FlagSYN|FlagACK|FlagRST|FlagFIN) == FlagSYN
	case flow.ICMP, flow.ICMPv6:
		return j.p.EchoReq
	}
	return true
}

// policy is step 11 for the tuple of a flow's first packet: in the source's ruleset when the source is here, and in
// the destination's when that is here.
func (j *judge) policy(t flow.Tuple, src, dst Address) Decision {
	d := Decision{Src: src.Number, Dst: dst.Number, Reason: flow.NoRule}
	if src.Local {
		d = d.with(j.v.Lookup(src.Number, dst.Number, Egress, t, j.now))
		if d.Verdict != flow.Allow {
			return d
		}
	}
	if dst.Local {
		d = d.with(j.v.Lookup(dst.Number, src.Number, Ingress, t, j.now))
	}
	return d
}

// Lookup asks one workload's ruleset about a flow: every probe is made, deny counts before allow, and among those the
// most specific wins. An allow outside its time window gives EXPIRED.
func (v *View) Lookup(own, peer identity.Number, dir Direction, t flow.Tuple, now time.Time) (flow.Verdict, flow.Reason, uint32) {
	rs := v.Rulesets[own]
	proto, port := t.Proto.Policy(), t.Dst.Port()
	if proto == flow.ICMP {
		port = 0
	}
	probes := [...]Key{
		{Peer: peer, Dir: dir, Proto: proto, Port: port},
		{Peer: peer, Dir: dir, Proto: proto},
		{Peer: peer, Dir: dir},
	}
	var allow, stale Slot
	for _, k := range probes {
		val := rs[k]
		if val.Deny.Active(now) {
			return flow.Deny, flow.PolicyDeny, val.Deny.Rule
		}
		if !allow.Present() && val.Allow.Active(now) {
			allow = val.Allow
		} else if !stale.Present() && val.Allow.Present() {
			stale = val.Allow
		}
	}
	switch {
	case allow.Present():
		return flow.Allow, flow.PolicyAllow, allow.Rule
	case stale.Present():
		return flow.Deny, flow.Expired, stale.Rule
	}
	return flow.Deny, flow.NoRule, 0
}

func (d Decision) with(v flow.Verdict, r flow.Reason, rule uint32) Decision {
	d.Verdict, d.Reason, d.Rule = v, r, rule
	return d
}

func (d Decision) withRule(rule uint32) Decision {
	d.Rule = rule
	return d
}

func (j *judge) deny(r flow.Reason) Decision {
	src, dst := j.src.Number, j.dst.Number
	if j.owner != identity.NumberUnknown {
		if j.p.Hook == HookIngressSocket {
			dst = j.owner
		} else if j.p.Hook != HookIngressDevice {
			src = j.owner
		}
	}
	return Decision{Verdict: flow.Deny, Reason: r, Src: src, Dst: dst}
}

func (j *judge) allow(rule uint32) Decision {
	return Decision{Verdict: flow.Allow, Reason: flow.PolicyAllow, Rule: rule, Src: j.src.Number, Dst: j.dst.Number}
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

// windowEnd lists every instant at which the ruleset's answer for the flow may change.
func (v *View) windowEnd(own, peer identity.Number, dir Direction, t flow.Tuple) []time.Time {
	proto, port := t.Proto.Policy(), t.Dst.Port()
	if proto == flow.ICMP {
		port = 0
	}
	var out []time.Time
	for _, k := range [...]Key{{Peer: peer, Dir: dir, Proto: proto, Port: port}, {Peer: peer, Dir: dir, Proto: proto}, {Peer: peer, Dir: dir}} {
		val := v.Rulesets[own][k]
		out = append(out, val.Allow.NotBefore, val.Allow.NotAfter, val.Deny.NotBefore, val.Deny.NotAfter)
	}
	return out
}
