/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* From bytes to a tuple. Loads copy out of the packet, so non-linear ones (GSO) need no special case. */
#ifndef BULKHEAD_PACKET_H
#define BULKHEAD_PACKET_H

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>

#include "abi.h"
#include "context.h"

#define PROTO_UDPLITE 136
#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10
#define MAX_VLAN_TAGS 2
#define MAX_EXTENSION_HEADERS 8
#define MAX_IPV4_OPTIONS 40 /* bytes, and so options */

enum parsed { PARSED_IP = 0, PARSED_ARP, PARSED_UNKNOWN, PARSED_MALFORMED };

/* packet.frag */
#define FRAG_FIRST 1
#define FRAG_LATER 2
/* Longest headers of a first fragment before the protocol's own. */
#define FRAG_HEADERS_MAX 2000

struct packet {
	struct addr src;
	struct addr dst;
	__u32 l3;      /* offset of the IP or ARP header */
	__u32 l4;      /* offset of what follows the IP headers */
	__u32 len;     /* IP header and payload */
	__u32 frag_id;
	__u16 sport;   /* host order; ICMP: identifier */
	__u16 dport;
	__u16 frag_offset;
	__u16 frag_start; /* first fragments: offset from l3 of what is put together */
	__u8 protocol;
	__u8 frag;
	__u8 tcp_flags;
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 hop_limit;
	__u8 v6;
	__u8 pad[1];
};

static __always_inline int is_v4_mapped(const struct addr *a)
{
	return !a->w[0] && !a->w[1] && a->w[2] == bpf_htonl(0xffff);
}

static __always_inline void map_v4(struct addr *a, __u32 v4)
{
	a->w[0] = 0;
	a->w[1] = 0;
	a->w[2] = bpf_htonl(0xffff);
	a->w[3] = v4;
}

/* Whether the first four bytes behind the IP headers are two ports. */
static __always_inline int has_ports(__u8 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP || protocol == IPPROTO_SCTP ||
	       protocol == PROTO_UDPLITE;
}

/* Whether a header of this protocol is read. */
static __always_inline int has_header(const struct packet *p)
{
	return has_ports(p->protocol) || p->protocol == (p->v6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP);
}

/* Bytes of a protocol's header that are judged. */
static __always_inline __u32 judged_len(__u8 protocol)
{
	return protocol == IPPROTO_TCP ? 20 : 8;
}

/* Ports, flags, type and code. `quoted` packets (inside ICMP errors) may end after eight bytes. */
static __always_inline int parse_l4(CONTEXT *context, struct packet *p, int quoted)
{
	__u8 h[20];

	/* What stands behind the end of the packet is padding, and no receiver reads ports from it. */
	if (!quoted && has_header(p) && p->l4 + judged_len(p->protocol) > p->l3 + p->len)
		return PARSED_MALFORMED;
	switch (p->protocol) {
	case IPPROTO_TCP:
		if (load_bytes(context, p->l4, h, quoted ? 8 : 20))
			return PARSED_MALFORMED;
		if (!quoted) {
			if (h[12] >> 4 < 5)
				return PARSED_MALFORMED;
			p->tcp_flags = h[13];
		}
		break;
	case IPPROTO_UDP:
	case IPPROTO_SCTP:
	case PROTO_UDPLITE:
		if (load_bytes(context, p->l4, h, 8))
			return PARSED_MALFORMED;
		break;
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		/* ICMP of the other family is no ICMP but an unknown protocol. */
		if ((p->protocol == IPPROTO_ICMPV6) != !!p->v6)
			return PARSED_IP;
		if (load_bytes(context, p->l4, h, 8))
			return PARSED_MALFORMED;
		p->icmp_type = h[0];
		p->icmp_code = h[1];
		p->sport = h[4] << 8 | h[5];
		return PARSED_IP;
	default:
		return PARSED_IP;
	}
	p->sport = h[0] << 8 | h[1];
	p->dport = h[2] << 8 | h[3];
	return PARSED_IP;
}

struct options {
	CONTEXT *context;
	__u32 at;
	__u32 end;
	int goes_on;
};

static long next_option(__u32 number, struct options *options)
{
	__u8 kind, len = 0;

	(void)number;
	if (options->at >= options->end || load_bytes(options->context, options->at, &kind, 1) || kind == IPOPT_END)
		return 1;
	options->at++;
	if (kind == IPOPT_NOOP)
		return 0;
	/* What cannot be read might be a route, too. */
	options->goes_on = kind == IPOPT_LSRR || kind == IPOPT_SSRR ||
			   load_bytes(options->context, options->at, &len, 1) || len < 2;
	options->at += len - 1;
	return options->goes_on;
}

/* Whether the options of an IPv4 header send the packet on from its destination. */
static __always_inline int goes_on_v4(CONTEXT *context, const struct packet *p, __u32 header)
{
	struct options options = {
		.context = context,
		.at = p->l3 + sizeof(struct iphdr),
		.end = p->l3 + header,
	};

	/* A loop here would be verified forty times over. */
	bpf_loop(MAX_IPV4_OPTIONS, next_option, &options, 0);
	return options.goes_on;
}

