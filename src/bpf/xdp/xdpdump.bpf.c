// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The programs that netprobe attaches to an interface itself: xdp_dump captures
 * and hands on to the chain, xdp_chain only hands on (it stands in when a capture
 * ends and programs of the user's remain in the chain).
 */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

#include "xdp/netprobe_chain.h"
#include "xdp/xdpdump.h"
#include "common/no_cast.bpf.h"
#include "xdp/xdpdump_stats.bpf.h"
#include "common/output_perf.bpf.h"
#include "common/frame_direct.bpf.h"
#include "common/outer.bpf.h"
#include "filter/filter_xdp.bpf.h"

/* Bytes of each packet to send; at least 1, at most NP_XDP_MAX_CAPTURE. */
const volatile __u32 snaplen = NP_XDP_MAX_CAPTURE;
/* Send one matching packet in this many. */
const volatile __u32 sample_every = 1;
/* Packets may have outer headers in front of them: those of this tunnel. */
const volatile __u8 has_outer = 0;
const volatile struct np_tunnel tunnel = {};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct np_chain_state);
} chain_state SEC(".maps");

/*
 * User space knows all slots to be empty: 1. It says so after it has looked, and
 * takes it back before it puts a program in (src/chain/place.rs).
 */
__u32 chain_empty = 0;

/*
 * By the number in chain_empty: nothing, and xdp_alone. Held by the capturing process
 * and not pinned: when that dies, the kernel empties it. So what a process
 * knows ends with it, whatever kills it.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 2);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
} chain_knowledge SEC(".maps");

/* Keeps the types of the contract in the object, for the skeleton. */
struct np_xdp_packet np_unused_packet SEC(".data");
struct np_xdp_event np_unused_event SEC(".data");
struct np_xdp_count np_unused_count SEC(".data");
struct np_chain_stats np_unused_stats SEC(".data");
enum np_xdp_kind np_unused_xdp_kind SEC(".data");
enum np_xdp_capture np_unused_xdp_capture SEC(".data");
enum np_xdp_sent np_unused_xdp_sent SEC(".data");
enum np_chain_limit np_unused_chain_limit SEC(".data");
enum np_chain_kind np_unused_chain_kind SEC(".data");
enum np_chain_state_limit np_unused_chain_state_limit SEC(".data");

static __always_inline __u64 packet_len(struct xdp_md *ctx)
{
	if (np_filter_xdp_frags)
		return bpf_xdp_get_buff_len(ctx);
	return (long)ctx->data_end - (long)ctx->data;
}

/*
 * Sends one packet: the event, and behind it the packet's bytes, which the
 * kernel copies straight into the perf buffer, from all of its buffers.
 */
static __always_inline void capture(struct xdp_md *ctx)
{
	struct np_xdp_stats *count = (void *)np_stats_get();
	struct np_xdp_packet packet;
	__u64 whole, bytes = snaplen;

	if (!count)
		return;
	if (np_filter_on) {
		count->seen++;
		if (!np_filter_xdp(ctx))
			return;
	}
	packet.number = ++count->matched;
	if (sample_every > 1) {
		if (packet.number % sample_every)
			return;
		count->all.sent++;
	}

	packet.ts = bpf_ktime_get_ns();
	packet.kind = NP_XDP_CHAIN;
	packet.queue = ctx->rx_queue_index;
	packet.ifindex = ctx->ingress_ifindex;
	whole = packet_len(ctx);
	packet.whole = whole;
	if (bytes > whole)
		bytes = whole;
	packet.len = NP_XDP_PACKET_SENT + bytes;
	if (bpf_perf_event_output(ctx, &events, BPF_F_CURRENT_CPU | bytes << 32,
				  &packet, NP_XDP_PACKET_SENT))
		count->all.lost++;
}

/* Outer headers in front of the packet. */
static __always_inline __u32 outer_len(struct xdp_md *ctx)
{
	struct np_frame frame = {
		.data = (const __u8 *)(long)ctx->data,
		.end = (const __u8 *)(long)ctx->data_end,
		.len = packet_len(ctx),
	};
	__u32 link;

	return np_outer_len(&frame, &tunnel, &link);
}

/*
 * Captures what is behind the outer headers: the packet begins there meanwhile.
 * It can begin where it did again, since nothing else has moved it, and XDP gives
 * every packet more room in front than bpf_xdp_adjust_head asks for.
 */
static __always_inline void capture_inner(struct xdp_md *ctx)
{
	__u32 outer = outer_len(ctx);

	if (outer && bpf_xdp_adjust_head(ctx, outer))
		return;
	capture(ctx);
	if (outer)
		bpf_xdp_adjust_head(ctx, -(int)outer);
}

SEC("xdp")
int xdp_dump(struct xdp_md *ctx)
{
	if (has_outer)
		capture_inner(ctx);
	else
		capture(ctx);
	bpf_tail_call(ctx, &chain_knowledge, chain_empty);
	/* Still here: there may be programs in the chain. */
	return np_chain_next(ctx);
}

/* Ends a chain without programs. */
SEC("xdp")
int xdp_alone(struct xdp_md *ctx)
{
	return XDP_PASS;
}

SEC("xdp")
int xdp_chain(struct xdp_md *ctx)
{
	return np_chain_next(ctx);
}

char _license[] SEC("license") = "Dual BSD/GPL";
