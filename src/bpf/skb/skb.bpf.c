// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * netprobe skb: one program for each argument position of the skb (1 to 5),
 * attached to every function with such a parameter; two more for functions
 * that also say why they free it; two for those that tracking must know of;
 * one for the tracepoint of drops.
 *
 * The order within a hit is by cost: config map, then sk_buff fields (mark,
 * interface, namespace), then the expression, the packet's headers, the event.
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "skb/skb_event.bpf.h"
#include "common/heartbeat.bpf.h"
#include "common/translated.bpf.h"
#include "skb/skb_helpers.bpf.h"
#include "skb/skb_changes.bpf.h"
#include "skb/skb_flight.bpf.h"

/* How a function was hit, for passed(): its kind and these. */
#define HOW_BEGIN (1U << 16) /* without: ours only where it is tracked */
#define HOW_MATCHED (1U << 17) /* so far */

static __always_inline __u64 passed_by(struct pt_regs *ctx, __u64 skb_ptr,
				       __u64 sk_ptr, __u32 reason, __u32 how,
				       const bool use_cast)
{
	const struct np_config *cfg = np_config_get();
	struct sk_buff *skb = NP_CAST(sk_buff, skb_ptr);
	struct sock *sk = sk_ptr ? NP_CAST(sock, sk_ptr) : NULL;
	struct hit hit = {.kind = (__u16)how, .reason = reason, .sk = sk};
	struct skb_scratch *buf = scratch_get(SCRATCH_PROBE);
	struct np_tuple *tuple;

	if (!skb_ptr || !buf)
		return 0;
	tuple = tuple_place(buf);
	if (wants_tuple(cfg))
		__builtin_memset(tuple, 0, sizeof(*tuple));
	if (!is_ours(cfg, ctx, PT_REGS_SP(ctx), skb, tuple, &hit.packet,
		     how & HOW_MATCHED, how & HOW_BEGIN, use_cast))
		return 0;
	hit.func = func_addr(ctx);
	if (returns_on)
		return_expect(ctx, hit.func, skb_ptr, hit.packet);
	if (who_on)
		who_note(skb, sk, tuple);
	if (sections & (SKB_SECTION_CALLER | SKB_SECTION_NFT))
		hit.caller = caller_addr(ctx);
	if (stack_lacks_caller)
		hit.unseen_caller = PT_REGS_RET(ctx);
	write_event_by(ctx, buf, skb, tuple, &hit, use_cast);
	return 1;
}

/*
 * The second half of a hit, for the few that got so far. A function of its own,
 * so that those that did not need neither its stack nor its registers.
 */
static __noinline __u64 passed(struct pt_regs *ctx, __u64 skb_ptr, __u64 sk_ptr,
			       __u32 reason, __u32 how)
{
	if (use_cast)
		return passed_by(ctx, skb_ptr, sk_ptr, reason, how, true);
	return passed_by(ctx, skb_ptr, sk_ptr, reason, how, false);
}

/* A hit where tracking is on: an skb that the filters refuse may be one of ours. */
static __noinline __u64 handle_tracked(struct pt_regs *ctx, __u64 skb_ptr,
				       __u64 sk_ptr, __u32 reason, __u32 how)
{
	const struct np_config *cfg = np_config_get();

	if (passes_gates(cfg, (void *)skb_ptr, (void *)sk_ptr) &&
	    (!who_on || who_matches(skb_ptr, sk_ptr)))
		how |= HOW_MATCHED;
	else if (cfg->fields & NP_PAUSED)
		return 0;
	return passed(ctx, skb_ptr, sk_ptr, reason, how);
}

/* One hit. Gives true where the skb is one of ours. */
static __always_inline bool handle(struct pt_regs *ctx, __u64 skb_ptr,
				   __u64 sk_ptr, __u16 kind, __u32 reason,
				   bool begin)
{
	__u32 how = kind | (begin ? HOW_BEGIN : 0);

	if (track)
		return handle_tracked(ctx, skb_ptr, sk_ptr, reason, how);
	return passes_gates(np_config_get(), (void *)skb_ptr, (void *)sk_ptr) &&
	       (!who_on || who_matches(skb_ptr, sk_ptr)) &&
	       passed(ctx, skb_ptr, sk_ptr, reason, how | HOW_MATCHED);
}

