/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The sending side: requests of this machine's processes (raw and ping
 * sockets), and what becomes of them. Included by icmp.bpf.c, which has the
 * tracepoints that both sides need (receive, xmit).
 */
#ifndef NETPROBE_ICMP_SENT_BPF_H
#define NETPROBE_ICMP_SENT_BPF_H

#include "icmp/icmp_names.bpf.h"

/* The tracepoint kfree_skb says why (kernels from 5.17). */
const volatile __u8 has_reason = 0;

/* RTCF_BROADCAST, RTCF_MULTICAST, linux/in_route.h */
#define NP_RTCF_BROADCAST 0x10000000
#define NP_RTCF_MULTICAST 0x20000000

/* Threads in sendmsg on a raw or ping socket, since when; taken by a request. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, __u64);
} senders SEC(".maps");

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

/* A request begins its way. Gives its number. */
static __noinline __u64 ask(__u64 sock, __u32 netns, bool xmitted, bool wide)
{
	struct asked asked = {
		.sock = sock,
		.netns = netns,
		.tgid = bpf_get_current_pid_tgid() >> 32,
		.copies[0] = 1,
		.xmitted = xmitted,
		.wide = wide,
	};
	__u64 request = new_request();

	bpf_map_update_elem(&asking, &request, &asked, BPF_ANY);
	return request;
}

/* This packet is the request. */
static __noinline int ask_by(void *skb_ptr, const struct icmp_key *key,
			     __u64 request)
{
	struct seen s = {.request = request};

	s.key = *key;
	seen_put(skb_ptr, &s);
	return 0;
}

/* The request of the event is known from now on, by all that it goes by. */
static __always_inline void ask_out(struct icmp_event *e, void *skb_ptr,
				    __u64 sock, bool wide)
{
	bool xmitted = e->head.kind == ICMP_KIND_XMIT;

	e->request = ask(sock, e->key.netns, xmitted, wide);
	ask_by(skb_ptr, &e->key, e->request);
	name_wire(&e->key, e->request, sock, wide);
	name_socket(&e->key, e->request, sock);
}

/* Does this go to a group, or to all hosts? */
static __always_inline bool is_wide(const struct icmp_key *key, void *dst)
{
	__u8 first = ((const __u8 *)key->daddr)[0];

	if (key->version == 6)
		return first == 0xff;
	return dst && (BPF_CORE_READ((struct rtable *)dst, rt_flags) &
		       (NP_RTCF_BROADCAST | NP_RTCF_MULTICAST));
}

/* Is this request one of those that are shown? (np_filter_skb() beside it) */
static __always_inline bool sent_match(const struct icmp_key *key,
				       struct sk_buff *skb,
				       struct net_device *dev)
{
	if (want_cpu >= 0 && bpf_get_smp_processor_id() != want_cpu)
		return false;
	return match(np_config_get(), skb, key, dev);
}

/* A request that is shown, before netfilter. */
struct sending {
	struct icmp_key key;
	__u64 start;
	__u64 sock;
	__u64 skb;
	__u64 dev;
	__u64 wide;
};

/* The event of such a request: with it the stacks of sent() and of what it calls would be too large together. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct icmp_event);
} sent_events SEC(".maps");

static __noinline int send_request(void *ctx, const struct sending *s)
{
	__u32 zero = 0;
	struct icmp_event *e = bpf_map_lookup_elem(&sent_events, &zero);

	if (!e)
		return 0;
	__builtin_memset(e, 0, sizeof(*e));
	e->key = s->key;
	e->start = s->start;
	np_head_fill(&e->head, ICMP_KIND_SEND);
	read_dev(e, NP_CAST(net_device, s->dev));
	e->len = l3_len(NP_CAST(sk_buff, s->skb));
	ask_out(e, (void *)s->skb, s->sock, s->wide);
	np_output(ctx, &e->head, sizeof(*e));
	return 0;
}

/* A request with its headers, before netfilter: skb->protocol is not set. */
static __always_inline int sent(void *ctx, void *net_ptr, void *sk,
				void *skb_ptr, __u16 proto)
{
	struct sk_buff *skb = NP_CAST(sk_buff, skb_ptr);
	struct net *net = NP_CAST(net, net_ptr);
	const void *l3 = NP_READ(skb, head) + NP_READ(skb, network_header);
	struct dst_entry *dst;
	struct net_device *dev;
	struct sending s = {};
	int echo = read_echo(l3, proto, &s.key);
	__u64 ref;

	if (echo == ECHO_NONE)
		return 0;
	if (echo == ECHO_REPLY)
		return reply_begins(skb_ptr, &s.key);
	s.start = sender_take();
	if (!s.start) {
		/* Not of a socket, or once more (ipvlan). */
		follow(skb_ptr, &s.key, false, true);
		return 0;
	}
	s.key.netns = NP_READ(net, ns.inum);
	/* Bit 0 of the address says that no reference is held. */
	ref = NP_READ(skb, _skb_refdst) & ~1ULL;
	dst = NP_CAST(dst_entry, ref);
	dev = NP_READ(dst, dev);
	if (!sent_match(&s.key, skb, dev) || !np_filter_skb(skb_ptr)) {
		seen_forget(skb_ptr);
		return 0;
	}
	s.sock = (__u64)sk;
	s.skb = (__u64)skb_ptr;
	s.dev = (__u64)dev;
	s.wide = is_wide(&s.key, (void *)ref);
	return send_request(ctx, &s);
}

