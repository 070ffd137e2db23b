/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* compat.bpf.h reads kernel memory by bpf_probe_read_kernel alone: a rare event costs a hundred times what casts would save. */
#ifndef NETPROBE_CAST_BPF_H
#define NETPROBE_CAST_BPF_H

static const __u8 use_cast = 0;

#endif
