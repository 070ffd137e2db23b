/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Finds the ICMP header of an skb, at each place where the programs of
 * icmp.bpf.c meet one. Needs compat.bpf.h, packet.bpf.h and icmp.h before it.
 */
#ifndef NETPROBE_ICMP_PACKET_BPF_H
#define NETPROBE_ICMP_PACKET_BPF_H

#define ECHO_NONE 0
#define ECHO_REQUEST 1
#define ECHO_REPLY 2

#ifndef ETH_P_IP
#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd
#define ETH_P_8021Q 0x8100
#define ETH_P_8021AD 0x88a8
#endif
#ifndef PF_KTHREAD
#define PF_KTHREAD 0x00200000
#endif
#define NP_PACKET_HOST 0 /* PACKET_HOST, linux/if_packet.h */
#define NP_ICMPV6 58
#define NP_IPV6_FRAGMENT 44

/* Type, id and sequence of the ICMP header at `l4`. */
static __always_inline bool read_icmp(const void *l4, struct icmp_key *key,
				      __u8 *type)
{
	__u8 h[8];

	if (bpf_probe_read_kernel(h, sizeof(h), l4) < 0)
		return false;
	*type = h[0];
	key->id = (__u16)h[4] << 8 | h[5];
	key->seq = (__u16)h[6] << 8 | h[7];
	return true;
}

/* The key of a reply is that of its request. */
static __always_inline int turn(struct icmp_key *key, bool reply)
{
	if (reply) {
		__u64 a = key->saddr[0], b = key->saddr[1];

		key->saddr[0] = key->daddr[0];
		key->saddr[1] = key->daddr[1];
		key->daddr[0] = a;
		key->daddr[1] = b;
		return ECHO_REPLY;
	}
	return ECHO_REQUEST;
}

static __always_inline int read_v4_echo(const void *l3, struct icmp_key *key)
{
	struct iphdr *peek = NP_CAST_BYTES(l3);
	struct iphdr ip;
	__u8 type;

	if (NP_READ(peek, protocol) != IPPROTO_ICMP)
		return ECHO_NONE;
	if (bpf_probe_read_kernel(&ip, sizeof(ip), l3) < 0 || ip.ihl < 5 ||
	    (ip.frag_off & bpf_htons(NP_FRAGMENT_OFFSET)))
		return ECHO_NONE;
	if (!read_icmp(l3 + ip.ihl * 4, key, &type) || (type != 8 && type != 0))
		return ECHO_NONE;
	key->version = 4;
	np_map_v4(key->saddr, ip.saddr);
	np_map_v4(key->daddr, ip.daddr);
	return turn(key, type == 0);
}

/* Follows a fragment header, and no other extension. */
static __always_inline int read_v6_echo(const void *l3, struct icmp_key *key)
{
	struct ipv6hdr *peek = NP_CAST_BYTES(l3);
	__u8 next = NP_READ(peek, nexthdr);
	const void *l4 = l3 + sizeof(struct ipv6hdr);
	struct ipv6hdr ip;
	__u8 type, ext[4];

	if (next != NP_ICMPV6 && next != NP_IPV6_FRAGMENT)
		return ECHO_NONE;
	if (next == NP_IPV6_FRAGMENT) {
		if (bpf_probe_read_kernel(ext, sizeof(ext), l4) < 0 ||
		    ext[0] != NP_ICMPV6 ||
		    (((__u16)ext[2] << 8 | ext[3]) & 0xfff8))
			return ECHO_NONE;
		l4 += 8;
	}
	if (!read_icmp(l4, key, &type) || (type != 128 && type != 129))
		return ECHO_NONE;
	if (bpf_probe_read_kernel(&ip, sizeof(ip), l3) < 0)
		return ECHO_NONE;
	key->version = 6;
	__builtin_memcpy(key->saddr, &ip.saddr, 16);
	__builtin_memcpy(key->daddr, &ip.daddr, 16);
	return turn(key, type == 129);
}

/* ECHO_*, from the IP header at `l3`; `proto` is its EtherType. */
static __always_inline int read_echo(const void *l3, __u16 proto,
				     struct icmp_key *key)
{
	if (proto == bpf_htons(ETH_P_IP))
		return read_v4_echo(l3, key);
	if (proto == bpf_htons(ETH_P_IPV6))
		return read_v6_echo(l3, key);
	return ECHO_NONE;
}

