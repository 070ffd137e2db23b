/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What the writers of an event's sections have to read from. */
#ifndef NETPROBE_SKB_SOURCE_BPF_H
#define NETPROBE_SKB_SOURCE_BPF_H

#include "skb/skb.h"

/* What a hit is, beside the skb. */
struct hit {
	__u64 func;
	__u64 caller;
	__u64 unseen_caller; /* what the stack lacks behind its first frame, or 0 */
	__u64 packet; /* identity, where tracking is on */
	struct sock *sk; /* the function's own, or NULL */
	const struct skb_drop *drop; /* with SKB_SECTION_DROP */
	__u32 reason;
	__u16 kind;
};

/* What the writer of a section has. */
struct skb_source {
	struct sk_buff *skb;
	const struct np_tuple *tuple;
	const struct hit *hit;
};

static __always_inline __u64 write_word(void *to, __u64 word)
{
	*(__u64 *)to = word;
	return sizeof(word);
}

#endif
