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
#include "common/heartbeat.bpf.h"
#include "common/stats.bpf.h"
#include "common/packet.h"
#define NP_V6_WALK_APART
#include "common/packet.bpf.h"
#include "common/fields.bpf.h"
#include "filter/filter.bpf.h"
#include "common/listen.bpf.h"
#include "common/translated.bpf.h"
#include "common/who.bpf.h"
#include "common/drop_facts.bpf.h"
#include "drops/drops.h"
#include "drops/drops_nft.bpf.h"

/* For the skeleton's types. */
enum drop_by drop_by_type;
struct drop_key drop_key_type;
struct drop_count drop_count_type;
struct drop_example drop_example_type;
struct drop_slot drop_slot_type;
enum drop_slots drop_slots_type;

/* The tracepoint tells a reason (5.17), the receiving socket (6.11). */
const volatile __u8 has_reasons = 0;
const volatile __u8 has_rx_sock = 0;
/* DROP_BY_* */
const volatile __u8 by = 0xff;

/*
 * Functions that free what others give up: from start to end, in order; unused
 * ones begin at the end of all addresses. Who called them is the place of the drop.
 */
#define DROP_FREES 64
const volatile __u64 frees_start[DROP_FREES] = {};
const volatile __u64 frees_end[DROP_FREES] = {};

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

/*
 * Rows found without a hash map's look-up: the first that came with their number,
 * until user space takes them out. Only drops_freed() writes here, which no drop on
 * the same CPU interrupts.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 2 * DROP_SLOTS);
	__type(key, __u32);
	__type(value, struct drop_slot);
} slots SEC(".maps");

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
	__u32 at = 0;

	/* The last that begins at or below the address. */
	for (__u32 step = DROP_FREES / 2; step; step /= 2)
		if (frees_start[(at + step) & (DROP_FREES - 1)] <= addr)
			at += step;
	at &= DROP_FREES - 1;
	return addr >= frees_start[at] && addr < frees_end[at];
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

/* Too large for the stack. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, SCRATCH_COUNT);
	__type(key, __u32);
	__type(value, struct drop_example);
} example_at_hand SEC(".maps");

#define DROP_AF_INET 2
#define DROP_AF_INET6 10
#define DROP_TIME_WAIT_STATE 6 /* enum in include/net/tcp_states.h */
#define DROP_NEW_SYN_RECV 12

/* Where a socket is bound. */
static __always_inline void read_local(struct drop_example *e, struct sock *sk)
{
	__u16 family = BPF_CORE_READ(sk, __sk_common.skc_family);

	if (family == DROP_AF_INET) {
		np_map_v4(e->local,
			  BPF_CORE_READ(sk, __sk_common.skc_rcv_saddr));
		e->local_version = 4;
	} else if (family == DROP_AF_INET6) {
		bpf_core_read(e->local, sizeof(e->local),
			      &sk->__sk_common.skc_v6_rcv_saddr);
		e->local_version = 6;
	}
	e->local_port = BPF_CORE_READ(sk, __sk_common.skc_num);
	if (!e->local_port)
		e->local_version = 0;
}

static __always_inline void read_socket(struct drop_example *e, struct sock *sk)
{
	__u8 state = BPF_CORE_READ(sk, __sk_common.skc_state);
	struct socket_alloc *alloc;
	struct socket *socket;
	struct cgroup *cgroup;

	/* These are no whole struct sock. */
	if (state == DROP_TIME_WAIT_STATE || state == DROP_NEW_SYN_RECV)
		return;
	read_local(e, sk);
	cgroup = who_cgroup_of(sk);
	if (cgroup)
		e->cgroup = BPF_CORE_READ(cgroup, kn, id);
	socket = BPF_CORE_READ(sk, sk_socket);
	if (!socket)
		return;
	alloc = container_of(socket, struct socket_alloc, socket);
	e->inode = BPF_CORE_READ(alloc, vfs_inode.i_ino);
}

static __always_inline void put_example(const struct drop_key *key,
					const struct drop_example *e)
{
	if (book)
		bpf_map_update_elem(&examples_b, key, e, BPF_NOEXIST);
	else
		bpf_map_update_elem(&examples_a, key, e, BPF_NOEXIST);
}

