/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* One packet on its way through the programs, and whose addresses are whose. */
#ifndef BULKHEAD_FLOW_H
#define BULKHEAD_FLOW_H

#include <linux/pkt_cls.h>

#include "judge.h"
#include "maps.h"
#include "packet.h"

#define ICMP_ECHO_REPLY 0
#define ICMP_ECHO 8
#define ICMP_TIMESTAMP 13
#define ICMP_TIMESTAMP_REPLY 14
#define ICMPV6_ECHO 128
#define ICMPV6_ECHO_REPLY 129

/* Verdicts of the programs. TCX_NEXT lets whoever else is attached have a say. */
#define PASS (-1) /* TCX_NEXT */
#define DROP TC_ACT_SHOT
/* Of slow_path(): to be judged where it is known where the packet goes. */
#define DEFER (-2)

/* flow.icmp */
#define ICMP_IS_QUERY 1
#define ICMP_IS_REPLY 2
#define ICMP_IS_ERROR 3
#define ICMP_IS_OTHER 4

/* flow.stage: whether the kernel may still choose where this packet goes. */
#define STAGE_EARLY 0 /* it may */
#define STAGE_BRIDGED 1 /* it may not, unless somebody plays with hardware addresses: to be looked at again */
#define STAGE_FINAL 2

/* flow.reject */
#define REJECT_NEW 1
#define REJECT_LIVE 2 /* of a connection that was allowed */

struct flow {
	struct packet p;     /* addresses and ports as they really are, where that is known */
	struct conn_key key; /* as the endpoint sees them */
	__u32 revision;
	__u64 now;
	__u64 binding;
	__u32 packets;	/* more than one if the kernel has merged segments */
	__u8 direction; /* of this packet: DIR_EGRESS comes from the workload */
	__u8 from_host;
	__u8 icmp;
	__u8 local_own; /* the local address is one of the endpoint's */
	__u8 stage;
	__u8 counted; /* at an earlier hook */
	__u8 reject;  /* its sender is to be told that it is refused */
};

