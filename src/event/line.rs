//! Packets in words: one line as tcpdump prints it, or hex.

use std::fmt::{self, Display, Formatter};

use super::link::{Frame, Link};
use super::packet::{Arp, Ip, Mac, Net, Tcp, Transport, protocol_name};

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
        match frame.link {
            Link::Ethernet { dst, src } if self.link => {
                let ethertype = frame.ethertype;
                write!(
                    f,
                    "{} > {}, ethertype {ethertype:#06x}, ",
                    Mac(src),
                    Mac(dst)
                )?;
            }
            Link::Family(family) if self.link => write!(f, "AF {family}, ")?,
            Link::Known(linktype) if self.link => {
                write!(
                    f,
                    "{}, ethertype {:#06x}, ",
                    linktype.name(),
                    frame.ethertype
                )?;
            }
            _ => {}
        }
        for tag in &frame.vlans {
            write!(f, "vlan {}, p {}, ", tag & 0xfff, tag >> 13)?;
        }
        match &frame.net {
            Net::Ip(ip) => self.ip(ip, f),
            Net::Arp(arp) => arp_line(arp, f),
            Net::Other { len } => match frame.link {
                Link::Family(family) => write!(f, "AF {family}, length {len}"),
                Link::Bare => write!(f, "no IP, length {len}"),
                Link::Other(linktype) => write!(f, "{}, length {len}", linktype.name()),
                _ => write!(f, "{}, length {len}", ethertype_name(frame.ethertype)),
            },
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
    use super::super::link::decode;
    use super::*;
    use crate::capture::linktype::Linktype;
    use proptest::prelude::*;

    fn bytes(hex: &str) -> Vec<u8> {
        let digits = hex.split_whitespace().collect::<String>();
        (0..digits.len() / 2)
            .map(|i| u8::from_str_radix(&digits[i * 2..i * 2 + 2], 16).unwrap())
            .collect()
    }

    fn line(hex: &str) -> String {
        let frame = decode(Linktype::ETHERNET, &bytes(hex)).unwrap();
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
        assert!(decode(Linktype::ETHERNET, &[0; 13]).is_none());
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
            if let Some(frame) = decode(Linktype::ETHERNET, &data) {
                let text = Line { frame: &frame, link: true, details: true }.to_string();
                prop_assert!(text.chars().all(|c| !c.is_control()));
            }
        }
    }
}
