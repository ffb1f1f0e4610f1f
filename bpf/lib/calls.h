/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/* connect, sendmsg and bind: give a socket its workload's own source address, refuse another's, and say no at once where
 * a packet would only be dropped. Included by judge.c, whose struct judge it uses.
 *
 * An IPv6 socket that names a mapped address reaches only the IPv6 hooks, so those decode it. The process that calls
 * is judged here; the socket, which may be another's, is judged with its packets. */
#pragma once

struct sockaddr4 {
	__u16 family;
	__u16 port;
	__u32 addr;
	__u8 zero[8];
};

struct sockaddr6 {
	__u16 family;
	__u16 port;
	__u32 flow;
	struct ip addr;
	__u32 scope;
};

static __always_inline const struct own *find_own(__u32 number, __u64 generation)
{
	struct own_key k = {.generation = generation, .number = number};

	return number ? bpf_map_lookup_elem(&owns, &k) : 0;
}

static __always_inline bool own_address(const struct own *o, __u8 family, struct ip *out)
{
	if (!o || !(o->flags & (family == 4 ? OWN_V4 : OWN_V6)))
		return false;
	*out = family == 4 ? o->v4 : o->v6;
	return true;
}

/* begin_call is what every call needs. The tuple is in place. */
static __always_inline bool begin_call(struct judge *j, __u8 hook)
{
	__u32 zero = 0;
	struct settings *cfg = bpf_map_lookup_elem(&config, &zero);

	if (!cfg)
		return false;
	j->hook = hook;
	j->generation = READ_ONCE(cfg->generation);
	j->now = now_ns();
	j->p.family = ip_mapped(&j->p.tuple.dst) || ip_mapped(&j->p.tuple.src) ? 4 : 6;
	return true;
}

/* call_form is steps 2 to 4 of a connect. */
static __always_inline __u8 call_form(struct judge *j, struct ends *e)
{
	__u8 proto = j->p.tuple.proto;

	e->src = find_addr(&j->p.tuple.src, j->generation);
	e->dst = find_addr(&j->p.tuple.dst, j->generation);
	if (proto != PROTO_TCP && proto != PROTO_UDP && proto != PROTO_ICMP && proto != PROTO_ICMPV6 && proto != PROTO_SCTP)
		return REASON_UNKNOWN_PROTO;
	return lease_over(find_view(j->generation), j->now) ? REASON_LEASE_ENDED : REASON_NONE;
}

/* call_source is step 6 of a connect: an unbound socket will be given the owner's address; a bound one must have it. */
static __always_inline __u8 call_source(const struct judge *j, const struct ends *e)
{
	if (!j->owner)
		return REASON_NO_IDENTITY;
	if (ip_unset(&j->p.tuple.src))
		return j->p.tuple.sport ? REASON_SOURCE_BOUND : REASON_NONE;
	return addr_local(e->src) && e->src->number == j->owner ? REASON_NONE : REASON_SPOOFED_SOURCE;
}

/* call_answers: a datagram that answers a tracked flow is judged as that flow. */
static __always_inline bool call_answers(const struct judge *j)
{
	struct tuple key;
	struct conn *c;
	bool swapped;

	if (j->p.tuple.proto == PROTO_TCP)
		return false;
	swapped = ct_key(&j->p.tuple, &key);
	c = ct_find(&key);
	return c && !ct_idle(c, j->now) && ct_side(READ_ONCE(c->state), swapped);
}

/* judge_call is steps 6 to 11 of a connect; the owner is known. */
static __always_inline void judge_call(struct judge *j, const struct ends *e, const struct own *own)
{
	__u8 reason = call_source(j, e);
	struct addr self = {.number = j->owner, .flags = ADDR_LOCAL, .ruleset = own ? own->ruleset : 0};
	struct answer a;

	/* 7. Peer. */
	if (!reason)
		reason = peer_reason(e->dst, j->now);
	if (reason) {
		deny(j, e, reason, 0);
		return;
	}
	/* 9 and 11; nothing is tracked for a call. */
	if (call_answers(j))
		ask_policy(e->dst, &self, j->p.tuple.proto, j->p.tuple.sport, j->now, &a);
	else
		ask_policy(&self, e->dst, j->p.tuple.proto, j->p.tuple.dport, j->now, &a);
	j->verdict = a.verdict;
	j->reason = a.reason;
	j->rule = a.rule;
	j->src_number = j->owner;
	j->dst_number = addr_number(e->dst);
}

