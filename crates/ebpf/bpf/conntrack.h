/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* Live connections: expiry, counting, TCP state, creation. */
#ifndef BULKHEAD_CONNTRACK_H
#define BULKHEAD_CONNTRACK_H

#include "report.h"

#define CONN_CLOSED(flags)                                                                            \
	((flags) & CONN_RST ||                                                                        \
	 ((flags) & (CONN_FIN_FORWARD | CONN_FIN_REVERSE)) == (CONN_FIN_FORWARD | CONN_FIN_REVERSE))

/* Also in src/sweep.rs. */
static __always_inline __u64 timeout_of(__u8 protocol, __u32 flags)
{
	if (flags & CONN_REVOKED)
		return protocol == IPPROTO_TCP ? TIMEOUT_REVOKED_TCP : TIMEOUT_REVOKED_OTHER;
	switch (protocol) {
	case IPPROTO_TCP:
		if (CONN_CLOSED(flags))
			return TIMEOUT_TCP_CLOSING;
		return flags & CONN_REPLIED ? TIMEOUT_TCP_ESTABLISHED : TIMEOUT_TCP_SYN;
	case IPPROTO_UDP:
	case PROTO_UDPLITE:
		return flags & CONN_REPLIED ? TIMEOUT_UDP_REPLIED : TIMEOUT_UDP_UNREPLIED;
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		return TIMEOUT_ICMP;
	default:
		return TIMEOUT_OTHER;
	}
}

static __always_inline int is_expired(const struct conn *c, __u8 protocol, __u64 now)
{
	__u64 last = c->last_ns;

	/* Another CPU may have been here with a later clock. */
	return now > last && now - last > timeout_of(protocol, c->flags);
}

/* The state bits that a packet adds to its connection. */
static __always_inline __u32 state_bits(const struct flow *f, __u8 direction)
{
	int forward = f->direction == direction;
	__u32 bits = 0;

	if (!forward)
		bits |= CONN_REPLIED;
	if (f->p.protocol != IPPROTO_TCP)
		return bits;
	/* Without SYN the handshake is behind us, also when we have not seen it. */
	if (!(f->p.tcp_flags & TCP_SYN))
		bits |= CONN_REPLIED;
	if (f->p.tcp_flags & TCP_FIN)
		bits |= forward ? CONN_FIN_FORWARD : CONN_FIN_REVERSE;
	if (f->p.tcp_flags & TCP_RST)
		bits |= CONN_RST;
	return bits;
}

static __always_inline __u64 half_open_cost(void)
{
	__u32 zero = 0;
	__u64 *cost = bpf_map_lookup_elem(&half_open_ns, &zero);

	return cost ? *cost : 0;
}

/* Whether an endpoint may have one more entry that nobody has answered yet. `conns` forgets the least recently used
 * one for it, whosesoever that is: none may fill it with its own. An entry counts for as long as it is kept, without
 * anybody keeping count: each takes its share of HALF_OPEN_SPAN, which passes by itself. */
__noinline int may_be_half_open(__u32 subject, __u64 now)
{
	return within_budget(budget_of(&half_open, subject), now, half_open_cost(), HALF_OPEN_SPAN);
}

/* Somebody has answered. */
__noinline int was_answered(__u32 subject, __u64 now)
{
	__u64 *until = budget_of(&half_open, subject);

	if (until && *until > now)
		__sync_fetch_and_add(until, -half_open_cost());
	return 0;
}

/* Counts a packet of a live connection and follows its state. */
static __always_inline void track(const struct flow *f, struct conn *c)
{
	__u32 side = f->direction == c->direction ? 0 : 1;
	__u32 bits = state_bits(f, c->direction), before = c->flags;

	__sync_fetch_and_add(&c->packets[side], f->packets);
	__sync_fetch_and_add(&c->bytes[side], f->p.len);
	c->last_ns = f->now;
	if ((before & bits) == bits)
		return;
	before = __sync_fetch_and_or(&c->flags, bits);
	if (bits & ~before & CONN_REPLIED)
		was_answered(f->key.subject, f->now);
	if (!CONN_CLOSED(before) && CONN_CLOSED(before | bits) && !report_conn(&f->key, c, EVENT_CLOSE, REASON_NONE))
		__sync_fetch_and_or(&c->flags, CONN_CLOSE_REPORTED);
}

/* Makes the entry of a connection that is allowed in `direction`, over `old` if there is one. */
__noinline int admit(const struct flow *f, const struct answer *a, int direction, int replace)
{
	struct conn fresh = {}, *c;
	__u32 bits, side;

	if (!f || !a)
		return DROP;
	side = f->direction == direction ? 0 : 1;
	bits = state_bits(f, direction);
	/* A reset about nothing we know: let through, but no connection. */
	if (bits & CONN_RST)
		return PASS;
	/* Let through without an entry, the answer to a SYN makes one: it is judged in both orientations. Nothing is told
	 * of it until then. */
	if (!(bits & CONN_REPLIED) && !replace && !may_be_half_open(f->key.subject, f->now)) {
		count(COUNTER_LOST_EVENTS);
		return PASS;
	}
	fresh.rule = a->rule;
	fresh.audit_rule = a->audit_rule;
	fresh.audit = a->audit;
	fresh.revision = f->revision;
	fresh.direction = direction;
	fresh.peer = *real_peer(f);
	fresh.peer_port = real_peer_port(f);
	fresh.flags = bits | CONN_OPEN_REPORTED;
	if (f->local_own)
		fresh.flags |= CONN_LOCAL_OWN;
	if (f->from_host && direction == DIR_INGRESS)
		fresh.flags |= CONN_FROM_HOST;
	fresh.opened_ns = f->now;
	fresh.last_ns = f->now;
	fresh.packets[side] = f->packets;
	fresh.bytes[side] = f->p.len;
	if (bpf_map_update_elem(&conns, &f->key, &fresh, replace ? BPF_ANY : BPF_NOEXIST)) {
		/* Another CPU was first with the same connection; or there is no memory, and the next
		 * packet will be judged again. */
		c = bpf_map_lookup_elem(&conns, &f->key);
		if (c)
			track(f, c);
		return PASS;
	}
	if (report_conn(&f->key, &fresh, EVENT_OPEN, REASON_NONE)) {
		/* The sweep will report it as opened. */
		c = bpf_map_lookup_elem(&conns, &f->key);
		if (c)
			__sync_fetch_and_and(&c->flags, ~CONN_OPEN_REPORTED);
	}
	return PASS;
}

#endif
