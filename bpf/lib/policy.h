/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/* Steps 1, 7 and 11 of the judge: scope, peers and rules (internal/policy/judge.go). */
#pragma once

#include "ct.h"

/* struct answer is what rules say of a flow, and from when on they may say something else. */
struct answer {
	__u64 until;
	__u32 rule;
	__u8 verdict;
	__u8 reason;
	__u8 pad[2];
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

static __always_inline bool slot_active(const struct slot *s, __u64 now)
{
	return s->rule && now >= s->not_before && (!s->not_after || now < s->not_after);
}

/* lookup asks one ruleset: every probe is made, deny counts before allow, and among those the most specific wins. */
__noinline int lookup(struct entry_key *k, __u64 now, struct answer *a)
{
	__u32 allow = 0, stale = 0;

	if (!k || !a)
		return 0;
	for (int i = 0; i < 3; i++) {
		const struct entry *e;

		if (i == 1)
			k->port = 0;
		if (i == 2)
			k->proto = 0;
		e = bpf_map_lookup_elem(&entries, k);
		if (!e)
			continue;
		earliest(&a->until, e->deny.not_before, now);
		earliest(&a->until, e->deny.not_after, now);
		earliest(&a->until, e->allow.not_before, now);
		earliest(&a->until, e->allow.not_after, now);
		if (slot_active(&e->deny, now)) {
			a->verdict = VERDICT_DENY;
			a->reason = REASON_POLICY_DENY;
			a->rule = e->deny.rule;
			return 0;
		}
		if (!allow && slot_active(&e->allow, now))
			allow = e->allow.rule;
		else if (!stale)
			stale = e->allow.rule;
	}
	a->verdict = allow ? VERDICT_ALLOW : VERDICT_DENY;
	a->reason = allow ? REASON_POLICY_ALLOW : stale ? REASON_EXPIRED : REASON_NO_RULE;
	a->rule = allow ? allow : stale;
	return 0;
}

/* ask_policy is step 11 for a flow's first packet: the source's ruleset when the source is here, then the destination's
 * when that is here. */
static __always_inline void ask_policy(const struct addr *src, const struct addr *dst, __u8 proto, __u16 port, __u64 now,
				       struct answer *a)
{
	struct entry_key k;

	a->until = 0;
	a->rule = 0;
	a->verdict = VERDICT_DENY;
	a->reason = REASON_NO_RULE;
	if (proto == PROTO_ICMPV6)
		proto = PROTO_ICMP;
	if (proto == PROTO_ICMP)
		port = 0;
	if (addr_local(src)) {
		k.ruleset = src->ruleset;
		k.peer = addr_number(dst);
		k.port = port;
		k.proto = proto;
		k.dir = DIR_EGRESS;
		lookup(&k, now, a);
		if (a->verdict != VERDICT_ALLOW)
			return;
	}
	if (addr_local(dst)) {
		k.ruleset = dst->ruleset;
		k.peer = addr_number(src);
		k.port = port;
		k.proto = proto;
		k.dir = DIR_INGRESS;
		lookup(&k, now, a);
	}
}
