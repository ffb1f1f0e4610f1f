//go:build ignore

/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/* The handshake-flood guard: on the underlay, in front of WireGuard's own port and nothing else. It decides nothing about
 * identity and reads no key; WireGuard's mac1 and cookies stay the last line. One source, two entrances: XDP, and tc for
 * drivers and devices that take no XDP. The steps, numbered here and in the code:
 *
 *   1. Scope. UDP to the port, whole, in IPv4 or IPv6, behind at most two VLAN tags. All else passes, uncounted.
 *   2. Form. A first word of 1 to 4 in little endian, which makes the three reserved bytes zero, and the length that
 *      goes with it. Both tunnels that Signet has read the word whole and drop what has anything in the reserved bytes.
 *   3. Data, responses and cookie replies of that form pass.
 *   4. Place. What is not addressed to the host itself is somebody else's, merely forwarded or bridged: it passes.
 *   5. Bad form is dropped.
 *   6. Initiations pay: a known source from its own bucket, any other from its own and then from the one of all strangers.
 *      In this order a single loud stranger is stopped by its own limit, and leaves the common one to the others.
 *
 * Steps 2 and 3 stand before 4 so that data costs no look-up. Nothing here is pinned: the guard ends with the agent, and a
 * host without an agent is a host without a guard, never one that a stale guard keeps apart. */
#include "lib/types.h"

char _license[] SEC("license") = "Dual BSD/GPL";

#define MAX_EXTENSIONS 6  /* IPv6 extension headers walked over before letting the packet be */
#define MAX_SEGMENTS   64 /* datagrams that the kernel glues into one for tc (UDP_GRO_CNT_MAX) */
#define MAX_TAGS       2
#define MAX_TRIES      8  /* of a bucket that other CPUs pay from at the same moment */

#define IPV4_MORE_OR_OFFSET 0x3fff

/* Where the walk can end at the furthest: both tags, an IPv6 header, six extension headers of 2 KiB, UDP. */
#define MAX_AT 0x3fff

enum cause {
	FLOOD_PASSED = 0,
	FLOOD_BAD_LENGTH = 1,
	FLOOD_BAD_TYPE = 2,
	FLOOD_RATE_SOURCE = 3,
	FLOOD_RATE_GLOBAL = 4,
	FLOOD_CAUSES = 5,
};

enum message_type {
	MESSAGE_INITIATION = 1,
	MESSAGE_RESPONSE = 2,
	MESSAGE_COOKIE = 3,
	MESSAGE_DATA = 4,
};

/* Bytes of UDP payload. WireGuard pads data to 16 bytes, but never beyond the MTU of its device: with the usual 1420 a
 * full packet makes a message of 1452 bytes, so a multiple of 16 must not be asked for. */
#define LENGTH_INITIATION 148
#define LENGTH_RESPONSE	  92
#define LENGTH_COOKIE	  64
#define LENGTH_DATA_LEAST 32

/* A bucket is the moment, on CLOCK_MONOTONIC, at which it will be full again (the generic cell rate algorithm): one word,
 * so that CPUs pay from it without a lock. Each token moves that moment by every; it is never further away than full. */
struct rate {
	__u64 every; /* ns for a token to come back */
	__u64 full;	 /* every * tokens of a full bucket */
};

struct rates {
	struct rate source, known, global;
};

/* Set before loading. */
volatile const struct rates limits = {};
volatile const __u16 port = 0; /* network order */

/* Buckets of strangers: IPv4 by address, IPv6 by /64, which is what one subscriber has. The longest unused makes room, and
 * comes back with a full bucket; so it is the common bucket that bounds a flood from forged addresses. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1 << 14);
	__type(key, struct ip);
	__type(value, __u64);
} sources SEC(".maps");

/* Buckets of the addresses at which peers are expected. The agent writes keys; the value is the kernel's. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1 << 16);
	__type(key, struct ip);
	__type(value, __u64);
} known SEC(".maps");

/* The host's own underlay addresses. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1 << 12);
	__type(key, struct ip);
	__type(value, __u8);
} own SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} global SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, FLOOD_CAUSES);
	__type(key, __u32);
	__type(value, __u64);
} causes SEC(".maps");

/* struct bytes is a packet as the entrance sees it; offsets count from the start of the frame. skb is a constant null
 * for XDP, so that each entrance keeps only its own way to load. */
