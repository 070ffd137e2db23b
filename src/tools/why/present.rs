//! The blocks of `netprobe why`: what became of packets, in words; and the same as JSON.

use std::io::Write;

use anyhow::Result;
use nix::errno::Errno;
use serde::Serialize;

use crate::bpf::skb::types::skb_change;
use crate::explain::Rules;
use crate::kernel::clock::WallClock;
use crate::kernel::process::Process;
use crate::run::Flow;
use crate::run::loss::Loss;
use crate::run::output::Output;
use crate::text::json;
use crate::tools::skb::columns::ct::Entry;
use crate::tools::skb::netfilter::{Nft, Who};

use super::changes::{Change, Changes, Kind};
use super::dropped::Dropped;
use super::ends::End;
use super::file::{Answer, File};
use super::fold::{Group, Totals};
use super::journey::{Journey, Leg, Step};
use super::names::Names;
use super::proof::{self, Case, Proof};
use super::sum;

/// Shows groups of journeys.
pub struct Presenter {
    details: bool,
    json: bool,
    rules: Rules,
    /// monotonic, ns: times count from here
    start: u64,
    changes: Changes,
}

/// All that is said of a group.
struct Said<'a> {
    group: &'a Group,
    dropped: Option<&'a Dropped>,
    change: Option<&'a Change>,
    proofs: Vec<Proof>,
    /// of the rules of the stages
    rules: Vec<Option<String>>,
    netns: String,
    /// of the end, where it is another than that of the start
    end_netns: Option<String>,
}

impl Presenter {
    pub fn new(details: bool, json: bool, rules: Rules, start: u64) -> Self {
        Self {
            details,
            json,
            rules,
            start,
            changes: Changes::default(),
        }
    }

    /// A change of the network, as a line.
    pub fn change_text(&mut self, change: &skb_change, names: &mut Names) -> Option<String> {
        let change = self.changes.event(change)?;
        let at = seconds(change.at.saturating_sub(self.start));
        let netns = names.netns(change.netns);
        let (comm, pid, what) = (&change.comm, change.pid, &change.what);
        Some(format!(
            "changed at {at}   {comm}[{pid}]   netns {netns}   {what}"
        ))
    }

    pub fn change(&mut self, to: To<'_>, change: &skb_change, names: &mut Names) -> Result<Flow> {
        let Some(text) = self.change_text(change, names) else {
            return Ok(Flow::Continue);
        };
        let row = self.changes.last().map(|c| ChangeRow::new(c, self.start));
        give(to, &text, row.as_ref())
    }

    /// The last change before the first of these losses, in a namespace that the packet came through.
    fn change_before(&self, group: &Group, dropped: Option<&Dropped>) -> Option<&Change> {
        if group.verdict.end.is_good() {
            return None;
        }
        let journey = &group.journey;
        let steps = journey.steps.iter().map(|s| s.netns);
        let end = dropped.and_then(|d| d.meta.as_ref()).map(|m| m.netns);
        let places: Vec<u32> = steps.chain(end).chain([journey.netns]).collect();
        let rule = dropped.and_then(|d| match &d.who {
            Some(Who::Nft(nft)) => Some(nft),
            _ => None,
        });
        let first = group.times.first().copied().unwrap_or(journey.first);
        self.changes.before(first, &places, rule)
    }

    pub fn group(&self, to: To<'_>, group: &Group, names: &mut Names) -> Result<Flow> {
        let said = self.say(group, names, to.1.is_some());
        let text = match to.0.json() && to.1.is_none() {
            true => String::new(),
            false => self.said_text(&said, names),
        };
        give(to, &text, Some(&self.row(&said)))
    }

    /// A group as text.
    pub fn block(
        &self,
        file: Option<&mut File>,
        group: &Group,
        names: &mut Names,
    ) -> Result<String> {
        let said = self.say(group, names, file.is_some());
        let text = self.said_text(&said, names);
        if let Some(file) = file {
            file.answer(&recorded(true, &text, Some(&self.row(&said)))?)?;
        }
        Ok(text)
    }

    fn said_text(&self, said: &Said<'_>, names: &mut Names) -> String {
        let mut text = Vec::new();
        self.text(&mut text, said, names);
        String::from_utf8_lossy(text.trim_ascii_end()).into_owned()
    }

