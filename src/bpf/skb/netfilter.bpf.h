/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Who decides about a packet in netfilter: one run of nf_hook_slow() over it,
 * and in it one evaluation of nft.
 *
 * The run: nf_hook_slow() says which functions the hook has; a probe on each of
 * them says which was entered last. A function that drops ends the run, so the
 * last one is the one that dropped, if the next in the list would have been seen.
 *
 * The evaluation: nft_do_chain() says the base chain. Only some expressions give
 * a verdict. nft_immediate_eval has it in its own data; of the others the verdict
 * is read when they return. A jump pushes a chain, a goto replaces one. That a
 * chain has ended is not seen: the next expression that gives a verdict lies in
 * the rules of one of the chains on the stack, and those above it have ended.
 * A verdict that ends the evaluation belongs to the rule around its expression.
 *
 * nf_tables is a module, so are its types: BTF of modules is needed (5.11);
 * rules lie so since 5.17.
 */
#ifndef NETPROBE_NETFILTER_BPF_H
#define NETPROBE_NETFILTER_BPF_H

#include "common/nft.bpf.h"
#include "skb/netfilter.h"

/* Keep the rule of verdicts that accept, too. */
const volatile __u8 nf_accepts = 0;

/* ipt_do_table and its like, by which the older iptables is a function of a hook; 0: not there */
const volatile __u64 nf_legacy[3] = {};

#define NF_TABLES 3 /* of the older iptables at one hook: the last ones */
#define NFT_STACK 17 /* the base chain, and NFT_JUMP_STACK_SIZE */
#define NF_ENTRIES 16 /* of a hook, looked at */
#define NFT_DO_CHAIN_SIZE 4096 /* code of nft_do_chain, at most */

struct nft_expr_type___np {
	const char *name;
} __attribute__((preserve_access_index));

struct nft_expr_ops___np {
	const struct nft_expr_type___np *type;
} __attribute__((preserve_access_index));

/* Of the older iptables, in the module x_tables. */
struct xt_table___np {
	char name[32];
} __attribute__((preserve_access_index));

struct nf_way {
	/* the run of the hook */
	__u64 entries; /* struct nf_hook_entries; 0: its start was not seen */
	__u64 hook; /* the function entered last; 0: none */
	__u64 priv; /* its first argument */
	__u32 next; /* index of the entry behind it */
	__u8 at; /* NF_INET_* and the like */
	__u8 pf;
	__u8 in_nft; /* this function has called nft_do_chain */
	__u8 lost; /* an expression that is in none of the known chains gave a verdict */
	/* the evaluation of nft */
	__u64 do_chain; /* address of nft_do_chain */
	__u64 regs; /* its struct nft_regs, as long as it runs; 0: not seen */
	__u64 chains[NFT_STACK];
	__u32 depth;
	__s32 code; /* the verdict of a rule that ended it; NFT_CODE_CONTINUE: none */
	__u64 handle;
	__u64 chain; /* the rule's */
	/* with nf_accepts: the run's number; the last nft chain in it that accepted, and its rule */
	__u64 packet; /* its identity: another sk_buff may come to lie at this address */
	__u64 passed_chain;
	__u64 passed_handle;
	__u32 run;
	__u32 table_count;
	__u64 tables
		[NF_TABLES]; /* struct xt_table of those that it went through */
};

/* By address of the sk_buff: from one run to the next. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, __u64);
	__type(value, struct nf_way);
} nf_ways SEC(".maps");

/* Too large for the stack. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct nf_way);
} nf_new SEC(".maps");

/* An expression that is being evaluated. */
struct nft_call_key {
	__u64 context; /* see track_context */
	__u64 func;
};

struct nft_call {
	__u64 expr;
	__u64 regs;
	__u64 skb;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct nft_call_key);
	__type(value, struct nft_call);
} nft_calls SEC(".maps");

struct nf_decision nf_decision_type;
enum nf_decided nf_decided_type;

static __always_inline struct nf_way *nf_way_of(__u64 skb)
{
	return bpf_map_lookup_elem(&nf_ways, &skb);
}

/* A new run over this packet. */
static __always_inline void nf_way_begin(__u64 skb, __u64 entries, __u32 first,
					 const struct nf_hook_state *state)
{
	struct nf_way *way;
	__u32 zero = 0;

	way = bpf_map_lookup_elem(&nf_new, &zero);
	if (!way || !skb)
		return;
	__builtin_memset(way, 0, sizeof(*way));
	way->entries = entries;
	way->next = first;
	way->at = BPF_CORE_READ(state, hook);
	way->pf = BPF_CORE_READ(state, pf);
	way->code = NFT_CODE_CONTINUE;
	if (nf_accepts) {
		way->run = bpf_get_prandom_u32() | 1;
		way->packet = track_find(NP_CAST(sk_buff, skb));
	}
	bpf_map_update_elem(&nf_ways, &skb, way, BPF_ANY);
}

