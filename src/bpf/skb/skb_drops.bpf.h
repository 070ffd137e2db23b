/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * --drops beyond the tracepoint of kfree_skb: handshakes that a listening socket
 * loses, whose packets the kernel frees as consumed; the socket that a packet was
 * on its way to; whether other sk_buffs hold the same packet.
 *
 * A SYN is lost where tcp_conn_request() returns and no SYN-ACK was made in it.
 * The last packet of a handshake is lost where ..._syn_recv_sock() gives back no
 * socket; the kernel frees that packet as dropped, but gives no reason.
 *
 * Needs skb_track.bpf.h and skb_return.bpf.h before it.
 */
#ifndef NETPROBE_SKB_DROPS_BPF_H
#define NETPROBE_SKB_DROPS_BPF_H

#include "common/drop_facts.bpf.h"
#include "common/scratch.bpf.h"
#include "common/listen.bpf.h"

/* Handshakes of listening sockets are watched. */
const volatile __u8 listens = 0;
/* The tracepoint tells the receiving socket (from 6.11). */
const volatile __u8 has_rx_sock = 0;
/* Functions on the way to a socket are watched, where it does not. */
const volatile __u8 rx_watched = 0;

struct skb_drop skb_drop_type;
enum skb_lost skb_lost_type;

/* A function that works on a handshake, by the stack that it runs on. */
struct listen_call {
	__u64 sk; /* the listening socket */
	__u64 skb;
	__u64 func;
	__u32 answered;
	__u32 lost; /* SKB_LOST_* if it comes to nothing */
	struct np_listen_queue queue;
};

/* tcp_conn_request */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, __u64);
	__type(value, struct listen_call);
} listen_syns SEC(".maps");

/* ..._syn_recv_sock, and afterwards the packet that is about to be freed */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, __u64);
	__type(value, struct listen_call);
} listen_acks SEC(".maps");

/* tcp_conn_request(ops, af_ops, sk, skb) */
SEC("kprobe/listen_syn")
int listen_syn(struct pt_regs *ctx)
{
	__u64 key = track_context(regs_address(ctx));
	struct listen_call call = {
		.sk = PT_REGS_PARM3(ctx),
		.skb = PT_REGS_PARM4(ctx),
		.func = func_addr(ctx),
	};
	__u32 full = np_listen_full((void *)call.sk, &call.queue);

	if (full == NP_LISTEN_ACCEPT_QUEUE_FULL)
		call.lost = SKB_LOST_ACCEPT_QUEUE;
	else if (full == NP_LISTEN_SYN_QUEUE_FULL)
		call.lost = SKB_LOST_SYN_QUEUE;
	else
		call.lost = SKB_LOST_SYN;
	bpf_map_update_elem(&listen_syns, &key, &call, BPF_ANY);
	return 0;
}

/* tcp_make_synack and those that call it */
SEC("kprobe/listen_answer")
int listen_answer(struct pt_regs *ctx)
{
	__u64 key = track_context(regs_address(ctx));
	struct listen_call *call = bpf_map_lookup_elem(&listen_syns, &key);

	if (call)
		call->answered = 1;
	return 0;
}

/* ... gives back the new socket. Without one its entry stays for the free that follows. */
SEC("kprobe/listen_ack_end")
int listen_ack_end(struct pt_regs *ctx)
{
	__u64 key = track_context(regs_address(ctx));
	struct listen_call *call = bpf_map_lookup_elem(&listen_acks, &key);

	if (!call)
		return 0;
	if (PT_REGS_RC(ctx))
		bpf_map_delete_elem(&listen_acks, &key);
	else
		call->answered = 0;
	return 0;
}

/* A packet on its way to a socket, by the stack that it is handled on. */
struct rx_call {
	__u64 skb;
	__u64 sk; /* 0: not known as yet */
	__u32 depth; /* functions that handle it, within each other */
	__u32 refused; /* SKB_LOST_*: one of them has refused it; 0: none has */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, __u64);
	__type(value, struct rx_call);
} rx_calls SEC(".maps");

static __always_inline void rx_begin(struct pt_regs *ctx, __u64 skb, __u64 sk)
{
	__u64 key = track_context(regs_address(ctx));
	struct rx_call *call = bpf_map_lookup_elem(&rx_calls, &key);
	struct rx_call new = {.skb = skb, .sk = sk, .depth = 1};

	if (call && call->skb == skb) {
		if (!call->depth++) {
			call->refused = 0;
			call->sk = sk;
		}
		if (sk)
			call->sk = sk;
		return;
	}
	bpf_map_update_elem(&rx_calls, &key, &new, BPF_ANY);
}

/* udp_queue_rcv_one_skb(sk, skb) and its like */
SEC("kprobe/rx_sock")
int rx_sock(struct pt_regs *ctx)
{
	rx_begin(ctx, PT_REGS_PARM2(ctx), PT_REGS_PARM1(ctx));
	return 0;
}

