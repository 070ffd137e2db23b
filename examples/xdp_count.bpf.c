// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A link of the chain that looks on: counts packets and bytes per CPU, and hands
 * every packet on to the next slot. Read it by `bpftool map dump name packets`.
 *
 *	clang -O2 -g -target bpf -I src/bpf/xdp -c examples/xdp_count.bpf.c -o xdp_count.o
 *	netprobe xdpchain add enp0s9 xdp_count.o --slot 1
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "netprobe_chain.h"

struct count {
	__u64 packets;
	__u64 bytes;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct count);
} packets SEC(".maps");

SEC("xdp")
int xdp_count(struct xdp_md *ctx)
{
	__u32 zero = 0;
	struct count *count = bpf_map_lookup_elem(&packets, &zero);

	if (count) {
		count->packets++;
		count->bytes += ctx->data_end - ctx->data;
	}
	return np_chain_next(ctx);
}

char _license[] SEC("license") = "Dual BSD/GPL";
