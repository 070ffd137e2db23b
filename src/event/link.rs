//! The first header of a packet, for the link types that netprobe reads: what lies behind it, by EtherType.
//!
//! Pure, and total: a packet may be cut anywhere and hold anything.

use crate::capture::linktype::Linktype;

use super::packet::{IPV4, IPV6, Net, array, u16_at, u32_at};

const ETH_LEN: usize = 14;
const VLAN: u16 = 0x8100;
const QINQ: u16 = 0x88a8;
/// BSD's and Linux's AF_INET.
const AF_INET: u32 = 2;

/// A packet's headers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub link: Link,
    /// VLAN tags (priority, DEI and id), outermost first.
    pub vlans: Vec<u16>,
    /// Of what follows the tags; 0 where the link header has none that says so.
    pub ethertype: u16,
    /// Bytes of the link header with its tags.
    pub header: usize,
    pub net: Net,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    Ethernet {
        dst: [u8; 6],
        src: [u8; 6],
    },
    /// The packet begins with its IP header.
    Bare,
    /// BSD's address family of a loopback packet, in host order.
    Family(u32),
    /// Linux's cooked header, PPP, HDLC: nothing of it is shown.
    Known(Linktype),
    /// A header that is named only.
    Other(Linktype),
}

/// Decodes a packet of which `bytes` were captured. None where its link header is cut.
pub fn decode(linktype: Linktype, bytes: &[u8]) -> Option<Frame> {
    match linktype {
        Linktype::ETHERNET => {
            let link = Link::Ethernet {
                dst: array(bytes, 0)?,
                src: array(bytes, 6)?,
            };
            by_type(link, bytes, 12, ETH_LEN)
        }
        Linktype::RAW_IP | Linktype::IPV4 | Linktype::IPV6 => {
            let ethertype = match bytes.first()? >> 4 {
                4 => IPV4,
                6 => IPV6,
                _ => 0,
            };
            Some(behind(Link::Bare, ethertype, bytes, 0))
        }
        Linktype::NULL | Linktype::LOOP => {
            let family = u32_at(bytes, 0)?;
            // Either byte order: families are small.
            let family = if family & 0xffff_0000 == 0 {
                family
            } else {
                family.swap_bytes()
            };
            let ethertype = match family {
                AF_INET => IPV4,
                // NetBSD and OpenBSD, FreeBSD, Darwin
                24 | 28 | 30 => IPV6,
                _ => 0,
            };
            Some(behind(Link::Family(family), ethertype, bytes, 4))
        }
        Linktype::LINUX_SLL => by_type(Link::Known(linktype), bytes, 14, 16),
        Linktype::LINUX_SLL2 => by_type(Link::Known(linktype), bytes, 0, 20),
        Linktype::PPP | Linktype::PPP_SERIAL => ppp(linktype, bytes),
        Linktype::CISCO_HDLC => by_type(Link::Known(linktype), bytes, 2, 4),
        _ => Some(behind(Link::Other(linktype), 0, bytes, 0)),
    }
}

fn ppp(linktype: Linktype, bytes: &[u8]) -> Option<Frame> {
    // Address and control may be left out, and so may the protocol's first byte.
    let at = if bytes.starts_with(&[0xff, 0x03]) {
        2
    } else {
        0
    };
    let (protocol, header) = match *bytes.get(at)? {
        odd if odd & 1 == 1 => (odd.into(), at + 1),
        _ => (u16_at(bytes, at)?, at + 2),
    };
    let ethertype = match protocol {
        0x0021 => IPV4,
        0x0057 => IPV6,
        _ => 0,
    };
    Some(behind(Link::Known(linktype), ethertype, bytes, header))
}

/// A header of `len` bytes that has an EtherType at `at`, and behind it perhaps VLAN tags.
fn by_type(link: Link, bytes: &[u8], at: usize, len: usize) -> Option<Frame> {
    bytes.get(..len)?;
    let mut ethertype = u16_at(bytes, at)?;
    let (mut vlans, mut header) = (Vec::new(), len);
    while matches!(ethertype, VLAN | QINQ) {
        let (Some(tag), Some(next)) = (u16_at(bytes, header), u16_at(bytes, header + 2)) else {
            return Some(Frame {
                link,
                vlans,
                ethertype,
                header: bytes.len(),
                net: Net::Cut("vlan"),
            });
        };
        vlans.push(tag);
        ethertype = next;
        header += 4;
    }
    Some(Frame {
        vlans,
        ..behind(link, ethertype, bytes, header)
    })
}

