/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The packet filter's place in a BPF program: stubs whose bodies user space
 * replaces by a translated expression before the object is loaded
 * (src/filter/inject.rs), and what calls them. Needs vmlinux.h, bpf_helpers.h
 * and bpf_core_read.h before it.
 *
 * In a program that has an sk_buff:
 *
 *	#include "common/compat.bpf.h"
 *	#include "filter/filter.bpf.h"
 *
 *	if (!np_filter_skb(pointer))		reads the fields it needs
 *		return 0;
 * or, where these fields were read already:
 *	struct np_filter_fields f = { .skb = ..., .head = ..., ... };
 *	if (!np_filter_fields(&f))
 *		return 0;
 *
 * Both are true at once where no filter is set (np_filter_on is constant: the
 * rest is taken out). In an XDP program, with filter_xdp.bpf.h:
 *
 *	if (np_filter_on && !np_filter_xdp(ctx))
 *		return XDP_PASS;
 *
 * In Rust:
 *
 *	let filters = Filters { expression: Some(Compiled::new(text)?), ..Default::default() };
 *	rodata.np_filter_on = filters.on(features.skb_fields);
 *	(and the addresses of kernel::pages::Pages, where on() is not 0)
 *	... everything else that is to be configured ...
 *	filters.prepare(open.open_object_mut(), &features)?;
 *	let skel = open.load()?;
 *
 * and for XDP `filter::inject_xdp(open.open_object_mut(), &program, frags)`.
 */
#ifndef NETPROBE_FILTER_BPF_H
#define NETPROBE_FILTER_BPF_H

#include "filter/filter.h"
#include "common/headers.bpf.h"

const volatile __u32 np_filter_on = 0;
/*
 * Where struct page of the first page is, and that page's memory: they lead from
 * a page to its bytes. Either the addresses of the kernel's variables (x86), or
 * the numbers themselves (arm64). All 0: bytes in page fragments cannot be read,
 * and a filter that asks for them does not match.
 */
const volatile __u64 np_filter_vmemmap_base = 0;
const volatile __u64 np_filter_page_offset_base = 0;
const volatile __u64 np_filter_vmemmap = 0;
const volatile __u64 np_filter_page_offset = 0;
/* log2 of a page's bytes */
const volatile __u32 np_filter_page_shift = 12;

/* Bytes of header that are copied once, for all loads. */
enum np_filter_block {
	NP_FILTER_BLOCK = 96,
};
/* Bytes of the sk_buff that are copied at once, from data_len on; its head is among them. */
#define NP_FILTER_FIELDS 104
/* CONFIG_MAX_SKB_FRAGS is 17, and may be raised to 45. */
#define NP_FILTER_FRAGS 45
#define NP_FILTER_NONE 0xffffffffU

/* What a filter needs to know of an sk_buff. */
struct np_filter_fields {
	__u64 skb;
	__u64 head;
	__u32 tail; /* an offset from head, as sk_buff has it on 64 bits */
	__u32 data_len;
	__u8 no_link; /* the packet begins with its IP header */
	__u8 pad[7];
};

/* The packet being filtered on this CPU. */
struct np_filter_packet {
	__u64 skb;
	__u64 data; /* address of its first byte, the link header or the IP header */
	__u64 linear; /* bytes there; the rest is in page fragments */
	__u64 len;
	__u64 base; /* where the filter begins: not 0 inside a tunnel */
	__u32 inner_l2; /* offsets of a tunnelled packet, or NP_FILTER_NONE */
	__u32 inner_l3;
	__u8 block[NP_FILTER_BLOCK];
	/* The tag beside the packet, in network byte order, where filter::ebpf looks for it: just behind the block. */
	__be16 tci;
	__u8 pad[6];
	__u8 fields[NP_FILTER_FIELDS];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct np_filter_packet);
} np_filter_packets SEC(".maps");

static __always_inline struct np_filter_packet *np_filter_packet_get(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&np_filter_packets, &zero);
}

/* The kernel's struct skb_frag (bio_vec before 6.10: the same layout). */
struct np_filter_frag {
	__u64 page;
	__u32 len;
	__u32 offset;
};

/* Address of a fragment's first byte, or 0. */
static __always_inline __u64
np_filter_frag_address(const struct np_filter_frag *frag)
{
	__u64 vmemmap = np_filter_vmemmap, direct = np_filter_page_offset,
	      page_size = bpf_core_type_size(struct page);

	/* The lowest bit: memory of a device (net_iov), not a page. */
	if (!page_size || (frag->page & 1))
		return 0;
	if (np_filter_vmemmap_base) {
		bpf_probe_read_kernel(&vmemmap, sizeof(vmemmap),
				      (void *)np_filter_vmemmap_base);
		bpf_probe_read_kernel(&direct, sizeof(direct),
				      (void *)np_filter_page_offset_base);
	}
	if (!vmemmap || !direct || frag->page < vmemmap)
		return 0;
	return direct +
	       (((frag->page - vmemmap) / page_size) << np_filter_page_shift) +
	       frag->offset;
}

