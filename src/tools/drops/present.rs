//! Tables of losses: text that is redrawn on a terminal, plain tables in a pipe, JSON lines.

use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use crate::bpf::drops::types::drop_example;
use crate::event::tuple::{Tuple, address, proto_name};
use crate::run::Flow;
use crate::run::output::Output;
use crate::text::columns::push_time_of_day;
use crate::text::escape::escaped;
use crate::tools::skb::netfilter::Nft;

use super::args::{Args, Sort};
use super::ledger::{Balance, Difference};
use super::nft;
use super::rows::Row;
use super::screen::{self, Size};
use super::verdicts::Verdict;
use crate::kernel::counters::Source;
use crate::kernel::netdev;

/// What is shown of an interval.
pub struct Table {
    rows: Vec<Row>,
    /// kinds of normal frees
    kinds: usize,
    pub lost: u64,
    pub expected: u64,
    /// `None`: not every drop is counted, so that nothing is balanced
    balance: Option<Balance>,
    time: Duration,
    /// rows that --top left out, and their packets
    cut: (usize, u64),
    /// by --max-cpu: rows without their example, tables that came later
    pub examples_left_out: u64,
    pub delayed: u64,
    /// with --programs
    pub verdicts: Vec<Verdict>,
}

impl Table {
    pub fn new(rows: &[Row], balance: Option<Balance>, time: Duration, args: &Args) -> Self {
        let (normal, mut shown): (Vec<Row>, Vec<Row>) = rows
            .iter()
            .cloned()
            .partition(|row| row.meaning.is_expected());
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
            balance,
            time,
            cut,
            examples_left_out: 0,
            delayed: 0,
            verdicts: Vec::new(),
        }
    }

    pub fn unexplained(&self) -> Option<u64> {
        self.balance.as_ref().map(Balance::packets)
    }

    pub fn in_no_counter(&self) -> Option<u64> {
        self.balance.as_ref().map(|balance| balance.in_no_counter)
    }
}

/// Writes tables.
pub struct Presenter {
    /// stdout is a terminal: each table takes the place of the last one
    redraws: bool,
    /// the table that is on it
    last: String,
    offsets: bool,
    all: bool,
}

impl Presenter {
    pub fn new(args: &Args) -> Self {
        let terminal = args.output.output_file.is_none()
            && args.output.otlp.is_none()
            && std::io::stdout().is_terminal();
        Self {
            redraws: terminal && !args.once && !args.output.output_json,
            last: String::new(),
            offsets: args.offsets,
            all: args.all,
        }
    }

    pub fn redraws(&self) -> bool {
        self.redraws
    }

    /// The table that is on the terminal once more: its size has changed.
    pub fn redraw(&self, out: &mut Output) -> Result<()> {
        if self.last.is_empty() {
            return Ok(());
        }
        let text = screen::fit(&self.last, Size::of_stdout());
        out.line(|b| b.extend_from_slice(text.as_bytes()))
    }

    pub fn table(&mut self, out: &mut Output, table: &Table) -> Result<Flow> {
        if out.json() {
            return self.json(out, table);
        }
        let mut text = Vec::new();
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
        let mut text = String::from_utf8_lossy(text.trim_ascii_end()).into_owned();
        if self.redraws {
            let fitted = screen::fit(&text, Size::of_stdout());
            self.last = std::mem::replace(&mut text, fitted);
        }
        // One event is one table: --output-limit-lines counts these.
        out.event(|b| b.extend_from_slice(text.as_bytes()))
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
        let _ = match table.unexplained() {
            Some(packets) => writeln!(text, ", {packets} unexplained"),
            None => writeln!(
                text,
                " (filtered or grouped: not balanced against the kernel's counters)"
            ),
        };
    }