    /// `recorded`: as text and as JSON.
    fn say<'a>(&'a self, group: &'a Group, names: &mut Names, recorded: bool) -> Said<'a> {
        let (journey, verdict) = (&group.journey, &group.verdict);
        let leg = journey.legs.get(&verdict.leg);
        let dropped = leg.and_then(|l| l.dropped.as_deref());
        let mut proofs = Vec::new();
        if !verdict.end.is_good() {
            if let Some(case) = Case::new(journey, verdict) {
                for question in self.questions(group) {
                    proofs.extend(proof::ask(question, &case));
                }
            }
        }
        let good = verdict.end.is_good();
        let rules = match good && !self.details && !self.json && !recorded {
            true => Vec::new(),
            false => rule_texts(journey, names),
        };
        let at_end = dropped.and_then(|d| d.meta.as_ref()).map_or(0, |m| m.netns);
        let at_end = match at_end {
            0 => leg.map_or(0, |l| l.netns),
            netns => netns,
        };
        let elsewhere = at_end != 0 && at_end != journey.netns;
        Said {
            group,
            dropped,
            change: self.change_before(group, dropped),
            proofs,
            rules,
            netns: names.netns(journey.netns),
            end_netns: elsewhere.then(|| names.netns(at_end)),
        }
    }

    /// What to ask about: by the rule of a drop; of a packet that waits, by where it does.
    fn questions(&self, group: &Group) -> Vec<crate::explain::Question> {
        use crate::explain::Question;
        if let Some(meaning) = &group.verdict.meaning {
            return self.rules.questions(meaning).to_vec();
        }
        let leg = group.journey.legs.get(&group.verdict.leg);
        match leg.and_then(|l| l.stage).map(|s| &*s.stage) {
            Some("neighbour") => vec![Question::Neighbour],
            _ => Vec::new(),
        }
    }

    fn text(&self, text: &mut Vec<u8>, said: &Said<'_>, names: &mut Names) {
        let journey = &said.group.journey;
        self.head(text, said);
        let good = said.group.verdict.end.is_good();
        if good && !self.details {
            return;
        }
        let mut netns = journey.netns;
        if let Some(sender) = &journey.sender {
            let _ = writeln!(text, "      0.000 ms  {:<12}sent by {sender}", "socket");
        }
        let rules = said.rules.iter().map(Option::as_deref);
        for (step, rule) in journey.steps.iter().zip(rules) {
            push_step(text, (journey, step), rule, &mut netns, names);
        }
        if journey.cut > 0 {
            let _ = writeln!(text, "  ... and {} stages more", journey.cut);
        }
        if !good {
            self.end(text, said);
        }
    }

    fn head(&self, text: &mut Vec<u8>, said: &Said<'_>) {
        let Group {
            journey,
            verdict,
            count,
            times,
            longest,
            ..
        } = said.group;
        let _ = write!(text, "{}", journey.line());
        if let Some(sender) = &journey.sender {
            let _ = write!(text, "   {sender}");
        }
        let _ = write!(text, "   netns {}   {}", said.netns, verdict.end.word());
        if verdict.end.is_good() {
            let _ = write!(text, " {}", verdict.what);
            if let Some(receiver) = &journey.receiver {
                if verdict.end == End::Delivered {
                    let _ = write!(text, " of {receiver}");
                }
            }
            if let Some(netns) = &said.end_netns {
                let _ = write!(text, " in netns {netns}");
            }
            let _ = write!(text, ", {}", ms(*longest));
        }
        if *count > 1 {
            let seconds = times.iter().map(|t| seconds(t.saturating_sub(self.start)));
            let seconds: Vec<String> = seconds.collect();
            let more = if (times.len() as u64) < *count {
                ", ..."
            } else {
                ""
            };
            let _ = write!(text, ", {count} times ({}{more})", seconds.join(", "));
        }
        if journey.incomplete {
            text.extend_from_slice(b", as far as it was seen");
        }
        text.push(b'\n');
    }

