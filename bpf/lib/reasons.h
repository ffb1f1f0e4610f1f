/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/* Verdicts, reasons, hooks and devices. The numbers are those of internal/flow/reason.go and internal/policy/judge.go;
 * bpf/numbers_test.go compares the two. */
#pragma once

enum verdict {
	VERDICT_DENY = 0,
	VERDICT_ALLOW = 1,
	VERDICT_AUDIT = 2,
	VERDICT_IGNORE = 3,
};

enum reason {
	REASON_NONE = 0,
	REASON_POLICY_ALLOW = 1,
	REASON_POLICY_DENY = 2,
	REASON_NO_RULE = 3,
	REASON_NO_IDENTITY = 4,
	REASON_SPOOFED_SOURCE = 5,
	REASON_UNKNOWN_PEER = 6,
	REASON_NOT_TUNNEL = 7,
	REASON_CT_FULL = 8,
	REASON_CT_INVALID = 9,
	REASON_EXPIRED = 10,
	REASON_REVOKED = 11,
	REASON_FRAGMENT = 12,
	REASON_MALFORMED = 13,
	REASON_LEASE_ENDED = 14,
	REASON_SOURCE_BOUND = 15,
	REASON_WRONG_RECEIVER = 16,
	REASON_UNKNOWN_PROTO = 17,
	REASON_INTERNET_DENIED = 18,
	REASON_LISTEN_OVERLAY = 19,
};

enum hook {
	HOOK_CONNECT = 0,
	HOOK_BIND = 1,
	HOOK_EGRESS_SOCKET = 2,
	HOOK_INGRESS_SOCKET = 3,
	HOOK_EGRESS_DEVICE = 4,
	HOOK_INGRESS_DEVICE = 5,
	HOOK_GUARD = 6,
	HOOK_LOOPBACK = 7,
	HOOK_FROM_WORKLOAD = 8,
	HOOK_TO_WORKLOAD = 9,
};

enum device {
	DEVICE_TUNNEL = 0,
	DEVICE_LOOPBACK = 1,
	DEVICE_OTHER = 2,
	DEVICE_WORKLOAD = 3,
};

/* Counters are indexed by verdict, hook and reason; the three sizes are powers of two above the last number. */
#define COUNTER_REASONS 32
#define COUNTER_HOOKS	16
#define COUNTER_SLOTS	(4 * COUNTER_HOOKS * COUNTER_REASONS)
