package policytest

import (
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/policy"
)

const (
	synAck = policy.FlagSYN | policy.FlagACK
	finAck = policy.FlagFIN | policy.FlagACK
)

// quotes is step 8.
func (b *builder) quotes() {
	out := tcp(a4, 1000, remote4, 443)
	in6 := udp(remote6, 4000, a6, 5000)
	dev, rcv, sock := policy.HookIngressDevice, policy.HookIngressSocket, policy.HookEgressDevice
	b.add("quote: an error about what we sent", errorFor(dev, remote4, a4, kernel, out), pass(1, Remote, A), known(out, 1))
	b.add("quote: from a peer that the packet was not for", errorFor(dev, broad4, a4, kernel, out), refuse(flow.CTInvalid, Broad, A), known(out, 1), leaves(1))
	b.add("quote: from a peer that the packet was not for, IPv6", errorFor(dev, broad6, a6, kernel, in6.Reverse()), refuse(flow.CTInvalid, Broad, A), known(in6, 41), leaves(1))
	b.add("quote: received", errorFor(rcv, remote4, a4, in(cgA), out), pass(1, Remote, A), known(out, 1))
	b.add("quote: received, IPv6", errorFor(rcv, remote6, a6, in(cgA), in6.Reverse()), pass(41, Remote, A), known(in6, 41))
	b.add("quote: received from a peer that the packet was not for", errorFor(rcv, broad4, a4, in(cgA), out), refuse(flow.CTInvalid, Broad, A), known(out, 1), leaves(1))
	b.add("quote: received from a peer that the packet was not for, IPv6", errorFor(rcv, broad6, a6, in(cgA), in6.Reverse()), refuse(flow.CTInvalid, Broad, A), known(in6, 41), leaves(1))
	b.add("quote: an error about a reply of ours, IPv6", errorFor(dev, remote6, a6, kernel, in6.Reverse()), pass(41, Remote, A), known(in6, 41))
	b.add("quote: an error of our kernel", errorFor(sock, a6, remote6, kernel, in6), pass(41, A, Remote), known(in6, 41))
	b.add("quote: about nothing", errorFor(dev, remote4, a4, kernel, out), refuse(flow.CTInvalid, Remote, A))
	b.add("quote: about another port", errorFor(dev, remote4, a4, kernel, tcp(a4, 1001, remote4, 443)), refuse(flow.CTInvalid, Remote, A), known(out, 1), leaves(1))
	b.add("quote: about another protocol", errorFor(dev, remote4, a4, kernel, udp(a4, 1000, remote4, 443)), refuse(flow.CTInvalid, Remote, A), known(out, 1), leaves(1))
	b.add("quote: about what the receiver did not send", errorFor(dev, remote4, a4, kernel, out.Reverse()), refuse(flow.CTInvalid, Remote, A), known(out, 1), leaves(1))
	b.add("quote: to another workload than the sender", errorFor(dev, remote4, b4, kernel, out), refuse(flow.CTInvalid, Remote, B), known(out, 1), leaves(1))
	b.add("quote: under an older generation", errorFor(dev, remote4, a4, kernel, out), refuse(flow.CTInvalid, Remote, A), older(out, 1), leaves(1))
	b.add("quote: about a flow that is due", errorFor(dev, remote4, a4, kernel, out), refuse(flow.CTInvalid, Remote, A), due(out, 1, 0), leaves(1))
	b.add("quote: from a revoked host", errorFor(dev, gone4, a4, kernel, out), refuse(flow.Revoked, Gone, A), known(out, 1), leaves(1))
	b.add("quote: from the lan", errorFor(dev, lan4, a4, kernel, out), refuse(flow.SpoofedSource, 0, A), known(out, 1), leaves(1))
	b.add("quote: about a ping", errorFor(dev, remote4, a4, kernel, echo(a4, remote4, 77)), pass(3, Remote, A), known(echo(a4, remote4, 77), 3))
	b.add("quote: forged by a workload", errorFor(policy.HookEgressSocket, b4, remote4, in(cgA), out), refuse(flow.SpoofedSource, A, Remote), known(out, 1), leaves(1))
	b.add("quote: in clear", errorFor(policy.HookGuard, remote4, a4, kernel, out), refuse(flow.NotTunnel, Remote, A), known(out, 1), leaves(1), func(c *Case) {
		c.Packet.Device = policy.DeviceOther
	})
}

