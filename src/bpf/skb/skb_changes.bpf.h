/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * netprobe why --changes: what a process changes in the network while packets are followed. Read where
 * the kernel takes a change in, and sent when the kernel has accepted it.
 *
 * Needs skb_event.bpf.h before it.
 */
#ifndef NETPROBE_SKB_CHANGES_BPF_H
#define NETPROBE_SKB_CHANGES_BPF_H

#include "skb/skb.h"

struct skb_change skb_change_type;
enum skb_changed skb_changed_type;
enum skb_change_size skb_change_size_type;
struct skb_nft_change skb_nft_change_type;

/* A change that is being made, by the stack that it is made on. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, __u64);
	__type(value, struct skb_change);
} changes SEC(".maps");

/* Too much for the stack. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct skb_change);
} change_scratch SEC(".maps");

/* The members of nf_tables' own types. */
struct nft_rule___np {
	__u64 handle : 42;
} __attribute__((preserve_access_index));

struct nft_set___np {
	char *name;
} __attribute__((preserve_access_index));

struct nft_ctx___np {
	struct net *net;
	struct nft_table___np *table;
	struct nft_chain___np *chain;
	__u8 family;
} __attribute__((preserve_access_index));

/* From 6.0 on a plain write has `ubuf`. */
struct iov_iter___np {
	void *ubuf;
	const struct iovec *iov;
} __attribute__((preserve_access_index));

static __always_inline struct skb_change *change_new(__u32 what, __u32 netns)
{
	__u32 zero = 0;
	struct skb_change *c = bpf_map_lookup_elem(&change_scratch, &zero);

	if (!c || (np_config_get()->fields & NP_PAUSED))
		return NULL;
	__builtin_memset(c, 0, sizeof(*c));
	np_head_fill(&c->event.head, SKB_KIND_CHANGE);
	c->event.reason = what;
	c->netns = netns;
	return c;
}

static __always_inline void change_begin(struct pt_regs *ctx,
					 struct skb_change *c)
{
	__u64 key = track_context(regs_address(ctx));

	bpf_map_update_elem(&changes, &key, c, BPF_ANY);
}

/* The end of a function that makes a change. */
SEC("kprobe/change_end")
int change_end(struct pt_regs *ctx)
{
	__u64 key = track_context(regs_address(ctx));
	struct skb_change *c = bpf_map_lookup_elem(&changes, &key);

	if (!c)
		return 0;
	if ((__s32)PT_REGS_RC(ctx) >= 0)
		np_output(ctx, &c->event.head, sizeof(*c));
	bpf_map_delete_elem(&changes, &key);
	return 0;
}

#define CHANGE_GET 2 /* rtnetlink's types are NEW, DEL, GET, SET */

/* rtnetlink_rcv_msg(skb, nlh, ...) */
SEC("kprobe/change_rtnl")
int change_rtnl(struct pt_regs *ctx)
{
	struct sk_buff *skb = (void *)PT_REGS_PARM1(ctx);
	struct nlmsghdr *nlh = (void *)PT_REGS_PARM2(ctx);
	struct sock *sk = BPF_CORE_READ(skb, sk);
	struct skb_change *c;
	__u32 len;

	if ((BPF_CORE_READ(nlh, nlmsg_type) & 3) == CHANGE_GET)
		return 0;
	c = change_new(SKB_CHANGED_RTNL,
		       BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum));
	if (!c)
		return 0;
	len = BPF_CORE_READ(nlh, nlmsg_len);
	if (len > sizeof(c->bytes))
		len = sizeof(c->bytes);
	c->len = len;
	asm volatile("" : "+r"(len));
	if (len < 1 || len > sizeof(c->bytes) ||
	    bpf_probe_read_kernel(c->bytes, len, nlh))
		return 0;
	change_begin(ctx, c);
	return 0;
}

static __always_inline __u32 change_netns(void)
{
	struct task_struct *task = (void *)bpf_get_current_task();

	return BPF_CORE_READ(task, nsproxy, net_ns, ns.inum);
}

/* proc_sys_write(iocb, iter): the value, then the names from the file outwards */
SEC("kprobe/change_sysctl")
int change_sysctl(struct pt_regs *ctx)
{
	struct kiocb *iocb = (void *)PT_REGS_PARM1(ctx);
	struct iov_iter___np *iter = (void *)PT_REGS_PARM2(ctx);
	struct skb_change *c = change_new(SKB_CHANGED_SYSCTL, change_netns());
	struct dentry *dentry, *parent;
	const void *user;

	if (!c)
		return 0;
	if (bpf_core_field_exists(iter->ubuf))
		user = BPF_CORE_READ(iter, ubuf);
	else
		user = BPF_CORE_READ(iter, iov, iov_base);
	bpf_probe_read_user_str(c->bytes, SKB_CHANGE_VALUE, user);
	dentry = BPF_CORE_READ(iocb, ki_filp, f_path.dentry);
	for (int i = 0; i < SKB_CHANGE_NAMES; i++) {
		parent = BPF_CORE_READ(dentry, d_parent);
		if (!dentry || parent == dentry)
			break;
		bpf_probe_read_kernel_str(
			&c->bytes[SKB_CHANGE_VALUE + i * SKB_CHANGE_NAME],
			SKB_CHANGE_NAME, BPF_CORE_READ(dentry, d_name.name));
		dentry = parent;
	}
	c->len = sizeof(c->bytes);
	change_begin(ctx, c);
	return 0;
}

