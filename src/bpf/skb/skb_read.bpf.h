/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * netprobe skb: settings, and what is read of an sk_buff, its device and the
 * registers of a probe. Included by skb_event.bpf.h.
 */
#ifndef NETPROBE_SKB_READ_BPF_H
#define NETPROBE_SKB_READ_BPF_H

/* SKB_SECTION_* to write. */
const volatile __u32 sections = 0;
/* bpf_get_func_ip exists (kernels from 5.15). */
const volatile __u8 has_func_ip = 0;
/* enum skb_drop_reason exists (kernels from 5.17). */
const volatile __u8 has_reasons = 0;

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

/* Any memory by typed loads of any width, see np_filter_by_cast(): what lies at `p` is at NP_BYTES_LEAD. */
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

#endif
