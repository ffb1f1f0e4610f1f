/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/* Connection tracking: one entry for both directions of a conversation, under its canonical tuple. IPv4 has a table of
 * its own, because its keys are 24 bytes shorter.
 *
 * Who may write what:
 *  - An entry is judged again, or taken away, only by the run that changes its generation to CT_BUSY first. Everybody
 *    else who meets a busy entry decides on its own packet and leaves the entry alone.
 *  - An entry is replaced by taking the old one away and inserting with BPF_NOEXIST; of two inserters one wins.
 *  - seal[] is one word, and carries the generation: a late writer of an older generation seals nothing.
 *  - Counters and state are atomics. deadline is a plain word: whoever is last is right to within a clock tick.
 *  - usage[] counts the entries by the identity that opened them: up before an entry is inserted, down after one is
 *    deleted, so that it is never less than the truth. */
#pragma once

#include "maps.h"

#define CT_BUSY 0 /* no view has this generation */

#define SECOND 1000000000ULL

/* Idle times. A connection that nobody answered is a scan or a dead host; one that both sides closed may still see the
 * last retransmission; an established one is kept as long as common keepalives need (2 h) with a wide margin. */
#define TCP_IDLE_OPENING     (60 * SECOND)
#define TCP_IDLE_ESTABLISHED (24 * 3600 * SECOND)
#define TCP_IDLE_CLOSED	     (10 * SECOND)
#define UDP_IDLE_ONE_WAY     (60 * SECOND)
#define UDP_IDLE_BOTH_WAYS   (180 * SECOND)
#define ICMP_IDLE	     (30 * SECOND)

/* Instants in entries are counted in steps of 67 ms, which 32 bits hold for nine years after boot. */
#define CT_STEP 26

/* struct conn's state: the TCP flags of side 0 and 1 in the two low bytes, one bit for each side that sent anything,
 * and these. Sides: 0 is the source of the first packet, 1 its destination. */
enum ct_state {
	CT_SWAPPED = 1 << 18, /* the first packet's source is the second end of the canonical tuple */
	CT_LOCAL0 = 1 << 19,  /* the side's address belongs to this host */
	CT_LOCAL1 = 1 << 20,
	CT_PEER0 = 1 << 21, /* the side's address belongs to a known, valid identity */
	CT_PEER1 = 1 << 22,
	CT_TOLD = 1 << 23,    /* its beginning is on record */
	CT_AUDITED = 1 << 24, /* what a rule in mode audit says of it is on record */
};

#define CT_LOCAL(side) ((side) ? CT_LOCAL1 : CT_LOCAL0)
#define CT_PEER(side)  ((side) ? CT_PEER1 : CT_PEER0)
#define CT_ENDS	       (CT_LOCAL0 | CT_LOCAL1 | CT_PEER0 | CT_PEER1)

#define SEEN_FLAGS(side, tcp) ((__u32)(tcp) << ((side) * 8))
#define SEEN_SIDE(side)	      (1U << (16 + (side)))

/* 80 bytes: with its key and what the kernel adds, an IPv4 entry takes 160. */
struct conn {
	__u64 generation; /* judged under this one; CT_BUSY while it is judged again */
	__u64 created;	  /* with the tuple, it names the flow in records */
	__u64 seal[2];	  /* the local socket of each side whose owner was verified, with the generation */
	__u64 bytes[2];
	__u32 packets[2]; /* modulo 2^32 */
	__u32 number[2];  /* identities */
	__u32 rule;
	__u32 expires;	/* step from which on it is judged again, rounded down; 0 for never */
	__u32 deadline; /* step from which on it is idle, rounded up */
	__u32 state;
};

/* struct tuple4 is the key of an IPv4 conversation. */
struct tuple4 {
	__u32 src, dst;
	__u16 sport, dport;
	__u8 proto;
	__u8 pad[3];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 18);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct tuple4);
	__type(value, struct conn);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} conns4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 18);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct tuple);
	__type(value, struct conn);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} conns6 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 17);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} usage SEC(".maps");

/* struct fragment_key names one datagram, struct fragment is what its first fragment says of the others. */
struct fragment_key {
	struct ip src, dst;
	__u32 id;
	__u8 proto;
	__u8 pad[3];
};

