// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Why XDP dropped a packet: the kernel's own tracepoints about aborted packets
 * and redirects that failed. They fire on errors alone, but for xdp_devmap_xmit
 * (once for each bulk of frames).
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#include "xdp/netprobe_chain.h"
#include "common/no_cast.bpf.h"
#include "common/stats.bpf.h"
#include "common/output_perf.bpf.h"
#include "xdp/xdpdump.h"

#define INTERFACES 64

/* The interfaces that are captured at, and their network namespace. */
const volatile __u32 ifindices[INTERFACES] = {};
const volatile __u32 netns = 0;

/* Keeps the types in the object, for the skeleton. */
struct np_xdp_error np_unused_error SEC(".data");
enum np_xdp_kind np_unused_xdp_kind SEC(".data");
enum np_xdp_what np_unused_xdp_what SEC(".data");

/* The index of a device that is captured at, or 0. */
static __always_inline __u32 captured(const struct net_device *dev)
{
	__u32 ifindex = BPF_CORE_READ(dev, ifindex);
	int i;

	if (BPF_CORE_READ(dev, nd_net.net, ns.inum) != netns)
		return 0;
	for (i = 0; i < INTERFACES; i++)
		if (ifindices[i] == ifindex)
			return ifindex;
	return 0;
}

static __always_inline int report(void *ctx, struct np_xdp_error *error)
{
	error->head.ts = bpf_ktime_get_ns();
	error->head.kind = NP_XDP_ERROR;
	error->head.cpu = bpf_get_smp_processor_id();
	np_output(ctx, &error->head, sizeof(*error));
	return 0;
}

/* (dev, prog, act) */
SEC("raw_tp/xdp_exception")
int xdp_exception(struct bpf_raw_tracepoint_args *ctx)
{
	struct bpf_prog *prog = (void *)ctx->args[1];
	struct np_xdp_error error = {
		.what = NP_XDP_EXCEPTION,
		.ifindex = captured((void *)ctx->args[0]),
		.verdict = ctx->args[2],
		.count = 1,
	};

	if (!error.ifindex)
		return 0;
	error.program = BPF_CORE_READ(prog, aux, id);
	return report(ctx, &error);
}

/* (dev, prog, target, err, map type, map id, index) */
static __always_inline int redirect_failed(struct bpf_raw_tracepoint_args *ctx)
{
	struct bpf_prog *prog = (void *)ctx->args[1];
	struct np_xdp_error error = {
		.what = NP_XDP_REDIRECT,
		.ifindex = captured((void *)ctx->args[0]),
		.err = ctx->args[3],
		.count = 1,
	};

	if (!error.ifindex)
		return 0;
	error.program = BPF_CORE_READ(prog, aux, id);
	/*
	 * Kernels before 5.13 (commit ee75aef23afe) have a struct bpf_map * in
	 * place of type and id; this type of map came soon after.
	 */
	if (bpf_core_enum_value_exists(enum bpf_map_type,
				       BPF_MAP_TYPE_BLOOM_FILTER)) {
		error.map = ctx->args[5];
		error.index = ctx->args[6];
	}
	return report(ctx, &error);
}

SEC("raw_tp/xdp_redirect_err")
int xdp_redirect_err(struct bpf_raw_tracepoint_args *ctx)
{
	return redirect_failed(ctx);
}

SEC("raw_tp/xdp_redirect_map_err")
int xdp_redirect_map_err(struct bpf_raw_tracepoint_args *ctx)
{
	return redirect_failed(ctx);
}

/* (from device, to device, sent, drops, err) */
SEC("raw_tp/xdp_devmap_xmit")
int xdp_devmap_xmit(struct bpf_raw_tracepoint_args *ctx)
{
	struct net_device *target = (void *)ctx->args[1];
	struct np_xdp_error error = {
		.what = NP_XDP_XMIT,
		.count = ctx->args[3],
		.err = ctx->args[4],
	};

	if (!error.count)
		return 0;
	error.ifindex = captured((void *)ctx->args[0]);
	if (!error.ifindex)
		return 0;
	error.target = BPF_CORE_READ(target, ifindex);
	return report(ctx, &error);
}

char _license[] SEC("license") = "Dual BSD/GPL";
