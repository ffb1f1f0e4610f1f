//go:build ignore

// SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only)
/* The judge in the kernel: the twin of internal/policy/judge.go, which says what it means. The numbered steps are the
 * same, and one table of cases (internal/policy/policytest) runs against both:
 *
 *  1. Scope: neither address is the overlay's: ignore, but on the tunnel device deny.
 *  2. Form: malformed, fragment, unknown protocol: deny.
 *  3. Place: overlay addresses pass the tunnel or loopback and no other device.
 *  4. Lease: ended in mode deny-all: deny.
 *  5. Owner: the socket's cgroup (or an ancestor) and user name exactly one workload, or none.
 *  6. Own end: the sender owns the source, the receiver owns the destination.
 *  7. Peer: the other address belongs to a known, unexpired, unrevoked identity.
 *  8. ICMP errors pass with the tracked connection that they quote.
 *  9. Tracked and judged under this generation: allow; under an older one: judge the first packet's direction again.
 * 10. Untracked: only what opens a connection, at a hook that may open one, goes on.
 * 11. Policy: deny before allow, in the ruleset of each end that is on this host.
 * 12. Track: a full table denies.
 *
 * The fast path takes the steps in another order, with the same answer: a connection that was judged under this
 * generation and is not due again has passed steps 1, 2, 3 for its devices, 4 (the lease's end bounds expires) and 7,
 * so that only 5 and 6 are left, and a seal stands for those.
 *
 * A run reads the generation once. Everything else that it looks up is keyed by that generation, so that each packet is
 * judged by exactly one view. One program for each hook, no tail calls: replacing a program is one atomic step.
 */
#include "lib/run.h"
#include "lib/socket.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* contradicts: a bare SYN, or an echo request, against the first packet's direction opens a connection of its own,
 * which was never judged. */
static __always_inline bool contradicts(const struct judge *j, __u32 side)
{
	if (!side)
		return false;
	if (j->p.tuple.proto == PROTO_TCP && (j->p.tcp & (TCP_SYN | TCP_ACK)) == TCP_SYN)
		return true;
	return j->p.flags & PACKET_ECHO_REQUEST;
}

/* reopens: a connection that both ends left may be opened again under the same tuple, by either end. */
static __always_inline bool reopens(const struct judge *j, const struct conn *c)
{
	return j->p.tuple.proto == PROTO_TCP && (j->p.tcp & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) == TCP_SYN &&
	       ct_closed(c->seen);
}

static __always_inline bool ct_gone(const struct judge *j, const struct conn *c)
{
	return j->now >= READ_ONCE(c->deadline) || reopens(j, c);
}

/* sealed is steps 5 and 6 of the fast path. */
static __always_inline bool sealed(const struct judge *j, const struct conn *c, __u32 side)
{
	__u32 flags = c->flags;

	switch (j->hook) {
	case HOOK_INGRESS_DEVICE:
		return !(flags & CT_LOCAL(side)) && (flags & CT_LOCAL(!side));
	case HOOK_INGRESS_SOCKET:
		return c->seal[side ? 0 : 1] == ct_seal(j->cgroup, j->uid, j->generation);
	}
	if (from_kernel(j))
		return flags & CT_LOCAL(side);
	return c->seal[side ? 1 : 0] == ct_seal(j->cgroup, j->uid, j->generation);
}

/* fast is the established path; false leaves the packet to the long one. */
static __always_inline bool fast(struct __sk_buff *skb, struct judge *j, const struct tuple *key)
{
	struct conn *c = bpf_map_lookup_elem(&conns, key);
	__u32 side, own, peer, rule;

	if (!c || !ct_fresh(c, j->generation, j->now) || ct_gone(j, c))
		return false;
	side = ct_side(c, j->swapped);
	own = c->number[side ? 1 : 0];
	peer = c->number[side ? 0 : 1];
	rule = c->rule;
	if (!(c->flags & CT_PEER(is_egress(j->hook) ? !side : side)) || !sealed(j, c, side) || contradicts(j, side))
		return false;
	/* Everything that was read must belong to this generation still. */
	barrier();
	if (READ_ONCE(c->generation) != j->generation)
		return false;
	ct_touch(c, side, j->p.tuple.proto, j->p.tcp, j->now);
	tally(skb, j, c, side);
	allow(j, rule, own, peer);
	return true;
}