/*
 * May this be an echo? Typed loads only, before anything else: this is what all
 * other packets cost. A tag, or a kernel without typed loads: it may.
 */
static __always_inline bool may_echo(const void *l3, __u16 proto)
{
	const struct ipv6hdr *ip6;
	const struct iphdr *ip4;

	switch (proto) {
	case bpf_htons(ETH_P_IP):
		ip4 = NP_CAST_BYTES(l3);
		return ip4->protocol == IPPROTO_ICMP;
	case bpf_htons(ETH_P_IPV6):
		ip6 = NP_CAST_BYTES(l3);
		return ip6->nexthdr == NP_ICMPV6 ||
		       ip6->nexthdr == NP_IPV6_FRAGMENT;
	}
	return proto == bpf_htons(ETH_P_8021Q) ||
	       proto == bpf_htons(ETH_P_8021AD);
}

/* The sk_buff at this address, as read_received() has it */
static __always_inline bool may_echo_received(const void *address)
{
	const struct sk_buff *skb;

	if (!use_cast)
		return true;
	skb = NP_TYPED(sk_buff, address);
	return may_echo(skb->data, skb->protocol);
}

/* As read_sent() has it */
static __always_inline bool may_echo_sent(const void *address)
{
	const struct sk_buff *skb;

	if (!use_cast)
		return true;
	skb = NP_TYPED(sk_buff, address);
	return may_echo(skb->head + skb->network_header, skb->protocol);
}

/* Received, before the stack has set the network header: data is at it. */
static __always_inline int read_received(struct sk_buff *skb,
					 struct icmp_key *key)
{
	__u16 proto = NP_READ(skb, protocol);
	const void *l3 = NP_READ(skb, data);
	int echo;

	if (proto == bpf_htons(ETH_P_8021Q) ||
	    proto == bpf_htons(ETH_P_8021AD)) {
		/* The tag is still in the packet: the inner type follows it. */
		if (bpf_probe_read_kernel(&proto, sizeof(proto), l3 + 2) < 0)
			return ECHO_NONE;
		l3 += 4;
	}
	echo = read_echo(l3, proto, key);
	if (echo)
		key->netns = np_read_netns(skb, NULL);
	return echo;
}

/* Sent, or anywhere else where the network header is set. */
static __always_inline int read_sent(struct sk_buff *skb, struct icmp_key *key)
{
	__u16 proto = NP_READ(skb, protocol);
	const void *l3;
	int echo;

	if (proto != bpf_htons(ETH_P_IP) && proto != bpf_htons(ETH_P_IPV6))
		return ECHO_NONE;
	l3 = NP_READ(skb, head) + NP_READ(skb, network_header);
	echo = read_echo(l3, proto, key);
	if (echo)
		key->netns = np_read_netns(skb, NULL);
	return echo;
}

/* A request that is handled: both headers are set, its type is not asked. */
static __always_inline bool read_handled(struct sk_buff *skb, __u8 version,
					 struct icmp_key *key, __u8 *type)
{
	const void *head = NP_READ(skb, head);
	const void *l3 = head + NP_READ(skb, network_header);

	if (!read_icmp(head + NP_READ(skb, transport_header), key, type))
		return false;
	key->version = version;
	key->netns = np_read_netns(skb, NULL);
	if (version == 4) {
		struct iphdr ip;

		if (bpf_probe_read_kernel(&ip, sizeof(ip), l3) < 0)
			return false;
		np_map_v4(key->saddr, ip.saddr);
		np_map_v4(key->daddr, ip.daddr);
	} else {
		struct ipv6hdr ip;

		/* icmpv6_rcv, probed in place of icmpv6_echo_reply, sees all. */
		if (*type != 128 && *type != 160)
			return false;
		if (bpf_probe_read_kernel(&ip, sizeof(ip), l3) < 0)
			return false;
		__builtin_memcpy(key->saddr, &ip.saddr, 16);
		__builtin_memcpy(key->daddr, &ip.daddr, 16);
	}
	return true;
}

/* Bytes of the IP packet: what follows the network header. */
static __always_inline __u32 l3_len(struct sk_buff *skb)
{
	__u64 l3 = (__u64)NP_READ(skb, head) + NP_READ(skb, network_header);

	return NP_READ(skb, len) + (__u32)((__u64)NP_READ(skb, data) - l3);
}

#endif
