/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Events that are no hit with an skb: what a function gives back, and functions
 * without an skb that run below one with a packet. Needs skb_track.bpf.h.
 */
#ifndef NETPROBE_SKB_RETURN_BPF_H
#define NETPROBE_SKB_RETURN_BPF_H

#include "skb/skb.h"

/* --output-retval */
const volatile __u8 returns_on = 0;

struct skb_entered_key {
	__u64 context; /* see track_context */
	__u64 func;
};

struct skb_entered {
	__u64 skb;
	__u64 packet;
};

/* Functions that were entered with a packet of ours and have not ended. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct skb_entered_key);
	__type(value, struct skb_entered);
} entered SEC(".maps");

static __always_inline void return_expect(struct pt_regs *ctx, __u64 func,
					  __u64 skb, __u64 packet)
{
	struct skb_entered_key key = {
		.context = track_context(regs_address(ctx)),
		.func = func,
	};
	struct skb_entered value = {.skb = skb, .packet = packet};

	bpf_map_update_elem(&entered, &key, &value, BPF_ANY);
}

/* An event of a fixed part and, where tracking is on, the packet. */
static __always_inline void write_short(void *ctx, __u16 kind, __u64 func,
					__u64 skb, __u64 packet, __u32 value)
{
	struct {
		struct skb_event event;
		__u64 packet;
	} e = {};

	np_head_fill(&e.event.head, kind);
	e.event.skb = skb;
	e.event.func = func;
	e.event.reason = value;
	e.event.sections = track ? SKB_SECTION_PACKET : 0;
	e.packet = packet;
	np_output(ctx, &e.event.head,
		  track ? sizeof(e) : sizeof(struct skb_event));
}

/* bpf_get_func_ip is needed: kernels from 5.15. */
SEC("kprobe/skb_return")
int skb_return(struct pt_regs *ctx)
{
	struct skb_entered_key key = {
		.context = track_context(regs_address(ctx)),
		.func = bpf_get_func_ip(ctx),
	};
	struct skb_entered *e = bpf_map_lookup_elem(&entered, &key);
	const struct np_config *cfg = np_config_get();

	if (!e)
		return 0;
	if (!(cfg->fields & NP_PAUSED))
		write_short(ctx, SKB_KIND_RETURN, key.func, e->skb, e->packet,
			    (__u32)PT_REGS_RC(ctx));
	bpf_map_delete_elem(&entered, &key);
	return 0;
}

#endif
