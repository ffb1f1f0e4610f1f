/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/* From bytes to a tuple. Loads are relative to the network header, so that devices with and without a link header, and
 * the test harness, are read alike. */
#pragma once

#include "types.h"

enum packet_flags {
	PACKET_MALFORMED = 1,
	PACKET_FIRST = 2, /* the first fragment of a datagram */
	PACKET_ECHO_REQUEST = 4,
	PACKET_QUOTES = 8,   /* an ICMP error */
	PACKET_NOT_IP = 16,  /* nothing was read */
	PACKET_QUIET = 32,   /* multicast and neighbour discovery: denied without an event */
	PACKET_PORTLESS = 64, /* a protocol that rules cannot name */
	PACKET_LATER = 128,   /* a later fragment: its ports are those of the first */
};

/* Extension headers that are walked over before giving up; real traffic has one or two. */
#define MAX_EXTENSIONS 6

/* An ICMP message that is neither echo nor error gets ports that no echo can have, so that it matches no tracked one. */
#define ICMP_OTHER_PORT 0xffff

struct packet {
	struct tuple tuple;
	__u32 fragment; /* identification, of a fragment; of an ICMP error, where the packet that it quotes begins */
	__u8 family;
	__u8 tcp;
	__u8 flags;
	__u8 part; /* protocol of what is fragmented: not the transport, where extension headers come between */
};

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
	__u32 version_class_flow;
	__u16 length;
	__u8 next;
	__u8 hops;
	struct ip src, dst;
};

#define IPV4_MORE_OR_OFFSET 0x3fff
#define IPV4_MORE	    0x2000
#define IPV4_OFFSET	    0x1fff

static __always_inline long load(struct __sk_buff *skb, __u32 at, void *to, __u32 size)
{
	return bpf_skb_load_bytes_relative(skb, at, to, size, BPF_HDR_START_NET);
}

static __always_inline bool icmp_is_echo(__u8 family, __u8 type, bool *request)
{
	*request = type == (family == 4 ? 8 : 128);
	return *request || type == (family == 4 ? 0 : 129);
}

/* icmp_is_error: unreachable, time exceeded, parameter problem, and for IPv6 packet too big. Redirects are none: they
 * would change routes, and nobody on an overlay may ask for that. */
static __always_inline bool icmp_is_error(__u8 family, __u8 type)
{
	if (family == 4)
		return type == 3 || type == 11 || type == 12;
	return type >= 1 && type <= 4;
}

/* parse_quoted reads the packet inside an ICMP error; eight bytes of its transport header are promised (RFC 792). */
static __noinline long parse_quoted(struct __sk_buff *skb, __u32 at, __u8 family, struct tuple *q)
{
	__u8 l4[8];
	__u8 first = 0;

	if (!q)
		return -1;
	if (family == 4) {
		struct ipv4 ip;

		if (load(skb, at, &ip, sizeof(ip)) < 0)
			return -1;
		first = ip.version_ihl;
		if (first >> 4 != 4 || (first & 15) < 5)
			return -1;
		ip_from4(&q->src, ip.src);
		ip_from4(&q->dst, ip.dst);
		q->proto = ip.proto;
		at += (first & 15) * 4;
	} else {
		struct ipv6 ip;

		if (load(skb, at, &ip, sizeof(ip)) < 0)
			return -1;
		q->src = ip.src;
		q->dst = ip.dst;
		if ((bpf_ntohl(ip.version_class_flow) >> 28) != 6 || ip_mapped(&q->src) || ip_mapped(&q->dst))
			return -1;
		q->proto = ip.next;
		at += sizeof(ip);
	}
	if (load(skb, at, l4, sizeof(l4)) < 0)
		return -1;
	if (q->proto == PROTO_TCP || q->proto == PROTO_UDP || q->proto == PROTO_SCTP) {
		q->sport = (__u16)l4[0] << 8 | l4[1];
		q->dport = (__u16)l4[2] << 8 | l4[3];
	} else if (q->proto == PROTO_ICMP || q->proto == PROTO_ICMPV6) {
		bool request;

		if (icmp_is_echo(family, l4[0], &request))
			q->sport = q->dport = (__u16)l4[4] << 8 | l4[5];
		else
			q->dport = ICMP_OTHER_PORT;
	}
	return 0;
}