/* tcp_v4_rcv(skb): the socket is looked up in it, or was before (early demux). */
SEC("kprobe/rx_packet")
int rx_packet(struct pt_regs *ctx)
{
	struct sk_buff *skb = (void *)PT_REGS_PARM1(ctx);

	rx_begin(ctx, (__u64)skb, (__u64)BPF_CORE_READ(skb, sk));
	return 0;
}

/* __inet_lookup_established and its like give back a socket, for the packet that this stack is busy with. */
SEC("kprobe/rx_found")
int rx_found(struct pt_regs *ctx)
{
	__u64 key = track_context(regs_address(ctx));
	struct rx_call *call = bpf_map_lookup_elem(&rx_calls, &key);

	if (call && PT_REGS_RC(ctx))
		call->sk = PT_REGS_RC(ctx);
	return 0;
}

/* One of these functions ends. What it refused (`lost`: SKB_LOST_*) is freed by a caller. */
static __always_inline int rx_leave(struct pt_regs *ctx, __u32 lost)
{
	__u64 key = track_context(regs_address(ctx));
	struct rx_call *call = bpf_map_lookup_elem(&rx_calls, &key);

	if (!call || !call->depth)
		return 0;
	if (lost)
		call->refused = lost;
	if (!--call->depth && !call->refused)
		bpf_map_delete_elem(&rx_calls, &key);
	return 0;
}

/* The end of rx_sock's and rx_packet's functions */
SEC("kprobe/rx_end")
int rx_end(struct pt_regs *ctx)
{
	return rx_leave(ctx, 0);
}

/*
 * Functions that refuse a packet by what they return, for kernels whose drops have
 * no reasons: sk_filter_trim_cap(sk, skb, cap)
 */
SEC("kprobe/rx_filter")
int rx_filter(struct pt_regs *ctx)
{
	rx_begin(ctx, PT_REGS_PARM2(ctx), PT_REGS_PARM1(ctx));
	return 0;
}

SEC("kprobe/rx_filter_end")
int rx_filter_end(struct pt_regs *ctx)
{
	return rx_leave(ctx, (__s32)PT_REGS_RC(ctx) ? SKB_LOST_FILTER : 0);
}

/* __xfrm_policy_check(sk, dir, skb, family) */
SEC("kprobe/rx_policy")
int rx_policy(struct pt_regs *ctx)
{
	rx_begin(ctx, PT_REGS_PARM3(ctx), PT_REGS_PARM1(ctx));
	return 0;
}

SEC("kprobe/rx_policy_end")
int rx_policy_end(struct pt_regs *ctx)
{
	return rx_leave(ctx, (__s32)PT_REGS_RC(ctx) ? 0 : SKB_LOST_POLICY);
}

/* __skb_checksum_complete(skb) */
SEC("kprobe/rx_sum")
int rx_sum(struct pt_regs *ctx)
{
	rx_begin(ctx, PT_REGS_PARM1(ctx), 0);
	return 0;
}

SEC("kprobe/rx_sum_end")
int rx_sum_end(struct pt_regs *ctx)
{
	return rx_leave(ctx, (__u16)PT_REGS_RC(ctx) ? SKB_LOST_CSUM : 0);
}

#define RX_ENOMEM -12
#define RX_EXDEV -18
#define RX_ENOBUFS -105

/* __udp_enqueue_schedule_skb(sk, skb) */
SEC("kprobe/rx_enqueue")
int rx_enqueue(struct pt_regs *ctx)
{
	rx_begin(ctx, PT_REGS_PARM2(ctx), PT_REGS_PARM1(ctx));
	return 0;
}

SEC("kprobe/rx_enqueue_end")
int rx_enqueue_end(struct pt_regs *ctx)
{
	__s32 error = (__s32)PT_REGS_RC(ctx);

	if (error == RX_ENOBUFS)
		return rx_leave(ctx, SKB_LOST_MEMORY);
	return rx_leave(ctx, error == RX_ENOMEM ? SKB_LOST_BUFFER : 0);
}

/* ip_route_input_noref(skb, daddr, saddr, tos, dev) */
SEC("kprobe/rx_route")
int rx_route(struct pt_regs *ctx)
{
	rx_begin(ctx, PT_REGS_PARM1(ctx), 0);
	return 0;
}

SEC("kprobe/rx_route_end")
int rx_route_end(struct pt_regs *ctx)
{
	__s32 error = (__s32)PT_REGS_RC(ctx);

	return rx_leave(ctx, error == RX_EXDEV ? SKB_LOST_RPFILTER : 0);
}

