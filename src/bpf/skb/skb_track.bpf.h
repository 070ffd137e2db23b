/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Tracking: a packet that matched once keeps its identity, whatever its
 * headers become, until its sk_buff is freed.
 *
 * The map `tracked` goes from an sk_buff's address to the packet. An address
 * is used again soon after it is freed, and a probe may be skipped, so an entry
 * is believed only while skb->head is the one it was seen with. On its way out
 * an skb is marked as dying: from then on its data and length must be the same
 * too (nothing changes them between consume_skb and kfree_skbmem, and a new
 * packet at that address has others), and kfree_skbmem removes the entry. What
 * goes another way (napi's cache, bulk frees) stays marked until its address
 * is used again or user space sweeps the map.
 *
 * Needs compat.bpf.h and event.bpf.h before it.
 */
#ifndef NETPROBE_SKB_TRACK_BPF_H
#define NETPROBE_SKB_TRACK_BPF_H

#include "common/stack.bpf.h"
#include "skb/skb.h"

/* --filter-track-skb */
const volatile __u8 track = 0;
/* Number the lives of sk_buffs, without tracking: from the first event to the free. */
const volatile __u8 lives = 0;
/* --filter-track-skb-by-stackid */
const volatile __u8 track_stack = 0;

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u64);
	__type(value, struct skb_track);
} tracked SEC(".maps");

/*
 * The packet that a thread, or a CPU's interrupt stack, is busy with: what runs
 * below the outermost function that was seen with it was called for it. That
 * function's end is not seen, and where the kernel shifts its stack at random
 * (CONFIG_RANDOMIZE_KSTACK_OFFSET) a later system call may run at lower addresses
 * from its start. So the stack pointer alone says nothing: the stack's outer part
 * must be the one that the context was made with, return address by return
 * address.
 */
struct skb_context {
	__u64 packet;
	__u64 skb;
	__u64 sp; /* stack pointer at that function's start */
	__u64 chain; /* of the return addresses from there on outwards */
	__u32 depth; /* how many these are */
	__u32 held; /* a watched program: its end is seen */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, __u64);
	__type(value, struct skb_context);
} contexts SEC(".maps");

/* A power of two above the kernel's own limit (127, kernel.perf_event_max_stack). */
#define TRACK_FRAMES 128

/* Where a stack is read to: too much for the BPF stack. */
struct track_stack {
	__u64 at[TRACK_FRAMES];
	__u32 depth; /* return addresses, without the function that was hit */
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct track_stack);
} track_stacks SEC(".maps");

/* Number of packets that began on this CPU. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} packets SEC(".maps");

struct skb_track skb_track_type;

/* Identity of the packet in `skb`; 0 where it is not tracked. */
static __always_inline __u64 track_find(struct sk_buff *skb)
{
	__u64 key = (__u64)skb, head;
	struct skb_track *t = bpf_map_lookup_elem(&tracked, &key);

	if (!t)
		return 0;
	head = (__u64)NP_READ(skb, head);
	if (t->head != head && t->moving) {
		t->head = head;
		t->moving = 0;
	}
	if (t->head == head &&
	    (!t->dying || (t->data == (__u64)NP_READ(skb, data) &&
			   t->len == NP_READ(skb, len))))
		return t->packet;
	bpf_map_delete_elem(&tracked, &key);
	return 0;
}

/* `moving`: skb->head is about to change, once. */
static __always_inline void track_set(struct sk_buff *skb, __u64 packet,
				      bool moving)
{
	struct skb_track t = {
		.packet = packet,
		.head = (__u64)NP_READ(skb, head),
		.moving = moving,
	};
	__u64 key = (__u64)skb;
	struct np_stats *count;

	if (!bpf_map_update_elem(&tracked, &key, &t, BPF_ANY))
		return;
	count = np_stats_get();
	if (count)
		count->map_full++;
}

