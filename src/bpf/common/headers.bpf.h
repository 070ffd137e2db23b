/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Which headers the packet in an sk_buff has, as far as the kernel has set them
 * at this point: an Ethernet header, an IP header, a VLAN tag beside the packet.
 * What lies in an sk_buff may be no packet at all: netlink messages, those of
 * AF_UNIX. Bytes alone never tell. Needs vmlinux.h, bpf_helpers.h and
 * bpf_core_read.h before it.
 */
#ifndef NETPROBE_HEADERS_BPF_H
#define NETPROBE_HEADERS_BPF_H

#include <bpf/bpf_endian.h>

#include "common/compat.bpf.h"
#include "common/ethertypes.bpf.h"

#define NP_HEADER_UNSET 0xffff /* a header's offset that is not set */
#define NP_TYPE_VLAN 0x8100
#define NP_TYPE_QINQ 0x88a8
#define NP_TYPE_BRIDGED 0x6558 /* an Ethernet frame inside a tunnel */
#define NP_IPV4_PLAIN \
	0x45 /* the first byte of an IPv4 header without options */
#define NP_RTM_NEWROUTE 24 /* include/uapi/linux/rtnetlink.h */
#define NP_AF_INET 2
#define NP_AF_INET6 10

/*
 * Is there an Ethernet header, with up to two tags, between these offsets? Where
 * tunnels have taken a packet out, the link header may be the outer IP header.
 */
static __always_inline bool np_is_ethernet(__u16 mac, __u16 network)
{
	__u32 len = (__u32)network - mac;

	return mac != NP_HEADER_UNSET && (len == 14 || len == 18 || len == 22);
}

static __always_inline bool np_is_set(__u16 offset)
{
	return offset && offset != NP_HEADER_UNSET;
}

static __always_inline bool np_is_vlan_type(__be16 type)
{
	return type == bpf_htons(NP_TYPE_VLAN) ||
	       type == bpf_htons(NP_TYPE_QINQ);
}

static __always_inline bool np_is_ip_type(__be16 type)
{
	return type == bpf_htons(NP_TYPE_IPV4) ||
	       type == bpf_htons(NP_TYPE_IPV6);
}

/* The IP header behind an Ethernet header with up to two tags; 0: none. */
static __always_inline __u64 np_behind_tags(__u64 ethernet)
{
	__be16 type = 0;
	__u64 at = ethernet + 12;

	for (int i = 0; i < 3; i++) {
		if (bpf_probe_read_kernel(&type, sizeof(type), (void *)at))
			return 0;
		at += sizeof(type);
		if (!np_is_vlan_type(type))
			break;
		at += 2;
	}
	return np_is_ip_type(type) ? at : 0;
}

/*
 * The address of the IP header where skb->protocol (`type`) says no IP; 0: there is
 * none. Before ip_local_out() it is 0, and the socket says what the network
 * header is. In a tunnel it may be what the tunnel carries.
 */
static __noinline __u64 np_l3_unsaid(const struct sk_buff *skb, __u32 type)
{
	__u16 offset = BPF_CORE_READ(skb, network_header), mac, family;
	__u64 head = (__u64)BPF_CORE_READ(skb, head);
	struct sock *sk;

	if (np_is_vlan_type(type)) {
		mac = BPF_CORE_READ(skb, mac_header);
		return mac == NP_HEADER_UNSET ? 0 : np_behind_tags(head + mac);
	}
	if (!np_is_set(offset))
		return 0;
	if (type == bpf_htons(NP_TYPE_BRIDGED))
		return head + offset;
	sk = BPF_CORE_READ(skb, sk);
	if (type || !np_is_pointer(sk))
		return 0;
	family = BPF_CORE_READ(sk, __sk_common.skc_family);
	return family == NP_AF_INET || family == NP_AF_INET6 ? head + offset
							     : 0;
}

/* skb->protocol and the network header's offset lie within 8 bytes; constants when a program is loaded. */
#define NP_NETWORK_BEHIND_PROTOCOL                                \
	(bpf_core_field_offset(struct sk_buff, network_header) == \
	 bpf_core_field_offset(struct sk_buff, protocol) + 4)

/*
 * The IP header: the skb's network header, or its data where that is not set yet
 * (received, before __netif_receive_skb_core); NULL where there is none.
 */
