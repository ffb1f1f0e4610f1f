//go:build ignore

// SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only)
/* The judge in the kernel: the twin of internal/policy/judge.go, which says what it means. The numbered steps are the
 * same, and one table of cases (internal/policy/policytest) runs against both:
 *
 *  1. Scope: neither address is the overlay's: deny on the tunnel device; ignore elsewhere, but for what a workload's
 *     own policy asks for (internet: deny, listen: overlay).
 *  2. Form: malformed, forbidden TCP flags, a fragment without its first one, unknown protocol: deny.
 *  3. Place: overlay addresses pass the tunnel, loopback or the device of a workload, and no other device.
 *  4. Lease: ended in mode deny-all: deny.
 *  5. Owner: the socket's cgroup (or an ancestor) and user name exactly one workload, or none; of what comes from the
 *     device of a workload, that one.
 *  6. Own end: the sender owns the source, the receiver owns the destination.
 *  7. Peer: the other address belongs to a known, unexpired, unrevoked identity.
 *  8. ICMP errors pass with the tracked connection that they quote.
 *  9. Tracked and judged under this generation: allow; under an older one: judge the first packet's direction again.
 * 10. Untracked: only what opens a connection, at a hook that may open one, goes on.
 * 11. Policy: deny before allow, in the ruleset of each end that is on this host. What a rule in mode audit would have
 *     denied passes with verdict AUDIT.
 * 12. Track: a full table, or a quota that is used up, denies.
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
	       ct_closed(READ_ONCE(c->state));
}

static __always_inline bool ct_gone(const struct judge *j, const struct conn *c)
{
	return ct_idle(c, j->now) || reopens(j, c);
}

/* sealed is steps 5 and 6 of the fast path. */
static __always_inline bool sealed(const struct judge *j, const struct conn *c, __u32 side)
{
	__u32 state = READ_ONCE(c->state);

	switch (j->hook) {
	case HOOK_INGRESS_DEVICE:
		return !(state & CT_LOCAL(side)) && (state & CT_LOCAL(!side));
	case HOOK_INGRESS_SOCKET:
	case HOOK_TO_WORKLOAD:
		return c->seal[side ? 0 : 1] == ct_seal(j->cgroup, j->uid, j->generation);
	}
	if (from_kernel(j))
		return state & CT_LOCAL(side);
	return c->seal[side ? 1 : 0] == ct_seal(j->cgroup, j->uid, j->generation);
}

