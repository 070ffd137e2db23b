// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * netprobe skb --filter-trace-tc, --filter-trace-xdp: a loaded tc or XDP program
 * watched from outside, by fentry and fexit. The watched program is not changed.
 *
 * User space prepares this object once and loads its programs once for each
 * watched program, with that one's id in the place of SKB_PROGRAM_ID. The maps
 * are those of skb.bpf.c (one filter, one tracking, one stream of events), but
 * for the scratch memory: a kprobe may interrupt what runs here.
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "skb/skb_event.bpf.h"
#include "common/frame_probe.bpf.h"
#include "common/outer.bpf.h"

/* bpf_xdp_get_buff_len exists (kernels from 5.18); packets have one buffer before. */
const volatile __u8 has_buff_len = 0;

struct running_key {
	__u64 packet; /* address of the sk_buff, or of the xdp_buff */
	__u32 program;
	__u32 pad;
};

struct running {
	__u64 identity;
	struct skb_context outer; /* what this stack was busy with before */
};

/*
 * Packets that a watched program is busy with, and their identity: what comes
 * out of it is shown where what went in was, whatever it has become.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct running_key);
	__type(value, struct running);
} running SEC(".maps");

/*
 * Replaced when a program is loaded for another one. No branch may depend on it: what is switched off by constants has gone by
 * then (src/filter/prune.rs).
 */
static __always_inline __u32 program_id(void)
{
	__u64 id;

	asm volatile("%0 = %1" : "=r"(id) : "i"(SKB_PROGRAM_ID));
	return id;
}

/* What went in is remembered, with its identity. */
static __always_inline void running_begin(void *ctx, __u64 packet,
					  __u32 program, __u64 identity)
{
	struct running_key key = {.packet = packet, .program = program};
	struct running value = {.identity = identity};

	if (track_stack)
		track_hold(stack_address(ctx), packet, identity, &value.outer);
	bpf_map_update_elem(&running, &key, &value, BPF_ANY);
}

/* Gives true where this packet was remembered, and forgets it. */
static __always_inline bool running_end(void *ctx, __u64 packet, __u32 program,
					__u64 *identity)
{
	struct running_key key = {.packet = packet, .program = program};
	struct running *found = bpf_map_lookup_elem(&running, &key);

	if (!found)
		return false;
	*identity = found->identity;
	if (track_stack)
		track_release(stack_address(ctx), &found->outer);
	bpf_map_delete_elem(&running, &key);
	return true;
}

static __always_inline void enter_tc(void *ctx, struct sk_buff *ptr)
{
	const struct np_config *cfg = np_config_get();
	struct sk_buff *skb = NP_CAST(sk_buff, ptr);
	struct hit hit = {.kind = SKB_KIND_ENTER, .func = program_id()};
	struct np_tuple tuple = {};

	if (cfg->fields & NP_PAUSED)
		return;
	if (!is_ours(cfg, NULL, 0, skb, &tuple, &hit.packet,
		     passes_gates(cfg, (void *)as_number(ptr), NULL), true,
		     use_cast))
		return;
	running_begin(ctx, (__u64)ptr, hit.func, hit.packet);
	write_event(ctx, skb, &tuple, &hit);
}

static __always_inline void leave_tc(void *ctx, struct sk_buff *ptr,
				     int verdict)
{
	const struct np_config *cfg = np_config_get();
	struct sk_buff *skb = NP_CAST(sk_buff, ptr);
	struct hit hit = {.kind = SKB_KIND_LEAVE,
			  .func = program_id(),
			  .reason = verdict};
	struct np_tuple tuple = {};

	if (!running_end(ctx, (__u64)ptr, hit.func, &hit.packet) ||
	    (cfg->fields & NP_PAUSED))
		return;
	if (wants_tuple(cfg))
		np_read_tuple(skb, &tuple);
	write_event(ctx, skb, &tuple, &hit);
}

#define NP_ETH_VLAN 0x8100
#define NP_ETH_VLAN_OUTER 0x88a8
#define NP_XDP_PASS 2

/* The IP header of what begins with one, and its EtherType; NULL: there is none. */
static __always_inline const __u8 *xdp_bare(const __u8 *data, __u16 *type)
{
	__u8 first = 0;

	bpf_probe_read_kernel(&first, sizeof(first), data);
	first >>= 4;
	*type = first == 4 ? NP_TYPE_IPV4 : first == 6 ? NP_TYPE_IPV6 : 0;
	return *type ? data : NULL;
}

