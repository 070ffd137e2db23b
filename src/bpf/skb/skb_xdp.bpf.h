/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Tracking between XDP and sk_buffs: a packet that XDP sees has an xdp_buff, and
 * no sk_buff or one that is not told. What they share is the start of the memory:
 * xdp->data_hard_start is skb->head.
 *
 * Before: generic XDP and veth run XDP on a packet that is in an sk_buff. Hooks on
 * the functions on that way remember the last one on this CPU; it is the packet
 * of the xdp_buff if its head is the same.
 *
 * After XDP_PASS: drivers build the sk_buff around that memory and give it to
 * eth_type_trans(). Where a driver copies a packet into new memory, where it is
 * redirected or sent back, the link is lost: a number more.
 *
 * Needs skb_track.bpf.h before it.
 */
#ifndef NETPROBE_SKB_XDP_BPF_H
#define NETPROBE_SKB_XDP_BPF_H

struct xdp_link {
	__u64 skb; /* the last sk_buff on its way to XDP */
	__u64 head; /* memory of the last packet that XDP passed */
	__u64 packet; /* its identity */
	__u64 buff; /* the xdp_buff that a program is busy with */
	__u64 buff_packet; /* its identity */
	__u32 program; /* the outermost program that is */
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct xdp_link);
} xdp_links SEC(".maps");

static __always_inline struct xdp_link *xdp_link_get(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&xdp_links, &zero);
}

static __always_inline void xdp_link_skb(__u64 skb)
{
	struct xdp_link *link = xdp_link_get();

	if (link)
		link->skb = skb;
}

/* The sk_buff around the memory that begins at `head`; 0: none is known. */
static __always_inline __u64 xdp_skb_of(__u64 head)
{
	struct xdp_link *link = xdp_link_get();
	struct sk_buff *skb;

	if (!link)
		return 0;
	/* What was passed before is on its way, or this is its memory again. */
	link->packet = 0;
	if (!link->skb)
		return 0;
	skb = NP_CAST(sk_buff, link->skb);
	return (__u64)NP_READ(skb, head) == head ? link->skb : 0;
}

/*
 * bpf_prog_run_generic_xdp(skb, ...); pskb_expand_head(skb, ...), which makes
 * room for XDP; skb_copy_header(skb, old)
 */
SEC("kprobe/xdp_skb_1")
int xdp_skb_1(struct pt_regs *ctx)
{
	xdp_link_skb(PT_REGS_PARM1(ctx));
	return 0;
}

/* do_xdp_generic(prog, skb) before 6.9, veth_xdp_rcv_skb(rq, skb, ...) */
SEC("kprobe/xdp_skb_2")
int xdp_skb_2(struct pt_regs *ctx)
{
	xdp_link_skb(PT_REGS_PARM2(ctx));
	return 0;
}

/* veth_convert_skb_to_xdp_buff(rq, xdp, &skb) */
SEC("kprobe/xdp_skb_at_3")
int xdp_skb_at_3(struct pt_regs *ctx)
{
	__u64 skb = 0;

	bpf_probe_read_kernel(&skb, sizeof(skb), (void *)PT_REGS_PARM3(ctx));
	xdp_link_skb(skb);
	return 0;
}

/* eth_type_trans(skb, dev) */
SEC("kprobe/xdp_passed_1")
int xdp_passed_1(struct pt_regs *ctx)
{
	struct xdp_link *link = xdp_link_get();
	struct sk_buff *skb = TRACK_SKB(1);

	if (!link || !link->packet || (__u64)NP_READ(skb, head) != link->head)
		return 0;
	if (!track_find(skb))
		track_set(skb, link->packet, false);
	link->packet = 0;
	return 0;
}

#endif
