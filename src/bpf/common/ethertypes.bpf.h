/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* EtherTypes, in host byte order (include/uapi/linux/if_ether.h, ETH_P_IP and ETH_P_IPV6). */
#ifndef NETPROBE_ETHERTYPES_BPF_H
#define NETPROBE_ETHERTYPES_BPF_H

#define NP_TYPE_IPV4 0x0800
#define NP_TYPE_IPV6 0x86dd

#endif
