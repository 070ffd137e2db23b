//! `netprobe tcpconnect`: which process connects where over TCP, and what became of it.

pub mod args;
mod counts;
mod decode;
mod names;
mod outcome;
mod present;
mod probes;
mod stacks;

use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use libbpf_rs::{MapCore, MapFlags};

use crate::bpf;
use crate::bpf::tcpconnect::TcpconnectSkel;
use crate::engine::drain::Drain;
use crate::engine::merge::Record;
use crate::kernel::btf::Btf;
use crate::kernel::btf_core::CoreBtf;
use crate::kernel::drop_reason::DropReasons;
use crate::kernel::features::Features;
use crate::kernel::trampoline::Ahead;
use crate::run::Flow;
use crate::run::loss::{CpuStats, Loss};
use crate::run::output::{self, Output};
use crate::run::session::{self, Consumer, Tool};
use crate::run::{log, signals};
use crate::usage::UsageError;

use args::{Args, Filter};
use decode::Event;
use names::Names;
use present::{Presenter, Row};
use probes::{Attached, Kernel, Pair};
use stacks::StackTable;

pub fn run(args: &Args) -> Result<()> {
    // What can be wrong on the command line comes first: it needs no privilege.
    args.transport.check(&args.engine)?;
    let filter = args.filter.resolve()?;
    log::init(args.verbose());
    let btf = Btf::vmlinux(None);
    if let Ok(btf) = &btf {
        btf.await_names(bpf::TCPCONNECT_TYPES);
    }
    let features = Features::with(btf.as_ref().ok());
    features.require_tracing("tcpconnect")?;
    let btf = btf?;
    let reasons = match args.outcome {
        true => DropReasons::load(&btf),
        false => DropReasons::default(),
    };
    let pairs = probes::pairs(args, &features, &btf);
    let ahead = match pairs.first() {
        Some(Pair::Fexit | Pair::Fentry) => Ahead::start(&btf),
        _ => None,
    };
    let mut pairs = pairs.into_iter().peekable();
    let kernel = Kernel::new(args, features, &btf, &reasons);
    let core = CoreBtf::new(&btf, bpf::TCPCONNECT_TYPES)?;
    // 3 MB less while libbpf works.
    drop(btf);
    let stop = signals::stop_channel()?;
    let mut out = Output::open(&args.output)?;
    let mut storages = [const { MaybeUninit::uninit() }; 3];
    let mut storages = storages.iter_mut();
    let (skel, drain, attached) = loop {
        let (Some(pair), Some(storage)) = (pairs.next(), storages.next()) else {
            bail!("no way to see the return of connect");
        };
        match start(args, &filter, &kernel, &core, pair, storage) {
            Ok(started) => break started,
            Err(e) if e.is::<UsageError>() || pairs.peek().is_none() => return Err(e),
            // DNS needs fexit programs in any case: the last way would hide why there are none.
            Err(e) if args.dns && pair != Pair::Multi => return Err(e),
            // Lockdown, an architecture without trampolines, another tracer's hands on the function.
            Err(_) => {}
        }
    };
    drop((core, ahead));
    let mut presenter = Presenter::new(args, reasons)?;
    eprintln!("Tracing connect ... Hit Ctrl-C to end");
    if !args.count {
        presenter.header(&mut out)?;
    }
    output::ready(args.output.ready_file.as_deref())?;

    let mut consumer = Lines {
        args,
        skel: &skel,
        attached,
        presenter: &mut presenter,
        out: &mut out,
        names: Names::default(),
        stacks: StackTable::default(),
        next_table: args
            .interval
            .map(|s| Instant::now() + Duration::from_secs(s)),
        undecodable: 0,
    };
    session::run(drain, &stop, None, &mut consumer)
}

