// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * netprobe tcpconnect: who connects where, and what became of it.
 *
 * The entry of tcp_v4_connect and tcp_v6_connect keeps the socket by thread,
 * their return reads addresses and ports. An IPv4 address in an IPv6 socket
 * passes both functions and is one connect.
 *
 * With TCP_MODE_OUTCOME a connect lives in `pending`, by socket, from the SYN
 * (tcp_connect) to the change of state that decides it. The socket is locked
 * from the entry to the return, so nothing but a failure of the call itself can decide it
 * in between.
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "packet.h"
#include "tcpconnect.h"
#include "compat.bpf.h"
#include "event.bpf.h"
#include "packet.bpf.h"
#include "dns.bpf.h"

#define AF_INET6 10
#define O_NONBLOCK 00004000
#define PF_EXITING 0x00000004
#define CGROUP_DEPTH 32

const volatile struct tcp_filter filter = {};
/* TCP_MODE_* */
const volatile __u32 mode = 0;
/* The tracepoint kfree_skb says why (kernels from 5.17). */
const volatile __u8 has_drop_reason = 0;

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

/* Addresses and ports of a connect that is pending. */
struct pending_key {
	__u64 saddr[2];
	__u64 daddr[2];
	__u16 sport;
	__u16 dport;
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, __u64); /* pid_tgid */
	__type(value, struct inside);
} inside SEC(".maps");

/* Connects that are not decided, by socket. The size is set before loading. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u64);
	__type(value, struct tcp_event);
} pending SEC(".maps");

/* The same by addresses, for packets without a socket; the value is the key above. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, struct pending_key);
	__type(value, __u64);
} pending_by_addr SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, struct tcp_flow);
	__type(value, __u64);
} counts SEC(".maps");

/* Filters with any number of values. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u16);
	__type(value, __u8);
} ports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct tcp_prefix);
	__type(value, __u8);
} daddrs SEC(".maps");

/*
 * The maps that --cgroupmap and --mntnsmap name, in a map of one place each:
 * a map of somebody else's making keeps its own name and flags there.
 */
struct cgroup_ids {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u64);
	__type(value, __u64);
};

struct mntns_inodes {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u64);
	__type(value, __u32);
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct cgroup_ids);
} cgroupmap SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct mntns_inodes);
} mntnsmap SEC(".maps");

/* Room for an event with its stacks: too much for the BPF stack. */
struct tcp_scratch {
	struct tcp_event event;
	__u8 more[2 * TCP_STACK_DEPTH * sizeof(__u64) + sizeof(struct tcp_exe)];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct tcp_scratch);
} scratch SEC(".maps");

/* For the types in the skeleton. */
struct tcp_event tcp_event_type;
struct tcp_exe tcp_exe_type;
struct tcp_flow tcp_flow_type;
struct tcp_prefix tcp_prefix_type;

static __always_inline void count_map_full(void)
{
	struct np_stats *count = np_stats_get();

	if (count)
		count->map_full++;
}

/* A filter that is off passes everything. */
static __always_inline bool passes(__u32 bit, bool equal)
{
	return !(filter.on & bit) || equal != !!(filter.negated & bit);
}

static __always_inline bool match_comm(void)
{
	__u64 name[2] = {};
	const volatile __u64 *want = (const volatile __u64 *)filter.comm;

	bpf_get_current_comm(name, sizeof(name));
	return name[0] == want[0] && name[1] == want[1];
}

/* A key of the map in the one place of `outer`. */
static __always_inline bool is_key(void *outer, __u64 key)
{
	__u32 zero = 0;
	void *map = bpf_map_lookup_elem(outer, &zero);

	return map && bpf_map_lookup_elem(map, &key);
}

static __always_inline bool match_mntns(void)
{
	struct task_struct *task = (void *)bpf_get_current_task();

	return is_key(&mntnsmap, BPF_CORE_READ(task, nsproxy, mnt_ns, ns.inum));
}

