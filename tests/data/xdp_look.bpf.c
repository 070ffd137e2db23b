// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Passes every packet as it is. As a program of several behind libxdp's dispatcher, it must change none. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

SEC("xdp")
int xdp_look(struct xdp_md *ctx)
{
	return XDP_PASS;
}

char _license[] SEC("license") = "Dual BSD/GPL";
