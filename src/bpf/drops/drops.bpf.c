// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * netprobe drops: packets that the kernel drops, counted in the kernel by reason,
 * place, interface, namespace, protocol and port. No event leaves the kernel: user
 * space reads the counts now and then.
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "common/cast.bpf.h"
#include "common/compat.bpf.h"
#include "common/event.h"
#include "common/config.bpf.h"
#include "common/stats.bpf.h"
#include "common/packet.h"
#include "common/packet.bpf.h"
#include "common/fields.bpf.h"
#include "filter/filter.bpf.h"
#include "common/listen.bpf.h"
#include "common/who.bpf.h"
#include "drops/drops.h"

/* For the skeleton's types. */
enum drop_by drop_by_type;
enum drop_fact drop_fact_type;
struct drop_key drop_key_type;
struct drop_count drop_count_type;
struct drop_example drop_example_type;

/* The tracepoint tells a reason (5.17), the receiving socket (6.11). */
const volatile __u8 has_reasons = 0;
const volatile __u8 has_rx_sock = 0;
/* DROP_BY_* */
const volatile __u8 by = 0xff;

/*
 * Functions that free what others give up: from start to end. Who called them is
 * the place of the drop.
 */
#define DROP_FREES 48
const volatile __u64 frees_start[DROP_FREES] = {};
const volatile __u64 frees_end[DROP_FREES] = {};
const volatile __u32 frees_count = 0;

/*
 * Two books, each with rows and their examples: while user space takes the rows
 * out of one, drops go into the other.
 */
struct drop_rows {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct drop_key);
	__type(value, struct drop_count);
} rows_a SEC(".maps"), rows_b SEC(".maps");

struct drop_examples {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, struct drop_key);
	__type(value, struct drop_example);
} examples_a SEC(".maps"), examples_b SEC(".maps");

/* The book that is written to: 0 or 1. */
volatile __u32 book SEC(".data.book") = 0;

struct drop_nothing {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} nothing SEC(".maps");

/*
 * An update of a map of maps waits until no program runs that began before it:
 * then nobody writes to the other book any more.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct drop_nothing);
} barrier SEC(".maps") = {.values = {&nothing}};

/* Drops that found no room for their row. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct drop_count);
} overflow SEC(".maps");

#define DROP_FRAMES 16

struct drop_stack {
	__u64 at[DROP_FRAMES];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct drop_stack);
} stacks SEC(".maps");

/*
 * Is the address in a function that only frees? Not static: so the verifier
 * checks it once, and not for each frame of each path again (16 s on 6.12).
 */
__noinline int only_frees(__u64 addr)
{
	for (__u32 i = 0; i < DROP_FREES && i < frees_count; i++)
		if (addr >= frees_start[i] && addr < frees_end[i])
			return 1;
	return 0;
}

/* The first caller of the function at `place` that does more than free. */
static __noinline __u64 deciding(void *ctx, __u64 place)
{
	__u32 zero = 0;
	struct drop_stack *s = bpf_map_lookup_elem(&stacks, &zero);
	bool found = false;
	long len;

	if (!s)
		return place;
	len = bpf_get_stack(ctx, s->at, sizeof(s->at), 0);
	for (int i = 0; i < DROP_FRAMES; i++) {
		if ((i + 1) * (long)sizeof(__u64) > len)
			break;
		if (found && !only_frees(s->at[i]))
			return s->at[i];
		if (s->at[i] == place)
			found = true;
	}
	return place;
}

static __always_inline void add(struct drop_count *count, __u32 len)
{
	__sync_fetch_and_add(&count->packets, 1);
	__sync_fetch_and_add(&count->bytes, len);
}

static __always_inline __u64 socket_inode(struct sock *sk)
{
	struct socket *socket;
	struct socket_alloc *alloc;
	__u8 state;

	if (!sk)
		return 0;
	state = BPF_CORE_READ(sk, __sk_common.skc_state);
	/* TIME-WAIT and NEW-SYN-RECV: no whole struct sock. */
	if (state == 6 || state == 12)
		return 0;
	socket = BPF_CORE_READ(sk, sk_socket);
	if (!socket)
		return 0;
	alloc = container_of(socket, struct socket_alloc, socket);
	return BPF_CORE_READ(alloc, vfs_inode.i_ino);
}