/* The socket that this packet was on its way to; 0: none is known. */
static __always_inline __u64 rx_sock_of(void *ctx, __u64 skb)
{
	__u64 key = track_context(stack_address(ctx));
	struct rx_call *call = bpf_map_lookup_elem(&rx_calls, &key);

	return call && call->skb == skb && call->depth ? call->sk : 0;
}

/* What refused this packet, which is freed now: SKB_LOST_*; 0: nothing is known. */
static __always_inline __u32 rx_refusal_of(void *ctx, __u64 skb)
{
	__u64 key = track_context(stack_address(ctx));
	struct rx_call *call = bpf_map_lookup_elem(&rx_calls, &key);
	__u32 lost;

	if (!call || call->skb != skb)
		return 0;
	lost = call->refused;
	call->refused = 0;
	if (!call->depth)
		bpf_map_delete_elem(&rx_calls, &key);
	return lost;
}

#define SKB_DATAREF_SHIFT 16 /* include/linux/skbuff.h */
#define SKB_DATAREF_MASK 0xffff

/*
 * How many other sk_buffs hold this packet now; -1: none. That it was cloned
 * once says nothing: who waits for a neighbour's address is cloned for the
 * request. A clone of a segment in TCP's queue of those sent is that segment, no
 * copy.
 */
static __always_inline __s32 drop_others(struct sk_buff *skb)
{
	struct skb_shared_info *shared;
	__u32 refs, payload;

	if (!BPF_CORE_READ_BITFIELD_PROBED(skb, cloned))
		return -1;
	shared = (void *)(NP_READ(skb, head) + NP_READ(skb, end));
	refs = BPF_CORE_READ(shared, dataref.counter);
	payload = refs >> SKB_DATAREF_SHIFT;
	refs = (refs & SKB_DATAREF_MASK) - payload;
	return refs > 1 && refs <= SKB_DATAREF_MASK ? refs - 1 : -1;
}

#define SKB_FCLONE_OF_TCP 2 /* SKB_FCLONE_CLONE, include/linux/skbuff.h */

/* Was it cloned, or is it a clone of anything but TCP's queue of those sent? */
static __always_inline bool drop_cloned(struct sk_buff *skb)
{
	return BPF_CORE_READ_BITFIELD_PROBED(skb, cloned) &&
	       BPF_CORE_READ_BITFIELD_PROBED(skb, fclone) != SKB_FCLONE_OF_TCP;
}

/* Of a packet in a qdisc, in skb->cb (a u32 from 7.x on, with the qdisc's own reason). */
struct tc_skb_cb___np {
	__u32 drop_reason;
} __attribute__((preserve_access_index));

static __always_inline __u32 drop_qdisc(struct sk_buff *skb)
{
	struct tc_skb_cb___np *cb = (void *)&skb->cb;
	__u32 reason = 0;

	if (bpf_core_field_exists(struct tc_skb_cb___np, drop_reason))
		reason = BPF_CORE_READ(cb, drop_reason);
	return reason;
}

/* What is known of the drop at hand: too much for the BPF stack. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, SCRATCH_COUNT);
	__type(key, __u32);
	__type(value, struct skb_drop);
} drop_at_hand SEC(".maps");

static __always_inline struct skb_drop *drop_new(__u32 scratch)
{
	struct skb_drop *drop = bpf_map_lookup_elem(&drop_at_hand, &scratch);

	if (drop)
		__builtin_memset(drop, 0, sizeof(*drop));
	return drop;
}

#define DROP_FRAMES 24

/* The functions that called the one with the place of the drop. */
static __noinline __attribute__((unused)) int
drop_callers(void *ctx, __u64 place, struct skb_drop *drop)
{
	struct track_stack *s = track_stack_get();
	long len;

	if (!s || !drop)
		return 0;
	len = bpf_get_stack(ctx, s->at, DROP_FRAMES * sizeof(__u64), 0);
	for (__u32 i = 0; i < DROP_FRAMES - SKB_DROP_CALLERS; i++) {
		if ((i + 1) * (long)sizeof(__u64) > len)
			break;
		if (s->at[i] != place)
			continue;
		for (__u32 j = 0; j < SKB_DROP_CALLERS; j++)
			if ((i + j + 2) * (long)sizeof(__u64) <= len)
				drop->callers[j] = s->at[i + j + 1];
		break;
	}
	return 0;
}

/* The packet of a handshake's end that made no socket is freed. */
static __always_inline void drop_of_ack(void *ctx, __u64 skb,
					struct skb_drop *drop)
{
	__u64 key = track_context(stack_address(ctx));
	struct listen_call *call = bpf_map_lookup_elem(&listen_acks, &key);

	if (!call || call->answered)
		return;
	if (call->skb == skb) {
		drop->lost = call->lost;
		drop->backlog = call->queue.held;
		drop->limit = call->queue.limit;
	}
	bpf_map_delete_elem(&listen_acks, &key);
}

#endif
