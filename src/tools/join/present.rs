//! The answer of `netprobe join`, as text and as JSON.

use std::fmt::Write;

use anyhow::Result;
use rustc_hash::FxHashMap;
use serde::Serialize;

use crate::run::output::Output;
use crate::text::escape::escaped;

use super::fate::{Direction, Joined, Outcome, Way};
use super::side::{Packet, Side};
use super::wire::{Flow, Kind, Wire};

/// Delays of a flow that are kept for its median.
const DELAYS: usize = 100_000;

/// A flow in one direction.
#[derive(Default)]
struct Counts {
    sent: u64,
    arrived: u64,
    partly: u64,
    lost: u64,
    lost_bytes: u64,
    unknown: u64,
    dropped: u64,
    delays: Vec<i64>,
}

#[derive(Serialize)]
struct JoinRow<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    a: SideRow<'a>,
    b: SideRow<'a>,
    /// the clock of b minus that of a; null: not known
    offset_ns: Option<i64>,
    bound_ns: Option<i64>,
    /// packets that left a host for others than the other one
    elsewhere: u64,
}

#[derive(Serialize)]
struct SideRow<'a> {
    name: &'a str,
    recorded: &'a str,
    packets: usize,
    /// events that the recording lost; null: it has no end
    lost_events: Option<u64>,
    /// whether lost_events has the hits that the kernel skipped (it counts them from 6.7)
    counts_skipped: bool,
}

impl<'a> SideRow<'a> {
    fn new(side: &'a Side) -> Self {
        Self {
            name: &side.name,
            recorded: &side.recorded,
            packets: side.packets.len(),
            lost_events: side.lost,
            counts_skipped: side.counts_skipped,
        }
    }
}

#[derive(Serialize)]
struct FlowRow<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    from: &'a str,
    to: &'a str,
    flow: String,
    /// what the other host calls it, where that differs
    #[serde(skip_serializing_if = "Option::is_none")]
    there: Option<String>,
    sent: u64,
    arrived: u64,
    partly: u64,
    lost: u64,
    lost_bytes: u64,
    unknown: u64,
    dropped: u64,
    delay_ns: Option<[i64; 3]>,
}

#[derive(Serialize)]
struct PacketRow<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    /// when it left, from the first event of a on, by a's clock
    ns: i64,
    from: &'a str,
    to: &'a str,
    packet: String,
    left: String,
    outcome: &'static str,
    missing: u32,
    alike: bool,
    sender_ns: u64,
    between_ns: Option<i64>,
    receiver_ns: Option<u64>,
    /// where it was dropped, at the host that got it
    dropped: Option<String>,
    text: String,
}

pub fn present(out: &mut Output, joined: &Joined, all: bool) -> Result<()> {
    let mut elsewhere = 0;
    let mut flows: Vec<(usize, Flow, Counts)> = Vec::new();
    for direction in &joined.directions {
        let mut index: FxHashMap<Flow, usize> = FxHashMap::default();
        for way in joined.ways(direction) {
            if way.outcome == Outcome::Elsewhere {
                elsewhere += 1;
                continue;
            }
            let flow = way.here.wire.flow();
            let at = *index.entry(flow).or_insert_with(|| {
                flows.push((direction.from, flow, Counts::default()));
                flows.len() - 1
            });
            flows[at].2.add(&way);
        }
    }
    head(out, joined, elsewhere)?;
    flows.sort_by_key(|(_, _, c)| std::cmp::Reverse((c.lost, c.sent)));
    table(out, joined, &flows)?;
    let mut ways: Vec<(usize, Way<'_>)> = Vec::new();
    for (number, direction) in joined.directions.iter().enumerate() {
        let shown = |way: &Way<'_>| match way.outcome {
            Outcome::Elsewhere => false,
            Outcome::Arrived => all || dropped(way).is_some(),
            Outcome::Partly(_) | Outcome::Lost => true,
            Outcome::Unknown => all,
        };
        ways.extend(joined.ways(direction).filter(shown).map(|w| (number, w)));
    }
    ways.sort_by_key(|(number, way)| joined.time(*number, way.here));
    for (number, way) in &ways {
        packet(out, joined, &joined.directions[*number], way)?;
    }
    for direction in &joined.directions {
        own_drops(out, &joined.sides[direction.from])?;
    }
    Ok(())
}

