// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The programs that netprobe attaches to an interface itself: xdp_dump captures
 * and hands on to the chain, xdp_chain only hands on (it stands in when a capture
 * ends and programs of the user's remain in the chain).
 */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

#define NP_FILTER_XDP
#include "netprobe_chain.h"
#include "event.bpf.h"
#include "filter.bpf.h"
#include "xdpdump.h"

/* Bytes of each packet to send; at least 1, at most NP_XDP_MAX_CAPTURE. */
const volatile __u32 snaplen = NP_XDP_MAX_CAPTURE;
/* Send one matching packet in this many. */
const volatile __u32 sample_every = 1;
/* bpf_xdp_get_buff_len exists (kernels from 5.18); packets have one buffer before. */
const volatile __u8 use_buff_len = 0;

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct np_xdp_count);
} xdp_count SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct np_chain_state);
} chain_state SEC(".maps");

/* Keeps the types of the contract in the object, for the skeleton. */
struct np_xdp_event np_unused_event SEC(".data");
struct np_chain_stats np_unused_stats SEC(".data");

static __always_inline __u64 packet_len(struct xdp_md *ctx)
{
	if (use_buff_len)
		return bpf_xdp_get_buff_len(ctx);
	return (long)ctx->data_end - (long)ctx->data;
}

/*
 * Sends one packet: the event, and behind it the packet's bytes, which the
 * kernel copies straight into the perf buffer, from all of its buffers.
 */
static __always_inline void capture(struct xdp_md *ctx)
{
	struct np_xdp_event event = {};
	struct np_xdp_count *count;
	struct np_stats *stats;
	__u32 zero = 0;
	__u64 bytes;

	count = bpf_map_lookup_elem(&xdp_count, &zero);
	if (!count)
		return;
	count->seen++;
	if (!np_filter_xdp(ctx))
		return;
	count->matched++;
	if (sample_every > 1 && count->matched % sample_every)
		return;

	event.head.ts = bpf_ktime_get_ns();
	event.head.kind = NP_XDP_CHAIN;
	event.head.cpu = bpf_get_smp_processor_id();
	event.id = (__u64)event.head.cpu << 48 | count->matched;
	event.ifindex = ctx->ingress_ifindex;
	event.queue = ctx->rx_queue_index;
	event.len = packet_len(ctx);
	bytes = event.len < snaplen ? event.len : snaplen;
	event.head.len = sizeof(event) + bytes;

	stats = np_stats_get();
	if (!stats)
		return;
	stats->sent++;
	if (bpf_perf_event_output(ctx, &events, BPF_F_CURRENT_CPU | bytes << 32,
				  &event, sizeof(event)))
		stats->lost++;
}

SEC("xdp")
int xdp_dump(struct xdp_md *ctx)
{
	capture(ctx);
	return np_chain_next(ctx);
}

SEC("xdp")
int xdp_chain(struct xdp_md *ctx)
{
	return np_chain_next(ctx);
}

char _license[] SEC("license") = "Dual BSD/GPL";
