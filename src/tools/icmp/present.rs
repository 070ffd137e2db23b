//! The lines of `netprobe icmp`: the source script's columns, text columns, JSON.

use std::collections::BTreeMap;
use std::io::Write;

use anyhow::Result;
use serde::Serialize;

use crate::kernel::clock::WallClock;
use crate::kernel::drop_reason::DropReasons;
use crate::run::Flow;
use crate::run::output::Output;
use crate::text::columns::{pad, push_time_of_day, us};
use crate::text::escape::{escaped, push_escaped};

use super::answers::Answer;
use super::args::{Args, Timestamp};
use super::culprit::Culprit;
use super::decode::{Context, Event, Softirq};
use super::requests::Part;
use super::stages::{Stage, is_steered};

/// Turns answers into lines. Columns grow to what they have held, so that lines below each other line up.
pub struct Presenter {
    legacy: bool,
    sent: bool,
    stages: bool,
    /// of drops
    pub(super) reasons: DropReasons,
    timestamp: Timestamp,
    clock: WallClock,
    first_ts: Option<u64>,
    widths: Widths,
    line: Vec<u8>,
}

/// Widths of the columns that grow.
#[derive(Debug, Clone, Copy)]
struct Widths {
    comm: usize,
    saddr: usize,
    daddr: usize,
    iface: usize,
}

impl Presenter {
    pub fn new(args: &Args, reasons: DropReasons) -> Result<Self> {
        Ok(Self {
            legacy: args.legacy,
            sent: args.sent,
            reasons,
            stages: args.with_stages(),
            timestamp: args.timestamp,
            clock: WallClock::new()?,
            first_ts: None,
            widths: Widths {
                comm: 15,
                saddr: 15,
                daddr: 15,
                iface: 10,
            },
            line: Vec::new(),
        })
    }

    /// The header line of the text form.
    pub fn header(&self, out: &mut Output) -> Result<()> {
        if out.json() || self.legacy {
            return Ok(());
        }
        let w = self.widths;
        let time = match self.timestamp {
            Timestamp::None => "",
            Timestamp::Absolute => "TIME            ",
            Timestamp::Relative => "TIME(s)      ",
            Timestamp::Current => "TIME(s)          ",
        };
        let context = if self.sent { "" } else { "CONTEXT   " };
        let mut line = format!(
            "{time}{:<7} {:<7} {:<cw$} {:<3} {context}{:<sw$} {:<dw$} {:<5} {:<5} {:<iw$} {:<10} {:<5}",
            "TGID",
            "PID",
            "COMM",
            "CPU",
            "SOURCE",
            "DESTINATION",
            "ID",
            "SEQ",
            "IFACE",
            "NETNS",
            "LEN",
            cw = w.comm,
            sw = w.saddr,
            dw = w.daddr,
            iw = w.iface,
        );
        let names: Vec<&str> = if self.sent {
            Part::ALL.iter().map(|p| p.name()).collect()
        } else if self.stages {
            Stage::ALL.iter().map(|s| s.name()).collect()
        } else {
            Vec::new()
        };
        for name in &names {
            line += &format!(" {:>8}", name.to_uppercase());
        }
        if !names.is_empty() {
            line += " (us)";
        }
        out.line(|b| b.extend_from_slice(line.as_bytes()))?;
        out.flush()
    }

    /// One answer.
    pub fn answer(
        &mut self,
        out: &mut Output,
        answer: &Answer,
        culprit: Option<&Culprit>,
    ) -> Result<Flow> {
        self.begin(answer.event.head.ts)?;
        if out.json() {
            return out.json_event(&self.row(answer, culprit));
        }
        let mut line = std::mem::take(&mut self.line);
        line.clear();
        if self.legacy {
            legacy(&mut line, answer);
        } else {
            self.text(&mut line, answer);
            if let Some(culprit) = culprit {
                culprit.push_text(&mut line);
            }
        }
        let flow = out.event(|b| b.extend_from_slice(&line));
        self.line = line;
        flow
    }

    /// Before each line.
    pub(super) fn begin(&mut self, ts: u64) -> Result<()> {
        self.first_ts.get_or_insert(ts);
        self.clock.refresh()
    }

    pub(super) fn wall(&self, ts: u64) -> u64 {
        self.clock.wall(ts)
    }

    fn text(&mut self, line: &mut Vec<u8>, answer: &Answer) {
        let e = &answer.event;
        self.columns(line, e, Some(e.context));
        if self.stages {
            for stage in Stage::ALL {
                push_us(line, answer.stages.get(stage));
            }
            if is_steered(&e.times) {
                // Writes to a Vec do not fail.
                let _ = write!(line, " [from cpu {}]", e.times.queued_cpu);
            }
        }
        if answer.gap > 0 {
            let _ = write!(line, " [{} missing before]", answer.gap);
        }
        if answer.late {
            line.extend_from_slice(b" [late]");
        }
    }

    /// The columns that both sides have.
    pub(super) fn columns(&mut self, line: &mut Vec<u8>, e: &Event, context: Option<Context>) {
        self.time(line, e.head.ts);
        let _ = write!(line, "{:<7} {:<7} ", e.head.tgid, e.head.pid);
        let start = line.len();
        push_escaped(line, &e.head.comm);
        pad(line, start, &mut self.widths.comm);
        let _ = write!(line, "{:<3} ", e.head.cpu);
        if let Some(context) = context {
            let _ = write!(line, "{:<9} ", context.name());
        }
        let start = line.len();
        let _ = write!(line, "{}", e.key.saddr);
        pad(line, start, &mut self.widths.saddr);
        let start = line.len();
        let _ = write!(line, "{}", e.key.daddr);
        pad(line, start, &mut self.widths.daddr);
        let _ = write!(line, "{:<5} {:<5} ", e.key.id, e.key.seq);
        let start = line.len();
        push_escaped(line, &e.ifname);
        let _ = write!(line, ":{}", e.ifindex);
        pad(line, start, &mut self.widths.iface);
        let _ = write!(line, "{:<10} {:<5}", e.key.netns, e.len);
    }

