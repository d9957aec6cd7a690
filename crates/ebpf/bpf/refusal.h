/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* `reject`: whoever is refused is told. The programs only say whom (netfilter's may send nothing); user space answers
 * for the other end by a socket of its own (src/refusal.rs), whose packets are known here by that socket. */
#ifndef BULKHEAD_REFUSAL_H
#define BULKHEAD_REFUSAL_H

#include "translation.h"

/* What may be said to whoever is refused: it opens nothing. */
static __always_inline int ends_something(const struct flow *f)
{
	return f->icmp == ICMP_IS_ERROR || (f->p.protocol == IPPROTO_TCP && f->p.tcp_flags & TCP_RST);
}

/* Whether user space says this for somebody. What a workload sends is never that, whoever has set what on its packet. */
static __always_inline int is_refusal(CONTEXT *context, const struct flow *f)
{
	struct config *configured = configuration();
	__u64 cookie;

	if (!configured || !ends_something(f) || (f->direction == DIR_EGRESS && !(f->key.subject & SUBJECT_HOST)))
		return 0;
	cookie = cookie_of(packet_of(context));
	return cookie && (cookie == configured->refusers[0] || cookie == configured->refusers[1]);
}

/* Has this packet's sender told. Its addresses are those that it used itself. */
__noinline int tell_refused(CONTEXT *context, const struct flow *f)
{
	struct nf_conntrack_tuple *tuple;
	struct refusal *r;
	__u32 header;
	int from;

	if (!f || ends_something(f) || f->p.frag == FRAG_LATER)
		return 0;
	if (!within_budget(budget_of(&refusals, f->key.subject), f->now, REFUSAL_SPAN / REFUSALS_AT_ONCE, REFUSAL_SPAN)) {
		count(COUNTER_UNTOLD);
		return 0;
	}
	r = bpf_ringbuf_reserve(&events, sizeof(*r), 0);
	if (!r) {
		count(COUNTER_UNTOLD);
		return 0;
	}
	__builtin_memset(r, 0, sizeof(*r));
	r->key = f->key;
	r->kind = EVENT_REFUSE;
	r->direction = f->direction;
	r->live = f->reject == REJECT_LIVE;
	header = f->p.l4 - f->p.l3;
	r->len = f->p.len > header ? f->p.len - header : 0;
	tuple = telling_tuple(context, f);
	from = f->direction == DIR_EGRESS;
	if (tuple) {
		READ_END(tuple, src, f, from ? &r->key.local : &r->key.peer,
			 from ? &r->key.local_port : &r->key.peer_port);
		READ_END(tuple, dst, f, from ? &r->key.peer : &r->key.local,
			 from ? &r->key.peer_port : &r->key.local_port);
	}
	/* Shorter ones are of protocols that have no such header. */
	if (load_bytes(context, f->p.l4, r->l4, sizeof(r->l4)))
		load_bytes(context, f->p.l4, r->l4, 8);
	bpf_ringbuf_submit(r, 0);
	return 0;
}

#endif
