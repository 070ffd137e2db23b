/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * --output-ct: what skb->_nfct points to. Its lowest three bits say how the packet
 * belongs to the entry. A packet that is freed keeps the address after it has
 * given the entry back: the kernel counts who uses an entry, and one without
 * users may hold anything.
 *
 * Included by skb_event.bpf.h.
 */
#ifndef NETPROBE_SKB_CT_BPF_H
#define NETPROBE_SKB_CT_BPF_H

#include "common/ct.bpf.h"
#include "skb/skb_ct.h"
#include "skb/skb_source.bpf.h"

struct skb_ct skb_ct_type;
enum skb_ct_known skb_ct_known_type;
enum skb_ct_info skb_ct_info_type;
enum skb_ct_status skb_ct_status_type;
enum skb_ct_zone skb_ct_zone_type;

static __always_inline void ct_entry(struct skb_ct *to,
				     const struct nf_conn *ct)
{
	__u32 users = 0;

	/* An atomic_t up to 5.15, a refcount_t since. */
	if (bpf_core_read(&users, sizeof(users), &ct->ct_general.use))
		return;
	if (!users) {
		to->known |= SKB_CT_GONE;
		return;
	}
	to->known |= SKB_CT_ENTRY;
	to->status = BPF_CORE_READ(ct, status);
	if (bpf_core_field_exists(ct->mark)) {
		to->known |= SKB_CT_MARK;
		to->mark = BPF_CORE_READ(ct, mark);
	}
	if (bpf_core_field_exists(ct->zone)) {
		to->known |= SKB_CT_ZONE;
		to->zone = BPF_CORE_READ(ct, zone.id);
		to->zone_dir = BPF_CORE_READ(ct, zone.dir);
	}
	np_ct_tuple(&to->tuples[0],
		    __builtin_preserve_access_index(&ct->tuplehash[0].tuple));
	np_ct_tuple(&to->tuples[1],
		    __builtin_preserve_access_index(&ct->tuplehash[1].tuple));
}

static __always_inline __u64 write_ct(const struct skb_source *from, void *to)
{
	struct sk_buff *skb = from->skb;
	struct skb_ct *c = to;
	unsigned long nfct;

	__builtin_memset(c, 0, sizeof(*c));
	if (!bpf_core_field_exists(skb->_nfct))
		return sizeof(*c);
	nfct = NP_READ(skb, _nfct);
	if (!nfct)
		return sizeof(*c);
	c->known = SKB_CT_INFO;
	c->info = nfct & NP_NFCT_INFO;
	nfct &= ~NP_NFCT_INFO;
	if (nfct)
		ct_entry(c, (const struct nf_conn *)nfct);
	return sizeof(*c);
}

#endif
