/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Events by perf buffers alone. */
#ifndef NETPROBE_OUTPUT_BPF_H
#define NETPROBE_OUTPUT_BPF_H

#include "common/event.bpf.h"

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
	err = bpf_perf_event_output(ctx, &events, BPF_F_CURRENT_CPU, head, len);
	np_count_output(count, err);
	return err;
}

#endif
