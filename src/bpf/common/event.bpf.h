/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The way of an event out of the kernel: the perf buffers, the counters of
 * loss, the common head. output_perf.bpf.h or output_ring.bpf.h sends it. Needs
 * vmlinux.h, bpf_helpers.h, cast.bpf.h (or no_cast.bpf.h) and stats.bpf.h (or a
 * tool's own map `stats`) before it.
 */
#ifndef NETPROBE_EVENT_BPF_H
#define NETPROBE_EVENT_BPF_H

#include "common/event.h"
#include "common/compat.bpf.h"

struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
} events SEC(".maps");

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

/* The name of the current thread, NUL-padded. */
static __always_inline void np_read_comm(__u8 *comm)
{
	/* The helper copies as a string: 120 instructions more. */
	if (use_cast)
		np_load_16((__u64 *)comm,
			   (void *)bpf_get_current_task() +
				   bpf_core_field_offset(struct task_struct,
							 comm));
	else
		bpf_get_current_comm(comm, NP_COMM_LEN);
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
	np_read_comm(head->comm);
}

/* An event was sent, or refused by its buffer (err is not 0). */
static __always_inline void np_count_output(struct np_stats *count, long err)
{
	if (count) {
		count->sent++;
		if (err)
			count->lost++;
	}
}

#endif
