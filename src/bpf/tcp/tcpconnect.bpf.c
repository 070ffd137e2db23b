// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * netprobe tcpconnect: who connects where, and what became of it.
 *
 * The return of tcp_v4_connect and tcp_v6_connect reads addresses and ports: by
 * fexit, which has the socket, else the entry keeps it by thread. An IPv4 address in an IPv6 socket
 * passes both functions and is one connect.
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "common/packet.h"
#include "tcp/tcpconnect.h"
#include "common/no_cast.bpf.h"
#include "common/compat.bpf.h"
#include "common/stats.bpf.h"
#include "common/heartbeat.bpf.h"
#include "common/output_ring.bpf.h"
#include "common/packet.bpf.h"
#include "tcp/dns.bpf.h"
#include "tcp/tcpconnect_filter.bpf.h"
#include "tcp/tcpconnect_stack.bpf.h"
#include "tcp/tcpconnect_enter.bpf.h"
#include "tcp/tcpconnect_outcome.bpf.h"
#include "tcp/tcpconnect_loss.bpf.h"

/* The return of the function of this IP version. */
static __always_inline int leave(void *ctx, int ret, __u8 version)
{
	__u64 id = bpf_get_current_pid_tgid();
	struct inside *found = bpf_map_lookup_elem(&inside, &id), in;
	__u32 room = version == 4 ? TCP_ROOM_V4 : TCP_ROOM_V6;
	struct tcp_scratch *buf;

	if (!found)
		return 0;
	in = *found;
	bpf_map_delete_elem(&inside, &id);
	buf = bpf_map_lookup_elem(&scratch, &room);
	if (!buf || in.refused)
		return 0;
	if (mode & TCP_MODE_OUTCOME) {
		leave_outcome(ctx, buf, &in, ret);
		return 0;
	}
	if (ret || np_held())
		return 0;
	fill(&buf->event, &in, false);
	if (!match_socket(&buf->event))
		return 0;
	if (mode & TCP_MODE_COUNT)
		count(&buf->event);
	else
		send_connect(ctx, buf);
	return 0;
}

/*
 * The return alone. All that is told of a connect that succeeded is in its
 * socket, unless it is followed (--outcome) or its stacks are asked for.
 */
static __always_inline int connected(void *ctx, struct sock *sk, int ret,
				     __u8 version)
{
	struct inside in = {.sock = (__u64)sk, .version = version};
	struct tcp_event e;

	if (ret || np_held() || !match_process())
		return 0;
	if (version == 4)
		in.mapped = BPF_CORE_READ(sk, __sk_common.skc_family) ==
			    AF_INET6;
	fill(&e, &in, false);
	/* tcp_v6_connect has handed a mapped address on to tcp_v4_connect. */
	if (version == 6 && !e.daddr[0] &&
	    (__u32)e.daddr[1] == bpf_htonl(0x0000ffff))
		return 0;
	if (!match_socket(&e))
		return 0;
	if (mode & TCP_MODE_COUNT)
		count(&e);
	else
		np_output(ctx, &e.head, sizeof(e));
	return 0;
}

/*
 * Ways to see entry and return, or the return alone; user space takes the first
 * that works (probes.rs).
 *
 * kprobe.multi where its returns are kept by task (6.14): any number of
 * threads can be inside, and no other thread takes the CPU during a program. An
 * fexit program may lose the CPU on a kernel that preempts (the default from
 * 7.0), and the kernel then passes over other threads' runs of it:
 * 8 % of connects made by four threads at full speed were lost so on 7.2.
 */
SEC("kprobe.multi")
int BPF_KPROBE(v4_multi_entry, struct sock *sk, void *uaddr)
{
	return enter(sk, uaddr, 4);
}

SEC("kprobe.multi")
int BPF_KPROBE(v6_multi_entry, struct sock *sk, void *uaddr)
{
	return enter(sk, uaddr, 6);
}

SEC("kretprobe.multi")
int BPF_KRETPROBE(v4_multi_return, int ret)
{
	return leave(ctx, ret, 4);
}

SEC("kretprobe.multi")
int BPF_KRETPROBE(v6_multi_return, int ret)
{
	return leave(ctx, ret, 6);
}

/*
 * fexit and fentry: any number of threads, too. fexit alone is half as much to
 * attach: a second program at a function makes its trampoline anew.
 */
SEC("fexit/tcp_v4_connect")
int v4_connected(__u64 *ctx)
{
	return connected(ctx, (struct sock *)ctx[0], ctx[3], 4);
}

SEC("fexit/tcp_v6_connect")
int v6_connected(__u64 *ctx)
{
	return connected(ctx, (struct sock *)ctx[0], ctx[3], 6);
}

SEC("fentry/tcp_v4_connect")
int v4_fentry(__u64 *ctx)
{
	return enter((struct sock *)ctx[0], (void *)ctx[1], 4);
}

SEC("fentry/tcp_v6_connect")
int v6_fentry(__u64 *ctx)
{
	return enter((struct sock *)ctx[0], (void *)ctx[1], 6);
}

/* Three arguments, then the result. */
SEC("fexit/tcp_v4_connect")
int v4_fexit(__u64 *ctx)
{
	return leave(ctx, ctx[3], 4);
}

SEC("fexit/tcp_v6_connect")
int v6_fexit(__u64 *ctx)
{
	return leave(ctx, ctx[3], 6);
}

/*
 * Else these four: a kretprobe has places for some ten threads that are inside
 * at once, and passes over the others; enter() and user space count those.
 */
SEC("kprobe/tcp_v4_connect")
int BPF_KPROBE(v4_entry, struct sock *sk, void *uaddr)
{
	return enter(sk, uaddr, 4);
}

SEC("kprobe/tcp_v6_connect")
int BPF_KPROBE(v6_entry, struct sock *sk, void *uaddr)
{
	return enter(sk, uaddr, 6);
}

SEC("kretprobe/tcp_v4_connect")
int BPF_KRETPROBE(v4_return, int ret)
{
	return leave(ctx, ret, 4);
}

SEC("kretprobe/tcp_v6_connect")
int BPF_KRETPROBE(v6_return, int ret)
{
	return leave(ctx, ret, 6);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
