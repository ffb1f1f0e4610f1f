/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/* What the kernel knows of the moment: the time, and whose socket it is. The object for tests (SIGNET_TEST) takes all
 * of it from a map instead, because the test harness has no sockets; the agent never loads that object. The twin that answers questions (SIGNET_TWIN, beside
 * SIGNET_TEST) is asked about sockets in the same way. */
#pragma once

#include "maps.h"

/* Cgroups nested deeper than this have no owner. */
#define MAX_LEVELS 24

/* The root cgroup is where the kernel's own sockets are: resets, echo replies, ICMP errors. */
#define ROOT_CGROUP 1

#ifdef SIGNET_TEST

struct test_input {
	__u64 now;
	__u64 cgroups[MAX_LEVELS]; /* from the root down to the socket's own */
	__u32 levels;
	__u32 uid;
	__u32 device;
	__u32 ifindex;
	__u32 connected;
	__u32 pad;
};

struct test_output {
	__u32 verdict, reason, rule, src, dst, runs;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct test_input);
} test_in SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct test_output);
} test_out SEC(".maps");

static __always_inline struct test_input *test_input(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&test_in, &zero);
}

static __always_inline __u64 now_ns(void)
{
	struct test_input *in = test_input();

#ifdef SIGNET_TWIN
	if (in && !in->now) /* the time is part of the question only where it is set */
		return bpf_ktime_get_ns();
#endif
	return in ? in->now : 0;
}

static __always_inline __u64 instant_ns(void)
{
	return now_ns();
}

static __always_inline __u64 packet_ancestor(struct __sk_buff *skb, __u32 level)
{
	struct test_input *in = test_input();

	asm volatile("" : : "r"(skb)); /* or the compiler passes nothing for it, which the verifier refuses */
	if (!in || level >= MAX_LEVELS || level >= in->levels)
		return 0;
	return in->cgroups[level];
}

static __always_inline __u64 packet_cgroup(struct __sk_buff *skb)
{
	struct test_input *in = test_input();
	__u32 level;

	if (!in || !in->levels)
		return 0;
	level = in->levels - 1;
	return level < MAX_LEVELS ? in->cgroups[level] : 0;
}

static __always_inline __u32 packet_uid(struct __sk_buff *skb)
{
	struct test_input *in = test_input();

	return in ? in->uid : UID_ANY;
}

static __always_inline __u32 packet_device(struct __sk_buff *skb, __u32 tunnel)
{
	struct test_input *in = test_input();

	return in ? in->device : DEVICE_OTHER;
}

static __always_inline __u32 packet_ifindex(struct __sk_buff *skb)
{
	struct test_input *in = test_input();

	asm volatile("" : : "r"(skb));
	return in ? in->ifindex : 0;
}

static __always_inline __u32 packet_from(struct __sk_buff *skb)
{
	return packet_ifindex(skb);
}

static __always_inline bool packet_connected(struct __sk_buff *skb)
{
	struct test_input *in = test_input();

	asm volatile("" : : "r"(skb));
	return in && in->connected;
}

static __always_inline bool packet_foreign(struct __sk_buff *skb, const struct settings *cfg)
{
	return false;
}

#else

#define LOOPBACK_IFINDEX 1 /* in every network namespace */

/* Each CPU's last reading of the clock. */
struct reading {
	__u64 jiffies;
	__u64 now;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct reading);
} readings SEC(".maps");

/* now_ns is CLOCK_MONOTONIC, up to two clock ticks (2 to 20 ms) behind. The coarse clock moves with the tick, so it is
 * read once a tick: reading it costs a quarter of a run, and looking at the tick next to nothing. A run that interrupts
 * another one between the two writes leaves an older tick, and the clock is only read once more. */
