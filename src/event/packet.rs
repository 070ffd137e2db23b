//! Packets in words: decodes an Ethernet frame into its headers, and prints one line as tcpdump does, or hex.
//!
//! Pure, and total: a frame may be cut anywhere and hold anything. Every byte that is printed is a number or our own word.

use std::fmt::{self, Display, Formatter};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const ETH_LEN: usize = 14;
const ARP: u16 = 0x0806;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const VLAN: u16 = 0x8100;
const QINQ: u16 = 0x88a8;

/// An Ethernet frame's headers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub dst: [u8; 6],
    pub src: [u8; 6],
    /// VLAN tags (priority, DEI and id), outermost first.
    pub vlans: Vec<u16>,
    /// Of what follows the tags.
    pub ethertype: u16,
    pub net: Net,
}

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

/// Decodes a frame of which `bytes` were captured.
pub fn decode(bytes: &[u8]) -> Option<Frame> {
    let head = bytes.get(..ETH_LEN)?;
    let mut frame = Frame {
        dst: array(head, 0)?,
        src: array(head, 6)?,
        vlans: Vec::new(),
        ethertype: u16_at(head, 12)?,
        net: Net::Cut("ethernet"),
    };
    let mut rest = &bytes[ETH_LEN..];
    while matches!(frame.ethertype, VLAN | QINQ) {
        let (Some(tag), Some(next)) = (u16_at(rest, 0), u16_at(rest, 2)) else {
            frame.net = Net::Cut("vlan");
            return Some(frame);
        };
        frame.vlans.push(tag);
        frame.ethertype = next;
        rest = &rest[4..];
    }
    frame.net = match frame.ethertype {
        IPV4 => ipv4(rest).map_or(Net::Cut("ip"), Net::Ip),
        IPV6 => ipv6(rest).map_or(Net::Cut("ip6"), Net::Ip),
        ARP => arp(rest).map_or(Net::Cut("arp"), Net::Arp),
        _ => Net::Other { len: rest.len() },
    };
    Some(frame)
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

fn array<const N: usize>(b: &[u8], at: usize) -> Option<[u8; N]> {
    b.get(at..at + N)?.try_into().ok()
}

fn u16_at(b: &[u8], at: usize) -> Option<u16> {
    array(b, at).map(u16::from_be_bytes)
}

fn u32_at(b: &[u8], at: usize) -> Option<u32> {
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

    fn details(&self, f: &mut Formatter<'_>) -> fmt::Result {
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
pub struct Mac(pub [u8; 6]);

impl Display for Mac {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// One line for a frame, without its end.
pub struct Line<'f> {
    pub frame: &'f Frame,
    /// With the link header, as tcpdump's -e.
    pub link: bool,
    /// With the fields of the IP header, as tcpdump's -v.
    pub details: bool,
}

impl Display for Line<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let frame = self.frame;
        if self.link {
            write!(
                f,
                "{} > {}, ethertype {:#06x}, ",
                Mac(frame.src),
                Mac(frame.dst),
                frame.ethertype
            )?;
        }
        for tag in &frame.vlans {
            write!(f, "vlan {}, p {}, ", tag & 0xfff, tag >> 13)?;
        }
        match &frame.net {
            Net::Ip(ip) => self.ip(ip, f),
            Net::Arp(arp) => arp_line(arp, f),
            Net::Other { len } => write!(f, "{}, length {len}", ethertype_name(frame.ethertype)),
            Net::Cut(what) => write!(f, "[|{what}]"),
        }
    }
}

impl Line<'_> {
    fn ip(&self, ip: &Ip, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(if ip.src.is_ipv6() { "IP6 " } else { "IP " })?;
        if self.details {
            ip.details(f)?;
        }
        match ip.ports() {
            Some((sport, dport)) => write!(f, "{}.{sport} > {}.{dport}: ", ip.src, ip.dst)?,
            None => write!(f, "{} > {}: ", ip.src, ip.dst)?,
        }
        if ip.more_fragments || ip.offset != 0 {
            write!(
                f,
                "frag ({}:{}{}) ",
                ip.id,
                ip.offset,
                if ip.more_fragments { "+" } else { "" }
            )?;
        }
        transport_line(ip, f)
    }
}

fn transport_line(ip: &Ip, f: &mut Formatter<'_>) -> fmt::Result {
    match &ip.transport {
        Transport::Tcp(tcp) => tcp_line(tcp, f),
        Transport::Udp { len, .. } => write!(f, "UDP, length {len}"),
        Transport::Sctp { len, .. } => write!(f, "SCTP, length {len}"),
        Transport::Icmp {
            kind,
            code,
            id,
            sequence,
            len,
        } => {
            let v6 = ip.src.is_ipv6();
            f.write_str(if v6 { "ICMP6, " } else { "ICMP " })?;
            match icmp_name(v6, *kind, *code) {
                Some(name) => f.write_str(name)?,
                None => write!(f, "type {kind} code {code}")?,
            }
            if matches!((v6, kind), (false, 0 | 8) | (true, 128 | 129)) {
                write!(f, ", id {id}, seq {sequence}")?;
            }
            write!(f, ", length {len}")
        }
        Transport::Other { len } => match protocol_name(ip.protocol) {
            "proto" => write!(f, "ip-proto-{}, length {len}", ip.protocol),
            name => write!(f, "{name}, length {len}"),
        },
        Transport::Cut => write!(f, "[|{}]", protocol_name(ip.protocol).to_ascii_lowercase()),
    }
}

