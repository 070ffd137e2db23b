/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The contract between xdpdump's programs and src/tools/xdpdump: the event that
 * comes before each packet, the counters, and the state pinned for each interface
 * that has a chain. netprobe_chain.h comes before it.
 */
#ifndef NETPROBE_XDPDUMP_H
#define NETPROBE_XDPDUMP_H

#include "common/event.h"

/* Kinds of events, np_head.kind: where the packet was seen. */
enum np_xdp_kind {
	NP_XDP_CHAIN = 1, /* by the chain's own program, before all others */
	NP_XDP_ENTRY = 2, /* as a traced program was entered */
	NP_XDP_EXIT = 3, /* as it returned */
	NP_XDP_ERROR =
		4, /* no packet, but why one was dropped: struct np_xdp_error */
};

/* np_xdp_error.what: the tracepoint that told it. */
enum np_xdp_what {
	NP_XDP_EXCEPTION =
		1, /* xdp_exception: an aborted packet, or a verdict that could not be carried out */
	NP_XDP_REDIRECT = 2, /* xdp_redirect_err, xdp_redirect_map_err */
	NP_XDP_XMIT =
		3, /* xdp_devmap_xmit: frames that the target device did not take */
};

/*
 * A perf record is 65,535 bytes at most: this much of a packet fits behind the
 * event and perf's own heads.
 */
enum np_xdp_capture {
	NP_XDP_MAX_CAPTURE = 65400,
};

/*
 * One packet at the head of the chain; `len` counts the packet's bytes that follow.
 * The CPU is the buffer's. All but the last two bytes are sent, which are the upper
 * ones of the number: the kernel's memcpy takes 20 instructions more from 32 on.
 */
struct np_xdp_packet {
	__u64 ts; /* these three as in np_head */
	__u32 len;
	__u16 kind;
	__u16 queue;
	__u32 ifindex;
	__u32 whole; /* bytes of the whole packet, all buffers */
	__u64 number; /* of the CPU's packets that matched, from 1 */
};

/* Bytes of it that are sent. */
enum np_xdp_sent {
	NP_XDP_PACKET_SENT = sizeof(struct np_xdp_packet) - 2,
};

_Static_assert(sizeof(struct np_xdp_packet) == 32 &&
		       __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
	       "np_xdp_packet is part of the contract");

/* One packet at a traced program; head.len counts the packet's bytes that follow. */
struct np_xdp_event {
	struct np_head head;
	__u64 id; /* of the packet: CPU in the upper 16 bits; exit has its entry's */
	__u32 ifindex;
	__u16 queue;
	__u8 outer; /* bytes of outer headers in front of the packet: see outer.bpf.h */
	__u8 outer_link; /* those of them that are a link header */
	__u32 len; /* of the whole packet, all buffers and outer headers */
	__u32 verdict; /* at exit: what the program returned */
	__u32 program; /* which traced program: index given by user space */
	__s32 moved; /* at exit: bytes by which the program moved the packet's start; negative: room was made in front */
};

_Static_assert(sizeof(struct np_xdp_event) == 72,
	       "np_xdp_event is part of the contract");

struct np_xdp_error {
	struct np_head head;
	__u32 what; /* NP_XDP_EXCEPTION, _REDIRECT, _XMIT */
	__u32 ifindex; /* the interface that the packet came in by */
	__u32 program; /* id; 0 where the tracepoint does not tell */
	__u32 verdict; /* of an exception */
	__s32 err; /* negative errno */
	__u32 target; /* interface index, where there is one */
	__u32 map; /* id of the map that the redirect went through; 0: none */
	__u32 index; /* its key, or the interface index that was asked for */
	__u32 count; /* frames */
	__u32 pad;
};

_Static_assert(sizeof(struct np_xdp_error) == 80,
	       "np_xdp_error is part of the contract");

/*
 * Per CPU, in the map `stats` of the chain's program. Each is counted only where
 * it differs from the one that follows from it: `seen` with a filter (else all
 * matched), all.sent with sampling (else all that matched were sent).
 */
struct np_xdp_stats {
	struct np_stats all;
	__u64 seen;
	__u64 matched;
};

/* Per CPU, of a traced program: packets before and after the filter. */
struct np_xdp_count {
	__u64 seen;
	__u64 matched;
};

/* How the chain got to the interface, np_chain_state.kind. */
enum np_chain_kind {
	NP_CHAIN_OWN_LINK = 1, /* nothing was there: a bpf_link of our own */
	NP_CHAIN_THEIR_NETLINK =
		3, /* replaced a program attached over netlink */
	NP_CHAIN_THEIR_LINK = 4, /* updated another process's bpf_link */
};

enum np_chain_state_limit {
	NP_CHAIN_NAME = 32,
	NP_CHAIN_STATE_VERSION = 1,
};

/* The one value of the pinned map chain_state: all that it takes to put things back. */
struct np_chain_state {
	__u32 version;
	__u32 kind; /* NP_CHAIN_* */
	__u64 netns; /* inode of the interface's network namespace */
	__u64 owner_start; /* start time of the capturing process (/proc/PID/stat), 0: none */
	__u32 owner; /* its pid */
	__u32 ifindex;
	__u32 mode; /* XDP_FLAGS_SKB_MODE or XDP_FLAGS_DRV_MODE */
	__u32 link; /* id of the bpf_link, ours or theirs */
	__u32 root; /* id of our program at the interface */
	__u32 root_next; /* id of the one that is about to replace it; 0: none */
	__u32 original; /* id of the program that was there; 0: none */
	__u32 frags; /* programs of this chain take packets of several buffers */
	__u32 attach_type; /* expected attach type that programs of this chain share */
	__u32 pad;
	__u8 names[NP_CHAIN_SLOTS][NP_CHAIN_NAME];
	/* chain_stats as a slot's program was put in: it only ever counts up */
	struct np_chain_slot base[NP_CHAIN_SLOTS];
};

#endif
