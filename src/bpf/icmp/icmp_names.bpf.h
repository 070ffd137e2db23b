/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The sending side: what a request goes by where no packet leads to it, and
 * what its packets are told by. Included by icmp_sent.bpf.h.
 */
#ifndef NETPROBE_ICMP_NAMES_BPF_H
#define NETPROBE_ICMP_NAMES_BPF_H

struct name {
	__u64 request; /* 0: two requests go by it */
	__u64 whose; /* socket of its sender */
};

/*
 * Names in the form of a key: as the request left by a device of this
 * namespace (daddr 0: to a group or to all, whoever answers); or by its socket,
 * with netns 0, the socket's address in saddr, and daddr as the sender has it or
 * 0.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 32768);
	__type(key, struct icmp_key);
	__type(value, struct name);
} names SEC(".maps");

static __always_inline void name_put(const struct icmp_key *key, __u64 request,
				     __u64 whose)
{
	struct name new = {.request = request, .whose = whose};
	struct name *old = bpf_map_lookup_elem(&names, key);
	__u64 other = old ? old->request : 0;

	/* A later request of the same sender takes the name over. */
	if (other && old->whose != whose &&
	    bpf_map_lookup_elem(&asking, &other))
		new.request = 0;
	bpf_map_update_elem(&names, key, &new, BPF_ANY);
}

static __always_inline __u64 name_get(const struct icmp_key *key)
{
	struct name *n = bpf_map_lookup_elem(&names, key);

	return n ? n->request : 0;
}

/* The request leaves by a device of the namespace of the key. */
static __noinline int name_wire(const struct icmp_key *key, __u64 request,
				__u64 whose, bool wide)
{
	struct icmp_key any = *key;

	if (!key->netns)
		return 0;
	name_put(key, request, whose);
	if (wide) {
		any.daddr[0] = any.daddr[1] = 0;
		name_put(&any, request, whose);
	}
	return 0;
}

/* The request that a packet is, or answers, in the namespace of the key. */
static __noinline __u64 asked_on_wire(const struct icmp_key *key)
{
	struct icmp_key any = *key;
	__u64 request = name_get(key);

	if (request)
		return request;
	any.daddr[0] = any.daddr[1] = 0;
	return name_get(&any);
}

/* The key becomes the name by socket. */
static __always_inline void by_socket(struct icmp_key *key, __u64 sock)
{
	key->saddr[0] = sock;
	key->saddr[1] = 0;
	key->netns = 0;
}

static __noinline int name_socket(const struct icmp_key *key, __u64 request,
				  __u64 sock)
{
	struct icmp_key name = *key;

	by_socket(&name, sock);
	name_put(&name, request, sock);
	/* Where it sends to several hosts at once: of none. */
	sock = name.daddr[0] ^ name.daddr[1];
	name.daddr[0] = name.daddr[1] = 0;
	name_put(&name, request, sock);
	return 0;
}

/* The request that a reply answers, by the socket that gets the reply. */
static __noinline __u64 asked_by(__u64 sock, const struct icmp_key *key)
{
	struct icmp_key name = *key;
	__u64 request;

	by_socket(&name, sock);
	request = name_get(&name);
	if (request)
		return request;
	/* Sent to a group or to all, or answered by another address. */
	name.daddr[0] = name.daddr[1] = 0;
	return name_get(&name);
}

/* The echo request that is being answered on this CPU. */
struct replying {
	__u64 request;
	__u32 seq;
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct replying);
} replying SEC(".maps");

static __always_inline struct replying *replying_get(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&replying, &zero);
}

/* This kernel answers a request itself: is it one of ours? */
static __always_inline int replies(void *skb_ptr, __u8 version)
{
	struct replying *r = replying_get();
	struct icmp_key key = {};
	__u8 type;

	if (!r)
		return 0;
	r->request = 0;
	if (!read_handled(NP_CAST(sk_buff, skb_ptr), version, &key, &type))
		return 0;
	r->seq = key.seq;
	r->request = follow(skb_ptr, &key, false, false);
	return 0;
}

SEC("kprobe/icmp_echo")
int BPF_KPROBE(replies_4, void *skb)
{
	return replies(skb, 4);
}

/* Or icmpv6_rcv, where the compiler left no icmpv6_echo_reply. */
SEC("kprobe/icmpv6_echo_reply")
int BPF_KPROBE(replies_6, void *skb)
{
	return replies(skb, 6);
}

/* A reply begins its way: made within icmp_echo, it answers the request there. */
static __noinline int reply_begins(void *skb_ptr, const struct icmp_key *key)
{
	struct replying *r = replying_get();
	struct seen s = {.reply = 1};

	if (!r || !r->request || r->seq != key->seq) {
		seen_forget(skb_ptr);
		return 0;
	}
	s.key = *key;
	s.request = r->request;
	r->request = 0;
	count_copy(s.request, true);
	seen_put(skb_ptr, &s);
	return 0;
}

#endif
