//! What `--drops` says of a drop beyond the kernel's reason: losses that the kernel frees as consumed, the function that asked for the free,
//! copies.

use serde::Serialize;

use crate::bpf::skb::types::{skb_drop, skb_lost};
use crate::kernel::frees::{QDISC_FREE, only_frees};
use crate::kernel::ksyms::KernelSymbols;

/// SKB_LOST_* of src/bpf/skb/skb.h
const ACCEPT_QUEUE: u32 = skb_lost::SKB_LOST_ACCEPT_QUEUE.0;
const SYN_QUEUE: u32 = skb_lost::SKB_LOST_SYN_QUEUE.0;
const SYN: u32 = skb_lost::SKB_LOST_SYN.0;
const CHILD: u32 = skb_lost::SKB_LOST_CHILD.0;
const CSUM: u32 = skb_lost::SKB_LOST_CSUM.0;
/// What refused a packet on kernels without reasons, and the reason that newer ones give.
const REFUSED: [(u32, &str); 5] = [
    (skb_lost::SKB_LOST_FILTER.0, "SOCKET_FILTER"),
    (skb_lost::SKB_LOST_POLICY.0, "XFRM_POLICY"),
    (skb_lost::SKB_LOST_BUFFER.0, "SOCKET_RCVBUFF"),
    (skb_lost::SKB_LOST_MEMORY.0, "PROTO_MEM"),
    (skb_lost::SKB_LOST_RPFILTER.0, "IP_RPFILTER"),
];
/// PACKET_BROADCAST, PACKET_MULTICAST, PACKET_OTHERHOST, PACKET_LOOPBACK
const BROADCAST: u8 = 1;
const MULTICAST: u8 = 2;
const OTHERHOST: u8 = 3;
const LOOPBACK: u8 = 5;

/// `struct skb_drop`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drop {
    /// return addresses of the functions that called the one with the place of the drop; 0: none
    callers: [u64; 4],
    lost: u32,
    backlog: u32,
    limit: u32,
    others: i32,
    pkt_type: u8,
    cloned: bool,
    facts: u8,
    qdisc: u32,
}

/// The queue of a listening socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Listen {
    pub backlog: u32,
    pub limit: u32,
}

/// The packet is not lost with this sk_buff: others have it, or were meant to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Copies {
    /// `other host`, `packet socket`, `broadcast`, `multicast`, `loopback` or `shared`
    pub why: &'static str,
    /// how many other sk_buffs hold it now
    pub others: u32,
    /// It was cloned once, and nobody holds the other now: a bridge's copy, or the packet itself, which a packet socket saw too.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub perhaps: bool,
}

impl Drop {
    pub fn new(d: &skb_drop) -> Self {
        Self {
            callers: d.callers,
            lost: d.lost,
            backlog: d.backlog,
            limit: d.limit,
            others: d.others,
            pkt_type: d.pkt_type,
            cloned: d.cloned != 0,
            facts: d.facts,
            qdisc: d.qdisc,
        }
    }

