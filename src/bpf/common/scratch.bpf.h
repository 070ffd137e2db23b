/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Places in maps of each CPU's memory at hand, by the kind of a program: the kernel
 * keeps kprobes from interrupting one another, but a tracepoint may interrupt a
 * kprobe's program, and a kprobe a tracepoint's.
 */
#ifndef NETPROBE_SCRATCH_BPF_H
#define NETPROBE_SCRATCH_BPF_H

enum {
	SCRATCH_PROBE,
	SCRATCH_TRACEPOINT,
	SCRATCH_DEVICE, /* tracepoints of devices: drops in an interrupt */
	SCRATCH_COUNT,
};

#endif
