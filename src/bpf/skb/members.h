/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Members of kernel structs that are shown with an event: where they are, and what was read. */
#ifndef NETPROBE_MEMBERS_H
#define NETPROBE_MEMBERS_H

enum np_path_limit {
	NP_PATHS = 4, /* shown at most */
	NP_PATH_POINTERS = 6, /* followed at most */
};

/* How to get at a number from the address of a struct on; from BTF. */
struct np_path {
	__u32 pointers; /* to follow: each at its offset from the one before */
	__u32 offsets[NP_PATH_POINTERS];
	__u32 offset; /* of the number, behind the last pointer */
	__u32 size; /* 1, 2, 4 or 8 bytes */
};

struct np_members {
	__u32 known; /* bit n: values[n] could be read */
	__u32 pad;
	__u64 values[NP_PATHS]; /* bytes as in memory, from the lowest on */
};

_Static_assert(sizeof(struct np_path) == 36, "np_path is part of the contract");
_Static_assert(sizeof(struct np_members) == 40,
	       "np_members is part of the contract");

#endif
