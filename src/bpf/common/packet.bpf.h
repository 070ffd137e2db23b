/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The headers of the packet in an sk_buff: addresses, ports, protocol. Needs
 * compat.bpf.h and packet.h before it.
 */
#ifndef NETPROBE_PACKET_BPF_H
#define NETPROBE_PACKET_BPF_H

#include "common/headers.bpf.h"

#define NP_IPV6_EXTENSIONS 6 /* extension headers followed at most */
#define NP_FRAGMENT_OFFSET 0x1fff

/*
 * The functions here have `use_cast` as a parameter, which hides the variable of
 * compat.bpf.h: a caller that has it as a constant (a parameter or variable of
 * its own) gets code without a question, any other asks at each load (2
 * instructions).
 */
#define np_read_l4(l4, t) np_read_l4_by(l4, t, use_cast)
#define np_read_v4(l3, first, t) np_read_v4_by(l3, first, t, use_cast)
#define np_read_v6(l3, t) np_read_v6_by(l3, t, use_cast)
#define np_read_l3(l3, t) np_read_l3_by(l3, t, use_cast)
#define np_read_tuple(skb, t) np_read_tuple_by(skb, t, use_cast)
#define np_read_netns(skb, sk) np_read_netns_by(skb, sk, use_cast)

/* Offset 0 of `mapped` is 10 zero bytes and ff ff: IPv4 in IPv6 form. */
static __always_inline void np_map_v4(__u64 *to, __be32 addr)
{
	to[0] = 0;
	to[1] = ((__u64)addr << 32) | bpf_htonl(0xffff);
}

/* What the first 14 bytes above IP say: ports, TCP flags or ICMP type and code. */
static __always_inline void np_take_l4(struct np_tuple *t, __u16 first,
				       __u16 second, __u8 flags)
{
	switch (t->l4_proto) {
	case IPPROTO_TCP:
		t->tcp_flags = flags;
		/* fall through */
	case IPPROTO_UDP:
	case IPPROTO_SCTP:
	case 136: /* UDP-Lite, RFC 3828 */
		t->sport = bpf_ntohs(first);
		t->dport = bpf_ntohs(second);
		break;
	case IPPROTO_ICMP:
	case 58: /* ICMPv6 */
		t->icmp_type = (__u8)first;
		t->icmp_code = first >> 8;
		break;
	}
}

static __always_inline void np_read_l4_by(const __u8 *l4, struct np_tuple *t,
					  const bool use_cast)
{
	__u16 words[7] = {};

	if (use_cast) {
		/* Typed loads: 3 in place of a helper call of some 100 instructions. */
		const __u8 *bytes = NP_CAST_BYTES(l4);
		const struct udphdr *udp = (const void *)bytes;
		__u16 flags = 0;

		if (t->l4_proto == IPPROTO_TCP)
			flags = *(const __u16 *)(bytes + 12);
		np_take_l4(t, udp->source, udp->dest, flags >> 8);
		return;
	}
	if (bpf_probe_read_kernel(words, sizeof(words), l4) < 0 &&
	    bpf_probe_read_kernel(words, 4, l4) < 0)
		return;
	np_take_l4(t, words[0], words[1], words[6] >> 8);
}

/* `first`: the header's first byte. */
static __always_inline void np_read_v4_by(const __u8 *l3, __u8 first,
					  struct np_tuple *t,
					  const bool use_cast)
{
	__u8 words = first & 0xf;
	__be16 frag_off;
	struct iphdr ip;

	if (words < 5)
		return;
	if (use_cast) {
		const struct iphdr *typed = NP_CAST_BYTES(l3);

		if (words > 5 && np_is_route_answer(typed))
			return;
		t->l4_proto = typed->protocol;
		frag_off = typed->frag_off;
		np_map_v4(t->saddr, typed->saddr);
		np_map_v4(t->daddr, typed->daddr);
	} else {
		if (bpf_probe_read_kernel(&ip, sizeof(ip), l3) < 0 ||
		    (words > 5 && np_is_route_answer(&ip)))
			return;
		t->l4_proto = ip.protocol;
		frag_off = ip.frag_off;
		np_map_v4(t->saddr, ip.saddr);
		np_map_v4(t->daddr, ip.daddr);
	}
	t->l3_version = 4;
	if (frag_off & bpf_htons(NP_FRAGMENT_OFFSET))
		t->fragment = 1;
	else
		np_read_l4(l3 + words * 4, t);
}

static __always_inline bool np_is_v6_extension(__u8 proto)
{
	return proto == 0 || proto == 43 || proto == 44 || proto == 51 ||
	       proto == 60;
}

/*
 * A packet's upper layer behind its extension headers: how far behind `next`
 * (16 bits), its protocol (8 bits), and whether it is a later fragment.
 */
static __always_inline __u32 np_v6_walk_on(const __u8 *next, __u8 proto)
{
	__u8 fragment = 0, ext[4];
	__u16 far = 0;

	for (int i = 0; i < NP_IPV6_EXTENSIONS && !fragment; i++) {
		if (!np_is_v6_extension(proto) ||
		    bpf_probe_read_kernel(ext, sizeof(ext), next + far) < 0)
			break;
		if (proto ==
		    44) { /* fragment: 8 bytes, offset in bytes 2 and 3 */
			if (((__u16)ext[2] << 8 | ext[3]) & 0xfff8)
				fragment = 1;
			far += 8;
		} else if (proto == 51) { /* authentication: in units of 4 */
			far += (ext[1] + 2) * 4;
		} else {
			far += (ext[1] + 1) * 8;
		}
		proto = ext[0];
	}
	return far | (__u32)proto << 16 | (__u32)fragment << 24;
}

