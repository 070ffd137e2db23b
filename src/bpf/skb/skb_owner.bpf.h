/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Owners: the process that made or connected a socket, remembered while the
 * socket lives. The process that happens to be current when a packet is
 * handled (a softirq, a retransmit timer) is another.
 *
 * Needs compat.bpf.h, event.bpf.h and packet.bpf.h before it.
 */
#ifndef NETPROBE_SKB_OWNER_BPF_H
#define NETPROBE_SKB_OWNER_BPF_H

#include "common/who.bpf.h"
#include "skb/skb.h"

struct skb_process {
	__u32 pid;
	__u8 comm[NP_COMM_LEN];
};

/* By address of the socket; entries go when the socket does. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u64);
	__type(value, struct skb_process);
} owners SEC(".maps");

struct skb_owner skb_owner_type;

static __always_inline void owner_set(__u64 sk, __u64 flags)
{
	struct skb_process p = {};
	struct np_stats *count;

	p.pid = bpf_get_current_pid_tgid() >> 32;
	if (!p.pid)
		return;
	bpf_get_current_comm(p.comm, sizeof(p.comm));
	/* -E2BIG: full; -EEXIST with BPF_NOEXIST is no loss. */
	if (bpf_map_update_elem(&owners, &sk, &p, flags) == -7) {
		count = np_stats_get();
		if (count)
			count->map_full++;
	}
}

/* struct sock before 5.11 kept the uid in sk_uid too, 6.17 made it kuid only. */
/* `to`: the socket that the function has beside the skb, or that the packet is on its way to; or NULL. */
static __always_inline void owner_read(struct sk_buff *skb, struct sock *to,
				       struct skb_owner *o)
{
	struct sock *sk = NP_READ(skb, sk);
	struct skb_process *p;
	struct cgroup *cgroup;
	struct socket *sock;
	struct inode *inode;
	__u8 state;
	__u64 key;

	__builtin_memset(o, 0, sizeof(*o));
	if (!sk)
		sk = to;
	if (!sk)
		return;
	state = BPF_CORE_READ(sk, __sk_common.skc_state);
	if (state == NP_TCP_NEW_SYN_RECV)
		sk = BPF_CORE_READ((struct request_sock *)sk,
				   __req_common.skc_listener);
	/* A time-wait socket is a small one that knows no process. */
	if (!sk || state == NP_TCP_TIME_WAIT)
		return;
	o->sock = (__u64)sk;
	o->cookie = BPF_CORE_READ(sk, __sk_common.skc_cookie.counter);
	o->uid = BPF_CORE_READ(sk, sk_uid.val);
	cgroup = who_cgroup_of(sk);
	if (cgroup)
		o->cgroup = BPF_CORE_READ(cgroup, kn, id);
	sock = BPF_CORE_READ(sk, sk_socket);
	if (sock) {
		inode = &((struct socket_alloc *)sock)->vfs_inode;
		o->inode = BPF_CORE_READ(inode, i_ino);
	}
	key = (__u64)sk;
	p = bpf_map_lookup_elem(&owners, &key);
	if (p) {
		o->pid = p->pid;
		__builtin_memcpy(o->comm, p->comm, sizeof(o->comm));
	}
}

/* sock_init_data(sock, sk): made by this process (or by none: the kernel). */
SEC("kprobe/owner_made")
int owner_made(struct pt_regs *ctx)
{
	if (PT_REGS_PARM1(ctx))
		owner_set(PT_REGS_PARM2(ctx), BPF_ANY);
	return 0;
}

/* tcp_v4_connect(sk, ...) and its like: the one who connects is the owner. */
SEC("kprobe/owner_connects")
int owner_connects(struct pt_regs *ctx)
{
	owner_set(PT_REGS_PARM1(ctx), BPF_ANY);
	return 0;
}

/* tcp_sendmsg(sk, ...) and its like: accepted sockets, and older ones. */
SEC("kprobe/owner_sends")
int owner_sends(struct pt_regs *ctx)
{
	owner_set(PT_REGS_PARM1(ctx), BPF_NOEXIST);
	return 0;
}

/* inet_sock_destruct(sk) */
SEC("kprobe/owner_gone")
int owner_gone(struct pt_regs *ctx)
{
	__u64 key = PT_REGS_PARM1(ctx);

	bpf_map_delete_elem(&owners, &key);
	return 0;
}

#endif
