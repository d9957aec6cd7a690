/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* What the kernel's connection tracking knows of a packet that was rewritten: who sent it, and whom it called. */
#ifndef BULKHEAD_TRANSLATION_H
#define BULKHEAD_TRANSLATION_H

#include "flow.h"

/* An address of the kernel's connection tracking. */
static __always_inline void read_address(struct addr *to, const void *from, int v6)
{
	__u32 v4 = 0;

	if (v6) {
		bpf_probe_read_kernel(to, sizeof(*to), from);
		return;
	}
	bpf_probe_read_kernel(&v4, sizeof(v4), from);
	map_v4(to, v4);
}

static __always_inline __u16 read_port(const void *from)
{
	__be16 port = 0;

	bpf_probe_read_kernel(&port, sizeof(port), from);
	return bpf_ntohs(port);
}

/* One end of a tuple: `SIDE` is src or dst. */
#define READ_END(tuple, SIDE, f, address, port)                                                                \
	do {                                                                                                   \
		read_address(address, __builtin_preserve_access_index(&(tuple)->SIDE.u3), (f)->p.v6);          \
		if (has_ports((f)->p.protocol))                                                                \
			*(port) = read_port(__builtin_preserve_access_index(&(tuple)->SIDE.u.all));            \
	} while (0)

/* The packet's tuple as its sender made it; NULL if there is none that says anything: an error is tracked with the
 * connection that it speaks of, and its sender is none of its ends. */
static __always_inline struct nf_conntrack_tuple *telling_tuple(CONTEXT *context, const struct flow *f)
{
	return f->icmp == ICMP_IS_ERROR ? NULL : tuple_as_sent(tracking_of(packet_of(context)));
}

/* Masquerading may have hidden who sends it. */
static __always_inline void find_real_source(CONTEXT *context, struct flow *f)
{
	struct nf_conntrack_tuple *tuple = telling_tuple(context, f);

	if (tuple)
		READ_END(tuple, src, f, &f->p.src, &f->p.sport);
}

/* Whom the sender called: the key of its connection. */
static __always_inline void find_dialled(CONTEXT *context, struct flow *f)
{
	struct nf_conntrack_tuple *tuple = telling_tuple(context, f);

	if (tuple)
		READ_END(tuple, dst, f, &f->key.peer, &f->key.peer_port);
}

/* As whom it sent, where masquerading has been before the program. */
static __always_inline void find_local(CONTEXT *context, struct flow *f)
{
	struct nf_conntrack_tuple *tuple = telling_tuple(context, f);

	if (tuple)
		READ_END(tuple, src, f, &f->key.local, &f->key.local_port);
}

#endif
