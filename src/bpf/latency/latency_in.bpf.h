/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The way in: from a driver to the process that reads. Needs latency_packet.bpf.h before it. */
#ifndef NETPROBE_LATENCY_IN_BPF_H
#define NETPROBE_LATENCY_IN_BPF_H

/* Segments of a TCP socket that its process has not read yet: numbers in `unread`. */
struct lat_unread {
	__u32 first;
	__u32 next;
	__u32 last_end; /* sequence number that the last one ends at */
	__u32 pad;
};

/* By socket. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, struct lat_unread);
} readers SEC(".maps");

struct lat_segment {
	__u64 sk;
	__u64 number;
};

/* TCP may merge sk_buffs in its queue: from there on a segment is known by its socket. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct lat_segment);
	__type(value, struct lat_packet);
} unread SEC(".maps");

/* Segments that one system call may have read and that are looked at: the next call looks at the rest. */
#define LAT_READS 16

static __always_inline bool lat_is_inside(const struct lat_packet *p)
{
	return p->way == LAT_IN && p->place >= LAT_AT_RECEIVE &&
	       p->place <= LAT_AT_FOUND;
}

/*
 * It comes by another device than before: a bridge, a tunnel. Gives false where it is
 * another packet: TCP frees some without a tracepoint, and their memory is used again.
 */
static __always_inline bool lat_next_device(struct lat_packet *p, __u64 skb,
					    __u8 place)
{
	if (!lat_is_inside(p) || p->place == LAT_AT_FOUND ||
	    lat_ifindex(skb) == p->ifindex || p->data != lat_data(skb))
		return false;
	lat_pass(p, LAT_DEVICE, place);
	lat_take_device(p, NP_CAST(sk_buff, skb));
	return true;
}

/* A driver hands a packet over: netif_rx, napi_gro_receive_entry, netif_receive_skb_entry. */
static __always_inline int lat_handed(void *ctx, __u64 skb)
{
	struct lat_packet *old = lat_at(skb), *p = lat_known(old);

	if (p) {
		/* A driver that is a wire to another namespace, or lo. */
		if (lat_is_out(p))
			lat_gone(ctx, p);
		else if (lat_next_device(p, skb, LAT_AT_DRIVER_IN))
			return 0;
	}
	lat_begin(old, skb, LAT_IN, LAT_AT_DRIVER_IN);
	return 0;
}

SEC("raw_tp/netif_rx")
int lat_netif_rx(struct bpf_raw_tracepoint_args *ctx)
{
	return lat_handed(ctx, ctx->args[0]);
}

static __always_inline int lat_received(__u64 skb)
{
	struct lat_packet *old = lat_at(skb), *p = lat_known(old);

	if (p && p->way == LAT_IN && p->place == LAT_AT_DRIVER_IN) {
		lat_pass(p, LAT_SOFTIRQ, LAT_AT_RECEIVE);
		/* RPS may have given it to another one. */
		p->cpu = bpf_get_smp_processor_id();
	} else if (!p || !lat_next_device(p, skb, LAT_AT_RECEIVE)) {
		p = lat_begin(old, skb, LAT_IN, LAT_AT_RECEIVE);
	}
	return lat_match(skb, p);
}

SEC("raw_tp/netif_receive_skb")
int lat_receive(struct bpf_raw_tracepoint_args *ctx)
{
	return lat_received(ctx->args[0]);
}

static __always_inline int lat_local(__u64 skb)
{
	struct lat_packet *p = lat_find(skb);

	if (p && p->way == LAT_IN && p->place == LAT_AT_RECEIVE)
		lat_pass(p, LAT_IP, LAT_AT_LOCAL);
	return 0;
}

NP_ENTRY(lat_local_4, ip_local_deliver)
{
	return lat_local(args[0]);
}

NP_ENTRY(lat_local_6, ip6_input)
{
	return lat_local(args[0]);
}

