/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The events of `netprobe skb`: a fixed part, then the sections asked for. */
#ifndef NETPROBE_SKB_H
#define NETPROBE_SKB_H

#include "event.h"
#include "packet.h"

#define SKB_KIND_HIT 1 /* a function was entered with this skb */
#define SKB_KIND_DROP 2 /* the same, and `reason` says why it is freed */

/* Bits of skb_event.sections, in the order in which the sections follow. */
#define SKB_SECTION_META (1U << 0) /* struct skb_meta */
#define SKB_SECTION_TUPLE (1U << 1) /* struct np_tuple */
#define SKB_SECTION_STACK (1U << 2) /* __u64 addresses, to the end */

#define SKB_STACK_DEPTH 64
#define SKB_IFNAMSIZ 16

struct skb_event {
	struct np_head head;
	__u64 skb; /* address of the sk_buff */
	__u64 func; /* address of the function */
	__u32 sections;
	__u32 reason; /* enum skb_drop_reason, with SKB_KIND_DROP */
};

struct skb_meta {
	__u32 netns; /* inode */
	__u32 mark;
	__u32 ifindex;
	__u32 len; /* skb->len, bytes */
	__u32 mtu; /* of the device, bytes */
	__u16 protocol; /* EtherType, host byte order */
	__u8 pad[2];
	__u8 ifname[SKB_IFNAMSIZ]; /* NUL-padded */
};

_Static_assert(sizeof(struct skb_event) == 64,
	       "skb_event is part of the contract");
_Static_assert(sizeof(struct skb_meta) == 40,
	       "skb_meta is part of the contract");

#endif
