/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A packet's entry in the kernel's table of connections, as events carry it. */
#ifndef NETPROBE_SKB_CT_H
#define NETPROBE_SKB_CT_H

#include "common/packet.h"

/* Bits of skb_ct.known. */
enum skb_ct_known {
	SKB_CT_INFO = 1, /* how the packet belongs to it: `info` */
	SKB_CT_ENTRY = 2, /* there is one, and it could be read */
	SKB_CT_GONE = 4, /* there was one: the packet has given it back */
	SKB_CT_MARK = 8, /* the kernel has marks of connections */
	SKB_CT_ZONE = 16, /* the kernel has zones */
};

/* Values of skb_ct.info: enum ip_conntrack_info of the kernel. */
enum skb_ct_info {
	SKB_CT_ESTABLISHED = 0,
	SKB_CT_RELATED = 1,
	SKB_CT_NEW = 2,
	SKB_CT_REPLY = 3, /* these three, in the direction of replies */
	SKB_CT_UNTRACKED = 7,
};

/* Bits of skb_ct.status: enum ip_conntrack_status of the kernel. */
enum skb_ct_status {
	SKB_CT_CONFIRMED = 1 << 3,
	SKB_CT_TEMPLATE = 1 << 11,
};

/* Values of skb_ct.zone_dir; 3: both. */
enum skb_ct_zone {
	SKB_CT_ZONE_ORIGINAL = 1,
	SKB_CT_ZONE_REPLY = 2,
};

struct skb_ct {
	__u32 status;
	__u32 mark;
	__u16 zone;
	__u8 zone_dir;
	__u8 info;
	__u32 known;
	/* ICMP: sport is the id; GRE: both ports are keys */
	struct np_tuple tuples[2]; /* original, reply */
};

_Static_assert(sizeof(struct skb_ct) == 112, "skb_ct is part of the contract");

#endif
