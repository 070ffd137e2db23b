//! `netprobe xdpdump`: packets captured at XDP, before the stack, beside whatever XDP program is there.

pub mod args;
pub mod chain;
mod decode;
mod file;
mod list;
pub mod place;
mod present;
pub mod probes;

use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::time::Instant;

use anyhow::{Context, Result};
use libbpf_rs::OpenObject;

use crate::engine::drain::Drain;
use crate::engine::loss::Loss;
use crate::engine::merge::Record;
use crate::engine::session::{self, Consumer, Flow};
use crate::engine::{log, signals};
use crate::kernel::clock::WallClock;
use crate::kernel::features::Features;
use crate::kernel::netns::Netns;
use crate::kernel::{netdev, xdp};
use crate::output::pcapng::{Counters, Direction, Interface, Packet};
use crate::output::{self, Output};

use args::Args;
use file::{CaptureFile, Rotation};
use place::{Lock, Place};
use present::{Presenter, Shown};
use probes::{Capture, Options};

pub fn run(args: &Args) -> Result<()> {
    args.check()?;
    if let Some(netns) = &args.netns {
        Netns::parse(netns)?.enter()?;
    }
    log::init(args.engine.verbose);
    if args.list {
        return list::run(&args.output);
    }
    Features::detect().require_xdp("xdpdump")?;
    if args.restore {
        return restore(&args.iface);
    }
    capture(args)
}

fn restore(ifaces: &[String]) -> Result<()> {
    let lock = Lock::take()?;
    if ifaces.is_empty() {
        return chain::restore_all(&lock);
    }
    for iface in ifaces {
        let place = Place::find(iface, &lock)?;
        if let Some(owner) = chain::recover(&place)?.as_ref().and_then(place::owner) {
            eprintln!("netprobe: {iface} is being captured by process {owner}; end that first");
        }
    }
    Ok(())
}

fn capture(args: &Args) -> Result<()> {
    let ifaces = args
        .iface
        .iter()
        .map(|name| Ok((netdev::index(name)?, name.clone())))
        .collect::<Result<Vec<_>>>()?;
    let stop = signals::stop_channel()?;
    let clock = WallClock::new()?;
    let begun = std::time::SystemTime::now();
    let options = Options {
        snaplen: args.capture_len(),
        sample: args.sample,
    };
    let mut sink = Sink::open(args, &ifaces)?;

    let mut storage: Vec<MaybeUninit<OpenObject>> =
        ifaces.iter().map(|_| MaybeUninit::uninit()).collect();
    let mut captures: Vec<Capture<'_>> = Vec::new();
    let mut drain = None;
    for ((_, name), storage) in ifaces.iter().zip(&mut storage) {
        let modes = args.xdp_mode.modes(netdev::driver(name).as_deref());
        let events = captures.first().map(Capture::events).transpose()?;
        let capture = Capture::begin(
            name,
            &options,
            modes,
            events.as_ref().map(AsFd::as_fd),
            storage,
        )?;
        if drain.is_none() {
            drain = Some(Drain::start(
                capture.events()?.as_fd(),
                args.engine.buffer(),
            )?);
        }
        tell(&capture);
        captures.push(capture);
    }
    let _promiscuous = promiscuous(args, &captures)?;
    let drain = drain.context("no interface")?;
    output::ready(args.output.ready_file.as_deref())?;

    let mut consumer = Live {
        sink: &mut sink,
        clock,
        captured: 0,
        limit: args.limit(),
        undecodable: 0,
    };
    let deadline = args.duration().map(|duration| Instant::now() + duration);
    let mut taken_away = Ok(());
    let ended = session::run(drain, &stop, deadline, &mut consumer, || {
        for capture in &mut captures {
            let ended = capture.end();
            if taken_away.is_ok() {
                taken_away = ended;
            }
        }
        xdp::settle();
    });
    let (captured, undecodable) = (consumer.captured, consumer.undecodable);
    let received = ended?;
    let mut loss = Loss {
        received: received.events,
        late: received.late,
        undecodable: undecodable + received.short,
        ..Loss::default()
    };
    let mut counts = Vec::new();
    for capture in &captures {
        capture.add_loss(&mut loss)?;
        counts.push((capture.place.name.clone(), capture.counts()?));
    }
    sink.finish(&counts, captured, &loss, begun)?;
    taken_away
}

/// Says on stderr where the programs stand.
fn tell(capture: &Capture<'_>) {
    let mode = capture.mode.name();
    match capture.before {
        Some(id) => eprintln!(
            "netprobe: capturing at {} ({mode} XDP), in front of program {id}, by tail call",
            capture.place.name
        ),
        None => eprintln!("netprobe: capturing at {} ({mode} XDP)", capture.place.name),
    }
}

