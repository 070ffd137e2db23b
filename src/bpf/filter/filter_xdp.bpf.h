/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The packet filter's place in an XDP program; filter.bpf.h says how it is filled. */
#ifndef NETPROBE_FILTER_XDP_BPF_H
#define NETPROBE_FILTER_XDP_BPF_H

/* Is an expression set? */
const volatile __u32 np_filter_on = 0;
/* May packets lie in several buffers (bpf_xdp_get_buff_len, Linux 5.18)? Only those of programs loaded for it do. */
const volatile __u32 np_filter_xdp_frags = 0;

/*
 * Replaced by the filter. The assembler keeps clang from dropping arguments or
 * folding the result; "hidden" makes it a static function to the verifier, so
 * that packet pointers may be passed.
 */
__hidden __noinline __u64 np_filter_xdp_stub(void *data, void *data_end,
					     struct xdp_md *ctx, __u64 len)
{
	__u64 matches;

	asm volatile("%0 = 1"
		     : "=r"(matches)
		     : "r"(data), "r"(data_end), "r"(ctx), "r"(len));
	return matches;
}

/* Only where np_filter_on is set. */
static __always_inline bool np_filter_xdp(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data;
	void *data_end = (void *)(long)ctx->data_end;
	__u64 len;

	len = np_filter_xdp_frags ? bpf_xdp_get_buff_len(ctx)
				  : (__u64)(data_end - data);
	return np_filter_xdp_stub(data, data_end, ctx, len) != 0;
}

#endif