/* form is step 2. */
static __always_inline __u8 form(const struct judge *j)
{
	if (j->p.flags & PACKET_MALFORMED)
		return REASON_MALFORMED;
	if (j->p.flags & PACKET_FRAGMENT)
		return REASON_FRAGMENT;
	if (j->p.flags & PACKET_PORTLESS)
		return REASON_UNKNOWN_PROTO;
	return REASON_NONE;
}

/* own_end is step 6. */
static __always_inline __u8 own_end(const struct judge *j, const struct ends *e)
{
	if (j->hook == HOOK_INGRESS_DEVICE) {
		if (addr_local(e->src) || !in_overlay(&j->p.tuple.src, j->p.family))
			return REASON_SPOOFED_SOURCE;
		return addr_local(e->dst) ? REASON_NONE : REASON_UNKNOWN_PEER;
	}
	if (j->hook == HOOK_INGRESS_SOCKET) {
		if (!j->owner)
			return REASON_NO_IDENTITY;
		return addr_local(e->dst) && e->dst->number == j->owner ? REASON_NONE : REASON_WRONG_RECEIVER;
	}
	if (from_kernel(j)) /* step 10 lets it only reply */
		return addr_local(e->src) ? REASON_NONE : REASON_SPOOFED_SOURCE;
	if (!j->owner)
		return REASON_NO_IDENTITY;
	return addr_local(e->src) && e->src->number == j->owner ? REASON_NONE : REASON_SPOOFED_SOURCE;
}

/* quoted is step 8. The error must travel against the packet that it quotes; it opens and refreshes nothing. The overlay
 * has no routers, so one that arrives comes from the very host that the quoted packet was sent to. */
static __always_inline void quoted(struct judge *j, const struct ends *e, struct tuple *quote)
{
	struct conn *c;

	if (!ip_equal(&quote->src, &j->p.tuple.dst) || (!is_egress(j->hook) && !ip_equal(&quote->dst, &j->p.tuple.src))) {
		deny(j, e, REASON_CT_INVALID, 0);
		return;
	}
	ct_sort(quote);
	c = bpf_map_lookup_elem(&conns, quote);
	if (!c || !ct_fresh(c, j->generation, j->now) || j->now >= c->deadline)
		deny(j, e, REASON_CT_INVALID, 0);
	else
		allow(j, c->rule, addr_number(e->src), addr_number(e->dst));
}

/* opens is the first half of step 10: sockets receive, and loopback carries, only what an earlier hook of this host has
 * tracked; the kernel itself only replies. */
static __always_inline bool opens(const struct judge *j)
{
	if (j->hook == HOOK_INGRESS_SOCKET || j->hook == HOOK_LOOPBACK)
		return false;
	if (is_egress(j->hook) && from_kernel(j))
		return false;
	switch (j->p.tuple.proto) {
	case PROTO_TCP:
		return (j->p.tcp & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) == TCP_SYN;
	case PROTO_ICMP:
	case PROTO_ICMPV6:
		return j->p.flags & PACKET_ECHO_REQUEST;
	}
	return true;
}

/* conn_until is when a connection must be judged again: the earliest end of a rule, a Binding and, in mode deny-all,
 * the lease. src and dst are those of the first packet. */
static __always_inline __u64 conn_until(const struct judge *j, const struct view *v, const struct addr *src,
					const struct addr *dst, const struct answer *a)
{
	__u64 until = a->until;

	if (src)
		earliest(&until, src->not_after, j->now);
	if (dst)
		earliest(&until, dst->not_after, j->now);
	if (v->lease_mode == LEASE_DENY_ALL)
		earliest(&until, v->lease_ends, j->now);
	return until;
}

