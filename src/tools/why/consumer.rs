//! Events to journeys, journeys to answers, and the end of a run.

use std::time::Instant;

use anyhow::Result;
use libbpf_rs::MapCore;

use crate::bpf::skb::types::skb_change;
use crate::engine::merge::Record;
use crate::explain::Rules;
use crate::os::monotonic_ns;
use crate::run::Flow;
use crate::run::heartbeat::Heartbeat;
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
use super::compare::Comparison;
use super::ends;
use super::expect::Report;
use super::file::File;
use super::fold::Groups;
use super::journey::{Journey, Journeys, QUIET};
use super::names::Names;
use super::present::Presenter;
use super::seen::Gaps;
use super::sum;

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
    /// --compare
    pub compared: Option<Comparison>,
    /// --write
    pub file: Option<File>,
    pub start: Instant,
    pub out: &'a mut Output,
    pub command: Option<Running>,
    pub sweeper: Sweeper<'a>,
    /// how many packets the kernel side has numbered
    pub packets: &'a M,
    pub gaps: Gaps,
    pub undecodable: u64,
    /// see [`Consumer::reached`]: nothing is over before
    pub reached: u64,
    /// the limit of lines is reached
    pub stopped: bool,
    pub programs: Programs<'a, M, Attached>,
}

impl<M: MapCore> Why<'_, M> {
    fn over(&mut self, journeys: Vec<Journey>, now: u64) -> Result<()> {
        for mut journey in journeys {
            // What comes after its end may have been lost, too.
            journey.incomplete = self.gaps.touch(journey.first, journey.last + QUIET);
            let verdict = ends::judge(&journey, &self.rules);
            if let Some(file) = &mut self.file {
                file.packet(&journey, &verdict, &mut self.names)?;
            }
            if let Some(compared) = &mut self.compared {
                compared.add(&journey, &verdict);
            }
            self.groups.add(journey, verdict, now);
        }
        Ok(())
    }

    fn show(&mut self, now: u64, all: bool) -> Result<Flow> {
        for group in self.groups.due(now, all) {
            let hidden = self.stopped || self.compared.is_some();
            if hidden || !self.args.shows(group.verdict.end, group.longest) {
                continue;
            }
            if let Some(report) = &mut self.report {
                let file = self.file.as_mut();
                report.add(&self.presenter.block(file, &group, &mut self.names)?);
                continue;
            }
            let to = (&mut *self.out, self.file.as_mut());
            if self.presenter.group(to, &group, &mut self.names)? == Flow::Stop {
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
            None => {
                let to = (&mut *self.out, self.file.as_mut());
                self.presenter.change(to, change, &mut self.names)
            }
        }
    }

    fn look_for_loss(&mut self) -> Result<()> {
        self.gaps.look(
            monotonic_ns()?,
            self.programs.lost()? + self.programs.unseen(),
        );
        Ok(())
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
        if decode::decode(&mut event, record.bytes, self.args.snap_len() as usize).is_none() {
            self.undecodable += 1;
            return Ok(Flow::Continue);
        }
        if let Some(errno) = event.no_route {
            let journey = Journey::without_route(&event, errno, &mut self.names);
            self.over(vec![journey], event.head.ts)?;
            return Ok(Flow::Continue);
        }
        if let Some(journey) = self.journeys.event(&event, &mut self.names)? {
            self.over(vec![journey], event.head.ts)?;
        }
        Ok(Flow::Continue)
    }

    fn reached(&mut self, until: u64) {
        self.reached = until;
    }

    fn tick(&mut self) -> Result<Flow> {
        let now = self.reached;
        self.look_for_loss()?;
        let over = self.journeys.over(now, false);
        self.over(over, now)?;
        let flow = self.show(now, false)?;
        self.sweeper.tick()?;
        if let Some(file) = &mut self.file {
            file.flush()?;
        }
        self.out.flush()?;
        match self.command_is_over(now) {
            true => Ok(Flow::Stop),
            false => Ok(flow),
        }
    }
}

impl<M: MapCore> Tool for Why<'_, M> {
    fn heartbeat(&mut self) -> Option<&mut Heartbeat> {
        Some(&mut self.programs.heartbeat)
    }

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

    fn close(&mut self, _: &Loss) -> Result<()> {
        self.look_for_loss()?;
        let now = monotonic_ns()?;
        let over = self.journeys.over(now, true);
        self.over(over, now)
    }

    fn report(&mut self, loss: &Loss) -> Result<()> {
        let now = monotonic_ns()?;
        let shown = self.show(now, true).map(|_| ());
        if let Some(compared) = &mut self.compared {
            compared.report(self.out, &mut self.names)?;
        }
        let cut = self.journeys.cut;
        if cut > 0 {
            eprintln!(
                "netprobe: {cut} packets were followed to no end, there were too many at once; a larger --track-entries helps"
            );
        }
        let totals = &mut self.groups.totals;
        totals.cut = cut;
        if loss.lost > 0 {
            totals.unseen = self.journeys.seen.missing(self.packets)?;
        }
        let totals = &self.groups.totals;
        let summed = match (&mut self.report, &self.args.expect) {
            (Some(report), Some(expect)) => {
                let sum = sum::text(totals, loss);
                let took = self.start.elapsed().as_secs_f64();
                report.finish(self.out, (&tested(self.args), expect), totals, (&sum, took))
            }
            _ => {
                let to = (&mut *self.out, self.file.as_mut());
                self.presenter.totals(to, totals, loss)
            }
        };
        let file = self.file.take();
        let finished = file.map_or(Ok(()), |file| file.finish(loss));
        shown.and(summed).and(finished).and(loss.report(self.out))
    }
}