struct fragment {
	__u64 until;
	__u16 sport, dport;
	__u8 proto;
	__u8 pad[3];
};

#define FRAGMENT_LIFE (30 * SECOND)

/* What falls out of this table when it is full is lost, not let through. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1 << 12);
	__type(key, struct fragment_key);
	__type(value, struct fragment);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} fragments SEC(".maps");

/* ct_swapped: whether the source comes after the destination, by address, then port (internal/flow/tuple.go). */
static __always_inline bool ct_swapped(const struct tuple *t)
{
	if (t->src.w[3] != t->dst.w[3] && ip_mapped(&t->src) && ip_mapped(&t->dst))
		return bpf_ntohl(t->src.w[3]) > bpf_ntohl(t->dst.w[3]);
	for (int i = 0; i < 4; i++) {
		__u32 a = bpf_ntohl(t->src.w[i]), b = bpf_ntohl(t->dst.w[i]);

		if (a != b)
			return a > b;
	}
	return t->sport > t->dport;
}

static __always_inline void ct_reverse(const struct tuple *t, struct tuple *out)
{
	out->src = t->dst;
	out->dst = t->src;
	out->sport = t->dport;
	out->dport = t->sport;
	out->proto = t->proto;
	out->pad[0] = out->pad[1] = out->pad[2] = 0;
}

/* ct_key writes the canonical tuple, and says whether the ends changed places. */
static __always_inline bool ct_key(const struct tuple *t, struct tuple *key)
{
	bool swapped = ct_swapped(t);

	if (swapped)
		ct_reverse(t, key);
	else
		*key = *t;
	return swapped;
}

/* ct_sort makes a tuple canonical in its place. */
static __always_inline void ct_sort(struct tuple *t)
{
	struct tuple copy = *t;

	ct_key(&copy, t);
}

static __always_inline void ct_key4(const struct tuple *key, struct tuple4 *out)
{
	out->src = key->src.w[3];
	out->dst = key->dst.w[3];
	out->sport = key->sport;
	out->dport = key->dport;
	out->proto = key->proto;
	out->pad[0] = out->pad[1] = out->pad[2] = 0;
}

#ifdef SIGNET_TWIN

/* The twin answers questions and writes nothing that anybody else reads. What it would do to the table happens to one
 * entry of its own, which lasts from hook to hook until the asker clears it: all packets of one question belong to one
 * conversation. */
struct twin_flow {
	struct conn conn;
	__u32 looked;  /* the table was asked; held and tracked count */
	__u32 held;    /* conn is in the table, as far as this question goes */
	__u32 tracked; /* it was there before the question */
	__u32 freed;   /* an entry of number was taken away, and left room */
	__u32 number;
	__u32 full[2]; /* the table of IPv4, and of IPv6, has no room; said by the asker */
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct twin_flow);
} twin SEC(".maps");

static __always_inline struct twin_flow *twin_flow(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&twin, &zero);
}

static __always_inline long unwritten(void *map, const void *key, const void *value, __u64 flags)
{
	return 0;
}

/* What follows would update a map only where it remembers fragments. */
#define bpf_map_update_elem unwritten

static __noinline struct conn *ct_find(const struct tuple *key)
{
	struct twin_flow *t = twin_flow();
	struct conn *c;
	struct tuple4 k;

	if (!t)
		return 0;
	if (!t->looked) {
		if (ip_mapped(&key->src)) {
			ct_key4(key, &k);
			c = bpf_map_lookup_elem(&conns4, &k);
		} else {
			c = bpf_map_lookup_elem(&conns6, key);
		}
		t->looked = 1;
		if (c) {
			t->conn = *c;
			t->held = t->tracked = 1;
		}
	}
	return t->held ? &t->conn : 0;
}

#else

static __always_inline struct conn *ct_find(const struct tuple *key)
{
	struct tuple4 k;

	if (!ip_mapped(&key->src))
		return bpf_map_lookup_elem(&conns6, key);
	ct_key4(key, &k);
	return bpf_map_lookup_elem(&conns4, &k);
}

#endif

/* What a new connection starts from: nobody's yet (CT_BUSY), and its direction known, so that a packet that meets it
 * before it is filled in is judged rightly. */
