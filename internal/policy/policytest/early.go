package policytest

import (
	"net/netip"
	"time"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policy"
)

// scope is step 1.
func (b *builder) scope() {
	b.add("scope: lan to lan leaves a socket", leave(tcp(lan4, 1000, outside4, 80), in(cgNobody)), ignored)
	b.add("scope: lan to lan reaches a socket", reach(tcp(lan4, 1000, outside4, 80), in(cgNobody)), ignored)
	b.add("scope: lan to lan at the guard", guard(tcp(lan4, 1000, outside4, 80), kernel), ignored)
	b.add("scope: lan to lan at the guard, IPv6", guard(udp(lan6, 1000, outside6, 80), kernel), ignored)
	b.add("scope: lan to lan on loopback", loop(udp(lan4, 1, lan4, 2), in(cgA)), ignored)
	b.add("scope: malformed underlay packet is not ours", malformed(guard(tcp(lan4, 1, outside4, 2), kernel)), ignored)
	b.add("scope: fragment of the underlay is not ours", fragment(leave(udp(lan4, 1, outside4, 2), in(cgA))), ignored)
	b.add("scope: first address of the range", guard(udp(lan4, 1, ip("198.18.0.0"), 2), kernel), refuse(flow.NotTunnel, 0, 0))
	b.add("scope: last address of the range", guard(udp(lan4, 1, ip("198.19.255.255"), 2), kernel), refuse(flow.NotTunnel, 0, 0))
	b.add("scope: address before the range", guard(udp(lan4, 1, ip("198.17.255.255"), 2), kernel), ignored)
	b.add("scope: address after the range", guard(udp(lan4, 1, ip("198.20.0.0"), 2), kernel), ignored)
	b.add("scope: IPv6 address beside the range", guard(udp(lan6, 1, ip("fd5a:8::1"), 2), kernel), ignored)
	b.add("scope: IPv6 last address of the range", guard(udp(lan6, 1, ip("fd5a:7:0:ffff:ffff:ffff:ffff:ffff"), 2), kernel), refuse(flow.NotTunnel, 0, 0))
	b.add("scope: the tunnel carries nothing else, out", exit(udp(lan4, 1, outside4, 2), in(cgA)), refuse(flow.UnknownPeer, 0, 0))
	b.add("scope: the tunnel carries nothing else, in", enter(udp(lan4, 1, outside4, 2)), refuse(flow.UnknownPeer, 0, 0))
	b.add("scope: the tunnel carries nothing else, IPv6", exit(udp(lan6, 1, outside6, 2), in(cgA)), refuse(flow.UnknownPeer, 0, 0))
	b.add("scope: connect to the lan", call(tcp(netip.Addr{}, 0, lan4, 80), in(cgA)), ignored)
	b.add("scope: connect to the lan from an overlay address", call(tcp(a4, 0, lan4, 80), in(cgA)), ignored)
	b.add("scope: bind to a lan address", packet(policy.HookBind, tcp(lan4, 80, netip.Addr{}, 0), in(cgNobody)), ignored)
	b.add("scope: bind to the wildcard", packet(policy.HookBind, tcp(ip("0.0.0.0"), 80, netip.Addr{}, 0), in(cgNobody)), ignored)
	b.add("scope: bind to the IPv6 wildcard", packet(policy.HookBind, tcp(ip("::"), 80, netip.Addr{}, 0), in(cgNobody)), ignored)
}

