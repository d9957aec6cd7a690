/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* What no policy can take away (neighbour discovery, DHCP) and whose addresses may be used. */
#ifndef BULKHEAD_INFRA_H
#define BULKHEAD_INFRA_H

#include "flow.h"

static __always_inline int is_discovery(const struct packet *p)
{
	if (!p->v6 || p->protocol != IPPROTO_ICMPV6 || p->frag)
		return 0;
	/* Hop limit 255: it has not been routed (RFC 4861). */
	if (p->icmp_type >= 133 && p->icmp_type <= 137)
		return p->hop_limit == 255;
	/* Multicast listener discovery. */
	return (p->icmp_type >= 130 && p->icmp_type <= 132) || p->icmp_type == 143;
}

static __always_inline int is_dhcp(const struct packet *p, __u8 direction)
{
	__u16 client = p->v6 ? 546 : 68, server = p->v6 ? 547 : 67;

	if (p->protocol != IPPROTO_UDP)
		return 0;
	return direction == DIR_EGRESS ? p->sport == client && p->dport == server :
					 p->sport == server && p->dport == client;
}

static __always_inline int is_infrastructure(const struct packet *p, __u8 direction)
{
	return is_discovery(p) || is_dhcp(p, direction);
}

/* Whether the workload may send an infrastructure packet with this source. */
static __always_inline int infrastructure_source_ok(const struct flow *f)
{
	const struct addr *src = &f->p.src;

	if (f->direction == DIR_INGRESS || is_own(f->key.subject, src))
		return 1;
	if (f->p.v6)
		return is_link_local(src) || is_v6_unspecified(src);
	return !src->w[3];
}

/* Whether the workload may use this source at all. Sets local_own. */
static __always_inline int source_ok(struct flow *f)
{
	/* The host may use whatever it routes, and its processes what the kernel lets them bind to. */
	if (f->key.subject & SUBJECT_KIND) {
		f->local_own = 1;
		return 1;
	}
	f->local_own = is_own(f->key.subject, &f->key.local);
	if (f->direction == DIR_INGRESS || f->local_own)
		return 1;
	return f->p.v6 && is_link_local(&f->p.src) && (is_link_local(&f->p.dst) || is_v6_multicast(&f->p.dst));
}

#endif
