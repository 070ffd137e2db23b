/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A frame's bytes by direct access: packet pointers of an XDP program (outer.bpf.h). */
#ifndef NETPROBE_FRAME_BPF_H
#define NETPROBE_FRAME_BPF_H

static __always_inline bool np_frame_load(void *to, const __u8 *from,
					  __u32 size)
{
	__builtin_memcpy(to, from, size);
	return true;
}

#endif
