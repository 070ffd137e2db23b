//! Which packets of one end are which of the other: by what routers and NAT leave alone. Pure.

use rustc_hash::FxHashMap;

use super::wire::{Flow, Kind, Wire};

/// A packet at one end: when it passed, and what it is.
#[derive(Debug, Clone, Copy)]
pub struct End {
    pub at: u64,
    pub wire: Wire,
}

/// What became of a packet that was sent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fate {
    /// the first packet at the other end with something of it
    pub got: Option<usize>,
    /// bytes of its payload (with SYN and FIN) that did not arrive
    pub missing: u32,
    /// Others are like it, and not all of them arrived: which one did is not known.
    pub alike: bool,
    /// This packet and `got` begin with the same byte: their times can be compared.
    pub timed: bool,
}

/// A flow at one end, and what the other calls it (NAT may give it other addresses).
pub type Flows = FxHashMap<Flow, Flow>;

/// The fate of each packet of `sent`, and the flows that are known at both ends. Both are in the order of time.
pub fn pair(sent: &[End], got: &[End]) -> (Vec<Fate>, Flows) {
    let mut flows = flows(sent, got);
    let mut fates = vec![Fate::default(); sent.len()];
    let by_flow = tcp_by_flow(got);
    let mut alike: FxHashMap<_, (Vec<usize>, Vec<usize>)> = FxHashMap::default();
    for (i, end) in sent.iter().enumerate() {
        if let Some((seq, len)) = end.wire.range() {
            let there = flows.get(&end.wire.flow());
            let there = there.and_then(|flow| by_flow.get(flow));
            fates[i] = range_fate(end, (seq, len), there, got);
        } else {
            let key = key(&end.wire, flows.get(&end.wire.flow()));
            alike.entry(key).or_default().0.push(i);
        }
    }
    for (i, end) in got.iter().enumerate() {
        if end.wire.range().is_none() {
            let key = key(&end.wire, Some(&end.wire.flow()));
            if let Some((_, there)) = alike.get_mut(&key) {
                there.push(i);
            }
        }
    }
    for (here, there) in alike.values() {
        let uncertain = here.len() != there.len() && !there.is_empty();
        for (k, &i) in here.iter().enumerate() {
            let found = there.get(k).copied();
            if let Some(found) = found {
                let flow = got[found].wire.flow();
                flows.entry(sent[i].wire.flow()).or_insert(flow);
            }
            fates[i] = Fate {
                got: found,
                missing: if found.is_none() { sent[i].wire.len } else { 0 },
                alike: uncertain && here.len() > 1,
                timed: found.is_some() && here.len() == 1 && there.len() == 1,
            };
        }
    }
    (fates, flows)
}

/// Packets without a range of bytes are compared by all that stays; TCP's within their flow.
fn key(wire: &Wire, there: Option<&Flow>) -> (Kind, u32, Option<Flow>) {
    let flow = if wire.is_tcp() { there.copied() } else { None };
    (wire.kind, wire.len, flow)
}

/// Packets of TCP with bytes, by flow and then by time stamp.
type ByStamp = FxHashMap<Option<u32>, Vec<usize>>;

fn tcp_by_flow(got: &[End]) -> FxHashMap<Flow, ByStamp> {
    let mut by_flow: FxHashMap<Flow, ByStamp> = FxHashMap::default();
    for (i, end) in got.iter().enumerate() {
        if end.wire.range().is_some() {
            let flow = by_flow.entry(end.wire.flow()).or_default();
            flow.entry(stamp(&end.wire)).or_default().push(i);
        }
    }
    for by_stamp in by_flow.values_mut() {
        for list in by_stamp.values_mut() {
            list.sort_by_key(|i| (got[*i].wire.range(), got[*i].at));
        }
    }
    by_flow
}

fn stamp(wire: &Wire) -> Option<u32> {
    match wire.kind {
        Kind::Tcp { stamps, .. } => stamps.map(|(own, _)| own),
        Kind::Other { .. } => None,
    }
}