    fn end(&self, text: &mut Vec<u8>, said: &Said<'_>) {
        let verdict = &said.group.verdict;
        let leg = said.group.journey.legs.get(&verdict.leg);
        match (verdict.end, said.dropped) {
            (End::Here, _) => {
                let _ = writeln!(text, "  waits     {}", verdict.what);
            }
            (_, Some(dropped)) => {
                if let Some(how) = leg.and_then(|l| answer(l, dropped)) {
                    let _ = writeln!(text, "  rejected  with {how}");
                }
                let _ = writeln!(text, "  dropped   {} ({})", verdict.what, said.place());
            }
            (End::Lost, None) => {
                let stage = leg.and_then(|l| l.stage).map_or("", |s| &s.stage);
                let _ = writeln!(text, "  ignored   {} (at the stage {stage})", verdict.what);
            }
            (_, None) => {
                let _ = writeln!(text, "  unknown   {}", verdict.what);
            }
        }
        if let Some(netns) = &said.end_netns {
            let _ = writeln!(text, "  where     in netns {netns}");
        }
        for proof in &said.proofs {
            let now = if proof.now { "now: " } else { "" };
            let _ = writeln!(text, "  proof     {now}{}", proof.text);
        }
        if let Some(change) = said.change {
            let journey = &said.group.journey;
            let before = journey.first.saturating_sub(change.at);
            let (comm, pid, what) = (&change.comm, change.pid, &change.what);
            let _ = writeln!(
                text,
                "  changed   {} before: {comm}[{pid}] {what}",
                seconds(before)
            );
        }
        for change in said.changes() {
            let _ = writeln!(text, "  to change {change}");
        }
    }

    /// The last line: what became of all packets, and what was missed.
    pub fn totals(&self, to: To<'_>, totals: &Totals, loss: &Loss) -> Result<()> {
        let (out, file) = to;
        let text = sum::text(totals, loss);
        let row = sum::Row::new(totals, loss);
        if let Some(file) = file {
            file.answer(&recorded(false, &text, Some(&row))?)?;
        }
        match out.json() {
            true => out.json_line(&row),
            false => out.line(|b| b.extend_from_slice(text.as_bytes())),
        }
    }
}

/// Where answers go: printed in one form, recorded in both.
pub type To<'a> = (&'a mut Output, Option<&'a mut File>);

fn recorded(event: bool, text: &str, row: Option<&impl Serialize>) -> Result<Answer> {
    let mut bytes = Vec::new();
    row.map_or(Ok(()), |row| json::push(&mut bytes, row))?;
    Ok(Answer {
        event,
        text: text.to_owned(),
        json: String::from_utf8_lossy(&bytes).into_owned(),
    })
}

fn give((out, file): To<'_>, text: &str, row: Option<&impl Serialize>) -> Result<Flow> {
    if let Some(file) = file {
        file.answer(&recorded(true, text, row)?)?;
    }
    match (out.json(), row) {
        (true, Some(row)) => out.json_event(row),
        (true, None) => Ok(Flow::Continue),
        (false, _) => out.event(|b| b.extend_from_slice(text.as_bytes())),
    }
}

fn ms(ns: u64) -> String {
    format!("{}.{:03} ms", ns / 1_000_000, ns / 1000 % 1000)
}

fn seconds(ns: u64) -> String {
    format!("{:.3} s", ns as f64 / 1e9)
}

/// The texts of the rules that the stages name.
fn rule_texts(journey: &Journey, names: &mut Names) -> Vec<Option<String>> {
    let steps = journey.steps.iter();
    let texts = steps.map(|s| names.rules.of(s.netns, s.nft.as_ref()?));
    texts.collect()
}

fn push_step(
    text: &mut Vec<u8>,
    (journey, step): (&Journey, &Step),
    rule: Option<&str>,
    netns: &mut u32,
    names: &mut Names,
) {
    let at = ms(step.at.saturating_sub(journey.first));
    let _ = write!(text, "  {at:>12}  {:<12}{}", step.stage, step.fact);
    if step.fact.is_empty() && !step.device.is_empty() {
        let _ = write!(text, "dev {}", step.device);
    }
    if let Some(rule) = rule {
        let _ = write!(text, " (now: {rule})");
    }
    if step.netns != *netns && step.netns != 0 {
        let _ = write!(text, " (now in netns {})", names.netns(step.netns));
        *netns = step.netns;
    }
    while text.last() == Some(&b' ') {
        text.pop();
    }
    text.push(b'\n');
}

/// How the sender was told.
fn answer(leg: &Leg, dropped: &Dropped) -> Option<String> {
    let v6 = dropped.tuple.is_some_and(|t| t.saddr.is_ipv6());
    if let Some((kind, code)) = leg.icmp {
        return Some(icmp_name(v6, kind, code));
    }
    if let Some(errno) = leg.errno {
        return Some(format!(
            "the error {}: no packet was made",
            Errno::from_raw(errno)
        ));
    }
    leg.reset.then(|| "a TCP reset (RST)".to_owned())
}