/* The IP header behind up to two VLAN tags, and the EtherType; NULL: there is none. */
static __always_inline const __u8 *xdp_l3(const __u8 *data, __u16 *type)
{
	__be16 field = 0;
	const __u8 *at = data + NP_ETH_LEN;

	for (int tags = 0; tags < 3; tags++) {
		bpf_probe_read_kernel(&field, sizeof(field), at - 2);
		*type = bpf_ntohs(field);
		if (*type != NP_ETH_VLAN && *type != NP_ETH_VLAN_OUTER)
			break;
		at += 4;
	}
	return np_is_ip_type(field) ? at : NULL;
}

/* An xdp_buff, as much of it as filters and events need. */
struct xdp_packet {
	const __u8 *data;
	const __u8 *l3;
	struct net_device *dev;
	__u64 head;
	__u32 linear;
	__u32 len;
	__u16 protocol;
	bool ethernet;
};

/* Begins the packet behind the outer headers of a tunnel device. */
static __always_inline void xdp_skip_outer(struct xdp_packet *p)
{
	struct net_device *dev = p->dev;
	struct np_tunnel tunnel = {.type = BPF_CORE_READ(dev, type)};
	struct np_frame frame = {
		.data = p->data,
		.end = p->data + p->linear,
		.len = p->len,
	};
	__u32 outer, link;

	bpf_probe_read_kernel(tunnel.local, sizeof(tunnel.local),
			      BPF_CORE_READ(dev, dev_addr));
	bpf_probe_read_kernel(tunnel.remote, sizeof(tunnel.remote),
			      dev->broadcast);
	outer = np_outer_len(&frame, &tunnel, &link);
	p->data += outer;
	p->linear -= outer;
	p->len -= outer;
}

/* `xdp`: as the program has it; the verifier knows its type. */
static __always_inline void xdp_read(struct xdp_buff *xdp, struct xdp_packet *p)
{
	p->data = xdp->data;
	p->dev = xdp->rxq->dev;
	p->head = (__u64)xdp->data_hard_start;
	p->linear = (__u64)xdp->data_end - (__u64)xdp->data;
	p->len = has_buff_len ? bpf_xdp_get_buff_len((void *)xdp) : p->linear;
	p->ethernet = xdp->rxq->dev->type == NP_ARPHRD_ETHER ||
		      xdp->rxq->dev->type == NP_ARPHRD_LOOPBACK;
	if (!p->ethernet)
		xdp_skip_outer(p);
	p->l3 = p->ethernet ? xdp_l3(p->data, &p->protocol)
			    : xdp_bare(p->data, &p->protocol);
}

static __always_inline bool match_xdp(const struct np_config *cfg,
				      struct xdp_buff *xdp,
				      const struct xdp_packet *p)
{
	/* A local: BPF_CORE_READ takes every struct on its way for a kernel's. */
	struct net_device *dev = p->dev;
	__u32 f = cfg->fields;
	struct np_filter_fields fields = {
		.skb = (__u64)xdp,
		.head = (__u64)p->data,
		.tail = p->linear,
		.data_len = p->len - p->linear,
		.no_link = !p->ethernet,
	};

	/* It has no mark as yet. */
	if ((f & NP_FIELD_MARK) && cfg->mark)
		return false;
	if ((f & NP_FIELD_IFINDEX) &&
	    BPF_CORE_READ(dev, ifindex) != cfg->ifindex)
		return false;
	if ((f & NP_FIELD_NETNS) &&
	    BPF_CORE_READ(dev, nd_net.net, ns.inum) != cfg->netns)
		return false;
	return np_filter_fields(&fields);
}

/* The identity of an XDP packet, as track_packet() for an sk_buff. */
static __always_inline __u64 track_xdp(__u32 program, struct xdp_buff *xdp,
				       const struct xdp_packet *p, bool matched)
{
	struct xdp_link *link = xdp_link_get();
	__u64 addr, packet = 0;
	struct sk_buff *skb;

	if (!link)
		return 0;
	/* A dispatcher calls other programs. */
	if (link->buff == (__u64)xdp)
		return link->buff_packet;
	addr = xdp_skb_of(p->head);
	skb = NP_CAST(sk_buff, addr);
	if (addr)
		packet = track_find(skb);
	if (!packet && matched) {
		packet = track_number();
		if (packet && addr)
			track_set(skb, packet, false);
	}
	if (packet) {
		link->buff = (__u64)xdp;
		link->buff_packet = packet;
		link->program = program;
	}
	return packet;
}

