// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Watches one loaded XDP program (or one of its subprograms) from outside, by
 * fentry and fexit: what goes in, what comes out, and with which verdict. The
 * program is not changed. One object of this for each watched function.
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "xdp/netprobe_chain.h"
#include "common/cast.bpf.h"
#include "common/stats.bpf.h"
#include "common/output_perf.bpf.h"
#include "common/frame_probe.bpf.h"
#include "common/outer.bpf.h"
#include "filter/filter.bpf.h"
#include "xdp/xdpdump.h"

/* Bytes of each packet to send; at least 1, at most NP_XDP_MAX_CAPTURE. */
const volatile __u32 snaplen = NP_XDP_MAX_CAPTURE;
/* Send one matching packet in this many. */
const volatile __u32 sample_every = 1;
/* bpf_xdp_get_buff_len exists (kernels from 5.18); packets have one buffer before. */
const volatile __u8 use_buff_len = 0;
/* Which of the two points to send. */
const volatile __u8 send_entry = 1;
const volatile __u8 send_exit = 1;
/* Bits of verdicts (1 << XDP_DROP) to send at exit. */
const volatile __u32 verdicts = ~0U;
/* The index that user space gave to this program. */
const volatile __u32 program = 0;
/* The same program may run at other interfaces too. */
const volatile __u32 ifindex = 0;
const volatile __u32 netns = 0;
/* Packets may have outer headers in front of them: those of this tunnel. */
const volatile __u8 has_outer = 0;
const volatile struct np_tunnel tunnel = {};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct np_xdp_count);
} xdp_count SEC(".maps");

/*
 * What the entry decided about the packet that this CPU is handling, for the
 * exit: it may look another way then. XDP does not nest on a CPU.
 */
struct decision {
	__u64 id;
	__u64 data; /* where the packet began */
	__u8 wanted;
	__u8 pad[7];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct decision);
} decisions SEC(".maps");

static __always_inline int is_ours(struct xdp_buff *xdp)
{
	struct net_device *dev = xdp->rxq->dev;

	return dev->ifindex == ifindex && dev->nd_net.net->ns.inum == netns;
}

static __always_inline __u64 packet_len(struct xdp_buff *xdp)
{
	if (use_buff_len)
		return bpf_xdp_get_buff_len((void *)xdp);
	return (long)xdp->data_end - (long)xdp->data;
}

/* Outer headers in front of the packet, and the link header among them. */
static __always_inline __u32 outer_len(struct xdp_buff *xdp, __u32 *link)
{
	struct np_frame frame = {
		.data = xdp->data,
		.end = xdp->data_end,
		.len = packet_len(xdp),
	};

	*link = 0;
	return has_outer ? np_outer_len(&frame, &tunnel, link) : 0;
}

static __always_inline void send(struct xdp_buff *xdp,
				 const struct decision *decision, __u16 kind,
				 __s32 moved, int verdict)
{
	struct np_xdp_event event = {};
	struct np_stats *stats;
	__u64 bytes, wanted = snaplen;
	__u32 link;

	event.head.ts = bpf_ktime_get_ns();
	event.head.kind = kind;
	event.head.cpu = bpf_get_smp_processor_id();
	event.id = decision->id;
	event.moved = moved;
	event.ifindex = ifindex;
	event.queue = xdp->rxq->queue_index;
	event.verdict = verdict;
	event.program = program;
	event.len = packet_len(xdp);
	event.outer = outer_len(xdp, &link);
	event.outer_link = link;
	wanted += event.outer;
	if (wanted > NP_XDP_MAX_CAPTURE)
		wanted = NP_XDP_MAX_CAPTURE;
	bytes = event.len < wanted ? event.len : wanted;
	event.head.len = sizeof(event) + bytes;

	stats = np_stats_get();
	if (!stats)
		return;
	stats->sent++;
	if (bpf_xdp_output(xdp, &events, BPF_F_CURRENT_CPU | bytes << 32,
			   &event, sizeof(event)))
		stats->lost++;
}

/* The filter sees the first buffer; a load beyond it does not match. */
static __always_inline int passes(struct xdp_buff *xdp)
{
	__u64 linear = (long)xdp->data_end - (long)xdp->data;
	__u32 link, outer = np_filter_on ? outer_len(xdp, &link) : 0;
	struct np_filter_fields fields = {
		.head = (__u64)xdp->data + outer,
		.tail = linear - outer,
		.data_len = packet_len(xdp) - linear,
	};

	return np_filter_fields(&fields);
}

/* Is one that the filter matches, one in sample_every. */
static __always_inline int counts(struct np_xdp_count *count)
{
	count->matched++;
	return sample_every <= 1 || count->matched % sample_every == 0;
}

/* With verdicts to choose by, the exit decides which packets match and are sampled. */
static __always_inline int is_wanted(struct xdp_buff *xdp,
				     struct np_xdp_count *count)
{
	count->seen++;
	return passes(xdp) && (verdicts != ~0U || counts(count));
}

static __always_inline int has_verdict(int verdict)
{
	return verdicts == ~0U ||
	       ((__u32)verdict < 32 && (verdicts & 1U << verdict));
}

/*
 * By how much the packet's start was moved since the entry. Through the map, since kernels
 * from 7.x know the member for a pointer and let none of its arithmetic out.
 */
static __always_inline __s32 moved(struct xdp_buff *xdp,
				   struct decision *decision)
{
	volatile __u64 *data = &decision->data;
	__u64 before = *data;

	*data = (__u64)xdp->data;
	return *data - before;
}

SEC("fentry/xdp")
int BPF_PROG(xdp_entry, struct xdp_buff *xdp)
{
	__u32 zero = 0;
	struct decision *decision = bpf_map_lookup_elem(&decisions, &zero);
	struct np_xdp_count *count = bpf_map_lookup_elem(&xdp_count, &zero);

	if (!decision || !count)
		return 0;
	decision->wanted = is_ours(xdp) && is_wanted(xdp, count);
	if (!decision->wanted)
		return 0;
	decision->id = (__u64)bpf_get_smp_processor_id() << 48 | count->seen;
	decision->data = (__u64)xdp->data;
	if (send_entry)
		send(xdp, decision, NP_XDP_ENTRY, 0, 0);
	return 0;
}

SEC("fexit/xdp")
int BPF_PROG(xdp_exit, struct xdp_buff *xdp, int verdict)
{
	__u32 zero = 0;
	struct decision *decision = bpf_map_lookup_elem(&decisions, &zero);
	struct np_xdp_count *count = bpf_map_lookup_elem(&xdp_count, &zero);

	if (!decision || !count || !decision->wanted)
		return 0;
	decision->wanted = 0;
	if (!has_verdict(verdict) || (verdicts != ~0U && !counts(count)))
		return 0;
	if (send_exit)
		send(xdp, decision, NP_XDP_EXIT, moved(xdp, decision), verdict);
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
