/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * netprobe skb: the table of an event's sections (SKB_SECTIONS), and a writer for
 * each. META and TUPLE, which most events have, are written by skb_event.bpf.h.
 *
 * Included by skb_event.bpf.h.
 */
#ifndef NETPROBE_SKB_COLUMNS_BPF_H
#define NETPROBE_SKB_COLUMNS_BPF_H

#include "common/scratch.bpf.h"
#include "skb/skb.h"
#include "skb/skb_source.bpf.h"
#include "skb/skb_ct.bpf.h"
#include "skb/skb_why.bpf.h"

/* SKB_DROP_REASON_NETFILTER_DROP of this kernel; 0: it has none. */
const volatile __u32 nf_drop_reason = 0;

/* Who in netfilter has dropped this packet, if it is freed for that. */
static __always_inline void read_decision(__u64 skb, const struct hit *hit,
					  struct nf_decision *to)
{
	bool dropped = hit->kind == SKB_KIND_DROPPED;

	if (nf_accepts && hit->kind == SKB_KIND_HIT) {
		nf_read_accepted(skb, hit->packet, to);
		return;
	}
	if (dropped || hit->kind == SKB_KIND_DROP)
		nf_read(skb, dropped ? hit->func : hit->caller, to);
	else
		to->known = 0;
	/* What a queue held may be freed without this reason: its place says it. */
	if (hit->reason != nf_drop_reason &&
	    !(dropped && to->verdict == NF_QUEUE))
		to->known = 0;
}

static __always_inline __u64 write_packet(const struct skb_source *from,
					  void *to)
{
	return write_word(to, from->hit->packet);
}

static __always_inline __u64 write_owner(const struct skb_source *from,
					 void *to)
{
	owner_read(from->skb, from->hit->sk, to);
	return sizeof(struct skb_owner);
}

static __always_inline __u64 write_caller(const struct skb_source *from,
					  void *to)
{
	return write_word(to, from->hit->caller);
}

static __always_inline __u64 write_tunnel(const struct skb_source *from,
					  void *to)
{
	read_tunnel((const __u8 *)np_l3_sound(from->skb), from->tuple, to);
	return sizeof(struct np_tuple);
}

static __always_inline __u64 write_cb(const struct skb_source *from, void *to)
{
	bpf_probe_read_kernel(to, SKB_CB_LEN, &from->skb->cb);
	return SKB_CB_LEN;
}

static __always_inline __u64 write_skb(const struct skb_source *from, void *to)
{
	read_copy(to, from->skb, bpf_core_type_size(struct sk_buff));
	return sizeof(struct skb_copy);
}

static __always_inline __u64 write_shared_info(const struct skb_source *from,
					       void *to)
{
	/* A local: CO-RE takes every struct on its way for a kernel's. */
	struct sk_buff *skb = from->skb;

	read_copy(to, NP_READ(skb, head) + NP_READ(skb, end),
		  bpf_core_type_size(struct skb_shared_info));
	return sizeof(struct skb_copy);
}

static __always_inline __u64 write_data(const struct skb_source *from, void *to)
{
	read_data(from->skb, to);
	return sizeof(struct skb_data) + snap_len;
}

static __always_inline __u64 write_members(const struct skb_source *from,
					   void *to)
{
	np_read_members(from->skb, to);
	return sizeof(struct np_members);
}

static __always_inline __u64 write_nft(const struct skb_source *from, void *to)
{
	read_decision((__u64)from->skb, from->hit, to);
	return sizeof(struct nf_decision);
}

static __always_inline __u64 write_life(const struct skb_source *from, void *to)
{
	return write_word(to, track_life(from->skb));
}

static __always_inline __u64 write_drop(const struct skb_source *from, void *to)
{
	if (!from->hit->drop)
		return 0;
	*(struct skb_drop *)to = *from->hit->drop;
	return sizeof(struct skb_drop);
}

static __always_inline __u64 write_facts(const struct skb_source *from,
					 void *to)
{
	struct sk_buff *skb = from->skb;
	struct sock *sk = from->hit->sk;

	read_facts(as_number(skb), sk ? as_number(sk) : 0, to);
	return sizeof(struct skb_facts);
}

/*
 * The sections that are seldom asked for, in the order of their bits: a row has
 * the bit's name, the bytes that the section takes at most, and its writer, which
 * gives the bytes that it took. User space has its half in
 * src/tools/skb/columns/mod.rs.
 */
#define SKB_SECTIONS(ROW)                                             \
	ROW(PACKET, sizeof(__u64), write_packet)                      \
	ROW(OWNER, sizeof(struct skb_owner), write_owner)             \
	ROW(CALLER, sizeof(__u64), write_caller)                      \
	ROW(TUNNEL, sizeof(struct np_tuple), write_tunnel)            \
	ROW(CB, SKB_CB_LEN, write_cb)                                 \
	ROW(SKB, sizeof(struct skb_copy), write_skb)                  \
	ROW(SHINFO, sizeof(struct skb_copy), write_shared_info)       \
	ROW(DATA, sizeof(struct skb_data) + SKB_SNAP_MAX, write_data) \
	ROW(MEMBERS, sizeof(struct np_members), write_members)        \
	ROW(NFT, sizeof(struct nf_decision), write_nft)               \
	ROW(LIFE, sizeof(__u64), write_life)                          \
	ROW(DROP, sizeof(struct skb_drop), write_drop)                \
	ROW(CT, sizeof(struct skb_ct), write_ct)                      \
	ROW(FACTS, sizeof(struct skb_facts), write_facts)

#define SKB_SECTION_ROOM(name, most, writer) +(most)

/* Room for an event with all its sections: too much for the BPF stack. */
struct skb_scratch {
	__u8 bytes[sizeof(struct skb_event) + sizeof(struct skb_meta) +
		   sizeof(struct np_tuple) SKB_SECTIONS(SKB_SECTION_ROOM) +
		   SKB_STACK_DEPTH * sizeof(__u64)];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, SCRATCH_COUNT);
	__type(key, __u32);
	__type(value, struct skb_scratch);
} scratch SEC(".maps");

#define SKB_SECTION_WRITE(name, most, writer) \
	if (sections & SKB_SECTION_##name)    \
		len += writer(from, &buf->bytes[len]);

/* The sections of the table, from `len` on; the new length. */
static __always_inline __u64 write_more(struct skb_scratch *buf, __u64 len,
					const struct skb_source *from)
{
	SKB_SECTIONS(SKB_SECTION_WRITE)
	return len;
}

#endif
