/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The way of an event out of the kernel: the perf buffers, the counters of
 * loss, the common head. Included by every tool's program; needs vmlinux.h
 * and bpf_helpers.h before it.
 */
#ifndef NETPROBE_EVENT_BPF_H
#define NETPROBE_EVENT_BPF_H

#include "common/event.h"

struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
} events SEC(".maps");

#ifdef NP_RINGBUF
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

/*
 * The reader is woken when the ring comes to be as full as it wants, not for
 * each record: it looks by itself now and then.
 */
static __always_inline long np_ring_output(void *data, __u64 len)
{
	__u32 cpu = bpf_get_smp_processor_id();
	void *ring = bpf_map_lookup_elem(&rings, &cpu);
	__u64 there;

	if (!ring)
		return -1;
	there = bpf_ringbuf_query(ring, BPF_RB_AVAIL_DATA);
	return bpf_ringbuf_output(ring, data, len,
				  there < np_ring_wakeup &&
						  there + len >= np_ring_wakeup
					  ? BPF_RB_FORCE_WAKEUP
					  : BPF_RB_NO_WAKEUP);
}
#endif

/* A tool with counters of its own defines NP_STATS: a struct that begins with np_stats. */
#ifndef NP_STATS
#define NP_STATS struct np_stats
#endif

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, NP_STATS);
} stats SEC(".maps");

/* The counters of this CPU; never NULL in practice, but the verifier asks. */
static __always_inline struct np_stats *np_stats_get(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&stats, &zero);
}

/* A full map refused an insertion. */
static __always_inline void np_count_map_full(void)
{
	struct np_stats *count = np_stats_get();

	if (count)
		count->map_full++;
}

/* Fills the head but for `len`, which np_output() sets. */
static __always_inline void np_head_fill(struct np_head *head, __u16 kind)
{
	__u64 id = bpf_get_current_pid_tgid();

	head->ts = bpf_ktime_get_ns();
	head->kind = kind;
	head->cpu = bpf_get_smp_processor_id();
	head->tgid = id >> 32;
	head->pid = (__u32)id;
#ifdef NP_HEAD_TYPED
	/* compat.bpf.h is there, too. The helper copies as a string: 120 instructions more. */
	if (use_cast) {
		np_load_16((__u64 *)head->comm,
			   (void *)bpf_get_current_task() +
				   bpf_core_field_offset(struct task_struct,
							 comm));
		return;
	}
#endif
	bpf_get_current_comm(head->comm, sizeof(head->comm));
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
#ifdef NP_RINGBUF
	if (np_ring_wakeup)
		err = np_ring_output(head, len);
	else
#endif
		err = bpf_perf_event_output(ctx, &events, BPF_F_CURRENT_CPU,
					    head, len);
	if (count) {
		count->sent++;
		if (err)
			count->lost++;
	}
	return err;
}

#endif
