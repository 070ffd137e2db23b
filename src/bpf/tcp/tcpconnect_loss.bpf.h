/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What happens to the packets of a connect that is pending: drops, listeners
 * without room, errors by ICMP, bridges that flood.
 *
 * A packet belongs to a connect by its socket or by the sequence number of the
 * SYN, which the kernel makes at random for each connect: no translation of
 * addresses changes it, and two namespaces with the same addresses have two.
 *
 * Included by tcpconnect.bpf.c behind tcpconnect_outcome.bpf.h.
 */
#ifndef NETPROBE_TCPCONNECT_LOSS_BPF_H
#define NETPROBE_TCPCONNECT_LOSS_BPF_H

#include "common/listen.bpf.h"
#include "tcp/tcp_l3.bpf.h"

#define ETH_P_8021Q 0x8100
#define ETH_P_8021AD 0x88a8
#define NP_ICMPV6 58
#define NP_PACKET_OTHERHOST 3 /* PACKET_OTHERHOST, linux/if_packet.h */
#define TCP_FIN_SYN_RST_ACK 0x17
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

/* The tracepoint kfree_skb says why (kernels from 5.17). */
const volatile __u8 has_drop_reason = 0;
/* Reasons for which a copy is dropped; 0 where the kernel does not have them. */
const volatile __u32 reason_otherhost = 0;
const volatile __u32 reason_packet_sock = 0;

/* Does this ICMP message quote the packet that it is about? */
static __always_inline bool is_icmp_error(__u8 proto, __u8 type)
{
	if (proto == IPPROTO_ICMP)
		return type == 3 || type == 11 || type == 12;
	return proto == NP_ICMPV6 && type >= 1 && type <= 4;
}

/*
 * Finds the number of the SYN in a SYN, in the answer to one, or in an ICMP
 * error about one, from its IP header.
 */
static __always_inline bool read_isn(const void *ip, __u16 ethertype,
				     __u32 *isn)
{
	struct tcp_l3 l3 = {};
	__be32 words[4];
	__u8 type = 0, flags;

	if (!read_l3(ip, ethertype, &l3))
		return false;
	if (l3.proto != IPPROTO_TCP) {
		bpf_probe_read_kernel(&type, sizeof(type), l3.l4);
		if (!is_icmp_error(l3.proto, type) ||
		    !read_l3(l3.l4 + 8, ethertype, &l3) ||
		    l3.proto != IPPROTO_TCP ||
		    bpf_probe_read_kernel(words, 8, l3.l4) < 0)
			return false;
		*isn = bpf_ntohl(words[1]);
		return true;
	}
	if (bpf_probe_read_kernel(words, sizeof(words), l3.l4) < 0)
		return false;
	flags = bpf_ntohl(words[3]) >> 16 & TCP_FIN_SYN_RST_ACK;
	if (flags == TCP_SYN)
		*isn = bpf_ntohl(words[1]);
	else if ((flags & TCP_ACK) && (flags & (TCP_SYN | TCP_RST)))
		*isn = bpf_ntohl(words[2]) - 1;
	else
		return false;
	return true;
}

static __always_inline struct tcp_outcome *connect_by_isn(__u32 isn)
{
	__u64 *found = bpf_map_lookup_elem(&pending_by_isn, &isn), sock;
	struct tcp_outcome *o;

	if (!found)
		return NULL;
	sock = *found;
	o = bpf_map_lookup_elem(&pending, &sock);
	return o && o->isn == isn ? o : NULL;
}

/* The connect that a packet belongs to, with its network header set. */
static __always_inline struct tcp_outcome *connect_of(struct sk_buff *skb)
{
	__u64 sock = (__u64)NP_READ(skb, sk);
	__u16 proto = NP_READ(skb, protocol);
	struct tcp_outcome *o;
	const void *l3;
	__u32 isn;

	if (sock) {
		o = bpf_map_lookup_elem(&pending, &sock);
		if (o)
			return o;
	}
	l3 = NP_READ(skb, head) + NP_READ(skb, network_header);
	if (proto == bpf_htons(ETH_P_8021Q) ||
	    proto == bpf_htons(ETH_P_8021AD)) {
		/* The tag is still in the packet: the inner type follows it. */
		bpf_probe_read_kernel(&proto, sizeof(proto), l3 + 2);
		l3 += 4;
	}
	return read_isn(l3, proto, &isn) ? connect_by_isn(isn) : NULL;
}

static __always_inline void add_drop(struct tcp_drop *drop, __u64 at,
				     __u32 reason)
{
	drop->at = at;
	drop->reason = reason;
	drop->packets++;
}

/* Is what was dropped a copy of the packet, or one for another host? */
static __always_inline bool is_copy(struct sk_buff *skb, __u32 reason)
{
	if (has_drop_reason && reason_otherhost)
		return reason == reason_otherhost ||
		       (reason_packet_sock && reason == reason_packet_sock);
	return BPF_CORE_READ_BITFIELD_PROBED(skb, pkt_type) ==
	       NP_PACKET_OTHERHOST;
}

