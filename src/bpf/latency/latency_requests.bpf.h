/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * --requests: how long a process thinks, by the directions of its connection, whatever
 * the protocol. A request has come when data is read; it is answered by the first write
 * that follows. The end that accepted the connection serves (lat_serves()).
 * Data that waits unread while the process writes: requests overlap (pipelining, several
 * streams in one connection), and no time is told.
 */
#ifndef NETPROBE_LATENCY_REQUESTS_BPF_H
#define NETPROBE_LATENCY_REQUESTS_BPF_H

enum lat_turn {
	LAT_TURN_NONE,
	LAT_TURN_READ, /* data was read last */
	LAT_TURN_WROTE, /* data was written last */
};

struct lat_talk {
	struct lat_packet p; /* the request, as it is sent */
	__u64 arrived; /* ns; its last byte came; of an answer: the first one */
	__u64 read;
	__u64 written;
	__u32 turn;
	__u32 overlap;
	__u32 copied; /* sequence number up to which it was read */
	__u32 pad;
};

/* By socket. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, __u64);
	__type(value, struct lat_talk);
} talks SEC(".maps");

/* All zeros. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct lat_talk);
} no_talk SEC(".maps");

static __always_inline bool lat_talk_matches(struct lat_packet *p,
					     struct sock *sk)
{
	const struct np_config *cfg = np_config_get();

	p->netns = BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum);
	if ((cfg->fields & NP_FIELD_NETNS) && p->netns != cfg->netns)
		return false;
	return !(cfg->fields & NP_FIELDS_PACKET) || match_tuple(cfg, &p->tuple);
}

#define LAT_BINDPORT_LOCK 8 /* SOCK_BINDPORT_LOCK */

/*
 * This end accepted the connection: its socket has the length of its listener's queue, which it
 * was copied from. This end connected: its port was chosen by connect(), which keeps such ports
 * apart (fastreuse -1), or it was bound to a port, which is not copied. Else (accepted with a queue
 * of no length, or bound to an address alone) the end with the lower port is taken for the server.
 */
static __always_inline bool lat_serves(struct lat_packet *p, struct sock *sk)
{
	struct inet_connection_sock *icsk = (void *)sk;
	struct inet_bind_bucket *ports = BPF_CORE_READ(icsk, icsk_bind_hash);

	if (BPF_CORE_READ(sk, sk_max_ack_backlog))
		return true;
	if (ports && BPF_CORE_READ(ports, fastreuse) < 0)
		return false;
	if (BPF_CORE_READ_BITFIELD_PROBED(sk, sk_userlocks) & LAT_BINDPORT_LOCK)
		return false;
	p->flags |= LAT_FLAG_BY_PORT;
	return p->tuple.dport < p->tuple.sport;
}

/* A connection is seen first. NULL: it is not one to look at. */
static __noinline struct lat_talk *lat_talk_new(__u64 sk)
{
	__u32 zero = 0;
	struct lat_talk *t = bpf_map_lookup_elem(&no_talk, &zero);

	if (!t)
		return NULL;
	bpf_map_update_elem(&talks, &sk, t, BPF_NOEXIST);
	t = bpf_map_lookup_elem(&talks, &sk);
	if (!t)
		return NULL;
	/* As seen from here, where a request comes in. */
	lat_tuple_of(&t->p.tuple, (void *)sk);
	t->p.way = lat_serves(&t->p, (void *)sk) ? LAT_SERVES : LAT_ASKS;
	if (t->p.way == LAT_ASKS)
		lat_turn_round(&t->p.tuple);
	if (lat_talk_matches(&t->p, (void *)sk))
		t->p.flags |= LAT_FLAG_MATCHES;
	return t;
}

static __always_inline struct lat_talk *lat_talk_of(__u64 sk)
{
	struct lat_talk *t = bpf_map_lookup_elem(&talks, &sk);

	if (!t && !np_paused())
		t = lat_talk_new(sk);
	return t && (t->p.flags & LAT_FLAG_MATCHES) ? t : NULL;
}

/* The process has data before it that it has not read. */
static __always_inline bool lat_has_unread(struct tcp_sock *tp)
{
	return BPF_CORE_READ(tp, rcv_nxt) != BPF_CORE_READ(tp, copied_seq);
}

static __always_inline void lat_talk_stage(struct lat_packet *p, __u32 stage,
					   __u64 ns)
{
	p->stage[stage] = ns;
	p->seen |= 1U << stage;
	p->last += ns;
}

