/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Whose packets a run is about: the contract with src/tools/who. */
#ifndef NETPROBE_WHO_H
#define NETPROBE_WHO_H

/* Bits of who_on: what a socket has to be. All that are on must hold. */
enum who_bit {
	WHO_UID = 1, /* made by this user */
	WHO_CGROUP = 2, /* made in this cgroup (v2), or below it */
	WHO_PROCESS = 4, /* made or used by a process of who_tgids */
	WHO_COMM = 8, /* made or used by a thread of this name */
};

/* Values of who_tgids. */
enum who_process {
	WHO_MEMBER = 1,
	WHO_PARENT = 2, /* not itself, but what it forks */
};

/* Packets of one direction between two ends, by their namespace. */
struct who_flow {
	__u64 saddr[2]; /* as in struct np_tuple */
	__u64 daddr[2];
	__u16 sport; /* host byte order */
	__u16 dport;
	__u32 netns; /* inode */
	__u32 l4_proto;
	__u32 pad;
};

/* What a socket is bound to. */
struct who_end {
	__u64 addr[2]; /* 0: any */
	__u32 netns; /* inode */
	__u16 port; /* host byte order */
	__u8 l4_proto;
	__u8 family; /* 4 or 6; 0: any address of either */
};

_Static_assert(sizeof(struct who_flow) == 48,
	       "who_flow is part of the contract");
_Static_assert(sizeof(struct who_end) == 24, "who_end is part of the contract");

#endif
