/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* The few fields of the kernel's own structures that are read. The loader finds their offsets in the running
 * kernel's BTF (CO-RE), so only names matter here; vmlinux.h would bring 150 000 lines for them. */
#ifndef BULKHEAD_KERNEL_H
#define BULKHEAD_KERNEL_H

#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define FROM_BTF __attribute__((preserve_access_index))

struct list_head {
	struct list_head *next;
} FROM_BTF;

/* include/linux/netdevice.h */
struct net_device {
	int ifindex;
	const unsigned char *dev_addr;
	struct {
		struct list_head upper;
	} adj_list;
} FROM_BTF;

/* net/core/dev.h: one step up or down in a stack of devices */
struct netdev_adjacent {
	struct net_device *dev;
	_Bool master;
	struct list_head list;
} FROM_BTF;

/* include/linux/skbuff.h */
struct skb_shared_info {
	unsigned short gso_segs;
} FROM_BTF;

/* include/net/sock.h */
struct sock_common {
	struct {
		__s64 counter;
	} skc_cookie;
} FROM_BTF;

struct sock {
	struct sock_common __sk_common;
} FROM_BTF;

struct sk_buff {
	struct sock *sk;
	unsigned int len;
	int skb_iif;
	__u16 tc_index;
	struct net_device *dev;
	unsigned long _nfct;
	unsigned long _skb_refdst;
	unsigned int end;
	unsigned char *head;
} FROM_BTF;

/* include/net/dst.h */
struct dst_entry {
	struct net_device *dev;
} FROM_BTF;

/* include/linux/netfilter.h */
struct nf_hook_state {
	__u8 pf;
	struct net_device *in;
	struct net_device *out;
} FROM_BTF;

struct bpf_nf_ctx {
	const struct nf_hook_state *state;
	struct sk_buff *skb;
};

/* include/net/netfilter/nf_conntrack.h and nf_conntrack_tuple.h */
union nf_inet_addr {
	__u32 all[4];
};

struct nf_conntrack_man {
	union nf_inet_addr u3;
	union {
		__be16 all;
	} u;
} FROM_BTF;

struct nf_conntrack_tuple {
	struct nf_conntrack_man src;
	struct {
		union nf_inet_addr u3;
		union {
			__be16 all;
		} u;
	} dst;
} FROM_BTF;

struct nf_conntrack_tuple_hash {
	struct nf_conntrack_tuple tuple;
} FROM_BTF;

struct nf_conn {
	struct nf_conntrack_tuple_hash tuplehash[2];
} FROM_BTF;

#define LOOPBACK 1 /* ifindex of lo in every network namespace */

/* enum ip_conntrack_info, in the low bits of sk_buff._nfct */
#define NFCT_INFO 7UL
#define NFCT_NEW 2
#define NFCT_FIRST_REPLY 3

extern void *bpf_cast_to_kern_ctx(void *context) __ksym;
extern int bpf_dynptr_from_skb(struct __sk_buff *skb, __u64 flags, struct bpf_dynptr *bytes) __ksym;

/* Of the socket that sent a packet, as SO_COOKIE has it; 0: none. */
static __always_inline __u64 cookie_of(struct sk_buff *skb)
{
	struct sock *socket = skb->sk;

	return socket ? BPF_CORE_READ(socket, __sk_common.skc_cookie.counter) : 0;
}

/* What the connection tracking of the kernel says of this packet; 0: nothing. */
static __always_inline unsigned long tracking_of(struct sk_buff *skb)
{
	return bpf_core_field_exists(skb->_nfct) ? skb->_nfct : 0;
}

/* Whether the kernel sees the first packets of a connection, so that this is the moment at which it chooses where
 * they go; a connection of ours with the same ports may have gone elsewhere. */
static __always_inline int is_new_to_kernel(struct sk_buff *skb)
{
	return (tracking_of(skb) & NFCT_INFO) == NFCT_NEW;
}

static __always_inline int tracked_direction(unsigned long tracking)
{
	return (tracking & NFCT_INFO) >= NFCT_FIRST_REPLY;
}

/* The entry of the direction that this packet goes: as its sender made it, before any rewriting. NULL: untracked. */
static __always_inline struct nf_conntrack_tuple *tuple_as_sent(unsigned long tracking)
{
	struct nf_conn *connection = (void *)(tracking & ~NFCT_INFO);

	if (!connection)
		return NULL;
	return tracked_direction(tracking) ? __builtin_preserve_access_index(&connection->tuplehash[1].tuple) :
					     __builtin_preserve_access_index(&connection->tuplehash[0].tuple);
}

/* The bridge or other master that a device is a port of. NULL: none. */
static __always_inline struct net_device *master_of(struct net_device *dev)
{
	struct list_head *head = __builtin_preserve_access_index(&dev->adj_list.upper), *node;
	struct netdev_adjacent *step;
	int i;

	node = BPF_CORE_READ(head, next);
	/* A port with more than four devices on top of it besides its master is judged before them. */
	for (i = 0; i < 5 && node && node != head; i++) {
		step = (void *)node - bpf_core_field_offset(struct netdev_adjacent, list);
		if (BPF_CORE_READ(step, master))
			return BPF_CORE_READ(step, dev);
		node = BPF_CORE_READ(node, next);
	}
	return NULL;
}

#endif