/*
 * One byte of this CPU's packet, in the linear part or in a page fragment; less
 * than 0 where there is none. A global function: the verifier reads it once.
 */
__noinline __s64 np_filter_load_byte(__u64 at)
{
	struct np_filter_packet *packet = np_filter_packet_get();
	struct skb_shared_info *shared;
	struct sk_buff *skb;
	__u64 address;
	__u8 byte, count;

	if (!packet || at >= packet->len)
		return -1;
	if (at < packet->linear) {
		if (bpf_probe_read_kernel(&byte, 1, (void *)packet->data + at))
			return -1;
		return byte;
	}
	at -= packet->linear;
	skb = (struct sk_buff *)packet->skb;
	shared = (void *)BPF_CORE_READ(skb, head) + BPF_CORE_READ(skb, end);
	count = BPF_CORE_READ(shared, nr_frags);
	for (int i = 0; i < NP_FILTER_FRAGS; i++) {
		struct np_filter_frag frag;

		if (i >= count ||
		    bpf_probe_read_kernel(
			    &frag, sizeof(frag),
			    (void *)shared +
				    bpf_core_field_offset(
					    struct skb_shared_info, frags) +
				    i * sizeof(frag)))
			return -1;
		if (at >= frag.len) {
			at -= frag.len;
			continue;
		}
		address = np_filter_frag_address(&frag);
		if (!address ||
		    bpf_probe_read_kernel(&byte, 1, (void *)address + at))
			return -1;
		return byte;
	}
	return -1;
}

/* A field's place in the copy of the sk_buff's fields. */
#define NP_FILTER_AT(field)                             \
	(bpf_core_field_offset(struct sk_buff, field) - \
	 bpf_core_field_offset(struct sk_buff, data_len))

/* Finds the packet's first byte; true where that is a link header. */
static __always_inline bool np_filter_locate(struct np_filter_packet *packet,
					     const void *address)
{
	const struct sk_buff *skb = address;
	__u64 start, tail, head, data_len;
	__u16 mac, network;
	bool l2;

	packet->skb = (__u64)address;
	packet->base = 0;
	/* One copy of all fields, where they lie together as they always did. */
	if (NP_FILTER_AT(head) + sizeof(head) <= NP_FILTER_FIELDS) {
		const __u8 *fields = packet->fields;

		if (bpf_probe_read_kernel(packet->fields,
					  sizeof(packet->fields),
					  &skb->data_len))
			__builtin_memset(packet->fields, 0,
					 sizeof(packet->fields));
		mac = *(__u16 *)(fields + NP_FILTER_AT(mac_header));
		network = *(__u16 *)(fields + NP_FILTER_AT(network_header));
		tail = *(__u32 *)(fields + NP_FILTER_AT(tail));
		head = *(__u64 *)(fields + NP_FILTER_AT(head));
		data_len = *(__u32 *)fields;
	} else {
		mac = BPF_CORE_READ(skb, mac_header);
		network = BPF_CORE_READ(skb, network_header);
		tail = BPF_CORE_READ(skb, tail);
		head = (__u64)BPF_CORE_READ(skb, head);
		data_len = BPF_CORE_READ(skb, data_len);
	}
	l2 = np_is_ethernet(mac, network);
	start = l2 ? mac : network;
	packet->data = head + start;
	packet->linear = tail > start ? tail - start : 0;
	packet->len = packet->linear + data_len;
	return l2;
}

/*
 * 1, 2 or 4 bytes of this CPU's packet wherever they are: their value in host
 * order, or less than 0. Called by the filter where its own loads do not reach.
 * `skb`: the packet is this one's; 0: it is known.
 */
__noinline __s64 np_filter_load(__u64 off, __u64 size, __u64 skb)
{
	struct np_filter_packet *packet = np_filter_packet_get();
	__s64 value = 0, byte;
	__u8 bytes[4];
	__u64 at;

	if (!packet || off > 0xffffffff)
		return -1;
	if (skb)
		np_filter_locate(packet, (const void *)skb);
	at = packet->base + off;
	if (at + 4 <= packet->linear) {
		if (bpf_probe_read_kernel(bytes, sizeof(bytes),
					  (void *)packet->data + at))
			return -1;
		value = (__u32)bytes[0] << 24 | (__u32)bytes[1] << 16 |
			bytes[2] << 8 | bytes[3];
		return size == 4   ? value
		       : size == 2 ? value >> 16
				   : value >> 24;
	}
	for (int i = 0; i < 4; i++) {
		if (i >= size)
			break;
		byte = np_filter_load_byte(at + i);
		if (byte < 0)
			return -1;
		value = value << 8 | byte;
	}
	return value;
}

