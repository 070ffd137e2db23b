/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What processes receive from port 53, by UDP and TCP: read from the buffer of
 * the process when the kernel has filled it. Needs vmlinux.h, the helpers and
 * event.bpf.h before it.
 *
 * fexit programs on udp_recvmsg, udpv6_recvmsg and tcp_recvmsg: they see arguments and result
 * without a map, and threads that block in a receive use up nothing (a
 * kretprobe has some ten places for all that are inside at once). Where
 * kprobe.multi keeps its returns by task (6.14), entry and return in their
 * place: a kernel that preempts passes over runs of an fexit program.
 */
#ifndef NETPROBE_DNS_BPF_H
#define NETPROBE_DNS_BPF_H

#include "tcp/dns.h"

#define DNS_PORT 53
#define DNS_MSG_PEEK 0x2
#define DNS_MSG_TRUNC 0x20

/* Arguments of udp_recvmsg: 6 up to 5.18 (with `noblock`), then 5, 4 in the newest. */
const volatile __u32 recv_args = 5;

/* Which of the programs uses which room: one may interrupt another. */
enum dns_room {
	DNS_UDP4,
	DNS_UDP6,
	DNS_TCP,
	DNS_ROOMS
};

struct dns_scratch {
	struct dns_event event;
	/* Twice: the message may lie in two buffers of the process. */
	__u8 data[2 * DNS_MAX];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, DNS_ROOMS);
	__type(key, __u32);
	__type(value, struct dns_scratch);
} dns_scratch SEC(".maps");

struct dns_event dns_event_type;
enum dns_kind dns_kind_type;

/* struct iov_iter up to 6.3: `iov`; up to 5.13: `type` with more bits. */
struct iov_iter___before_6_4 {
	const struct iovec *iov;
} __attribute__((preserve_access_index));

struct iov_iter___before_5_14 {
	unsigned int type;
} __attribute__((preserve_access_index));

enum iter_type___before_5_14 {
	ITER_IOVEC___before_5_14 = 4
};

/* One buffer of the process, not an array of them (kernels from 6.0). */
static __always_inline bool dns_is_ubuf(struct iov_iter *iter)
{
	if (!bpf_core_enum_value_exists(enum iter_type, ITER_UBUF))
		return false;
	return BPF_CORE_READ(iter, iter_type) ==
	       bpf_core_enum_value(enum iter_type, ITER_UBUF);
}

static __always_inline bool dns_is_iovec(struct iov_iter *iter)
{
	struct iov_iter___before_5_14 *old = (void *)iter;

	if (bpf_core_field_exists(old->type))
		return BPF_CORE_READ(old, type) & ITER_IOVEC___before_5_14;
	return BPF_CORE_READ(iter, iter_type) ==
	       bpf_core_enum_value(enum iter_type, ITER_IOVEC);
}

/* Reads `size` bytes to data[at]. */
static __always_inline bool dns_read(struct dns_scratch *to, __u64 at,
				     const void *from, __u64 size)
{
	/* What the compiler knows about them, the verifier does not. */
	barrier_var(at);
	barrier_var(size);
	if (at > DNS_MAX || size > DNS_MAX)
		return false;
	/* A size of 0 reads nothing; the verifier of 6.1 wants it said. */
	if (size == 0)
		return true;
	return bpf_probe_read_user(&to->data[at], size, from) == 0;
}

/*
 * The `got` bytes that the process has just received. The iterator stands
 * behind them: in the same buffer, or at the start of the next.
 */
static __always_inline bool dns_copy(struct dns_scratch *to, struct msghdr *msg,
				     __u64 got, __u64 size)
{
	struct iov_iter *iter = &msg->msg_iter;
	struct iov_iter___before_6_4 *old = (void *)iter;
	__u64 offset = BPF_CORE_READ(iter, iov_offset);
	const struct iovec *iov;
	struct iovec last;
	__u64 before;

	if (dns_is_ubuf(iter)) {
		if (offset < got)
			return false;
		return dns_read(to, 0,
				BPF_CORE_READ(iter, ubuf) + (offset - got),
				size);
	}
	if (!dns_is_iovec(iter))
		return false;
	if (bpf_core_field_exists(old->iov))
		iov = BPF_CORE_READ(old, iov);
	else
		iov = BPF_CORE_READ(iter, __iov);
	if (offset >= got) {
		if (bpf_probe_read_kernel(&last, sizeof(last), iov) < 0)
			return false;
		return dns_read(to, 0, last.iov_base + (offset - got), size);
	}
	if (bpf_probe_read_kernel(&last, sizeof(last), iov - 1) < 0)
		return false;
	before = got - offset;
	if (before > last.iov_len)
		return false;
	if (before >= size)
		return dns_read(to, 0, last.iov_base + (last.iov_len - before),
				size);
	if (!dns_read(to, 0, last.iov_base + (last.iov_len - before), before) ||
	    bpf_probe_read_kernel(&last, sizeof(last), iov) < 0)
		return false;
	return dns_read(to, before, last.iov_base, size - before);
}

/* The peer's port: of a connected socket, else of the sender. */
static __always_inline bool dns_from_server(struct sock *sk, struct msghdr *msg)
{
	__u16 port = BPF_CORE_READ(sk, __sk_common.skc_dport);
	struct sockaddr_in *name;

	if (!port) {
		/* sin_port and sin6_port are at the same place. */
		name = BPF_CORE_READ(msg, msg_name);
		if (!name ||
		    bpf_probe_read_kernel(&port, sizeof(port), &name->sin_port))
			return false;
	}
	return port == bpf_htons(DNS_PORT);
}

