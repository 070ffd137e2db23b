/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The contract of `netprobe latency`: packets with the time that each stage took, and histograms of these times. */
#ifndef NETPROBE_LATENCY_H
#define NETPROBE_LATENCY_H

#include "common/event.h"
#include "common/packet.h"

enum lat_kind {
	LAT_KIND_PACKET = 1, /* struct lat_packet */
	/* Before the packet that it is about. */
	LAT_KIND_READER = 2, /* struct lat_reader */
	LAT_KIND_SENT = 3, /* struct lat_sent */
};

enum lat_way {
	LAT_IN, /* to a socket, or handled by the kernel */
	LAT_OUT, /* from a socket to a driver */
	LAT_THROUGH, /* from one device to another */
	LAT_BETWEEN, /* --from, --to */
	LAT_SERVES, /* --requests: a request that a process of this machine answers */
	LAT_ASKS, /* --requests: one that a process of this machine sends */
	LAT_WAYS,
};

/* What a packet's time is cut into. A stage ends at the place that its comment names. */
enum lat_stage {
	LAT_NIC, /* the card's time stamp -> its driver hands it over */
	LAT_SOFTIRQ, /* a driver handed it over -> netif_receive_skb */
	LAT_DEVICE, /* a bridge, a tunnel, a VLAN: on to the next device */
	LAT_IP, /* -> ip_local_deliver, ip6_input */
	LAT_TRANSPORT, /* -> its socket is found (sk_filter_trim_cap) */
	LAT_QUEUE, /* -> the socket's queue; TCP: while a process has the socket */
	LAT_SOCKET, /* -> read by a process */
	LAT_WRITE, /* sendmsg -> IP: ip_queue_xmit, ip_send_skb */
	LAT_OUTPUT, /* -> net_dev_queue */
	LAT_FORWARD, /* netif_receive_skb -> net_dev_queue */
	LAT_QDISC, /* -> the driver: net_dev_start_xmit */
	LAT_COMPLETION, /* -> the driver frees it; in no total */
	LAT_BETWEEN_THEM, /* the one function -> the other */
	LAT_NETWORK, /* a request: the smoothed round trip */
	LAT_PROCESS, /* read -> the first byte of the answer is written */
	LAT_UNREAD, /* it is in the socket's queue -> read */
	LAT_OVERLAP, /* requests that overlap: counted, no time */
	LAT_TOTAL,
	LAT_STAGES,
};

/* Where a packet is: the last place that it passed. */
enum lat_place {
	LAT_AT_DRIVER_IN, /* handed over by a driver */
	LAT_AT_RECEIVE,
	LAT_AT_LOCAL,
	LAT_AT_FOUND,
	LAT_AT_QUEUE,
	LAT_AT_READ,
	LAT_AT_IP_OUT,
	LAT_AT_QDISC,
	LAT_AT_DRIVER_OUT,
	LAT_AT_SENT, /* the driver has it */
	LAT_AT_END, /* nothing is known any more */
};

/* Bits of lat_packet.flags. */
enum lat_flag {
	LAT_FLAG_MATCHES = 1U << 0, /* the filter has taken it */
	LAT_FLAG_SPLIT = 1U << 1, /* cut into segments: it ends there */
	LAT_FLAG_AGAIN = 1U << 2, /* TCP: sent before */
	LAT_FLAG_HOLE = 1U << 3, /* TCP: an earlier segment was missing */
	LAT_FLAG_WHOLE = 1U << 4, /* read, or sent: it has a total */
	LAT_FLAG_LIMITS = 1U << 5, /* `limited` is known */
	LAT_FLAG_BY_PORT = 1U << 6, /* the end that serves: by the ports */
	LAT_FLAG_THEIRS = 1U << 7, /* read or written by who is asked for */
};