/*
 * The stubs. Each body is replaced by the filter; the assembler keeps clang
 * from dropping arguments or folding the result, the call makes libbpf append
 * np_filter_load() to the program. "Hidden" makes a function static to the
 * verifier, so that the block's pointer may be passed.
 */
#define NP_FILTER_STUB(name, n)                                         \
	__hidden __noinline __u64 name(const __u8 *block, __u64 linear, \
				       __u64 source, __u64 len)         \
	{                                                               \
		__u64 matches;                                          \
                                                                        \
		asm volatile("%0 = " #n                                 \
			     : "=r"(matches)                            \
			     : "r"(block), "r"(linear), "r"(source),    \
			       "r"(len));                               \
		return matches | np_filter_load(0, 1, 0);               \
	}

NP_FILTER_STUB(np_filter_l2, 1)
NP_FILTER_STUB(np_filter_l3, 2)
NP_FILTER_STUB(np_filter_tagged, 8)
NP_FILTER_STUB(np_filter_tunnel_l2, 3)
NP_FILTER_STUB(np_filter_tunnel_l3, 4)

/*
 * The expression for the sk_buff at this address by typed loads, with its own
 * loads of the sk_buff's fields (src/filter/ebpf/by_cast.rs): this is what a
 * packet that does not match costs. Headers are read through a struct that
 * every kernel has and that is an array of bytes from its third byte on, so that
 * a load of any width goes anywhere in it. The cast shows the filter how one is
 * called.
 */
__hidden __noinline __u64 np_filter_by_cast(const void *address)
{
	__u64 matches;
	void *typed;

	asm volatile("%0 = 6" : "=r"(matches) : "r"(address));
	typed = NP_TYPED(__kernel_sockaddr_storage, address);
	return matches | (typed != NULL) | np_filter_load(0, 1, 0);
}

/* What np_filter_by_copy() gives back; np_filter_by_cast() too, but for UNSURE, and any other number for YES. */
enum np_filter_answer {
	NP_FILTER_NO = 0,
	NP_FILTER_YES = 1,
	NP_FILTER_UNSURE = 2,
	NP_FILTER_YES_BARE = 3, /* if what has no link header is an IP packet */
};

/*
 * The expression for the sk_buff at this address by two short reads, where there
 * are no typed loads (src/filter/ebpf/by_copy.rs): this is what a packet that does
 * not match costs there.
 */
__hidden __noinline __u64 np_filter_by_copy(const void *address)
{
	__u64 matches;

	asm volatile("%0 = 7" : "=r"(matches) : "r"(address));
	return matches;
}

/* Comparisons of the sk_buff's members (--filter-skb-expr). */
__hidden __noinline __u64 np_filter_members(__u64 skb)
{
	__u64 matches;

	asm volatile("%0 = 5" : "=r"(matches) : "r"(skb));
	return matches;
}

#define NP_FILTER_UDP 17
#define NP_FILTER_GRE 47
#define NP_FILTER_IPIP 4
#define NP_FILTER_IPV6 41
#define NP_FILTER_PORT_VXLAN 4789
#define NP_FILTER_PORT_VXLAN_OLD 8472 /* the default of ip-link(8) */
#define NP_FILTER_PORT_GENEVE 6081
#define NP_FILTER_ETHERNET_BRIDGED 0x6558

static __always_inline bool np_filter_is_vlan(__s64 ethertype)
{
	return ethertype == 0x8100 || ethertype == 0x88a8;
}

/* Where the IP header behind an Ethernet header is (up to two VLAN tags), or NP_FILTER_NONE. */
static __always_inline __u32 np_filter_skip_ethernet(__u32 at)
{
	__s64 ethertype;
	int tags;

	at += 12;
	for (tags = 0; tags < 3; tags++) {
		ethertype = np_filter_load(at, 2, 0);
		if (!np_filter_is_vlan(ethertype))
			break;
		at += 4;
	}
	return ethertype == 0x0800 || ethertype == 0x86dd ? at + 2
							  : NP_FILTER_NONE;
}