fn icmp_name(v6: bool, kind: u8, code: u8) -> String {
    let name = match (v6, kind, code) {
        (false, 3, 0) => "net unreachable",
        (false, 3, 1) => "host unreachable",
        (false, 3, 2) => "protocol unreachable",
        (false, 3, 3) | (true, 1, 4) => "port unreachable",
        (false, 3, 4) => "fragmentation needed",
        (false, 3, 9 | 10 | 13) | (true, 1, 1) => "administratively prohibited",
        (false, 11, 0) | (true, 3, 0) => "time exceeded",
        (_, 11, 1) | (true, 3, 1) => "reassembly time exceeded",
        (true, 1, 0) => "no route",
        (true, 1, 3) => "address unreachable",
        (true, 2, _) => "packet too big",
        _ => return format!("ICMP type {kind} code {code}"),
    };
    format!("ICMP {name} (type {kind} code {code})")
}

/// The rule or the function that decided.
fn decider(who: &Who) -> Option<String> {
    let text = who.to_string();
    (*who != Who::Unknown).then(|| text.trim_matches(['[', ']']).to_owned())
}

impl Said<'_> {
    /// `NO_SOCKET in __udp4_lib_rcv, dev veth0`
    fn place(&self) -> String {
        let Some(dropped) = self.dropped else {
            return String::new();
        };
        dropped.decided()
    }

    /// What to do: what a proof names, else what the rule says.
    fn changes(&self) -> Vec<String> {
        let named: Vec<String> = self
            .proofs
            .iter()
            .filter_map(|p| p.change.clone())
            .collect();
        let rule = self
            .group
            .verdict
            .meaning
            .as_ref()
            .map(|m| self.filled(&m.change));
        match named.is_empty() {
            true => rule.into_iter().filter(|c| !c.is_empty()).collect(),
            false => named,
        }
    }

    /// What a rule says to change, with this packet's device and addresses.
    fn filled(&self, change: &str) -> String {
        let tuple = self.dropped.and_then(|d| d.tuple);
        let meta = self.dropped.and_then(|d| d.meta.as_ref());
        let device = meta.map(|m| crate::text::escape::escaped(&m.ifname));
        let of = |word: &str| match word {
            "DEV" => device.clone().filter(|d| !d.is_empty()),
            "SRC" => tuple.map(|t| t.saddr.to_string()),
            "DST" => tuple.map(|t| t.daddr.to_string()),
            _ => None,
        };
        let is_word = |c: char| c.is_alphanumeric();
        let mut filled = String::new();
        for part in change.split_inclusive(|c: char| !is_word(c)) {
            let word = part.trim_end_matches(|c: char| !is_word(c));
            match of(word) {
                Some(value) => filled += &format!("{value}{}", &part[word.len()..]),
                None => filled += part,
            }
        }
        filled
    }

    fn answer(&self) -> Option<String> {
        let leg = self.group.journey.legs.get(&self.group.verdict.leg)?;
        answer(leg, self.dropped?)
    }
}

/// A change of the network.
#[derive(Serialize)]
struct ChangeRow<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    seconds: f64,
    netns: u32,
    pid: u32,
    comm: &'a str,
    of: Kind,
    what: &'a str,
}

impl<'a> ChangeRow<'a> {
    fn new(change: &'a Change, start: u64) -> Self {
        Self {
            kind: "change",
            seconds: change.at.saturating_sub(start) as f64 / 1e9,
            netns: change.netns,
            pid: change.pid,
            comm: &change.comm,
            of: change.kind,
            what: &change.what,
        }
    }
}

#[derive(Serialize)]
struct ProcessRow<'a> {
    pid: u32,
    comm: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    container: Option<&'a str>,
}

fn process(p: &Option<Process>) -> Option<ProcessRow<'_>> {
    p.as_ref().map(|p| ProcessRow {
        pid: p.pid,
        comm: &p.comm,
        container: p.container.as_deref(),
    })
}

#[derive(Serialize)]
struct StepRow<'a> {
    us: f64,
    stage: &'a str,
    device: &'a str,
    netns: u32,
    fact: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    nft: Option<&'a Nft>,
    /// the rule's text now
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ct: Option<&'a Entry>,
}