static __always_inline void example(__u32 in, const struct drop_key *key,
				    struct sk_buff *skb, __u64 sk_ptr,
				    struct net_device *dev,
				    const struct np_tuple *tuple, __u32 len)
{
	struct sock *sk = (void *)sk_ptr;
	struct drop_example e = {};
	struct np_listen_queue queue;

	e.tuple = *tuple;
	e.ts = bpf_ktime_get_ns();
	e.inode = socket_inode(sk);
	e.len = len;
	e.protocol = bpf_ntohs(NP_READ(skb, protocol));
	if (np_is_pointer(dev))
		bpf_probe_read_kernel(e.ifname, sizeof(e.ifname), dev->name);
	if (key->reason == NP_LISTEN_ACCEPT_QUEUE_FULL && sk) {
		np_accept_queue_full(sk, &queue);
		e.backlog = queue.held;
		e.limit = queue.limit;
	}
	if (in)
		bpf_map_update_elem(&examples_b, key, &e, BPF_NOEXIST);
	else
		bpf_map_update_elem(&examples_a, key, &e, BPF_NOEXIST);
}

/*
 * The segment that this CPU handled last for a connection in TIME-WAIT. A filter
 * may keep us from its free: the address alone could be another segment's by then.
 */
struct segment {
	__u64 skb;
	__u64 head;
	__u32 seq;
	__u32 ports;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct segment);
} time_wait SEC(".maps");

static __always_inline void segment_of(struct sk_buff *skb, struct segment *s)
{
	struct tcp_skb_cb *cb = (void *)skb->cb;

	s->skb = (__u64)skb;
	s->head = (__u64)BPF_CORE_READ(skb, head);
	s->seq = BPF_CORE_READ(cb, seq);
	s->ports = 0;
	bpf_probe_read_kernel(&s->ports, sizeof(s->ports),
			      (void *)s->head +
				      BPF_CORE_READ(skb, transport_header));
}

/* Is it the segment that was for a connection in TIME-WAIT? Asked once of each. */
static __always_inline bool was_waiting(struct sk_buff *skb)
{
	__u32 zero = 0;
	struct segment *waiting = bpf_map_lookup_elem(&time_wait, &zero);
	struct segment now;

	if (!waiting || waiting->skb != (__u64)skb)
		return false;
	waiting->skb = 0;
	segment_of(skb, &now);
	return now.head == waiting->head && now.seq == waiting->seq &&
	       now.ports == waiting->ports;
}

#define DROP_TCP_SYN 0x02

static __always_inline __u8 tcp_facts(struct sk_buff *skb,
				      const struct np_tuple *t)
{
	struct tcp_skb_cb *cb = (void *)skb->cb;
	bool ended = was_waiting(skb);
	__u32 seq, end;

	if (t->tcp_flags & DROP_TCP_SYN)
		return 0;
	if (ended)
		return DROP_TIME_WAIT;
	/* A FIN counts as one byte. */
	seq = BPF_CORE_READ(cb, seq) + (t->tcp_flags & 1);
	end = BPF_CORE_READ(cb, end_seq);
	return seq == end ? DROP_NO_DATA : 0;
}

static __always_inline __u8 facts_of(struct sk_buff *skb,
				     struct net_device *dev,
				     const struct np_tuple *t)
{
	__u8 facts = BPF_CORE_READ_BITFIELD_PROBED(skb, pkt_type) &
		     DROP_PKT_TYPE;

	if (np_is_pointer(dev) && NP_READ(dev, promiscuity))
		facts |= DROP_PROMISCUOUS;
	if (!t->l3_version)
		facts |= DROP_NO_IP;
	if ((t->l4_proto == IPPROTO_ICMP && t->icmp_type == 0) ||
	    (t->l4_proto == 58 && t->icmp_type == 129))
		facts |= DROP_ECHO_REPLY;
	if (t->l4_proto == IPPROTO_TCP)
		facts |= tcp_facts(skb, t);
	return facts;
}

static __always_inline struct drop_count *row(__u32 in,
					      const struct drop_key *key)
{
	return in ? bpf_map_lookup_elem(&rows_b, key)
		  : bpf_map_lookup_elem(&rows_a, key);
}

static __always_inline struct drop_count *new_row(__u32 in,
						  const struct drop_key *key)
{
	struct drop_count none = {};

	if (in)
		bpf_map_update_elem(&rows_b, key, &none, BPF_NOEXIST);
	else
		bpf_map_update_elem(&rows_a, key, &none, BPF_NOEXIST);
	return row(in, key);
}

