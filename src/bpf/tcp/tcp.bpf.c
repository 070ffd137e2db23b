// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * netprobe tcp: a row for each TCP connection at its end.
 *
 * A connection lives in `lives`, by socket, from SYN_SENT or SYN_RECV (or, where it is
 * older than the run, from its first FIN) to TCP_CLOSE; its counters are read from the
 * struct tcp_sock then. A socket that is closed without a FIN sends its RST after that
 * change of state: such a row waits for the RST, or for the end of the socket.
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "common/packet.h"
#include "tcp/tcp.h"
#include "common/cast.bpf.h"
#include "common/compat.bpf.h"
#include "common/stats.bpf.h"
#include "common/heartbeat.bpf.h"
#include "common/output_ring.bpf.h"
#include "common/packet.bpf.h"
#include "tcp/tcp_l3.bpf.h"

#define PF_EXITING 0x00000004

/* By socket. The size is set before loading. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u64);
	__type(value, struct conn_life);
} lives SEC(".maps");

/* For the types in the skeleton. */
struct conn_event conn_event_type;
struct conn_note conn_note_type;
enum conn_what conn_what_type;
enum conn_lost conn_lost_type;
enum conn_kind conn_kind_type;
enum conn_role conn_role_type;
enum conn_flag conn_flag_type;

static __always_inline void claim(struct conn_owner *owner)
{
	owner->tgid = bpf_get_current_pid_tgid() >> 32;
	owner->uid = (__u32)bpf_get_current_uid_gid();
	owner->cgroup = bpf_get_current_cgroup_id();
	np_read_comm(owner->comm);
}

static __always_inline bool is_exiting(const bool typed)
{
	struct task_struct *task;

	/* A typed pointer: kernels from 5.11. */
	if (typed && bpf_core_enum_value_exists(enum bpf_func_id,
						BPF_FUNC_get_current_task_btf))
		return bpf_get_current_task_btf()->flags & PF_EXITING;
	task = (void *)bpf_get_current_task();
	return BPF_CORE_READ(task, flags) & PF_EXITING;
}

#include "tcp/tcp_read.bpf.h"

/* Rows that wait for what follows their end. */
__u32 waiting = 0;

/* Writes the row of a connection. `typed`: see tcp_read.bpf.h; `ts`: its end, or when it has waited long enough. */
static __always_inline void fill(struct conn_event *e, struct tcp_sock *tp,
				 __u64 key, const struct conn_life *life,
				 __u64 ts, const bool typed)
{
	e->head.ts = ts;
	e->head.len = sizeof(*e);
	e->head.kind = CONN_KIND_END;
	e->head.cpu = bpf_get_smp_processor_id();
	__builtin_memset(&e->head.tgid, 0,
			 sizeof(e->head) - offsetof(struct np_head, tgid));
	e->sock = key;
	e->life = *life;
	read_all(e, tp, typed);
}

/* Sends the row of a connection and forgets it. */
static __always_inline void end(void *ctx, struct tcp_sock *tp, __u64 key,
				struct conn_life *life, __u64 ts,
				const bool typed)
{
	struct conn_event *e, row;
	__u64 flags;

	if (np_held()) {
		bpf_map_delete_elem(&lives, &key);
		return;
	}
	if (np_ring_wakeup) {
		e = np_ring_reserve(sizeof(*e), &flags);
		if (e) {
			fill(e, tp, key, life, ts, typed);
			bpf_ringbuf_submit(e, flags);
		}
	} else {
		fill(&row, tp, key, life, ts, typed);
		np_output(ctx, &row.head, sizeof(row));
	}
	bpf_map_delete_elem(&lives, &key);
}

/* A connection begins. */
static __always_inline void begin(__u64 key, const struct conn_life *new)
{
	if (bpf_map_update_elem(&lives, &key, new, BPF_ANY))
		np_count_map_full();
}