/* fast is the established path; false leaves the packet to the long one. */
static __always_inline bool fast(struct __sk_buff *skb, struct judge *j, struct conn *c, bool swapped)
{
	__u32 side, own, peer, rule, state;

	if (!c || !ct_fresh(c, j->generation, j->now) || ct_gone(j, c))
		return false;
	state = READ_ONCE(c->state);
	side = ct_side(state, swapped);
	own = c->number[side ? 1 : 0];
	peer = c->number[side ? 0 : 1];
	rule = c->rule;
	if (!(state & CT_PEER(is_egress(j->hook) ? !side : side)) || !sealed(j, c, side) || contradicts(j, side))
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

static __always_inline bool fast4(struct __sk_buff *skb, struct judge *j)
{
	const struct tuple *t = &j->p.tuple;
	__u32 src = bpf_ntohl(t->src.w[3]), dst = bpf_ntohl(t->dst.w[3]);
	bool swapped = src != dst ? src > dst : t->sport > t->dport;
	struct tuple4 k = {.proto = t->proto};

	k.src = swapped ? t->dst.w[3] : t->src.w[3];
	k.dst = swapped ? t->src.w[3] : t->dst.w[3];
	k.sport = swapped ? t->dport : t->sport;
	k.dport = swapped ? t->sport : t->dport;
	return fast(skb, j, bpf_map_lookup_elem(&conns4, &k), swapped);
}

/* fast_any is the same out of line, for the sake of the stack: for IPv6, and where other programs need more of it. */
__noinline int fast_any(struct __sk_buff *skb, struct judge *j)
{
	struct tuple key;
	bool swapped;

	if (!j)
		return 0;
	if (j->p.family == 4)
		return fast4(skb, j);
	swapped = ct_key(&j->p.tuple, &key);
	return fast(skb, j, bpf_map_lookup_elem(&conns6, &key), swapped);
}

static __always_inline void fragment_key(const struct judge *j, struct fragment_key *k)
{
	k->src = j->p.tuple.src;
	k->dst = j->p.tuple.dst;
	k->id = j->p.fragment;
	k->proto = j->p.part;
	k->pad[0] = k->pad[1] = k->pad[2] = 0;
}

/* follow gives a later fragment the ports of the first; false when that did not pass here before. */
__noinline int follow(struct judge *j)
{
	struct fragment_key k;
	const struct fragment *f;

	if (!j)
		return 0;
	fragment_key(j, &k);
	f = bpf_map_lookup_elem(&fragments, &k);
	if (!f || j->now >= f->until)
		return 0;
	j->p.tuple.sport = f->sport;
	j->p.tuple.dport = f->dport;
	j->p.tuple.proto = f->proto;
	j->p.tcp = TCP_ACK;
	return 1;
}

/* lead remembers what a first fragment that passes says of the others. */
__noinline int lead(struct judge *j)
{
	struct fragment_key k;
	struct fragment f = {};

	if (!j)
		return 0;
	fragment_key(j, &k);
	f.until = j->now + FRAGMENT_LIFE;
	f.sport = j->p.tuple.sport;
	f.dport = j->p.tuple.dport;
	f.proto = j->p.tuple.proto;
	bpf_map_update_elem(&fragments, &k, &f, BPF_ANY);
	return 0;
}

/* sane_flags refuses the sets of flags that no TCP sends (RFC 9293, section 3.10.7), and that probe or confuse stacks. */
static __always_inline bool sane_flags(__u8 tcp)
{
	switch (tcp & (TCP_SYN | TCP_FIN | TCP_RST)) {
	case TCP_SYN:
	case TCP_RST:
		return true;
	case 0:
	case TCP_FIN:
		return tcp & TCP_ACK;
	}
	return false;
}

/* form is step 2. */
static __always_inline __u8 form(struct judge *j)
{
	if (j->p.flags & PACKET_MALFORMED)
		return REASON_MALFORMED;
	if ((j->p.flags & PACKET_LATER) && !follow(j))
		return REASON_FRAGMENT;
	if (j->p.flags & PACKET_PORTLESS)
		return REASON_UNKNOWN_PROTO;
	if (j->p.tuple.proto == PROTO_TCP && !sane_flags(j->p.tcp))
		return REASON_MALFORMED;
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
	if (j->hook == HOOK_INGRESS_SOCKET || j->hook == HOOK_TO_WORKLOAD) {
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
static __always_inline void quoted(struct __sk_buff *skb, struct judge *j, const struct ends *e, struct tuple *quote)
{
	struct conn *c;

	__builtin_memset(quote, 0, sizeof(*quote));
	parse_quoted(skb, j->p.fragment, j->p.family, quote); /* it was read before, and is sound */
	if (!ip_equal(&quote->src, &j->p.tuple.dst) || (!is_egress(j->hook) && !ip_equal(&quote->dst, &j->p.tuple.src))) {
		deny(j, e, REASON_CT_INVALID, 0);
		return;
	}
	ct_sort(quote);
	c = ct_find(quote);
	if (!c || !ct_fresh(c, j->generation, j->now) || ct_idle(c, j->now))
		deny(j, e, REASON_CT_INVALID, 0);
	else
		allow(j, c->rule, addr_number(e->src), addr_number(e->dst));
}

/* opens is the first half of step 10: sockets receive, and loopback carries, only what an earlier hook of this host has
 * tracked; the kernel itself only replies. */
static __always_inline bool opens(const struct judge *j)
{
	if (j->p.flags & PACKET_LATER)
		return false;
	if (j->hook == HOOK_INGRESS_SOCKET || j->hook == HOOK_LOOPBACK || j->hook == HOOK_TO_WORKLOAD)
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

/* find_view gives the scalars of the run's generation. */
static __always_inline const struct view *find_view(__u64 generation)
{
	__u32 slot = generation & 1;
	const struct view *v = bpf_map_lookup_elem(&views, &slot);

	return v && v->generation == generation ? v : 0;
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
	if (v && v->lease_mode == LEASE_DENY_ALL)
		earliest(&until, v->lease_ends, j->now);
	return until;
}

/* step rounds an instant down to a step; the first one, an hour before this could matter, stands for never. */
static __always_inline __u32 step(__u64 t)
{
	__u32 s = t >> CT_STEP;

	return t && !s ? 1 : s;
}

static __always_inline __u32 conn_ends(const struct judge *j, const struct addr *src, const struct addr *dst)
{
	return (addr_local(src) ? CT_LOCAL0 : 0) | (addr_local(dst) ? CT_LOCAL1 : 0) |
	       (peer_reason(src, j->now) ? 0 : CT_PEER0) | (peer_reason(dst, j->now) ? 0 : CT_PEER1);
}

/* seal_side remembers that the socket of this run owns its end. */
static __always_inline void seal_side(const struct judge *j, struct conn *c, __u32 side)
{
	__u32 own = is_egress(j->hook) ? side : !side;
	__u64 seal;

	if (j->hook == HOOK_INGRESS_DEVICE || from_kernel(j))
		return;
	seal = ct_seal(j->cgroup, j->uid, j->generation);
	if (own)
		WRITE_ONCE(c->seal[1], seal);
	else
		WRITE_ONCE(c->seal[0], seal);
}

/* tell puts on record what is said of an entry. Not inlined, for the sake of the stack. */
__noinline int tell(struct judge *j, struct tuple *key, struct conn *c, __u32 rule, __u32 what)
{
	struct teller t = {};

	if (!j || !key || !c)
		return 0;
	t.now = j->now;
	t.cgroup = by_device(j) ? 0 : j->cgroup;
	t.uid = j->uid;
	t.rule = rule;
	t.kind = what;
	t.verdict = what >> 8;
	t.reason = what >> 16;
	return event_conn(key, c, &t);
}

#define TELL(kind, verdict, reason) ((__u32)(kind) | (__u32)(verdict) << 8 | (__u32)(reason) << 16)

/* tell_begin puts the beginning of a flow on record, once, where its local socket is known: for what comes from another
 * host that is where it is received. */
static __always_inline void tell_begin(struct judge *j, struct tuple *key, struct conn *c)
{
	if (j->hook == HOOK_INGRESS_DEVICE || (ct_mark(c, CT_TOLD) & CT_TOLD))
		return;
	tell(j, key, c, c->rule, TELL(EVENT_START, VERDICT_ALLOW, REASON_POLICY_ALLOW));
}

/* tell_audit puts on record, once for a flow, what a rule in mode audit would have done with it. */
static __always_inline void tell_audit(struct judge *j, struct tuple *key, struct conn *c, const struct answer *a)
{
	if (a->verdict != VERDICT_AUDIT || (ct_mark(c, CT_AUDITED) & CT_AUDITED))
		return;
	tell(j, key, c, a->rule, TELL(EVENT_AUDIT, VERDICT_AUDIT, a->reason));
}

/* answered ends the run with what rules say of a flow that may go on. */
static __always_inline void answered(struct judge *j, const struct ends *e, const struct answer *a)
{
	j->verdict = a->verdict;
	j->reason = a->reason;
	j->rule = a->rule;
	j->src_number = addr_number(e->src);
	j->dst_number = addr_number(e->dst);
}

/* pass_tracked ends the run for a packet of a connection that may go on. */
static __always_inline void pass_tracked(struct __sk_buff *skb, struct judge *j, struct tuple *key, struct conn *c, __u32 side)
{
	seal_side(j, c, side);
	ct_touch(c, side, j->p.tuple.proto, j->p.tcp, j->now);
	tally(skb, j, c, side);
}

/* passed puts on record what is to be said of a flow that may go on. */
static __always_inline void passed(struct judge *j, struct tuple *key, const struct answer *a)
{
	struct conn *c;

	if (j->p.flags & PACKET_FIRST)
		lead(j);
	c = ct_find(key);
	if (!c)
		return;
	tell_begin(j, key, c);
	if (a)
		tell_audit(j, key, c, a);
}

/* again is the second half of step 9: what rules say now, in a, of a connection that was judged under another view. This
 * and insert are not inlined, for the sake of the stack, and look up again what no argument can carry. */
__noinline int again(struct __sk_buff *skb, struct judge *j, struct tuple *key, struct conn *c, struct answer *a)
{
	const struct addr *src, *dst;
	const struct view *v;
	__u32 side;
	bool mine;

	if (!j || !key || !c || !a)
		return 0;
	mine = ct_take(c);
	if (a->verdict == VERDICT_DENY) {
		if (mine) {
			event_end(key, c, j->now);
			ct_delete(key, c->number[0]);
		}
		return 0;
	}
	side = ct_side(READ_ONCE(c->state), j->swapped);
	if (mine) {
		v = find_view(j->generation);
		src = find_addr(side ? &j->p.tuple.dst : &j->p.tuple.src, j->generation);
		dst = find_addr(side ? &j->p.tuple.src : &j->p.tuple.dst, j->generation);
		c->expires = step(conn_until(j, v, src, dst, a));
		__sync_fetch_and_and(&c->state, ~CT_ENDS);
		__sync_fetch_and_or(&c->state, conn_ends(j, src, dst));
		if (c->number[0] != addr_number(src)) { /* the address has another owner now, in whose quota it counts */
			ct_uncharge(c->number[0]);
			ct_charge(addr_number(src), ~0U);
			c->number[0] = addr_number(src);
		}
		c->number[1] = addr_number(dst);
		c->rule = a->under;
		/* A full barrier: whoever reads this generation reads what was written under it. */
		__sync_val_compare_and_swap(&c->generation, CT_BUSY, j->generation);
	}
	pass_tracked(skb, j, key, c, side);
	return 0;
}

/* insert is step 12; 0, -EEXIST when another run was first, or another error when there is no room. */
__noinline int insert(struct __sk_buff *skb, struct judge *j, struct tuple *key, struct answer *a)
{
	const struct addr *src, *dst;
	const struct settings *cfg;
	struct tuple own; /* Linux 6.1 takes no argument of a function for a map's key */
	struct conn *c;
	__u32 zero = 0;
	long err;

	if (!j || !key || !a)
		return -EBUSY;
	own = *key;
	src = find_addr(&j->p.tuple.src, j->generation);
	dst = find_addr(&j->p.tuple.dst, j->generation);
	cfg = bpf_map_lookup_elem(&config, &zero);
	if (!ct_charge(addr_number(src), cfg && cfg->quota ? cfg->quota : ~0U))
		return -EBUSY;
	err = ct_insert(key, j->swapped);
	if (err) {
		ct_uncharge(addr_number(src));
		return err;
	}
	c = ct_find(&own);
	if (!c) /* only the owner of a busy entry deletes it */
		return -EEXIST;
	c->expires = step(conn_until(j, find_view(j->generation), src, dst, a));
	c->created = instant_ns();
	c->rule = a->under;
	c->number[0] = addr_number(src);
	c->number[1] = addr_number(dst);
	ct_mark(c, conn_ends(j, src, dst));
	pass_tracked(skb, j, key, c, 0);
	/* A full barrier: whoever reads this generation reads what was written under it. */
	__sync_val_compare_and_swap(&c->generation, CT_BUSY, j->generation);
	return 0;
}

/* retire takes an idle or closed entry out of the way of its successor. */
static __always_inline void retire(const struct judge *j, struct tuple *key, struct conn *c)
{
	if (!ct_take(c))
		return;
	event_end(key, c, j->now);
	ct_delete(key, c->number[0]);
}

/* met ends the run for a packet whose connection another run has tracked meanwhile: what rules say of it is known, if it
 * was opened in the same direction. */
static __always_inline bool met(struct __sk_buff *skb, struct judge *j, struct tuple *key)
{
	struct conn *c = ct_find(key);

	if (!c || ct_side(READ_ONCE(c->state), j->swapped))
		return false;
	pass_tracked(skb, j, key, c, 0);
	return true;
}

/* tracked is steps 9 to 12. */
static __always_inline void tracked(struct __sk_buff *skb, struct judge *j, const struct ends *e, const struct view *v,
				    struct tuple *key)
{
	struct conn *c = ct_find(key);
	bool known = c && !ct_gone(j, c);
	__u32 side = 0;
	struct answer a;
	long err;

	if (known) {
		/* 9. Tracked. */
		__u32 rule = c->rule;

		side = ct_side(READ_ONCE(c->state), j->swapped);
		if (contradicts(j, side)) {
			deny(j, e, REASON_CT_INVALID, 0);
			return;
		}
		if (ct_fresh(c, j->generation, j->now)) {
			pass_tracked(skb, j, key, c, side);
			passed(j, key, 0);
			allow(j, rule, addr_number(e->src), addr_number(e->dst));
			return;
		}
	} else if (!opens(j)) {
		/* 10. Untracked. */
		deny(j, e, REASON_CT_INVALID, 0);
		return;
	} else if (v->lease_mode == LEASE_DENY_NEW && j->now >= v->lease_ends) {
		deny(j, e, REASON_LEASE_ENDED, 0);
		return;
	}
	/* 11. Policy, for the direction of the first packet. */
	ask_policy(side ? e->dst : e->src, side ? e->src : e->dst, key->proto, side ? j->p.tuple.sport : j->p.tuple.dport, j->now, &a);
	if (known)
		again(skb, j, key, c, &a);
	if (a.verdict == VERDICT_DENY) {
		if (known)
			deny(j, e, a.reason, a.rule);
		else
			answered(j, e, &a);
		return;
	}
	/* 12. Track. */
	if (!known) {
		if (c)
			retire(j, key, c);
		err = insert(skb, j, key, &a);
		if (err && (err != -EEXIST || !met(skb, j, key))) {
			deny(j, e, err == -EEXIST ? REASON_CT_INVALID : REASON_CT_FULL, 0);
			return;
		}
	}
	passed(j, key, &a);
	answered(j, e, &a);
}

static __always_inline bool lease_over(const struct view *v, __u64 now)
{
	return !v || (v->lease_mode == LEASE_DENY_ALL && now >= v->lease_ends);
}

/* slow is steps 4 to 12, for a packet that the fast path did not pass. */
__noinline int slow(struct __sk_buff *skb, struct judge *j)
{
	const struct view *v;
	struct ends ends, *e = &ends;
	struct tuple key;
	__u8 reason;

	if (!j)
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
	if (j->hook != HOOK_INGRESS_DEVICE && !from_kernel(j) && !by_device(j))
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
		quoted(skb, j, e, &key);
		return 0;
	}
	/* 9 to 12. */
	j->swapped = ct_key(&j->p.tuple, &key);
	tracked(skb, j, e, v, &key);
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
static __always_inline void begin(struct judge *j, const struct settings *cfg, __u8 hook)
{
	j->generation = READ_ONCE(cfg->generation);
	j->hook = hook;
	j->cgroup = 0;
	j->uid = j->owner = 0;
	j->now = 0;
	j->p.tcp = j->p.flags = 0;
	j->p.tuple.pad[0] = j->p.tuple.pad[1] = j->p.tuple.pad[2] = 0;
}

/* asks reports whether a workload's own policy has the flag. */
static __always_inline bool asks(const struct judge *j, __u32 flag)
{
	struct own_key k = {.generation = j->generation, .number = j->owner};
	const struct own *o = j->owner ? bpf_map_lookup_elem(&owns, &k) : 0;

	return o && (o->flags & flag);
}

/* opens_outside: a packet from outside the overlay opens something, as far as its receiver can tell: what a workload
 * asked for itself comes back to a socket that has a peer. */
static __always_inline bool opens_outside(const struct judge *j, bool connected)
{
	if (j->p.tuple.proto == PROTO_TCP && !(j->p.flags & (PACKET_FIRST | PACKET_LATER)))
		return (j->p.tcp & (TCP_SYN | TCP_ACK)) == TCP_SYN;
	return !connected;
}

/* outside is step 1 for what has nothing to do with the overlay, where a workload's own policy may. */
static __always_inline bool outside(struct judge *j, bool connected)
{
	__u8 reason = REASON_NONE;

	if (is_egress(j->hook)) {
		if (!ip_loopback(&j->p.tuple.dst) && asks(j, OWN_CONFINED))
			reason = REASON_INTERNET_DENIED;
	} else if (!ip_loopback(&j->p.tuple.dst) && opens_outside(j, connected) && asks(j, OWN_OVERLAY_ONLY)) {
		reason = REASON_LISTEN_OVERLAY;
	}
	if (!reason) {
		ignore(j);
	} else {
		if (ip_multicast(&j->p.tuple.dst))
			j->p.flags |= PACKET_QUIET;
		deny_early(j, reason);
	}
	return finish(j, 0);
}

/* outside_socket is outside for a socket of this host. */
static __noinline bool outside_socket(struct __sk_buff *skb, struct judge *j, __u32 hook)
{
	bool connected = false;

	if (!j)
		return false;
	j->cgroup = packet_cgroup(skb);
	j->uid = packet_uid(skb);
	if (!from_kernel(j))
		j->owner = packet_owner(skb, j->generation, j->cgroup, j->uid);
	if (hook == HOOK_INGRESS_SOCKET)
		connected = packet_connected(skb);
	return outside(j, connected);
}

/* in_scope is step 1. */
static __always_inline bool in_scope(const struct judge *j)
{
	return !(j->p.flags & PACKET_NOT_IP) &&
	       (in_overlay(&j->p.tuple.src, j->p.family) || in_overlay(&j->p.tuple.dst, j->p.family));
}

/* judge_tracked is steps 4 to 12. A first fragment takes the long path, which remembers it. foreign is set where packets
 * of other network namespaces pass, whose devices have numbers of their own. */
static __always_inline bool judge_tracked(struct __sk_buff *skb, struct judge *j, bool in_line, const struct settings *foreign)
{
	if ((j->p.flags & (PACKET_QUOTES | PACKET_FIRST)) || !(in_line && j->p.family == 4 ? fast4(skb, j) : fast_any(skb, j))) {
		if (foreign && packet_foreign(skb, foreign))
			return true; /* judged where it reaches this host's namespace */
		slow(skb, j);
	}
	return finish(j, 0);
}

/* place is step 3 at sockets and devices. */
static __always_inline __u8 place(struct __sk_buff *skb, struct judge *j, const struct settings *cfg, bool tunnel)
{
	if (tunnel)
		j->device = DEVICE_TUNNEL;
	else if (j->hook == HOOK_LOOPBACK)
		j->device = DEVICE_LOOPBACK;
	else
		j->device = packet_device(skb, cfg->tunnel);
	if (j->device == DEVICE_OTHER && find_iface(packet_ifindex(skb), j->generation))
		j->device = DEVICE_WORKLOAD;
	return j->device == DEVICE_OTHER ? REASON_NOT_TUNNEL : REASON_NONE;
}

/* judge_packet judges at a hook that carries packets of sockets, of the tunnel or of loopback; true lets the packet
 * pass. */
static __always_inline bool judge_packet(struct __sk_buff *skb, const __u8 hook)
{
	const bool tunnel = hook == HOOK_EGRESS_DEVICE || hook == HOOK_INGRESS_DEVICE;
	const bool socket = hook == HOOK_EGRESS_SOCKET || hook == HOOK_INGRESS_SOCKET;
	struct judge j;
	struct settings *cfg;
	__u32 zero = 0;
	__u8 reason;

	cfg = bpf_map_lookup_elem(&config, &zero);
	if (!cfg)
		return false;
	begin(&j, cfg, hook);
	if (hook == HOOK_LOOPBACK || !parse_fast(skb, &j.p, tunnel ? link_header : 0)) {
		if (!socket)
			pull_headers(skb);
		__builtin_memset(&j.p, 0, sizeof(j.p));
		parse(skb, &j.p);
	}
	/* 1. Scope. */
	if (!in_scope(&j)) {
		if (socket && cfg->traits && !(j.p.flags & PACKET_NOT_IP) && !packet_foreign(skb, cfg))
			return outside_socket(skb, &j, hook);
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
	if (hook == HOOK_EGRESS_DEVICE && packet_from(skb)) {
		/* Forwarded: its owner is known by the device that it came in by, and by nothing else. */
		j.cgroup = BY_DEVICE | packet_from(skb);
		j.owner = find_iface(packet_from(skb), j.generation);
	}
	j.now = now_ns();
	/* 2. Form. 3. Place. */
	reason = form(&j);
	if (!reason)
		reason = place(skb, &j, cfg, tunnel);
	if (reason) {
		if (socket && packet_foreign(skb, cfg))
			return true; /* judged where it reaches this host's namespace */
		deny_early(&j, reason);
		return finish(&j, 0);
	}
	return judge_tracked(skb, &j, hook != HOOK_LOOPBACK, socket ? cfg : 0);
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
	__u16 type = 0;

	/* A packet socket may claim another protocol than the frame's, or hide the packet behind a tag; on the way in the
	 * kernel goes by the frame. What does not agree with itself is no honest packet. */
	if (network_header(skb, &type) != ETH_HLEN || type != skb->protocol)
		return guard_packet(skb, HOOK_LOOPBACK) ? PASS_TC : DROP_TC;
	return judge_packet(skb, HOOK_LOOPBACK) ? PASS_TC : DROP_TC;
}

SEC("tcx/ingress")
int guard(struct __sk_buff *skb)
{
	return guard_packet(skb, HOOK_FROM_WORKLOAD) ? PASS_TC : DROP_TC;
}

SEC("tcx/egress")
int guard_egress(struct __sk_buff *skb)
{
	return guard_packet(skb, HOOK_TO_WORKLOAD) ? PASS_TC : DROP_TC;
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

#include "lib/sweep.h"