static __always_inline __u64 nf_entry(const struct nf_way *way, __u32 i)
{
	struct nf_hook_entries *e = (void *)way->entries;

	if (!e || i >= BPF_CORE_READ(e, num_hook_entries))
		return 0;
	return (__u64)BPF_CORE_READ(e, hooks[i & 1023].hook);
}

static __always_inline void nft_begin(struct nf_way *way, __u64 chain)
{
	way->in_nft = chain != 0;
	way->lost = 0;
	way->regs = 0;
	way->chains[0] = chain;
	way->depth = 1;
	way->code = NFT_CODE_CONTINUE;
	way->handle = 0;
	way->chain = 0;
}

/* The next function of the hook is entered: the nft chain before it, if there was one, accepted. */
static __always_inline void nft_keep_passed(struct nf_way *way)
{
	if (!way->in_nft)
		return;
	way->passed_chain = way->chain ? way->chain : way->chains[0];
	way->passed_handle = way->lost ? 0 : way->handle;
}

/* The older iptables is entered with this table. An address may be that behind an endbr64. */
static __always_inline void nf_note_table(struct nf_way *way, __u64 func,
					  __u64 table)
{
	for (int i = 0; i < 3; i++) {
		if (!nf_legacy[i] || func + 4 - nf_legacy[i] > 4)
			continue;
		way->tables[0] = way->tables[1];
		way->tables[1] = way->tables[2];
		way->tables[2] = table;
		return;
	}
}

/*
 * Entry `i` of the hook is this function with this argument. One function may stand
 * there several times, or be called by another one: a table of the older iptables
 * by those of mangle and of nat.
 */
static __always_inline bool nf_entry_is(const struct nf_way *way, __u32 i,
					__u64 entry, __u64 func, __u64 priv)
{
	struct nf_hook_entries *e = (void *)way->entries;

	return entry == func &&
	       (__u64)BPF_CORE_READ(e, hooks[i & 1023].priv) == priv;
}

/* nf_hook_slow(skb, state, entries, first) */
SEC("kprobe/nf_run")
int nf_run(struct pt_regs *ctx)
{
	nf_way_begin(PT_REGS_PARM1(ctx), PT_REGS_PARM3(ctx),
		     (__u32)PT_REGS_PARM4(ctx), (void *)PT_REGS_PARM2(ctx));
	return 0;
}

/* f(priv, skb, state): the next function of a hook, or one that such a function calls. */
SEC("kprobe/nf_enter")
int nf_enter(struct pt_regs *ctx)
{
	__u64 skb = PT_REGS_PARM2(ctx), func = func_addr(ctx);
	struct nf_way *way = nf_way_of(skb);

	/* nf_reinject() goes on with a run that a queue had interrupted. */
	if (!way)
		nf_way_begin(skb, 0, 0, (void *)PT_REGS_PARM3(ctx));
	way = way ? way : nf_way_of(skb);
	if (!way)
		return 0;
	if (nf_accepts)
		nf_note_table(way, func, PT_REGS_PARM1(ctx));
	for (int i = 0; i < NF_ENTRIES && way->entries; i++) {
		__u64 entry = nf_entry(way, way->next + i);

		if (!entry)
			return 0;
		if (!nf_entry_is(way, way->next + i, entry, func,
				 PT_REGS_PARM1(ctx)))
			continue;
		way->next += i + 1;
		break;
	}
	way->hook = func;
	way->priv = PT_REGS_PARM1(ctx);
	if (nf_accepts)
		nft_keep_passed(way);
	nft_begin(way, 0);
	return 0;
}

/* nft_do_chain(pkt, chain) */
SEC("kprobe/nft_enter")
int nft_enter(struct pt_regs *ctx)
{
	struct nft_pktinfo___np *pkt = (void *)PT_REGS_PARM1(ctx);
	struct nf_way *way = nf_way_of((__u64)BPF_CORE_READ(pkt, skb));

	if (!way)
		return 0;
	nft_begin(way, PT_REGS_PARM2(ctx));
	way->do_chain = func_addr(ctx);
	return 0;
}