static volatile const struct conn unborn = {.deadline = ~0U}, unborn_swapped = {.deadline = ~0U, .state = CT_SWAPPED};

#ifdef SIGNET_TWIN

__noinline int ct_insert(struct tuple *key, __u32 swapped)
{
	struct twin_flow *t = twin_flow();

	if (!key || !t)
		return -EBUSY;
	if (t->held)
		return -EEXIST;
	if (!t->freed && t->full[ip_mapped(&key->src) ? 0 : 1])
		return -EBUSY;
	t->conn = (struct conn){.deadline = ~0U, .state = swapped ? CT_SWAPPED : 0};
	t->looked = t->held = 1;
	return 0;
}

__noinline int ct_charge(__u32 number, __u32 quota)
{
	struct twin_flow *t = twin_flow();
	__u32 *n;

	if (!quota)
		return 1;
	n = bpf_map_lookup_elem(&usage, &number);
	if (!n || !t)
		return 1;
	return READ_ONCE(*n) < quota || (READ_ONCE(*n) == quota && t->freed && t->number == number);
}

__noinline int ct_uncharge(__u32 number)
{
	return 0;
}

__noinline int ct_delete(struct tuple *key, __u32 number)
{
	struct twin_flow *t = twin_flow();

	if (!key || !t)
		return 0;
	t->held = 0;
	t->freed = 1;
	t->number = number;
	return 0;
}

#else

/* ct_insert makes an entry that is nobody's yet; -EEXIST when another run was first. This and what follows is not
 * inlined, for the sake of the stack. */
__noinline int ct_insert(struct tuple *key, __u32 swapped)
{
	void *c = (void *)&unborn;
	struct tuple k6;
	struct tuple4 k;

	if (!key)
		return -EBUSY;
	if (swapped) {
		c = (void *)&unborn_swapped;
		asm volatile("" : "+r"(c)); /* or the compiler computes the address, which Linux 6.1 does not follow */
	}
	if (!ip_mapped(&key->src)) {
		k6 = *key; /* Linux 6.1 takes no argument of a function for a map's key */
		return bpf_map_update_elem(&conns6, &k6, c, BPF_NOEXIST);
	}
	ct_key4(key, &k);
	return bpf_map_update_elem(&conns4, &k, c, BPF_NOEXIST);
}

/* ct_charge counts one more connection of an identity; false when it has as many as it may. */
__noinline int ct_charge(__u32 number, __u32 quota)
{
	__u32 zero = 0, *n;

	if (!quota)
		return 1;
	n = bpf_map_lookup_elem(&usage, &number);
	if (!n) {
		bpf_map_update_elem(&usage, &number, &zero, BPF_NOEXIST);
		n = bpf_map_lookup_elem(&usage, &number);
		if (!n)
			return 0;
	}
	if (__sync_fetch_and_add(n, 1) < quota)
		return 1;
	__sync_fetch_and_add(n, -1);
	return 0;
}

__noinline int ct_uncharge(__u32 number)
{
	__u32 *n = bpf_map_lookup_elem(&usage, &number);

	if (n && READ_ONCE(*n))
		__sync_fetch_and_add(n, -1);
	return 0;
}

/* ct_delete takes an entry away that this run has made busy; number is who opened it. */
__noinline int ct_delete(struct tuple *key, __u32 number)
{
	struct tuple k6;
	struct tuple4 k;

	if (!key)
		return 0;
	if (ip_mapped(&key->src)) {
		ct_key4(key, &k);
		bpf_map_delete_elem(&conns4, &k);
	} else {
		k6 = *key;
		bpf_map_delete_elem(&conns6, &k6);
	}
	return ct_uncharge(number);
}

#endif

/* ct_side is the side of the entry that sends a packet. */
static __always_inline __u32 ct_side(__u32 state, bool swapped)
{
	__u32 side = ((state & CT_SWAPPED) != 0) != swapped;

	asm volatile("" : "+r"(side)); /* or the compiler leaves out what tells Linux 6.1 that it is 0 or 1 */
	return side & 1;
}

static __always_inline bool ct_closed(__u32 state)
{
	return (state & (SEEN_FLAGS(0, TCP_RST) | SEEN_FLAGS(1, TCP_RST))) ||
	       (state & (SEEN_FLAGS(0, TCP_FIN) | SEEN_FLAGS(1, TCP_FIN))) ==
		       (SEEN_FLAGS(0, TCP_FIN) | SEEN_FLAGS(1, TCP_FIN));
}

