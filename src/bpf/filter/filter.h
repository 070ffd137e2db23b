/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What np_filter_on says: the contract of the packet filter and src/filter. */
#ifndef NETPROBE_FILTER_H
#define NETPROBE_FILTER_H

/* Bits of np_filter_on: which stubs were replaced. */
enum np_filter_bit {
	NP_FILTER_EXPRESSION = 1U << 0,
	NP_FILTER_TUNNEL_L2 = 1U << 1,
	NP_FILTER_TUNNEL_L3 = 1U << 2,
	NP_FILTER_MEMBERS = 1U << 3,
	/* The expression reads the packet by typed loads (use_cast), and the sk_buff is laid out for it. */
	NP_FILTER_BY_CAST = 1U << 4,
	/* The expression has a form that decides by short copies what it can (np_filter_by_copy). */
	NP_FILTER_BY_COPY = 1U << 5,
	/* The expression has `vlan`: another form of it is for packets with their tag beside them (np_filter_tagged). */
	NP_FILTER_VLAN = 1U << 6,
};
#define NP_FILTER_READS \
	(NP_FILTER_EXPRESSION | NP_FILTER_TUNNEL_L2 | NP_FILTER_TUNNEL_L3)

#endif
