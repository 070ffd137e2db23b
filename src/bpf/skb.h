/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The events of `netprobe skb`: a fixed part, then the sections asked for. */
#ifndef NETPROBE_SKB_H
#define NETPROBE_SKB_H

#include "event.h"
#include "packet.h"

#define SKB_KIND_HIT 1 /* a function was entered with this skb */
#define SKB_KIND_DROP 2 /* the same, and `reason` says why it is freed */
#define SKB_KIND_DROPPED 3 /* tracepoint skb:kfree_skb; `func`: the location */

/* Bits of skb_event.sections, in the order in which the sections follow. */
#define SKB_SECTION_META (1U << 0) /* struct skb_meta */
#define SKB_SECTION_TUPLE (1U << 1) /* struct np_tuple */
#define SKB_SECTION_PACKET (1U << 2) /* __u64 identity, see skb_track */
#define SKB_SECTION_OWNER (1U << 3) /* struct skb_owner */
#define SKB_SECTION_CALLER (1U << 4) /* __u64 address of the caller */
#define SKB_SECTION_STACK (1U << 15) /* __u64 addresses, to the end */

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

/* A packet's identity: a number that its first CPU gave it, and that CPU. */
#define SKB_PACKET_CPU_BITS 16
#define SKB_PACKET_CPU_MASK 0xffff

/* Value of the map `tracked`; the key is the address of an sk_buff. */
struct skb_track {
	__u64 packet; /* identity */
	__u64 head; /* skb->head */
	__u64 data; /* skb->data when it was given up, where `dying` */
	__u32 len; /* skb->len then */
	__u8 dying; /* freed, or about to be */
	__u8 moving; /* skb->head may change once */
	__u8 pad[2];
};

/* Whose socket a packet belongs to. */
struct skb_owner {
	__u64 sock; /* address of the full socket; 0: none */
	__u64 cookie; /* 0 where the kernel has not made one yet */
	__u64 cgroup; /* id of the socket's cgroup (v2) */
	__u64 inode; /* of the socket's file */
	__u32 uid; /* user who made the socket */
	__u32 pid; /* process that made or connected it; 0: not seen */
	__u8 comm[NP_COMM_LEN]; /* its name then */
};

_Static_assert(sizeof(struct skb_track) == 32,
	       "skb_track is part of the contract");
_Static_assert(sizeof(struct skb_owner) == 56,
	       "skb_owner is part of the contract");
_Static_assert(sizeof(struct skb_event) == 64,
	       "skb_event is part of the contract");
_Static_assert(sizeof(struct skb_meta) == 40,
	       "skb_meta is part of the contract");

#endif