static __noinline int example(const struct drop_key *key, __u64 skb_ptr,
			      __u64 sk_ptr, const struct np_tuple *tuple,
			      __u32 scratch)
{
	struct sk_buff *skb = NP_CAST(sk_buff, skb_ptr);
	struct sock *sk = (void *)sk_ptr;
	struct net_device *dev = NP_READ(skb, dev);
	struct np_listen_queue queue;
	struct drop_example *e;

	e = bpf_map_lookup_elem(&example_at_hand, &scratch);
	if (!e || !key || !tuple)
		return 0;
	__builtin_memset(e, 0, sizeof(*e));
	e->tuple = *tuple;
	e->ts = bpf_ktime_get_ns();
	e->len = NP_READ(skb, len);
	e->protocol = bpf_ntohs(NP_READ(skb, protocol));
	if (sk)
		read_socket(e, sk);
	if (np_is_pointer(dev))
		bpf_probe_read_kernel(e->ifname, sizeof(e->ifname), dev->name);
	if (key->reason == NP_LISTEN_ACCEPT_QUEUE_FULL && sk) {
		np_accept_queue_full(sk, &queue);
		e->backlog = queue.held;
		e->limit = queue.limit;
	}
	put_example(key, e);
	return 0;
}

/* What the last qdisc that dropped on this CPU said of it. */
struct qdisc_said {
	__u64 skb;
	__u32 handle;
	__u32 reason;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct qdisc_said);
} qdisc_said SEC(".maps");

/* The tracepoint qdisc:qdisc_drop is there (7.x). */
const volatile __u8 has_qdisc_drop = 0;

