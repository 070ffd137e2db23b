/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Which nft table, chain and rule dropped a packet (--output-nft).
 *
 * nft_do_chain says the base chain. A rule that ends in `drop`, `jump` or
 * `goto` does so by nft_immediate_eval, whose expression lies within the rule;
 * one that rejects, by nft_reject_*_eval. The rules of a chain lie one behind
 * the other: the walk along them finds the rule's handle. A policy, or a
 * verdict out of a map, has no rule; of the older iptables only the table is known.
 *
 * nf_tables is a module, so are its types: BTF of modules is needed (5.11);
 * rules lie so since 5.17.
 */
#ifndef NETPROBE_SKB_NFT_BPF_H
#define NETPROBE_SKB_NFT_BPF_H

#include "skb.h"

/* SKB_DROP_REASON_NETFILTER_DROP of this kernel; 0: it has none. */
const volatile __u32 nft_drop_reason = 0;

#define NFT_CHAINS 8 /* remembered of one packet */
#define NFT_RULES 1024 /* of a chain, looked at */
#define NFT_DREG_VERDICT 0 /* enum nft_registers */
#define NFT_CODE_DROP 0 /* NF_DROP */
#define NFT_CODE_JUMP -3 /* enum nft_verdicts */
#define NFT_CODE_GOTO -4

/* What is read of nf_tables' own types. */
struct nft_rule_blob___np {
	unsigned long size;
	unsigned char data[];
} __attribute__((preserve_access_index));

struct nft_table___np {
	__u16 family : 6;
	char *name;
} __attribute__((preserve_access_index));

struct nft_chain___np {
	struct nft_rule_blob___np *blob_gen_0;
	struct nft_rule_blob___np *blob_gen_1;
	struct nft_table___np *table;
	char *name;
} __attribute__((preserve_access_index));

struct nft_pktinfo___np {
	struct sk_buff *skb;
} __attribute__((preserve_access_index));

struct nft_verdict___np {
	__u32 code;
	struct nft_chain___np *chain;
} __attribute__((preserve_access_index));

struct nft_data___np {
	struct nft_verdict___np verdict;
} __attribute__((preserve_access_index));

struct nft_immediate_expr___np {
	struct nft_data___np data;
	__u8 dreg;
} __attribute__((preserve_access_index));

struct nft_expr___np {
	const void *ops;
	unsigned char data[];
} __attribute__((preserve_access_index));

/* Of the older iptables, in the module x_tables. */
struct xt_table___np {
	char name[32];
} __attribute__((preserve_access_index));

/* A packet's way through nft. */
struct nft_way {
	__u64 chains[NFT_CHAINS]; /* the base chain, and those jumped to */
	__u32 count;
	__u32 dropped; /* by a rule */
	struct skb_nft said;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, __u64);
	__type(value, struct nft_way);
} nft_ways SEC(".maps");

/* Too large for the stack. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct nft_way);
} nft_new SEC(".maps");

struct skb_nft skb_nft_type;

/* What is known of a drop of this skb. */
static __always_inline void nft_read(__u64 skb, __u16 kind, __u32 reason,
				     struct skb_nft *to)
{
	struct nft_way *way = NULL;

	if (kind == SKB_KIND_DROP || kind == SKB_KIND_DROPPED)
		way = bpf_map_lookup_elem(&nft_ways, &skb);
	if (way &&
	    (way->dropped || (nft_drop_reason && reason == nft_drop_reason)))
		*to = way->said;
	else
		__builtin_memset(to, 0, sizeof(*to));
}

static __always_inline void nft_name_chain(struct skb_nft *said,
					   struct nft_chain___np *chain)
{
	bpf_probe_read_kernel_str(said->chain, sizeof(said->chain),
				  BPF_CORE_READ(chain, name));
}

/* nft_do_chain(pkt, chain): a packet enters a base chain. */
SEC("kprobe/nft_chain")
int nft_chain(struct pt_regs *ctx)
{
	struct nft_pktinfo___np *pkt = (void *)PT_REGS_PARM1(ctx);
	struct nft_chain___np *chain = (void *)PT_REGS_PARM2(ctx);
	__u64 skb = (__u64)BPF_CORE_READ(pkt, skb);
	struct nft_table___np *table;
	struct nft_way *way;
	__u32 zero = 0;

	way = bpf_map_lookup_elem(&nft_new, &zero);
	if (!way || !skb)
		return 0;
	__builtin_memset(way, 0, sizeof(*way));
	way->chains[0] = (__u64)chain;
	way->count = 1;
	table = BPF_CORE_READ(chain, table);
	way->said.known = SKB_NFT_RULES;
	way->said.family = BPF_CORE_READ_BITFIELD_PROBED(table, family);
	bpf_probe_read_kernel_str(way->said.table, sizeof(way->said.table),
				  BPF_CORE_READ(table, name));
	nft_name_chain(&way->said, chain);
	bpf_map_update_elem(&nft_ways, &skb, way, BPF_ANY);
	return 0;
}

/* Where a blob's rules begin, if `expr` is among them; else 0. */
static __always_inline __u64 nft_rules(const struct nft_rule_blob___np *blob,
				       __u64 expr)
{
	__u64 at = (__u64)__builtin_preserve_access_index(&blob->data);

	if (!blob || expr < at || expr >= at + BPF_CORE_READ(blob, size))
		return 0;
	return at;
}

