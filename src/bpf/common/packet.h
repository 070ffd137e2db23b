/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Addresses and ports of a packet, as events carry them. */
#ifndef NETPROBE_PACKET_H
#define NETPROBE_PACKET_H

struct np_tuple {
	__u64 saddr[2]; /* network byte order; IPv4 as ::ffff:a.b.c.d */
	__u64 daddr[2];
	__u16 sport; /* host byte order; 0 where the protocol has no ports */
	__u16 dport;
	__u8 l3_version; /* 4, 6, or 0 where the packet is no IP */
	__u8 l4_proto; /* IPPROTO_*, behind IPv6 extension headers */
	__u8 tcp_flags; /* byte 13 of the TCP header, RFC 9293 */
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 fragment; /* not the first fragment: no ports */
	__u8 pad[6];
};

_Static_assert(sizeof(struct np_tuple) == 48,
	       "np_tuple is part of the contract");

#endif