/* Takes what a qdisc has just said of this packet. */
static __always_inline void take_qdisc(struct drop_key *key, __u64 skb_ptr)
{
	__u32 zero = 0;
	struct qdisc_said *said = bpf_map_lookup_elem(&qdisc_said, &zero);

	if (!said || said->skb != skb_ptr)
		return;
	said->skb = 0;
	key->decider = said->handle;
	key->qdisc_reason = said->reason;
	key->qdisc_subsys = said->reason >> 16;
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

/* Which program counts: that at tcp_conn_request has reasons of its own. */
static __always_inline __u32 scratch_of(__u32 reason)
{
	return reason == NP_LISTEN_SYN_QUEUE_FULL ||
			       reason == NP_LISTEN_ACCEPT_QUEUE_FULL
		       ? SCRATCH_PROBE
		       : SCRATCH_TRACEPOINT;
}

static __always_inline struct drop_slot *slot_of(__u32 in,
						 const struct drop_key *key)
{
	__u32 at = key->place ^ key->place >> 6 ^ key->dport ^ key->netns ^
		   key->ifindex << 2;

	at = in * DROP_SLOTS + (at & (DROP_SLOTS - 1));
	return bpf_map_lookup_elem(&slots, &at);
}

static __always_inline bool same_key(const struct drop_key *a,
				     const struct drop_key *b)
{
	const __u64 *x = (const void *)a, *y = (const void *)b;

	return x[0] == y[0] && x[1] == y[1] && x[2] == y[2] && x[3] == y[3];
}

/* The row of a drop, which is not at hand: found, or made with its example. */
static __noinline int count_in_book(struct drop_key *key, __u64 skb_ptr,
				    __u64 to_ptr, const struct np_tuple *tuple,
				    __u32 len)
{
	struct drop_count *count;
	__u32 zero = 0;

	if (!key || !tuple)
		return 0;
	count = row(book, key);
	if (!count) {
		example(key, skb_ptr, to_ptr, tuple, scratch_of(key->reason));
		count = new_row(book, key);
	}
	if (!count) {
		count = bpf_map_lookup_elem(&overflow, &zero);
		if (count)
			add(count, len);
		return 0;
	}
	add(count, len);
	return 1;
}

/* A packet that has passed the filter. `to_ptr`: the socket that it was on its way to, or 0. */
__hidden __noinline int count_drop(void *ctx, __u64 skb_ptr, __u64 to_ptr,
				   __u64 place, __u64 reason)
{
	const struct np_config *cfg = np_config_get();
	struct sk_buff *skb = NP_CAST(sk_buff, skb_ptr);
	struct sock *to = to_ptr ? NP_CAST(sock, to_ptr) : NULL;
	struct np_tuple tuple = {};
	struct drop_key key = {};
	struct drop_slot *slot = NULL;
	struct net_device *dev;
	__u32 netns, ifindex = 0, len;

	if (has_nft)
		key.decider = nft_dropped(skb_ptr, reason);
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
	if (!np_translations && (cfg->fields & NP_FIELDS_PACKET) &&
	    !match_tuple(cfg, &tuple))
		return 0;
	len = NP_READ(skb, len);
	if (by & DROP_BY_REASON) {
		key.reason = reason;
		key.facts = np_drop_facts(skb_ptr, skb, dev, &tuple);
		if (has_qdisc_drop)
			take_qdisc(&key, skb_ptr);
	}
	if (by & DROP_BY_PLACE)
		key.place = place;
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
	if (scratch_of(reason) == SCRATCH_TRACEPOINT)
		slot = slot_of(book, &key);
	if (slot && slot->taken && same_key(&slot->key, &key)) {
		slot->count.packets++;
		slot->count.bytes += len;
		return 0;
	}
	if (key.place && only_frees(place)) {
		key.place = deciding(ctx, place);
		slot = NULL;
	}
	if (count_in_book(&key, skb_ptr,
			  to_ptr ? to_ptr : (__u64)NP_READ(skb, sk), &tuple,
			  len) &&
	    slot && !slot->taken) {
		slot->key = key;
		slot->taken = 1;
	}
	return 0;
}

/* All filters that look at headers: now, or before the packet's addresses were translated. */
static __noinline __u64 matches_translated(__u64 skb_ptr, __u32 scratch)
{
	const struct np_config *cfg = np_config_get();
	struct np_two_forms *forms = np_forms_of(skb_ptr, scratch);

	if (!forms)
		return 0;
	if (np_filter_skb((void *)skb_ptr) &&
	    (!(cfg->fields & NP_FIELDS_PACKET) ||
	     match_tuple(cfg, &forms->now)))
		return 1;
	return np_matched_before(skb_ptr, forms);
}

/* One packet that is dropped. The filter and the count are not on one stack: together they are too much for it. */
static __always_inline int dropped(void *ctx, __u64 skb, __u64 to, __u64 place,
				   __u32 reason)
{
	if ((np_config_get()->fields & NP_PAUSED) ||
	    !(np_translations ? matches_translated(skb, scratch_of(reason))
			      : np_filter_skb((void *)skb)) ||
	    (who_on && !who_matches(skb, to))) {
		if (has_nft)
			nft_forget(skb);
		return 0;
	}
	return count_drop(ctx, skb, to, place, reason);
}

#include "drops/drops_device.bpf.h"

/* skb:kfree_skb(skb, location), from 5.17 with the reason, from 6.11 with the receiving socket behind it. */
SEC("raw_tp/kfree_skb")
int drops_freed(struct bpf_raw_tracepoint_args *ctx)
{
	return dropped(ctx, ctx->args[0], has_rx_sock ? ctx->args[3] : 0,
		       ctx->args[1], has_reasons ? (__u32)ctx->args[2] : 0);
}

/* qdisc:qdisc_drop(qdisc, txq, dev, skb, reason): the free of the packet follows. */
SEC("raw_tp/qdisc_drop")
int drops_qdisc(struct bpf_raw_tracepoint_args *ctx)
{
	struct Qdisc *qdisc = (void *)ctx->args[0];
	__u32 zero = 0;
	struct qdisc_said *said = bpf_map_lookup_elem(&qdisc_said, &zero);

	if (!said)
		return 0;
	said->skb = ctx->args[3];
	said->handle = qdisc ? BPF_CORE_READ(qdisc, handle) : 0;
	said->reason = ctx->args[4];
	return 0;
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

char LICENSE[] SEC("license") = "Dual BSD/GPL";
