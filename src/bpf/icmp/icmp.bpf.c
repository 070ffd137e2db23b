// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * netprobe icmp: who handles an echo request, and when it was where.
 *
 * Two kprobes say that a request is handled; everything else is raw
 * tracepoints. What they see of all other traffic they leave after three loads
 * (protocol of the skb, its data, protocol of the IP header): what comes behind
 * that is a function of its own, so that all other traffic does not pay for its
 * stack.
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "icmp/icmp.h"
#include "common/packet.h"
#include "common/cast.bpf.h"
#include "common/compat.bpf.h"
#include "common/config.bpf.h"
#include "common/heartbeat.bpf.h"
#include "common/fields.bpf.h"
#include "common/stats.bpf.h"
#include "common/output_ring.bpf.h"
#include "filter/filter.bpf.h"
#include "common/packet.bpf.h"
#include "icmp/icmp_packet.bpf.h"
#include "icmp/icmp_softirq.bpf.h"
#include "icmp/icmp_seen.bpf.h"
#include "icmp/icmp_event.bpf.h"
#include "icmp/icmp_sent.bpf.h"

/* The reply to this request is looked for from now on. */
static __noinline int answer_due(void *skb_ptr, const struct icmp_key *key,
				 __u64 request)
{
	struct sk_buff *skb = skb_ptr;
	struct icmp_key k = *key;

	/* The reply has an address of this host's own. */
	if (BPF_CORE_READ_BITFIELD_PROBED(skb, pkt_type) != NP_PACKET_HOST)
		k.daddr[0] = k.daddr[1] = 0;
	__sync_fetch_and_add(&answers_due, 1);
	bpf_map_update_elem(&answering, &k, &request, BPF_ANY);
	return 0;
}

/*
 * Turns the key of a reply that leaves into what it was when the reply was
 * made: conntrack has both forms of a connection that it translates.
 */
static __always_inline void untranslate(struct icmp_key *key,
					struct sk_buff *skb)
{
	struct nf_conn *ct = (void *)conntrack_of(skb);
	struct nf_conntrack_tuple t = {};

	if (!ct || !bpf_core_field_exists(ct->tuplehash))
		return;
	/* [1]: IP_CT_DIR_REPLY */
	BPF_CORE_READ_INTO(&t, ct, tuplehash[1].tuple);
	if (!t.src.u.icmp.id && !t.src.u3.all[0])
		return;
	key->id = bpf_ntohs(t.src.u.icmp.id);
	if (key->version == 4) {
		np_map_v4(key->saddr, t.dst.u3.ip);
		np_map_v4(key->daddr, t.src.u3.ip);
	} else {
		__builtin_memcpy(key->saddr, &t.dst.u3.ip6, 16);
		__builtin_memcpy(key->daddr, &t.src.u3.ip6, 16);
	}
}

static __always_inline __u64 answer_take(const struct icmp_key *key)
{
	__u64 *found = bpf_map_lookup_elem(&answering, key);
	__u64 request = found ? *found : 0;

	if (request && !bpf_map_delete_elem(&answering, key))
		__sync_fetch_and_add(&answers_due, -1);
	return request;
}

/* The number of the request that this packet is the reply to; it is no longer looked for. */
static __noinline __u64 answer_found(void *skb_ptr, const struct icmp_key *key)
{
	struct icmp_key k = *key;
	__u64 request;

	untranslate(&k, NP_CAST(sk_buff, skb_ptr));
	request = answer_take(&k);
	if (request)
		return request;
	k.daddr[0] = k.daddr[1] = 0;
	return answer_take(&k);
}

/* A request is handled: takes what was seen of its way in. */
static __noinline int take_times(void *skb_ptr, const struct icmp_key *key,
				 struct icmp_times *to)
{
	struct sk_buff *skb = NP_CAST(sk_buff, skb_ptr);
	struct seen *s = seen_at((__u64)skb_ptr, key, false);

	if (!s)
		s = seen_at((__u64)NP_READ(skb, head), key, false);
	if (!s)
		return 0;
	*to = s->times;
	seen_forget(skb_ptr);
	return 0;
}

