/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Which nft rule dropped a packet. nft_do_chain() tells the base chain, an
 * expression that gives a verdict its rule; what they say is noted for the free of
 * the packet, which follows on the same CPU. Each rule has a number, made of its
 * names and handle: rows have the number, user space reads the names.
 *
 * All that a packet costs which is not dropped: a probe at nft_do_chain, and one at
 * each expression that may give a verdict. Rules lie so from 5.17 on; BTF of modules.
 */
#ifndef NETPROBE_DROPS_NFT_BPF_H
#define NETPROBE_DROPS_NFT_BPF_H

#include "common/nft.bpf.h"
#include "common/stack.bpf.h"
#include "drops/drops_rules.bpf.h"

/* The programs of this file are attached. */
const volatile __u8 has_nft = 0;
/* SKB_DROP_REASON_NETFILTER_DROP */
const volatile __u32 nft_drop_reason = 0;

/* Packets of a CPU whose evaluations are within each other: a rule's answer, an interrupt. */
#define NFT_NOTES 16
#define NFT_CHAINS 256 /* of a table, looked at */

/* What nft has said of a packet. */
struct nft_note {
	__u64 skb;
	__u64 chain; /* the base chain; 0: a rule has accepted */
	__u32 rule; /* the number of the rule that drops; 0: none as yet */
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, NFT_NOTES);
	__type(key, __u32);
	__type(value, struct nft_note);
} nft_notes SEC(".maps");

/* What is known of an expression, or of a base chain with a policy: true as long as all of it is as it was. */
struct nft_known {
	__u64 chain;
	__u64 name; /* where the chain's name is */
	__u64 at; /* the header of the rule, and what is in it; 0: a policy */
	__u64 head;
	__u32 number;
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, __u64);
	__type(value, struct nft_known);
} nft_knowns SEC(".maps");

/* An expression that is being evaluated. */
struct nft_call_key {
	__u64 context; /* see track_context */
	__u64 func;
};

struct nft_call {
	__u64 expr;
	__u64 regs;
	__u64 skb;
	__u64 chain; /* the base chain; 0: not known */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct nft_call_key);
	__type(value, struct nft_call);
} nft_calls SEC(".maps");

static __always_inline struct nft_note *nft_note_place(__u64 skb)
{
	/* sk_buffs lie 256 bytes apart, or in pairs. */
	__u32 at = (skb >> 8) & (NFT_NOTES - 1);

	return bpf_map_lookup_elem(&nft_notes, &at);
}

/* The number of a rule, or of the policy of a base chain (handle 0); 0: there is none left. */
static __always_inline __u32 nft_number(__u64 chain, __u64 handle,
					__u32 scratch)
{
	struct drop_rule *rule = rule_new(scratch);

	if (!rule)
		return 0;
	rule->handle = handle;
	rule->family =
		nft_read_names(chain, rule->table, rule->chain, DROP_NAME_LEN);
	return rule_number(rule);
}

static __always_inline __u64 nft_name_of(__u64 chain)
{
	struct nft_chain___np *c = (void *)chain;

	return (__u64)BPF_CORE_READ(c, name);
}

/* The number of what is known, if it still is so. */
static __always_inline __u32 nft_still(const struct nft_known *known,
				       __u64 expr)
{
	__u64 head = 0;

	if (!known || nft_name_of(known->chain) != known->name ||
	    !bpf_map_lookup_elem(&rules_seen, &known->number))
		return 0;
	if (!known->at)
		return known->number;
	if (!nft_rules_of(known->chain, expr) ||
	    bpf_probe_read_kernel(&head, sizeof(head), (void *)known->at) ||
	    head != known->head)
		return 0;
	return known->number;
}

/* The chain of the base chain's table with this expression; 0: not found. */
__noinline __u64 nft_chain_with(__u64 base, __u64 expr)
{
	struct nft_chain___np *c = (void *)base;
	struct nft_table___np *table;
	__u64 list, at;

	if (!base)
		return 0;
	if (nft_rules_of(base, expr))
		return base;
	table = BPF_CORE_READ(c, table);
	list = (__u64)__builtin_preserve_access_index(&table->chains);
	at = list;
	for (int i = 0; i < NFT_CHAINS; i++) {
		__u64 chain;

		if (bpf_probe_read_kernel(&at, sizeof(at), (void *)at) || !at ||
		    at == list)
			return 0;
		chain = at - bpf_core_field_offset(struct nft_chain___np, list);
		if (nft_rules_of(chain, expr))
			return chain;
	}
	return 0;
}

/* The number of the rule with this expression; 0: not known. */
__noinline __u32 nft_rule_with(__u64 base, __u64 expr)
{
	struct nft_known known = {};
	__u32 number = nft_still(bpf_map_lookup_elem(&nft_knowns, &expr), expr);

	if (number)
		return number;
	known.chain = nft_chain_with(base, expr);
	if (!known.chain)
		return 0;
	known.at = nft_rule_head(nft_rules_of(known.chain, expr), expr);
	if (!known.at || bpf_probe_read_kernel(&known.head, sizeof(known.head),
					       (void *)known.at))
		return 0;
	known.name = nft_name_of(known.chain);
	known.number =
		nft_number(known.chain, nft_handle(known.at), SCRATCH_PROBE);
	if (known.number)
		bpf_map_update_elem(&nft_knowns, &expr, &known, BPF_ANY);
	return known.number;
}

