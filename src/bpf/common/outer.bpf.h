/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Headers that XDP sees in front of the packet that a tunnel device has received.
 * Generic XDP begins at the MAC header. For GRE devices without a fixed far end
 * that is the outer IP header (ipgre_header_ops); kernels before 5.14 leave it at
 * the outer IP or even the outer Ethernet header for all tunnels. The device's
 * own addresses identify the outer header: bytes alone could be a tunnel within
 * the tunnel.
 *
 * Needs frame_direct.bpf.h or frame_probe.bpf.h before it.
 */
#ifndef NETPROBE_OUTER_BPF_H
#define NETPROBE_OUTER_BPF_H

#include "common/ethertypes.bpf.h"
#include "common/outer.h"

#define NP_OUTER_ETHERNET 14
#define NP_OUTER_IPV4 20
#define NP_OUTER_IPV6 40
#define NP_OUTER_OPTIONS \
	60 /* IPv6 destination options: the encapsulation limit */
#define NP_OUTER_GRE 47
#define NP_OUTER_MPLS 137
/* More than any outer headers that are skipped here; a mask. */
#define NP_OUTER_MAX 0xff

struct np_frame {
	const __u8 *data;
	const __u8 *end; /* of its first buffer */
	__u32 len; /* with all buffers */
};

static __always_inline bool np_frame_read(const struct np_frame *frame,
					  __u32 at, void *to, __u32 size)
{
	const __u8 *from = frame->data + (at & NP_OUTER_MAX);

	/* The checked pointer and the one that is read have to be the same register. */
	asm volatile("" : "+r"(from));
	if (from + size > frame->end)
		return false;
	return np_frame_load(to, from, size);
}

static __always_inline __u16 np_frame_u16(const __u8 *bytes)
{
	return bytes[0] << 8 | bytes[1];
}

/* Does an IP packet begin here, and end where the frame ends? */
static __always_inline bool np_frame_is_ip(const struct np_frame *frame,
					   __u32 at)
{
	__u8 head[8] = {};

	if (!np_frame_read(frame, at, head, sizeof(head)))
		return false;
	if (head[0] >> 4 == 4)
		return at + np_frame_u16(&head[2]) == frame->len;
	return head[0] >> 4 == 6 &&
	       at + NP_OUTER_IPV6 + np_frame_u16(&head[4]) == frame->len;
}

/* Bytes of an Ethernet header before the IP packet; 0: there is none. */
static __always_inline __u32 np_outer_link(const struct np_frame *frame)
{
	__u8 type[2] = {};
	__u16 ethertype;

	if (np_frame_is_ip(frame, 0) || !np_frame_read(frame, 12, type, 2))
		return 0;
	ethertype = np_frame_u16(type);
	if (ethertype != NP_TYPE_IPV4 && ethertype != NP_TYPE_IPV6)
		return 0;
	return np_frame_is_ip(frame, NP_OUTER_ETHERNET) ? NP_OUTER_ETHERNET : 0;
}

/* Is this address of a header the device's? */
static __always_inline bool np_end_is(const __u8 *theirs,
				      const volatile __u8 *ours, __u32 size)
{
	for (__u32 i = 0; i < size; i++)
		if (theirs[i] != ours[i])
			return false;
	return true;
}

static __always_inline bool np_end_is_any(const volatile __u8 *address,
					  __u32 size)
{
	for (__u32 i = 0; i < size; i++)
		if (address[i])
			return false;
	return true;
}

/* From the device's far end to its near one. `first`: the header begins the frame. */
static __always_inline bool np_ends_fit(const volatile struct np_tunnel *tunnel,
					const __u8 *src, const __u8 *dst,
					__u32 size, bool gre, bool first)
{
	bool group = size == 4 ? tunnel->remote[0] >> 4 == 0xe
			       : tunnel->remote[0] == 0xff;
	bool open = group || np_end_is_any(tunnel->remote, size);

	if (group)
		return np_end_is(dst, tunnel->remote, size);
	if (!np_end_is_any(tunnel->local, size) &&
	    !np_end_is(dst, tunnel->local, size))
		return false;
	if (!open)
		return np_end_is(src, tunnel->remote, size);
	/* Without a far end GRE always shows its outer header. For others a link header proves it. */
	return gre || !first;
}