    /// Why, in our own words, where the kernel has none: it says `reason`. `place`: the function that dropped it.
    pub fn reason(&self, reason: Option<&str>, place: &str) -> Option<&'static str> {
        let none = reason.is_none_or(|r| r.ends_with("NOT_SPECIFIED"));
        match self.lost {
            ACCEPT_QUEUE => Some("ACCEPT_QUEUE_FULL"),
            SYN_QUEUE => Some("SYN_QUEUE_FULL"),
            SYN => Some("SYN_UNANSWERED"),
            CHILD if none => Some("HANDSHAKE_FAILED"),
            CSUM if place.contains("tcp") => Some("TCP_CSUM"),
            CSUM if place.contains("udp") => Some("UDP_CSUM"),
            CSUM => Some("SKB_CSUM"),
            lost => {
                let refused = REFUSED.iter().find(|(by, _)| *by == lost);
                refused.map(|(_, reason)| *reason)
            }
        }
    }

    /// The reason of a qdisc, where the function `at` frees what a qdisc dropped: it says itself that one did, and no more.
    pub fn qdisc(&self, at: &str) -> Option<u32> {
        (at == QDISC_FREE && self.qdisc >> 16 != 0).then_some(self.qdisc)
    }

    /// Bits of enum drop_fact.
    pub fn facts(&self) -> u8 {
        self.facts
    }

    /// The queue that was full.
    pub fn listen(&self) -> Option<Listen> {
        matches!(self.lost, ACCEPT_QUEUE | SYN_QUEUE).then_some(Listen {
            backlog: self.backlog,
            limit: self.limit,
        })
    }

    /// `place`: the function that dropped it.
    pub fn copies(&self, place: &str) -> Option<Copies> {
        let others = u32::try_from(self.others).unwrap_or(0);
        let perhaps = others == 0 && self.is_for_another(place);
        let why = match self.pkt_type {
            OTHERHOST if self.is_for_another(place) => {
                if others == 0 && !self.cloned {
                    return None;
                }
                "other host"
            }
            _ if place.contains("packet_rcv") => "packet socket",
            BROADCAST => "broadcast",
            MULTICAST => "multicast",
            LOOPBACK => "loopback",
            _ if others > 0 => "shared",
            _ => return None,
        };
        Some(Copies {
            why,
            others,
            perhaps,
        })
    }

    /// Dropped since its link address is another host's. A bridge sees such packets too, and drops none for that.
    fn is_for_another(&self, place: &str) -> bool {
        self.pkt_type == OTHERHOST
            && matches!(
                place,
                "ip_rcv_core" | "ip_rcv" | "ip6_rcv_core" | "ipv6_rcv" | "arp_rcv"
            )
    }

    /// Addresses that [`Drop::place`] asks for by their symbols.
    pub fn addresses(&self) -> [u64; 4] {
        self.callers
    }

    /// The place of the drop: `at`, or where the function was called that frees for others.
    pub fn place(&self, at: u64, symbols: &KernelSymbols) -> u64 {
        let frees = |addr: u64| symbols.get(addr).is_some_and(|s| only_frees(&s.name));
        let callers = self.callers.into_iter().filter(|addr| *addr != 0);
        let mut places = std::iter::once(at).chain(callers);
        places.find(|addr| !frees(*addr)).unwrap_or(at)
    }

    /// What stands behind the place in a line.
    pub fn push(&self, line: &mut Vec<u8>, place: &str) {
        use std::io::Write;
        if let Some(Listen { backlog, limit }) = self.listen() {
            let _ = write!(line, " [backlog {backlog}, limit {limit}]");
        }
        let Some(Copies {
            why,
            others,
            perhaps,
        }) = self.copies(place)
        else {
            if self.is_for_another(place) {
                line.extend_from_slice(b" [for another host]");
            }
            return;
        };
        let _ = match (why, others) {
            ("other host", _) if perhaps => write!(line, " [perhaps a copy, for another host]"),
            ("other host", _) => write!(line, " [a copy, for another host]"),
            ("packet socket", _) => write!(line, " [a packet socket's copy]"),
            ("loopback", _) => write!(line, " [the sender's own copy]"),
            ("shared", 1) => write!(line, " [a copy, 1 other is left]"),
            ("shared", n) => write!(line, " [a copy, {n} others are left]"),
            (why, _) => write!(line, " [{why}]"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drop(lost: u32, others: i32) -> Drop {
        Drop {
            callers: [0; 4],
            lost,
            backlog: 2,
            limit: 1,
            others,
            pkt_type: 0,
            cloned: false,
            facts: 0,
            qdisc: 0,
        }
    }

    #[test]
    fn words_of_our_own_only_where_the_kernel_has_none() {
        assert_eq!(drop(0, -1).reason(None, "f"), None);
        let sum = drop(CSUM, -1);
        assert_eq!(
            sum.reason(None, "udpv6_queue_rcv_one_skb"),
            Some("UDP_CSUM")
        );
        assert_eq!(sum.reason(None, "icmp_rcv"), Some("SKB_CSUM"));
        assert_eq!(
            drop(REFUSED[1].0, -1).reason(None, "f"),
            Some("XFRM_POLICY")
        );
        assert_eq!(
            drop(ACCEPT_QUEUE, -1).reason(None, "f"),
            Some("ACCEPT_QUEUE_FULL")
        );
        let specified = Some("SKB_DROP_REASON_NOMEM");
        assert_eq!(drop(CHILD, -1).reason(specified, "f"), None);
        let not = Some("SKB_DROP_REASON_NOT_SPECIFIED");
        assert_eq!(drop(CHILD, -1).reason(not, "f"), Some("HANDSHAKE_FAILED"));
    }

    #[test]
    fn queues_and_copies() {
        let text = |d: &Drop| {
            let mut line = Vec::new();
            d.push(&mut line, "ip_rcv_core");
            String::from_utf8(line).unwrap()
        };
        assert_eq!(text(&drop(0, -1)), "");
        assert_eq!(text(&drop(ACCEPT_QUEUE, -1)), " [backlog 2, limit 1]");
        let other = Drop {
            pkt_type: OTHERHOST,
            ..drop(0, -1)
        };
        assert_eq!(text(&other), " [for another host]");
        assert_eq!(other.copies("ip_rcv_core"), None);
        assert_eq!(other.copies("nf_hook_slow"), None);
        let cloned = Drop {
            cloned: true,
            ..other.clone()
        };
        assert_eq!(text(&cloned), " [perhaps a copy, for another host]");
        let shared = Drop {
            others: 1,
            ..cloned
        };
        assert_eq!(text(&shared), " [a copy, for another host]");
        assert_eq!(text(&drop(0, 2)), " [a copy, 2 others are left]");
    }
}
