/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The events of `netprobe skb`: a fixed part, then the sections asked for. */
#ifndef NETPROBE_SKB_H
#define NETPROBE_SKB_H

#include "common/event.h"
#include "skb/members.h"
#include "skb/netfilter.h"
#include "common/packet.h"

enum skb_kind {
	SKB_KIND_HIT = 1, /* a function was entered with this skb */
	SKB_KIND_DROP = 2, /* the same, and `reason` says why it is freed */
	SKB_KIND_DROPPED =
		3, /* tracepoint skb:kfree_skb; `func`: the location */
	SKB_KIND_RETURN = 4, /* a function ends; `retval`: what it gives back */
	SKB_KIND_NEAR =
		5, /* a function without an skb, below one of a packet */
	/* A tc or XDP program; `func`: its id, `skb`: the sk_buff or the xdp_buff */
	SKB_KIND_ENTER = 6, /* it is entered */
	SKB_KIND_LEAVE = 7, /* it ends; `reason`: its verdict */
	/* This kernel sends an ICMP error for it; `reason`: its type << 8 | its code */
	SKB_KIND_ICMP = 8,
	/* A process looked for a route in vain; `reason`: the errno. Sections META (the namespace alone) and TUPLE */
	SKB_KIND_NO_ROUTE = 9,
	/* struct skb_change; `reason`: SKB_CHANGED_* */
	SKB_KIND_CHANGE = 10,
	/* A rule of nft translates it. Sections PACKET and NFT */
	SKB_KIND_TRANSLATED = 11,
	/* struct skb_trigger */
	SKB_KIND_TRIGGER = 12,
};

/*
 * Bits of skb_event.sections, in the order in which the sections follow. A new
 * one comes in front of the last.
 */
enum skb_section {
	SKB_SECTION_META = 1U << 0, /* struct skb_meta */
	SKB_SECTION_TUPLE = 1U << 1, /* struct np_tuple */
	SKB_SECTION_PACKET = 1U << 2, /* __u64 identity, see skb_track */
	SKB_SECTION_OWNER = 1U << 3, /* struct skb_owner */
	SKB_SECTION_CALLER = 1U << 4, /* __u64 address of the caller */
	SKB_SECTION_TUNNEL = 1U << 5, /* struct np_tuple of the inner packet */
	SKB_SECTION_CB = 1U << 6, /* skb->cb, SKB_CB_LEN bytes */
	SKB_SECTION_SKB = 1U << 7, /* struct skb_copy of the sk_buff */
	SKB_SECTION_SHINFO = 1U << 8, /* struct skb_copy, skb_shared_info */
	SKB_SECTION_DATA = 1U << 9, /* struct skb_data and snap_len bytes */
	SKB_SECTION_MEMBERS = 1U << 10, /* struct np_members of the sk_buff */
	SKB_SECTION_NFT = 1U << 11, /* struct nf_decision */
	SKB_SECTION_MAP = 1U << 12, /* struct skb_map */
	SKB_SECTION_LIFE = 1U
			   << 13, /* __u64 number of its life, see skb_track */
	SKB_SECTION_DROP = 1U << 14, /* struct skb_drop */
	SKB_SECTION_CT = 1U << 15, /* struct skb_ct */
	SKB_SECTION_FACTS = 1U << 16, /* struct skb_facts */
	SKB_SECTION_STACK = 1U << 30, /* __u64 addresses, to the end */
};

#define SKB_STACK_DEPTH 64
#define SKB_CB_LEN 48
/* Room for any kernel's sk_buff and skb_shared_info (6.12: 232 and 320). */
#define SKB_COPY_LEN 384
#define SKB_SNAP_MAX 1536
#define SKB_IFNAMSIZ 16

struct skb_event {
	struct np_head head;
	__u64 skb; /* address of the sk_buff */
	__u64 func; /* address of the function */
	__u32 sections;
	/* enum skb_drop_reason, where it is a drop; SKB_KIND_RETURN: the value */
	__u32 reason;
};

/* In skb_meta.mtu: a VLAN tag is beside the packet. */
enum skb_mtu {
	SKB_MTU_TAGGED = 1U << 31,
};

struct skb_meta {
	__u32 netns; /* inode */
	__u32 mark;
	__u32 ifindex;
	__u32 len; /* skb->len, bytes */
	__u32 mtu; /* of the device, bytes; SKB_MTU_TAGGED */
	__u16 protocol; /* EtherType, host byte order */
	__u16 vlan; /* of the tag beside the packet: priority, DEI and id */
	__u8 ifname[SKB_IFNAMSIZ]; /* NUL-padded */
};

