// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/* The two programs on the host side of a workload's interface. What a workload sends is met before the kernel routes
 * it, and so before it may rewrite where it goes: a new connection that is routed is only let through to the programs
 * at netfilter's hooks (gate.bpf.c), which judge it by where it really goes. */
#include <linux/if_packet.h>

#include "arp.h"
#include "parse.h"
#include "translation.h"
#include "verdict.h"

/* Whether the host takes a frame in, to route it or to have it: then the kernel may still rewrite where it goes. */
static __always_inline __u8 stage_of(struct __sk_buff *skb)
{
	struct net_device *port = packet_of(skb)->dev, *master;
	unsigned char wanted[6], own[6];
	const unsigned char *address;
	int i;

	if (skb->pkt_type == PACKET_HOST)
		return STAGE_EARLY;
	/* Broadcast and multicast are not rewritten. */
	if (skb->pkt_type != PACKET_OTHERHOST)
		return STAGE_FINAL;
	master = master_of(port);
	if (!master || bpf_skb_load_bytes(skb, 0, wanted, sizeof(wanted)))
		return STAGE_BRIDGED;
	address = BPF_CORE_READ(master, dev_addr);
	if (bpf_probe_read_kernel(own, sizeof(own), address))
		return STAGE_BRIDGED;
	for (i = 0; i < 6; i++)
		if (own[i] != wanted[i])
			return STAGE_BRIDGED;
	return STAGE_EARLY;
}

static __always_inline int handle(struct __sk_buff *skb, __u8 direction)
{
	struct config *configured = configuration();
	__u32 ifindex = skb->ifindex;
	struct flow f = {};
	int parsed, result;
	__u8 reason;

	if (!configured)
		return DROP;
	f.direction = direction;
	/* Before anything is judged: what is judged while tables change is judged again afterwards. */
	f.revision = *(volatile __u32 *)&configured->revision;
	parsed = parse(skb, &f.p);
	if (parsed == PARSED_ARP) {
		reason = judge_arp(skb, &f.p, direction);
		return reason == REASON_NONE ? PASS : deny_without_entry(reason);
	}
	if (parsed != PARSED_IP) {
		if (!is_programmed(binding_of(ifindex), direction))
			return deny_without_entry(REASON_UNPROGRAMMED);
		return deny_without_entry(parsed == PARSED_UNKNOWN ? REASON_UNKNOWN_ETHERTYPE : REASON_MALFORMED);
	}
	/* Good enough to expire by, and a fifth of the price; slow_path() reads the exact clock. */
	f.now = bpf_ktime_get_coarse_ns();
	f.packets = skb->gso_segs ? skb->gso_segs : 1;
	if (follow(&f, ifindex) == DROP)
		return DROP;
	if (direction == DIR_INGRESS) {
		if (!is_new_to_kernel(packet_of(skb)) && fast_path(&f))
			return PASS;
		f.stage = STAGE_FINAL;
		find_real_source(skb, &f);
		return slow_path(skb, &f);
	}
	if (fast_path(&f)) {
		skb->tc_index = PASSED_SETTLED | passed_from(ifindex);
		return PASS;
	}
	f.stage = stage_of(skb);
	result = slow_path(skb, &f);
	if (result == DROP)
		return DROP;
	skb->tc_index = passed_from(ifindex) | (result == DEFER		       ? 0 :
						f.stage == STAGE_BRIDGED ? PASSED_COUNTED :
									 PASSED_SETTLED);
	return PASS;
}

/* Attached to tcx ingress of the host side: packets FROM the workload. */
SEC("tc")
int from_workload(struct __sk_buff *skb)
{
	return handle(skb, DIR_EGRESS);
}

/* Attached to tcx egress of the host side: packets TO the workload. */
SEC("tc")
int to_workload(struct __sk_buff *skb)
{
	return handle(skb, DIR_INGRESS);
}

char LICENSE[] SEC("license") = "GPL";
