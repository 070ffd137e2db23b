/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The entry of connect, its event, and the counts of connects. Included by
 * tcpconnect.bpf.c.
 */
#ifndef NETPROBE_TCPCONNECT_ENTER_BPF_H
#define NETPROBE_TCPCONNECT_ENTER_BPF_H

#define O_NONBLOCK 00004000
#define AF_INET6 10

/* A thread that is inside of connect. */
struct inside {
	__u64 sock;
	__u64 start;
	__u64 daddr[2]; /* as asked for */
	__u16 dport;
	__u8 version;
	__u8 mapped;
	__u8 refused; /* by a filter */
	__u8 pad[3];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, __u64); /* pid_tgid */
	__type(value, struct inside);
} inside SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, struct tcp_flow);
	__type(value, __u64);
} counts SEC(".maps");

/* For the types in the skeleton. */
struct tcp_event tcp_event_type;
struct tcp_exe tcp_exe_type;
struct tcp_flow tcp_flow_type;
struct tcp_prefix tcp_prefix_type;
enum tcp_kind tcp_kind_type;
enum tcp_mode tcp_mode_type;
enum tcp_filter_bit tcp_filter_bit_type;
enum tcp_flag tcp_flag_type;
enum tcp_decided tcp_decided_type;

static __always_inline bool is_nonblocking(struct sock *sk, bool mptcp)
{
	struct inet_connection_sock *icsk = (void *)sk;
	struct file *file = BPF_CORE_READ(sk, sk_socket, file);
	struct mptcp_subflow_context *subflow;

	/* A subflow's own socket has no file: its MPTCP socket has. */
	if (!file && mptcp &&
	    bpf_core_field_exists(struct mptcp_subflow_context, conn)) {
		subflow = BPF_CORE_READ(icsk, icsk_ulp_data);
		file = BPF_CORE_READ(subflow, conn, sk_socket, file);
	}
	return file && (BPF_CORE_READ(file, f_flags) & O_NONBLOCK);
}

static __always_inline __u32 socket_flags(struct sock *sk)
{
	struct tcp_sock *tp = (void *)sk;
	__u32 flags = 0;

	if (bpf_core_field_exists(tp->is_mptcp) && BPF_CORE_READ(tp, is_mptcp))
		flags |= TCP_FLAG_MPTCP;
	if (is_nonblocking(sk, flags))
		flags |= TCP_FLAG_NONBLOCK;
	return flags;
}

/*
 * Fills the event of a connect of the current thread: from the socket, or,
 * where connect failed and has cleared it, from what was asked for.
 */
static __always_inline void fill(struct tcp_event *e, const struct inside *in,
				 bool failed)
{
	struct sock *sk = (struct sock *)in->sock;

	__builtin_memset(e, 0, sizeof(*e));
	np_head_fill(&e->head, TCP_KIND_CONNECT);
	e->sock = in->sock;
	e->start = in->start;
	e->version = in->version;
	e->netns = BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum);
	e->uid = (__u32)bpf_get_current_uid_gid();
	e->cgroup = bpf_get_current_cgroup_id();
	e->sport = BPF_CORE_READ(sk, __sk_common.skc_num);
	e->flags = socket_flags(sk) | (in->mapped ? TCP_FLAG_MAPPED : 0);
	if (in->version == 4)
		np_map_v4(e->saddr,
			  BPF_CORE_READ(sk, __sk_common.skc_rcv_saddr));
	else
		BPF_CORE_READ_INTO(&e->saddr, sk, __sk_common.skc_v6_rcv_saddr);
	if (failed) {
		e->daddr[0] = in->daddr[0];
		e->daddr[1] = in->daddr[1];
		e->dport = in->dport;
		return;
	}
	if (in->version == 4)
		np_map_v4(e->daddr, BPF_CORE_READ(sk, __sk_common.skc_daddr));
	else
		BPF_CORE_READ_INTO(&e->daddr, sk, __sk_common.skc_v6_daddr);
	e->dport = bpf_ntohs(BPF_CORE_READ(sk, __sk_common.skc_dport));
}

static __always_inline int enter(struct sock *sk, const void *uaddr,
				 __u8 version)
{
	__u64 id = bpf_get_current_pid_tgid();
	struct inside in = {}, *outer;

	/* tcp_v6_connect hands a mapped address on to tcp_v4_connect. */
	outer = bpf_map_lookup_elem(&inside, &id);
	if (version == 4 && outer && outer->sock == (__u64)sk &&
	    outer->version == 6) {
		outer->version = 4;
		outer->mapped = 1;
		return 0;
	}
	if (outer) {
		/* Its return was not seen: the kernel had no place for it. */
		struct np_stats *count = np_stats_get();

		if (count)
			count->hits++;
	}
	if (np_held() || !match_process()) {
		if (outer)
			bpf_map_delete_elem(&inside, &id);
		return 0;
	}
	in.sock = (__u64)sk;
	in.start = bpf_ktime_get_ns();
	in.version = version;
	if (version == 4) {
		struct sockaddr_in sin = {};

		bpf_probe_read_kernel(&sin, sizeof(sin), uaddr);
		np_map_v4(in.daddr, sin.sin_addr.s_addr);
		in.dport = bpf_ntohs(sin.sin_port);
	} else {
		struct sockaddr_in6 sin6 = {};

		bpf_probe_read_kernel(&sin6, sizeof(sin6), uaddr);
		__builtin_memcpy(in.daddr, &sin6.sin6_addr, sizeof(in.daddr));
		in.dport = bpf_ntohs(sin6.sin6_port);
	}
	if (bpf_map_update_elem(&inside, &id, &in, BPF_ANY))
		np_count_map_full();
	return 0;
}

static __always_inline void count(const struct tcp_event *e)
{
	struct tcp_flow key = {
		.saddr = {e->saddr[0], e->saddr[1]},
		.daddr = {e->daddr[0], e->daddr[1]},
		.dport = e->dport,
		.lport = mode & TCP_MODE_LPORT ? e->sport : 0,
		.version = e->version,
	};
	__u64 one = 1, *value;

	value = bpf_map_lookup_elem(&counts, &key);
	if (!value) {
		if (!bpf_map_update_elem(&counts, &key, &one, BPF_NOEXIST))
			return;
		/* Another CPU may have been first. */
		value = bpf_map_lookup_elem(&counts, &key);
	}
	if (value)
		__sync_fetch_and_add(value, 1);
	else
		np_count_map_full();
}

#endif
