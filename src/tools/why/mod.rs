//! `netprobe why`: what became of a packet, in words, with proof.

pub mod args;
mod changes;
mod ends;
mod expect;
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

use crate::bpf::{self, skb::types::skb_change};
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
use crate::text::escape::escaped;
use crate::tools::rules;
use crate::tools::skb::attached::Attached;
use crate::tools::skb::decode;
use crate::tools::skb::event::Event;
use crate::tools::skb::track::Sweeper;
use crate::tools::who::{self, command::Running};

use args::Args;
use expect::Report;
use fold::Groups;
use journey::{Journey, Journeys};
use names::Names;
use present::Presenter;
use probes::Probes;

/// Events may wait so long in buffers, ns: nothing is over before.
const LAG: u64 = 200_000_000;

pub fn run(args: &Args) -> Result<()> {
    let rules = rules::load(args.rules.as_deref())?;
    if let Some(reason) = &args.explain {
        return rules::explain(&rules, reason, &args.output);
    }
    let config = args.fields.config()?;
    let mut who = args.who.resolve()?;
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
    let probes = Probes::plan(args, &who, &btf, &features)?;
    let reasons = DropReasons::load(&btf);
    drop(btf);
    let stop = signals::stop_channel()?;
    let mut out = Output::open(&args.output)?;
    let mut storage = MaybeUninit::uninit();
    let mut skel = probes.load(args, &features, (&filters, &reasons), &who, &mut storage)?;
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
    let maps = who::Maps {
        tgids: &skel.maps.who_tgids,
        inodes: &skel.maps.who_inodes,
        ends: &skel.maps.who_ends,
        flows: &skel.maps.who_flows,
    };
    who.seed(&maps)?;
    eprintln!("netprobe: following packets (Ctrl-C ends)");
    output::ready(args.output.ready_file.as_deref())?;
    let command = who.start(&maps, args.expect_format.is_some())?;
    let presenter = Presenter::new(args.details, rules.clone(), monotonic_ns()?);
    let mut why = Why {
        args,
        rules,
        names,
        journeys: Journeys::new(args.track_entries as usize, probes.nft),
        groups: Groups::default(),
        presenter,
        report: args.expect_format.map(Report::new),
        start: Instant::now(),
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
    match &args.expect {
        Some(expect) => expect.check(&why.groups.totals),
        None => Ok(()),
    }
}

/// What is tested: the command, or the packets that are followed.
fn tested(args: &Args) -> String {
    let words = match args.who.command.as_slice() {
        [] => args.expression.expression.as_slice(),
        command => command,
    };
    match words {
        [] => "all packets".to_owned(),
        words => escaped(words.join(" ").as_bytes()),
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
    report: Option<Report>,
    start: Instant,
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
            if let Some(report) = &mut self.report {
                report.add(&self.presenter.block(&group, &mut self.names));
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

    fn change(&mut self, change: &skb_change) -> Result<Flow> {
        match &mut self.report {
            Some(report) => {
                if let Some(line) = self.presenter.change_text(change, &mut self.names) {
                    report.add(&line);
                }
                Ok(Flow::Continue)
            }
            None => self.presenter.change(self.out, change, &mut self.names),
        }
    }

    /// The command has ended, and so have its packets.
    fn command_is_over(&mut self, now: u64) -> bool {
        let quiet = self.journeys.is_quiet(now);
        self.command.as_mut().is_some_and(|c| c.is_over(quiet))
    }
}

impl<M: MapCore> Consumer for Why<'_, M> {
    fn event(&mut self, record: Record<'_>) -> Result<Flow> {
        if self.args.changes {
            if let Some(change) = changes::read_change(record.bytes) {
                return self.change(&change);
            }
        }
        let mut event = Event::default();
        if decode::decode(&mut event, record.bytes, probes::SNAP_LEN as usize).is_none() {
            self.undecodable += 1;
            return Ok(Flow::Continue);
        }
        if let Some(errno) = event.no_route {
            let journey = Journey::without_route(&event, errno, &mut self.names);
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
        let totals = &self.groups.totals;
        let summed = match (&mut self.report, &self.args.expect) {
            (Some(report), Some(expect)) => {
                let sum = present::sum(totals, loss, cut);
                let took = self.start.elapsed().as_secs_f64();
                report.finish(self.out, (&tested(self.args), expect), totals, (&sum, took))
            }
            _ => self.presenter.totals(self.out, totals, loss, cut),
        };
        shown.and(summed).and(loss.report(self.out))
    }
}