/// Loads and attaches, with the buffers read from the first event on.
fn start<'a>(
    args: &Args,
    filter: &Filter,
    kernel: &Kernel,
    core: &CoreBtf,
    pair: Pair,
    storage: &'a mut MaybeUninit<libbpf_rs::OpenObject>,
) -> Result<(TcpconnectSkel<'a>, Drain, Attached)> {
    let skel = probes::load(args, filter, kernel, core, pair, storage)?;
    let (events, rings) = (skel.maps.events.as_fd(), skel.maps.rings.as_fd());
    let drain = Drain::start(args.transport.source(events, rings), args.engine.buffer())?;
    let attached = probes::attach(args, kernel, pair, &skel)?;
    Ok((skel, drain, attached))
}

/// Entries that a later connect of the same thread took the place of: np_stats.hits.
fn overwritten(skel: &TcpconnectSkel<'_>) -> Result<u64> {
    let per_cpu = skel
        .maps
        .stats
        .lookup_percpu(&0u32.to_ne_bytes(), MapFlags::ANY)
        .context("failed to read the counters of the run")?
        .unwrap_or_default();
    Ok(per_cpu
        .iter()
        .filter_map(|bytes| {
            let mut s = CpuStats::default();
            plain::copy_from_bytes(&mut s, bytes).ok()?;
            Some(s.hits)
        })
        .sum())
}

/// Events to lines.
struct Lines<'a, 'o> {
    args: &'a Args,
    skel: &'a TcpconnectSkel<'o>,
    attached: Attached,
    presenter: &'a mut Presenter,
    out: &'a mut Output,
    names: Names,
    stacks: StackTable,
    next_table: Option<Instant>,
    undecodable: u64,
}

impl Consumer for Lines<'_, '_> {
    fn event(&mut self, record: Record<'_>) -> Result<Flow> {
        let connect = match decode::decode(record.bytes) {
            Some(Event::Answer(answer)) => {
                self.names.add(&answer);
                return Ok(Flow::Continue);
            }
            Some(Event::Connect(connect)) => {
                self.stacks.add(&connect)?;
                if self.args.outcome {
                    // It only brings the stacks.
                    return Ok(Flow::Continue);
                }
                connect
            }
            Some(Event::Outcome(connect)) => connect,
            None => {
                self.undecodable += 1;
                return Ok(Flow::Continue);
            }
        };
        let stacks = self.stacks.take(&connect);
        let row = Row {
            connect: &connect,
            stacks: stacks.as_ref(),
            late: record.late,
            name: self.names.get(connect.head.tgid, connect.daddr),
        };
        self.presenter.row(self.out, &row)
    }

    fn tick(&mut self) -> Result<Flow> {
        if let (Some(next), Some(seconds)) = (self.next_table, self.args.interval) {
            if Instant::now() >= next {
                self.next_table = Some(next + Duration::from_secs(seconds));
                let counts = counts::read(&self.skel.maps.counts)?;
                if counts::print(self.out, &counts, self.args.top, self.args.lport)? == Flow::Stop {
                    self.out.flush()?;
                    return Ok(Flow::Stop);
                }
            }
        }
        self.out.flush()?;
        Ok(Flow::Continue)
    }
}

impl Tool for Lines<'_, '_> {
    fn pause(&mut self) -> Result<()> {
        self.attached.detach();
        Ok(())
    }

    fn count(&mut self, loss: &mut Loss) -> Result<()> {
        let maps = &self.skel.maps;
        loss.undecodable += self.undecodable;
        loss.missed += self.attached.missed();
        // A thread that entered connect and was not seen to return.
        loss.unreturned += maps.inside.keys().count() as u64 + overwritten(self.skel)?;
        loss.add_stats(&maps.stats)
    }

    fn report(&mut self, loss: &Loss) -> Result<()> {
        let counted = if self.args.count {
            counts::read(&self.skel.maps.counts)
                .and_then(|counts| counts::print(self.out, &counts, self.args.top, self.args.lport))
        } else {
            Ok(Flow::Stop)
        };
        if self.args.outcome {
            let pending = self.skel.maps.pending.keys().count();
            if pending > 0 {
                eprintln!("netprobe: {pending} connects were not decided yet");
            }
        }
        counted.and(loss.report(self.out))
    }
}
