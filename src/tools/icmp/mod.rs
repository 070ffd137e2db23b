//! `netprobe icmp`: who handles an echo request, on which CPU, and where the time went.

mod answers;
pub mod args;
mod consumer;
mod culprit;
mod decode;
mod present;
mod present_sent;
mod probes;
mod requests;
mod stages;
mod summary;

use std::mem::MaybeUninit;
use std::os::fd::AsFd;

use anyhow::{Context, Result};
use libbpf_rs::MapCore;
use libbpf_rs::skel::OpenSkel;

use crate::bpf;
use crate::bpf::icmp::{IcmpSkel, IcmpSkelBuilder};
use crate::engine::drain::Drain;
use crate::engine::merge::Record;
use crate::filter::{Filters, set_filter};
use crate::kernel::btf::Btf;
use crate::kernel::btf_core::CoreBtf;
use crate::kernel::drop_reason::DropReasons;
use crate::kernel::features::Features;
use crate::run::Flow;
use crate::run::config::Config;
use crate::run::loss::Loss;
use crate::run::output::{self, Output};
use crate::run::pins::Pins;
use crate::run::session::{self, Consumer, Tool};
use crate::run::{log, object, signals};

use args::Args;
use consumer::Session;
use probes::Attached;

pub fn run(args: &Args) -> Result<()> {
    // What can be wrong on the command line comes first: it needs no privilege.
    let config = args.filter.config()?;
    args.transport.check(&args.engine)?;
    args.check_stages()?;
    let filters = args.expression.filters(None)?;
    log::init(args.engine.verbose);
    let btf = Btf::vmlinux(None);
    if let Ok(btf) = &btf {
        btf.await_names(bpf::ICMP_TYPES);
    }
    let features = Features::with(btf.as_ref().ok());
    features.require_tracing("icmp")?;
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
    let mut skel = load(args, &features, &filters, &core, &mut storage)?;
    drop(core);
    let pins = Pins::create("icmp");
    if let Some(pins) = &pins {
        pins.pin(&mut skel.maps.data_config, "config")?;
        pins.pin(&mut skel.maps.stats, "stats")?;
    }
    let config = Config::set(&skel.maps.data_config, config)?;

    let (events, rings) = (skel.maps.events.as_fd(), skel.maps.rings.as_fd());
    let drain = Drain::start(args.transport.source(events, rings), args.engine.buffer())?;
    let attached = probes::attach(&skel, args)?;
    eprintln!("netprobe: {}", attached.summary());
    let mut icmp = Icmp {
        session: Session::new(args, reasons, &mut out)?,
        config,
        attached,
        stats: &skel.maps.stats,
        _pins: pins,
    };
    output::ready(args.output.ready_file.as_deref())?;
    session::run(drain, &stop, None, &mut icmp)
}

/// The run: what it does with events, and what its end needs.
struct Icmp<'a, M> {
    session: Session<'a>,
    config: Config<'a, M>,
    attached: Attached,
    stats: &'a M,
    _pins: Option<Pins>,
}

impl<M: MapCore> Consumer for Icmp<'_, M> {
    fn event(&mut self, record: Record<'_>) -> Result<Flow> {
        self.session.event(record)
    }

    fn tick(&mut self) -> Result<Flow> {
        self.session.tick()
    }
}

impl<M: MapCore> Tool for Icmp<'_, M> {
    fn pause(&mut self) -> Result<()> {
        self.config.pause()
    }

    fn count(&mut self, loss: &mut Loss) -> Result<()> {
        loss.undecodable += self.session.undecodable;
        loss.missed += self.attached.missed();
        loss.add_stats(self.stats)
    }

    fn report(&mut self, loss: &Loss) -> Result<()> {
        let finished = self.session.finish();
        finished.and(self.session.loss(loss))
    }
}

/// Opens, configures and loads the programs that the run needs.
fn load<'a>(
    args: &Args,
    features: &Features,
    filters: &Filters,
    core: &CoreBtf,
    storage: &'a mut MaybeUninit<libbpf_rs::OpenObject>,
) -> Result<IcmpSkel<'a>> {
    let mut open = object::open(IcmpSkelBuilder::default(), Some(core.path()), storage)?;
    let rodata = open
        .maps
        .rodata_data
        .as_mut()
        .context("the BPF object has no .rodata")?;
    rodata.use_cast = u8::from(features.rdonly_cast);
    rodata.np_ring_wakeup = args.transport.wakeup(&args.engine);
    rodata.with_stages = u8::from(args.with_stages());
    rodata.has_reason = u8::from(features.drop_reasons);
    rodata.with_culprit = u8::from(args.culprit);
    rodata.gap_min_ns = args.gap_ns();
    rodata.want_id = args.filter.filter_id.map_or(-1, i32::from);
    rodata.want_cpu = args.filter.filter_cpu.map_or(-1, i32::from);
    set_filter!(rodata, filters.on(features.skb_fields));
    args.transport.prepare(&mut open.maps.rings)?;
    probes::prepare(&mut open, args)?;
    filters.prepare(open.open_object_mut(), features)?;
    object::load(open)
}