/// A packet may arrive in pieces, or as part of a larger one: its bytes count, with the same time stamp.
fn range_fate(sent: &End, (seq, len): (u32, u32), there: Option<&ByStamp>, got: &[End]) -> Fate {
    let lost = Fate {
        missing: len,
        ..Fate::default()
    };
    let Some(list) = there.and_then(|by_stamp| by_stamp.get(&stamp(&sent.wire))) else {
        return lost;
    };
    // Relative to its first byte; sequence numbers wrap.
    let mut pieces: Vec<(i64, i64, usize)> = list
        .iter()
        .filter_map(|&i| {
            let (from, n) = got[i].wire.range()?;
            let from = i64::from(from.wrapping_sub(seq) as i32);
            Some((from, from + i64::from(n), i))
        })
        .filter(|(from, to, _)| *from < i64::from(len) && *to > 0)
        .collect();
    pieces.sort_unstable_by_key(|(from, _, i)| (*from, got[*i].at));
    let (mut covered, mut until) = (0, 0i64);
    for (from, to, _) in &pieces {
        let (from, to) = ((*from).max(until), (*to).min(i64::from(len)));
        covered += (to - from).max(0);
        until = until.max(to);
    }
    let Some((from, _, first)) = pieces.first() else {
        return lost;
    };
    Fate {
        got: Some(*first),
        missing: len - covered as u32,
        alike: false,
        timed: *from == 0,
    }
}

/// Which flow is which: by the same addresses, else (NAT) by the most packets that begin alike.
fn flows(sent: &[End], got: &[End]) -> Flows {
    let mut there: FxHashMap<(u32, u32, u32), Vec<Flow>> = FxHashMap::default();
    let mut same: FxHashMap<Flow, ()> = FxHashMap::default();
    for end in got.iter().filter(|e| e.wire.is_tcp()) {
        let flow = end.wire.flow();
        same.insert(flow, ());
        if let Some(first) = first_byte(&end.wire) {
            let list = there.entry(first).or_default();
            if !list.contains(&flow) && list.len() < 16 {
                list.push(flow);
            }
        }
    }
    let mut votes: FxHashMap<Flow, FxHashMap<Flow, u32>> = FxHashMap::default();
    let mut flows = Flows::default();
    for end in sent.iter().filter(|e| e.wire.is_tcp()) {
        let flow = end.wire.flow();
        if same.contains_key(&flow) {
            flows.insert(flow, flow);
            continue;
        }
        let first = first_byte(&end.wire).and_then(|first| there.get(&first));
        for other in first.into_iter().flatten() {
            *votes.entry(flow).or_default().entry(*other).or_default() += 1;
        }
    }
    for (flow, votes) in votes {
        let most = votes.iter().max_by_key(|(_, n)| **n);
        if let Some((other, _)) = most {
            flows.insert(flow, *other);
        }
    }
    flows
}

