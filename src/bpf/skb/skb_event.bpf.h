/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * netprobe skb: is an sk_buff one of ours, and its event: what the programs on
 * functions (skb.bpf.c) and those on tc and XDP programs (skb_prog.bpf.c) share.
 * Needs vmlinux.h and libbpf's headers before it.
 */
#ifndef NETPROBE_SKB_EVENT_BPF_H
#define NETPROBE_SKB_EVENT_BPF_H

#include "skb/skb.h"
#include "common/cast.bpf.h"
#include "common/compat.bpf.h"
#include "common/config.bpf.h"
#include "common/stats.bpf.h"
#include "common/output_ring.bpf.h"
#include "filter/filter.bpf.h"
#include "skb/members.bpf.h"
#include "common/packet.bpf.h"
#include "common/fields.bpf.h"
#include "skb/skb_owner.bpf.h"
#include "skb/skb_sections.bpf.h"
#include "skb/skb_track.bpf.h"
#include "skb/skb_return.bpf.h"
#include "skb/skb_xdp.bpf.h"
#include "skb/skb_read.bpf.h"
#include "skb/netfilter.bpf.h"
#include "skb/skb_drops.bpf.h"
#include "skb/skb_columns.bpf.h"

/* Not 0 while a program of skb_prog.bpf.c runs on this CPU. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} watching SEC(".maps");

static __always_inline void watching_set(__u32 value)
{
	__u32 zero = 0;
	__u32 *on = bpf_map_lookup_elem(&watching, &zero);

	if (on)
		*on = value;
}

/* The fixed part of an event; `addr`: of its sk_buff or xdp_buff. */
static __always_inline void event_begin(struct skb_scratch *buf, __u64 addr,
					const struct hit *hit)
{
	struct skb_event *event = (struct skb_event *)buf->bytes;

	np_head_fill(&event->head, hit->kind);
	event->skb = addr;
	event->func = hit->func;
	/* Only a drop has this one. */
	event->sections = hit->drop ? sections : sections & ~SKB_SECTION_DROP;
	event->reason = hit->reason;
}

/* The sections of a packet's tuple and its identity, at `len`; the length then. */
static __always_inline __u64 event_tuple(struct skb_scratch *buf, __u64 len,
					 const struct np_tuple *tuple,
					 const struct hit *hit)
{
	if (sections & SKB_SECTION_TUPLE) {
		*(struct np_tuple *)&buf->bytes[len] = *tuple;
		len += sizeof(struct np_tuple);
	}
	if (sections & SKB_SECTION_PACKET) {
		*(__u64 *)&buf->bytes[len] = hit->packet;
		len += sizeof(__u64);
	}
	return len;
}

/*
 * A single kprobe on arm64 hits before the function has made its frame: its
 * caller is in the link register alone, and bpf_get_stack passes over it.
 */
const volatile __u8 stack_lacks_caller = 0;

/* Such a stack, with the caller behind the first frame. */
static __always_inline long get_stack_with(void *ctx, __u64 *frames,
					   __u64 caller)
{
	long stack = bpf_get_stack(ctx, frames + 1,
				   (SKB_STACK_DEPTH - 1) * sizeof(__u64), 0);

	if (stack <= 0)
		return 0;
	frames[0] = frames[1];
	frames[1] = caller;
	return stack + sizeof(__u64);
}

/* The stack, which comes last; and out. */
static __always_inline void event_end(void *ctx, struct skb_scratch *buf,
				      __u64 len, const struct hit *hit)
{
	long stack;

	if (sections & SKB_SECTION_STACK) {
		if (stack_lacks_caller && hit->unseen_caller)
			stack = get_stack_with(ctx, (__u64 *)&buf->bytes[len],
					       hit->unseen_caller);
		else
			stack = bpf_get_stack(ctx, &buf->bytes[len],
					      SKB_STACK_DEPTH * sizeof(__u64),
					      0);
		if (stack > 0)
			len += stack & (1024 - 1);
	}
	if (len > sizeof(buf->bytes))
		return;
	np_output(ctx, (struct np_head *)buf->bytes, len);
}

/*
 * Sections beside META and TUPLE: one question where none of them is asked for
 * (each costs 3 instructions).
 */
#define SKB_SECTIONS_MORE (~(SKB_SECTION_META | SKB_SECTION_TUPLE))

/* Where the tuple is read to: its place in an event, or behind all that an event without it may have. */
static __always_inline struct np_tuple *tuple_place(struct skb_scratch *buf)
{
	__u64 at = sizeof(struct skb_event);

	if (!(sections & SKB_SECTION_TUPLE))
		at = sizeof(*buf) - sizeof(struct np_tuple);
	else if (sections & SKB_SECTION_META)
		at += sizeof(struct skb_meta);
	return (struct np_tuple *)&buf->bytes[at];
}

/*
 * Writes the event: the fixed part and the sections asked for. The tuple is in
 * its place already (see tuple_place), where it is asked for.
 */
