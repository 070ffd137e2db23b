/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* --from, --to: the time of a packet between two functions. Needs latency_packet.bpf.h before it. */
#ifndef NETPROBE_LATENCY_BETWEEN_BPF_H
#define NETPROBE_LATENCY_BETWEEN_BPF_H

/* Which of the functions' arguments is the sk_buff: 1 to 5. */
const volatile __u8 from_arg = 1;
const volatile __u8 to_arg = 1;

/* The compiler must not choose the register by an offset in the context: the verifier refuses it. */
static __always_inline __u64 lat_argument(struct pt_regs *ctx, __u8 arg)
{
	__u64 value = PT_REGS_PARM1(ctx);

	asm volatile("" : "+r"(value));
	if (arg == 2)
		value = PT_REGS_PARM2(ctx);
	asm volatile("" : "+r"(value));
	if (arg == 3)
		value = PT_REGS_PARM3(ctx);
	asm volatile("" : "+r"(value));
	if (arg == 4)
		value = PT_REGS_PARM4(ctx);
	asm volatile("" : "+r"(value));
	if (arg == 5)
		value = PT_REGS_PARM5(ctx);
	asm volatile("" : "+r"(value));
	return value;
}

SEC("kprobe/from")
int lat_from(struct pt_regs *ctx)
{
	__u64 skb = lat_argument(ctx, from_arg);

	if (!skb)
		return 0;
	return lat_match(
		skb, lat_begin(lat_at(skb), skb, LAT_BETWEEN, LAT_AT_QUEUE));
}

SEC("kprobe/to")
int lat_to(struct pt_regs *ctx)
{
	__u64 skb = lat_argument(ctx, to_arg);
	struct lat_packet *p = lat_find(skb);

	if (!p)
		return 0;
	lat_pass(p, LAT_BETWEEN_THEM, LAT_AT_READ);
	p->flags |= LAT_FLAG_WHOLE;
	p->cpu = bpf_get_smp_processor_id();
	lat_claim(p);
	lat_look(skb, p);
	lat_finish(ctx, p);
	p->place = LAT_AT_END;
	return 0;
}

/* Freed in between. */
SEC("raw_tp/consume_skb")
int lat_between_consumed(struct bpf_raw_tracepoint_args *ctx)
{
	lat_forget(ctx->args[0]);
	return 0;
}

#endif
