//! Journeys alike in one: same kind of packet, same way, same end. A group waits a while for more of its kind, then it is shown.

use std::collections::HashSet;
use std::net::IpAddr;

use rustc_hash::FxHashMap;

use crate::event::tuple::Tuple;

use super::ends::{End, Verdict};
use super::journey::Journey;

/// Times that a group keeps.
const TIMES: usize = 8;
/// Flows that are told apart, over the whole run.
const FLOWS: usize = 65_536;
/// How long a group waits for more of its kind, ns: the first retransmission comes after a second.
const WAITS: u64 = 2_000_000_000;

/// What journeys of a group have in common.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    end: End,
    packet: String,
    way: Vec<(&'static str, String, u32)>,
    decided: String,
    incomplete: bool,
}

/// Journeys that are alike.
pub struct Group {
    pub journey: Journey,
    pub verdict: Verdict,
    pub count: u64,
    /// when the first ones began, monotonic, ns
    pub times: Vec<u64>,
    /// the longest took this, ns
    pub longest: u64,
    /// when the group is shown
    due: u64,
    number: u64,
}

/// The protocol and the ends of a conversation.
type Ends = (u8, [(IpAddr, u16); 2]);

/// Conversations. Those of the same addresses are one where a namespace is an end of both.
#[derive(Debug, Default)]
struct Flows {
    by_ends: FxHashMap<Ends, Vec<HashSet<u32>>>,
    count: usize,
}

impl Flows {
    fn add(&mut self, ends: Ends, places: HashSet<u32>) {
        if self.count >= FLOWS {
            return;
        }
        let flows = self.by_ends.entry(ends).or_default();
        let before = flows.len();
        let (same, others) = std::mem::take(flows)
            .into_iter()
            .partition::<Vec<_>, _>(|flow| !flow.is_disjoint(&places));
        *flows = others;
        flows.push(same.into_iter().fold(places, |all, flow| &all | &flow));
        self.count = self.count + flows.len() - before;
    }
}

/// What is counted over the whole run.
#[derive(Debug, Default)]
pub struct Totals {
    pub packets: u64,
    flows: Flows,
    pub ends: std::collections::BTreeMap<End, u64>,
    /// losses and rejections by what they mean
    pub causes: std::collections::BTreeMap<(End, String), u64>,
    /// rules by which packets were lost
    pub rules: HashSet<String>,
    /// events were lost while they were under way
    pub incomplete: u64,
    /// all of their events were lost
    pub unseen: u64,
    /// ended early, since there were too many at once
    pub cut: u64,
}

impl Totals {
    fn add(&mut self, journey: &Journey, verdict: &Verdict) {
        self.packets += 1;
        self.incomplete += u64::from(journey.incomplete);
        *self.ends.entry(verdict.end).or_default() += 1;
        if let Some(tuple) = journey.tuple {
            let end = journey.legs.get(&verdict.leg).map(|leg| leg.netns);
            let end = end.filter(|netns| verdict.end.is_good() && *netns != 0);
            let places = end.into_iter().chain([journey.netns]);
            self.flows.add(flow(&tuple), places.collect());
        }
        if matches!(verdict.end, End::Lost | End::Rejected) {
            let what = verdict.what.clone();
            *self.causes.entry((verdict.end, what)).or_default() += 1;
        }
        if let (End::Lost, Some(meaning)) = (verdict.end, &verdict.meaning) {
            self.rules.insert(meaning.rule().to_owned());
        }
    }

    pub fn flows(&self) -> usize {
        self.flows.count
    }

    pub fn of(&self, end: End) -> u64 {
        self.ends.get(&end).copied().unwrap_or_default()
    }
}

/// Both directions of a conversation are one flow.
fn flow(t: &Tuple) -> Ends {
    let mut ends = [(t.saddr, t.sport), (t.daddr, t.dport)];
    ends.sort_unstable();
    (t.proto, ends)
}

/// Groups that wait to be shown.
#[derive(Default)]
pub struct Groups {
    waiting: FxHashMap<Key, Group>,
    pub totals: Totals,
    next: u64,
}

impl Groups {
    pub fn add(&mut self, journey: Journey, verdict: Verdict, now: u64) {
        self.totals.add(&journey, &verdict);
        let key = key(&journey, &verdict);
        let took = journey.last.saturating_sub(journey.first);
        if let Some(group) = self.waiting.get_mut(&key) {
            group.count += 1;
            group.longest = group.longest.max(took);
            if group.times.len() < TIMES {
                group.times.push(journey.first);
            }
            return;
        }
        self.next += 1;
        let group = Group {
            times: vec![journey.first],
            journey,
            verdict,
            count: 1,
            longest: took,
            due: now + WAITS,
            number: self.next,
        };
        self.waiting.insert(key, group);
    }

    /// Those that have waited long enough, or `all`; in the order in which they began.
    pub fn due(&mut self, now: u64, all: bool) -> Vec<Group> {
        let due: Vec<Key> = self
            .waiting
            .iter()
            .filter(|(_, g)| all || g.due <= now)
            .map(|(key, _)| key.clone())
            .collect();
        let mut groups: Vec<Group> = due
            .iter()
            .filter_map(|key| self.waiting.remove(key))
            .collect();
        groups.sort_by_key(|g| (g.journey.first, g.number));
        groups
    }
}

fn key(journey: &Journey, verdict: &Verdict) -> Key {
    let good = verdict.end.is_good();
    let packet = journey
        .tuple
        .map_or_else(|| journey.line(), |t| packet(&t, good));
    let steps = journey.steps.iter();
    // Of packets that got where they should the end alone matters.
    let way = match good {
        true => Vec::new(),
        false => steps
            .map(|s| (s.stage, s.device.clone(), s.netns))
            .collect(),
    };
    let dropped = journey
        .legs
        .get(&verdict.leg)
        .and_then(|l| l.dropped.as_ref());
    let decided = dropped.map_or_else(
        || verdict.what.clone(),
        |d| format!("{} {} {:?}", d.reason, d.place.function, d.who),
    );
    Key {
        end: verdict.end,
        packet,
        way,
        decided,
        incomplete: journey.incomplete,
    }
}

/// The kind of packet: the port of its client, which is another each time, is left out.
fn packet(t: &Tuple, good: bool) -> String {
    let service = match (t.sport, t.dport) {
        (from, to) if from < to => format!("from {from}"),
        (_, to) => format!("to {to}"),
    };
    let flags = if good { 0 } else { t.tcp_flags };
    format!(
        "{} {} {} {service} {flags} {}",
        t.proto, t.saddr, t.daddr, t.icmp_type
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_of_the_same_addresses_in_several_namespaces() {
        let end = |a: &str, port: u16| (a.parse().unwrap(), port);
        let ends = (6, [end("10.0.0.1", 4000), end("10.0.0.2", 80)]);
        let mut flows = Flows::default();
        let mut add = |places: &[u32]| {
            flows.add(ends, places.iter().copied().collect());
            flows.count
        };
        assert_eq!(add(&[1, 2]), 1);
        assert_eq!(add(&[2, 1]), 1, "the answer");
        assert_eq!(add(&[3]), 2, "another container's");
        assert_eq!(add(&[4]), 3);
        assert_eq!(add(&[4, 3]), 2, "its two directions");
    }
}
