/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The events of `netprobe tcp`. */
#ifndef NETPROBE_TCP_H
#define NETPROBE_TCP_H

#include "common/event.h"

enum conn_kind {
	CONN_KIND_END = 1, /* struct conn_event */
	CONN_KIND_NOTE = 2, /* struct conn_note */
};

/* What a note tells of a connection that goes on. */
enum conn_what {
	CONN_WHAT_RETRANSMIT = 1, /* of data or of a SYN: conn_note.how */
	CONN_WHAT_RETRANSMIT_SYNACK = 2,
	CONN_WHAT_UNDONE = 3, /* what was sent again had arrived */
	CONN_WHAT_RST_OUT = 4,
	CONN_WHAT_RST_IN = 5,
	CONN_WHAT_PEER_SHUT = 6, /* the peer's window is zero */
	CONN_WHAT_PEER_OPEN = 7, /* it is no longer: conn_note.waited */
	CONN_WHAT_HERE_READ = 8, /* a process reads while our window is zero */
	CONN_WHAT_PRESSURE = 9, /* TCP has little memory */
	CONN_WHAT_RELIEF = 10, /* it has enough again */
	CONN_WHAT_STATE = 11, /* conn_note.from, .to */
	CONN_WHAT_DUPLICATES = 12, /* the peer had it: conn_note.seq segments */
};

/* How a packet that was lost belongs to what is sent again. */
enum conn_lost {
	CONN_LOST_NONE = 0,
	CONN_LOST_ORIGINAL = 1,
	CONN_LOST_ACK = 2, /* what acknowledged it */
};

enum conn_role {
	CONN_ROLE_NOT_SEEN = 0, /* older than the run */
	CONN_ROLE_CONNECT = 1,
	CONN_ROLE_ACCEPT = 2,
};

/* Bits of conn_life.flags. */
enum conn_flag {
	CONN_FLAG_OLD = 1U << 0, /* it was there before the run */
	CONN_FLAG_FIN_IN = 1U << 1, /* the peer's FIN has come */
	CONN_FLAG_RST_OUT = 1U << 2, /* a RST was sent */
	CONN_FLAG_RST_IN = 1U << 3, /* a RST was received */
	CONN_FLAG_MPTCP = 1U << 4, /* a subflow of an MPTCP socket */
	CONN_FLAG_EXITING = 1U << 5, /* closed by the end of its process */
};

/* A process: who connected, accepted, or, where that was not seen, closed. */
struct conn_owner {
	__u64 cgroup; /* id (v2) */
	__u32 tgid; /* 0: not known */
	__u32 uid;
	__u8 comm[NP_COMM_LEN];
};

/* What is kept of a connection from its first state to its end. */
struct conn_life {
	__u64 start; /* SYN sent or received, ns; 0: not seen */
	__u64 established; /* ns; 0: not seen */
	__u64 end; /* ns; 0: not yet */
	struct conn_owner owner;
	__u32 flags; /* CONN_FLAG_* */
	__u8 role; /* CONN_ROLE_* */
	__u8 last; /* state before TCP_CLOSE */
	__u8 pad[2];
};

/* Both ends of a connection. */
struct conn_ends {
	__u64 saddr[2]; /* network byte order; IPv4 as ::ffff:a.b.c.d */
	__u64 daddr[2];
	__u32 netns; /* inode */
	__u16 sport; /* host byte order */
	__u16 dport;
	__u8 version; /* 4 or 6 */
	__u8 pad[7];
};

/* A packet of TCP that this kernel has dropped. */
struct conn_drop {
	__u64 ts; /* ns; 0: none */
	__u64 at; /* address of the code that dropped it */
	__u32 reason; /* enum skb_drop_reason; 0 where a kernel has none */
	__u32 netns; /* inode; 0: not known */
};

#define CONN_STACK_DEPTH 24

/* Something has happened to a connection. */
struct conn_note {
	struct np_head head; /* its process is the current one */
	struct conn_life life; /* zero where it is not followed */
	struct conn_ends ends;
	struct conn_drop drop;
	__u64 sock; /* address of the struct sock; 0: none */
	__u64 waited; /* ns; where `jiffies` is set, jiffies_64 */
	/*
	 * Host byte order: of what is sent again; where a window is zero, the number that
	 * its end waits for, by which both ends know one another through NAT.
	 */
	__u32 seq;
	__u32 end_seq;
	__u32 jiffies; /* the retransmission timeout; since data came last */
	__u32 reason; /* enum sk_rst_reason */
	__u32 stack; /* of a RST: its number in the map `stacks`, and 1; 0: none */
	__u8 what; /* CONN_WHAT_* */
	__u8 ca_state; /* enum tcp_ca_state */
	__u8 from; /* TCP_*: the state; of CONN_WHAT_STATE, before */
	__u8 to;
	__u8 lost; /* CONN_LOST_*: what `drop` is */
	__u8 fin; /* what is sent again has a FIN, which has a number, and no byte */
	__u8 pad[6];
};

/* A connection has ended. Counters are those of struct tcp_sock; 0 where a kernel has none. */
struct conn_event {
	struct np_head head; /* without a process */
	struct conn_life life;
	struct conn_ends ends;
	__u64 sock; /* address of the struct sock */
	__u64 bytes_sent; /* of data, with what was sent again */
	__u64 bytes_retrans;
	__u64 bytes_acked; /* with SYN and FIN */
	__u64 bytes_received; /* with the FIN */
	__u64 jiffies; /* jiffies_64 */
	__u32 limited
		[3]; /* jiffies: busy, by the peer's window, by the send buffer */
	__u32 segs_out;
	__u32 segs_in;
	__u32 data_segs_out;
	__u32 data_segs_in;
	__u32 retransmitted; /* segments, those of the SYN included */
	__u32 lost; /* segments that the kernel took for lost */
	__u32 reordered; /* times that reordering was seen */
	__u32 duplicates; /* DSACKs: segments that the peer had already */
	__u32 out_of_order; /* segments received so */
	__u32 srtt; /* us */
	__u32 rttvar; /* us */
	__u32 min_rtt; /* us; 0: not measured */
	__u32 error; /* errno, positive */
};

_Static_assert(sizeof(struct conn_life) == 64,
	       "conn_life is part of the contract");
_Static_assert(sizeof(struct conn_event) == 264,
	       "conn_event is part of the contract");
_Static_assert(sizeof(struct conn_note) == 224,
	       "conn_note is part of the contract");

#endif
