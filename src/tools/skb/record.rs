//! `netprobe record`: a run of `netprobe skb` whose events go into a recording, as they came, with the news that their lines need.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustc_hash::FxHashSet;
use serde::{Deserialize, Serialize};

use crate::bpf::skb::types::skb_event;
use crate::engine::merge::Record;
use crate::filter::expr::Compiled;
use crate::os::monotonic_ns;
use crate::recording::block::{Kind, Packed, Packer};
use crate::recording::chunk::Chunk;
use crate::run::Flow;
use crate::run::loss::Loss;
use crate::text::json;

use super::capture::Capture;
use super::columns;
use super::event::{Event, Point};
use super::flight::{Flight, Triggered};
use super::members::{Members, Shown};
use super::news::{News, Teller};
use super::present::Presenter;
use super::style::Style;
use super::{Lines, decode};

/// A chunk is closed so long after its first event, at the latest: what a crash costs.
const CLOSE: Duration = Duration::from_secs(1);
/// Packets whose first event has been seen.
const SEEN: usize = 65_536;

/// Where the blocks of a recording go.
pub trait Sink {
    /// Appends whole blocks.
    fn write(&mut self, blocks: &[u8]) -> Result<()>;
    /// The file is full: another one is to be begun.
    fn is_full(&self) -> bool;
    /// Begins another file.
    fn begin_anew(&mut self) -> Result<()>;
    /// The recording is as large as it may be.
    fn is_over(&self) -> bool;
}

/// Where a recording goes.
pub enum Target {
    File(Box<dyn Sink>),
    Flight(Box<Flight>),
}

/// Makes a [`Target`]: a file is created when nothing else can be wrong any more.
pub trait MakeTarget {
    /// `expression`: of the run.
    fn make(&self, expression: Option<&Compiled>) -> Result<Target>;
}

/// What a recording begins with.
#[derive(Debug, Serialize, Deserialize)]
pub struct Head {
    /// `skb`
    pub tool: String,
    /// version of the netprobe that recorded
    pub netprobe: String,
    pub kernel: String,
    pub machine: String,
    /// the command line
    pub command: Vec<String>,
    /// section and its bytes, of those that events may have; 0: the part that all events have
    pub layout: Vec<(u32, u32)>,
    pub style: Style,
    /// of sk_buffs, of XDP packets
    pub members: [Shown; 2],
    /// CLOCK_MONOTONIC when all was attached, ns; 0: not known
    #[serde(default)]
    pub since: u64,
    /// of a flight recorder's file
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub triggered: Option<Triggered>,
}

/// What a recording ends with.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct End {
    /// It goes on in another file.
    pub goes_on: bool,
    /// CLOCK_MONOTONIC of the end, ns; 0: not known
    #[serde(default)]
    pub until: u64,
    pub loss: Loss,
}

impl Head {
    pub fn new(style: Style, members: [&Members; 2]) -> Self {
        let uname = nix::sys::utsname::uname().ok();
        let word = |of: fn(&nix::sys::utsname::UtsName) -> &std::ffi::OsStr| {
            let word = uname.as_ref().map(|u| of(u).to_string_lossy().into_owned());
            word.unwrap_or_default()
        };
        Self {
            tool: "skb".to_owned(),
            netprobe: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: word(|u| u.release()),
            machine: word(|u| u.machine()),
            command: std::env::args().collect(),
            layout: layout(style.shown),
            style,
            members: members.map(Members::shown),
            since: monotonic_ns().unwrap_or_default(),
            triggered: None,
        }
    }
}

/// Bytes of each of these sections, but for those without a fixed size: the packet's bytes, the stack.
pub fn layout(sections: u32) -> Vec<(u32, u32)> {
    let used = columns::ALL
        .iter()
        .filter(|column| sections & column.section != 0 && column.size != 0);
    std::iter::once((0, size_of::<skb_event>()))
        .chain(used.map(|column| (column.section, column.size)))
        .map(|(section, size)| (section, size as u32))
        .collect()
}

/// Which packet an event is of, by identity; `None`: no other event is of the same, or nobody knows.
pub fn identity(event: &Event) -> Option<u64> {
    match (event.packet, event.life) {
        (Some(packet), _) => Some(packet.number << 16 | u64::from(packet.cpu)),
        (None, life) => life,
    }
}

/// Packets whose first event was seen; the oldest are forgotten.
#[derive(Default)]
struct Seen {
    set: FxHashSet<u64>,
    order: VecDeque<u64>,
}

