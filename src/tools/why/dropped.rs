//! The drop of an sk_buff: what was read when it happened.

use std::net::{IpAddr, Ipv4Addr};

use crate::event::link::Frame;
use crate::event::packet::{Net, Transport};
use crate::event::tuple::Tuple;
use crate::explain::Fact;
use crate::kernel::process::Process;
use crate::text::escape::escaped;
use crate::tools::skb::drops::Listen;
use crate::tools::skb::event::{Facts, Meta};
use crate::tools::skb::netfilter::Who;

use super::names::Place;

/// A drop of one of its sk_buffs.
#[derive(Debug, Clone)]
pub struct Dropped {
    pub at: u64,
    /// without SKB_DROP_REASON_; empty where the kernel gives none
    pub reason: String,
    pub place: Place,
    pub who: Option<Who>,
    /// the hook of netfilter that it was in, where that decided
    pub hook: Option<&'static str>,
    pub meta: Option<Meta>,
    pub tuple: Option<Tuple>,
    pub facts: Option<Facts>,
    pub frame: Option<Frame>,
    pub header: Header,
    /// the VLAN that the frame came in with
    pub vlan: Option<u16>,
    pub listen: Option<Listen>,
    /// another sk_buff has the packet
    pub copy: bool,
    pub process: Option<Process>,
    /// the id of its socket's cgroup; 0: not known
    pub cgroup: u64,
}

/// What the sender was told: type and code of an ICMP error, a TCP reset.
#[derive(Debug, Clone, Copy)]
pub struct Told {
    pub icmp: Option<(u8, u8)>,
    pub reset: bool,
}

/// Whose the frame is, where the kernel has marked it as another host's. It marks frames with a VLAN that no device takes so, too.
pub fn mac_fact(facts: &Facts, vlan: Option<u16>) -> Option<Fact> {
    const OTHERHOST: u8 = 3;
    let own = facts.own_mac.filter(|_| facts.pkt_type == OTHERHOST)?;
    Some(match (own, vlan) {
        (true, Some(_)) => Fact::UnknownVlan,
        (true, None) => Fact::OwnMac,
        (false, _) => Fact::OtherMac,
    })
}

/// What is wrong with an IPv4 header.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    /// The header says more bytes than there are: what it says, and what there is.
    pub cut: Option<(usize, usize)>,
    /// Its checksum is not that of its bytes.
    pub bad_sum: bool,
}

impl Header {
    /// `len`: of the packet from its link header on.
    pub fn new(frame: &Frame, bytes: &[u8], len: usize) -> Self {
        let (Net::Ip(ip), Some(packet)) = (&frame.net, bytes.get(frame.header..)) else {
            return Self::default();
        };
        let rest = len.saturating_sub(frame.header);
        let cut = (ip.len > rest).then_some((ip.len, rest));
        let first = packet.first().copied().unwrap_or_default();
        let header = packet.get(..usize::from(first & 0xf) * 4);
        let bad_sum = first >> 4 == 4 && header.is_some_and(|h| sum(h) != 0xffff);
        Self { cut, bad_sum }
    }
}

/// The sum of 16-bit words as IP's checksum has it: 0xffff where the header is right.
fn sum(header: &[u8]) -> u16 {
    let words = header.chunks_exact(2);
    let mut sum: u32 = words
        .map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])))
        .sum();
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

/// Facts of addresses that no packet may have where it is received (ip_route_input_slow).
fn address_facts(from: IpAddr, to: IpAddr) -> Vec<Fact> {
    let (IpAddr::V4(from), IpAddr::V4(to)) = (from, to) else {
        return Vec::new();
    };
    let zero = |a: Ipv4Addr| a.octets()[0] == 0;
    let all = [
        (from.is_loopback() || to.is_loopback(), Fact::Loopback),
        (
            from.is_multicast() || from.is_broadcast() || zero(from),
            Fact::BadSource,
        ),
        (zero(to), Fact::BadDestination),
    ];
    all.into_iter().filter(|f| f.0).map(|f| f.1).collect()
}

impl Dropped {
    /// `NETFILTER_DROP in nft_do_chain, dev veth0`
    pub fn decided(&self) -> String {
        let mut text = match &*self.reason {
            "" => String::new(),
            reason => format!("{reason} "),
        };
        text += &format!("in {}", self.place.function);
        let device = self.meta.as_ref().map(|m| escaped(&m.ifname));
        if let Some(device) = device.filter(|d| !d.is_empty()) {
            text += &format!(", dev {device}");
        }
        text
    }

