//! `netprobe why`: what became of a packet, in words, with proof.

pub mod args;
mod command;
mod ends;
mod fold;
mod journey;
mod names;
mod present;
mod probes;
mod proof;
mod stages;

use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::Result;
use libbpf_rs::MapCore;

use crate::bpf;
use crate::engine::drain::Drain;
use crate::engine::merge::Record;
use crate::explain::Rules;
use crate::kernel::btf::Btf;
use crate::kernel::drop_reason::DropReasons;
use crate::kernel::features::Features;
use crate::os::monotonic_ns;
use crate::run::Flow;
use crate::run::config::Config;
use crate::run::loss::Loss;
use crate::run::output::{self, Output};
use crate::run::pins::Pins;
use crate::run::session::{self, Consumer, Tool};
use crate::run::{log, signals};
use crate::tools::rules;
use crate::tools::skb::attached::Attached;
use crate::tools::skb::decode;
use crate::tools::skb::event::Event;
use crate::tools::skb::track::Sweeper;
use crate::usage::Unexpected;

use args::{Args, Expect};
use command::{Cgroup, Running};
use ends::End;
use fold::{Groups, Totals};
use journey::{Journey, Journeys};
use names::Names;
use present::Presenter;
use probes::Probes;

/// Events may wait so long in buffers, ns: nothing is over before.
const LAG: u64 = 200_000_000;
/// How long after a command's end its last packets are waited for, at least and at most.
const LAST: (Duration, Duration) = (Duration::from_millis(300), Duration::from_millis(1500));

pub fn run(args: &Args) -> Result<()> {
    let rules = rules::load(args.rules.as_deref())?;
    if let Some(reason) = &args.explain {
        return rules::explain(&rules, reason, &args.output);
    }
    let config = args.fields.config()?;
    args.transport.check(&args.engine)?;
    let filters = args.expression.filters(None)?;
    log::init(args.engine.verbose);
    let btf = Btf::vmlinux(None);
    if let Ok(btf) = &btf {
        btf.await_names(bpf::SKB_TYPES);
    }
    let features = Features::with(btf.as_ref().ok());
    features.require_tracing("why")?;
    let btf = btf?;
    let probes = Probes::plan(args, &btf, &features)?;
    let reasons = DropReasons::load(&btf);
    drop(btf);
    let cgroup = match args.command.is_empty() {
        true => None,
        false => Some(Cgroup::create()?),
    };
    let stop = signals::stop_channel()?;
    let mut out = Output::open(&args.output)?;
    let mut storage = MaybeUninit::uninit();
    let who = cgroup.as_ref().map_or(0, |c| c.id);
    let mut skel = probes.load(args, &features, (&filters, &reasons), who, &mut storage)?;
    let pins = Pins::create("why");
    if let Some(pins) = &pins {
        pins.pin(&mut skel.maps.data_config, "config")?;
        pins.pin(&mut skel.maps.stats, "stats")?;
    }
    let config = Config::set(&skel.maps.data_config, config)?;
    let (events, rings) = (skel.maps.events.as_fd(), skel.maps.rings.as_fd());
    let drain = Drain::start(args.transport.source(events, rings), args.buffer())?;
    let attached = match probes.plan.attach(&skel, &stop) {
        Ok(attached) => attached,
        Err(e) => {
            config.pause()?;
            return Err(e);
        }
    };
    let functions = attached.names().clone();
    let names = Names::new(functions, reasons, attached.netfilter_hooks().clone());
    eprintln!("netprobe: following packets (Ctrl-C ends)");
    output::ready(args.output.ready_file.as_deref())?;
    let command = match cgroup {
        Some(cgroup) => Some(Running::start(&args.command, cgroup)?),
        None => None,
    };
    let presenter = Presenter::new(args.details, rules.clone(), monotonic_ns()?);
    let mut why = Why {
        args,
        rules,
        names,
        journeys: Journeys::new(args.track_entries as usize, probes.nft),
        groups: Groups::default(),
        presenter,
        out: &mut out,
        command,
        sweeper: Sweeper::new(&skel.maps.tracked),
        undecodable: 0,
        stopped: false,
        config,
        attached,
        stats: &skel.maps.stats,
        _pins: pins,
    };
    let deadline = args
        .duration
        .map(|s| Instant::now() + Duration::from_secs(s));
    session::run(drain, &stop, deadline, &mut why)?;
    check(args.expect.as_ref(), &why.groups.totals)
}

