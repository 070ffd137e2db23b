/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The filters of `netprobe tcpconnect`: by the process that connects, and by
 * addresses, ports and namespace. Needs vmlinux.h, the helpers and
 * tcpconnect.h before it.
 */
#ifndef NETPROBE_TCPCONNECT_FILTER_BPF_H
#define NETPROBE_TCPCONNECT_FILTER_BPF_H

#include "common/cgroup.bpf.h"

const volatile struct tcp_filter filter = {};

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
	    !passes(TCP_FILTER_CGROUP, np_current_is_below(filter.cgroup)))
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

#endif
