/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What `netprobe tcp` reads of a socket: by plain loads where the verifier knows the
 * pointer's type (tp_btf programs: kernels from 5.5), else by bpf_probe_read_kernel, at
 * 120 instructions a member. `typed` is a constant in each caller. Included by tcp.bpf.c.
 */
#ifndef NETPROBE_TCP_READ_BPF_H
#define NETPROBE_TCP_READ_BPF_H

#define AF_INET 2
#define INITIAL_RTT (~0U)

#define READ(typed, p, member)                              \
	({                                                  \
		typeof((p)->member) value;                  \
		if (typed)                                  \
			value = (p)->member;                \
		else                                        \
			value = BPF_CORE_READ((p), member); \
		value;                                      \
	})

/* Four words of an address: no typed load goes across members. */
static __always_inline void load_v6(__u64 *to, const struct in6_addr *addr)
{
	__u32 *words = (__u32 *)to;

	words[0] = addr->in6_u.u6_addr32[0];
	words[1] = addr->in6_u.u6_addr32[1];
	words[2] = addr->in6_u.u6_addr32[2];
	words[3] = addr->in6_u.u6_addr32[3];
}

static __always_inline void read_ends_by(struct conn_ends *e, struct sock *sk,
					 const bool typed)
{
	e->version = READ(typed, sk, __sk_common.skc_family) == AF_INET ? 4 : 6;
	if (e->version == 4) {
		np_map_v4(e->saddr, READ(typed, sk, __sk_common.skc_rcv_saddr));
		np_map_v4(e->daddr, READ(typed, sk, __sk_common.skc_daddr));
	} else if (typed) {
		load_v6(e->saddr, &sk->__sk_common.skc_v6_rcv_saddr);
		load_v6(e->daddr, &sk->__sk_common.skc_v6_daddr);
	} else {
		BPF_CORE_READ_INTO(&e->saddr, sk, __sk_common.skc_v6_rcv_saddr);
		BPF_CORE_READ_INTO(&e->daddr, sk, __sk_common.skc_v6_daddr);
	}
	e->dport = bpf_ntohs(READ(typed, sk, __sk_common.skc_dport));
	if (typed)
		e->netns = sk->__sk_common.skc_net.net->ns.inum;
	else
		e->netns = BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum);
}

static __always_inline void read_ends(struct conn_ends *e, struct sock *sk)
{
	read_ends_by(e, sk, false);
}

/* Of a full socket: skc_num is given back before the last change of state. */
static __always_inline __u16 local_port(struct sock *sk)
{
	return bpf_ntohs(BPF_CORE_READ((struct inet_sock *)sk, inet_sport));
}

/* tcp_get_info_chrono_stats(): what runs now counts up to now. */
static __always_inline void read_limits(struct conn_event *e,
					struct tcp_sock *tp, const bool typed)
{
	__u32 start = READ(typed, tp, chrono_start), running;

	if (typed)
		running = BPF_CORE_READ_BITFIELD(tp, chrono_type);
	else
		running = BPF_CORE_READ_BITFIELD_PROBED(tp, chrono_type);
	e->jiffies = bpf_jiffies64();
	e->limited[0] = READ(typed, tp, chrono_stat[0]);
	e->limited[1] = READ(typed, tp, chrono_stat[1]);
	e->limited[2] = READ(typed, tp, chrono_stat[2]);
	/* enum tcp_chrono: 0 is none. */
	for (__u32 i = 0; i < 3; i++)
		if (running == i + 1)
			e->limited[i] += (__u32)e->jiffies - start;
}

static __always_inline void read_counters(struct conn_event *e,
					  struct tcp_sock *tp, const bool typed)
{
	e->bytes_sent = READ(typed, tp, bytes_sent);
	e->bytes_retrans = READ(typed, tp, bytes_retrans);
	e->bytes_acked = READ(typed, tp, bytes_acked);
	e->bytes_received = READ(typed, tp, bytes_received);
	e->segs_out = READ(typed, tp, segs_out);
	e->segs_in = READ(typed, tp, segs_in);
	e->data_segs_out = READ(typed, tp, data_segs_out);
	e->data_segs_in = READ(typed, tp, data_segs_in);
	e->retransmitted = READ(typed, tp, total_retrans);
	e->lost = READ(typed, tp, lost);
	e->reordered = READ(typed, tp, reord_seen);
	e->duplicates = READ(typed, tp, dsack_dups);
	e->out_of_order = READ(typed, tp, rcv_ooopack);
	e->srtt = READ(typed, tp, srtt_us) >> 3;
	e->rttvar = READ(typed, tp, mdev_us) >> 2;
	e->min_rtt = READ(typed, tp, rtt_min.s[0].v);
	if (e->min_rtt == INITIAL_RTT)
		e->min_rtt = 0;
	if (bpf_core_field_exists(tp->is_mptcp) && READ(typed, tp, is_mptcp))
		e->life.flags |= CONN_FLAG_MPTCP;
}

/* All that a socket tells at its end. */
static __always_inline void read_all(struct conn_event *e, struct tcp_sock *tp,
				     const bool typed)
{
	struct sock *sk = &tp->inet_conn.icsk_inet.sk;

	read_ends_by(&e->ends, sk, typed);
	e->ends.sport =
		bpf_ntohs(READ(typed, tp, inet_conn.icsk_inet.inet_sport));
	read_counters(e, tp, typed);
	read_limits(e, tp, typed);
	e->error = READ(typed, sk, sk_err);
}

#endif
