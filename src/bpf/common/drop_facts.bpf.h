/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Facts of a dropped packet that tell a loss from a normal free, and the program
 * that notes segments for connections in TIME-WAIT.
 *
 * Needs packet.bpf.h and compat.bpf.h before it.
 */
#ifndef NETPROBE_DROP_FACTS_BPF_H
#define NETPROBE_DROP_FACTS_BPF_H

#include "common/drop_facts.h"

enum drop_fact drop_fact_type;

/*
 * The segment that this CPU handled last for a connection in TIME-WAIT. A filter
 * may keep us from its free: the address alone could be another segment's by then.
 */
struct np_segment {
	__u64 skb;
	__u64 head;
	__u32 seq;
	__u32 ports;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct np_segment);
} np_time_wait SEC(".maps");

static __always_inline void np_segment_of(struct sk_buff *skb,
					  struct np_segment *s)
{
	struct tcp_skb_cb *cb = (void *)skb->cb;

	s->skb = (__u64)skb;
	s->head = (__u64)BPF_CORE_READ(skb, head);
	s->seq = BPF_CORE_READ(cb, seq);
	s->ports = 0;
	bpf_probe_read_kernel(&s->ports, sizeof(s->ports),
			      (void *)s->head +
				      BPF_CORE_READ(skb, transport_header));
}

/* Is it the segment that was for a connection in TIME-WAIT? Asked once of each. */
static __always_inline bool np_was_waiting(struct sk_buff *skb)
{
	__u32 zero = 0;
	struct np_segment *waiting = bpf_map_lookup_elem(&np_time_wait, &zero);
	struct np_segment now;

	if (!waiting || waiting->skb != (__u64)skb)
		return false;
	waiting->skb = 0;
	np_segment_of(skb, &now);
	return now.head == waiting->head && now.seq == waiting->seq &&
	       now.ports == waiting->ports;
}

#define DROP_TCP_SYN 0x02

/* A global function: the verifier reads it once. */
__noinline int np_tcp_facts(__u64 skb_ptr, __u32 tcp_flags)
{
	struct sk_buff *skb = (void *)skb_ptr;
	struct tcp_skb_cb *cb = (void *)skb->cb;
	bool ended = np_was_waiting(skb);
	__u32 seq, end;

	if (tcp_flags & DROP_TCP_SYN)
		return 0;
	if (ended)
		return DROP_TIME_WAIT;
	/* A FIN counts as one byte. */
	seq = BPF_CORE_READ(cb, seq) + (tcp_flags & 1);
	end = BPF_CORE_READ(cb, end_seq);
	return seq == end ? DROP_NO_DATA : 0;
}

/* `skb`: the same as `skb_ptr`, fit for NP_READ. */
static __always_inline __u8 np_drop_facts(__u64 skb_ptr, struct sk_buff *skb,
					  struct net_device *dev,
					  const struct np_tuple *t)
{
	__u8 facts;

	/* A typed load in place of a helper's call. */
	if (use_cast)
		facts = BPF_CORE_READ_BITFIELD(skb, pkt_type);
	else
		facts = BPF_CORE_READ_BITFIELD_PROBED(skb, pkt_type);
	facts &= DROP_PKT_TYPE;

	if (np_is_pointer(dev) && NP_READ(dev, promiscuity))
		facts |= DROP_PROMISCUOUS;
	if (!t->l3_version)
		facts |= DROP_NO_IP;
	if ((t->l4_proto == IPPROTO_ICMP && t->icmp_type == 0) ||
	    (t->l4_proto == 58 && t->icmp_type == 129))
		facts |= DROP_ECHO_REPLY;
	if (t->l4_proto == IPPROTO_TCP)
		facts |= np_tcp_facts(skb_ptr, t->tcp_flags);
	return facts;
}

/* tcp_timewait_state_process(tw, skb, ...): most of these segments are freed without a reason, and nothing is lost. */
SEC("kprobe/tcp_timewait_state_process")
int drops_time_wait(struct pt_regs *ctx)
{
	__u32 zero = 0;
	struct np_segment *waiting = bpf_map_lookup_elem(&np_time_wait, &zero);

	if (waiting)
		np_segment_of((void *)PT_REGS_PARM2(ctx), waiting);
	return 0;
}

#endif
