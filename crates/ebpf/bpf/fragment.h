/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* Later fragments take ports from their first. */
#ifndef BULKHEAD_FRAGMENT_H
#define BULKHEAD_FRAGMENT_H

#include "flow.h"

static __always_inline void fragment_key(struct frag_key *key, const struct flow *f, __u32 subject)
{
	__builtin_memset(key, 0, sizeof(*key));
	key->subject = subject;
	key->id = f->p.frag_id;
	key->src = f->p.src;
	key->dst = f->p.dst;
	key->protocol = f->p.protocol;
	key->direction = f->direction;
}

/* Remembers a first fragment, completes a later one. Answers why not, or REASON_NONE. */
__noinline int follow_fragment(struct flow *f, __u32 subject)
{
	struct frag_key key;
	struct frag *known;

	if (!f)
		return REASON_MALFORMED;
	fragment_key(&key, f, subject);
	if (f->p.frag == FRAG_FIRST) {
		struct frag first = {
			.sport = f->p.sport,
			.dport = f->p.dport,
			.tcp_flags = f->p.tcp_flags,
			.icmp_type = f->p.icmp_type,
			.icmp_code = f->p.icmp_code,
			.judged = (f->p.l4 - f->p.l3 - f->p.frag_start + judged_len(f->p.protocol) + 7) / 8,
		};

		bpf_map_update_elem(&frags, &key, &first, BPF_ANY);
		return REASON_NONE;
	}
	known = bpf_map_lookup_elem(&frags, &key);
	if (!known)
		return REASON_FRAGMENT_WITHOUT_FIRST;
	/* Would overwrite what its first was judged by. */
	if (f->p.frag_offset < known->judged)
		return REASON_MALFORMED;
	f->p.sport = known->sport;
	f->p.dport = known->dport;
	f->p.tcp_flags = known->tcp_flags;
	f->p.icmp_type = known->icmp_type;
	f->p.icmp_code = known->icmp_code;
	return REASON_NONE;
}

#endif