// form is step 2.
func (b *builder) form() {
	b.add("form: malformed, out of a socket", malformed(leave(tcp(a4, 1000, remote4, 443), in(cgA))), refuse(flow.Malformed, A, Remote))
	b.add("form: malformed, out of the tunnel", malformed(enter(tcp(remote4, 1000, a4, 8080))), refuse(flow.Malformed, Remote, A))
	b.add("form: malformed, IPv6", malformed(enter(tcp(remote6, 1000, a6, 8080))), refuse(flow.Malformed, Remote, A))
	b.add("form: malformed, at the guard", malformed(guard(tcp(remote4, 1000, a4, 8080), kernel)), refuse(flow.Malformed, Remote, A))
	b.add("form: fragment, into the tunnel", fragment(exit(udp(a4, 1000, remote4, 53), in(cgA))), refuse(flow.Fragment, A, Remote))
	b.add("form: fragment, out of the tunnel", fragment(enter(udp(remote4, 1000, a4, 5000))), refuse(flow.Fragment, Remote, A))
	b.add("form: fragment, IPv6", fragment(enter(udp(remote6, 1000, a6, 5000))), refuse(flow.Fragment, Remote, A))
	b.add("form: fragment of a tracked flow", fragment(exit(udp(a4, 1000, remote4, 53), in(cgA))), refuse(flow.Fragment, A, Remote),
		known(udp(a4, 1000, remote4, 53), 2), leaves(1))
	for _, proto := range []flow.Proto{2, 33, 47, 50, 136, 255} {
		b.add("form: protocol "+proto.String(), leave(tuple(proto, a4, 0, remote4, 0), in(cgA)), refuse(flow.UnknownProto, A, Remote))
	}
	b.add("form: unknown protocol, IPv6", enter(tuple(136, remote6, 0, a6, 0)), refuse(flow.UnknownProto, Remote, A))
	b.add("form: connect of an unknown protocol", call(tuple(136, netip.Addr{}, 0, remote4, 80), in(cgA)), refuse(flow.UnknownProto, 0, Remote))
}

// place is step 3.
func (b *builder) place() {
	b.add("place: guard, overlay destination", guard(tcp(lan4, 1000, a4, 8080), kernel), refuse(flow.NotTunnel, 0, A))
	b.add("place: guard, overlay source", guard(tcp(a4, 1000, lan4, 80), in(cgA)), refuse(flow.NotTunnel, A, 0))
	b.add("place: guard, both ends", guard(tcp(remote4, 1000, a4, 8080), kernel), refuse(flow.NotTunnel, Remote, A))
	b.add("place: guard, IPv6", guard(tcp(remote6, 1000, a6, 8080), kernel), refuse(flow.NotTunnel, Remote, A))
	b.add("place: guard, a tracked flow in clear", flags(guard(tcp(remote4, 443, a4, 1000), kernel), policy.FlagACK), refuse(flow.NotTunnel, Remote, A),
		known(tcp(a4, 1000, remote4, 443), 1), leaves(1))
	b.add("place: leaves a socket by the underlay", on(leave(tcp(a4, 1000, remote4, 443), in(cgA)), policy.DeviceOther), refuse(flow.NotTunnel, A, Remote))
	b.add("place: reaches a socket by the underlay", on(reach(tcp(remote4, 1000, a4, 8080), in(cgA)), policy.DeviceOther), refuse(flow.NotTunnel, Remote, A))
	b.add("place: a tracked flow leaves by the underlay", on(flags(leave(tcp(a4, 1000, remote4, 443), in(cgA)), policy.FlagACK), policy.DeviceOther),
		refuse(flow.NotTunnel, A, Remote), known(tcp(a4, 1000, remote4, 443), 1), leaves(1))
	b.add("place: overlay source to the lan", on(leave(udp(a4, 1000, lan4, 53), in(cgA)), policy.DeviceOther), refuse(flow.NotTunnel, A, 0))
	b.add("place: the underlay has no place for an echo", on(leave(echo(a6, remote6, 9), in(cgA)), policy.DeviceOther), refuse(flow.NotTunnel, A, Remote))
}