static __always_inline int parse_v4(CONTEXT *context, struct packet *p, int quoted)
{
	__u32 header, total, offset;
	struct iphdr ip;

	if (load_bytes(context, p->l3, &ip, sizeof(ip)))
		return PARSED_MALFORMED;
	header = ip.ihl * 4;
	total = bpf_ntohs(ip.tot_len);
	p->len = packet_len(context) - p->l3;
	if (ip.version != 4 || header < sizeof(ip))
		return PARSED_MALFORMED;
	/* A total length of 0 is how the kernel writes packets of more than 64 KiB. */
	if (!quoted && total && (total < header || total > p->len))
		return PARSED_MALFORMED;
	/* A source route ends elsewhere than where it is judged. */
	if (!quoted && header > sizeof(ip) && goes_on_v4(context, p, header))
		return PARSED_MALFORMED;
	if (total && total < p->len)
		p->len = total;
	map_v4(&p->src, ip.saddr);
	map_v4(&p->dst, ip.daddr);
	p->v6 = 0;
	p->protocol = ip.protocol;
	p->hop_limit = ip.ttl;
	p->l4 = p->l3 + header;
	offset = bpf_ntohs(ip.frag_off);
	p->frag_id = ip.id;
	p->frag_offset = offset & 0x1fff;
	if (p->frag_offset)
		p->frag = FRAG_LATER;
	else if (offset & 0x2000)
		p->frag = FRAG_FIRST;
	p->frag_start = header;
	return PARSED_IP;
}

/* Follows extension headers up to a protocol. */
static __always_inline int parse_v6_headers(CONTEXT *context, struct packet *p)
{
	__u8 h[8];
	int i;

	for (i = 0; i <= MAX_EXTENSION_HEADERS; i++) {
		__u8 next = p->protocol;

		switch (next) {
		case IPPROTO_HOPOPTS:
		case IPPROTO_ROUTING:
		case IPPROTO_DSTOPTS:
		case IPPROTO_AH:
		case IPPROTO_FRAGMENT:
			if (load_bytes(context, p->l4, h, 8))
				return PARSED_MALFORMED;
			break;
		default:
			return PARSED_IP;
		}
		/* So does a routing header with segments left. */
		if (next == IPPROTO_ROUTING && h[3])
			return PARSED_MALFORMED;
		p->protocol = h[0];
		if (next == IPPROTO_FRAGMENT) {
			__u16 word = h[2] << 8 | h[3];

			p->frag_id = h[4] << 24 | h[5] << 16 | h[6] << 8 | h[7];
			p->frag_offset = word >> 3;
			p->l4 += 8;
			if (p->frag_offset) {
				/* What follows is the middle of something: the protocol is all we get. */
				p->frag = FRAG_LATER;
				return PARSED_IP;
			}
			if (word & 1) {
				/* Parts of a part: nobody sends that. */
				if (p->frag)
					return PARSED_MALFORMED;
				p->frag = FRAG_FIRST;
				p->frag_start = p->l4 - p->l3;
			}
		} else if (next == IPPROTO_AH) {
			p->l4 += (h[1] + 2) * 4;
		} else {
			p->l4 += (h[1] + 1) * 8;
		}
	}
	return PARSED_MALFORMED;
}

static __always_inline int parse_v6(CONTEXT *context, struct packet *p, int quoted)
{
	struct ipv6hdr ip;
	__u32 payload;

	if (load_bytes(context, p->l3, &ip, sizeof(ip)))
		return PARSED_MALFORMED;
	p->len = packet_len(context) - p->l3;
	if (ip.version != 6)
		return PARSED_MALFORMED;
	payload = bpf_ntohs(ip.payload_len);
	if (!quoted && payload + sizeof(ip) > p->len)
		return PARSED_MALFORMED;
	/* A payload length of 0 is how the kernel writes packets of more than 64 KiB. */
	if (payload && payload + sizeof(ip) < p->len)
		p->len = payload + sizeof(ip);
	__builtin_memcpy(&p->src, &ip.saddr, sizeof(p->src));
	__builtin_memcpy(&p->dst, &ip.daddr, sizeof(p->dst));
	/* Never legal on the wire, and here it would pass for an IPv4 address. */
	if (is_v4_mapped(&p->src) || is_v4_mapped(&p->dst))
		return PARSED_MALFORMED;
	p->v6 = 1;
	p->protocol = ip.nexthdr;
	p->hop_limit = ip.hop_limit;
	p->l4 = p->l3 + sizeof(ip);
	return parse_v6_headers(context, p);
}

/* Parses the IP packet at p->l3, whose other fields are 0. Verified once, as a global function. */
__noinline int parse_ip(CONTEXT *context, struct packet *p, int v6, int quoted)
{
	int result;

	if (!p)
		return PARSED_MALFORMED;
	result = v6 ? parse_v6(context, p, quoted) : parse_v4(context, p, quoted);
	if (result != PARSED_IP)
		return result;
	if (p->frag == FRAG_LATER) {
		/* Would overwrite the flags of the first fragment (RFC 1858). */
		if (p->protocol == IPPROTO_TCP && p->frag_offset == 1)
			return PARSED_MALFORMED;
		return PARSED_IP;
	}
	/* The table of fragments has a byte for where the judged part ends, in units of eight. */
	if (p->frag == FRAG_FIRST && p->l4 - p->l3 - p->frag_start > FRAG_HEADERS_MAX)
		return PARSED_MALFORMED;
	return parse_l4(context, p, quoted);
}

#endif
