/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/* The few fields of the kernel's own structs that the socket iterators read. They are named as the kernel names them,
 * and the loader moves every access to where the running kernel has the field (CO-RE), so that neither order nor size
 * means anything here. Only programs that iterate need this; everything else reads stable interfaces. */
#pragma once

#include "types.h"

#define TCP_ESTABLISHED 1 /* also the state of a connected UDP socket */
#define TCP_SYN_SENT	2
#define TCP_FIN_WAIT1	4
#define TCP_FIN_WAIT2	5
#define TCP_CLOSE_WAIT	8

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct in6_addr {
	union {
		__u32 u6_addr32[4];
	} in6_u;
};

/* The kernel keeps the first four in anonymous unions, which CO-RE looks through. */
struct sock_common {
	__u32 skc_daddr;
	__u32 skc_rcv_saddr;
	__u16 skc_dport; /* network order */
	__u16 skc_num;	 /* local port, host order */
	__u16 skc_family;
	volatile __u8 skc_state;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
};

struct socket;

struct sock {
	struct sock_common __sk_common;
	struct socket *sk_socket; /* null once its process closed it, and before it is accepted */
};

struct tcp_sock; /* begins with a struct sock */
struct udp_sock;

struct bpf_iter_meta;

struct bpf_iter__tcp {
	struct bpf_iter_meta *meta;
	struct sock_common *sk_common;
};

struct bpf_iter__udp {
	struct bpf_iter_meta *meta;
	struct udp_sock *udp_sk;
};

#pragma clang attribute pop

/* bpf_sock_destroy (Linux 6.5) ends a TCP or UDP socket as SOCK_DESTROY does: the process that has it learns by
 * ECONNABORTED. The iterator holds the socket's lock meanwhile. Never for a request or TIME_WAIT socket, which is
 * smaller than what the function reads. */
extern int bpf_sock_destroy(struct sock_common *sock) __ksym;