SEC("kprobe/__ip_local_out")
int BPF_KPROBE(sent_4, void *net, void *sk, void *skb)
{
	return sent(ctx, net, sk, skb, bpf_htons(ETH_P_IP));
}

SEC("kprobe/__ip6_local_out")
int BPF_KPROBE(sent_6, void *net, void *sk, void *skb)
{
	return sent(ctx, net, sk, skb, bpf_htons(ETH_P_IPV6));
}

/*
 * A request is handed to a driver: `e` has its key. Since when its sender has
 * been sending, where that made the IP header too (IP_HDRINCL), else 0: such a
 * request is not known yet (sent_own).
 */
static __always_inline __u64 sent_on(struct bpf_raw_tracepoint_args *ctx,
				     struct icmp_event *e,
				     struct net_device *dev)
{
	void *skb_ptr = (void *)ctx->args[0];
	struct sk_buff *skb = NP_CAST(sk_buff, skb_ptr);
	__u64 request = follow(skb_ptr, &e->key, false, false);
	struct asked *asked;

	if (np_ended())
		return 0;
	if (!request) {
		request = asked_on_wire(&e->key);
		/* In a new sk_buff: a fragment of it. */
		if (request)
			ask_by(skb_ptr, &e->key, request);
	}
	if (!request)
		return sender_take();
	asked = bpf_map_lookup_elem(&asking, &request);
	/* Until it comes in somewhere it is on its sender's side: its device, and those below. */
	if (!asked || asked->received)
		return 0;
	name_wire(&e->key, request, asked->sock, asked->wide);
	if (asked->netns != e->key.netns || asked->xmitted)
		return 0;
	asked->xmitted = 1;
	e->request = request;
	np_head_fill(&e->head, ICMP_KIND_XMIT);
	read_dev(e, dev);
	e->len = l3_len(skb);
	np_output(ctx, &e->head, sizeof(*e));
	return 0;
}

/* A request with its sender's IP header, which np_filter_skb() lets pass. */
static __noinline int sent_own(struct bpf_raw_tracepoint_args *ctx, __u64 start)
{
	void *skb_ptr = (void *)ctx->args[0];
	struct sk_buff *skb = NP_CAST(sk_buff, skb_ptr);
	struct net_device *dev = NP_CAST(net_device, ctx->args[1]);
	struct icmp_event e = {};

	if (read_sent(skb, &e.key) != ECHO_REQUEST ||
	    !sent_match(&e.key, skb, dev))
		return 0;
	e.start = start;
	np_head_fill(&e.head, ICMP_KIND_XMIT);
	read_dev(&e, dev);
	e.len = l3_len(skb);
	ask_out(&e, skb_ptr, (__u64)NP_READ(skb, sk), false);
	np_output(ctx, &e.head, sizeof(e));
	return 0;
}

/* As sent_on() */
static __noinline __u64 sent_echo(struct bpf_raw_tracepoint_args *ctx)
{
	struct icmp_event e = {};

	switch (read_sent(NP_CAST(sk_buff, ctx->args[0]), &e.key)) {
	case ECHO_REPLY:
		follow((void *)ctx->args[0], &e.key, true, false);
		return 0;
	case ECHO_REQUEST:
		return sent_on(ctx, &e, NP_CAST(net_device, ctx->args[1]));
	}
	return 0;
}

