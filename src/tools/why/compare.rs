//! --compare: where the ways of two kinds of packets part first. Of each kind the way that most packets took counts; of TCP, packets
//! with the same flags are compared.

use anyhow::Result;
use rustc_hash::FxHashMap;
use serde::Serialize;

use crate::filter::expr::{Compiled, SNAPLEN};
use crate::run::output::Output;
use crate::tools::skb::capture::Frame;
use crate::tools::skb::netfilter::Nft;
use crate::usage::usage;

use super::ends::{End, Verdict};
use super::hops::{Changed, DROP, Deed, Hop};
use super::journey::Journey;
use super::names::Names;

/// Ways of a kind that are told apart.
const WAYS: usize = 4096;

/// Packets that can be compared: protocol, TCP's flags, ICMP's type.
type Class = (u8, u8, u8);

/// A way, and what became of the packets that took it.
struct Way {
    hops: Vec<Hop>,
    end: End,
    what: String,
    count: u64,
}

/// A kind of packets.
struct Kind {
    text: String,
    filter: Compiled,
    packets: u64,
    ways: FxHashMap<Class, Vec<Way>>,
}

/// Two kinds of packets and their ways.
pub struct Comparison {
    kinds: [Kind; 2],
    /// classes in the order in which they were seen
    classes: Vec<Class>,
    /// packets that are of both kinds
    both: u64,
}

impl Kind {
    fn new(text: &str) -> Result<Self> {
        Ok(Self {
            text: text.to_owned(),
            filter: Compiled::new(text).map_err(|e| usage(format!("{e:#}")))?,
            packets: 0,
            ways: FxHashMap::default(),
        })
    }

    fn add(&mut self, class: Class, way: Way) {
        self.packets += 1;
        let ways = self.ways.entry(class).or_default();
        let alike = |w: &Way| w.end == way.end && parting(&w.hops, &way.hops).is_none();
        match ways.iter().position(alike) {
            Some(known) => ways[known].count += 1,
            None if ways.len() < WAYS => ways.push(way),
            None => {}
        }
    }

    /// The way that most packets of a class took, and how many there are.
    fn usual(&self, class: Class) -> Option<(&Way, u64)> {
        let ways = self.ways.get(&class)?;
        let all = ways.iter().map(|w| w.count).sum();
        // The first of those with the same count.
        let most = ways.iter().rev().max_by_key(|w| w.count)?;
        Some((most, all))
    }
}

/// The first hop at which two ways differ.
fn parting(first: &[Hop], second: &[Hop]) -> Option<usize> {
    let common = first.iter().zip(second).take_while(|(a, b)| same(a, b));
    let common = common.count();
    (common < first.len() || common < second.len()).then_some(common)
}

fn same(a: &Hop, b: &Hop) -> bool {
    same_place(a, b) && differences(a, b).is_empty()
}

fn same_place(a: &Hop, b: &Hop) -> bool {
    (&a.function, a.stage, &a.device, a.netns) == (&b.function, b.stage, &b.device, b.netns)
}

/// What differs at a place that both reached.
fn differences(a: &Hop, b: &Hop) -> Vec<&'static str> {
    let mut found = Vec::new();
    let mut add = |is: bool, what| {
        if is {
            found.push(what);
        }
    };
    add(a.rules != b.rules, "rule");
    // What was not seen is no difference.
    let returned = a.returned.zip(b.returned);
    add(returned.is_some_and(|(a, b)| a != b), "return value");
    add(a.mark != b.mark, "mark");
    add(a.changed != b.changed, "addresses");
    add(a.route != b.route, "route");
    add(a.reason != b.reason, "reason");
    found
}

impl Comparison {
    pub fn new([first, second]: [&str; 2]) -> Result<Self> {
        Ok(Self {
            kinds: [Kind::new(first)?, Kind::new(second)?],
            classes: Vec::new(),
            both: 0,
        })
    }

    pub fn add(&mut self, journey: &Journey, verdict: &Verdict) {
        let (Some(hops), Some(data)) = (
            &journey.hops,
            journey.seen.as_ref().and_then(|s| s.data.as_ref()),
        ) else {
            return;
        };
        let frame = Frame::of(data, SNAPLEN as usize);
        let is_of = |kind: &Kind| kind.filter.l2.run(&frame.bytes, frame.len) != 0;
        let index = match self.kinds.each_ref().map(is_of) {
            [true, false] => 0,
            [false, true] => 1,
            [true, true] => {
                self.both += 1;
                return;
            }
            [false, false] => return,
        };
        let tuple = journey.tuple;
        let class = tuple.map_or((0, 0, 0), |t| (t.proto, t.tcp_flags, t.icmp_type));
        if !self.classes.contains(&class) {
            self.classes.push(class);
        }
        let way = Way {
            hops: hops.way(),
            end: verdict.end,
            what: verdict.what.clone(),
            count: 1,
        };
        self.kinds[index].add(class, way);
    }