impl Joined {
    /// ns from the first event of a on, by a's clock.
    fn time(&self, direction: usize, packet: &Packet) -> i64 {
        let at = packet.left.map_or(packet.first, |pass| pass.at) as i64;
        let offset = self.clock.map_or(0, |clock| clock.offset);
        let at = if direction == 0 { at } else { at - offset };
        at - self.sides[0].first as i64
    }
}

impl Counts {
    fn add(&mut self, way: &Way<'_>) {
        self.sent += 1;
        match way.outcome {
            Outcome::Arrived => self.arrived += 1,
            Outcome::Partly(missing) => {
                self.partly += 1;
                self.lost_bytes += u64::from(missing);
            }
            Outcome::Lost => {
                self.lost += 1;
                self.lost_bytes += u64::from(way.here.wire.len);
            }
            Outcome::Unknown | Outcome::Elsewhere => self.unknown += 1,
        }
        self.dropped += u64::from(dropped(way).is_some());
        if let (Some(between), true) = (way.between, self.delays.len() < DELAYS) {
            self.delays.push(between);
        }
    }

    /// The least, the median, the largest.
    fn delay(&self) -> Option<[i64; 3]> {
        let mut all = self.delays.clone();
        all.sort_unstable();
        let median = *all.get(all.len() / 2)?;
        Some([*all.first()?, median, *all.last()?])
    }
}

/// Where the host that got it dropped it.
fn dropped(way: &Way<'_>) -> Option<String> {
    let dropped = way.there?.dropped.as_ref()?;
    Some(match dropped.reason.is_empty() {
        true => format!("at {}", dropped.function),
        false => format!("{} at {}", dropped.reason, dropped.function),
    })
}

fn head(out: &mut Output, joined: &Joined, elsewhere: u64) -> Result<()> {
    let [a, b] = &joined.sides;
    if out.json() {
        return out.json_line(&JoinRow {
            kind: "join",
            a: SideRow::new(a),
            b: SideRow::new(b),
            offset_ns: joined.clock.map(|c| c.offset),
            bound_ns: joined.clock.map(|c| c.bound),
            elsewhere,
        });
    }
    let mut lines = Vec::new();
    for side in [a, b] {
        lines.push(format!(
            "{}: {} packets, {}",
            side.name,
            side.packets.len(),
            side.recorded
        ));
        lines.extend(match side.lost {
            Some(0) if side.counts_skipped => None,
            Some(0) => Some(format!(
                "{}: this kernel does not count the hits that it skips (6.7 does): packets may seem lost that were not",
                side.name
            )),
            Some(n) => Some(format!(
                "{}: its recording lost {n} events: packets may seem lost that were not",
                side.name
            )),
            None => Some(format!(
                "{}: its recording has no end: what it lost is not known",
                side.name
            )),
        });
        if side.cut > 0 {
            lines.push(format!("{}: {} packets had no room", side.name, side.cut));
        }
    }
    lines.push(clocks(joined));
    if elsewhere > 0 {
        lines.push(format!("{elsewhere} packets were for neither of them"));
    }
    for line in lines {
        out.line(|to| to.extend_from_slice(line.as_bytes()))?;
    }
    Ok(())
}

fn clocks(joined: &Joined) -> String {
    let [a, b] = &joined.sides;
    let [forth, back] = joined.directions.each_ref().map(|d| d.least);
    match (joined.clock, forth, back) {
        (Some(clock), ..) => format!(
            "clocks: {}'s is {} {} {}'s, +/- {}",
            b.name,
            ms(clock.offset.abs()),
            if clock.offset < 0 {
                "behind"
            } else {
                "ahead of"
            },
            a.name,
            ms(clock.bound)
        ),
        (None, None, None) => {
            "clocks: no packet was found at both ends, so delays are not known".to_owned()
        }
        (None, Some(_), Some(_)) => {
            "clocks: they drifted apart during the recordings, so delays are not known".to_owned()
        }
        (None, ..) => {
            "clocks: packets of both directions are needed to know delays; there are those of one"
                .to_owned()
        }
    }
}