/* Behind the IP header at `at`: the protocol, `at` moved on; less than 0 where there is none to read. */
static __always_inline __s64 np_filter_skip_ip(__u32 *at)
{
	__s64 first = np_filter_load(*at, 1, 0), protocol, length;
	int headers;

	if (first < 0)
		return -1;
	if (first >> 4 == 4) {
		/* Only the first fragment has what follows. */
		if (np_filter_load(*at + 6, 2, 0) & 0x1fff)
			return -1;
		protocol = np_filter_load(*at + 9, 1, 0);
		*at += (first & 0xf) * 4;
		return protocol;
	}
	if (first >> 4 != 6)
		return -1;
	protocol = np_filter_load(*at + 6, 1, 0);
	*at += 40;
	for (headers = 0; headers < 4; headers++) {
		/* Hop-by-hop, routing, destination options. */
		if (protocol != 0 && protocol != 43 && protocol != 60)
			break;
		protocol = np_filter_load(*at, 1, 0);
		length = np_filter_load(*at + 1, 1, 0);
		if (length < 0)
			return -1;
		*at += (length + 1) * 8;
	}
	return protocol;
}

/*
 * Looks for a tunnelled packet behind the IP header at `l3`, and sets
 * inner_l2 and inner_l3. A global function, see np_filter_load().
 */
__noinline int np_filter_find_inner(__u32 l3)
{
	struct np_filter_packet *packet = np_filter_packet_get();
	__u32 at = l3, l2 = NP_FILTER_NONE;
	__s64 protocol, port, type = -1, flags;

	if (!packet)
		return 0;
	packet->inner_l2 = NP_FILTER_NONE;
	packet->inner_l3 = NP_FILTER_NONE;
	protocol = np_filter_skip_ip(&at);
	if (protocol == NP_FILTER_UDP) {
		port = np_filter_load(at + 2, 2, 0);
		at += 8;
		flags = np_filter_load(at, 1, 0);
		if (flags < 0)
			return 0;
		if (port == NP_FILTER_PORT_VXLAN ||
		    port == NP_FILTER_PORT_VXLAN_OLD) {
			/* The bit that says that the network's number is valid. */
			if (!(flags & 0x08))
				return 0;
			type = NP_FILTER_ETHERNET_BRIDGED;
			at += 8;
		} else if (port == NP_FILTER_PORT_GENEVE) {
			type = np_filter_load(at + 2, 2, 0);
			at += 8 + (flags & 0x3f) * 4;
		} else {
			return 0;
		}
	} else if (protocol == NP_FILTER_GRE) {
		flags = np_filter_load(at, 2, 0);
		type = np_filter_load(at + 2, 2, 0);
		/* Version 0 only; checksum, key and sequence number. */
		if (flags < 0 || (flags & 7))
			return 0;
		at += 4 + (flags & 0x8000 ? 4 : 0) + (flags & 0x2000 ? 4 : 0) +
		      (flags & 0x1000 ? 4 : 0);
	} else if (protocol == NP_FILTER_IPIP || protocol == NP_FILTER_IPV6) {
		type = 0x0800;
	}
	if (type == NP_FILTER_ETHERNET_BRIDGED) {
		l2 = at;
		packet->inner_l2 = l2;
		packet->inner_l3 = np_filter_skip_ethernet(at);
	} else if (type == 0x0800 || type == 0x86dd) {
		packet->inner_l3 = at;
	}
	return 0;
}

/* Copies the packet's first bytes from `base` on; how many bytes are there in one piece. */
static __always_inline __u64 np_filter_begin(struct np_filter_packet *packet,
					     __u32 base)
{
	packet->base = base;
	if (base >= packet->linear)
		return 0;
	/*
	 * A fixed length, for speed: behind the linear part always lies a
	 * skb_shared_info, so that no more than the packet's own memory is read.
	 */
	if (bpf_probe_read_kernel(packet->block, sizeof(packet->block),
				  (void *)packet->data + base))
		return 0;
	return packet->linear - base;
}

/*
 * Is what the filter saw from the network header on an IP packet? Asked for those
 * that match alone.
 */
static __noinline __u64 np_filter_is_ip(const void *address)
{
	struct sk_buff *skb = NP_CAST(sk_buff, address);
	__u64 l3 = np_l3_sound(skb);
	__u16 offset = NP_READ(skb, network_header);

	return l3 && l3 == (__u64)NP_READ(skb, head) + offset;
}

/* What begins with an Ethernet header. `tagged`: a tag is beside it. */
static __always_inline bool np_filter_ethernet(struct np_filter_packet *packet,
					       __u64 linear, bool tagged)
{
	if (tagged)
		return np_filter_tagged(packet->block, linear, 0, packet->len);
	return np_filter_l2(packet->block, linear, 0, packet->len);
}