    fn cells(&self, row: &Row, table: &Table) -> [String; 6] {
        let mut what = row.meaning.what.clone();
        if let Some(e) = row.example.as_ref().filter(|e| e.limit > 0) {
            what += &format!(" (backlog {} of {})", e.backlog, e.limit);
        }
        if let Some((handle, why)) = &row.qdisc {
            what += &format!(" (qdisc {handle} {why})");
        }
        if let Some(queue) = row.queue {
            what += &format!(" (queue {queue})");
        }
        if let Some((group, name)) = &row.trap {
            what += &format!(" (devlink trap {name} of {group})");
        }
        if let Some(rule) = &row.nft {
            what += &format!(" ({})", nft::text(rule));
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
            who(row),
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
        for (kind, differences) in table.balance.iter().flat_map(kinds) {
            for difference in differences {
                out.json_line(&DifferenceJson::new(kind, difference))?;
            }
        }
        for verdict in &table.verdicts {
            out.json_line(&ProgramJson::new(verdict))?;
        }
        out.json_line(&TableJson {
            kind: "table",
            seconds: table.time.as_secs_f64(),
            lost: table.lost,
            expected: table.expected,
            expected_kinds: table.kinds,
            unexplained: table.unexplained(),
            in_no_counter: table.balance.as_ref().map(|b| b.in_no_counter),
            counters: table.balance.as_ref().map(|b| b.counters),
            examples_left_out: table.examples_left_out,
            tables_delayed: table.delayed,
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
    for (kind, differences) in table.balance.iter().flat_map(kinds) {
        if kind == "note" && !all {
            continue;
        }
        for difference in differences {
            push_difference(text, kind, difference);
        }
    }
    for v in &table.verdicts {
        let _ = writeln!(
            text,
            "  program: {} {} (id {}) dropped {} at interface {} of netns {} ({})",
            v.kind.name(),
            v.name,
            v.id,
            v.packets,
            v.ifindex,
            v.netns,
            v.verdict
        );
    }
    if table.examples_left_out + table.delayed > 0 {
        let _ = writeln!(
            text,
            "  --max-cpu: {} rows without an example, {} tables later; all packets are counted",
            table.examples_left_out, table.delayed
        );
    }
    let mut also = Vec::new();
    if table.expected > 0 && !all {
        also.push(format!(
            "{} normal frees of {} kinds (--all)",
            table.expected, table.kinds
        ));
    }
    if let Some(balance) = &table.balance {
        if balance.in_no_counter > 0 {
            also.push(format!(
                "{} packets lost since the start are in no counter of the kernel",
                balance.in_no_counter
            ));
        }
        let odd = balance.unexplained.len() + balance.uncounted.len();
        also.push(match odd {
            0 => format!("all {} counters balance", balance.counters),
            odd => format!("{odd} of {} counters do not balance", balance.counters),
        });
    }
    if !also.is_empty() {
        let _ = writeln!(text, "  also: {}", also.join("; "));
    }
}

/// The differences of a balance by the word for them.
fn kinds(balance: &Balance) -> [(&'static str, &[Difference]); 3] {
    [
        ("unexplained", &balance.unexplained),
        ("uncounted", &balance.uncounted),
        ("note", &balance.notes),
    ]
}

/// Parts of a counter that a line names, at most.
const PARTS: usize = 4;

fn push_difference(text: &mut Vec<u8>, kind: &str, d: &Difference) {
    let netns = match d.netns {
        0 => String::new(),
        netns => format!(" of netns {netns}"),
    };
    let _ = write!(text, "  {kind}: {}{netns} grew by {}", counter(d), d.grew);
    if kind != "note" {
        let _ = write!(text, ", drops seen {}", d.seen);
    }
    let _ = write!(text, ": {}", d.entry.what);
    if let Some((now, most)) = ring(d) {
        let _ = write!(text, "; ring {now} of {most}");
    }
    if !d.entry.shared.is_empty() {
        let _ = write!(text, " (shared: {})", d.entry.shared);
    }
    let parts: Vec<String> = d
        .parts
        .iter()
        .filter(|(of, _)| !of.is_empty())
        .map(part)
        .collect();
    if !parts.is_empty() {
        let _ = write!(text, " [{}", parts[..parts.len().min(PARTS)].join(", "));
        if parts.len() > PARTS {
            let _ = write!(text, ", {} more", parts.len() - PARTS);
        }
        text.push(b']');
    }
    text.push(b'\n');
}

/// `UdpNoPorts`, `rx_missed_errors`, `xfrm XfrmInNoStates`
fn counter(d: &Difference) -> String {
    let name = escaped(d.name.as_bytes());
    match d.source {
        Source::Proc | Source::Xfrm | Source::Link => name,
        other => format!("{} {name}", source(other)),
    }
}

/// The source's own name.
pub fn source(source: Source) -> &'static str {
    match source {
        Source::Proc => "proc",
        Source::Xfrm => "xfrm",
        Source::Link => "link",
        Source::Softnet => "softnet",
        Source::Conntrack => "conntrack",
        Source::Ethtool => "ethtool",
        Source::Qdisc => "qdisc",
        Source::Socket => "socket",
    }
}

/// `eth0 +5`
fn part((of, grew): &(String, u64)) -> String {
    format!("{} +{grew}", escaped(of.as_bytes()))
}

/// How large the ring is in which a card's packets were lost, of an interface of this namespace.
fn ring(d: &Difference) -> Option<(u32, u32)> {
    let lost = ["rx_missed_errors", "rx_fifo_errors", "rx_over_errors"].contains(&d.name.as_str());
    let (device, _) = d.parts.first().filter(|_| lost)?;
    let here = netdev::name(d.ifindex).as_ref() == Some(device);
    here.then(|| netdev::receive_ring(device)).flatten()
}

/// `statsd[771]@web 10.0.0.5:8125`, or as much of it as is known.
fn who(row: &Row) -> String {
    let mut who = match &row.owner {
        Some((pid, comm)) => format!("{}[{pid}]", escaped(comm.as_bytes())),
        None => String::new(),
    };
    if let Some(container) = &row.container {
        who += &format!("@{container}");
    }
    if let (Some(local), true) = (row.example.as_ref().and_then(local), row.owner.is_some()) {
        who += &format!(" {local}");
    }
    if who.is_empty() { "-".into() } else { who }
}

/// The address of the example's socket.
fn local(e: &drop_example) -> Option<SocketAddr> {
    let version = e.local_version;
    (version != 0).then(|| SocketAddr::new(address(e.local, version), e.local_port))
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
        let end = |addr, port| SocketAddr::new(addr, port);
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
    let address = |of: [u64; 2]| address(of, t.l3_version);
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
    container: Option<String>,
    /// of the example's socket
    socket: Option<String>,
    qdisc: Option<String>,
    qdisc_reason: Option<String>,
    nft: Option<Nft>,
    queue: Option<u32>,
    trap: Option<String>,
    trap_group: Option<String>,
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
            container: row.container.clone(),
            socket: e.and_then(local).map(|local| local.to_string()),
            qdisc: row.qdisc.as_ref().map(|q| q.0.clone()),
            qdisc_reason: row.qdisc.as_ref().map(|q| q.1.clone()),
            nft: row.nft.clone(),
            queue: row.queue,
            trap: row.trap.as_ref().map(|t| t.1.clone()),
            trap_group: row.trap.as_ref().map(|t| t.0.clone()),
        }
    }
}

/// A counter beside the drops that were seen.
#[derive(Serialize)]
struct DifferenceJson {
    #[serde(rename = "type")]
    kind: &'static str,
    netns: u32,
    ifindex: u32,
    counter: String,
    what: &'static str,
    shared: &'static str,
    packets: u64,
    grew: u64,
    seen: u64,
    parts: Vec<PartJson>,
}

/// A device, qdisc, socket or CPU of a counter.
#[derive(Serialize)]
struct PartJson {
    of: String,
    grew: u64,
}

impl DifferenceJson {
    fn new(kind: &'static str, d: &Difference) -> Self {
        Self {
            kind,
            netns: d.netns,
            ifindex: d.ifindex,
            counter: counter(d),
            what: &d.entry.what,
            shared: &d.entry.shared,
            packets: match kind {
                "unexplained" => d.unexplained(),
                "uncounted" => d.uncounted(),
                _ => d.grew,
            },
            grew: d.grew,
            seen: d.seen,
            parts: d
                .parts
                .iter()
                .map(|(of, grew)| PartJson {
                    of: escaped(of.as_bytes()),
                    grew: *grew,
                })
                .collect(),
        }
    }
}

/// What a BPF program dropped.
#[derive(Serialize)]
struct ProgramJson<'a> {
    #[serde(rename = "type")]
    row: &'static str,
    kind: &'static str,
    id: u32,
    name: &'a str,
    verdict: &'static str,
    packets: u64,
    netns: u32,
    ifindex: u32,
}

impl<'a> ProgramJson<'a> {
    fn new(v: &'a Verdict) -> Self {
        Self {
            row: "program",
            kind: v.kind.name(),
            id: v.id,
            name: &v.name,
            verdict: v.verdict,
            packets: v.packets,
            netns: v.netns,
            ifindex: v.ifindex,
        }
    }
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
    in_no_counter: Option<u64>,
    counters: Option<usize>,
    examples_left_out: u64,
    tables_delayed: u64,
}