/// Is it as expected?
fn check(expect: Option<&Expect>, totals: &Totals) -> Result<()> {
    let good: u64 = [End::Delivered, End::Answered, End::Sent]
        .map(|end| totals.of(end))
        .iter()
        .sum();
    let bad = totals.of(End::Lost) + totals.of(End::Rejected);
    let met = match expect {
        None => true,
        Some(Expect::Delivered) => good > 0 && bad == 0,
        Some(Expect::Lost(None)) => totals.of(End::Lost) > 0,
        Some(Expect::Lost(Some(rule))) => totals.rules.contains(rule),
        Some(Expect::Rejected) => totals.of(End::Rejected) > 0,
    };
    match met {
        true => Ok(()),
        false => {
            Err(Unexpected("--expect: this is not what became of the packets".to_owned()).into())
        }
    }
}

/// The run.
struct Why<'a, M> {
    args: &'a Args,
    rules: Rules,
    names: Names,
    journeys: Journeys,
    groups: Groups,
    presenter: Presenter,
    out: &'a mut Output,
    command: Option<Running>,
    sweeper: Sweeper<'a>,
    undecodable: u64,
    /// the limit of lines is reached
    stopped: bool,
    config: Config<'a, M>,
    attached: Attached,
    stats: &'a M,
    _pins: Option<Pins>,
}

impl<M: MapCore> Why<'_, M> {
    fn over(&mut self, journeys: Vec<Journey>, now: u64) {
        for journey in journeys {
            let verdict = ends::judge(&journey, &self.rules);
            self.groups.add(journey, verdict, now);
        }
    }

    fn show(&mut self, now: u64, all: bool) -> Result<Flow> {
        for group in self.groups.due(now, all) {
            if self.stopped || !self.args.shows(group.verdict.end, group.longest) {
                continue;
            }
            if self.presenter.group(self.out, &group, &mut self.names)? == Flow::Stop {
                self.stopped = true;
            }
        }
        Ok(if self.stopped {
            Flow::Stop
        } else {
            Flow::Continue
        })
    }

    /// The command has ended, and so have its packets.
    fn command_is_over(&mut self, now: u64) -> bool {
        let Some(ended) = self.command.as_mut().and_then(Running::ended) else {
            return false;
        };
        ended >= LAST.1 || ended >= LAST.0 && self.journeys.is_quiet(now)
    }
}

impl<M: MapCore> Consumer for Why<'_, M> {
    fn event(&mut self, record: Record<'_>) -> Result<Flow> {
        let mut event = Event::default();
        if decode::decode(&mut event, record.bytes, probes::SNAP_LEN as usize).is_none() {
            self.undecodable += 1;
            return Ok(Flow::Continue);
        }
        if let Some(errno) = event.no_route {
            let journey = Journey::without_route(&event, errno);
            self.over(vec![journey], event.head.ts);
            return Ok(Flow::Continue);
        }
        if let Some(journey) = self.journeys.event(&event, &mut self.names)? {
            self.over(vec![journey], event.head.ts);
        }
        Ok(Flow::Continue)
    }

    fn tick(&mut self) -> Result<Flow> {
        let now = monotonic_ns()?.saturating_sub(LAG);
        let over = self.journeys.over(now, false);
        self.over(over, now);
        let flow = self.show(now, false)?;
        self.sweeper.tick()?;
        self.out.flush()?;
        match self.command_is_over(now) {
            true => Ok(Flow::Stop),
            false => Ok(flow),
        }
    }
}

impl<M: MapCore> Tool for Why<'_, M> {
    fn pause(&mut self) -> Result<()> {
        if let Some(command) = &mut self.command {
            command.stop();
        }
        self.config.pause()
    }

    fn count(&mut self, loss: &mut Loss) -> Result<()> {
        loss.undecodable += self.undecodable;
        loss.missed += self.attached.missed();
        loss.add_stats(self.stats)
    }

    fn report(&mut self, loss: &Loss) -> Result<()> {
        let now = monotonic_ns()?;
        let over = self.journeys.over(now, true);
        self.over(over, now);
        let shown = self.show(now, true).map(|_| ());
        let cut = self.journeys.cut;
        if cut > 0 {
            eprintln!(
                "netprobe: {cut} packets were followed to no end, there were too many at once; a larger --track-entries helps"
            );
        }
        let summed = self
            .presenter
            .totals(self.out, &self.groups.totals, loss, cut);
        shown.and(summed).and(loss.report(self.out))
    }
}
