package policytest

import (
	"net/netip"
	"time"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policy"
)

// fragmentID is that of every fragmented datagram here.
const fragmentID = 9

func firstPart(p policy.Packet) policy.Packet {
	p.Part, p.Fragment = policy.FirstFragment, fragmentID
	return p
}

// later makes a packet the part of a datagram that names no ports.
func later(p policy.Packet) policy.Packet {
	p = fragment(p)
	p.TCPFlags, p.EchoReq = 0, false
	p.Tuple.Src, p.Tuple.Dst = netip.AddrPortFrom(p.Tuple.Src.Addr(), 0), netip.AddrPortFrom(p.Tuple.Dst.Addr(), 0)
	return p
}

// parted: the first fragment of that datagram has passed, and is remembered for that long.
func parted(t flow.Tuple, life time.Duration) option {
	return func(c *Case) {
		if c.Fragments == nil {
			c.Fragments = map[policy.FragmentKey]policy.Fragment{}
		}
		k := policy.FragmentKey{Src: t.Src.Addr(), Dst: t.Dst.Addr(), Proto: t.Proto, ID: fragmentID}
		c.Fragments[k] = policy.Fragment{Tuple: t, Until: Now.Add(life)}
	}
}

// fragments: the first one decides, the others follow it or are dropped.
func (b *builder) fragments() {
	out, out6, into := udp(a4, 1000, remote4, 53), udp(a6, 1000, remote6, 53), udp(remote4, 4000, a4, 5000)
	b.add("fragments: the first opens a flow", firstPart(exit(out, in(cgA))), pass(2, A, Remote))
	b.add("fragments: the first opens a flow, IPv6", firstPart(exit(out6, in(cgA))), pass(2, A, Remote))
	b.add("fragments: the first is judged", firstPart(exit(udp(a4, 1000, remote4, 54), in(cgA))), refuse(flow.NoRule, A, Remote))
	b.add("fragments: the first is judged, in", firstPart(enter(udp(remote4, 4000, a4, 5001))), refuse(flow.NoRule, Remote, A))
	b.add("fragments: the first of TCP", firstPart(exit(tcp(a4, 1000, remote4, 443), in(cgA))), pass(1, A, Remote))
	b.add("fragments: the first of a ping", firstPart(exit(echo(a4, remote4, 5), in(cgA))), pass(3, A, Remote))
	b.add("fragments: the first out of a socket", firstPart(leave(out, in(cgA))), pass(2, A, Remote))
	b.add("fragments: the first of a tracked flow", firstPart(enter(out.Reverse())), pass(2, Remote, A), known(out, 2))
	b.add("fragments: the first is forged", firstPart(exit(udp(b4, 1000, remote4, 53), in(cgA))), refuse(flow.SpoofedSource, A, Remote))
	b.add("fragments: a later one follows", later(exit(out, in(cgA))), pass(2, A, Remote), known(out, 2), parted(out, minute))
	b.add("fragments: a later one follows, IPv6", later(exit(out6, in(cgA))), pass(2, A, Remote), known(out6, 2), parted(out6, minute))
	b.add("fragments: a later one follows, in", later(enter(into)), pass(41, Remote, A), known(into, 41), parted(into, minute))
	b.add("fragments: a later one follows, answer", later(enter(out.Reverse())), pass(2, Remote, A), known(out, 2), parted(out.Reverse(), minute))
	b.add("fragments: a later one of TCP", later(exit(tcp(a4, 1000, remote4, 443), in(cgA))), pass(1, A, Remote),
		known(tcp(a4, 1000, remote4, 443), 1), parted(tcp(a4, 1000, remote4, 443), minute))
	b.add("fragments: a later one, judged again", later(exit(out, in(cgA))), pass(2, A, Remote), older(out, 99), parted(out, minute))
	b.add("fragments: a later one, not allowed any more", later(exit(udp(a4, 1000, remote4, 54), in(cgA))), refuse(flow.NoRule, A, Remote),
		older(udp(a4, 1000, remote4, 54), 99), parted(udp(a4, 1000, remote4, 54), minute), leaves(-1))
	b.add("fragments: a later one of another socket", later(exit(out, in(cgB))), refuse(flow.SpoofedSource, B, Remote), known(out, 2), parted(out, minute), leaves(1))
	b.add("fragments: a later one opens nothing", later(exit(out, in(cgA))), refuse(flow.CTInvalid, A, Remote), parted(out, minute))
	b.add("fragments: a later one too late", later(exit(out, in(cgA))), refuse(flow.Fragment, A, Remote), known(out, 2), parted(out, 0), leaves(1))
	b.add("fragments: a later one of another datagram", func() policy.Packet {
		p := later(exit(out, in(cgA)))
		p.Fragment++
		return p
	}(), refuse(flow.Fragment, A, Remote), known(out, 2), parted(out, minute), leaves(1))
	b.add("fragments: a later one of another protocol", later(exit(tcp(a4, 1000, remote4, 443), in(cgA))), refuse(flow.Fragment, A, Remote), parted(out, minute))
	b.add("fragments: in clear", later(guard(out, in(cgA))), refuse(flow.NotTunnel, A, Remote), parted(out, minute))
}

