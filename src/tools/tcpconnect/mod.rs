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
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags};

use crate::bpf::tcpconnect::TcpconnectSkel;
use crate::engine::drain::Drain;
use crate::engine::loss::{self, CpuStats, Loss};
use crate::engine::merge::Record;
use crate::engine::session::{self, Consumer, Flow, Received};
use crate::engine::{UsageError, log, signals};
use crate::kernel::btf::Btf;
use crate::kernel::features::Features;
use crate::output::{self, Output};

use args::Args;
use decode::Event;
use names::Names;
use present::{Presenter, Row};
use probes::Pair;
use stacks::StackTable;

pub fn run(args: &Args) -> Result<()> {
    // What can be wrong on the command line comes first: it needs no privilege.
    let filter = args.filter.resolve()?;
    log::init(args.verbose());
    let features = Features::detect();
    features.require_tracing("tcpconnect")?;
    let btf = Btf::vmlinux(None)?;
    let reasons = btf.enum_values("skb_drop_reason");
    let stop = signals::stop_channel()?;
    let mut out = Output::open(&args.output)?;
    let mut storages = [MaybeUninit::uninit(), MaybeUninit::uninit()];
    let [first, second] = &mut storages;
    let start = |pair, storage| {
        let skel = probes::load(args, &filter, &features, &btf, pair, storage)?;
        let drain = Drain::start(skel.maps.events.as_fd(), args.engine.buffer())?;
        let attached = probes::attach(args, pair, &skel)?;
        anyhow::Ok((skel, drain, attached))
    };
    let (skel, drain, mut attached) = match start(Pair::Fentry, first) {
        Ok(started) => started,
        Err(e) if e.is::<UsageError>() => return Err(e),
        // DNS needs fexit programs: there is nothing else to try.
        Err(e) if args.dns => return Err(e),
        // Lockdown, or an architecture without trampolines.
        Err(_) => start(Pair::Kprobe, second)?,
    };
    let mut presenter = Presenter::new(args, reasons)?;
    eprintln!("Tracing connect ... Hit Ctrl-C to end");
    if !args.count {
        presenter.header(&mut out)?;
    }
    output::ready(args.output.ready_file.as_deref())?;

    let mut consumer = Lines {
        args,
        skel: &skel,
        presenter: &mut presenter,
        out: &mut out,
        names: Names::default(),
        stacks: StackTable::default(),
        next_table: args
            .interval
            .map(|s| Instant::now() + Duration::from_secs(s)),
        undecodable: 0,
    };
    let ended = session::run(drain, &stop, None, &mut consumer, || attached.detach());
    let undecodable = consumer.undecodable;
    let received = ended?;
    if args.count {
        let counts = counts::read(&skel.maps.counts)?;
        counts::print(&mut out, &counts, args.top, args.lport)?;
    }
    let loss = loss(&skel, received, undecodable)?;
    Presenter::loss(&mut out, &loss)?;
    if args.outcome {
        let pending = skel.maps.pending.keys().count();
        if pending > 0 {
            eprintln!("netprobe: {pending} connects were not decided yet");
        }
    }
    Ok(())
}

/// What the run lost, connects whose return was not seen included.
fn loss(skel: &TcpconnectSkel<'_>, received: Received, undecodable: u64) -> Result<Loss> {
    let p = &skel.progs;
    let programs = [
        &p.v4_fentry,
        &p.v6_fentry,
        &p.v4_fexit,
        &p.v6_fexit,
        &p.v4_entry,
        &p.v6_entry,
        &p.v4_return,
        &p.v6_return,
        &p.syn,
        &p.state,
        &p.drop,
        &p.dns_udp4,
        &p.dns_udp6,
        &p.dns_tcp,
    ];
    let mut loss = Loss {
        received: received.events,
        late: received.late,
        undecodable: undecodable + received.short,
        missed: programs
            .iter()
            .map(|p| p.as_fd().as_raw_fd())
            .filter(|&fd| fd >= 0)
            .map(loss::missed)
            .sum(),
        ..Loss::default()
    };
    loss.add_stats(&skel.maps.stats)?;
    // A thread that entered connect and was not seen to return: the kernel has few places for probes on returns.
    loss.missed += skel.maps.inside.keys().count() as u64 + overwritten(skel)?;
    Ok(loss)
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
