//! Events to journeys, journeys to answers, and the end of a run.

use std::time::Instant;

use anyhow::Result;
use libbpf_rs::MapCore;

use crate::bpf::skb::types::skb_change;
use crate::engine::merge::Record;
use crate::explain::Rules;
use crate::os::monotonic_ns;
use crate::run::Flow;
use crate::run::loss::Loss;
use crate::run::output::Output;
use crate::run::programs::Programs;
use crate::run::session::{Consumer, Tool};
use crate::text::escape::escaped;
use crate::tools::skb::attached::Attached;
use crate::tools::skb::decode;
use crate::tools::skb::event::Event;
use crate::tools::skb::track::Sweeper;
use crate::tools::who::command::Running;

use super::args::Args;
use super::changes;
use super::ends;
use super::expect::Report;
use super::fold::Groups;
use super::journey::{Journey, Journeys};
use super::names::Names;
use super::present::{self, Presenter};
use super::probes;

/// Events may wait so long in buffers, ns: nothing is over before.
const LAG: u64 = 200_000_000;

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
pub struct Why<'a, M> {
    pub args: &'a Args,
    pub rules: Rules,
    pub names: Names,
    pub journeys: Journeys,
    pub groups: Groups,
    pub presenter: Presenter,
    pub report: Option<Report>,
    pub start: Instant,
    pub out: &'a mut Output,
    pub command: Option<Running>,
    pub sweeper: Sweeper<'a>,
    pub undecodable: u64,
    /// the limit of lines is reached
    pub stopped: bool,
    pub programs: Programs<'a, M, Attached>,
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
        self.programs.pause()
    }

    fn count(&mut self, loss: &mut Loss) -> Result<()> {
        loss.undecodable += self.undecodable;
        self.programs.count(loss)
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