#define CHANGE_SET_REPLACE 64 /* IPT_SO_SET_REPLACE, IP6T_SO_SET_REPLACE */

/* do_ipt_set_ctl(sk, command, arg, ...): arg begins with the table's name */
static __always_inline int change_xt(struct pt_regs *ctx, __u32 what)
{
	struct sock *sk = (void *)PT_REGS_PARM1(ctx);
	struct skb_change *c;

	if ((__u32)PT_REGS_PARM2(ctx) != CHANGE_SET_REPLACE)
		return 0;
	c = change_new(what,
		       BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum));
	if (!c)
		return 0;
	c->len = SKB_CHANGE_NAME;
	bpf_probe_read_user_str(c->bytes, SKB_CHANGE_NAME,
				(void *)PT_REGS_PARM3(ctx));
	change_begin(ctx, c);
	return 0;
}

SEC("kprobe/change_ipt")
int change_ipt(struct pt_regs *ctx)
{
	return change_xt(ctx, SKB_CHANGED_IPTABLES);
}

SEC("kprobe/change_ip6t")
int change_ip6t(struct pt_regs *ctx)
{
	return change_xt(ctx, SKB_CHANGED_IP6TABLES);
}

/* A change of nf_tables that is committed. */
static __always_inline int change_nft(struct pt_regs *ctx,
				      struct nft_ctx___np *nft, __u32 type,
				      struct nft_rule___np *rule,
				      struct nft_set___np *set)
{
	struct net *net = BPF_CORE_READ(nft, net);
	struct skb_change *c;
	struct skb_nft_change *n;

	c = change_new(SKB_CHANGED_NFT, BPF_CORE_READ(net, ns.inum));
	if (!c)
		return 0;
	n = (void *)c->bytes;
	c->len = sizeof(*n);
	n->msg = type;
	n->family = BPF_CORE_READ(nft, family);
	if (rule)
		n->handle = BPF_CORE_READ_BITFIELD_PROBED(rule, handle);
	bpf_probe_read_kernel_str(n->table, sizeof(n->table),
				  BPF_CORE_READ(nft, table, name));
	if (set)
		bpf_probe_read_kernel_str(n->part, sizeof(n->part),
					  BPF_CORE_READ(set, name));
	else
		bpf_probe_read_kernel_str(n->part, sizeof(n->part),
					  BPF_CORE_READ(nft, chain, name));
	np_output(ctx, &c->event.head, sizeof(*c));
	return 0;
}

/* nf_tables_rule_notify(ctx, rule, type) */
SEC("kprobe/change_nft_rule")
int change_nft_rule(struct pt_regs *ctx)
{
	return change_nft(ctx, (void *)PT_REGS_PARM1(ctx),
			  (__u32)PT_REGS_PARM3(ctx), (void *)PT_REGS_PARM2(ctx),
			  NULL);
}

/* nf_tables_chain_notify(ctx, type), nf_tables_table_notify(ctx, type) */
SEC("kprobe/change_nft_chain")
int change_nft_chain(struct pt_regs *ctx)
{
	return change_nft(ctx, (void *)PT_REGS_PARM1(ctx),
			  (__u32)PT_REGS_PARM2(ctx), NULL, NULL);
}

/* nf_tables_setelem_notify(ctx, set, element, type) */
SEC("kprobe/change_nft_elem")
int change_nft_elem(struct pt_regs *ctx)
{
	return change_nft(ctx, (void *)PT_REGS_PARM1(ctx),
			  (__u32)PT_REGS_PARM4(ctx), NULL,
			  (void *)PT_REGS_PARM2(ctx));
}

/* nf_tables_commit(net, skb), where the types of nf_tables are not known */
SEC("kprobe/change_nft_some")
int change_nft_some(struct pt_regs *ctx)
{
	struct net *net = (void *)PT_REGS_PARM1(ctx);
	struct skb_change *c;

	c = change_new(SKB_CHANGED_NFT_SOME, BPF_CORE_READ(net, ns.inum));
	if (c)
		np_output(ctx, &c->event.head, sizeof(*c));
	return 0;
}

#endif
