//go:build ignore

// SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only)
/* Revocation: ends the sockets of flows that the judge lets pass no longer, so that processes learn at once instead of
 * waiting out a timeout. The packets of such flows are denied already; nothing here allows or denies anything.
 *
 * Two iterators visit every socket of the network namespace in which they are opened. One socket's way, numbered as the
 * judge's steps (judge.c):
 *
 *  1. Scope: neither address is the overlay's, or there is no other end: leave it.
 *  4. Lease: ended in mode deny-all: destroy.
 *  6. Own end: the local address belongs to nobody on this host: destroy.
 *  7. Peer: the other address is unknown, expired or revoked: destroy.
 *  9. Tracked: ask the rules about the direction in which the flow was opened.
 * 10. Untracked: a TCP connection that is past its first packet is one that the judge denies: destroy. One that is
 *     being opened is asked about as the first packet would be, and UDP in both directions, for either may open it.
 * 11. Policy: deny: destroy.
 *
 * Step 5, whose socket it is, is left out: who has a socket does not change, and a workload that is taken from this
 * host takes its address with it. In doubt a socket is left alone: the judge keeps its packets anyway.
 */
#include "lib/policy.h"
#include "lib/sock.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* What one sweep counts. There is one sweep at a time. */
__u64 destroyed = 0;
__u64 refused = 0; /* sockets that the kernel did not destroy */

struct end {
	struct tuple t; /* from here to there */
	__u8 family;
	__u8 state;
};

/* allowed_by is step 11 for a flow that src opened; what is only audited passes. */
static __always_inline bool allowed_by(const struct addr *src, const struct addr *dst, __u8 proto, __u16 port, __u64 now)
{
	struct answer a;

	ask_policy(src, dst, proto, port, now, &a);
	return a.verdict != VERDICT_DENY;
}

static __always_inline bool opening(const struct end *s)
{
	return s->t.proto == PROTO_UDP || s->state == TCP_SYN_SENT;
}

/* allowed is steps 4 to 11. */
static __always_inline bool allowed(const struct end *s, const struct view *v, __u64 now)
{
	const struct addr *here = find_addr(&s->t.src, v->generation), *there = find_addr(&s->t.dst, v->generation);
	struct tuple key;
	struct conn *c;
	bool swapped;

	/* 4. Lease. */
	if (v->lease_mode == LEASE_DENY_ALL && now >= v->lease_ends)
		return false;
	/* 6. Own end. 7. Peer. */
	if (!addr_local(here) || peer_reason(there, now))
		return false;
	/* 9. Tracked. */
	swapped = ct_key(&s->t, &key);
	c = ct_find(&key);
	if (c && !ct_idle(c, now)) {
		if (ct_side(READ_ONCE(c->state), swapped))
			return allowed_by(there, here, s->t.proto, s->t.sport, now);
		return allowed_by(here, there, s->t.proto, s->t.dport, now);
	}
	/* 10. Untracked. A lease that ended in mode deny-new takes nothing back. */
	if (!opening(s))
		return false;
	/* 11. Policy. */
	return allowed_by(here, there, s->t.proto, s->t.dport, now) ||
	       (s->t.proto == PROTO_UDP && allowed_by(there, here, s->t.proto, s->t.sport, now));
}

/* condemned decides on one socket. Before the first view, and where a flip comes in between, nothing is taken back. */
__noinline int condemned(struct end *s)
{
	__u32 zero = 0, slot;
	const struct settings *cfg;
	const struct view *v;
	__u64 generation;

	if (!s)
		return 0;
	/* 1. Scope. */
	if (!s->t.dport || ip_unset(&s->t.dst) || ip_unset(&s->t.src))
		return 0;
	if (!in_overlay(&s->t.src, s->family) && !in_overlay(&s->t.dst, s->family))
		return 0;
	cfg = bpf_map_lookup_elem(&config, &zero);
	generation = cfg ? READ_ONCE(cfg->generation) : 0;
	slot = generation & 1;
	v = bpf_map_lookup_elem(&views, &slot);
	if (!generation || !v || v->generation != generation)
		return 0;
	return !allowed(s, v, bpf_ktime_get_ns());
}

/* read_end reads the socket's two ends. An IPv6 socket that talks IPv4 has mapped addresses, as every tuple here. */
static __always_inline bool read_end(struct end *s, const struct sock_common *sk)
{
	s->state = sk->skc_state;
	s->t.sport = sk->skc_num;
	s->t.dport = bpf_ntohs(sk->skc_dport);
	if (sk->skc_family == AF_INET) {
		s->family = 4;
		ip_from4(&s->t.src, sk->skc_rcv_saddr);
		ip_from4(&s->t.dst, sk->skc_daddr);
		return true;
	}
	if (sk->skc_family != AF_INET6)
		return false;
	for (int i = 0; i < 4; i++) {
		s->t.src.w[i] = sk->skc_v6_rcv_saddr.in6_u.u6_addr32[i];
		s->t.dst.w[i] = sk->skc_v6_daddr.in6_u.u6_addr32[i];
	}
	s->family = ip_mapped(&s->t.dst) || ip_mapped(&s->t.src) ? 4 : 6;
	return true;
}

static __always_inline void destroy(struct sock_common *sk)
{
	if (bpf_sock_destroy(sk))
		__sync_fetch_and_add(&refused, 1);
	else
		__sync_fetch_and_add(&destroyed, 1);
}

/* told: somebody learns from the end of a TCP connection in this state. A listener has no flow; a request socket becomes
 * a connection only by a packet that the judge sees; what both ends closed (TIME_WAIT, CLOSING, LAST_ACK), or this end
 * closed and its process let go, has nobody left to tell. */
static __always_inline bool told(const struct sock *sk, __u8 state)
{
	switch (state) {
	case TCP_ESTABLISHED:
	case TCP_SYN_SENT:
	case TCP_CLOSE_WAIT:
		return true;
	case TCP_FIN_WAIT1:
	case TCP_FIN_WAIT2:
		return sk->sk_socket;
	}
	return false;
}

SEC("iter/tcp")
int revoke_tcp(struct bpf_iter__tcp *ctx)
{
	struct sock_common *common = ctx->sk_common;
	struct sock *sk;
	struct end s = {};

	if (!common)
		return 0;
	sk = (struct sock *)bpf_skc_to_tcp_sock(common); /* null for request and TIME_WAIT sockets */
	if (!sk || !read_end(&s, &sk->__sk_common) || !told(sk, s.state))
		return 0;
	s.t.proto = PROTO_TCP;
	if (condemned(&s))
		destroy(common);
	return 0;
}

/* revoke_udp: only a connected UDP socket has one flow; others are judged datagram by datagram, and their process
 * learns from sendmsg. */
SEC("iter/udp")
int revoke_udp(struct bpf_iter__udp *ctx)
{
	struct udp_sock *udp = ctx->udp_sk;
	struct end s = {};

	if (!udp || !read_end(&s, &((struct sock *)udp)->__sk_common) || s.state != TCP_ESTABLISHED)
		return 0;
	s.t.proto = PROTO_UDP;
	if (condemned(&s))
		destroy((struct sock_common *)udp);
	return 0;
}