static __always_inline void write_xdp(void *ctx, struct xdp_buff *xdp,
				      const struct xdp_packet *p,
				      const struct np_tuple *tuple,
				      const struct hit *hit)
{
	struct net_device *dev = p->dev;
	struct skb_scratch *buf;
	__u64 len = sizeof(struct skb_event);
	__u32 zero = 0;

	buf = bpf_map_lookup_elem(&scratch, &zero);
	if (!buf)
		return;
	event_begin(buf, (__u64)xdp, hit);
	if (sections & SKB_SECTION_META) {
		struct skb_meta *m = (struct skb_meta *)&buf->bytes[len];

		__builtin_memset(m, 0, sizeof(*m));
		m->netns = BPF_CORE_READ(dev, nd_net.net, ns.inum);
		m->ifindex = BPF_CORE_READ(dev, ifindex);
		m->mtu = BPF_CORE_READ(dev, mtu);
		m->len = p->len;
		m->protocol = p->protocol;
		bpf_probe_read_kernel(m->ifname, sizeof(m->ifname), dev->name);
		len += sizeof(*m);
	}
	len = event_tuple(buf, len, tuple, hit);
	if (sections & SKB_SECTION_TUNNEL) {
		read_tunnel(p->l3, tuple, (struct np_tuple *)&buf->bytes[len]);
		len += sizeof(struct np_tuple);
	}
	if (sections & SKB_SECTION_DATA) {
		struct skb_data *d = (struct skb_data *)&buf->bytes[len];

		d->len = p->len;
		d->ethernet = p->ethernet;
		d->hatype = BPF_CORE_READ(dev, type);
		d->vlan = 0;
		d->vlan_type = 0;
		read_bytes(d, p->data, p->linear);
		len += sizeof(*d) + snap_len;
	}
	if (sections & SKB_SECTION_MEMBERS) {
		np_read_members(xdp, (struct np_members *)&buf->bytes[len]);
		len += sizeof(struct np_members);
	}
	event_end(ctx, buf, len, hit);
}

static __always_inline void enter_xdp(void *ctx, struct xdp_buff *xdp)
{
	const struct np_config *cfg = np_config_get();
	struct hit hit = {.kind = SKB_KIND_ENTER, .func = program_id()};
	struct np_tuple tuple = {};
	struct xdp_packet p;
	bool matched;

	if (cfg->fields & NP_PAUSED)
		return;
	xdp_read(xdp, &p);
	matched = match_xdp(cfg, xdp, &p);
	if (!matched && !track)
		return;
	if (wants_tuple(cfg) && p.l3)
		np_read_l3(p.l3, &tuple);
	if (matched && (cfg->fields & NP_FIELDS_PACKET))
		matched = match_tuple(cfg, &tuple);
	if (track) {
		hit.packet = track_xdp(hit.func, xdp, &p, matched);
		matched = matched || hit.packet;
	}
	if (!matched)
		return;
	running_begin(ctx, (__u64)xdp, hit.func, hit.packet);
	write_xdp(ctx, xdp, &p, &tuple, &hit);
}

static __always_inline void leave_xdp(void *ctx, struct xdp_buff *xdp,
				      int verdict)
{
	const struct np_config *cfg = np_config_get();
	struct xdp_link *link = xdp_link_get();
	struct hit hit = {.kind = SKB_KIND_LEAVE,
			  .func = program_id(),
			  .reason = verdict};
	struct np_tuple tuple = {};
	struct xdp_packet p;

	if (!running_end(ctx, (__u64)xdp, hit.func, &hit.packet) ||
	    (cfg->fields & NP_PAUSED))
		return;
	xdp_read(xdp, &p);
	if (wants_tuple(cfg) && p.l3)
		np_read_l3(p.l3, &tuple);
	if (track && link && link->program == hit.func) {
		link->buff = 0;
		link->head = p.head;
		link->packet = verdict == NP_XDP_PASS ? hit.packet : 0;
	}
	write_xdp(ctx, xdp, &p, &tuple, &hit);
}

SEC("fentry/tc")
int BPF_PROG(tc_enter, struct sk_buff *ptr)
{
	watching_set(1);
	enter_tc(ctx, ptr);
	watching_set(0);
	return 0;
}

SEC("fexit/tc")
int BPF_PROG(tc_leave, struct sk_buff *ptr, int verdict)
{
	watching_set(1);
	leave_tc(ctx, ptr, verdict);
	watching_set(0);
	return 0;
}

SEC("fentry/xdp")
int BPF_PROG(xdp_enter, struct xdp_buff *xdp)
{
	watching_set(1);
	enter_xdp(ctx, xdp);
	watching_set(0);
	return 0;
}

SEC("fexit/xdp")
int BPF_PROG(xdp_leave, struct xdp_buff *xdp, int verdict)
{
	watching_set(1);
	leave_xdp(ctx, xdp, verdict);
	watching_set(0);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
