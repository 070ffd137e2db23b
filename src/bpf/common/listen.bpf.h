/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * A listener without room for one more SYN: tcp_conn_request() gives such a
 * SYN back by consume_skb, as if it had been used.
 *
 * Needs vmlinux.h and bpf_core_read.h before it.
 */
#ifndef NETPROBE_LISTEN_BPF_H
#define NETPROBE_LISTEN_BPF_H

#include "common/listen.h"

/* What a queue of a listener holds, and how much it may hold. */
struct np_listen_queue {
	__u32 held;
	__u32 limit;
};

static __always_inline bool np_accept_queue_full(struct sock *sk,
						 struct np_listen_queue *queue)
{
	queue->held = BPF_CORE_READ(sk, sk_ack_backlog);
	queue->limit = BPF_CORE_READ(sk, sk_max_ack_backlog);
	return queue->held > queue->limit;
}

/*
 * Would tcp_conn_request() drop a SYN for this listener now, and for want of
 * what (NP_LISTEN_*)? The conditions are the kernel's, in its order. The kernel
 * does not apply the last one to a peer that it knows. `queue`: the full one.
 */
static __always_inline __u32 np_listen_full(struct sock *sk,
					    struct np_listen_queue *queue)
{
	struct inet_connection_sock *icsk = (void *)sk;
	struct net *net = BPF_CORE_READ(sk, __sk_common.skc_net.net);
	__u32 young = BPF_CORE_READ(icsk, icsk_accept_queue.qlen.counter);
	__u8 cookies = BPF_CORE_READ(net, ipv4.sysctl_tcp_syncookies);
	bool accept = np_accept_queue_full(sk, queue);
	int most;

	if (accept && (cookies || young < queue->limit))
		return NP_LISTEN_ACCEPT_QUEUE_FULL;
	queue->held = young;
	if (!cookies && young >= queue->limit)
		return NP_LISTEN_SYN_QUEUE_FULL;
	most = BPF_CORE_READ(net, ipv4.sysctl_max_syn_backlog);
	if (cookies || most - (int)young >= most >> 2)
		return NP_LISTEN_ROOM;
	queue->limit = most;
	return NP_LISTEN_SYN_QUEUE_FULL;
}

/* SYNs that this listener has dropped. */
static __always_inline __u32 np_listen_drops(struct sock *sk)
{
	return BPF_CORE_READ(sk, sk_drops.counter);
}

#endif
