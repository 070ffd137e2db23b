//! The last line of a run: what became of all packets, and what of them was missed.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::run::loss::Loss;

use super::ends::End;
use super::fold::Totals;

/// What became of all packets, and what was missed, in words.
pub fn text(totals: &Totals, loss: &Loss) -> String {
    let (packets, flows) = (
        plural(totals.packets, "packet"),
        plural(totals.flows() as u64, "flow"),
    );
    let mut parts: Vec<String> = Vec::new();
    for (end, count) in &totals.ends {
        let causes = totals.causes.iter().filter(|((e, _), _)| e == end);
        let causes: Vec<String> = causes.map(|((_, what), n)| format!("{what} {n}")).collect();
        let causes = match causes.is_empty() {
            true => String::new(),
            false => format!(" ({})", causes.join(", ")),
        };
        parts.push(format!("{count} {}{causes}", end.counted()));
    }
    let colon = if parts.is_empty() { "" } else { ": " };
    let missed = match missed(totals, loss) {
        false => "Nothing was missed.".to_owned(),
        true => missing(totals),
    };
    format!("{packets} in {flows}{colon}{}. {missed}", parts.join(", "))
}

/// Of which packets something is missing.
fn missing(totals: &Totals) -> String {
    let all = [
        (totals.incomplete, "seen in part"),
        (totals.unseen, "not seen at all"),
        (totals.cut, "followed to no end"),
    ];
    let parts = all.iter().filter(|(n, _)| *n > 0);
    let parts: Vec<String> = parts
        .map(|(n, what)| format!("{} {what}", plural(*n, "packet")))
        .collect();
    match parts.is_empty() {
        true => "Something was missed: see stderr.".to_owned(),
        false => format!("Something was missed: {} (see stderr).", parts.join(", ")),
    }
}

fn missed(totals: &Totals, loss: &Loss) -> bool {
    loss.any() || totals.cut > 0
}

fn plural(count: u64, noun: &str) -> String {
    match count {
        1 => format!("1 {noun}"),
        n => format!("{n} {noun}s"),
    }
}

#[derive(Serialize)]
pub struct Row<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    packets: u64,
    flows: usize,
    ends: &'a BTreeMap<End, u64>,
    missed: bool,
    incomplete: u64,
    unseen: u64,
    cut: u64,
}

impl<'a> Row<'a> {
    pub fn new(totals: &'a Totals, loss: &Loss) -> Self {
        Self {
            kind: "summary",
            packets: totals.packets,
            flows: totals.flows(),
            ends: &totals.ends,
            missed: missed(totals, loss),
            incomplete: totals.incomplete,
            unseen: totals.unseen,
            cut: totals.cut,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_that_were_missed_are_counted() {
        let mut totals = Totals::default();
        let nothing = Loss::default();
        assert_eq!(
            text(&totals, &nothing),
            "0 packets in 0 flows. Nothing was missed."
        );
        let lost = Loss {
            lost: 7,
            ..Loss::default()
        };
        assert!(text(&totals, &lost).ends_with("Something was missed: see stderr."));
        (totals.incomplete, totals.unseen) = (1, 3);
        assert!(text(&totals, &lost).ends_with(
            "Something was missed: 1 packet seen in part, 3 packets not seen at all (see stderr)."
        ));
    }
}
