/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/* Steps 1, 7 and 11 of the judge: scope, peers and rules (internal/policy/judge.go). */
#pragma once

#include "ct.h"

/* struct answer is what rules say of a flow, and from when on they may say something else. */
struct answer {
	__u64 until;
	__u32 rule;  /* that decided; with VERDICT_AUDIT the one that would have denied */
	__u32 under; /* that lets the flow pass */
	__u8 verdict;
	__u8 reason;
	__u8 pad[6];
};

static __always_inline bool in_overlay(const struct ip *a, __u8 family)
{
	if (family == 4)
		return overlay.v4_mask.w[3] && (a->w[3] & overlay.v4_mask.w[3]) == overlay.v4.w[3];
	return (a->w[0] & overlay.v6_mask.w[0]) == overlay.v6.w[0] && (a->w[1] & overlay.v6_mask.w[1]) == overlay.v6.w[1] &&
	       (a->w[2] & overlay.v6_mask.w[2]) == overlay.v6.w[2] && (a->w[3] & overlay.v6_mask.w[3]) == overlay.v6.w[3] &&
	       overlay.v6_mask.w[0];
}

static __always_inline const struct addr *find_addr(const struct ip *ip, __u64 generation)
{
	struct addr_key k = {.ip = *ip, .generation = generation};

	return bpf_map_lookup_elem(&addrs, &k);
}

/* find_iface gives the workload behind a device, 0 for none. */
static __always_inline __u32 find_iface(__u32 ifindex, __u64 generation)
{
	struct iface_key k = {.generation = generation, .ifindex = ifindex};
	const __u32 *n = bpf_map_lookup_elem(&ifaces, &k);

	return n ? *n : 0;
}

static __always_inline __u32 addr_number(const struct addr *a)
{
	return a ? a->number : 0;
}

static __always_inline bool addr_local(const struct addr *a)
{
	return a && (a->flags & ADDR_LOCAL);
}

/* peer_reason is step 7. */
static __always_inline __u8 peer_reason(const struct addr *a, __u64 now)
{
	if (a && (a->flags & ADDR_REVOKED))
		return REASON_REVOKED;
	if (!addr_number(a))
		return REASON_UNKNOWN_PEER;
	if (a->not_after && now >= a->not_after)
		return REASON_EXPIRED;
	return REASON_NONE;
}

/* earliest keeps the first instant after now in *until. */
static __always_inline void earliest(__u64 *until, __u64 t, __u64 now)
{
	if (t > now && (!*until || t < *until))
		*until = t;
}

/* struct search is what the probes of one ruleset have found so far. */
struct search {
	__u64 now;
	__u64 until;
	__u32 deny, audit, allow, lenient, stale;
	__u32 pad;
};

/* slot_active: whether the rule counts now; notes when that may change. */
static __always_inline bool slot_active(const struct slot *s, struct search *f)
{
	__u32 id = s->window & ~SLOT_LENIENT;
	const struct window *w;

	if (!s->rule)
		return false;
	if (!id)
		return true;
	w = bpf_map_lookup_elem(&windows, &id);
	if (!w) /* written before the entry is, and deleted after it */
		return false;
	earliest(&f->until, w->not_before, f->now);
	earliest(&f->until, w->not_after, f->now);
	return f->now >= w->not_before && (!w->not_after || f->now < w->not_after);
}

/* hear takes one entry in; 1 when it denies, which nothing outweighs. Not inlined, so that the verifier need not go
 * through it for each probe anew. */
__noinline int hear(const struct entry *e, struct search *f)
{
	if (!e || !f)
		return 0;
	if (slot_active(&e->deny, f)) {
		f->deny = e->deny.rule;
		return 1;
	}
	if (slot_active(&e->audit, f) && !f->audit)
		f->audit = e->audit.rule;
	if (slot_active(&e->allow, f)) {
		if (!f->allow)
			f->allow = e->allow.rule;
	} else if (e->allow.window & SLOT_LENIENT) {
		if (!f->lenient)
			f->lenient = e->allow.rule;
	} else if (!f->stale) {
		f->stale = e->allow.rule;
	}
	return 0;
}