impl Seen {
    /// It is the first event of its packet.
    fn is_first(&mut self, event: &Event) -> bool {
        let Some(packet) = identity(event) else {
            // Drops, and XDP packets, of which the entry is the first event.
            return event.dropped || event.program == Some(Point::Enter);
        };
        if !self.set.insert(packet) {
            return false;
        }
        self.order.push_back(packet);
        if self.order.len() > SEEN {
            if let Some(oldest) = self.order.pop_front() {
                self.set.remove(&oldest);
            }
        }
        true
    }
}

/// Writes the recording.
pub struct Recorder {
    to: Target,
    head: Head,
    snaplen: u32,
    packer: Packer,
    chunk: Chunk,
    /// when the chunk got its first event
    since: Option<Instant>,
    /// all events up to this time (ns of CLOCK_MONOTONIC) have come
    pub reached: u64,
    /// blocks of packets, for other programs
    packets: Capture<Vec<u8>>,
    seen: Seen,
    teller: Teller,
    scratch: Vec<u8>,
    /// lines are printed, too
    lines: bool,
    /// the most events, and how many there were
    limit: u64,
    events: u64,
    /// a write has failed: what comes is counted
    failed: bool,
    unwritten: u64,
}

/// What of a run's flags decides about its recording.
pub struct Options {
    pub snaplen: u32,
    pub lines: bool,
    pub limit: u64,
}

impl Recorder {
    pub fn new(
        to: Target,
        head: Head,
        presenter: &mut Presenter,
        options: &Options,
    ) -> Result<Self> {
        let mut recorder = Self {
            to,
            head,
            snaplen: options.snaplen,
            packer: Packer::new().context("failed to start zstd")?,
            chunk: Chunk::default(),
            since: None,
            reached: 0,
            packets: packets(options.snaplen)?,
            seen: Seen::default(),
            teller: Teller::default(),
            scratch: Vec::new(),
            lines: options.lines,
            limit: options.limit,
            events: 0,
            failed: false,
            unwritten: 0,
        };
        recorder.begin(presenter)?;
        Ok(recorder)
    }

    /// The head, and all that is known, at the begin of a file. A flight recorder's file begins later.
    fn begin(&mut self, presenter: &mut Presenter) -> Result<()> {
        let all = self.teller.all(presenter, &self.head.style);
        let mut blocks = std::mem::take(self.packets.target());
        let to = match &mut self.to {
            Target::File(to) => to,
            Target::Flight(flight) => {
                flight.introduce(&mut blocks);
                eprintln!("netprobe: {}", flight.summary());
                return self.begin_chunk();
            }
        };
        let packer = &mut self.packer;
        blocks.extend(first_blocks(packer, &self.head, &all)?);
        to.write(&blocks)
    }

    /// Chunks of a flight recorder are shown without those before them.
    fn begin_chunk(&mut self) -> Result<()> {
        if let Target::Flight(_) = self.to {
            for news in self.teller.state() {
                self.news(&news)?;
            }
        }
        Ok(())
    }

    fn news(&mut self, news: &News) -> Result<()> {
        self.scratch.clear();
        json::push(&mut self.scratch, news)?;
        self.chunk.news(&self.scratch);
        Ok(())
    }

    fn pack(&mut self) -> Result<Packed> {
        let about = (self.chunk.events, self.chunk.times);
        let contents = &self.chunk.contents;
        let packed = self.packer.pack(Kind::Events, about, contents);
        self.chunk.clear();
        self.since = None;
        packed.context("failed to compress")
    }

    /// One event: its line, where there are lines, then the recording.
    pub(super) fn event(&mut self, record: Record<'_>, lines: &mut Lines<'_, '_>) -> Result<Flow> {
        let mut flow = Flow::Continue;
        if let Target::Flight(flight) = &mut self.to {
            let reasons = &mut lines.presenter.view.reasons;
            if let Some(by) = flight.event(record.bytes, reasons) {
                let triggered =
                    by.map_or(Ok(()), |by| self.trigger((by, record.ts), lines.presenter));
                return triggered.map(|()| flow);
            }
        }
        if decode::decode(&mut lines.event, record.bytes, lines.snap_len).is_some() {
            if self.limit > 0 && self.events >= self.limit {
                return Ok(Flow::Stop);
            }
            flow = self.look(record.late, lines)?;
        } else {
            lines.undecodable += 1;
        }
        for news in self.teller.news(lines.presenter) {
            self.news(&news)?;
        }
        (self.chunk).event(record.ts, record.cpu, record.late, record.bytes);
        if self.chunk.is_full() {
            self.flush(lines.presenter)?;
        }
        match &self.to {
            Target::File(to) if to.is_over() => Ok(Flow::Stop),
            _ => Ok(flow),
        }
    }