fn table(out: &mut Output, joined: &Joined, flows: &[(usize, Flow, Counts)]) -> Result<()> {
    if !out.json() && !flows.is_empty() {
        let head = format!(
            "\n{:<17} {:>7} {:>7} {:>6} {:>7} {:>7} {:>28}  FLOW",
            "FROM -> TO",
            "SENT",
            "ARRIVED",
            "LOST",
            "DROPPED",
            "UNKNOWN",
            "DELAY MIN/MEDIAN/MAX (ms)"
        );
        out.line(|to| to.extend_from_slice(head.as_bytes()))?;
    }
    for (from, flow, c) in flows {
        let (here, there) = (&joined.sides[*from], &joined.sides[1 - *from]);
        let other = joined.other_flow(&joined.directions[*from], flow);
        let other = other.filter(|other| other != flow).map(|f| f.0.to_string());
        let delay = c.delay();
        if out.json() {
            out.json_line(&FlowRow {
                kind: "flow",
                from: &here.name,
                to: &there.name,
                flow: flow.0.to_string(),
                there: other,
                sent: c.sent,
                arrived: c.arrived,
                partly: c.partly,
                lost: c.lost,
                lost_bytes: c.lost_bytes,
                unknown: c.unknown,
                dropped: c.dropped,
                delay_ns: delay,
            })?;
            continue;
        }
        let delay = delay.map_or("-".to_owned(), |d| {
            d.map(|ns| format!("{:.3}", ns as f64 / 1e6)).join("/")
        });
        let mut line = format!(
            "{:<17} {:>7} {:>7} {:>6} {:>7} {:>7} {delay:>28}  {}",
            format!("{} -> {}", here.name, there.name),
            c.sent,
            c.arrived,
            c.lost,
            c.dropped,
            c.unknown,
            flow.0
        );
        if let Some(other) = other {
            let _ = write!(line, " = {other} at {}", there.name);
        }
        if c.partly > 0 {
            let _ = write!(line, " ({} in part)", c.partly);
        }
        out.line(|to| to.extend_from_slice(line.as_bytes()))?;
    }
    if !out.json() && !flows.is_empty() {
        out.line(|_| ())?;
    }
    Ok(())
}

fn packet(out: &mut Output, joined: &Joined, direction: &Direction, way: &Way<'_>) -> Result<()> {
    let (here, there) = (
        &joined.sides[direction.from],
        &joined.sides[1 - direction.from],
    );
    let ns = joined.time(direction.from, way.here);
    let what = named(&way.here.wire);
    let said = sentence(here, there, way);
    let left = way.here.left;
    if !out.json() {
        let line = format!("{:.6} s  {what}: {said}", ns as f64 / 1e9);
        return out.line(|to| to.extend_from_slice(line.as_bytes()));
    }
    let came = way.there.and_then(|p| Some((p.came?.at, p.last)));
    out.json_line(&PacketRow {
        kind: "packet",
        ns,
        from: &here.name,
        to: &there.name,
        packet: what,
        left: left.map_or(String::new(), |pass| escaped(&pass.device)),
        outcome: match way.outcome {
            Outcome::Arrived => "arrived",
            Outcome::Partly(_) => "partly",
            Outcome::Lost => "lost",
            Outcome::Unknown => "unknown",
            Outcome::Elsewhere => "elsewhere",
        },
        missing: match way.outcome {
            Outcome::Partly(missing) => missing,
            Outcome::Lost => way.here.wire.len,
            _ => 0,
        },
        alike: way.alike,
        sender_ns: left.map_or(0, |pass| pass.at - way.here.first.min(pass.at)),
        between_ns: way.between,
        receiver_ns: came.map(|(at, last)| last.saturating_sub(at)),
        dropped: dropped(way),
        text: said,
    })
}

