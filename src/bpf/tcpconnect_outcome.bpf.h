/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What became of each connect: `netprobe tcpconnect --outcome`.
 *
 * A connect lives in `pending`, by socket, from the SYN
 * (tcp_connect) to the change of state that decides it. The socket is locked
 * from the entry to the return, so nothing but a failure of the call itself can decide it
 * in between.
 *
 * Included by tcpconnect.bpf.c behind fill() and the map `inside`.
 */
#ifndef NETPROBE_TCPCONNECT_OUTCOME_BPF_H
#define NETPROBE_TCPCONNECT_OUTCOME_BPF_H

#define PF_EXITING 0x00000004

/* The tracepoint kfree_skb says why (kernels from 5.17). */
const volatile __u8 has_drop_reason = 0;

/* Addresses and ports of a connect that is pending. */
struct pending_key {
	__u64 saddr[2];
	__u64 daddr[2];
	__u16 sport;
	__u16 dport;
	__u32 pad;
};

/* Connects that are not decided, by socket. The size is set before loading. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u64);
	__type(value, struct tcp_event);
} pending SEC(".maps");

/* The same by addresses, for packets without a socket; the value is the key above. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, struct pending_key);
	__type(value, __u64);
} pending_by_addr SEC(".maps");

static __always_inline void forget(const struct tcp_event *e)
{
	__u64 sock = e->sock;
	struct pending_key key = {
		.saddr = {e->saddr[0], e->saddr[1]},
		.daddr = {e->daddr[0], e->daddr[1]},
		.sport = e->sport,
		.dport = e->dport,
	};

	bpf_map_delete_elem(&pending_by_addr, &key);
	bpf_map_delete_elem(&pending, &sock);
}

static __always_inline void remember_addr(const struct tcp_event *e)
{
	__u64 sock = e->sock;
	struct pending_key key = {
		.saddr = {e->saddr[0], e->saddr[1]},
		.daddr = {e->daddr[0], e->daddr[1]},
		.sport = e->sport,
		.dport = e->dport,
	};

	if (bpf_map_update_elem(&pending_by_addr, &key, &sock, BPF_ANY))
		np_count_map_full();
}

/* A connect is decided: sends it, and forgets it. */
static __always_inline void decide(void *ctx, struct tcp_event *e, __u8 decided,
				   __u32 error)
{
	struct tcp_sock *tp = (struct tcp_sock *)e->sock;
	__u64 now = bpf_ktime_get_ns();
	__u64 since = e->syn ? e->syn : e->start;

	e->head.ts = now;
	e->head.kind = TCP_KIND_OUTCOME;
	e->head.cpu = bpf_get_smp_processor_id();
	e->decided = decided;
	e->error = error;
	if (decided != TCP_DECIDED_AT_ONCE) {
		e->retransmits = BPF_CORE_READ(tp, total_retrans);
		if (BPF_CORE_READ_BITFIELD_PROBED(tp, syn_fastopen))
			e->flags |= TCP_FLAG_FASTOPEN;
		if (BPF_CORE_READ_BITFIELD_PROBED(tp, syn_data))
			e->flags |= TCP_FLAG_SYN_DATA | TCP_FLAG_FASTOPEN;
	}
	if (now - since >= filter.min_ns)
		np_output(ctx, &e->head, sizeof(*e));
}

static __always_inline void leave_outcome(void *ctx, struct tcp_scratch *buf,
					  struct inside *in, int ret)
{
	struct tcp_event *e = bpf_map_lookup_elem(&pending, &in->sock);
	__u64 sock = in->sock;

	if (ret == 0 && e) {
		e->flags &= ~TCP_FLAG_IN_CALL;
		if (mode & TCP_MODE_STACKS) {
			buf->event = *e;
			buf->event.head.ts = bpf_ktime_get_ns();
			send_connect(ctx, buf);
		}
		return;
	}
	if (ret == 0) {
		/* Fast Open: the SYN waits for the first data. */
		fill(&buf->event, in, false);
		buf->event.flags |= TCP_FLAG_DEFERRED;
		if (!match_socket(&buf->event))
			return;
		if (bpf_map_update_elem(&pending, &sock, &buf->event, BPF_ANY))
			np_count_map_full();
		else if (mode & TCP_MODE_STACKS)
			send_connect(ctx, buf);
		return;
	}
	fill(&buf->event, in, true);
	if (match_socket(&buf->event)) {
		if (mode & TCP_MODE_STACKS)
			send_connect(ctx, buf);
		decide(ctx, &buf->event, TCP_DECIDED_AT_ONCE, -ret);
	}
	if (e)
		forget(e);
}

