/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Whose packets are followed: those of the sockets of a user, a cgroup, processes or threads
 * by name, and the packets to these sockets.
 *
 * A packet that has a socket belongs to it. One that has none yet is for what its
 * addresses name in its namespace: an end that one of our sockets is bound to
 * (who_ends), or the other direction of a flow that was seen (who_flows), which is
 * also how answers are known that are to be translated back. User space adds what is older than
 * the run.
 *
 * Needs compat.bpf.h, stats.bpf.h and packet.bpf.h before it.
 */
#ifndef NETPROBE_WHO_BPF_H
#define NETPROBE_WHO_BPF_H

#include "common/cgroup.bpf.h"
#include "common/who.h"

/* Values of sock_common.skc_state, include/net/tcp_states.h */
#define NP_TCP_TIME_WAIT 6
#define NP_TCP_LISTEN 10
#define NP_TCP_NEW_SYN_RECV 12
#define NP_AF_PACKET 17

/* WHO_*; 0: all packets. */
const volatile __u32 who_on = 0;
const volatile __u32 who_uid = 0;
const volatile __u64 who_cgroup = 0;
const volatile __u64 who_comm[2] = {};

enum who_bit who_bit_type;
enum who_process who_process_type;
struct who_flow who_flow_type;
struct who_end who_end_type;

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct who_flow);
	__type(value, __u8);
} who_flows SEC(".maps");

/* How many of our sockets are bound to an end. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, struct who_end);
	__type(value, __u32);
} who_ends SEC(".maps");

/* Sockets older than the run, by the inode of their file. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u64);
	__type(value, __u8);
} who_inodes SEC(".maps");

/* Processes: WHO_MEMBER, WHO_PARENT. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u8);
} who_tgids SEC(".maps");

struct who_sock {
	struct who_end end; /* in who_ends, where `bound` */
	__u8 ours; /* made or used by one of our processes */
	__u8 bound;
	__u8 pad[6];
};

/* What is known of a socket, by its address. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u64);
	__type(value, struct who_sock);
} who_socks SEC(".maps");

/* The socket that a thread binds, by its id. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, __u64);
	__type(value, __u64);
} who_binds SEC(".maps");

/* Too much for the stack. */
struct who_scratch {
	struct np_tuple tuple;
	struct np_tuple quoted;
	struct who_flow key;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct who_scratch);
} who_scratches SEC(".maps");

/* The socket's cgroup; kernels before 5.13 keep other things in its place, too. */
struct sock_cgroup_data___np {
	__u64 val;
} __attribute__((preserve_access_index));

static __always_inline struct cgroup *who_cgroup_of(struct sock *sk)
{
	struct sock_cgroup_data___np *old = (void *)&sk->sk_cgrp_data;
	__u64 val;

	if (bpf_core_field_exists(sk->sk_cgrp_data.cgroup))
		return BPF_CORE_READ(sk, sk_cgrp_data.cgroup);
	if (!bpf_core_field_exists(struct sock_cgroup_data___np, val))
		return NULL;
	val = BPF_CORE_READ(old, val);
	return val & 1 ? NULL : (void *)(val & ~3ULL);
}

/* Is it the cgroup asked for, or below it? */
static __noinline __attribute__((unused)) __u64 who_below(__u64 cgroup_ptr)
{
	return np_cgroup_is_below((void *)cgroup_ptr, who_cgroup);
}

/* A full socket: one that is made for a handshake stands for its listener; NULL in TIME-WAIT. */
static __always_inline struct sock *who_full(struct sock *sk)
{
	__u8 state = BPF_CORE_READ(sk, __sk_common.skc_state);

	if (state == NP_TCP_NEW_SYN_RECV)
		return BPF_CORE_READ((struct request_sock *)sk,
				     __req_common.skc_listener);
	return state == NP_TCP_TIME_WAIT ? NULL : sk;
}

/* The thread that runs now, against WHO_PROCESS and WHO_COMM. */
static __always_inline bool who_thread(void)
{
	__u32 tgid = bpf_get_current_pid_tgid() >> 32;
	__u64 name[2] = {};
	__u8 *member;

	if (who_on & WHO_PROCESS) {
		member = bpf_map_lookup_elem(&who_tgids, &tgid);
		if (!member || *member != WHO_MEMBER)
			return false;
	}
	if (who_on & WHO_COMM) {
		bpf_get_current_comm(name, sizeof(name));
		if (name[0] != who_comm[0] || name[1] != who_comm[1])
			return false;
	}
	return true;
}

