/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Does somebody still read? User space says at each round of its own that it is
 * there (src/engine/heartbeat.rs); a program that runs some times a second keeps the
 * others from working while it has been silent for too long (stopped, hung,
 * without memory).
 */
#ifndef NETPROBE_HEARTBEAT_H
#define NETPROBE_HEARTBEAT_H

enum np_heartbeat_rate {
	NP_HEARTBEAT_HZ = 4,
};

/* The one value of the map `data_heartbeat`. Times: ns of CLOCK_MONOTONIC. */
struct np_heartbeat {
	__u64 drained; /* user space: when its last round began */
	__u64 limit; /* user space: how old that may become, ns */
	__u64 looked; /* the program's last run */
	__u64 since; /* the others stand still since then; 0: they work */
	__u64 gaps; /* how often they have stood still */
	__u64 gap_ns; /* how long in all, but for the time since `since` */
};

#endif