static __always_inline void parse_icmp(struct __sk_buff *skb, struct packet *p, __u32 at)
{
	struct tuple quote = {};
	__u8 icmp[8];
	bool request;

	if (load(skb, at, icmp, sizeof(icmp)) < 0) {
		p->flags |= PACKET_MALFORMED;
		return;
	}
	if (icmp_is_echo(p->family, icmp[0], &request)) {
		p->tuple.sport = p->tuple.dport = (__u16)icmp[4] << 8 | icmp[5];
		if (request)
			p->flags |= PACKET_ECHO_REQUEST;
		return;
	}
	p->tuple.dport = ICMP_OTHER_PORT;
	if (!icmp_is_error(p->family, icmp[0])) {
		/* Neighbour discovery and listener reports: the kernel's own chatter on a device that needs neither. */
		if (p->family == 6 && icmp[0] >= 130 && icmp[0] <= 143)
			p->flags |= PACKET_QUIET;
		return;
	}
	p->flags |= PACKET_QUOTES;
	p->fragment = at + sizeof(icmp);
	if (parse_quoted(skb, p->fragment, p->family, &quote) < 0)
		p->flags |= PACKET_MALFORMED;
}

static __always_inline void parse_transport(struct __sk_buff *skb, struct packet *p, __u32 at)
{
	__u8 l4[14];

	switch (p->tuple.proto) {
	case PROTO_TCP:
		if (load(skb, at, l4, 14) < 0 || l4[12] >> 4 < 5) {
			p->flags |= PACKET_MALFORMED;
			return;
		}
		p->tcp = l4[13];
		break;
	case PROTO_UDP:
		if (load(skb, at, l4, 8) < 0) {
			p->flags |= PACKET_MALFORMED;
			return;
		}
		break;
	case PROTO_SCTP:
		if (load(skb, at, l4, 12) < 0) {
			p->flags |= PACKET_MALFORMED;
			return;
		}
		break;
	case PROTO_ICMP:
		if (p->family == 4)
			parse_icmp(skb, p, at);
		else
			p->flags |= PACKET_PORTLESS; /* ICMP of the other family means nothing */
		return;
	case PROTO_ICMPV6:
		if (p->family == 6)
			parse_icmp(skb, p, at);
		else
			p->flags |= PACKET_PORTLESS;
		return;
	default:
		p->flags |= PACKET_PORTLESS;
		return;
	}
	p->tuple.sport = (__u16)l4[0] << 8 | l4[1];
	p->tuple.dport = (__u16)l4[2] << 8 | l4[3];
}

/* later_fragment: the offset is in units of 8 bytes. One that could rewrite a transport header that was judged is
 * refused (RFC 1858, RFC 3128). */
static __always_inline void later_fragment(struct packet *p, __u32 offset)
{
	p->flags |= PACKET_LATER;
	if (offset < 2 && p->part != PROTO_UDP)
		p->flags |= PACKET_MALFORMED;
}

static __always_inline void parse4(struct __sk_buff *skb, struct packet *p)
{
	struct ipv4 ip;
	__u32 header;

	if (load(skb, 0, &ip, sizeof(ip)) < 0) {
		p->flags |= PACKET_NOT_IP;
		return;
	}
	p->family = 4;
	ip_from4(&p->tuple.src, ip.src);
	ip_from4(&p->tuple.dst, ip.dst);
	p->tuple.proto = ip.proto;
	header = (ip.version_ihl & 15) * 4;
	/* A length of 0 is a super-packet that is cut before it reaches a wire. */
	if (ip.version_ihl >> 4 != 4 || header < sizeof(ip) || (ip.length && bpf_ntohs(ip.length) < header)) {
		p->flags |= PACKET_MALFORMED;
		return;
	}
	if (ip.fragment & bpf_htons(IPV4_MORE_OR_OFFSET)) {
		p->fragment = bpf_ntohs(ip.id);
		p->part = ip.proto;
		if (ip.fragment & bpf_htons(IPV4_OFFSET)) {
			later_fragment(p, bpf_ntohs(ip.fragment) & IPV4_OFFSET);
			return;
		}
		p->flags |= PACKET_FIRST;
	}
	parse_transport(skb, p, header);
}

struct ipv6_fragment {
	__u8 next;
	__u8 reserved;
	__u16 offset_more;
	__u32 id;
};

/* parse6_extensions walks to the transport header. A routing header would let a packet choose a second destination
 * behind the judge's back, so none is accepted. */
static __always_inline __u32 parse6_extensions(struct __sk_buff *skb, struct packet *p, __u32 at)
{
	__u8 next = p->tuple.proto;

	for (int i = 0; i < MAX_EXTENSIONS; i++) {
		__u8 ext[2];

		if (next == PROTO_FRAGMENT) {
			struct ipv6_fragment f;
			__u16 place;

			if (p->flags & PACKET_FIRST || load(skb, at, &f, sizeof(f)) < 0)
				break;
			place = bpf_ntohs(f.offset_more);
			next = f.next;
			at += sizeof(f);
			if (place & ~7) {
				p->fragment = f.id;
				p->part = p->tuple.proto = next;
				later_fragment(p, place >> 3);
				return 0;
			}
			if (place & 1) { /* else it is whole (RFC 6946) */
				p->fragment = f.id;
				p->part = next;
				p->flags |= PACKET_FIRST;
			}
			continue;
		}
		if (next == PROTO_ROUTING)
			break;
		if (next != PROTO_HOPOPTS && next != PROTO_DSTOPTS) {
			p->tuple.proto = next;
			return at;
		}
		if (load(skb, at, ext, sizeof(ext)) < 0)
			break;
		next = ext[0];
		at += ((__u32)ext[1] + 1) * 8;
	}
	p->flags |= PACKET_MALFORMED;
	return 0;
}

