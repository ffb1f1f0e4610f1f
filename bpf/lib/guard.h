/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/* The guard of every device but the tunnel and loopback: overlay addresses neither arrive nor leave there. Included by
 * judge.c, whose struct judge it uses. Whatever is not clearly an overlay packet passes: the underlay is not ours. */
#pragma once


/* network_header finds an IP header behind a link header that skb->protocol does not tell of: a tag, or a packet socket
 * that names one protocol and sends another. 0 for neither. */
static __always_inline __u32 network_header(struct __sk_buff *skb, __u16 *type)
{
	__u32 at = ETH_HLEN;

	if (bpf_skb_load_bytes_relative(skb, at - 2, type, sizeof(*type), BPF_HDR_START_MAC) < 0)
		return 0;
	for (int i = 0; i < 2; i++) {
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

/* guard_packet is steps 1 to 3; true lets the packet pass. */
static __always_inline bool guard_packet(struct __sk_buff *skb)
{
	struct judge j = {.hook = HOOK_GUARD, .device = DEVICE_OTHER};
	struct tuple quote = {};
	__u32 zero = 0, at = 0, base = BPF_HDR_START_NET;
	__u16 type = skb->protocol;
	struct settings *cfg;
	__u8 reason = REASON_NONE;

	if (type != bpf_htons(ETH_P_IP) && type != bpf_htons(ETH_P_IPV6)) {
		at = network_header(skb, &type);
		if (!at)
			return true;
		base = BPF_HDR_START_MAC;
	}
	/* 1. Scope. */
	if (!guard_ends(skb, &j.p, type, at, base)) {
		ignore(&j);
		return finish(&j, 0);
	}
	cfg = bpf_map_lookup_elem(&config, &zero);
	if (!cfg)
		return false;
	j.generation = READ_ONCE(cfg->generation);
	j.wake = cfg->wake;
	j.cgroup = packet_cgroup(skb);
	/* 2. Form. */
	if (base == BPF_HDR_START_NET) {
		parse(skb, &j.p, &quote);
		reason = form(&j);
	}
	if (ip_multicast(&j.p.tuple.dst))
		j.p.flags |= PACKET_QUIET;
	/* 3. Place. */
	deny_early(&j, reason ? reason : REASON_NOT_TUNNEL);
	return finish(&j, 0);
}