static __always_inline const __u8 *
np_l3_typed_by(struct sk_buff *skb, __be16 *said, const bool use_cast)
{
	__u16 offset, words[4] = {};
	__be16 type;

	if (!use_cast && NP_NETWORK_BEHIND_PROTOCOL) {
		/* One call in place of two. */
		bpf_probe_read_kernel(words, sizeof(words), &skb->protocol);
		type = words[0];
		offset = words[2];
	} else {
		type = NP_READ(skb, protocol);
		offset = NP_READ(skb, network_header);
	}
	*said = type;
	if (!np_is_ip_type(type))
		return (const __u8 *)np_l3_unsaid(skb, type);
	if (np_is_set(offset))
		return NP_READ(skb, head) + offset;
	return NP_READ(skb, data);
}

/*
 * May a packet that the kernel says to be of this type have an IP header of this
 * version? An outer IPv4 header may lie before IPv6, whose type is still said. The
 * answer to a question for an IPv4 route is written into the sk_buff of the packet
 * that was made up for it: there is no IPv6 in it.
 */
static __always_inline bool np_version_fits(__be16 said, __u8 version)
{
	return version == 4 ||
	       (version == 6 && said != bpf_htons(NP_TYPE_IPV4));
}

/*
 * That answer, in the place of an IPv4 packet: a netlink message (RTM_NEWROUTE) of
 * 72 or 76 bytes begins as an IPv4 header with options does. An IPv4 header with
 * this number, no length and no type of service does not occur.
 */
static __always_inline bool np_is_route_answer(const struct iphdr *ip)
{
	return !ip->tos && !ip->tot_len && !ip->frag_off &&
	       ip->id == bpf_htons(NP_RTM_NEWROUTE << 8);
}

/* The IP header, if its version is what the kernel says. */
static __noinline __attribute__((unused)) __u64 np_l3_sound(struct sk_buff *skb)
{
	__be16 said;
	const __u8 *l3 = np_l3_typed_by(skb, &said, use_cast);
	struct iphdr ip = {};
	__u8 first = 0;

	if (!l3 || bpf_probe_read_kernel(&first, sizeof(first), l3))
		return 0;
	if (first >> 4 == 4 && first != NP_IPV4_PLAIN &&
	    !bpf_probe_read_kernel(&ip, sizeof(ip), l3) &&
	    np_is_route_answer(&ip))
		return 0;
	return np_version_fits(said, first >> 4) ? (__u64)l3 : 0;
}

/* skb->vlan_present as kernels before 6.2 have it, a bit field. */
struct sk_buff___vlan_present {
	__u8 vlan_present : 1;
} __attribute__((preserve_access_index));

/* A VLAN tag beside the packet: `proto` in network byte order, 0: there is none. */
struct np_tag {
	__u16 tci;
	__be16 proto;
};

/* What skb->vlan_proto and skb->vlan_tci say. Older kernels leave them as they were when they take the tag away. */
static __always_inline struct np_tag np_take_tag(struct sk_buff *skb,
						 __be16 proto, __u16 tci)
{
	const struct sk_buff___vlan_present *older = (const void *)skb;
	struct np_tag tag = {.proto = proto, .tci = tci}, none = {};

	if (proto && bpf_core_field_exists(older->vlan_present) &&
	    !BPF_CORE_READ_BITFIELD_PROBED(older, vlan_present))
		return none;
	return tag;
}

static __always_inline struct np_tag np_read_tag(struct sk_buff *skb,
						 const bool use_cast)
{
	__be16 proto = NP_READ(skb, vlan_proto);

	return np_take_tag(skb, proto, proto ? NP_READ(skb, vlan_tci) : 0);
}

/* What lies from skb->vlan_proto on: one read of memory for all that an event asks for. */
struct np_sk_buff_part {
	__u8 bytes[40];
};

#define NP_PART_AT(field)                               \
	(bpf_core_field_offset(struct sk_buff, field) - \
	 bpf_core_field_offset(struct sk_buff, vlan_proto))
#define NP_PART_HAS(field) \
	(NP_PART_AT(field) + 4 <= sizeof(struct np_sk_buff_part))
#define NP_PART(part, field, type) (*(type *)&(part)->bytes[NP_PART_AT(field)])
/* So it is in every kernel's sk_buff; a constant when it is loaded. */
#define NP_PART_HAS_ALL \
	(NP_PART_HAS(vlan_tci) && NP_PART_HAS(mark) && NP_PART_HAS(protocol))

#endif