/* A new identity: this CPU's next number, and the CPU. */
static __always_inline __u64 track_number(void)
{
	__u32 zero = 0;
	__u64 *n = bpf_map_lookup_elem(&packets, &zero);

	if (!n)
		return 0;
	(*n)++;
	return *n << SKB_PACKET_CPU_BITS |
	       (bpf_get_smp_processor_id() & SKB_PACKET_CPU_MASK);
}

/* The number of this sk_buff's life; a new one with its first event. */
static __always_inline __u64 track_life(struct sk_buff *skb)
{
	__u64 life = track_find(skb);

	if (life)
		return life;
	life = track_number();
	track_set(skb, life, false);
	return life;
}

static __always_inline struct track_stack *track_stack_get(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&track_stacks, &zero);
}

/*
 * A number for the outermost `depth` return addresses of the stack (0: for all of
 * them); 0 where there are no more than so many, or more than can be seen.
 * Not for fentry: the unwinder loses its way in a BPF program's trampoline.
 */
static __noinline __u64 track_chain(void *ctx, __u32 depth)
{
	struct track_stack *s = track_stack_get();
	__u64 chain = 1;
	__u32 count;
	long len;

	if (!s)
		return 0;
	len = bpf_get_stack(ctx, s->at, sizeof(s->at), 0);
	if (len <= 0 || len >= (TRACK_FRAMES - 1) * sizeof(s->at[0]))
		return 0;
	count = (__u32)len / sizeof(s->at[0]);
	s->depth = count - 1;
	if (!depth)
		depth = count - 1;
	else if (count - 1 <= depth)
		return 0;
	for (__u32 i = 1; i < TRACK_FRAMES; i++) {
		if (i > depth)
			break;
		chain = (chain ^ s->at[(count - i) & (TRACK_FRAMES - 1)]) *
			0x9e3779b97f4a7c15;
	}
	return chain;
}

/* The context that this code, entered with this stack pointer, runs in. */
static __always_inline struct skb_context *track_below(void *ctx, __u64 sp)
{
	__u64 key = track_context(sp);
	struct skb_context *c = bpf_map_lookup_elem(&contexts, &key);

	if (!c)
		return NULL;
	if (sp < c->sp && (c->held || track_chain(ctx, c->depth) == c->chain))
		return c;
	/* The outermost function for that packet has returned. */
	bpf_map_delete_elem(&contexts, &key);
	return NULL;
}

static __always_inline void track_remember(void *ctx, __u64 sp, __u64 skb,
					   __u64 packet)
{
	__u64 key = track_context(sp);
	struct skb_context *c = bpf_map_lookup_elem(&contexts, &key);
	struct skb_context new = {.packet = packet, .skb = skb, .sp = sp};
	struct track_stack *s = track_stack_get();

	if (c && c->packet == packet && sp < c->sp) {
		c->skb = skb;
		return;
	}
	new.chain = track_chain(ctx, 0);
	if (s)
		new.depth = s->depth;
	if (new.chain)
		bpf_map_update_elem(&contexts, &key, &new, BPF_ANY);
}

/* A watched program is entered: its context stands until track_release(). */
static __always_inline void track_hold(__u64 sp, __u64 skb, __u64 packet,
				       struct skb_context *outer)
{
	__u64 key = track_context(sp);
	struct skb_context *c = bpf_map_lookup_elem(&contexts, &key);
	struct skb_context new = {
		.packet = packet,
		.skb = skb,
		.sp = sp,
		.held = 1,
	};

	if (c)
		*outer = *c;
	bpf_map_update_elem(&contexts, &key, &new, BPF_ANY);
}

static __always_inline void track_release(__u64 sp,
					  const struct skb_context *outer)
{
	__u64 key = track_context(sp);

	if (outer->packet)
		bpf_map_update_elem(&contexts, &key, outer, BPF_ANY);
	else
		bpf_map_delete_elem(&contexts, &key);
}

/*
 * The identity of the packet in `skb`: `packet` where it is tracked, else that
 * of the stack's packet, else a new one where a filter has matched. 0: not one
 * of ours. With `begin` false nothing begins. `ctx`: that of a kprobe, or NULL,
 * which leaves the stack aside.
 */