static __always_inline bool match_cgroupmap(void)
{
	return is_key(&cgroupmap, bpf_get_current_cgroup_id());
}

/*
 * The current cgroup (v2) or one above it has this id. A walk, since
 * bpf_get_current_ancestor_cgroup_id is not for kprobes before 5.15.
 */
static __always_inline bool is_below(__u64 id)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct cgroup *cgroup = BPF_CORE_READ(task, cgroups, dfl_cgrp);
	struct cgroup_subsys_state *parent;

	for (int i = 0; i < CGROUP_DEPTH && cgroup; i++) {
		if (BPF_CORE_READ(cgroup, kn, id) == id)
			return true;
		parent = BPF_CORE_READ(cgroup, self.parent);
		if (!parent)
			break;
		cgroup = (void *)parent -
			 bpf_core_field_offset(struct cgroup, self);
	}
	return false;
}

/* What the caller of connect decides, cheapest first. */
static __always_inline bool match_process(void)
{
	if ((filter.on & TCP_FILTER_PID) &&
	    !passes(TCP_FILTER_PID,
		    bpf_get_current_pid_tgid() >> 32 == filter.pid))
		return false;
	if ((filter.on & TCP_FILTER_UID) &&
	    !passes(TCP_FILTER_UID,
		    (__u32)bpf_get_current_uid_gid() == filter.uid))
		return false;
	if ((filter.on & TCP_FILTER_COMM) &&
	    !passes(TCP_FILTER_COMM, match_comm()))
		return false;
	if ((filter.on & TCP_FILTER_CGROUP) &&
	    !passes(TCP_FILTER_CGROUP, is_below(filter.cgroup)))
		return false;
	if ((filter.on & TCP_FILTER_CGROUPMAP) && !match_cgroupmap())
		return false;
	if ((filter.on & TCP_FILTER_MNTNSMAP) && !match_mntns())
		return false;
	return true;
}

static __always_inline bool match_daddr(const __u64 *daddr)
{
	struct tcp_prefix key = {.bits = 128};

	__builtin_memcpy(key.addr, daddr, sizeof(key.addr));
	return bpf_map_lookup_elem(&daddrs, &key);
}

/* What addresses, ports and namespace decide. */
static __always_inline bool match_socket(const struct tcp_event *e)
{
	__u16 port = e->dport;

	if (!passes(TCP_FILTER_FAMILY, e->version == filter.version))
		return false;
	if ((filter.on & TCP_FILTER_PORTS) &&
	    !passes(TCP_FILTER_PORTS, bpf_map_lookup_elem(&ports, &port)))
		return false;
	if ((filter.on & TCP_FILTER_NETNS) &&
	    !passes(TCP_FILTER_NETNS, e->netns == filter.netns))
		return false;
	if ((filter.on & TCP_FILTER_DADDR) &&
	    !passes(TCP_FILTER_DADDR, match_daddr(e->daddr)))
		return false;
	return true;
}

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
	if (!match_process()) {
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
		count_map_full();
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
		count_map_full();
}

#define THREAD_SIZE 16384 /* x86-64 and arm64 with pages of 4 KiB */

/* The user registers of the current thread, saved by its system call. */
static __always_inline struct pt_regs *user_regs(struct task_struct *task)
{
	/* bpf_task_pt_regs: from 5.15. Before, they end where the stack does. */
	if (bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_task_pt_regs))
		return (struct pt_regs *)bpf_task_pt_regs(
			bpf_get_current_task_btf());
	return (struct pt_regs *)(BPF_CORE_READ(task, stack) + THREAD_SIZE) - 1;
}

/*
 * The words on top of the user stack: the wrapper of the system call in libc
 * makes no frame, so that the frame pointers pass over its caller.
 */
static __always_inline void read_top(struct tcp_exe *exe,
				     struct task_struct *task)
{
	struct pt_regs *regs = user_regs(task);
	__u64 sp = PT_REGS_SP_CORE(regs);

