//! Tables of losses: text that is redrawn on a terminal, plain tables in a pipe, JSON lines.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use crate::bpf::drops::types::drop_example;
use crate::event::tuple::{Tuple, address, proto_name};
use crate::run::Flow;
use crate::run::output::Output;
use crate::text::columns::push_time_of_day;
use crate::text::escape::escaped;

use super::args::{Args, Sort};
use super::ledger::Unexplained;
use super::rows::Row;

/// What is shown of an interval.
pub struct Table {
    rows: Vec<Row>,
    /// kinds of normal frees
    kinds: usize,
    pub lost: u64,
    pub expected: u64,
    unexplained: Option<Vec<Unexplained>>,
    time: Duration,
    /// rows that --top left out, and their packets
    cut: (usize, u64),
}

impl Table {
    pub fn new(
        rows: Vec<Row>,
        unexplained: Option<Vec<Unexplained>>,
        time: Duration,
        args: &Args,
    ) -> Self {
        let (normal, mut shown): (Vec<Row>, Vec<Row>) =
            rows.into_iter().partition(|row| row.meaning.is_expected());
        let packets = |rows: &[Row]| rows.iter().map(|row| row.count.packets).sum();
        let mut kinds: Vec<&str> = normal.iter().map(|row| &*row.meaning.what).collect();
        kinds.sort_unstable();
        kinds.dedup();
        let (lost, expected, kinds) = (packets(&shown), packets(&normal), kinds.len());
        if args.all {
            shown.extend(normal);
        }
        shown.sort_by(|a, b| {
            let by_lost = b.count.packets.cmp(&a.count.packets);
            let by_what = (&a.meaning.what, &a.place).cmp(&(&b.meaning.what, &b.place));
            match args.sort {
                Sort::Lost => by_lost.then(by_what),
                Sort::Bytes => b.count.bytes.cmp(&a.count.bytes).then(by_what),
                Sort::What => by_what.then(by_lost),
            }
        });
        let mut cut = (0, 0);
        if args.top > 0 && shown.len() > args.top {
            let rest = shown.split_off(args.top);
            cut = (rest.len(), packets(&rest));
        }
        Self {
            rows: shown,
            kinds,
            lost,
            expected,
            unexplained,
            time,
            cut,
        }
    }

    fn unexplained(&self) -> u64 {
        let all = self.unexplained.iter().flatten();
        all.map(Unexplained::packets).sum()
    }
}

/// Writes tables.
pub struct Presenter {
    /// stdout is a terminal: each table takes the place of the last one
    redraw: bool,
    offsets: bool,
    all: bool,
}

impl Presenter {
    pub fn new(args: &Args) -> Self {
        let terminal = args.output.output_file.is_none() && std::io::stdout().is_terminal();
        Self {
            redraw: terminal && !args.once && !args.output.output_json,
            offsets: args.offsets,
            all: args.all,
        }
    }

    pub fn table(&mut self, out: &mut Output, table: &Table) -> Result<Flow> {
        if out.json() {
            return self.json(out, table);
        }
        let mut text = Vec::new();
        if self.redraw {
            // To the first place, and what is there goes.
            text.extend_from_slice(b"\x1b[H\x1b[J");
        }
        self.head(&mut text, table);
        let cells: Vec<[String; 6]> = table
            .rows
            .iter()
            .map(|row| self.cells(row, table))
            .collect();
        let names = ["LOST", "RATE/s", "WHAT", "WHERE", "WHO", "EXAMPLE"].map(str::to_owned);
        if !cells.is_empty() {
            push_columns(&mut text, &names, &cells);
        }
        foot(&mut text, table, self.all);
        // One event is one table: --output-limit-lines counts these.
        out.event(|b| b.extend_from_slice(text.trim_ascii_end()))
    }

