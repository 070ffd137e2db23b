/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * netprobe skb: is an sk_buff one of ours, and its event: what the programs on
 * functions (skb.bpf.c) and those on tc and XDP programs (skb_prog.bpf.c) share.
 * Needs vmlinux.h and libbpf's headers before it.
 */
#ifndef NETPROBE_SKB_EVENT_BPF_H
#define NETPROBE_SKB_EVENT_BPF_H

#include "skb.h"
#include "compat.bpf.h"
#include "config.bpf.h"
#define NP_RINGBUF
#define NP_HEAD_TYPED
#include "event.bpf.h"
#include "filter.bpf.h"
#include "members.bpf.h"
#include "packet.bpf.h"
#include "fields.bpf.h"
#include "skb_owner.bpf.h"
#include "skb_sections.bpf.h"
#include "skb_track.bpf.h"
#include "skb_return.bpf.h"
#include "skb_xdp.bpf.h"

/* SKB_SECTION_* to write. */
const volatile __u32 sections = 0;
/* bpf_get_func_ip exists (kernels from 5.15). */
const volatile __u8 has_func_ip = 0;
/* enum skb_drop_reason exists (kernels from 5.17). */
const volatile __u8 has_reasons = 0;

/* Room for an event with all its sections: too much for the BPF stack. */
struct skb_scratch {
	__u8 bytes[sizeof(struct skb_event) + sizeof(struct skb_meta) +
		   sizeof(struct np_tuple) + sizeof(struct skb_owner) +
		   sizeof(struct np_tuple) + SKB_CB_LEN +
		   2 * sizeof(struct skb_copy) + sizeof(struct skb_data) +
		   SKB_SNAP_MAX + sizeof(struct np_members) +
		   sizeof(struct nf_decision) + sizeof(struct skb_drop) +
		   (3 + SKB_STACK_DEPTH) * sizeof(__u64)];
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
enum skb_kind skb_kind_type;
enum skb_section skb_section_type;
enum skb_mtu skb_mtu_type;
enum skb_packet skb_packet_type;
enum skb_program skb_program_type;
enum np_config_version np_config_version_type;
enum np_field np_field_type;
enum np_filter_bit np_filter_bit_type;
enum np_filter_block np_filter_block_type;
enum np_filter_answer np_filter_answer_type;
enum np_type np_type_type;
enum np_cast np_cast_type;

/*
 * The skb's device; to be asked for by np_is_pointer. With a socket (`sk`)
 * beside it the skb may be in one of TCP's trees, whose links share the place
 * of skb->dev: only a device in the socket's namespace is one.
 */
static __always_inline struct net_device *
read_dev(struct sk_buff *skb, struct sock *sk, const bool use_cast)
{
	struct net_device *dev = NP_READ(skb, dev);

	if (sk && np_is_pointer(dev) &&
	    NP_READ(dev, nd_net.net) != NP_READ(sk, __sk_common.skc_net.net))
		return NULL;
	return dev;
}

/* `fields` read again in place of being kept: a register less to save on each hit. */
static __always_inline __u32 fields_again(const struct np_config *cfg)
{
	return *(const volatile __u32 *)&cfg->fields;
}

static __always_inline bool match_mark(const struct np_config *cfg,
				       struct sk_buff *skb, const bool use_cast)
{
	return (NP_READ(skb, mark) & cfg->mark_mask) == cfg->mark;
}

/* The filters that the device decides, or the socket `sk` that the function has beside the skb. */
static __always_inline bool match_device(const struct np_config *cfg,
					 struct sk_buff *skb, struct sock *sk,
					 const bool use_cast)
{
	__u32 f = fields_again(cfg);

	if (f & NP_FIELD_IFINDEX) {
		struct net_device *dev = read_dev(skb, sk, use_cast);

		if (!np_is_pointer(dev) ||
		    NP_READ(dev, ifindex) != cfg->ifindex)
			return false;
	}
	return !(f & NP_FIELD_NETNS) ||
	       np_read_netns_by(skb, sk, use_cast) == cfg->netns;
}

/* Any memory by typed loads of any width, see np_filter_fast(): what lies at `p` is at NP_BYTES_LEAD. */
#define NP_BYTES_LEAD 2
#define NP_BYTES(p) \
	((void *)NP_TYPED(__kernel_sockaddr_storage, (p)-NP_BYTES_LEAD))

static __always_inline __u64 load_8(const void *bytes, int at)
{
	return *(const __u64 *)(bytes + NP_BYTES_LEAD + at);
}

/*
 * May the packet with an IP header at `at` match the filters of protocol,
 * addresses and ports? By typed loads of what they ask for, else from `read`, its
 * first 24 bytes. False is certain; match_tuple() decides about what is left: few
 * packets, or those with IPv6 extension headers and fragments.
 */
static __always_inline __u64 may_match_at(const __u8 *at, const __u64 *read,
					  const bool use_cast)
{
	const struct np_config *cfg = np_config_get();
	const void *l3 = use_cast ? NP_BYTES(at) : NULL;
	__u64 first = use_cast ? load_8(l3, 0) : read[0];
	__u64 second = use_cast ? load_8(l3, 8) : read[1];
	__u32 f = cfg->fields, proto, headers;
	__u64 addr[2], ports;

	if ((first & 0xf0) == 0x60)
		return 1;
	if ((first & 0xf0) != 0x40)
		return 0;
	proto = (__u8)(second >> 8);
	if ((f & NP_FIELD_PROTO) && proto != cfg->l4_proto)
		return 0;
	addr[0] = 0;
	if (f & NP_FIELD_SADDR) {
		addr[1] = (second & ~0xffffffffULL) | bpf_htonl(0xffff);
		if (!match_addr(addr, cfg->saddr_mask, cfg->saddr))
			return 0;
	}
	if (f & NP_FIELD_DADDR) {
		addr[1] = (use_cast ? load_8(l3, 16) : read[2]) << 32 |
			  bpf_htonl(0xffff);
		if (!match_addr(addr, cfg->daddr_mask, cfg->daddr))
			return 0;
	}
	/* Fragments have no ports, as other protocols have none. */
	if (!(f & (NP_FIELD_SPORT | NP_FIELD_DPORT)) ||
	    ((first >> 48) & bpf_htons(NP_FRAGMENT_OFFSET)) ||
	    (proto != IPPROTO_TCP && proto != IPPROTO_UDP))
		return 1;
	headers = (first & 0xf) * 4;
	if (use_cast)
		ports = load_8(NP_BYTES(at + headers), 0);
	else if (headers == sizeof(struct iphdr))
		ports = read[2] >> 32;
	else
		return 1;
	if ((f & NP_FIELD_SPORT) && bpf_ntohs((__u16)ports) != cfg->sport)
		return 0;
	return !(f & NP_FIELD_DPORT) ||
	       bpf_ntohs((__u16)(ports >> 16)) == cfg->dport;
}

/* By typed loads. */
static __noinline __u64 may_match(const void *skb_ptr)
{
	const struct sk_buff *skb = NP_TYPED(sk_buff, skb_ptr);
	__u16 offset = skb->network_header;

	return may_match_at(offset && offset != NP_NO_HEADER
				    ? skb->head + offset
				    : skb->data,
			    NULL, true);
}

/* By two reads: the sk_buff's fields that lie together, then the IP header and the ports. */
static __noinline __u64 may_match_read(const void *skb_ptr)
{
	const struct sk_buff *skb = skb_ptr;
	__u64 fields[4], read[3];
	__u16 offset;
	__u8 *at;

	/* What lies before the head, the head, data; for offset constants one of these is left. */
	if (!NP_DATA_BEHIND_HEAD ||
	    bpf_probe_read_kernel(fields, sizeof(fields),
				  (void *)&skb->head - 16))
		return 1;
	if (NP_BEFORE_HEAD(network_header, 16))
		offset = ((__u16 *)fields)[0];
	else if (NP_BEFORE_HEAD(network_header, 12))
		offset = ((__u16 *)fields)[2];
	else
		return 1;
	at = (__u8 *)fields[offset && offset != NP_NO_HEADER ? 2 : 3];
	if (offset != NP_NO_HEADER)
		at += offset;
	if (bpf_probe_read_kernel(read, sizeof(read), at))
		return 1;
	return may_match_at(at, read, false);
}

static __always_inline void read_meta(struct sk_buff *skb, struct sock *sk,
				      struct skb_meta *m, const bool use_cast)
{
	struct net_device *dev = read_dev(skb, sk, use_cast);

