// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/* The two programs on the host side of a workload's interface. An established packet costs one look-up
 * in `conns`; everything else goes through slow_path(). */
#include "conntrack.h"
#include "fragment.h"
#include "infra.h"
#include "parse.h"
#include "related.h"

__noinline int ask(const struct flow *f, int direction, struct answer *answer)
{
	struct question question;

	if (!f || !answer)
		return 0;
	question = (struct question){
		.binding = f->binding,
		.own = { .ifindex = f->key.ifindex, .addr = f->key.peer },
		.port_key = port_key_of(&f->key, f->icmp, direction),
		.source_port = source_port_of(&f->key, f->icmp, direction),
		.direction = direction,
	};
	if (f->from_host && direction == DIR_INGRESS)
		question.flags |= QUESTION_FROM_HOST;
	if (f->local_own && bpf_map_lookup_elem(&endpoint_addrs, &question.own))
		question.flags |= QUESTION_SELF;
	question.peer.prefixlen = 128;
	return judge(&question, answer);
}

/* A live connection that was judged under an older revision, in its original orientation. */
__noinline int judge_again(struct flow *f)
{
	struct answer answer = {};
	struct conn *c;
	int direction, changed;

	if (!f)
		return DROP;
	c = bpf_map_lookup_elem(&conns, &f->key);
	if (!c)
		return DROP;
	direction = c->direction;
	f->from_host = !!(c->flags & CONN_FROM_HOST);
	ask(f, direction, &answer);
	changed = c->rule != answer.rule || c->audit_rule != answer.audit_rule || c->audit != answer.audit;
	if (answer.allow) {
		int reopened = c->flags & CONN_REVOKED;

		c->rule = answer.rule;
		c->audit_rule = answer.audit_rule;
		c->audit = answer.audit;
		__sync_fetch_and_and(&c->flags, ~CONN_REVOKED);
		if (f->local_own)
			__sync_fetch_and_or(&c->flags, CONN_LOCAL_OWN);
		else
			__sync_fetch_and_and(&c->flags, ~CONN_LOCAL_OWN);
		c->revision = f->revision;
		if (changed || reopened)
			report_conn(&f->key, c, EVENT_CHANGE, REASON_NONE);
		track(f, c);
		return PASS;
	}
	/* The entry stays as a tombstone. Were it deleted, the next packet could open the connection again
	 * in the other orientation, and a revoked rule would cut nothing. */
	if (!(c->flags & CONN_REVOKED)) {
		c->rule = answer.rule;
		c->audit_rule = answer.audit_rule;
		c->audit = answer.audit;
		__sync_fetch_and_or(&c->flags, CONN_REVOKED);
		report_conn(&f->key, c, EVENT_CHANGE, REASON_REVOKED);
	}
	c->last_ns = f->now;
	c->revision = f->revision;
	answer.reason = REASON_REVOKED;
	return deny(f, &answer, direction, 1);
}

/* A packet of a revoked connection, under the revision that revoked it. */
static __always_inline int refuse_revoked(const struct flow *f, struct conn *c)
{
	struct answer answer = {};

	if (f->p.protocol == IPPROTO_TCP)
		c->last_ns = f->now;
	answer.rule = c->rule;
	answer.audit_rule = c->audit_rule;
	answer.audit = c->audit;
	answer.reason = REASON_REVOKED;
	return deny(f, &answer, c->direction, 1);
}

/* Nobody knows this connection: which orientations may it have, and does one of them allow it? */
static __always_inline int judge_new(struct __sk_buff *skb, struct flow *f, int existing)
{
	int sender = f->direction, receiver = !f->direction;
	int tcp = f->p.protocol == IPPROTO_TCP, as_sender = 1, as_receiver = 0;
	struct answer answer = {}, second = {};

	if (tcp && !is_pure_syn(f)) {
		/* Its entry may have been evicted: whoever began, if that was allowed, it goes on. */
		as_receiver = 1;
		as_sender = !(f->p.tcp_flags & TCP_SYN);
	} else if (f->icmp == ICMP_IS_REPLY) {
		as_receiver = 1;
		as_sender = 0;
	}
	if (as_sender) {
		ask(f, sender, &answer);
		if (answer.allow)
			return admit(f, &answer, sender, existing);
	}
	if (as_receiver) {
		ask(f, receiver, &second);
		if (second.allow)
			return admit(f, &second, receiver, existing);
	}
	if (f->icmp == ICMP_IS_ERROR && is_related(skb, f))
		return PASS;
	return as_sender ? deny(f, &answer, sender, 0) : deny(f, &second, receiver, 0);
}

