/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Sections of an event that are seldom asked for: the packet inside a tunnel,
 * whole kernel structs, the packet's bytes.
 *
 * Needs compat.bpf.h and packet.bpf.h before it.
 */
#ifndef NETPROBE_SKB_SECTIONS_BPF_H
#define NETPROBE_SKB_SECTIONS_BPF_H

#include "skb/skb.h"

/* Bytes of the packet in SKB_SECTION_DATA; a multiple of 8. */
const volatile __u32 snap_len = 0;

#define NP_IPPROTO_IPIP 4
#define NP_IPPROTO_IPV6 41
#define NP_IPPROTO_GRE 47
#define NP_ETH_IPV4 0x0800
#define NP_ETH_IPV6 0x86dd
#define NP_ETH_BRIDGED 0x6558 /* an Ethernet frame inside GRE or Geneve */
#define NP_ETH_LEN 14
#define NP_UDP_LEN 8
#define NP_VXLAN_LEN 8
#define NP_GENEVE_LEN 8
#define NP_NO_HEADER 0xffff /* a header's offset that is not set */

struct skb_copy skb_copy_type;
struct skb_data skb_data_type;

/* Behind an Ethernet header, where it holds IP. */
static __always_inline const __u8 *inner_ethernet(const __u8 *eth)
{
	__be16 type = 0;

	bpf_probe_read_kernel(&type, sizeof(type), eth + NP_ETH_LEN - 2);
	if (type == bpf_htons(NP_ETH_IPV4) || type == bpf_htons(NP_ETH_IPV6))
		return eth + NP_ETH_LEN;
	return NULL;
}

/* Where a payload of this EtherType begins its IP header; NULL: no IP. */
static __always_inline const __u8 *inner_payload(const __u8 *at, __u16 type)
{
	switch (type) {
	case NP_ETH_IPV4:
	case NP_ETH_IPV6:
		return at;
	case NP_ETH_BRIDGED:
		return inner_ethernet(at);
	}
	return NULL;
}

/* GRE, RFC 2890: four bytes, and four for each of checksum, key, sequence. */
static __always_inline const __u8 *inner_gre(const __u8 *gre)
{
	__u8 h[4] = {};
	__u32 len = 4;

	if (bpf_probe_read_kernel(h, sizeof(h), gre) < 0)
		return NULL;
	len += (h[0] & 0x80) ? 4 : 0;
	len += (h[0] & 0x20) ? 4 : 0;
	len += (h[0] & 0x10) ? 4 : 0;
	return inner_payload(gre + len, ((__u16)h[2] << 8) | h[3]);
}

/* Geneve, RFC 8926: eight bytes and options in units of four. */
static __always_inline const __u8 *inner_geneve(const __u8 *geneve)
{
	__u8 h[4] = {};

	if (bpf_probe_read_kernel(h, sizeof(h), geneve) < 0)
		return NULL;
	return inner_payload(geneve + NP_GENEVE_LEN + (h[0] & 0x3f) * 4,
			     ((__u16)h[2] << 8) | h[3]);
}

/*
 * The tuple of the packet inside `outer`, in VXLAN, Geneve, GRE, IPIP, SIT.
 * l3_version stays 0 where there is none.
 */
static __always_inline void read_tunnel(const __u8 *l3,
					const struct np_tuple *outer,
					struct np_tuple *inner)
{
	const __u8 *l4, *at = NULL;
	__u8 version = 0;

	__builtin_memset(inner, 0, sizeof(*inner));
	if (!outer->l3_version || outer->fragment)
		return;
	bpf_probe_read_kernel(&version, 1, l3);
	/* Behind IPv6 extension headers nothing is looked for. */
	l4 = l3 + (outer->l3_version == 4 ? (version & 0xf) * 4 : 40);
	switch (outer->l4_proto) {
	case IPPROTO_UDP:
		switch (outer->dport) {
		case 4789: /* VXLAN, RFC 7348 */
		case 8472: /* VXLAN, Linux's first port */
			at = inner_ethernet(l4 + NP_UDP_LEN + NP_VXLAN_LEN);
			break;
		case 6081: /* Geneve */
			at = inner_geneve(l4 + NP_UDP_LEN);
			break;
		}
		break;
	case NP_IPPROTO_IPIP:
	case NP_IPPROTO_IPV6:
		at = l4;
		break;
	case NP_IPPROTO_GRE:
		at = inner_gre(l4);
		break;
	}
	if (at)
		np_read_l3(at, inner);
}

/* A struct of `size` bytes, as much of it as there is room for. */
static __always_inline void read_copy(struct skb_copy *to, const void *from,
				      __u32 size)
{
	to->size = size;
	to->pad = 0;
	if (size > SKB_COPY_LEN)
		size = SKB_COPY_LEN;
	if (bpf_probe_read_kernel(to->bytes, size, from) < 0)
		to->size = 0;
}

/* The packet's first bytes, of which `linear` lie together. */
static __always_inline void read_bytes(struct skb_data *d, const __u8 *at,
				       __u32 linear)
{
	__u64 len = snap_len;

	if (linear < len)
		len = linear;
	/*
	 * The verifier must see the bounds on the very register that goes into
	 * the call, and for 6.1 a minimum of 1.
	 */
	asm volatile("" : "+r"(len));
	if (len < 1 || len > SKB_SNAP_MAX)
		len = 0;
	else if (bpf_probe_read_kernel(d + 1, len, at) < 0)
		len = 0;
	d->captured = len;
}

static __always_inline void read_data(struct sk_buff *skb, struct skb_data *d)
{
	__u16 mac = NP_READ(skb, mac_header),
	      net = NP_READ(skb, network_header);
	/*
	 * Not by a typed load: newest kernels know it for a pointer then, and
	 * allow no difference to a number.
	 */
	const __u8 *head = (const __u8 *)BPF_CORE_READ(skb, head), *at;
	struct np_tag tag = np_read_tag(skb, use_cast);
	struct net_device *dev = NP_READ(skb, dev);
	__u32 tail = NP_READ(skb, tail), nonlinear = NP_READ(skb, data_len);
	__u32 linear;

	d->ethernet = 0;
	d->hatype = 0;
	d->vlan = tag.tci;
	d->vlan_type = bpf_ntohs(tag.proto);
	if (np_is_ethernet(mac, net)) {
		at = head + mac;
		d->ethernet = 1;
	} else {
		/* Through the map, so that it is a number, as head is. */
		*(volatile __u64 *)d = np_l3_sound(skb);
		at = (const __u8 *)*(volatile __u64 *)d;
	}
	if (np_is_pointer(dev))
		d->hatype = BPF_CORE_READ(dev, type);
	/* Neither Ethernet nor IP: its length alone. */
	if (!at) {
		d->len = NP_READ(skb, len);
		d->captured = 0;
		return;
	}
	linear = head + tail > at ? head + tail - at : 0;
	d->len = linear + nonlinear;
	read_bytes(d, at, linear);
}

#endif
