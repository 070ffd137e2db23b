/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * nf_tables' own types, and what is read of them: which rule an expression is in,
 * what its chain and table are called. nf_tables is a module, so are its types: BTF
 * of modules is needed (5.11); rules lie so since 5.17.
 */
#ifndef NETPROBE_NFT_BPF_H
#define NETPROBE_NFT_BPF_H

#define NFT_RULES 2048 /* of a chain, looked at */
#define NFT_SOME_RULES 32 /* at once */
#define NFT_DREG_VERDICT 0 /* enum nft_registers */

#define NF_DROP 0 /* include/uapi/linux/netfilter.h */
#define NF_ACCEPT 1
#define NF_QUEUE 3
#define NFT_CODE_CONTINUE -1 /* enum nft_verdicts */
#define NFT_CODE_BREAK -2
#define NFT_CODE_JUMP -3
#define NFT_CODE_GOTO -4
#define NFT_CODE_RETURN -5

/* What is read of nf_tables' own types. */
struct nft_rule_blob___np {
	unsigned long size;
	unsigned char data[];
} __attribute__((preserve_access_index));

struct nft_table___np {
	struct list_head chains;
	__u16 family : 6;
	char *name;
} __attribute__((preserve_access_index));

struct nft_chain___np {
	struct nft_rule_blob___np *blob_gen_0;
	struct nft_rule_blob___np *blob_gen_1;
	struct list_head list;
	struct nft_table___np *table;
	char *name;
} __attribute__((preserve_access_index));

struct nft_base_chain___np {
	__u8 policy;
	struct nft_chain___np chain;
} __attribute__((preserve_access_index));

struct nft_pktinfo___np {
	struct sk_buff *skb;
} __attribute__((preserve_access_index));

struct nft_verdict___np {
	__u32 code;
	struct nft_chain___np *chain;
} __attribute__((preserve_access_index));

struct nft_regs___np {
	struct nft_verdict___np verdict;
} __attribute__((preserve_access_index));

struct nft_data___np {
	struct nft_verdict___np verdict;
} __attribute__((preserve_access_index));

struct nft_immediate_expr___np {
	struct nft_data___np data;
	__u8 dreg;
} __attribute__((preserve_access_index));

struct nft_expr___np {
	const struct nft_expr_ops___np *ops;
	unsigned char data[];
} __attribute__((preserve_access_index));

/* Where the rules of a blob begin, if `expr` is among them; else 0. */
static __always_inline __u64 nft_rules(const struct nft_rule_blob___np *blob,
				       __u64 expr)
{
	__u64 at = (__u64)__builtin_preserve_access_index(&blob->data);

	if (!blob || expr < at || expr >= at + BPF_CORE_READ(blob, size))
		return 0;
	return at;
}

/* The same of a chain. */
__noinline __u64 nft_rules_of(__u64 chain, __u64 expr)
{
	struct nft_chain___np *c = (void *)chain;
	__u64 at;

	if (!c || !bpf_core_field_exists(struct nft_chain___np, blob_gen_0))
		return 0;
	at = nft_rules(BPF_CORE_READ(c, blob_gen_0), expr);
	return at ? at : nft_rules(BPF_CORE_READ(c, blob_gen_1), expr);
}

/* How many bytes the rule with this header takes; 0: it cannot be read. */
static __always_inline __u64 nft_rule_bytes(__u64 at)
{
	__u64 head;

	/* struct nft_rule_dp: is_last:1, dlen:12, handle:42 */
	if (bpf_probe_read_kernel(&head, sizeof(head), (void *)at) < 0)
		return 0;
	return sizeof(head) + ((head >> 1) & 0xfff);
}

/*
 * From the rule at `at` on, the header of the one with this expression; of another
 * one where it is not among the next few; 0: not found. A global function, as those
 * below: the verifier reads it once, not for each call.
 */
__noinline __u64 nft_some_rules(__u64 at, __u64 expr)
{
	for (int i = 0; i < NFT_SOME_RULES; i++) {
		__u64 bytes = nft_rule_bytes(at);

		if (!bytes)
			return 0;
		if (expr < at + bytes)
			return at;
		at += bytes;
	}
	return at;
}

/* The header of the rule with this expression, among those from `at` on; 0: not found. */
__noinline __u64 nft_rule_head(__u64 at, __u64 expr)
{
	for (int i = 0; i < NFT_RULES / NFT_SOME_RULES; i++) {
		at = nft_some_rules(at, expr);
		if (!at || expr < at + nft_rule_bytes(at))
			return at;
	}
	return 0;
}

/* The handle of the rule with this header; 0: not known. */
static __always_inline __u64 nft_handle(__u64 at)
{
	__u64 head = 0;

	if (at)
		bpf_probe_read_kernel(&head, sizeof(head), (void *)at);
	return (head >> 13) & ((1ULL << 42) - 1);
}

/* The names of a chain and its table, of `bytes` at most each; gives the family. */
static __always_inline __u8 nft_read_names(__u64 of_chain, __u8 *table_name,
					   __u8 *chain_name, __u32 bytes)
{
	struct nft_chain___np *chain = (void *)of_chain;
	struct nft_table___np *table = BPF_CORE_READ(chain, table);

	bpf_probe_read_kernel_str(table_name, bytes,
				  BPF_CORE_READ(table, name));
	bpf_probe_read_kernel_str(chain_name, bytes,
				  BPF_CORE_READ(chain, name));
	return BPF_CORE_READ_BITFIELD_PROBED(table, family);
}

/* The policy of a base chain drops. */
static __always_inline bool nft_policy_drops(__u64 chain)
{
	struct nft_base_chain___np *base =
		(void *)chain -
		bpf_core_field_offset(struct nft_base_chain___np, chain);

	return BPF_CORE_READ(base, policy) == NF_DROP;
}

#endif