/* The kernel drops a packet: is it a SYN of ours, or its answer? */
SEC("raw_tp/kfree_skb")
int drop(struct bpf_raw_tracepoint_args *ctx)
{
	struct sk_buff *skb = NP_CAST(sk_buff, ctx->args[0]);
	struct tcp_outcome *o = connect_of(skb);
	__u32 reason = 0;

	if (!o)
		return 0;
	if (has_drop_reason)
		reason = ctx->args[2];
	add_drop(is_copy(skb, reason) ? &o->copy : &o->drop, ctx->args[1],
		 reason);
	return 0;
}

/* A bridge sends a packet to all of its ports: what others get are copies. */
SEC("kprobe/br_flood")
int BPF_KPROBE(flooded, void *br, struct sk_buff *skb)
{
	struct tcp_outcome *o = connect_of(skb);

	if (o)
		o->connect.flags |= TCP_FLAG_FLOODED;
	return 0;
}

/* What this CPU is in: functions that run with softirqs held off, not nested. */
struct tcp_within {
	__u64 listener; /* tcp_conn_request of a SYN that it will drop, else 0 */
	__u64 at;
	__u64 asks; /* the socket that connects */
	__u32 reason;
	__u32 drops; /* of the listener, before */
	__u64 icmp; /* tcp_v4_err, tcp_v6_err about this socket, else 0 */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct tcp_within);
} within SEC(".maps");

static __always_inline struct tcp_within *within_get(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&within, &zero);
}

/* A SYN reaches a listener: would it be dropped for want of room? */
SEC("kprobe/tcp_conn_request")
int BPF_KPROBE(listener, void *rsk_ops, void *af_ops, struct sock *sk,
	       struct sk_buff *skb)
{
	struct np_listen_queue queue;
	struct tcp_within *w = within_get();
	struct tcp_outcome *o;

	if (!w)
		return 0;
	w->listener = 0;
	w->reason = np_listen_full(sk, &queue);
	if (!w->reason)
		return 0;
	o = connect_of(skb);
	if (!o)
		return 0;
	w->asks = o->connect.sock;
	w->drops = np_listen_drops(sk);
	w->at = PT_REGS_IP(ctx);
	w->listener = (__u64)sk;
	return 0;
}

/* It was, where the listener has counted one more. */
SEC("kretprobe/tcp_conn_request")
int listener_return(struct pt_regs *ctx)
{
	struct tcp_within *w = within_get();
	struct tcp_outcome *o;
	struct sock *sk;
	__u64 asks;

	if (!w || !w->listener)
		return 0;
	sk = (struct sock *)w->listener;
	w->listener = 0;
	if (np_listen_drops(sk) == w->drops)
		return 0;
	asks = w->asks;
	o = bpf_map_lookup_elem(&pending, &asks);
	if (o)
		add_drop(&o->drop, w->at, w->reason);
	return 0;
}

/* An ICMP error for TCP: skb->data is the packet that it quotes. */
static __always_inline int icmp_error(struct sk_buff *skb, __u16 ethertype)
{
	struct tcp_within *w = within_get();
	struct tcp_outcome *o;
	struct tcp_l3 l3 = {};
	__be32 words[2];

	if (!w)
		return 0;
	w->icmp = 0;
	if (!read_l3(NP_READ(skb, data), ethertype, &l3) ||
	    bpf_probe_read_kernel(words, sizeof(words), l3.l4) < 0)
		return 0;
	o = connect_by_isn(bpf_ntohl(words[1]));
	if (o)
		w->icmp = o->connect.sock;
	return 0;
}

/* It has set a soft error where the socket was in use: in connect itself. */
static __always_inline int icmp_error_return(void)
{
	struct tcp_within *w = within_get();
	struct tcp_outcome *o;
	__u32 error;
	__u64 sock;

	if (!w || !w->icmp)
		return 0;
	sock = w->icmp;
	w->icmp = 0;
	o = bpf_map_lookup_elem(&pending, &sock);
	if (!o)
		return 0;
	error = BPF_CORE_READ((struct sock *)sock, sk_err_soft);
	if (error) {
		o->soft_error = error;
		o->soft_at = bpf_ktime_get_ns();
	}
	return 0;
}

SEC("kprobe/tcp_v4_err")
int BPF_KPROBE(icmp4, struct sk_buff *skb)
{
	return icmp_error(skb, bpf_htons(ETH_P_IP));
}

SEC("kprobe/tcp_v6_err")
int BPF_KPROBE(icmp6, struct sk_buff *skb)
{
	return icmp_error(skb, bpf_htons(ETH_P_IPV6));
}

SEC("kretprobe/tcp_v4_err")
int icmp4_return(struct pt_regs *ctx)
{
	return icmp_error_return();
}

SEC("kretprobe/tcp_v6_err")
int icmp6_return(struct pt_regs *ctx)
{
	return icmp_error_return();
}

#endif
