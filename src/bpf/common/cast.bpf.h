/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* compat.bpf.h reads kernel memory by typed loads where the kernel has them. */
#ifndef NETPROBE_CAST_BPF_H
#define NETPROBE_CAST_BPF_H

/* bpf_rdonly_cast exists (kernels from 6.2). */
const volatile __u8 use_cast = 0;

#endif