    /// The first class of packets whose ways part, else the first that both kinds have.
    fn compared(&self) -> Option<(Class, Option<usize>)> {
        let both = self.classes.iter().filter_map(|class| {
            let [a, b] = self.kinds.each_ref().map(|k| k.usual(*class));
            Some((*class, parting(&a?.0.hops, &b?.0.hops)))
        });
        let both: Vec<(Class, Option<usize>)> = both.collect();
        let parted = both.iter().find(|(_, at)| at.is_some());
        parted.or(both.first()).copied()
    }

    pub fn report(&self, out: &mut Output, names: &mut Names) -> Result<()> {
        for kind in self.kinds.iter().filter(|k| k.packets == 0) {
            eprintln!("netprobe: no packet matched '{}'", kind.text);
        }
        if self.both > 0 {
            eprintln!(
                "netprobe: {} packets matched both expressions and were not compared",
                self.both
            );
        }
        let Some(row) = self.row(names) else {
            let seen = self.kinds.iter().all(|k| k.packets > 0);
            if seen {
                eprintln!(
                    "netprobe: the two kinds have no packets that can be compared (of the same protocol and flags)"
                );
            }
            return Ok(());
        };
        match out.json() {
            true => out.json_line(&row),
            false => out.line(|b| b.extend_from_slice(row.text().trim_end().as_bytes())),
        }
    }

    fn row(&self, names: &mut Names) -> Option<Row<'_>> {
        let (class, at) = self.compared()?;
        let [first, second] = self.kinds.each_ref().map(|k| (k, k.usual(class)));
        let (a, b) = (first.1?.0, second.1?.0);
        let both = at.and_then(|i| Some((a.hops.get(i)?, b.hops.get(i)?)));
        let both = both.filter(|(a, b)| same_place(a, b));
        let by = both.map_or_else(|| vec!["next"], |(a, b)| differences(a, b));
        let place = match both {
            Some((a, _)) => Some(a),
            None => a.hops.get(at.unwrap_or(0).wrapping_sub(1)),
        };
        let common = at.unwrap_or(a.hops.len());
        let mut side = |(kind, usual): (&'_ Kind, Option<(&'_ Way, u64)>)| -> Option<Side> {
            let (way, packets) = usual?;
            Some(Side {
                expression: kind.text.clone(),
                packets,
                like_this: way.count,
                end: way.end,
                what: way.what.clone(),
                is: at.map_or_else(Vec::new, |i| {
                    by.iter().map(|what| value(what, way, i, names)).collect()
                }),
            })
        };
        let (first, second) = (side(first)?, side(second)?);
        Some(Row {
            kind: "compare",
            class: class_name(class),
            same: at.is_none(),
            common: common as u64,
            stage: place.map(|h| h.stage.to_owned()),
            function: place.map(|h| h.function.clone()),
            hook: place.and_then(|h| h.hook),
            device: place.map(|h| h.device.clone()),
            netns: place.map(|h| names.netns(h.netns)),
            by: by.clone(),
            after: both.is_none(),
            first,
            second,
        })
    }
}

/// What a kind has at hop `i` of its way.
fn value(what: &str, way: &Way, i: usize, names: &mut Names) -> String {
    let Some(hop) = way.hops.get(i) else {
        return format!("nothing more is seen: {}", way.what);
    };
    match what {
        "rule" if hop.rules.is_empty() => "no rule of nft is known".to_owned(),
        "rule" => {
            let rules = hop.rules.iter();
            let texts = rules.map(|(deed, nft)| rule(*deed, nft, hop.netns, names));
            texts.collect::<Vec<_>>().join("; ")
        }
        "return value" => hop.returned.map_or("?".to_owned(), |v| v.to_string()),
        "mark" => format!("{:#x}", hop.mark),
        "addresses" => addresses(&hop.changed),
        "route" if hop.route.is_empty() => "none".to_owned(),
        "route" => hop.route.clone(),
        "reason" => hop.reason.clone(),
        _ => next(hop),
    }
}