// lease is step 4 and its half of step 10.
func (b *builder) lease() {
	ended := func(m policy.LeaseMode) option {
		return with(func(v *policy.View) { v.Lease = policy.Lease{Ends: Now, Mode: m} })
	}
	never := with(func(v *policy.View) { v.Lease = policy.Lease{} })
	conn := tcp(a4, 1000, remote4, 443)
	b.add("lease: ended denies new flows", leave(conn, in(cgA)), refuse(flow.LeaseEnded, A, Remote), ended(policy.LeaseDenyAll))
	b.add("lease: ended denies what comes in", enter(tcp(remote4, 1000, a4, 8080)), refuse(flow.LeaseEnded, Remote, A), ended(policy.LeaseDenyAll))
	b.add("lease: ended denies calls", call(tcp(netip.Addr{}, 0, remote4, 443), in(cgA)), refuse(flow.LeaseEnded, 0, Remote), ended(policy.LeaseDenyAll))
	b.add("lease: ended denies what was judged before", flags(exit(conn, in(cgA)), policy.FlagACK), refuse(flow.LeaseEnded, A, Remote),
		ended(policy.LeaseDenyAll), due(conn, 1, 0), leaves(1))
	b.add("lease: one instant before its end", leave(conn, in(cgA)), pass(1, A, Remote),
		with(func(v *policy.View) { v.Lease.Ends = Now.Add(time.Nanosecond) }))
	b.add("lease: none was ever given", leave(conn, in(cgA)), refuse(flow.LeaseEnded, A, Remote), never)
	b.add("lease: binds are not traffic", packet(policy.HookBind, tcp(a4, 80, netip.Addr{}, 0), in(cgA)), pass(0, A, 0), ended(policy.LeaseDenyAll))
	b.add("lease: deny-new denies new flows", leave(conn, in(cgA)), refuse(flow.LeaseEnded, A, Remote), ended(policy.LeaseDenyNew))
	b.add("lease: deny-new denies new flows from outside", enter(tcp(remote4, 1000, a4, 8080)), refuse(flow.LeaseEnded, Remote, A), ended(policy.LeaseDenyNew))
	b.add("lease: deny-new lets tracked flows go on", flags(exit(conn, in(cgA)), policy.FlagACK), pass(1, A, Remote), ended(policy.LeaseDenyNew), known(conn, 1))
	b.add("lease: deny-new judges tracked flows again", flags(exit(conn, in(cgA)), policy.FlagACK), pass(1, A, Remote), ended(policy.LeaseDenyNew), older(conn, 9))
	b.add("lease: deny-new lets replies pass", flags(enter(conn.Reverse()), policy.FlagACK), pass(1, Remote, A), ended(policy.LeaseDenyNew), known(conn, 1))
	b.add("lease: in deny-new its end bounds no flow", leave(conn, in(cgA)), pass(1, A, Remote), with(func(v *policy.View) { v.Lease.Mode = policy.LeaseDenyNew }))
	b.add("lease: the guard needs none", guard(tcp(remote4, 1, a4, 2), kernel), refuse(flow.NotTunnel, Remote, A), ended(policy.LeaseDenyAll))
}

// owner is step 5.
func (b *builder) owner() {
	toRemote := tcp(a4, 1000, remote4, 443)
	fromB := tcp(b4, 1000, remote4, 443)
	b.add("owner: the socket's own cgroup", leave(toRemote, in(cgA)), pass(1, A, Remote))
	b.add("owner: an ancestor", leave(toRemote, in(990, 980, cgA)), pass(1, A, Remote))
	b.add("owner: a deep ancestor", leave(toRemote, in(990, 991, 992, 993, 994, 995, 996, 997, 998, 999, cgA)), pass(1, A, Remote))
	b.add("owner: nobody", leave(toRemote, in(cgNobody)), refuse(flow.NoIdentity, A, Remote))
	b.add("owner: the parent of a workload is nobody", leave(toRemote, in(cgSystem)), refuse(flow.NoIdentity, A, Remote))
	b.add("owner: by user", leave(toRemote, as(in(cgShared), userOne)), pass(1, A, Remote))
	b.add("owner: another user is another workload", leave(toRemote, as(in(cgShared), userTwo)), refuse(flow.SpoofedSource, B, Remote))
	b.add("owner: a user without workload", leave(toRemote, as(in(cgShared), userNeither)), refuse(flow.NoIdentity, A, Remote))
	b.add("owner: root in a cgroup for users", leave(toRemote, in(cgShared)), refuse(flow.NoIdentity, A, Remote))
	b.add("owner: any user of a workload", leave(toRemote, as(in(cgA), userTwo)), pass(1, A, Remote))
	b.add("owner: two workloads, nested", leave(toRemote, in(cgInner, cgOuter)), refuse(flow.NoIdentity, A, Remote))
	b.add("owner: two workloads, by user and by cgroup", leave(toRemote, as(in(cgBoth), 7)), refuse(flow.NoIdentity, A, Remote))
	b.add("owner: one of two, for the other users", leave(toRemote, as(in(cgBoth), 8)), pass(1, A, Remote))
	b.add("owner: twice the same workload", leave(toRemote, in(cgSame, cgA)), pass(1, A, Remote))
	b.add("owner: three claims, two workloads", leave(toRemote, in(cgSame, cgB, cgA)), refuse(flow.NoIdentity, A, Remote))
	b.add("owner: at the tunnel too", exit(toRemote, in(cgNobody)), refuse(flow.NoIdentity, A, Remote))
	b.add("owner: at the tunnel, by ancestor", exit(toRemote, in(990, cgA)), pass(1, A, Remote))
	b.add("owner: of the receiving socket", reach(tcp(remote4, 9, a4, 8080), in(cgNobody)), refuse(flow.NoIdentity, Remote, A))
	b.add("owner: of the receiving socket, ambiguous", reach(tcp(remote4, 9, a4, 8080), in(cgInner, cgOuter)), refuse(flow.NoIdentity, Remote, A))
	b.add("owner: is asked of tracked flows too", flags(leave(toRemote, in(cgNobody)), policy.FlagACK), refuse(flow.NoIdentity, A, Remote), known(toRemote, 1), leaves(1))
	b.add("owner: loopback", loop(tcp(a4, 1000, b4, 80), in(cgNobody)), refuse(flow.NoIdentity, A, B))
	b.add("owner: calls", call(tcp(netip.Addr{}, 0, remote4, 443), in(cgNobody)), refuse(flow.NoIdentity, 0, Remote))
	b.add("owner: calls, by user", call(tcp(netip.Addr{}, 0, remote4, 443), as(in(cgShared), userOne)), pass(1, A, Remote))
	b.add("owner: calls, ambiguous", call(tcp(netip.Addr{}, 0, remote4, 443), in(cgInner, cgOuter)), refuse(flow.NoIdentity, 0, Remote))
	b.add("owner: B has no rule", leave(fromB, in(cgB)), refuse(flow.NoRule, B, Remote))
}

