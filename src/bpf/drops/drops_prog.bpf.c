// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * netprobe drops --programs: what XDP, tc and cgroup programs drop, counted by a
 * fexit program on each of them. User space prepares this object once and loads a
 * program once for each watched one, with that one's id in the place of
 * DROP_PROGRAM_ID.
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "drops/drops_prog.h"

#define DROP_TC_SHOT 2 /* TC_ACT_SHOT of include/uapi/linux/pkt_cls.h */

enum drop_program drop_program_type;
struct drop_verdict drop_verdict_type;

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, struct drop_verdict);
	__type(value, __u64);
} verdicts SEC(".maps");

static __always_inline __u32 program_id(void)
{
	__u64 id;

	asm volatile("%0 = %1" : "=r"(id) : "i"(DROP_PROGRAM_ID));
	return id;
}

static __always_inline void count(struct net_device *dev, __s32 verdict)
{
	struct drop_verdict key = {
		.program = program_id(),
		.verdict = verdict,
	};
	__u64 *packets, none = 0;

	if (dev) {
		key.ifindex = BPF_CORE_READ(dev, ifindex);
		key.netns = BPF_CORE_READ(dev, nd_net.net, ns.inum);
	}
	packets = bpf_map_lookup_elem(&verdicts, &key);
	if (!packets) {
		bpf_map_update_elem(&verdicts, &key, &none, BPF_NOEXIST);
		packets = bpf_map_lookup_elem(&verdicts, &key);
	}
	if (packets)
		__sync_fetch_and_add(packets, 1);
}

SEC("fexit/xdp")
int BPF_PROG(drops_xdp, struct xdp_buff *xdp, int verdict)
{
	if (verdict == XDP_ABORTED || verdict == XDP_DROP)
		count(BPF_CORE_READ(xdp, rxq, dev), verdict);
	return 0;
}

SEC("fexit/tc")
int BPF_PROG(drops_tc, struct sk_buff *skb, int verdict)
{
	if (verdict == DROP_TC_SHOT)
		count(BPF_CORE_READ(skb, dev), verdict);
	return 0;
}

/* At a cgroup the lowest bit lets a packet pass. */
SEC("fexit/cgroup")
int BPF_PROG(drops_cgroup, struct sk_buff *skb, int verdict)
{
	if (!(verdict & 1))
		count(BPF_CORE_READ(skb, dev), verdict);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
