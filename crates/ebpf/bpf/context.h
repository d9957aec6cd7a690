/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* What a program is given, and how bytes of the packet are read: at a device's hook (tcx) or, with
 * BULKHEAD_NETFILTER, at a hook of netfilter, where a packet begins with its IP header. */
#ifndef BULKHEAD_CONTEXT_H
#define BULKHEAD_CONTEXT_H

#include "kernel.h"

#ifdef BULKHEAD_NETFILTER

#define CONTEXT struct bpf_nf_ctx

static __always_inline struct sk_buff *packet_of(CONTEXT *context)
{
	return context->skb;
}

static __always_inline int load_bytes(CONTEXT *context, __u32 offset, void *to, __u32 len)
{
	struct bpf_dynptr bytes;

	if (bpf_dynptr_from_skb((struct __sk_buff *)context->skb, 0, &bytes))
		return -1;
	return bpf_dynptr_read(to, len, &bytes, offset, 0);
}

static __always_inline __u32 packet_len(CONTEXT *context)
{
	return context->skb->len;
}

static __always_inline __u32 ingress_ifindex(CONTEXT *context)
{
	return context->skb->skb_iif;
}

#else

#define CONTEXT struct __sk_buff

static __always_inline struct sk_buff *packet_of(CONTEXT *context)
{
	return bpf_cast_to_kern_ctx(context);
}

static __always_inline int load_bytes(CONTEXT *context, __u32 offset, void *to, __u32 len)
{
	return bpf_skb_load_bytes(context, offset, to, len);
}

static __always_inline __u32 packet_len(CONTEXT *context)
{
	return context->len;
}

static __always_inline __u32 ingress_ifindex(CONTEXT *context)
{
	return context->ingress_ifindex;
}

#endif

#endif
