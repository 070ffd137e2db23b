/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * XDP programs that work together on one interface, for netprobe and for you.
 *
 * netprobe's own program runs first and tail calls the programs in the slots
 * of a program array, lowest slot first. A program that includes this header
 * hands a packet on to the next slot by
 *
 *	return np_chain_next(ctx);
 *
 * or ends the chain by
 *
 *	return np_chain_end(XDP_DROP);
 *
 * so that `netprobe xdpchain list` shows its verdicts too. A program that knows
 * nothing of this ends the chain with whatever it returns: put it into the
 * last used slot. Include vmlinux.h or linux/bpf.h, and bpf_helpers.h, first;
 * compile with `clang -O2 -g -target bpf -c`, put in with
 *
 *	netprobe xdpchain add IFACE FILE.o --slot N
 *
 * The maps are those that netprobe pinned for the interface, in
 * /sys/fs/bpf/netprobe/xdp/IFACE/; np_chain_slot is set when the program is put in.
 * A program that you put into next_prog_map by other means runs too: in front of
 * a capture, which passes over slots known to be empty, after some 0.05 s.
 */
#ifndef NETPROBE_CHAIN_H
#define NETPROBE_CHAIN_H

/* Slots 0 to 6 are for programs of yours, 7 holds the program that was there before. */
enum np_chain_limit {
	NP_CHAIN_SLOTS = 8,
	NP_CHAIN_LAST = NP_CHAIN_SLOTS - 1,
	/* Verdicts that are counted: XDP_ABORTED to XDP_REDIRECT, and any other. */
	NP_CHAIN_VERDICTS = 6,
};

struct np_chain_slot {
	__u64 runs;
	__u64 verdicts[NP_CHAIN_VERDICTS]; /* of programs that tell them */
};

struct np_chain_stats {
	struct np_chain_slot slot[NP_CHAIN_SLOTS];
	__u64 zero; /* always */
};

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, NP_CHAIN_SLOTS);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
} next_prog_map SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct np_chain_stats);
} chain_stats SEC(".maps");

/* The slot of this program; NP_CHAIN_SLOTS in the program that comes before all slots. */
const volatile __u32 np_chain_slot SEC(".rodata.netprobe") = NP_CHAIN_SLOTS;

static __always_inline struct np_chain_stats *np_chain_counters(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&chain_stats, &zero);
}

/* Ends the chain here: counts the verdict and gives it back to be returned. */
static __always_inline int np_chain_end(int verdict)
{
	struct np_chain_stats *stats = np_chain_counters();
	__u32 slot = np_chain_slot;
	__u32 kind = verdict;

	if (kind >= NP_CHAIN_VERDICTS)
		kind = NP_CHAIN_VERDICTS - 1;
	if (stats && slot < NP_CHAIN_SLOTS)
		stats->slot[slot].verdicts[kind]++;
	return verdict;
}

/*
 * Hands the packet to the first occupied slot after this program's; XDP_PASS
 * when there is none. An empty slot costs some 2 ns. Adding a zero that the
 * verifier does not know hides the slot's number from it: else the kernel would
 * patch this code each time that a program is put in or taken out.
 */
static __always_inline int np_chain_next(struct xdp_md *ctx)
{
	struct np_chain_stats *stats = np_chain_counters();
	/* The program before all slots goes on with slot 0. */
	__u32 slot = np_chain_slot < NP_CHAIN_SLOTS ? np_chain_slot + 1 : 0;

	/* Never: an array has its first entry. The verifier asks. */
	if (!stats)
		return XDP_ABORTED;
#pragma clang loop unroll(disable)
	for (; slot < NP_CHAIN_SLOTS; slot++) {
		stats->slot[slot].runs++;
		bpf_tail_call(ctx, &next_prog_map, slot + (__u32)stats->zero);
		/* Still here: the slot is empty. */
		stats->slot[slot].runs--;
	}
	return np_chain_end(XDP_PASS);
}

#endif