fn rule(deed: Deed, nft: &Nft, netns: u32, names: &mut Names) -> String {
    let chain = nft.chain.as_deref().unwrap_or("an unknown chain");
    let mut text = format!("nft {} {} {chain}", nft.family, nft.table);
    text += &match nft.handle {
        Some(handle) => format!(" handle {handle}"),
        None if nft.policy => " policy".to_owned(),
        None => ", rule unknown,".to_owned(),
    };
    text += &format!(" {}", deed.word());
    if let Some(rule) = names.rules.of(netns, nft) {
        text += &format!(" (now: {rule})");
    }
    text
}

fn addresses(changed: &Changed) -> String {
    let Changed {
        source,
        destination,
        dport,
    } = changed;
    let mut parts = Vec::new();
    parts.extend(source.map(|a| format!("source {a}")));
    parts.extend(destination.map(|a| format!("destination {a}")));
    parts.extend(dport.map(|p| format!("destination port {p}")));
    match parts.is_empty() {
        true => "not translated".to_owned(),
        false => format!("translated: {}", parts.join(", ")),
    }
}

/// Where it went on.
fn next(hop: &Hop) -> String {
    if hop.stage == DROP {
        return format!("dropped: {}", hop.reason);
    }
    let mut text = format!("{} ({})", hop.stage, hop.function);
    if !hop.device.is_empty() {
        text += &format!(" dev {}", hop.device);
    }
    if !hop.route.is_empty() {
        text += &format!(", route {}", hop.route);
    }
    if hop.mark != 0 {
        text += &format!(", mark {:#x}", hop.mark);
    }
    text
}

fn class_name((proto, flags, kind): Class) -> String {
    const FLAGS: [(u8, &str); 4] = [(2, "SYN"), (16, "ACK"), (1, "FIN"), (4, "RST")];
    match proto {
        6 => {
            let names = FLAGS.iter().filter(|(bit, _)| flags & bit != 0);
            let names: Vec<&str> = names.map(|(_, name)| *name).collect();
            format!("TCP {}", names.join(","))
        }
        17 => "UDP".to_owned(),
        1 | 58 => format!("ICMP type {kind}"),
        0 => "not IP".to_owned(),
        other => format!("IP protocol {other}"),
    }
}

/// One kind, in the answer.
#[derive(Serialize)]
struct Side {
    expression: String,
    /// that can be compared
    packets: u64,
    /// of them, those that took this way
    like_this: u64,
    end: End,
    what: String,
    /// what it has there, for each of `by`
    is: Vec<String>,
}

/// The answer.
#[derive(Serialize)]
struct Row<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    class: String,
    same: bool,
    /// functions that both ways have
    common: u64,
    stage: Option<String>,
    function: Option<String>,
    hook: Option<&'a str>,
    device: Option<String>,
    netns: Option<String>,
    /// what differs: there, or next
    by: Vec<&'static str>,
    /// the ways part behind this function, not in it
    after: bool,
    first: Side,
    second: Side,
}

impl Row<'_> {
    fn text(&self) -> String {
        let sides = [&self.first, &self.second];
        let mut text = match self.same {
            true => format!("{}: both kinds took the same way\n", self.class),
            false => format!("{}: the ways part {}\n", self.class, self.place()),
        };
        let width = sides.map(|s| s.expression.len()).into_iter().max();
        let width = width.unwrap_or(0);
        for side in sides {
            let mut head = side.expression.as_str();
            for (by, is) in self.by.iter().zip(&side.is) {
                text += &format!("  {head:width$}  {by}: {is}\n");
                head = "";
            }
            let Side {
                like_this,
                packets,
                end,
                what,
                ..
            } = side;
            let end = end.word();
            text += &format!("  {head:width$}  {like_this} of {packets} packets: {end} {what}\n");
        }
        text
    }

    fn place(&self) -> String {
        let (Some(stage), Some(function)) = (&self.stage, &self.function) else {
            return "at their beginning".to_owned();
        };
        let at = if self.after { "after" } else { "at" };
        let hook = self.hook.map_or(String::new(), |h| format!(", {h}"));
        let mut text = format!("{at} the stage {stage} ({function}{hook})");
        if let Some(device) = self.device.as_ref().filter(|d| !d.is_empty()) {
            text += &format!(", dev {device}");
        }
        if let Some(netns) = &self.netns {
            text += &format!(", netns {netns}");
        }
        text
    }
}
