//! The lines of `netprobe tcpconnect`: bcc's columns, what was asked for beside them, and JSON.

use std::io::Write;

use anyhow::Result;
use serde::Serialize;

use crate::kernel::cgroup::CgroupNames;
use crate::kernel::clock::WallClock;
use crate::kernel::drop_reason::DropReasons;
use crate::kernel::ksyms::{KernelSymbols, Symbol};
use crate::kernel::listen;
use crate::run::Flow;
use crate::run::output::Output;
use crate::text::columns::pad;
use crate::text::escape::{escaped, push_escaped};

use super::args::Args;
use super::decode::{self, Connect};
use super::outcome;
use super::stacks::NamedStacks;

/// bcc cuts names here.
const COMM_WIDTH: usize = 12;

/// Turns connects into lines.
pub struct Presenter {
    timestamp: bool,
    uid: bool,
    lport: bool,
    outcome: bool,
    dns: bool,
    cgroup_name: bool,
    reasons: DropReasons,
    cgroups: CgroupNames,
    symbols: KernelSymbols,
    clock: WallClock,
    /// ns, of the first event
    first: Option<u64>,
    widths: Widths,
}

/// Widths of the columns that grow; they start as bcc's.
struct Widths {
    addr: [usize; 2],
    detail: usize,
    cgroup: usize,
}

/// A connect and what user space found out about it.
pub struct Row<'a> {
    pub connect: &'a Connect,
    pub late: bool,
    pub stacks: Option<&'a NamedStacks>,
    /// as in the DNS answer
    pub name: Option<&'a [u8]>,
}

impl Presenter {
    pub fn new(args: &Args, reasons: DropReasons) -> Result<Self> {
        Ok(Self {
            timestamp: args.timestamp,
            uid: args.print_uid,
            lport: args.lport,
            outcome: args.outcome,
            dns: args.dns,
            cgroup_name: args.cgroup_name,
            reasons,
            cgroups: CgroupNames::default(),
            symbols: KernelSymbols::default(),
            clock: WallClock::new()?,
            first: None,
            widths: Widths {
                addr: [16, 16],
                detail: 16,
                cgroup: 24,
            },
        })
    }

    /// The header line of the text form.
    pub fn header(&self, out: &mut Output) -> Result<()> {
        if out.json() {
            return Ok(());
        }
        let mut line = String::new();
        if self.timestamp {
            line += &format!("{:<9}", "TIME(s)");
        }
        if self.uid {
            line += &format!("{:<6}", "UID");
        }
        line += &format!("{:<7} {:<12} {:<2} {:<16} ", "PID", "COMM", "IP", "SADDR");
        if self.lport {
            line += &format!("{:<6} ", "LPORT");
        }
        line += &format!("{:<16} {:<6}", "DADDR", "DPORT");
        if self.outcome {
            line += &format!(
                " {:<11} {:<9} {:<7} {:<16}",
                "OUTCOME", "LAT(ms)", "RETRANS", "DETAIL"
            );
        }
        if self.cgroup_name {
            line += &format!(" {:<24}", "CGROUP");
        }
        if self.dns {
            line += " QUERY";
        }
        out.line(|b| b.extend_from_slice(line.as_bytes()))?;
        out.flush()
    }

    /// One connect.
    pub fn row(&mut self, out: &mut Output, row: &Row<'_>) -> Result<Flow> {
        self.clock.refresh()?;
        let first = *self.first.get_or_insert(row.connect.head.ts);
        let fate = &row.connect.fate;
        let drops = [fate.drop, fate.copy].into_iter().flatten();
        self.symbols
            .resolve(&drops.map(|d| d.at).collect::<Vec<_>>())?;
        if out.json() {
            let json = self.json(row);
            return out.json_event(&json);
        }
        let mut line = Vec::with_capacity(160);
        self.text(&mut line, row, first);
        out.event(|b| b.extend_from_slice(&line))
    }

    fn text(&mut self, line: &mut Vec<u8>, row: &Row<'_>, first: u64) {
        let c = row.connect;
        // Writes to a Vec do not fail.
        if self.timestamp {
            let seconds = c.head.ts.saturating_sub(first) as f64 / 1e9;
            let _ = write!(line, "{seconds:<9.3}");
        }
        if self.uid {
            let _ = write!(line, "{:<6}", c.uid);
        }
        let comm: String = escaped(&c.head.comm).chars().take(COMM_WIDTH).collect();
        let _ = write!(line, "{:<7} {comm:<12} {:<2} ", c.head.tgid, c.version);
        let start = line.len();
        let _ = write!(line, "{}", c.saddr);
        pad(line, start, &mut self.widths.addr[0]);
        if self.lport {
            let _ = write!(line, "{:<6} ", c.sport);
        }
        let start = line.len();
        let _ = write!(line, "{}", c.daddr);
        pad(line, start, &mut self.widths.addr[1]);
        let _ = write!(line, "{:<6}", c.dport);
        if self.outcome {
            self.text_outcome(line, c);
        }
        if self.cgroup_name {
            line.push(b' ');
            let start = line.len();
            match self.cgroups.get(c.cgroup) {
                Some(path) => push_escaped(line, path.as_bytes()),
                None => {
                    let _ = write!(line, "id:{}", c.cgroup);
                }
            }
            pad(line, start, &mut self.widths.cgroup);
            line.pop();
        }
        if self.dns {
            line.push(b' ');
            match row.name {
                Some(name) => push_escaped(line, name),
                None => line.extend_from_slice(b"unknown"),
            }
        }
        if row.late {
            line.extend_from_slice(b" [late]");
        }
        if let Some(stacks) = row.stacks {
            stacks.push_text(line);
        }
    }