	if (bpf_probe_read_user(exe->top, sizeof(exe->top), (void *)sp))
		__builtin_memset(exe->top, 0, sizeof(exe->top));
#ifdef __TARGET_ARCH_arm64
	/* There the caller is in the link register. */
	exe->top[0] = BPF_CORE_READ((struct user_pt_regs *)regs, regs[30]);
#endif
}

/* The program of the current process, by the names in its path. */
static __always_inline void read_exe(struct tcp_exe *exe)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct mm_struct *mm = BPF_CORE_READ(task, mm);
	struct dentry *dentry = BPF_CORE_READ(mm, exe_file, f_path.dentry);
	struct mount *mount = container_of(
		BPF_CORE_READ(mm, exe_file, f_path.mnt), struct mount, mnt);
	struct dentry *parent;

	read_top(exe, task);
	exe->start_code = BPF_CORE_READ(mm, start_code);
	exe->end_code = BPF_CORE_READ(mm, end_code);
	for (int i = 0; i < TCP_EXE_NAMES; i++) {
		exe->names[i][0] = 0;
		if (!dentry)
			continue;
		/* The root of a file system goes on where it is mounted. */
		if (dentry == BPF_CORE_READ(mount, mnt.mnt_root)) {
			dentry = BPF_CORE_READ(mount, mnt_mountpoint);
			mount = BPF_CORE_READ(mount, mnt_parent);
		}
		parent = BPF_CORE_READ(dentry, d_parent);
		if (parent == dentry) {
			dentry = NULL;
			continue;
		}
		bpf_probe_read_kernel_str(exe->names[i], TCP_EXE_NAME_LEN,
					  BPF_CORE_READ(dentry, d_name.name));
		dentry = parent;
	}
}

/* Bytes of a stack, 0 where there is none; bounds for the verifier. */
static __always_inline __u64 read_stack(void *ctx, void *to, __u64 flags)
{
	long got =
		bpf_get_stack(ctx, to, TCP_STACK_DEPTH * sizeof(__u64), flags);

	if (got < 0)
		return 0;
	barrier_var(got);
	return got & (2 * TCP_STACK_DEPTH * sizeof(__u64) - 1);
}

/* Sends the connect, with the stacks of the current thread where asked for. */
static __always_inline void send_connect(void *ctx, struct tcp_scratch *buf)
{
	struct tcp_event *e = &buf->event;
	__u64 len;

	if (!(mode & TCP_MODE_STACKS)) {
		np_output(ctx, &e->head, sizeof(*e));
		return;
	}
	len = read_stack(ctx, buf->more, 0);
	e->stack_kernel = len;
	e->stack_user = read_stack(ctx, &buf->more[len], BPF_F_USER_STACK);
	len += e->stack_user;
	barrier_var(len);
	if (len > 2 * TCP_STACK_DEPTH * sizeof(__u64))
		return;
	read_exe((struct tcp_exe *)&buf->more[len]);
	np_output(ctx, &e->head, sizeof(*e) + len + sizeof(struct tcp_exe));
}

static __always_inline void forget(const struct tcp_event *e)
{
	__u64 sock = e->sock;
	struct pending_key key = {
		.saddr = {e->saddr[0], e->saddr[1]},
		.daddr = {e->daddr[0], e->daddr[1]},
		.sport = e->sport,
		.dport = e->dport,
	};

	bpf_map_delete_elem(&pending_by_addr, &key);
	bpf_map_delete_elem(&pending, &sock);
}

static __always_inline void remember_addr(const struct tcp_event *e)
{
	__u64 sock = e->sock;
	struct pending_key key = {
		.saddr = {e->saddr[0], e->saddr[1]},
		.daddr = {e->daddr[0], e->daddr[1]},
		.sport = e->sport,
		.dport = e->dport,
	};

	if (bpf_map_update_elem(&pending_by_addr, &key, &sock, BPF_ANY))
		count_map_full();
}

