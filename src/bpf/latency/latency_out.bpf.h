/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The way out, and through: from a process, or another device, to a driver. Needs latency_packet.bpf.h before it. */
#ifndef NETPROBE_LATENCY_OUT_BPF_H
#define NETPROBE_LATENCY_OUT_BPF_H

/* A call of sendmsg. */
struct lat_write {
	__u64 ts;
	__u64 cgroup;
	__u32 tgid;
	__u32 seq; /* TCP: of its first byte */
	__u32 size; /* bytes; 0: none */
	__u32 theirs; /* by a process that is asked for */
	/* Jiffies up to then: by the peer's window, by the send buffer; all. */
	__u32 limited[3];
	__u8 comm[NP_COMM_LEN];
};

#define LAT_WRITES 8

/* The last writes of a TCP socket. */
struct lat_writes {
	struct lat_write of[LAT_WRITES];
	__u32 next;
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 2048);
	__type(key, __u64);
	__type(value, struct lat_writes);
} written SEC(".maps");

/* What a thread writes to another socket than one of TCP. */
struct lat_call {
	struct lat_write write;
	__u64 sk;
};

/* By thread. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 2048);
	__type(key, __u64);
	__type(value, struct lat_call);
} writing SEC(".maps");

/* All zeros. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct lat_writes);
} no_writes SEC(".maps");

static __always_inline void lat_write_now(struct lat_write *w, __u64 size)
{
	w->ts = bpf_ktime_get_ns();
	w->tgid = bpf_get_current_pid_tgid() >> 32;
	w->size = size;
	w->theirs = whose && lat_is_theirs();
	if (by == LAT_BY_CGROUP || min_ns)
		w->cgroup = bpf_get_current_cgroup_id();
	if (min_ns)
		bpf_get_current_comm(w->comm, sizeof(w->comm));
}

/* Jiffies that a socket has waited so far for the peer's window, and for its send buffer: tcp_get_info_chrono_stats(). */
static __always_inline void lat_limits(struct tcp_sock *tp, __u32 limited[3])
{
	__u32 running = BPF_CORE_READ_BITFIELD_PROBED(tp, chrono_type);
	__u32 start = BPF_CORE_READ(tp, chrono_start);
	__u32 now = bpf_jiffies64();

	/* enum tcp_chrono: 2, 3; the first of the three counts the time with data. */
	limited[0] = BPF_CORE_READ(tp, chrono_stat[1]);
	limited[1] = BPF_CORE_READ(tp, chrono_stat[2]);
	limited[2] = now;
	if (running == 2)
		limited[0] += now - start;
	if (running == 3)
		limited[1] += now - start;
}

__hidden __noinline int lat_tcp_write(__u64 sk, __u64 size)
{
	struct lat_writes *w = bpf_map_lookup_elem(&written, &sk);
	struct tcp_sock *tp = (void *)sk;
	__u32 zero = 0, at;

	if (!w) {
		w = bpf_map_lookup_elem(&no_writes, &zero);
		if (w)
			bpf_map_update_elem(&written, &sk, w, BPF_NOEXIST);
		w = bpf_map_lookup_elem(&written, &sk);
		if (!w)
			return 0;
	}
	at = w->next & (LAT_WRITES - 1);
	w->of[at].seq = BPF_CORE_READ(tp, write_seq);
	lat_write_now(&w->of[at], size);
	if (min_ns)
		lat_limits(tp, w->of[at].limited);
	w->next++;
	return 0;
}

/* inet_sendmsg(sock, msg, size) */
static __always_inline int lat_sendmsg(const __u64 *args)
{
	struct socket *sock = (void *)args[0];
	struct sock *sk = BPF_CORE_READ(sock, sk);
	__u64 thread = bpf_get_current_pid_tgid();
	struct lat_call call = {}, *known;

	if (BPF_CORE_READ(sk, sk_protocol) == IPPROTO_TCP)
		return lat_tcp_write((__u64)sk, args[2]);
	known = bpf_map_lookup_elem(&writing, &thread);
	if (known) {
		lat_write_now(&known->write, args[2]);
		known->sk = (__u64)sk;
		return 0;
	}
	lat_write_now(&call.write, args[2]);
	call.sk = (__u64)sk;
	bpf_map_update_elem(&writing, &thread, &call, BPF_ANY);
	return 0;
}

NP_ENTRY(lat_sendmsg_4, inet_sendmsg)
{
	return lat_sendmsg(args);
}

NP_ENTRY(lat_sendmsg_6, inet6_sendmsg)
{
	return lat_sendmsg(args);
}

/* The packet was written by this call. */
static __always_inline void lat_written(struct lat_packet *p,
					const struct lat_write *w)
{
	if (w->ts > p->last)
		return;
	p->first = w->ts;
	p->stage[LAT_WRITE] = p->last - w->ts;
	p->seen |= 1U << LAT_WRITE;
	if (w->theirs)
		p->flags |= LAT_FLAG_THEIRS;
	p->tgid = w->tgid;
	p->cgroup = w->cgroup;
	__builtin_memcpy(p->comm, w->comm, sizeof(p->comm));
}