/* A packet's identity: a number that its first CPU gave it, and that CPU. */
enum skb_packet {
	SKB_PACKET_CPU_BITS = 16,
	SKB_PACKET_CPU_MASK = 0xffff,
};

/* Value of the map `tracked`; the key is the address of an sk_buff. */
struct skb_track {
	__u64 packet; /* identity */
	__u64 head; /* skb->head */
	__u64 data; /* skb->data when it was given up, where `dying` */
	__u32 len; /* skb->len then */
	__u8 dying; /* freed, or about to be */
	__u8 moving; /* skb->head may change once */
	__u8 pad[2];
};

/* Whose socket a packet belongs to. */
struct skb_owner {
	__u64 sock; /* address of the full socket; 0: none */
	__u64 cookie; /* 0 where the kernel has not made one yet */
	__u64 cgroup; /* id of the socket's cgroup (v2) */
	__u64 inode; /* of the socket's file */
	__u32 uid; /* user who made the socket */
	__u32 pid; /* process that made or connected it; 0: not seen */
	__u8 comm[NP_COMM_LEN]; /* its name then */
};

/* What may trigger the flight recorder (netprobe record --flight). */
enum skb_trigger_what {
	SKB_TRIGGER_DROP = 1, /* `value`: enum skb_drop_reason */
	SKB_TRIGGER_RETRANSMIT = 2, /* `value`: first unacknowledged byte */
	SKB_TRIGGER_RST_SENT = 3,
	SKB_TRIGGER_RST_RECEIVED = 4,
	SKB_TRIGGER_CONNECT_BEGIN = 5,
	SKB_TRIGGER_CONNECT_END = 6, /* `value`: it is established */
	SKB_TRIGGER_REASONS = 8, /* drop reasons at most */
};

struct skb_trigger {
	struct np_head head;
	struct np_tuple tuple; /* of the packet */
	__u64 sk; /* address of the socket */
	__u32 what; /* SKB_TRIGGER_* */
	__u32 value;
	__u32 netns; /* inode */
	__u32 pad;
};

/* A constant that user space looks for in the loaded instructions. */
enum skb_program {
	SKB_PROGRAM_ID = 0x4e50b1d0,
};

/* A kernel struct as it is in memory; BTF says what is in it. */
struct skb_copy {
	__u32 size; /* of the struct; what does not fit is cut off */
	__u32 pad;
	__u8 bytes[SKB_COPY_LEN];
};

/* The packet from its link layer header, or from its network header, on. */
struct skb_data {
	__u32 len; /* of the packet from there on */
	__u32 captured; /* of the bytes that follow: these are of the packet */
	__u16 ethernet; /* begins with an Ethernet header; 0: with that of IP */
	__u16 hatype; /* ARPHRD_* of the device */
	__u16 vlan; /* of the tag beside the packet: priority, DEI and id */
	__u16 vlan_type; /* its EtherType, host byte order; 0: there is none */
};

/* What the kernel frees as consumed or for no reason, though it is lost. */
enum skb_lost {
	SKB_LOST_ACCEPT_QUEUE = 1, /* its accept queue is full */
	SKB_LOST_SYN_QUEUE = 2, /* its queue of SYNs is full */
	SKB_LOST_SYN = 3, /* a SYN that got no answer, for another cause */
	SKB_LOST_CHILD =
		4, /* a handshake that made no socket, for another cause */
	/* On kernels without reasons: who has refused it */
	SKB_LOST_FILTER = 5, /* a socket's filter */
	SKB_LOST_POLICY = 6, /* a policy of IPsec */
	SKB_LOST_CSUM = 7, /* its checksum is wrong */
	SKB_LOST_BUFFER = 8, /* the socket's receive buffer is full */
	SKB_LOST_MEMORY = 9, /* the protocol's memory is used up */
	SKB_LOST_RPFILTER = 10, /* the reverse path filter */
};

#define SKB_DROP_CALLERS 4

/* A drop, with --drops. */
struct skb_drop {
	__u64 callers[SKB_DROP_CALLERS]; /* of the place, outwards; 0: none */
	__u32 lost; /* SKB_LOST_*; 0: none of these */
	__u32 backlog; /* what the queue held */
	__u32 limit; /* of the queue */
	__s32 others; /* sk_buffs that hold the same packet now; -1: none do */
	__u8 pkt_type; /* PACKET_* of include/uapi/linux/if_packet.h */
	__u8 cloned; /* others held the same packet once, TCP's own queue aside */
	__u8 facts; /* enum drop_fact */
	__u8 pad;
	__u32 qdisc; /* reason that the qdisc left in the packet; 0: the kernel keeps none */
};

_Static_assert(sizeof(struct skb_drop) == 56,
	       "skb_drop is part of the contract");

