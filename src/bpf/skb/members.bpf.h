/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Reads the members that user space wants to see. Needs bpf_helpers.h before it. */
#ifndef NETPROBE_MEMBERS_BPF_H
#define NETPROBE_MEMBERS_BPF_H

#include "skb/members.h"

/* Constants: what is not asked for costs nothing. */
const volatile __u32 np_path_count = 0;
const volatile struct np_path np_paths[NP_PATHS] = {};

/* For the types in the skeleton. */
struct np_members np_members_type;
enum np_path_limit np_path_limit_type;

static __always_inline void np_read_members(const void *from,
					    struct np_members *m)
{
	m->known = 0;
	m->pad = 0;
#pragma unroll
	for (int i = 0; i < NP_PATHS; i++) {
		const void *at = from;
		__u64 value = 0;
		long err = -1;

		m->values[i] = 0;
		if (i >= np_path_count)
			continue;
			/* A NULL pointer on the way makes the next read fail. */
#pragma unroll
		for (int j = 0; j < NP_PATH_POINTERS; j++) {
			if (j < np_paths[i].pointers)
				bpf_probe_read_kernel(
					&at, sizeof(at),
					at + np_paths[i].offsets[j]);
		}
		at += np_paths[i].offset;
		switch (np_paths[i].size) {
		case 1:
			err = bpf_probe_read_kernel(&value, 1, at);
			break;
		case 2:
			err = bpf_probe_read_kernel(&value, 2, at);
			break;
		case 4:
			err = bpf_probe_read_kernel(&value, 4, at);
			break;
		case 8:
			err = bpf_probe_read_kernel(&value, 8, at);
			break;
		}
		if (err)
			continue;
		m->known |= 1U << i;
		m->values[i] = value;
	}
}

#endif
