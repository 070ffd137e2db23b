//! The lines of `netprobe skb`: text columns and JSON.

use std::collections::HashMap;
use std::io::Write;

use anyhow::Result;
use serde::Serialize;

use crate::engine::loss::Loss;
use crate::engine::session::Flow;
use crate::event::tuple::proto_name;
use crate::kernel::ksyms::{KernelSymbols, Symbol};
use crate::output::Output;
use crate::output::escape::{escaped, push_escaped};

use super::args::{Args, Timestamp};
use super::decode::Event;
use super::probes::Attached;

/// skbs whose last event is remembered for relative time stamps.
const REMEMBERED: usize = 65_536;

/// Turns events into lines. Columns grow to what they have held, so that lines below each other line up.
pub struct Presenter {
    meta: bool,
    tuple: bool,
    timestamp: Timestamp,
    /// CLOCK_REALTIME - CLOCK_MONOTONIC, ns
    wall_offset: i128,
    names: HashMap<u64, String>,
    reasons: HashMap<u32, String>,
    symbols: KernelSymbols,
    last_seen: HashMap<u64, u64>,
    widths: Widths,
    line: Vec<u8>,
}

/// Widths of the columns that grow.
#[derive(Debug, Clone, Copy)]
struct Widths {
    process: usize,
    iface: usize,
    tuple: usize,
}

impl Presenter {
    pub fn new(args: &Args, attached: &Attached, reasons: Vec<(i64, String)>) -> Self {
        Self {
            meta: args.output_meta,
            tuple: args.output_tuple,
            timestamp: args.timestamp(),
            wall_offset: wall_offset(),
            names: attached.names().clone(),
            reasons: reasons
                .into_iter()
                .filter_map(|(v, n)| u32::try_from(v).ok().map(|v| (v, n)))
                .collect(),
            symbols: KernelSymbols::default(),
            last_seen: HashMap::new(),
            widths: Widths {
                process: 16,
                iface: 10,
                tuple: 36,
            },
            line: Vec::new(),
        }
    }

    /// The header line of the text form.
    pub fn header(&self, out: &mut Output) -> Result<()> {
        if out.json() {
            return Ok(());
        }
        let w = self.widths;
        let time = match self.timestamp {
            Timestamp::None => "",
            Timestamp::Absolute => "TIME            ",
            Timestamp::Relative => "TIME(us)    ",
            Timestamp::Current => "TIME(s)          ",
        };
        let mut line = format!(
            "{:<18} {:<3} {:<pw$} {time}",
            "SKB",
            "CPU",
            "PROCESS",
            pw = w.process
        );
        if self.meta {
            line += &format!(
                "{:<10} {:<8} {:<iw$} {:<6} {:<5} {:<5} ",
                "NETNS",
                "MARK/x",
                "IFACE",
                "PROTO",
                "MTU",
                "LEN",
                iw = w.iface
            );
        }
        if self.tuple {
            line += &format!("{:<tw$} ", "TUPLE", tw = w.tuple);
        }
        line += "FUNC";
        out.line(|b| b.extend_from_slice(line.as_bytes()))?;
        out.flush()
    }

    /// One event.
    pub fn event(&mut self, out: &mut Output, event: &Event, late: bool) -> Result<Flow> {
        if let Some(stack) = &event.stack {
            self.symbols.resolve(stack)?;
        }
        if !self.names.contains_key(&event.func) {
            self.symbols.resolve(&[event.func])?;
            let name = match self.symbols.get(event.func) {
                Some(s) => s.name.clone(),
                None => format!("{:#x}", event.func),
            };
            self.names.insert(event.func, name);
        }
        let since = self.since_last(event);
        if out.json() {
            let row = self.row(event, late, since);
            return out.json_event(&row);
        }
        let mut line = std::mem::take(&mut self.line);
        line.clear();
        self.text(&mut line, event, late, since);
        let flow = out.event(|b| b.extend_from_slice(&line));
        self.line = line;
        flow
    }

