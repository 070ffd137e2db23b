/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What became of each connect: `netprobe tcpconnect --outcome`.
 *
 * A connect lives in `pending`, by socket, from the SYN
 * (tcp_connect) to the change of state that decides it. The socket is locked
 * from the entry to the return, so nothing but a failure of the call itself can decide it
 * in between.
 *
 * Needs tcpconnect_enter.bpf.h before it.
 */
#ifndef NETPROBE_TCPCONNECT_OUTCOME_BPF_H
#define NETPROBE_TCPCONNECT_OUTCOME_BPF_H

#define PF_EXITING 0x00000004

/* Connects that are not decided, by socket. The size is set before loading. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u64);
	__type(value, struct tcp_outcome);
} pending SEC(".maps");

/* The same by the sequence number of the SYN: to the key above. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} pending_by_isn SEC(".maps");

/* For the types in the skeleton. */
struct tcp_outcome tcp_outcome_type;
enum np_listen np_listen_type;

static __always_inline void forget(const struct tcp_outcome *o)
{
	__u64 sock = o->connect.sock;
	__u32 isn = o->isn;

	bpf_map_delete_elem(&pending_by_isn, &isn);
	bpf_map_delete_elem(&pending, &sock);
}

/* The SYN is about to be sent: its number is the next that the socket has. */
static __always_inline void remember_isn(struct tcp_outcome *o)
{
	struct tcp_sock *tp = (struct tcp_sock *)o->connect.sock;
	__u64 sock = o->connect.sock;
	__u32 isn = BPF_CORE_READ(tp, write_seq);

	o->isn = isn;
	if (bpf_map_update_elem(&pending_by_isn, &isn, &sock, BPF_ANY))
		np_count_map_full();
}

/* A connect is decided: sends it. */
static __always_inline void decide(void *ctx, struct tcp_outcome *o,
				   __u8 decided, __u32 error)
{
	struct tcp_event *e = &o->connect;
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
	if (now - since >= filter.min_ns && !np_held())
		np_output(ctx, &e->head, sizeof(*o));
}

/* The scratch as an outcome, its connect filled in. */
static __always_inline struct tcp_outcome *as_outcome(struct tcp_scratch *buf)
{
	struct tcp_outcome *o = (struct tcp_outcome *)buf;

	__builtin_memset((void *)o + sizeof(o->connect), 0,
			 sizeof(*o) - sizeof(o->connect));
	return o;
}

static __always_inline void leave_outcome(void *ctx, struct tcp_scratch *buf,
					  struct inside *in, int ret)
{
	struct tcp_outcome *o = bpf_map_lookup_elem(&pending, &in->sock);
	__u64 sock = in->sock;

	if (ret == 0 && o) {
		o->connect.flags &= ~TCP_FLAG_IN_CALL;
		if (mode & TCP_MODE_STACKS) {
			buf->event = o->connect;
			buf->event.head.ts = bpf_ktime_get_ns();
			send_connect(ctx, buf);
		}
		return;
	}
	fill(&buf->event, in, ret != 0);
	if (ret == 0) {
		/* Fast Open: the SYN waits for the first data. */
		buf->event.flags |= TCP_FLAG_DEFERRED;
		if (!match_socket(&buf->event))
			return;
		if (bpf_map_update_elem(&pending, &sock, as_outcome(buf),
					BPF_ANY))
			np_count_map_full();
		else if (mode & TCP_MODE_STACKS)
			send_connect(ctx, buf);
		return;
	}
	if (match_socket(&buf->event)) {
		if (mode & TCP_MODE_STACKS)
			send_connect(ctx, buf);
		decide(ctx, as_outcome(buf), TCP_DECIDED_AT_ONCE, -ret);
	}
	if (o)
		forget(o);
}

/* The SYN is about to be sent: inside of connect, or with the first data (Fast Open). */
SEC("kprobe/tcp_connect")
int BPF_KPROBE(syn, struct sock *sk)
{
	__u64 id = bpf_get_current_pid_tgid(), sock = (__u64)sk;
	struct inside *in = bpf_map_lookup_elem(&inside, &id);
	struct tcp_outcome *o;
	struct tcp_scratch *buf;
	struct tcp_event *e;
	__u32 room = TCP_ROOM_SYN;

	if (!in || in->sock != sock) {
		o = bpf_map_lookup_elem(&pending, &sock);
		if (o && !o->connect.syn) {
			o->connect.syn = bpf_ktime_get_ns();
			remember_isn(o);
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
	o = as_outcome(buf);
	remember_isn(o);
	if (bpf_map_update_elem(&pending, &sock, o, BPF_ANY)) {
		np_count_map_full();
		in->refused = 1;
	}
	return 0;
}

/*
 * The error that the program has got of a socket that closes, 0 where it closed
 * the socket without one. A soft error that is no longer in the socket was read
 * (SO_ERROR): an acknowledgement, which clears it too, would have decided the
 * connect.
 */
static __always_inline __u32 error_of(struct sock *sk, struct tcp_outcome *o)
{
	__u32 error = BPF_CORE_READ(sk, sk_err);

	if (error || !o->soft_error || BPF_CORE_READ(sk, sk_err_soft))
		return error;
	o->connect.flags |= TCP_FLAG_SOFT;
	return o->soft_error;
}

SEC("raw_tp/inet_sock_set_state")
int state(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];
	int to = ctx->args[2];
	__u64 sock = (__u64)sk;
	struct task_struct *task;
	struct tcp_outcome *o;
	__u32 error;

	if (to != TCP_ESTABLISHED && to != TCP_CLOSE)
		return 0;
	o = bpf_map_lookup_elem(&pending, &sock);
	if (!o)
		return 0;
	if (to == TCP_ESTABLISHED) {
		decide(ctx, o, TCP_DECIDED_ESTABLISHED, 0);
		forget(o);
		return 0;
	}
	error = error_of(sk, o);
	if (!error) {
		/* A failing connect closes the socket: its return tells more. */
		if ((o->connect.flags & TCP_FLAG_IN_CALL) &&
		    o->connect.head.pid == (__u32)bpf_get_current_pid_tgid())
			return 0;
		task = (void *)bpf_get_current_task();
		if (BPF_CORE_READ(task, flags) & PF_EXITING)
			o->connect.flags |= TCP_FLAG_EXITING;
	}
	decide(ctx, o, TCP_DECIDED_CLOSED, error);
	forget(o);
	return 0;
}

#endif
