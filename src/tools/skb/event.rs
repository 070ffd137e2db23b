//! An event of `netprobe skb` as an owned value. Pure.

use std::net::IpAddr;

use plain::Plain;

use crate::bpf::read;
use crate::bpf::skb::types::skb_section;
use crate::event::head::Head;
use crate::event::tuple::Tuple;

use super::drops::Drop;
use super::netfilter::Decision;

pub const SECTION_META: u32 = skb_section::SKB_SECTION_META.0;
pub const SECTION_TUPLE: u32 = skb_section::SKB_SECTION_TUPLE.0;
pub const SECTION_PACKET: u32 = skb_section::SKB_SECTION_PACKET.0;
pub const SECTION_OWNER: u32 = skb_section::SKB_SECTION_OWNER.0;
pub const SECTION_CALLER: u32 = skb_section::SKB_SECTION_CALLER.0;
pub const SECTION_TUNNEL: u32 = skb_section::SKB_SECTION_TUNNEL.0;
pub const SECTION_CB: u32 = skb_section::SKB_SECTION_CB.0;
pub const SECTION_SKB: u32 = skb_section::SKB_SECTION_SKB.0;
pub const SECTION_SHINFO: u32 = skb_section::SKB_SECTION_SHINFO.0;
pub const SECTION_DATA: u32 = skb_section::SKB_SECTION_DATA.0;
pub const SECTION_MEMBERS: u32 = skb_section::SKB_SECTION_MEMBERS.0;
pub const SECTION_NFT: u32 = skb_section::SKB_SECTION_NFT.0;
pub const SECTION_MAP: u32 = skb_section::SKB_SECTION_MAP.0;
pub const SECTION_LIFE: u32 = skb_section::SKB_SECTION_LIFE.0;
pub const SECTION_DROP: u32 = skb_section::SKB_SECTION_DROP.0;
pub const SECTION_STACK: u32 = skb_section::SKB_SECTION_STACK.0;

/// A function was entered with this skb. What few events have stands in boxes, as large events cost time.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Event {
    pub head: Head,
    /// address of the sk_buff
    pub skb: u64,
    /// address of the function, or of the place of the drop
    pub func: u64,
    /// SKB_SECTION_*: what the event carries
    pub sections: u32,
    /// from the tracepoint of drops
    pub dropped: bool,
    /// value of enum skb_drop_reason, where the function says why it frees the skb
    pub reason: Option<u32>,
    /// what the function gives back: it ends, where this is something
    pub retval: Option<i32>,
    /// it is no function but a tc or XDP program: `func` is its id
    pub program: Option<Point>,
    pub meta: Option<Meta>,
    /// outer: the section is there; inner: the packet is IP
    pub tuple: Option<Option<Tuple>>,
    pub packet: Option<Packet>,
    /// outer: the section is there; inner: the packet has a socket
    pub owner: Option<Option<Owner>>,
    /// address of the function's caller
    pub caller: Option<u64>,
    /// outer: the section is there; inner: there is a packet inside
    pub tunnel: Option<Option<Tuple>>,
    pub cb: Option<Box<[u8; 48]>>,
    /// bytes of the struct sk_buff; empty where they could not be read
    pub skb_copy: Option<Vec<u8>>,
    /// the same of the struct skb_shared_info
    pub shared_info: Option<Vec<u8>>,
    pub data: Option<Data>,
    /// bytes as they were read, `None` where they could not be: `members` knows what they are
    pub members: Option<Box<[Option<u64>; 4]>>,
    /// who in netfilter dropped the packet
    pub nft: Option<Box<Decision>>,
    pub map: Option<Box<MapCall>>,
    /// number of the sk_buff's life, from its first event to its free
    pub life: Option<u64>,
    /// with --drops: what is known beyond the kernel's reason
    pub drop: Option<Box<Drop>>,
    /// what decides beside the packet
    pub facts: Option<Box<Facts>>,
    /// type and code of an ICMP error that this kernel sends for the packet
    pub icmp: Option<(u8, u8)>,
    /// a rule of nft has translated the packet: `nft` is the rule
    pub translated: bool,
    /// errno of a route that a process looked for in vain
    pub no_route: Option<i32>,
    /// addresses, innermost first
    pub stack: Option<Vec<u64>>,
    /// 8 bits that are the same of events with the same CPU, meta and tuple, and mostly not of others
    pub like: u64,
    /// sections that only their own columns understand, as they came
    pub(super) kept: Vec<(u32, Box<[u8]>)>,
}