/* A request is answered; its stages are known. */
__hidden __noinline int lat_answered(void *ctx, struct lat_talk *t,
				     __u64 unread, __u64 process, __u64 network)
{
	struct lat_packet *p;

	if (!t)
		return 0;
	p = &t->p;
	if (np_paused()) {
		t->overlap = 0;
		return 0;
	}
	if (t->overlap) {
		t->overlap = 0;
		lat_claim(p);
		if (whose && !(p->flags & LAT_FLAG_THEIRS))
			return 0;
		lat_count(lat_by_value(p), p->way, LAT_OVERLAP, 0);
		return 0;
	}
	p->seen = p->counted = 0;
	p->last = bpf_ktime_get_ns();
	p->first = p->last;
	lat_talk_stage(p, LAT_UNREAD, unread);
	lat_talk_stage(p, LAT_PROCESS, process);
	lat_talk_stage(p, LAT_NETWORK, network);
	p->first -= p->last - p->first;
	p->last = p->first + unread + process + network;
	p->flags |= LAT_FLAG_WHOLE;
	p->cpu = bpf_get_smp_processor_id();
	lat_claim(p);
	return lat_finish(ctx, p);
}

static __always_inline __u64 lat_round_trip(struct tcp_sock *tp)
{
	return (__u64)(BPF_CORE_READ(tp, srtt_us) >> 3) * 1000;
}

__hidden __noinline int lat_talk_writes(void *ctx, __u64 sk)
{
	struct lat_talk *t = lat_talk_of(sk);
	struct tcp_sock *tp = (void *)sk;
	__u64 now = bpf_ktime_get_ns();

	if (!t)
		return 0;
	if (lat_has_unread(tp))
		t->overlap = 1;
	if (t->p.way == LAT_SERVES && t->turn == LAT_TURN_READ)
		lat_answered(ctx, t,
			     t->arrived && t->read > t->arrived
				     ? t->read - t->arrived
				     : 0,
			     now - t->read, lat_round_trip(tp));
	t->turn = LAT_TURN_WROTE;
	t->written = now;
	t->arrived = 0;
	return 0;
}

static __always_inline int lat_talk_sendmsg(void *ctx, const __u64 *args)
{
	struct socket *sock = (void *)args[0];
	struct sock *sk = BPF_CORE_READ(sock, sk);

	if (args[2] && BPF_CORE_READ(sk, sk_protocol) == IPPROTO_TCP)
		lat_talk_writes(ctx, (__u64)sk);
	return 0;
}

NP_ENTRY(lat_talk_sendmsg_4, inet_sendmsg)
{
	return lat_talk_sendmsg(ctx, args);
}

NP_ENTRY(lat_talk_sendmsg_6, inet6_sendmsg)
{
	return lat_talk_sendmsg(ctx, args);
}

/* tcp_rcv_established(sk, skb): data comes. */
NP_ENTRY(lat_talk_arrives, tcp_rcv_established)
{
	struct sk_buff *skb = (void *)args[1];
	struct tcp_skb_cb *cb = (void *)skb->cb;
	struct lat_talk *t;

	if (BPF_CORE_READ(cb, seq) == BPF_CORE_READ(cb, end_seq))
		return 0;
	t = lat_talk_of(args[0]);
	/* Of a request the last byte counts, of an answer the first. */
	if (t && (t->p.way == LAT_SERVES || !t->arrived))
		t->arrived = bpf_ktime_get_ns();
	return 0;
}

/* tcp_rcv_space_adjust(sk): a process reads. */
SEC("raw_tp/tcp_rcv_space_adjust")
int lat_talk_reads(struct bpf_raw_tracepoint_args *ctx)
{
	__u64 sk = ctx->args[0], now = bpf_ktime_get_ns(), trip, wait;
	struct lat_talk *t = lat_talk_of(sk);
	__u32 copied;

	if (!t)
		return 0;
	/* A look (MSG_PEEK) is no read. */
	copied = BPF_CORE_READ((struct tcp_sock *)sk, copied_seq);
	if (copied == t->copied)
		return 0;
	t->copied = copied;
	t->read = now;
	if (t->p.way == LAT_ASKS && t->turn == LAT_TURN_WROTE && t->arrived) {
		wait = t->arrived - t->written;
		trip = lat_round_trip((void *)sk);
		if (trip > wait)
			trip = wait;
		lat_answered(ctx, t, now - t->arrived, wait - trip, trip);
	}
	t->turn = LAT_TURN_READ;
	return 0;
}

SEC("raw_tp/tcp_destroy_sock")
int lat_talk_ends(struct bpf_raw_tracepoint_args *ctx)
{
	__u64 sk = ctx->args[0];

	bpf_map_delete_elem(&talks, &sk);
	return 0;
}

#endif
