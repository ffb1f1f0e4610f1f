/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/* Socket options that would carry packets around the judge at the tunnel: a packet socket that bypasses the queue, and
 * AF_XDP, hand their packets to the driver without tcx. No workload needs them for overlay traffic, and for a socket
 * that is not bound yet nobody can say which device it will name; so they are refused for every device. */
#pragma once

#include "types.h"

#define SOL_PACKET	    263
#define SOL_XDP		    283
#define PACKET_QDISC_BYPASS 20

/* What the kernel copies of a long option for programs to see. */
#define SOCKOPT_SEEN 4096

/* judge_setsockopt: false fails the call with EPERM. */
static __always_inline bool judge_setsockopt(struct bpf_sockopt *ctx)
{
	if (ctx->level == SOL_XDP || (ctx->level == SOL_PACKET && ctx->optname == PACKET_QDISC_BYPASS))
		return false;
	/* The kernel refuses a long option that no program took care of; 0 gives it the caller's own buffer. A short
	 * one is left alone: programs below in the tree may have changed it. */
	if (ctx->optlen > SOCKOPT_SEEN)
		ctx->optlen = 0;
	return true;
}