impl Event {
    /// The packet of an event alone: its device and its bytes.
    pub fn of_packet(meta: Option<Meta>, data: Data) -> Self {
        Self {
            meta,
            data: Some(data),
            ..Self::default()
        }
    }

    /// Keeps the first `size` bytes for the section's own column ([`Event::kept`]), and gives what follows them.
    pub fn keep<'b>(&mut self, section: u32, size: usize, bytes: &'b [u8]) -> Option<&'b [u8]> {
        let (own, rest) = bytes.split_at_checked(size)?;
        self.kept.push((section, own.into()));
        Some(rest)
    }

    /// A section that was kept.
    pub fn kept<T: Plain + Default>(&self, section: u32) -> Option<T> {
        let (_, bytes) = self.kept.iter().find(|(s, _)| *s == section)?;
        Some(read(bytes)?.0)
    }

    /// What [`Event::like`] is to be.
    pub(super) fn like(&self) -> u64 {
        let meta = self.meta.as_ref().map_or(0, |m| {
            let device = u64::from(m.netns) << 20 ^ u64::from(m.ifindex) << 16;
            device ^ u64::from(m.len) ^ u64::from(m.protocol) << 40
        });
        let tuple = self.tuple.flatten().map_or(0, |t| {
            u64::from(t.sport) << 32 ^ u64::from(t.dport) << 8 ^ u64::from(t.tcp_flags)
        });
        (meta ^ tuple ^ u64::from(self.head.cpu)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56
    }
}

/// What a BPF program does with a map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapCall {
    pub id: u32,
    /// NUL-padded
    pub name: [u8; 16],
    /// the first 256 bytes; `None` where it could not be read
    pub key: Option<Vec<u8>>,
    /// the same; `None` also where the call has none
    pub value: Option<Vec<u8>>,
    pub key_size: u32,
    pub value_size: u32,
}

/// Where in a program's run an event is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    Enter,
    /// with its verdict
    Leave(i32),
}

/// `struct skb_facts`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    pub socket: Option<Socket>,
    pub route: Option<Route>,
    pub pkt_type: u8,
    pub ip_summed: u8,
    /// its socket is in TIME-WAIT
    pub time_wait: bool,
    /// its device takes frames for others, too
    pub promiscuous: bool,
    /// the frame is for the device's own address or a group's; else another host's; nothing where it was not asked
    pub own_mac: Option<bool>,
    /// its device does not take IPv6
    pub ipv6_off: bool,
    /// its socket has a filter
    pub filter: bool,
}

/// A socket's queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Socket {
    /// bytes in its receive queue and backlog, and their limit
    pub rmem: u32,
    pub rcvbuf: u32,
    /// connections that wait for accept(), and their limit
    pub backlog: u32,
    pub limit: u32,
    /// TCP_* of include/net/tcp_states.h
    pub state: u8,
}

/// A packet's route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    pub ifindex: u32,
    pub mtu: u32,
    /// NUL-padded
    pub ifname: [u8; 16],
    pub gateway: Option<IpAddr>,
    /// errno of a route that refuses
    pub error: i16,
    /// RTN_*; 0 for IPv6
    pub kind: u8,
}

/// The packet's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Data {
    /// length of the packet; `bytes` may be fewer
    pub len: u32,
    /// begins with an Ethernet header, else with that of IP
    pub ethernet: bool,
    /// ARPHRD_* of the device; 0 where it has none
    pub hatype: u16,
    /// the VLAN tag beside the packet: its EtherType; priority, DEI and id
    pub vlan: Option<(u16, u16)>,
    pub bytes: Vec<u8>,
}

/// A packet's identity: the number that the CPU which saw it first gave it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    pub number: u64,
    pub cpu: u16,
}

/// `struct skb_owner`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// address of the socket
    pub sock: u64,
    /// 0 where the kernel has not made one yet
    pub cookie: u64,
    pub cgroup: u64,
    pub inode: u64,
    pub uid: u32,
    /// 0: made before the trace, or by the kernel
    pub pid: u32,
    /// NUL-padded
    pub comm: [u8; 16],
}

/// `struct skb_meta`
#[derive(Debug, Clone, PartialEq)]
pub struct Meta {
    pub netns: u32,
    pub mark: u32,
    pub ifindex: u32,
    pub len: u32,
    pub mtu: u32,
    pub protocol: u16,
    /// of the VLAN tag beside the packet: priority, DEI and id
    pub vlan: Option<u16>,
    /// NUL-padded
    pub ifname: [u8; 16],
}
