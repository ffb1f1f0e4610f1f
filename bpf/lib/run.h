/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/* One run of the judge: its state, its verdict, and what is told and counted of it. */
#pragma once

#include "events.h"
#include "parse.h"
#include "policy.h"
#include "socket.h"

/* struct judge is the state of one run over a packet or a call. It holds no pointers, so that it can be handed to
 * functions that the verifier checks by themselves. */
struct judge {
	struct packet p;
	__u64 now, generation;
	__u64 cgroup; /* of the socket; or, with BY_DEVICE, the device of a workload in a network namespace of its own */
	__u32 uid, owner;
	__u32 src_number, dst_number, rule;
	__u8 hook, device, verdict, reason;
	__u8 swapped; /* the tuple's ends change places in the table's key */
	__u8 pad[7];
};

#define BY_DEVICE (1ULL << 63)

/* struct ends is what the view knows of a packet's two addresses; null for nothing. */
struct ends {
	const struct addr *src, *dst;
};

/* is_egress: the packet comes from this end of the flow. */
static __always_inline bool is_egress(__u8 hook)
{
	return hook == HOOK_EGRESS_SOCKET || hook == HOOK_EGRESS_DEVICE || hook == HOOK_LOOPBACK || hook == HOOK_FROM_WORKLOAD;
}

/* by_device: the packet's owner is known by the device that it came from, or goes to. */
static __always_inline bool by_device(const struct judge *j)
{
	return j->cgroup & BY_DEVICE;
}

/* from_kernel: no socket, or one of the kernel's own. What is forwarded has no socket either, but a device. */
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
static __always_inline void deny(struct judge *j, const struct ends *e, __u8 reason, __u32 rule)
{
	j->verdict = VERDICT_DENY;
	j->reason = reason;
	j->rule = rule;
	j->src_number = addr_number(e->src);
	j->dst_number = addr_number(e->dst);
	if (j->owner) {
		if (j->hook == HOOK_INGRESS_SOCKET || j->hook == HOOK_TO_WORKLOAD)
			j->dst_number = j->owner;
		else if (j->hook != HOOK_INGRESS_DEVICE)
			j->src_number = j->owner;
	}
}

static __always_inline void ignore(struct judge *j)
{
	j->src_number = j->dst_number = j->rule = 0;
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
	e->cgroup = by_device(j) ? 0 : j->cgroup;
	e->uid = j->uid;
	e->pid = pid;
	e->src_number = j->src_number;
	e->dst_number = j->dst_number;
	e->rule = j->rule;
	e->verdict = j->verdict;
	e->reason = j->reason;
	e->hook = j->hook;
	e->tcp = j->p.tcp;
	event_submit(e);
	return 0;
}

/* finish counts and tells; true lets the packet pass. */
static __always_inline bool finish(struct judge *j, __u32 pid)
{
	test_report(j);
	if (j->verdict == VERDICT_IGNORE)
		return true;
	count(j->verdict, j->hook, j->reason);
	if (j->verdict != VERDICT_DENY)
		return true;
	deny_event(j, pid);
	return false;
}

/* tally counts a packet of a tracked connection once in each direction: on the tunnel for what leaves or enters the
 * host, and for what stays at the sender's socket, or the device that it comes from when that has one of its own. */
static __always_inline void tally(struct __sk_buff *skb, const struct judge *j, struct conn *c, __u32 side)
{
	__u32 both = CT_LOCAL0 | CT_LOCAL1;

	if (j->hook == HOOK_FROM_WORKLOAD) {
		if ((READ_ONCE(c->state) & both) != both)
			return;
	} else if (j->hook != HOOK_EGRESS_DEVICE && j->hook != HOOK_INGRESS_DEVICE &&
		   !(j->hook == HOOK_EGRESS_SOCKET && j->device != DEVICE_TUNNEL)) {
		return;
	}
	ct_count(c, side, skb->gso_segs ?: 1, skb->len);
}