// tracked is step 9.
func (b *builder) tracked() {
	out, into := tcp(a4, 1000, remote4, 443), tcp(remote4, 4000, a4, 8080)
	out6 := tcp(a6, 1000, remote6, 443)
	b.add("tracked: goes on", flags(leave(out, in(cgA)), policy.FlagACK), pass(1, A, Remote), known(out, 1))
	b.add("tracked: goes on into the tunnel", flags(exit(out, in(cgA)), policy.FlagACK), pass(1, A, Remote), known(out, 1))
	b.add("tracked: reply out of the tunnel", flags(enter(out.Reverse()), synAck), pass(1, Remote, A), known(out, 1))
	b.add("tracked: reply to the socket", flags(reach(out.Reverse(), in(cgA)), policy.FlagACK), pass(1, Remote, A), known(out, 1))
	b.add("tracked: reply, IPv6", flags(enter(out6.Reverse()), synAck), pass(1, Remote, A), known(out6, 1))
	b.add("tracked: the server's answer", flags(leave(into.Reverse(), in(cgA)), synAck), pass(40, A, Remote), known(into, 40))
	b.add("tracked: reset of our kernel", flags(exit(into.Reverse(), kernel), policy.FlagRST), pass(40, A, Remote), known(into, 40))
	b.add("tracked: acknowledgement of our kernel", flags(exit(out, kernel), policy.FlagACK), pass(1, A, Remote), known(out, 1))
	b.add("tracked: end", flags(leave(out, in(cgA)), finAck), pass(1, A, Remote), known(out, 1))
	b.add("tracked: first packet again", leave(out, in(cgA)), pass(1, A, Remote), known(out, 1))
	b.add("tracked: opened backwards, in", enter(out.Reverse()), refuse(flow.CTInvalid, Remote, A), known(out, 1), leaves(1))
	b.add("tracked: opened backwards, out", leave(into.Reverse(), in(cgA)), refuse(flow.CTInvalid, A, Remote), known(into, 40), leaves(1))
	b.add("tracked: opened backwards with other flags", flags(enter(out.Reverse()), policy.FlagSYN|0x08), refuse(flow.CTInvalid, Remote, A), known(out, 1), leaves(1))
	b.add("tracked: opened backwards under an older generation", enter(out.Reverse()), refuse(flow.CTInvalid, Remote, A), older(out, 1), leaves(1))
	b.add("tracked: ping answered", reply(enter(echo(remote4, a4, 5))), pass(3, Remote, A), known(echo(a4, remote4, 5), 3))
	b.add("tracked: ping answered, IPv6", reply(enter(echo(remote6, a6, 5))), pass(3, Remote, A), known(echo(a6, remote6, 5), 3))
	b.add("tracked: our kernel answers a ping", reply(exit(echo(a4, remote4, 5), kernel)), pass(42, A, Remote), known(echo(remote4, a4, 5), 42))
	b.add("tracked: ping asked backwards", enter(echo(remote4, a4, 5)), refuse(flow.CTInvalid, Remote, A), known(echo(a4, remote4, 5), 3), leaves(1))
	b.add("tracked: next ping", leave(echo(a4, remote4, 5), in(cgA)), pass(3, A, Remote), known(echo(a4, remote4, 5), 3))
	b.add("tracked: datagram answered", enter(udp(remote4, 53, a4, 1000)), pass(2, Remote, A), known(udp(a4, 1000, remote4, 53), 2))
	b.add("tracked: the same ports of another protocol", flags(leave(udp(a4, 1000, remote4, 443), in(cgA)), 0), refuse(flow.NoRule, A, Remote), known(out, 1), leaves(1))

	b.add("again: still allowed, by another rule", flags(leave(out, in(cgA)), policy.FlagACK), pass(1, A, Remote), older(out, 99))
	b.add("again: a reply is judged as the first packet was", flags(enter(out.Reverse()), policy.FlagACK), pass(1, Remote, A), older(out, 99))
	b.add("again: the answer of a server", flags(leave(into.Reverse(), in(cgA)), policy.FlagACK), pass(40, A, Remote), older(into, 99))
	b.add("again: not allowed any more", flags(leave(tcp(a4, 1000, remote4, 444), in(cgA)), policy.FlagACK), refuse(flow.NoRule, A, Remote),
		older(tcp(a4, 1000, remote4, 444), 99), leaves(-1))
	b.add("again: not allowed any more, reply", flags(enter(tcp(remote4, 444, a4, 1000)), policy.FlagACK), refuse(flow.NoRule, Remote, A),
		older(tcp(a4, 1000, remote4, 444), 99), leaves(-1))
	b.add("again: denied now", flags(enter(tcp(remote4, 4000, a4, 9090)), policy.FlagACK), refuseBy(flow.PolicyDeny, 45, Remote, A),
		older(tcp(remote4, 4000, a4, 9090), 40), leaves(-1))
	b.add("again: datagrams", leave(udp(a4, 1000, remote4, 54), in(cgA)), refuse(flow.NoRule, A, Remote), older(udp(a4, 1000, remote4, 54), 2), leaves(-1))
	b.add("again: due, and allowed", flags(leave(out, in(cgA)), policy.FlagACK), pass(1, A, Remote), due(out, 99, 0))
	b.add("again: due, and over", flags(leave(tcp(a4, 1, windows4, 2), in(cgA)), policy.FlagACK), refuseBy(flow.Expired, 52, A, Windows),
		due(tcp(a4, 1, windows4, 2), 52, -minute), leaves(-1))
	b.add("again: not due yet", flags(leave(tcp(a4, 1, windows4, 2), in(cgA)), policy.FlagACK), pass(52, A, Windows), due(tcp(a4, 1, windows4, 2), 52, minute))
	b.add("again: at the receiving socket", flags(reach(into, in(cgA)), policy.FlagACK), pass(40, Remote, A), older(into, 99))
	b.add("again: on loopback", flags(loop(tcp(a4, 1, b4, 80), in(cgA)), policy.FlagACK), pass(11, A, B), older(tcp(a4, 1, b4, 80), 99))
}

