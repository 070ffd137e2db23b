// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Sends each packet back out of the interface that it came in by, as it is. It
 * knows nothing of the chain, as any XDP program: it ends the chain.
 *
 *	clang -O2 -g -target bpf -c examples/xdp_echo.bpf.c -o xdp_echo.o
 *	netprobe xdpchain add enp0s9 xdp_echo.o
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <bpf/bpf_helpers.h>

SEC("xdp_echo")
int xdp_echo_prog(struct xdp_md *ctx)
{
	void *data_end = (void *)(long)ctx->data_end;
	void *data = (void *)(long)ctx->data;

	if (data + sizeof(struct ethhdr) > data_end)
		return XDP_DROP;
	return bpf_redirect(ctx->ingress_ifindex, 0);
}

char _license[] SEC("license") = "Dual BSD/GPL";
