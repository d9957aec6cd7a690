// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/* The programs at netfilter's hooks. There a packet has the addresses that it really goes to, whoever rewrites them
 * (kube-proxy, Docker's published ports, nftables), and the kernel still knows who sent it.
 *
 * At FORWARD and LOCAL_IN they judge what a workload of this host sends, as its exit left it to them; at LOCAL_IN and
 * LOCAL_OUT, what comes to and goes from the host itself, and at FORWARD what it forwards, if there are endpoints for
 * that. Priorities are the loader's. */
#define BULKHEAD_NETFILTER
#include "translation.h"
#include "verdict.h"

/* uapi/linux/netfilter.h, which has a union of its own in the way */
#define NF_DROP 0
#define NF_ACCEPT 1
#define NFPROTO_V6 10

/* The programs in force. Links to netfilter's hooks cannot be given another program, so they run the small ones
 * below, which jump to these. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 4); /* pinned by agents of all layouts, so it keeps its size */
	__type(key, __u32);
	__type(value, __u32);
} gates SEC(".maps");

enum gate { GATE_FORWARD = 0, GATE_LOCAL_IN = 1, GATE_LOCAL_OUT = 2 };

/* What these go on with: there is no room on one stack for two questions. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 3);
	__type(key, __u32);
	__type(value, __u32);
} inner_gates SEC(".maps");

enum inner_gate { INNER_HOST_IN = 0, INNER_FORWARDED_IN = 1, INNER_FORWARDED_OUT = 2 };

/* Fails closed for what workloads send; a host must not lose itself. */
static __always_inline int enter(struct bpf_nf_ctx *context, __u32 gate)
{
	__u16 passed = context->skb->tc_index;

	bpf_tail_call(context, &gates, gate);
	return passed && !(passed & PASSED_SETTLED) ? NF_DROP : NF_ACCEPT;
}

SEC("netfilter")
int enter_forward(struct bpf_nf_ctx *context)
{
	return enter(context, GATE_FORWARD);
}

SEC("netfilter")
int enter_local_in(struct bpf_nf_ctx *context)
{
	return enter(context, GATE_LOCAL_IN);
}

SEC("netfilter")
int enter_local_out(struct bpf_nf_ctx *context)
{
	return enter(context, GATE_LOCAL_OUT);
}

/* Segments that the kernel has merged into this packet. */
static __always_inline __u32 segments_of(struct sk_buff *skb)
{
	struct skb_shared_info *shared = (void *)(skb->head + skb->end);
	__u16 segments = 0;

	bpf_probe_read_kernel(&segments, sizeof(segments), __builtin_preserve_access_index(&shared->gso_segs));
	return segments ? segments : 1;
}

static __always_inline int is_v6(struct bpf_nf_ctx *context)
{
	return context->state->pf == NFPROTO_V6;
}

static __always_inline __u32 incoming(struct bpf_nf_ctx *context)
{
	struct net_device *in = context->state->in;

	return in ? in->ifindex : 0;
}

static __always_inline int may_send(__u32 subject, const struct addr *source)
{
	return is_own(subject, source) || (is_link_local(source) && binding_of(subject));
}

/* The workload of this host that sent a packet; 0: none. Its exit has said so; where somebody took that away, the
 * interface or the address tells, which the exit has checked. */
static __always_inline __u32 sender_of(struct bpf_nf_ctx *context)
{
	__u32 subject = context->skb->tc_index & PASSED_FROM, *owner;
	struct addr source = {};

	if (is_v6(context)) {
		if (load_bytes(context, 8, &source, sizeof(source)))
			return 0;
	} else {
		map_v4(&source, 0);
		if (load_bytes(context, 12, &source.w[3], sizeof(source.w[3])))
			return 0;
	}
	if (subject && may_send(subject, &source))
		return subject;
	subject = incoming(context);
	if (may_send(subject, &source))
		return subject;
	owner = bpf_map_lookup_elem(&owners, &source);
	return owner && !(*owner & SUBJECT_HOST) ? *owner : 0;
}

/* Everything about a packet but whose it is. 0: it cannot be parsed. */
static __always_inline int take_in(struct bpf_nf_ctx *context, struct flow *f)
{
	struct config *configured = configuration();

	if (!configured)
		return 0;
	f->revision = *(volatile __u32 *)&configured->revision;
	f->now = bpf_ktime_get_ns();
	f->packets = segments_of(context->skb);
	f->stage = STAGE_FINAL;
	return parse_ip(context, &f->p, is_v6(context), 0) == PARSED_IP;
}

static __always_inline int judge_unparsed(__u32 subject)
{
	return deny_without_entry(is_programmed(binding_of(subject), DIR_EGRESS) ? REASON_MALFORMED :
										   REASON_UNPROGRAMMED);
}

