/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * netprobe why: what decides beside the packet (socket, route), and the ICMP errors
 * that this kernel sends for a packet.
 *
 * Needs skb_track.bpf.h, skb_owner.bpf.h and packet.bpf.h before it.
 */
#ifndef NETPROBE_SKB_WHY_BPF_H
#define NETPROBE_SKB_WHY_BPF_H

#include "common/outer.h"
#include "skb/skb.h"

struct skb_facts skb_facts_type;
enum skb_fact skb_fact_type;

/* The socket: what it holds, and how much it may. */
static __always_inline void facts_of_sock(struct sock *sk, struct skb_facts *f)
{
	sk = who_full(sk);
	if (!sk) {
		f->known |= SKB_FACT_TIME_WAIT;
		return;
	}
	f->known |= SKB_FACT_SOCK;
	f->rmem = BPF_CORE_READ(sk, sk_backlog.rmem_alloc.counter);
	f->rcvbuf = BPF_CORE_READ(sk, sk_rcvbuf);
	f->backlog = BPF_CORE_READ(sk, sk_ack_backlog);
	f->limit = BPF_CORE_READ(sk, sk_max_ack_backlog);
	f->state = BPF_CORE_READ(sk, __sk_common.skc_state);
	if (BPF_CORE_READ(sk, sk_filter))
		f->known |= SKB_FACT_FILTER;
}

/* The frame's destination, beside the device's address. */
static __always_inline __u8 facts_of_mac(struct sk_buff *skb,
					 struct net_device *dev)
{
	__u16 offset = NP_READ(skb, mac_header);
	__u64 frame = 0, own = 0;

	if (offset == NP_NO_HEADER ||
	    !BPF_CORE_READ_BITFIELD_PROBED(skb, pkt_type) ||
	    BPF_CORE_READ(dev, type) != NP_ARPHRD_ETHER)
		return 0;
	bpf_probe_read_kernel(&frame, 6, NP_READ(skb, head) + offset);
	bpf_probe_read_kernel(&own, 6, BPF_CORE_READ(dev, dev_addr));
	/* The lowest bit of the first byte: a group's address. */
	return frame == own || (((__u8 *)&frame)[0] & 1) ? SKB_FACT_OWN_MAC
							 : SKB_FACT_OTHER_MAC;
}

static __always_inline __u8 facts_of_dev(struct sk_buff *skb,
					 struct net_device *dev)
{
	struct inet6_dev *v6;
	__u8 known;

	if (!np_is_pointer(dev))
		return 0;
	known = facts_of_mac(skb, dev);
	if (NP_READ(dev, promiscuity))
		known |= SKB_FACT_PROMISCUOUS;
	if (NP_READ(skb, protocol) != bpf_htons(NP_TYPE_IPV6))
		return known;
	v6 = BPF_CORE_READ(dev, ip6_ptr);
	if (!v6 || BPF_CORE_READ(v6, cnf.disable_ipv6))
		known |= SKB_FACT_IPV6_OFF;
	return known;
}

/* The route, where the packet has one. */
static __always_inline void facts_of_route(struct sk_buff *skb,
					   struct skb_facts *f)
{
	struct dst_entry *dst =
		(void *)(BPF_CORE_READ(skb, _skb_refdst) & ~1UL);
	struct rt6_info *rt6 = (void *)dst;
	struct rtable *rt = (void *)dst;
	struct net_device *dev;

	if (!np_is_pointer(dst))
		return;
	dev = BPF_CORE_READ(dst, dev);
	f->family = BPF_CORE_READ(dst, ops, family);
	if (!np_is_pointer(dev) ||
	    (f->family != NP_AF_INET && f->family != NP_AF_INET6))
		return;
	f->known |= SKB_FACT_ROUTE;
	f->error = BPF_CORE_READ(dst, error);
	f->ifindex = BPF_CORE_READ(dev, ifindex);
	f->mtu = BPF_CORE_READ(dev, mtu);
	bpf_probe_read_kernel(f->ifname, sizeof(f->ifname), dev->name);
	if (f->family == NP_AF_INET6) {
		f->gateway_family = NP_AF_INET6;
		bpf_probe_read_kernel(f->gateway, sizeof(f->gateway),
				      &rt6->rt6i_gateway);
		return;
	}
	f->type = BPF_CORE_READ(rt, rt_type);
	f->gateway_family = BPF_CORE_READ(rt, rt_gw_family);
	bpf_probe_read_kernel(f->gateway, sizeof(f->gateway), &rt->rt_gw6);
}

/* A function of its own, for its stack. `to`: the function's own socket, or 0. */
static __noinline __attribute__((unused)) int
read_facts(__u64 skb_ptr, __u64 to, struct skb_facts *f)
{
	struct sk_buff *skb = NP_CAST(sk_buff, skb_ptr);
	__u64 sk = to ? to : (__u64)BPF_CORE_READ(skb, sk);
	struct net_device *dev =
		read_dev(skb, to ? NP_CAST(sock, to) : NULL, use_cast);

	if (!f)
		return 0;
	__builtin_memset(f, 0, sizeof(*f));
	f->known = facts_of_dev(skb, dev);
	if (sk)
		facts_of_sock((struct sock *)sk, f);
	facts_of_route(skb, f);
	f->pkt_type = BPF_CORE_READ_BITFIELD_PROBED(skb, pkt_type);
	f->ip_summed = BPF_CORE_READ_BITFIELD_PROBED(skb, ip_summed);
	return 0;
}