    /// ns since the last event of the same skb; 0 with its first.
    fn since_last(&mut self, event: &Event) -> Option<u64> {
        if self.timestamp != Timestamp::Relative {
            return None;
        }
        if self.last_seen.len() >= REMEMBERED {
            // The oldest half goes.
            let mut times: Vec<u64> = self.last_seen.values().copied().collect();
            times.sort_unstable();
            let middle = times[times.len() / 2];
            self.last_seen.retain(|_, t| *t > middle);
        }
        let last = self.last_seen.insert(event.skb, event.head.ts);
        Some(last.map_or(0, |l| event.head.ts.saturating_sub(l)))
    }

    fn text(&mut self, line: &mut Vec<u8>, event: &Event, late: bool, since: Option<u64>) {
        // Writes to a Vec do not fail.
        let _ = write!(line, "{:<#18x} {:<3} ", event.skb, event.head.cpu);
        let start = line.len();
        event.head.push_process(line);
        pad(line, start, &mut self.widths.process);
        self.time(line, event.head.ts, since);
        if let (true, Some(m)) = (self.meta, &event.meta) {
            let _ = write!(line, "{:<10} {:<8x} ", m.netns, m.mark);
            let start = line.len();
            if m.ifindex != 0 {
                push_escaped(line, &m.ifname);
                let _ = write!(line, ":{}", m.ifindex);
            } else {
                line.push(b'-');
            }
            pad(line, start, &mut self.widths.iface);
            let _ = write!(line, "{:#06x} {:<5} {:<5} ", m.protocol, m.mtu, m.len);
        }
        if let (true, Some(tuple)) = (self.tuple, &event.tuple) {
            let start = line.len();
            match tuple {
                Some(t) => {
                    let _ = write!(line, "{t}");
                }
                None => line.push(b'-'),
            }
            pad(line, start, &mut self.widths.tuple);
        }
        line.extend_from_slice(self.name(event.func).as_bytes());
        if let Some(reason) = event.reason {
            line.push(b'(');
            line.extend_from_slice(self.reason(reason).as_bytes());
            line.push(b')');
        }
        if late {
            line.extend_from_slice(b" [late]");
        }
        for &addr in event.stack.iter().flatten() {
            line.extend_from_slice(b"\n    ");
            match self.symbols.get(addr) {
                Some(s) => push_symbol(line, s),
                None => {
                    let _ = write!(line, "{addr:#018x}");
                }
            }
        }
    }

    fn time(&self, line: &mut Vec<u8>, ts: u64, since: Option<u64>) {
        let _ = match self.timestamp {
            Timestamp::None => Ok(()),
            Timestamp::Current => {
                let text = format!("{}.{:09}", ts / 1_000_000_000, ts % 1_000_000_000);
                write!(line, "{text:<16} ")
            }
            Timestamp::Relative => {
                let ns = since.unwrap_or(0);
                let text = format!("{}.{:03}", ns / 1000, ns % 1000);
                write!(line, "{text:<11} ")
            }
            Timestamp::Absolute => {
                let wall = (i128::from(ts) + self.wall_offset).max(0) as u64;
                let (s, us) = (wall / 1_000_000_000, wall % 1_000_000_000 / 1000);
                write!(
                    line,
                    "{:02}:{:02}:{:02}.{us:06} ",
                    s / 3600 % 24,
                    s / 60 % 60,
                    s % 60
                )
            }
        };
    }

    fn name(&self, func: u64) -> &str {
        self.names.get(&func).map_or("?", String::as_str)
    }

    fn reason(&self, reason: u32) -> String {
        match self.reasons.get(&reason) {
            Some(name) => name.clone(),
            None => format!("reason {reason:#x}"),
        }
    }

