/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* What the kernel programs and user space share. Mirrored by src/layout.rs: a change of any layout
 * here raises ABI_VERSION there, which is part of the pin path. */
#ifndef BULKHEAD_ABI_H
#define BULKHEAD_ABI_H

#include <linux/types.h>

/* bulkhead_model::flow::DropReason */
enum reason {
	REASON_NONE = 0,
	REASON_POLICY = 1,
	REASON_UNPROGRAMMED = 2,
	REASON_SPOOFED = 3,
	REASON_MALFORMED = 4,
	REASON_FRAGMENT_WITHOUT_FIRST = 5,
	REASON_REVOKED = 6,
	REASON_UNKNOWN_ETHERTYPE = 7,
	REASONS = 8,
};

/* bulkhead_model::verdict::Builtin */
enum builtin_rule {
	RULE_UNPROGRAMMED = 1,
	RULE_SELF_TRAFFIC = 2,
	RULE_HOST_TO_WORKLOAD = 3,
	RULE_SPOOFED = 6,
	RULE_MALFORMED = 7,
};

/* bulkhead_model::verdict::Direction: which policy of the endpoint judges. Packets FROM the workload
 * come through the tcx ingress hook of the host side and have DIR_EGRESS. */
enum direction { DIR_INGRESS = 0, DIR_EGRESS = 1 };

/* bulkhead_model::flow::FlowEvent, as far as the kernel makes them. */
enum event_kind { EVENT_OPEN = 0, EVENT_CLOSE = 2, EVENT_CHANGE = 3, EVENT_DENY = 4, EVENT_REFUSE = 5 };

/* Idle times after which a connection's entry counts as absent. Also in src/layout.rs. */
#define SECOND_NS 1000000000ULL
#define TIMEOUT_TCP_SYN (60 * SECOND_NS)
#define TIMEOUT_TCP_ESTABLISHED (24 * 3600 * SECOND_NS)
#define TIMEOUT_TCP_CLOSING (10 * SECOND_NS)
#define TIMEOUT_UDP_UNREPLIED (60 * SECOND_NS)
#define TIMEOUT_UDP_REPLIED (180 * SECOND_NS)
#define TIMEOUT_ICMP (30 * SECOND_NS)
#define TIMEOUT_OTHER (300 * SECOND_NS)
/* How long one that nobody answers counts against its endpoint. */
#define HALF_OPEN_SPAN (60 * SECOND_NS)
/* Refusals of an endpoint that are told: so many at once, and one more for each part of the span that has passed, so
 * 1000 a second. */
#define REFUSAL_SPAN (SECOND_NS / 5)
#define REFUSALS_AT_ONCE 200
/* How long a revoked connection stays refused in both orientations. Refreshed by TCP packets only. */
#define TIMEOUT_REVOKED_TCP (300 * SECOND_NS)
#define TIMEOUT_REVOKED_OTHER (60 * SECOND_NS)

/* Both families in 128 bits, network order; IPv4 as ::ffff:a.b.c.d. */
struct addr {
	__u32 w[4];
};

/* Who an endpoint is: the number of its interface; or with one of these, the host behind that interface or what it
 * forwards through it (0: of any that has no endpoint of its own), or the inode of a control group. */
#define SUBJECT_FORWARDED (1U << 30)
#define SUBJECT_HOST (2U << 30)
#define SUBJECT_CGROUP (3U << 30)
#define SUBJECT_KIND (3U << 30)

/* A connection as its endpoint sees it; ports in host order. Where the host rewrites addresses, the peer is not who
 * it seems: see conn.peer. */
struct conn_key {
	__u32 subject;
	__u8 protocol;
	__u8 pad[3];
	struct addr local;
	struct addr peer;
	__u16 local_port; /* ICMP echo: identifier */
	__u16 peer_port;  /* ICMP: type << 8 | code of the first message */
};