struct bytes {
	struct __sk_buff *skb;
	void *data, *end;
};

static __always_inline bool take(const struct bytes *b, __u32 at, void *to, __u32 size)
{
	if (b->skb)
		return bpf_skb_load_bytes(b->skb, at, to, size) == 0;
	if (at > MAX_AT || b->data + at + size > b->end)
		return false;
	__builtin_memcpy(to, b->data + at, size);
	return true;
}

struct ipv4 {
	__u8 version_ihl;
	__u8 tos;
	__u16 length;
	__u16 id;
	__u16 fragment;
	__u8 ttl;
	__u8 proto;
	__u16 checksum;
	__u32 src, dst;
};

struct ipv6 {
	__u8 version_class;
	__u8 rest[3];
	__u16 length;
	__u8 next;
	__u8 hops;
	struct ip src, dst;
};

struct udp {
	__u16 src, dst;
	__u16 length;
	__u16 checksum;
};

/* struct message is a UDP payload for the port. */
struct message {
	struct ip src, dst;
	__u32 at, length;
};

/* walk6 steps over extension headers; 0 for a fragment, for a packet that has another stop before it, and for what is
 * not UDP. */
static __always_inline __u32 walk6(const struct bytes *b, __u8 next, __u32 at)
{
	for (int i = 0; i <= MAX_EXTENSIONS; i++) {
		__u8 ext[4];

		if (next == PROTO_UDP)
			return at;
		if (i == MAX_EXTENSIONS || (next != PROTO_HOPOPTS && next != PROTO_DSTOPTS && next != PROTO_ROUTING))
			return 0;
		if (!take(b, at, ext, sizeof(ext)) || (next == PROTO_ROUTING && ext[3]))
			return 0;
		next = ext[0];
		at += ((__u32)ext[1] + 1) * 8;
	}
	return 0;
}

/* find_network returns where the UDP header is, or 0. */
static __always_inline __u32 find_network(const struct bytes *b, __u16 type, __u32 at, struct message *m)
{
	if (type == bpf_htons(ETH_P_IP)) {
		struct ipv4 ip;
		__u32 header;

		if (!take(b, at, &ip, sizeof(ip)))
			return 0;
		header = (ip.version_ihl & 15) * 4;
		if (ip.version_ihl >> 4 != 4 || header < sizeof(ip) || ip.proto != PROTO_UDP ||
		    (ip.fragment & bpf_htons(IPV4_MORE_OR_OFFSET)))
			return 0;
		ip_from4(&m->src, ip.src);
		ip_from4(&m->dst, ip.dst);
		return at + header;
	}
	if (type == bpf_htons(ETH_P_IPV6)) {
		struct ipv6 ip;

		/* A mapped address is never on a wire; here it would pass for the IPv4 one. */
		if (!take(b, at, &ip, sizeof(ip)) || ip.version_class >> 4 != 6 || ip_mapped(&ip.src) || ip_mapped(&ip.dst))
			return 0;
		m->src = ip.src;
		m->dst = ip.dst;
		return walk6(b, ip.next, at + sizeof(ip));
	}
	return 0;
}

/* find is step 1. The length is the UDP header's, which is what a socket is given: packets that hold less are dropped by
 * the kernel, and headers may be all that the first buffer has. */
static __always_inline bool find(const struct bytes *b, __u16 type, __u32 at, struct message *m)
{
	struct udp udp;

	for (int i = 0; i < MAX_TAGS; i++) {
		__u16 tag[2];

		if (type != bpf_htons(ETH_P_8021Q) && type != bpf_htons(ETH_P_8021AD))
			break;
		if (!take(b, at, tag, sizeof(tag)))
			return false;
		type = tag[1];
		at += VLAN_HLEN;
	}
	at = find_network(b, type, at, m);
	if (!at || !take(b, at, &udp, sizeof(udp)) || udp.dst != port)
		return false;
	m->at = at + sizeof(udp);
	m->length = bpf_ntohs(udp.length);
	if (m->length < sizeof(udp))
		return false;
	m->length -= sizeof(udp);
	return true;
}