/* The thread that runs now, against all that is asked for. */
static __always_inline bool who_current(void)
{
	struct task_struct *task = (void *)bpf_get_current_task();

	if ((who_on & WHO_UID) && (__u32)bpf_get_current_uid_gid() != who_uid)
		return false;
	if ((who_on & WHO_CGROUP) &&
	    !who_below((__u64)BPF_CORE_READ(task, cgroups, dfl_cgrp)))
		return false;
	return who_thread();
}

static __always_inline bool who_is_older(struct sock *sk)
{
	struct socket *sock = BPF_CORE_READ(sk, sk_socket);
	struct inode *inode;
	__u64 number;

	if (!sock)
		return false;
	inode = &((struct socket_alloc *)sock)->vfs_inode;
	number = BPF_CORE_READ(inode, i_ino);
	return bpf_map_lookup_elem(&who_inodes, &number) != NULL;
}

/* Is a full socket one of ours? */
static __noinline __u64 who_owns(__u64 sk_ptr)
{
	struct sock *sk = (void *)sk_ptr;
	struct who_sock *known;
	bool is = true;

	if (who_on & WHO_UID)
		is = BPF_CORE_READ(sk, sk_uid.val) == who_uid;
	if ((who_on & WHO_CGROUP) && is)
		is = who_below((__u64)who_cgroup_of(sk));
	if ((who_on & (WHO_PROCESS | WHO_COMM)) && is) {
		known = bpf_map_lookup_elem(&who_socks, &sk_ptr);
		is = known && known->ours;
	}
	return is || who_is_older(sk);
}

static __always_inline void who_full_map(void)
{
	__u32 zero = 0;
	struct np_stats *count = bpf_map_lookup_elem(&stats, &zero);

	if (count)
		count->map_full++;
}

static __always_inline void who_key(const struct np_tuple *t, __u32 netns,
				    bool back, struct who_flow *key)
{
	__builtin_memset(key, 0, sizeof(*key));
	key->saddr[0] = back ? t->daddr[0] : t->saddr[0];
	key->saddr[1] = back ? t->daddr[1] : t->saddr[1];
	key->daddr[0] = back ? t->saddr[0] : t->daddr[0];
	key->daddr[1] = back ? t->saddr[1] : t->daddr[1];
	key->sport = back ? t->dport : t->sport;
	key->dport = back ? t->sport : t->dport;
	key->netns = netns;
	key->l4_proto = t->l4_proto;
}

/* Is one of our sockets bound to this end? */
static __always_inline bool who_is_end(const __u64 *addr, __u16 port,
				       const struct np_tuple *t, __u32 netns)
{
	struct who_end key = {
		.addr = {addr[0], addr[1]},
		.netns = netns,
		.port = port,
		.l4_proto = t->l4_proto,
		.family = t->l3_version,
	};

	if (!port)
		return false;
	if (bpf_map_lookup_elem(&who_ends, &key))
		return true;
	key.addr[0] = 0;
	key.addr[1] = 0;
	if (bpf_map_lookup_elem(&who_ends, &key))
		return true;
	key.family = 0;
	return bpf_map_lookup_elem(&who_ends, &key) != NULL;
}

/* An ICMP error quotes the packet that it is about. */
static __always_inline bool who_is_error(const struct np_tuple *t)
{
	if (t->l4_proto == IPPROTO_ICMP)
		return t->icmp_type == 3 || t->icmp_type == 11 ||
		       t->icmp_type == 12;
	return t->l4_proto == 58 && t->icmp_type < 128;
}

/* Is it an ICMP error about a packet of ours? */
static __always_inline bool who_is_told(struct sk_buff *skb, __u32 netns,
					struct who_scratch *s)
{
	__u64 l3 = np_l3_sound(skb);
	__u8 first = 0;

	bpf_probe_read_kernel(&first, 1, (void *)l3);
	l3 += s->tuple.l3_version == 4 ? (first & 0xf) * 4 : 40;
	__builtin_memset(&s->quoted, 0, sizeof(s->quoted));
	np_read_l3((const __u8 *)l3 + 8, &s->quoted);
	who_key(&s->quoted, netns, true, &s->key);
	return bpf_map_lookup_elem(&who_flows, &s->key) ||
	       who_is_end(s->quoted.saddr, s->quoted.sport, &s->quoted, netns);
}