/* conn.flags */
#define CONN_REPLIED (1U << 0)	       /* TCP: established */
#define CONN_FIN_FORWARD (1U << 1)
#define CONN_FIN_REVERSE (1U << 2)
#define CONN_RST (1U << 3)
#define CONN_LOCAL_OWN (1U << 4)       /* key.local is one of the endpoint's own addresses */
#define CONN_OPEN_REPORTED (1U << 5)
#define CONN_CLOSE_REPORTED (1U << 6)
#define CONN_FROM_HOST (1U << 7)       /* began on this host: rule 3 may allow it */
#define CONN_REVOKED (1U << 8)	       /* tombstone: refused until the revision changes or it is idle */
#define CONN_REJECT (1U << 9)	       /* and whoever goes on with it is told */

struct conn {
	__u32 rule;
	__u32 audit_rule;
	__u32 revision;
	__u32 flags;
	__u8 direction; /* of the side that began */
	__u8 audit;
	__u16 peer_port;
	__u8 pad[4];
	struct addr peer; /* who the peer really is, and was judged as */
	__u64 opened_ns;
	__u64 last_ns;
	__u64 packets[2]; /* 0: from the side that began */
	__u64 bytes[2];
};

struct denial_key {
	struct conn_key conn;
	__u8 direction;
	__u8 pad[3];
};

struct denial {
	__u32 rule;
	__u32 audit_rule;
	__u8 reason;
	__u8 audit;
	__u16 peer_port;
	__u32 reported_packets; /* already told through the ring buffer */
	struct addr peer;	/* who it really is */
	__u64 reported_bytes;
	__u64 packets;
	__u64 bytes;
	__u64 first_ns;
	__u64 last_ns;
};

struct frag_key {
	__u32 subject;
	__u32 id;
	struct addr src;
	struct addr dst;
	__u8 protocol;
	__u8 direction;
	__u8 pad[2];
};

/* What later fragments cannot say for themselves. */
struct frag {
	__u16 sport;
	__u16 dport;
	__u8 tcp_flags;
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 judged; /* later fragments begin here or behind it, in units of eight bytes */
};

struct event {
	struct conn_key key;
	__u8 kind;
	__u8 direction;
	__u8 verdict; /* 1: allow */
	__u8 audit;
	__u32 rule;
	__u32 audit_rule;
	__u8 reason;
	__u8 pad;
	__u16 peer_port;
	__u8 more_pad[4];
	struct addr peer; /* who it really is */
	__u64 opened_ns;
	__u64 last_ns;
	__u64 packets[2];
	__u64 bytes[2];
};

/* Somebody is refused and is to be told: in the ring buffer, as events are. Addresses and ports are those that the
 * sender used. */
struct refusal {
	struct conn_key key;
	__u8 kind;
	__u8 direction; /* of the packet */
	__u8 live;	/* of a connection that was allowed: its other end is told, too */
	__u8 pad;
	__u32 len;	/* of what follows the IP headers */
	__u8 l4[20];	/* its first bytes */
};

/* Tables of a bank. */
struct class_entry {
	__u32 class;
	__u32 tag; /* exact: addr_tag() of the key; LPM: prefix length */
};

struct lpm_key {
	__u32 prefixlen;
	struct addr addr;
};

struct row_key {
	__u32 compiled;
	__u32 class;
};

#define CLASS_DEFAULT_ROW 0xffffffffU
#define CLASS_NOBODY 0U

struct row {
	__u32 first; /* in steps, or with the flag in variants */
	__u32 len;   /* and ROW_BY_SOURCE_PORT */
};

/* Set in row.len if rules of the row ask for the source port. */
#define ROW_BY_SOURCE_PORT (1U << 31)

/* The steps from this source port up to the next variant's. */
struct variant {
	__u32 first_source_port;
	__u32 first;
	__u32 len;
	__u32 pad;
};

struct step {
	__u32 first_key;
	__u32 cell;
};