/* The number of a base chain's policy, where it drops. */
__noinline __u32 nft_policy_of(__u64 chain)
{
	struct nft_known known = {.chain = chain};
	__u32 number;

	if (!chain || !nft_policy_drops(chain))
		return 0;
	number = nft_still(bpf_map_lookup_elem(&nft_knowns, &chain), chain);
	if (number)
		return number;
	known.name = nft_name_of(chain);
	known.number = nft_number(chain, 0, SCRATCH_TRACEPOINT);
	if (known.number)
		bpf_map_update_elem(&nft_knowns, &chain, &known, BPF_ANY);
	return known.number;
}

/* nft_do_chain(pkt, chain) */
SEC("kprobe/nft_enter")
int nft_enter(struct pt_regs *ctx)
{
	struct nft_pktinfo___np *pkt = (void *)PT_REGS_PARM1(ctx);
	__u64 skb = (__u64)BPF_CORE_READ(pkt, skb);
	struct nft_note *note = nft_note_place(skb);

	if (!note)
		return 0;
	note->skb = skb;
	note->chain = PT_REGS_PARM2(ctx);
	note->rule = 0;
	return 0;
}

/* A rule has ended the evaluation. `base`: the base chain, 0 where it is not known. */
static __always_inline void nft_ended(__u64 skb, __u64 base, __u64 expr,
				      __s32 code)
{
	struct nft_note *note = nft_note_place(skb);
	__u32 rule = 0;

	if (!note)
		return;
	if ((code & 0xff) != NF_DROP) {
		if (note->skb == skb)
			note->chain = 0;
		return;
	}
	if (!base && note->skb == skb)
		base = note->chain;
	rule = nft_rule_with(base, expr);
	note->skb = skb;
	note->chain = 0;
	note->rule = rule;
}

/* nft_immediate_eval(expr, regs, pkt) */
SEC("kprobe/nft_immediate")
int nft_immediate(struct pt_regs *ctx)
{
	struct nft_expr___np *expr = (void *)PT_REGS_PARM1(ctx);
	struct nft_immediate_expr___np *imm =
		(void *)__builtin_preserve_access_index(&expr->data);
	struct nft_pktinfo___np *pkt = (void *)PT_REGS_PARM3(ctx);
	__s32 code;

	if (BPF_CORE_READ(imm, dreg) != NFT_DREG_VERDICT)
		return 0;
	/* Below 0: the evaluation goes on. */
	code = (__s32)BPF_CORE_READ(imm, data.verdict.code);
	if (code >= 0)
		nft_ended((__u64)BPF_CORE_READ(pkt, skb), 0, (__u64)expr, code);
	return 0;
}

/* f(expr, regs, pkt), for expressions that may give a verdict */
SEC("kprobe/nft_eval")
int nft_eval(struct pt_regs *ctx)
{
	struct nft_pktinfo___np *pkt = (void *)PT_REGS_PARM3(ctx);
	struct nft_call_key key = {
		.context = track_context(regs_address(ctx)),
		.func = bpf_get_func_ip(ctx),
	};
	struct nft_call call = {
		.expr = PT_REGS_PARM1(ctx),
		.regs = PT_REGS_PARM2(ctx),
		.skb = (__u64)BPF_CORE_READ(pkt, skb),
	};
	struct nft_note *note = nft_note_place(call.skb);

	if (note && note->skb == call.skb)
		call.chain = note->chain;
	bpf_map_update_elem(&nft_calls, &key, &call, BPF_ANY);
	return 0;
}

SEC("kprobe/nft_eval_end")
int nft_eval_end(struct pt_regs *ctx)
{
	struct nft_call_key key = {
		.context = track_context(regs_address(ctx)),
		.func = bpf_get_func_ip(ctx),
	};
	struct nft_call *call = bpf_map_lookup_elem(&nft_calls, &key);
	struct nft_regs___np *regs;
	__s32 code;

	if (!call)
		return 0;
	regs = (void *)call->regs;
	code = (__s32)BPF_CORE_READ(regs, verdict.code);
	if (code >= 0)
		nft_ended(call->skb, call->chain, call->expr, code);
	bpf_map_delete_elem(&nft_calls, &key);
	return 0;
}

/* The packet is freed, and nobody asks. */
static __always_inline void nft_forget(__u64 skb)
{
	struct nft_note *note = nft_note_place(skb);

	if (note && note->skb == skb)
		note->skb = 0;
}

/* The number of what in nft has dropped this packet, which is freed for this reason; 0: not known. */
static __always_inline __u32 nft_dropped(__u64 skb, __u32 reason)
{
	struct nft_note *note = nft_note_place(skb);
	__u64 chain;

	if (!note || note->skb != skb)
		return 0;
	note->skb = 0;
	if (reason != nft_drop_reason)
		return 0;
	chain = note->chain;
	return chain ? nft_policy_of(chain) : note->rule;
}

#endif