// ownEnd is step 6 for packets.
func (b *builder) ownEnd() {
	b.add("own end: another's source", leave(tcp(b4, 1000, remote4, 443), in(cgA)), refuse(flow.SpoofedSource, A, Remote))
	b.add("own end: another's source, IPv6", leave(tcp(b6, 1000, remote6, 443), in(cgA)), refuse(flow.SpoofedSource, A, Remote))
	b.add("own end: another's source, at the tunnel", exit(udp(b4, 1000, remote4, 53), in(cgA)), refuse(flow.SpoofedSource, A, Remote))
	b.add("own end: the node's source", leave(udp(node4, 1000, remote4, 53), in(cgA)), refuse(flow.SpoofedSource, A, Remote))
	b.add("own end: a remote's source", exit(udp(remote4, 1000, broad4, 53), in(cgA)), refuse(flow.SpoofedSource, A, Broad))
	b.add("own end: a free overlay address", exit(udp(unknown4, 1000, remote4, 53), in(cgA)), refuse(flow.SpoofedSource, A, Remote))
	b.add("own end: a free overlay address, IPv6", exit(udp(unknown6, 1000, remote6, 53), in(cgA)), refuse(flow.SpoofedSource, A, Remote))
	b.add("own end: an underlay source into the tunnel", exit(udp(lan4, 1000, remote4, 53), in(cgA)), refuse(flow.SpoofedSource, A, Remote))
	b.add("own end: another's tracked flow", flags(exit(tcp(b4, 1000, remote4, 443), in(cgA)), policy.FlagACK), refuse(flow.SpoofedSource, A, Remote),
		known(tcp(b4, 1000, remote4, 443), 1), leaves(1))
	b.add("own end: another's source on loopback", loop(tcp(b4, 1000, a4, 80), in(cgA)), refuse(flow.SpoofedSource, A, A))
	b.add("own end: the listener of another", reach(tcp(remote4, 1000, a4, 8080), in(cgB)), refuse(flow.WrongReceiver, Remote, B),
		known(tcp(remote4, 1000, a4, 8080), 40), leaves(1))
	b.add("own end: the listener of another, IPv6", reach(tcp(remote6, 1000, a6, 8080), in(cgB)), refuse(flow.WrongReceiver, Remote, B),
		known(tcp(remote6, 1000, a6, 8080), 40), leaves(1))
	b.add("own end: a socket on the lan's address", reach(udp(remote4, 1000, lan4, 5000), in(cgA)), refuse(flow.WrongReceiver, Remote, A))
	b.add("own end: a local source out of the tunnel", enter(udp(b4, 1000, a4, 5000)), refuse(flow.SpoofedSource, B, A))
	b.add("own end: its own source out of the tunnel", enter(udp(a4, 1000, a4, 5000)), refuse(flow.SpoofedSource, A, A))
	b.add("own end: an underlay source out of the tunnel", enter(udp(lan4, 1000, a4, 5000)), refuse(flow.SpoofedSource, 0, A))
	b.add("own end: an underlay source out of the tunnel, IPv6", enter(udp(lan6, 1000, a6, 5000)), refuse(flow.SpoofedSource, 0, A))
	b.add("own end: a remote destination out of the tunnel", enter(udp(remote4, 1000, broad4, 53)), refuse(flow.UnknownPeer, Remote, Broad))
	b.add("own end: an underlay destination out of the tunnel", enter(udp(remote4, 1000, lan4, 53)), refuse(flow.UnknownPeer, Remote, 0))
	b.add("own end: the kernel with a remote's source", exit(tcp(remote4, 1000, broad4, 443), kernel), refuse(flow.SpoofedSource, Remote, Broad))
	b.add("own end: the kernel with a remote's source, tracked", flags(exit(tcp(remote4, 4000, a4, 8080), kernel), policy.FlagACK),
		refuse(flow.SpoofedSource, Remote, A), known(tcp(remote4, 4000, a4, 8080), 40), leaves(1))
	b.add("own end: the kernel with the lan's source", exit(udp(lan4, 1000, remote4, 53), kernel), refuse(flow.SpoofedSource, 0, Remote))
	b.add("own end: a selector without an address", leave(tcp(a4, 1000, remote4, 443), in(cgB)), refuse(flow.SpoofedSource, B, Remote),
		with(func(v *policy.View) { delete(v.Addresses, b4); delete(v.Addresses, b6) }))
	b.add("own end: an address that moved away", leave(tcp(a4, 1000, remote4, 443), in(cgA)), refuse(flow.SpoofedSource, A, Remote),
		with(func(v *policy.View) { v.Addresses[a4] = policy.Address{Number: A} }))
}

