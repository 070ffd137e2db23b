//! `netprobe report`: what a recording shows, on any machine, without privilege. It knows what an event is by `tools::skb` alone.

pub mod args;
pub(super) mod filter;
mod html;
pub(super) mod input;
mod perfetto;
mod show;
mod sort;
pub(super) mod stats;

use anyhow::Result;
use crossbeam_channel::Receiver;
use nix::sys::signal::Signal;

use crate::recording::chunk::Item;
use crate::run::Flow;
use crate::run::loss::Loss;
use crate::run::output::Output;
use crate::run::signals;
use crate::text::json;
use crate::tools::skb::event::Event;
use crate::tools::skb::record::{End, Head, identity};
use crate::tools::skb::recorded::Recorded;
use crate::tools::why::file::{Answer, TOOL};
use crate::usage::usage;

use args::{Args, Format, Sort};
use filter::Filter;
use html::Html;
use input::View;
use perfetto::Perfetto;
use show::{Lines, Packets, Show};
use sort::{Key, Sorter};
use stats::Stats;

pub fn run(args: &Args) -> Result<()> {
    run_until(args, &signals::stop_channel()?)
}

/// The same, until `stop` has a message.
pub fn run_until(args: &Args, stop: &Receiver<Signal>) -> Result<()> {
    if args.output_limit_lines > 0 && matches!(args.format(), Format::Perfetto | Format::Html) {
        return Err(usage("--output-limit-lines: this format has no lines"));
    }
    if args.stats && !matches!(args.format(), Format::Text | Format::Json) {
        return Err(usage("--stats: as text or as JSON"));
    }
    let by_packet = matches!(args.format(), Format::Perfetto | Format::Html);
    if by_packet && args.sort.is_some() {
        return Err(usage("--sort: this format has an order of its own"));
    }
    let filter = Filter::new(&args.filter)?;
    let limit = args.output_limit_lines;
    let show: Box<dyn Show> = match args.format() {
        _ if args.stats => Box::new(Stats::new(Output::open(&args.output())?)),
        Format::Text | Format::Json => Box::new(Lines(Output::open(&args.output())?)),
        Format::Pcapng => Box::new(Packets::new(args.output_file.as_deref(), limit, false)?),
        Format::Packets => Box::new(Packets::new(args.output_file.as_deref(), limit, true)?),
        Format::Html => Box::new(Html::new(Output::open(&args.output())?)?),
        Format::Perfetto => Box::new(Perfetto::new(Output::open(&args.output())?)),
    };
    let sort = match by_packet {
        true => Some(Sort::Packet),
        false => args.sort,
    };
    let mut report = Report {
        args,
        filter,
        show,
        recorded: None,
        answers: false,
        sort,
        sorter: Sorter::default(),
        number: 0,
        loss: None,
        undecodable: 0,
        event: Event::default(),
    };
    let read = input::read(&args.files, stop, &mut report);
    read.and(report.finish())
}

struct Report<'a> {
    args: &'a Args,
    filter: Filter,
    show: Box<dyn Show>,
    recorded: Option<Recorded>,
    /// the recording at hand is of answers (`netprobe why -w`), not of events
    answers: bool,
    sort: Option<Sort>,
    /// events that wait for the end of the recording
    sorter: Sorter,
    number: u64,
    /// of the recording at hand, where it has ended
    loss: Option<Loss>,
    undecodable: u64,
    /// the one at hand
    event: Event,
}

impl View for Report<'_> {
    fn begin(&mut self, head: Head, goes_on: bool) -> Result<()> {
        let mut style = head.style.clone();
        style.timestamp = self.args.timestamp.unwrap_or(style.timestamp);
        style.all |= self.args.all;
        style.tcp_flags |= self.args.output_tcp_flags;
        style.netns_names |= self.args.output_netns_names;
        let same = |recorded: &Recorded| goes_on && recorded.style == style;
        if self.recorded.as_ref().is_some_and(same) {
            return Ok(());
        }
        self.end_of_recording()?;
        if let Some(t) = &head.triggered {
            eprintln!("netprobe: {}", t.words());
        }
        self.answers = head.tool == TOOL;
        if self.answers {
            self.recorded = None;
            let lines = self.sort.is_none() && self.filter.is_empty();
            return self.show.begin_answers(lines);
        }
        let recorded = Recorded::new(&head, style)?;
        self.show.begin(&recorded, &head)?;
        self.recorded = Some(recorded);
        Ok(())
    }

    fn item(&mut self, item: Item<'_>) -> Result<Flow> {
        if self.answers {
            return self.answer(item);
        }
        let Some(recorded) = &mut self.recorded else {
            return Ok(Flow::Continue);
        };
        let (late, bytes) = match item {
            Item::Event { late, bytes, .. } => (late, bytes),
            Item::News(bytes) => {
                recorded.learn(bytes);
                return Ok(Flow::Continue);
            }
        };
        if recorded.decode(&mut self.event, bytes).is_none() {
            self.undecodable += 1;
            return Ok(Flow::Continue);
        }
        let event = &self.event;
        if !self.filter.matches(event, recorded) {
            return Ok(Flow::Continue);
        }
        if recorded.hides(event)? {
            return Ok(Flow::Continue);
        }
        let Some(sort) = self.sort else {
            return self.show.event(recorded, event, late);
        };
        self.number += 1;
        let packed = pack(recorded.dumps.as_deref(), bytes);
        self.sorter
            .push(first_key(sort, event, self.number), &packed)?;
        Ok(Flow::Continue)
    }

    fn end(&mut self, end: &End) -> Result<()> {
        self.loss = (!end.goes_on).then(|| end.loss.clone());
        Ok(())
    }

    fn tick(&mut self) -> Result<()> {
        self.show.flush()
    }
}

