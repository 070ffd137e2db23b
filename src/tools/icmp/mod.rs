//! `netprobe icmp`: who handles an echo request, on which CPU, and where the time went.

mod answers;
pub mod args;
mod consumer;
pub mod culprit;
pub mod decode;
mod present;
mod present_sent;
mod probes;
mod requests;
mod stages;
mod summary;

use std::mem::MaybeUninit;

use anyhow::Result;
use libbpf_rs::MapCore;

use crate::bpf;
use crate::engine::merge::Record;
use crate::kernel::btf_core::CoreBtf;
use crate::kernel::drop_reason::DropReasons;
use crate::run::Flow;
use crate::run::heartbeat::Heartbeat;
use crate::run::loss::Loss;
use crate::run::output::{self, Output};
use crate::run::programs::{Programs, engine};
use crate::run::session::{self, Consumer, Tool};
use crate::run::{log, signals};

use args::Args;
use consumer::Session;
use probes::Attached;

pub fn run(args: &Args) -> Result<()> {
    // What can be wrong on the command line comes first: it needs no privilege.
    let filter = args.filter.config()?;
    args.transport.check(&args.engine)?;
    args.check_stages()?;
    let filters = args.expression.filters(args.types.file())?;
    log::init(args.engine.verbose);
    let (btf, features) = args.types.load(&[bpf::ICMP_TYPES])?;
    features.require_tracing("icmp")?;
    log::lacking();
    let btf = btf?;
    let reasons = if args.sent {
        DropReasons::load(&btf)
    } else {
        DropReasons::default()
    };
    let core = CoreBtf::new(&btf, bpf::ICMP_TYPES)?;
    // Some 3 MB.
    drop(btf);

    let stop = signals::stop_channel()?;
    let mut out = Output::open(&args.output)?;
    let mut storage = MaybeUninit::uninit();
    let mut skel = probes::load(args, &features, &filters, &core, &mut storage)?;
    drop(core);
    let engine = engine!(skel, "icmp", filter, args.transport, args.engine.buffer());
    let (drain, programs) = Programs::start(engine, || probes::attach(&skel, args))?;
    eprintln!("netprobe: {}", programs.attached.summary());
    let mut icmp = Icmp {
        session: Session::new(args, reasons, &mut out)?,
        programs,
    };
    output::ready(args.output.ready_file.as_deref())?;
    session::run(drain, &stop, None, &mut icmp)
}

/// The run: what it does with events, and what its end needs.
struct Icmp<'a, M> {
    session: Session<'a>,
    programs: Programs<'a, M, Attached>,
}

impl<M: MapCore> Consumer for Icmp<'_, M> {
    fn event(&mut self, record: Record<'_>) -> Result<Flow> {
        self.session.event(record)
    }

    fn reached(&mut self, until: u64) {
        self.session.reached(until);
    }

    fn tick(&mut self) -> Result<Flow> {
        self.session.tick()
    }
}

impl<M: MapCore> Tool for Icmp<'_, M> {
    fn heartbeat(&mut self) -> Option<&mut Heartbeat> {
        Some(&mut self.programs.heartbeat)
    }

    fn pause(&mut self) -> Result<()> {
        self.programs.pause()
    }

    fn count(&mut self, loss: &mut Loss) -> Result<()> {
        loss.undecodable += self.session.undecodable;
        self.programs.count(loss)
    }

    fn report(&mut self, loss: &Loss) -> Result<()> {
        let finished = self.session.finish();
        finished.and(self.session.loss(loss))
    }
}
