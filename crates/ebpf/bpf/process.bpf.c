// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/* The two programs of a control group whose processes are a workload of their own. They stand next to the sockets: behind
 * every rewriting on the way in and out, so the kernel's connection tracking says what the other end sees, if anything is
 * rewritten.
 *
 * All processes of a host share its addresses. Between two of them (on the loopback interface) the sender's program leaves
 * its number in the packet's priority, which nothing else uses there, and the receiver knows it by that. */
#include "translation.h"
#include "verdict.h"

/* Which endpoint the group is that a program is attached to. Of a group that nobody has named yet: 0. */
struct {
	__uint(type, BPF_MAP_TYPE_CGROUP_STORAGE);
	__type(key, struct bpf_cgroup_storage_key);
	__type(value, __u32);
} groups SEC(".maps");

/* bulkhead_model::host_policy::Attachment::own_address: a name in the form of an address (RFC 6666). */
static __always_inline void name_process(struct addr *name, __u32 subject)
{
	name->w[0] = bpf_htonl(0x01000000);
	name->w[1] = 0;
	name->w[2] = 0;
	name->w[3] = bpf_htonl(subject & ~SUBJECT_KIND);
}

/* A packet from another process of this host. */
static __always_inline int from_neighbour(struct __sk_buff *skb, struct flow *f)
{
	__u32 sender = skb->priority;
	struct conn *c = bpf_map_lookup_elem(&conns, &f->key);

	if (c && c->direction == DIR_EGRESS) {
		/* An answer: who was called is known by address only. */
		f->stage = STAGE_BRIDGED;
		return slow_path(skb, f);
	}
	if ((sender & SUBJECT_KIND) != SUBJECT_CGROUP || !binding_of(sender)) {
		/* One that is no workload: the host. */
		sender = 0;
		f->from_host = 1;
	}
	name_process(&f->p.src, sender);
	return slow_path(skb, f);
}

static __always_inline int handle(struct __sk_buff *skb, __u8 direction)
{
	struct config *configured = configuration();
	__u32 *subject = bpf_get_local_storage(&groups, 0);
	int loops = skb->ifindex == LOOPBACK;
	struct flow f = {};

	if (!configured || !*subject)
		return deny_without_entry(REASON_UNPROGRAMMED);
	f.direction = direction;
	f.stage = STAGE_FINAL;
	f.revision = *(volatile __u32 *)&configured->revision;
	f.now = bpf_ktime_get_ns();
	f.packets = skb->gso_segs ? skb->gso_segs : 1;
	if (parse_ip(skb, &f.p, skb->protocol == bpf_htons(ETH_P_IPV6), 0) != PARSED_IP)
		return deny_without_entry(REASON_MALFORMED);
	if (follow(&f, *subject) == DROP)
		return DROP;
	if (direction == DIR_EGRESS) {
		find_local(skb, &f);
		find_dialled(skb, &f);
	} else {
		find_real_source(skb, &f);
	}
	if (loops && direction == DIR_EGRESS)
		skb->priority = *subject;
	if (loops && direction == DIR_INGRESS && skb->priority == PRIORITY_REFUSAL && ends_something(&f))
		return PASS;
	if (loops && direction == DIR_INGRESS)
		return from_neighbour(skb, &f);
	if (!is_new_to_kernel(packet_of(skb)) && fast_path(&f))
		return PASS;
	return slow_path(skb, &f);
}

SEC("cgroup_skb/egress")
int from_process(struct __sk_buff *skb)
{
	return handle(skb, DIR_EGRESS) != DROP;
}

SEC("cgroup_skb/ingress")
int to_process(struct __sk_buff *skb)
{
	return handle(skb, DIR_INGRESS) != DROP;
}

char LICENSE[] SEC("license") = "GPL";
