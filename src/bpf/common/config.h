/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The field filters: the one value of the map `config`, pinned as
 * /sys/fs/bpf/netprobe/<tool>-<pid>/config. Another process may change it while
 * the probes stay attached (netprobe ctl): BPF reads it on every hit.
 */
#ifndef NETPROBE_CONFIG_H
#define NETPROBE_CONFIG_H

enum np_config_version {
	NP_CONFIG_VERSION = 1,
};

/* Bits of np_config.fields: which of the fields below filter. All hold (AND). */
enum np_field {
	NP_FIELD_MARK = 1U << 0,
	NP_FIELD_NETNS = 1U << 1,
	NP_FIELD_IFINDEX = 1U << 2,
	NP_FIELD_PROTO = 1U << 3,
	NP_FIELD_SADDR = 1U << 4,
	NP_FIELD_DADDR = 1U << 5,
	NP_FIELD_SPORT = 1U << 6,
	NP_FIELD_DPORT = 1U << 7,
	/* With NP_PAUSED: the run has ended and is detaching, what has begun is of no interest either. */
	NP_ENDED = 1U << 30,
	/* Nothing matches: nobody reads (heartbeat.h), or the run has ended. */
	NP_PAUSED = 1U << 31,
};

/* The fields that are read from the device, and those from the packet. */
#define NP_FIELDS_DEVICE (NP_FIELD_NETNS | NP_FIELD_IFINDEX)
#define NP_FIELDS_PACKET                                                     \
	(NP_FIELD_PROTO | NP_FIELD_SADDR | NP_FIELD_DADDR | NP_FIELD_SPORT | \
	 NP_FIELD_DPORT)

struct np_config {
	__u32 version; /* NP_CONFIG_VERSION */
	__u32 fields; /* NP_FIELD_* */
	__u32 mark;
	__u32 mark_mask; /* matches when (skb->mark & mark_mask) == mark */
	__u32 netns; /* inode of the network namespace */
	__u32 ifindex;
	__u64 saddr[2]; /* network byte order; IPv4 as ::ffff:a.b.c.d */
	__u64 saddr_mask[2]; /* matches when (address & mask) == saddr */
	__u64 daddr[2];
	__u64 daddr_mask[2];
	__u16 sport; /* host byte order */
	__u16 dport; /* host byte order */
	__u8 l4_proto; /* IPPROTO_*; 58 for ICMPv6 */
	__u8 pad[3];
};

_Static_assert(sizeof(struct np_config) == 96,
	       "np_config is part of the contract");

#endif
