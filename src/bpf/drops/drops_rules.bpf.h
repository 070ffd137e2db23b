/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What decided about a packet, by a number that rows have: nft rules, traps of
 * devices. A number is made of the names, so that it stays what it is when the
 * kernel puts something else where one was.
 */
#ifndef NETPROBE_DROPS_RULES_BPF_H
#define NETPROBE_DROPS_RULES_BPF_H

#include "common/scratch.bpf.h"
#include "drops/drops.h"

struct drop_rule drop_rule_type;

#define RULE_NUMBERS 4 /* tried for one, where others have the same number */

/* By number. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct drop_rule);
} rules_seen SEC(".maps");

/* Too large for the stack. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, SCRATCH_COUNT);
	__type(key, __u32);
	__type(value, struct drop_rule);
} rule_at_hand SEC(".maps");

static __always_inline struct drop_rule *rule_new(__u32 scratch)
{
	struct drop_rule *rule = bpf_map_lookup_elem(&rule_at_hand, &scratch);

	if (rule)
		__builtin_memset(rule, 0, sizeof(*rule));
	return rule;
}

static __always_inline bool rule_is(const struct drop_rule *a,
				    const struct drop_rule *b)
{
	const __u64 *x = (const void *)a, *y = (const void *)b;

	for (__u32 i = 0; i < sizeof(*a) / sizeof(*x); i++)
		if (x[i] != y[i])
			return false;
	return true;
}

/* Has this number no other rule by now? */
static __noinline bool rule_takes(const struct drop_rule *rule, __u32 number)
{
	struct drop_rule *seen;

	if (!rule)
		return false;
	bpf_map_update_elem(&rules_seen, &number, rule, BPF_NOEXIST);
	seen = bpf_map_lookup_elem(&rules_seen, &number);
	return seen && rule_is(seen, rule);
}

/* Its number; 0: there is none left. */
static __noinline __u32 rule_number(const struct drop_rule *rule)
{
	const __u64 *words = (const void *)rule;
	__u64 hash = 0xcbf29ce484222325;
	__u32 number;

	if (!rule)
		return 0;
	for (__u32 i = 0; i < sizeof(*rule) / sizeof(*words); i++) {
		hash = (hash ^ words[i]) * 0x100000001b3;
		hash ^= hash >> 29;
	}
	number = hash >> 32 ^ hash;
	for (__u32 i = 0; i < RULE_NUMBERS; i++) {
		if (number + i && rule_takes(rule, number + i))
			return number + i;
	}
	return 0;
}

#endif
