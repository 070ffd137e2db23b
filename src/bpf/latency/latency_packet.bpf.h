/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Packets on their way, by the address of the sk_buff, and the histograms of their
 * stages. The time between two places belongs to one stage: so the stages of a packet
 * add up to its total.
 */
#ifndef NETPROBE_LATENCY_PACKET_BPF_H
#define NETPROBE_LATENCY_PACKET_BPF_H

#include "common/cgroup.bpf.h"

/* LAT_BY_* */
const volatile __u8 by = 0;
/* Packets that took at least this long are sent as events; 0: none. */
const volatile __u64 min_ns = 0;

/* LAT_WHOSE_*: packets that such a process has read or written; 0: all. */
const volatile __u8 whose = 0;
const volatile __u32 whose_tgid = 0;
const volatile __u32 whose_uid = 0;
const volatile __u64 whose_cgroup = 0;
const volatile __u64 whose_comm[2] = {};

/* What clocks of cards may be before CLOCK_MONOTONIC, ns: as CLOCK_REALTIME is, as CLOCK_TAI is. */
const volatile __s64 nic_clock[2] = {};

/* For the skeleton's types. */
enum lat_whose lat_whose_type;
enum lat_kind lat_kind_type;
enum lat_way lat_way_type;
enum lat_stage lat_stage_type;
enum lat_place lat_place_type;
enum lat_flag lat_flag_type;
enum lat_by lat_by_type;
enum lat_buckets lat_buckets_type;
struct lat_hist lat_hist_type;
struct lat_key lat_key_type;
struct lat_packet lat_packet_type;
struct lat_reader lat_reader_type;
struct lat_sent lat_sent_type;

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, __u64);
	__type(value, struct lat_packet);
} packets SEC(".maps");

/* All zeros. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct lat_packet);
} no_packet SEC(".maps");

/* By way * LAT_STAGES + stage. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, LAT_WAYS *LAT_STAGES);
	__type(key, __u32);
	__type(value, struct lat_hist);
} hists SEC(".maps");

/* The same with --by. Its size is set before loading. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 1);
	__type(key, struct lat_key);
	__type(value, struct lat_hist);
} hists_by SEC(".maps");

/* All zeros: the begin of a row. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct lat_hist);
} no_hist SEC(".maps");

static __always_inline __u64 lat_bucket(__u64 ns)
{
	__u32 bits = 1;
	__u64 x = ns;

	if (ns < LAT_FINE)
		return ns;
	if (ns >> LAT_BITS)
		return LAT_BUCKETS - 1;
	if (x >> 32) {
		x >>= 32;
		bits += 32;
	}
	if (x >> 16) {
		x >>= 16;
		bits += 16;
	}
	if (x >> 8) {
		x >>= 8;
		bits += 8;
	}
	if (x >> 4) {
		x >>= 4;
		bits += 4;
	}
	if (x >> 2) {
		x >>= 2;
		bits += 2;
	}
	bits += x >> 1;
	return (bits - 4) * LAT_FINE + ((ns >> (bits - 5)) & (LAT_FINE - 1));
}

/* The histogram of a row of --by. NULL: no room. */
static __noinline struct lat_hist *lat_row(__u64 of, __u32 way, __u32 stage)
{
	struct lat_key key = {.by = of, .way = way, .stage = stage};
	struct lat_hist *hist = bpf_map_lookup_elem(&hists_by, &key), *none;
	__u32 zero = 0;

	if (hist)
		return hist;
	none = bpf_map_lookup_elem(&no_hist, &zero);
	if (none)
		bpf_map_update_elem(&hists_by, &key, none, BPF_NOEXIST);
	hist = bpf_map_lookup_elem(&hists_by, &key);
	if (!hist)
		np_count_map_full();
	return hist;
}

/*
 * One more time of a stage. A softirq may come in between: atomically. Not static: so
 * the verifier checks it once.
 */
__noinline int lat_count(__u64 of, __u32 way, __u32 stage, __u64 ns)
{
	__u32 at = way * LAT_STAGES + stage;
	struct lat_hist *hist;
	__u64 bucket;

	if (by)
		hist = lat_row(of, way, stage);
	else
		hist = bpf_map_lookup_elem(&hists, &at);
	if (!hist)
		return 0;
	__sync_fetch_and_add(&hist->count, 1);
	__sync_fetch_and_add(&hist->sum, ns);
	if (ns > hist->max)
		hist->max = ns;
	bucket = lat_bucket(ns);
	/* For the verifier, which must see the comparison of the register that is used. */
	asm volatile("" : "+r"(bucket));
	if (bucket < LAT_BUCKETS)
		__sync_fetch_and_add(&hist->buckets[bucket], 1);
	return 0;
}