	struct np_sk_buff_part part = {};
	struct np_tag tag;

	m->netns = np_read_netns(skb, sk);
	m->len = NP_READ(skb, len);
	if (!use_cast && NP_PART_HAS_ALL) {
		bpf_probe_read_kernel(&part, sizeof(part), &skb->vlan_proto);
		m->mark = NP_PART(&part, mark, __u32);
		m->protocol = bpf_ntohs(NP_PART(&part, protocol, __be16));
		tag = np_take_tag(skb, NP_PART(&part, vlan_proto, __be16),
				  NP_PART(&part, vlan_tci, __u16));
	} else {
		m->mark = NP_READ(skb, mark);
		m->protocol = bpf_ntohs(NP_READ(skb, protocol));
		tag = np_read_tag(skb, use_cast);
	}
	m->ifindex = 0;
	m->mtu = tag.proto ? SKB_MTU_TAGGED : 0;
	m->vlan = tag.tci;
	__builtin_memset(m->ifname, 0, sizeof(m->ifname));
	if (np_is_pointer(dev)) {
		m->ifindex = NP_READ(dev, ifindex);
		m->mtu |= NP_READ(dev, mtu) & ~SKB_MTU_TAGGED;
		if (use_cast)
			np_load_16((__u64 *)m->ifname, dev->name);
		else
			bpf_probe_read_kernel(m->ifname, sizeof(m->ifname),
					      dev->name);
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

/* Address to which the probed function returns. */
static __always_inline __u64 caller_addr(struct pt_regs *ctx)
{
	__u64 addr = 0;

#ifdef __TARGET_ARCH_x86
	bpf_probe_read_kernel(&addr, sizeof(addr), (void *)PT_REGS_SP(ctx));
#else
	addr = PT_REGS_RET(ctx);
#endif
	return addr;
}

#include "netfilter.bpf.h"
#include "skb_drops.bpf.h"

/* What a hit is, beside the skb. */
struct hit {
	__u64 func;
	__u64 caller;
	__u64 packet; /* identity, where tracking is on */
	struct sock *sk; /* the function's own, or NULL */
	const struct skb_drop *drop; /* with SKB_SECTION_DROP */
	__u32 reason;
	__u16 kind;
};

/* Not 0 while a program of skb_prog.bpf.c runs on this CPU. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} watching SEC(".maps");

static __always_inline void watching_set(__u32 value)
{
	__u32 zero = 0;
	__u32 *on = bpf_map_lookup_elem(&watching, &zero);

	if (on)
		*on = value;
}

/* The fixed part of an event; `addr`: of its sk_buff or xdp_buff. */
static __always_inline void event_begin(struct skb_scratch *buf, __u64 addr,
					const struct hit *hit)
{
	struct skb_event *event = (struct skb_event *)buf->bytes;

	np_head_fill(&event->head, hit->kind);
	event->skb = addr;
	event->func = hit->func;
	event->sections = sections;
	event->reason = hit->reason;
}

/* The sections of a packet's tuple and its identity, at `len`; the length then. */
static __always_inline __u64 event_tuple(struct skb_scratch *buf, __u64 len,
					 const struct np_tuple *tuple,
					 const struct hit *hit)
{
	if (sections & SKB_SECTION_TUPLE) {
		*(struct np_tuple *)&buf->bytes[len] = *tuple;
		len += sizeof(struct np_tuple);
	}
	if (sections & SKB_SECTION_PACKET) {
		*(__u64 *)&buf->bytes[len] = hit->packet;
		len += sizeof(__u64);
	}
	return len;
}

/* The stack, which comes last; and out. */
static __always_inline void event_end(void *ctx, struct skb_scratch *buf,
				      __u64 len)
{
	long stack;

	if (sections & SKB_SECTION_STACK) {
		stack = bpf_get_stack(ctx, &buf->bytes[len],
				      SKB_STACK_DEPTH * sizeof(__u64), 0);
		if (stack > 0)
			len += stack & (1024 - 1);
	}
	if (len > sizeof(buf->bytes))
		return;
	np_output(ctx, (struct np_head *)buf->bytes, len);
}

/*
 * Sections beside META and TUPLE: one question where none of them is asked for
 * (each costs 3 instructions).
 */
#define SKB_SECTIONS_MORE (~(SKB_SECTION_META | SKB_SECTION_TUPLE))

/* Where the tuple is read to: its place in an event, or behind all that an event without it may have. */
static __always_inline struct np_tuple *tuple_place(struct skb_scratch *buf)
{
	__u64 at = sizeof(struct skb_event);

	if (!(sections & SKB_SECTION_TUPLE))
		at = sizeof(*buf) - sizeof(struct np_tuple);
	else if (sections & SKB_SECTION_META)
		at += sizeof(struct skb_meta);
	return (struct np_tuple *)&buf->bytes[at];
}

/* SKB_DROP_REASON_NETFILTER_DROP of this kernel; 0: it has none. */
const volatile __u32 nf_drop_reason = 0;

/* Who in netfilter has dropped this packet, if it is freed for that. */
static __always_inline void read_decision(__u64 skb, const struct hit *hit,
					  struct nf_decision *to)
{
	bool dropped = hit->kind == SKB_KIND_DROPPED;

	if (dropped || hit->kind == SKB_KIND_DROP)
		nf_read(skb, dropped ? hit->func : hit->caller, to);
	else
		to->known = 0;
	/* What a queue held may be freed without this reason: its place says it. */
	if (hit->reason != nf_drop_reason &&
	    !(dropped && to->verdict == NF_QUEUE))
		to->known = 0;
}

/* The sections that are seldom asked for, from `len` on; the new length. */
static __always_inline __u64 write_more(struct skb_scratch *buf, __u64 len,
					struct sk_buff *skb,
					const struct np_tuple *tuple,
					const struct hit *hit)
{
	if (sections & SKB_SECTION_PACKET) {
		*(__u64 *)&buf->bytes[len] = hit->packet;
		len += sizeof(__u64);
	}
	if (sections & SKB_SECTION_OWNER) {
		owner_read(skb, hit->sk, (struct skb_owner *)&buf->bytes[len]);
		len += sizeof(struct skb_owner);
	}
	if (sections & SKB_SECTION_CALLER) {
		*(__u64 *)&buf->bytes[len] = hit->caller;
		len += sizeof(__u64);
	}
	if (sections & SKB_SECTION_TUNNEL) {
		read_tunnel((const __u8 *)np_l3_sound(skb), tuple,
			    (struct np_tuple *)&buf->bytes[len]);
		len += sizeof(struct np_tuple);
	}
	if (sections & SKB_SECTION_CB) {
		bpf_probe_read_kernel(&buf->bytes[len], SKB_CB_LEN, &skb->cb);
		len += SKB_CB_LEN;
	}
	if (sections & SKB_SECTION_SKB) {
		read_copy((struct skb_copy *)&buf->bytes[len], skb,
			  bpf_core_type_size(struct sk_buff));
		len += sizeof(struct skb_copy);
	}
	if (sections & SKB_SECTION_SHINFO) {
		read_copy((struct skb_copy *)&buf->bytes[len],
			  NP_READ(skb, head) + NP_READ(skb, end),
			  bpf_core_type_size(struct skb_shared_info));
		len += sizeof(struct skb_copy);
	}
	if (sections & SKB_SECTION_DATA) {
		read_data(skb, (struct skb_data *)&buf->bytes[len]);
		len += sizeof(struct skb_data) + snap_len;
	}
	if (sections & SKB_SECTION_MEMBERS) {
		np_read_members(skb, (struct np_members *)&buf->bytes[len]);
		len += sizeof(struct np_members);
	}
	if (sections & SKB_SECTION_NFT) {
		read_decision((__u64)skb, hit,
			      (struct nf_decision *)&buf->bytes[len]);
		len += sizeof(struct nf_decision);
	}
	if (sections & SKB_SECTION_LIFE) {
		*(__u64 *)&buf->bytes[len] = track_life(skb);
		len += sizeof(__u64);
	}
	if ((sections & SKB_SECTION_DROP) && hit->drop) {
		*(struct skb_drop *)&buf->bytes[len] = *hit->drop;
		len += sizeof(struct skb_drop);
	}
	return len;
}

/*
 * Writes the event: the fixed part and the sections asked for. The tuple is in
 * its place already (see tuple_place), where it is asked for.
 */
static __always_inline void write_event_by(void *ctx, struct skb_scratch *buf,
					   struct sk_buff *skb,
					   const struct np_tuple *tuple,
					   const struct hit *hit,
					   const bool use_cast)
{
	__u64 len = sizeof(struct skb_event);

	event_begin(buf, (__u64)skb, hit);
	/* `sections` is a constant, so each offset is a constant. */
	if (sections & SKB_SECTION_META) {
		read_meta(skb, hit->sk, (struct skb_meta *)&buf->bytes[len],
			  use_cast);
		len += sizeof(struct skb_meta);
	}
	if (sections & SKB_SECTION_TUPLE)
		len += sizeof(struct np_tuple);
	if (sections & SKB_SECTIONS_MORE)
		len = write_more(buf, len, skb, tuple, hit);
	event_end(ctx, buf, len);
}

static __always_inline struct skb_scratch *scratch_get(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&scratch, &zero);
}

static __always_inline void write_event(void *ctx, struct sk_buff *skb,
					const struct np_tuple *tuple,
					const struct hit *hit)
{
	struct skb_scratch *buf = scratch_get();

	if (!buf)
		return;
	if (sections & SKB_SECTION_TUPLE)
		*tuple_place(buf) = *tuple;
	write_event_by(ctx, buf, skb, tuple, hit, use_cast);
}

/* The tuple is needed for the filter or for the event. */
static __always_inline bool wants_tuple(const struct np_config *cfg)
{
	return (cfg->fields & NP_FIELDS_PACKET) ||
	       (sections & (SKB_SECTION_TUPLE | SKB_SECTION_TUNNEL));
}

/* The gates by typed loads. */
static __always_inline bool match_typed(const struct np_config *cfg,
					const void *skb_ptr, const void *sk_ptr)
{
	struct sk_buff *skb = NP_CAST(sk_buff, skb_ptr);
	struct sock *sk = sk_ptr ? NP_CAST(sock, sk_ptr) : NULL;
	__u32 f = fields_again(cfg);

	if ((f & NP_FIELD_MARK) && !match_mark(cfg, skb, true))
		return false;
	if ((f & NP_FIELDS_DEVICE) && !match_device(cfg, skb, sk, true))
		return false;
	return !(fields_again(cfg) & NP_FIELDS_PACKET) || may_match(skb_ptr);
}

/* The gates without them: functions of their own, for their stack and registers. */
static __noinline __u64 match_mark_read(const void *skb_ptr)
{
	return match_mark(np_config_get(), (void *)skb_ptr, false);
}

static __noinline __u64 match_device_read(const void *skb_ptr,
					  const void *sk_ptr)
{
	return match_device(np_config_get(), (void *)skb_ptr, (void *)sk_ptr,
			    false);
}

static __always_inline bool match_read(const struct np_config *cfg,
				       const void *skb_ptr, const void *sk_ptr)
{
	__u32 f = fields_again(cfg);

	if ((f & NP_FIELD_MARK) && !match_mark_read(skb_ptr))
		return false;
	if ((fields_again(cfg) & NP_FIELDS_DEVICE) &&
	    !match_device_read(skb_ptr, sk_ptr))
		return false;
	return !(fields_again(cfg) & NP_FIELDS_PACKET) ||
	       may_match_read(skb_ptr);
}

/*
 * The gates that cost little: the field filters, then the expression. This is
 * what a packet that does not match costs: that the session has ended is asked
 * behind them.
 */
static __always_inline bool passes_gates(const struct np_config *cfg,
					 const void *skb_ptr,
					 const void *sk_ptr)
{
	if (fields_again(cfg) &&
	    (!(use_cast ? match_typed(cfg, skb_ptr, sk_ptr)
			: match_read(cfg, skb_ptr, sk_ptr)) ||
	     (fields_again(cfg) & NP_PAUSED)))
		return false;
	return np_filter_skb(skb_ptr);
}

/*
 * Is an skb one of ours that has passed the gates (`matched`) or may be tracked? Reads the tuple where it is needed, and the
 * packet's identity. `ctx` and `sp`, the stack pointer: see track_packet. With `begin` false it is one of ours only where it is
 * tracked already.
 */
static __always_inline bool is_ours(const struct np_config *cfg, void *ctx,
				    __u64 sp, struct sk_buff *skb,
				    struct np_tuple *tuple, __u64 *packet,
				    bool matched, bool begin,
				    const bool use_cast)
{
	if (track)
		*packet = track_find(skb);
	if (!matched && !*packet && !track_stack)
		return false;
	if (wants_tuple(cfg))
		np_read_tuple(skb, tuple);
	if (matched && (cfg->fields & NP_FIELDS_PACKET))
		matched = match_tuple(cfg, tuple);
	if (track) {
		*packet = track_packet(ctx, sp, skb, *packet, matched, begin);
		matched = matched || *packet;
	}
	return matched;
}

#endif
