/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The contract of `netprobe drops --programs`: packets that BPF programs drop, by program and verdict. */
#ifndef NETPROBE_DROPS_PROG_H
#define NETPROBE_DROPS_PROG_H

/* A constant that user space looks for in the loaded instructions. */
enum drop_program {
	DROP_PROGRAM_ID = 0x4e50b1d1,
};

struct drop_verdict {
	__u32 program; /* its id */
	__s32 verdict; /* XDP_*, TC_ACT_*, or what a cgroup's program gave back */
	__u32 ifindex;
	__u32 netns; /* inode */
};

_Static_assert(sizeof(struct drop_verdict) == 16,
	       "drop_verdict is part of the contract");

#endif