static __always_inline void write_event_by(void *ctx, struct skb_scratch *buf,
					   struct sk_buff *skb,
					   const struct np_tuple *tuple,
					   const struct hit *hit,
					   const bool use_cast)
{
	const struct skb_source from = {
		.skb = skb,
		.tuple = tuple,
		.hit = hit,
	};
	__u64 len = sizeof(struct skb_event);

	event_begin(buf, (__u64)skb, hit);
	/* `sections` is a constant, so each offset is a constant. */
	if (sections & SKB_SECTION_META) {
		read_meta(skb, hit->sk, (struct skb_meta *)&buf->bytes[len],
			  use_cast);
		len += sizeof(struct skb_meta);
	}
	if (sections & SKB_SECTION_TUPLE)
		len += sizeof(struct np_tuple);
	if (sections & SKB_SECTIONS_MORE)
		len = write_more(buf, len, &from);
	event_end(ctx, buf, len, hit);
}

/* `place`: SCRATCH_* of the program's kind. */
static __always_inline struct skb_scratch *scratch_get(__u32 place)
{
	return bpf_map_lookup_elem(&scratch, &place);
}

static __always_inline void write_event(void *ctx, struct sk_buff *skb,
					const struct np_tuple *tuple,
					const struct hit *hit)
{
	struct skb_scratch *buf = scratch_get(SCRATCH_PROBE);

	if (!buf)
		return;
	if (sections & SKB_SECTION_TUPLE)
		*tuple_place(buf) = *tuple;
	write_event_by(ctx, buf, skb, tuple, hit, use_cast);
}

/* The tuple is needed for the filter or for the event. */
static __always_inline bool wants_tuple(const struct np_config *cfg)
{
	return (cfg->fields & NP_FIELDS_PACKET) || who_on ||
	       (sections & (SKB_SECTION_TUPLE | SKB_SECTION_TUNNEL));
}

/* The gates by typed loads. */
static __always_inline bool match_typed(const struct np_config *cfg,
					const void *skb_ptr, const void *sk_ptr)
{
	struct sk_buff *skb = NP_CAST(sk_buff, skb_ptr);
	struct sock *sk = sk_ptr ? NP_CAST(sock, sk_ptr) : NULL;
	__u32 f = fields_again(cfg);

	if ((f & NP_FIELD_MARK) && !match_mark(cfg, skb, true))
		return false;
	if ((f & NP_FIELDS_DEVICE) && !match_device(cfg, skb, sk, true))
		return false;
	return !(fields_again(cfg) & NP_FIELDS_PACKET) || may_match(skb_ptr);
}

/* The gates without them: functions of their own, for their stack and registers. */
static __noinline __u64 match_mark_read(const void *skb_ptr)
{
	return match_mark(np_config_get(), (void *)skb_ptr, false);
}

static __noinline __u64 match_device_read(const void *skb_ptr,
					  const void *sk_ptr)
{
	return match_device(np_config_get(), (void *)skb_ptr, (void *)sk_ptr,
			    false);
}

static __always_inline bool match_read(const struct np_config *cfg,
				       const void *skb_ptr, const void *sk_ptr)
{
	__u32 f = fields_again(cfg);

	if ((f & NP_FIELD_MARK) && !match_mark_read(skb_ptr))
		return false;
	if ((fields_again(cfg) & NP_FIELDS_DEVICE) &&
	    !match_device_read(skb_ptr, sk_ptr))
		return false;
	return !(fields_again(cfg) & NP_FIELDS_PACKET) ||
	       may_match_read(skb_ptr);
}

/*
 * The gates that cost little: the field filters, then the expression. This is
 * what a packet that does not match costs: that the session has ended is asked
 * behind them.
 */
static __always_inline bool passes_gates(const struct np_config *cfg,
					 const void *skb_ptr,
					 const void *sk_ptr)
{
	if (fields_again(cfg) &&
	    (!(use_cast ? match_typed(cfg, skb_ptr, sk_ptr)
			: match_read(cfg, skb_ptr, sk_ptr)) ||
	     (fields_again(cfg) & NP_PAUSED)))
		return false;
	return np_filter_skb(skb_ptr);
}

/*
 * Is an skb one of ours that has passed the gates (`matched`) or may be tracked? Reads the tuple where it is needed, and the
 * packet's identity. `ctx` and `sp`, the stack pointer: see track_packet. With `begin` false it is one of ours only where it is
 * tracked already.
 */
static __always_inline bool is_ours(const struct np_config *cfg, void *ctx,
				    __u64 sp, struct sk_buff *skb,
				    struct np_tuple *tuple, __u64 *packet,
				    bool matched, bool begin,
				    const bool use_cast)
{
	if (track)
		*packet = track_find(skb);
	if (!matched && !*packet && !track_stack)
		return false;
	if (wants_tuple(cfg))
		np_read_tuple(skb, tuple);
	if (matched && (cfg->fields & NP_FIELDS_PACKET))
		matched = match_tuple(cfg, tuple);
	if (track) {
		*packet = track_packet(ctx, sp, skb, *packet, matched, begin);
		matched = matched || *packet;
	}
	return matched;
}

#endif
