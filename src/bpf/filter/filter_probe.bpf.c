// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The smallest program with the sk_buff filter in it, never attached: `netprobe
 * filter` and the tests load it to see that the verifier accepts an
 * expression in the form in which the tools use it.
 */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>

#include "common/cast.bpf.h"
#include "common/compat.bpf.h"
#include "filter/filter.bpf.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

SEC("kprobe")
int np_filter_probe(struct pt_regs *ctx)
{
	return np_filter_skb((void *)PT_REGS_PARM1(ctx));
}
