/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* From a packet to PASS or DROP, the same at every hook. An established packet costs one look-up in `conns`
 * (fast_path); everything else goes through slow_path(). */
#ifndef BULKHEAD_VERDICT_H
#define BULKHEAD_VERDICT_H

#include "conntrack.h"
#include "fragment.h"
#include "infra.h"
#include "refusal.h"
#include "related.h"

__noinline int ask(const struct flow *f, int direction, struct answer *answer)
{
	struct question question;

	if (!f || !answer)
		return 0;
	/* What a process asks of the loopback addresses, whoever receives it decides. */
	if ((f->key.subject & SUBJECT_KIND) == SUBJECT_CGROUP && direction == DIR_EGRESS && is_loopback(real_peer(f))) {
		answer_builtin(answer, RULE_SELF_TRAFFIC, 1, REASON_NONE);
		return 0;
	}
	question = (struct question){
		.binding = f->binding,
		.own = { .subject = f->key.subject, .addr = *real_peer(f) },
		.port_key = port_key_of(&f->key, real_peer_port(f), f->icmp, direction),
		.source_port = source_port_of(&f->key, real_peer_port(f), f->icmp, direction),
		.direction = direction,
	};
	if (f->from_host && direction == DIR_INGRESS)
		question.flags |= QUESTION_FROM_HOST;
	if (f->local_own && bpf_map_lookup_elem(&endpoint_addrs, &question.own))
		question.flags |= QUESTION_SELF;
	question.peer.prefixlen = 128;
	return judge(&question, answer);
}

/* A live connection that was judged under an older revision, in its original orientation. Before the kernel rewrites
 * a packet only the entry knows where it goes. */
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
	if (f->stage != STAGE_FINAL)
		set_real_peer(f, &c->peer, c->peer_port);
	f->from_host = !!(c->flags & CONN_FROM_HOST);
	ask(f, direction, &answer);
	changed = c->rule != answer.rule || c->audit_rule != answer.audit_rule || c->audit != answer.audit;
	if (answer.allow) {
		int reopened = c->flags & CONN_REVOKED;

		c->rule = answer.rule;
		c->audit_rule = answer.audit_rule;
		c->audit = answer.audit;
		__sync_fetch_and_and(&c->flags, ~(CONN_REVOKED | CONN_REJECT));
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
	if (answer.reject)
		__sync_fetch_and_or(&c->flags, CONN_REJECT);
	else
		__sync_fetch_and_and(&c->flags, ~CONN_REJECT);
	c->last_ns = f->now;
	c->revision = f->revision;
	f->reject = answer.reject ? REJECT_LIVE : 0;
	answer.reason = REASON_REVOKED;
	return deny(f, &answer, direction, 1);
}

/* A packet of a revoked connection, under the revision that revoked it. */
static __always_inline int refuse_revoked(struct flow *f, struct conn *c)
{
	struct answer answer = {};

	if (f->p.protocol == IPPROTO_TCP)
		c->last_ns = f->now;
	answer.rule = c->rule;
	answer.audit_rule = c->audit_rule;
	answer.audit = c->audit;
	answer.reason = REASON_REVOKED;
	f->reject = c->flags & CONN_REJECT ? REJECT_LIVE : 0;
	return deny(f, &answer, c->direction, 1);
}

/* Nobody knows this connection: which orientations may it have, and does one of them allow it? */
static __always_inline int judge_new(CONTEXT *context, struct flow *f, int existing)
{
	int sender = f->direction, receiver = !f->direction;
	int tcp = f->p.protocol == IPPROTO_TCP, as_sender = 1, as_receiver = 0;
	struct answer answer = {};

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
		ask(f, receiver, &answer);
		if (answer.allow)
			return admit(f, &answer, receiver, existing);
	}
	if (f->icmp == ICMP_IS_ERROR && is_related(context, f))
		return PASS;
	/* Again, rather than a second answer on the stack. */
	if (as_sender && as_receiver)
		ask(f, sender, &answer);
	f->reject = answer.reject ? REJECT_NEW : 0;
	return deny(f, &answer, as_sender ? sender : receiver, 0);
}

