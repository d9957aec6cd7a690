/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* What user space hears: events, denials, counters. */
#ifndef BULKHEAD_REPORT_H
#define BULKHEAD_REPORT_H

#include "flow.h"

/* An event about a live connection. 0 if it was handed over, else it is counted as lost. */
static __always_inline int report_conn(const struct conn_key *key, const struct conn *c, __u8 kind,
				       __u8 reason)
{
	struct event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);

	if (!e) {
		count(COUNTER_LOST_EVENTS);
		return -1;
	}
	e->key = *key;
	e->kind = kind;
	e->direction = c->direction;
	e->verdict = reason == REASON_NONE;
	e->audit = c->audit;
	e->rule = c->rule;
	e->audit_rule = c->audit_rule;
	e->reason = reason;
	e->pad = 0;
	e->peer_port = c->peer_port;
	__builtin_memset(e->more_pad, 0, sizeof(e->more_pad));
	e->peer = c->peer;
	e->opened_ns = c->opened_ns;
	e->last_ns = c->last_ns;
	e->packets[0] = c->packets[0];
	e->packets[1] = c->packets[1];
	e->bytes[0] = c->bytes[0];
	e->bytes[1] = c->bytes[1];
	bpf_ringbuf_submit(e, 0);
	return 0;
}

static __always_inline int report_denial(const struct denial_key *key, const struct denial *d)
{
	struct event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);

	if (!e) {
		count(COUNTER_LOST_EVENTS);
		return -1;
	}
	e->key = key->conn;
	e->kind = EVENT_DENY;
	e->direction = key->direction;
	e->verdict = 0;
	e->audit = d->audit;
	e->rule = d->rule;
	e->audit_rule = d->audit_rule;
	e->reason = d->reason;
	e->pad = 0;
	e->peer_port = d->peer_port;
	__builtin_memset(e->more_pad, 0, sizeof(e->more_pad));
	e->peer = d->peer;
	e->opened_ns = d->first_ns;
	e->last_ns = d->last_ns;
	e->packets[0] = d->packets;
	e->packets[1] = 0;
	e->bytes[0] = d->bytes;
	e->bytes[1] = 0;
	bpf_ringbuf_submit(e, 0);
	return 0;
}

static __always_inline void count_denial(struct denial *d, const struct flow *f)
{
	__sync_fetch_and_add(&d->packets, f->packets);
	__sync_fetch_and_add(&d->bytes, f->p.len);
	d->last_ns = f->now;
}

static __always_inline int deny_without_entry(__u32 reason)
{
	count(reason < REASONS ? reason : REASON_MALFORMED);
	return DROP;
}

/* Refuses a packet of a connection that began in `direction`: counted exactly, reported once. `silent`:
 * the caller has reported already. A global function: verified once, whoever calls. */
__noinline int deny(const struct flow *f, const struct answer *a, int direction, int silent)
{
	struct denial_key key = {};
	struct denial fresh = {}, *d;
	long error;

	if (!f || !a)
		return DROP;
	deny_without_entry(a->reason);
	key.conn = f->key;
	key.direction = direction;
	d = bpf_map_lookup_elem(&denials, &key);
	if (d) {
		count_denial(d, f);
		return DROP;
	}
	fresh.rule = a->rule;
	fresh.audit_rule = a->audit_rule;
	fresh.reason = a->reason;
	fresh.audit = a->audit;
	fresh.peer = *real_peer(f);
	fresh.peer_port = real_peer_port(f);
	fresh.packets = f->packets;
	fresh.bytes = f->p.len;
	fresh.first_ns = f->now;
	fresh.last_ns = f->now;
	fresh.reported_packets = f->packets;
	fresh.reported_bytes = f->p.len;
	/* Stored before it is told: only the one who made the entry tells. */
	error = bpf_map_update_elem(&denials, &key, &fresh, BPF_NOEXIST);
	if (error) {
		d = bpf_map_lookup_elem(&denials, &key);
		if (d)
			count_denial(d, f);
		else
			count(COUNTER_UNRECORDED + (a->reason < REASONS ? a->reason : 0));
		return DROP;
	}
	if (!silent && report_denial(&key, &fresh)) {
		d = bpf_map_lookup_elem(&denials, &key);
		if (d) {
			d->reported_packets = 0;
			d->reported_bytes = 0;
		}
	}
	return DROP;
}

#endif