fn promiscuous(args: &Args, captures: &[Capture<'_>]) -> Result<Vec<std::os::fd::OwnedFd>> {
    let wanted = captures.iter().filter(|_| args.promiscuous);
    wanted
        .map(|capture| {
            netdev::promiscuous(capture.place.ifindex)
                .with_context(|| format!("failed to make {} promiscuous", capture.place.name))
        })
        .collect()
}

/// Where packets go: lines, or a capture file.
enum Sink {
    Lines {
        out: Output,
        presenter: Box<Presenter>,
        names: Vec<(u32, String)>,
    },
    File {
        file: Box<CaptureFile>,
        out: Output,
        ifindices: Vec<u32>,
        dropped: u64,
    },
}

impl Sink {
    fn open(args: &Args, ifaces: &[(u32, String)]) -> Result<Self> {
        let out = Output::open(&args.output)?;
        let Some(path) = &args.write else {
            let names = ifaces.to_vec();
            return Ok(Sink::Lines {
                out,
                presenter: Box::new(Presenter::new(args)),
                names,
            });
        };
        let interfaces = ifaces
            .iter()
            .map(|(_, name)| Interface {
                snaplen: args.told_snaplen(),
                ..Interface::ethernet(name)
            })
            .collect();
        let rotation = Rotation {
            bytes: args.rotate_size.map(|mb| mb * 1_000_000),
            time: args.rotate_seconds.map(std::time::Duration::from_secs),
            keep: args.rotate_files,
        };
        let file = CaptureFile::create(
            path,
            args.format(),
            rotation,
            interfaces,
            args.told_snaplen(),
        )?;
        let ifindices = ifaces.iter().map(|(index, _)| *index).collect();
        Ok(Sink::File {
            file: Box::new(file),
            out,
            ifindices,
            dropped: 0,
        })
    }

    fn packet(&mut self, seen: &decode::Seen<'_>, wall: u64, late: bool) -> Result<Flow> {
        match self {
            Sink::Lines {
                out,
                presenter,
                names,
            } => {
                let name = names.iter().find(|(index, _)| *index == seen.ifindex);
                let shown = Shown {
                    wall,
                    iface: name.map_or("?", |(_, name)| name),
                    queue: Some(seen.queue),
                    id: Some(seen.id),
                    verdict: seen.verdict,
                    len: seen.len,
                    data: seen.data,
                    late,
                    comment: None,
                };
                presenter.packet(out, &shown)
            }
            Sink::File {
                file,
                ifindices,
                dropped,
                ..
            } => {
                let at = ifindices
                    .iter()
                    .position(|index| *index == seen.ifindex)
                    .unwrap_or_default();
                let packet = Packet {
                    interface: at as u32,
                    ts: wall,
                    len: seen.len,
                    data: seen.data,
                    direction: Some(Direction::Inbound),
                    id: Some(seen.id),
                    queue: Some(seen.queue),
                    verdict: seen.verdict.map(u64::from),
                    dropped: (*dropped > 0).then_some(std::mem::take(dropped)),
                    comment: None,
                };
                file.packet(&packet)?;
                Ok(Flow::Continue)
            }
        }
    }

    fn flush(&mut self) -> Result<()> {
        match self {
            Sink::Lines { out, .. } => out.flush(),
            Sink::File { file, .. } => file.flush(),
        }
    }

    /// Summary, statistics blocks, and everything written.
    fn finish(
        &mut self,
        counts: &[(String, probes::Counts)],
        captured: u64,
        loss: &Loss,
        begun: std::time::SystemTime,
    ) -> Result<()> {
        match self {
            Sink::Lines { out, .. } => present::summary(out, counts, captured, loss),
            Sink::File { file, out, .. } => {
                for (interface, (_, counts)) in counts.iter().enumerate() {
                    let counters = Counters {
                        start: nanoseconds(begun),
                        end: nanoseconds(std::time::SystemTime::now()),
                        received: Some(counts.seen),
                        accepted: Some(counts.matched),
                        dropped: Some(counts.lost),
                        delivered: Some(counts.sent.saturating_sub(counts.lost)),
                    };
                    file.statistics(interface as u32, &counters)?;
                }
                file.flush()?;
                present::summary(out, counts, captured, loss)
            }
        }
    }
}

fn nanoseconds(time: std::time::SystemTime) -> u64 {
    time.duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as u64)
}

/// Events of a running capture.
struct Live<'a> {
    sink: &'a mut Sink,
    clock: WallClock,
    captured: u64,
    /// 0: none
    limit: u64,
    undecodable: u64,
}

impl Consumer for Live<'_> {
    fn event(&mut self, record: Record<'_>) -> Result<Flow> {
        if self.limit > 0 && self.captured >= self.limit {
            return Ok(Flow::Stop);
        }
        let Some(seen) = decode::decode(record.bytes) else {
            self.undecodable += 1;
            return Ok(Flow::Continue);
        };
        self.captured += 1;
        let flow = self
            .sink
            .packet(&seen, self.clock.wall(seen.ts), record.late)?;
        Ok(if self.captured == self.limit {
            Flow::Stop
        } else {
            flow
        })
    }

    fn tick(&mut self) -> Result<Flow> {
        self.clock.refresh()?;
        self.sink.flush()?;
        Ok(Flow::Continue)
    }
}
