//! `netprobe why`: what became of a packet, in words, with proof.

pub mod args;
mod changes;
mod compare;
mod consumer;
mod dropped;
mod ends;
mod expect;
mod facts;
pub(super) mod file;
mod fold;
mod hops;
mod journey;
mod names;
mod present;
mod probes;
mod proof;
mod rule_texts;
mod seen;
pub(super) mod stages;
mod sum;

use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::bpf;
use crate::kernel::drop_reason::DropReasons;
use crate::os::monotonic_ns;
use crate::run::output::{self, Output};
use crate::run::programs::{Programs, engine};
use crate::run::{log, session, signals};
use crate::tools::skb::track::Sweeper;
use crate::tools::{rules, who};

use args::Args;
use compare::Comparison;
use consumer::Why;
use expect::Report;
use file::File;
use fold::Groups;
use journey::{Journeys, Keep};
use names::Names;
use present::Presenter;
use probes::Probes;
use seen::Gaps;

pub fn run(args: &Args) -> Result<()> {
    let rules = rules::load(args.rules.as_deref())?;
    if let Some(reason) = &args.explain {
        return rules::explain(&rules, reason, &args.output);
    }
    let filter = args.fields.config()?;
    let mut who = args.who.resolve()?;
    args.transport.check(&args.engine)?;
    let filters = args.expressions().filters(args.types.file())?;
    let compared = args.compared().map(Comparison::new).transpose()?;
    log::init(args.engine.verbose);
    let (btf, features) = args.types.load(&[bpf::SKB_TYPES])?;
    features.require_tracing("why")?;
    log::lacking();
    let btf = btf?;
    let probes = Probes::plan(args, &who, &btf, &features)?;
    let reasons = DropReasons::load(&btf);
    drop(btf);
    let stop = signals::stop_channel()?;
    let mut out = Output::open(&args.output)?;
    let file = args.write.as_deref();
    let file = file
        .map(|path| File::create(path, args.snaplen))
        .transpose()?;
    let mut storage = MaybeUninit::uninit();
    let mut skel = probes.load(args, &features, (&filters, &reasons), &who, &mut storage)?;
    let engine = engine!(skel, "why", filter, args.transport, args.buffer());
    let (drain, programs) = Programs::start(engine, || probes.plan.attach(&skel, &stop))?;
    let attached = &programs.attached;
    let functions = attached.names().clone();
    let names = Names::new(functions, reasons, attached.netfilter_hooks().clone());
    let maps = who::maps!(skel);
    who.seed(&maps)?;
    eprintln!("netprobe: following packets (Ctrl-C ends)");
    output::ready(args.output.ready_file.as_deref())?;
    let command = who.start(&maps, args.expect_format.is_some())?;
    let presenter = Presenter::new(args.details, out.json(), rules.clone(), monotonic_ns()?);
    let keep = Keep {
        packet: file.is_some() || compared.is_some(),
        hops: compared.is_some(),
    };
    let mut why = Why {
        args,
        rules,
        names,
        journeys: Journeys::new(args.track_entries as usize, probes.nft, keep),
        groups: Groups::default(),
        presenter,
        report: args.expect_format.map(Report::new),
        compared,
        file,
        start: Instant::now(),
        out: &mut out,
        command,
        sweeper: Sweeper::new(&skel.maps.tracked),
        packets: &skel.maps.packets,
        gaps: Gaps::default(),
        undecodable: 0,
        reached: 0,
        stopped: false,
        programs,
    };
    let deadline = args
        .duration
        .map(|s| Instant::now() + Duration::from_secs(s));
    session::run(drain, &stop, deadline, &mut why)?;
    match &args.expect {
        Some(expect) => expect.check(&why.groups.totals),
        None => Ok(()),
    }
}
