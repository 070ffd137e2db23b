/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A frame's bytes by bpf_probe_read_kernel: a program beside the one that has the packet (outer.bpf.h). */
#ifndef NETPROBE_FRAME_BPF_H
#define NETPROBE_FRAME_BPF_H

static __always_inline bool np_frame_load(void *to, const __u8 *from,
					  __u32 size)
{
	return !bpf_probe_read_kernel(to, size, from);
}

#endif