// untracked is step 10.
func (b *builder) untracked() {
	out, into := tcp(a4, 1000, remote4, 443), tcp(remote4, 4000, a4, 8080)
	for _, f := range []struct {
		name  string
		flags uint8
	}{
		{"acknowledgement", policy.FlagACK}, {"reset", policy.FlagRST}, {"end", finAck}, {"answer", synAck},
		{"reset and acknowledgement", policy.FlagRST | policy.FlagACK}, {"acknowledgement with urgent and push", policy.FlagACK | 0x28},
	} {
		b.add("untracked: "+f.name, flags(leave(out, in(cgA)), f.flags), refuse(flow.CTInvalid, A, Remote))
		b.add("untracked: "+f.name+" out of the tunnel", flags(enter(into), f.flags), refuse(flow.CTInvalid, Remote, A))
	}
	b.add("untracked: open with urgent and push", flags(leave(out, in(cgA)), policy.FlagSYN|0x28), pass(1, A, Remote))
	b.add("untracked: a socket only receives", reach(into, in(cgA)), refuse(flow.CTInvalid, Remote, A))
	b.add("untracked: a socket only receives datagrams", reach(udp(remote4, 4000, a4, 5000), in(cgA)), refuse(flow.CTInvalid, Remote, A))
	b.add("untracked: loopback only carries", loop(tcp(a4, 1000, b4, 80), in(cgA)), refuse(flow.CTInvalid, A, B))
	b.add("untracked: on loopback, at the receiver", on(reach(tcp(a4, 1000, b4, 80), in(cgB)), policy.DeviceLoopback), refuse(flow.CTInvalid, A, B))
	b.add("untracked: the kernel opens nothing", exit(out, kernel), refuse(flow.CTInvalid, A, Remote))
	b.add("untracked: the kernel sends no datagrams", exit(udp(a4, 1000, remote4, 53), kernel), refuse(flow.CTInvalid, A, Remote))
	b.add("untracked: the kernel pings nobody", exit(echo(a4, remote4, 5), kernel), refuse(flow.CTInvalid, A, Remote))
	b.add("untracked: the kernel resets nothing", flags(exit(out, kernel), policy.FlagRST), refuse(flow.CTInvalid, A, Remote))
	b.add("untracked: out of a kernel's socket", leave(udp(a4, 1000, remote4, 53), kernel), refuse(flow.CTInvalid, A, Remote))
	b.add("untracked: answer to no ping", reply(enter(echo(remote4, a4, 5))), refuse(flow.CTInvalid, Remote, A))
	b.add("untracked: answer to no ping, IPv6", reply(enter(echo(remote6, a6, 5))), refuse(flow.CTInvalid, Remote, A))
	b.add("untracked: open, at the tunnel first", exit(out, in(cgA)), pass(1, A, Remote))
}