/* judge_bind_call: an overlay address is bound only by the workload that owns it. */
static __always_inline void judge_bind_call(struct judge *j, const struct ends *e)
{
	if (!j->owner)
		deny(j, e, REASON_NO_IDENTITY, 0);
	else if (!addr_local(e->src) || e->src->number != j->owner)
		deny(j, e, REASON_SPOOFED_SOURCE, 0);
	else
		allow(j, 0, j->owner, 0);
}

static __always_inline void task_identity(struct judge *j)
{
	j->cgroup = bpf_get_current_cgroup_id();
	j->uid = bpf_get_current_uid_gid();
	j->owner = task_owner(j->generation, j->cgroup, j->uid);
}

static __always_inline __u32 task_pid(void)
{
	return bpf_get_current_pid_tgid() >> 32;
}

/* call_foreign: the process is in another network namespace and is nobody by itself: if its device leads to a workload,
 * its packets are judged there. */
static __always_inline bool call_foreign(struct bpf_sock_addr *ctx, const struct judge *j)
{
	__u32 zero = 0;
	const struct settings *cfg = bpf_map_lookup_elem(&config, &zero);

	return has_netns && cfg && cfg->netns && !j->owner && bpf_get_netns_cookie(ctx) != cfg->netns;
}

/* refuse makes the call fail with EACCES, which tells it from a missing route or a filter. */
static __always_inline int refuse(void)
{
	bpf_set_retval(-EACCES);
	return DROP_CG;
}

/* call_outside is step 1 of a call to a destination outside the overlay: true lets it go on. The unspecified address is
 * this host. */
static __always_inline bool call_outside(struct judge *j)
{
	__u32 zero = 0;
	const struct settings *cfg = bpf_map_lookup_elem(&config, &zero);
	struct ends e = {};

	if (!cfg || !cfg->traits || ip_loopback(&j->p.tuple.dst) || ip_unset(&j->p.tuple.dst))
		return true;
	task_identity(j);
	if (!asks(j, OWN_CONFINED))
		return true;
	e.src = find_addr(&j->p.tuple.src, j->generation);
	deny(j, &e, REASON_INTERNET_DENIED, 0);
	return finish(j, task_pid());
}

/* bind_source gives the socket an address and leaves the port open. mapped: an IPv6 socket that talks IPv4. */
static __always_inline long bind_source(struct bpf_sock_addr *ctx, const struct ip *ip, bool v6)
{
	if (v6) {
		struct sockaddr6 a = {.family = AF_INET6, .addr = *ip};

		return bpf_bind(ctx, (struct sockaddr *)&a, sizeof(a));
	} else {
		struct sockaddr4 a = {.family = AF_INET, .addr = ip->w[3]};

		return bpf_bind(ctx, (struct sockaddr *)&a, sizeof(a));
	}
}

/* loosen undoes what an earlier connect to the overlay left: after connect(AF_UNSPEC) the source address would stick,
 * and a destination outside the overlay would be called from an overlay address. A bound port cannot be loosened; its
 * packets are denied as they leave. */
static __always_inline void loosen(struct bpf_sock_addr *ctx, const struct judge *j, bool v6)
{
	struct ip any = {};

	if (j->p.tuple.sport || !in_overlay(&j->p.tuple.src, ip_mapped(&j->p.tuple.src) ? 4 : 6))
		return;
	if (v6 && ip_mapped(&j->p.tuple.src))
		any.w[2] = bpf_htonl(0xffff);
	bind_source(ctx, &any, v6);
}

/* judge_connect finishes a connect whose tuple is in j. */
static __always_inline int judge_connect(struct bpf_sock_addr *ctx, struct judge *j, bool v6)
{
	const struct own *own;
	struct ends e = {};
	struct ip source;
	__u8 reason;

	if (!begin_call(j, HOOK_CONNECT))
		return refuse();
	/* An address without a port is what an earlier connect left, after loosen: the process chose none. */
	if (!j->p.tuple.sport && !in_overlay(&j->p.tuple.src, ip_mapped(&j->p.tuple.src) ? 4 : 6) && in_overlay(&j->p.tuple.dst, j->p.family))
		j->p.tuple.src = (struct ip){};
	/* 1. Scope. */
	if (!in_overlay(&j->p.tuple.dst, j->p.family)) {
		if (!call_outside(j))
			return refuse();
		loosen(ctx, j, v6);
		return PASS_CG;
	}
	reason = call_form(j, &e);
	if (reason) {
		deny(j, &e, reason, 0);
		finish(j, task_pid());
		return refuse();
	}
	/* 5. Owner. */
	task_identity(j);
	if (call_foreign(ctx, j))
		return PASS_CG;
	own = find_own(j->owner, j->generation);
	judge_call(j, &e, own);
	if (j->verdict != VERDICT_DENY && ip_unset(&j->p.tuple.src) &&
	    (!own_address(own, j->p.family, &source) || bind_source(ctx, &source, v6) < 0))
		deny(j, &e, REASON_SOURCE_BOUND, 0);
	return finish(j, task_pid()) ? PASS_CG : refuse();
}

