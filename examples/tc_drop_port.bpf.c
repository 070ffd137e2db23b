// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A tc program: drops UDP packets over IPv4 to one port, marks all others and
 * leaves them to the next program. To see its verdicts:
 *
 *	clang -O2 -g -target bpf -c examples/tc_drop_port.bpf.c -o tc_drop_port.o
 *	tc qdisc add dev enp0s9 clsact
 *	tc filter add dev enp0s9 egress bpf direct-action obj tc_drop_port.o sec tc
 *	netprobe skb --filter-trace-tc udp
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <linux/udp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

/* UDP's discard service. */
#define DROPPED_PORT 9
#define MARK 0x77

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 64);
	__type(key, __u16); /* UDP port, network byte order */
	__type(value, __u64); /* packets */
} ports SEC(".maps");

static __always_inline void count(__u16 port)
{
	__u64 *packets = bpf_map_lookup_elem(&ports, &port), one = 1;

	if (packets)
		*packets += 1;
	else
		bpf_map_update_elem(&ports, &port, &one, BPF_ANY);
}

SEC("tc")
int tc_drop_port(struct __sk_buff *skb)
{
	struct iphdr ip;
	struct udphdr udp;

	if (skb->protocol != bpf_htons(ETH_P_IP) ||
	    bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)) < 0 ||
	    ip.protocol != IPPROTO_UDP || ip.ihl != 5 ||
	    bpf_skb_load_bytes(skb, ETH_HLEN + sizeof(ip), &udp, sizeof(udp)) <
		    0)
		return TC_ACT_UNSPEC;
	count(udp.dest);
	if (udp.dest == bpf_htons(DROPPED_PORT))
		return TC_ACT_SHOT;
	skb->mark = MARK;
	return TC_ACT_UNSPEC;
}

char _license[] SEC("license") = "Dual BSD/GPL";
