/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * netprobe record --flight: programs at what may trigger a file. Each sends a
 * short event; user space decides. Needs skb_event.bpf.h before it.
 */
#ifndef NETPROBE_SKB_FLIGHT_BPF_H
#define NETPROBE_SKB_FLIGHT_BPF_H

/* include/net/tcp_states.h */
#define TCP_ESTABLISHED_STATE 1
#define TCP_SYN_SENT_STATE 2
#define TCP_FLAG_BIT_SYN 0x02
#define TCP_FLAG_BIT_RST 0x04
#define TCP_FLAG_BIT_ACK 0x10

/* Drop reasons that trigger; with none of them, each drop does. */
const volatile __u32 trigger_reasons[SKB_TRIGGER_REASONS] = {};
const volatile __u32 trigger_reason_count = 0;

struct skb_trigger skb_trigger_type;
enum skb_trigger_what skb_trigger_what_type;

/* On the stack: tracepoints interrupt others' programs while these write their events. */
static __always_inline void trigger_begin(struct skb_trigger *t, __u32 what)
{
	__builtin_memset(t, 0, sizeof(*t));
	np_head_fill(&t->head, SKB_KIND_TRIGGER);
	t->what = what;
}

/* The tuple of a packet that the socket sends, or gets with `to_us`. */
static __always_inline bool trigger_tuple(struct sock *sk, struct np_tuple *t,
					  bool to_us)
{
	__u16 port = BPF_CORE_READ(sk, __sk_common.skc_num);
	__u16 peer = bpf_ntohs(BPF_CORE_READ(sk, __sk_common.skc_dport));

	if (!who_addresses(sk, to_us ? t->daddr : t->saddr,
			   to_us ? t->saddr : t->daddr))
		return false;
	t->l3_version = 6;
	if (!t->daddr[0] && (__u32)t->daddr[1] == bpf_htonl(0xffff))
		t->l3_version = 4;
	t->l4_proto = IPPROTO_TCP;
	t->sport = to_us ? peer : port;
	t->dport = to_us ? port : peer;
	return true;
}

/* The field filters, as far as a socket's packet can be asked: not the interface. */
static __always_inline bool trigger_passes(const struct np_config *cfg,
					   const struct skb_trigger *t,
					   __u32 mark)
{
	__u32 f = cfg->fields;

	if (f & (NP_PAUSED | NP_FIELD_IFINDEX))
		return false;
	if ((f & NP_FIELD_NETNS) && t->netns != cfg->netns)
		return false;
	if ((f & NP_FIELD_MARK) && (mark & cfg->mark_mask) != cfg->mark)
		return false;
	return !(f & NP_FIELDS_PACKET) || match_tuple(cfg, &t->tuple);
}

/* Something of a socket. */
static __always_inline void trigger_of_sock(void *ctx, struct sock *sk,
					    __u32 what, __u32 value,
					    __u8 tcp_flags, bool to_us)
{
	const struct np_config *cfg = np_config_get();
	struct skb_trigger t;

	trigger_begin(&t, what);
	if (!sk || !trigger_tuple(sk, &t.tuple, to_us))
		return;
	t.sk = (__u64)sk;
	t.value = value;
	t.tuple.tcp_flags = tcp_flags;
	t.netns = BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum);
	if (!trigger_passes(cfg, &t, BPF_CORE_READ(sk, sk_mark)))
		return;
	if (who_on && !who_owns((__u64)sk))
		return;
	np_output(ctx, &t.head, sizeof(t));
}

static __always_inline bool trigger_reason(__u32 reason)
{
	if (!trigger_reason_count)
		return true;
	for (__u32 i = 0; i < SKB_TRIGGER_REASONS; i++)
		if (i < trigger_reason_count && trigger_reasons[i] == reason)
			return true;
	return false;
}

/* tcp_retransmit_skb(sk, skb): `value` is the first byte that the other end has not acknowledged. */
SEC("raw_tp/tcp_retransmit_skb")
int flight_retransmit(struct bpf_raw_tracepoint_args *ctx)
{
	struct tcp_sock *tp = (void *)ctx->args[0];
	struct sock *sk = (void *)ctx->args[0];
	__u8 state = BPF_CORE_READ(sk, __sk_common.skc_state);

	trigger_of_sock(ctx, sk, SKB_TRIGGER_RETRANSMIT,
			BPF_CORE_READ(tp, snd_una),
			state == TCP_SYN_SENT_STATE ? TCP_FLAG_BIT_SYN
						    : TCP_FLAG_BIT_ACK,
			false);
	return 0;
}