static __always_inline __u32 conn_flags(const struct judge *j, const struct addr *src, const struct addr *dst)
{
	return (addr_local(src) ? CT_LOCAL0 : 0) | (addr_local(dst) ? CT_LOCAL1 : 0) |
	       (peer_reason(src, j->now) ? 0 : CT_PEER0) | (peer_reason(dst, j->now) ? 0 : CT_PEER1);
}

/* seal_side remembers that the socket of this run owns its end. */
static __always_inline void seal_side(const struct judge *j, struct conn *c, __u32 side)
{
	__u32 own = j->hook == HOOK_INGRESS_SOCKET ? !side : side;
	__u64 seal;

	if (j->hook == HOOK_INGRESS_DEVICE || from_kernel(j))
		return;
	seal = ct_seal(j->cgroup, j->uid, j->generation);
	if (own) {
		c->cgroup[1] = j->cgroup;
		c->uid[1] = j->uid;
		WRITE_ONCE(c->seal[1], seal);
	} else {
		c->cgroup[0] = j->cgroup;
		c->uid[0] = j->uid;
		WRITE_ONCE(c->seal[0], seal);
	}
}

/* pass_tracked ends the run for a packet of a connection that may go on. */
static __always_inline void pass_tracked(struct __sk_buff *skb, struct judge *j, const struct ends *e, struct conn *c,
					 __u32 side, __u32 rule)
{
	seal_side(j, c, side);
	ct_touch(c, side, j->p.tuple.proto, j->p.tcp, j->now);
	tally(skb, j, c, side);
	allow(j, rule, addr_number(e->src), addr_number(e->dst));
}

/* judge_again is the second half of step 9. */
static __always_inline void judge_again(struct __sk_buff *skb, struct judge *j, const struct ends *e,
					const struct view *v, struct tuple *key, struct conn *c, __u32 side)
{
	const struct addr *src = side ? e->dst : e->src, *dst = side ? e->src : e->dst;
	bool mine = ct_take(c);
	struct answer a;

	ask_policy(src, dst, key->proto, side ? j->p.tuple.sport : j->p.tuple.dport, j->now, &a);
	if (a.verdict != VERDICT_ALLOW) {
		if (mine) {
			event_conn(key, c, EVENT_END, j->now, j->wake);
			bpf_map_delete_elem(&conns, key);
		}
		deny(j, e, a.reason, a.rule);
		return;
	}
	if (mine) {
		c->expires = conn_until(j, v, src, dst, &a);
		c->flags = (c->flags & CT_SWAPPED) | conn_flags(j, src, dst);
		c->number[0] = addr_number(src);
		c->number[1] = addr_number(dst);
		c->rule = a.rule;
		/* A full barrier: whoever reads this generation reads what was written under it. */
		__sync_val_compare_and_swap(&c->generation, CT_BUSY, j->generation);
	}
	pass_tracked(skb, j, e, c, side, a.rule);
}

/* What a new connection starts from: nobody's yet (CT_BUSY), and its direction known, so that a packet that meets it
 * before it is filled in is judged rightly. */
static volatile const struct conn unborn[2] = {{.deadline = ~0ULL}, {.deadline = ~0ULL, .flags = CT_SWAPPED}};

/* insert is step 12; 0, -EEXIST when another run was first, or another error when there is no room. */
static __always_inline long insert(struct __sk_buff *skb, struct judge *j, const struct ends *e, const struct view *v,
				   struct tuple *key, const struct answer *a)
{
	struct conn *c;
	long err;

