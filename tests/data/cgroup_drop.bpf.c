// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Lets nothing out of a cgroup: for tests/live/drops_programs.rs. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

SEC("cgroup_skb/egress")
int cgroup_drop(struct __sk_buff *skb)
{
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
