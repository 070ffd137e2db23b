/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What differs from kernel to kernel in reading kernel memory.
 *
 * NP_READ(p, member) reads a member of a kernel struct: where use_cast is set,
 * by a plain load through a pointer that bpf_rdonly_cast made typed (kernel
 * 6.2: a fault reads as 0, and no helper is called: 95 instructions in place
 * of 120 for one member, 110 in place of 630 for five), else by
 * bpf_probe_read_kernel. use_cast is in .rodata: the branch that is not
 * taken is removed (src/filter/prune.rs). Needs cast.bpf.h or no_cast.bpf.h
 * before it.
 */
#ifndef NETPROBE_COMPAT_BPF_H
#define NETPROBE_COMPAT_BPF_H

enum np_cast {
	NP_CAST_PLACE = 0x4e504341,
};

/*
 * A call that user space replaces by one of the kernel's function, whose number
 * it knows (src/filter/inject.rs): for an extern __ksym libbpf reads all of the
 * kernel's BTF. Where it is not replaced it is removed (use_cast).
 */
static void *(*const np_rdonly_cast)(const void *obj,
				     __u32 btf_id) = (void *)NP_CAST_PLACE;

/*
 * Numbers in the place of those that the kernel's BTF gives to these structs:
 * user space replaces them with the call (CAST_TYPES of src/kernel/features.rs
 * has the same names in the same order). Not by CO-RE, whose BTF has just what
 * relocations need, by other numbers (src/kernel/btf_core.rs).
 */
enum np_type {
	NP_TYPE___kernel_sockaddr_storage = 0x4e505400,
	NP_TYPE_dst_entry,
	NP_TYPE_net,
	NP_TYPE_net_device,
	NP_TYPE_sk_buff,
	NP_TYPE_sock,
	NP_TYPE_task_struct,
	NP_TYPE_timespec64,
};

/* The pointer p as one to `struct type`, with use_cast only. */
#define NP_TYPED(type, p) \
	((struct type *)np_rdonly_cast((const void *)(p), NP_TYPE_##type))

/* The pointer p as one to `struct type`, fit for NP_READ. */
#define NP_CAST(type, p) (use_cast ? NP_TYPED(type, p) : (struct type *)(p))

/*
 * The pointer p as one to bytes, fit for NP_READ of any struct up to 126 bytes
 * that none of the kernel's own are in: a packet's header. By a struct that every
 * kernel has, two bytes and an array of them: a load of any width goes anywhere
 * in the array.
 */
#define NP_CAST_BYTES(p) ((void *)NP_CAST(__kernel_sockaddr_storage, p))

#define NP_READ(p, member)                                   \
	({                                                   \
		typeof((p)->member) np_value;                \
		if (use_cast)                                \
			np_value = (p)->member;              \
		else                                         \
			np_value = BPF_CORE_READ(p, member); \
		np_value;                                    \
	})

/*
 * Two words of any kernel memory by typed loads, with use_cast only. The type
 * is one that every kernel has and that is two integers of 8 bytes.
 */
static __always_inline void np_load_16(__u64 *to, const void *from)
{
	const struct timespec64 *words = NP_TYPED(timespec64, from);

	to[0] = words->tv_sec;
	to[1] = words->tv_nsec;
}

/* How fields of the sk_buff lie to its head: constants when a program is loaded. */
#define NP_BEFORE_HEAD(field, bytes)                               \
	(bpf_core_field_offset(struct sk_buff, field) + (bytes) == \
	 bpf_core_field_offset(struct sk_buff, head))
#define NP_DATA_BEHIND_HEAD                                 \
	(bpf_core_field_offset(struct sk_buff, head) + 8 == \
	 bpf_core_field_offset(struct sk_buff, data))

/* A kernel address; skb->dev may hold something else (see np_read_netns). */
static __always_inline bool np_is_pointer(const void *p)
{
	return (__s64)p < 0;
}

#endif