// calls is step 6 for connect and sendmsg.
func (b *builder) calls() {
	unset, any4, any6 := netip.Addr{}, ip("0.0.0.0"), ip("::")
	b.add("calls: unbound", call(tcp(unset, 0, remote4, 443), in(cgA)), pass(1, A, Remote))
	b.add("calls: unbound, IPv6", call(tcp(unset, 0, remote6, 443), in(cgA)), pass(1, A, Remote))
	b.add("calls: wildcard", call(tcp(any4, 0, remote4, 443), in(cgA)), pass(1, A, Remote))
	b.add("calls: wildcard, IPv6", call(udp(any6, 0, remote6, 53), in(cgA)), pass(2, A, Remote))
	b.add("calls: bound to its own address", call(tcp(a4, 0, remote4, 443), in(cgA)), pass(1, A, Remote))
	b.add("calls: bound to its own address and a port", call(tcp(a4, 1000, remote4, 443), in(cgA)), pass(1, A, Remote))
	b.add("calls: bound to a port alone", call(tcp(any4, 1000, remote4, 443), in(cgA)), refuse(flow.SourceBound, A, Remote))
	b.add("calls: bound to a port alone, IPv6", call(tcp(any6, 1000, remote6, 443), in(cgA)), refuse(flow.SourceBound, A, Remote))
	b.add("calls: bound to another's address", call(tcp(b4, 0, remote4, 443), in(cgA)), refuse(flow.SpoofedSource, A, Remote))
	b.add("calls: bound to the lan's address", call(tcp(lan4, 0, remote4, 443), in(cgA)), refuse(flow.SpoofedSource, A, Remote))
	b.add("calls: bound to a free overlay address", call(udp(unknown4, 0, remote4, 53), in(cgA)), refuse(flow.SpoofedSource, A, Remote))
	b.add("calls: no rule", call(tcp(unset, 0, remote4, 444), in(cgA)), refuse(flow.NoRule, A, Remote))
	b.add("calls: denied", call(tcp(unset, 0, broad4, 22), in(cgA)), refuseBy(flow.PolicyDeny, 31, A, Broad))
	b.add("calls: unknown peer", call(tcp(unset, 0, unknown4, 443), in(cgA)), refuse(flow.UnknownPeer, A, 0))
	b.add("calls: revoked peer", call(tcp(unset, 0, gone4, 443), in(cgA)), refuse(flow.Revoked, A, Gone))
	b.add("calls: expired peer", call(tcp(unset, 0, stale4, 443), in(cgA)), refuse(flow.Expired, A, Stale))
	b.add("calls: to a workload of the host", call(tcp(unset, 0, b4, 80), in(cgA)), pass(11, A, B))
	b.add("calls: to a workload of the host that refuses", call(tcp(unset, 0, b4, 81), in(cgA)), refuse(flow.NoRule, A, B))
	b.add("calls: to a workload of the host that denies", call(tcp(unset, 0, b4, 84), in(cgA)), refuseBy(flow.PolicyDeny, 16, A, B))
	b.add("calls: to itself", call(tcp(unset, 0, a4, 80), in(cgA)), pass(9, A, A))
	b.add("calls: ping", call(echo(any4, remote4, 0), in(cgA)), pass(3, A, Remote))
	b.add("calls: ping, IPv6", call(echo(any6, remote6, 0), in(cgA)), pass(3, A, Remote))
	b.add("calls: port 0", call(udp(unset, 0, remote4, 0), in(cgA)), refuse(flow.NoRule, A, Remote))
	asked := udp(remote4, 4000, a4, 5000)
	b.add("calls: an answer needs no rule of its own", call(asked.Reverse(), in(cgA)), pass(41, A, Remote), known(asked, 41), leaves(1))
	b.add("calls: an answer under a new generation", call(asked.Reverse(), in(cgA)), pass(41, A, Remote), older(asked, 41), leaves(1))
	b.add("calls: an answer to what is not allowed any more", call(asked.Reverse(), in(cgA)), refuse(flow.NoRule, A, Remote), known(asked, 41), leaves(1),
		with(func(v *policy.View) { delete(v.Rulesets[A], ingress(Remote, flow.UDP, 5000)) }))
	b.add("calls: an answer to nobody", call(asked.Reverse(), in(cgA)), refuse(flow.NoRule, A, Remote))
	b.add("calls: TCP never answers by connecting", call(tcp(a4, 8080, remote4, 4000), in(cgA)), refuse(flow.NoRule, A, Remote),
		known(tcp(remote4, 4000, a4, 8080), 40), leaves(1))
	b.add("calls: another's answer", call(asked.Reverse(), in(cgB)), refuse(flow.SpoofedSource, B, Remote), known(asked, 41), leaves(1))
	b.add("calls: of A's user in B's cgroup", call(tcp(unset, 0, remote4, 443), as(in(cgShared), userTwo)), refuse(flow.NoRule, B, Remote))
}