#define CELL_LOG 1
#define CELL_WRITTEN 2
#define CELL_REJECT 4

struct cell {
	__u32 rule;
	__u32 audit_rule;
	__u8 verdict; /* 1: allow */
	__u8 audit;
	__u8 flags;
	__u8 pad[5];
};

/* An endpoint's switch, one 64-bit word so that one store changes all of it: ids of the compiled
 * policies (30 bits each), the bank, and whether there is a binding at all. */
#define BINDING_INGRESS_SHIFT 0
#define BINDING_EGRESS_SHIFT 30
#define BINDING_ID_MASK 0x3fffffffULL
#define BINDING_BANK_SHIFT 60
#define BINDING_PRESENT (1ULL << 63)

struct endpoint_addr_key {
	__u32 subject;
	struct addr addr;
};

/* Written by user space through a mapping, read by every packet. */
struct config {
	__u64 generation;
	__u32 revision;
	__u32 hosts; /* endpoints that are the host itself */
	__u64 refusers[2]; /* cookies of the sockets that tell whoever is refused */
	__u32 forwarded;   /* endpoints that are about forwarded traffic */
	__u32 pad;
};

/* Of packets of these sockets to processes of this host: on the loopback interface they lose their socket. */
#define PRIORITY_REFUSAL 0x42756c6bU

/* Two are in use while endpoints are switched. More, so that a process that died in the middle of that
 * (even repeatedly) leaves a free one to its successor. */
#define BANKS 8
/* 2^24 port keys bound a row's length, and with it the probes of the search. */
#define MAX_PROBES 24
/* And 2^16 source ports the variants of a row. */
#define MAX_SOURCE_PROBES 16

/* What the program at a workload's exit writes into a packet's tc_index for those at netfilter's hooks, who see where it
 * really goes: nothing but the programs of devices can change it. Lost, it costs time only. */
#define PASSED_SETTLED (1U << 15) /* of a connection in the table, or nothing that could be rewritten */
#define PASSED_COUNTED (1U << 14) /* judged by the addresses that it had, and counted */
#define PASSED_FROM 0x3fffU	  /* number of the workload's interface, if it is that small */

/* Counters: drops by reason, then drops without a denial entry by reason, then lost events, refusals untold. */
#define COUNTER_UNRECORDED REASONS
#define COUNTER_LOST_EVENTS (2 * REASONS)
#define COUNTER_UNTOLD (2 * REASONS + 1)
#define COUNTERS (2 * REASONS + 2)

_Static_assert(sizeof(struct conn_key) == 44, "conn_key");
_Static_assert(sizeof(struct conn) == 88, "conn");
_Static_assert(sizeof(struct denial_key) == 48, "denial_key");
_Static_assert(sizeof(struct denial) == 72, "denial");
_Static_assert(sizeof(struct frag_key) == 44, "frag_key");
_Static_assert(sizeof(struct frag) == 8, "frag");
_Static_assert(sizeof(struct event) == 128, "event");
_Static_assert(sizeof(struct refusal) == 72, "refusal");
_Static_assert(__builtin_offsetof(struct refusal, kind) == __builtin_offsetof(struct event, kind), "kind");
_Static_assert(sizeof(struct variant) == 16, "variant");
_Static_assert(sizeof(struct cell) == 16, "cell");
_Static_assert(sizeof(struct endpoint_addr_key) == 20, "endpoint_addr_key");
_Static_assert(sizeof(struct config) == 40, "config");
_Static_assert(__builtin_offsetof(struct conn, opened_ns) == 40, "conn.opened_ns");
_Static_assert(__builtin_offsetof(struct denial, packets) == 40, "denial.packets");
_Static_assert(__builtin_offsetof(struct event, rule) == 48, "event.rule");
_Static_assert(__builtin_offsetof(struct event, opened_ns) == 80, "event.opened_ns");

#endif
