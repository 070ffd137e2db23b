/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What a drop's packet is, as the rules of src/explain ask for it. */
#ifndef NETPROBE_DROP_FACTS_H
#define NETPROBE_DROP_FACTS_H

/* Facts that tell a loss from a normal free: bits above skb->pkt_type, which are the lowest. */
enum drop_fact {
	DROP_PKT_TYPE = 0x7, /* skb->pkt_type: 3 is PACKET_OTHERHOST */
	DROP_PROMISCUOUS = 1 << 3, /* its device takes frames for others too */
	DROP_ECHO_REPLY = 1 << 4, /* ICMP or ICMPv6 */
	DROP_NO_IP = 1 << 5,
	DROP_TIME_WAIT = 1 << 6, /* for a TCP connection in TIME-WAIT */
	DROP_NO_DATA = 1 << 7, /* a TCP segment without data or SYN */
};

#endif