/* le32 reads a little-endian word on hosts of either kind. */
static __always_inline __u32 le32(__u32 word)
{
	return __builtin_bswap32(bpf_ntohl(word));
}

/* form is step 2; word is what the message begins with, in host order. */
static __always_inline enum cause form(__u32 word, __u32 length)
{
	bool fits;

	switch (word) {
	case MESSAGE_INITIATION:
		fits = length == LENGTH_INITIATION;
		break;
	case MESSAGE_RESPONSE:
		fits = length == LENGTH_RESPONSE;
		break;
	case MESSAGE_COOKIE:
		fits = length == LENGTH_COOKIE;
		break;
	case MESSAGE_DATA:
		fits = length >= LENGTH_DATA_LEAST;
		break;
	default:
		return FLOOD_BAD_TYPE;
	}
	return fits ? FLOOD_PASSED : FLOOD_BAD_LENGTH;
}

static __always_inline void count(__u32 cause, __u32 n)
{
	__u64 *c = bpf_map_lookup_elem(&causes, &cause);

	if (c)
		*c += n; /* of this CPU, and programs of this kind do not interrupt one another on it */
}

/* pay takes n tokens, all or none. */
static __always_inline bool pay(__u64 *bucket, const volatile struct rate *r, __u64 now, __u32 n)
{
	for (int i = 0; i < MAX_TRIES; i++) {
		__u64 seen = READ_ONCE(*bucket), next;

		next = (seen > now ? seen : now) + n * r->every;
		if (next - now > r->full)
			return false;
		if (__sync_val_compare_and_swap(bucket, seen, next) == seen)
			return true;
	}
	return false; /* so many paid at once that the flood is real */
}

/* pay_source pays from the bucket of a stranger, which has a full one when first seen. */
static __always_inline bool pay_source(const struct ip *src, __u64 now, __u32 n)
{
	struct ip key = *src;
	__u64 *bucket, next = now + n * limits.source.every;

	if (!ip_mapped(&key))
		key.w[2] = key.w[3] = 0;
	bucket = bpf_map_lookup_elem(&sources, &key);
	if (bucket)
		return pay(bucket, &limits.source, now, n);
	if (next - now > limits.source.full)
		return false;
	if (bpf_map_update_elem(&sources, &key, &next, BPF_NOEXIST) == 0)
		return true;
	/* Another CPU was first, or the map has no room for now; then the common bucket is left. */
	bucket = bpf_map_lookup_elem(&sources, &key);
	return !bucket || pay(bucket, &limits.source, now, n);
}

/* charge is step 6. */
static __always_inline enum cause charge(const struct ip *src, __u32 n)
{
	__u64 now = bpf_ktime_get_ns();
	__u64 *bucket = bpf_map_lookup_elem(&known, src);
	__u32 zero = 0;

	if (bucket)
		return pay(bucket, &limits.known, now, n) ? FLOOD_PASSED : FLOOD_RATE_SOURCE;
	if (!pay_source(src, now, n))
		return FLOOD_RATE_SOURCE;
	bucket = bpf_map_lookup_elem(&global, &zero);
	return bucket && pay(bucket, &limits.global, now, n) ? FLOOD_PASSED : FLOOD_RATE_GLOBAL;
}

/* judge is steps 2 to 6 for one message; true lets it pass. */
static __always_inline bool judge(const struct bytes *b, const struct message *m)
{
	enum cause cause = FLOOD_BAD_LENGTH;
	__u32 word = 0;

	if (m->length >= sizeof(word)) {
		if (!take(b, m->at, &word, sizeof(word)))
			return true; /* cut: the kernel drops it */
		word = le32(word);
		cause = form(word, m->length);
	}
	if (cause == FLOOD_PASSED && word != MESSAGE_INITIATION) {
		count(FLOOD_PASSED, 1);
		return true;
	}
	if (!bpf_map_lookup_elem(&own, &m->dst))
		return true;
	if (cause == FLOOD_PASSED)
		cause = charge(&m->src, 1);
	count(cause, 1);
	return cause == FLOOD_PASSED;
}

