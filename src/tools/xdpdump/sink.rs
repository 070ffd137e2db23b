//! Where captured packets go: lines, or a capture file; and what is said at the end. It must not know how packets were captured.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Result;

use crate::capture::linktype::Linktype;
use crate::capture::pcapng::{Counters, Direction, Interface, Packet};
use crate::event::link;
use crate::run::Flow;
use crate::run::loss::Loss;
use crate::run::output::Output;

use super::args::Args;
use super::decode::{Seen, SeenAt};
use super::diff::Diff;
use super::errors::{Names, Problem};
use super::file::{CaptureFile, Rotation};
use super::present::{self, Presenter, Shown};
use super::probes::Counts;

/// A place where packets were seen: an interface, or one end of a program at it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CapturePoint {
    pub iface: String,
    pub ifindex: u32,
    pub point: SeenAt,
    /// Number of the traced program in its events; 0 in front of a chain.
    pub program: u32,
    /// Name of the traced function.
    pub function: Option<String>,
    pub linktype: Linktype,
}

impl CapturePoint {
    fn is_of(&self, seen: &Seen<'_>) -> bool {
        self.ifindex == seen.ifindex && self.point == seen.point && self.program == seen.program
    }

    /// The end of a program, for lines: `xdp_prog()@exit`.
    fn place(&self) -> Option<String> {
        let end = if self.point == SeenAt::Exit {
            "exit"
        } else {
            "entry"
        };
        self.function
            .as_ref()
            .map(|function| format!("{function}()@{end}"))
    }

    /// The name of an interface block: as xdp-tools writes it for a traced program.
    fn block_name(&self) -> String {
        let end = if self.point == SeenAt::Exit {
            "fexit"
        } else {
            "fentry"
        };
        match &self.function {
            Some(function) => format!("{}:{function}()@{end}", self.iface),
            None => self.iface.clone(),
        }
    }
}

pub struct Sink {
    /// Each with its place in lines.
    sources: Vec<(CapturePoint, Option<String>)>,
    out: Output,
    kind: Destination,
    programs: Names,
    /// Errors by their words: in a capture file there is no place for them.
    errors: BTreeMap<String, u64>,
}

enum Destination {
    Lines(Box<Presenter>),
    /// `dropped`: packets lost since the last one that was written.
    File {
        file: Box<CaptureFile>,
        dropped: u64,
        linktype: Linktype,
    },
}

impl Sink {
    pub fn open(args: &Args, sources: Vec<CapturePoint>) -> Result<Self> {
        let out = Output::open(&args.output)?;
        let kind = match &args.write {
            None => Destination::Lines(Box::new(Presenter::new(args))),
            Some(path) => {
                let linktype = common(&sources);
                // Readers refuse packets that are longer.
                let snaplen = args.told_snaplen().saturating_add(link::MADE_UP_LEN);
                let interfaces = sources.iter().map(|source| Interface {
                    snaplen,
                    filter: args.filter_text(),
                    ..Interface::new(source.block_name(), linktype)
                });
                let rotation = Rotation {
                    bytes: args.rotate_size.map(|mb| mb * 1_000_000),
                    time: args.rotate_seconds.map(Duration::from_secs),
                    keep: args.rotate_files,
                };
                let interfaces = interfaces.collect();
                let file = CaptureFile::create(
                    path,
                    args.format(),
                    rotation,
                    interfaces,
                    snaplen,
                    linktype,
                )?;
                Destination::File {
                    file: Box::new(file),
                    dropped: 0,
                    linktype,
                }
            }
        };
        let sources = sources.into_iter().map(|source| {
            let place = source.place();
            (source, place)
        });
        Ok(Sink {
            sources: sources.collect(),
            out,
            kind,
            programs: Names::default(),
            errors: BTreeMap::new(),
        })
    }

