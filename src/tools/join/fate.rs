//! What became of each packet between two hosts.

use std::net::IpAddr;

use rustc_hash::FxHashSet;

use super::clock::{self, Clock};
use super::matching::{self, End, Fate, Flows};
use super::side::{Packet, Side};
use super::wire::Flow;

/// The end of a packet's way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// the other host got all of it
    Arrived,
    /// the other host got so many bytes less
    Partly(u32),
    /// it left one host, and never reached the other
    Lost,
    /// it left near the end or the begin of the other's recording
    Unknown,
    /// the other host never had anything of its flow, and nobody there has its address
    Elsewhere,
}

/// A packet that left a host.
pub struct Way<'a> {
    pub here: &'a Packet,
    /// the same packet at the other host
    pub there: Option<&'a Packet>,
    pub outcome: Outcome,
    /// Others are like it, and not all of them arrived.
    pub alike: bool,
    /// between the hosts, ns, by the clocks' offset; `None`: not known
    pub between: Option<i64>,
}

/// Packets of one direction.
pub struct Direction {
    /// index of the host that sends
    pub from: usize,
    /// index of the packet here; what became of it
    sent: Vec<(usize, Fate)>,
    got: Vec<usize>,
    flows: Flows,
    /// the least difference of the time stamps
    pub least: Option<i64>,
    most: i64,
}

pub struct Joined {
    pub sides: [Side; 2],
    pub directions: [Direction; 2],
    pub clock: Option<Clock>,
    addresses: [FxHashSet<IpAddr>; 2],
}

impl Joined {
    pub fn new(a: Side, b: Side) -> Self {
        let directions = [Direction::new(0, &a, &b), Direction::new(1, &b, &a)];
        let clock = clock::offset(directions[0].least, directions[1].least);
        let addresses = [own(&a), own(&b)];
        Self {
            sides: [a, b],
            directions,
            clock,
            addresses,
        }
    }

    /// How much is to be added to a time of this direction's sender to get the receiver's, at least as far as it is known.
    fn shift(&self, direction: &Direction) -> i64 {
        match (self.clock, direction.from) {
            (Some(clock), 0) => clock.offset,
            (Some(clock), _) => -clock.offset,
            // The least delay taken for none.
            (None, _) => direction.least.unwrap_or(0),
        }
    }

    /// All packets that one host sent, with what became of them.
    pub fn ways<'a>(&'a self, direction: &'a Direction) -> impl Iterator<Item = Way<'a>> + 'a {
        let (here, there) = (&self.sides[direction.from], &self.sides[1 - direction.from]);
        direction.sent.iter().filter_map(move |(index, fate)| {
            let packet = &here.packets[*index];
            let left = packet.left?;
            let other = fate.got.map(|got| &there.packets[direction.got[got]]);
            let between = other.and_then(|o| o.came).map(|came| {
                let raw = came.at as i64 - left.at as i64;
                raw - self.shift(direction)
            });
            let outcome = match (fate.got, fate.missing) {
                (Some(_), 0) => Outcome::Arrived,
                (Some(_), missing) => Outcome::Partly(missing),
                (None, _) => self.missing(direction, packet, left.at),
            };
            Some(Way {
                here: packet,
                there: other,
                outcome,
                alike: fate.alike,
                between: between.filter(|_| fate.timed && self.clock.is_some()),
            })
        })
    }

    /// A packet of which the other host has nothing.
    fn missing(&self, direction: &Direction, packet: &Packet, left: u64) -> Outcome {
        let there = &self.sides[1 - direction.from];
        let known = direction.flows.contains_key(&packet.wire.flow())
            || self.addresses[1 - direction.from].contains(&packet.wire.tuple.daddr);
        if !known {
            return Outcome::Elsewhere;
        }
        // When it would have come, at the latest that was seen.
        let earliest = left as i64 + self.shift(direction);
        let latest = earliest + direction.most - direction.least.unwrap_or(0);
        let recorded = there.first as i64..there.last as i64;
        match recorded.contains(&earliest) && latest < recorded.end {
            true => Outcome::Lost,
            false => Outcome::Unknown,
        }
    }

    /// What the other host calls the flow.
    pub fn other_flow(&self, direction: &Direction, flow: &Flow) -> Option<Flow> {
        direction.flows.get(flow).copied()
    }
}

impl Direction {
    fn new(from: usize, here: &Side, there: &Side) -> Self {
        let mut sent: Vec<(usize, End)> = ends(here, |p| p.left.map(|pass| pass.at));
        let mut got: Vec<(usize, End)> = ends(there, |p| p.came.map(|pass| pass.at));
        for list in [&mut sent, &mut got] {
            list.sort_by_key(|(_, end)| end.at);
        }
        let wires = |list: &[(usize, End)]| list.iter().map(|(_, end)| *end).collect::<Vec<_>>();
        let (fates, flows) = matching::pair(&wires(&sent), &wires(&got));
        let timed = fates.iter().zip(&sent).filter(|(fate, _)| fate.timed);
        let differences = timed.filter_map(|(fate, (_, end))| {
            let at = got[fate.got?].1.at;
            Some(at as i64 - end.at as i64)
        });
        let (mut least, mut most) = (None, 0);
        for difference in differences {
            most = if least.is_none() {
                difference
            } else {
                most.max(difference)
            };
            least = Some(least.map_or(difference, |least: i64| least.min(difference)));
        }
        Self {
            from,
            sent: sent.iter().map(|(index, _)| *index).zip(fates).collect(),
            got: got.iter().map(|(index, _)| *index).collect(),
            flows,
            least,
            most,
        }
    }
}

fn ends(side: &Side, at: impl Fn(&Packet) -> Option<u64>) -> Vec<(usize, End)> {
    let packets = side.packets.iter().enumerate();
    packets
        .filter_map(|(index, packet)| {
            let end = End {
                at: at(packet)?,
                wire: packet.wire,
            };
            Some((index, end))
        })
        .collect()
}

/// Addresses that are the host's own: it sends from them what never came to it, and what comes for them goes nowhere else.
fn own(side: &Side) -> FxHashSet<IpAddr> {
    let mut own = FxHashSet::default();
    for packet in &side.packets {
        let t = &packet.wire.tuple;
        match (&packet.came, &packet.left) {
            (None, Some(_)) => own.insert(t.saddr),
            (Some(_), None) if packet.dropped.is_none() => own.insert(t.daddr),
            _ => false,
        };
    }
    own.retain(|address| !address.is_multicast() && !address.is_unspecified());
    own
}
