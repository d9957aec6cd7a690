/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* ARP: no policy can take it away, and nobody may speak for another's address. */
#ifndef BULKHEAD_ARP_H
#define BULKHEAD_ARP_H

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

#endif