static __always_inline void parse6(struct __sk_buff *skb, struct packet *p)
{
	struct ipv6 ip;
	__u32 at = sizeof(ip);

	if (load(skb, 0, &ip, sizeof(ip)) < 0) {
		p->flags |= PACKET_NOT_IP;
		return;
	}
	p->family = 6;
	p->tuple.src = ip.src;
	p->tuple.dst = ip.dst;
	p->tuple.proto = ip.next;
	/* A mapped address is never on a wire; here it would pass for the IPv4 one. */
	if ((bpf_ntohl(ip.version_class_flow) >> 28) != 6 || ip_mapped(&ip.src) || ip_mapped(&ip.dst)) {
		p->flags |= PACKET_MALFORMED;
		return;
	}
	if (ip.next != PROTO_TCP && ip.next != PROTO_UDP && ip.next != PROTO_ICMPV6) {
		at = parse6_extensions(skb, p, at);
		if (!at)
			return;
	}
	parse_transport(skb, p, at);
}

/* parse reads what an IP device or the IP layer carries. Global, as are the other functions that are not static: the
 * verifier checks such a function once by itself, and not again on every path that calls it. */
__noinline int parse(struct __sk_buff *skb, struct packet *p)
{
	if (!p)
		return 0;
	if (skb->protocol == bpf_htons(ETH_P_IP))
		parse4(skb, p);
	else if (skb->protocol == bpf_htons(ETH_P_IPV6))
		parse6(skb, p);
	else
		p->flags |= PACKET_NOT_IP;
	return 0;
}

/* What headers may take: a link header with tags, IPv6 with extension headers, and a transport header. */
#define HEADERS 256

/* pull_headers brings headers within reach that a sender has left in pages of their own: loads reach only the first part
 * of a packet, and a packet that cannot be read could not be judged. Only programs at devices may pull. */
static __always_inline void pull_headers(struct __sk_buff *skb)
{
	__u32 want = skb->len < HEADERS ? skb->len : HEADERS;

	if ((void *)(long)skb->data + want > (void *)(long)skb->data_end)
		bpf_skb_pull_data(skb, want);
}

/* Where an IP packet begins on the tunnel. Tunnels have no link header, but the test harness gives them one. */
volatile const __u32 link_header = 0;

/* parse_fast reads what nearly every packet is, straight from the packet: TCP or UDP, whole, without options. What it
 * does not know it leaves, untouched, to parse. */
static __always_inline bool parse_fast(struct __sk_buff *skb, struct packet *p, __u32 skip)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u8 *l4;

	data += skip;
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct ipv4 *ip = data;

		l4 = (void *)(ip + 1);
		if ((void *)(l4 + 14) > end || ip->version_ihl != 0x45 || (ip->fragment & bpf_htons(IPV4_MORE_OR_OFFSET)) ||
		    (ip->length && bpf_ntohs(ip->length) < sizeof(*ip)) || (ip->proto != PROTO_TCP && ip->proto != PROTO_UDP))
			return false;
		p->family = 4;
		p->tuple.proto = ip->proto;
		ip_from4(&p->tuple.src, ip->src);
		ip_from4(&p->tuple.dst, ip->dst);
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		struct ipv6 *ip = data;

		l4 = (void *)(ip + 1);
		if ((void *)(l4 + 14) > end || (bpf_ntohl(ip->version_class_flow) >> 28) != 6 ||
		    (ip->next != PROTO_TCP && ip->next != PROTO_UDP) || ip_mapped(&ip->src) || ip_mapped(&ip->dst))
			return false;
		p->family = 6;
		p->tuple.proto = ip->next;
		p->tuple.src = ip->src;
		p->tuple.dst = ip->dst;
	} else {
		return false;
	}
	if (p->tuple.proto == PROTO_TCP) {
		p->tcp = l4[13];
		if (l4[12] >> 4 < 5)
			p->flags = PACKET_MALFORMED;
	}
	p->tuple.sport = bpf_ntohs(*(__u16 *)l4);
	p->tuple.dport = bpf_ntohs(*(__u16 *)(l4 + 2));
	return true;
}
