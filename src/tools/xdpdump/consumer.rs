//! Packets to the sink, and the end of a capture.

use std::time::SystemTime;

use anyhow::Result;
use libbpf_rs::MapHandle;

use crate::engine::merge::Record;
use crate::kernel::clock::WallClock;
use crate::kernel::xdp;
use crate::run::Flow;
use crate::run::loss::Loss;
use crate::run::session::{Consumer, Tool};

use super::attach::Probe;
use super::decode::{self, SeenAt};
use super::diff::Pairs;
use super::errors::{self, Errors};
use super::probes::Counts;
use super::sink::Sink;

/// Events of a running capture.
pub struct Live<'a> {
    pub sink: &'a mut Sink,
    pub clock: WallClock,
    pub captured: u64,
    /// 0: none
    pub limit: u64,
    pub undecodable: u64,
    /// With --diff: packets between entry and exit.
    pub pairs: Option<Pairs>,
    /// The counters of all probes, to tell in the file where packets were lost.
    pub stats: Vec<MapHandle>,
    pub lost: u64,
    pub probes: Vec<Probe<'a>>,
    pub errors: Option<Errors<'a>>,
    pub begun: SystemTime,
}

impl Live<'_> {
    fn watch_loss(&mut self) -> Result<()> {
        if !self.sink.tells_loss() {
            return Ok(());
        }
        let mut loss = Loss::default();
        for stats in &self.stats {
            loss.add_stats(stats)?;
        }
        self.sink.lost(loss.lost - self.lost);
        self.lost = loss.lost;
        Ok(())
    }
}

impl Tool for Live<'_> {
    /// Takes the programs away: what they have sent until then can still be read.
    fn pause(&mut self) -> Result<()> {
        if let Some(errors) = &mut self.errors {
            errors.end();
        }
        let ended = self.probes.iter_mut().map(Probe::end);
        let ended = ended.fold(Ok(()), Result::and);
        xdp::settle();
        ended
    }

    fn count(&mut self, loss: &mut Loss) -> Result<()> {
        loss.undecodable += self.undecodable;
        if let Some(errors) = &self.errors {
            errors.add_loss(loss)?;
        }
        self.probes
            .iter()
            .try_for_each(|probe| probe.add_loss(loss))
    }

    fn close(&mut self, _loss: &Loss) -> Result<()> {
        let mut of_sources = Vec::new();
        for probe in &self.probes {
            let counts = probe.counts()?;
            of_sources.extend(probe.sources().iter().map(|_| counts));
        }
        self.sink.close(&of_sources, self.begun)
    }

    fn report(&mut self, loss: &Loss) -> Result<()> {
        let mut total = Counts::default();
        for probe in &self.probes {
            total.add(&probe.counts()?);
        }
        self.sink.report(total, self.captured, loss)
    }
}

impl Consumer for Live<'_> {
    fn event(&mut self, record: Record<'_>) -> Result<Flow> {
        if self.limit > 0 && self.captured >= self.limit {
            return Ok(Flow::Stop);
        }
        if let Some(problem) = errors::decode(record.bytes) {
            self.sink.problem(&problem, self.clock.wall(problem.ts))?;
            return Ok(Flow::Continue);
        }
        let Some(seen) = decode::decode(record.cpu, record.bytes) else {
            self.undecodable += 1;
            return Ok(Flow::Continue);
        };
        let mut diff = None;
        if let Some(pairs) = &mut self.pairs {
            if seen.point == SeenAt::Entry {
                pairs.enter(&seen);
                return Ok(Flow::Continue);
            }
            diff = Some(pairs.exit(&seen, self.sink.linktype(&seen)));
        }
        self.captured += 1;
        let wall = self.clock.wall(seen.ts);
        let flow = self.sink.packet(&seen, diff.as_ref(), wall, record.late)?;
        Ok(if self.captured == self.limit {
            Flow::Stop
        } else {
            flow
        })
    }

    fn tick(&mut self) -> Result<Flow> {
        self.clock.refresh()?;
        self.watch_loss()?;
        self.sink.flush()?;
        Ok(Flow::Continue)
    }
}
