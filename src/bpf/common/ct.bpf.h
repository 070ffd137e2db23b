/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The tuples of an entry in the kernel's table of connections. Needs packet.h and
 * headers.bpf.h before it.
 */
#ifndef NETPROBE_CT_BPF_H
#define NETPROBE_CT_BPF_H

#define NP_NFCT_INFO 7UL /* NFCT_INFOMASK of include/linux/skbuff.h */
#define NP_ICMPV6 58

/* One of an entry's tuples. */
static __always_inline void np_ct_tuple(struct np_tuple *to,
					const struct nf_conntrack_tuple *from)
{
	__be16 ends[2] = {};
	__u16 family = 0;

	__builtin_memset(to, 0, sizeof(*to));
	bpf_core_read(&family, sizeof(family), &from->src.l3num);
	bpf_core_read(&to->l4_proto, 1, &from->dst.protonum);
	switch (family) {
	case NP_AF_INET:
		to->l3_version = 4;
		to->saddr[1] = bpf_htonl(0xffff);
		to->daddr[1] = bpf_htonl(0xffff);
		bpf_core_read((__u8 *)to->saddr + 12, 4, &from->src.u3);
		bpf_core_read((__u8 *)to->daddr + 12, 4, &from->dst.u3);
		break;
	case NP_AF_INET6:
		to->l3_version = 6;
		bpf_core_read(to->saddr, 16, &from->src.u3);
		bpf_core_read(to->daddr, 16, &from->dst.u3);
		break;
	}
	bpf_core_read(&ends[0], 2, &from->src.u);
	bpf_core_read(&ends[1], 2, &from->dst.u);
	to->sport = bpf_ntohs(ends[0]);
	if (to->l4_proto == IPPROTO_ICMP || to->l4_proto == NP_ICMPV6) {
		to->icmp_type = bpf_ntohs(ends[1]) >> 8;
		to->icmp_code = bpf_ntohs(ends[1]);
	} else {
		to->dport = bpf_ntohs(ends[1]);
	}
}

#endif
