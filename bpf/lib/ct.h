/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/* Connection tracking: one entry for both directions of a conversation, under its canonical tuple.
 *
 * Who may write what:
 *  - An entry is judged again, or taken away, only by the run that changes its generation to CT_BUSY first. Everybody
 *    else who meets a busy entry decides on its own packet and leaves the entry alone.
 *  - An entry is replaced by taking the old one away and inserting with BPF_NOEXIST; of two inserters one wins.
 *  - seal[] is one word, and carries the generation: a late writer of an older generation seals nothing.
 *  - Counters and seen are atomics. deadline is a plain word: whoever is last is right to within a clock tick. */
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

/* Sides of an entry: 0 is the source of the first packet, 1 its destination. */
enum ct_flags {
	CT_SWAPPED = 1, /* the first packet's source is the second end of the canonical tuple */
	CT_LOCAL0 = 2,	/* the side's address belongs to this host */
	CT_LOCAL1 = 4,
	CT_PEER0 = 8, /* the side's address is a peer that step 7 passes, until expires */
	CT_PEER1 = 16,
};

#define CT_LOCAL(side) (CT_LOCAL0 << (side))
#define CT_PEER(side)  (CT_PEER0 << (side))

/* struct conn.seen: TCP flags of side 0 and 1 in the two low bytes, then one bit for each side that sent anything. */
#define SEEN_FLAGS(side, tcp) ((__u32)(tcp) << ((side) * 8))
#define SEEN_SIDE(side)	      (1U << (16 + (side)))

struct conn {
	__u64 generation; /* judged under this one; CT_BUSY while it is judged again */
	__u64 expires;	  /* to be judged again from here on */
	__u64 deadline;	  /* idle from here on */
	__u64 created;
	__u64 flow;	/* random: with created it names the flow in records */
	__u64 seal[2];	/* the local socket of each side whose owner was verified, with the generation */
	__u64 cgroup[2]; /* for records */
	__u64 packets[2];
	__u64 bytes[2];
	__u32 uid[2];	 /* for records */
	__u32 number[2]; /* identities */
	__u32 rule;
	__u32 seen;
	__u32 flags;
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 18);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct tuple);
	__type(value, struct conn);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} conns SEC(".maps");

/* ct_swapped: whether the source comes after the destination, by address, then port (internal/flow/tuple.go). */
static __always_inline bool ct_swapped(const struct tuple *t)
{
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

/* ct_side is the side of the entry that sends a packet. */
static __always_inline __u32 ct_side(const struct conn *c, bool swapped)
{
	return ((c->flags & CT_SWAPPED) != 0) != swapped;
}

static __always_inline bool ct_closed(__u32 seen)
{
	return (seen & (SEEN_FLAGS(0, TCP_RST) | SEEN_FLAGS(1, TCP_RST))) ||
	       (seen & (SEEN_FLAGS(0, TCP_FIN) | SEEN_FLAGS(1, TCP_FIN))) ==
		       (SEEN_FLAGS(0, TCP_FIN) | SEEN_FLAGS(1, TCP_FIN));
}

static __always_inline __u64 ct_idle_time(__u8 proto, __u32 seen)
{
	switch (proto) {
	case PROTO_TCP:
		if (ct_closed(seen))
			return TCP_IDLE_CLOSED;
		return seen & SEEN_SIDE(1) ? TCP_IDLE_ESTABLISHED : TCP_IDLE_OPENING;
	case PROTO_UDP:
		return seen & SEEN_SIDE(1) ? UDP_IDLE_BOTH_WAYS : UDP_IDLE_ONE_WAY;
	}
	return ICMP_IDLE;
}

/* ct_fresh: judged under this generation and not due to be judged again. The generation is read on both sides of
 * expires, so that no other run's answer is taken for ours. */
static __always_inline bool ct_fresh(struct conn *c, __u64 generation, __u64 now)
{
	__u64 expires;

	if (generation == CT_BUSY || READ_ONCE(c->generation) != generation)
		return false;
	expires = READ_ONCE(c->expires);
	if (READ_ONCE(c->generation) != generation)
		return false;
	return !expires || now < expires;
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

/* ct_touch records that a side sent a packet. Words are written only when they change, so that several CPUs can share
 * the entry. */
static __always_inline void ct_touch(struct conn *c, __u32 side, __u8 proto, __u8 tcp, __u64 now)
{
	__u32 bits = SEEN_SIDE(side) | SEEN_FLAGS(side, tcp), seen = READ_ONCE(c->seen);
	__u64 deadline;

	if ((seen & bits) != bits) {
		__sync_fetch_and_or(&c->seen, bits);
		seen |= bits;
	}
	deadline = now + ct_idle_time(proto, seen);
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
