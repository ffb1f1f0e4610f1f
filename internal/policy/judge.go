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
	HookFromWorkload              // tcx ingress on the device of a workload in a network namespace of its own: it sends
	HookToWorkload                // tcx egress on such a device: it receives
)

// Device is what a packet arrives at or leaves by.
type Device uint8

// The devices.
const (
	DeviceTunnel Device = iota
	DeviceLoopback
	DeviceOther
	DeviceWorkload // a workload in a network namespace of its own is behind it
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

// Part is what a packet carries of a datagram.
type Part uint8

// The parts. Only the first fragment names ports; the others follow its answer.
const (
	Whole Part = iota
	FirstFragment
	LaterFragment
)

// FragmentKey names one fragmented datagram (RFC 791, RFC 8200 section 4.5).
type FragmentKey struct {
	Src, Dst netip.Addr
	Proto    flow.Proto
	ID       uint32
}

// fragmentLife is how long fragments may follow the first one; kernels give up on a datagram after 30 s or less.
const fragmentLife = 30 * time.Second

// Fragment is what the first fragment of a datagram says of the others.
type Fragment struct {
	Tuple flow.Tuple
	Until time.Time
}

// Packet is one packet, or one connect or bind call, as a hook sees it. IPv4-mapped addresses are unmapped before.
type Packet struct {
	Hook      Hook
	Device    Device
	Tuple     flow.Tuple // for HookConnect an unset source is unspecified; for HookBind only Src counts
	TCPFlags  uint8
	EchoReq   bool        // ICMP echo request
	Quoted    *flow.Tuple // the tuple inside an ICMP error, as it was sent; nil for anything else
	Part      Part
	Fragment  uint32 // identification, of a fragment
	Malformed bool
	Socket    Socket
	Connected bool // the receiving socket has a peer of its own
	// Interface is the index of the device, at the hooks of workloads; and at HookEgressDevice that of the device that a
	// forwarded packet came in by, 0 for what the host sends itself.
	Interface uint32
}

// Decision is a verdict with everything that led to it.
type Decision struct {
	Verdict  flow.Verdict
	Reason   flow.Reason
	Rule     uint32 // the deciding rule's number; 0 where no rule decided. With verdict Audit, the one in mode audit
	Src, Dst identity.Number

	under uint32 // the rule that lets the flow pass; Rule but for verdict Audit
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
	Max   int // of each IP version; 0 means no bound
	// Quota bounds the connections that one identity may have opened; 0 means none.
	Quota     int
	Fragments map[FragmentKey]Fragment
}

// Judge decides on one packet. It may add to, refresh or remove from t, and reads nothing else but its arguments.
//
// The steps, which bpf/judge.c numbers in the same way; the first that decides, decides:
//
//  1. Scope: neither address is the overlay's: deny on the tunnel device; ignore elsewhere, but for what a workload's own
//     policy asks for (internet: deny, listen: overlay).
//  2. Form: malformed, forbidden TCP flags, a fragment without its first one, unknown protocol: deny.
//  3. Place: overlay addresses pass the tunnel, loopback or the device of a workload, and no other device.
//  4. Lease: ended in mode deny-all: deny.
//  5. Owner: the socket's cgroup (or an ancestor) and user name exactly one workload, or none; of what comes from the
//     device of a workload, that one.
//  6. Own end: the sender owns the source, the receiver owns the destination.
//  7. Peer: the other address belongs to a known, unexpired, unrevoked identity.
//  8. ICMP errors pass with the tracked connection that they quote.
//  9. Tracked and judged under this generation: allow; under an older one: judge the first packet's direction again.
//  10. Untracked: only what opens a connection, at a hook that may open one, goes on.
//  11. Policy: deny before allow, in the ruleset of each end that is on this host. What a rule in mode audit would have
//     denied passes with verdict Audit.
//  12. Track: a full table, or a quota that is used up, denies.
func Judge(v *View, t *Table, p Packet, now time.Time) Decision {
	j := judge{v: v, t: t, p: p, now: now}
	d := j.run()
	d.under = 0
	return d
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
	if (p.Hook == HookFromWorkload || p.Hook == HookToWorkload) && v.Interfaces[p.Interface] == identity.NumberUnknown {
		p.Hook = HookGuard // the device leads to nobody
	}
	if p.byDevice() {
		j.owner = v.Interfaces[p.Interface]
	}
	srcIn, dstIn := v.InOverlay(p.Tuple.Src.Addr()), v.InOverlay(p.Tuple.Dst.Addr())
	j.src, j.dst = v.Addresses[p.Tuple.Src.Addr()], v.Addresses[p.Tuple.Dst.Addr()]
	// 1. Scope.
	if p.Hook == HookBind {
		return j.bind(srcIn)
	}
	if p.Hook == HookConnect && !dstIn || !srcIn && !dstIn {
		return j.outside()
	}
	// 2. Form.
	if r := j.form(); r != flow.ReasonNone {
		return j.deny(r)
	}
	// 3. Place.
	if r := j.place(); r != flow.ReasonNone {
		return j.deny(r)
	}
	// 4. Lease.
	if v.Lease.Mode == LeaseDenyAll && !j.now.Before(v.Lease.Ends) {
		return j.deny(flow.LeaseEnded)
	}
	// 5. Owner.
	j.owner = j.ownerOf()
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

// outside judges what has nothing to do with the overlay: by what a workload's own policy asks for, and else not at all.
func (j *judge) outside() Decision {
	p := &j.p
	if len(j.v.Traits) > 0 {
		j.owner = j.ownerOf()
	}
	traits := j.v.Traits[j.owner]
	switch p.Hook {
	case HookEgressDevice, HookIngressDevice:
		j.owner = identity.NumberUnknown
		return j.deny(flow.UnknownPeer)
	case HookConnect, HookEgressSocket, HookFromWorkload:
		here := p.Tuple.Dst.Addr().IsLoopback() || p.Hook == HookConnect && p.Tuple.Dst.Addr().IsUnspecified()
		if traits.Confined && !here {
			return j.deny(flow.InternetDenied)
		}
	case HookIngressSocket, HookToWorkload:
		if traits.OverlayOnly && !p.Tuple.Dst.Addr().IsLoopback() && j.isNew() {
			return j.deny(flow.ListenOverlay)
		}
	}
	return Decision{Verdict: flow.Ignore}
}

// isNew reports whether a packet from outside the overlay opens something, as far as its receiver can tell: what a
// workload asked for itself comes back to a socket that has a peer.
func (j *judge) isNew() bool {
	if j.p.Tuple.Proto == flow.TCP && j.p.Part == Whole {
		return j.p.TCPFlags&(FlagSYN|FlagACK) == FlagSYN
	}
	return !j.p.Connected
}

// form is step 2. It gives a later fragment the ports of the first.
func (j *judge) form() flow.Reason {
	p := &j.p
	if p.Malformed {
		return flow.Malformed
	}
	if p.Part == LaterFragment && p.Hook != HookGuard {
		f, ok := j.t.Fragments[j.fragment()]
		if !ok || !j.now.Before(f.Until) {
			return flow.Fragment
		}
		p.Tuple, p.TCPFlags, p.EchoReq, p.Quoted = f.Tuple, FlagACK, false, nil
	}
	if p.Part == LaterFragment && p.Hook == HookGuard {
		return flow.ReasonNone
	}
	switch p.Tuple.Proto {
	case flow.TCP:
		if p.Hook != HookConnect && p.Hook != HookGuard && !sane(p.TCPFlags) {
			return flow.Malformed
		}
	case flow.UDP, flow.ICMP, flow.ICMPv6, flow.SCTP:
	default:
		return flow.UnknownProto
	}
	return flow.ReasonNone
}

func (j *judge) fragment() FragmentKey {
	return FragmentKey{Src: j.p.Tuple.Src.Addr(), Dst: j.p.Tuple.Dst.Addr(), Proto: j.p.Tuple.Proto, ID: j.p.Fragment}
}

// sane refuses the sets of flags that no TCP sends (RFC 9293, section 3.10.7), and that probe or confuse stacks: a
// segment has exactly one of SYN, FIN and RST at most, and without SYN or RST it acknowledges.
func sane(flags uint8) bool {
	switch flags & (FlagSYN | FlagFIN | FlagRST) {
	case FlagSYN, FlagRST:
		return true
	case 0, FlagFIN:
		return flags&FlagACK != 0
	}
	return false
}

// place is step 3.
func (j *judge) place() flow.Reason {
	switch j.p.Hook {
	case HookConnect, HookFromWorkload, HookToWorkload:
		return flow.ReasonNone
	}
	if j.p.Hook == HookGuard || j.p.Device == DeviceOther {
		return flow.NotTunnel
	}
	return flow.ReasonNone
}

// ownerOf is step 5.
func (j *judge) ownerOf() identity.Number {
	if j.p.byDevice() {
		return j.v.Interfaces[j.p.Interface]
	}
	return j.v.Owner(j.p.Socket)
}

// byDevice: the packet's owner is known by the device that it came from, or goes to. A forwarded packet has no socket
// here.
func (p *Packet) byDevice() bool {
	return p.Hook == HookFromWorkload || p.Hook == HookToWorkload || p.Hook == HookEgressDevice && p.Interface != 0
}

// fromKernel: no socket, and no device to know a workload by.
func (p *Packet) fromKernel() bool { return len(p.Socket.Cgroups) == 0 && !p.byDevice() }

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
	case HookFromWorkload:
		if !j.src.Local || j.src.Number != j.owner {
			return flow.SpoofedSource
		}
	case HookToWorkload:
		if !j.dst.Local || j.dst.Number != j.owner {
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
		case j.p.fromKernel(): // step 10 lets it only reply
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
	if j.arrives() {
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

// arrives: the packet is on its way to this end of the flow.
func (j *judge) arrives() bool {
	return j.p.Hook == HookIngressDevice || j.p.Hook == HookIngressSocket || j.p.Hook == HookToWorkload
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
	if q.Src.Addr() != j.p.Tuple.Dst.Addr() || j.arrives() && q.Dst.Addr() != j.p.Tuple.Src.Addr() {
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
			j.first()
			return j.allow(c.Rule)
		}
		d := j.policy(c.Orig, j.v.Addresses[c.Orig.Src.Addr()], j.v.Addresses[c.Orig.Dst.Addr()])
		if d.Verdict == flow.Deny {
			delete(j.t.Conns, key)
			return j.deny(d.Reason).withRule(d.Rule)
		}
		j.track(key, c.Orig, d.under)
		j.first()
		d.Src, d.Dst = j.src.Number, j.dst.Number
		return d
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
	if d.Verdict == flow.Deny {
		return d
	}
	// 12. Track.
	if j.full() {
		return j.deny(flow.CTFull)
	}
	j.track(key, j.p.Tuple, d.under)
	j.first()
	return d
}

// first remembers what the first fragment of a datagram says of the others.
func (j *judge) first() {
	if j.p.Part != FirstFragment {
		return
	}
	if j.t.Fragments == nil {
		j.t.Fragments = map[FragmentKey]Fragment{}
	}
	j.t.Fragments[j.fragment()] = Fragment{Tuple: j.p.Tuple, Until: j.now.Add(fragmentLife)}
}

// full: there is no room for one more, in the table of this IP version or in the sender's quota.
func (j *judge) full() bool {
	family, opened := 0, 0
	for _, c := range j.t.Conns {
		if c.Orig.Src.Addr().Is4() == j.p.Tuple.Src.Addr().Is4() {
			family++
		}
		if j.v.Addresses[c.Orig.Src.Addr()].Number == j.src.Number {
			opened++
		}
	}
	return j.t.Max > 0 && family >= j.t.Max || j.t.Quota > 0 && opened >= j.t.Quota
}

// opens reports whether the packet may open a connection here. Sockets receive, and loopback carries, only what an
// earlier hook of this host has tracked; the kernel itself only replies.
func (j *judge) opens() bool {
	if j.p.Part == LaterFragment {
		return false
	}
	switch j.p.Hook {
	case HookIngressSocket, HookLoopback, HookToWorkload:
		return false
	case HookEgressSocket, HookEgressDevice:
		if j.p.fromKernel() {
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
	var a Answer
	a.Reason = flow.NoRule
	if src.Local {
		a = j.v.Lookup(src.Number, dst.Number, Egress, t, j.now)
	}
	if dst.Local && (a.Verdict != flow.Deny || !src.Local) {
		in := j.v.Lookup(dst.Number, src.Number, Ingress, t, j.now)
		if a.Verdict == flow.Audit && in.Verdict != flow.Deny {
			in.Verdict, in.Reason, in.Rule = a.Verdict, a.Reason, a.Rule // the first would-be denial is the one on record
		}
		a = in
	}
	return Decision{Verdict: a.Verdict, Reason: a.Reason, Rule: a.Rule, Src: src.Number, Dst: dst.Number, under: a.Under}
}

func (d Decision) withRule(rule uint32) Decision {
	d.Rule = rule
	return d
}

func (j *judge) deny(r flow.Reason) Decision {
	src, dst := j.src.Number, j.dst.Number
	if j.owner != identity.NumberUnknown {
		if j.p.Hook == HookIngressSocket || j.p.Hook == HookToWorkload {
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