    fn head(&self, text: &mut Vec<u8>, table: &Table) {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        text.extend_from_slice(b"netprobe drops  ");
        push_time_of_day(text, now.as_nanos() as u64);
        let _ = write!(
            text,
            "  {} lost in {:.1} s",
            table.lost,
            table.time.as_secs_f64()
        );
        let _ = match &table.unexplained {
            Some(_) => writeln!(text, ", {} unexplained", table.unexplained()),
            None => writeln!(
                text,
                " (filtered or grouped: not balanced against the kernel's counters)"
            ),
        };
    }

    fn cells(&self, row: &Row, table: &Table) -> [String; 6] {
        let mut what = row.meaning.what.clone();
        if let Some(e) = row.example.as_ref().filter(|e| e.limit > 0) {
            what += &format!(" ({} of {})", e.backlog, e.limit);
        }
        if row.meaning.class == "unknown" && !row.place.is_empty() {
            what += &format!(" in {}", escaped(row.place.as_bytes()));
        }
        [
            row.count.packets.to_string(),
            format!(
                "{:.1}",
                row.count.packets as f64 / table.time.as_secs_f64().max(0.001)
            ),
            what,
            self.place(row),
            row.owner.as_ref().map_or("-".into(), |(pid, comm)| {
                format!("{}[{pid}]", escaped(comm.as_bytes()))
            }),
            row.example.as_ref().map_or("-".into(), example),
        ]
    }

    fn place(&self, row: &Row) -> String {
        let mut place = escaped(row.place.as_bytes());
        if self.offsets && !place.is_empty() {
            place += &format!("+{:#x}", row.offset);
        }
        let ifname = row.example.as_ref().map_or(String::new(), ifname);
        if row.key.ifindex != 0 && !ifname.is_empty() {
            if !place.is_empty() {
                place += ", ";
            }
            place += &ifname;
        }
        if place.is_empty() { "-".into() } else { place }
    }

    fn json(&self, out: &mut Output, table: &Table) -> Result<Flow> {
        for row in &table.rows {
            let json = RowJson::new(row, table.time);
            if out.json_event(&json)? == Flow::Stop {
                return Ok(Flow::Stop);
            }
        }
        for u in table.unexplained.iter().flatten() {
            out.json_line(&UnexplainedJson {
                kind: "unexplained",
                netns: u.netns,
                counter: u.name,
                what: u.what,
                packets: u.packets(),
                grew: u.grew,
                seen: u.seen,
            })?;
        }
        out.json_line(&TableJson {
            kind: "table",
            seconds: table.time.as_secs_f64(),
            lost: table.lost,
            expected: table.expected,
            expected_kinds: table.kinds,
            unexplained: table.unexplained.as_ref().map(|_| table.unexplained()),
        })?;
        Ok(Flow::Continue)
    }
}

/// Columns as wide as their cells need; the last one is not padded, the first two are at the right.
fn push_columns(text: &mut Vec<u8>, names: &[String; 6], rows: &[[String; 6]]) {
    let mut widths = names.each_ref().map(|name| name.chars().count());
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    for row in std::iter::once(names).chain(rows) {
        for (i, cell) in row.iter().enumerate() {
            let width = widths[i];
            let _ = match i {
                0 | 1 => write!(text, "{cell:>width$}  "),
                5 => writeln!(text, "{cell}"),
                _ => write!(text, "{cell:<width$}  "),
            };
        }
    }
}

fn foot(text: &mut Vec<u8>, table: &Table, all: bool) {
    if table.cut.0 > 0 {
        let _ = writeln!(
            text,
            "  and {} rows more with {} packets (--top)",
            table.cut.0, table.cut.1
        );
    }
    for u in table.unexplained.iter().flatten() {
        let netns = match u.netns {
            0 => String::new(),
            netns => format!(" of netns {netns}"),
        };
        let _ = writeln!(
            text,
            "  unexplained: {}{netns} grew by {}, drops seen {}: {}",
            u.name, u.grew, u.seen, u.what
        );
    }
    if table.expected > 0 && !all {
        let _ = writeln!(
            text,
            "  also: {} normal frees of {} kinds (--all)",
            table.expected, table.kinds
        );
    }
}

