/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The sending side: requests of this machine's processes (raw and ping
 * sockets), and what becomes of them. Included by icmp.bpf.c, which has the
 * tracepoints that both sides need (receive, xmit).
 */
#ifndef NETPROBE_ICMP_SENT_BPF_H
#define NETPROBE_ICMP_SENT_BPF_H

/* Look at the sending side, and not at the answering one. */
const volatile __u8 with_sent = 0;
/* The tracepoint kfree_skb says why (kernels from 5.17). */
const volatile __u8 has_reason = 0;

/* Threads in sendmsg on a raw or ping socket, since when; taken by a request. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, __u64);
} senders SEC(".maps");

/* A request on its way, until its sender reads the reply. */
struct asked {
	__u32 netns;
	__u32 tgid;
	__u8 xmitted;
	__u8 returned;
	__u8 delivered;
	__u8 pad;
};

/* By key, its netns 0: a drop in another namespace of this kernel counts. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct icmp_key);
	__type(value, struct asked);
} asking SEC(".maps");

/* The request that this packet belongs to. Sets key->netns to 0. */
static __always_inline struct asked *asked_find(struct icmp_key *key)
{
	key->netns = 0;
	return bpf_map_lookup_elem(&asking, key);
}

static __always_inline int sender(void)
{
	__u64 id = bpf_get_current_pid_tgid();
	__u64 now = bpf_ktime_get_ns();

	bpf_map_update_elem(&senders, &id, &now, BPF_ANY);
	return 0;
}

SEC("kprobe/raw_sendmsg")
int raw_sendmsg_4(struct pt_regs *ctx)
{
	return sender();
}

SEC("kprobe/rawv6_sendmsg")
int raw_sendmsg_6(struct pt_regs *ctx)
{
	return sender();
}

SEC("kprobe/ping_v4_sendmsg")
int ping_sendmsg_4(struct pt_regs *ctx)
{
	return sender();
}

SEC("kprobe/ping_v6_sendmsg")
int ping_sendmsg_6(struct pt_regs *ctx)
{
	return sender();
}

/* Since when this thread has been sending; 0 where it is not. */
static __always_inline __u64 sender_take(void)
{
	__u64 id = bpf_get_current_pid_tgid();
	__u64 *since = bpf_map_lookup_elem(&senders, &id);
	__u64 start = since ? *since : 0;

	if (start)
		bpf_map_delete_elem(&senders, &id);
	return start;
}

static __always_inline void ask(const struct icmp_event *e, __u8 xmitted)
{
	struct icmp_key key = e->key;
	struct asked value = {
		.netns = e->key.netns,
		.tgid = e->head.tgid,
		.xmitted = xmitted,
	};
	struct np_stats *count = np_stats_get();

	key.netns = 0;
	bpf_map_update_elem(&asking, &key, &value, BPF_ANY);
	if (count)
		count->hits++;
}

/* Is this request one of those that are shown? (np_filter_skb() beside it) */
static __always_inline bool sent_match(const struct icmp_event *e,
				       struct sk_buff *skb,
				       struct net_device *dev)
{
	if (want_cpu >= 0 && bpf_get_smp_processor_id() != want_cpu)
		return false;
	return match(np_config_get(), skb, &e->key, dev);
}

/* A request with its headers, before netfilter: skb->protocol is not set. */
static __always_inline int sent(void *ctx, void *net_ptr, void *skb_ptr,
				__u16 proto)
{
	struct sk_buff *skb = NP_CAST(sk_buff, skb_ptr);
	struct net *net = NP_CAST(net, net_ptr);
	const void *l3 = NP_READ(skb, head) + NP_READ(skb, network_header);
	struct dst_entry *dst;
	struct net_device *dev;
	struct icmp_event e = {};

	if (read_echo(l3, proto, &e.key) != ECHO_REQUEST)
		return 0;
	e.start = sender_take();
	if (!e.start)
		return 0;
	e.key.netns = NP_READ(net, ns.inum);
	/* Bit 0 of the address says that no reference is held. */
	dst = NP_CAST(dst_entry, NP_READ(skb, _skb_refdst) & ~1ULL);
	dev = NP_READ(dst, dev);
	if (!sent_match(&e, skb, dev) || !np_filter_skb(skb_ptr))
		return 0;
	np_head_fill(&e.head, ICMP_KIND_SEND);
	read_dev(&e, dev);
	e.len = l3_len(skb);
	ask(&e, 0);
	np_output(ctx, &e.head, sizeof(e));
	return 0;
}

SEC("kprobe/__ip_local_out")
int BPF_KPROBE(sent_4, void *net, void *sk, void *skb)
{
	return sent(ctx, net, skb, bpf_htons(ETH_P_IP));
}

SEC("kprobe/__ip6_local_out")
int BPF_KPROBE(sent_6, void *net, void *sk, void *skb)
{
	return sent(ctx, net, skb, bpf_htons(ETH_P_IPV6));
}

/*
 * A request is handed to a driver: `e` has its key. Since when its sender has
 * been sending, where that made the IP header too (IP_HDRINCL), else 0: such a
 * request is not known yet (sent_own).
 */