// rules is step 11.
func (b *builder) rules() {
	b.add("rules: TCP", leave(tcp(a4, 1000, remote4, 443), in(cgA)), pass(1, A, Remote))
	b.add("rules: TCP, IPv6", leave(tcp(a6, 1000, remote6, 443), in(cgA)), pass(1, A, Remote))
	b.add("rules: UDP", leave(udp(a4, 1000, remote4, 53), in(cgA)), pass(2, A, Remote))
	b.add("rules: ping", leave(echo(a4, remote4, 5), in(cgA)), pass(3, A, Remote))
	b.add("rules: ping, IPv6 means the same rule", leave(echo(a6, remote6, 5), in(cgA)), pass(3, A, Remote))
	b.add("rules: in, TCP", enter(tcp(remote4, 4000, a4, 8080)), pass(40, Remote, A))
	b.add("rules: in, TCP, IPv6", enter(tcp(remote6, 4000, a6, 8080)), pass(40, Remote, A))
	b.add("rules: in, UDP", enter(udp(remote4, 4000, a4, 5000)), pass(41, Remote, A))
	b.add("rules: in, ping", enter(echo(remote4, a4, 5)), pass(42, Remote, A))
	b.add("rules: in, ping, IPv6", enter(echo(remote6, a6, 5)), pass(42, Remote, A))
	b.add("rules: in, denied", enter(tcp(remote4, 4000, a4, 9090)), refuseBy(flow.PolicyDeny, 45, Remote, A))
	b.add("rules: none for the port", leave(tcp(a4, 1000, remote4, 444), in(cgA)), refuse(flow.NoRule, A, Remote))
	b.add("rules: none for the protocol", leave(udp(a4, 1000, remote4, 443), in(cgA)), refuse(flow.NoRule, A, Remote))
	b.add("rules: the source port is no destination port", leave(tcp(a4, 443, remote4, 1000), in(cgA)), refuse(flow.NoRule, A, Remote))
	b.add("rules: egress is not ingress", enter(tcp(remote4, 4000, a4, 443)), refuse(flow.NoRule, Remote, A))
	b.add("rules: ingress is not egress", leave(tcp(a4, 1000, remote4, 8080), in(cgA)), refuse(flow.NoRule, A, Remote))
	b.add("rules: of A are not B's", enter(tcp(remote4, 4000, b4, 8080)), refuse(flow.NoRule, Remote, B))
	b.add("rules: a workload without ruleset", enter(tcp(remote4, 4000, node4, 8080)), refuse(flow.NoRule, Remote, Node))
	b.add("rules: last port", leave(tcp(a4, 1000, remote4, 65535), in(cgA)), pass(4, A, Remote))
	b.add("rules: last port, in", enter(tcp(remote4, 65535, a4, 65535)), pass(43, Remote, A))
	b.add("rules: first port", leave(tcp(a4, 65535, remote4, 1), in(cgA)), pass(5, A, Remote))
	b.add("rules: port 0 is covered by every port", leave(tcp(a4, 1000, broad4, 0), in(cgA)), pass(34, A, Broad))
	b.add("rules: port 0 by no port", leave(tcp(a4, 1000, remote4, 0), in(cgA)), refuse(flow.NoRule, A, Remote))
	b.add("rules: source port 0", leave(tcp(a4, 0, remote4, 443), in(cgA)), pass(1, A, Remote))
	b.add("rules: everything", leave(echo(a4, broad4, 5), in(cgA)), pass(30, A, Broad))
	b.add("rules: everything, IPv6", leave(echo(a6, broad6, 5), in(cgA)), pass(30, A, Broad))
	b.add("rules: a narrow deny in a broad allow", leave(tcp(a4, 1000, broad4, 22), in(cgA)), refuseBy(flow.PolicyDeny, 31, A, Broad))
	b.add("rules: a broad deny under a narrow allow", leave(udp(a4, 1000, broad4, 53), in(cgA)), refuseBy(flow.PolicyDeny, 32, A, Broad))
	b.add("rules: a broad deny under a broader allow", leave(udp(a4, 1000, broad4, 99), in(cgA)), refuseBy(flow.PolicyDeny, 32, A, Broad))
	b.add("rules: the narrowest allow is named", leave(tcp(a4, 1000, broad4, 443), in(cgA)), pass(35, A, Broad))
	b.add("rules: the protocol's allow before everything's", leave(tcp(a4, 1000, broad4, 80), in(cgA)), pass(34, A, Broad))
	b.add("rules: no policy at all", leave(tcp(a4, 1000, remote4, 443), in(cgA)), refuse(flow.NoRule, A, Remote), with(func(v *policy.View) { v.Rulesets = nil }))
	b.add("rules: allow and deny in one place", leave(tcp(a4, 1000, remote4, 443), in(cgA)), refuseBy(flow.PolicyDeny, 80, A, Remote),
		with(func(v *policy.View) {
			v.Rulesets[A][egress(Remote, flow.TCP, 443)] = policy.Value{Allow: policy.Slot{Rule: 1}, Deny: policy.Slot{Rule: 80}}
		}))
	b.add("rules: deny everything", leave(tcp(a4, 1000, remote4, 443), in(cgA)), refuseBy(flow.PolicyDeny, 81, A, Remote),
		with(func(v *policy.View) { v.Rulesets[A][egress(Remote, flow.AnyProto, 0)] = deny(81) }))
	b.add("rules: an ICMP identifier is no port", leave(echo(a4, remote4, 443), in(cgA)), pass(3, A, Remote))
}