/* Everything but a current connection. */
__noinline int slow_path(struct __sk_buff *skb, struct flow *f)
{
	struct answer answer = {};
	int existing, syn;
	struct conn *c;

	if (!f)
		return DROP;
	f->now = bpf_ktime_get_ns();
	f->binding = binding_of(f->key.ifindex);
	f->from_host = f->direction == DIR_INGRESS && skb->ingress_ifindex == 0;
	if (is_infrastructure(&f->p, f->direction)) {
		if (!is_programmed(f->binding, f->direction))
			return deny_without_entry(REASON_UNPROGRAMMED);
		if (infrastructure_source_ok(f))
			return PASS;
	}
	if (!is_programmed(f->binding, f->direction)) {
		answer_builtin(&answer, RULE_UNPROGRAMMED, 0, REASON_UNPROGRAMMED);
		return deny(f, &answer, f->direction, 0);
	}
	if (!source_ok(f)) {
		answer_builtin(&answer, RULE_SPOOFED, 0, REASON_SPOOFED);
		return deny(f, &answer, f->direction, 0);
	}
	c = bpf_map_lookup_elem(&conns, &f->key);
	existing = c != NULL;
	syn = is_pure_syn(f);
	if (c && !is_expired(c, f->key.protocol, f->now)) {
		if (!syn) {
			if (c->revision != f->revision)
				return judge_again(f);
			if (c->flags & CONN_REVOKED)
				return refuse_revoked(f, c);
			/* Current: its local address is not the endpoint's own, and has been looked at above. */
			track(f, c);
			return PASS;
		}
		if (c->direction == f->direction && !(c->flags & (CONN_REPLIED | CONN_REVOKED))) {
			/* The same SYN again. */
			ask(f, f->direction, &answer);
			if (!answer.allow)
				return deny(f, &answer, f->direction, 0);
			if (c->revision != f->revision)
				return judge_again(f);
			track(f, c);
			return PASS;
		}
	}
	return judge_new(skb, f, existing);
}

static __always_inline int fast_path(const struct flow *f)
{
	struct conn *c;
	__u32 flags;

	if (is_pure_syn(f))
		return 0;
	c = bpf_map_lookup_elem(&conns, &f->key);
	if (!c || c->revision != f->revision)
		return 0;
	flags = c->flags;
	if (flags & CONN_REVOKED || is_expired(c, f->key.protocol, f->now))
		return 0;
	/* Anti-spoofing was settled when the entry was made, if the address is the endpoint's own. */
	if (f->direction == DIR_EGRESS && !(flags & CONN_LOCAL_OWN))
		return 0;
	track(f, c);
	return 1;
}

static __always_inline int handle(struct __sk_buff *skb, __u8 direction)
{
	struct config *configured = configuration();
	__u32 ifindex = skb->ifindex;
	struct flow f = {};
	int parsed;
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
	reason = f.p.frag ? follow_fragment(&f, ifindex) : REASON_NONE;
	if (reason) {
		struct answer answer = {};

		make_key(&f.key, &f.p, ifindex, direction);
		if (is_programmed(binding_of(ifindex), direction))
			answer_builtin(&answer, RULE_MALFORMED, 0, reason);
		else
			answer_builtin(&answer, RULE_UNPROGRAMMED, 0, REASON_UNPROGRAMMED);
		return deny(&f, &answer, direction, 0);
	}
	f.icmp = make_key(&f.key, &f.p, ifindex, direction);
	if (fast_path(&f))
		return PASS;
	return slow_path(skb, &f);
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