/* What held a segment back since it was written. */
static __always_inline void lat_limited_by(struct lat_packet *p, __u64 sk,
					   const struct lat_write *w)
{
	__u32 now[3];

	lat_limits((void *)sk, now);
	p->limited[0] = now[0] - w->limited[0];
	p->limited[1] = now[1] - w->limited[1];
	p->limited[2] = now[2] - w->limited[2];
	p->flags |= LAT_FLAG_LIMITS;
}

/* The call that wrote the first byte of a segment. */
static __always_inline void lat_find_write(struct lat_packet *p, __u64 sk,
					   __u32 seq)
{
	struct lat_writes *w = bpf_map_lookup_elem(&written, &sk);
	__u32 at;

	if (!w)
		return;
	for (int i = 1; i <= LAT_WRITES; i++) {
		at = (w->next - i) & (LAT_WRITES - 1);
		if (seq - w->of[at].seq < w->of[at].size) {
			lat_written(p, &w->of[at]);
			if (min_ns && p->last - p->first >= min_ns)
				lat_limited_by(p, sk, &w->of[at]);
			return;
		}
	}
}

/* ip_queue_xmit(sk, skb, ...), inet6_csk_xmit: a segment that TCP sends; its header is at skb->data. */
__hidden __noinline int lat_tcp_out(__u64 sk, __u64 skb_ptr)
{
	struct sk_buff *skb = NP_CAST(sk_buff, skb_ptr);
	struct tcp_sock *tp = (void *)sk;
	struct lat_packet *p;
	struct tcphdr th = {};
	__u32 seq;

	p = lat_begin(lat_at(skb_ptr), skb_ptr, LAT_OUT, LAT_AT_IP_OUT);
	if (!p || bpf_probe_read_kernel(&th, sizeof(th), NP_READ(skb, data)))
		return 0;
	if (p->len <= th.doff * 4)
		return 0;
	seq = bpf_ntohl(th.seq);
	if ((__s32)(seq - BPF_CORE_READ(tp, snd_nxt)) < 0)
		p->flags |= LAT_FLAG_AGAIN;
	lat_find_write(p, sk, seq);
	return 0;
}

NP_ENTRY(lat_tcp_out_4, ip_queue_xmit)
{
	struct sock *sk = (void *)args[0];

	/* SCTP and L2TP call it too. */
	if (BPF_CORE_READ(sk, sk_protocol) == IPPROTO_TCP)
		lat_tcp_out((__u64)sk, args[1]);
	return 0;
}

NP_ENTRY(lat_tcp_out_6, inet6_csk_xmit)
{
	return lat_tcp_out(args[0], args[1]);
}

/* ip_send_skb(net, skb), ip6_send_skb(skb): a datagram is complete. */
__hidden __noinline int lat_datagram_out(__u64 skb_ptr)
{
	struct sk_buff *skb = NP_CAST(sk_buff, skb_ptr);
	__u64 thread = bpf_get_current_pid_tgid();
	struct lat_call *call;
	struct lat_packet *p;

	p = lat_begin(lat_at(skb_ptr), skb_ptr, LAT_OUT, LAT_AT_IP_OUT);
	call = bpf_map_lookup_elem(&writing, &thread);
	/* What the kernel itself sends, in this thread's time, has another socket. */
	if (!call || !call->sk || call->sk != (__u64)NP_READ(skb, sk))
		return 0;
	if (p)
		lat_written(p, &call->write);
	/* It is not another packet's. */
	call->sk = 0;
	return 0;
}

NP_ENTRY(lat_datagram_4, ip_send_skb)
{
	return lat_datagram_out(args[1]);
}

NP_ENTRY(lat_datagram_6, ip6_send_skb)
{
	return lat_datagram_out(args[0]);
}

/*
 * A packet that came in may leave by another device. Where the memory of one that TCP has
 * freed without a tracepoint is used again, it is one that this machine sends: the device
 * that such a packet came by is 0.
 */
static __always_inline bool lat_may_leave(const struct lat_packet *p, __u64 skb)
{
	return p->way != LAT_IN || (p->place == LAT_AT_RECEIVE &&
				    NP_READ(NP_CAST(sk_buff, skb), skb_iif));
}

/* net_dev_queue(skb): at a device's queue. */
/* The queue of the device that the packet goes to. */
static __always_inline struct Qdisc *lat_qdisc_of(struct sk_buff *skb)
{
	struct net_device *dev = BPF_CORE_READ(skb, dev);
	__u16 at = BPF_CORE_READ(skb, queue_mapping);
	void *queue = BPF_CORE_READ(dev, _tx);

	if (at >= BPF_CORE_READ(dev, num_tx_queues))
		at = 0;
	queue += at * bpf_core_type_size(struct netdev_queue);
	return BPF_CORE_READ((struct netdev_queue *)queue, qdisc);
}

