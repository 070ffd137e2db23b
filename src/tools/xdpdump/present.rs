//! The lines of `netprobe xdpdump`: text as tcpdump prints it, with what XDP knows before it, and JSON.

use std::io::Write;

use anyhow::Result;
use serde::Serialize;

use crate::capture::linktype::Linktype;
use crate::event::layout::joined;
use crate::event::line::{self, Line};
use crate::event::link::{self, Frame, Link};
use crate::event::packet::{Mac, Net, Transport, protocol_name};
use crate::kernel::clock::time_of_day;
use crate::run::Flow;
use crate::run::log;
use crate::run::loss::Loss;
use crate::run::output::Output;
use crate::text::escape::{escaped, push_escaped};

use super::args::Args;
use super::decode::verdict_name;
use super::diff::{Change, Diff};
use super::errors::Problem;
use super::probes::Counts;

/// One packet on its way to the reader: live, or from a file.
#[derive(Clone, Copy, Debug)]
pub struct Shown<'a> {
    /// ns since 1970
    pub wall: u64,
    pub iface: &'a str,
    /// The end of a traced program: `xdp_prog()@exit`.
    pub place: Option<&'a str>,
    pub queue: Option<u32>,
    pub id: Option<u64>,
    pub verdict: Option<u32>,
    pub linktype: Linktype,
    pub len: u32,
    pub data: &'a [u8],
    /// Out of the order of time.
    pub late: bool,
    pub comment: Option<&'a str>,
    /// What the traced program changed in it, where that was asked for.
    pub diff: Option<&'a Diff>,
}

/// Turns packets into lines.
pub struct Presenter {
    hex: u8,
    details: bool,
    link: bool,
    line: Vec<u8>,
    /// Hour, minute and second of `second`: the time zone is asked once a second.
    clock: (u8, u8, u8),
    second: u64,
}

impl Presenter {
    pub fn new(args: &Args) -> Self {
        Presenter {
            hex: args.hex,
            details: args.details,
            link: args.link,
            line: Vec::new(),
            clock: (0, 0, 0),
            second: u64::MAX,
        }
    }

    pub fn packet(&mut self, out: &mut Output, shown: &Shown<'_>) -> Result<Flow> {
        let frame = link::decode(shown.linktype, shown.data);
        if out.json() {
            return out.json_event(&row(shown, frame.as_ref()));
        }
        let mut line = std::mem::take(&mut self.line);
        line.clear();
        self.text(&mut line, shown, frame.as_ref());
        let flow = out.event(|buffer| buffer.extend_from_slice(&line));
        self.line = line;
        flow
    }

    /// `12:34:56.123456 veth0 xdp_redirect_err: program 5 (xdp_echo) redirected to interface 7: the target interface is down`.
    pub fn problem(
        &mut self,
        out: &mut Output,
        problem: &Problem,
        iface: &str,
        words: &str,
        wall: u64,
    ) -> Result<()> {
        if out.json() {
            let row = ProblemRow {
                kind: "xdp_error",
                time_ns: wall,
                iface: escaped(iface.as_bytes()),
                what: problem.name(),
                program: problem.program,
                errno: problem.errno,
                count: problem.count,
                summary: words,
            };
            return out.json_line(&row);
        }
        let mut line = std::mem::take(&mut self.line);
        line.clear();
        self.time(&mut line, wall);
        push_escaped(&mut line, iface.as_bytes());
        let _ = write!(line, " {}: {words}", problem.name());
        let written = out.line(|buffer| buffer.extend_from_slice(&line));
        self.line = line;
        written
    }

