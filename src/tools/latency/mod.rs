//! `netprobe latency`: how long packets take from place to place in this kernel.

pub mod args;
mod culprit;
mod kernel;
mod metrics;
mod names;
mod packet;
mod present;
mod rows;
mod stages;
mod whose;

use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

use anyhow::Result;
use libbpf_rs::MapCore;

use crate::bpf;
use crate::bpf::latency::LatencySkel;
use crate::engine::merge::Record;
use crate::kernel::btf_core::CoreBtf;
use crate::kernel::trampoline::Ahead;
use crate::run::heartbeat::Heartbeat;
use crate::run::loss::Loss;
use crate::run::output::{self, Output};
use crate::run::programs::{Programs, engine};
use crate::run::session::{self, Consumer, Tool};
use crate::run::{Flow, log, signals};

use args::{Args, Mode};
use culprit::Culprit;
use kernel::{Attached, Functions};
use metrics::Metrics;
use packet::{Message, Packet};
use present::Presenter;
use rows::Rows;

pub fn run(args: &Args) -> Result<()> {
    // What can be wrong on the command line comes first: it needs no privilege.
    args.check()?;
    let config = args.fields.config()?;
    let filters = args.expression.filters(args.types.file())?;
    let whose = args.whose.resolve()?;
    log::init(args.engine.verbose);
    let (btf, features) = args
        .types
        .load(&[bpf::LATENCY_TYPES, &kernel::names(args)])?;
    features.require_drops("latency")?;
    log::lacking();
    let btf = btf?;
    let ahead = Ahead::start(&btf);
    let functions = Functions::new(args, &btf);
    let between = kernel::between(args, &btf)?;
    let between = between.as_ref();
    let core = CoreBtf::new(&btf, bpf::LATENCY_TYPES)?;
    // Some 3 MB.
    drop(btf);
    let stop = signals::stop_channel()?;
    let out = Output::open(&args.output)?;
    let mut storage = MaybeUninit::uninit();
    let mut skel = kernel::load(
        args,
        &features,
        (&filters, &whose, &functions, between),
        &core,
        &mut storage,
    )?;
    drop(core);
    let mut buffer = args.engine.buffer();
    if args.min_us.is_none() && args.engine.buffer_pages.is_none() {
        // No packet is sent.
        buffer.pages = 1;
    }
    let engine = engine!(skel, "latency", config, args.transport, buffer);
    let (drain, programs) =
        Programs::start(engine, || kernel::attach(args, &skel, &functions, between))?;
    drop(ahead);
    let mut latency = Latency {
        args,
        skel: &skel,
        programs,
        presenter: Presenter::new(args.by)?,
        culprit: Culprit::default(),
        rows: Rows::default(),
        metrics: args.metrics_listen.map(Metrics::listen).transpose()?,
        since: Instant::now(),
        shown: 0,
        undecodable: 0,
        out,
    };
    log::note("timing packets (Ctrl-C ends)");
    output::ready(args.output.ready_file.as_deref())?;
    session::run(drain, &stop, None, &mut latency)
}

/// The run.
struct Latency<'a, 'o, M> {
    args: &'a Args,
    skel: &'a LatencySkel<'o>,
    programs: Programs<'a, M, Attached>,
    presenter: Presenter,
    culprit: Culprit,
    rows: Rows,
    metrics: Option<Metrics>,
    since: Instant,
    /// slow packets
    shown: u64,
    undecodable: u64,
    out: Output,
}

impl<M: MapCore> Latency<'_, '_, M> {
    /// A table of what came since the last one.
    fn table(&mut self) -> Result<Flow> {
        let all = rows::read_all(self.skel, self.args.by.is_some())?;
        if let Some(metrics) = &self.metrics {
            let mut loss = Loss::default();
            self.programs.count(&mut loss)?;
            let missed = loss.missed + loss.map_full;
            metrics.update(&all, self.args.by, &mut self.presenter.names, missed)?;
        }
        let rows = self.rows.next(all);
        let time = self.since.elapsed();
        self.since = Instant::now();
        let flow = self.presenter.table(&mut self.out, &rows, time)?;
        self.out.flush()?;
        Ok(flow)
    }

    /// A slow packet, or request.
    fn packet(&mut self, packet: &Packet, late: bool) -> Result<Flow> {
        self.shown += 1;
        let why = match self.args.culprit || self.args.mode() == Mode::Requests {
            true => {
                let device = self.presenter.names.device(packet.netns, packet.ifindex);
                self.culprit.of(packet, &device)?
            }
            false => None,
        };
        self.presenter.packet(&mut self.out, packet, why, late)
    }

    fn is_due(&self) -> bool {
        let period = self.args.period().map(Duration::from_secs);
        period.is_some_and(|period| self.since.elapsed() >= period)
    }
}

impl<M: MapCore> Consumer for Latency<'_, '_, M> {
    fn event(&mut self, record: Record<'_>) -> Result<Flow> {
        match packet::decode(record.bytes) {
            Some(Message::Packet(packet)) => return self.packet(&packet, record.late),
            Some(Message::Reader(reader)) => self.culprit.reader(reader),
            Some(Message::Sent(sent)) => self.culprit.sent(sent),
            Some(Message::Softirq(message)) => self.culprit.softirq(message),
            None => self.undecodable += 1,
        }
        Ok(Flow::Continue)
    }

    fn tick(&mut self) -> Result<Flow> {
        if self.is_due() {
            if self.args.once {
                // The only table is the last one.
                return Ok(Flow::Stop);
            }
            self.table()?;
        }
        self.out.flush()?;
        Ok(Flow::Continue)
    }
}

impl<M: MapCore> Tool for Latency<'_, '_, M> {
    fn heartbeat(&mut self) -> Option<&mut Heartbeat> {
        Some(&mut self.programs.heartbeat)
    }

    fn pause(&mut self) -> Result<()> {
        self.programs.pause()
    }

    fn count(&mut self, loss: &mut Loss) -> Result<()> {
        loss.undecodable += self.undecodable;
        self.programs.count(loss)
    }

    fn report(&mut self, loss: &Loss) -> Result<()> {
        let last = self.table();
        if self.args.min_us.is_some() {
            let what = match self.args.mode() {
                Mode::Requests => "requests",
                _ => "packets",
            };
            log::note(&format!("{} slow {what}", self.shown));
        }
        last.and(loss.report(&mut self.out))
    }
}