impl Report<'_> {
    /// An answer of why.
    fn answer(&mut self, item: Item<'_>) -> Result<Flow> {
        let Item::News(bytes) = item else {
            return Ok(Flow::Continue);
        };
        match json::read::<Answer>(bytes) {
            Ok(answer) => self.show.answer(&answer),
            Err(_) => {
                self.undecodable += 1;
                Ok(Flow::Continue)
            }
        }
    }

    /// Everything of the recording has been read, or as much of it as is wanted.
    fn end_of_recording(&mut self) -> Result<()> {
        if std::mem::take(&mut self.answers) {
            return self.show.end(self.loss.take().as_ref());
        }
        let Some(recorded) = &mut self.recorded else {
            return Ok(());
        };
        let mut sorter = std::mem::take(&mut self.sorter);
        match self.sort {
            None => {}
            Some(Sort::Time) => replay(&mut sorter, recorded, self.show.as_mut())?,
            Some(Sort::Packet | Sort::Latency) => {
                let latency = self.sort == Some(Sort::Latency);
                let mut by_packet = Sorter::default();
                by_packets(&mut sorter, &mut by_packet, latency)?;
                drop(sorter);
                replay(&mut by_packet, recorded, self.show.as_mut())?;
            }
        }
        let odd = recorded.odd();
        if odd > 0 {
            eprintln!("netprobe: {odd} pieces of news make no sense: names may be missing");
        }
        // Those that the live run could not decode are in its own count.
        let known = self.loss.as_ref().map_or(0, |loss| loss.undecodable);
        if self.undecodable > known {
            eprintln!("netprobe: {} events could not be decoded", self.undecodable);
        }
        self.undecodable = 0;
        recorded.tell_hidden();
        self.show.end(self.loss.take().as_ref())
    }

    fn finish(&mut self) -> Result<()> {
        self.end_of_recording()?;
        if self.filter.without_bytes > 0 {
            eprintln!(
                "netprobe: --filter: {} events have no packet's bytes, and do not match",
                self.filter.without_bytes
            );
        }
        self.show.finish()
    }
}

/// The key of an event in the first pass: in order of time, or packet by packet.
fn first_key(sort: Sort, event: &Event, number: u64) -> Key {
    match sort {
        Sort::Time => [event.head.ts, number, 0, 0],
        Sort::Packet | Sort::Latency => {
            // Of a packet that nobody knows it is the only event.
            let packet = identity(event).unwrap_or(1 << 63 | number);
            [packet, event.head.ts, number, 0]
        }
    }
}

/// Packet by packet to the order of packets. One look runs ahead to the packet's end, which says how long it took.
fn by_packets(from: &mut Sorter, to: &mut Sorter, latency: bool) -> Result<()> {
    let (mut event, mut nothing) = (Vec::new(), Vec::new());
    // First the ends, packet by packet, themselves in a file.
    let mut ends = Sorter::default();
    let mut ahead = from.sorted()?;
    let mut packets = 0u64;
    while let Some([packet, first, ..]) = ahead.peek() {
        let mut last = first;
        while let Some([_, ts, ..]) = ahead.peek().filter(|key| key[0] == packet) {
            last = ts;
            ahead.next(&mut event)?;
        }
        packets += 1;
        ends.push([packets, first, last, 0], &[])?;
    }
    drop(ahead);
    let mut ends = ends.sorted()?;
    let mut behind = from.sorted()?;
    while let Some([_, first, last, _]) = ends.next(&mut nothing)? {
        let Some([packet, ..]) = behind.peek() else {
            break;
        };
        let rank = match latency {
            true => u64::MAX - (last - first),
            false => first,
        };
        while let Some([_, ts, number, _]) = behind.peek().filter(|key| key[0] == packet) {
            behind.next(&mut event)?;
            to.push([rank, packet, ts, number], &event)?;
        }
    }
    Ok(())
}

/// Shows events in the order of the sorter.
fn replay(sorter: &mut Sorter, recorded: &mut Recorded, show: &mut dyn Show) -> Result<()> {
    let mut sorted = sorter.sorted()?;
    let (mut packed, mut event) = (Vec::new(), Event::default());
    while sorted.next(&mut packed)?.is_some() {
        let Some((dumps, bytes)) = unpack(&packed) else {
            continue;
        };
        if !dumps.is_empty() {
            recorded.learn(dumps);
        }
        if recorded.decode(&mut event, bytes).is_none() {
            continue;
        }
        if show.event(recorded, &event, false)? == Flow::Stop {
            break;
        }
    }
    Ok(())
}

/// An event with the texts that belong to it.
fn pack(dumps: Option<&[u8]>, event: &[u8]) -> Vec<u8> {
    let dumps = dumps.unwrap_or_default();
    let len = dumps.len() as u32;
    [&len.to_le_bytes()[..], dumps, event].concat()
}

fn unpack(packed: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = packed.split_first_chunk()?;
    rest.split_at_checked(u32::from_le_bytes(*len) as usize)
}
