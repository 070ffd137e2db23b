/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What a process received from port 53. */
#ifndef NETPROBE_DNS_H
#define NETPROBE_DNS_H

#include "common/event.h"

enum dns_kind {
	DNS_KIND_ANSWER = 3,
};

/* More of one message is cut off: EDNS answers have 4096 bytes at most as a rule. */
#define DNS_MAX 4096

/* `size` bytes follow: a datagram, or the next piece of a TCP stream. */
struct dns_event {
	struct np_head head;
	__u64 sock; /* address of the struct sock: names the stream */
	__u32 size;
	__u8 stream; /* 1: TCP */
	__u8 cut; /* 1: there was more than DNS_MAX */
	__u8 pad[2];
};

_Static_assert(sizeof(struct dns_event) == 56,
	       "dns_event is part of the contract");

#endif
