// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Hands a packet on, as one that comes by its device: for tests/live/latency_requests.rs. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

SEC("tc")
int tc_stamp(struct __sk_buff *skb)
{
	return bpf_clone_redirect(skb, skb->ifindex, BPF_F_INGRESS);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
