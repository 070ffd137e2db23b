/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Does a filter hold for what a packet was before this machine translated its
 * addresses (NAT)? Its entry in the table of connections has both tuples: the one
 * with which packets of its direction arrive says what it was. A packet that has
 * given its entry back (at the look-up of a UDP socket) cannot be asked any more.
 *
 * Needs filter.bpf.h, packet.bpf.h, config.bpf.h and fields.bpf.h before it.
 */
#ifndef NETPROBE_TRANSLATED_BPF_H
#define NETPROBE_TRANSLATED_BPF_H

#include "common/ct.bpf.h"
#include "common/scratch.bpf.h"

/* There are filters that look at addresses or ports, and the kernel has the types. */
const volatile __u8 np_translations = 0;

#define NP_CT_REPLY \
	3 /* IP_CT_IS_REPLY: from here on the direction of replies */
#define NP_CT_RELATED 1 /* in each direction: the entry is of another packet */
#define NP_CT_UNTRACKED 7
#define NP_CT_TEMPLATE (1 << 11) /* IPS_TEMPLATE */

/* The forms that a packet may have had: from the outside, and between both translations. */
enum np_form {
	NP_FORM_ARRIVED = 0,
	NP_FORM_DESTINATION = 1, /* its destination was translated already */
	NP_FORMS = 2,
};

/* What a packet is, and what it was: too much for the BPF stack. */
struct np_two_forms {
	struct np_tuple now;
	struct np_tuple was;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, SCRATCH_COUNT);
	__type(key, __u32);
	__type(value, struct np_two_forms);
} np_two_forms SEC(".maps");

static __always_inline struct np_two_forms *np_forms_of(__u64 skb_ptr,
							__u32 scratch)
{
	struct np_two_forms *forms =
		bpf_map_lookup_elem(&np_two_forms, &scratch);

	if (!forms)
		return NULL;
	__builtin_memset(&forms->now, 0, sizeof(forms->now));
	np_read_tuple(NP_CAST(sk_buff, skb_ptr), &forms->now);
	return forms;
}

/* The entry that a packet belongs to; NULL: none that says what it was. */
static __always_inline const struct nf_conn *np_entry_of(struct sk_buff *skb,
							 __u32 *info)
{
	const struct nf_conn *ct;
	unsigned long nfct;
	__u32 users = 0;

	if (!bpf_core_field_exists(skb->_nfct))
		return NULL;
	nfct = BPF_CORE_READ(skb, _nfct);
	*info = nfct & NP_NFCT_INFO;
	ct = (const struct nf_conn *)(nfct & ~NP_NFCT_INFO);
	if (!ct || *info == NP_CT_UNTRACKED ||
	    *info % NP_CT_REPLY == NP_CT_RELATED)
		return NULL;
	/* An atomic_t up to 5.15, a refcount_t since. */
	if (bpf_core_read(&users, sizeof(users), &ct->ct_general.use) ||
	    !users || (BPF_CORE_READ(ct, status) & NP_CT_TEMPLATE))
		return NULL;
	return ct;
}

/* What the packet was; 0: nobody knows. */
static __noinline int np_read_form(__u64 skb_ptr, struct np_two_forms *forms,
				   __u32 form)
{
	const struct nf_conntrack_tuple *tuple;
	struct np_tuple *now, *was;
	const struct nf_conn *ct;
	__u32 info = 0;

	if (!forms)
		return 0;
	now = &forms->now;
	was = &forms->was;
	ct = np_entry_of((struct sk_buff *)skb_ptr, &info);
	if (!ct)
		return 0;
	if (info >= NP_CT_REPLY)
		tuple = __builtin_preserve_access_index(
			&ct->tuplehash[1].tuple);
	else
		tuple = __builtin_preserve_access_index(
			&ct->tuplehash[0].tuple);
	np_ct_tuple(was, tuple);
	if (was->l3_version != now->l3_version ||
	    was->l4_proto != now->l4_proto)
		return 0;
	was->tcp_flags = now->tcp_flags;
	was->icmp_type = now->icmp_type;
	was->icmp_code = now->icmp_code;
	was->fragment = now->fragment;
	/* Of ICMP the entry has the id in place of ports. */
	if (!now->sport && !now->dport) {
		was->sport = 0;
		was->dport = 0;
	}
	if (form == NP_FORM_DESTINATION) {
		was->daddr[0] = now->daddr[0];
		was->daddr[1] = now->daddr[1];
		was->dport = now->dport;
	}
	return 1;
}

/* This CPU's packet, from its IP header on, with these addresses and ports. */
static __always_inline void np_write_form(struct np_filter_packet *packet,
					  const struct np_tuple *was)
{
	__u8 *block = packet->block;
	__u32 l4;

	if (was->l3_version == 4) {
		*(__be32 *)(block + 12) = was->saddr[1] >> 32;
		*(__be32 *)(block + 16) = was->daddr[1] >> 32;
		l4 = (block[0] & 0xf) * 4;
	} else {
		__builtin_memcpy(block + 8, was->saddr, 16);
		__builtin_memcpy(block + 24, was->daddr, 16);
		/* Ports behind extension headers stay as they are. */
		l4 = block[6] == was->l4_proto ? 40 : 0;
	}
	if (l4 < 20 || l4 > 60 || (!was->sport && !was->dport))
		return;
	*(__be16 *)(block + l4) = bpf_htons(was->sport);
	*(__be16 *)(block + l4 + 2) = bpf_htons(was->dport);
}

/* The expression, if the packet had these addresses and ports. What asks for a link header or a tunnel is not asked again. */
static __always_inline bool np_filter_form(__u64 skb_ptr,
					   const struct np_tuple *was)
{
	struct np_filter_packet *packet = np_filter_packet_get();
	struct sk_buff *skb = NP_CAST(sk_buff, skb_ptr);
	__u64 l3, end, linear;

	if (!packet || (np_filter_on & (NP_FILTER_TUNNEL_L2 |
					NP_FILTER_TUNNEL_L3 | NP_FILTER_VLAN)))
		return 0;
	l3 = np_l3_sound(skb);
	end = (__u64)BPF_CORE_READ((struct sk_buff *)skb_ptr, head) +
	      NP_READ(skb, tail);
	if (!l3 || end <= l3)
		return 0;
	packet->skb = skb_ptr;
	packet->data = l3;
	packet->linear = end - l3;
	packet->len = packet->linear + NP_READ(skb, data_len);
	linear = np_filter_begin(packet, 0);
	np_write_form(packet, was);
	return np_filter_l3(packet->block, linear, 0, packet->len);
}

/* Do all filters that look at headers hold for one of the forms that the packet had? */
static __always_inline bool np_matched_before(__u64 skb_ptr,
					      struct np_two_forms *forms)
{
	const struct np_config *cfg = np_config_get();

	if ((np_filter_on & NP_FILTER_MEMBERS) && !np_filter_members(skb_ptr))
		return false;
	for (__u32 form = 0; form < NP_FORMS; form++) {
		if (!np_read_form(skb_ptr, forms, form))
			return false;
		if ((cfg->fields & NP_FIELDS_PACKET) &&
		    !match_tuple(cfg, &forms->was))
			continue;
		if (!(np_filter_on & NP_FILTER_READS) ||
		    np_filter_form(skb_ptr, &forms->was))
			return true;
	}
	return false;
}

#endif