fn ifname(e: &drop_example) -> String {
    let name: Vec<u8> = e.ifname.iter().copied().take_while(|b| *b != 0).collect();
    escaped(&name)
}

/// `udp 10.0.0.9:41000 > 10.0.0.5:8125 len 1440`
fn example(e: &drop_example) -> String {
    let Some(tuple) = tuple(e) else {
        return format!("ethertype 0x{:04x} len {}", e.protocol, e.len);
    };
    let name = match proto_name(tuple.proto) {
        Some(name) => name.to_owned(),
        None => format!("ip-proto-{}", tuple.proto),
    };
    let ends = if tuple.has_ports() {
        let end = |addr, port| std::net::SocketAddr::new(addr, port);
        format!(
            "{} > {}",
            end(tuple.saddr, tuple.sport),
            end(tuple.daddr, tuple.dport)
        )
    } else {
        format!("{} > {}", tuple.saddr, tuple.daddr)
    };
    format!("{name} {ends} len {}", e.len)
}

/// `None` where the packet is no IP.
fn tuple(e: &drop_example) -> Option<Tuple> {
    let t = &e.tuple;
    let address = |words: [u64; 2]| {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&words[0].to_ne_bytes());
        bytes[8..].copy_from_slice(&words[1].to_ne_bytes());
        address(bytes, t.l3_version)
    };
    (t.l3_version != 0).then(|| Tuple {
        saddr: address(t.saddr),
        daddr: address(t.daddr),
        sport: t.sport,
        dport: t.dport,
        proto: t.l4_proto,
        tcp_flags: t.tcp_flags,
        icmp_type: t.icmp_type,
        icmp_code: t.icmp_code,
        fragment: t.fragment != 0,
    })
}

/// A row as JSON; a field is missing only where it was not asked for or is not known.
#[derive(Serialize)]
struct RowJson {
    #[serde(rename = "type")]
    kind: &'static str,
    packets: u64,
    bytes: u64,
    per_second: f64,
    class: String,
    what: String,
    change: String,
    reason: String,
    place: String,
    offset: u64,
    netns: u32,
    ifindex: u32,
    iface: String,
    proto: u8,
    dport: u16,
    pid: Option<u32>,
    comm: Option<String>,
    backlog: u32,
    limit: u32,
    example: String,
}

impl RowJson {
    fn new(row: &Row, time: Duration) -> Self {
        let e = row.example.as_ref();
        Self {
            kind: "drops",
            packets: row.count.packets,
            bytes: row.count.bytes,
            per_second: row.count.packets as f64 / time.as_secs_f64().max(0.001),
            class: row.meaning.class.clone(),
            what: row.meaning.what.clone(),
            change: row.meaning.change.clone(),
            reason: row.reason.clone(),
            place: escaped(row.place.as_bytes()),
            offset: row.offset,
            netns: row.key.netns,
            ifindex: row.key.ifindex,
            iface: e.map_or(String::new(), ifname),
            proto: row.key.proto,
            dport: row.key.dport,
            pid: row.owner.as_ref().map(|o| o.0),
            comm: row.owner.as_ref().map(|o| escaped(o.1.as_bytes())),
            backlog: e.map_or(0, |e| e.backlog),
            limit: e.map_or(0, |e| e.limit),
            example: e.map_or(String::new(), example),
        }
    }
}

#[derive(Serialize)]
struct UnexplainedJson {
    #[serde(rename = "type")]
    kind: &'static str,
    netns: u32,
    counter: &'static str,
    what: &'static str,
    packets: u64,
    grew: u64,
    seen: u64,
}

#[derive(Serialize)]
struct TableJson {
    #[serde(rename = "type")]
    kind: &'static str,
    seconds: f64,
    lost: u64,
    expected: u64,
    expected_kinds: usize,
    /// null: filtered, so that nothing is balanced
    unexplained: Option<u64>,
}
