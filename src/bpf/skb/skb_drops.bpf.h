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
	__u64 key = track_context(stack_address(ctx));
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
	__u64 key = track_context(stack_address(ctx));
	struct listen_call *call = bpf_map_lookup_elem(&listen_syns, &key);

	if (call)
		call->answered = 1;
	return 0;
}

/* ... gives back the new socket. Without one its entry stays for the free that follows. */
SEC("kprobe/listen_ack_end")
int listen_ack_end(struct pt_regs *ctx)
{
	__u64 key = track_context(stack_address(ctx));
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
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, __u64);
	__type(value, struct rx_call);
} rx_calls SEC(".maps");

static __always_inline void rx_begin(void *ctx, __u64 skb, __u64 sk)
{
	__u64 key = track_context(stack_address(ctx));
	struct rx_call *call = bpf_map_lookup_elem(&rx_calls, &key);
	struct rx_call new = {.skb = skb, .sk = sk, .depth = 1};

	if (call && call->skb == skb) {
		call->depth++;
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
	__u64 key = track_context(stack_address(ctx));
	struct rx_call *call = bpf_map_lookup_elem(&rx_calls, &key);

	if (call && PT_REGS_RC(ctx))
		call->sk = PT_REGS_RC(ctx);
	return 0;
}

/* The end of rx_sock's and rx_packet's functions */
SEC("kprobe/rx_end")
int rx_end(struct pt_regs *ctx)
{
	__u64 key = track_context(stack_address(ctx));
	struct rx_call *call = bpf_map_lookup_elem(&rx_calls, &key);

	if (call && !--call->depth)
		bpf_map_delete_elem(&rx_calls, &key);
	return 0;
}

/* The socket that this packet was on its way to; 0: none is known. */
static __always_inline __u64 rx_sock_of(void *ctx, __u64 skb)
{
	__u64 key = track_context(stack_address(ctx));
	struct rx_call *call = bpf_map_lookup_elem(&rx_calls, &key);

	return call && call->skb == skb ? call->sk : 0;
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
