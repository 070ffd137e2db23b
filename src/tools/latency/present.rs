//! Tables and slow packets of `netprobe latency`, as text and JSON.

use std::io::Write;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use crate::kernel::clock::WallClock;
use crate::os::monotonic_ns;
use crate::run::Flow;
use crate::run::output::Output;
use crate::text::columns::{push_time_of_day, us};
use crate::text::escape::escaped;

use super::args::By;
use super::culprit::Why;
use super::names::Names;
use super::packet::Packet;
use super::rows::Row;

/// Quantiles of a row.
const QUANTILES: [f64; 4] = [0.5, 0.9, 0.99, 0.999];

/// Turns rows and packets into lines.
pub struct Presenter {
    by: Option<By>,
    clock: WallClock,
    pub names: Names,
}

impl Presenter {
    pub fn new(by: Option<By>) -> Result<Self> {
        Ok(Self {
            by,
            clock: WallClock::new()?,
            names: Names::default(),
        })
    }

    pub fn table(&mut self, out: &mut Output, rows: &[Row], time: Duration) -> Result<Flow> {
        self.names.refresh();
        if out.json() {
            for row in rows {
                let json = self.row(row);
                if out.json_event(&json)? == Flow::Stop {
                    return Ok(Flow::Stop);
                }
            }
            out.json_line(&TableJson {
                kind: "table",
                seconds: time.as_secs_f64(),
                rows: rows.len(),
            })?;
            return Ok(Flow::Continue);
        }
        let text = self.text(rows, time)?;
        out.event(|b| b.extend_from_slice(text.trim_ascii_end()))
    }

    fn text(&mut self, rows: &[Row], time: Duration) -> Result<Vec<u8>> {
        self.clock.refresh()?;
        let mut text = b"netprobe latency  ".to_vec();
        push_time_of_day(&mut text, self.clock.wall(monotonic_ns()?));
        // Writes to a Vec do not fail.
        let _ = writeln!(text, "  {:.1} s", time.as_secs_f64());
        if rows.is_empty() {
            text.extend_from_slice(b"no packets\n");
            return Ok(text);
        }
        let by: Vec<String> = rows.iter().map(|row| self.by_text(row)).collect();
        let title = self.by.map_or("", by_title);
        let width = by.iter().map(|name| name.chars().count()).max();
        let width = width.unwrap_or(0).max(title.len());
        let gap = if width == 0 { "" } else { "  " };
        let _ = writeln!(
            text,
            "{title:<width$}{gap}{:<8} {:<10} {:>9} {:>11} {:>11} {:>11} {:>11} {:>11} (us)",
            "WAY", "STAGE", "PACKETS", "P50", "P90", "P99", "P99.9", "MAX"
        );
        for (row, by) in rows.iter().zip(&by) {
            let _ = write!(
                text,
                "{by:<width$}{gap}{:<8} {:<10} {:>9}",
                row.key.way.name(),
                row.key.stage.name(),
                row.hist.count
            );
            for q in QUANTILES {
                let _ = write!(text, " {:>11}", us(row.hist.quantile(q)));
            }
            let _ = writeln!(text, " {:>11}", us(row.hist.max));
        }
        Ok(text)
    }

    fn by_text(&mut self, row: &Row) -> String {
        match self.by {
            Some(by) => self.names.by(by, row.key.by),
            None => String::new(),
        }
    }

    fn row(&mut self, row: &Row) -> RowJson {
        let [p50, p90, p99, p999] = QUANTILES.map(|q| row.hist.quantile(q));
        RowJson {
            kind: "latency",
            by: self.by.map(|by| self.names.by(by, row.key.by)),
            way: row.key.way.name(),
            stage: row.key.stage.name(),
            packets: row.hist.count,
            average_ns: row.hist.average(),
            p50_ns: p50,
            p90_ns: p90,
            p99_ns: p99,
            p999_ns: p999,
            max_ns: row.hist.max,
        }
    }