    fn text_outcome(&mut self, line: &mut Vec<u8>, c: &Connect) {
        let latency = format!("{:.3}", c.latency() as f64 / 1e6);
        let _ = write!(
            line,
            " {:<11} {latency:<9} {:<7} ",
            outcome::word(c),
            c.retransmits
        );
        let mut details: Vec<String> = outcome::error_name(c).into_iter().collect();
        details.extend(outcome::notes(c).into_iter().map(str::to_string));
        if let Some(error) = outcome::unread_error(c) {
            details.push(format!("unread:{error}"));
        }
        let dropped = self.dropped(c);
        for (what, drop) in [
            ("dropped", dropped.drop),
            ("copy-dropped", dropped.copy),
            ("other-host-dropped", dropped.other_host),
        ] {
            let Some(drop) = drop else { continue };
            details.push(match drop.reason {
                Some(reason) => format!("{what}:{}@{}", reason, drop.at),
                None => format!("{what}@{}", drop.at),
            });
        }
        if details.is_empty() {
            details.push("-".into());
        }
        let start = line.len();
        line.extend_from_slice(details.join(",").as_bytes());
        pad(line, start, &mut self.widths.detail);
        line.pop();
    }

    /// What the kernel dropped of the handshake before it was decided, in names.
    fn dropped(&mut self, c: &Connect) -> DroppedJson {
        let dropped = outcome::dropped(c, |at| self.place(at));
        let mut named = |drop: Option<decode::Drop>| {
            drop.map(|d| Drop {
                // 0: the kernel has no reasons (before 5.17).
                reason: (d.reason != 0).then(|| self.reason(d.reason)),
                at: self.place(d.at),
                packets: d.packets,
            })
        };
        DroppedJson {
            drop: named(dropped.drop),
            copy: named(dropped.copy),
            other_host: named(dropped.other_host),
        }
    }

    fn reason(&mut self, reason: u32) -> String {
        match listen::reason(reason) {
            Some(name) => name.to_owned(),
            None => self.reasons.name(reason),
        }
    }

    fn place(&self, at: u64) -> String {
        match self.symbols.get(at) {
            Some(Symbol { name, .. }) => escaped(name.as_bytes()),
            None => format!("{at:#x}"),
        }
    }

    fn json<'a>(&mut self, row: &Row<'a>) -> Json<'a> {
        let c = row.connect;
        let outcome = self.outcome.then(|| OutcomeJson {
            outcome: outcome::word(c),
            error: outcome::error_name(c),
            latency_ns: c.latency(),
            retransmits: c.retransmits,
            syn_sent: c.syn != 0,
            fast_open: c.has(decode::FLAG_FASTOPEN),
            syn_data: c.has(decode::FLAG_SYN_DATA),
            syn_deferred: c.has(decode::FLAG_DEFERRED),
            process_ended: c.has(decode::FLAG_EXITING),
            unread_error: outcome::unread_error(c),
            dropped: self.dropped(c),
        });
        Json {
            kind: "connect",
            ts_ns: c.head.ts,
            wall_ns: self.clock.wall(c.head.ts),
            late: row.late,
            pid: c.head.tgid,
            tid: c.head.pid,
            uid: c.uid,
            comm: escaped(&c.head.comm),
            ip: c.version,
            saddr: c.saddr.to_string(),
            lport: c.sport,
            daddr: c.daddr.to_string(),
            dport: c.dport,
            netns: c.netns,
            cgroup_id: c.cgroup,
            cgroup: match self.cgroup_name {
                true => self.cgroups.get(c.cgroup).map(|p| escaped(p.as_bytes())),
                false => None,
            },
            v4_mapped: c.has(decode::FLAG_MAPPED),
            nonblocking: c.has(decode::FLAG_NONBLOCK),
            mptcp: c.has(decode::FLAG_MPTCP),
            outcome,
            query: self.dns.then(|| row.name.map(escaped)),
            stacks: row.stacks,
        }
    }
}

/// One JSON object a line; the names are documented in README.md. Zeros are kept; a field is missing only where it was not asked for.
#[derive(Serialize)]
struct Json<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    ts_ns: u64,
    wall_ns: u64,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    late: bool,
    pid: u32,
    tid: u32,
    uid: u32,
    comm: String,
    ip: u8,
    saddr: String,
    lport: u16,
    daddr: String,
    dport: u16,
    netns: u32,
    cgroup_id: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    cgroup: Option<String>,
    v4_mapped: bool,
    nonblocking: bool,
    mptcp: bool,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    outcome: Option<OutcomeJson>,
    /// outer: asked for; inner: known
    #[serde(skip_serializing_if = "Option::is_none")]
    query: Option<Option<String>>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    stacks: Option<&'a NamedStacks>,
}

#[derive(Serialize)]
struct OutcomeJson {
    outcome: &'static str,
    error: Option<String>,
    latency_ns: u64,
    retransmits: u32,
    syn_sent: bool,
    fast_open: bool,
    syn_data: bool,
    syn_deferred: bool,
    process_ended: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    unread_error: Option<String>,
    #[serde(flatten)]
    dropped: DroppedJson,
}

/// [`outcome::Dropped`] with names.
#[derive(Serialize)]
struct DroppedJson {
    drop: Option<Drop>,
    #[serde(skip_serializing_if = "Option::is_none")]
    copy: Option<Drop>,
    #[serde(skip_serializing_if = "Option::is_none")]
    other_host: Option<Drop>,
}

#[derive(Serialize)]
struct Drop {
    reason: Option<String>,
    at: String,
    packets: u32,
}
