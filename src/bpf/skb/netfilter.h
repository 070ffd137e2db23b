/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Who decided about a packet in netfilter, as events carry it. */
#ifndef NETPROBE_NETFILTER_H
#define NETPROBE_NETFILTER_H

enum nf_decided {
	NF_DECIDED_RULE = 1, /* an nft rule: table, chain, handle, verdict */
	NF_DECIDED_POLICY = 2, /* the policy of an nft base chain */
	NF_DECIDED_NFT = 3, /* nft; of which rule or policy is not known */
	NF_DECIDED_HOOK = 4, /* `hook`, or what follows it; not an nft chain */
	NF_DECIDED_PASSED =
		5, /* what follows `hook`, whose nft chain accepted */
	/*
	 * netprobe why: a whole run let the packet pass; the last nft chain in it, if
	 * there was one. `hook` and `following` are then the first 8 bytes of the names
	 * of tables of the older iptables that it went through; 0: none.
	 */
	NF_DECIDED_ACCEPTED = 6,
};

#define NF_NAME_LEN 64 /* longer names are cut off */

struct nf_decision {
	__u64 handle; /* of the rule; 0: not known */
	__u64 hook; /* the function of the hook entered last; 0: none */
	__u64 following[2]; /* the functions behind it in the list; 0: none */
	__u8 known; /* NF_DECIDED_*; 0: nothing is */
	__u8 family; /* NFPROTO_* */
	__u8 at; /* NF_INET_*, NF_NETDEV_* or NF_BR_*, by family */
	__u8 verdict; /* NF_DROP .. NF_STOP */
	__u32 run; /* tells one run of a hook from the next, if nf_accepts is set */
	__u8 table
		[NF_NAME_LEN]; /* NUL-padded; of nft, or of the older iptables */
	__u8 chain[NF_NAME_LEN]; /* of the rule or the policy */
};

_Static_assert(sizeof(struct nf_decision) == 168,
	       "nf_decision is part of the contract");

#endif