/* Is a packet on its way to one of our sockets, by its addresses? */
static __noinline __u64 who_is_for_us(__u64 skb_ptr, __u32 netns)
{
	struct sk_buff *skb = NP_CAST(sk_buff, skb_ptr);
	struct who_scratch *s;
	__u32 zero = 0;

	s = bpf_map_lookup_elem(&who_scratches, &zero);
	if (!s)
		return 0;
	__builtin_memset(&s->tuple, 0, sizeof(s->tuple));
	np_read_tuple(skb, &s->tuple);
	if (!s->tuple.l3_version)
		return 0;
	who_key(&s->tuple, netns, false, &s->key);
	if (bpf_map_lookup_elem(&who_flows, &s->key) ||
	    who_is_end(s->tuple.daddr, s->tuple.dport, &s->tuple, netns))
		return 1;
	return who_is_error(&s->tuple) && who_is_told(skb, netns, s);
}

/* Is it a packet of one of our sockets, or for one? `to`: the function's own socket, or 0. */
static __noinline __attribute__((unused)) __u64 who_matches(__u64 skb_ptr,
							    __u64 to)
{
	struct sk_buff *skb = NP_CAST(sk_buff, skb_ptr);
	__u64 sk = (__u64)BPF_CORE_READ(skb, sk);

	if (!sk)
		sk = to;
	if (sk)
		sk = (__u64)who_full((struct sock *)sk);
	if (sk && who_owns(sk))
		return 1;
	return who_is_for_us(skb_ptr,
			     np_read_netns(skb, to ? NP_CAST(sock, to) : NULL));
}

/* This packet is followed: what comes back belongs to it. */
static __always_inline void who_note(struct sk_buff *skb, struct sock *sk,
				     const struct np_tuple *t)
{
	struct who_scratch *s;
	__u32 zero = 0;
	__u8 one = 1;

	s = bpf_map_lookup_elem(&who_scratches, &zero);
	if (!s || !t->l3_version)
		return;
	who_key(t, np_read_netns(skb, sk), true, &s->key);
	bpf_map_update_elem(&who_flows, &s->key, &one, BPF_ANY);
}

/* The addresses of a socket: its own in `local`, the other end's in `peer`. */
static __always_inline bool who_addresses(struct sock *sk, __u64 *local,
					  __u64 *peer)
{
	__u16 family = BPF_CORE_READ(sk, __sk_common.skc_family);

	if (family == NP_AF_INET) {
		np_map_v4(local, BPF_CORE_READ(sk, __sk_common.skc_rcv_saddr));
		np_map_v4(peer, BPF_CORE_READ(sk, __sk_common.skc_daddr));
		return true;
	}
	if (family != NP_AF_INET6)
		return false;
	bpf_probe_read_kernel(local, 16, &sk->__sk_common.skc_v6_rcv_saddr);
	bpf_probe_read_kernel(peer, 16, &sk->__sk_common.skc_v6_daddr);
	return true;
}

/* What comes back on a connection. */
static __always_inline bool who_flow_of(struct sock *sk, struct who_flow *key)
{
	struct net *net = BPF_CORE_READ(sk, __sk_common.skc_net.net);

	__builtin_memset(key, 0, sizeof(*key));
	if (!who_addresses(sk, key->daddr, key->saddr))
		return false;
	key->sport = bpf_ntohs(BPF_CORE_READ(sk, __sk_common.skc_dport));
	key->dport = BPF_CORE_READ(sk, __sk_common.skc_num);
	key->netns = BPF_CORE_READ(net, ns.inum);
	key->l4_proto = IPPROTO_TCP;
	return key->sport != 0;
}

/* What a socket is bound to. */
static __always_inline bool who_end_of(struct sock *sk, __u8 proto,
				       struct who_end *end)
{
	struct net *net = BPF_CORE_READ(sk, __sk_common.skc_net.net);
	__u64 peer[2];

