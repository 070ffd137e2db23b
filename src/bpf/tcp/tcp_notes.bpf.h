/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Notes of `netprobe tcp --events`: what happens to connections that go on, and the
 * drops behind what is sent again. A dropped segment belongs to its retransmission by
 * its sequence number, which no translation of addresses changes and which the kernel
 * begins at random; so does a dropped acknowledgement.
 *
 * Included by tcp.bpf.c.
 */
#ifndef NETPROBE_TCP_NOTES_BPF_H
#define NETPROBE_TCP_NOTES_BPF_H

#define TCP_FIN 0x01
#define TCP_FIN_SYN 0x03
#define TCP_RST 0x04
#define TCP_ACK 0x10
#define DROPS 16384
/* Older drops have had their retransmission, ns. */
#define OLD 120000000000ULL

/* Which notes are wanted: bits by CONN_WHAT_*. */
const volatile __u32 notes = 0;
/* The tracepoint kfree_skb says why (kernels from 5.17). */
const volatile __u8 has_drop_reason = 0;
/* The tracepoint tcp_send_reset says why (kernels from 6.10). */
const volatile __u8 has_reset_reason = 0;

struct conn_number {
	__u32 seq;
	__u32 lost; /* CONN_LOST_* */
};

/* What was dropped lately: data by its first number, acknowledgements by theirs. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, DROPS);
	__type(key, struct conn_number);
	__type(value, struct conn_drop);
} drops SEC(".maps");

struct conn_windows {
	__u64 peer; /* since when its window is zero, ns; 0: it is not */
	__u64 read; /* a read was told while ours was zero */
};

/* By socket. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, DROPS);
	__type(key, __u64);
	__type(value, struct conn_windows);
} windows SEC(".maps");

/* Sockets that have sent again, and how many of their segments the peer has had twice: tcp_sock.dsack_dups. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, DROPS);
	__type(key, __u64);
	__type(value, __u32);
} resent SEC(".maps");

/* Of RSTs. A stack that finds its place taken is not kept. */
struct {
	__uint(type, BPF_MAP_TYPE_STACK_TRACE);
	__uint(max_entries, 1024);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, CONN_STACK_DEPTH * sizeof(__u64));
} stacks SEC(".maps");

static __always_inline bool wants_notes(__u32 what)
{
	return notes & 1U << what;
}

/* A note of a full socket. */
static __always_inline void note_begin(struct conn_note *n, struct sock *sk,
				       __u8 what)
{
	__u64 key = (__u64)sk;
	struct conn_life *life = bpf_map_lookup_elem(&lives, &key);

	np_head_fill(&n->head, CONN_KIND_NOTE);
	n->sock = key;
	n->what = what;
	if (life)
		n->life = *life;
	read_ends(&n->ends, sk);
	n->ends.sport = local_port(sk);
	n->from = BPF_CORE_READ(sk, __sk_common.skc_state);
}

/* The drop behind it, where that is later than what is known. */
static __always_inline void take_drop(struct conn_note *n, __u32 seq, __u8 lost)
{
	struct conn_number key = {.seq = seq, .lost = lost};
	struct conn_drop *drop = bpf_map_lookup_elem(&drops, &key);

	if (!drop || n->head.ts - drop->ts > OLD || drop->ts < n->drop.ts)
		return;
	n->drop = *drop;
	n->lost = lost;
	bpf_map_delete_elem(&drops, &key);
}

static __always_inline void note_again(void *ctx, struct conn_note *n)
{
	take_drop(n, n->seq, CONN_LOST_ORIGINAL);
	/* A later one: what it acknowledges was only freed as a drop is, by TIME_WAIT, or had been sent again. */
	take_drop(n, n->end_seq, CONN_LOST_ACK);
	if (!np_held())
		np_output(ctx, &n->head, sizeof(*n));
}

SEC("raw_tp/tcp_retransmit_skb")
int note_retransmit(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];
	struct sk_buff *skb = (struct sk_buff *)ctx->args[1];
	struct inet_connection_sock *icsk = (struct inet_connection_sock *)sk;
	struct tcp_skb_cb *cb = (struct tcp_skb_cb *)skb->cb;
	__u32 dups = BPF_CORE_READ((struct tcp_sock *)sk, dsack_dups);
	__u64 key = (__u64)sk;
	struct conn_note n = {};
	__u32 numbers[2];

	note_begin(&n, sk, CONN_WHAT_RETRANSMIT);
	bpf_map_update_elem(&resent, &key, &dups, BPF_NOEXIST);
	n.fin = BPF_CORE_READ(cb, tcp_flags) & TCP_FIN;
	/* struct tcp_skb_cb begins with them. */
	bpf_probe_read_kernel(numbers, sizeof(numbers), &skb->cb);
	n.seq = numbers[0];
	n.end_seq = numbers[1];
	n.ca_state = BPF_CORE_READ_BITFIELD_PROBED(icsk, icsk_ca_state);
	n.jiffies = BPF_CORE_READ(icsk, icsk_rto);
	n.waited = bpf_jiffies64();
	note_again(ctx, &n);
	return 0;
}

