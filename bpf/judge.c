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
#include "lib/events.h"
#include "lib/parse.h"
#include "lib/policy.h"
#include "lib/socket.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* struct judge is the state of one run over a packet. */
struct judge {
	struct packet p;
	const struct addr *src, *dst;
	__u64 now, generation, cgroup;
	__u32 uid, owner;
	__u32 src_number, dst_number, rule;
	__u32 wake;
	__u8 hook, device, verdict, reason;
};

static __always_inline bool is_egress(__u8 hook)
{
	return hook == HOOK_EGRESS_SOCKET || hook == HOOK_EGRESS_DEVICE || hook == HOOK_LOOPBACK;
}

/* from_kernel: no socket, or one of the kernel's own. */
static __always_inline bool from_kernel(const struct judge *j)
{
	return j->cgroup <= ROOT_CGROUP;
}

static __always_inline void test_report(const struct judge *j)
{
#ifdef SIGNET_TEST
	__u32 zero = 0;
	struct test_output *out = bpf_map_lookup_elem(&test_out, &zero);

	if (out) {
		out->verdict = j->verdict;
		out->reason = j->reason;
		out->rule = j->rule;
		out->src = j->src_number;
		out->dst = j->dst_number;
		out->runs++;
	}
#endif
}

static __always_inline void allow(struct judge *j, __u32 rule, __u32 src, __u32 dst)
{
	j->verdict = VERDICT_ALLOW;
	j->reason = REASON_POLICY_ALLOW;
	j->rule = rule;
	j->src_number = src;
	j->dst_number = dst;
}

/* deny names the ends by their addresses, and the end that is a socket here by the socket's owner. */
static __always_inline void deny(struct judge *j, __u8 reason, __u32 rule)
{
	j->verdict = VERDICT_DENY;
	j->reason = reason;
	j->rule = rule;
	j->src_number = addr_number(j->src);
	j->dst_number = addr_number(j->dst);
	if (j->owner) {
		if (j->hook == HOOK_INGRESS_SOCKET)
			j->dst_number = j->owner;
		else if (j->hook != HOOK_INGRESS_DEVICE)
			j->src_number = j->owner;
	}
}

static __always_inline void ignore(struct judge *j)
{
	j->verdict = VERDICT_IGNORE;
	j->reason = REASON_NONE;
}

/* deny_event tells of a denial; pid is 0 for packets. */
__noinline int deny_event(struct judge *j, __u32 pid)
{
	struct event *e;
	const struct view *v;
	__u32 slot;

	if (!j || (j->p.flags & PACKET_QUIET))
		return 0;
	e = event_reserve(EVENT_DENY);
	if (!e)
		return 0;
	slot = j->generation & 1;
	v = bpf_map_lookup_elem(&views, &slot);
	event_tuple(e, &j->p.tuple);
	e->time = bpf_ktime_get_ns();
	e->generation = j->generation;
	e->revision = v ? v->revision : 0;
	e->cgroup = j->cgroup;
	e->uid = j->uid;
	e->pid = pid;
	e->src_number = j->src_number;
	e->dst_number = j->dst_number;
	e->rule = j->rule;
	e->verdict = j->verdict;
	e->reason = j->reason;
	e->hook = j->hook;
	e->tcp = j->p.tcp;
	event_submit(e, j->wake);
	return 0;
}

/* finish counts and tells; true lets the packet pass. */
static __always_inline bool finish(struct judge *j, __u32 pid)
{
	test_report(j);
	if (j->verdict == VERDICT_IGNORE)
		return true;
	count(j->verdict, j->hook, j->reason);
	if (j->verdict == VERDICT_ALLOW)
		return true;
	deny_event(j, pid);
	return false;
}

/* tally counts a packet of a tracked connection once in each direction: on the tunnel for what leaves or enters the
 * host, at the sender's socket for what stays. */
