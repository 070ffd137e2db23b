//! `netprobe skb`: a packet's way through the kernel, function by function.

pub mod args;
pub(super) mod attached;
pub(super) mod capture;
pub(super) mod columns;
mod consumer;
pub(super) mod decode;
pub(super) mod drops;
mod dump;
pub(super) mod event;
pub(super) mod flight;
mod helpers;
pub(super) mod hooks;
mod json;
mod json_tails;
pub(super) mod kernel;
mod load;
mod meanings;
pub(super) mod members;
pub(super) mod netfilter;
mod netns_names;
mod news;
mod present;
pub(super) mod probes;
mod programs;
pub(super) mod record;
pub(super) mod recorded;
pub mod replay;
mod since;
pub mod style;
mod told;
mod traced_program;
pub(super) mod track;
pub(super) mod trigger;
mod view;

use std::mem::MaybeUninit;

use anyhow::Result;

use crate::run::output::{self, Output};
use crate::run::programs::{self as engine, engine};
use crate::run::{log, session, signals};
use crate::tools::{rules, who};

use args::Args;
use capture::Capture;
use consumer::{Lines, Skb};
use event::Event;
use helpers::Helpers;
use kernel::Kernel;
use present::Presenter;
use programs::{Programs, Storage, Watched};
use record::{Head, MakeTarget, Recorder};
use track::Sweeper;

pub fn run(args: &Args) -> Result<()> {
    run_recorded(args, None)
}

/// A run whose events go into a recording, too: `record` makes its file, once everything that can be wrong has been looked at.
pub(super) fn run_recorded(args: &Args, record: Option<&dyn MakeTarget>) -> Result<()> {
    // What can be wrong on the command line comes first: it needs no privilege.
    let rules = rules::load(args.rules.as_deref())?;
    let filter = args.fields.config()?;
    let mut who = args.who.resolve()?;
    args.transport.check(&args.engine)?;
    args.check_write()?;
    let pattern = args.function_pattern()?;
    let mut filters = args.expression.filters(args.types.kernel_btf.as_deref())?;
    let triggers = &args.triggers;
    triggers.check(&args.fields, &args.expression, filters.expression.as_ref())?;
    let xdp_members = args.xdp_members()?;
    log::init(args.engine.verbose);
    let mut args = args.clone();
    let kernel = Kernel::look(
        &mut args,
        (&mut filters, filter.fields),
        pattern.as_ref(),
        who.wants(),
    )?;
    let args = &args;
    let stop = signals::stop_channel()?;
    let mut out = Output::open(&args.output)?;
    let sink = record.map(|record| record.make(filters.expression.as_ref()));
    let sink = sink.transpose()?;
    let capture = args.write.as_deref();
    let capture = capture
        .map(|path| Capture::create(path, args.snaplen))
        .transpose()?;
    let mut storage = MaybeUninit::uninit();
    let mut skel = load::load(args, &kernel, &filters, &who, &mut storage)?;
    let Kernel {
        features,
        wants,
        plan,
        members,
        xdp_members: xdp_shown,
        reasons,
        core,
        btf,
    } = kernel;
    drop(core);
    let engine = engine!(skel, "skb", filter, args.transport, args.buffer());
    let (drain, own) = engine::Programs::start(engine, || plan.attach(&skel, &stop))?;
    let attached = &own.attached;
    log::note(&attached.summary());
    let mut kinds: Storage = [MaybeUninit::uninit(), MaybeUninit::uninit()];
    let watched = Watched {
        filters: &filters,
        xdp_filter: xdp_members.as_ref(),
        members: &members,
        xdp_members: &xdp_shown,
    };
    let helpers = match btf {
        Some(btf) => Some(Helpers::new(args, attached.backend(), &btf, &skel)?),
        None => None,
    };
    let mut programs = Programs::prepare(args, &features, watched, &skel, helpers, &mut kinds)?;
    let head = sink
        .as_ref()
        .map(|_| Head::new(args.style(), [&members, &xdp_shown]));
    let names = attached.names().clone();
    let mut presenter = Presenter::new(args, names, reasons, [members, xdp_shown])?;
    presenter.rules(rules);
    presenter.hooks(attached.netfilter_hooks());
    if let Some(programs) = &mut programs {
        presenter.programs(programs.start()?);
    }
    let options = record::Options {
        snaplen: args.snaplen,
        lines: args.output.output_file.is_some(),
        limit: args.output.output_limit_lines,
    };
    let recorder = match sink.zip(head) {
        Some((sink, head)) => Some(Recorder::new(sink, head, &mut presenter, &options)?),
        None => None,
    };
    if recorder.is_none() || options.lines {
        presenter.header(&mut out)?;
    }
    let maps = who::maps!(skel);
    who.seed(&maps)?;
    output::ready(args.output.ready_file.as_deref())?;
    let command = who.start(&maps, false)?;
    let mut run = Skb {
        command,
        lines: Lines {
            presenter: &mut presenter,
            capture,
            out: &mut out,
            sweeper: (wants.track || wants.lives).then(|| Sweeper::new(&skel.maps.tracked)),
            snap_len: args.snap_len() as usize,
            programs,
            undecodable: 0,
            event: Event::default(),
        },
        recorder,
        programs: own,
    };
    session::run(drain, &stop, None, &mut run)
}