SEC("raw_tp/tcp_retransmit_synack")
int note_retransmit_synack(struct bpf_raw_tracepoint_args *ctx)
{
	struct request_sock *req = (struct request_sock *)ctx->args[1];
	struct tcp_request_sock *tcp = (struct tcp_request_sock *)req;
	struct conn_note n = {};

	np_head_fill(&n.head, CONN_KIND_NOTE);
	n.what = CONN_WHAT_RETRANSMIT_SYNACK;
	/* It begins as a struct sock does. */
	read_ends(&n.ends, (struct sock *)req);
	n.ends.sport = BPF_CORE_READ(req, __req_common.skc_num);
	n.life.role = CONN_ROLE_ACCEPT;
	n.seq = BPF_CORE_READ(tcp, snt_isn);
	n.end_seq = n.seq + 1;
	note_again(ctx, &n);
	return 0;
}

/* tcp_undo_cwnd_reduction: the kernel has found out that nothing was lost. */
SEC("kprobe/tcp_undo_cwnd_reduction")
int BPF_KPROBE(note_undone, struct sock *sk)
{
	struct conn_note n = {};

	if (np_held())
		return 0;
	note_begin(&n, sk, CONN_WHAT_UNDONE);
	np_output(ctx, &n.head, sizeof(n));
	return 0;
}

/* tcp_ack(sk, skb, flag): an acknowledgement may have told that the peer has a segment twice (DSACK). */
SEC("fexit/tcp_ack")
int note_acked(__u64 *ctx)
{
	struct tcp_sock *tp = (void *)ctx[0];
	__u64 key = ctx[0];
	__u32 *known = bpf_map_lookup_elem(&resent, &key), more;
	struct conn_note n = {};

	if (!known)
		return 0;
	more = BPF_CORE_READ(tp, dsack_dups) - *known;
	if (!more)
		return 0;
	*known += more;
	if (np_held())
		return 0;
	note_begin(&n, (struct sock *)tp, CONN_WHAT_DUPLICATES);
	n.seq = more;
	np_output(ctx, &n.head, sizeof(n));
	return 0;
}

static __always_inline void keep_drop(__u32 seq, __u32 lost,
				      const struct conn_drop *drop)
{
	struct conn_number key = {.seq = seq, .lost = lost};

	bpf_map_update_elem(&drops, &key, drop, BPF_ANY);
}

SEC("raw_tp/kfree_skb")
int note_drop(struct bpf_raw_tracepoint_args *ctx)
{
	struct sk_buff *skb = (struct sk_buff *)ctx->args[0];
	const void *head = BPF_CORE_READ(skb, head);
	const void *end = BPF_CORE_READ(skb, data) + BPF_CORE_READ(skb, len);
	struct conn_drop drop = {};
	struct tcp_l3 l3 = {};
	__be32 words[4];
	__u32 flags;

	if (!read_l3(head + BPF_CORE_READ(skb, network_header),
		     BPF_CORE_READ(skb, protocol), &l3) ||
	    l3.proto != IPPROTO_TCP ||
	    bpf_probe_read_kernel(words, sizeof(words), l3.l4) < 0)
		return 0;
	drop.ts = bpf_ktime_get_ns();
	drop.at = ctx->args[1];
	drop.reason = has_drop_reason ? ctx->args[2] : 0;
	drop.netns = np_read_netns(NP_CAST(sk_buff, skb), NULL);
	flags = bpf_ntohl(words[3]) >> 16;
	if (flags & TCP_RST)
		return 0;
	/* The header's length is in words of four bytes. */
	if (flags & TCP_FIN_SYN || end > l3.l4 + (flags >> 12) * 4)
		keep_drop(bpf_ntohl(words[1]), CONN_LOST_ORIGINAL, &drop);
	if (flags & TCP_ACK)
		keep_drop(bpf_ntohl(words[2]), CONN_LOST_ACK, &drop);
	return 0;
}

/* The note of a RST, which may have no socket: `skb` is what it answers then, or NULL. */
static __always_inline bool reset_begin(struct conn_note *n, struct sock *sk,
					struct sk_buff *skb, __u8 what)
{
	struct np_tuple t = {};

	if (sk) {
		note_begin(n, sk, what);
		return true;
	}
	if (!skb)
		return false;
	np_head_fill(&n->head, CONN_KIND_NOTE);
	n->what = what;
	np_read_tuple(NP_CAST(sk_buff, skb), &t);
	/* It goes back. */
	__builtin_memcpy(n->ends.saddr, t.daddr, 16);
	__builtin_memcpy(n->ends.daddr, t.saddr, 16);
	n->ends.sport = t.dport;
	n->ends.dport = t.sport;
	n->ends.version = t.l3_version;
	n->ends.netns = np_read_netns(NP_CAST(sk_buff, skb), NULL);
	return true;
}

static __always_inline void note_reset(void *ctx, struct sock *sk,
				       struct sk_buff *skb, __u8 what,
				       __u32 reason)
{
	struct conn_note n = {};
	long stack;

	if (np_held() || !reset_begin(&n, sk, skb, what))
		return;
	n.reason = reason;
	stack = bpf_get_stackid(ctx, &stacks, 0);
	if (stack >= 0)
		n.stack = stack + 1;
	np_output(ctx, &n.head, sizeof(n));
}