// rulesInTime is step 11 with time windows.
func (b *builder) rulesInTime() {
	to := func(port uint16) policy.Packet { return leave(tcp(a4, 1000, windows4, port), in(cgA)) }
	b.add("time: later", to(1), refuseBy(flow.Expired, 51, A, Windows))
	b.add("time: later has come", to(1), pass(51, A, Windows), at(minute))
	b.add("time: over", to(2), refuseBy(flow.Expired, 52, A, Windows))
	b.add("time: now", to(3), pass(53, A, Windows))
	b.add("time: at the end", to(3), refuseBy(flow.Expired, 53, A, Windows), at(minute))
	b.add("time: before the beginning", to(3), refuseBy(flow.Expired, 53, A, Windows), at(-minute-1))
	b.add("time: a deny that is over", to(4), pass(54, A, Windows))
	b.add("time: a deny of now", to(5), refuseBy(flow.PolicyDeny, 65, A, Windows))
	b.add("time: a deny of before", to(5), pass(55, A, Windows), at(minute))
	b.add("time: the first instant counts", to(6), pass(56, A, Windows))
	b.add("time: the last instant does not", to(7), refuseBy(flow.Expired, 57, A, Windows))
	b.add("time: a deny that is to come bounds the flow", to(8), pass(58, A, Windows))
	b.add("time: past ends bound nothing", to(9), pass(59, A, Windows))
	b.add("time: a narrow rule is closed, no broad one", to(90), refuseBy(flow.Expired, 70, A, Windows))
	b.add("time: a narrow rule is closed, a broad one open", leave(udp(a4, 1000, windows4, 90), in(cgA)), pass(72, A, Windows))
	b.add("time: both are closed, the narrow one is named", leave(udp(a4, 1000, windows4, 90), in(cgA)), refuseBy(flow.Expired, 71, A, Windows), at(2*minute))
	b.add("time: the call says so too", call(tcp(a4, 0, windows4, 2), in(cgA)), refuseBy(flow.Expired, 52, A, Windows))
}