// binds is the bind hook.
func (b *builder) binds() {
	bind := func(a netip.Addr, s policy.Socket) policy.Packet {
		return packet(policy.HookBind, tcp(a, 80, netip.Addr{}, 0), s)
	}
	b.add("bind: own address", bind(a4, in(cgA)), pass(0, A, 0))
	b.add("bind: own address, IPv6", bind(a6, in(cgA)), pass(0, A, 0))
	b.add("bind: own address, by ancestor", bind(a4, in(990, cgA)), pass(0, A, 0))
	b.add("bind: another's address", bind(b4, in(cgA)), refuse(flow.SpoofedSource, A, 0))
	b.add("bind: another's address, IPv6", bind(b6, in(cgA)), refuse(flow.SpoofedSource, A, 0))
	b.add("bind: a remote's address", bind(remote4, in(cgA)), refuse(flow.SpoofedSource, A, 0))
	b.add("bind: a free overlay address", bind(unknown4, in(cgA)), refuse(flow.SpoofedSource, A, 0))
	b.add("bind: nobody", bind(a4, in(cgNobody)), refuse(flow.NoIdentity, A, 0))
	b.add("bind: ambiguous", bind(a4, in(cgInner, cgOuter)), refuse(flow.NoIdentity, A, 0))
	b.add("bind: by user", bind(b4, as(in(cgShared), userTwo)), pass(0, B, 0))
	b.add("bind: the node's address", bind(node4, in(cgA)), refuse(flow.SpoofedSource, A, 0))
}

