//! What of a packet is the same at both ends: what routers and NAT leave alone. Pure.

use std::hash::Hasher;

use rustc_hash::FxHasher;

use crate::capture::linktype::Linktype;
use crate::event::link;
use crate::event::packet::{Ip, Net, Transport};
use crate::event::tuple::Tuple;
use crate::tools::skb::event::Data;

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
const TCP: u8 = 6;
/// Bytes of the payload that tell packets apart: recordings may have few of each packet.
const HASHED: usize = 40;
const OPTION_END: u8 = 0;
const OPTION_NOP: u8 = 1;
const OPTION_TIMESTAMPS: u8 = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    Tcp {
        seq: u32,
        ack: u32,
        flags: u8,
        /// of the time stamps option: own, echoed
        stamps: Option<(u32, u32)>,
    },
    Other {
        /// IPv4 identification; 0: none
        id: u16,
        /// of a fragment
        offset: u32,
        /// of ICMP: type, code and sequence; else 0
        what: u32,
        hash: u64,
    },
}

/// A packet on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Wire {
    pub tuple: Tuple,
    pub kind: Kind,
    /// bytes of its payload
    pub len: u32,
}

impl Wire {
    /// `None`: it is no IP, or its headers are cut off.
    pub fn of(data: &Data) -> Option<Self> {
        let linktype = match data.ethernet {
            true => Linktype::ETHERNET,
            false => Linktype::RAW_IP,
        };
        let frame = link::decode(linktype, &data.bytes)?;
        let Net::Ip(ip) = &frame.net else {
            return None;
        };
        let header = data.bytes.get(frame.header..)?;
        let ip_len = match header.first()? >> 4 {
            4 => usize::from(header[0] & 15) * 4,
            // Behind extension headers nobody looks.
            _ if header.get(6) == Some(&ip.protocol) => 40,
            _ => return None,
        };
        let whole = match ip.len {
            0 => (data.len as usize).saturating_sub(frame.header),
            len => len,
        };
        let rest = header.get(ip_len..)?;
        Self::behind(ip, rest, whole.checked_sub(ip_len)?)
    }

    /// `len`: bytes behind the IP header, of which `rest` was recorded.
    fn behind(ip: &Ip, rest: &[u8], len: usize) -> Option<Self> {
        let mut tuple = Tuple {
            saddr: ip.src,
            daddr: ip.dst,
            sport: 0,
            dport: 0,
            proto: ip.protocol,
            tcp_flags: 0,
            icmp_type: 0,
            icmp_code: 0,
            fragment: ip.offset != 0,
        };
        if let Some((sport, dport)) = ip.ports() {
            (tuple.sport, tuple.dport) = (sport, dport);
        }
        if let Transport::Tcp(tcp) = &ip.transport {
            let header = usize::from(rest.get(12)? >> 4) * 4;
            tuple.tcp_flags = tcp.flags;
            let kind = Kind::Tcp {
                seq: tcp.sequence,
                ack: tcp.ack,
                flags: tcp.flags & (FIN | SYN | RST),
                stamps: rest.get(20..header).and_then(stamps),
            };
            let len = len.checked_sub(header)? as u32;
            return Some(Self { tuple, kind, len });
        }
        let (header, what) = match ip.transport {
            Transport::Udp { .. } => (8, 0),
            Transport::Icmp {
                kind,
                code,
                sequence,
                ..
            } => {
                (tuple.icmp_type, tuple.icmp_code) = (kind, code);
                let what = u32::from(kind) << 24 | u32::from(code) << 16 | u32::from(sequence);
                (8, what)
            }
            Transport::Cut => return None,
            _ => (0, 0),
        };
        let len = len.checked_sub(header)?;
        let payload = rest.get(header..)?.get(..len.min(HASHED))?;
        let mut hasher = FxHasher::default();
        hasher.write(payload);
        let kind = Kind::Other {
            id: if ip.src.is_ipv4() { ip.id as u16 } else { 0 },
            offset: ip.offset | u32::from(ip.more_fragments),
            what,
            hash: hasher.finish(),
        };
        let len = len as u32;
        Some(Self { tuple, kind, len })
    }

