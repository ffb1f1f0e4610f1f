/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/* What is told: counters for every verdict, events for denials and for the beginning and end of flows. An event that
 * finds no room is counted, never waited for. */
#pragma once

#include "ct.h"

enum event_kind {
	EVENT_START = 1,
	EVENT_END = 2,
	EVENT_DENY = 3,
	EVENT_AUDIT = 4,
};

struct event {
	__u64 time;
	__u64 created; /* with the tuple, the name of the flow; 0 for a denial */
	__u64 generation;
	__u64 revision;
	__u64 cgroup;
	__u64 packets[2], bytes[2]; /* 0: from the source, 1: from the destination */
	struct ip src, dst;
	__u16 sport, dport;
	__u32 src_number, dst_number;
	__u32 rule;
	__u32 uid;
	__u32 pid; /* of the calling process; 0 for packets */
	__u8 proto;
	__u8 kind;
	__u8 verdict;
	__u8 reason;
	__u8 hook;
	__u8 tcp;
	__u8 pad[2];
};

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} lost SEC(".maps");

#ifdef SIGNET_TWIN

/* The twin counts nothing and tells nobody. */
static __always_inline void count(__u8 verdict, __u8 hook, __u8 reason)
{
}

static __always_inline struct event *event_reserve(__u8 kind)
{
	return 0;
}

#else

static __always_inline void count(__u8 verdict, __u8 hook, __u8 reason)
{
	__u32 slot = ((verdict & 3) * COUNTER_HOOKS + (hook & (COUNTER_HOOKS - 1))) * COUNTER_REASONS +
		     (reason & (COUNTER_REASONS - 1));
	__u64 *n = bpf_map_lookup_elem(&counters, &slot);

	if (!n)
		return;
	/* A run can be interrupted by another one on its CPU. Denials are counted exactly; passing packets, which conns
	 * count exactly, cheaply. */
	if (verdict == VERDICT_ALLOW)
		*n += 1;
	else
		__sync_fetch_and_add(n, 1);
}

/* event_reserve gives room for one event, zeroed, or counts the loss. */
static __always_inline struct event *event_reserve(__u8 kind)
{
	struct event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);

	if (!e) {
		__u32 zero = 0;
		__u64 *n = bpf_map_lookup_elem(&lost, &zero);

		if (n)
			__sync_fetch_and_add(n, 1);
		return 0;
	}
	__builtin_memset(e, 0, sizeof(*e));
	e->kind = kind;
	return e;
}

#endif

/* event_submit wakes the reader only when enough is queued; otherwise the reader looks by itself a few times a second.
 * Not inlined, so that struct event reaches the type information that the Go side is generated from. */
static __noinline int event_submit(struct event *e)
{
	__u32 zero = 0;
	const struct settings *cfg = bpf_map_lookup_elem(&config, &zero);
	__u64 flags = BPF_RB_NO_WAKEUP;

	if (cfg && bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA) >= cfg->wake)
		flags = BPF_RB_FORCE_WAKEUP;
	bpf_ringbuf_submit(e, flags);
	return 0;
}

/* struct teller is what is told beside an entry. */
struct teller {
	__u64 now;
	__u64 cgroup;
	__u32 uid, pid;
	__u32 rule;
	__u8 kind;
	__u8 verdict;
	__u8 reason;
	__u8 pad;
};

static __always_inline void event_tuple(struct event *e, const struct tuple *t)
{
	e->src = t->src;
	e->dst = t->dst;
	e->sport = t->sport;
	e->dport = t->dport;
	e->proto = t->proto;
}

/* event_conn tells the beginning or the end of a flow, or what a rule in mode audit says of it; key is the canonical
 * tuple. cgroup and uid are those of the local socket, 0 where it is not known any more. */
__noinline int event_conn(struct tuple *key, struct conn *c, struct teller *t)
{
	struct event *e;
	__u32 state;

	if (!key || !c || !t)
		return 0;
	e = event_reserve(t->kind);
	if (!e)
		return 0;
	state = READ_ONCE(c->state);
	event_tuple(e, key);
	if (state & CT_SWAPPED) {
		e->src = key->dst;
		e->dst = key->src;
		e->sport = key->dport;
		e->dport = key->sport;
	}
	e->time = t->now;
	e->created = c->created;
	e->cgroup = t->cgroup;
	e->uid = t->uid;
	e->pid = t->pid;
	e->packets[0] = c->packets[0];
	e->packets[1] = c->packets[1];
	e->bytes[0] = c->bytes[0];
	e->bytes[1] = c->bytes[1];
	e->src_number = c->number[0];
	e->dst_number = c->number[1];
	e->rule = t->rule;
	e->verdict = t->verdict;
	e->reason = t->reason;
	e->tcp = state | state >> 8;
	event_submit(e);
	return 0;
}

/* event_end tells the end of a flow. */
static __always_inline void event_end(struct tuple *key, struct conn *c, __u64 now)
{
	struct teller t = {
		.now = now, .rule = c->rule, .kind = EVENT_END,
		.verdict = VERDICT_ALLOW, .reason = REASON_POLICY_ALLOW,
	};

	event_conn(key, c, &t);
}
