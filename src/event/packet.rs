//! What lies behind a link header: IP, ARP and the protocols above, decoded.
//!
//! Pure, and total: a frame may be cut anywhere and hold anything. Every byte that is printed is a number or our own word.

use std::fmt::{self, Display, Formatter};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const ARP: u16 = 0x0806;
pub(super) const IPV4: u16 = 0x0800;
pub(super) const IPV6: u16 = 0x86dd;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Net {
    Ip(Ip),
    Arp(Arp),
    /// Anything else: bytes behind the link header.
    Other {
        len: usize,
    },
    /// The header is cut, or is none.
    Cut(&'static str),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arp {
    pub operation: u16,
    pub sender: Ipv4Addr,
    pub sender_mac: [u8; 6],
    pub target: Ipv4Addr,
    pub len: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ip {
    pub src: IpAddr,
    pub dst: IpAddr,
    pub protocol: u8,
    pub ttl: u8,
    /// Type of service or traffic class.
    pub tos: u8,
    /// IPv4 identification or IPv6 flow label.
    pub id: u32,
    pub dont_fragment: bool,
    pub more_fragments: bool,
    /// In bytes; not 0 in every fragment but the first.
    pub offset: u32,
    /// As the header tells it, header included.
    pub len: usize,
    pub transport: Transport,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transport {
    Tcp(Tcp),
    /// `len` is the payload's.
    Udp {
        sport: u16,
        dport: u16,
        len: usize,
    },
    /// ICMP or ICMPv6; `id` and `sequence` of echo messages.
    Icmp {
        kind: u8,
        code: u8,
        id: u16,
        sequence: u16,
        len: usize,
    },
    Sctp {
        sport: u16,
        dport: u16,
        len: usize,
    },
    /// A later fragment, or a protocol that is only named.
    Other {
        len: usize,
    },
    Cut,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tcp {
    pub sport: u16,
    pub dport: u16,
    pub sequence: u32,
    pub ack: u32,
    pub flags: u8,
    pub window: u16,
    /// Payload bytes.
    pub len: usize,
}

impl Net {
    /// What lies behind a link header that says this EtherType.
    pub(super) fn decode(ethertype: u16, rest: &[u8]) -> Self {
        match ethertype {
            IPV4 => ipv4(rest).map_or(Net::Cut("ip"), Net::Ip),
            IPV6 => ipv6(rest).map_or(Net::Cut("ip6"), Net::Ip),
            ARP => arp(rest).map_or(Net::Cut("arp"), Net::Arp),
            _ => Net::Other { len: rest.len() },
        }
    }
}

fn ipv4(b: &[u8]) -> Option<Ip> {
    let version = *b.first()?;
    let header = usize::from(version & 15) * 4;
    if version >> 4 != 4 || header < 20 || b.len() < 20 {
        return None;
    }
    let flags = u16_at(b, 6)?;
    let mut ip = Ip {
        src: Ipv4Addr::from(array::<4>(b, 12)?).into(),
        dst: Ipv4Addr::from(array::<4>(b, 16)?).into(),
        protocol: b[9],
        ttl: b[8],
        tos: b[1],
        id: u16_at(b, 4)?.into(),
        dont_fragment: flags & 0x4000 != 0,
        more_fragments: flags & 0x2000 != 0,
        offset: u32::from(flags & 0x1fff) * 8,
        len: u16_at(b, 2)?.into(),
        transport: Transport::Cut,
    };
    // 0: segmentation offload left the length to be told by the frame.
    let total = if ip.len == 0 { b.len() } else { ip.len };
    ip.transport = transport(
        &ip,
        b.get(header..).unwrap_or_default(),
        total.saturating_sub(header),
    );
    Some(ip)
}

fn ipv6(b: &[u8]) -> Option<Ip> {
    let first = u32_at(b, 0)?;
    if first >> 28 != 6 || b.len() < 40 {
        return None;
    }
    let payload = usize::from(u16_at(b, 4)?);
    let mut ip = Ip {
        src: Ipv6Addr::from(array::<16>(b, 8)?).into(),
        dst: Ipv6Addr::from(array::<16>(b, 24)?).into(),
        protocol: b[6],
        ttl: b[7],
        tos: (first >> 20) as u8,
        id: first & 0xf_ffff,
        dont_fragment: false,
        more_fragments: false,
        offset: 0,
        len: payload + 40,
        transport: Transport::Cut,
    };
    let mut rest = &b[40..];
    let mut left = if payload == 0 { rest.len() } else { payload };
    // Hop-by-hop, routing, destination options, mobility, HIP, shim6 all have the same shape; the fragment header its own.
    loop {
        let len = match ip.protocol {
            0 | 43 | 60 | 135 | 139 | 140 => rest.get(1).map(|n| usize::from(*n) * 8 + 8),
            51 => rest.get(1).map(|n| usize::from(*n) * 4 + 8),
            44 if ip.offset == 0 => {
                let Some(fragment) = u16_at(rest, 2) else {
                    return Some(ip);
                };
                ip.offset = u32::from(fragment & 0xfff8);
                ip.more_fragments = fragment & 1 != 0;
                Some(8)
            }
            _ => break,
        };
        let (Some(len), Some(next)) = (len, rest.first()) else {
            return Some(ip);
        };
        ip.protocol = *next;
        left = left.saturating_sub(len);
        match rest.get(len..) {
            Some(more) => rest = more,
            None => return Some(ip),
        }
        if ip.offset != 0 {
            break;
        }
    }
    ip.transport = transport(&ip, rest, left);
    Some(ip)
}

/// `b`: what was captured of it, `len`: how much there was.
fn transport(ip: &Ip, b: &[u8], len: usize) -> Transport {
    if ip.offset != 0 {
        return Transport::Other { len };
    }
    let decoded = match ip.protocol {
        6 => tcp(b, len),
        17 | 136 => udp(b, len),
        1 | 58 => icmp(b, len),
        132 => ports(b).map(|(sport, dport)| Transport::Sctp {
            sport,
            dport,
            len: len.saturating_sub(12),
        }),
        _ => Some(Transport::Other { len }),
    };
    decoded.unwrap_or(Transport::Cut)
}

fn ports(b: &[u8]) -> Option<(u16, u16)> {
    Some((u16_at(b, 0)?, u16_at(b, 2)?))
}

fn tcp(b: &[u8], len: usize) -> Option<Transport> {
    let (sport, dport) = ports(b)?;
    let header = usize::from(*b.get(12)? >> 4) * 4;
    Some(Transport::Tcp(Tcp {
        sport,
        dport,
        sequence: u32_at(b, 4)?,
        ack: u32_at(b, 8)?,
        flags: *b.get(13)?,
        window: u16_at(b, 14)?,
        len: len.saturating_sub(header),
    }))
}

fn udp(b: &[u8], len: usize) -> Option<Transport> {
    let (sport, dport) = ports(b)?;
    let told = usize::from(u16_at(b, 4)?);
    let len = if told == 0 { len } else { told };
    Some(Transport::Udp {
        sport,
        dport,
        len: len.saturating_sub(8),
    })
}

fn icmp(b: &[u8], len: usize) -> Option<Transport> {
    let (kind, code) = (*b.first()?, *b.get(1)?);
    let (id, sequence) = (u16_at(b, 4).unwrap_or(0), u16_at(b, 6).unwrap_or(0));
    Some(Transport::Icmp {
        kind,
        code,
        id,
        sequence,
        len,
    })
}

fn arp(b: &[u8]) -> Option<Arp> {
    // Ethernet and IPv4 only.
    if b.get(..6)? != [0, 1, 8, 0, 6, 4] {
        return None;
    }
    Some(Arp {
        operation: u16_at(b, 6)?,
        sender_mac: array(b, 8)?,
        sender: Ipv4Addr::from(array::<4>(b, 14)?),
        target: Ipv4Addr::from(array::<4>(b, 24)?),
        len: b.len().min(28),
    })
}

pub(super) fn array<const N: usize>(b: &[u8], at: usize) -> Option<[u8; N]> {
    b.get(at..at + N)?.try_into().ok()
}

pub(super) fn u16_at(b: &[u8], at: usize) -> Option<u16> {
    array(b, at).map(u16::from_be_bytes)
}

pub(super) fn u32_at(b: &[u8], at: usize) -> Option<u32> {
    array(b, at).map(u32::from_be_bytes)
}

impl Ip {
    /// Source and destination port, where the protocol has ports.
    pub fn ports(&self) -> Option<(u16, u16)> {
        match &self.transport {
            Transport::Tcp(tcp) => Some((tcp.sport, tcp.dport)),
            Transport::Udp { sport, dport, .. } | Transport::Sctp { sport, dport, .. } => {
                Some((*sport, *dport))
            }
            _ => None,
        }
    }

    pub(super) fn details(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (name, number) = (protocol_name(self.protocol), self.protocol);
        if self.src.is_ipv6() {
            let class = self.tos;
            return write!(
                f,
                "(class {class:#04x}, flowlabel {:#07x}, hlim {}, next-header {name} ({number}) payload length: {}) ",
                self.id,
                self.ttl,
                self.len.saturating_sub(40)
            );
        }
        let flags = match (self.dont_fragment, self.more_fragments) {
            (false, false) => "none",
            (true, false) => "DF",
            (false, true) => "+",
            (true, true) => "+, DF",
        };
        write!(
            f,
            "(tos {:#x}, ttl {}, id {}, offset {}, flags [{flags}], proto {name} ({number}), length {}) ",
            self.tos, self.ttl, self.id, self.offset, self.len
        )
    }
}

/// A protocol's name as tcpdump spells it, for the usual ones.
pub fn protocol_name(protocol: u8) -> &'static str {
    match protocol {
        1 => "ICMP",
        2 => "IGMP",
        4 => "IPIP",
        6 => "TCP",
        17 => "UDP",
        41 => "IPv6",
        47 => "GRE",
        50 => "ESP",
        51 => "AH",
        58 => "ICMP6",
        89 => "OSPF",
        103 => "PIM",
        112 => "VRRP",
        132 => "SCTP",
        136 => "UDPLite",
        _ => "proto",
    }
}

/// A MAC address, in the usual notation.
#[derive(Clone, Copy)]
pub struct Mac(pub [u8; 6]);

impl Display for Mac {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}
