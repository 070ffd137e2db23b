/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The program that asks whether somebody still reads (heartbeat.h): not at each hit,
 * which would cost a look at the clock, but by a clock of its own (a perf event,
 * which goes with the process however it ends). What the others ask at each hit they
 * ask anyway: the config map's fields (config.bpf.h before this file), or np_held()
 * where there is no such map. Needs vmlinux.h and bpf_helpers.h before it.
 */
#ifndef NETPROBE_HEARTBEAT_BPF_H
#define NETPROBE_HEARTBEAT_BPF_H

#include "common/heartbeat.h"

struct np_heartbeat np_heartbeat_value SEC(".data.heartbeat");

/* For the skeleton's types. */
enum np_heartbeat_rate np_heartbeat_rate_type;

/* Nobody reads. What later events are told by is kept up to date all the same. */
static __always_inline bool np_held(void)
{
	return np_heartbeat_value.since;
}

#ifdef NETPROBE_CONFIG_BPF_H
/*
 * NP_PAUSED alone, in one store: others' fields may be changed meanwhile. User space
 * ends this program before it sets that bit itself.
 */
static __always_inline void np_hold(bool held)
{
	volatile __u8 *bytes = (volatile __u8 *)&np_config_value.fields;
	const __u32 at = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? 3 : 0;
	__u8 want = held ? NP_PAUSED >> 24 : 0;

	if (bytes[at] != want && !np_ended())
		bytes[at] = want;
}
#else
static __always_inline void np_hold(bool held)
{
}
#endif

SEC("perf_event")
int heartbeat(void *ctx)
{
	volatile struct np_heartbeat *h = &np_heartbeat_value;
	/* User space may have drained since the clock was asked. */
	__u64 drained = h->drained, now = bpf_ktime_get_ns();
	bool late = (__s64)(now - drained) > (__s64)h->limit;

	h->looked = now;
	if (late && !h->since) {
		h->gaps++;
		h->since = now;
	} else if (!late && h->since) {
		h->gap_ns += now - h->since;
		h->since = 0;
	}
	np_hold(late);
	return 0;
}

#endif