// tcpFlags are the sets that no TCP sends.
func (b *builder) tcpFlags() {
	out, into := tcp(a4, 1000, remote4, 443), tcp(remote4, 4000, a4, 8080)
	const syn, fin, rst, ack, push, urgent = policy.FlagSYN, policy.FlagFIN, policy.FlagRST, policy.FlagACK, 0x08, 0x20
	for name, f := range map[string]uint8{
		"none": 0, "syn and fin": syn | fin, "syn and rst": syn | rst, "rst and fin": rst | fin | ack, "all": 0xff, "fin alone": fin,
		"christmas": fin | push | urgent, "push alone": push, "urgent alone": urgent, "syn, fin and ack": syn | fin | ack,
	} {
		b.add("flags: "+name+", out", flags(leave(out, in(cgA)), f), refuse(flow.Malformed, A, Remote))
		b.add("flags: "+name+", in", flags(enter(into), f), refuse(flow.Malformed, Remote, A))
		b.add("flags: "+name+", tracked", flags(enter(out.Reverse()), f), refuse(flow.Malformed, Remote, A), known(out, 1), leaves(1))
	}
}

// sctp is judged by its protocol and ports, like datagrams.
func (b *builder) sctp() {
	rules := with(func(v *policy.View) {
		v.Rulesets[A][egress(Remote, flow.SCTP, 36412)] = allow(90)
		v.Rulesets[A][ingress(Remote, flow.SCTP, 0)] = allow(91)
	})
	out := tuple(flow.SCTP, a4, 1000, remote4, 36412)
	b.add("sctp: a port", leave(out, in(cgA)), pass(90, A, Remote), rules)
	b.add("sctp: another port", leave(tuple(flow.SCTP, a4, 1000, remote4, 36413), in(cgA)), refuse(flow.NoRule, A, Remote), rules)
	b.add("sctp: every port, IPv6", enter(tuple(flow.SCTP, remote6, 1000, a6, 9)), pass(91, Remote, A), rules)
	b.add("sctp: answered", enter(out.Reverse()), pass(90, Remote, A), rules, known(out, 90))
	b.add("sctp: everything", leave(tuple(flow.SCTP, a4, 1, broad4, 2), in(cgA)), pass(30, A, Broad))
}