// sameHost is what stays on the host.
func (b *builder) sameHost() {
	local := func(p policy.Packet) policy.Packet { return on(p, policy.DeviceLoopback) }
	ab := tcp(a4, 1000, b4, 80)
	b.add("same host: both allow", local(leave(ab, in(cgA))), pass(11, A, B))
	b.add("same host: both allow, IPv6", local(leave(tcp(a6, 1000, b6, 80), in(cgA))), pass(11, A, B))
	b.add("same host: both allow datagrams", local(leave(udp(a4, 1000, b4, 80), in(cgA))), pass(11, A, B))
	b.add("same host: both allow pings", local(leave(echo(a4, b4, 80), in(cgA))), pass(11, A, B))
	b.add("same host: the receiver has no rule", local(leave(tcp(a4, 1000, b4, 81), in(cgA))), refuse(flow.NoRule, A, B))
	b.add("same host: the sender has no rule", local(leave(tcp(a4, 1000, b4, 82), in(cgA))), refuse(flow.NoRule, A, B))
	b.add("same host: the receiver denies", local(leave(tcp(a4, 1000, b4, 84), in(cgA))), refuseBy(flow.PolicyDeny, 16, A, B))
	b.add("same host: the other way is another flow", local(leave(tcp(b4, 1000, a4, 80), in(cgB))), refuse(flow.NoRule, B, A))
	b.add("same host: carried", loop(ab, in(cgA)), pass(11, A, B), known(ab, 11))
	b.add("same host: received", local(reach(ab, in(cgB))), pass(11, A, B), known(ab, 11))
	b.add("same host: answered", flags(local(leave(ab.Reverse(), in(cgB))), synAck), pass(11, B, A), known(ab, 11))
	b.add("same host: the answer is carried", flags(loop(ab.Reverse(), in(cgB)), synAck), pass(11, B, A), known(ab, 11))
	b.add("same host: the answer is received", flags(local(reach(ab.Reverse(), in(cgA))), synAck), pass(11, B, A), known(ab, 11))
	b.add("same host: received by another", local(reach(ab, in(cgA))), refuse(flow.WrongReceiver, A, A), known(ab, 11), leaves(1))
	b.add("same host: received by nobody", local(reach(ab, in(cgNobody))), refuse(flow.NoIdentity, A, B), known(ab, 11), leaves(1))
	b.add("same host: the kernel refuses", flags(loop(ab.Reverse(), kernel), policy.FlagRST), pass(11, B, A), known(ab, 11))
	b.add("same host: pretends to be its destination", local(leave(tcp(b4, 1000, b4, 80), in(cgA))), refuse(flow.SpoofedSource, A, B))
	b.add("same host: with itself", local(leave(tcp(a4, 1000, a4, 80), in(cgA))), pass(9, A, A))
	b.add("same host: with itself, answered", flags(local(leave(tcp(a4, 80, a4, 1000), in(cgA))), synAck), pass(9, A, A), known(tcp(a4, 1000, a4, 80), 9))
	b.add("same host: with itself, received", local(reach(tcp(a4, 1000, a4, 80), in(cgA))), pass(9, A, A), known(tcp(a4, 1000, a4, 80), 9))
	b.add("same host: the same port at both ends", local(leave(tcp(a4, 80, a4, 80), in(cgA))), pass(9, A, A))
	b.add("same host: the node has no ruleset", local(leave(tcp(a4, 1000, node4, 80), in(cgA))), refuse(flow.NoRule, A, Node))
	b.add("same host: judged again, the receiver's rule is gone", flags(local(leave(ab, in(cgA))), policy.FlagACK), refuse(flow.NoRule, A, B), older(ab, 11), leaves(-1),
		with(func(v *policy.View) { delete(v.Rulesets[B], ingress(A, flow.TCP, 80)) }))
	b.add("same host: judged again, the sender's rule is gone", flags(local(reach(ab.Reverse(), in(cgA))), policy.FlagACK), refuse(flow.NoRule, B, A), older(ab, 11), leaves(-1),
		with(func(v *policy.View) { delete(v.Rulesets[A], egress(B, flow.TCP, 80)) }))
}

// full is step 12.
func (b *builder) full() {
	crowded := func(c *Case) { c.Full = true }
	out := tcp(a4, 1000, remote4, 443)
	b.add("full: new flow", leave(out, in(cgA)), refuse(flow.CTFull, A, Remote), crowded)
	b.add("full: new flow out of the tunnel", enter(udp(remote4, 4000, a4, 5000)), refuse(flow.CTFull, Remote, A), crowded)
	b.add("full: what is not allowed is not allowed", leave(tcp(a4, 1000, remote4, 444), in(cgA)), refuse(flow.NoRule, A, Remote), crowded)
	b.add("full: tracked flows go on", flags(leave(out, in(cgA)), policy.FlagACK), pass(1, A, Remote), known(out, 1), crowded)
	b.add("full: tracked flows are judged again", flags(enter(out.Reverse()), policy.FlagACK), pass(1, Remote, A), older(out, 99), crowded)
	b.add("full: calls are not tracked", call(tcp(a4, 0, remote4, 443), in(cgA)), pass(1, A, Remote), crowded)
}