/// A packet in a few words.
fn named(wire: &Wire) -> String {
    let mut text = wire.tuple.to_string();
    match (wire.kind, wire.range()) {
        (Kind::Tcp { seq, .. }, Some((_, len))) => {
            let _ = write!(text, " seq {seq}:{}", seq.wrapping_add(len));
        }
        (Kind::Tcp { ack, .. }, None) => {
            let _ = write!(text, " ack {ack}");
        }
        (Kind::Other { id, .. }, _) => {
            let _ = write!(text, " id {id} len {}", wire.len);
        }
    }
    text
}

fn sentence(here: &Side, there: &Side, way: &Way<'_>) -> String {
    let device = way
        .here
        .left
        .map_or(String::new(), |pass| escaped(&pass.device));
    let left = format!("left {}'s {device}", here.name);
    let text = match way.outcome {
        Outcome::Lost => format!("{left}, never reached {}", there.name),
        Outcome::Unknown => format!(
            "{left}; {}'s recording does not have the time when it would have come",
            there.name
        ),
        Outcome::Partly(missing) => {
            format!("{left}, {missing} bytes of it never reached {}", there.name)
        }
        Outcome::Elsewhere => left,
        Outcome::Arrived => match dropped(way) {
            Some(where_it_was) => {
                format!(
                    "{left}, reached {}, dropped there: {where_it_was}",
                    there.name
                )
            }
            None => arrived(here, there, way),
        },
    };
    match way.alike {
        true => format!("{text} (or another one that is just like it)"),
        false => text,
    }
}

/// Where the time went of a packet that arrived.
fn arrived(here: &Side, there: &Side, way: &Way<'_>) -> String {
    let (Some(left), Some(other)) = (way.here.left, way.there) else {
        return String::new();
    };
    let Some(came) = other.came else {
        return String::new();
    };
    let sender = left.at.saturating_sub(way.here.first) as i64;
    let receiver = other.last.saturating_sub(came.at) as i64;
    let Some(between) = way.between else {
        return format!(
            "{} in {}, {} in {}",
            ms(sender),
            here.name,
            ms(receiver),
            there.name
        );
    };
    let total = sender + between + receiver;
    let mut parts = vec![(between, format!("between {} and {}", here.name, there.name))];
    for (side, packet, from, until) in [
        (here, way.here, way.here.first, Some(left.at)),
        (there, other, came.at, None),
    ] {
        let stay = packet.longest_stay(from, until);
        let (stage, took) = stay.unwrap_or(("way", 0));
        let queue = if stage == "socket" {
            "socket queue"
        } else {
            stage
        };
        parts.push((took as i64, format!("in {}'s {queue}", side.name)));
    }
    let longest = parts.into_iter().max_by_key(|(took, _)| *took);
    let (took, place) = longest.unwrap_or_default();
    format!(
        "{} of {} {place} ({} in {}, {} between, {} in {})",
        number(took),
        ms(total),
        ms(sender),
        here.name,
        ms(between),
        ms(receiver),
        there.name
    )
}

/// Packets that a host dropped itself before they left.
fn own_drops(out: &mut Output, side: &Side) -> Result<()> {
    let mut counts: std::collections::BTreeMap<(&str, &str), u64> = Default::default();
    for packet in &side.packets {
        if let (Some(dropped), None, None) = (&packet.dropped, &packet.left, &packet.came) {
            let key = (dropped.reason.as_str(), dropped.function.as_str());
            *counts.entry(key).or_default() += 1;
        }
    }
    for ((reason, function), count) in counts {
        if out.json() {
            out.json_line(&OwnDropRow {
                kind: "own_drop",
                host: &side.name,
                reason,
                function,
                count,
            })?;
            continue;
        }
        let line = format!(
            "{count} packets never left {}: {reason} at {function}",
            side.name
        );
        out.line(|to| to.extend_from_slice(line.as_bytes()))?;
    }
    Ok(())
}

#[derive(Serialize)]
struct OwnDropRow<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    host: &'a str,
    reason: &'a str,
    function: &'a str,
    count: u64,
}

fn number(ns: i64) -> String {
    format!("{:.3}", ns as f64 / 1e6)
}

fn ms(ns: i64) -> String {
    format!("{} ms", number(ns))
}