// ranges are ports by their leading bits.
func (b *builder) ranges() {
	rules := with(func(v *policy.View) {
		r := func(port uint16, bits uint8, val policy.Value) {
			v.Rulesets[A][egress(Remote, flow.TCP, port).InRange(bits)] = val
		}
		r(8192, 3, allow(100)) // 8192-16383
		r(1024, 6, allow(101)) // 1024-2047
		r(2048, 5, deny(102))  // 2048-4095
		r(4096, 15, allow(103))
		r(5120, 6, policy.Value{Allow: during(104, minute, 0)}) // 5120-6143
		v.Rulesets[A][egress(Remote, flow.TCP, 8200)] = deny(105)
		v.Rulesets[A][egress(Remote, flow.TCP, 8201)] = allow(106)
		v.Rulesets[A][egress(Remote, flow.TCP, 2050)] = allow(107)
		v.Rulesets[A][ingress(Remote, flow.UDP, 32768).InRange(1)] = allow(108) // 32768-65535
	})
	to := func(port uint16) policy.Packet { return leave(tcp(a4, 1000, remote4, port), in(cgA)) }
	b.add("ranges: the first port", to(8192), pass(100, A, Remote), rules)
	b.add("ranges: the last port", to(16383), pass(100, A, Remote), rules)
	b.add("ranges: one before", to(8191), refuse(flow.NoRule, A, Remote), rules)
	b.add("ranges: one after", to(16384), refuse(flow.NoRule, A, Remote), rules)
	b.add("ranges: a neighbour", to(2047), pass(101, A, Remote), rules)
	b.add("ranges: a neighbour denies", to(2048), refuseBy(flow.PolicyDeny, 102, A, Remote), rules)
	b.add("ranges: of two ports", to(4097), pass(103, A, Remote), rules)
	b.add("ranges: not of three", to(4098), refuse(flow.NoRule, A, Remote), rules)
	b.add("ranges: later", to(5200), refuseBy(flow.Expired, 104, A, Remote), rules)
	b.add("ranges: a port in it is denied", to(8200), refuseBy(flow.PolicyDeny, 105, A, Remote), rules)
	b.add("ranges: a port in it has its own rule", to(8201), pass(106, A, Remote), rules)
	b.add("ranges: a denied range outweighs a port", to(2050), refuseBy(flow.PolicyDeny, 102, A, Remote), rules)
	b.add("ranges: of another protocol", leave(udp(a4, 1000, remote4, 8192), in(cgA)), refuse(flow.NoRule, A, Remote), rules)
	b.add("ranges: of another direction", enter(tcp(remote4, 1000, a4, 8192)), refuse(flow.NoRule, Remote, A), rules)
	b.add("ranges: half of all ports", enter(udp(remote4, 1, a4, 65535)), pass(108, Remote, A), rules)
	b.add("ranges: IPv6", leave(tcp(a6, 1000, remote6, 9000), in(cgA)), pass(100, A, Remote), rules)
	b.add("ranges: the call says so too", call(tcp(netip.Addr{}, 0, remote4, 8200), in(cgA)), refuseBy(flow.PolicyDeny, 105, A, Remote), rules)
}

func audited(r flow.Reason, rule uint32, src, dst identity.Number) policy.Decision {
	return policy.Decision{Verdict: flow.Audit, Reason: r, Rule: rule, Src: src, Dst: dst}
}

// audit is mode audit: what would have been denied passes, on record.
func (b *builder) audit() {
	set := func(port uint16, val policy.Value) option {
		return with(func(v *policy.View) { v.Rulesets[A][egress(Remote, flow.TCP, port)] = val })
	}
	to := func(port uint16) policy.Packet { return leave(tcp(a4, 1000, remote4, port), in(cgA)) }
	slot := func(rule uint32) policy.Slot { return policy.Slot{Rule: rule} }
	lenient := func(s policy.Slot) policy.Slot {
		s.Audit = true
		return s
	}
	b.add("audit: a deny", to(700), audited(flow.PolicyDeny, 111, A, Remote), set(700, policy.Value{Allow: slot(110), Audit: slot(111)}), leaves(1))
	b.add("audit: allows nothing by itself", to(700), refuse(flow.NoRule, A, Remote), set(700, policy.Value{Audit: slot(111)}))
	b.add("audit: a deny that counts outweighs it", to(700), refuseBy(flow.PolicyDeny, 112, A, Remote),
		set(700, policy.Value{Allow: slot(110), Audit: slot(111), Deny: slot(112)}))
	b.add("audit: a deny that is over", to(700), pass(110, A, Remote), set(700, policy.Value{Allow: slot(110), Audit: during(111, 0, -minute)}))
	b.add("audit: a broad deny", to(443), audited(flow.PolicyDeny, 113, A, Remote),
		with(func(v *policy.View) { v.Rulesets[A][egress(Remote, flow.AnyProto, 0)] = policy.Value{Audit: slot(113)} }), leaves(1))
	b.add("audit: the flow goes on", flags(to(700), policy.FlagACK), pass(110, A, Remote), set(700, policy.Value{Allow: slot(110), Audit: slot(111)}),
		known(tcp(a4, 1000, remote4, 700), 110))
	b.add("audit: judged again", flags(to(700), policy.FlagACK), audited(flow.PolicyDeny, 111, A, Remote), set(700, policy.Value{Allow: slot(110), Audit: slot(111)}),
		older(tcp(a4, 1000, remote4, 700), 110), leaves(1))
	b.add("audit: an allow outside its time", to(700), audited(flow.Expired, 114, A, Remote), set(700, policy.Value{Allow: lenient(during(114, 0, -minute))}), leaves(1))
	b.add("audit: an allow inside its time", to(700), pass(114, A, Remote), set(700, policy.Value{Allow: lenient(during(114, 0, minute))}))
	b.add("audit: another allow counts", to(700), pass(115, A, Remote), set(700, policy.Value{Allow: lenient(during(114, 0, -minute))}),
		with(func(v *policy.View) { v.Rulesets[A][egress(Remote, flow.TCP, 0)] = allow(115) }))
	b.add("audit: both", to(700), audited(flow.PolicyDeny, 111, A, Remote), set(700, policy.Value{Allow: lenient(during(114, 0, -minute)), Audit: slot(111)}), leaves(1))
	b.add("audit: the call goes on", call(tcp(netip.Addr{}, 0, remote4, 700), in(cgA)), audited(flow.PolicyDeny, 111, A, Remote),
		set(700, policy.Value{Allow: slot(110), Audit: slot(111)}))
	ab := on(leave(tcp(a4, 1000, b4, 80), in(cgA)), policy.DeviceLoopback)
	b.add("audit: the sender's is on record", ab, audited(flow.PolicyDeny, 116, A, B),
		with(func(v *policy.View) {
			v.Rulesets[A][egress(B, flow.TCP, 80)] = policy.Value{Allow: slot(10), Audit: slot(116)}
			v.Rulesets[B][ingress(A, flow.TCP, 80)] = policy.Value{Allow: slot(11), Audit: slot(117)}
		}), leaves(1))
	b.add("audit: the receiver's is on record", ab, audited(flow.PolicyDeny, 117, A, B),
		with(func(v *policy.View) {
			v.Rulesets[B][ingress(A, flow.TCP, 80)] = policy.Value{Allow: slot(11), Audit: slot(117)}
		}), leaves(1))
	b.add("audit: the receiver's denial counts", ab, refuse(flow.NoRule, A, B),
		with(func(v *policy.View) {
			v.Rulesets[A][egress(B, flow.TCP, 80)] = policy.Value{Allow: slot(10), Audit: slot(116)}
			delete(v.Rulesets[B], ingress(A, flow.TCP, 80))
		}))
}