    fn time(&self, line: &mut Vec<u8>, ts: u64) {
        let _ = match self.timestamp {
            Timestamp::None => Ok(()),
            Timestamp::Current => {
                let text = format!("{}.{:09}", ts / 1_000_000_000, ts % 1_000_000_000);
                write!(line, "{text:<16} ")
            }
            Timestamp::Relative => {
                let us = ts.saturating_sub(self.first_ts.unwrap_or(ts)) / 1000;
                let text = format!("{}.{:06}", us / 1_000_000, us % 1_000_000);
                write!(line, "{text:<12} ")
            }
            Timestamp::Absolute => {
                push_time_of_day(line, self.clock.wall(ts));
                line.push(b' ');
                Ok(())
            }
        };
    }

    fn row<'a>(&self, answer: &Answer, culprit: Option<&'a Culprit>) -> Row<'a> {
        let e = &answer.event;
        let t = &e.times;
        Row {
            kind: "echo",
            ts_ns: e.head.ts,
            wall_ns: self.clock.wall(e.head.ts),
            late: answer.late,
            tgid: e.head.tgid,
            pid: e.head.pid,
            comm: escaped(&e.head.comm),
            cpu: e.head.cpu,
            context: e.context.name(),
            saddr: e.key.saddr.to_string(),
            daddr: e.key.daddr.to_string(),
            icmp_type: e.icmp_type,
            id: e.key.id,
            seq: e.key.seq,
            gap: answer.gap,
            iface: escaped(&e.ifname),
            ifindex: e.ifindex,
            netns: e.key.netns,
            len: e.len,
            times: self.stages.then(|| TimesRow {
                queued: t.queued,
                queued_cpu: t.queued.map(|_| t.queued_cpu),
                backlog: t.backlog,
                first: is_steered(t).then(|| softirq_row(&t.first)),
                softirq: softirq_row(&t.last),
                receive: t.receive,
                echo: e.head.ts,
                reply: answer.reply,
            }),
            stages_ns: self.stages.then(|| {
                Stage::ALL
                    .iter()
                    .filter_map(|&s| answer.stages.get(s).map(|ns| (s.name(), ns)))
                    .collect()
            }),
            steered: self.stages.then(|| is_steered(t)),
            culprit,
        }
    }
}

/// A stage in its column; `-` where it was not seen.
pub(super) fn push_us(line: &mut Vec<u8>, ns: Option<u64>) {
    let value = ns.map_or_else(|| "-".into(), us);
    let _ = write!(line, " {value:>8}");
}

/// `"%-7d %-7d %-15s %s" % (tgid, pid, comm, v0)`, where v0 is the sequence as it lies in memory (`int v0 = (int)seq` of a __be16).
fn legacy(line: &mut Vec<u8>, answer: &Answer) {
    let e = &answer.event;
    let raw = u16::from_ne_bytes(e.key.seq.to_be_bytes());
    let _ = write!(
        line,
        "{:<7} {:<7} {:<15} {raw}",
        e.head.tgid,
        e.head.pid,
        escaped(&e.head.comm)
    );
}

fn softirq_row(s: &Softirq) -> SoftirqRow {
    SoftirqRow {
        irq: s.irq,
        raise: s.raise,
        entry: s.entry,
    }
}

/// One JSON object a line.
#[derive(Serialize)]
struct Row<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    ts_ns: u64,
    wall_ns: u64,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    late: bool,
    tgid: u32,
    pid: u32,
    comm: String,
    cpu: u16,
    context: &'static str,
    saddr: String,
    daddr: String,
    icmp_type: u8,
    id: u16,
    seq: u16,
    gap: u16,
    iface: String,
    ifindex: u32,
    netns: u32,
    len: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    steered: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    times: Option<TimesRow>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stages_ns: Option<BTreeMap<&'static str, u64>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    culprit: Option<&'a Culprit>,
}

/// ns of CLOCK_MONOTONIC; null: not seen.
#[derive(Serialize)]
struct TimesRow {
    queued: Option<u64>,
    queued_cpu: Option<u16>,
    backlog: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    first: Option<SoftirqRow>,
    softirq: SoftirqRow,
    receive: Option<u64>,
    echo: u64,
    reply: Option<u64>,
}

#[derive(Serialize)]
struct SoftirqRow {
    irq: Option<u64>,
    raise: Option<u64>,
    entry: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::super::decode::test::event;
    use super::super::stages::Stages;
    use super::*;

    #[test]
    fn legacy_prints_what_the_script_prints() {
        let mut event = event(1, 1);
        event.head.tgid = 12;
        event.head.pid = 34;
        event.head.comm[..4].copy_from_slice(b"ping");
        let answer = Answer {
            event,
            late: false,
            reply: None,
            gap: 0,
            stages: Stages::default(),
        };
        let mut line = Vec::new();
        legacy(&mut line, &answer);
        let seq = if cfg!(target_endian = "little") {
            256
        } else {
            1
        };
        assert_eq!(
            String::from_utf8(line).unwrap(),
            format!("12      34      ping            {seq}")
        );
    }
}
