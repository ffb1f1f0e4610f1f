/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/* Everything that outlives the agent. All maps are pinned below one directory that carries the ABI version: a change
 * of any struct here needs a new version (dataplane/enforce/pins.go).
 *
 * Ports are in host order, addresses in network order, IPv4 as ::ffff:a.b.c.d. Times are CLOCK_MONOTONIC nanoseconds;
 * 0 bounds nothing, unless it says otherwise. */
#pragma once

#include "types.h"

#define UID_ANY (~0U)

/* struct settings is the one word that makes a view real, and what no view changes. */
struct settings {
	__u64 generation; /* read once by each run; 0 before the first view */
	__u64 netns;	  /* cookie of this host's network namespace; 0 where the kernel does not tell */
	__u64 swept;	  /* when idle connections were last looked for */
	__u32 tunnel;	  /* ifindex of the tunnel, 0 while there is none */
	__u32 wake;	  /* queued bytes of events that wake the reader */
	__u32 traits;	  /* 1 while some workload's policy reaches beyond the overlay; never 0 too early */
	__u32 quota;	  /* connections that one identity may have opened; 0 for no bound */
};

/* struct view holds the scalars of one generation; two generations are kept, by the lowest bit. */
struct view {
	__u64 generation;
	__u64 revision;
	__u64 lease_ends; /* 0: ended */
	__u32 lease_mode;
	__u32 pad;
};

enum lease_mode {
	LEASE_DENY_ALL = 0,
	LEASE_DENY_NEW = 1,
};

struct addr_key {
	struct ip ip;
	__u64 generation;
};

enum addr_flags {
	ADDR_LOCAL = 1,
	ADDR_REVOKED = 2,
};

struct addr {
	__u64 not_after;
	__u32 number;
	__u32 ruleset; /* of a local workload; 0 has no entries */
	__u32 flags;
	__u32 pad;
};

/* A ruleset's number carries this bit when it has ranges of ports, which only then are looked for. */
#define RULESET_RANGES (1U << 31)

struct local_key {
	__u64 generation;
	__u64 cgroup;
	__u32 uid;
	__u32 pad;
};

struct own_key {
	__u64 generation;
	__u32 number;
	__u32 pad;
};

enum own_flags {
	OWN_V4 = 1,
	OWN_V6 = 2,
	OWN_CONFINED = 4,     /* internet: deny */
	OWN_OVERLAY_ONLY = 8, /* listen: overlay */
};

/* struct own is what the calls need of a local workload: the addresses that it sends from, and its ruleset. */
struct own {
	struct ip v4, v6;
	__u32 ruleset;
	__u32 flags;
};

enum direction {
	DIR_EGRESS = 0,
	DIR_INGRESS = 1,
};

struct entry_key {
	__u32 ruleset;
	__u32 peer;
	__u16 port;
	__u8 proto;
	__u8 dir;
};

/* struct slot is one rule's word. Most rules always count; the times of the others are shared in map windows. */
struct slot {
	__u32 rule;   /* 0: absent */
	__u32 window; /* number of its times, 0 for always; with SLOT_LENIENT */
};

#define SLOT_LENIENT (1U << 31) /* an allow in mode audit: outside its times it allows too, on record */

struct entry {
	struct slot allow, deny, audit;
};

struct window {
	__u64 not_before;
	__u64 not_after;
};

/* struct range_key is an entry_key whose port counts by its leading bits only. Ranges of a ruleset that are alike in all
 * else do not overlap. */
struct range_key {
	__u32 prefixlen; /* RANGE_FIXED and the bits of the port that count */
	__u32 ruleset;
	__u32 peer;
	__u8 proto;
	__u8 dir;
	__u16 port; /* network order, since tries compare bits in the order of bytes */
};

#define RANGE_FIXED 80

struct iface_key {
	__u64 generation;
	__u32 ifindex;
	__u32 pad;
};

/* struct ruleset is the agent's own note of what a ruleset holds; programs never read it. */
struct ruleset {
	__u8 hash[32];
	__u32 entries;
	__u32 ranges;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct settings);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} config SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, struct view);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} views SEC(".maps");

/* The sizes below are defaults; dataplane/enforce sets them at load. Nothing is allocated before it is used, so that
 * an idle host pays only for the buckets. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 16);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct addr_key);
	__type(value, struct addr);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} addrs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 12);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct local_key);
	__type(value, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} locals SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 12);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct own_key);
	__type(value, struct own);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} owns SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 12);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct ruleset);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} rulesets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 18);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct entry_key);
	__type(value, struct entry);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} entries SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 1 << 16);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct range_key);
	__type(value, struct entry);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} ranges SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 14);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct window);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} windows SEC(".maps");

/* The workloads in network namespaces of their own, by the device that leads to them. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 13);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct iface_key);
	__type(value, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} ifaces SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTER_SLOTS);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} counters SEC(".maps");

/* The overlay's prefixes, set once before the programs are loaded. */
struct prefixes {
	struct ip v4, v4_mask, v6, v6_mask;
};

volatile const struct prefixes overlay = {};

/* Whether the kernel tells packets' network namespaces to programs at sockets. */
volatile const bool has_netns = false;
