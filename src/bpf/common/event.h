/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The head of every event of every tool, and the counters of the engine: the
 * contract between the BPF programs and src/engine.
 */
#ifndef NETPROBE_EVENT_H
#define NETPROBE_EVENT_H

#define NP_COMM_LEN 16

struct np_head {
	__u64 ts; /* ns of CLOCK_MONOTONIC (bpf_ktime_get_ns) */
	__u32 len; /* bytes of the event with this head; perf pads what follows */
	__u16 kind; /* the tool's own event kind */
	__u16 cpu;
	__u32 tgid; /* process and thread that were current */
	__u32 pid;
	__u8 comm[NP_COMM_LEN]; /* name of the current thread, NUL-padded */
};

_Static_assert(sizeof(struct np_head) == 40, "np_head is part of the contract");

/* One per CPU, in the map `stats`. Counts since the start of the run. */
struct np_stats {
	__u64 sent; /* events handed to the buffer, lost ones included */
	__u64 lost; /* events that the full buffer refused */
	__u64 map_full; /* insertions that a full map refused */
	__u64 hits; /* events of the filter that matched (tool's own use) */
};

#endif