static __always_inline __u64 track_packet(void *ctx, __u64 sp,
					  struct sk_buff *skb, __u64 packet,
					  bool matched, bool begin)
{
	struct skb_context *c = NULL;

	if (!packet && begin) {
		if (track_stack && ctx)
			c = track_below(ctx, sp);
		if (c)
			packet = c->packet;
		if (!packet && matched)
			packet = track_number();
		if (packet)
			track_set(skb, packet, false);
	}
	if (packet && track_stack && ctx)
		track_remember(ctx, sp, (__u64)skb, packet);
	return packet;
}

/* The skb is given up: freed, where this was the last reference to it. */
static __always_inline void track_dying(struct sk_buff *skb)
{
	__u64 key = (__u64)skb;
	struct skb_track *t = bpf_map_lookup_elem(&tracked, &key);

	if (!t || t->dying || NP_READ(skb, users.refs.counter) > 1)
		return;
	t->data = (__u64)NP_READ(skb, data);
	t->len = NP_READ(skb, len);
	t->dying = 1;
}

/* `to` gets the packet of `from`. Its memory is new: what is known of it goes. */
static __always_inline void track_copy(struct sk_buff *to, struct sk_buff *from)
{
	__u64 packet = track_find(from);
	__u64 key = (__u64)to;

	/* Its head may not be set yet. */
	if (packet)
		track_set(to, packet, true);
	else
		bpf_map_delete_elem(&tracked, &key);
}

/* `to` swallows `from`, and goes on for both unless it has an identity. */
static __always_inline void track_merge(struct sk_buff *to,
					struct sk_buff *from)
{
	__u64 packet;

	if (track_find(to))
		return;
	packet = track_find(from);
	if (packet)
		track_set(to, packet, false);
}

#define TRACK_SKB(n) NP_CAST(sk_buff, PT_REGS_PARM##n(ctx))

/*
 * Programs without an event, for functions that tracking depends on. A
 * function whose hits are shown has its event from another program.
 */

/* consume_skb(skb) and its like */
SEC("kprobe/track_free_1")
int track_free_1(struct pt_regs *ctx)
{
	track_dying(TRACK_SKB(1));
	return 0;
}

/* sk_skb_reason_drop(sk, skb, reason) */
SEC("kprobe/track_free_2")
int track_free_2(struct pt_regs *ctx)
{
	track_dying(TRACK_SKB(2));
	return 0;
}

/* kfree_skbmem(skb): the last that is heard of it */
SEC("kprobe/track_gone_1")
int track_gone_1(struct pt_regs *ctx)
{
	__u64 key = PT_REGS_PARM1(ctx);

	bpf_map_delete_elem(&tracked, &key);
	return 0;
}

/* __copy_skb_header(new, old) and its like */
SEC("kprobe/track_copy_to_1")
int track_copy_to_1(struct pt_regs *ctx)
{
	track_copy(TRACK_SKB(1), TRACK_SKB(2));
	return 0;
}

/* skb_split(skb, rest, len) */
SEC("kprobe/track_copy_to_2")
int track_copy_to_2(struct pt_regs *ctx)
{
	track_copy(TRACK_SKB(2), TRACK_SKB(1));
	return 0;
}

/* skb_gro_receive(whole, part) */
SEC("kprobe/track_merge_to_1")
int track_merge_to_1(struct pt_regs *ctx)
{
	track_merge(TRACK_SKB(1), TRACK_SKB(2));
	return 0;
}

/* pskb_expand_head(skb, ...): skb->head is about to change. */
SEC("kprobe/track_head_1")
int track_head_1(struct pt_regs *ctx)
{
	__u64 key = PT_REGS_PARM1(ctx);
	struct skb_track *t;

	if (!track_find(TRACK_SKB(1)))
		return 0;
	t = bpf_map_lookup_elem(&tracked, &key);
	if (t)
		t->moving = 1;
	return 0;
}

#endif