	__builtin_memset(end, 0, sizeof(*end));
	if (!who_addresses(sk, end->addr, peer))
		return false;
	end->netns = BPF_CORE_READ(net, ns.inum);
	end->port = BPF_CORE_READ(sk, __sk_common.skc_num);
	end->l4_proto = proto;
	end->family = end->addr[0] || (__u32)end->addr[1] != bpf_htonl(0xffff)
			      ? 6
			      : 4;
	/* 0.0.0.0, and :: */
	if (end->family == 4 && !(end->addr[1] >> 32))
		end->addr[1] = 0;
	else if (!end->addr[0] && !end->addr[1] &&
		 !BPF_CORE_READ_BITFIELD_PROBED(sk, __sk_common.skc_ipv6only))
		end->family = 0;
	return end->port != 0;
}

static __always_inline void who_unbind(const struct who_end *end)
{
	__u32 *count = bpf_map_lookup_elem(&who_ends, end);

	if (!count)
		return;
	__sync_fetch_and_add(count, -1);
	if (!*(volatile __u32 *)count)
		bpf_map_delete_elem(&who_ends, end);
}

/* One of our sockets has got a port. */
static __noinline __attribute__((unused)) __u64 who_bound(__u64 sk_ptr,
							  __u32 proto)
{
	struct who_sock *known, new = {};
	__u32 one = 1, *count;
	struct who_end end;

	if (!who_end_of((void *)sk_ptr, proto, &end))
		return 0;
	known = bpf_map_lookup_elem(&who_socks, &sk_ptr);
	if (known && known->bound)
		who_unbind(&known->end);
	count = bpf_map_lookup_elem(&who_ends, &end);
	if (count)
		__sync_fetch_and_add(count, 1);
	else if (bpf_map_update_elem(&who_ends, &end, &one, BPF_ANY))
		who_full_map();
	if (known)
		new.ours = known->ours;
	new.end = end;
	new.bound = 1;
	if (bpf_map_update_elem(&who_socks, &sk_ptr, &new, BPF_ANY))
		who_full_map();
	return 0;
}

/* A connection of ours has both of its ends. */
static __always_inline void who_connected(struct sock *sk)
{
	struct who_flow key;
	__u8 one = 1;

	if (who_flow_of(sk, &key))
		bpf_map_update_elem(&who_flows, &key, &one, BPF_ANY);
}

/* A socket is made or used by one of our processes. */
static __always_inline void who_take(__u64 sk)
{
	struct who_sock *known = bpf_map_lookup_elem(&who_socks, &sk);
	struct who_sock new = {.ours = 1};

	if (known)
		known->ours = 1;
	else if (bpf_map_update_elem(&who_socks, &sk, &new, BPF_ANY))
		who_full_map();
}

/* The memory of a socket of ours, whose end was not seen, may be another's now. */
static __always_inline void who_forget(__u64 sk)
{
	bpf_map_delete_elem(&who_socks, &sk);
}

/* sock_init_data(sock, sk) */
SEC("kprobe/who_made")
int who_made(struct pt_regs *ctx)
{
	struct sock *sk = (void *)PT_REGS_PARM2(ctx);
	__u16 family = BPF_CORE_READ(sk, __sk_common.skc_family);

	/* Of others no end is seen. */
	if (family != NP_AF_INET && family != NP_AF_INET6 &&
	    family != NP_AF_PACKET)
		return 0;
	if (PT_REGS_PARM1(ctx) && who_thread())
		who_take((__u64)sk);
	else
		who_forget((__u64)sk);
	return 0;
}

/* tcp_sendmsg(sk, ...) and its like: a socket that another process made, or that was accepted. */
SEC("kprobe/who_uses")
int who_uses(struct pt_regs *ctx)
{
	__u64 sk = PT_REGS_PARM1(ctx);
	struct who_sock *known = bpf_map_lookup_elem(&who_socks, &sk);

	if ((known && known->ours) || !who_thread())
		return 0;
	who_take(sk);
	if (!who_owns(sk))
		return 0;
	if (BPF_CORE_READ((struct sock *)sk, sk_protocol) == IPPROTO_TCP)
		who_connected((void *)sk);
	else if (BPF_CORE_READ((struct sock *)sk, sk_protocol) == IPPROTO_UDP)
		who_bound(sk, IPPROTO_UDP);
	return 0;
}

