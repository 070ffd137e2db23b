//! Events to lines, captures and recordings, and the end of a run.

use std::io::BufWriter;

use anyhow::Result;
use libbpf_rs::MapCore;

use crate::engine::merge::Record;
use crate::run::heartbeat::Heartbeat;
use crate::run::loss::Loss;
use crate::run::output::Output;
use crate::run::session::{Consumer, Tool};
use crate::run::stream::Stream;
use crate::run::{Flow, programs as run};
use crate::tools::who::command::Running;

use super::attached::Attached;
use super::capture::Capture;
use super::decode;
use super::event::Event;
use super::present::Presenter;
use super::programs::Programs;
use super::record::Recorder;
use super::track::Sweeper;

/// The run: what it does with events, and what its end needs.
pub struct Skb<'a, 'p, M> {
    pub command: Option<Running>,
    pub lines: Lines<'a, 'p>,
    pub recorder: Option<Recorder>,
    pub programs: run::Programs<'a, M, Attached>,
}

impl<M: MapCore> Skb<'_, '_, M> {
    fn record(&mut self) -> Result<()> {
        let wants_loss = self.recorder.as_ref().is_some_and(Recorder::wants_loss);
        let mut loss = Loss::default();
        if wants_loss {
            self.count(&mut loss)?;
        }
        let Some(recorder) = &mut self.recorder else {
            return Ok(());
        };
        if wants_loss {
            recorder.loss(loss)?;
        }
        recorder.tick(self.lines.presenter)
    }
}

impl<M: MapCore> Consumer for Skb<'_, '_, M> {
    fn event(&mut self, record: Record<'_>) -> Result<Flow> {
        match &mut self.recorder {
            None => self.lines.event(record),
            Some(recorder) => recorder.event(record, &mut self.lines),
        }
    }

    fn reached(&mut self, until: u64) {
        if let Some(recorder) = &mut self.recorder {
            recorder.reached = until;
        }
    }

    fn tick(&mut self) -> Result<Flow> {
        self.record()?;
        let flow = self.lines.tick()?;
        // Nobody knows here which packets are still under way.
        match self.command.as_mut().is_some_and(|c| c.is_over(false)) {
            true => Ok(Flow::Stop),
            false => Ok(flow),
        }
    }
}

impl<M: MapCore> Tool for Skb<'_, '_, M> {
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
        loss.undecodable += self.lines.undecodable;
        loss.missed += self.lines.programs.as_ref().map_or(0, Programs::missed);
        self.programs.count(loss)
    }

    fn close(&mut self, loss: &Loss) -> Result<()> {
        let capture = self.lines.capture.take();
        let recorder = self.recorder.as_mut();
        let closed = recorder.map_or(Ok(()), |r| r.close(self.lines.presenter, loss));
        let captured = capture.map_or(Ok(()), |capture| capture.finish(loss.lost));
        closed.and(captured)
    }

    fn report(&mut self, loss: &Loss) -> Result<()> {
        self.lines.presenter.hidden.tell();
        loss.report(self.lines.out)
    }
}

/// Events to lines.
pub struct Lines<'a, 'p> {
    pub presenter: &'a mut Presenter,
    pub capture: Option<Capture<BufWriter<Stream>>>,
    pub out: &'a mut Output,
    pub sweeper: Option<Sweeper<'a>>,
    pub snap_len: usize,
    pub programs: Option<Programs<'p>>,
    pub undecodable: u64,
    /// the one that is shown
    pub event: Event,
}

impl Lines<'_, '_> {
    /// The line of the event, and its packet in a capture file.
    pub fn shown(&mut self, late: bool) -> Result<Flow> {
        let event = &self.event;
        if self.presenter.hides(event)? {
            return Ok(Flow::Continue);
        }
        let flow = self.presenter.event(self.out, event, late)?;
        if let Some(capture) = &mut self.capture {
            let comment = self.presenter.comment(event);
            capture.packet(event, self.presenter.wall(event.head.ts), &comment)?;
        }
        Ok(flow)
    }
}

impl Consumer for Lines<'_, '_> {
    fn event(&mut self, record: Record<'_>) -> Result<Flow> {
        if decode::decode(&mut self.event, record.bytes, self.snap_len).is_none() {
            self.undecodable += 1;
            return Ok(Flow::Continue);
        }
        self.shown(record.late)
    }

    fn tick(&mut self) -> Result<Flow> {
        self.out.flush()?;
        self.presenter.tick()?;
        if let Some(capture) = &mut self.capture {
            capture.flush()?;
        }
        if let Some(sweeper) = &mut self.sweeper {
            sweeper.tick()?;
        }
        if let Some(programs) = &mut self.programs {
            self.presenter.programs(programs.look()?);
        }
        Ok(Flow::Continue)
    }
}