/* Bits of skb_facts.known. */
enum skb_fact {
	SKB_FACT_SOCK = 1, /* rmem, rcvbuf, backlog, limit, state */
	SKB_FACT_ROUTE = 2, /* ifindex to gateway */
	SKB_FACT_TIME_WAIT = 4, /* its socket is in TIME-WAIT */
	SKB_FACT_PROMISCUOUS = 8, /* its device takes frames for others, too */
	/* its Ethernet header has the device's own address, or that of a group */
	SKB_FACT_OWN_MAC = 16,
	SKB_FACT_OTHER_MAC = 32, /* or the address of another host */
	SKB_FACT_IPV6_OFF = 64, /* its device does not take IPv6 */
	SKB_FACT_FILTER = 128, /* its socket has a filter */
};

/* What decides beside the packet, for netprobe why. */
struct skb_facts {
	__u32 rmem; /* bytes in the socket's receive queue and backlog */
	__u32 rcvbuf; /* their limit */
	__u32 backlog; /* connections that wait for accept() */
	__u32 limit; /* of these */
	__u32 ifindex; /* of the route's device */
	__u32 mtu; /* of that device, bytes */
	__u8 ifname[SKB_IFNAMSIZ]; /* of that device, NUL-padded */
	__u8 gateway[16]; /* the first 4 bytes, where its family is AF_INET */
	__s16 error; /* of the route, an errno; 0: none */
	__u16 family; /* AF_* of the route */
	__u8 known; /* SKB_FACT_* */
	__u8 state; /* TCP_* of the socket */
	__u8 type; /* RTN_* of the route, IPv4 */
	__u8 gateway_family; /* AF_*; 0: there is none */
	__u8 pkt_type; /* PACKET_* */
	__u8 ip_summed; /* CHECKSUM_* */
	__u8 pad[6];
};

_Static_assert(sizeof(struct skb_facts) == 72,
	       "skb_facts is part of the contract");

/* What was changed, and what skb_change.bytes holds. */
enum skb_changed {
	SKB_CHANGED_RTNL = 1, /* the message of rtnetlink, from its header on */
	SKB_CHANGED_NFT = 2, /* struct skb_nft_change */
	SKB_CHANGED_NFT_SOME = 3, /* nothing: something of nf_tables */
	SKB_CHANGED_IPTABLES = 4, /* name of the table */
	SKB_CHANGED_IP6TABLES = 5,
	SKB_CHANGED_SYSCTL =
		6, /* SKB_CHANGE_VALUE bytes, then names, outwards */
};

enum skb_change_size {
	SKB_CHANGE_VALUE = 64,
	SKB_CHANGE_NAME = 32,
	SKB_CHANGE_NAMES = 6,
};

#define SKB_CHANGE_BYTES 256

/* What a process has changed, with netprobe why --changes. */
struct skb_change {
	struct skb_event event; /* without sections */
	__u32 netns; /* inode */
	__u32 len; /* of `bytes`, as far as they are used */
	__u8 bytes[SKB_CHANGE_BYTES];
};

struct skb_nft_change {
	__u64 handle; /* of a rule; 0: it is none */
	__u32 msg; /* NFT_MSG_* */
	__u8 family; /* NFPROTO_* */
	__u8 pad[3];
	__u8 table[64];
	__u8 part[64]; /* chain, or set; empty: the table itself */
};

_Static_assert(sizeof(struct skb_change) == 328,
	       "skb_change is part of the contract");

#define SKB_MAP_BYTES 256 /* longer keys and values are cut off */

/* Bits of skb_map.known. */
enum skb_map_part {
	SKB_MAP_KEY = 1,
	SKB_MAP_VALUE = 2,
};

/* What a BPF program does with a map. */
struct skb_map {
	__u32 id;
	__u32 key_size;
	__u32 value_size;
	__u32 known; /* SKB_MAP_*: what could be read */
	__u8 name[16]; /* NUL-padded */
	__u8 key[SKB_MAP_BYTES];
	__u8 value[SKB_MAP_BYTES];
};

_Static_assert(sizeof(struct skb_map) == 544,
	       "skb_map is part of the contract");
_Static_assert(sizeof(struct skb_copy) == 392,
	       "skb_copy is part of the contract");
_Static_assert(sizeof(struct skb_data) == 16,
	       "skb_data is part of the contract");
_Static_assert(sizeof(struct skb_track) == 32,
	       "skb_track is part of the contract");
_Static_assert(sizeof(struct skb_owner) == 56,
	       "skb_owner is part of the contract");
_Static_assert(sizeof(struct skb_event) == 64,
	       "skb_event is part of the contract");
_Static_assert(sizeof(struct skb_meta) == 40,
	       "skb_meta is part of the contract");

#endif