	err = bpf_map_update_elem(&conns, key, j->swapped ? (void *)&unborn[1] : (void *)&unborn[0], BPF_NOEXIST);
	if (err)
		return err;
	c = bpf_map_lookup_elem(&conns, key);
	if (!c) /* only the owner of a busy entry deletes it */
		return -EEXIST;
	c->expires = conn_until(j, v, e->src, e->dst, a);
	c->created = j->now;
	c->flow = (__u64)bpf_get_prandom_u32() << 32 | bpf_get_prandom_u32();
	c->rule = a->rule;
	c->number[0] = addr_number(e->src);
	c->number[1] = addr_number(e->dst);
	c->flags = (j->swapped ? CT_SWAPPED : 0) | conn_flags(j, e->src, e->dst);
	seal_side(j, c, 0);
	ct_touch(c, 0, key->proto, j->p.tcp, j->now);
	tally(skb, j, c, 0);
	event_conn(key, c, EVENT_START, j->now, j->wake);
	/* A full barrier: whoever reads this generation reads what was written under it. */
	__sync_val_compare_and_swap(&c->generation, CT_BUSY, j->generation);
	return 0;
}

/* retire takes an idle or closed entry out of the way of its successor. */
static __always_inline void retire(const struct judge *j, struct tuple *key, struct conn *c)
{
	if (!ct_take(c))
		return;
	event_conn(key, c, EVENT_END, j->now, j->wake);
	bpf_map_delete_elem(&conns, key);
}

/* tracked is steps 9 to 12; false asks for a second try, because another run tracked the connection meanwhile. */
static __always_inline bool tracked(struct __sk_buff *skb, struct judge *j, const struct ends *e, const struct view *v,
				    struct tuple *key, bool last)
{
	struct conn *c = bpf_map_lookup_elem(&conns, key);
	struct answer a;
	long err;

	/* 9. Tracked. */
	if (c && !ct_gone(j, c)) {
		__u32 side = ct_side(c, j->swapped);

		if (contradicts(j, side))
			deny(j, e, REASON_CT_INVALID, 0);
		else if (ct_fresh(c, j->generation, j->now))
			pass_tracked(skb, j, e, c, side, c->rule);
		else
			judge_again(skb, j, e, v, key, c, side);
		return true;
	}
	/* 10. Untracked. */
	if (!opens(j)) {
		deny(j, e, REASON_CT_INVALID, 0);
		return true;
	}
	if (v->lease_mode == LEASE_DENY_NEW && j->now >= v->lease_ends) {
		deny(j, e, REASON_LEASE_ENDED, 0);
		return true;
	}
	/* 11. Policy. */
	ask_policy(e->src, e->dst, key->proto, j->p.tuple.dport, j->now, &a);
	if (a.verdict != VERDICT_ALLOW) {
		j->verdict = VERDICT_DENY;
		j->reason = a.reason;
		j->rule = a.rule;
		j->src_number = addr_number(e->src);
		j->dst_number = addr_number(e->dst);
		return true;
	}
	/* 12. Track. */
	if (c)
		retire(j, key, c);
	err = insert(skb, j, e, v, key, &a);
	if (err == -EEXIST && !last)
		return false;
	if (err)
		deny(j, e, err == -EEXIST ? REASON_CT_INVALID : REASON_CT_FULL, 0);
	else
		allow(j, a.rule, addr_number(e->src), addr_number(e->dst));
	return true;
}

/* find_view gives the scalars of the run's generation. */
static __always_inline const struct view *find_view(__u64 generation)
{
	__u32 slot = generation & 1;
	const struct view *v = bpf_map_lookup_elem(&views, &slot);

	return v && v->generation == generation ? v : 0;
}

static __always_inline bool lease_over(const struct view *v, __u64 now)
{
	return !v || (v->lease_mode == LEASE_DENY_ALL && now >= v->lease_ends);
}

/* slow is steps 4 to 12, for a packet that the fast path did not pass. key is the table's key of the packet, or of what
 * it quotes. */