#ifdef NP_V6_WALK_APART
/* The same, read by the verifier once, and not for each of the ways that lead here and on. */
__noinline __u32 np_v6_walk_apart(__u64 next, __u32 proto)
{
	return np_v6_walk_on((const __u8 *)next, proto);
}

static __always_inline __u32 np_v6_walk(const __u8 *next, __u8 proto)
{
	__u64 plain = 0;

	if (!np_is_v6_extension(proto))
		return (__u32)proto << 16;
	/* A number, where newest kernels have a pointer. */
	bpf_probe_read_kernel(&plain, sizeof(plain), &next);
	return np_v6_walk_apart(plain, proto);
}
#else
#define np_v6_walk(next, proto) np_v6_walk_on(next, proto)
#endif

/* Follows extension headers (RFC 8200 section 4) to the upper layer. */
static __always_inline void np_read_v6_by(const __u8 *l3, struct np_tuple *t,
					  const bool use_cast)
{
	struct ipv6hdr ip;
	const __u8 *next = l3 + sizeof(ip);
	__u32 walk;
	__u8 proto;

	if (bpf_probe_read_kernel(&ip, sizeof(ip), l3) < 0)
		return;
	t->l3_version = 6;
	__builtin_memcpy(t->saddr, &ip.saddr, 16);
	__builtin_memcpy(t->daddr, &ip.daddr, 16);
	walk = np_v6_walk(next, ip.nexthdr);
	proto = walk >> 16;
	t->fragment = walk >> 24;
	next += (__u16)walk;
	t->l4_proto = proto;
	if (!t->fragment)
		np_read_l4(next, t);
}

/*
 * Fills the tuple (zeroed by the caller) from a network header. l3_version
 * stays 0 where there is no IP.
 */
static __always_inline void np_read_l3_by(const __u8 *l3, struct np_tuple *t,
					  const bool use_cast)
{
	__u8 first = 0;

	if (use_cast)
		first = *(const __u8 *)NP_CAST_BYTES(l3);
	else
		bpf_probe_read_kernel(&first, 1, l3);
	if (first >> 4 == 4)
		np_read_v4(l3, first, t);
	else if (first >> 4 == 6)
		np_read_v6(l3, t);
}

static __always_inline void
np_read_tuple_by(struct sk_buff *skb, struct np_tuple *t, const bool use_cast)
{
	__be16 said;
	const __u8 *l3 = np_l3_typed_by(skb, &said, use_cast);

	if (!l3)
		return;
	np_read_l3(l3, t);
	if (!np_version_fits(said, t->l3_version))
		t->l3_version = 0;
}

/* Of the device of its route; 0 where it has none. */
static __noinline __attribute__((unused)) __u64
np_netns_of_route(struct sk_buff *skb)
{
	struct net_device *dev;
	struct dst_entry *dst;
	struct net *net;
	/* Bit 0 of the pointer: no reference was taken (SKB_DST_NOREF). */
	unsigned long ref = NP_READ(skb, _skb_refdst) & ~1UL;

	if (!np_is_pointer((void *)ref))
		return 0;
	dst = NP_CAST(dst_entry, ref);
	dev = NP_READ(dst, dev);
	if (!np_is_pointer(dev))
		return 0;
	net = NP_READ(dev, nd_net.net);
	return net ? NP_READ(net, ns.inum) : 0;
}

/* So it is in every kernel's sk_buff; a constant when it is loaded. */
#define NP_SK_BEHIND_DEV                                       \
	(bpf_core_field_offset(struct sk_buff, sk) -           \
		 bpf_core_field_offset(struct sk_buff, dev) == \
	 sizeof(void *))

/*
 * Inode of the network namespace: of the socket that the function has beside the
 * skb (`sk`, may be NULL), else of the device, else of the skb's own socket, else
 * of the device of its route (TCP takes skb->dev away on reception); 0 where it
 * is not known.
 */
static __always_inline __u32 np_read_netns_by(struct sk_buff *skb,
					      struct sock *sk,
					      const bool use_cast)
{
	struct net_device *dev;
	struct net *net = NULL;
	void *both[2];

	if (sk) {
		net = NP_READ(sk, __sk_common.skc_net.net);
		return net ? NP_READ(net, ns.inum) : 0;
	}
	if (!use_cast && NP_SK_BEHIND_DEV) {
		/* One call of some 80 instructions in place of two. */
		bpf_probe_read_kernel(both, sizeof(both), &skb->dev);
		dev = both[0];
		sk = both[1];
	} else {
		dev = NP_READ(skb, dev);
	}
	/*
	 * skb->dev shares its place with dev_scratch (UDP): not a pointer then, and a
	 * load through it would fault, which costs as much as fifty loads.
	 */
	if (np_is_pointer(dev))
		net = NP_READ(dev, nd_net.net);
	if (!net) {
		if (use_cast || !NP_SK_BEHIND_DEV)
			sk = NP_READ(skb, sk);
		if (!sk)
			return np_netns_of_route(skb);
		net = NP_READ(sk, __sk_common.skc_net.net);
	}
	return net ? NP_READ(net, ns.inum) : 0;
}

#endif
