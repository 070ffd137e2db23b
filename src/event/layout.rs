//! Where the header fields of an Ethernet frame are: names for the bytes that somebody changed.
//!
//! Pure, and total: a frame may be cut anywhere and hold anything.

use std::fmt::Write;
use std::net::{Ipv4Addr, Ipv6Addr};

use crate::capture::linktype::Linktype;

/// One header field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    pub name: &'static str,
    /// Offset in the frame.
    pub at: usize,
    pub len: usize,
    show: Show,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Show {
    Mac,
    Address,
    Decimal,
    Hex,
}
use Show::{Address, Decimal, Hex, Mac};

type Table = &'static [(&'static str, usize, usize, Show)];

const ETHERNET: Table = &[
    ("ethernet destination", 0, 6, Mac),
    ("ethernet source", 6, 6, Mac),
    ("ethertype", 12, 2, Hex),
];
const VLAN: Table = &[("VLAN tag", 0, 2, Hex), ("ethertype", 2, 2, Hex)];
const IPV4: Table = &[
    ("IP version and header length", 0, 1, Hex),
    ("IP type of service", 1, 1, Hex),
    ("IP length", 2, 2, Decimal),
    ("IP id", 4, 2, Decimal),
    ("IP flags and offset", 6, 2, Hex),
    ("IP time to live", 8, 1, Decimal),
    ("IP protocol", 9, 1, Decimal),
    ("IP checksum", 10, 2, Hex),
    ("IP source", 12, 4, Address),
    ("IP destination", 16, 4, Address),
];
const IPV6: Table = &[
    ("IPv6 version, class and flow label", 0, 4, Hex),
    ("IPv6 payload length", 4, 2, Decimal),
    ("IPv6 next header", 6, 1, Decimal),
    ("IPv6 hop limit", 7, 1, Decimal),
    ("IPv6 source", 8, 16, Address),
    ("IPv6 destination", 24, 16, Address),
];
const TCP: Table = &[
    ("TCP source port", 0, 2, Decimal),
    ("TCP destination port", 2, 2, Decimal),
    ("TCP sequence", 4, 4, Decimal),
    ("TCP acknowledgment", 8, 4, Decimal),
    ("TCP offset and flags", 12, 2, Hex),
    ("TCP window", 14, 2, Decimal),
    ("TCP checksum", 16, 2, Hex),
    ("TCP urgent pointer", 18, 2, Decimal),
];
const UDP: Table = &[
    ("UDP source port", 0, 2, Decimal),
    ("UDP destination port", 2, 2, Decimal),
    ("UDP length", 4, 2, Decimal),
    ("UDP checksum", 6, 2, Hex),
];
const ICMP: Table = &[
    ("ICMP type", 0, 1, Decimal),
    ("ICMP code", 1, 1, Decimal),
    ("ICMP checksum", 2, 2, Hex),
];
const ARP: Table = &[
    ("ARP operation", 6, 2, Decimal),
    ("ARP sender MAC", 8, 6, Mac),
    ("ARP sender", 14, 4, Address),
    ("ARP target MAC", 18, 6, Mac),
    ("ARP target", 24, 4, Address),
];