static __always_inline void tally(struct __sk_buff *skb, const struct judge *j, struct conn *c, __u32 side)
{
	if (j->hook != HOOK_EGRESS_DEVICE && j->hook != HOOK_INGRESS_DEVICE &&
	    !(j->hook == HOOK_EGRESS_SOCKET && j->device == DEVICE_LOOPBACK))
		return;
	ct_count(c, side, skb->gso_segs ?: 1, skb->len);
}

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
static __always_inline bool fast(struct __sk_buff *skb, struct judge *j, struct tuple *key, bool swapped)
{
	struct conn *c = bpf_map_lookup_elem(&conns, key);
	__u32 side, own, peer, rule;

	if (!c || !ct_fresh(c, j->generation, j->now) || ct_gone(j, c))
		return false;
	side = ct_side(c, swapped);
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
static __always_inline __u8 own_end(const struct judge *j)
{
	if (j->hook == HOOK_INGRESS_DEVICE) {
		if (addr_local(j->src) || !in_overlay(&j->p.tuple.src, j->p.family))
			return REASON_SPOOFED_SOURCE;
		return addr_local(j->dst) ? REASON_NONE : REASON_UNKNOWN_PEER;
	}
	if (j->hook == HOOK_INGRESS_SOCKET) {
		if (!j->owner)
			return REASON_NO_IDENTITY;
		return addr_local(j->dst) && j->dst->number == j->owner ? REASON_NONE : REASON_WRONG_RECEIVER;
	}
	if (from_kernel(j)) /* step 10 lets it only reply */
		return addr_local(j->src) ? REASON_NONE : REASON_SPOOFED_SOURCE;
	if (!j->owner)
		return REASON_NO_IDENTITY;
	return addr_local(j->src) && j->src->number == j->owner ? REASON_NONE : REASON_SPOOFED_SOURCE;
}

/* quoted is step 8. The error must travel against the packet that it quotes; it opens and refreshes nothing. */
static __always_inline void quoted(struct judge *j, struct tuple *quote)
{
	struct conn *c;

	if (!ip_equal(&quote->src, &j->p.tuple.dst)) {
		deny(j, REASON_CT_INVALID, 0);
		return;
	}
	ct_sort(quote);
	c = bpf_map_lookup_elem(&conns, quote);
	if (!c || !ct_fresh(c, j->generation, j->now) || j->now >= c->deadline)
		deny(j, REASON_CT_INVALID, 0);
	else
		allow(j, c->rule, addr_number(j->src), addr_number(j->dst));
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
static __always_inline void pass_tracked(struct __sk_buff *skb, struct judge *j, struct conn *c, __u32 side, __u32 rule)
{
	seal_side(j, c, side);
	ct_touch(c, side, j->p.tuple.proto, j->p.tcp, j->now);
	tally(skb, j, c, side);
	allow(j, rule, addr_number(j->src), addr_number(j->dst));
}

/* judge_again is the second half of step 9. */
static __always_inline void judge_again(struct __sk_buff *skb, struct judge *j, const struct view *v,
					struct tuple *key, struct conn *c, __u32 side)
{
	const struct addr *src = side ? j->dst : j->src, *dst = side ? j->src : j->dst;
	bool mine = ct_take(c);
	struct answer a;

	ask_policy(src, dst, key->proto, side ? j->p.tuple.sport : j->p.tuple.dport, j->now, &a);
	if (a.verdict != VERDICT_ALLOW) {
		if (mine) {
			event_conn(key, c, EVENT_END, j->now, j->wake);
			bpf_map_delete_elem(&conns, key);
		}
		deny(j, a.reason, a.rule);
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
	pass_tracked(skb, j, c, side, a.rule);
}

/* What a new connection starts from: nobody's yet (CT_BUSY), and its direction known, so that a packet that meets it
 * before it is filled in is judged rightly. */
static volatile const struct conn unborn[2] = {{.deadline = ~0ULL}, {.deadline = ~0ULL, .flags = CT_SWAPPED}};

/* insert is step 12; 0, -EEXIST when another run was first, or another error when there is no room. */
static __always_inline long insert(struct __sk_buff *skb, struct judge *j, const struct view *v, struct tuple *key,
				   bool swapped, const struct answer *a)
{
	struct conn *c;
	long err;

	err = bpf_map_update_elem(&conns, key, swapped ? (void *)&unborn[1] : (void *)&unborn[0], BPF_NOEXIST);
	if (err)
		return err;
	c = bpf_map_lookup_elem(&conns, key);
	if (!c) /* only the owner of a busy entry deletes it */
		return -EEXIST;
	c->expires = conn_until(j, v, j->src, j->dst, a);
	c->created = j->now;
	c->flow = (__u64)bpf_get_prandom_u32() << 32 | bpf_get_prandom_u32();
	c->rule = a->rule;
	c->number[0] = addr_number(j->src);
	c->number[1] = addr_number(j->dst);
	c->flags = (swapped ? CT_SWAPPED : 0) | conn_flags(j, j->src, j->dst);
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
static __always_inline bool tracked(struct __sk_buff *skb, struct judge *j, const struct view *v, struct tuple *key,
				    bool swapped, bool last)
{
	struct conn *c = bpf_map_lookup_elem(&conns, key);
	struct answer a;
	long err;

	/* 9. Tracked. */
	if (c && !ct_gone(j, c)) {
		__u32 side = ct_side(c, swapped);

		if (contradicts(j, side))
			deny(j, REASON_CT_INVALID, 0);
		else if (ct_fresh(c, j->generation, j->now))
			pass_tracked(skb, j, c, side, c->rule);
		else
			judge_again(skb, j, v, key, c, side);
		return true;
	}
	/* 10. Untracked. */
	if (!opens(j)) {
		deny(j, REASON_CT_INVALID, 0);
		return true;
	}
	if (v->lease_mode == LEASE_DENY_NEW && j->now >= v->lease_ends) {
		deny(j, REASON_LEASE_ENDED, 0);
		return true;
	}
	/* 11. Policy. */
	ask_policy(j->src, j->dst, key->proto, j->p.tuple.dport, j->now, &a);
	if (a.verdict != VERDICT_ALLOW) {
		j->verdict = VERDICT_DENY;
		j->reason = a.reason;
		j->rule = a.rule;
		j->src_number = addr_number(j->src);
		j->dst_number = addr_number(j->dst);
		return true;
	}
	/* 12. Track. */
	if (c)
		retire(j, key, c);
	err = insert(skb, j, v, key, swapped, &a);
	if (err == -EEXIST && !last)
		return false;
	if (err)
		deny(j, err == -EEXIST ? REASON_CT_INVALID : REASON_CT_FULL, 0);
	else
		allow(j, a.rule, addr_number(j->src), addr_number(j->dst));
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

/* slow is steps 4 to 12. */
static __always_inline void slow(struct __sk_buff *skb, struct judge *j, struct tuple *key, bool swapped)
{
	const struct view *v = find_view(j->generation);
	__u8 reason;

	j->src = find_addr(&j->p.tuple.src, j->generation);
	j->dst = find_addr(&j->p.tuple.dst, j->generation);
	/* 4. Lease. */
	if (lease_over(v, j->now) || !v) {
		deny(j, REASON_LEASE_ENDED, 0);
		return;
	}
	/* 5. Owner. */
	if (j->hook != HOOK_INGRESS_DEVICE && !from_kernel(j))
		j->owner = packet_owner(skb, j->generation, j->cgroup, j->uid);
	/* 6. Own end. */
	reason = own_end(j);
	/* 7. Peer. */
	if (!reason)
		reason = peer_reason(is_egress(j->hook) ? j->dst : j->src, j->now);
	if (reason) {
		deny(j, reason, 0);
		return;
	}
	/* 8. ICMP errors. */
	if (j->p.flags & PACKET_QUOTES) {
		quoted(j, key);
		return;
	}
	/* 9 to 12. */
	if (!tracked(skb, j, v, key, swapped, false))
		tracked(skb, j, v, key, swapped, true);
}

/* name_ends looks both addresses up, for a denial that came before the long path did. */
static __always_inline void deny_early(struct judge *j, __u8 reason)
{
	j->src = find_addr(&j->p.tuple.src, j->generation);
	j->dst = find_addr(&j->p.tuple.dst, j->generation);
	deny(j, reason, 0);
}

/* judge_packet judges at a hook that carries packets of sockets or of the tunnel; true lets the packet pass. */
static __always_inline bool judge_packet(struct __sk_buff *skb, const __u8 hook)
{
	const bool tunnel = hook == HOOK_EGRESS_DEVICE || hook == HOOK_INGRESS_DEVICE;
	struct judge j = {.hook = hook};
	struct tuple key = {};
	struct settings *cfg;
	__u32 zero = 0;
	bool swapped;
	__u8 reason;

	cfg = bpf_map_lookup_elem(&config, &zero);
	if (!cfg)
		return false;
	j.generation = READ_ONCE(cfg->generation);
	j.wake = cfg->wake;
	parse(skb, &j.p, &key);
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
		slow(skb, &j, &key, false); /* key is what the packet quotes */
		return finish(&j, 0);
	}
	swapped = ct_key(&j.p.tuple, &key);
	if (!fast(skb, &j, &key, swapped))
		slow(skb, &j, &key, swapped);
	return finish(&j, 0);
}

#include "lib/calls.h"
#include "lib/guard.h"

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
