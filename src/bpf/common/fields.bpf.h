/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The field filters (config.h) against a packet's tuple. Needs config.bpf.h and packet.h before it. */
#ifndef NETPROBE_FIELDS_BPF_H
#define NETPROBE_FIELDS_BPF_H

static __always_inline bool match_addr(const __u64 *addr, const __u64 *mask,
				       const __u64 *want)
{
	return (addr[0] & mask[0]) == want[0] && (addr[1] & mask[1]) == want[1];
}

static __always_inline bool match_tuple(const struct np_config *cfg,
					const struct np_tuple *t)
{
	__u32 f = cfg->fields;

	if (!t->l3_version)
		return false;
	if ((f & NP_FIELD_PROTO) && t->l4_proto != cfg->l4_proto)
		return false;
	if ((f & NP_FIELD_SADDR) &&
	    !match_addr(t->saddr, cfg->saddr_mask, cfg->saddr))
		return false;
	if ((f & NP_FIELD_DADDR) &&
	    !match_addr(t->daddr, cfg->daddr_mask, cfg->daddr))
		return false;
	if ((f & NP_FIELD_SPORT) && t->sport != cfg->sport)
		return false;
	if ((f & NP_FIELD_DPORT) && t->dport != cfg->dport)
		return false;
	return true;
}

#endif