/* An argument, by a load at a constant offset, as the verifier demands. */
#define DNS_ARG(ctx, n)                                             \
	({                                                          \
		__u64 np_arg;                                       \
		asm volatile("%0 = *(u64 *)(%1 + %2)"               \
			     : "=r"(np_arg)                         \
			     : "r"(ctx), "i"((n) * sizeof(__u64))); \
		np_arg;                                             \
	})

/* A call that gave `got` bytes. */
static __always_inline int dns_received(void *ctx, struct sock *sk,
					struct msghdr *msg, int flags, int got,
					__u32 room)
{
	struct dns_scratch *to;
	__u64 size;

	if (got <= 0 || np_held() || (flags & (DNS_MSG_PEEK | DNS_MSG_TRUNC)) ||
	    !dns_from_server(sk, msg))
		return 0;
	to = bpf_map_lookup_elem(&dns_scratch, &room);
	if (!to)
		return 0;
	size = got < DNS_MAX ? got : DNS_MAX;
	if (!dns_copy(to, msg, got, size))
		return 0;
	np_head_fill(&to->event.head, DNS_KIND_ANSWER);
	to->event.sock = (__u64)sk;
	to->event.size = size;
	to->event.stream = room == DNS_TCP;
	to->event.cut = got > DNS_MAX;
	to->event.pad[0] = 0;
	to->event.pad[1] = 0;
	barrier_var(size);
	if (size <= DNS_MAX)
		np_output(ctx, &to->event.head, sizeof(to->event) + size);
	return 0;
}

static __always_inline int dns_fexit(__u64 *ctx, __u32 room)
{
	int flags, got;

	if (recv_args == 6) {
		flags = DNS_ARG(ctx, 4);
		got = DNS_ARG(ctx, 6);
	} else if (recv_args == 5) {
		flags = DNS_ARG(ctx, 3);
		got = DNS_ARG(ctx, 5);
	} else {
		flags = DNS_ARG(ctx, 3);
		got = DNS_ARG(ctx, 4);
	}
	return dns_received(ctx, (void *)ctx[0], (void *)ctx[1], flags, got,
			    room);
}

SEC("fexit/udp_recvmsg")
int dns_udp4(__u64 *ctx)
{
	return dns_fexit(ctx, DNS_UDP4);
}

SEC("fexit/udpv6_recvmsg")
int dns_udp6(__u64 *ctx)
{
	return dns_fexit(ctx, DNS_UDP6);
}

SEC("fexit/tcp_recvmsg")
int dns_tcp(__u64 *ctx)
{
	return dns_fexit(ctx, DNS_TCP);
}

/* A thread that receives what may be an answer. */
struct dns_call {
	__u64 sock;
	__u64 msg;
	__u64 flags;
};

/* One more call than this is not seen, and counted. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1); /* set before loading where it is used */
	__type(key, __u64); /* pid_tgid */
	__type(value, struct dns_call);
} dns_calls SEC(".maps");

static __always_inline int dns_enter(struct sock *sk, struct msghdr *msg,
				     __u64 flags, bool stream)
{
	__u64 id = bpf_get_current_pid_tgid();
	__u16 port = BPF_CORE_READ(sk, __sk_common.skc_dport);
	struct dns_call call = {
		.sock = (__u64)sk, .msg = (__u64)msg, .flags = flags};

	/* Of an unconnected socket the answer tells who sent it. */
	if (port != bpf_htons(DNS_PORT) && (port || stream))
		return 0;
	if (bpf_map_update_elem(&dns_calls, &id, &call, BPF_ANY))
		np_count_map_full();
	return 0;
}

static __always_inline int dns_leave(void *ctx, int got, __u32 room)
{
	__u64 id = bpf_get_current_pid_tgid();
	struct dns_call *found = bpf_map_lookup_elem(&dns_calls, &id), call;

	if (!found)
		return 0;
	call = *found;
	bpf_map_delete_elem(&dns_calls, &id);
	return dns_received(ctx, (void *)call.sock, (void *)call.msg,
			    call.flags, got, room);
}

/*
 * By kprobe.multi, or by single kprobes where there is neither that nor a
 * trampoline (arm64 before 6.12). The flags stand behind `noblock` where there
 * is one (before 5.19).
 */
static __always_inline int dns_entry(struct pt_regs *ctx, bool stream)
{
	__u64 fourth = PT_REGS_PARM4(ctx), fifth = PT_REGS_PARM5(ctx);

	/* Two loads: 5.10 refuses one from a place that is chosen first. */
	barrier_var(fourth);
	barrier_var(fifth);
	return dns_enter((void *)PT_REGS_PARM1(ctx), (void *)PT_REGS_PARM2(ctx),
			 recv_args == 6 ? fifth : fourth, stream);
}

SEC("kprobe.multi")
int dns_udp4_entry(struct pt_regs *ctx)
{
	return dns_entry(ctx, false);
}

SEC("kprobe.multi")
int dns_udp6_entry(struct pt_regs *ctx)
{
	return dns_entry(ctx, false);
}

SEC("kprobe.multi")
int dns_tcp_entry(struct pt_regs *ctx)
{
	return dns_entry(ctx, true);
}

SEC("kretprobe.multi")
int BPF_KRETPROBE(dns_udp4_return, int got)
{
	return dns_leave(ctx, got, DNS_UDP4);
}

SEC("kretprobe.multi")
int BPF_KRETPROBE(dns_udp6_return, int got)
{
	return dns_leave(ctx, got, DNS_UDP6);
}

SEC("kretprobe.multi")
int BPF_KRETPROBE(dns_tcp_return, int got)
{
	return dns_leave(ctx, got, DNS_TCP);
}

#endif
