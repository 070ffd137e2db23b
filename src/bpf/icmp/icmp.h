/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The events of `netprobe icmp`. All that belong to one echo have the same
 * number, `request`: user space joins them by it. Addresses and ids do not tell:
 * they are translated on the way, and two namespaces may have the same.
 */
#ifndef NETPROBE_ICMP_H
#define NETPROBE_ICMP_H

#include "common/event.h"

enum icmp_kind {
	/* The answering side. */
	ICMP_KIND_ECHO = 1, /* the kernel handles a request (icmp_echo) */
	ICMP_KIND_REPLY = 2, /* its reply is handed to a device's driver */
	/* The sending side. */
	ICMP_KIND_SEND = 3, /* a process' request, headers complete */
	ICMP_KIND_XMIT = 4, /* it is handed to a device's driver */
	ICMP_KIND_RETURN = 5, /* its reply is received from a device */
	ICMP_KIND_READ = 6, /* its process reads the reply */
	ICMP_KIND_DROP = 7, /* this kernel frees the request or its reply */
	/* The CPU that made an echo wait. */
	ICMP_KIND_GAP = 8, /* struct icmp_gap */
	ICMP_KIND_SAMPLE = 9, /* struct icmp_sample */
	/* The sending side again. */
	ICMP_KIND_DELIVER = 10, /* the reply is put into a socket's queue */
};

/* icmp_event.context: who was current when the request was handled. */
enum icmp_context {
	ICMP_CONTEXT_TASK = 0,
	ICMP_CONTEXT_IDLE = 1,
	ICMP_CONTEXT_KSOFTIRQD = 2,
};

/* Bits of icmp_event.drop. */
enum icmp_drop {
	ICMP_DROP_COPY =
		1, /* another copy of the packet has not been dropped */
	ICMP_DROP_UNQUEUED = 2, /* its socket had no room for it */
};

#define ICMP_IFNAMSIZ 16

/* An echo, always as its request has it: saddr is who asks. */
struct icmp_key {
	__u64 saddr[2]; /* network byte order; IPv4 as ::ffff:a.b.c.d */
	__u64 daddr[2];
	__u32 netns; /* inode */
	__u16 id; /* host byte order */
	__u16 seq; /* host byte order */
	__u8 version; /* of IP: 4 or 6 */
	__u8 pad[7];
};

/* One NET_RX softirq of a CPU. ns of CLOCK_MONOTONIC, 0: not seen. */
struct icmp_softirq {
	__u64 irq; /* start of the hard interrupt that raised it */
	__u64 raise; /* irq:softirq_raise */
	__u64 entry; /* irq:softirq_entry */
};

/* A request's way in. */
struct icmp_times {
	__u64 queued; /* net:netif_rx, or the driver handed it to the stack */
	struct icmp_softirq first; /* what queued_cpu ran then */
	struct icmp_softirq last; /* what receive_cpu ran then */
	__u64 receive; /* net:netif_receive_skb */
	__u16 queued_cpu;
	__u16 receive_cpu;
	__u8 backlog; /* `queued` is by net:netif_rx */
	__u8 pad[3];
};

struct icmp_event {
	struct np_head head;
	__u64 request; /* number of the echo in this run; 0: none */
	struct icmp_key key;
	struct icmp_times times; /* ECHO; RETURN: of the reply */
	__u64 start; /* SEND: entry of the system call's sendmsg */
	__u64 location; /* DROP: where in the kernel */
	__u32 reason; /* DROP: enum skb_drop_reason, 0 if the kernel has none */
	__u32 ifindex; /* 0: none */
	__u32 len; /* bytes of the IP packet */
	__u8 icmp_type;
	__u8 context; /* ECHO: ICMP_CONTEXT_* */
	__u8 reply; /* DROP: it is the reply that is freed */
	__u8 drop; /* DROP: ICMP_DROP_* */
	__u8 ifname[ICMP_IFNAMSIZ]; /* NUL-padded */
};

/* Tasks of one gap that are told apart; the time of more goes to the last. */
#define ICMP_RUNS 6
#define ICMP_STACK_DEPTH 48

/* A task that ran while a softirq waited. */
struct icmp_run {
	__u64 ns; /* how long, in the gap */
	__u64 cgroup; /* id in cgroup v2 */
	__u32 tgid;
	__u32 pid;
	__u8 comm[NP_COMM_LEN]; /* NUL-padded */
};

/* NET_RX was raised, and entered later than the limit. */
struct icmp_gap {
	struct np_head head;
	__u64 raise; /* with the CPU: what it has in common with echoes */
	__u64 entry;
	__u32 runs;
	__u32 pad;
	struct icmp_run run[ICMP_RUNS];
};

/* What a CPU did at one moment while NET_RX waited: current is the task. */
struct icmp_sample {
	struct np_head head;
	__u64 raise;
	/* Kernel addresses, innermost first; the event ends with the last. */
	__u64 stack[ICMP_STACK_DEPTH];
};

_Static_assert(sizeof(struct icmp_key) == 48,
	       "icmp_key is part of the contract");
_Static_assert(sizeof(struct icmp_times) == 72,
	       "icmp_times is part of the contract");
_Static_assert(sizeof(struct icmp_event) == 216,
	       "icmp_event is part of the contract");

#endif
