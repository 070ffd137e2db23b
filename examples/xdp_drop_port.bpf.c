// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A link of the chain that filters: drops UDP packets over IPv4 to one port, and
 * hands everything else on to the next slot.
 *
 *	clang -O2 -g -target bpf -I src/bpf/xdp -c examples/xdp_drop_port.bpf.c -o xdp_drop_port.o
 *	netprobe xdpchain add enp0s9 xdp_drop_port.o --slot 0
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/udp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "netprobe_chain.h"

/* UDP's discard service. */
#define DROPPED_PORT 9

static __always_inline int is_unwanted(struct xdp_md *ctx)
{
	void *data_end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = (void *)(long)ctx->data;
	struct iphdr *ip = (void *)(eth + 1);
	struct udphdr *udp;

	if ((void *)(ip + 1) > data_end || eth->h_proto != bpf_htons(ETH_P_IP))
		return 0;
	if (ip->ihl < 5 || ip->protocol != IPPROTO_UDP)
		return 0;
	udp = (void *)ip + ip->ihl * 4;
	if ((void *)(udp + 1) > data_end)
		return 0;
	return udp->dest == bpf_htons(DROPPED_PORT);
}

SEC("xdp")
int xdp_drop_port(struct xdp_md *ctx)
{
	if (is_unwanted(ctx))
		return np_chain_end(XDP_DROP);
	return np_chain_next(ctx);
}

char _license[] SEC("license") = "Dual BSD/GPL";