/// The header fields of a packet, in order: Ethernet and VLAN tags where it begins with them, IPv4 or IPv6 (without extension headers)
/// or ARP, TCP, UDP or ICMP. Fields that the packet is too short for are left out.
pub fn fields(linktype: Linktype, frame: &[u8]) -> Vec<Field> {
    let mut fields = Vec::new();
    let mut push = |base: usize, table: Table| {
        let known = table.iter().map(|&(name, at, len, show)| Field {
            name,
            at: base + at,
            len,
            show,
        });
        fields.extend(known.filter(|field| field.at + field.len <= frame.len()));
    };
    let word = |at: usize| {
        let bytes = frame.get(at..at + 2)?;
        Some(u16::from_be_bytes([bytes[0], bytes[1]]))
    };
    let mut at = 0;
    let ethertype = if linktype == Linktype::ETHERNET {
        push(0, ETHERNET);
        at = 12;
        while let Some(0x8100 | 0x88a8) = word(at) {
            push(at + 2, VLAN);
            at += 4;
        }
        at += 2;
        word(at - 2)
    } else {
        frame.first().and_then(|first| match first >> 4 {
            4 => Some(0x0800),
            6 => Some(0x86dd),
            _ => None,
        })
    };
    let (protocol, transport) = match ethertype {
        Some(0x0800) => {
            push(at, IPV4);
            let header = frame.get(at).map_or(0, |byte| usize::from(byte & 15) * 4);
            // A later fragment has no transport header.
            let first = word(at + 6).is_some_and(|offset| offset & 0x1fff == 0);
            (frame.get(at + 9).filter(|_| first), at + header)
        }
        Some(0x86dd) => {
            push(at, IPV6);
            (frame.get(at + 6), at + 40)
        }
        Some(0x0806) => {
            push(at, ARP);
            (None, at)
        }
        _ => (None, at),
    };
    match protocol {
        Some(6) => push(transport, TCP),
        Some(17) => push(transport, UDP),
        Some(1 | 58) => push(transport, ICMP),
        _ => {}
    }
    fields
}

impl Field {
    /// The field's value as people read it; `bytes`: the field's own.
    pub fn value(&self, bytes: &[u8]) -> String {
        match self.show {
            Mac => joined(bytes, ":"),
            Hex => format!("0x{}", joined(bytes, "")),
            Decimal => bytes
                .iter()
                .fold(0u64, |value, byte| value << 8 | u64::from(*byte))
                .to_string(),
            Address => match (<[u8; 4]>::try_from(bytes), <[u8; 16]>::try_from(bytes)) {
                (Ok(v4), _) => Ipv4Addr::from(v4).to_string(),
                (_, Ok(v6)) => Ipv6Addr::from(v6).to_string(),
                _ => joined(bytes, ""),
            },
        }
    }
}

/// Bytes in hex.
pub fn joined(bytes: &[u8], between: &str) -> String {
    let mut text = String::with_capacity(bytes.len() * (2 + between.len()));
    for (at, byte) in bytes.iter().enumerate() {
        if at > 0 {
            text.push_str(between);
        }
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn find(frame: &[u8], name: &str) -> Option<String> {
        let fields = fields(Linktype::ETHERNET, frame);
        let field = fields.iter().find(|field| field.name == name)?;
        Some(field.value(&frame[field.at..field.at + field.len]))
    }

    #[test]
    fn a_tagged_datagram() {
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x81, 0, 0, 100, 8, 0];
        let mut ip = vec![
            0x45, 0, 0, 28, 0, 1, 0, 0, 64, 17, 0xab, 0xcd, 10, 0, 0, 1, 10, 0, 0, 2,
        ];
        frame.append(&mut ip);
        frame.extend([0, 9, 0, 80, 0, 8, 0, 0]);
        assert_eq!(find(&frame, "VLAN tag").unwrap(), "0x0064");
        assert_eq!(
            find(&frame, "ethernet source").unwrap(),
            "02:00:00:00:00:02"
        );
        assert_eq!(find(&frame, "IP time to live").unwrap(), "64");
        assert_eq!(find(&frame, "IP destination").unwrap(), "10.0.0.2");
        assert_eq!(find(&frame, "UDP destination port").unwrap(), "80");
        assert_eq!(
            find(&frame[..42], "UDP destination port"),
            Some("80".into())
        );
        assert_eq!(find(&frame[..41], "UDP destination port"), None);
        // A later fragment.
        frame[24] = 1;
        assert_eq!(find(&frame, "UDP destination port"), None);
    }

    proptest! {
        #[test]
        fn any_frame(frame in proptest::collection::vec(any::<u8>(), 0..120), kind in 0usize..4) {
            let mut frame = frame;
            let types: [[u8; 2]; 4] = [[8, 0], [0x86, 0xdd], [8, 6], [0x81, 0]];
            if frame.len() > 14 {
                frame[12..14].copy_from_slice(&types[kind]);
            }
            for field in fields(if kind == 3 { Linktype::RAW_IP } else { Linktype::ETHERNET }, &frame) {
                field.value(&frame[field.at..field.at + field.len]);
            }
        }
    }
}