static __always_inline __u64 ct_idle_time(__u8 proto, __u32 state)
{
	switch (proto) {
	case PROTO_TCP:
		if (ct_closed(state))
			return TCP_IDLE_CLOSED;
		return state & SEEN_SIDE(1) ? TCP_IDLE_ESTABLISHED : TCP_IDLE_OPENING;
	case PROTO_ICMP:
	case PROTO_ICMPV6:
		return ICMP_IDLE;
	}
	return state & SEEN_SIDE(1) ? UDP_IDLE_BOTH_WAYS : UDP_IDLE_ONE_WAY;
}

/* ct_due: to be judged again. Up to a step too early, which costs one judgement and changes no answer. */
static __always_inline bool ct_due(__u32 expires, __u64 now)
{
	return expires && (__u32)(now >> CT_STEP) >= expires;
}

static __always_inline bool ct_idle(const struct conn *c, __u64 now)
{
	return (__u32)(now >> CT_STEP) >= READ_ONCE(c->deadline);
}

/* ct_fresh: judged under this generation and not due to be judged again. The generation is read on both sides of
 * expires, so that no other run's answer is taken for ours. */
static __always_inline bool ct_fresh(struct conn *c, __u64 generation, __u64 now)
{
	__u32 expires;

	if (generation == CT_BUSY || READ_ONCE(c->generation) != generation)
		return false;
	expires = READ_ONCE(c->expires);
	if (READ_ONCE(c->generation) != generation)
		return false;
	return !ct_due(expires, now);
}

/* ct_take makes the entry this run's alone; false when another run has it or had it first. */
static __always_inline bool ct_take(struct conn *c)
{
	__u64 seen = READ_ONCE(c->generation);

	return seen != CT_BUSY && __sync_val_compare_and_swap(&c->generation, seen, CT_BUSY) == seen;
}

/* ct_seal names one socket of one owner under one generation. Cgroup ids fit in 32 bits on every host seen so far, so
 * that cgroup and user do not overlap; the odd factor keeps generations apart. */
static __always_inline __u64 ct_seal(__u64 cgroup, __u32 uid, __u64 generation)
{
	return (((cgroup << 32) | (cgroup >> 32)) ^ uid) + generation * 0x9e3779b97f4a7c15ULL;
}

/* ct_mark sets bits of an entry's state, and returns what it was. */
static __always_inline __u32 ct_mark(struct conn *c, __u32 bits)
{
	__u32 state = READ_ONCE(c->state);

	if ((state & bits) == bits)
		return state;
	return __sync_fetch_and_or(&c->state, bits);
}

#ifdef SIGNET_TWIN

/* The fast path comes here with an entry of the table itself. */
static __always_inline void ct_touch(struct conn *c, __u32 side, __u8 proto, __u8 tcp, __u64 now)
{
	struct twin_flow *t = twin_flow();

	if (t && !t->looked)
		t->tracked = 1;
}

static __always_inline void ct_count(struct conn *c, __u32 side, __u32 packets, __u32 bytes)
{
}

#else

/* ct_touch records that a side sent a packet. Words are written only when they change, so that several CPUs can share
 * the entry. */
static __always_inline void ct_touch(struct conn *c, __u32 side, __u8 proto, __u8 tcp, __u64 now)
{
	__u32 bits = SEEN_SIDE(side) | SEEN_FLAGS(side, tcp), deadline;

	deadline = (__u32)((now + ct_idle_time(proto, ct_mark(c, bits) | bits)) >> CT_STEP) + 1;
	if (READ_ONCE(c->deadline) != deadline)
		WRITE_ONCE(c->deadline, deadline);
}

static __always_inline void ct_count(struct conn *c, __u32 side, __u32 packets, __u32 bytes)
{
	if (side) {
		__sync_fetch_and_add(&c->packets[1], packets);
		__sync_fetch_and_add(&c->bytes[1], bytes);
	} else {
		__sync_fetch_and_add(&c->packets[0], packets);
		__sync_fetch_and_add(&c->bytes[0], bytes);
	}
}

#endif