/* These run before conn_rst_in and conn_rst_out, which forget a connection that has ended. */
SEC("raw_tp/tcp_receive_reset")
int note_rst_in(struct bpf_raw_tracepoint_args *ctx)
{
	note_reset(ctx, (struct sock *)ctx->args[0], NULL, CONN_WHAT_RST_IN, 0);
	return 0;
}

SEC("raw_tp/tcp_send_reset")
int note_rst_out(struct bpf_raw_tracepoint_args *ctx)
{
	note_reset(ctx, (struct sock *)ctx->args[0],
		   (struct sk_buff *)ctx->args[1], CONN_WHAT_RST_OUT,
		   has_reset_reason ? ctx->args[2] : 0);
	return 0;
}

static __always_inline void note_state(void *ctx, struct sock *sk, int from,
				       int to)
{
	struct conn_note n = {};

	/* Listeners are no connections. */
	if (from == TCP_LISTEN || to == TCP_LISTEN || np_held())
		return;
	note_begin(&n, sk, CONN_WHAT_STATE);
	n.from = from;
	n.to = to;
	np_output(ctx, &n.head, sizeof(n));
}

static __always_inline void note_window(void *ctx, struct sock *sk, __u8 what,
					__u64 since, __u32 seq)
{
	struct conn_note n = {};

	if (np_held())
		return;
	note_begin(&n, sk, what);
	n.seq = seq;
	if (since)
		n.waited = n.head.ts - since;
	np_output(ctx, &n.head, sizeof(n));
}

/* A segment has come: is the peer's window zero? */
SEC("raw_tp/tcp_probe")
int note_segment(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];
	struct sk_buff *skb = (struct sk_buff *)ctx->args[1];
	struct conn_windows *known, new = {};
	__u64 key = (__u64)sk, since;
	/* Of the TCP header, from its eighth byte on. */
	struct {
		__be32 ack;
		__be16 flags;
		__be16 window;
	} words;
	bool shut;

	bpf_probe_read_kernel(&words, sizeof(words),
			      BPF_CORE_READ(skb, head) +
				      BPF_CORE_READ(skb, transport_header) + 8);
	/* It has no window. */
	if (bpf_ntohs(words.flags) & TCP_RST)
		return 0;
	shut = !words.window;
	known = bpf_map_lookup_elem(&windows, &key);
	if (!known) {
		if (!shut)
			return 0;
		bpf_map_update_elem(&windows, &key, &new, BPF_ANY);
		known = bpf_map_lookup_elem(&windows, &key);
		if (!known)
			return 0;
	}
	if (shut && !known->peer) {
		known->peer = bpf_ktime_get_ns();
		note_window(ctx, sk, CONN_WHAT_PEER_SHUT, 0,
			    bpf_ntohl(words.ack));
	} else if (!shut && known->peer) {
		since = known->peer;
		known->peer = 0;
		note_window(ctx, sk, CONN_WHAT_PEER_OPEN, since, 0);
	}
	return 0;
}

/* A process reads: the first time while the window that we told is zero. */
SEC("raw_tp/tcp_rcv_space_adjust")
int note_read(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];
	struct inet_connection_sock *icsk = (struct inet_connection_sock *)sk;
	bool shut = !BPF_CORE_READ((struct tcp_sock *)sk, rcv_wnd);
	__u64 key = (__u64)sk;
	struct conn_windows *known = bpf_map_lookup_elem(&windows, &key);
	struct conn_windows new = {.read = 1};
	struct conn_note n = {};

	if (!shut) {
		if (known)
			known->read = 0;
		return 0;
	}
	if (known && known->read)
		return 0;
	if (known)
		known->read = 1;
	else
		bpf_map_update_elem(&windows, &key, &new, BPF_ANY);
	if (np_held())
		return 0;
	note_begin(&n, sk, CONN_WHAT_HERE_READ);
	n.seq = BPF_CORE_READ((struct tcp_sock *)sk, rcv_nxt);
	n.waited = bpf_jiffies64();
	n.jiffies = (__u32)n.waited - BPF_CORE_READ(icsk, icsk_ack.lrcvtime);
	np_output(ctx, &n.head, sizeof(n));
	return 0;
}

/* Both functions are called again and again; two CPUs at once may tell it twice. */
__u32 pressed = 0;

SEC("kprobe/tcp_enter_memory_pressure")
int BPF_KPROBE(note_pressure, struct sock *sk)
{
	if (pressed)
		return 0;
	pressed = 1;
	note_window(ctx, sk, CONN_WHAT_PRESSURE, 0, 0);
	return 0;
}

SEC("kprobe/tcp_leave_memory_pressure")
int BPF_KPROBE(note_relief, struct sock *sk)
{
	if (!pressed)
		return 0;
	pressed = 0;
	note_window(ctx, sk, CONN_WHAT_RELIEF, 0, 0);
	return 0;
}

#endif