static __always_inline __u16 lat_port(const struct np_tuple *t)
{
	/* The service's: mostly the lower one. */
	return t->sport < t->dport ? t->sport : t->dport;
}

static __always_inline __u64 lat_by_value(const struct lat_packet *p)
{
	switch (by) {
	case LAT_BY_CPU:
		return p->cpu;
	case LAT_BY_DEVICE:
		return (__u64)p->netns << 32 | p->ifindex;
	case LAT_BY_PORT:
		return lat_port(&p->tuple);
	case LAT_BY_PROCESS:
		return p->tgid;
	case LAT_BY_CGROUP:
		return p->cgroup;
	}
	return 0;
}

static __always_inline void lat_send(void *ctx, struct lat_packet *p)
{
	np_head_fill(&p->head, LAT_KIND_PACKET);
	np_output(ctx, &p->head, sizeof(*p));
}

/* The packet has come as far as it is followed: its stages count, and it is sent where it was slow. */
__hidden __noinline int lat_finish(void *ctx, struct lat_packet *p)
{
	__u64 total, of;
	__u32 left;

	if (!p || !(p->flags & LAT_FLAG_MATCHES) || np_paused())
		return 0;
	if (whose && !(p->flags & LAT_FLAG_THEIRS))
		return 0;
	total = p->last - p->first;
	of = lat_by_value(p);
	left = p->seen & ~p->counted;
	p->counted = p->seen;
	for (__u32 i = 0; i < LAT_TOTAL; i++)
		if (left & (1U << i))
			lat_count(of, p->way, i, p->stage[i]);
	if (p->flags & LAT_FLAG_WHOLE)
		lat_count(of, p->way, LAT_TOTAL, total);
	if (min_ns && total >= min_ns)
		lat_send(ctx, p);
	return 0;
}

static __always_inline bool lat_is_out(const struct lat_packet *p)
{
	return p->way != LAT_IN && p->place == LAT_AT_DRIVER_OUT;
}

/* Given to a driver: that is its end. */
static __always_inline void lat_gone(void *ctx, struct lat_packet *p)
{
	p->flags |= LAT_FLAG_WHOLE;
	lat_finish(ctx, p);
}

/* What stands at this address: a packet, or one that has ended. */
static __always_inline struct lat_packet *lat_at(__u64 skb)
{
	return bpf_map_lookup_elem(&packets, &skb);
}

static __always_inline struct lat_packet *lat_known(struct lat_packet *p)
{
	return p && p->place != LAT_AT_END ? p : NULL;
}

static __always_inline struct lat_packet *lat_find(__u64 skb)
{
	return lat_known(lat_at(skb));
}

/*
 * Nothing is known of this address any more. What is in the map stays there: the memory of
 * an sk_buff is soon used again, and to write in place costs less than to insert.
 */
static __always_inline void lat_forget(__u64 skb)
{
	struct lat_packet *p = lat_at(skb);

	if (p)
		p->place = LAT_AT_END;
}

/* The packet has come to a place: the time since the last one is the stage's. */
static __always_inline void lat_pass(struct lat_packet *p, __u32 stage,
				     __u8 place)
{
	__u64 now = bpf_ktime_get_ns();

	p->stage[stage] += now - p->last;
	p->seen |= 1U << stage;
	p->last = now;
	p->place = place;
}

/* A device that is a pointer, and its namespace. */
static __always_inline void lat_take_device(struct lat_packet *p,
					    struct sk_buff *skb)
{
	struct net_device *dev = NP_READ(skb, dev);
	struct net *net;

	if (!np_is_pointer(dev))
		return;
	p->ifindex = NP_READ(dev, ifindex);
	net = NP_READ(dev, nd_net.net);
	p->netns = net ? NP_READ(net, ns.inum) : 0;
}

static __always_inline __u32 lat_ifindex(__u64 skb_ptr)
{
	struct net_device *dev = NP_READ(NP_CAST(sk_buff, skb_ptr), dev);

	return np_is_pointer(dev) ? NP_READ(dev, ifindex) : 0;
}

static __always_inline __u64 lat_data(__u64 skb_ptr)
{
	return (__u64)NP_READ(NP_CAST(sk_buff, skb_ptr), head);
}

/* A card whose packets wait longer has another clock. */
#define LAT_NIC_MAX 1000000000ULL

/* The card may have noted when the packet came: it begins then. */
static __always_inline void lat_take_nic(struct lat_packet *p,
					 struct sk_buff *skb)
{
	const void *stamps =
		(void *)p->data + NP_READ(skb, end) +
		bpf_core_field_offset(struct skb_shared_info, hwtstamps);
	__u64 stamp = 0, wait;

