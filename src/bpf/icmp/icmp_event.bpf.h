/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What both sides of `netprobe icmp` share: its settings, the requests that are
 * being answered, the parts of an event. Needs icmp_packet.bpf.h before it.
 */
#ifndef NETPROBE_ICMP_EVENT_BPF_H
#define NETPROBE_ICMP_EVENT_BPF_H

/* Look at the stages of a request (else only at who handles it). */
const volatile __u8 with_stages = 0;
/* Only this echo id, only handled on this CPU; -1: any. */
const volatile __s32 want_id = -1;
const volatile __s32 want_cpu = -1;

/* For the types in the skeleton. */
struct icmp_event icmp_event_type;
enum icmp_kind icmp_kind_type;
enum icmp_context icmp_context_type;
enum icmp_drop icmp_drop_type;

/*
 * Requests whose reply has not reached a device yet: the number of each, by its
 * addresses as it was handled (daddr 0: it went to a group or to all).
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct icmp_key);
	__type(value, __u64);
} answering SEC(".maps");

/* Not less than the requests in `answering`: while it is 0 no reply is looked for. */
__u64 answers_due = 0;

static __always_inline bool match(const struct np_config *cfg,
				  struct sk_buff *skb,
				  const struct icmp_key *key,
				  struct net_device *dev)
{
	__u32 f = cfg->fields;

	if (f & NP_PAUSED)
		return false;
	if (want_id >= 0 && key->id != want_id)
		return false;
	if ((f & NP_FIELD_SADDR) &&
	    !match_addr(key->saddr, cfg->saddr_mask, cfg->saddr))
		return false;
	if ((f & NP_FIELD_DADDR) &&
	    !match_addr(key->daddr, cfg->daddr_mask, cfg->daddr))
		return false;
	if ((f & NP_FIELD_MARK) &&
	    (NP_READ(skb, mark) & cfg->mark_mask) != cfg->mark)
		return false;
	if ((f & NP_FIELD_NETNS) && key->netns != cfg->netns)
		return false;
	if ((f & NP_FIELD_PROTO) &&
	    cfg->l4_proto != (key->version == 4 ? IPPROTO_ICMP : 58))
		return false;
	if ((f & NP_FIELD_IFINDEX) &&
	    (!dev || NP_READ(dev, ifindex) != cfg->ifindex))
		return false;
	return true;
}

static __always_inline void read_dev(struct icmp_event *e,
				     struct net_device *dev)
{
	if (!dev)
		return;
	e->ifindex = NP_READ(dev, ifindex);
	BPF_CORE_READ_STR_INTO(&e->ifname, dev, name);
}

/* Who is current: the idle task, ksoftirqd, or any other task. */
static __always_inline __u8 current_context(const struct np_head *head)
{
	const char name[] = "ksoftirqd/";
	struct task_struct *task;

	if (!head->pid)
		return ICMP_CONTEXT_IDLE;
	for (int i = 0; i < sizeof(name) - 1; i++)
		if (head->comm[i] != name[i])
			return ICMP_CONTEXT_TASK;
	/* Anybody can take the name: a kernel thread it must be. */
	task = NP_CAST(task_struct, bpf_get_current_task());
	return NP_READ(task, flags) & PF_KTHREAD ? ICMP_CONTEXT_KSOFTIRQD
						 : ICMP_CONTEXT_TASK;
}

#endif