    /// Asks for all that lines of the event need, and shows it.
    fn look(&mut self, late: bool, lines: &mut Lines<'_, '_>) -> Result<Flow> {
        lines.presenter.prepare(&lines.event)?;
        lines.presenter.view.ask(&lines.event);
        let mut flow = Flow::Continue;
        if self.lines {
            flow = lines.shown(late)?;
        }
        self.events += 1;
        if self.limit > 0 && self.events >= self.limit {
            flow = Flow::Stop;
        }
        let event = &lines.event;
        if self.seen.is_first(event) {
            let comment = lines.presenter.comment(event);
            let wall = lines.presenter.wall(event.head.ts);
            self.packets.packet(event, wall, &comment)?;
        }
        Ok(flow)
    }

    /// Writes what has waited for a second. To be called often.
    pub fn tick(&mut self, presenter: &mut Presenter) -> Result<()> {
        if self.chunk.events > 0 {
            let since = *self.since.get_or_insert_with(Instant::now);
            if since.elapsed() >= CLOSE {
                self.flush(presenter)?;
            }
        }
        let Target::Flight(flight) = &mut self.to else {
            return Ok(());
        };
        flight.forget(self.reached);
        if flight.is_complete(self.reached) {
            return self.land(presenter);
        }
        match flight.now_triggers(monotonic_ns()?, self.reached) {
            Some(trigger) => self.trigger(trigger, presenter),
            None => Ok(()),
        }
    }

    /// The run's losses are to be told ([`Recorder::loss`]) before the next tick.
    pub fn wants_loss(&self) -> bool {
        let now = monotonic_ns().unwrap_or_default();
        matches!(&self.to, Target::Flight(flight) if flight.wants_loss(now, self.reached))
    }

    /// What the run has lost since its start.
    pub fn loss(&mut self, loss: Loss) -> Result<()> {
        if let Target::Flight(flight) = &mut self.to {
            flight.loss(monotonic_ns()?, loss);
        }
        Ok(())
    }

    /// A flight recorder's file begins, unless one has begun a short while ago.
    fn trigger(&mut self, (by, at): (String, u64), presenter: &mut Presenter) -> Result<()> {
        let Target::Flight(flight) = &mut self.to else {
            return Ok(());
        };
        if !flight.may_begin() {
            return Ok(());
        }
        if self.chunk.events > 0 {
            self.flush(presenter)?;
        }
        let Target::Flight(flight) = &mut self.to else {
            return Ok(());
        };
        let all = self.teller.everything(presenter);
        let head = &mut self.head;
        flight.begin(&mut self.packer, (by, at), |packer, triggered| {
            head.triggered = Some(triggered.clone());
            head.since = triggered.at - triggered.before;
            first_blocks(packer, head, &all)
        })
    }

    /// The end of a flight recorder's file.
    fn land(&mut self, presenter: &mut Presenter) -> Result<()> {
        if self.chunk.events > 0 {
            self.flush(presenter)?;
        }
        let Target::Flight(flight) = &mut self.to else {
            return Ok(());
        };
        let end = End {
            goes_on: false,
            until: monotonic_ns()?,
            loss: flight.lost(),
        };
        let mut block = Vec::new();
        self.scratch.clear();
        json::push(&mut self.scratch, &end)?;
        self.packer
            .push(&mut block, Kind::End, (0, (0, 0)), &self.scratch)?;
        flight.finish(&block)
    }

    fn flush(&mut self, presenter: &mut Presenter) -> Result<()> {
        let events = u64::from(self.chunk.events);
        // Packets first: the others find them where the events are.
        let mut blocks = std::mem::take(self.packets.target());
        let packed = self.pack()?;
        if let Target::Flight(flight) = &mut self.to {
            flight.introduce(&mut blocks);
            flight.keep(&mut self.packer, packed, &blocks)?;
            return self.begin_chunk();
        }
        self.packer.frame(&mut blocks, &packed);
        if self.failed {
            self.unwritten += events;
            return Ok(());
        }
        let written = self.write(&blocks, presenter);
        if written.is_err() {
            self.failed = true;
            self.unwritten += events;
        }
        blocks.clear();
        if self.packets.target().is_empty() {
            *self.packets.target() = blocks;
        }
        written
    }