#define SKB_PROBE(n)                                                         \
	SEC("kprobe/skb_" #n)                                                \
	int skb_##n(struct pt_regs *ctx)                                     \
	{                                                                    \
		handle(ctx, PT_REGS_PARM##n(ctx), 0, SKB_KIND_HIT, 0, true); \
		return 0;                                                    \
	}

SKB_PROBE(1)
SKB_PROBE(2)
SKB_PROBE(3)
SKB_PROBE(4)
SKB_PROBE(5)

/* f(sk, skb) */
SEC("kprobe/skb_sk_2")
int skb_sk_2(struct pt_regs *ctx)
{
	handle(ctx, PT_REGS_PARM2(ctx), PT_REGS_PARM1(ctx), SKB_KIND_HIT, 0,
	       true);
	return 0;
}

/*
 * What frees an skb says so while nothing matches, too: its address may be
 * another's when the run goes on.
 */

/* kfree_skb_reason(skb, reason) and its like (from 5.17). */
SEC("kprobe/skb_drop_1")
int skb_drop_1(struct pt_regs *ctx)
{
	bool ours = handle(ctx, PT_REGS_PARM1(ctx), 0, SKB_KIND_DROP,
			   (__u32)PT_REGS_PARM2(ctx), true);

	if (track && (ours || np_paused()))
		track_dying(TRACK_SKB(1));
	return 0;
}

/* sk_skb_reason_drop(sk, skb, reason) (from 6.11). */
SEC("kprobe/skb_drop_2")
int skb_drop_2(struct pt_regs *ctx)
{
	bool ours = handle(ctx, PT_REGS_PARM2(ctx), PT_REGS_PARM1(ctx),
			   SKB_KIND_DROP, (__u32)PT_REGS_PARM3(ctx), true);

	if (track && (ours || np_paused()))
		track_dying(TRACK_SKB(2));
	return 0;
}

/* consume_skb(skb) and its like, where tracking is on or lives are numbered */
SEC("kprobe/skb_free_1")
int skb_free_1(struct pt_regs *ctx)
{
	if (handle(ctx, PT_REGS_PARM1(ctx), 0, SKB_KIND_HIT, 0, true) ||
	    lives || np_paused())
		track_dying(TRACK_SKB(1));
	return 0;
}

/* kfree_skbmem(skb), in the same case: the entry goes behind the event. */
SEC("kprobe/skb_gone_1")
int skb_gone_1(struct pt_regs *ctx)
{
	__u64 key = PT_REGS_PARM1(ctx);

	if (handle(ctx, key, 0, SKB_KIND_HIT, 0, false) || lives || np_paused())
		bpf_map_delete_elem(&tracked, &key);
	return 0;
}

/* --filter-non-skb-funcs: shown below a function that has a packet of ours. */
SEC("kprobe/skb_near")
int skb_near(struct pt_regs *ctx)
{
	const struct np_config *cfg = np_config_get();
	struct skb_context *c;

	if (cfg->fields & NP_PAUSED)
		return 0;
	c = track_below(ctx, PT_REGS_SP(ctx));
	if (c)
		write_short(ctx, SKB_KIND_NEAR, func_addr(ctx), c->skb,
			    c->packet, 0);
	return 0;
}

/* The identity of a packet that is dropped, a new one with `begin`: a function of its own, for its stack. */
static __noinline __u64 drop_packet(__u64 skb_ptr, bool begin)
{
	struct sk_buff *skb = NP_CAST(sk_buff, skb_ptr);
	__u64 packet;

	if (!begin)
		return track_find(skb);
	packet = track_number();
	track_set(skb, packet, false);
	return packet;
}

/* What the rules ask about a dropped packet: a function of its own, for its stack. */
static __noinline __u64 drop_facts(__u64 skb_ptr, const struct np_tuple *tuple)
{
	struct sk_buff *skb = NP_CAST(sk_buff, skb_ptr);

	return tuple ? np_drop_facts(skb_ptr, skb, NP_READ(skb, dev), tuple)
		     : 0;
}

/* The filters by mark, interface and namespace. */
static __always_inline bool drop_is_there(__u64 skb_ptr, __u64 sk_ptr,
					  const bool use_cast)
{
	const struct np_config *cfg = np_config_get();
	struct sk_buff *skb = NP_CAST(sk_buff, skb_ptr);
	struct sock *sk = sk_ptr ? NP_CAST(sock, sk_ptr) : NULL;

	if ((cfg->fields & NP_FIELD_MARK) && !match_mark(cfg, skb, use_cast))
		return false;
	return !(cfg->fields & NP_FIELDS_DEVICE) ||
	       match_device(cfg, skb, sk, use_cast);
}

/* The filters, for what the packet was before its addresses were translated. */
static __noinline __u64 drop_translated(__u64 skb_ptr, __u64 sk_ptr,
					__u32 scratch)
{
	const struct np_config *cfg = np_config_get();
	struct np_two_forms *forms;

	if (cfg->fields & NP_PAUSED)
		return 0;
	if (!(use_cast ? drop_is_there(skb_ptr, sk_ptr, true)
		       : drop_is_there(skb_ptr, sk_ptr, false)))
		return 0;
	forms = np_forms_of(skb_ptr, scratch);
	return forms && np_matched_before(skb_ptr, forms);
}

/*
 * A drop, if it is one of ours. `sk`: the socket that the packet was on its way to,
 * or 0. `scratch`: SCRATCH_* of the program.
 */
static __always_inline void dropped(void *ctx, __u64 skb_ptr, __u64 sk_ptr,
				    __u64 place, __u32 reason,
				    struct skb_drop *drop, __u32 scratch)
{
	const struct np_config *cfg = np_config_get();
	struct sk_buff *skb = NP_CAST(sk_buff, skb_ptr);
	struct hit hit = {
		.kind = SKB_KIND_DROPPED,
		.func = place,
		.reason = reason,
		.drop = drop,
	};
	struct skb_scratch *buf = scratch_get(scratch);
	struct np_tuple *tuple;

	if (!buf)
		return;
	tuple = tuple_place(buf);
	__builtin_memset(tuple, 0, sizeof(*tuple));
	if (sk_ptr)
		hit.sk = NP_CAST(sock, sk_ptr);
	if (track)
		hit.packet = drop_packet(skb_ptr, false);
	np_read_tuple(skb, tuple);
	if (!hit.packet && (cfg->fields & NP_FIELDS_PACKET) &&
	    !match_tuple(cfg, tuple) &&
	    !(np_translations && drop_translated(skb_ptr, sk_ptr, scratch)))
		return;
	if (track && !hit.packet)
		hit.packet = drop_packet(skb_ptr, true);
	drop->others = drop_others(skb);
	drop->cloned = drop_cloned(skb);
	drop->qdisc = drop_qdisc(skb);
	drop->facts = drop_facts(skb_ptr, tuple);
	drop->pkt_type = BPF_CORE_READ_BITFIELD_PROBED(skb, pkt_type);
	drop_callers(ctx, place, drop);
	write_event_by(ctx, buf, skb, tuple, &hit, use_cast);
}

/* Is a drop one of ours? A packet that is tracked is, whatever its headers are now. */
static __always_inline bool drop_wanted(const struct np_config *cfg, __u64 skb,
					__u64 sk, __u32 scratch)
{
	if (track && drop_packet(skb, false))
		return true;
	if (!passes_gates(cfg, (void *)skb, (void *)sk) &&
	    !(np_translations && drop_translated(skb, sk, scratch)))
		return false;
	return !who_on || who_matches(skb, sk);
}

/*
 * --drops: tracepoint skb:kfree_skb(skb, location), from 5.17 with the reason,
 * from 6.11 with the receiving socket behind it.
 */
SEC("raw_tp/kfree_skb")
int skb_dropped(struct bpf_raw_tracepoint_args *ctx)
{
	const struct np_config *cfg = np_config_get();
	struct skb_drop *drop;
	__u64 sk = 0;

	if ((cfg->fields & NP_PAUSED) ||
	    !drop_wanted(cfg, ctx->args[0], 0, SCRATCH_TRACEPOINT))
		return 0;
	drop = drop_new(SCRATCH_TRACEPOINT);
	if (!drop)
		return 0;
	if (has_rx_sock)
		sk = ctx->args[3];
	else if (rx_watched)
		sk = rx_sock_of(ctx, ctx->args[0]);
	if (rx_watched && !has_reasons)
		drop->lost = rx_refusal_of(ctx, ctx->args[0]);
	if (listens)
		drop_of_ack(ctx, ctx->args[0], drop);
	dropped(ctx, ctx->args[0], sk, ctx->args[1],
		has_reasons ? (__u32)ctx->args[2] : 0, drop,
		SCRATCH_TRACEPOINT);
	return 0;
}

/* The end of tcp_conn_request: without an answer its SYN is lost. */
SEC("kprobe/listen_syn_end")
int listen_syn_end(struct pt_regs *ctx)
{
	const struct np_config *cfg = np_config_get();
	__u64 key = track_context(regs_address(ctx));
	struct listen_call *call = bpf_map_lookup_elem(&listen_syns, &key);
	struct listen_call ended;
	struct skb_drop *drop;

	if (!call)
		return 0;
	ended = *call;
	bpf_map_delete_elem(&listen_syns, &key);
	if (ended.answered || !ended.skb || (cfg->fields & NP_PAUSED) ||
	    !drop_wanted(cfg, ended.skb, ended.sk, SCRATCH_PROBE))
		return 0;
	drop = drop_new(SCRATCH_PROBE);
	if (!drop)
		return 0;
	drop->lost = ended.lost;
	drop->backlog = ended.queue.held;
	drop->limit = ended.queue.limit;
	dropped(ctx, ended.skb, ended.sk, ended.func, 0, drop, SCRATCH_PROBE);
	return 0;
}

/*
 * --drops with tracking, f(skb, ...): where a packet may match before something
 * changes its headers. nf_hook_slow() is where netfilter does.
 */
SEC("kprobe/drop_begin")
int drop_begin(struct pt_regs *ctx)
{
	const struct np_config *cfg = np_config_get();
	struct skb_scratch *buf = scratch_get(SCRATCH_PROBE);
	__u64 skb = PT_REGS_PARM1(ctx), packet = 0;
	struct np_tuple *tuple;

	if (!buf || !passes_gates(cfg, (void *)skb, NULL) ||
	    (who_on && !who_matches(skb, 0)))
		return 0;
	tuple = tuple_place(buf);
	__builtin_memset(tuple, 0, sizeof(*tuple));
	is_ours(cfg, ctx, PT_REGS_SP(ctx), NP_CAST(sk_buff, skb), tuple,
		&packet, true, true, use_cast);
	return 0;
}

/* tcp_v4_syn_recv_sock(sk, skb, ...) and its like */
SEC("kprobe/listen_ack")
int listen_ack(struct pt_regs *ctx)
{
	const struct np_config *cfg = np_config_get();
	__u64 key = track_context(regs_address(ctx));
	struct listen_call call = {
		.sk = PT_REGS_PARM1(ctx),
		.skb = PT_REGS_PARM2(ctx),
		.answered = 1,
	};

	/* Its free has to be wanted too, or the entry would stay for another packet. */
	if (!drop_wanted(cfg, call.skb, 0, SCRATCH_PROBE))
		return 0;
	call.lost = np_accept_queue_full((void *)call.sk, &call.queue)
			    ? SKB_LOST_ACCEPT_QUEUE
			    : SKB_LOST_CHILD;
	bpf_map_update_elem(&listen_acks, &key, &call, BPF_ANY);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