/* An ICMP error that is being made for a packet, by the stack that it is made on. */
struct why_error {
	__u64 skb;
	__u64 packet;
	__u32 type;
	__u32 code;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, __u64);
	__type(value, struct why_error);
} why_errors SEC(".maps");

/* __icmp_send(skb, type, code, ...), icmp6_send(skb, type, code, ...) */
SEC("kprobe/why_icmp")
int why_icmp(struct pt_regs *ctx)
{
	struct sk_buff *skb = NP_CAST(sk_buff, PT_REGS_PARM1(ctx));
	__u64 key = track_context(regs_address(ctx));
	struct why_error error = {
		.skb = PT_REGS_PARM1(ctx),
		.packet = track_find(skb),
		.type = (__u32)PT_REGS_PARM2(ctx),
		.code = (__u32)PT_REGS_PARM3(ctx),
	};

	if (error.packet)
		bpf_map_update_elem(&why_errors, &key, &error, BPF_ANY);
	return 0;
}

/* icmp_push_reply, icmpv6_push_pending_frames: no limit of its rate keeps the error back. */
SEC("kprobe/why_pushed")
int why_pushed(struct pt_regs *ctx)
{
	__u64 key = track_context(regs_address(ctx));
	struct why_error *error = bpf_map_lookup_elem(&why_errors, &key);
	const struct np_config *cfg = np_config_get();

	if (error && !(cfg->fields & NP_PAUSED))
		write_short(ctx, SKB_KIND_ICMP, 0, error->skb, error->packet,
			    (error->type & 0xff) << 8 | (error->code & 0xff));
	return 0;
}

/* The end of why_icmp's functions */
SEC("kprobe/why_icmp_end")
int why_icmp_end(struct pt_regs *ctx)
{
	__u64 key = track_context(regs_address(ctx));

	bpf_map_delete_elem(&why_errors, &key);
	return 0;
}

/* A process's question for a route, by the stack that it is asked on. */
struct why_flow_call {
	__u64 net;
	__u64 flow;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, __u64);
	__type(value, struct why_flow_call);
} why_flows SEC(".maps");

/*
 * The process that runs asks in its own namespace. While it sends, this CPU may
 * handle a packet that has arrived in another one, whose errors need routes, too.
 */
static __always_inline bool why_is_own(__u64 net)
{
	struct task_struct *task = (void *)bpf_get_current_task();

	return (__u64)BPF_CORE_READ(task, nsproxy, net_ns) == net;
}

/* ip_route_output_key_hash_rcu(net, flow, ...), asked by a process whose packets are followed */
SEC("kprobe/why_route")
int why_route(struct pt_regs *ctx)
{
	__u64 key = track_context(regs_address(ctx));
	struct why_flow_call call = {
		.net = PT_REGS_PARM1(ctx),
		.flow = PT_REGS_PARM2(ctx),
	};

	if (who_current() && why_is_own(call.net))
		bpf_map_update_elem(&why_flows, &key, &call, BPF_ANY);
	return 0;
}

struct why_no_route {
	struct skb_event event;
	struct skb_meta meta;
	struct np_tuple tuple;
};

static __always_inline __u64 why_mapped(__be32 address)
{
	__u64 word = 0;

	/* ::ffff:a.b.c.d, its second half in memory order */
	((__u32 *)&word)[0] = bpf_htonl(0xffff);
	((__u32 *)&word)[1] = address;
	return word;
}

static __always_inline void why_read_flow(const struct why_flow_call *call,
					  struct why_no_route *e)
{
	const struct flowi4 *flow = (void *)call->flow;
	struct net *net = (void *)call->net;

	e->meta.netns = BPF_CORE_READ(net, ns.inum);
	e->tuple.l3_version = 4;
	e->tuple.l4_proto = BPF_CORE_READ(flow, __fl_common.flowic_proto);
	e->tuple.saddr[1] = why_mapped(BPF_CORE_READ(flow, saddr));
	e->tuple.daddr[1] = why_mapped(BPF_CORE_READ(flow, daddr));
	if (e->tuple.l4_proto != IPPROTO_TCP &&
	    e->tuple.l4_proto != IPPROTO_UDP)
		return;
	e->tuple.sport = bpf_ntohs(BPF_CORE_READ(flow, uli.ports.sport));
	e->tuple.dport = bpf_ntohs(BPF_CORE_READ(flow, uli.ports.dport));
}

/* It ends with an error in place of a route. */
SEC("kprobe/why_route_end")
int why_route_end(struct pt_regs *ctx)
{
	__u64 key = track_context(regs_address(ctx));
	struct why_flow_call *call = bpf_map_lookup_elem(&why_flows, &key);
	const struct np_config *cfg = np_config_get();
	__s64 error = (__s64)PT_REGS_RC(ctx);
	struct why_no_route e = {};

	if (!call)
		return 0;
	if (error < 0 && error >= -4095 && !(cfg->fields & NP_PAUSED)) {
		np_head_fill(&e.event.head, SKB_KIND_NO_ROUTE);
		e.event.reason = (__u32)-error;
		e.event.sections = SKB_SECTION_META | SKB_SECTION_TUPLE;
		why_read_flow(call, &e);
		np_output(ctx, &e.event.head, sizeof(e));
	}
	bpf_map_delete_elem(&why_flows, &key);
	return 0;
}

#endif