    /// `12:34:56.123456 veth0 q0 xdp_prog()@exit[PASS] IP 10.0.0.1 > 10.0.0.2: ICMP echo request, id 1, seq 1, length 64 (98 bytes)`.
    /// Writes to a Vec do not fail, so their results are dropped here.
    fn text(&mut self, line: &mut Vec<u8>, shown: &Shown<'_>, frame: Option<&Frame>) {
        self.time(line, shown.wall);
        push_escaped(line, shown.iface.as_bytes());
        if let Some(queue) = shown.queue {
            let _ = write!(line, " q{queue}");
        }
        if let Some(place) = shown.place {
            line.push(b' ');
            push_escaped(line, place.as_bytes());
        }
        if let Some(verdict) = shown.verdict {
            let _ = write!(line, "[{}]", verdict_name(verdict));
        }
        if let (true, Some(id)) = (self.details, shown.id) {
            let _ = write!(line, " id {id:#x}");
        }
        // A file may have no name of the interface.
        if !line.ends_with(b" ") {
            line.push(b' ');
        }
        match frame {
            Some(frame) => {
                let _ = write!(
                    line,
                    "{}",
                    Line {
                        frame,
                        link: self.link,
                        details: self.details
                    }
                );
            }
            None => line.extend_from_slice(cut(shown.linktype).as_bytes()),
        }
        let captured = shown.data.len();
        if captured < shown.len as usize {
            let _ = write!(line, " ({} bytes, {captured} captured)", shown.len);
        } else {
            let _ = write!(line, " ({} bytes)", shown.len);
        }
        if shown.late {
            line.extend_from_slice(b" [late]");
        }
        if let Some(comment) = shown.comment {
            line.extend_from_slice(b" # ");
            push_escaped(line, comment.as_bytes());
        }
        match shown.diff {
            None => {}
            Some(Diff::Unknown) => {
                line.extend_from_slice(b"\n\t?      the packet at entry was lost")
            }
            Some(Diff::Changes(changes)) if changes.is_empty() => {
                line.extend_from_slice(b"\n\t=      unchanged");
            }
            Some(Diff::Changes(changes)) => {
                for change in changes {
                    let _ = write!(line, "\n\t{}", change.words());
                }
            }
        }
        match self.hex {
            0 => {}
            1 => line::push_hex(line, shown.data.get(link_len(frame)..).unwrap_or_default()),
            _ => line::push_hex(line, shown.data),
        }
    }
}

impl Presenter {
    /// The time of day, and a blank.
    fn time(&mut self, line: &mut Vec<u8>, wall: u64) {
        let second = wall / 1_000_000_000;
        if second != self.second {
            self.second = second;
            self.clock = time_of_day(wall);
        }
        let (h, m, s) = self.clock;
        let _ = write!(
            line,
            "{h:02}:{m:02}:{s:02}.{:06} ",
            wall % 1_000_000_000 / 1000
        );
    }
}

/// The end of a capture: a summary for people, a record for programs.
pub fn summary(out: &mut Output, sum: Counts, captured: u64, loss: &Loss) -> Result<()> {
    let text = format!(
        "{captured} packets captured, {} lost, {} matched the filter, {} seen at XDP",
        sum.lost, sum.matched, sum.seen
    );
    match sum.lost {
        0 => log::note(&text),
        _ => eprintln!("netprobe: {text}"),
    }
    loss.tell();
    if out.json() {
        let record = Summary {
            kind: "summary",
            captured,
            lost: sum.lost,
            matched: sum.matched,
            seen: sum.seen,
        };
        out.json_line(&record)?;
    }
    out.flush()?;
    out.report_unwritten();
    Ok(())
}

/// A packet that ends within its link header.
fn cut(linktype: Linktype) -> String {
    match linktype {
        Linktype::ETHERNET => "[|ether]".to_owned(),
        other => format!("[|{}]", other.name().to_ascii_lowercase()),
    }
}

/// Bytes of the link header with its tags.
fn link_len(frame: Option<&Frame>) -> usize {
    frame.map_or(0, |frame| frame.header)
}

#[derive(Serialize)]
struct Summary {
    #[serde(rename = "type")]
    kind: &'static str,
    captured: u64,
    lost: u64,
    matched: u64,
    seen: u64,
}

/// An error as a JSON object.
#[derive(Serialize)]
struct ProblemRow<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    time_ns: u64,
    iface: String,
    what: &'static str,
    /// 0: not told
    program: u32,
    errno: i32,
    count: u32,
    summary: &'a str,
}