/* A request is handled now: skb's transport header is the ICMP header. */
static __always_inline int handle_echo(void *ctx, void *skb_ptr, __u8 version)
{
	const struct np_config *cfg = np_config_get();
	struct sk_buff *skb = NP_CAST(sk_buff, skb_ptr);
	struct net_device *dev = NP_READ(skb, dev);
	struct icmp_event e = {};

	if (!read_handled(skb, version, &e.key, &e.icmp_type))
		return 0;
	if (want_cpu >= 0 && bpf_get_smp_processor_id() != want_cpu)
		return 0;
	if (!match(cfg, skb, &e.key, dev) || !np_filter_skb(skb_ptr))
		return 0;
	np_head_fill(&e.head, ICMP_KIND_ECHO);
	e.context = current_context(&e.head);
	read_dev(&e, dev);
	e.len = l3_len(skb);
	e.request = new_request();
	if (with_stages) {
		take_times(skb_ptr, &e.key, &e.times);
		answer_due(skb_ptr, &e.key, e.request);
	}
	np_output(ctx, &e.head, sizeof(e));
	return 0;
}

SEC("kprobe/icmp_echo")
int BPF_KPROBE(icmp_echo, void *skb)
{
	return handle_echo(ctx, skb, 4);
}

/* Or icmpv6_rcv, where the compiler left no icmpv6_echo_reply. */
SEC("kprobe/icmpv6_echo_reply")
int BPF_KPROBE(icmpv6_echo, void *skb)
{
	return handle_echo(ctx, skb, 6);
}

static __noinline int queued_echo(void *skb_ptr, __u8 backlog)
{
	struct seen s = {};

	if (read_received(NP_CAST(sk_buff, skb_ptr), &s.key) != ECHO_REQUEST)
		return 0;
	seen_queued(&s, backlog);
	seen_put(skb_ptr, &s);
	return 0;
}

SEC("raw_tp/netif_rx")
int netif_rx(struct bpf_raw_tracepoint_args *ctx)
{
	if (may_echo_received((void *)ctx->args[0]))
		queued_echo((void *)ctx->args[0], 1);
	return 0;
}

/* At napi_gro_receive_entry too. */
SEC("raw_tp/netif_receive_skb_entry")
int receive_entry(struct bpf_raw_tracepoint_args *ctx)
{
	if (may_echo_received((void *)ctx->args[0]))
		queued_echo((void *)ctx->args[0], 0);
	return 0;
}

static __noinline int received_echo(void *skb_ptr)
{
	struct seen s = {};

	if (read_received(NP_CAST(sk_buff, skb_ptr), &s.key) != ECHO_REQUEST)
		return 0;
	seen_received(&s, skb_ptr);
	seen_put(skb_ptr, &s);
	return 0;
}

SEC("raw_tp/netif_receive_skb")
int receive(struct bpf_raw_tracepoint_args *ctx)
{
	if (may_echo_received((void *)ctx->args[0]))
		received_echo((void *)ctx->args[0]);
	return 0;
}

static __noinline int answered(struct bpf_raw_tracepoint_args *ctx)
{
	void *skb_ptr = (void *)ctx->args[0];
	struct sk_buff *skb = NP_CAST(sk_buff, skb_ptr);
	struct icmp_event e = {};

	if (read_sent(skb, &e.key) != ECHO_REPLY)
		return 0;
	e.request = answer_found(skb_ptr, &e.key);
	if (!e.request || np_ended())
		return 0;
	np_head_fill(&e.head, ICMP_KIND_REPLY);
	read_dev(&e, NP_CAST(net_device, ctx->args[1]));
	e.len = l3_len(skb);
	np_output(ctx, &e.head, sizeof(e));
	return 0;
}

/* A packet is handed to a device's driver. */
SEC("raw_tp/net_dev_start_xmit")
int xmit(struct bpf_raw_tracepoint_args *ctx)
{
	if (answers_due && may_echo_sent((void *)ctx->args[0]))
		answered(ctx);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