/* Bits of `whose`: what a process is asked for by. */
enum lat_whose {
	LAT_WHOSE_PID = 1U << 0,
	LAT_WHOSE_UID = 1U << 1,
	LAT_WHOSE_CGROUP = 1U << 2, /* or one below it */
	LAT_WHOSE_COMM = 1U << 3,
};

/* What rows are made by. */
enum lat_by {
	LAT_BY_NOTHING,
	LAT_BY_CPU,
	LAT_BY_DEVICE,
	LAT_BY_PORT,
	LAT_BY_PROCESS,
	LAT_BY_CGROUP,
};

/* A value of n bits: values below 16 stand alone, above each power of two has 16 parts. */
enum lat_buckets {
	LAT_FINE = 16,
	LAT_BITS = 37, /* longer than 137 s is in the last bucket */
	LAT_BUCKETS = 544, /* (LAT_BITS - 4 + 1) * LAT_FINE */
};

struct lat_hist {
	__u64 count;
	__u64 sum; /* ns */
	__u64 max;
	__u32 buckets[LAT_BUCKETS];
};

/* A row of --by. */
struct lat_key {
	__u64 by;
	__u32 way;
	__u32 stage;
};

/* One packet, by the address of its sk_buff. */
struct lat_packet {
	struct np_head head; /* filled when it is sent as an event */
	struct np_tuple tuple; /* l3_version 0: not read */
	__u64 first; /* ns; the first place that was seen */
	__u64 last; /* the last one */
	__u64 stage[LAT_TOTAL]; /* ns */
	__u64 cgroup; /* of the process that wrote or read it; 0: not known */
	__u32 seen; /* bits: stages that it passed */
	__u32 counted; /* bits: stages that are in the histograms */
	__u32 tgid; /* that process */
	__u32 ifindex; /* device that it came by, or leaves by */
	__u32 netns; /* inode; of that device */
	__u32 len; /* bytes, as they were seen first */
	__u32 end_seq; /* TCP, while it waits to be read */
	__u16 cpu; /* that it came in by, or was given to the driver by */
	__u8 place; /* LAT_AT_* */
	__u8 way; /* LAT_IN ... */
	__u8 flags; /* LAT_FLAG_* */
	__u8 pad[3];
	__u32 backlog; /* packets in the queue of the device when it came */
	/* Jiffies of stage write: by the peer's window, by the send buffer; all. */
	__u32 limited[3];
	__u32 pad2;
	__u64 queued; /* ns; when it came into that queue */
	__u64 data; /* address of its bytes where it was seen first */
	__u8 comm[NP_COMM_LEN]; /* of the process, NUL-padded */
	__u8 qdisc[NP_COMM_LEN]; /* kind of that queue, NUL-padded */
};

#define LAT_FRAMES 24

/* What a process that reads late did since it had read before. */
struct lat_reader {
	struct np_head head; /* its process is the current one */
	__u64 packet; /* lat_packet.last */
	__u64 since; /* ns; when it read before */
	__u64 from; /* ns; the longest time off its CPU */
	__u64 to;
	__u64 ran; /* ns on a CPU since it read before */
	__u64 waited; /* ns that it could have run, and had no CPU, since then */
	__u32 state; /* task_struct.__state in that time; 0: it wanted to run */
	__u32 len; /* bytes of the stack */
	__u64 stack[LAT_FRAMES]; /* innermost first */
};

#define LAT_SENT 64

struct lat_frame {
	__u64 ts;
	__u32 len;
	__u32 pad;
	struct np_tuple tuple;
};

/* The last packets that left a device. */
struct lat_sent {
	struct np_head head;
	__u32 ifindex;
	__u32 netns;
	__u32 next; /* the oldest one */
	__u32 pad;
	struct lat_frame frame[LAT_SENT];
};

_Static_assert(sizeof(struct lat_hist) == 24 + 4 * LAT_BUCKETS,
	       "lat_hist is part of the contract");
_Static_assert(sizeof(struct lat_packet) == 352,
	       "lat_packet is part of the contract");

#endif