    /// One packet; `diff`: what a program changed in it, `wall`: its time in ns since 1970.
    pub fn packet(
        &mut self,
        seen: &Seen<'_>,
        diff: Option<&Diff>,
        wall: u64,
        late: bool,
    ) -> Result<Flow> {
        let at = self
            .sources
            .iter()
            .position(|(source, _)| source.is_of(seen))
            .unwrap_or_default();
        let (data, len) = seen.packet();
        match &mut self.kind {
            Destination::Lines(presenter) => {
                let source = self.sources.get(at);
                let shown = Shown {
                    wall,
                    iface: source.map_or("?", |(source, _)| &source.iface),
                    place: source.and_then(|(_, place)| place.as_deref()),
                    queue: Some(seen.queue),
                    id: Some(seen.id),
                    verdict: seen.verdict,
                    linktype: source.map_or(Linktype::ETHERNET, |(source, _)| source.linktype),
                    len,
                    data,
                    late,
                    comment: None,
                    diff,
                };
                presenter.packet(&mut self.out, &shown)
            }
            Destination::File {
                file,
                dropped,
                linktype,
            } => {
                let dropped = std::mem::take(dropped);
                let source = self.sources.get(at).map(|(source, _)| source.linktype);
                let header = if source == Some(*linktype) {
                    None
                } else {
                    link::made_up_header(data)
                };
                let framed = header.map(|header| [&header[..], data].concat());
                file.packet(&Packet {
                    interface: at as u32,
                    ts: wall,
                    len: len + header.map_or(0, |header| header.len() as u32),
                    data: framed.as_deref().unwrap_or(data),
                    direction: Some(Direction::Inbound),
                    id: Some(seen.id),
                    queue: Some(seen.queue),
                    verdict: seen.verdict.map(u64::from),
                    dropped: (dropped > 0).then_some(dropped),
                    comment: header.map(|_| link::MADE_UP),
                })?;
                Ok(Flow::Continue)
            }
        }
    }

    /// Why a packet was dropped: a line, or a count for the end.
    pub fn problem(&mut self, problem: &Problem, wall: u64) -> Result<()> {
        let words = problem.words(&mut self.programs);
        let source = self
            .sources
            .iter()
            .find(|(source, _)| source.ifindex == problem.ifindex);
        let iface = source.map_or("?", |(source, _)| &source.iface);
        match &mut self.kind {
            Destination::Lines(presenter) => {
                presenter.problem(&mut self.out, problem, iface, &words, wall)
            }
            Destination::File { .. } => {
                let words = format!("{iface}: {}: {words}", problem.name());
                *self.errors.entry(words).or_default() += u64::from(problem.count);
                Ok(())
            }
        }
    }

    /// What the frame begins with.
    pub fn linktype(&self, seen: &Seen<'_>) -> Linktype {
        if seen.outer_link > 0 {
            return Linktype::ETHERNET;
        }
        let source = self.sources.iter().find(|(source, _)| source.is_of(seen));
        source.map_or(Linktype::ETHERNET, |(source, _)| source.linktype)
    }

    /// So many packets were lost just now: the next one in the file says it.
    pub fn lost(&mut self, more: u64) {
        if let Destination::File { dropped, .. } = &mut self.kind {
            *dropped += more;
        }
    }

    /// Whether [`Sink::lost`] has a use.
    pub fn tells_loss(&self) -> bool {
        matches!(self.kind, Destination::File { .. })
    }

    pub fn flush(&mut self) -> Result<()> {
        match &mut self.kind {
            Destination::Lines(_) => self.out.flush(),
            Destination::File { file, .. } => file.flush(),
        }
    }

    /// The statistics blocks of a capture file. `counts`: of each source, in their order.
    pub fn close(&mut self, counts: &[Counts], begun: SystemTime) -> Result<()> {
        let Destination::File { file, .. } = &mut self.kind else {
            return Ok(());
        };
        for (interface, counts) in counts.iter().enumerate() {
            let counters = Counters {
                start: nanoseconds(begun),
                end: nanoseconds(SystemTime::now()),
                received: Some(counts.seen),
                accepted: Some(counts.matched),
                dropped: Some(counts.lost),
                delivered: Some(counts.sent.saturating_sub(counts.lost)),
            };
            file.statistics(interface as u32, &counters)?;
        }
        file.flush()
    }

    /// The summary.
    pub fn report(&mut self, total: Counts, captured: u64, loss: &Loss) -> Result<()> {
        for (words, count) in &self.errors {
            eprintln!("netprobe: {count} times: {words}");
        }
        present::summary(&mut self.out, total, captured, loss)
    }
}

/// The link type of a file with packets of all these: theirs, or that of Ethernet where they differ.
fn common(sources: &[CapturePoint]) -> Linktype {
    let mut types = sources.iter().map(|source| source.linktype);
    let first = types.next().unwrap_or(Linktype::ETHERNET);
    if types.all(|linktype| linktype == first) {
        first
    } else {
        Linktype::ETHERNET
    }
}

fn nanoseconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as u64)
}