static __always_inline int is_pure_syn(const struct flow *f)
{
	return f->p.protocol == IPPROTO_TCP && (f->p.tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

/* The kind of an ICMP message; for a reply, *type becomes that of its query. */
static __always_inline __u8 classify_icmp(const struct packet *p, __u8 *type)
{
	*type = p->icmp_type;
	if (p->v6) {
		if (p->icmp_type == ICMPV6_ECHO)
			return ICMP_IS_QUERY;
		if (p->icmp_type == ICMPV6_ECHO_REPLY) {
			*type = ICMPV6_ECHO;
			return ICMP_IS_REPLY;
		}
		return p->icmp_type >= 1 && p->icmp_type <= 4 ? ICMP_IS_ERROR : ICMP_IS_OTHER;
	}
	switch (p->icmp_type) {
	case ICMP_ECHO:
	case ICMP_TIMESTAMP:
		return ICMP_IS_QUERY;
	case ICMP_ECHO_REPLY:
		*type = ICMP_ECHO;
		return ICMP_IS_REPLY;
	case ICMP_TIMESTAMP_REPLY:
		*type = ICMP_TIMESTAMP;
		return ICMP_IS_REPLY;
	case 3:	 /* unreachable */
	case 4:	 /* source quench */
	case 5:	 /* redirect */
	case 11: /* time exceeded */
	case 12: /* parameter problem */
		return ICMP_IS_ERROR;
	default:
		return ICMP_IS_OTHER;
	}
}

/* The connection that a packet belongs to, `direction` being the packet's own. Answers the ICMP kind. */
static __always_inline __u8 make_key(struct conn_key *key, const struct packet *p, __u32 subject, __u8 direction)
{
	int icmp = p->protocol == (p->v6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP);
	int from = direction == DIR_EGRESS;
	__u8 kind = 0, type;

	key->subject = subject;
	key->protocol = p->protocol;
	key->local = from ? p->src : p->dst;
	key->peer = from ? p->dst : p->src;
	if (icmp) {
		kind = classify_icmp(p, &type);
		key->local_port = kind <= ICMP_IS_REPLY ? p->sport : 0;
		key->peer_port = type << 8 | p->icmp_code;
	} else {
		key->local_port = from ? p->sport : p->dport;
		key->peer_port = from ? p->dport : p->sport;
	}
	return kind;
}

/* Who is really at the other end. */
static __always_inline const struct addr *real_peer(const struct flow *f)
{
	return f->direction == DIR_EGRESS ? &f->p.dst : &f->p.src;
}

static __always_inline __u16 real_peer_port(const struct flow *f)
{
	if (f->icmp)
		return f->key.peer_port;
	return f->direction == DIR_EGRESS ? f->p.dport : f->p.sport;
}

static __always_inline void set_real_peer(struct flow *f, const struct addr *peer, __u16 port)
{
	if (f->direction == DIR_EGRESS) {
		f->p.dst = *peer;
		if (!f->icmp)
			f->p.dport = port;
	} else {
		f->p.src = *peer;
		if (!f->icmp)
			f->p.sport = port;
	}
}

static __always_inline __u16 passed_from(__u32 ifindex)
{
	return ifindex <= PASSED_FROM ? ifindex : 0;
}

/* `icmp`: whether the ports are an identifier and a message type. */
static __always_inline __u32 port_key_of(const struct conn_key *key, __u16 peer_port, int icmp, __u8 direction)
{
	__u16 port = icmp || direction == DIR_EGRESS ? peer_port : key->local_port;

	return (__u32)key->protocol << 16 | port;
}

/* The port of the side that began, `direction` being that side's. ICMP and others without ports have 0. */
static __always_inline __u16 source_port_of(const struct conn_key *key, __u16 peer_port, int icmp, __u8 direction)
{
	if (icmp)
		return 0;
	return direction == DIR_EGRESS ? key->local_port : peer_port;
}

static __always_inline __u64 binding_of(__u32 subject)
{
	__u32 *slot = bpf_map_lookup_elem(&endpoints, &subject);
	__u64 *binding;

	if (!slot)
		return 0;
	binding = bpf_map_lookup_elem(&bindings, slot);
	return binding ? *(volatile __u64 *)binding : 0;
}

static __always_inline int is_programmed(__u64 binding, __u8 direction)
{
	return binding & BINDING_PRESENT &&
	       (binding >> (direction == DIR_EGRESS ? BINDING_EGRESS_SHIFT : BINDING_INGRESS_SHIFT) &
		BINDING_ID_MASK);
}

static __always_inline int is_own(__u32 subject, const struct addr *addr)
{
	struct endpoint_addr_key key = { .subject = subject, .addr = *addr };

	return bpf_map_lookup_elem(&endpoint_addrs, &key) != NULL;
}

static __always_inline int is_link_local(const struct addr *a)
{
	return (a->w[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

/* 127.0.0.0/8 and ::1 */
static __always_inline int is_loopback(const struct addr *a)
{
	if (is_v4_mapped(a))
		return (a->w[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return !a->w[0] && !a->w[1] && !a->w[2] && a->w[3] == bpf_htonl(1);
}

static __always_inline int is_v6_multicast(const struct addr *a)
{
	return (a->w[0] & bpf_htonl(0xff000000)) == bpf_htonl(0xff000000);
}

static __always_inline int same_addr(const struct addr *a, const struct addr *b)
{
	return a->w[0] == b->w[0] && a->w[1] == b->w[1] && a->w[2] == b->w[2] && a->w[3] == b->w[3];
}

static __always_inline int is_v6_unspecified(const struct addr *a)
{
	return !a->w[0] && !a->w[1] && !a->w[2] && !a->w[3];
}

#endif