// traits are what a workload's own policy asks for outside the overlay.
func (b *builder) traits() {
	confined := with(func(v *policy.View) { v.Traits = map[identity.Number]policy.Traits{A: {Confined: true}} })
	closed := with(func(v *policy.View) { v.Traits = map[identity.Number]policy.Traits{A: {OverlayOnly: true}} })
	home, home6 := ip("127.0.0.1"), ip("::1")
	out := tcp(lan4, 1000, outside4, 443)
	b.add("internet: denied", leave(out, in(cgA)), refuse(flow.InternetDenied, A, 0), confined)
	b.add("internet: denied, datagrams", leave(udp(lan4, 1000, outside4, 53), in(cgA)), refuse(flow.InternetDenied, A, 0), confined)
	b.add("internet: denied, IPv6", leave(udp(lan6, 1000, outside6, 53), in(990, cgA)), refuse(flow.InternetDenied, A, 0), confined)
	b.add("internet: denied, by user", leave(out, as(in(cgShared), userOne)), refuse(flow.InternetDenied, A, 0), confined)
	b.add("internet: another workload", leave(out, in(cgB)), ignored, confined)
	b.add("internet: nobody", leave(out, in(cgNobody)), ignored, confined)
	b.add("internet: the kernel", leave(out, kernel), ignored, confined)
	b.add("internet: without that", leave(out, in(cgA)), ignored, closed)
	b.add("internet: loopback", leave(udp(home, 1000, home, 53), in(cgA)), ignored, confined)
	b.add("internet: loopback, IPv6", leave(udp(home6, 1000, home6, 53), in(cgA)), ignored, confined)
	b.add("internet: the overlay", leave(tcp(a4, 1000, remote4, 443), in(cgA)), pass(1, A, Remote), confined)
	b.add("internet: answers too", flags(leave(out, in(cgA)), synAck), refuse(flow.InternetDenied, A, 0), confined)
	b.add("internet: fragments too", later(leave(udp(lan4, 1, outside4, 2), in(cgA))), refuse(flow.InternetDenied, A, 0), confined)
	b.add("internet: what arrives is not sent", reach(out.Reverse(), in(cgA)), ignored, confined)
	b.add("internet: the call is refused", call(tcp(netip.Addr{}, 0, outside4, 443), in(cgA)), refuse(flow.InternetDenied, A, 0), confined)
	b.add("internet: the call is refused, IPv6", call(udp(netip.Addr{}, 0, outside6, 53), in(cgA)), refuse(flow.InternetDenied, A, 0), confined)
	b.add("internet: a call to loopback", call(udp(netip.Addr{}, 0, home, 53), in(cgA)), ignored, confined)
	b.add("internet: a call to no address is one to this host", call(tcp(netip.Addr{}, 0, ip("0.0.0.0"), 80), in(cgA)), ignored, confined)
	b.add("internet: a call of another", call(tcp(netip.Addr{}, 0, outside4, 443), in(cgB)), ignored, confined)

	into := tcp(outside4, 4000, lan4, 8080)
	connected := func(p policy.Packet) policy.Packet {
		p.Connected = true
		return p
	}
	b.add("listen: the lan is refused", reach(into, in(cgA)), refuse(flow.ListenOverlay, 0, A), closed)
	b.add("listen: the lan is refused, IPv6", reach(tcp(outside6, 4000, lan6, 8080), in(cgA)), refuse(flow.ListenOverlay, 0, A), closed)
	b.add("listen: datagrams", reach(udp(outside4, 4000, lan4, 8080), in(cgA)), refuse(flow.ListenOverlay, 0, A), closed)
	b.add("listen: datagrams that it asked for", connected(reach(udp(outside4, 53, lan4, 1000), in(cgA))), ignored, closed)
	b.add("listen: connections that it opened", flags(reach(into, in(cgA)), synAck), ignored, closed)
	b.add("listen: a fragment", later(reach(udp(outside4, 4000, lan4, 8080), in(cgA))), refuse(flow.ListenOverlay, 0, A), closed)
	b.add("listen: loopback", reach(tcp(home, 4000, home, 8080), in(cgA)), ignored, closed)
	b.add("listen: another workload", reach(into, in(cgB)), ignored, closed)
	b.add("listen: it may send", leave(out, in(cgA)), ignored, closed)
	b.add("listen: the overlay", flags(reach(tcp(remote4, 4000, a4, 8080), in(cgA)), 0x10), pass(40, Remote, A), closed, known(tcp(remote4, 4000, a4, 8080), 40))
}