/* How full it is. */
static __always_inline void lat_take_qdisc(struct lat_packet *p,
					   struct sk_buff *skb)
{
	struct Qdisc *qdisc = lat_qdisc_of(skb);

	p->queued = p->last;
	if (qdisc)
		p->backlog = BPF_CORE_READ(qdisc, q.qlen);
}

/* Of which kind, for a packet that has been slow. */
static __always_inline void lat_name_qdisc(struct lat_packet *p,
					   struct sk_buff *skb)
{
	struct Qdisc *qdisc = lat_qdisc_of(skb);

	if (qdisc)
		BPF_CORE_READ_STR_INTO(&p->qdisc, qdisc, ops, id);
}

static __always_inline void lat_queued(struct lat_packet *p)
{
	if (p->way == LAT_IN) {
		p->way = LAT_THROUGH;
		lat_pass(p, LAT_FORWARD, LAT_AT_QDISC);
	} else if (p->place == LAT_AT_IP_OUT) {
		lat_pass(p, LAT_OUTPUT, LAT_AT_QDISC);
	} else {
		/* A tunnel, a bridge, a VLAN sends it on. */
		lat_pass(p, LAT_DEVICE, LAT_AT_QDISC);
	}
}

SEC("raw_tp/net_dev_queue")
int lat_queue(struct bpf_raw_tracepoint_args *ctx)
{
	__u64 skb = ctx->args[0];
	struct lat_packet *old = lat_at(skb), *p = lat_known(old);

	if (!p || p->place == LAT_AT_SENT || !lat_may_leave(p, skb))
		p = lat_begin(old, skb, LAT_OUT, LAT_AT_QDISC);
	else
		lat_queued(p);
	/* The device that it leaves by. */
	if (p) {
		lat_take_device(p, NP_CAST(sk_buff, skb));
		if (with_culprit)
			lat_take_qdisc(p, (void *)skb);
	}
	return lat_match(skb, p);
}

/* net_dev_start_xmit(skb, dev) */
SEC("raw_tp/net_dev_start_xmit")
int lat_start(struct bpf_raw_tracepoint_args *ctx)
{
	__u64 skb = ctx->args[0];
	struct lat_packet *p = lat_find(skb);

	if (!p || p->way == LAT_IN ||
	    (p->place != LAT_AT_QDISC && p->place != LAT_AT_DRIVER_OUT))
		return 0;
	lat_pass(p, LAT_QDISC, LAT_AT_DRIVER_OUT);
	p->cpu = bpf_get_smp_processor_id();
	if (with_culprit)
		lat_note_sent(ctx, skb, p);
	if (min_ns && p->last - p->first >= min_ns)
		lat_name_qdisc(p, (void *)skb);
	return lat_look(skb, p);
}

#define LAT_XMIT_MASK 0x0f /* NET_XMIT_MASK: above it the driver was busy */

/* net_dev_xmit(skb, rc, dev, len): the driver has it, or has freed it. */
SEC("raw_tp/net_dev_xmit")
int lat_xmit(struct bpf_raw_tracepoint_args *ctx)
{
	struct net_device *dev = (void *)ctx->args[2];
	struct lat_packet *p = lat_find(ctx->args[0]);

	if (!p || !lat_is_out(p) || (int)ctx->args[1] > LAT_XMIT_MASK ||
	    BPF_CORE_READ(dev, ifindex) != p->ifindex)
		return 0;
	p->place = LAT_AT_SENT;
	lat_gone(ctx, p);
	return 0;
}

/* The total is over already: this stage stands for itself. */
static __always_inline void lat_completed(void *ctx, struct lat_packet *p)
{
	__u64 ns;

	lat_pass(p, LAT_COMPLETION, LAT_AT_SENT);
	ns = p->stage[LAT_COMPLETION];
	lat_count(lat_by_value(p), p->way, LAT_COMPLETION, ns);
	if (min_ns && ns >= min_ns)
		lat_send(ctx, p);
}

/* consume_skb(skb): it is freed, and was of use. */
SEC("raw_tp/consume_skb")
int lat_consumed(struct bpf_raw_tracepoint_args *ctx)
{
	__u64 skb = ctx->args[0];
	struct lat_packet *p = lat_find(skb);

	if (!p)
		return 0;
	if (p->place == LAT_AT_SENT) {
		lat_completed(ctx, p);
	} else if (lat_is_out(p)) {
		lat_gone(ctx, p);
		lat_completed(ctx, p);
	} else {
		if (p->place == LAT_AT_QDISC)
			p->flags |= LAT_FLAG_SPLIT;
		lat_look(skb, p);
		lat_finish(ctx, p);
	}
	p->place = LAT_AT_END;
	return 0;
}

/* kfree_skb(skb, ...): dropped. */
SEC("raw_tp/kfree_skb")
int lat_dropped(struct bpf_raw_tracepoint_args *ctx)
{
	lat_forget(ctx->args[0]);
	return 0;
}

#endif
