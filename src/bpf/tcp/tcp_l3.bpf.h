/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* From an IP header to the TCP header. Needs vmlinux.h, the helpers and packet.bpf.h before it. */
#ifndef NETPROBE_TCP_L3_BPF_H
#define NETPROBE_TCP_L3_BPF_H

#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd

/* An IP header as far as it is followed. */
struct tcp_l3 {
	const void *l4;
	__u8 proto;
};

/* False where there is no IP header, or a later fragment. */
static __always_inline bool read_l3(const void *l3, __u16 ethertype,
				    struct tcp_l3 *to)
{
	struct ipv6hdr ip6;
	struct iphdr ip;
	__u8 ext[4];

	if (ethertype == bpf_htons(ETH_P_IP)) {
		if (bpf_probe_read_kernel(&ip, sizeof(ip), l3) < 0 ||
		    ip.ihl < 5 || (ip.frag_off & bpf_htons(NP_FRAGMENT_OFFSET)))
			return false;
		to->proto = ip.protocol;
		to->l4 = l3 + ip.ihl * 4;
		return true;
	}
	if (ethertype != bpf_htons(ETH_P_IPV6) ||
	    bpf_probe_read_kernel(&ip6, sizeof(ip6), l3) < 0)
		return false;
	to->proto = ip6.nexthdr;
	to->l4 = l3 + sizeof(ip6);
	for (int i = 0; i < NP_IPV6_EXTENSIONS; i++) {
		if (to->proto != 0 && to->proto != 43 && to->proto != 60)
			break;
		if (bpf_probe_read_kernel(ext, sizeof(ext), to->l4) < 0)
			return false;
		to->proto = ext[0];
		to->l4 += (ext[1] + 1) * 8;
	}
	return true;
}

#endif