// workloadDevice is a device that leads to workload B, in a network namespace of its own; freeDevice leads to nobody.
const (
	workloadDevice = 77
	freeDevice     = 78
)

func via(p policy.Packet, device uint32) policy.Packet {
	p.Interface, p.Device = device, policy.DeviceWorkload
	return p
}

// namespaces is what arrives from and leaves by the device of a workload.
func (b *builder) namespaces() {
	placed := with(func(v *policy.View) { v.Interfaces = map[uint32]identity.Number{workloadDevice: B} })
	from := func(t flow.Tuple) policy.Packet {
		return via(packet(policy.HookFromWorkload, t, kernel), workloadDevice)
	}
	into := func(t flow.Tuple) policy.Packet {
		return via(packet(policy.HookToWorkload, t, kernel), workloadDevice)
	}
	rules := with(func(v *policy.View) {
		v.Rulesets[B][egress(Remote, flow.TCP, 443)] = allow(120)
		v.Rulesets[B][ingress(Remote, flow.TCP, 80)] = allow(121)
	})
	out, in443 := tcp(b4, 1000, remote4, 443), tcp(remote4, 4000, b4, 80)
	b.add("namespace: it opens", from(out), pass(120, B, Remote), placed, rules)
	b.add("namespace: it opens, IPv6", from(tcp(b6, 1000, remote6, 443)), pass(120, B, Remote), placed, rules)
	b.add("namespace: it has no rule", from(tcp(b4, 1000, remote4, 444)), refuse(flow.NoRule, B, Remote), placed, rules)
	b.add("namespace: another's source", from(tcp(a4, 1000, remote4, 443)), refuse(flow.SpoofedSource, B, Remote), placed, rules)
	b.add("namespace: a remote's source", from(udp(remote4, 1000, broad4, 53)), refuse(flow.SpoofedSource, B, Broad), placed, rules)
	b.add("namespace: the lan's source", from(udp(lan4, 1000, remote4, 53)), refuse(flow.SpoofedSource, B, Remote), placed, rules)
	b.add("namespace: to a workload of the host", from(tcp(b4, 1000, a4, 80)), refuse(flow.NoRule, B, A), placed, rules)
	b.add("namespace: it answers", flags(from(in443.Reverse()), synAck), pass(121, B, Remote), placed, rules, known(in443, 121))
	b.add("namespace: it answers nothing", flags(from(in443.Reverse()), synAck), refuse(flow.CTInvalid, B, Remote), placed, rules)
	b.add("namespace: it is answered", flags(into(out.Reverse()), synAck), pass(120, Remote, B), placed, rules, known(out, 120))
	b.add("namespace: it is called", into(in443), pass(121, Remote, B), placed, rules, known(in443, 121))
	b.add("namespace: what was not judged before does not reach it", into(in443), refuse(flow.CTInvalid, Remote, B), placed, rules)
	b.add("namespace: what is for another does not reach it", into(tcp(remote4, 4000, a4, 8080)), refuse(flow.WrongReceiver, Remote, B), placed, rules,
		known(tcp(remote4, 4000, a4, 8080), 40), leaves(1))
	forwarded := func(p policy.Packet, device uint32) policy.Packet {
		p.Interface = device
		return p
	}
	b.add("namespace: forwarded into the tunnel", forwarded(exit(out, kernel), workloadDevice), pass(120, B, Remote), placed, rules, known(out, 120))
	b.add("namespace: forwarded from another's device", forwarded(flags(exit(out, kernel), policy.FlagACK), freeDevice), refuse(flow.NoIdentity, B, Remote), placed, rules,
		known(out, 120), leaves(1))
	b.add("namespace: forwarded with a host process's source", forwarded(flags(exit(tcp(a4, 1000, remote4, 443), kernel), policy.FlagACK), workloadDevice),
		refuse(flow.SpoofedSource, B, Remote), placed, rules, known(tcp(a4, 1000, remote4, 443), 1), leaves(1))
	b.add("namespace: forwarded like a reply of the kernel", forwarded(flags(exit(tcp(a4, 8080, remote4, 4000), kernel), policy.FlagRST), freeDevice),
		refuse(flow.NoIdentity, A, Remote), placed, known(tcp(remote4, 4000, a4, 8080), 40), leaves(1))
	b.add("namespace: forwarded out of the tunnel", enter(in443), pass(121, Remote, B), placed, rules)
	b.add("namespace: a process of the host calls it", via(leave(tcp(a4, 1000, b4, 80), in(cgA)), workloadDevice), pass(11, A, B), placed, rules)
	b.add("namespace: a process of the host is called", via(flags(reach(tcp(b4, 1000, a4, 80), in(cgA)), policy.FlagACK), workloadDevice), pass(9, B, A), placed, rules,
		known(tcp(b4, 1000, a4, 80), 9))
	b.add("namespace: a device of nobody", via(packet(policy.HookFromWorkload, out, kernel), freeDevice), refuse(flow.NotTunnel, B, Remote), placed, rules)
	b.add("namespace: a device of nobody, in", via(packet(policy.HookToWorkload, in443, kernel), freeDevice), refuse(flow.NotTunnel, Remote, B), placed, rules)
	b.add("namespace: the underlay", from(tcp(lan4, 1, outside4, 2)), ignored, placed, rules)
	b.add("namespace: internet: denied", from(tcp(lan4, 1, outside4, 2)), refuse(flow.InternetDenied, B, 0), placed, rules,
		with(func(v *policy.View) { v.Traits = map[identity.Number]policy.Traits{B: {Confined: true}} }))
	b.add("namespace: listen: overlay", into(tcp(outside4, 4000, lan4, 80)), refuse(flow.ListenOverlay, 0, B), placed, rules,
		with(func(v *policy.View) { v.Traits = map[identity.Number]policy.Traits{B: {OverlayOnly: true}} }))
	b.add("namespace: a first fragment", firstPart(from(tcp(b4, 1000, remote4, 443))), pass(120, B, Remote), placed, rules)
	b.add("namespace: a datagram without answer", later(from(out)), refuse(flow.Fragment, B, Remote), placed, rules)
}

// quota is step 12 for one identity.
func (b *builder) quota() {
	of := func(n int) option { return func(c *Case) { c.Quota = n } }
	out := tcp(a4, 1000, remote4, 443)
	others := known(tcp(a4, 1001, remote4, 443), 1)
	b.add("quota: used up", leave(out, in(cgA)), refuse(flow.CTFull, A, Remote), of(1), others, leaves(1))
	b.add("quota: one is left", leave(out, in(cgA)), pass(1, A, Remote), of(2), others, leaves(2))
	b.add("quota: of the one that opens", enter(tcp(remote4, 4000, a4, 8080)), pass(40, Remote, A), of(1), others, leaves(2))
	b.add("quota: of the one that opens, used up", enter(tcp(remote4, 4000, a4, 8080)), refuse(flow.CTFull, Remote, A), of(1),
		known(tcp(remote4, 4001, a4, 8080), 40), leaves(1))
	b.add("quota: tracked flows go on", flags(leave(out, in(cgA)), policy.FlagACK), pass(1, A, Remote), of(1), known(out, 1), leaves(1))
}
