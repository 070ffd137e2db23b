/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The contract of `netprobe drops`: rows that the kernel side counts, an example packet of each. */
#ifndef NETPROBE_DROPS_H
#define NETPROBE_DROPS_H

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
};

/* Facts that tell a loss from a normal free: bits of drop_key.facts, above skb->pkt_type. */
enum drop_fact {
	DROP_PKT_TYPE = 0x7, /* skb->pkt_type: 3 is PACKET_OTHERHOST */
	DROP_PROMISCUOUS = 1 << 3, /* its device takes frames for others too */
	DROP_ECHO_REPLY = 1 << 4, /* ICMP or ICMPv6 */
	DROP_NO_IP = 1 << 5,
	DROP_TIME_WAIT = 1 << 6, /* for a TCP connection in TIME-WAIT */
	DROP_NO_DATA = 1 << 7, /* a TCP segment without data or SYN */
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
	__u8 pad[7];
};

struct drop_count {
	__u64 packets;
	__u64 bytes; /* skb->len */
};

/* The first packet of a row. */
struct drop_example {
	struct np_tuple tuple;
	__u64 ts; /* ns of CLOCK_MONOTONIC */
	__u64 inode; /* of the socket that it was on its way to, or from; 0: none */
	__u32 len;
	__u32 backlog; /* of a listening socket, and its limit */
	__u32 limit;
	__u16 protocol; /* skb->protocol, host byte order */
	__u16 pad;
	__u8 ifname[DROP_IFNAME_LEN];
};

_Static_assert(sizeof(struct drop_key) == 32,
	       "drop_key is part of the contract");
_Static_assert(sizeof(struct drop_example) == 96,
	       "drop_example is part of the contract");

#endif