    /// What rules may ask about it.
    pub fn rule_facts(&self, told: Told, time_wait: bool) -> Vec<Fact> {
        let Told { icmp, reset } = told;
        let addresses = self.tuple.map(|t| address_facts(t.saddr, t.daddr));
        let mut facts = addresses.unwrap_or_default();
        let mut add = |is: bool, fact| {
            if is {
                facts.push(fact);
            }
        };
        let pkt_type = self.facts.as_ref().map_or(0, |f| f.pkt_type);
        let v6 = self.tuple.is_some_and(|t| t.saddr.is_ipv6());
        add(pkt_type == 1, Fact::Broadcast);
        add(pkt_type == 2, Fact::Multicast);
        add(pkt_type == 3, Fact::OtherHost);
        let promiscuous = self.facts.as_ref().is_some_and(|f| f.promiscuous);
        add(promiscuous, Fact::Promiscuous);
        add(self.tuple.is_none(), Fact::NoIp);
        let reply =
            |t: Tuple| (t.proto, t.icmp_type) == (1, 0) || (t.proto, t.icmp_type) == (58, 129);
        add(self.tuple.is_some_and(reply), Fact::EchoReply);
        let waits = time_wait || self.facts.as_ref().is_some_and(|f| f.time_wait);
        add(waits, Fact::TimeWait);
        add(self.has_no_data(), Fact::NoData);
        let time = if v6 { 3 } else { 11 };
        add(icmp.is_some_and(|i| i.0 == time), Fact::TimeExceeded);
        let too_big = |i: (u8, u8)| if v6 { i.0 == 2 } else { i == (3, 4) };
        add(icmp.is_some_and(too_big), Fact::TooBig);
        let no_protocol = |i| i == if v6 { (4, 1) } else { (3, 2) };
        add(icmp.is_some_and(no_protocol), Fact::NoProtocol);
        add(reset, Fact::Reset);
        add(self.tuple.is_some(), Fact::Ip);
        add(self.header.cut.is_some(), Fact::CutOff);
        add(self.header.bad_sum, Fact::BadIpSum);
        let route = self.facts.as_ref().and_then(|f| f.route.as_ref());
        let error = route.map_or(0, |r| i32::from(r.error).abs());
        add(error == libc::EINVAL, Fact::RouteBlackhole);
        add(error == libc::EACCES, Fact::RouteProhibits);
        add(error == libc::EHOSTUNREACH, Fact::RouteUnreachable);
        let off = self.facts.as_ref().is_some_and(|f| f.ipv6_off);
        add(off, Fact::Ipv6Off);
        facts.extend(self.facts.as_ref().and_then(|f| mac_fact(f, self.vlan)));
        facts
    }

    fn has_no_data(&self) -> bool {
        const SYN: u8 = 2;
        let Some(Net::Ip(ip)) = self.frame.as_ref().map(|f| &f.net) else {
            return false;
        };
        matches!(&ip.transport, Transport::Tcp(tcp) if tcp.len == 0 && tcp.flags & SYN == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::linktype::Linktype;
    use crate::event::link;

    #[test]
    fn headers_that_are_wrong() {
        let mut bytes = vec![
            0x45, 0, 0, 28, 0, 1, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ];
        let right = !sum(&bytes);
        bytes[10..12].copy_from_slice(&right.to_be_bytes());
        bytes.extend_from_slice(&[0x9c, 0x40, 0, 53, 0, 8, 0, 0]);
        let of = |bytes: &[u8], len| {
            let frame = link::decode(Linktype::RAW_IP, bytes).unwrap();
            Header::new(&frame, bytes, len)
        };
        assert_eq!(of(&bytes, 28), Header::default());
        assert_eq!(of(&bytes, 24).cut, Some((28, 24)));
        assert_eq!(of(&bytes[..10], 28), Header::default(), "not all was read");
        bytes[8] = 63;
        assert!(of(&bytes, 28).bad_sum);
    }

    #[test]
    fn addresses_that_no_packet_may_have() {
        let of = |from: &str, to: &str| address_facts(from.parse().unwrap(), to.parse().unwrap());
        assert_eq!(of("10.0.0.1", "10.0.0.2"), []);
        assert_eq!(of("127.0.0.5", "10.0.0.2"), [Fact::Loopback]);
        assert_eq!(of("224.0.0.1", "10.0.0.2"), [Fact::BadSource]);
        assert_eq!(
            of("0.1.0.1", "0.0.0.2"),
            [Fact::BadSource, Fact::BadDestination]
        );
        assert_eq!(of("::1", "::1"), []);
    }
}