/* sk_filter_trim_cap(sk, skb, ...): a packet's socket is found. */
static __always_inline int lat_socket_found(__u64 skb)
{
	struct lat_packet *p = lat_find(skb);

	if (p && lat_is_inside(p) && p->place != LAT_AT_FOUND)
		lat_pass(p, LAT_TRANSPORT, LAT_AT_FOUND);
	return 0;
}

NP_ENTRY(lat_found, sk_filter_trim_cap)
{
	return lat_socket_found(args[1]);
}

/* Where a kernel has no sk_filter_trim_cap: its first call. */
NP_ENTRY(lat_found_by_lsm, security_sock_rcv_skb)
{
	return lat_socket_found(args[1]);
}

/* The segment goes on as one that is not read yet. */
__hidden __noinline int lat_wait_for_reader(__u64 sk, struct lat_packet *p)
{
	struct lat_unread *r = bpf_map_lookup_elem(&readers, &sk), new = {};
	struct lat_segment key = {.sk = sk};

	if (!p)
		return 0;
	if (!r) {
		bpf_map_update_elem(&readers, &sk, &new, BPF_ANY);
		r = bpf_map_lookup_elem(&readers, &sk);
		if (!r)
			return 0;
	}
	/* The same once more: the first one was dropped. */
	if (r->next != r->first && r->last_end == p->end_seq)
		r->next--;
	key.number = r->next;
	bpf_map_update_elem(&unread, &key, p, BPF_ANY);
	r->last_end = p->end_seq;
	r->next++;
	return 0;
}

/* tcp_rcv_established(sk, skb): the socket has it. */
NP_ENTRY(lat_tcp_queue, tcp_rcv_established)
{
	struct tcp_sock *tp = (void *)args[0];
	struct sk_buff *skb = (void *)args[1];
	struct tcp_skb_cb *cb = (void *)skb->cb;
	struct lat_packet *p = lat_find((__u64)skb);
	__u32 seq, end, next;

	if (!p || p->way != LAT_IN)
		return 0;
	lat_pass(p, LAT_QUEUE, LAT_AT_QUEUE);
	seq = BPF_CORE_READ(cb, seq);
	end = BPF_CORE_READ(cb, end_seq);
	next = BPF_CORE_READ(tp, rcv_nxt);
	/* A FIN has a sequence number, and no data. */
	if (BPF_CORE_READ(cb, tcp_flags) & 1)
		end--;
	if ((__s32)(end - seq) > 0 && (__s32)(end - next) > 0) {
		p->end_seq = end;
		if ((__s32)(seq - next) > 0)
			p->flags |= LAT_FLAG_HOLE;
		lat_wait_for_reader((__u64)tp, p);
	} else {
		lat_look((__u64)skb, p);
		lat_finish(ctx, p);
	}
	p->place = LAT_AT_END;
	return 0;
}

/* The addresses of a segment that came to this socket. */
static __always_inline void lat_tuple_of(struct np_tuple *t, struct sock *sk)
{
	if (BPF_CORE_READ(sk, __sk_common.skc_family) == NP_AF_INET) {
		t->l3_version = 4;
		np_map_v4(t->saddr, BPF_CORE_READ(sk, __sk_common.skc_daddr));
		np_map_v4(t->daddr,
			  BPF_CORE_READ(sk, __sk_common.skc_rcv_saddr));
	} else {
		t->l3_version = 6;
		BPF_CORE_READ_INTO(&t->saddr, sk, __sk_common.skc_v6_daddr);
		BPF_CORE_READ_INTO(&t->daddr, sk, __sk_common.skc_v6_rcv_saddr);
	}
	/* IPv4 by a socket of IPv6. */
	if (!t->saddr[0] && (__u32)t->saddr[1] == bpf_htonl(0xffff))
		t->l3_version = 4;
	t->l4_proto = IPPROTO_TCP;
	t->sport = bpf_ntohs(BPF_CORE_READ(sk, __sk_common.skc_dport));
	t->dport = BPF_CORE_READ(sk, __sk_common.skc_num);
}