/* A connect is decided: sends it, and forgets it. */
static __always_inline void decide(void *ctx, struct tcp_event *e, __u8 decided,
				   __u32 error)
{
	struct tcp_sock *tp = (struct tcp_sock *)e->sock;
	__u64 now = bpf_ktime_get_ns();
	__u64 since = e->syn ? e->syn : e->start;

	e->head.ts = now;
	e->head.kind = TCP_KIND_OUTCOME;
	e->head.cpu = bpf_get_smp_processor_id();
	e->decided = decided;
	e->error = error;
	if (decided != TCP_DECIDED_AT_ONCE) {
		e->retransmits = BPF_CORE_READ(tp, total_retrans);
		if (BPF_CORE_READ_BITFIELD_PROBED(tp, syn_fastopen))
			e->flags |= TCP_FLAG_FASTOPEN;
		if (BPF_CORE_READ_BITFIELD_PROBED(tp, syn_data))
			e->flags |= TCP_FLAG_SYN_DATA | TCP_FLAG_FASTOPEN;
	}
	if (now - since >= filter.min_ns)
		np_output(ctx, &e->head, sizeof(*e));
}

static __always_inline void leave_outcome(void *ctx, struct tcp_scratch *buf,
					  struct inside *in, int ret)
{
	struct tcp_event *e = bpf_map_lookup_elem(&pending, &in->sock);
	__u64 sock = in->sock;

	if (ret == 0 && e) {
		e->flags &= ~TCP_FLAG_IN_CALL;
		if (mode & TCP_MODE_STACKS) {
			buf->event = *e;
			buf->event.head.ts = bpf_ktime_get_ns();
			send_connect(ctx, buf);
		}
		return;
	}
	if (ret == 0) {
		/* Fast Open: the SYN waits for the first data. */
		fill(&buf->event, in, false);
		buf->event.flags |= TCP_FLAG_DEFERRED;
		if (!match_socket(&buf->event))
			return;
		if (bpf_map_update_elem(&pending, &sock, &buf->event, BPF_ANY))
			count_map_full();
		else if (mode & TCP_MODE_STACKS)
			send_connect(ctx, buf);
		return;
	}
	fill(&buf->event, in, true);
	if (match_socket(&buf->event)) {
		if (mode & TCP_MODE_STACKS)
			send_connect(ctx, buf);
		decide(ctx, &buf->event, TCP_DECIDED_AT_ONCE, -ret);
	}
	if (e)
		forget(e);
}

static __always_inline int leave(void *ctx, int ret)
{
	__u64 id = bpf_get_current_pid_tgid();
	struct inside *found = bpf_map_lookup_elem(&inside, &id), in;
	struct tcp_scratch *buf;
	__u32 zero = 0;

	if (!found)
		return 0;
	in = *found;
	bpf_map_delete_elem(&inside, &id);
	buf = bpf_map_lookup_elem(&scratch, &zero);
	if (!buf || in.refused)
		return 0;
	if (mode & TCP_MODE_OUTCOME) {
		leave_outcome(ctx, buf, &in, ret);
		return 0;
	}
	if (ret)
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
 * fentry and fexit where the kernel has them and lets one use them: a kretprobe has places for
 * some ten threads that are inside at once, and passes over the others in silence.
 */
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
	return leave(ctx, ctx[3]);
}

SEC("fexit/tcp_v6_connect")
int v6_fexit(__u64 *ctx)
{
	return leave(ctx, ctx[3]);
}

/* Else these four. */
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
	return leave(ctx, ret);
}

SEC("kretprobe/tcp_v6_connect")
int BPF_KRETPROBE(v6_return, int ret)
{
	return leave(ctx, ret);
}

