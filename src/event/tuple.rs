//! Addresses, ports and protocol of a packet.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::text::format::{push_dec, push_ip};

/// What `struct np_tuple` of src/bpf/common/packet.h says; only for IP packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tuple {
    pub saddr: IpAddr,
    pub daddr: IpAddr,
    /// 0 where the protocol has no ports, or in a later fragment
    pub sport: u16,
    pub dport: u16,
    /// IPPROTO_*
    pub proto: u8,
    /// byte 13 of the TCP header
    pub tcp_flags: u8,
    pub icmp_type: u8,
    pub icmp_code: u8,
    /// not the first fragment
    pub fragment: bool,
}

impl Tuple {
    pub fn has_ports(&self) -> bool {
        !self.fragment && matches!(self.proto, 6 | 17 | 132 | 136)
    }

    /// Appends the text of `Display`; a fifth of the cost of `write!`, which counts once an event.
    pub fn push(&self, out: &mut Vec<u8>) {
        self.push_end(out, self.saddr, self.sport);
        out.extend_from_slice(b"->");
        self.push_end(out, self.daddr, self.dport);
        out.push(b'(');
        match proto_name(self.proto) {
            Some(name) => out.extend_from_slice(name.as_bytes()),
            None => push_dec(out, self.proto.into()),
        }
        out.extend_from_slice(if self.fragment { b",frag)" } else { b")" });
    }

    fn push_end(&self, out: &mut Vec<u8>, addr: IpAddr, port: u16) {
        let bracket = addr.is_ipv6() && self.has_ports();
        if bracket {
            out.push(b'[');
        }
        push_ip(out, addr);
        if bracket {
            out.push(b']');
        }
        if self.has_ports() {
            out.push(b':');
            push_dec(out, port.into());
        }
    }
}

/// `10.0.0.1:1234->10.0.0.2:80(tcp)`, `[2001:db8::1]:1234->[2001:db8::2]:80(tcp)`, without ports where there are none.
impl fmt::Display for Tuple {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = Vec::new();
        self.push(&mut text);
        f.write_str(&String::from_utf8_lossy(&text))
    }
}

/// The 16 bytes in network order that two words of an event are.
pub fn address_bytes(words: [u64; 2]) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&words[0].to_ne_bytes());
    bytes[8..].copy_from_slice(&words[1].to_ne_bytes());
    bytes
}

/// An address as events carry it, in network order (IPv4 as ::ffff:a.b.c.d where `version` is 4).
pub fn address(words: [u64; 2], version: u8) -> IpAddr {
    let bytes = address_bytes(words);
    match version {
        4 => Ipv4Addr::new(bytes[12], bytes[13], bytes[14], bytes[15]).into(),
        _ => Ipv6Addr::from(bytes).into(),
    }
}

/// Names of the protocols that users filter by.
pub const PROTOCOLS: [(&str, u8); 10] = [
    ("tcp", 6),
    ("udp", 17),
    ("icmp", 1),
    ("icmp6", 58),
    ("sctp", 132),
    ("gre", 47),
    ("esp", 50),
    ("ah", 51),
    ("ipip", 4),
    ("igmp", 2),
];

/// The name of an IP protocol number.
pub fn proto_name(proto: u8) -> Option<&'static str> {
    const BY_NUMBER: [Option<&str>; 256] = {
        let mut names = [None; 256];
        let mut i = 0;
        while i < PROTOCOLS.len() {
            names[PROTOCOLS[i].1 as usize] = Some(PROTOCOLS[i].0);
            i += 1;
        }
        names
    };
    BY_NUMBER[usize::from(proto)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        let t = Tuple {
            saddr: "10.0.0.1".parse().unwrap(),
            daddr: "10.0.0.2".parse().unwrap(),
            sport: 1234,
            dport: 80,
            proto: 6,
            tcp_flags: 2,
            icmp_type: 0,
            icmp_code: 0,
            fragment: false,
        };
        assert_eq!(t.to_string(), "10.0.0.1:1234->10.0.0.2:80(tcp)");
        let v6 = Tuple {
            saddr: "2001:db8::1".parse().unwrap(),
            daddr: "::1".parse().unwrap(),
            ..t
        };
        assert_eq!(v6.to_string(), "[2001:db8::1]:1234->[::1]:80(tcp)");
        assert_eq!(
            Tuple { proto: 1, ..t }.to_string(),
            "10.0.0.1->10.0.0.2(icmp)"
        );
        assert_eq!(
            Tuple {
                fragment: true,
                proto: 17,
                ..t
            }
            .to_string(),
            "10.0.0.1->10.0.0.2(udp,frag)"
        );
        assert_eq!(
            Tuple { proto: 200, ..t }.to_string(),
            "10.0.0.1->10.0.0.2(200)"
        );
    }
}