/* The expression of a rule gave a verdict; `to`: where it jumps. */
static __noinline int nft_verdict(struct nf_way *way, __u64 expr, __s32 code,
				  __u64 to)
{
	__u64 chain = 0, at = 0;
	__u32 depth = 0;

	if (!way || code == NFT_CODE_CONTINUE || code == NFT_CODE_BREAK ||
	    code == NFT_CODE_RETURN)
		return 0;
	/* Chains above the one with this expression have ended. */
	for (int i = NFT_STACK - 1; i >= 0; i--) {
		if (i >= way->depth)
			continue;
		chain = way->chains[i];
		at = nft_rules_of(chain, expr);
		depth = i + 1;
		if (at)
			break;
	}
	if (code >= 0)
		way->code = code;
	way->lost = !at;
	if (!at)
		return 0;
	switch (code) {
	case NFT_CODE_JUMP:
		if (depth >= NFT_STACK) {
			way->lost = 1;
			break;
		}
		way->chains[depth] = to;
		way->depth = depth + 1;
		break;
	case NFT_CODE_GOTO:
		if (depth - 1 < NFT_STACK)
			way->chains[depth - 1] = to;
		way->depth = depth;
		break;
	default:
		way->depth = depth;
		way->chain = chain;
		if ((code & 0xff) != NF_ACCEPT || nf_accepts)
			way->handle = nft_handle(nft_rule_head(at, expr));
	}
	return 0;
}

/* nft_immediate_eval(expr, regs, pkt) */
SEC("kprobe/nft_immediate")
int nft_immediate(struct pt_regs *ctx)
{
	struct nft_expr___np *expr = (void *)PT_REGS_PARM1(ctx);
	struct nft_immediate_expr___np *imm =
		(void *)__builtin_preserve_access_index(&expr->data);
	struct nft_pktinfo___np *pkt = (void *)PT_REGS_PARM3(ctx);
	struct nf_way *way;

	if (BPF_CORE_READ(imm, dreg) != NFT_DREG_VERDICT)
		return 0;
	way = nf_way_of((__u64)BPF_CORE_READ(pkt, skb));
	if (!way || !way->in_nft)
		return 0;
	way->regs = PT_REGS_PARM2(ctx);
	nft_verdict(way, (__u64)expr,
		    (__s32)BPF_CORE_READ(imm, data.verdict.code),
		    (__u64)BPF_CORE_READ(imm, data.verdict.chain));
	return 0;
}

/* f(expr, regs, pkt), for expressions that may give a verdict */
SEC("kprobe/nft_eval")
int nft_eval(struct pt_regs *ctx)
{
	struct nft_pktinfo___np *pkt = (void *)PT_REGS_PARM3(ctx);
	struct nft_call_key key = {
		.context = track_context(regs_address(ctx)),
		.func = func_addr(ctx),
	};
	struct nft_call call = {
		.expr = PT_REGS_PARM1(ctx),
		.regs = PT_REGS_PARM2(ctx),
		.skb = (__u64)BPF_CORE_READ(pkt, skb),
	};
	struct nf_way *way = nf_way_of(call.skb);

	if (!way || !way->in_nft)
		return 0;
	way->regs = call.regs;
	bpf_map_update_elem(&nft_calls, &key, &call, BPF_ANY);
	return 0;
}

static __always_inline void nf_read_names(struct nf_decision *to,
					  __u64 of_chain)
{
	to->family =
		nft_read_names(of_chain, to->table, to->chain, NF_NAME_LEN);
}

/* Two names of 8 bytes, NUL-padded. */
static __always_inline bool nft_same_name(const char *a, const char *b)
{
	for (int i = 0; i < 8; i++) {
		if (a[i] != b[i])
			return false;
	}
	return true;
}

/* An expression that translates: nat (snat, dnat), masq, redir. */
static __always_inline bool nft_translates(__u64 expr)
{
	const struct nft_expr___np *e = (void *)expr;
	char name[8] = {};

	bpf_probe_read_kernel_str(name, sizeof(name),
				  BPF_CORE_READ(e, ops, type, name));
	return nft_same_name(name, "nat\0\0\0\0") ||
	       nft_same_name(name, "masq\0\0\0") ||
	       nft_same_name(name, "redir\0\0");
}

struct nf_translated {
	struct skb_event event;
	__u64 packet;
	struct nf_decision decision;
};

/* netprobe why: the rule that ended the evaluation has translated the packet. */
static __noinline int nf_translated(void *ctx, __u64 skb, __u64 expr)
{
	const struct np_config *cfg = np_config_get();
	struct nf_way *way = nf_way_of(skb);
	struct nf_translated e = {};

	if (!way || !way->packet || !way->chain || way->lost ||
	    (cfg->fields & NP_PAUSED) || !nft_translates(expr))
		return 0;
	np_head_fill(&e.event.head, SKB_KIND_TRANSLATED);
	e.event.skb = skb;
	e.event.sections = SKB_SECTION_PACKET | SKB_SECTION_NFT;
	e.packet = way->packet;
	e.decision.known = NF_DECIDED_RULE;
	e.decision.verdict = NF_ACCEPT;
	e.decision.handle = way->handle;
	e.decision.at = way->at;
	e.decision.run = way->run;
	nf_read_names(&e.decision, way->chain);
	np_output(ctx, &e.event.head, sizeof(e));
	return 0;
}

