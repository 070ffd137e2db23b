/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Where a cgroup (v2) is in the tree. */
#ifndef NETPROBE_CGROUP_BPF_H
#define NETPROBE_CGROUP_BPF_H

#define NP_CGROUP_DEPTH 32

/*
 * This cgroup, or one above it, has this id. A walk, since
 * bpf_get_current_ancestor_cgroup_id is not for tracing programs before 5.15.
 */
static __always_inline bool np_cgroup_is_below(struct cgroup *cgroup, __u64 id)
{
	struct cgroup_subsys_state *parent;

	for (int i = 0; i < NP_CGROUP_DEPTH && cgroup; i++) {
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

/* The current thread's. */
static __always_inline bool np_current_is_below(__u64 id)
{
	struct task_struct *task = (void *)bpf_get_current_task();

	return np_cgroup_is_below(BPF_CORE_READ(task, cgroups, dfl_cgrp), id);
}

#endif
