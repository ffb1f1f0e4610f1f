/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/* The guard of every device but the tunnel and loopback: overlay addresses neither arrive nor leave there. Included by
 * judge.c, whose struct judge it uses. Whatever is not clearly an overlay packet passes: the underlay is not ours. */
#pragma once


/* Receivers take off any number of tags with identifier 0; nobody needs more than two. */
#define MAX_TAGS 8

/* network_header finds an IP header behind a link header that skb->protocol does not tell of: a tag, or a packet socket
 * that names one protocol and sends another. 0 for neither. */
static __always_inline __u32 network_header(struct __sk_buff *skb, __u16 *type)
{
	__u32 at = ETH_HLEN;

	if (bpf_skb_load_bytes_relative(skb, at - 2, type, sizeof(*type), BPF_HDR_START_MAC) < 0)
		return 0;
	for (int i = 0; i < MAX_TAGS; i++) {
		if (*type != bpf_htons(ETH_P_8021Q) && *type != bpf_htons(ETH_P_8021AD))
			break;
		at += VLAN_HLEN;
		if (bpf_skb_load_bytes_relative(skb, at - 2, type, sizeof(*type), BPF_HDR_START_MAC) < 0)
			return 0;
	}
	return at;
}

/* guard_ends reads only the addresses; true when one of them is the overlay's. */
static __always_inline bool guard_ends(struct __sk_buff *skb, struct packet *p, __u16 type, __u32 at, __u32 base)
{
	if (type == bpf_htons(ETH_P_IP)) {
		struct ipv4 ip;

		if (bpf_skb_load_bytes_relative(skb, at, &ip, sizeof(ip), base) < 0)
			return false;
		p->family = 4;
		p->tuple.proto = ip.proto;
		ip_from4(&p->tuple.src, ip.src);
		ip_from4(&p->tuple.dst, ip.dst);
	} else if (type == bpf_htons(ETH_P_IPV6)) {
		struct ipv6 ip;

		if (bpf_skb_load_bytes_relative(skb, at, &ip, sizeof(ip), base) < 0)
			return false;
		p->family = 6;
		p->tuple.proto = ip.next;
		p->tuple.src = ip.src;
		p->tuple.dst = ip.dst;
	} else {
		return false;
	}
	return in_overlay(&p->tuple.src, p->family) || in_overlay(&p->tuple.dst, p->family);
}

/* guard_find reads the addresses; true when one of them is the overlay's. On the way out skb->protocol is what the sender
 * says, and a packet socket may say anything: what the frame itself says counts as much, because the receiver goes by
 * that. disguised: the two do not agree. */
static __always_inline bool guard_find(struct __sk_buff *skb, struct packet *p, bool *disguised, bool *buried)
{
	__u16 type = 0;
	__u32 at;

	*disguised = false;
	*buried = false;
	if (guard_ends(skb, p, skb->protocol, 0, BPF_HDR_START_NET))
		return true;
	*disguised = true;
	at = network_header(skb, &type);
	*buried = type == bpf_htons(ETH_P_8021Q) || type == bpf_htons(ETH_P_8021AD);
	return at && guard_ends(skb, p, type, at, BPF_HDR_START_MAC);
}

/* guard_workload judges at the device of a workload in a network namespace of its own, which is j's owner. */
static __always_inline bool guard_workload(struct __sk_buff *skb, struct judge *j)
{
	__u8 reason;

	__builtin_memset(&j->p, 0, sizeof(j->p));
	parse(skb, &j->p);
	/* 1. Scope. */
	if (!in_scope(j))
		return outside(j, true);
	j->now = now_ns();
	/* 2. Form. */
	reason = form(j);
	if (reason) {
		deny_early(j, reason);
		return finish(j, 0);
	}
	return judge_tracked(skb, j, false, 0);
}

/* guard_refuse is step 2 and 3 for what is the overlay's. */
static __always_inline bool guard_refuse(struct __sk_buff *skb, struct judge *j, bool disguised)
{
	__u8 reason = REASON_NOT_TUNNEL;

	j->cgroup = packet_cgroup(skb);
	/* 2. Form. */
	if (!disguised)
		parse(skb, &j->p);
	if (ip_multicast(&j->p.tuple.dst))
		j->p.flags |= PACKET_QUIET;
	/* 3. Place. On loopback only what is disguised comes here. */
	if ((j->p.flags & PACKET_MALFORMED) || j->hook == HOOK_LOOPBACK)
		reason = REASON_MALFORMED;
	else if (j->p.flags & PACKET_PORTLESS)
		reason = REASON_UNKNOWN_PROTO;
	deny_early(j, reason);
	return finish(j, 0);
}

/* guard_packet is steps 1 to 3; true lets the packet pass. hook is that of a workload's device in the same direction, or
 * that of loopback. */
static __always_inline bool guard_packet(struct __sk_buff *skb, const __u8 hook)
{
	bool ours, disguised, buried;
	struct judge j = {};
	__u32 zero = 0;
	struct settings *cfg;

	cfg = bpf_map_lookup_elem(&config, &zero);
	if (!cfg)
		return false;
	pull_headers(skb);
	begin(&j, cfg, hook == HOOK_LOOPBACK ? hook : HOOK_GUARD);
	j.device = hook == HOOK_LOOPBACK ? DEVICE_LOOPBACK : DEVICE_OTHER;
	ours = guard_find(skb, &j.p, &disguised, &buried);
	if (hook != HOOK_LOOPBACK && (ours ? !disguised : cfg->traits)) {
		j.owner = find_iface(packet_ifindex(skb), j.generation);
		if (j.owner) {
			j.cgroup = BY_DEVICE | packet_ifindex(skb);
			j.hook = hook;
			j.device = DEVICE_WORKLOAD;
			return guard_workload(skb, &j);
		}
	}
	/* 1. Scope. Buried deeper than anybody looks: on loopback no honest packet is tagged at all. */
	if (!ours && !(buried && hook == HOOK_LOOPBACK)) {
		ignore(&j);
		return finish(&j, 0);
	}
	return guard_refuse(skb, &j, disguised);
}
