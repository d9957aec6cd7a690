// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/* What a packet costs that meets a program at all: the zero point of the benchmarks. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

struct bpf_nf_ctx;

SEC("tc")
int empty(struct __sk_buff *skb)
{
	(void)skb;
	return -1; /* TCX_NEXT */
}

SEC("netfilter")
int empty_gate(struct bpf_nf_ctx *context)
{
	(void)context;
	return 1; /* NF_ACCEPT */
}

char LICENSE[] SEC("license") = "GPL";
