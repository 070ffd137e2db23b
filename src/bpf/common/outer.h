/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What outer.bpf.h has to know of a device. */
#ifndef NETPROBE_OUTER_H
#define NETPROBE_OUTER_H

/* Kinds of devices whose packets may have outer headers in front of them. */
enum np_arphrd {
	NP_ARPHRD_ETHER = 1,
	NP_ARPHRD_TUNNEL = 768, /* IPIP */
	NP_ARPHRD_TUNNEL6 = 769,
	NP_ARPHRD_LOOPBACK = 772,
	NP_ARPHRD_SIT = 776,
	NP_ARPHRD_IPGRE = 778,
	NP_ARPHRD_IP6GRE = 823,
};

/* A tunnel device: its kind and ends, zeros where it has none; IPv4 addresses are in the first four bytes. */
struct np_tunnel {
	__u32 type;
	__u8 local[16];
	__u8 remote[16];
};

#endif