/* The rule with this expression drops the packet. */
static __always_inline void nft_dropped_by(struct nft_way *way, __u64 expr)
{
	struct nft_chain___np *chain = NULL;
	__u64 at = 0, head;

	way->dropped = 1;
	if (!bpf_core_field_exists(struct nft_chain___np, blob_gen_0))
		return;
	for (int i = 0; i < NFT_CHAINS; i++) {
		chain = (void *)way->chains[i];
		if (!chain)
			return;
		at = nft_rules(BPF_CORE_READ(chain, blob_gen_0), expr);
		if (!at)
			at = nft_rules(BPF_CORE_READ(chain, blob_gen_1), expr);
		if (at)
			break;
	}
	if (!at)
		return;
	nft_name_chain(&way->said, chain);
	for (int i = 0; i < NFT_RULES; i++) {
		/* struct nft_rule_dp: is_last:1, dlen:12, handle:42 */
		if (bpf_probe_read_kernel(&head, sizeof(head), (void *)at) < 0)
			return;
		at += sizeof(head) + ((head >> 1) & 0xfff);
		if (expr < at) {
			way->said.handle = (head >> 13) & ((1ULL << 42) - 1);
			return;
		}
	}
}

static __always_inline struct nft_way *nft_way_of(struct pt_regs *ctx)
{
	struct nft_pktinfo___np *pkt = (void *)PT_REGS_PARM3(ctx);
	__u64 skb = (__u64)BPF_CORE_READ(pkt, skb);

	return bpf_map_lookup_elem(&nft_ways, &skb);
}

/* nft_immediate_eval(expr, regs, pkt) */
SEC("kprobe/nft_immediate")
int nft_immediate(struct pt_regs *ctx)
{
	struct nft_expr___np *expr = (void *)PT_REGS_PARM1(ctx);
	struct nft_immediate_expr___np *imm =
		(void *)__builtin_preserve_access_index(&expr->data);
	struct nft_way *way;
	__u32 at;

	if (BPF_CORE_READ(imm, dreg) != NFT_DREG_VERDICT)
		return 0;
	way = nft_way_of(ctx);
	if (!way)
		return 0;
	switch ((__s32)BPF_CORE_READ(imm, data.verdict.code)) {
	case NFT_CODE_DROP:
		nft_dropped_by(way, (__u64)expr);
		break;
	case NFT_CODE_JUMP:
	case NFT_CODE_GOTO:
		at = way->count;
		if (at >= NFT_CHAINS)
			at = NFT_CHAINS - 1;
		way->chains[at] = (__u64)BPF_CORE_READ(imm, data.verdict.chain);
		way->count = at + 1;
		break;
	}
	return 0;
}

/* nft_reject_ipv4_eval(expr, regs, pkt) and its like */
SEC("kprobe/nft_rejects")
int nft_rejects(struct pt_regs *ctx)
{
	struct nft_way *way = nft_way_of(ctx);

	if (way)
		nft_dropped_by(way, PT_REGS_PARM1(ctx));
	return 0;
}

static __always_inline void nft_name_hook(struct skb_nft *said, __u8 hook)
{
	switch (hook) {
	case NF_INET_PRE_ROUTING:
		__builtin_memcpy(said->chain, "PREROUTING", 11);
		break;
	case NF_INET_LOCAL_IN:
		__builtin_memcpy(said->chain, "INPUT", 6);
		break;
	case NF_INET_FORWARD:
		__builtin_memcpy(said->chain, "FORWARD", 8);
		break;
	case NF_INET_LOCAL_OUT:
		__builtin_memcpy(said->chain, "OUTPUT", 7);
		break;
	case NF_INET_POST_ROUTING:
		__builtin_memcpy(said->chain, "POSTROUTING", 12);
		break;
	}
}

/*
 * ipt_do_table(table, skb, state), before 5.16 (skb, state, table): the older
 * iptables has the packet now. Which of its rules drops it nobody says.
 */
SEC("kprobe/nft_legacy")
int nft_legacy(struct pt_regs *ctx)
{
	__u64 first = PT_REGS_PARM1(ctx), second = PT_REGS_PARM2(ctx);
	struct nf_hook_state *state = (void *)PT_REGS_PARM3(ctx);
	struct xt_table___np *table = (void *)first;
	struct nft_way *way;
	__u32 zero = 0;

	way = bpf_map_lookup_elem(&nft_new, &zero);
	/* Reasons are younger (5.17) than this order of the arguments. */
	if (!way || !nft_drop_reason ||
	    !bpf_core_field_exists(struct xt_table___np, name)) {
		bpf_map_delete_elem(&nft_ways, &first);
		bpf_map_delete_elem(&nft_ways, &second);
		return 0;
	}
	__builtin_memset(way, 0, sizeof(*way));
	way->said.known = SKB_NFT_LEGACY;
	way->said.family = BPF_CORE_READ(state, pf);
	bpf_probe_read_kernel_str(
		way->said.table, 32,
		__builtin_preserve_access_index(&table->name));
	nft_name_hook(&way->said, BPF_CORE_READ(state, hook));
	bpf_map_update_elem(&nft_ways, &second, way, BPF_ANY);
	return 0;
}

#endif