/* The other direction. */
static __always_inline void lat_turn_round(struct np_tuple *t)
{
	__u64 addr[2] = {t->saddr[0], t->saddr[1]};
	__u16 port = t->sport;

	t->saddr[0] = t->daddr[0];
	t->saddr[1] = t->daddr[1];
	t->daddr[0] = addr[0];
	t->daddr[1] = addr[1];
	t->sport = t->dport;
	t->dport = port;
}

__hidden __noinline int lat_tcp_read_one(void *ctx, __u64 sk,
					 struct lat_packet *p)
{
	if (!p)
		return 0;
	lat_pass(p, LAT_SOCKET, LAT_AT_READ);
	p->flags |= LAT_FLAG_WHOLE;
	lat_claim(p);
	if (min_ns && p->last - p->first >= min_ns && !p->tuple.l3_version)
		lat_tuple_of(&p->tuple, (void *)sk);
	if (with_culprit)
		lat_note_reader(ctx, p);
	return lat_finish(ctx, p);
}

/* One segment more that has been read; else 0. Not static: so the verifier checks it once. */
__noinline int lat_tcp_read_next(struct bpf_raw_tracepoint_args *ctx, __u64 sk,
				 __u32 copied)
{
	struct lat_unread *r = bpf_map_lookup_elem(&readers, &sk);
	struct lat_segment key = {.sk = sk};
	struct lat_packet *p;

	if (!r || r->first == r->next)
		return 0;
	key.number = r->first;
	p = bpf_map_lookup_elem(&unread, &key);
	if (p && (__s32)(copied - p->end_seq) < 0)
		return 0;
	if (p) {
		lat_tcp_read_one(ctx, sk, p);
		bpf_map_delete_elem(&unread, &key);
	}
	r->first++;
	return 1;
}

/* tcp_rcv_space_adjust(sk): a process has read up to copied_seq. */
SEC("raw_tp/tcp_rcv_space_adjust")
int lat_tcp_read(struct bpf_raw_tracepoint_args *ctx)
{
	__u64 sk = ctx->args[0];
	struct lat_unread *r = bpf_map_lookup_elem(&readers, &sk);
	__u32 copied;

	if (!r || r->first == r->next)
		return 0;
	copied = BPF_CORE_READ((struct tcp_sock *)sk, copied_seq);
	for (int i = 0; i < LAT_READS; i++)
		if (!lat_tcp_read_next(ctx, sk, copied))
			break;
	return 0;
}

/* Its memory may be another socket's from now on. */
SEC("raw_tp/tcp_destroy_sock")
int lat_tcp_gone(struct bpf_raw_tracepoint_args *ctx)
{
	__u64 sk = ctx->args[0];

	bpf_map_delete_elem(&readers, &sk);
	bpf_map_delete_elem(&written, &sk);
	return 0;
}

/* __udp_enqueue_schedule_skb(sk, skb) */
NP_ENTRY(lat_udp_queue, __udp_enqueue_schedule_skb)
{
	struct lat_packet *p = lat_find(args[1]);

	if (p && lat_is_inside(p))
		lat_pass(p, LAT_QUEUE, LAT_AT_QUEUE);
	return 0;
}

/* skb_consume_udp(sk, skb, len): a process has read it. */
NP_ENTRY(lat_udp_read, skb_consume_udp)
{
	__u64 skb = args[1];
	struct lat_packet *p = lat_find(skb);

	if (!p || p->place != LAT_AT_QUEUE)
		return 0;
	lat_pass(p, LAT_SOCKET, LAT_AT_READ);
	p->flags |= LAT_FLAG_WHOLE;
	lat_claim(p);
	lat_look(skb, p);
	if (with_culprit)
		lat_note_reader(ctx, p);
	lat_finish(ctx, p);
	p->place = LAT_AT_END;
	return 0;
}

#endif