/// A packet as a JSON object; a field that says nothing about this packet is left out.
#[derive(Serialize)]
struct Row {
    #[serde(rename = "type")]
    kind: &'static str,
    /// ns since 1970
    time_ns: u64,
    iface: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    place: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    queue: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    verdict: Option<&'static str>,
    len: u32,
    captured: usize,
    late: bool,
    /// Where the packet begins with another header than Ethernet's.
    #[serde(skip_serializing_if = "Option::is_none")]
    linktype: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    src_mac: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dst_mac: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ethertype: Option<u16>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    vlans: Vec<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    src: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dst: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    protocol: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    protocol_name: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sport: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dport: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    icmp_type: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    icmp_seq: Option<u16>,
    summary: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    comment: Option<String>,
    /// null: not known
    #[serde(skip_serializing_if = "Option::is_none")]
    changes: Option<Option<Vec<ChangeRow>>>,
}

/// One change of `--diff` as a JSON object; bytes are in hex, at most 32 of them.
#[derive(Serialize)]
struct ChangeRow {
    /// "inserted", "removed" or "replaced"
    kind: &'static str,
    /// Offset: of what was inserted in the packet at exit, else in the packet at entry.
    offset: usize,
    len: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    field: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    old: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    new: Option<String>,
}

impl From<&Change> for ChangeRow {
    fn from(change: &Change) -> Self {
        let (kind, offset, len, field, old, new) = match change {
            Change::Inserted { at, len, bytes } => ("inserted", at, *len, None, None, Some(bytes)),
            Change::Removed { at, len, bytes } => ("removed", at, *len, None, Some(bytes), None),
            Change::Replaced {
                at,
                field,
                old,
                new,
            } => ("replaced", at, old.len(), *field, Some(old), Some(new)),
        };
        ChangeRow {
            kind,
            offset: *offset,
            len,
            field: field.map(|field| field.name),
            old: old.map(|bytes| joined(bytes, "")),
            new: new.map(|bytes| joined(bytes, "")),
        }
    }
}

fn row(shown: &Shown<'_>, frame: Option<&Frame>) -> Row {
    let ip = frame.and_then(|frame| match &frame.net {
        Net::Ip(ip) => Some(ip),
        _ => None,
    });
    let macs = frame.and_then(|frame| match frame.link {
        Link::Ethernet { dst, src } => Some((Mac(src), Mac(dst))),
        _ => None,
    });
    let ports = ip.and_then(|ip| ip.ports());
    let icmp = ip.and_then(|ip| match ip.transport {
        Transport::Icmp { kind, sequence, .. } => Some((kind, sequence)),
        _ => None,
    });
    Row {
        kind: "packet",
        time_ns: shown.wall,
        iface: escaped(shown.iface.as_bytes()),
        place: shown.place.map(|place| escaped(place.as_bytes())),
        queue: shown.queue,
        id: shown.id,
        verdict: shown.verdict.map(verdict_name),
        len: shown.len,
        captured: shown.data.len(),
        late: shown.late,
        linktype: (shown.linktype != Linktype::ETHERNET).then(|| shown.linktype.name()),
        src_mac: macs.map(|(src, _)| src.to_string()),
        dst_mac: macs.map(|(_, dst)| dst.to_string()),
        ethertype: frame
            .map(|frame| frame.ethertype)
            .filter(|ethertype| macs.is_some() || *ethertype != 0),
        vlans: frame
            .map(|frame| frame.vlans.iter().map(|tag| tag & 0xfff).collect())
            .unwrap_or_default(),
        src: ip.map(|ip| ip.src.to_string()),
        dst: ip.map(|ip| ip.dst.to_string()),
        protocol: ip.map(|ip| ip.protocol),
        protocol_name: ip.map(|ip| protocol_name(ip.protocol)),
        sport: ports.map(|ports| ports.0),
        dport: ports.map(|ports| ports.1),
        icmp_type: icmp.map(|icmp| icmp.0),
        icmp_seq: icmp.map(|icmp| icmp.1),
        summary: frame
            .map(|frame| {
                Line {
                    frame,
                    link: false,
                    details: false,
                }
                .to_string()
            })
            .unwrap_or_else(|| cut(shown.linktype)),
        comment: shown.comment.map(|comment| escaped(comment.as_bytes())),
        changes: shown.diff.map(|diff| match diff {
            Diff::Changes(changes) => Some(changes.iter().map(ChangeRow::from).collect()),
            Diff::Unknown => None,
        }),
    }
}