__noinline int slow(struct __sk_buff *skb, struct judge *j, struct tuple *key)
{
	const struct view *v;
	struct ends ends, *e = &ends;
	__u8 reason;

	if (!j || !key)
		return 0;
	v = find_view(j->generation);
	ends.src = find_addr(&j->p.tuple.src, j->generation);
	ends.dst = find_addr(&j->p.tuple.dst, j->generation);
	/* 4. Lease. */
	if (!v || lease_over(v, j->now)) {
		deny(j, e, REASON_LEASE_ENDED, 0);
		return 0;
	}
	/* 5. Owner. */
	if (j->hook != HOOK_INGRESS_DEVICE && !from_kernel(j))
		j->owner = packet_owner(skb, j->generation, j->cgroup, j->uid);
	/* 6. Own end. */
	reason = own_end(j, e);
	/* 7. Peer. */
	if (!reason)
		reason = peer_reason(is_egress(j->hook) ? ends.dst : ends.src, j->now);
	if (reason) {
		deny(j, e, reason, 0);
		return 0;
	}
	/* 8. ICMP errors. */
	if (j->p.flags & PACKET_QUOTES) {
		quoted(j, e, key);
		return 0;
	}
	/* 9 to 12. */
	if (!tracked(skb, j, e, v, key, false))
		tracked(skb, j, e, v, key, true);
	return 0;
}

/* deny_early denies before the addresses were looked up, and looks them up to name them. */
__noinline int deny_early(struct judge *j, __u32 reason)
{
	struct ends ends;

	if (!j)
		return 0;
	ends.src = find_addr(&j->p.tuple.src, j->generation);
	ends.dst = find_addr(&j->p.tuple.dst, j->generation);
	deny(j, &ends, reason, 0);
	return 0;
}

/* begin sets what a run may read before it writes it. Not the whole struct: that alone would cost a tenth of the run. */
static __always_inline void begin(struct judge *j, __u8 hook)
{
	j->hook = hook;
	j->cgroup = 0;
	j->uid = j->owner = 0;
	j->now = 0;
	j->p.tcp = j->p.flags = 0;
	j->p.tuple.pad[0] = j->p.tuple.pad[1] = j->p.tuple.pad[2] = 0;
}

/* judge_packet judges at a hook that carries packets of sockets or of the tunnel; true lets the packet pass. */
static __always_inline bool judge_packet(struct __sk_buff *skb, const __u8 hook)
{
	const bool tunnel = hook == HOOK_EGRESS_DEVICE || hook == HOOK_INGRESS_DEVICE;
	struct judge j;
	struct tuple key;
	struct settings *cfg;
	__u32 zero = 0;
	__u8 reason;

	cfg = bpf_map_lookup_elem(&config, &zero);
	if (!cfg)
		return false;
	j.generation = READ_ONCE(cfg->generation);
	j.wake = cfg->wake;
	begin(&j, hook);
	if (hook == HOOK_LOOPBACK || !parse_fast(skb, &j.p, tunnel ? link_header : 0)) {
		__builtin_memset(&j.p, 0, sizeof(j.p));
		__builtin_memset(&key, 0, sizeof(key));
		parse(skb, &j.p, &key);
	}
	/* 1. Scope. */
	if ((j.p.flags & PACKET_NOT_IP) ||
	    (!in_overlay(&j.p.tuple.src, j.p.family) && !in_overlay(&j.p.tuple.dst, j.p.family))) {
		if (!tunnel)
			ignore(&j);
		else
			deny_early(&j, REASON_UNKNOWN_PEER);
		if (tunnel && ip_multicast(&j.p.tuple.dst))
			j.p.flags |= PACKET_QUIET;
		return finish(&j, 0);
	}
	if (ip_multicast(&j.p.tuple.dst))
		j.p.flags |= PACKET_QUIET;
	if (hook != HOOK_INGRESS_DEVICE) {
		j.cgroup = packet_cgroup(skb);
		j.uid = packet_uid(skb);
	}
	/* 2. Form. 3. Place. */
	j.device = tunnel ? DEVICE_TUNNEL : hook == HOOK_LOOPBACK ? DEVICE_LOOPBACK : packet_device(skb, cfg->tunnel);
	reason = form(&j);
	if (!reason && j.device == DEVICE_OTHER)
		reason = REASON_NOT_TUNNEL;
	if (reason) {
		deny_early(&j, reason);
		return finish(&j, 0);
	}
	j.now = now_ns();
	if (j.p.flags & PACKET_QUOTES) {
		slow(skb, &j, &key);
		return finish(&j, 0);
	}
	j.swapped = ct_key(&j.p.tuple, &key);
	if (!fast(skb, &j, &key))
		slow(skb, &j, &key);
	return finish(&j, 0);
}