    fn write(&mut self, blocks: &[u8], presenter: &mut Presenter) -> Result<()> {
        let Target::File(to) = &mut self.to else {
            return Ok(());
        };
        to.write(blocks)?;
        if !to.is_full() || to.is_over() {
            return Ok(());
        }
        let end = End {
            goes_on: true,
            until: monotonic_ns()?,
            ..End::default()
        };
        self.finish(&end)?;
        if let Target::File(to) = &mut self.to {
            to.begin_anew()?;
        }
        self.packer.restart();
        self.packets = packets(self.snaplen)?;
        self.begin(presenter)
    }

    /// The end of a file.
    fn finish(&mut self, end: &End) -> Result<()> {
        self.packets.statistics(end.loss.lost)?;
        let mut blocks = std::mem::take(self.packets.target());
        self.scratch.clear();
        json::push(&mut self.scratch, end)?;
        self.packer
            .push(&mut blocks, Kind::End, (0, (0, 0)), &self.scratch)?;
        match &mut self.to {
            Target::File(to) => to.write(&blocks),
            Target::Flight(_) => Ok(()),
        }
    }

    /// The end of a flight recorder.
    fn disarm(&mut self, presenter: &mut Presenter, loss: &Loss) -> Result<()> {
        self.loss(loss.clone())?;
        if matches!(&self.to, Target::Flight(flight) if flight.is_open()) {
            self.land(presenter)?;
        }
        if let Target::Flight(flight) = &self.to {
            flight.tell();
        }
        Ok(())
    }

    /// The end of the recording.
    pub fn close(&mut self, presenter: &mut Presenter, loss: &Loss) -> Result<()> {
        if let Target::Flight(_) = self.to {
            return self.disarm(presenter, loss);
        }
        let flushed = match self.chunk.is_empty() {
            true => Ok(()),
            false => self.flush(presenter),
        };
        if self.unwritten > 0 {
            eprintln!("netprobe: {} events were not recorded", self.unwritten);
        }
        flushed?;
        if self.failed {
            return Ok(());
        }
        let end = End {
            goes_on: false,
            until: monotonic_ns()?,
            loss: loss.clone(),
        };
        self.finish(&end)
    }
}

/// The head, and what is known at the begin of a file.
fn first_blocks(packer: &mut Packer, head: &Head, all: &[News]) -> Result<Vec<u8>> {
    let (mut blocks, mut text) = (Vec::new(), Vec::new());
    json::push(&mut text, head)?;
    packer.push(&mut blocks, Kind::Head, (0, (0, 0)), &text)?;
    let mut chunk = Chunk::default();
    for news in all {
        text.clear();
        json::push(&mut text, news)?;
        chunk.news(&text);
        if chunk.is_full() {
            packer.push(&mut blocks, Kind::Events, (0, (0, 0)), &chunk.contents)?;
            chunk.clear();
        }
    }
    packer.push(&mut blocks, Kind::Events, (0, (0, 0)), &chunk.contents)?;
    Ok(blocks)
}

fn packets(snaplen: u32) -> Result<Capture<Vec<u8>>> {
    Capture::begin(Vec::new(), "the recording".to_owned(), snaplen)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tools::skb::columns;
    use crate::tools::skb::event::{SECTION_DATA, SECTION_STACK};

    /// A section that is new, or of another size, is in the layout: an older recording is refused, and not misread.
    #[test]
    fn the_layout_has_each_section() {
        let bytes = [0; 4096];
        for column in &columns::ALL {
            if column.section & (SECTION_DATA | SECTION_STACK) != 0 {
                continue;
            }
            let mut event = Event::default();
            let rest = (column.decode)(&mut event, &bytes, 0).unwrap();
            let size = (bytes.len() - rest.len()) as u32;
            let layout = layout(column.section);
            assert_eq!(layout[1..], [(column.section, size)]);
        }
    }

    #[test]
    fn a_packet_is_new_once() {
        let mut seen = Seen::default();
        let of = |life| Event {
            life: Some(life),
            ..Event::default()
        };
        assert!(seen.is_first(&of(1)) && !seen.is_first(&of(1)));
        for life in 2..=SEEN as u64 + 1 {
            assert!(seen.is_first(&of(life)));
        }
        assert_eq!(seen.set.len(), SEEN);
    }
}