static __always_inline __u64 now_ns(void)
{
	__u32 zero = 0;
	struct reading *r = bpf_map_lookup_elem(&readings, &zero);
	__u64 tick = bpf_jiffies64(), now;

	if (r && READ_ONCE(r->jiffies) == tick)
		return READ_ONCE(r->now);
	now = bpf_ktime_get_coarse_ns();
	if (r) {
		WRITE_ONCE(r->now, now);
		WRITE_ONCE(r->jiffies, tick);
	}
	return now;
}

/* instant_ns is the same without delay. */
static __always_inline __u64 instant_ns(void)
{
	return bpf_ktime_get_ns();
}

static __always_inline __u64 packet_ancestor(struct __sk_buff *skb, __u32 level)
{
	return bpf_skb_ancestor_cgroup_id(skb, level);
}

static __always_inline __u64 packet_cgroup(struct __sk_buff *skb)
{
	return bpf_skb_cgroup_id(skb);
}

static __always_inline __u32 packet_uid(struct __sk_buff *skb)
{
	return bpf_get_socket_uid(skb);
}

static __always_inline __u32 packet_device(struct __sk_buff *skb, __u32 tunnel)
{
	if (skb->ifindex == LOOPBACK_IFINDEX)
		return DEVICE_LOOPBACK;
	return tunnel && skb->ifindex == tunnel ? DEVICE_TUNNEL : DEVICE_OTHER;
}

static __always_inline __u32 packet_ifindex(struct __sk_buff *skb)
{
	return skb->ifindex;
}

/* packet_from is the device that a packet came in by; 0 for what this host sends itself. */
static __always_inline __u32 packet_from(struct __sk_buff *skb)
{
	return skb->ingress_ifindex;
}

/* packet_connected: the receiving socket has a peer of its own. Only programs at sockets may ask. */
static __always_inline bool packet_connected(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;

	if (sk)
		sk = bpf_sk_fullsock(sk);
	return sk && sk->dst_port;
}

/* packet_foreign: the socket is in another network namespace, whose packets meet the judge where they reach this one.
 * Only programs at sockets may ask. */
static __always_inline bool packet_foreign(struct __sk_buff *skb, const struct settings *cfg)
{
	return has_netns && cfg->netns && bpf_get_netns_cookie(skb) != cfg->netns;
}

#endif

/* probe_owner adds what one cgroup says to what was found so far; false once two workloads claim the socket. */
static __always_inline bool probe_owner(struct local_key *k, __u32 uid, __u32 *found)
{
	__u32 *n;

	k->uid = UID_ANY;
	n = bpf_map_lookup_elem(&locals, k);
	if (n && *n != *found) {
		if (*found)
			return false;
		*found = *n;
	}
	k->uid = uid;
	n = bpf_map_lookup_elem(&locals, k);
	if (n && *n != *found) {
		if (*found)
			return false;
		*found = *n;
	}
	return true;
}

/* packet_owner is step 5 for a packet's socket; 0 for nobody. */
__noinline __u32 packet_owner(struct __sk_buff *skb, __u64 generation, __u64 own, __u32 uid)
{
	struct local_key k = {.generation = generation};
	__u32 found = 0;

	for (__u32 level = 0; level < MAX_LEVELS; level++) {
		__u64 id = packet_ancestor(skb, level);

		if (!id)
			break;
		k.cgroup = id;
		if (!probe_owner(&k, uid, &found))
			return 0;
	}
	return k.cgroup == own ? found : 0; /* else nested too deep to know all that claim it */
}

/* task_owner is step 5 for a calling process; 0 for nobody. */
__noinline __u32 task_owner(__u64 generation, __u64 own, __u32 uid)
{
	struct local_key k = {.generation = generation};
	__u32 found = 0;

	for (__u32 level = 0; level < MAX_LEVELS; level++) {
		__u64 id = bpf_get_current_ancestor_cgroup_id(level);

		if (!id)
			break;
		k.cgroup = id;
		if (!probe_owner(&k, uid, &found))
			return 0;
	}
	return k.cgroup == own ? found : 0;
}