/* The entry speaks of a connection with the same ports that went elsewhere. */
static __always_inline int has_moved(const struct flow *f, const struct conn *c)
{
	return f->stage == STAGE_FINAL &&
	       (c->peer_port != real_peer_port(f) || !same_addr(&c->peer, real_peer(f)));
}

/* A packet of a live connection that is no new beginning of it. */
static __always_inline int go_on(struct flow *f, struct conn *c)
{
	if (c->revision != f->revision)
		return judge_again(f);
	if (c->flags & CONN_REVOKED)
		return refuse_revoked(f, c);
	/* Counted where it was met first. */
	if (f->counted) {
		f->packets = 0;
		f->p.len = 0;
	}
	track(f, c);
	return PASS;
}

/* Refuses for a reason that no policy has. */
__noinline int deny_builtin(const struct flow *f, __u32 rule, __u32 reason)
{
	struct answer answer;

	if (!f)
		return DROP;
	answer_builtin(&answer, rule, 0, reason);
	return deny(f, &answer, f->direction, 0);
}

/* Finds the connection of a packet, which for a later fragment takes its first. PASS, or DROP if there is none. */
static __always_inline int follow(struct flow *f, __u32 subject)
{
	__u32 reason = f->p.frag ? follow_fragment(f, subject) : REASON_NONE;

	f->icmp = make_key(&f->key, &f->p, subject, f->direction);
	if (!reason)
		return PASS;
	return is_programmed(binding_of(subject), f->direction) ?
		       deny_builtin(f, RULE_MALFORMED, reason) :
		       deny_builtin(f, RULE_UNPROGRAMMED, REASON_UNPROGRAMMED);
}

static __always_inline int judge_packet(CONTEXT *context, struct flow *f)
{
	int live, moved = 0, syn, result;
	struct conn *c;

	f->now = bpf_ktime_get_ns();
	f->binding = binding_of(f->key.subject);
	if (!(f->key.subject & SUBJECT_KIND))
		f->from_host = f->direction == DIR_INGRESS && !ingress_ifindex(context);
	/* None of that is forwarded. */
	if ((f->key.subject & SUBJECT_KIND) != SUBJECT_FORWARDED && is_infrastructure(&f->p, f->direction)) {
		if (!is_programmed(f->binding, f->direction))
			return deny_without_entry(REASON_UNPROGRAMMED);
		if (infrastructure_source_ok(f))
			return PASS;
	}
	if (!is_programmed(f->binding, f->direction))
		return deny_builtin(f, RULE_UNPROGRAMMED, REASON_UNPROGRAMMED);
	if (!source_ok(f))
		return deny_builtin(f, RULE_SPOOFED, REASON_SPOOFED);
	c = bpf_map_lookup_elem(&conns, &f->key);
	syn = is_pure_syn(f);
	live = c && !is_expired(c, f->key.protocol, f->now);
	if (live) {
		moved = has_moved(f, c);
		/* A SYN begins anew, unless it is one that nobody has answered yet, again: the kernel may by then have
		 * chosen somebody else. */
		if (!moved && (!syn || (f->stage != STAGE_EARLY && c->direction == f->direction &&
					!(c->flags & (CONN_REPLIED | CONN_REVOKED)))))
			return go_on(f, c);
	}
	/* Errors speak of a connection as this endpoint sees it: there is no better place to judge them. */
	if (f->stage == STAGE_EARLY && f->icmp != ICMP_IS_ERROR)
		return DEFER;
	if (moved && !(c->flags & (CONN_CLOSE_REPORTED | CONN_REVOKED)))
		report_conn(&f->key, c, EVENT_CLOSE, REASON_NONE);
	result = judge_new(context, f, c != NULL);
	/* Or its next packet would pass as one of the connection that was allowed. */
	if (moved && result == DROP)
		bpf_map_delete_elem(&conns, &f->key);
	return result;
}

/* Everything but a current connection. Answers PASS, DROP or DEFER. */
__noinline int slow_path(CONTEXT *context, struct flow *f)
{
	int result;

	if (!f)
		return DROP;
	if (is_refusal(context, f))
		return PASS;
	result = judge_packet(context, f);
	if (result == DROP && f->reject)
		tell_refused(context, f);
	return result;
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

#endif
