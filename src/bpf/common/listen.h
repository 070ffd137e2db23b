/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What a listener has no room in: a reason for a drop that the kernel has no name for. */
#ifndef NETPROBE_LISTEN_H
#define NETPROBE_LISTEN_H

/* Beside the values of enum skb_drop_reason, whose upper half is a subsystem's number. */
enum np_listen {
	NP_LISTEN_ROOM = 0,
	NP_LISTEN_SYN_QUEUE_FULL = 0xffff0001,
	NP_LISTEN_ACCEPT_QUEUE_FULL = 0xffff0002,
};

#endif
