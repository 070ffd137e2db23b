/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The counters of loss: a map of struct np_stats. */
#ifndef NETPROBE_STATS_BPF_H
#define NETPROBE_STATS_BPF_H

#include "common/event.h"

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct np_stats);
} stats SEC(".maps");

#endif
