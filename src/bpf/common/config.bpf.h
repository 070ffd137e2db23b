/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The field filters (config.h) that are read on every hit: one value that is a map
 * of its own, pinned by user space as `config`. As a global variable it is read
 * without a look-up: 1 instruction in place of 12. Needs vmlinux.h and
 * bpf_helpers.h before it.
 */
#ifndef NETPROBE_CONFIG_BPF_H
#define NETPROBE_CONFIG_BPF_H

#include "common/config.h"

struct np_config np_config_value SEC(".data.config");

static __always_inline const struct np_config *np_config_get(void)
{
	return &np_config_value;
}

/* Nothing begins now: nobody reads, or the run is at its end. */
static __always_inline bool np_paused(void)
{
	return np_config_get()->fields & NP_PAUSED;
}

/* The run is at its end: what is sent now nobody reads. */
static __always_inline bool np_ended(void)
{
	return np_config_get()->fields & NP_ENDED;
}

#endif
