/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* xdpdump's counters: those of common/stats.bpf.h, and what the chain's programs said. */
#ifndef NETPROBE_XDPDUMP_STATS_BPF_H
#define NETPROBE_XDPDUMP_STATS_BPF_H

#include "xdp/xdpdump.h"

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct np_xdp_stats);
} stats SEC(".maps");

#endif