/* A packet is handed to a device's driver. */
SEC("raw_tp/net_dev_start_xmit")
int sent_xmit(struct bpf_raw_tracepoint_args *ctx)
{
	__u64 start;

	if (!may_echo_sent((void *)ctx->args[0]))
		return 0;
	/* Not from within: with the filter's own stack that would be too much. */
	start = sent_echo(ctx);
	if (start && np_filter_skb((void *)ctx->args[0]))
		sent_own(ctx, start);
	return 0;
}

/* A request comes in, somewhere in this kernel. Its sender may get a copy too, before it has left. */
static __noinline int request_received(void *skb_ptr,
				       const struct icmp_key *key)
{
	__u64 request = follow(skb_ptr, key, false, true);
	struct asked *asked;

	if (!request)
		return 0;
	asked = bpf_map_lookup_elem(&asking, &request);
	if (asked && asked->netns != key->netns)
		asked->received = 1;
	return 0;
}

/* A reply comes in: the number of the request that it answers. */
static __noinline __u64 reply_received(void *skb_ptr,
				       const struct icmp_key *key)
{
	__u64 request = follow(skb_ptr, key, true, true);

	if (request)
		return request;
	request = asked_on_wire(key);
	if (request)
		count_copy(request, true);
	return request;
}

/* Sends what is known of a reply that has come back. */
static __noinline int send_return(void *ctx, const struct seen *s)
{
	struct icmp_event e = {};

	e.request = s->request;
	e.key = s->key;
	e.times = s->times;
	np_head_fill(&e.head, ICMP_KIND_RETURN);
	np_output(ctx, &e.head, sizeof(e));
	return 0;
}

/* A reply is received: in its request's namespace, or on a device below. */
static __noinline int sent_return(void *ctx, const struct seen *s)
{
	__u64 request = s->request;
	struct asked *asked = bpf_map_lookup_elem(&asking, &request);

	if (!asked || asked->returned || np_ended())
		return 0;
	if (asked->netns != s->key.netns && asked_on_wire(&s->key) != request)
		return 0;
	asked->returned = 1;
	return send_return(ctx, s);
}

static __noinline int sent_queued(void *skb_ptr, __u8 backlog)
{
	struct seen s = {.reply = 1};

	if (read_received(NP_CAST(sk_buff, skb_ptr), &s.key) != ECHO_REPLY)
		return 0;
	s.request = follow(skb_ptr, &s.key, true, true);
	seen_queued(&s, backlog);
	seen_put(skb_ptr, &s);
	return 0;
}

SEC("raw_tp/netif_rx")
int sent_netif_rx(struct bpf_raw_tracepoint_args *ctx)
{
	if (may_echo_received((void *)ctx->args[0]))
		sent_queued((void *)ctx->args[0], 1);
	return 0;
}

/* At napi_gro_receive_entry too. */
SEC("raw_tp/netif_receive_skb_entry")
int sent_receive_entry(struct bpf_raw_tracepoint_args *ctx)
{
	if (may_echo_received((void *)ctx->args[0]))
		sent_queued((void *)ctx->args[0], 0);
	return 0;
}

static __noinline int sent_received(struct bpf_raw_tracepoint_args *ctx)
{
	void *skb_ptr = (void *)ctx->args[0];
	struct seen s = {.reply = 1};

	switch (read_received(NP_CAST(sk_buff, skb_ptr), &s.key)) {
	case ECHO_REQUEST:
		return request_received(skb_ptr, &s.key);
	case ECHO_REPLY:
		seen_received(&s, skb_ptr);
		s.request = reply_received(skb_ptr, &s.key);
		seen_put(skb_ptr, &s);
		return sent_return(ctx, &s);
	}
	return 0;
}

SEC("raw_tp/netif_receive_skb")
int sent_receive(struct bpf_raw_tracepoint_args *ctx)
{
	if (may_echo_received((void *)ctx->args[0]))
		sent_received(ctx);
	return 0;
}

static __noinline int send_delivered(void *ctx, const struct icmp_key *key,
				     __u64 request)
{
	struct icmp_event e = {};

	e.request = request;
	e.key = *key;
	np_head_fill(&e.head, ICMP_KIND_DELIVER);
	np_output(ctx, &e.head, sizeof(e));
	return 0;
}