/* judge_sendmsg judges a datagram without a connection. An unset source becomes the owner's, so that a server on the
 * wildcard address answers from the address that was asked; the caller writes it back from j when this returns true. */
static __always_inline bool judge_sendmsg(struct bpf_sock_addr *ctx, struct judge *j)
{
	const struct own *own;
	struct ends e = {};
	__u8 reason;

	reason = call_form(j, &e);
	if (reason) {
		deny(j, &e, reason, 0);
		return finish(j, task_pid());
	}
	task_identity(j);
	if (call_foreign(ctx, j))
		return true;
	own = find_own(j->owner, j->generation);
	if (ip_unset(&j->p.tuple.src) && own_address(own, j->p.family, &j->p.tuple.src))
		e.src = find_addr(&j->p.tuple.src, j->generation);
	judge_call(j, &e, own);
	return finish(j, task_pid());
}

static __always_inline int judge_connect4(struct bpf_sock_addr *ctx)
{
	struct judge j = {};
	struct bpf_sock *sk = ctx->sk;

	if (!sk)
		return PASS_CG;
	ip_from4(&j.p.tuple.src, sk->src_ip4);
	ip_from4(&j.p.tuple.dst, ctx->user_ip4);
	j.p.tuple.sport = sk->src_port;
	j.p.tuple.dport = bpf_ntohs(ctx->user_port);
	j.p.tuple.proto = ctx->protocol;
	return judge_connect(ctx, &j, false);
}

/* read6 takes word by word: the verifier wants each access to the context to be one field. */
#define read6(to, from)                                                                                                \
	do {                                                                                                           \
		(to)->w[0] = (from)[0];                                                                                \
		(to)->w[1] = (from)[1];                                                                                \
		(to)->w[2] = (from)[2];                                                                                \
		(to)->w[3] = (from)[3];                                                                                \
	} while (0)

static __always_inline int judge_connect6(struct bpf_sock_addr *ctx)
{
	struct judge j = {};
	struct bpf_sock *sk = ctx->sk;

	if (!sk)
		return PASS_CG;
	read6(&j.p.tuple.src, sk->src_ip6);
	read6(&j.p.tuple.dst, ctx->user_ip6);
	j.p.tuple.sport = sk->src_port;
	j.p.tuple.dport = bpf_ntohs(ctx->user_port);
	j.p.tuple.proto = ctx->protocol;
	return judge_connect(ctx, &j, true);
}

static __always_inline int judge_sendmsg4(struct bpf_sock_addr *ctx)
{
	struct judge j = {};
	struct bpf_sock *sk = ctx->sk;

	if (!sk)
		return PASS_CG;
	ip_from4(&j.p.tuple.src, ctx->msg_src_ip4);
	ip_from4(&j.p.tuple.dst, ctx->user_ip4);
	j.p.tuple.dport = bpf_ntohs(ctx->user_port);
	if (!ctx->user_ip4 && !ctx->user_port) { /* connected, with ancillary data */
		ip_from4(&j.p.tuple.dst, sk->dst_ip4);
		j.p.tuple.dport = bpf_ntohs(sk->dst_port);
	}
	j.p.tuple.sport = sk->src_port;
	j.p.tuple.proto = ctx->protocol;
	if (!begin_call(&j, HOOK_CONNECT))
		return refuse();
	if (!in_overlay(&j.p.tuple.dst, j.p.family))
		return call_outside(&j) ? PASS_CG : refuse();
	if (!judge_sendmsg(ctx, &j))
		return refuse();
	ctx->msg_src_ip4 = j.p.tuple.src.w[3];
	return PASS_CG;
}

