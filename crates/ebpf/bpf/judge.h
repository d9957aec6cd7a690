/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* The three look-ups of bulkhead_model::host_policy: address -> class, (policy, class) -> row,
 * (row, source port, port key) -> cell. */
#ifndef BULKHEAD_JUDGE_H
#define BULKHEAD_JUDGE_H

#include "maps.h"
#include "packet.h"

/* The address stands behind the first word of either key: room on the stack is scarce. */
struct question {
	__u64 binding;
	union {
		struct endpoint_addr_key own; /* for whoever fills in QUESTION_SELF */
		struct lpm_key peer;	      /* for judge(): prefixlen is 128 */
	};
	__u32 port_key;
	__u16 source_port; /* of the side that began; 0 for protocols without ports */
	__u8 direction;
	__u8 flags;
};

/* question.flags */
#define QUESTION_FROM_HOST 1 /* began on this host, towards the workload */
#define QUESTION_SELF 2	     /* between the endpoint's own addresses */

struct answer {
	__u32 rule;
	__u32 audit_rule;
	__u8 allow;
	__u8 audit;
	__u8 reason;
	__u8 reject;
};

/* Ties an entry of addr_exact to its key. An overwritten element is recycled at once for another key
 * by the kernel's allocator, and a reader that still holds it must notice. Also in src/layout.rs. */
static __always_inline __u32 addr_tag(const struct addr *a)
{
	return (a->w[0] * 0x9e3779b1U) ^ (a->w[1] * 0x85ebca77U) ^ (a->w[2] * 0xc2b2ae3dU) ^
	       (a->w[3] * 0x27d4eb2fU) ^ 0x165667b1U;
}

/* 0 and the class, or -1 if the bank is not there or is being overwritten under our eyes. */
static __always_inline int class_of(__u32 bank, const struct lpm_key *key, __u32 *class)
{
	const struct addr *addr = &key->addr;
	void *exact = bpf_map_lookup_elem(&addr_exact, &bank);
	void *lpm = bpf_map_lookup_elem(&addr_lpm, &bank);
	__u32 tag = addr_tag(addr);
	__u64 *entry, word;
	int i;

	if (!exact || !lpm)
		return -1;
	for (i = 0; i < 3; i++) {
		entry = bpf_map_lookup_elem(exact, addr);
		if (!entry)
			break;
		word = *(volatile __u64 *)entry;
		if (word >> 32 == tag) {
			*class = (__u32)word;
			return 0;
		}
	}
	if (i == 3)
		return -1;
	entry = bpf_map_lookup_elem(lpm, key);
	*class = CLASS_NOBODY;
	if (!entry)
		return 0;
	word = *(volatile __u64 *)entry;
	/* A block of IPv6 never contains an IPv4 address (bulkhead_model::address). */
	if (!is_v4_mapped(addr) || word >> 32 >= 96)
		*class = (__u32)word;
	return 0;
}

static __always_inline struct row *row_of(__u32 bank, __u32 compiled, __u32 class)
{
	void *table = bpf_map_lookup_elem(&rows, &bank);
	struct row_key key = { .compiled = compiled, .class = class };
	struct row *row;

	if (!table)
		return NULL;
	row = bpf_map_lookup_elem(table, &key);
	if (row)
		return row;
	key.class = CLASS_DEFAULT_ROW;
	return bpf_map_lookup_elem(table, &key);
}

/* Turns a row with variants into the steps for one source port. -1: the bank is not there. */
static __always_inline int choose_variant(__u32 bank, struct row *row, __u32 source_port)
{
	void *table = bpf_map_lookup_elem(&variants, &bank);
	__u32 first = row->first, low = 0, high = row->len & ~ROW_BY_SOURCE_PORT, index;
	struct variant *variant;
	int i;

	if (!table)
		return -1;
	for (i = 0; i < MAX_SOURCE_PROBES && high - low > 1; i++) {
		__u32 middle = (low + high) / 2;

		index = first + middle;
		variant = bpf_map_lookup_elem(table, &index);
		if (!variant)
			return -1;
		if (variant->first_source_port <= source_port)
			low = middle;
		else
			high = middle;
	}
	index = first + low;
	variant = bpf_map_lookup_elem(table, &index);
	if (!variant)
		return -1;
	row->first = variant->first;
	row->len = variant->len;
	return 0;
}

static __always_inline struct cell *cell_of(__u32 bank, const struct row *row, __u32 port_key)
{
	void *table = bpf_map_lookup_elem(&steps, &bank);
	void *contents = bpf_map_lookup_elem(&cells, &bank);
	__u32 first = row->first, low = 0, high = row->len, index;
	struct step *step;
	int i;

	if (!table || !contents)
		return NULL;
	for (i = 0; i < MAX_PROBES && high - low > 1; i++) {
		__u32 middle = (low + high) / 2;

		index = first + middle;
		step = bpf_map_lookup_elem(table, &index);
		if (!step)
			return NULL;
		if (step->first_key <= port_key)
			low = middle;
		else
			high = middle;
	}
	index = first + low;
	step = bpf_map_lookup_elem(table, &index);
	if (!step)
		return NULL;
	index = step->cell;
	return bpf_map_lookup_elem(contents, &index);
}

static __always_inline void answer_builtin(struct answer *a, __u32 rule, int allow, __u8 reason)
{
	a->rule = rule;
	a->audit_rule = rule;
	a->allow = allow;
	a->audit = allow;
	a->reason = reason;
	a->reject = 0;
}

/* What the tables say. A global function: verified once, whoever calls. */
__noinline int judge(const struct question *q, struct answer *a)
{
	__u32 bank, compiled, class = 0;
	struct cell *cell;
	struct row *entry, row;

	if (!q || !a)
		return 0;
	answer_builtin(a, RULE_UNPROGRAMMED, 0, REASON_UNPROGRAMMED);
	compiled = q->binding >> (q->direction == DIR_EGRESS ? BINDING_EGRESS_SHIFT : BINDING_INGRESS_SHIFT) &
		   BINDING_ID_MASK;
	bank = q->binding >> BINDING_BANK_SHIFT & (BANKS - 1);
	if (!(q->binding & BINDING_PRESENT) || !compiled)
		return 0;
	if (q->flags & QUESTION_SELF) {
		answer_builtin(a, RULE_SELF_TRAFFIC, 1, REASON_NONE);
		return 0;
	}
	if (class_of(bank, &q->peer, &class))
		return 0;
	entry = row_of(bank, compiled, class);
	if (!entry)
		return 0;
	row = *entry;
	if (row.len & ROW_BY_SOURCE_PORT && choose_variant(bank, &row, q->source_port))
		return 0;
	cell = cell_of(bank, &row, q->port_key);
	if (!cell)
		return 0;
	a->rule = cell->rule;
	a->audit_rule = cell->audit_rule;
	a->allow = cell->verdict;
	a->audit = cell->audit;
	a->reason = a->allow ? REASON_NONE : REASON_POLICY;
	a->reject = !a->allow && cell->flags & CELL_REJECT;
	if (!a->allow && q->flags & QUESTION_FROM_HOST && !(cell->flags & CELL_WRITTEN)) {
		/* The host reaches its workloads unless a written rule forbids it (DESIGN 4.10). */
		if (a->audit_rule == a->rule) {
			a->audit = 1;
			a->audit_rule = RULE_HOST_TO_WORKLOAD;
		}
		a->rule = RULE_HOST_TO_WORKLOAD;
		a->allow = 1;
		a->reason = REASON_NONE;
	}
	return 0;
}

#endif