/* The SYN is about to be sent: inside of connect, or with the first data (Fast Open). */
SEC("kprobe/tcp_connect")
int BPF_KPROBE(syn, struct sock *sk)
{
	__u64 id = bpf_get_current_pid_tgid(), sock = (__u64)sk;
	struct inside *in = bpf_map_lookup_elem(&inside, &id);
	struct tcp_event *e;
	struct tcp_scratch *buf;
	__u32 zero = 0;

	if (!in || in->sock != sock) {
		e = bpf_map_lookup_elem(&pending, &sock);
		if (e && !e->syn) {
			e->syn = bpf_ktime_get_ns();
			remember_addr(e);
		}
		return 0;
	}
	buf = bpf_map_lookup_elem(&scratch, &zero);
	if (!buf)
		return 0;
	e = &buf->event;
	fill(e, in, false);
	if (!match_socket(e)) {
		in->refused = 1;
		return 0;
	}
	e->syn = e->head.ts;
	e->flags |= TCP_FLAG_IN_CALL;
	if (bpf_map_update_elem(&pending, &sock, e, BPF_ANY)) {
		count_map_full();
		in->refused = 1;
		return 0;
	}
	remember_addr(e);
	return 0;
}

SEC("raw_tp/inet_sock_set_state")
int state(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];
	int to = ctx->args[2];
	__u64 sock = (__u64)sk;
	struct task_struct *task;
	struct tcp_event *e;
	__u32 error;

	if (to != TCP_ESTABLISHED && to != TCP_CLOSE)
		return 0;
	e = bpf_map_lookup_elem(&pending, &sock);
	if (!e)
		return 0;
	if (to == TCP_ESTABLISHED) {
		decide(ctx, e, TCP_DECIDED_ESTABLISHED, 0);
		forget(e);
		return 0;
	}
	error = BPF_CORE_READ(sk, sk_err);
	if (!error) {
		/* A failing connect closes the socket: its return tells more. */
		if ((e->flags & TCP_FLAG_IN_CALL) &&
		    e->head.pid == (__u32)bpf_get_current_pid_tgid())
			return 0;
		task = (void *)bpf_get_current_task();
		if (BPF_CORE_READ(task, flags) & PF_EXITING)
			e->flags |= TCP_FLAG_EXITING;
	}
	decide(ctx, e, TCP_DECIDED_CLOSED, error);
	forget(e);
	return 0;
}

/* The connect that a packet belongs to: by its socket, else by its addresses. */
static __always_inline struct tcp_event *connect_of(struct sk_buff *skb)
{
	struct np_tuple t = {};
	struct pending_key key = {};
	__u64 sock = (__u64)NP_READ(skb, sk), *found;
	struct tcp_event *e;

	if (sock) {
		e = bpf_map_lookup_elem(&pending, &sock);
		if (e)
			return e;
	}
	np_read_tuple(skb, &t);
	if (!t.l3_version || t.l4_proto != IPPROTO_TCP)
		return NULL;
	__builtin_memcpy(key.saddr, t.saddr, sizeof(key.saddr));
	__builtin_memcpy(key.daddr, t.daddr, sizeof(key.daddr));
	key.sport = t.sport;
	key.dport = t.dport;
	found = bpf_map_lookup_elem(&pending_by_addr, &key);
	if (!found) {
		/* An answer. */
		__builtin_memcpy(key.saddr, t.daddr, sizeof(key.saddr));
		__builtin_memcpy(key.daddr, t.saddr, sizeof(key.daddr));
		key.sport = t.dport;
		key.dport = t.sport;
		found = bpf_map_lookup_elem(&pending_by_addr, &key);
	}
	if (!found)
		return NULL;
	sock = *found;
	return bpf_map_lookup_elem(&pending, &sock);
}

/* The kernel drops a packet: is it a SYN of ours, or its answer? */
SEC("raw_tp/kfree_skb")
int drop(struct bpf_raw_tracepoint_args *ctx)
{
	struct sk_buff *skb = NP_CAST(struct sk_buff, ctx->args[0]);
	struct tcp_event *e = connect_of(skb);

	if (!e)
		return 0;
	e->drop_at = ctx->args[1];
	if (has_drop_reason)
		e->drop_reason = ctx->args[2];
	e->drops++;
	e->flags |= TCP_FLAG_DROPPED;
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
