/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What devices tell: transmit queues that time out, packets that the hardware
 * dropped and handed on for the record (devlink traps). No expression and no
 * socket can be asked about these: with a filter of packets they are not counted.
 *
 * Needs the rows of drops.bpf.c before it.
 */
#ifndef NETPROBE_DROPS_DEVICE_BPF_H
#define NETPROBE_DROPS_DEVICE_BPF_H

enum drop_device drop_device_type;

static __always_inline bool device_wanted(const struct np_config *cfg,
					  struct drop_key *key,
					  struct net_device *dev)
{
	key->ifindex = BPF_CORE_READ(dev, ifindex);
	key->netns = BPF_CORE_READ(dev, nd_net.net, ns.inum);
	if ((cfg->fields & NP_PAUSED) || np_filter_on || who_on)
		return false;
	if ((cfg->fields & NP_FIELD_NETNS) && key->netns != cfg->netns)
		return false;
	if ((cfg->fields & NP_FIELD_IFINDEX) && key->ifindex != cfg->ifindex)
		return false;
	return !(cfg->fields & ~(NP_FIELD_NETNS | NP_FIELD_IFINDEX));
}

/* `skb`: the packet, or 0; `what`: DROP_TX_TIMEOUT and a queue, or DROP_DEVLINK_TRAP and its number. */
static __noinline int device_count(__u64 dev_ptr, __u64 skb_ptr, __u32 what,
				   __u32 which)
{
	struct net_device *dev = (void *)dev_ptr;
	struct sk_buff *skb = (void *)skb_ptr;
	__u32 zero = 0, scratch = SCRATCH_DEVICE;
	struct drop_key key = {};
	struct drop_count *count;
	struct drop_example *e;

	e = bpf_map_lookup_elem(&example_at_hand, &scratch);
	if (!e || !device_wanted(np_config_get(), &key, dev))
		return 0;
	if (!(by & DROP_BY_IFACE))
		key.ifindex = 0;
	if (!(by & DROP_BY_NETNS))
		key.netns = 0;
	if (by & DROP_BY_REASON) {
		key.reason = what;
		key.decider = which;
	}
	__builtin_memset(e, 0, sizeof(*e));
	e->ts = bpf_ktime_get_ns();
	bpf_probe_read_kernel(e->ifname, sizeof(e->ifname), dev->name);
	if (skb) {
		e->len = BPF_CORE_READ(skb, len);
		e->protocol = bpf_ntohs(BPF_CORE_READ(skb, protocol));
	}
	count = row(book, &key);
	if (!count) {
		put_example(&key, e);
		count = new_row(book, &key);
	}
	if (!count)
		count = bpf_map_lookup_elem(&overflow, &zero);
	if (count)
		add(count, e->len);
	return 0;
}

/* net:net_dev_xmit_timeout(dev, queue_index) */
SEC("raw_tp/net_dev_xmit_timeout")
int drops_tx_timeout(struct bpf_raw_tracepoint_args *ctx)
{
	return device_count(ctx->args[0], 0, DROP_TX_TIMEOUT, ctx->args[1]);
}

#define DEVLINK_DROP \
	0 /* DEVLINK_TRAP_TYPE_DROP of include/uapi/linux/devlink.h */

/* devlink:devlink_trap_report(devlink, skb, metadata) */
SEC("raw_tp/devlink_trap_report")
int drops_trap(struct bpf_raw_tracepoint_args *ctx)
{
	struct devlink_trap_metadata *trap = (void *)ctx->args[2];
	struct sk_buff *skb = (void *)ctx->args[1];
	struct drop_rule *rule = rule_new(SCRATCH_DEVICE);
	struct net_device *dev;

	/* Exceptions and control packets are handled by the kernel. */
	if (!rule || BPF_CORE_READ(trap, trap_type) != DEVLINK_DROP)
		return 0;
	dev = BPF_CORE_READ(trap, input_dev);
	if (!dev)
		dev = BPF_CORE_READ(skb, dev);
	bpf_probe_read_kernel_str(rule->table, sizeof(rule->table),
				  BPF_CORE_READ(trap, trap_group_name));
	bpf_probe_read_kernel_str(rule->chain, sizeof(rule->chain),
				  BPF_CORE_READ(trap, trap_name));
	return device_count((__u64)dev, (__u64)skb, DROP_DEVLINK_TRAP,
			    rule_number(rule));
}

#endif
