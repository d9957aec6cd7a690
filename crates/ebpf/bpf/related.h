/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* ICMP errors pass with the connection that they quote. */
#ifndef BULKHEAD_RELATED_H
#define BULKHEAD_RELATED_H

#include "conntrack.h"

/* Room for the quoted packet, which the stack has none for. */
struct quoted {
	struct packet p;
	struct conn_key key;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct quoted);
} scratch SEC(".maps");

/* `peer` and its port: who it really is, as far as known. */
static __always_inline int quoted_allows(const struct flow *f, const struct quoted *quoted, const struct addr *peer,
					 __u16 peer_port, int icmp, __u8 direction, int from_host)
{
	struct question question = {
		.peer = { .prefixlen = 128, .addr = *peer },
		.binding = f->binding,
		.port_key = port_key_of(&quoted->key, peer_port, icmp, direction),
		.source_port = source_port_of(&quoted->key, peer_port, icmp, direction),
		.direction = direction,
		.flags = from_host ? QUESTION_FROM_HOST : 0,
	};
	struct answer answer = {};

	judge(&question, &answer);
	return answer.allow;
}

/* Whether an ICMP error is about a connection that is allowed. */
__noinline int is_related(CONTEXT *context, const struct flow *f)
{
	__u32 zero = 0;
	struct quoted *quoted = bpf_map_lookup_elem(&scratch, &zero);
	struct conn *c;
	__u8 icmp;

	if (!f || !quoted || f->p.frag)
		return 0;
	__builtin_memset(quoted, 0, sizeof(*quoted));
	quoted->p.l3 = f->p.l4 + 8;
	if (parse_ip(context, &quoted->p, f->p.v6, 1) != PARSED_IP || quoted->p.frag == FRAG_LATER)
		return 0;
	/* The quoted packet went the other way. */
	icmp = make_key(&quoted->key, &quoted->p, f->key.subject, !f->direction);
	if (icmp == ICMP_IS_ERROR)
		return 0;
	/* Of what is forwarded neither end is the endpoint's own, and any router may be the one who complains. */
	if ((f->key.subject & SUBJECT_KIND) != SUBJECT_FORWARDED && !same_addr(&quoted->key.local, &f->key.local))
		return 0;
	c = bpf_map_lookup_elem(&conns, &quoted->key);
	if (c && !(c->flags & CONN_REVOKED) && !is_expired(c, quoted->key.protocol, f->now)) {
		if (c->revision == f->revision)
			return 1;
		return quoted_allows(f, quoted, &c->peer, c->peer_port, icmp, c->direction,
				     !!(c->flags & CONN_FROM_HOST));
	}
	if (c && c->flags & CONN_REVOKED)
		return 0;
	return quoted_allows(f, quoted, &quoted->key.peer, quoted->key.peer_port, icmp, DIR_INGRESS, 0) ||
	       quoted_allows(f, quoted, &quoted->key.peer, quoted->key.peer_port, icmp, DIR_EGRESS, 0);
}

#endif
