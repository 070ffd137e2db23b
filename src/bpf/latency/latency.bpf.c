// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * netprobe latency: how long packets take from place to place in the kernel. Counted in
 * the kernel; only slow packets (min_ns) leave it as events.
 *
 * A packet is known by the address of its sk_buff from the first place that sees it. GRO
 * merges frames into the first one: the packet is that frame. A clone (a bridge floods,
 * a packet socket) begins at the first place that sees it.
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "common/cast.bpf.h"
#include "common/compat.bpf.h"
#include "common/entry.bpf.h"
#include "common/event.h"
#include "common/config.bpf.h"
#include "common/heartbeat.bpf.h"
#include "common/stats.bpf.h"
#include "common/packet.h"
#include "common/output_ring.bpf.h"
#include "common/packet.bpf.h"
#include "common/fields.bpf.h"
#include "filter/filter.bpf.h"
#include "latency/latency.h"
#include "icmp/icmp.h"
#include "icmp/icmp_softirq.bpf.h"
#include "latency/latency_packet.bpf.h"
#include "latency/latency_culprit.bpf.h"
#include "latency/latency_out.bpf.h"
#include "latency/latency_in.bpf.h"
#include "latency/latency_requests.bpf.h"
#include "latency/latency_between.bpf.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";