static __always_inline int judge_sendmsg6(struct bpf_sock_addr *ctx)
{
	struct judge j = {};
	struct bpf_sock *sk = ctx->sk;
	struct ip any = {};

	if (!sk)
		return PASS_CG;
	read6(&j.p.tuple.src, ctx->msg_src_ip6);
	read6(&j.p.tuple.dst, ctx->user_ip6);
	j.p.tuple.dport = bpf_ntohs(ctx->user_port);
	if (ip_equal(&j.p.tuple.dst, &any) && !ctx->user_port) {
		read6(&j.p.tuple.dst, sk->dst_ip6);
		j.p.tuple.dport = bpf_ntohs(sk->dst_port);
	}
	j.p.tuple.sport = sk->src_port;
	j.p.tuple.proto = ctx->protocol;
	if (!begin_call(&j, HOOK_CONNECT))
		return refuse();
	if (!in_overlay(&j.p.tuple.dst, j.p.family))
		return call_outside(&j) ? PASS_CG : refuse();
	if (!judge_sendmsg(ctx, &j))
		return refuse();
	ctx->msg_src_ip6[0] = j.p.tuple.src.w[0];
	ctx->msg_src_ip6[1] = j.p.tuple.src.w[1];
	ctx->msg_src_ip6[2] = j.p.tuple.src.w[2];
	ctx->msg_src_ip6[3] = j.p.tuple.src.w[3];
	return PASS_CG;
}

/* judge_bind fails the call with EPERM; the port is known to no rule here. */
static __always_inline int judge_bind(struct bpf_sock_addr *ctx, struct judge *j)
{
	struct ends e = {};

	if (!begin_call(j, HOOK_BIND))
		return DROP_CG;
	if (!in_overlay(&j->p.tuple.src, j->p.family))
		return PASS_CG;
	e.src = find_addr(&j->p.tuple.src, j->generation);
	task_identity(j);
	if (call_foreign(ctx, j))
		return PASS_CG;
	judge_bind_call(j, &e);
	return finish(j, task_pid()) ? PASS_CG : DROP_CG;
}

static __always_inline int judge_bind4(struct bpf_sock_addr *ctx)
{
	struct judge j = {};

	ip_from4(&j.p.tuple.src, ctx->user_ip4);
	j.p.tuple.sport = bpf_ntohs(ctx->user_port);
	j.p.tuple.proto = ctx->protocol;
	return judge_bind(ctx, &j);
}

static __always_inline int judge_bind6(struct bpf_sock_addr *ctx)
{
	struct judge j = {};

	read6(&j.p.tuple.src, ctx->user_ip6);
	j.p.tuple.sport = bpf_ntohs(ctx->user_port);
	j.p.tuple.proto = ctx->protocol;
	return judge_bind(ctx, &j);
}

#ifdef SIGNET_TEST

/* The harness cannot run calls. These two judge the call that a packet's tuple describes, with the same functions. */
static __always_inline void test_identity(struct __sk_buff *skb, struct judge *j)
{
	j->cgroup = packet_cgroup(skb);
	j->uid = packet_uid(skb);
	j->owner = packet_owner(skb, j->generation, j->cgroup, j->uid);
}

SEC("tc")
int test_connect(struct __sk_buff *skb)
{
	struct judge j = {};
	struct ends e = {};
	__u8 reason;

	parse(skb, &j.p);
	if (!begin_call(&j, HOOK_CONNECT))
		return DROP_TC;
	if (!in_overlay(&j.p.tuple.dst, j.p.family)) {
		test_identity(skb, &j);
		if (!ip_loopback(&j.p.tuple.dst) && !ip_unset(&j.p.tuple.dst) && asks(&j, OWN_CONFINED)) {
			e.src = find_addr(&j.p.tuple.src, j.generation);
			deny(&j, &e, REASON_INTERNET_DENIED, 0);
		} else {
			ignore(&j);
		}
		return finish(&j, 0) ? PASS_TC : DROP_TC;
	}
	reason = call_form(&j, &e);
	if (reason) {
		deny(&j, &e, reason, 0);
		return finish(&j, 0) ? PASS_TC : DROP_TC;
	}
	test_identity(skb, &j);
	judge_call(&j, &e, find_own(j.owner, j.generation));
	return finish(&j, 0) ? PASS_TC : DROP_TC;
}

SEC("tc")
int test_bind(struct __sk_buff *skb)
{
	struct judge j = {};
	struct ends e = {};

	parse(skb, &j.p);
	if (!begin_call(&j, HOOK_BIND))
		return DROP_TC;
	if (!in_overlay(&j.p.tuple.src, j.p.family)) {
		ignore(&j);
		return finish(&j, 0) ? PASS_TC : DROP_TC;
	}
	e.src = find_addr(&j.p.tuple.src, j.generation);
	test_identity(skb, &j);
	judge_bind_call(&j, &e);
	return finish(&j, 0) ? PASS_TC : DROP_TC;
}

#endif