SEC("kprobe/nft_eval_end")
int nft_eval_end(struct pt_regs *ctx)
{
	struct nft_call_key key = {
		.context = track_context(regs_address(ctx)),
		.func = func_addr(ctx),
	};
	struct nft_call *call = bpf_map_lookup_elem(&nft_calls, &key);
	struct nft_regs___np *regs;
	struct nf_way *way;
	__s32 code;

	if (!call)
		return 0;
	regs = (void *)call->regs;
	way = nf_way_of(call->skb);
	if (way && way->in_nft) {
		code = (__s32)BPF_CORE_READ(regs, verdict.code);
		nft_verdict(way, call->expr, code,
			    (__u64)BPF_CORE_READ(regs, verdict.chain));
		if (nf_accepts && code == NF_ACCEPT)
			nf_translated(ctx, call->skb, call->expr);
	}
	bpf_map_delete_elem(&nft_calls, &key);
	return 0;
}

/* What an evaluation of nft came to, when the packet is freed at `place`. */
static __always_inline __u8 nft_outcome(const struct nf_way *way, __u64 place)
{
	bool inside = place - way->do_chain < NFT_DO_CHAIN_SIZE;
	struct nft_regs___np *regs = (void *)way->regs;
	__s32 code = way->code;

	/* Since 6.9 nft frees what it drops, and does not leave it to the hook. */
	if (code < 0 && inside && regs)
		code = (__s32)BPF_CORE_READ(regs, verdict.code);
	if (code >= 0 && (code & 0xff) == NF_ACCEPT)
		return NF_DECIDED_PASSED;
	if (code >= 0)
		return way->code == code && !way->lost ? NF_DECIDED_RULE
						       : NF_DECIDED_NFT;
	if (nft_policy_drops(way->chains[0]))
		return NF_DECIDED_POLICY;
	return inside ? NF_DECIDED_NFT : NF_DECIDED_HOOK;
}

/* Who has decided about this packet, that is freed at `place`; zeroes where nothing is known. */
static __always_inline void nf_read(__u64 skb, __u64 place,
				    struct nf_decision *to)
{
	struct nf_way *way = nf_way_of(skb);

	__builtin_memset(to, 0, sizeof(*to));
	if (!way)
		return;
	to->hook = way->hook;
	to->following[0] = nf_entry(way, way->next);
	to->following[1] = nf_entry(way, way->next + 1);
	to->at = way->at;
	to->family = way->pf;
	to->known = NF_DECIDED_HOOK;
	if (way->in_nft) {
		to->known = nft_outcome(way, place);
		to->verdict = way->code >= 0 ? way->code & 0xff : 0;
		to->handle = way->handle;
		nf_read_names(to, way->chain ? way->chain : way->chains[0]);
	} else if (bpf_core_field_exists(struct xt_table___np, name)) {
		bpf_probe_read_kernel(
			to->table, 32,
			(void *)way->priv +
				bpf_core_field_offset(struct xt_table___np,
						      name));
	}
}

/* The name of an older table, as far as 8 bytes hold it. */
static __always_inline __u64 nf_table_name(__u64 table)
{
	__u64 name = 0;

	if (table && bpf_core_field_exists(struct xt_table___np, name))
		bpf_probe_read_kernel(
			&name, sizeof(name),
			(void *)table + bpf_core_field_offset(
						struct xt_table___np, name));
	return name;
}

/* The last run of a hook over this packet, which is past it: it was let through. */
static __always_inline void nf_read_accepted(__u64 skb, __u64 packet,
					     struct nf_decision *to)
{
	struct nf_way *way = nf_way_of(skb);

	__builtin_memset(to, 0, sizeof(*to));
	if (!way || !way->run || way->packet != packet)
		return;
	nft_keep_passed(way);
	to->known = NF_DECIDED_ACCEPTED;
	to->verdict = NF_ACCEPT;
	to->at = way->at;
	to->family = way->pf;
	to->run = way->run;
	to->hook = nf_table_name(way->tables[0]);
	to->following[0] = nf_table_name(way->tables[1]);
	to->following[1] = nf_table_name(way->tables[2]);
	if (!way->passed_chain)
		return;
	to->handle = way->passed_handle;
	nf_read_names(to, way->passed_chain);
}

#endif
