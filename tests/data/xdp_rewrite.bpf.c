// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Changes UDP packets over IPv4 by their destination port, for the tests of what is
 * told about changes:
 *   9   puts in a VLAN tag with id 100 behind the addresses
 *   10  sets the time to live to 7 and the destination port to 11
 *   12  cuts the last 16 bytes off
 * and passes all others as they are.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/udp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define TAG_LEN 4

static __always_inline int push_tag(struct xdp_md *ctx)
{
	void *data, *data_end;

	if (bpf_xdp_adjust_head(ctx, -TAG_LEN))
		return XDP_ABORTED;
	data = (void *)(long)ctx->data;
	data_end = (void *)(long)ctx->data_end;
	if (data + 2 * ETH_ALEN + TAG_LEN > data_end)
		return XDP_ABORTED;
	for (int i = 0; i < 2 * ETH_ALEN; i++)
		((__u8 *)data)[i] = ((__u8 *)data)[i + TAG_LEN];
	*(__be16 *)(data + 2 * ETH_ALEN) = bpf_htons(ETH_P_8021Q);
	*(__be16 *)(data + 2 * ETH_ALEN + 2) = bpf_htons(100);
	return XDP_PASS;
}

SEC("xdp")
int xdp_rewrite(struct xdp_md *ctx)
{
	void *data_end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = (void *)(long)ctx->data;
	struct iphdr *ip = (void *)(eth + 1);
	struct udphdr *udp = (void *)(ip + 1);

	if ((void *)(udp + 1) > data_end || eth->h_proto != bpf_htons(ETH_P_IP))
		return XDP_PASS;
	if (ip->ihl != 5 || ip->protocol != IPPROTO_UDP)
		return XDP_PASS;
	switch (bpf_ntohs(udp->dest)) {
	case 9:
		return push_tag(ctx);
	case 10:
		ip->ttl = 7;
		udp->dest = bpf_htons(11);
		return XDP_PASS;
	case 12:
		return bpf_xdp_adjust_tail(ctx, -16) ? XDP_ABORTED : XDP_PASS;
	}
	return XDP_PASS;
}

char _license[] SEC("license") = "Dual BSD/GPL";