/* What a workload's exit has not settled. PASS or DROP. */
static __always_inline int judge_sender(struct bpf_nf_ctx *context, struct flow *f)
{
	__u16 passed = context->skb->tc_index;
	__u32 subject;

	if (passed & PASSED_SETTLED && !is_new_to_kernel(context->skb))
		return PASS;
	subject = sender_of(context);
	/* From a workload's interface, with an address that has been taken from it since its exit looked. (What an exit has
	 * written proves nothing here: a packet brings it along from another namespace.) */
	if (!subject && binding_of(incoming(context)))
		return deny_without_entry(REASON_SPOOFED);
	if (!subject)
		return PASS;
	if (!take_in(context, f))
		return judge_unparsed(subject);
	f->direction = DIR_EGRESS;
	if (follow(f, subject) == DROP)
		return DROP;
	find_dialled(context, f);
	f->counted = !!(passed & (PASSED_COUNTED | PASSED_SETTLED));
	return slow_path(context, f);
}

SEC("netfilter")
int forward(struct bpf_nf_ctx *context)
{
	struct config *configured = configuration();
	struct flow f = {};

	if (judge_sender(context, &f) == DROP)
		return NF_DROP;
	if (configured && configured->forwarded) {
		bpf_tail_call(context, &inner_gates, INNER_FORWARDED_IN);
		return NF_DROP;
	}
	return NF_ACCEPT;
}

/* The endpoint for what is forwarded through an interface; 0: none. One for all interfaces is not about workloads, which
 * have endpoints of their own, whatever interfaces their packets take. */
static __always_inline __u32 forwarded_subject(const struct flow *f, __u32 ifindex)
{
	__u32 subject = SUBJECT_FORWARDED | ifindex, *owner;

	if (binding_of(subject))
		return subject;
	owner = bpf_map_lookup_elem(&owners, real_peer(f));
	return owner && !(*owner & SUBJECT_KIND) ? 0 : SUBJECT_FORWARDED;
}

/* What comes in through one interface and goes out through another, which are asked one after the other. */
static __always_inline int judge_forwarded(struct bpf_nf_ctx *context, __u8 direction)
{
	struct net_device *through = direction == DIR_EGRESS ? context->state->out : context->state->in;
	__u32 ifindex = through ? through->ifindex : 0, subject;
	struct flow f = {};

	if (!binding_of(SUBJECT_FORWARDED | ifindex) && !binding_of(SUBJECT_FORWARDED))
		return PASS;
	if (!take_in(context, &f))
		return deny_without_entry(REASON_MALFORMED);
	f.direction = direction;
	subject = forwarded_subject(&f, ifindex);
	if (!binding_of(subject))
		return PASS;
	if (follow(&f, subject) == DROP)
		return DROP;
	return fast_path(&f) ? PASS : slow_path(context, &f);
}

SEC("netfilter")
int forwarded_in(struct bpf_nf_ctx *context)
{
	if (judge_forwarded(context, DIR_INGRESS) == DROP)
		return NF_DROP;
	bpf_tail_call(context, &inner_gates, INNER_FORWARDED_OUT);
	return NF_DROP;
}

SEC("netfilter")
int forwarded_out(struct bpf_nf_ctx *context)
{
	return judge_forwarded(context, DIR_EGRESS) == DROP ? NF_DROP : NF_ACCEPT;
}

/* The endpoint that the host is for packets with this own address through this interface; 0: none. */
static __always_inline __u32 host_subject(const struct addr *own, __u32 ifindex)
{
	__u32 *owner = bpf_map_lookup_elem(&owners, own), subject = SUBJECT_HOST | ifindex;

	if (owner && (*owner & SUBJECT_KIND) == SUBJECT_HOST)
		return *owner;
	if (binding_of(subject))
		return subject;
	subject = SUBJECT_HOST;
	return binding_of(subject) ? subject : 0;
}

static __always_inline int judge_host(struct bpf_nf_ctx *context, __u32 ifindex, __u8 direction)
{
	struct config *configured = configuration();
	struct flow f = {};
	__u32 subject;

	if (!configured || !configured->hosts || ifindex == LOOPBACK)
		return PASS;
	if (!take_in(context, &f))
		return deny_without_entry(REASON_MALFORMED);
	subject = host_subject(direction == DIR_EGRESS ? &f.p.src : &f.p.dst, ifindex);
	if (!subject)
		return PASS;
	f.direction = direction;
	if (follow(&f, subject) == DROP)
		return DROP;
	return fast_path(&f) ? PASS : slow_path(context, &f);
}

SEC("netfilter")
int local_in(struct bpf_nf_ctx *context)
{
	struct flow f = {};

	struct config *configured = configuration();

	if (incoming(context) == LOOPBACK)
		return NF_ACCEPT;
	if (judge_sender(context, &f) == DROP)
		return NF_DROP;
	if (configured && configured->hosts) {
		bpf_tail_call(context, &inner_gates, INNER_HOST_IN);
		return NF_DROP;
	}
	return NF_ACCEPT;
}

SEC("netfilter")
int host_in(struct bpf_nf_ctx *context)
{
	return judge_host(context, incoming(context), DIR_INGRESS) == DROP ? NF_DROP : NF_ACCEPT;
}

SEC("netfilter")
int local_out(struct bpf_nf_ctx *context)
{
	struct dst_entry *route = (void *)(context->skb->_skb_refdst & ~1UL);
	__u32 ifindex = route ? BPF_CORE_READ(route, dev, ifindex) : 0;

	return judge_host(context, ifindex, DIR_EGRESS) == DROP ? NF_DROP : NF_ACCEPT;
}

char LICENSE[] SEC("license") = "GPL";
