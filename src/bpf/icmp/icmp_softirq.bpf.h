/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the NET_RX softirq of each CPU is at: raised, entered, left. Included
 * by icmp.bpf.c; needs icmp.h and event.bpf.h before it.
 *
 * With with_culprit also who runs from the raise to the entry: the time of
 * each task by sched_switch, what it did by samples of a timer.
 */
#ifndef NETPROBE_ICMP_SOFTIRQ_BPF_H
#define NETPROBE_ICMP_SOFTIRQ_BPF_H

/* enum: NET_RX_SOFTIRQ of include/linux/interrupt.h, unchanged since 2.6 */
#define NP_NET_RX 3

/* Look for the culprits of gaps, and tell gaps from this length on. */
const volatile __u8 with_culprit = 0;
const volatile __u64 gap_min_ns = 0;

struct icmp_gap icmp_gap_type;
struct icmp_sample icmp_sample_type;

struct softirq_cpu {
	__u64 irq; /* in a hard interrupt's handler since; 0: in none */
	struct icmp_softirq pending; /* raised, not entered yet */
	struct icmp_softirq running; /* entered; zeros outside of it */
	__u64 run_since; /* the current task runs in the gap since */
	struct icmp_gap gap; /* while it is pending */
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

/* The current task ran up to now: its time counts in the gap. */
static __always_inline void gap_run(struct softirq_cpu *cpu, __u64 now)
{
	__u64 id = bpf_get_current_pid_tgid();
	__u64 ns = now - cpu->run_since;
	__u32 n = cpu->gap.runs;
	struct icmp_run *run;

	cpu->run_since = now;
	for (int i = 0; i < ICMP_RUNS; i++) {
		run = &cpu->gap.run[i];
		if (i >= n)
			break;
		if (run->pid == (__u32)id || i == ICMP_RUNS - 1) {
			run->ns += ns;
			return;
		}
	}
	if (n >= ICMP_RUNS)
		return;
	run = &cpu->gap.run[n];
	run->ns = ns;
	run->cgroup = bpf_get_current_cgroup_id();
	run->tgid = id >> 32;
	run->pid = (__u32)id;
	bpf_get_current_comm(run->comm, sizeof(run->comm));
	cpu->gap.runs = n + 1;
}

/* NET_RX, raised at `raise`, is entered: the gap is over, and told if it was long. */
static __always_inline void gap_end(void *ctx, struct softirq_cpu *cpu,
				    __u64 raise, __u64 now)
{
	if (now - raise < gap_min_ns || np_paused())
		return;
	gap_run(cpu, now);
	cpu->gap.raise = raise;
	cpu->gap.entry = now;
	np_head_fill(&cpu->gap.head, ICMP_KIND_GAP);
	np_output(ctx, &cpu->gap.head, sizeof(cpu->gap));
}

SEC("raw_tp/sched_switch")
int sched_switch(struct bpf_raw_tracepoint_args *ctx)
{
	struct softirq_cpu *cpu = softirq_cpu();

	/* The task that leaves is still current. */
	if (cpu && cpu->pending.raise)
		gap_run(cpu, bpf_ktime_get_ns());
	return 0;
}

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct icmp_sample);
} samples SEC(".maps");

/* A timer of each CPU, cpu-clock: virtual machines often have no PMU. */
SEC("perf_event")
int sample(struct bpf_perf_event_data *ctx)
{
	struct softirq_cpu *cpu = softirq_cpu();
	struct icmp_sample *s;
	__u32 zero = 0;
	long len;

	if (!cpu || !cpu->pending.raise || np_paused())
		return 0;
	s = bpf_map_lookup_elem(&samples, &zero);
	if (!s)
		return 0;
	np_head_fill(&s->head, ICMP_KIND_SAMPLE);
	s->raise = cpu->pending.raise;
	len = bpf_get_stack(ctx, s->stack, sizeof(s->stack), 0);
	if (len < 0)
		len = 0;
	len &= 511;
	if (len > sizeof(s->stack))
		return 0;
	np_output(ctx, &s->head,
		  __builtin_offsetof(struct icmp_sample, stack) + len);
	return 0;
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
	cpu->pending.irq = cpu->irq;
	cpu->pending.raise = bpf_ktime_get_ns();
	if (with_culprit) {
		cpu->gap.runs = 0;
		cpu->run_since = cpu->pending.raise;
	}
	return 0;
}

SEC("raw_tp/softirq_entry")
int softirq_entry(struct bpf_raw_tracepoint_args *ctx)
{
	struct softirq_cpu *cpu;
	__u64 irq, raise;

	if ((__u32)ctx->args[0] != NP_NET_RX)
		return 0;
	cpu = softirq_cpu();
	if (!cpu)
		return 0;
	irq = cpu->pending.irq;
	raise = cpu->pending.raise;
	/* An interrupt may raise it again from here on. */
	if (raise)
		cpu->pending.raise = 0;
	cpu->running.irq = raise ? irq : 0;
	cpu->running.raise = raise;
	cpu->running.entry = bpf_ktime_get_ns();
	if (with_culprit && raise)
		gap_end(ctx, cpu, raise, cpu->running.entry);
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