fn behind(link: Link, ethertype: u16, bytes: &[u8], header: usize) -> Frame {
    Frame {
        link,
        vlans: Vec::new(),
        ethertype,
        header,
        net: Net::decode(ethertype, bytes.get(header..).unwrap_or_default()),
    }
}

/// What is in the comment of a packet whose Ethernet header no device has sent.
pub const MADE_UP: &str = "made-up Ethernet header";

/// Bytes of such a header.
pub const MADE_UP_LEN: u32 = ETH_LEN as u32;

/// An Ethernet header for an IP packet that has none: addresses of zeros, and the type by the IP version. None for other bytes.
pub fn made_up_header(packet: &[u8]) -> Option<[u8; ETH_LEN]> {
    let ethertype: u16 = match packet.first()? >> 4 {
        4 => IPV4,
        6 => IPV6,
        _ => return None,
    };
    let mut header = [0; ETH_LEN];
    header[12..].copy_from_slice(&ethertype.to_be_bytes());
    Some(header)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::line::Line;
    use crate::event::packet::Transport;
    use proptest::prelude::*;

    const IP: [u8; 28] = [
        0x45, 0, 0, 28, 0, 1, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 0, 9, 0, 80, 0, 8, 0, 0,
    ];

    fn line(linktype: Linktype, header: &[u8]) -> String {
        let bytes = [header, &IP].concat();
        let frame = decode(linktype, &bytes).unwrap();
        assert!(
            matches!(frame.net, Net::Cut(_)) || frame.header >= header.len() || header.len() > 20
        );
        let line = Line {
            frame: &frame,
            link: false,
            details: false,
        };
        line.to_string()
    }

    #[test]
    fn ip_behind_each_header() {
        let udp = "IP 10.0.0.1.9 > 10.0.0.2.80: UDP, length 0";
        let mut cooked = [0; 16];
        cooked[14] = 8;
        let mut cooked2 = [0; 20];
        cooked2[0] = 8;
        for (linktype, header) in [
            (
                Linktype::ETHERNET,
                &[2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 8, 0][..],
            ),
            (Linktype::RAW_IP, &[]),
            (Linktype::IPV4, &[]),
            (Linktype::NULL, &[2, 0, 0, 0]),
            (Linktype::NULL, &[0, 0, 0, 2]),
            (Linktype::LOOP, &[0, 0, 0, 2]),
            (Linktype::LINUX_SLL, &cooked),
            (Linktype::LINUX_SLL2, &cooked2),
            (Linktype::PPP, &[0xff, 3, 0, 0x21]),
            (Linktype::PPP, &[0x21]),
            (Linktype::CISCO_HDLC, &[0x0f, 0, 8, 0]),
        ] {
            assert_eq!(line(linktype, header), udp, "{}", linktype.name());
        }
        assert_eq!(line(Linktype::NULL, &[10, 0, 0, 0]), "AF 10, length 28");
        assert_eq!(
            line(Linktype::from_name("IEEE802_11").unwrap(), &[]),
            "IEEE802_11, length 28"
        );
        let mut tagged = cooked2.to_vec();
        tagged[..2].copy_from_slice(&[0x81, 0]);
        tagged.extend([0, 5, 8, 0]);
        assert_eq!(
            line(Linktype::LINUX_SLL2, &tagged),
            format!("vlan 5, p 0, {udp}")
        );
    }

    #[test]
    fn made_up_headers_are_decoded_again() {
        let frame = [&made_up_header(&IP).unwrap()[..], &IP].concat();
        let frame = decode(Linktype::ETHERNET, &frame).unwrap();
        let Net::Ip(ip) = frame.net else { panic!() };
        assert!(matches!(ip.transport, Transport::Udp { dport: 80, .. }));
        assert_eq!(made_up_header(&[0x12]), None);
    }

    proptest! {
        #[test]
        fn any_bytes_of_any_type(linktype in 0i32..300, bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            if let Some(frame) = decode(Linktype(linktype), &bytes) {
                prop_assert!(frame.header <= bytes.len());
                let text = Line { frame: &frame, link: true, details: true }.to_string();
                prop_assert!(text.chars().all(|c| !c.is_control()));
            }
        }
    }
}