/* The connection of a socket; NULL: no room. One that is not known is older than the run. */
static __always_inline struct conn_life *life_of(__u64 key)
{
	struct conn_life new = {.role = CONN_ROLE_NOT_SEEN,
				.flags = CONN_FLAG_OLD};
	struct conn_life *life = bpf_map_lookup_elem(&lives, &key);

	if (life)
		return life;
	begin(key, &new);
	return bpf_map_lookup_elem(&lives, &key);
}

/* A connection is closed in a process, its own, or by the end of that. */
static __always_inline void closed_by_process(struct conn_life *life,
					      const bool typed)
{
	if (!life->owner.tgid)
		claim(&life->owner);
	if (is_exiting(typed))
		life->flags |= CONN_FLAG_EXITING;
}

/*
 * The row waits for what follows: the socket was closed without a FIN, and it is not
 * known yet if a RST goes out.
 */
static __always_inline bool waits(const struct conn_life *life, __u32 error)
{
	if (error || life->flags & (CONN_FLAG_RST_IN | CONN_FLAG_RST_OUT))
		return false;
	switch (life->last) {
	case TCP_ESTABLISHED:
	case TCP_CLOSE_WAIT:
	case TCP_SYN_RECV:
		return true;
	case TCP_FIN_WAIT1:
	case TCP_FIN_WAIT2:
		return !(life->flags & CONN_FLAG_FIN_IN);
	}
	return false;
}

/* The kernel's word for the type of what it hands over; else the caller's. NULL: it is none. */
static __always_inline struct tcp_sock *tcp_of(struct sock *sk,
					       const bool typed)
{
	return typed ? bpf_skc_to_tcp_sock(sk) : (struct tcp_sock *)sk;
}

static __always_inline void closed(void *ctx, struct sock *sk, int from,
				   const bool typed)
{
	struct conn_life *life;
	struct tcp_sock *tp;
	__u64 key = (__u64)sk;

	/* A listener, or a socket that was never connected. */
	if (from == TCP_LISTEN || from == TCP_CLOSE)
		return;
	life = life_of(key);
	if (!life)
		return;
	/*
	 * Two CPUs may make a socket of one request (tcp_check_req): the one that lost
	 * is thrown away, and is no connection. With TCP Fast Open it is one by now.
	 */
	if (from == TCP_SYN_RECV && life->role == CONN_ROLE_ACCEPT) {
		tp = tcp_of(sk, typed);
		if (tp && !READ(typed, tp, fastopen_rsk)) {
			bpf_map_delete_elem(&lives, &key);
			return;
		}
	}
	life->end = bpf_ktime_get_ns();
	life->last = from;
	/* tcp_fin() sets it. */
	if (READ(typed, sk, __sk_common.skc_flags) &
	    (1UL << bpf_core_enum_value(enum sock_flags, SOCK_DONE)))
		life->flags |= CONN_FLAG_FIN_IN;
	if (!waits(life, READ(typed, sk, sk_err))) {
		tp = tcp_of(sk, typed);
		if (tp)
			end(ctx, tp, key, life, life->end, typed);
		return;
	}
	__sync_fetch_and_add(&waiting, 1);
	/* Others are closed by the kernel, in whatever process its CPU runs. */
	if (from == TCP_ESTABLISHED || from == TCP_CLOSE_WAIT)
		closed_by_process(life, typed);
}

#include "tcp/tcp_notes.bpf.h"

