/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* The tables. Sizes here are placeholders: the loader sets them from `Capacities`. */
#ifndef BULKHEAD_MAPS_H
#define BULKHEAD_MAPS_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "abi.h"

/* Banks: a replacement fills a free slot. Inner maps are declared by sizes, since
 * clang 14 emits no BTF for types that only an inner map uses. */
#define BANK_TABLE(name, inner_type, inner_flags, inner_key, inner_value) \
	struct {                                                          \
		__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);                 \
		__uint(max_entries, BANKS);                               \
		__uint(key_size, sizeof(__u32));                          \
		__array(values, struct {                                  \
			__uint(type, inner_type);                         \
			__uint(map_flags, inner_flags);                   \
			__uint(max_entries, 1);                           \
			__uint(key_size, inner_key);                      \
			__uint(value_size, inner_value);                  \
		});                                                       \
	} name SEC(".maps")

BANK_TABLE(addr_exact, BPF_MAP_TYPE_HASH, BPF_F_NO_PREALLOC, sizeof(struct addr), sizeof(struct class_entry));
BANK_TABLE(addr_lpm, BPF_MAP_TYPE_LPM_TRIE, BPF_F_NO_PREALLOC, sizeof(struct lpm_key), sizeof(struct class_entry));
BANK_TABLE(rows, BPF_MAP_TYPE_HASH, BPF_F_NO_PREALLOC, sizeof(struct row_key), sizeof(struct row));
BANK_TABLE(steps, BPF_MAP_TYPE_ARRAY, BPF_F_MMAPABLE | BPF_F_INNER_MAP, sizeof(__u32), sizeof(struct step));
BANK_TABLE(cells, BPF_MAP_TYPE_ARRAY, BPF_F_MMAPABLE | BPF_F_INNER_MAP, sizeof(__u32), sizeof(struct cell));
BANK_TABLE(variants, BPF_MAP_TYPE_ARRAY, BPF_F_MMAPABLE | BPF_F_INNER_MAP, sizeof(__u32), sizeof(struct variant));

/* Subject -> index into bindings. Never overwritten, so a reader never sees a recycled element that
 * belongs to another interface (user space waits for a grace period after deletions). */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} endpoints SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} bindings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct endpoint_addr_key);
	__type(value, __u32);
} endpoint_addrs SEC(".maps");

/* Address -> the endpoint on this host that uses it (one of them, if several do). */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct addr);
	__type(value, __u32);
} owners SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct conn_key);
	__type(value, struct conn);
} conns SEC(".maps");

/* By index into bindings: until when an endpoint's connections that nobody has answered count against it. Each
 * puts that off by the only element of `half_open_ns`. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} half_open SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} half_open_ns SEC(".maps");

/* By index into bindings: the same of refusals that were told, each of which costs its part of REFUSAL_SPAN. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} refusals SEC(".maps");

/* Not LRU: refused packets are counted exactly, and a flood of them evicts nothing. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct denial_key);
	__type(value, struct denial);
} denials SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct frag_key);
	__type(value, struct frag);
} frags SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct config);
} config SEC(".maps");

static __always_inline struct config *configuration(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&config, &zero);
}

static __always_inline void count(__u32 index)
{
	__u64 *counter = bpf_map_lookup_elem(&counters, &index);

	if (counter)
		__sync_fetch_and_add(counter, 1);
}

/* An endpoint's element of an array by index into bindings. */
static __always_inline __u64 *budget_of(void *budgets, __u32 subject)
{
	__u32 *slot = bpf_map_lookup_elem(&endpoints, &subject);

	return slot ? bpf_map_lookup_elem(budgets, slot) : NULL;
}

/* Whether one more thing fits into a budget: each puts off the time until which the budget is in use by its cost, and
 * that may be this far ahead. Nobody keeps count; time itself gives back. No budget: no bound. */
static __always_inline int within_budget(__u64 *until, __u64 now, __u64 cost, __u64 span)
{
	__u64 was;

	if (!until)
		return 1;
	was = *until;
	if (was < now)
		/* Another CPU may have been here meanwhile: then one more than allowed is no harm. */
		__sync_val_compare_and_swap(until, was, now);
	else if (was - now > span)
		return 0;
	__sync_fetch_and_add(until, cost);
	return 1;
}

#endif
