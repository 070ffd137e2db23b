//! Counts: events, packets, drops by kind, functions.

use std::collections::BTreeMap;

use anyhow::Result;
use rustc_hash::FxHashSet;
use serde::Serialize;

use crate::run::Flow;
use crate::run::loss::Loss;
use crate::run::output::Output;
use crate::text::escape::printable;
use crate::tools::skb::event::Event;
use crate::tools::skb::flight::Triggered;
use crate::tools::skb::record::{Head, identity};
use crate::tools::skb::recorded::Recorded;

use super::show::Show;

/// The most packets that are told apart, and kinds of anything.
const PACKETS: usize = 4 << 20;
const KINDS: usize = 16_384;

/// A kind of drop.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Drop {
    reason: Option<String>,
    at: String,
}

#[derive(Default)]
struct Counts {
    recorded: String,
    events: u64,
    packets: FxHashSet<u64>,
    late: u64,
    first: Option<u64>,
    last: u64,
    cpus: BTreeMap<u16, u64>,
    functions: BTreeMap<String, u64>,
    drops: BTreeMap<Drop, u64>,
}

/// What is known of one recording.
#[derive(Serialize)]
struct Row<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    /// by which netprobe, on which kernel, by which command
    recorded: &'a str,
    events: u64,
    /// packets that are told apart; null: more than can be
    packets: Option<usize>,
    late: u64,
    /// between the first and the last event
    ns: u64,
    cpus: &'a BTreeMap<u16, u64>,
    drops: Vec<DropRow<'a>>,
    functions: Vec<FunctionRow<'a>>,
    /// null: the recording has no end
    loss: Option<&'a Loss>,
}

#[derive(Serialize)]
struct DropRow<'a> {
    count: u64,
    #[serde(flatten)]
    drop: &'a Drop,
}

#[derive(Serialize)]
struct FunctionRow<'a> {
    count: u64,
    func: &'a str,
}

pub struct Stats {
    out: Output,
    counts: Counts,
}

impl Stats {
    pub fn new(out: Output) -> Self {
        Self {
            out,
            counts: Counts::default(),
        }
    }

    fn text(&mut self, row: &Row<'_>) -> Result<()> {
        let mut lines = vec![row.recorded.to_owned()];
        let packets = match row.packets {
            Some(0) => String::new(),
            Some(packets) => format!(" of {packets} packets"),
            None => format!(" of more than {PACKETS} packets"),
        };
        let cpus: Vec<_> = row
            .cpus
            .iter()
            .map(|(cpu, n)| format!("{cpu}: {n}"))
            .collect();
        lines.push(format!(
            "{} events{packets} in {}.{:06} s, {} late; by CPU {}",
            row.events,
            row.ns / 1_000_000_000,
            row.ns % 1_000_000_000 / 1000,
            row.late,
            cpus.join(", ")
        ));
        lines.extend(match row.loss {
            None => vec!["what was lost is not known: the recording has no end".to_owned()],
            Some(loss) if loss.any() => loss.lines(),
            Some(_) => vec!["nothing was lost".to_owned()],
        });
        if !row.drops.is_empty() {
            lines.push(format!("\n{:>10} {:<32} AT", "EVENTS", "DROP REASON"));
        }
        for d in &row.drops {
            let reason = d.drop.reason.as_deref().unwrap_or("-");
            lines.push(format!("{:>10} {reason:<32} {}", d.count, d.drop.at));
        }
        if !row.functions.is_empty() {
            lines.push(format!("\n{:>10} FUNC", "EVENTS"));
        }
        for f in &row.functions {
            lines.push(format!("{:>10} {}", f.count, f.func));
        }
        for line in lines {
            self.out.line(|b| b.extend_from_slice(line.as_bytes()))?;
        }
        Ok(())
    }
}

/// The largest first.
fn sorted<K: Ord>(counts: &BTreeMap<K, u64>) -> Vec<(&K, u64)> {
    let mut all: Vec<_> = counts.iter().map(|(key, n)| (key, *n)).collect();
    all.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
    all
}

/// The event says that its packet is lost here: a drop, or a function that frees it for a reason that is one.
pub fn is_loss(event: &Event, reason: Option<&str>) -> bool {
    let is_one = |reason: &str| !matches!(reason, "SKB_CONSUMED" | "SKB_NOT_DROPPED_YET");
    event.dropped || reason.is_some_and(is_one)
}

/// Counts one more; of kinds that are too many, none is added.
fn count<K: Ord>(counts: &mut BTreeMap<K, u64>, key: K) {
    if counts.len() < KINDS || counts.contains_key(&key) {
        *counts.entry(key).or_default() += 1;
    }
}

impl Show for Stats {
    fn begin(&mut self, _: &Recorded, head: &Head) -> Result<()> {
        let why = head.triggered.as_ref().map(Triggered::words);
        self.counts = Counts {
            recorded: printable(&format!(
                "recorded by netprobe {} on Linux {} {}: {}{}",
                head.netprobe,
                head.kernel,
                head.machine,
                head.command.join(" "),
                why.map_or(String::new(), |why| format!("; {why}"))
            )),
            ..Counts::default()
        };
        Ok(())
    }

    fn event(&mut self, of: &mut Recorded, event: &Event, late: bool) -> Result<Flow> {
        let function = of.function(event);
        let c = &mut self.counts;
        c.events += 1;
        c.late += u64::from(late);
        c.first = Some(
            c.first
                .map_or(event.head.ts, |first| first.min(event.head.ts)),
        );
        c.last = c.last.max(event.head.ts);
        count(&mut c.cpus, event.head.cpu);
        if let Some(packet) = identity(event) {
            if c.packets.len() < PACKETS {
                c.packets.insert(packet);
            }
        }
        if event.dropped {
            let reason = of.reason(event);
            let at = function;
            count(&mut c.drops, Drop { reason, at });
        } else {
            let reason = of.reason(event);
            if is_loss(event, reason.as_deref()) {
                let at = function.clone();
                count(&mut c.drops, Drop { reason, at });
            }
            count(&mut c.functions, function);
        }
        Ok(Flow::Continue)
    }

    fn end(&mut self, loss: Option<&Loss>) -> Result<()> {
        let counts = std::mem::take(&mut self.counts);
        let drops = sorted(&counts.drops).into_iter();
        let functions = sorted(&counts.functions).into_iter();
        let row = Row {
            kind: "stats",
            recorded: &counts.recorded,
            events: counts.events,
            packets: (counts.packets.len() < PACKETS).then_some(counts.packets.len()),
            late: counts.late,
            ns: counts.last - counts.first.unwrap_or(counts.last),
            cpus: &counts.cpus,
            drops: drops.map(|(drop, count)| DropRow { count, drop }).collect(),
            functions: functions
                .map(|(func, count)| FunctionRow { count, func })
                .collect(),
            loss,
        };
        match self.out.json() {
            true => self.out.json_line(&row),
            false => self.text(&row),
        }
    }

    fn flush(&mut self) -> Result<()> {
        self.out.flush()
    }
}