/// What tells the begin of a TCP packet from those of other flows; an ACK alone is too little.
fn first_byte(wire: &Wire) -> Option<(u32, u32, u32)> {
    let Kind::Tcp {
        seq, ack, stamps, ..
    } = wire.kind
    else {
        return None;
    };
    wire.range()?;
    match stamps {
        Some((own, _)) => Some((seq, own, 1)),
        None => Some((seq, ack, 0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::tuple::Tuple;
    use proptest::prelude::*;

    fn tuple(from: &str, proto: u8) -> Tuple {
        Tuple {
            saddr: from.parse().unwrap(),
            daddr: "10.0.0.2".parse().unwrap(),
            sport: 1,
            dport: 2,
            proto,
            tcp_flags: 0,
            icmp_type: 0,
            icmp_code: 0,
            fragment: false,
        }
    }

    fn tcp(from: &str, at: u64, seq: u32, len: u32, stamp: u32) -> End {
        let kind = Kind::Tcp {
            seq,
            ack: 7,
            flags: 0,
            stamps: Some((stamp, 1)),
        };
        let tuple = tuple(from, 6);
        End {
            at,
            wire: Wire { tuple, kind, len },
        }
    }

    fn udp(at: u64, id: u16, hash: u64) -> End {
        let kind = Kind::Other {
            id,
            offset: 0,
            what: 0,
            hash,
        };
        End {
            at,
            wire: Wire {
                tuple: tuple("10.0.0.1", 17),
                kind,
                len: 10,
            },
        }
    }

    #[test]
    fn segments_and_merged_ones_by_their_bytes() {
        // One of 3,000 bytes that arrives in two pieces, one in one with the next, one that half arrives, a repeated one.
        let here = "10.0.0.1";
        let sent = [
            tcp(here, 1, 0, 3000, 5),
            tcp(here, 2, 3000, 1000, 6),
            tcp(here, 3, 4000, 1000, 6),
            tcp(here, 4, 5000, 2000, 7),
            tcp(here, 5, 6000, 1000, 9),
            tcp(here, 6, 7000, 0, 9),
        ];
        let nat = "192.0.2.1";
        let got = [
            tcp(nat, 11, 0, 1500, 5),
            tcp(nat, 12, 1500, 1500, 5),
            tcp(nat, 13, 3000, 2000, 6),
            tcp(nat, 14, 5000, 1000, 7),
            tcp(nat, 15, 6000, 1000, 9),
            tcp(nat, 16, 7000, 0, 9),
        ];
        let (fates, flows) = pair(&sent, &got);
        assert_eq!(flows[&sent[0].wire.flow()], got[0].wire.flow());
        let told: Vec<_> = fates.iter().map(|f| (f.got, f.missing, f.timed)).collect();
        assert_eq!(
            told,
            [
                (Some(0), 0, true),
                (Some(2), 0, true),
                (Some(2), 0, false),
                (Some(3), 1000, true),
                (Some(4), 0, true),
                (Some(5), 0, true),
            ]
        );
    }

    #[test]
    fn those_alike_are_counted_and_not_told_apart() {
        let sent = [udp(1, 1, 5), udp(2, 1, 5), udp(3, 2, 5), udp(4, 3, 5)];
        let got = [udp(11, 1, 5), udp(13, 2, 5)];
        let (fates, _) = pair(&sent, &got);
        let told: Vec<_> = fates.iter().map(|f| (f.got, f.alike)).collect();
        let wanted = [
            (Some(0), true),
            (None, true),
            (Some(1), false),
            (None, false),
        ];
        assert_eq!(told, wanted);
    }

    proptest! {
        /// However a stream is cut at either end, a byte is missing if and only if it did not arrive.
        #[test]
        fn any_boundaries(
            here in prop::collection::vec(1u32..50, 1..20),
            there in prop::collection::vec((1u32..50, any::<bool>()), 1..40),
            start: u32,
        ) {
            let mut sent = Vec::new();
            let mut at = 0;
            for len in here {
                sent.push(tcp("10.0.0.1", 1, start.wrapping_add(at), len, 1));
                at += len;
            }
            let mut lost = vec![true; at as usize];
            let (mut got, mut from) = (Vec::new(), 0);
            for (len, arrives) in there {
                let len = len.min(at - from);
                if len == 0 { break; }
                if arrives {
                    got.push(tcp("10.0.0.1", 2, start.wrapping_add(from), len, 1));
                    lost[from as usize..(from + len) as usize].fill(false);
                }
                from += len;
            }
            let (fates, _) = pair(&sent, &got);
            let mut from = 0;
            for (end, fate) in sent.iter().zip(fates) {
                let to = from + end.wire.len as usize;
                let missing = lost[from..to].iter().filter(|l| **l).count();
                prop_assert_eq!(fate.missing as usize, missing);
                from = to;
            }
        }
    }
}