    /// A slow packet.
    pub fn packet(
        &mut self,
        out: &mut Output,
        p: &Packet,
        why: Option<Why>,
        late: bool,
    ) -> Result<Flow> {
        self.clock.refresh()?;
        if out.json() {
            let json = self.packet_json(p, why, late);
            return out.json_event(&json);
        }
        let mut line = Vec::with_capacity(160);
        push_time_of_day(&mut line, self.clock.wall(p.ts));
        let _ = write!(line, " {:<7} {:>9} us  ", p.way.name(), us(p.total));
        match &p.tuple {
            Some(tuple) => tuple.push(&mut line),
            None => line.push(b'-'),
        }
        let _ = write!(line, " len {}", p.len);
        if p.ifindex != 0 {
            let _ = write!(line, "  {}", self.names.device(p.netns, p.ifindex));
        }
        if let Some(owner) = &p.owner {
            let _ = write!(line, "  {}[{}]", escaped(owner.comm()), owner.tgid);
            if let Some(container) = self.names.container_of(owner.cgroup, owner.tgid) {
                let _ = write!(line, "@{container}");
            }
        }
        line.extend_from_slice(b" ");
        for (stage, ns) in &p.stages {
            let _ = write!(line, " {} {}", stage.name(), us(*ns));
        }
        for (set, text) in [
            (p.again, "  sent again"),
            (p.hole, "  an earlier segment was missing"),
            (p.split, "  cut into segments by software"),
            (!p.whole, "  not to a process or driver"),
            (
                p.by_port,
                "  (who serves is a guess: the end with the lower port)",
            ),
            (late, "  [late]"),
        ] {
            if set {
                line.extend_from_slice(text.as_bytes());
            }
        }
        if let Some(why) = why {
            let _ = write!(line, "\n    {}; {}", why.text, why.change);
            for frame in &why.stack {
                let _ = write!(line, "\n        {frame}");
            }
        }
        out.event(|b| b.extend_from_slice(&line))
    }

    fn packet_json(&mut self, p: &Packet, why: Option<Why>, late: bool) -> PacketJson {
        let stage = |(stage, ns): &(super::stages::Stage, u64)| StageJson {
            stage: stage.name(),
            ns: *ns,
        };
        let owner = p.owner.as_ref();
        PacketJson {
            kind: "packet",
            ts_ns: p.ts,
            wall_ns: self.clock.wall(p.ts),
            late,
            way: p.way.name(),
            total_ns: p.total,
            stages: p.stages.iter().map(stage).collect(),
            src: p.tuple.map(|t| t.saddr.to_string()),
            dst: p.tuple.map(|t| t.daddr.to_string()),
            sport: p.tuple.map(|t| t.sport),
            dport: p.tuple.map(|t| t.dport),
            proto: p.tuple.map(|t| t.proto),
            len: p.len,
            device: (p.ifindex != 0).then(|| self.names.device(p.netns, p.ifindex)),
            ifindex: p.ifindex,
            netns: p.netns,
            cpu: p.cpu,
            pid: owner.map(|o| o.tgid),
            comm: owner.map(|o| escaped(o.comm())),
            container: owner.and_then(|o| self.names.container_of(o.cgroup, o.tgid)),
            sent_again: p.again,
            hole: p.hole,
            split: p.split,
            whole: p.whole,
            by_port: p.by_port,
            why,
        }
    }
}

fn by_title(by: By) -> &'static str {
    match by {
        By::Cpu => "CPU",
        By::Device => "DEVICE",
        By::Port => "PORT",
        By::Process => "PROCESS",
        By::Container => "CONTAINER",
    }
}

/// A row of a table (docs/json/latency.json).
#[derive(Serialize)]
struct RowJson {
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    by: Option<String>,
    way: &'static str,
    stage: &'static str,
    packets: u64,
    average_ns: u64,
    p50_ns: u64,
    p90_ns: u64,
    p99_ns: u64,
    p999_ns: u64,
    max_ns: u64,
}

#[derive(Serialize)]
struct TableJson {
    #[serde(rename = "type")]
    kind: &'static str,
    seconds: f64,
    rows: usize,
}

#[derive(Serialize)]
struct StageJson {
    stage: &'static str,
    ns: u64,
}

/// A slow packet. What is not known is missing.
#[derive(Serialize)]
struct PacketJson {
    #[serde(rename = "type")]
    kind: &'static str,
    ts_ns: u64,
    wall_ns: u64,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    late: bool,
    way: &'static str,
    total_ns: u64,
    stages: Vec<StageJson>,
    #[serde(skip_serializing_if = "Option::is_none")]
    src: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dst: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sport: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dport: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    proto: Option<u8>,
    len: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<String>,
    ifindex: u32,
    netns: u32,
    cpu: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    comm: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    container: Option<String>,
    sent_again: bool,
    hole: bool,
    split: bool,
    whole: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    by_port: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<Why>,
}