/* A packet that has passed the filter. `to_ptr`: the socket that it was on its way to, or 0. */
static __noinline int count_drop(void *ctx, __u64 skb_ptr, __u64 to_ptr,
				 __u64 place, __u64 reason)
{
	const struct np_config *cfg = np_config_get();
	struct sk_buff *skb = NP_CAST(sk_buff, skb_ptr);
	struct sock *to = to_ptr ? NP_CAST(sock, to_ptr) : NULL;
	struct np_tuple tuple = {};
	struct drop_key key = {};
	struct drop_count *count;
	struct net_device *dev;
	__u32 zero = 0, netns, ifindex = 0, len, in = book;

	dev = NP_READ(skb, dev);
	if (np_is_pointer(dev))
		ifindex = NP_READ(dev, ifindex);
	netns = np_read_netns(skb, to);
	np_read_tuple(skb, &tuple);
	if ((cfg->fields & NP_FIELD_NETNS) && netns != cfg->netns)
		return 0;
	if ((cfg->fields & NP_FIELD_IFINDEX) && ifindex != cfg->ifindex)
		return 0;
	if ((cfg->fields & NP_FIELD_MARK) &&
	    (NP_READ(skb, mark) & cfg->mark_mask) != cfg->mark)
		return 0;
	if ((cfg->fields & NP_FIELDS_PACKET) && !match_tuple(cfg, &tuple))
		return 0;
	len = NP_READ(skb, len);
	if (by & DROP_BY_REASON) {
		key.reason = reason;
		key.facts = facts_of(skb, dev, &tuple);
	}
	if (by & DROP_BY_PLACE)
		key.place = only_frees(place) ? deciding(ctx, place) : place;
	if (by & DROP_BY_IFACE)
		key.ifindex = ifindex;
	if (by & DROP_BY_NETNS)
		key.netns = netns;
	if (by & DROP_BY_PROTO) {
		key.proto = tuple.l4_proto;
		key.ip = tuple.l3_version;
	}
	if (by & DROP_BY_PORT)
		key.dport = tuple.dport;
	count = row(in, &key);
	if (!count) {
		example(in, &key, skb,
			to_ptr ? to_ptr : (__u64)NP_READ(skb, sk), dev, &tuple,
			len);
		count = new_row(in, &key);
	}
	if (!count)
		count = bpf_map_lookup_elem(&overflow, &zero);
	if (count)
		add(count, len);
	return 0;
}

/* One packet that is dropped. The filter and the count are not on one stack: together they are too much for it. */
static __always_inline int dropped(void *ctx, __u64 skb, __u64 to, __u64 place,
				   __u32 reason)
{
	if ((np_config_get()->fields & NP_PAUSED) ||
	    !np_filter_skb((void *)skb) || (who_on && !who_matches(skb, to)))
		return 0;
	return count_drop(ctx, skb, to, place, reason);
}

/* skb:kfree_skb(skb, location), from 5.17 with the reason, from 6.11 with the receiving socket behind it. */
SEC("raw_tp/kfree_skb")
int drops_freed(struct bpf_raw_tracepoint_args *ctx)
{
	return dropped(ctx, ctx->args[0], has_rx_sock ? ctx->args[3] : 0,
		       ctx->args[1], has_reasons ? (__u32)ctx->args[2] : 0);
}

/* tcp_conn_request(ops, af_ops, sk, skb): a SYN without room is freed as if it had been used. */
SEC("kprobe/tcp_conn_request")
int drops_listen(struct pt_regs *ctx)
{
	struct sock *sk = (void *)PT_REGS_PARM3(ctx);
	struct np_listen_queue queue;
	__u32 full = np_listen_full(sk, &queue);

	if (full != NP_LISTEN_ROOM)
		dropped(ctx, PT_REGS_PARM4(ctx), (__u64)sk, PT_REGS_IP(ctx),
			full);
	return 0;
}

/* tcp_timewait_state_process(tw, skb, ...): most of these segments are freed without a reason, and nothing is lost. */
SEC("kprobe/tcp_timewait_state_process")
int drops_time_wait(struct pt_regs *ctx)
{
	__u32 zero = 0;
	struct segment *waiting = bpf_map_lookup_elem(&time_wait, &zero);

	if (waiting)
		segment_of((void *)PT_REGS_PARM2(ctx), waiting);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
