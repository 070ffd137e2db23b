// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * netprobe skb: one program for each argument position of the skb (1 to 5),
 * attached to every function with such a parameter; two more for functions
 * that also say why they free it.
 *
 * The order within a hit is by cost: config map, then sk_buff fields (mark,
 * interface, namespace), then the expression, the packet's headers, the event.
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "skb.h"
#include "compat.bpf.h"
#include "config.bpf.h"
#include "event.bpf.h"
#include "filter.bpf.h"
#include "packet.bpf.h"

/* SKB_SECTION_* to write. */
const volatile __u32 sections = 0;
/* bpf_get_func_ip exists (kernels from 5.15). */
const volatile __u8 has_func_ip = 0;

/* Room for an event with all its sections: too much for the BPF stack. */
struct skb_scratch {
	__u8 bytes[sizeof(struct skb_event) + sizeof(struct skb_meta) +
		   sizeof(struct np_tuple) + SKB_STACK_DEPTH * sizeof(__u64)];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct skb_scratch);
} scratch SEC(".maps");

/* For the types in the skeleton. */
struct skb_event skb_event_type;
struct skb_meta skb_meta_type;
struct np_tuple np_tuple_type;

static __always_inline bool match_addr(const __u64 *addr, const __u64 *mask,
				       const __u64 *want)
{
	return (addr[0] & mask[0]) == want[0] && (addr[1] & mask[1]) == want[1];
}

static __always_inline bool match_tuple(const struct np_config *cfg,
					const struct np_tuple *t)
{
	__u32 f = cfg->fields;

	if (!t->l3_version)
		return false;
	if ((f & NP_FIELD_PROTO) && t->l4_proto != cfg->l4_proto)
		return false;
	if ((f & NP_FIELD_SADDR) &&
	    !match_addr(t->saddr, cfg->saddr_mask, cfg->saddr))
		return false;
	if ((f & NP_FIELD_DADDR) &&
	    !match_addr(t->daddr, cfg->daddr_mask, cfg->daddr))
		return false;
	if ((f & NP_FIELD_SPORT) && t->sport != cfg->sport)
		return false;
	if ((f & NP_FIELD_DPORT) && t->dport != cfg->dport)
		return false;
	return true;
}

static __always_inline bool match_skb(const struct np_config *cfg,
				      struct sk_buff *skb)
{
	__u32 f = cfg->fields;

	if ((f & NP_FIELD_MARK) &&
	    (NP_READ(skb, mark) & cfg->mark_mask) != cfg->mark)
		return false;
	if (f & NP_FIELD_IFINDEX) {
		struct net_device *dev = NP_READ(skb, dev);

		if (!dev || NP_READ(dev, ifindex) != cfg->ifindex)
			return false;
	}
	if ((f & NP_FIELD_NETNS) && np_read_netns(skb) != cfg->netns)
		return false;
	return true;
}

static __always_inline void read_meta(struct sk_buff *skb, struct skb_meta *m)
{
	struct net_device *dev = NP_READ(skb, dev);

	m->netns = np_read_netns(skb);
	m->mark = NP_READ(skb, mark);
	m->len = NP_READ(skb, len);
	m->protocol = bpf_ntohs(NP_READ(skb, protocol));
	m->ifindex = 0;
	m->mtu = 0;
	m->pad[0] = 0;
	m->pad[1] = 0;
	__builtin_memset(m->ifname, 0, sizeof(m->ifname));
	if (dev) {
		m->ifindex = NP_READ(dev, ifindex);
		m->mtu = NP_READ(dev, mtu);
		BPF_CORE_READ_STR_INTO(&m->ifname, dev, name);
	}
}

/* Start of the probed function. */
static __always_inline __u64 func_addr(struct pt_regs *ctx)
{
	if (has_func_ip)
		return bpf_get_func_ip(ctx);
#ifdef __TARGET_ARCH_x86
	/* A kprobe hits behind its one-byte breakpoint. */
	return PT_REGS_IP(ctx) - 1;
#else
	return PT_REGS_IP(ctx);
#endif
}

static __always_inline int handle(struct pt_regs *ctx, void *skb_ptr,
				  __u16 kind, __u32 reason)
{
	struct np_config *cfg = np_config_get();
	struct sk_buff *skb = NP_CAST(struct sk_buff, skb_ptr);
	struct np_tuple tuple = {};
	struct skb_scratch *buf;
	struct skb_event *event;
	__u32 zero = 0;
	__u64 len = sizeof(*event);
	long stack;

	if (!cfg || !skb_ptr || (cfg->fields & NP_PAUSED) ||
	    !match_skb(cfg, skb))
		return 0;
	if (!np_filter_skb(skb))
		return 0;
	if ((cfg->fields & NP_FIELDS_PACKET) || (sections & SKB_SECTION_TUPLE))
		np_read_tuple(skb, &tuple);
	if ((cfg->fields & NP_FIELDS_PACKET) && !match_tuple(cfg, &tuple))
		return 0;

	buf = bpf_map_lookup_elem(&scratch, &zero);
	if (!buf)
		return 0;
	event = (struct skb_event *)buf->bytes;
	np_head_fill(&event->head, kind);
	event->skb = (__u64)skb_ptr;
	event->func = func_addr(ctx);
	event->sections = sections;
	event->reason = reason;
	/* `sections` is known to the verifier, so each offset is a constant. */
	if (sections & SKB_SECTION_META) {
		read_meta(skb, (struct skb_meta *)&buf->bytes[len]);
		len += sizeof(struct skb_meta);
	}
	if (sections & SKB_SECTION_TUPLE) {
		*(struct np_tuple *)&buf->bytes[len] = tuple;
		len += sizeof(struct np_tuple);
	}
	if (sections & SKB_SECTION_STACK) {
		stack = bpf_get_stack(ctx, &buf->bytes[len],
				      SKB_STACK_DEPTH * sizeof(__u64), 0);
		if (stack > 0)
			len += stack & (1024 - 1);
	}
	if (len > sizeof(buf->bytes))
		return 0;
	np_output(ctx, &event->head, len);
	return 0;
}

#define SKB_PROBE(n)                                                           \
	SEC("kprobe/skb_" #n)                                                  \
	int skb_##n(struct pt_regs *ctx)                                       \
	{                                                                      \
		return handle(ctx, (void *)PT_REGS_PARM##n(ctx), SKB_KIND_HIT, \
			      0);                                              \
	}

SKB_PROBE(1)
SKB_PROBE(2)
SKB_PROBE(3)
SKB_PROBE(4)
SKB_PROBE(5)

/* kfree_skb_reason(skb, reason) and its like (from 5.17). */
SEC("kprobe/skb_drop_1")
int skb_drop_1(struct pt_regs *ctx)
{
	return handle(ctx, (void *)PT_REGS_PARM1(ctx), SKB_KIND_DROP,
		      (__u32)PT_REGS_PARM2(ctx));
}

/* sk_skb_reason_drop(sk, skb, reason) (from 6.11). */
SEC("kprobe/skb_drop_2")
int skb_drop_2(struct pt_regs *ctx)
{
	return handle(ctx, (void *)PT_REGS_PARM2(ctx), SKB_KIND_DROP,
		      (__u32)PT_REGS_PARM3(ctx));
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