    fn row<'a>(&'a self, event: &'a Event, late: bool, since: Option<u64>) -> Row<'a> {
        Row {
            kind: "event",
            ts_ns: event.head.ts,
            wall_ns: (i128::from(event.head.ts) + self.wall_offset).max(0) as u64,
            since_ns: since,
            late,
            skb: format!("{:#x}", event.skb),
            cpu: event.head.cpu,
            pid: event.head.tgid,
            tid: event.head.pid,
            comm: escaped(&event.head.comm),
            func: self.name(event.func),
            reason: event.reason.map(|r| self.reason(r)),
            netns: event.meta.as_ref().map(|m| m.netns),
            mark: event.meta.as_ref().map(|m| m.mark),
            ifindex: event.meta.as_ref().map(|m| m.ifindex),
            iface: event.meta.as_ref().map(|m| escaped(&m.ifname)),
            protocol: event.meta.as_ref().map(|m| m.protocol),
            mtu: event.meta.as_ref().map(|m| m.mtu),
            len: event.meta.as_ref().map(|m| m.len),
            tuple: event.tuple.flatten().map(|t| TupleRow {
                saddr: t.saddr.to_string(),
                daddr: t.daddr.to_string(),
                sport: t.sport,
                dport: t.dport,
                proto: t.proto,
                proto_name: proto_name(t.proto),
                tcp_flags: t.tcp_flags,
                fragment: t.fragment,
            }),
            stack: event.stack.as_ref().map(|s| {
                s.iter()
                    .map(|&addr| Frame {
                        addr: format!("{addr:#x}"),
                        symbol: self.symbols.get(addr),
                    })
                    .collect()
            }),
        }
    }

    /// What the run lost: on stderr, and in JSON as the last record.
    pub fn loss(&self, out: &mut Output, loss: &Loss) -> Result<()> {
        loss.tell();
        if out.json() && loss.any() {
            let text = serde_json::to_vec(&LossRow { kind: "loss", loss })?;
            out.line(|b| b.extend_from_slice(&text))?;
        }
        out.flush()
    }
}

/// Fills up with spaces to the column's width, which grows where the text is longer, and one space more.
fn pad(line: &mut Vec<u8>, start: usize, width: &mut usize) {
    let used = String::from_utf8_lossy(&line[start..]).chars().count();
    *width = (*width).max(used);
    line.resize(line.len() + *width - used + 1, b' ');
}

/// `name+0x1f [module]`
fn push_symbol(line: &mut Vec<u8>, s: &Symbol) {
    push_escaped(line, s.name.as_bytes());
    let _ = write!(line, "+{:#x}", s.offset);
    if let Some(module) = &s.module {
        let _ = write!(line, " [{}]", escaped(module.as_bytes()));
    }
}

/// CLOCK_REALTIME - CLOCK_MONOTONIC now, ns.
fn wall_offset() -> i128 {
    use nix::time::{ClockId, clock_gettime};
    let now = |c| {
        clock_gettime(c).map_or(0, |t| {
            i128::from(t.tv_sec()) * 1_000_000_000 + i128::from(t.tv_nsec())
        })
    };
    now(ClockId::CLOCK_REALTIME) - now(ClockId::CLOCK_MONOTONIC)
}

/// One JSON object a line. Zeros are kept; a field is missing only where its section was not asked for or does not apply.
#[derive(Serialize)]
struct Row<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    ts_ns: u64,
    wall_ns: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    since_ns: Option<u64>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    late: bool,
    skb: String,
    cpu: u16,
    pid: u32,
    tid: u32,
    comm: String,
    func: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    netns: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mark: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ifindex: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    iface: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    protocol: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mtu: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    len: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tuple: Option<TupleRow>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stack: Option<Vec<Frame<'a>>>,
}

#[derive(Serialize)]
struct TupleRow {
    saddr: String,
    daddr: String,
    sport: u16,
    dport: u16,
    proto: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    proto_name: Option<&'static str>,
    tcp_flags: u8,
    fragment: bool,
}

#[derive(Serialize)]
struct Frame<'a> {
    addr: String,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    symbol: Option<&'a Symbol>,
}

#[derive(Serialize)]
struct LossRow<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(flatten)]
    loss: &'a Loss,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_grows_and_stays_grown() {
        let mut width = 4;
        let mut line = b"ab".to_vec();
        pad(&mut line, 0, &mut width);
        assert_eq!(line, b"ab   ");
        line = b"abcdef".to_vec();
        pad(&mut line, 0, &mut width);
        assert_eq!((line.as_slice(), width), (&b"abcdef "[..], 6));
    }
}