fn tcp_line(tcp: &Tcp, f: &mut Formatter<'_>) -> fmt::Result {
    f.write_str("TCP, Flags [")?;
    if tcp.flags & 0xef == 0 && tcp.flags & 0x10 == 0 {
        f.write_str("none")?;
    }
    // tcpdump's order and letters.
    for (bit, letter) in [
        (1, 'F'),
        (2, 'S'),
        (4, 'R'),
        (8, 'P'),
        (0x10, '.'),
        (0x20, 'U'),
        (0x40, 'E'),
        (0x80, 'W'),
    ] {
        if tcp.flags & bit != 0 {
            write!(f, "{letter}")?;
        }
    }
    write!(f, "], seq {}", tcp.sequence)?;
    if tcp.len > 0 {
        write!(f, ":{}", tcp.sequence.wrapping_add(tcp.len as u32))?;
    }
    if tcp.flags & 0x10 != 0 {
        write!(f, ", ack {}", tcp.ack)?;
    }
    write!(f, ", win {}, length {}", tcp.window, tcp.len)
}

fn arp_line(arp: &Arp, f: &mut Formatter<'_>) -> fmt::Result {
    match arp.operation {
        1 => write!(
            f,
            "ARP, Request who-has {} tell {}, length {}",
            arp.target, arp.sender, arp.len
        ),
        2 => write!(
            f,
            "ARP, Reply {} is-at {}, length {}",
            arp.sender,
            Mac(arp.sender_mac),
            arp.len
        ),
        other => write!(f, "ARP, operation {other}, length {}", arp.len),
    }
}

fn ethertype_name(ethertype: u16) -> String {
    let name = match ethertype {
        0..=1500 => "802.3",
        0x8847 | 0x8848 => "MPLS",
        0x8863 => "PPPoE discovery",
        0x8864 => "PPPoE",
        0x88cc => "LLDP",
        0x8809 => "slow protocols",
        0x88e5 => "MACsec",
        _ => return format!("ethertype {ethertype:#06x}"),
    };
    name.to_owned()
}

fn icmp_name(v6: bool, kind: u8, code: u8) -> Option<&'static str> {
    Some(match (v6, kind, code) {
        (false, 0, _) => "echo reply",
        (false, 8, _) => "echo request",
        (false, 3, 0) => "net unreachable",
        (false, 3, 1) => "host unreachable",
        (false, 3, 2) => "protocol unreachable",
        (false, 3, 3) => "port unreachable",
        (false, 3, 4) => "unreachable - need to frag",
        (false, 3, 9 | 10 | 13) => "unreachable - admin prohibited",
        (false, 3, _) => "unreachable",
        (false, 5, _) => "redirect",
        (false, 11, _) | (true, 3, _) => "time exceeded",
        (true, 1, 4) => "destination unreachable, unreachable port",
        (true, 1, _) => "destination unreachable",
        (true, 2, _) => "packet too big",
        (true, 128, _) => "echo request",
        (true, 129, _) => "echo reply",
        (true, 133, _) => "router solicitation",
        (true, 134, _) => "router advertisement",
        (true, 135, _) => "neighbor solicitation",
        (true, 136, _) => "neighbor advertisement",
        (true, 143, _) => "multicast listener report v2",
        _ => return None,
    })
}