/* tcp_receive_reset(sk) */
SEC("raw_tp/tcp_receive_reset")
int flight_reset_comes(struct bpf_raw_tracepoint_args *ctx)
{
	trigger_of_sock(ctx, (void *)ctx->args[0], SKB_TRIGGER_RST_RECEIVED, 0,
			TCP_FLAG_BIT_RST, true);
	return 0;
}

/* tcp_send_active_reset(sk, ...) */
SEC("kprobe/flight_resets")
int flight_resets(struct pt_regs *ctx)
{
	trigger_of_sock(ctx, (void *)PT_REGS_PARM1(ctx), SKB_TRIGGER_RST_SENT,
			0, TCP_FLAG_BIT_RST, false);
	return 0;
}

/*
 * tcp_v4_send_reset(sk, skb, ...) answers a packet, mostly one without a
 * socket; the tracepoint tcp_send_reset leaves those out before 6.10. A reset is
 * not answered.
 */
SEC("kprobe/flight_answers")
int flight_answers(struct pt_regs *ctx)
{
	const struct np_config *cfg = np_config_get();
	struct sk_buff *skb = NP_CAST(sk_buff, PT_REGS_PARM2(ctx));
	struct np_tuple got = {};
	struct skb_trigger t;

	np_read_tuple(skb, &got);
	if (!got.l3_version || (got.tcp_flags & TCP_FLAG_BIT_RST))
		return 0;
	trigger_begin(&t, SKB_TRIGGER_RST_SENT);
	t.tuple = got;
	__builtin_memcpy(t.tuple.saddr, got.daddr, sizeof(got.daddr));
	__builtin_memcpy(t.tuple.daddr, got.saddr, sizeof(got.saddr));
	t.tuple.sport = got.dport;
	t.tuple.dport = got.sport;
	t.tuple.tcp_flags = TCP_FLAG_BIT_RST;
	t.netns = np_read_netns(skb, NULL);
	if (!trigger_passes(cfg, &t, NP_READ(skb, mark)))
		return 0;
	if (who_on && !who_matches((__u64)skb, 0))
		return 0;
	np_output(ctx, &t.head, sizeof(t));
	return 0;
}

/* tcp_connect(sk): addresses and ports are chosen, the SYN is not sent yet. */
SEC("kprobe/flight_connects")
int flight_connects(struct pt_regs *ctx)
{
	trigger_of_sock(ctx, (void *)PT_REGS_PARM1(ctx),
			SKB_TRIGGER_CONNECT_BEGIN, 0, TCP_FLAG_BIT_SYN, false);
	return 0;
}

/* inet_sock_set_state(sk, old, new): a connect ends. */
SEC("raw_tp/inet_sock_set_state")
int flight_connected(struct bpf_raw_tracepoint_args *ctx)
{
	if (ctx->args[1] == TCP_SYN_SENT_STATE)
		trigger_of_sock(ctx, (void *)ctx->args[0],
				SKB_TRIGGER_CONNECT_END,
				ctx->args[2] == TCP_ESTABLISHED_STATE,
				TCP_FLAG_BIT_SYN, false);
	return 0;
}

/* kfree_skb(skb, location, reason): see skb_dropped. */
SEC("raw_tp/kfree_skb")
int flight_drops(struct bpf_raw_tracepoint_args *ctx)
{
	const struct np_config *cfg = np_config_get();
	__u32 reason = has_reasons ? (__u32)ctx->args[2] : 0;
	__u64 addr = ctx->args[0];
	struct sk_buff *skb = NP_CAST(sk_buff, addr);
	struct skb_trigger t;

	if ((cfg->fields & NP_PAUSED) || !trigger_reason(reason) ||
	    !passes_gates(cfg, (void *)addr, NULL) ||
	    (who_on && !who_matches(addr, 0)))
		return 0;
	trigger_begin(&t, SKB_TRIGGER_DROP);
	np_read_tuple(skb, &t.tuple);
	if ((cfg->fields & NP_FIELDS_PACKET) && !match_tuple(cfg, &t.tuple))
		return 0;
	t.value = reason;
	t.netns = np_read_netns(skb, NULL);
	np_output(ctx, &t.head, sizeof(t));
	return 0;
}

#endif
