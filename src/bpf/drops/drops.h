/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The contract of `netprobe drops`: rows that the kernel side counts, an example packet of each. */
#ifndef NETPROBE_DROPS_H
#define NETPROBE_DROPS_H

#include "common/drop_facts.h"
#include "common/packet.h"

#define DROP_IFNAME_LEN 16

/* What a row is made of: bits of `by`. */
enum drop_by {
	DROP_BY_REASON = 1 << 0,
	DROP_BY_PLACE = 1 << 1,
	DROP_BY_IFACE = 1 << 2,
	DROP_BY_NETNS = 1 << 3,
	DROP_BY_PROTO = 1 << 4,
	DROP_BY_PORT = 1 << 5,
	DROP_BY_RULE = 1 << 6,
};

/* Reasons that the kernel has no name for, beside enum skb_drop_reason and enum np_listen. */
enum drop_device {
	DROP_TX_TIMEOUT = 0xffff0011,
	DROP_DEVLINK_TRAP = 0xffff0012,
};

struct drop_key {
	__u64 place; /* an address in the function that decided; 0: not asked for */
	__u32 reason; /* enum skb_drop_reason or enum np_listen; 0 on kernels before 5.17 */
	__u32 ifindex;
	__u32 netns; /* inode */
	__u16 dport; /* host byte order */
	__u8 proto; /* IPPROTO_* */
	__u8 facts; /* enum drop_fact */
	__u8 ip; /* 4, 6; 0: neither, or protocols are not asked for */
	__u8 qdisc_reason; /* low bits of the qdisc's own reason (7.x); 0: none */
	__u16 qdisc_subsys; /* the subsystem that this reason is of */
	__u32 decider; /* the qdisc's handle, with its reason; the queue, or the trap's number; else the nft rule's; 0: none */
};

struct drop_count {
	__u64 packets;
	__u64 bytes; /* skb->len */
};

/* Rows at hand on each CPU, in each book. */
enum drop_slots {
	DROP_SLOTS = 64,
};

/* A part of a row, beside what its book has of it. */
struct drop_slot {
	struct drop_key key;
	struct drop_count count;
	__u64 taken; /* 0: free */
};

#define DROP_NAME_LEN 64 /* longer names are cut off */

/* An nft rule, or the policy of a base chain; of a devlink trap the group and its name. */
struct drop_rule {
	__u64 handle; /* 0: the policy */
	__u8 family; /* NFPROTO_* */
	__u8 pad[7];
	__u8 table[DROP_NAME_LEN]; /* NUL-padded */
	__u8 chain[DROP_NAME_LEN];
};

/* The first packet of a row. */
struct drop_example {
	struct np_tuple tuple;
	__u64 ts; /* ns of CLOCK_MONOTONIC */
	__u64 inode; /* of the socket that it was on its way to, or from; 0: none */
	__u64 cgroup; /* of that socket (v2); 0: not known */
	__u64 local[2]; /* its address, as those of np_tuple */
	__u32 len;
	__u32 backlog; /* of a listening socket, and its limit */
	__u32 limit;
	__u16 protocol; /* skb->protocol, host byte order */
	__u16 local_port; /* host byte order */
	__u8 local_version; /* 4, 6; 0: the socket has no port */
	__u8 pad[7];
	__u8 ifname[DROP_IFNAME_LEN];
};

_Static_assert(sizeof(struct drop_key) == 32,
	       "drop_key is part of the contract");
_Static_assert(sizeof(struct drop_rule) == 144,
	       "drop_rule is part of the contract");
_Static_assert(sizeof(struct drop_example) == 128,
	       "drop_example is part of the contract");

#endif
