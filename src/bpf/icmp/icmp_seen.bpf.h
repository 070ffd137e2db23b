/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Which packet is which, while addresses and ids change on the way: an echo
 * is known by its sk_buff and by its data. A clone has the same data at another
 * address; an sk_buff whose data moves keeps its address.
 *
 * Nothing tells when an sk_buff is freed. But each packet is looked at where its
 * way begins, sent or received, and what is known of its address then is
 * replaced, or removed where the packet is not the one that was there.
 *
 * Included by icmp.bpf.c; needs icmp_packet.bpf.h before it.
 */
#ifndef NETPROBE_ICMP_SEEN_BPF_H
#define NETPROBE_ICMP_SEEN_BPF_H

struct seen {
	struct icmp_times times; /* since it was queued last */
	__u64 request; /* number; 0: none that is looked at */
	struct icmp_key key; /* as it was seen last */
	__u8 reply;
	__u8 delivered; /* to the socket that sent the request */
	__u8 pad[6];
};

/* By address of the sk_buff, and by address of its data. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, __u64);
	__type(value, struct seen);
} seen SEC(".maps");

/* A request of this machine's on its way, until its sender reads the reply. */
struct asked {
	__u64 sock; /* of its sender */
	__u32 netns;
	__u32 tgid;
	/* Of the request and of its replies: how many there are, how many were dropped. */
	__u32 copies[2];
	__u32 drops[2];
	__u8 xmitted;
	__u8 received; /* in another namespace of this kernel */
	__u8 returned;
	__u8 delivered;
	__u8 wide; /* to a group or to all: whoever answers */
	__u8 pad[3];
};

/* By number. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, __u64);
	__type(value, struct asked);
} asking SEC(".maps");

/* The connection that conntrack knows for this packet, or 0. */
static __always_inline __u64 conntrack_of(struct sk_buff *skb)
{
	if (!bpf_core_field_exists(skb->_nfct))
		return 0;
	return NP_READ(skb, _nfct) & ~7ULL;
}

/* A number for a new request: this CPU's next one, and the CPU. */
static __always_inline __u64 new_request(void)
{
	struct np_stats *count = np_stats_get();

	if (!count)
		return 0;
	count->hits++;
	return count->hits << 16 | (__u16)bpf_get_smp_processor_id();
}

/* The same but for the namespace. */
static __always_inline bool same_echo(const struct icmp_key *a,
				      const struct icmp_key *b)
{
	return a->saddr[0] == b->saddr[0] && a->saddr[1] == b->saddr[1] &&
	       a->daddr[0] == b->daddr[0] && a->daddr[1] == b->daddr[1] &&
	       a->id == b->id;
}

/* Without a look at what may be translated. */
static __always_inline struct seen *
seen_at(__u64 at, const struct icmp_key *key, bool reply)
{
	struct seen *s = bpf_map_lookup_elem(&seen, &at);

	if (!s || s->key.seq != key->seq || s->key.version != key->version ||
	    s->reply != reply)
		return NULL;
	return s;
}

static __always_inline void seen_put(void *skb_ptr, const struct seen *s)
{
	__u64 at = (__u64)skb_ptr;

	bpf_map_update_elem(&seen, &at, s, BPF_ANY);
	at = (__u64)NP_READ(NP_CAST(sk_buff, skb_ptr), head);
	bpf_map_update_elem(&seen, &at, s, BPF_ANY);
}

static __always_inline void seen_forget(void *skb_ptr)
{
	__u64 at = (__u64)skb_ptr;

	bpf_map_delete_elem(&seen, &at);
	at = (__u64)NP_READ(NP_CAST(sk_buff, skb_ptr), head);
	bpf_map_delete_elem(&seen, &at);
}

/* A packet on its way to the stack: it is queued by this CPU. */
static __always_inline void seen_queued(struct seen *s, __u8 backlog)
{
	struct icmp_softirq *running = softirq_running();

	s->times.queued = bpf_ktime_get_ns();
	s->times.queued_cpu = bpf_get_smp_processor_id();
	s->times.receive_cpu = s->times.queued_cpu;
	s->times.backlog = backlog;
	if (running)
		s->times.first = *running;
}

/* It has reached the stack. */
static __always_inline void seen_received(struct seen *s, void *skb_ptr)
{
	struct icmp_softirq *running = softirq_running();
	struct seen *before = seen_at((__u64)skb_ptr, &s->key, s->reply);

	/* Of an earlier hop (a bridge, a lower device) nothing is kept. */
	if (before && !before->times.receive)
		s->times = before->times;
	s->times.receive = bpf_ktime_get_ns();
	s->times.receive_cpu = bpf_get_smp_processor_id();
	if (!s->times.queued)
		s->times.queued_cpu = s->times.receive_cpu;
	if (running)
		s->times.last = *running;
}

/* One more packet that is the request (or its reply). */
static __always_inline void count_copy(__u64 request, bool reply)
{
	struct asked *asked = bpf_map_lookup_elem(&asking, &request);

	if (asked)
		__sync_fetch_and_add(&asked->copies[reply & 1], 1);
}

/* What may be known of this address, where it is of this packet. */
static __always_inline struct seen *follow_at(__u64 at, struct sk_buff *skb,
					      const struct icmp_key *key,
					      bool reply, bool begins)
{
	struct seen *s = seen_at(at, key, reply);

	if (s && same_echo(&s->key, key))
		return s;
	/* Where a device hands it over nothing was translated: it is another packet. */
	if (begins)
		bpf_map_delete_elem(&seen, &at);
	return s && !begins && conntrack_of(skb) ? s : NULL;
}

/*
 * The number of the request that this packet is (or answers); 0: of none that
 * is looked at. `begins`: a device hands the packet over.
 */
static __noinline __u64 follow(void *skb_ptr, const struct icmp_key *key,
			       bool reply, bool begins)
{
	struct sk_buff *skb = NP_CAST(sk_buff, skb_ptr);
	__u64 at = (__u64)skb_ptr, head = (__u64)NP_READ(skb, head), request;
	struct seen *s = follow_at(at, skb, key, reply, begins);
	struct seen *data = follow_at(head, skb, key, reply, begins);

	if (s) {
		request = s->request;
		s->key = *key;
		if (request && (!data || data->request != request))
			bpf_map_update_elem(&seen, &head, s, BPF_ANY);
		return request;
	}
	if (!data || !data->request)
		return 0;
	/* A clone. */
	request = data->request;
	data->key = *key;
	bpf_map_update_elem(&seen, &at, data, BPF_ANY);
	count_copy(request, reply);
	return request;
}

#endif