/// Appends a hex dump in tcpdump's layout: 16 bytes a line, ASCII beside it.
pub fn push_hex(out: &mut Vec<u8>, bytes: &[u8]) {
    use std::io::Write;
    for (line, row) in bytes.chunks(16).enumerate() {
        // Writing to a Vec cannot fail.
        let _ = write!(out, "\n\t{:#06x}:  ", line * 16);
        for at in 0..16 {
            match row.get(at) {
                Some(byte) => {
                    let _ = write!(out, "{byte:02x}");
                }
                None => out.extend_from_slice(b"  "),
            }
            if at % 2 == 1 {
                out.push(b' ');
            }
        }
        out.push(b' ');
        out.extend(row.iter().map(|b| {
            if b.is_ascii_graphic() || *b == b' ' {
                *b
            } else {
                b'.'
            }
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(hex: &str) -> Vec<u8> {
        let digits = hex.split_whitespace().collect::<String>();
        (0..digits.len() / 2)
            .map(|i| u8::from_str_radix(&digits[i * 2..i * 2 + 2], 16).unwrap())
            .collect()
    }

    fn line(hex: &str) -> String {
        let frame = decode(&bytes(hex)).unwrap();
        Line {
            frame: &frame,
            link: false,
            details: false,
        }
        .to_string()
    }

    const MACS: &str = "0200 0000 0002 0200 0000 0001";

    #[test]
    fn echo_request() {
        let ip = "0800 4500 0054 04d2 4000 4001 0000 0a4d 0001 0a4d 0002";
        let icmp = "0800 0000 1862 0061";
        assert_eq!(
            line(&format!("{MACS} {ip} {icmp}")),
            "IP 10.77.0.1 > 10.77.0.2: ICMP echo request, id 6242, seq 97, length 64"
        );
    }

    #[test]
    fn tcp_syn_and_data() {
        let ip = "0800 4500 003c 0000 4000 4006 0000 0a4d 0001 0a4d 0002";
        let syn = "d431 0050 0000 0064 0000 0000 a002 faf0 0000 0000 0204 05b4 0402 080a 0000 0000 0000 0000 0103 0307";
        assert_eq!(
            line(&format!("{MACS} {ip} {syn}")),
            "IP 10.77.0.1.54321 > 10.77.0.2.80: TCP, Flags [S], seq 100, win 64240, length 0"
        );
        let ip = "0800 4500 002d 0000 4000 4006 0000 0a4d 0001 0a4d 0002";
        let data = "d431 0050 0000 0065 0000 0007 5018 00ff 0000 0000 6869";
        assert_eq!(
            line(&format!("{MACS} {ip} {data}")),
            "IP 10.77.0.1.54321 > 10.77.0.2.80: TCP, Flags [P.], seq 101:106, ack 7, win 255, length 5"
        );
    }

    #[test]
    fn vlan_udp6_behind_options() {
        let tags = "88a8 0064 8100 2005 86dd";
        let ip6 = "6001 2345 0018 0040 fd77 0000 0000 0000 0000 0000 0000 0001 fd77 0000 0000 0000 0000 0000 0000 0002";
        let rest = "1100 0104 0000 0000 0035 3039 0010 0000";
        assert_eq!(
            line(&format!("{MACS} {tags} {ip6} {rest}")),
            "vlan 100, p 0, vlan 5, p 1, IP6 fd77::1.53 > fd77::2.12345: UDP, length 8"
        );
    }

    #[test]
    fn arp_both_ways_and_cuts() {
        let who = "0806 0001 0800 0604 0001 0200 0000 0001 0a4d 0001 0000 0000 0000 0a4d 0002";
        assert_eq!(
            line(&format!("{MACS} {who}")),
            "ARP, Request who-has 10.77.0.2 tell 10.77.0.1, length 28"
        );
        assert_eq!(line(&format!("{MACS} 0800 4500")), "[|ip]");
        let ip = "0800 4500 003c 0000 4000 4006 0000 0a4d 0001 0a4d 0002";
        assert_eq!(
            line(&format!("{MACS} {ip} d431")),
            "IP 10.77.0.1 > 10.77.0.2: [|tcp]"
        );
        assert_eq!(line(&format!("{MACS} 88cc 0207")), "LLDP, length 2");
        assert!(decode(&[0; 13]).is_none());
    }

    #[test]
    fn fragments() {
        let ip = "0800 4500 05dc 0007 2000 4011 0000 0a4d 0001 0a4d 0002";
        let udp = "1000 2000 0fa0 0000";
        assert_eq!(
            line(&format!("{MACS} {ip} {udp}")),
            "IP 10.77.0.1.4096 > 10.77.0.2.8192: frag (7:0+) UDP, length 3992"
        );
        let later = "0800 4500 05dc 0007 20b9 4011 0000 0a4d 0001 0a4d 0002 1000";
        assert_eq!(
            line(&format!("{MACS} {later}")),
            "IP 10.77.0.1 > 10.77.0.2: frag (7:1480+) UDP, length 1480"
        );
    }

    #[test]
    fn hex_layout() {
        let mut out = Vec::new();
        push_hex(&mut out, b"0123456789abcdef\x00");
        let want = "\n\t0x0000:  3031 3233 3435 3637 3839 6162 6364 6566  0123456789abcdef\n\t0x0010:  00                                       .";
        assert_eq!(String::from_utf8(out).unwrap(), want);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(mut data in proptest::collection::vec(any::<u8>(), 0..120), kind in 0usize..5) {
            if data.len() > 14 {
                let ethertype = [0x0800u16, 0x86dd, 0x0806, 0x8100, 0x88a8][kind];
                data[12..14].copy_from_slice(&ethertype.to_be_bytes());
                if let Some(first) = data.get_mut(14) {
                    *first = if kind == 1 { 0x60 } else { 0x40 | (*first & 15) };
                }
            }
            if let Some(frame) = decode(&data) {
                let text = Line { frame: &frame, link: true, details: true }.to_string();
                prop_assert!(text.chars().all(|c| !c.is_control()));
            }
        }
    }
}