static __always_inline __u64 sent_xmit(void *ctx, struct icmp_event *e,
				       struct sk_buff *skb,
				       struct net_device *dev)
{
	__u32 netns = e->key.netns;
	struct asked *asked = asked_find(&e->key);

	if (paused())
		return 0;
	if (!asked)
		return sender_take();
	/* The first device of its own namespace. */
	if (asked->netns != netns || asked->xmitted)
		return 0;
	asked->xmitted = 1;
	e->key.netns = netns;
	np_head_fill(&e->head, ICMP_KIND_XMIT);
	read_dev(e, dev);
	e->len = l3_len(skb);
	np_output(ctx, &e->head, sizeof(*e));
	return 0;
}

/* A request with its sender's IP header, which np_filter_skb() lets pass. */
static __noinline int sent_own(struct bpf_raw_tracepoint_args *ctx, __u64 start)
{
	struct sk_buff *skb = NP_CAST(sk_buff, ctx->args[0]);
	struct net_device *dev = NP_CAST(net_device, ctx->args[1]);
	struct icmp_event e = {};

	if (read_sent(skb, &e.key) != ECHO_REQUEST || !sent_match(&e, skb, dev))
		return 0;
	e.start = start;
	np_head_fill(&e.head, ICMP_KIND_XMIT);
	read_dev(&e, dev);
	e.len = l3_len(skb);
	ask(&e, 1);
	np_output(ctx, &e.head, sizeof(e));
	return 0;
}

/* A reply is received: `key` is that of its request. */
static __always_inline void sent_return(void *ctx, struct icmp_key *key,
					const struct icmp_times *times)
{
	__u32 netns = key->netns;
	struct asked *asked = asked_find(key);
	struct icmp_event e = {};

	if (!asked || asked->netns != netns || asked->returned || paused())
		return;
	asked->returned = 1;
	e.key = *key;
	e.key.netns = netns;
	e.times = *times;
	np_head_fill(&e.head, ICMP_KIND_RETURN);
	np_output(ctx, &e.head, sizeof(e));
}

static __noinline int delivered_echo(void *ctx, void *skb_ptr)
{
	struct sk_buff *skb = NP_CAST(sk_buff, skb_ptr);
	struct icmp_event e = {};
	struct asked *asked;
	__u32 netns;

	if (read_sent(skb, &e.key) != ECHO_REPLY)
		return 0;
	netns = e.key.netns;
	asked = asked_find(&e.key);
	if (!asked || asked->netns != netns || !asked->returned ||
	    asked->delivered || paused())
		return 0;
	asked->delivered = 1;
	e.key.netns = netns;
	np_head_fill(&e.head, ICMP_KIND_DELIVER);
	np_output(ctx, &e.head, sizeof(e));
	return 0;
}

/* The reply is put into a socket's queue (of each raw socket in turn). */
SEC("kprobe/sk_filter_trim_cap")
int BPF_KPROBE(delivered, void *sk, void *skb_ptr)
{
	if (may_echo_sent(skb_ptr))
		delivered_echo(ctx, skb_ptr);
	return 0;
}

static __noinline int read_by_socket(struct bpf_raw_tracepoint_args *ctx)
{
	struct sk_buff *skb = NP_CAST(sk_buff, ctx->args[0]);
	struct icmp_event e = {};
	struct asked *asked;

	if (read_sent(skb, &e.key) != ECHO_REPLY)
		return 0;
	asked = asked_find(&e.key);
	if (!asked)
		return 0;
	np_head_fill(&e.head, ICMP_KIND_READ);
	/* Every raw socket gets the reply: only its sender's own counts. */
	if (asked->tgid != e.head.tgid || !asked->returned || paused())
		return 0;
	e.key.netns = asked->netns;
	np_output(ctx, &e.head, sizeof(e));
	e.key.netns = 0;
	bpf_map_delete_elem(&asking, &e.key);
	return 0;
}

/* A process reads a packet from a socket. */
SEC("raw_tp/skb_copy_datagram_iovec")
int read(struct bpf_raw_tracepoint_args *ctx)
{
	if (may_echo_sent((void *)ctx->args[0]))
		read_by_socket(ctx);
	return 0;
}

static __noinline int dropped_echo(struct bpf_raw_tracepoint_args *ctx)
{
	struct sk_buff *skb = NP_CAST(sk_buff, ctx->args[0]);
	struct icmp_event e = {};
	struct asked *asked;
	int echo = read_sent(skb, &e.key);

	if (echo == ECHO_NONE)
		return 0;
	asked = asked_find(&e.key);
	if (!asked || paused())
		return 0;
	e.key.netns = asked->netns;
	e.reply = echo == ECHO_REPLY;
	e.location = ctx->args[1];
	if (has_reason)
		e.reason = (__u32)ctx->args[2];
	np_head_fill(&e.head, ICMP_KIND_DROP);
	np_output(ctx, &e.head, sizeof(e));
	return 0;
}

SEC("raw_tp/kfree_skb")
int dropped(struct bpf_raw_tracepoint_args *ctx)
{
	if (may_echo_sent((void *)ctx->args[0]))
		dropped_echo(ctx);
	return 0;
}

#endif