/* The tracepoint inet_sock_set_state. */
static __always_inline int changed(void *ctx, struct sock *sk, int from, int to,
				   const bool typed)
{
	struct conn_life *life, new = {};
	__u64 key = (__u64)sk;

	if (READ(typed, sk, sk_protocol) != IPPROTO_TCP)
		return 0;
	/* The end of a connection forgets it; a connect begins it. */
	if (wants_notes(CONN_WHAT_STATE) && to != TCP_SYN_SENT)
		note_state(ctx, sk, from, to);
	switch (to) {
	case TCP_SYN_SENT:
		new.role = CONN_ROLE_CONNECT;
		new.start = bpf_ktime_get_ns();
		claim(&new.owner);
		begin(key, &new);
		break;
	case TCP_SYN_RECV:
		/* Both ends have connected at once. */
		if (from == TCP_SYN_SENT)
			break;
		new.role = CONN_ROLE_ACCEPT;
		new.start = bpf_ktime_get_ns();
		begin(key, &new);
		break;
	case TCP_ESTABLISHED:
		life = life_of(key);
		if (life)
			life->established = bpf_ktime_get_ns();
		break;
	/* Only a process sends a FIN. */
	case TCP_FIN_WAIT1:
	case TCP_LAST_ACK:
		life = life_of(key);
		if (life)
			closed_by_process(life, typed);
		break;
	case TCP_CLOSE:
		closed(ctx, sk, from, typed);
		break;
	}
	if (wants_notes(CONN_WHAT_STATE) && to == TCP_SYN_SENT)
		note_state(ctx, sk, from, to);
	return 0;
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(conn_state, struct sock *sk, int from, int to)
{
	return changed(ctx, sk, from, to, true);
}

/* Where the kernel has no types of its own (CONFIG_DEBUG_INFO_BTF). */
SEC("raw_tp/inet_sock_set_state")
int conn_state_raw(struct bpf_raw_tracepoint_args *ctx)
{
	return changed(ctx, (struct sock *)ctx->args[0], ctx->args[1],
		       ctx->args[2], false);
}

/* accept(): the connection belongs to a process. */
static __always_inline void accepted(__u64 key)
{
	struct conn_life *life = bpf_map_lookup_elem(&lives, &key);

	if (life)
		claim(&life->owner);
}

SEC("fentry/security_sock_graft")
int BPF_PROG(conn_accepted, struct sock *sk)
{
	accepted((__u64)sk);
	return 0;
}

/* Where there are no trampolines. */
SEC("kprobe/security_sock_graft")
int BPF_KPROBE(conn_accepted_probe, struct sock *sk)
{
	accepted((__u64)sk);
	return 0;
}

/* A row waits no longer. */
static __always_inline void end_waiting(void *ctx, struct sock *sk,
					struct conn_life *life)
{
	__sync_fetch_and_add(&waiting, -1);
	end(ctx, (struct tcp_sock *)sk, (__u64)sk, life, bpf_ktime_get_ns(),
	    false);
}

static __always_inline void reset(void *ctx, struct sock *sk, __u32 flag)
{
	__u64 key = (__u64)sk;
	struct conn_life *life = bpf_map_lookup_elem(&lives, &key);

	if (!life)
		return;
	life->flags |= flag;
	if (life->end)
		end_waiting(ctx, sk, life);
}

SEC("raw_tp/tcp_receive_reset")
int conn_rst_in(struct bpf_raw_tracepoint_args *ctx)
{
	reset(ctx, (struct sock *)ctx->args[0], CONN_FLAG_RST_IN);
	return 0;
}

SEC("raw_tp/tcp_send_reset")
int conn_rst_out(struct bpf_raw_tracepoint_args *ctx)
{
	reset(ctx, (struct sock *)ctx->args[0], CONN_FLAG_RST_OUT);
	return 0;
}

SEC("raw_tp/tcp_destroy_sock")
int conn_destroyed(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];
	__u64 key = (__u64)sk;
	struct conn_life *life;

	/* Its memory may be another socket's from now on. */
	if (wants_notes(CONN_WHAT_RETRANSMIT))
		bpf_map_delete_elem(&resent, &key);
	if (wants_notes(CONN_WHAT_PEER_SHUT))
		bpf_map_delete_elem(&windows, &key);
	if (!waiting)
		return 0;
	life = bpf_map_lookup_elem(&lives, &key);
	if (life && life->end)
		end_waiting(ctx, sk, life);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