/* tcp_connect(sk) */
SEC("kprobe/who_connects")
int who_connects(struct pt_regs *ctx)
{
	if (who_owns(PT_REGS_PARM1(ctx)))
		who_connected((void *)PT_REGS_PARM1(ctx));
	return 0;
}

/* inet_csk_complete_hashdance(sk, child, ...): a listener's connection is its own until it is accepted. */
SEC("kprobe/who_child")
int who_child(struct pt_regs *ctx)
{
	if (!who_owns(PT_REGS_PARM1(ctx))) {
		who_forget(PT_REGS_PARM2(ctx));
		return 0;
	}
	if (who_on & (WHO_PROCESS | WHO_COMM))
		who_take(PT_REGS_PARM2(ctx));
	who_connected((void *)PT_REGS_PARM2(ctx));
	return 0;
}

/* inet_hash(sk) and its like, of a socket that is to listen */
SEC("kprobe/who_listens")
int who_listens(struct pt_regs *ctx)
{
	if (who_owns(PT_REGS_PARM1(ctx)))
		who_bound(PT_REGS_PARM1(ctx), IPPROTO_TCP);
	return 0;
}

/* udp_lib_get_port(sk, ...) */
SEC("kprobe/who_binds_begin")
int who_binds_begin(struct pt_regs *ctx)
{
	__u64 key = bpf_get_current_pid_tgid(), sk = PT_REGS_PARM1(ctx);

	if (who_owns(sk))
		bpf_map_update_elem(&who_binds, &key, &sk, BPF_ANY);
	return 0;
}

/* Its end */
SEC("kprobe/who_binds_end")
int who_binds_end(struct pt_regs *ctx)
{
	__u64 key = bpf_get_current_pid_tgid();
	__u64 *sk = bpf_map_lookup_elem(&who_binds, &key);

	if (!sk)
		return 0;
	if (!PT_REGS_RC(ctx))
		who_bound(*sk, BPF_CORE_READ((struct sock *)*sk, sk_protocol));
	bpf_map_delete_elem(&who_binds, &key);
	return 0;
}

static __always_inline void who_left(struct sock *sk)
{
	__u8 state = BPF_CORE_READ(sk, __sk_common.skc_state);
	__u16 proto = BPF_CORE_READ(sk, sk_protocol);
	struct who_flow flow;
	struct who_end end;

	if (proto == IPPROTO_TCP && state != NP_TCP_LISTEN) {
		if (who_flow_of(sk, &flow))
			bpf_map_delete_elem(&who_flows, &flow);
	} else if (who_end_of(sk, proto, &end)) {
		who_unbind(&end);
	}
}

/* inet_unhash(sk), udp_lib_unhash(sk): its port may be another's from now on. */
SEC("kprobe/who_leaves")
int who_leaves(struct pt_regs *ctx)
{
	__u64 sk = PT_REGS_PARM1(ctx);
	struct who_sock *known = bpf_map_lookup_elem(&who_socks, &sk);

	if (known && known->bound) {
		who_unbind(&known->end);
		known->bound = 0;
		return 0;
	}
	/* Older than the run, or a connection. */
	if (who_owns(sk))
		who_left((void *)sk);
	return 0;
}

/* inet_sock_destruct(sk) and its like */
SEC("kprobe/who_gone")
int who_gone(struct pt_regs *ctx)
{
	who_forget(PT_REGS_PARM1(ctx));
	return 0;
}

/* sched_process_fork(parent, child): what a member forks is one. */
SEC("raw_tp/sched_process_fork")
int who_forks(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *parent = (void *)ctx->args[0];
	struct task_struct *child = (void *)ctx->args[1];
	__u32 from = BPF_CORE_READ(parent, tgid);
	__u32 to = BPF_CORE_READ(child, tgid);
	__u8 member = WHO_MEMBER;

	if (from == to || !bpf_map_lookup_elem(&who_tgids, &from))
		return 0;
	if (bpf_map_update_elem(&who_tgids, &to, &member, BPF_ANY))
		who_full_map();
	return 0;
}

/* sched_process_exit(task): its number may be another's from now on. */
SEC("raw_tp/sched_process_exit")
int who_exits(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *task = (void *)ctx->args[0];
	__u32 tgid = BPF_CORE_READ(task, tgid);

	if (!BPF_CORE_READ(task, signal, live.counter))
		bpf_map_delete_elem(&who_tgids, &tgid);
	return 0;
}

#endif
