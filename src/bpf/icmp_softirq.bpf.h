/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the NET_RX softirq of each CPU is at: raised, entered, left. Included
 * by icmp.bpf.c; needs icmp.h before it.
 */
#ifndef NETPROBE_ICMP_SOFTIRQ_BPF_H
#define NETPROBE_ICMP_SOFTIRQ_BPF_H

/* enum: NET_RX_SOFTIRQ of include/linux/interrupt.h, unchanged since 2.6 */
#define NP_NET_RX 3

struct softirq_cpu {
	__u64 irq; /* in a hard interrupt's handler since; 0: in none */
	struct icmp_softirq pending; /* raised, not entered yet */
	struct icmp_softirq running; /* entered; zeros outside of it */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct softirq_cpu);
} softirqs SEC(".maps");

static __always_inline struct softirq_cpu *softirq_cpu(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&softirqs, &zero);
}

/* The NET_RX softirq that this CPU is in; zeros where it is in none. */
static __always_inline struct icmp_softirq *softirq_running(void)
{
	struct softirq_cpu *cpu = softirq_cpu();

	return cpu ? &cpu->running : NULL;
}

SEC("raw_tp/irq_handler_entry")
int irq_entry(struct bpf_raw_tracepoint_args *ctx)
{
	struct softirq_cpu *cpu = softirq_cpu();

	if (cpu)
		cpu->irq = bpf_ktime_get_ns();
	return 0;
}

SEC("raw_tp/irq_handler_exit")
int irq_exit(struct bpf_raw_tracepoint_args *ctx)
{
	struct softirq_cpu *cpu = softirq_cpu();

	if (cpu)
		cpu->irq = 0;
	return 0;
}

/* Comes again while the softirq is pending: the first one counts. */
SEC("raw_tp/softirq_raise")
int softirq_raise(struct bpf_raw_tracepoint_args *ctx)
{
	struct softirq_cpu *cpu;

	if ((__u32)ctx->args[0] != NP_NET_RX)
		return 0;
	cpu = softirq_cpu();
	if (!cpu || cpu->pending.raise)
		return 0;
	cpu->pending.raise = bpf_ktime_get_ns();
	cpu->pending.irq = cpu->irq;
	return 0;
}

SEC("raw_tp/softirq_entry")
int softirq_entry(struct bpf_raw_tracepoint_args *ctx)
{
	struct softirq_cpu *cpu;

	if ((__u32)ctx->args[0] != NP_NET_RX)
		return 0;
	cpu = softirq_cpu();
	if (!cpu)
		return 0;
	cpu->running.irq = cpu->pending.irq;
	cpu->running.raise = cpu->pending.raise;
	cpu->running.entry = bpf_ktime_get_ns();
	cpu->pending.irq = 0;
	cpu->pending.raise = 0;
	return 0;
}

SEC("raw_tp/softirq_exit")
int softirq_exit(struct bpf_raw_tracepoint_args *ctx)
{
	struct softirq_cpu *cpu;

	if ((__u32)ctx->args[0] != NP_NET_RX)
		return 0;
	cpu = softirq_cpu();
	if (cpu) {
		cpu->running.irq = 0;
		cpu->running.raise = 0;
		cpu->running.entry = 0;
	}
	return 0;
}

#endif
