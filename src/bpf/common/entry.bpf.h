/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The begin of a kernel function, for a program with two forms: NAME by a trampoline, and
 * NAME_probe by a kprobe, where the kernel makes no trampolines (no types of its own; arm64
 * before 6.4). The body has the function's arguments, up to three, in `args`.
 */
#ifndef NETPROBE_ENTRY_BPF_H
#define NETPROBE_ENTRY_BPF_H

#define NP_ENTRY(name, function)                                            \
	static __always_inline int name##_at(void *ctx, const __u64 *args); \
                                                                            \
	SEC("fentry/" #function)                                            \
	int name(__u64 *ctx)                                                \
	{                                                                   \
		return name##_at(ctx, ctx);                                 \
	}                                                                   \
                                                                            \
	SEC("kprobe/" #function)                                            \
	int name##_probe(struct pt_regs *ctx)                               \
	{                                                                   \
		__u64 args[] = {PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx),     \
				PT_REGS_PARM3(ctx)};                        \
                                                                            \
		return name##_at(ctx, args);                                \
	}                                                                   \
                                                                            \
	static __always_inline int name##_at(void *ctx, const __u64 *args)

#endif