static __noinline int delivered_echo(void *ctx, __u64 sock, void *skb_ptr)
{
	struct sk_buff *skb = NP_CAST(sk_buff, skb_ptr);
	struct seen s = {.reply = 1}, *before;
	struct asked *asked;
	__u64 at = (__u64)skb_ptr, request;

	if (read_sent(skb, &s.key) != ECHO_REPLY)
		return 0;
	before = seen_at(at, &s.key, true);
	if (!before)
		before = seen_at((__u64)NP_READ(skb, head), &s.key, true);
	if (before)
		s.times = before->times;
	/* Every raw socket gets a copy: only its sender's own counts. */
	request = asked_by(sock, &s.key);
	asked = bpf_map_lookup_elem(&asking, &request);
	if (asked) {
		s.request = request;
		s.delivered = 1;
	}
	bpf_map_update_elem(&seen, &at, &s, BPF_ANY);
	if (!asked || asked->delivered || np_ended())
		return 0;
	asked->delivered = 1;
	if (!asked->returned) {
		asked->returned = 1;
		send_return(ctx, &s);
	}
	return send_delivered(ctx, &s.key, request);
}

/* The reply is about to be put into a socket's queue (of each raw socket in turn). */
SEC("kprobe/sk_filter_trim_cap")
int BPF_KPROBE(delivered, void *sk, void *skb_ptr)
{
	if (may_echo_sent(skb_ptr))
		delivered_echo(ctx, (__u64)sk, skb_ptr);
	return 0;
}

static __noinline int read_by_socket(struct bpf_raw_tracepoint_args *ctx)
{
	struct sk_buff *skb = NP_CAST(sk_buff, ctx->args[0]);
	struct icmp_event e = {};
	__u64 at = ctx->args[0];
	struct asked *asked;
	struct seen *s;

	if (read_sent(skb, &e.key) != ECHO_REPLY)
		return 0;
	s = seen_at(at, &e.key, true);
	if (!s || !s->delivered)
		return 0;
	e.request = s->request;
	asked = bpf_map_lookup_elem(&asking, &e.request);
	if (!asked || np_ended())
		return 0;
	np_head_fill(&e.head, ICMP_KIND_READ);
	np_output(ctx, &e.head, sizeof(e));
	bpf_map_delete_elem(&asking, &e.request);
	bpf_map_delete_elem(&seen, &at);
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

/*
 * A packet is copied with its data (nft dup), and both go on. What becomes of the
 * copy is known by its addresses and number alone (asked_on_wire).
 */
SEC("kprobe/__pskb_copy_fclone")
int copied(struct pt_regs *ctx)
{
	void *skb_ptr = (void *)PT_REGS_PARM1(ctx);
	struct icmp_key key = {};
	__u64 request;
	int echo;

	if (!may_echo_sent(skb_ptr))
		return 0;
	echo = read_sent(NP_CAST(sk_buff, skb_ptr), &key);
	if (echo == ECHO_NONE)
		return 0;
	request = follow(skb_ptr, &key, echo == ECHO_REPLY, false);
	if (request)
		count_copy(request, echo == ECHO_REPLY);
	return 0;
}

/* Which request a packet that is dropped is of, and ICMP_DROP_UNQUEUED. */
static __noinline __u64 dropped_of(void *skb_ptr, const struct icmp_key *key,
				   bool reply, __u8 *drop)
{
	struct sk_buff *skb = NP_CAST(sk_buff, skb_ptr);
	__u64 at = (__u64)skb_ptr;
	struct seen *s = seen_at(at, key, reply);
	__u64 request = follow(skb_ptr, key, reply, false);

	if (s && s->delivered && !NP_READ(skb, sk))
		*drop |= ICMP_DROP_UNQUEUED;
	if (!s && !request)
		request = asked_on_wire(key);
	bpf_map_delete_elem(&seen, &at);
	return request;
}

static __noinline int dropped_echo(struct bpf_raw_tracepoint_args *ctx)
{
	void *skb_ptr = (void *)ctx->args[0];
	struct icmp_event e = {};
	struct asked *asked;
	int echo = read_sent(NP_CAST(sk_buff, skb_ptr), &e.key);

	if (echo == ECHO_NONE)
		return 0;
	e.reply = echo == ECHO_REPLY;
	e.request = dropped_of(skb_ptr, &e.key, e.reply, &e.drop);
	asked = bpf_map_lookup_elem(&asking, &e.request);
	if (!asked || np_ended())
		return 0;
	__sync_fetch_and_add(&asked->drops[e.reply & 1], 1);
	if (asked->copies[e.reply & 1] > asked->drops[e.reply & 1])
		e.drop |= ICMP_DROP_COPY;
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
