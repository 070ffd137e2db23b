/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Events by perf buffers, or by a ring buffer of each CPU (--transport ringbuf). */
#ifndef NETPROBE_OUTPUT_BPF_H
#define NETPROBE_OUTPUT_BPF_H

#include "common/event.bpf.h"

/* --transport ringbuf (kernels from 5.8): bytes in a ring that wake its reader; 0: perf buffers. */
const volatile __u32 np_ring_wakeup = 0;

struct np_ring {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
};

/* A ring for each CPU, made by user space: one for all would be one lock for all. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct np_ring);
} rings SEC(".maps");

/* This CPU's. */
static __always_inline void *np_ring_get(void)
{
	__u32 cpu = bpf_get_smp_processor_id();

	return bpf_map_lookup_elem(&rings, &cpu);
}

/*
 * The reader is woken when the ring comes to be as full as it wants, not for
 * each record: it looks by itself now and then.
 */
static __always_inline __u64 np_ring_flags(void *ring, __u64 len)
{
	__u64 there = bpf_ringbuf_query(ring, BPF_RB_AVAIL_DATA);

	return there < np_ring_wakeup && there + len >= np_ring_wakeup
		       ? BPF_RB_FORCE_WAKEUP
		       : BPF_RB_NO_WAKEUP;
}

static __always_inline long np_ring_output(void *data, __u64 len)
{
	void *ring = np_ring_get();

	if (!ring)
		return -1;
	return bpf_ringbuf_output(ring, data, len, np_ring_flags(ring, len));
}

/*
 * Room for an event of `len` bytes (a constant), which the caller fills, with its
 * head, and submits with `flags`; NULL: none. Counts it as sent and, then, as lost.
 */
static __always_inline void *np_ring_reserve(const __u64 len, __u64 *flags)
{
	void *ring = np_ring_get(), *event = NULL;

	if (ring) {
		*flags = np_ring_flags(ring, len);
		event = bpf_ringbuf_reserve(ring, len, 0);
	}
	np_count_output(np_stats_get(), event ? 0 : -1);
	return event;
}

/*
 * Sends `len` bytes (the verifier must know bounds: 1 <= len) that begin with
 * a head, and counts the event as sent and, where the buffer is full, as lost.
 */
static __always_inline long np_output(void *ctx, struct np_head *head,
				      __u64 len)
{
	struct np_stats *count = np_stats_get();
	long err;

	head->len = len;
	if (np_ring_wakeup)
		err = np_ring_output(head, len);
	else
		err = bpf_perf_event_output(ctx, &events, BPF_F_CURRENT_CPU,
					    head, len);
	np_count_output(count, err);
	return err;
}

#endif
