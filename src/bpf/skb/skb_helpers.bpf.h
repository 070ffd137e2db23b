/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * --filter-track-bpf-helpers, --output-bpfmap: kernel functions that tc and XDP
 * programs call, where they run below a function, or in a program, that has a
 * packet of ours. Our own kprobe programs call some of them too: the kernel
 * skips a probe in a probe. skb_prog.bpf.c says itself when it is at work.
 *
 * Needs skb_event.bpf.h before it.
 */
#ifndef NETPROBE_SKB_HELPERS_BPF_H
#define NETPROBE_SKB_HELPERS_BPF_H

/* A look-up that has not ended. */
struct map_call {
	__u64 func;
	__u64 skb;
	__u64 packet;
	__u64 map;
	__u64 key;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, __u64); /* see track_context */
	__type(value, struct map_call);
} map_calls SEC(".maps");

struct skb_map skb_map_type;
enum skb_map_part skb_map_part_type;

/* The packet that this function is called for; NULL: none of ours. */
static __always_inline struct skb_context *helper_context(struct pt_regs *ctx)
{
	const struct np_config *cfg = np_config_get();
	__u32 zero = 0;
	__u32 *on = bpf_map_lookup_elem(&watching, &zero);

	if ((cfg->fields & NP_PAUSED) || !on || *on)
		return NULL;
	return track_below(ctx, PT_REGS_SP(ctx));
}

SEC("kprobe/skb_helper")
int skb_helper(struct pt_regs *ctx)
{
	struct skb_context *c = helper_context(ctx);

	if (c)
		write_short(ctx, SKB_KIND_NEAR, func_addr(ctx), c->skb,
			    c->packet, 0);
	return 0;
}

/* As much of a key or value as there is room for; false: it cannot be read. */
static __always_inline bool read_part(__u8 *to, __u32 size, __u64 from)
{
	__u64 len = size;

	/* The verifier must see the bounds on the register that goes into the call. */
	asm volatile("" : "+r"(len));
	if (len < 1)
		return false;
	if (len > SKB_MAP_BYTES)
		len = SKB_MAP_BYTES;
	return bpf_probe_read_kernel(to, len, (const void *)from) == 0;
}

/* `value` 0: there is none. */
static __always_inline void write_map(void *ctx, const struct map_call *call,
				      __u64 value)
{
	struct bpf_map *map = (struct bpf_map *)call->map;
	struct skb_scratch *buf;
	struct skb_event *event;
	struct skb_map *m;
	__u32 zero = 0;

	buf = bpf_map_lookup_elem(&scratch, &zero);
	if (!buf)
		return;
	event = (struct skb_event *)buf->bytes;
	np_head_fill(&event->head, SKB_KIND_NEAR);
	event->skb = call->skb;
	event->func = call->func;
	event->sections = SKB_SECTION_PACKET | SKB_SECTION_MAP;
	event->reason = 0;
	*(__u64 *)&buf->bytes[sizeof(*event)] = call->packet;
	m = (struct skb_map *)&buf->bytes[sizeof(*event) + sizeof(__u64)];
	m->known = 0;
	m->id = BPF_CORE_READ(map, id);
	m->key_size = BPF_CORE_READ(map, key_size);
	m->value_size = BPF_CORE_READ(map, value_size);
	bpf_probe_read_kernel(m->name, sizeof(m->name), &map->name);
	if (read_part(m->key, m->key_size, call->key))
		m->known |= SKB_MAP_KEY;
	if (value && read_part(m->value, m->value_size, value))
		m->known |= SKB_MAP_VALUE;
	np_output(ctx, &event->head,
		  sizeof(*event) + sizeof(__u64) + sizeof(*m));
}

static __always_inline bool map_called(struct pt_regs *ctx,
				       struct map_call *call)
{
	struct skb_context *c = helper_context(ctx);

	if (!c)
		return false;
	call->func = func_addr(ctx);
	call->skb = c->skb;
	call->packet = c->packet;
	call->map = PT_REGS_PARM1(ctx);
	call->key = PT_REGS_PARM2(ctx);
	return true;
}

/* update(map, key, value, flags) */
SEC("kprobe/skb_map_update")
int skb_map_update(struct pt_regs *ctx)
{
	struct map_call call;

	if (map_called(ctx, &call))
		write_map(ctx, &call, PT_REGS_PARM3(ctx));
	return 0;
}

/* delete(map, key) */
SEC("kprobe/skb_map_delete")
int skb_map_delete(struct pt_regs *ctx)
{
	struct map_call call;

	if (map_called(ctx, &call))
		write_map(ctx, &call, 0);
	return 0;
}

/* lookup(map, key): the value is known at its end. */
SEC("kprobe/skb_map_lookup")
int skb_map_lookup(struct pt_regs *ctx)
{
	__u64 key = track_context(regs_address(ctx));
	struct map_call call;

	if (map_called(ctx, &call))
		bpf_map_update_elem(&map_calls, &key, &call, BPF_ANY);
	return 0;
}

/* The end of a look-up. */
static __always_inline void map_found(struct pt_regs *ctx, bool element)
{
	__u64 key = track_context(regs_address(ctx)), value = PT_REGS_RC(ctx);
	struct map_call *call = bpf_map_lookup_elem(&map_calls, &key);
	struct bpf_map *map;
	__u32 type;

	if (!call)
		return;
	if (element && value) {
		map = (struct bpf_map *)call->map;
		type = BPF_CORE_READ(map, map_type);
		/* The value lies behind the key; elsewhere for other types. */
		if (type == BPF_MAP_TYPE_HASH || type == BPF_MAP_TYPE_LRU_HASH)
			value += bpf_core_field_offset(struct htab_elem, key) +
				 ((BPF_CORE_READ(map, key_size) + 7) & ~7U);
		else
			value = 0;
	}
	write_map(ctx, call, value);
	bpf_map_delete_elem(&map_calls, &key);
}

/* It gives back the value. */
SEC("kprobe/skb_map_found")
int skb_map_found(struct pt_regs *ctx)
{
	map_found(ctx, false);
	return 0;
}

/* __htab_map_lookup_elem gives back the element: its caller adds the rest. */
SEC("kprobe/skb_map_found_elem")
int skb_map_found_elem(struct pt_regs *ctx)
{
	map_found(ctx, true);
	return 0;
}

#endif
