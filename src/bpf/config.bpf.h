/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The map cfg_map, pinned as `config`, with the field filters (config.h), pinned by user space and
 * read on every hit. Needs vmlinux.h and bpf_helpers.h before it.
 */
#ifndef NETPROBE_CONFIG_BPF_H
#define NETPROBE_CONFIG_BPF_H

#include "config.h"

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct np_config);
} cfg_map SEC(".maps");

/* The field filters; never NULL in practice, but the verifier asks. */
static __always_inline struct np_config *np_config_get(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&cfg_map, &zero);
}

#endif