/* probe makes every probe, the most specific first; true when one denies. */
static __always_inline bool probe(struct entry_key *k, struct search *f, bool has_ranges)
{
	const struct entry *e = bpf_map_lookup_elem(&entries, k);

	if (e && hear(e, f))
		return true;
	if (has_ranges && k->port) {
		struct range_key r = {
			.prefixlen = RANGE_FIXED + 16, .ruleset = k->ruleset, .peer = k->peer,
			.proto = k->proto, .dir = k->dir, .port = bpf_htons(k->port),
		};

		e = bpf_map_lookup_elem(&ranges, &r);
		if (e && hear(e, f))
			return true;
	}
	if (k->port) {
		k->port = 0;
		e = bpf_map_lookup_elem(&entries, k);
		if (e && hear(e, f))
			return true;
	}
	if (!k->proto)
		return false;
	k->proto = 0;
	e = bpf_map_lookup_elem(&entries, k);
	return e && hear(e, f);
}

/* lookup asks one ruleset: every probe is made, deny counts before allow, and among those the most specific wins. */
__noinline int lookup(struct entry_key *key, __u64 now, struct answer *a)
{
	struct search f = {.now = now};
	struct entry_key own, *k = &own; /* Linux 6.1 takes no argument of a function for a map's key */
	bool denied;

	if (!key || !a)
		return 0;
	own = *key;
	f.until = a->until;
	denied = k->ruleset & RULESET_RANGES;
	k->ruleset &= ~RULESET_RANGES;
	denied = probe(k, &f, denied);
	a->until = f.until;
	a->under = 0;
	a->verdict = VERDICT_DENY;
	if (denied) {
		a->reason = REASON_POLICY_DENY;
		a->rule = f.deny;
		return 0;
	}
	if (f.allow) {
		a->verdict = VERDICT_ALLOW;
		a->reason = REASON_POLICY_ALLOW;
		a->rule = a->under = f.allow;
	} else if (f.lenient) {
		a->verdict = VERDICT_AUDIT;
		a->reason = REASON_EXPIRED;
		a->rule = a->under = f.lenient;
	} else {
		a->reason = f.stale ? REASON_EXPIRED : REASON_NO_RULE;
		a->rule = f.stale;
		return 0;
	}
	if (f.audit) {
		a->verdict = VERDICT_AUDIT;
		a->reason = REASON_POLICY_DENY;
		a->rule = f.audit;
	}
	return 0;
}

/* ask_one asks the ruleset of a local end about its peer. */
static __always_inline void ask_one(const struct addr *own, const struct addr *peer, __u8 dir, __u8 proto, __u16 port,
				    __u64 now, struct answer *a)
{
	struct entry_key k;

	k.ruleset = own->ruleset;
	k.peer = addr_number(peer);
	k.port = port;
	k.proto = proto;
	k.dir = dir;
	lookup(&k, now, a);
}

/* ask_policy is step 11 for a flow's first packet: the source's ruleset when the source is here, then the destination's
 * when that is here. */
static __always_inline void ask_policy(const struct addr *src, const struct addr *dst, __u8 proto, __u16 port, __u64 now,
				       struct answer *a)
{
	__u8 verdict = VERDICT_ALLOW, reason = REASON_NONE;
	__u32 rule = 0;

	a->until = 0;
	a->rule = a->under = 0;
	a->verdict = VERDICT_DENY;
	a->reason = REASON_NO_RULE;
	if (proto == PROTO_ICMPV6)
		proto = PROTO_ICMP;
	if (proto == PROTO_ICMP)
		port = 0;
	if (addr_local(src)) {
		ask_one(src, dst, DIR_EGRESS, proto, port, now, a);
		if (a->verdict == VERDICT_DENY)
			return;
		verdict = a->verdict;
		reason = a->reason;
		rule = a->rule;
	}
	if (addr_local(dst)) {
		ask_one(dst, src, DIR_INGRESS, proto, port, now, a);
		/* The first would-be denial is the one on record. */
		if (verdict == VERDICT_AUDIT && a->verdict != VERDICT_DENY) {
			a->verdict = verdict;
			a->reason = reason;
			a->rule = rule;
		}
	}
}