SEC("xdp.frags")
int flood_xdp(struct xdp_md *ctx)
{
	struct bytes b = {.data = (void *)(long)ctx->data, .end = (void *)(long)ctx->data_end};
	struct message m;
	__u16 type;

	if (!take(&b, ETH_HLEN - 2, &type, sizeof(type)) || !find(&b, type, ETH_HLEN, &m) || judge(&b, &m))
		return XDP_PASS;
	return XDP_DROP;
}

/* struct segments says what a run of datagrams, glued into one, holds of each. */
struct segments {
	__u32 sound, initiations, bad_length, bad_type;
};

/* survey_one adds one datagram of a run. Global, as is survey: the verifier checks such a function once by itself and takes
 * what s points to for unknown, instead of following each combination of counts. */
__noinline int survey_one(struct __sk_buff *skb, __u32 at, __u32 length, struct segments *s)
{
	enum cause cause = FLOOD_BAD_LENGTH;
	__u32 word = 0;

	if (!s)
		return 0;
	if (length >= sizeof(word) && bpf_skb_load_bytes(skb, at, &word, sizeof(word)) == 0) {
		word = le32(word);
		cause = form(word, length);
	}
	if (cause == FLOOD_BAD_LENGTH)
		s->bad_length++;
	else if (cause == FLOOD_BAD_TYPE)
		s->bad_type++;
	else if (word == MESSAGE_INITIATION)
		s->initiations++;
	else
		s->sound++;
	return 0;
}

/* survey reads each datagram of the run; all but the last have the same size. */
__noinline int survey(struct __sk_buff *skb, __u32 at, __u32 left, __u32 size, struct segments *s)
{
	for (int i = 0; i < MAX_SEGMENTS && left; i++) {
		__u32 length = left < size ? left : size;

		survey_one(skb, at, length, s);
		at += length;
		left -= length;
	}
	return 0;
}

/* judge_run is steps 2 to 6 for a run, which passes or is dropped whole. Initiations pay for each of them, whatever stands
 * beside them; bad form alone drops only a run that has nothing else, or a forger could take data with his own. */
static __always_inline bool judge_run(const struct bytes *b, const struct message *m, __u32 size)
{
	struct segments s = {};
	enum cause cause;

	survey(b->skb, m->at, m->length, size, &s);
	if (!s.initiations && s.sound) {
		count(FLOOD_PASSED, s.sound);
		return true;
	}
	if (!bpf_map_lookup_elem(&own, &m->dst))
		return true;
	if (!s.initiations) {
		count(FLOOD_BAD_LENGTH, s.bad_length);
		count(FLOOD_BAD_TYPE, s.bad_type);
		return false;
	}
	cause = charge(&m->src, s.initiations);
	count(cause, s.initiations + s.sound);
	return cause == FLOOD_PASSED;
}

static __always_inline int flood_tc(struct __sk_buff *skb, __u32 link_header)
{
	struct bytes b = {.skb = skb};
	__u32 size = skb->gso_size;
	struct message m;

	/* The kernel has taken off the outer tag, if any, together with its type. */
	if (!find(&b, skb->protocol, link_header, &m))
		return PASS_TC;
	if (size && size < m.length)
		return judge_run(&b, &m, size) ? PASS_TC : DROP_TC;
	return judge(&b, &m) ? PASS_TC : DROP_TC;
}

SEC("tc")
int flood_ether(struct __sk_buff *skb)
{
	return flood_tc(skb, ETH_HLEN);
}

/* For devices whose packets begin with the IP header. */
SEC("tc")
int flood_plain(struct __sk_buff *skb)
{
	return flood_tc(skb, 0);
}
