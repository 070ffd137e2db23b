/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The events, filters and counts of `netprobe tcpconnect`. */
#ifndef NETPROBE_TCPCONNECT_H
#define NETPROBE_TCPCONNECT_H

#include "common/event.h"
#include "tcp/dns.h"
#include "common/listen.h"

enum tcp_kind {
	TCP_KIND_CONNECT = 1, /* connect has sent its SYN: struct tcp_event */
	TCP_KIND_OUTCOME = 2, /* a connect is decided: struct tcp_outcome */
};
/* DNS_KIND_ANSWER (dns.h) is the third. */

/* Bits of the variable `mode`: what a run does with a connect. */
enum tcp_mode {
	TCP_MODE_COUNT = 1U << 0, /* count it in the map counts, no event */
	TCP_MODE_LPORT = 1U << 1, /* the local port is part of a count's key */
	TCP_MODE_OUTCOME = 1U << 2, /* follow it until it is decided */
	TCP_MODE_STACKS = 1U << 3, /* kernel and user stack of the connect */
};

/* Bits of tcp_filter.on and .negated. All that are on must hold. */
enum tcp_filter_bit {
	TCP_FILTER_PID = 1U << 0,
	TCP_FILTER_UID = 1U << 1,
	TCP_FILTER_COMM = 1U << 2,
	TCP_FILTER_CGROUP = 1U << 3,
	TCP_FILTER_CGROUPMAP = 1U << 4,
	TCP_FILTER_MNTNSMAP = 1U << 5,
	TCP_FILTER_PORTS = 1U << 6,
	TCP_FILTER_FAMILY = 1U << 7,
	TCP_FILTER_DADDR = 1U << 8,
	TCP_FILTER_NETNS = 1U << 9,
};

/* In .rodata: fixed for a run, so that what is off is taken out. */
struct tcp_filter {
	__u64 cgroup; /* this cgroup or one below it, by id */
	__u64 min_ns; /* outcomes that took less are not told */
	__u32 on; /* TCP_FILTER_* */
	__u32 negated; /* TCP_FILTER_*: must not match */
	__u32 pid; /* tgid */
	__u32 uid;
	__u32 netns; /* inode */
	__u8 comm[NP_COMM_LEN]; /* NUL-padded */
	__u32 version; /* 4 or 6: as sent on the wire */
};

/* Bits of tcp_event.flags. */
enum tcp_flag {
	TCP_FLAG_MAPPED = 1U << 0, /* IPv4 by an IPv6 socket */
	TCP_FLAG_NONBLOCK = 1U << 1,
	TCP_FLAG_MPTCP = 1U << 2, /* a subflow of an MPTCP socket */
	TCP_FLAG_FASTOPEN = 1U << 3, /* the SYN had its option, or data */
	TCP_FLAG_SYN_DATA = 1U << 4, /* the SYN had data (Fast Open) */
	TCP_FLAG_DEFERRED = 1U << 5, /* the SYN waited for the first data */
	TCP_FLAG_EXITING = 1U << 6, /* closed by the end of the process */
	TCP_FLAG_FLOODED = 1U << 7, /* a bridge sent its SYN to several ports */
	TCP_FLAG_SOFT = 1U << 8, /* error is the soft error, which was read */
	TCP_FLAG_IN_CALL = 1U << 31, /* connect has not returned yet */
};

/* How a connect was decided: tcp_event.decided. */
enum tcp_decided {
	TCP_DECIDED_NOT = 0,
	TCP_DECIDED_ESTABLISHED = 1,
	TCP_DECIDED_AT_ONCE = 2, /* connect failed before any packet was sent */
	TCP_DECIDED_CLOSED =
		3, /* the socket closed; error says why, 0: closed by its process */
};

#define TCP_STACK_DEPTH 64

/*
 * A connect. The head is that of the thread that called connect; head.ts is the
 * time of the event. Behind it, with TCP_MODE_STACKS: stack_kernel and
 * stack_user bytes of addresses, then a struct tcp_exe.
 */
struct tcp_event {
	struct np_head head;
	__u64 sock; /* address of the struct sock: names the connect */
	__u64 start; /* entry of tcp_v4_connect or tcp_v6_connect, ns; 0: not looked at */
	__u64 syn; /* the SYN was sent, ns; 0: not yet */
	__u64 cgroup; /* id of the process's cgroup (v2) */
	__u64 saddr[2]; /* network byte order; IPv4 as ::ffff:a.b.c.d */
	__u64 daddr[2];
	__u32 netns; /* inode */
	__u32 uid;
	__u32 retransmits; /* of the SYN */
	__u32 error; /* errno, positive */
	__u32 flags; /* TCP_FLAG_* */
	__u16 sport; /* host byte order */
	__u16 dport;
	__u16 stack_kernel; /* bytes */
	__u16 stack_user;
	__u8 version; /* 4 or 6 */
	__u8 decided; /* TCP_DECIDED_* */
	__u8 pad[2];
};

_Static_assert(sizeof(struct tcp_event) == 136,
	       "tcp_event is part of the contract");

/* Packets of a handshake that the kernel dropped; the place and reason of the last. */
struct tcp_drop {
	__u64 at;
	__u32 reason; /* enum skb_drop_reason (kernels from 5.17), enum np_listen */
	__u32 packets; /* 0: none */
};

/* A connect that is followed until it is decided. */
struct tcp_outcome {
	struct tcp_event connect;
	struct tcp_drop drop;
	struct tcp_drop
		copy; /* by a host that they were not addressed to, by a packet socket */
	__u64 soft_at; /* soft_error was set, ns */
	__u32 soft_error; /* sk_err_soft: the program reads it by SO_ERROR */
	__u32 isn; /* sequence number of its SYN */
};

_Static_assert(sizeof(struct tcp_outcome) == 184,
	       "tcp_outcome is part of the contract");

#define TCP_STACK_TOP 16
#define TCP_EXE_NAMES 16
#define TCP_EXE_NAME_LEN 32

/* The program of the process: to name its functions when it has gone. */
struct tcp_exe {
	__u64 top
		[TCP_STACK_TOP]; /* words on top of its stack; 0: not readable */
	__u64 start_code; /* address of its first executable segment */
	__u64 end_code;
	__u8 names
		[TCP_EXE_NAMES]
		[TCP_EXE_NAME_LEN]; /* of its path, last part first; one of 31 bytes may be cut */
};

/* Key of the map counts; the value is a __u64. */
struct tcp_flow {
	__u64 saddr[2];
	__u64 daddr[2];
	__u16 dport;
	__u16 lport; /* 0 without TCP_MODE_LPORT */
	__u8 version;
	__u8 pad[3];
};

/* Key of the map daddrs (LPM trie): IPv4 as ::ffff:a.b.c.d. */
struct tcp_prefix {
	__u32 bits;
	__u8 addr[16];
};

#endif