// peers is step 7.
func (b *builder) peers() {
	b.add("peer: unknown, out of a socket", leave(tcp(a4, 1000, unknown4, 443), in(cgA)), refuse(flow.UnknownPeer, A, 0))
	b.add("peer: unknown, IPv6", leave(tcp(a6, 1000, unknown6, 443), in(cgA)), refuse(flow.UnknownPeer, A, 0))
	b.add("peer: unknown, out of the tunnel", enter(tcp(unknown4, 1000, a4, 8080)), refuse(flow.UnknownPeer, 0, A))
	b.add("peer: unknown, into a socket", reach(tcp(unknown4, 1000, a4, 8080), in(cgA)), refuse(flow.UnknownPeer, 0, A))
	b.add("peer: the lan, into a socket", reach(tcp(lan4, 1000, a4, 8080), in(cgA)), refuse(flow.UnknownPeer, 0, A))
	b.add("peer: the lan, out of a socket by the tunnel", leave(udp(a4, 1000, lan4, 53), in(cgA)), refuse(flow.UnknownPeer, A, 0))
	b.add("peer: the lan, into the tunnel", exit(udp(a4, 1000, lan4, 53), in(cgA)), refuse(flow.UnknownPeer, A, 0))
	b.add("peer: revoked, out", leave(tcp(a4, 1000, gone4, 443), in(cgA)), refuse(flow.Revoked, A, Gone))
	b.add("peer: revoked, in", enter(tcp(gone4, 1000, a4, 8080)), refuse(flow.Revoked, Gone, A))
	b.add("peer: revoked, IPv6", enter(udp(gone6, 1000, a6, 5000)), refuse(flow.Revoked, Gone, A))
	b.add("peer: revoked, tracked, out", flags(exit(tcp(a4, 1000, gone4, 443), in(cgA)), policy.FlagACK), refuse(flow.Revoked, A, Gone),
		known(tcp(a4, 1000, gone4, 443), 6), leaves(1))
	b.add("peer: revoked, tracked, in", flags(enter(tcp(gone4, 443, a4, 1000)), policy.FlagACK), refuse(flow.Revoked, Gone, A),
		older(tcp(a4, 1000, gone4, 443), 6), leaves(1))
	b.add("peer: revoked, tracked under this generation, in", flags(enter(tcp(gone4, 443, a4, 1000)), policy.FlagACK), refuse(flow.Revoked, Gone, A),
		known(tcp(a4, 1000, gone4, 443), 6), leaves(1))
	b.add("peer: expired, out", leave(tcp(a4, 1000, stale4, 443), in(cgA)), refuse(flow.Expired, A, Stale))
	b.add("peer: expired, in", enter(tcp(stale4, 1000, a4, 8080)), refuse(flow.Expired, Stale, A))
	b.add("peer: expires later", leave(tcp(a4, 1000, brief4, 443), in(cgA)), pass(8, A, Brief))
	b.add("peer: expires at this instant", leave(tcp(a4, 1000, brief4, 443), in(cgA)), refuse(flow.Expired, A, Brief), at(minute))
	b.add("peer: expires in the next instant", leave(tcp(a4, 1000, brief4, 443), in(cgA)), pass(8, A, Brief), at(minute-time.Nanosecond))
	b.add("peer: expired since it was tracked", flags(exit(tcp(a4, 1000, brief4, 443), in(cgA)), policy.FlagACK), refuse(flow.Expired, A, Brief),
		due(tcp(a4, 1000, brief4, 443), 8, minute), at(minute), leaves(1))
	b.add("peer: an expired address of one's own lives on", leave(tcp(a4, 1000, remote4, 443), in(cgA)), pass(1, A, Remote),
		with(func(v *policy.View) {
			v.Addresses[a4] = policy.Address{Number: A, Local: true, NotAfter: Now.Add(-minute)}
		}))
	b.add("peer: a number without address rights", leave(tcp(a4, 1000, node4, 80), in(cgA)), refuse(flow.NoRule, A, Node))
	b.add("peer: number 0 is nobody", leave(tcp(a4, 1000, unknown4, 443), in(cgA)), refuse(flow.UnknownPeer, A, 0),
		with(func(v *policy.View) { v.Addresses[unknown4] = policy.Address{Number: identity.NumberUnknown} }))
}
