/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Which stack a program runs on: what a function's start and its end have in common. */
#ifndef NETPROBE_STACK_BPF_H
#define NETPROBE_STACK_BPF_H

/*
 * A pointer whose type the verifier knows (a context, an argument of a traced
 * program) as a number, to compute with or to pass on: it forbids both for the
 * pointer.
 */
static __always_inline __u64 as_number(void *ptr)
{
	void *copy = ptr;
	__u64 addr = 0;

	bpf_probe_read_kernel(&addr, sizeof(addr), &copy);
	return addr;
}

/* An address on the stack that this code runs on: the registers are there. */
static __always_inline __u64 stack_address(void *ctx)
{
	return as_number(ctx);
}

/*
 * The same at a function's start and at its end, for a program of a kprobe. On
 * arm64 kprobe.multi hands over registers that are not on the stack, at an end
 * without the stack pointer: there it is the caller's frame.
 */
static __always_inline __u64 regs_address(struct pt_regs *regs)
{
#ifdef __TARGET_ARCH_arm64
	return PT_REGS_FP(regs);
#else
	return as_number(regs);
#endif
}

/* Where this code runs: the task, or the CPU where not on the task's stack. */
static __always_inline __u64 track_context(__u64 sp)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	__u64 stack = (__u64)BPF_CORE_READ(task, stack);

	if (sp - stack < 64 * 1024)
		return (__u64)task;
	return bpf_get_smp_processor_id();
}

#endif