static __always_inline bool np_is_gre(const volatile struct np_tunnel *tunnel)
{
	return tunnel->type == NP_ARPHRD_IPGRE ||
	       tunnel->type == NP_ARPHRD_IP6GRE;
}

static __always_inline bool np_carries(const volatile struct np_tunnel *tunnel,
				       __u8 protocol)
{
	if (np_is_gre(tunnel))
		return protocol == NP_OUTER_GRE;
	return protocol == 4 || protocol == 41 || protocol == NP_OUTER_MPLS;
}

/* Where the tunnel's IPv4 header at `at` ends; `at`: there is none. */
static __always_inline __u32
np_behind_ipv4(const struct np_frame *frame,
	       const volatile struct np_tunnel *tunnel, __u32 at)
{
	__u8 ip[NP_OUTER_IPV4] = {};

	if (!np_frame_read(frame, at, ip, sizeof(ip)) || ip[0] >> 4 != 4 ||
	    !np_carries(tunnel, ip[9]) ||
	    !np_ends_fit(tunnel, &ip[12], &ip[16], 4, np_is_gre(tunnel), !at))
		return at;
	return at + (ip[0] & 0xf) * 4;
}

static __always_inline __u32
np_behind_ipv6(const struct np_frame *frame,
	       const volatile struct np_tunnel *tunnel, __u32 at)
{
	__u8 ip[NP_OUTER_IPV6] = {}, option[2] = {};
	__u32 end = at + NP_OUTER_IPV6;
	__u8 protocol;

	if (!np_frame_read(frame, at, ip, sizeof(ip)) || ip[0] >> 4 != 6)
		return at;
	protocol = ip[6];
	if (protocol == NP_OUTER_OPTIONS) {
		if (!np_frame_read(frame, end, option, sizeof(option)) ||
		    option[1] > 7)
			return at;
		protocol = option[0];
		end += (option[1] + 1) * 8;
	}
	if (!np_carries(tunnel, protocol) ||
	    !np_ends_fit(tunnel, &ip[8], &ip[24], 16, np_is_gre(tunnel), !at))
		return at;
	return end;
}

/* Bytes of the GRE header; 0: none that is known. */
static __always_inline __u32 np_gre_len(const struct np_frame *frame, __u32 at)
{
	__u8 gre[4] = {};

	if (!np_frame_read(frame, at, gre, sizeof(gre)) || (gre[1] & 7))
		return 0;
	return 4 + (gre[0] & 0x80 ? 4 : 0) + (gre[0] & 0x20 ? 4 : 0) +
	       (gre[0] & 0x10 ? 4 : 0);
}

/*
 * Bytes before the packet that the device has received, the link header's among
 * them in `link`; only for devices whose packets begin with IP.
 */
static __always_inline __u32
np_outer_len(const struct np_frame *frame,
	     const volatile struct np_tunnel *tunnel, __u32 *link)
{
	__u32 type = tunnel->type, end, at, gre;

	at = np_outer_link(frame);
	*link = at;
	if (type == NP_ARPHRD_IPGRE || type == NP_ARPHRD_TUNNEL ||
	    type == NP_ARPHRD_SIT)
		end = np_behind_ipv4(frame, tunnel, at);
	else if (type == NP_ARPHRD_IP6GRE || type == NP_ARPHRD_TUNNEL6)
		end = np_behind_ipv6(frame, tunnel, at);
	else
		return at;
	if (end != at && np_is_gre(tunnel)) {
		gre = np_gre_len(frame, end);
		end = gre ? end + gre : at;
	}
	return end < frame->len && end <= NP_OUTER_MAX ? end : 0;
}

#endif