/*
 * The filters that read the packet, but `skip`. `l2`: it begins with a link
 * header; `tagged`: a tag is beside it.
 */
static __always_inline bool np_filter_packet(struct np_filter_packet *packet,
					     bool l2, bool tagged, __u32 skip)
{
	__u32 on = np_filter_on & ~skip, inner;
	__u64 linear;

	if (on & NP_FILTER_EXPRESSION) {
		linear = np_filter_begin(packet, 0);
		if (l2 ? !np_filter_ethernet(packet, linear, tagged)
		       : !np_filter_l3(packet->block, linear, 0, packet->len))
			return false;
	}
	if (!(on & (NP_FILTER_TUNNEL_L2 | NP_FILTER_TUNNEL_L3)))
		return true;

	/* What is not tunnelled passes. */
	inner = l2 ? np_filter_skip_ethernet(0) : 0;
	if (inner == NP_FILTER_NONE)
		return true;
	np_filter_find_inner(inner);
	inner = packet->inner_l2;
	if ((on & NP_FILTER_TUNNEL_L2) && inner != NP_FILTER_NONE &&
	    inner < packet->len) {
		linear = np_filter_begin(packet, inner);
		if (!np_filter_tunnel_l2(packet->block, linear, 0,
					 packet->len - inner))
			return false;
	}
	inner = packet->inner_l3;
	if ((on & NP_FILTER_TUNNEL_L3) && inner != NP_FILTER_NONE &&
	    inner < packet->len) {
		linear = np_filter_begin(packet, inner);
		if (!np_filter_tunnel_l3(packet->block, linear, 0,
					 packet->len - inner))
			return false;
	}
	return true;
}

/* For a program that knows the fields already: block loads only. */
static __always_inline bool
np_filter_fields(const struct np_filter_fields *fields)
{
	struct np_filter_packet *packet;

	if (!np_filter_on)
		return true;
	if ((np_filter_on & NP_FILTER_MEMBERS) &&
	    !np_filter_members(fields->skb))
		return false;
	if (!(np_filter_on & NP_FILTER_READS))
		return true;
	packet = np_filter_packet_get();
	if (!packet)
		return false;
	packet->skb = fields->skb;
	packet->data = fields->head;
	packet->linear = fields->tail;
	packet->len = packet->linear + fields->data_len;
	return np_filter_packet(packet, !fields->no_link, false, 0);
}

/* The expression by typed loads. */
static __always_inline bool np_filter_typed(const void *address)
{
	__u64 matches = np_filter_by_cast(address);

	return matches == NP_FILTER_YES_BARE ? np_filter_is_ip(address)
					     : matches != NP_FILTER_NO;
}

/* Every filter that is set, in any case. */
static __noinline __u64 np_filter_any(const void *address)
{
	struct np_filter_packet *packet;
	bool l2, tagged = false, typed = np_filter_on & NP_FILTER_BY_CAST;
	struct np_tag tag;

	if ((np_filter_on & NP_FILTER_MEMBERS) &&
	    !np_filter_members((__u64)address))
		return 0;
	if (!(np_filter_on & NP_FILTER_READS))
		return 1;
	packet = np_filter_packet_get();
	if (!packet)
		return 0;
	l2 = np_filter_locate(packet, address);
	if (typed && !np_filter_typed(address))
		return 0;
	if (np_filter_on & NP_FILTER_VLAN) {
		tag = np_read_tag(NP_CAST(sk_buff, address), use_cast);
		tagged = tag.proto != 0;
		packet->tci = bpf_htons(tag.tci);
	}
	return np_filter_packet(packet, l2, tagged,
				typed ? NP_FILTER_EXPRESSION : 0) &&
	       (typed || l2 || !(np_filter_on & NP_FILTER_EXPRESSION) ||
		np_filter_is_ip(address));
}

/* Does the sk_buff at this address (a plain one, not made by NP_CAST) pass every filter that is set? */
static __always_inline bool np_filter_skb(const void *address)
{
	__u32 on = np_filter_on;
	__u64 known;

	if (on == (NP_FILTER_EXPRESSION | NP_FILTER_BY_CAST))
		return np_filter_typed(address);
	if (on == (NP_FILTER_EXPRESSION | NP_FILTER_BY_COPY)) {
		known = np_filter_by_copy(address);
		if (known == NP_FILTER_YES_BARE)
			return np_filter_is_ip(address);
		return known == NP_FILTER_UNSURE ? np_filter_any(address)
						 : known;
	}
	if (!on || ((on & NP_FILTER_BY_COPY) && !np_filter_by_copy(address)))
		return !on;
	return np_filter_any(address);
}

#endif