	if (use_cast)
		stamp = NP_TYPED(timespec64, stamps)->tv_sec;
	else
		bpf_probe_read_kernel(&stamp, sizeof(stamp), stamps);
	if (!stamp)
		return;
	for (int i = 0; i < 2; i++) {
		wait = p->first + nic_clock[i] - stamp;
		if (wait < LAT_NIC_MAX) {
			p->first -= wait;
			p->stage[LAT_NIC] = wait;
			p->seen |= 1U << LAT_NIC;
			return;
		}
	}
}

/*
 * A packet begins where nothing is known of it; `p` stood at its address. It is too large
 * for the stack, with those of its callers.
 */
static __noinline struct lat_packet *
lat_begin(struct lat_packet *p, __u64 skb_ptr, __u8 way, __u8 place)
{
	struct lat_packet *none;
	struct sk_buff *skb = NP_CAST(sk_buff, skb_ptr);
	__u32 zero = 0;

	if (p) {
		__builtin_memset(p, 0, sizeof(*p));
	} else {
		none = bpf_map_lookup_elem(&no_packet, &zero);
		if (none)
			bpf_map_update_elem(&packets, &skb_ptr, none, BPF_ANY);
		p = lat_at(skb_ptr);
		if (!p)
			return NULL;
	}
	p->way = way;
	p->place = place;
	p->first = p->last = bpf_ktime_get_ns();
	p->cpu = bpf_get_smp_processor_id();
	p->len = NP_READ(skb, len);
	p->data = (__u64)NP_READ(skb, head);
	lat_take_device(p, skb);
	if (way == LAT_IN)
		lat_take_nic(p, skb);
	return p;
}

static __always_inline bool lat_fields_match(const struct np_config *cfg,
					     struct lat_packet *p,
					     struct sk_buff *skb)
{
	__u32 f = cfg->fields;

	if ((f & NP_FIELD_NETNS) && p->netns != cfg->netns)
		return false;
	if ((f & NP_FIELD_IFINDEX) && p->ifindex != cfg->ifindex)
		return false;
	if ((f & NP_FIELD_MARK) &&
	    (NP_READ(skb, mark) & cfg->mark_mask) != cfg->mark)
		return false;
	if (!(f & NP_FIELDS_PACKET) && by != LAT_BY_PORT)
		return true;
	__builtin_memset(&p->tuple, 0, sizeof(p->tuple));
	np_read_tuple(skb, &p->tuple);
	return !(f & NP_FIELDS_PACKET) || match_tuple(cfg, &p->tuple);
}

/* The packet has all of its headers: is it one to follow? Else it is forgotten. */
__hidden __noinline int lat_match(__u64 skb_ptr, struct lat_packet *p)
{
	const struct np_config *cfg = np_config_get();

	if (!p || (p->flags & LAT_FLAG_MATCHES))
		return 0;
	if (!(cfg->fields & NP_PAUSED) && np_filter_skb((void *)skb_ptr) &&
	    lat_fields_match(cfg, p, NP_CAST(sk_buff, skb_ptr)))
		p->flags |= LAT_FLAG_MATCHES;
	else
		p->place = LAT_AT_END;
	return 0;
}

/* Who and where, of a packet that has been slow up to now: its headers are there now. */
__hidden __noinline int lat_look(__u64 skb_ptr, struct lat_packet *p)
{
	if (!p || !min_ns || p->last - p->first < min_ns || p->tuple.l3_version)
		return 0;
	np_read_tuple(NP_CAST(sk_buff, skb_ptr), &p->tuple);
	return 0;
}

/* The process that is current is one that is asked for. */
static __noinline __attribute__((unused)) int lat_is_theirs(void)
{
	__u64 name[2] = {};

	if ((whose & LAT_WHOSE_PID) &&
	    bpf_get_current_pid_tgid() >> 32 != whose_tgid)
		return 0;
	if ((whose & LAT_WHOSE_UID) &&
	    (__u32)bpf_get_current_uid_gid() != whose_uid)
		return 0;
	if ((whose & LAT_WHOSE_CGROUP) && !np_current_is_below(whose_cgroup))
		return 0;
	if (whose & LAT_WHOSE_COMM) {
		bpf_get_current_comm(name, sizeof(name));
		if (name[0] != whose_comm[0] || name[1] != whose_comm[1])
			return 0;
	}
	return 1;
}

/* The process that is current wrote or read the packet. */
static __always_inline void lat_claim(struct lat_packet *p)
{
	bool slow = min_ns && p->last - p->first >= min_ns;

	if (whose && lat_is_theirs())
		p->flags |= LAT_FLAG_THEIRS;
	else if (whose)
		p->flags &= ~LAT_FLAG_THEIRS;
	p->tgid = bpf_get_current_pid_tgid() >> 32;
	if (by == LAT_BY_CGROUP || slow)
		p->cgroup = bpf_get_current_cgroup_id();
	if (slow)
		bpf_get_current_comm(p->comm, sizeof(p->comm));
}

#endif