#[derive(Serialize)]
struct DropRow<'a> {
    rule: &'a str,
    class: &'a str,
    what: &'a str,
    /// the kernel's; empty where it gives none
    reason: &'a str,
    place: &'a str,
    offset: u64,
    device: String,
    netns: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    rejected_with: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nft: Option<&'a Nft>,
    #[serde(skip_serializing_if = "Option::is_none")]
    netfilter: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hook: Option<&'a str>,
}

#[derive(Serialize)]
struct Row<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    packet: String,
    proto: Option<u8>,
    source: Option<String>,
    destination: Option<String>,
    sport: Option<u16>,
    dport: Option<u16>,
    netns: u32,
    netns_name: &'a str,
    end: End,
    what: &'a str,
    count: u64,
    seconds: Vec<f64>,
    longest_us: f64,
    /// events were lost meanwhile: stages and the end may be missing
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    incomplete: bool,
    sender: Option<ProcessRow<'a>>,
    receiver: Option<ProcessRow<'a>>,
    stages: Vec<StepRow<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    drop: Option<DropRow<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    change_before: Option<ChangeRow<'a>>,
    /// of the first of them, since 1970
    #[serde(skip_serializing_if = "Option::is_none")]
    wall_ns: Option<u64>,
    proof: &'a [Proof],
    change: Vec<String>,
}

impl Presenter {
    fn row<'a>(&self, said: &'a Said<'_>) -> Row<'a> {
        let Group {
            journey, verdict, ..
        } = said.group;
        let tuple = journey.tuple;
        let ports = tuple.filter(|t| t.has_ports());
        let us = |ns: u64| ns as f64 / 1000.0;
        let step = |(s, rule): (&'a Step, &'a Option<String>)| StepRow {
            us: us(s.at.saturating_sub(journey.first)),
            stage: s.stage,
            device: &s.device,
            netns: s.netns,
            fact: &s.fact,
            nft: s.nft.as_ref(),
            rule: rule.as_deref(),
            ct: s.ct.as_deref(),
        };
        let start = self.start;
        Row {
            kind: "packet",
            packet: journey.line(),
            proto: tuple.map(|t| t.proto),
            source: tuple.map(|t| t.saddr.to_string()),
            destination: tuple.map(|t| t.daddr.to_string()),
            sport: ports.map(|t| t.sport),
            dport: ports.map(|t| t.dport),
            netns: journey.netns,
            netns_name: &said.netns,
            end: verdict.end,
            what: &verdict.what,
            count: said.group.count,
            seconds: said
                .group
                .times
                .iter()
                .map(|t| t.saturating_sub(start) as f64 / 1e9)
                .collect(),
            longest_us: us(said.group.longest),
            incomplete: journey.incomplete,
            sender: process(&journey.sender),
            receiver: process(&journey.receiver),
            stages: journey.steps.iter().zip(&said.rules).map(step).collect(),
            drop: said.dropped.and_then(|d| said.drop_row(d)),
            change_before: said.change.map(|c| ChangeRow::new(c, start)),
            wall_ns: WallClock::new().map(|c| c.wall(journey.first)).ok(),
            proof: &said.proofs,
            change: if verdict.end.is_good() {
                Vec::new()
            } else {
                said.changes()
            },
        }
    }
}

impl Said<'_> {
    fn drop_row<'a>(&'a self, dropped: &'a Dropped) -> Option<DropRow<'a>> {
        let meaning = self.group.verdict.meaning.as_ref()?;
        let meta = dropped.meta.as_ref();
        let nft = match &dropped.who {
            Some(Who::Nft(nft)) => Some(nft),
            _ => None,
        };
        let other = dropped.who.as_ref().filter(|_| nft.is_none());
        Some(DropRow {
            rule: meaning.rule(),
            class: &meaning.class,
            what: &meaning.what,
            reason: &dropped.reason,
            place: &dropped.place.function,
            offset: dropped.place.offset,
            device: meta.map_or_else(String::new, |m| crate::text::escape::escaped(&m.ifname)),
            netns: meta.map_or(0, |m| m.netns),
            rejected_with: self.answer(),
            nft,
            netfilter: other.and_then(decider),
            hook: dropped.hook,
        })
    }
}
