/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* What no policy can take away (ARP, neighbour discovery, DHCP) and whose addresses may be used. */
#ifndef BULKHEAD_INFRA_H
#define BULKHEAD_INFRA_H

#include "flow.h"

struct arp {
	__be16 hardware;
	__be16 protocol;
	__u8 hardware_len;
	__u8 protocol_len;
	__be16 operation;
	__u8 sender_mac[6];
	__u8 sender_ip[4];
	__u8 target_mac[6];
	__u8 target_ip[4];
};

/* ARP: reason to drop it, or REASON_NONE. */
static __always_inline __u8 judge_arp(struct __sk_buff *skb, const struct packet *p, __u8 direction)
{
	struct addr sender;
	struct arp arp;
	__u32 v4;

	if (!is_programmed(binding_of(skb->ifindex), direction))
		return REASON_UNPROGRAMMED;
	if (bpf_skb_load_bytes(skb, p->l3, &arp, sizeof(arp)) || arp.hardware_len != 6 || arp.protocol_len != 4 ||
	    arp.protocol != bpf_htons(ETH_P_IP))
		return REASON_MALFORMED;
	if (direction == DIR_INGRESS)
		return REASON_NONE;
	__builtin_memcpy(&v4, arp.sender_ip, sizeof(v4));
	map_v4(&sender, v4);
	/* 0.0.0.0 asks whether an address is free (RFC 5227). */
	return !v4 || is_own(skb->ifindex, &sender) ? REASON_NONE : REASON_SPOOFED;
}

static __always_inline int is_discovery(const struct packet *p)
{
	if (!p->v6 || p->protocol != IPPROTO_ICMPV6 || p->frag)
		return 0;
	/* Hop limit 255: it has not been routed (RFC 4861). */
	if (p->icmp_type >= 133 && p->icmp_type <= 137)
		return p->hop_limit == 255;
	/* Multicast listener discovery. */
	return (p->icmp_type >= 130 && p->icmp_type <= 132) || p->icmp_type == 143;
}

static __always_inline int is_dhcp(const struct packet *p, __u8 direction)
{
	__u16 client = p->v6 ? 546 : 68, server = p->v6 ? 547 : 67;

	if (p->protocol != IPPROTO_UDP)
		return 0;
	return direction == DIR_EGRESS ? p->sport == client && p->dport == server :
					 p->sport == server && p->dport == client;
}

static __always_inline int is_infrastructure(const struct packet *p, __u8 direction)
{
	return is_discovery(p) || is_dhcp(p, direction);
}

/* Whether the workload may send an infrastructure packet with this source. */
static __always_inline int infrastructure_source_ok(const struct flow *f)
{
	const struct addr *src = &f->p.src;

	if (f->direction == DIR_INGRESS || is_own(f->key.ifindex, src))
		return 1;
	if (f->p.v6)
		return is_link_local(src) || is_v6_unspecified(src);
	return !src->w[3];
}

/* Whether the workload may use this source at all. Sets local_own. */
static __always_inline int source_ok(struct flow *f)
{
	f->local_own = is_own(f->key.ifindex, &f->key.local);
	if (f->direction == DIR_INGRESS || f->local_own)
		return 1;
	return f->p.v6 && is_link_local(&f->p.src) && (is_link_local(&f->p.dst) || is_v6_multicast(&f->p.dst));
}

#endif