#include "lib/calls.h"
#include "lib/guard.h"
#include "lib/sockopt.h"

SEC("cgroup_skb/egress")
int egress(struct __sk_buff *skb)
{
	return judge_packet(skb, HOOK_EGRESS_SOCKET) ? PASS_CG : DROP_CG;
}

SEC("cgroup_skb/ingress")
int ingress(struct __sk_buff *skb)
{
	return judge_packet(skb, HOOK_INGRESS_SOCKET) ? PASS_CG : DROP_CG;
}

SEC("tcx/egress")
int tunnel_egress(struct __sk_buff *skb)
{
	return judge_packet(skb, HOOK_EGRESS_DEVICE) ? PASS_TC : DROP_TC;
}

SEC("tcx/ingress")
int tunnel_ingress(struct __sk_buff *skb)
{
	return judge_packet(skb, HOOK_INGRESS_DEVICE) ? PASS_TC : DROP_TC;
}

SEC("tcx/egress")
int lo_egress(struct __sk_buff *skb)
{
	return judge_packet(skb, HOOK_LOOPBACK) ? PASS_TC : DROP_TC;
}

SEC("tcx/ingress")
int guard(struct __sk_buff *skb)
{
	return guard_packet(skb) ? PASS_TC : DROP_TC;
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	return judge_connect4(ctx);
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	return judge_connect6(ctx);
}

SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx)
{
	return judge_sendmsg4(ctx);
}

SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx)
{
	return judge_sendmsg6(ctx);
}

SEC("cgroup/bind4")
int bind4(struct bpf_sock_addr *ctx)
{
	return judge_bind4(ctx);
}

SEC("cgroup/bind6")
int bind6(struct bpf_sock_addr *ctx)
{
	return judge_bind6(ctx);
}

SEC("cgroup/setsockopt")
int setsockopt(struct bpf_sockopt *ctx)
{
	return judge_setsockopt(ctx) ? PASS_CG : DROP_CG;
}

struct sweep {
	__u64 now;
	__u32 wake;
	__u32 removed;
};

/* sweep_one takes one idle connection away, unless a packet is just replacing it. */
static long sweep_one(void *map, struct tuple *key, struct conn *c, struct sweep *s)
{
	struct tuple k;

	if (s->now < READ_ONCE(c->deadline) || !ct_take(c))
		return 0;
	k = *key;
	event_conn(&k, c, EVENT_END, s->now, s->wake);
	bpf_map_delete_elem(&conns, &k);
	s->removed++;
	return 0;
}

/* sweep removes idle connections and tells of their end. The agent runs it now and then (BPF_PROG_TEST_RUN): inside the
 * kernel it can take an entry away without racing with a packet that brings it back. It is never attached. */
SEC("tc")
int sweep(struct __sk_buff *skb)
{
	__u32 zero = 0;
	struct settings *cfg = bpf_map_lookup_elem(&config, &zero);
	struct sweep s = {.now = now_ns(), .wake = cfg ? cfg->wake : 0};

	bpf_for_each_map_elem(&conns, sweep_one, &s, 0);
	return s.removed;
}
