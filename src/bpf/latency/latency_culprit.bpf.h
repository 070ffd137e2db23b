/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * --culprit: what made a packet slow. What ran while a softirq waited is of
 * icmp_softirq.bpf.h; here are the process that read late, and what filled the queue of a
 * device. Needs latency_packet.bpf.h and icmp_softirq.bpf.h before it.
 */
#ifndef NETPROBE_LATENCY_CULPRIT_BPF_H
#define NETPROBE_LATENCY_CULPRIT_BPF_H

/* A thread that has read from a socket. */
struct lat_thread {
	struct lat_reader out; /* as it is sent */
	__u64 exec; /* sum_exec_runtime when it read last */
	__u64 delay; /* sched_info.run_delay then */
	__u64 off; /* ns; off its CPU since then; 0: it runs */
	__u32 state;
	__u32 len;
	__u64 stack[LAT_FRAMES];
};

/* By thread. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, struct lat_thread);
} threads SEC(".maps");

/* All zeros. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct lat_thread);
} no_thread SEC(".maps");

/* By interface and namespace. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 64);
	__type(key, __u64);
	__type(value, struct lat_sent);
} sent_by SEC(".maps");

/* All zeros. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct lat_sent);
} none_sent SEC(".maps");

struct task_struct___5_13 {
	long state;
} __attribute__((preserve_access_index));

static __always_inline __u32 lat_task_state(struct task_struct *task)
{
	struct task_struct___5_13 *old = (void *)task;

	if (bpf_core_field_exists(task->__state))
		return BPF_CORE_READ(task, __state);
	return BPF_CORE_READ(old, state);
}

/* The current thread has read a packet: tells what it did before, and looks on. */
__hidden __noinline int lat_note_reader(void *ctx, struct lat_packet *p)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	__u32 thread = (__u32)bpf_get_current_pid_tgid(), zero = 0;
	struct lat_thread *t = bpf_map_lookup_elem(&threads, &thread);
	__u64 exec = BPF_CORE_READ(task, se.sum_exec_runtime), delay = 0;

	if (!p)
		return 0;
	if (bpf_core_field_exists(task->sched_info.run_delay))
		delay = BPF_CORE_READ(task, sched_info.run_delay);
	if (!t) {
		t = bpf_map_lookup_elem(&no_thread, &zero);
		if (t)
			bpf_map_update_elem(&threads, &thread, t, BPF_NOEXIST);
		t = bpf_map_lookup_elem(&threads, &thread);
		if (!t)
			return 0;
	} else if ((p->flags & LAT_FLAG_MATCHES) &&
		   p->stage[LAT_SOCKET] * 2 >= min_ns &&
		   p->last - p->first >= min_ns && !np_paused()) {
		t->out.packet = p->last;
		t->out.ran = exec - t->exec;
		t->out.waited = delay - t->delay;
		np_head_fill(&t->out.head, LAT_KIND_READER);
		np_output(ctx, &t->out.head, sizeof(t->out));
		/* Others that it reads at the same time wait for the same. */
		return 0;
	}
	t->out.since = p->last;
	t->exec = exec;
	t->delay = delay;
	t->out.from = t->out.to = t->out.len = 0;
	return 0;
}

/* A thread that reads comes back to a CPU. */
__hidden __noinline int lat_on_cpu(struct lat_thread *t, __u64 now)
{
	if (!t || !t->off)
		return 0;
	if (now - t->off > t->out.to - t->out.from) {
		t->out.from = t->off;
		t->out.to = now;
		t->out.state = t->state;
		t->out.len = t->len;
		__builtin_memcpy(t->out.stack, t->stack, sizeof(t->stack));
	}
	t->off = 0;
	return 0;
}

/* sched_switch(preempt, prev, next): prev is current. */
SEC("raw_tp/sched_switch")
int lat_switch(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *prev = (void *)ctx->args[1];
	struct task_struct *next = (void *)ctx->args[2];
	__u32 from = (__u32)bpf_get_current_pid_tgid();
	__u32 to = BPF_CORE_READ(next, pid);
	struct lat_thread *t = bpf_map_lookup_elem(&threads, &from);
	long len;

	if (t) {
		t->off = bpf_ktime_get_ns();
		t->state = ctx->args[0] ? 0 : lat_task_state(prev);
		len = bpf_get_stack(ctx, t->stack, sizeof(t->stack), 0);
		t->len = len > 0 ? len : 0;
	}
	t = bpf_map_lookup_elem(&threads, &to);
	if (t)
		lat_on_cpu(t, bpf_ktime_get_ns());
	return 0;
}

/* A packet leaves a device: the list of the last ones is sent where it has waited long. */
__hidden __noinline int lat_note_sent(void *ctx, __u64 skb_ptr,
				      struct lat_packet *p)
{
	struct lat_sent *sent;
	struct lat_frame *f;
	__u32 zero = 0, at;
	__u64 key;

	if (!p)
		return 0;
	key = (__u64)p->netns << 32 | p->ifindex;
	sent = bpf_map_lookup_elem(&sent_by, &key);
	if (!sent) {
		sent = bpf_map_lookup_elem(&none_sent, &zero);
		if (sent)
			bpf_map_update_elem(&sent_by, &key, sent, BPF_NOEXIST);
		sent = bpf_map_lookup_elem(&sent_by, &key);
		if (!sent)
			return 0;
	}
	if (p->stage[LAT_QDISC] * 2 >= min_ns && p->last - p->first >= min_ns &&
	    (p->flags & LAT_FLAG_MATCHES) && !np_paused()) {
		sent->ifindex = p->ifindex;
		sent->netns = p->netns;
		np_head_fill(&sent->head, LAT_KIND_SENT);
		np_output(ctx, &sent->head, sizeof(*sent));
	}
	at = sent->next & (LAT_SENT - 1);
	sent->next++;
	f = &sent->frame[at];
	f->ts = p->last;
	f->len = NP_READ(NP_CAST(sk_buff, skb_ptr), len);
	__builtin_memset(&f->tuple, 0, sizeof(f->tuple));
	np_read_tuple(NP_CAST(sk_buff, skb_ptr), &f->tuple);
	return 0;
}

#endif