/* The SYN is about to be sent: inside of connect, or with the first data (Fast Open). */
SEC("kprobe/tcp_connect")
int BPF_KPROBE(syn, struct sock *sk)
{
	__u64 id = bpf_get_current_pid_tgid(), sock = (__u64)sk;
	struct inside *in = bpf_map_lookup_elem(&inside, &id);
	struct tcp_event *e;
	struct tcp_scratch *buf;
	__u32 room = TCP_ROOM_SYN;

	if (!in || in->sock != sock) {
		e = bpf_map_lookup_elem(&pending, &sock);
		if (e && !e->syn) {
			e->syn = bpf_ktime_get_ns();
			remember_addr(e);
		}
		return 0;
	}
	buf = bpf_map_lookup_elem(&scratch, &room);
	if (!buf)
		return 0;
	e = &buf->event;
	fill(e, in, false);
	if (!match_socket(e)) {
		in->refused = 1;
		return 0;
	}
	e->syn = e->head.ts;
	e->flags |= TCP_FLAG_IN_CALL;
	if (bpf_map_update_elem(&pending, &sock, e, BPF_ANY)) {
		np_count_map_full();
		in->refused = 1;
		return 0;
	}
	remember_addr(e);
	return 0;
}

SEC("raw_tp/inet_sock_set_state")
int state(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];
	int to = ctx->args[2];
	__u64 sock = (__u64)sk;
	struct task_struct *task;
	struct tcp_event *e;
	__u32 error;

	if (to != TCP_ESTABLISHED && to != TCP_CLOSE)
		return 0;
	e = bpf_map_lookup_elem(&pending, &sock);
	if (!e)
		return 0;
	if (to == TCP_ESTABLISHED) {
		decide(ctx, e, TCP_DECIDED_ESTABLISHED, 0);
		forget(e);
		return 0;
	}
	error = BPF_CORE_READ(sk, sk_err);
	if (!error) {
		/* A failing connect closes the socket: its return tells more. */
		if ((e->flags & TCP_FLAG_IN_CALL) &&
		    e->head.pid == (__u32)bpf_get_current_pid_tgid())
			return 0;
		task = (void *)bpf_get_current_task();
		if (BPF_CORE_READ(task, flags) & PF_EXITING)
			e->flags |= TCP_FLAG_EXITING;
	}
	decide(ctx, e, TCP_DECIDED_CLOSED, error);
	forget(e);
	return 0;
}

/* The connect that a packet belongs to: by its socket, else by its addresses. */
static __always_inline struct tcp_event *connect_of(struct sk_buff *skb)
{
	struct np_tuple t = {};
	struct pending_key key = {};
	__u64 sock = (__u64)NP_READ(skb, sk), *found;
	struct tcp_event *e;

	if (sock) {
		e = bpf_map_lookup_elem(&pending, &sock);
		if (e)
			return e;
	}
	np_read_tuple(skb, &t);
	if (!t.l3_version || t.l4_proto != IPPROTO_TCP)
		return NULL;
	__builtin_memcpy(key.saddr, t.saddr, sizeof(key.saddr));
	__builtin_memcpy(key.daddr, t.daddr, sizeof(key.daddr));
	key.sport = t.sport;
	key.dport = t.dport;
	found = bpf_map_lookup_elem(&pending_by_addr, &key);
	if (!found) {
		/* An answer. */
		__builtin_memcpy(key.saddr, t.daddr, sizeof(key.saddr));
		__builtin_memcpy(key.daddr, t.saddr, sizeof(key.daddr));
		key.sport = t.dport;
		key.dport = t.sport;
		found = bpf_map_lookup_elem(&pending_by_addr, &key);
	}
	if (!found)
		return NULL;
	sock = *found;
	return bpf_map_lookup_elem(&pending, &sock);
}

/* The kernel drops a packet: is it a SYN of ours, or its answer? */
SEC("raw_tp/kfree_skb")
int drop(struct bpf_raw_tracepoint_args *ctx)
{
	struct sk_buff *skb = NP_CAST(sk_buff, ctx->args[0]);
	struct tcp_event *e = connect_of(skb);

	if (!e)
		return 0;
	e->drop_at = ctx->args[1];
	if (has_drop_reason)
		e->drop_reason = ctx->args[2];
	e->drops++;
	e->flags |= TCP_FLAG_DROPPED;
	return 0;
}

#endif
