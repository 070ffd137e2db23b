/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Sending a connect of `netprobe tcpconnect`, with the stacks of its thread
 * and the program of its process where asked for. Needs vmlinux.h, the helpers,
 * tcpconnect.h and event.bpf.h before it.
 */
#ifndef NETPROBE_TCPCONNECT_STACK_BPF_H
#define NETPROBE_TCPCONNECT_STACK_BPF_H

/* TCP_MODE_* */
const volatile __u32 mode = 0;

/* Room for an event with its stacks: too much for the BPF stack. */
struct tcp_scratch {
	struct tcp_event event;
	__u8 more[2 * TCP_STACK_DEPTH * sizeof(__u64) + sizeof(struct tcp_exe)];
};

/*
 * Which of the programs uses which room: a kernel that preempts lets one take
 * the CPU from another (fexit programs are not protected from that), and a
 * kprobe hits while a fexit program is interrupted.
 */
enum tcp_room {
	TCP_ROOM_V4,
	TCP_ROOM_V6,
	TCP_ROOM_SYN,
	TCP_ROOMS
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, TCP_ROOMS);
	__type(key, __u32);
	__type(value, struct tcp_scratch);
} scratch SEC(".maps");

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

#endif
