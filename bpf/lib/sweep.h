/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/* Idle connections are taken away: by the agent, which runs sweep now and then, and by a timer of the kernel when no
 * agent does. Inside the kernel an entry is taken without racing with a packet that brings it back. */
#pragma once

struct sweep {
	__u64 now;
	__u64 removed;
};

/* sweep_one takes one idle connection away, unless a packet is just replacing it. */
static __always_inline void sweep_one(struct tuple *key, struct conn *c, struct sweep *s)
{
	if (!ct_idle(c, s->now) || !ct_take(c))
		return;
	event_end(key, c, s->now);
	ct_delete(key, c->number[0]);
	s->removed++;
}

static long sweep_one4(void *map, struct tuple4 *key, struct conn *c, struct sweep *s)
{
	struct tuple k = {.sport = key->sport, .dport = key->dport, .proto = key->proto};

	ip_from4(&k.src, key->src);
	ip_from4(&k.dst, key->dst);
	sweep_one(&k, c, s);
	return 0;
}

static long sweep_one6(void *map, struct tuple *key, struct conn *c, struct sweep *s)
{
	struct tuple k = *key;

	sweep_one(&k, c, s);
	return 0;
}

/* sweep_all removes idle connections and tells of their end. */
static __noinline int sweep_all(void)
{
	__u32 zero = 0;
	struct settings *cfg = bpf_map_lookup_elem(&config, &zero);
	struct sweep s = {.now = now_ns()};

	if (cfg)
		WRITE_ONCE(cfg->swept, s.now);
	bpf_for_each_map_elem(&conns4, sweep_one4, &s, 0);
	bpf_for_each_map_elem(&conns6, sweep_one6, &s, 0);
	return s.removed;
}

/* sweep is run by BPF_PROG_TEST_RUN and never attached. */
SEC("tc")
int sweep(struct __sk_buff *skb)
{
	return sweep_all();
}

#ifndef SIGNET_TEST

/* How long nobody may have swept before the timer does, and how often it looks. */
#define SWEEP_OVERDUE (60 * SECOND)
#define SWEEP_LOOK    (20 * SECOND)

struct sweeper {
	struct bpf_timer timer;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct sweeper);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} sweepers SEC(".maps");

static int sweep_overdue(void *map, __u32 *key, struct sweeper *s)
{
	__u32 zero = 0;
	struct settings *cfg = bpf_map_lookup_elem(&config, &zero);

	if (cfg && now_ns() >= READ_ONCE(cfg->swept) + SWEEP_OVERDUE)
		sweep_all();
	bpf_timer_start(&s->timer, SWEEP_LOOK, 0);
	return 0;
}

/* sweep_timer starts the timer, which outlives the agent with the pinned map that holds it. It is run once at start, by
 * BPF_PROG_TEST_RUN, and never attached. */
SEC("tc")
int sweep_timer(struct __sk_buff *skb)
{
	__u32 zero = 0;
	struct sweeper *s = bpf_map_lookup_elem(&sweepers, &zero);
	long err;

	if (!s)
		return 1;
	err = bpf_timer_init(&s->timer, &sweepers, 1 /* CLOCK_MONOTONIC */);
	if (err && err != -EBUSY) /* busy: an earlier agent started it */
		return 2;
	if (bpf_timer_set_callback(&s->timer, sweep_overdue))
		return 3;
	return bpf_timer_start(&s->timer, SWEEP_LOOK, 0) ? 4 : 0;
}

#endif
