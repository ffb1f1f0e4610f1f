/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/* The kernel's interface as far as it is needed here, and the types that every other header uses. Stable UAPI headers
 * only: nothing reads kernel structs, so no BTF of the running kernel is needed. */
#pragma once

#include <linux/bpf.h>
#include <linux/types.h>
#include <stdbool.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "reasons.h"

#define ETH_P_IP     0x0800
#define ETH_P_IPV6   0x86DD
#define ETH_P_8021Q  0x8100
#define ETH_P_8021AD 0x88A8
#define ETH_HLEN     14
#define VLAN_HLEN    4

#define AF_INET	 2
#define AF_INET6 10

#define PROTO_HOPOPTS  0
#define PROTO_ICMP     1
#define PROTO_TCP      6
#define PROTO_UDP      17
#define PROTO_ROUTING  43
#define PROTO_FRAGMENT 44
#define PROTO_ICMPV6   58
#define PROTO_DSTOPTS  60
#define PROTO_SCTP     132

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

#define EACCES 13
#define EBUSY  16
#define EEXIST 17

#define PASS_TC	  (-1) /* TCX_NEXT: other tools' programs still run */
#define DROP_TC	  2
#define PASS_CG	  1
#define DROP_CG	  0

#define barrier() asm volatile("" ::: "memory")
#define READ_ONCE(x) (*(volatile typeof(x) *)&(x))
#define WRITE_ONCE(x, v) (*(volatile typeof(x) *)&(x) = (v))

/* struct ip is an address in network order; IPv4 is ::ffff:a.b.c.d. */
struct ip {
	__u32 w[4];
};

/* struct tuple names a conversation; for ICMP echo both ports are the identifier. */
struct tuple {
	struct ip src, dst;
	__u16 sport, dport;
	__u8 proto;
	__u8 pad[3];
};

static __always_inline bool ip_equal(const struct ip *a, const struct ip *b)
{
	return a->w[0] == b->w[0] && a->w[1] == b->w[1] && a->w[2] == b->w[2] && a->w[3] == b->w[3];
}

static __always_inline bool ip_mapped(const struct ip *a)
{
	return a->w[0] == 0 && a->w[1] == 0 && a->w[2] == bpf_htonl(0xffff);
}

static __always_inline bool ip_loopback(const struct ip *a)
{
	if (ip_mapped(a))
		return (a->w[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return a->w[0] == 0 && a->w[1] == 0 && a->w[2] == 0 && a->w[3] == bpf_htonl(1);
}

/* ip_unset: the unspecified address of either family. */
static __always_inline bool ip_unset(const struct ip *a)
{
	return a->w[0] == 0 && a->w[1] == 0 && (a->w[2] == 0 || a->w[2] == bpf_htonl(0xffff)) && a->w[3] == 0;
}

static __always_inline bool ip_multicast(const struct ip *a)
{
	if (ip_mapped(a))
		return (a->w[3] & bpf_htonl(0xf0000000)) == bpf_htonl(0xe0000000) || a->w[3] == ~0U;
	return (a->w[0] & bpf_htonl(0xff000000)) == bpf_htonl(0xff000000);
}

static __always_inline void ip_from4(struct ip *to, __u32 v4)
{
	to->w[0] = 0;
	to->w[1] = 0;
	to->w[2] = bpf_htonl(0xffff);
	to->w[3] = v4;
}