    /// The bytes of a TCP stream that it is: SYN and FIN take one each. `None`: none, or no TCP.
    pub fn range(&self) -> Option<(u32, u32)> {
        let Kind::Tcp { seq, flags, .. } = self.kind else {
            return None;
        };
        let more = u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
        let len = self.len + more;
        (len > 0).then_some((seq, len))
    }

    pub fn is_tcp(&self) -> bool {
        self.tuple.proto == TCP
    }

    /// The flow in this direction.
    pub fn flow(&self) -> Flow {
        let t = &self.tuple;
        Flow(Tuple {
            tcp_flags: 0,
            icmp_type: 0,
            icmp_code: 0,
            fragment: false,
            // Later fragments have no ports: they are of the addresses alone, as the first one is.
            ..*t
        })
    }
}

/// Addresses and ports of one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Flow(pub Tuple);

/// The time stamps among TCP's options.
fn stamps(mut options: &[u8]) -> Option<(u32, u32)> {
    while let Some((&kind, rest)) = options.split_first() {
        match kind {
            OPTION_END => return None,
            OPTION_NOP => options = rest,
            _ => {
                let len = usize::from(*rest.first()?);
                let body = options.get(2..len.max(2))?;
                if kind == OPTION_TIMESTAMPS {
                    let word = |at: usize| {
                        let bytes = body.get(at..at + 4)?.first_chunk::<4>()?;
                        Some(u32::from_be_bytes(*bytes))
                    };
                    return Some((word(0)?, word(4)?));
                }
                options = options.get(len.max(2)..)?;
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn data(bytes: Vec<u8>) -> Data {
        Data {
            len: bytes.len() as u32,
            ethernet: false,
            hatype: 1,
            vlan: None,
            bytes,
        }
    }

    fn udp(from: u8, ttl: u8, payload: &[u8]) -> Vec<u8> {
        let len = 28 + payload.len() as u8;
        let mut b = vec![0x45, 0, 0, len, 0x12, 0x34, 0, 0, ttl, 17, 0, 0];
        b.extend([10, 0, 0, from, 10, 0, 1, 1, 0, 9, 0, 7, 0, len - 20, 0, 0]);
        b.extend(payload);
        b
    }

    #[test]
    fn what_a_router_and_nat_change_does_not_count() {
        let here = Wire::of(&data(udp(1, 64, b"hello"))).unwrap();
        let there = Wire::of(&data(udp(2, 63, b"hello"))).unwrap();
        assert_eq!((here.kind, here.len), (there.kind, 5));
        let other = Wire::of(&data(udp(1, 64, b"hallo"))).unwrap();
        assert_ne!(here.kind, other.kind);
    }

    #[test]
    fn tcp_has_its_bytes_and_time_stamps() {
        let mut b = vec![0x45, 0, 0, 55, 0, 0, 0, 0, 64, 6, 0, 0];
        b.extend([10, 0, 0, 1, 10, 0, 0, 2, 0, 80, 0, 81]);
        b.extend([0, 0, 0, 9, 0, 0, 0, 7, 0x80, 0x18, 0, 0, 0, 0, 0, 0]);
        b.extend([1, 1, 8, 10, 0, 0, 0, 5, 0, 0, 0, 6]);
        b.extend(b"abc");
        let wire = Wire::of(&data(b)).unwrap();
        let kind = Kind::Tcp {
            seq: 9,
            ack: 7,
            flags: 0,
            stamps: Some((5, 6)),
        };
        assert_eq!((wire.kind, wire.range()), (kind, Some((9, 3))));
    }

    proptest! {
        #[test]
        fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..120), ethernet: bool) {
            let _ = Wire::of(&Data { ethernet, ..data(bytes) });
        }
    }
}
