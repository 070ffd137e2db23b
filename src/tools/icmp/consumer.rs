//! Events to lines, histograms and the summary: what a run does with all that comes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Serialize;

use crate::engine::merge::Record;
use crate::kernel::drop_reason::DropReasons;
use crate::run::Flow;
use crate::run::loss::Loss;
use crate::run::output::Output;
use crate::run::session::Consumer;

use super::answers::{Answer, Answers};
use super::args::Args;
use super::culprit::{Culprits, Names};
use super::decode::{self, Event, Message};
use super::present::Presenter;
use super::requests::{Part, Request, Requests};
use super::stages::Stage;
use super::summary::{ByCpu, FigureRow, Figures};

/// Events to lines and figures.
pub struct Session<'a> {
    out: &'a mut Output,
    presenter: Presenter,
    answers: Answers,
    sent: Option<Requests>,
    counts: Counts,
    figures: Figures,
    min_ns: u64,
    legacy: bool,
    stages: bool,
    histograms: Option<Histograms>,
    culprits: Culprits,
    names: Names,
    pub undecodable: u64,
    /// see [`Consumer::reached`]
    reached: u64,
}

/// For the summary.
#[derive(Debug, Clone, Copy, Default, Serialize)]
struct Counts {
    requests: u64,
    /// handled: handed to a device; sent: read
    replies: u64,
    /// sent only
    lost: u64,
    /// of the lost: freed by this kernel, as request or as reply
    dropped: u64,
    /// sent, and at the end neither read nor lost
    open: u64,
}

/// Histograms in place of lines.
struct Histograms {
    by_cpu: ByCpu,
    interval: Option<Duration>,
    since: Instant,
}

/// The summary as a JSON record.
#[derive(Serialize)]
struct SummaryRow {
    #[serde(rename = "type")]
    kind: &'static str,
    side: &'static str,
    #[serde(flatten)]
    counts: Counts,
    missing: u64,
    late_replies: u64,
    stages: BTreeMap<&'static str, FigureRow>,
}

impl<'a> Session<'a> {
    /// `reasons`: of drops.
    pub fn new(args: &Args, reasons: DropReasons, out: &'a mut Output) -> Result<Self> {
        let presenter = Presenter::new(args, reasons)?;
        if !args.histogram {
            presenter.header(out)?;
        }
        Ok(Self {
            out,
            presenter,
            answers: Answers::new(args.with_stages(), args.filter.filter_cpu.is_none()),
            sent: args
                .sent
                .then(|| Requests::new(args.timeout.saturating_mul(1_000_000_000))),
            counts: Counts::default(),
            figures: Figures::default(),
            min_ns: args.min_us.unwrap_or(0).saturating_mul(1000),
            legacy: args.legacy,
            stages: args.with_stages(),
            histograms: args.histogram.then(|| Histograms {
                by_cpu: ByCpu::default(),
                interval: args.interval.map(Duration::from_secs),
                since: Instant::now(),
            }),
            culprits: Culprits::default(),
            names: Names::default(),
            undecodable: 0,
            reached: 0,
        })
    }

    /// Prints what is complete at `now`, or has waited too long.
    fn release(&mut self, now: u64) -> Result<Flow> {
        while let Some(answer) = self.answers.next(now) {
            if self.answer(&answer)? == Flow::Stop {
                return Ok(Flow::Stop);
            }
        }
        while let Some(request) = self.sent.as_mut().and_then(|s| s.expired(now)) {
            if self.request(&request)? == Flow::Stop {
                return Ok(Flow::Stop);
            }
        }
        Ok(Flow::Continue)
    }

    /// A request was handled.
    fn answer(&mut self, answer: &Answer) -> Result<Flow> {
        self.counts.requests += 1;
        self.counts.replies += u64::from(answer.reply.is_some());
        self.figures.add(answer.stages.parts());
        if let Some(h) = &mut self.histograms {
            h.by_cpu.add(answer.event.head.cpu, answer.stages.parts());
            return Ok(Flow::Continue);
        }
        if answer.stages.get(Stage::Total).unwrap_or(0) < self.min_ns {
            return Ok(Flow::Continue);
        }
        let culprit = match self.culprits.of(&answer.event.times) {
            Some(waited) => self.names.culprit(waited)?,
            None => None,
        };
        self.presenter.answer(self.out, answer, culprit.as_ref())
    }

    /// A request of this machine was answered, or is lost.
    fn request(&mut self, request: &Request) -> Result<Flow> {
        self.counts.requests += 1;
        self.counts.replies += u64::from(request.read.is_some());
        self.counts.lost += u64::from(request.lost);
        self.counts.dropped += u64::from(request.is_dropped());
        self.figures.add(request.parts());
        if let Some(h) = &mut self.histograms {
            h.by_cpu.add(request.event.head.cpu, request.parts());
            return Ok(Flow::Continue);
        }
        // What is lost took longer than anything.
        if !request.lost && request.part(Part::Total).unwrap_or(0) < self.min_ns {
            return Ok(Flow::Continue);
        }
        self.presenter.request(self.out, request, &mut self.names)
    }

    fn message(&mut self, event: Event, late: bool) -> Result<Flow> {
        let ts = event.head.ts;
        // What has waited too long by then was lost: the event may be of its reply.
        if self.release(ts)? == Flow::Stop {
            return Ok(Flow::Stop);
        }
        match event.head.kind {
            decode::KIND_ECHO => self.answers.echo(event, late),
            decode::KIND_REPLY => self.answers.reply(event.request, ts),
            _ => {
                let done = self.sent.as_mut().and_then(|s| s.event(event, late));
                if let Some(request) = done {
                    return self.request(&request);
                }
            }
        }
        self.release(ts)
    }

    /// Prints the histograms of the interval, if it is over.
    fn interval(&mut self) -> Result<()> {
        if let Some(h) = &mut self.histograms {
            if h.interval.is_some_and(|i| h.since.elapsed() >= i) {
                h.since = Instant::now();
                h.print(self.out)?;
            }
        }
        Ok(())
    }

    /// What still waits, the last histograms, the summary.
    pub fn finish(&mut self) -> Result<()> {
        while let Some(answer) = self.answers.next(u64::MAX) {
            self.answer(&answer)?;
        }
        if let Some((lost, open)) = self.sent.as_mut().map(Requests::finish) {
            self.counts.open = open;
            for request in &lost {
                self.request(request)?;
            }
        }
        if let Some(h) = &mut self.histograms {
            h.print(self.out)?;
        }
        if self.legacy {
            return self.out.flush();
        }
        self.counts.requests += self.counts.open;
        if self.out.json() {
            let row = SummaryRow {
                kind: "summary",
                side: if self.sent.is_some() {
                    "sent"
                } else {
                    "handled"
                },
                counts: self.counts,
                missing: self.answers.missing(),
                late_replies: self.sent.as_ref().map_or(0, |s| s.late_replies),
                stages: self.figures.rows(),
            };
            self.out.json_line(&row)?;
        } else {
            eprint!("{}", self.summary());
        }
        self.out.flush()
    }

    fn summary(&self) -> String {
        let c = &self.counts;
        let title = match &self.sent {
            Some(s) => {
                let share = (c.lost * 100).checked_div(c.requests).unwrap_or(0);
                let mut line = format!(
                    "--- echo requests sent\n{} requests, {} replies read, {} lost ({share}%, {} dropped by this kernel)",
                    c.requests, c.replies, c.lost, c.dropped
                );
                if c.open > 0 {
                    line += &format!(", {} without a reply yet", c.open);
                }
                if s.late_replies > 0 {
                    line += &format!(", {} replies later than --timeout", s.late_replies);
                }
                line
            }
            None => {
                let replies = if self.stages {
                    format!(", {} replies handed to a device", c.replies)
                } else {
                    String::new()
                };
                format!(
                    "--- echo requests handled\n{} requests{replies}, {} missing in the sequences",
                    c.requests,
                    self.answers.missing()
                )
            }
        };
        format!("{title}\n{}", self.figures.table())
    }

    /// What the run lost: on stderr, and in JSON as the last record.
    pub fn loss(&mut self, loss: &Loss) -> Result<()> {
        loss.report(self.out)
    }
}

impl Histograms {
    fn print(&mut self, out: &mut Output) -> Result<()> {
        if out.json() {
            for row in self.by_cpu.rows() {
                out.json_line(&row)?;
            }
        } else {
            let text = self.by_cpu.text();
            if !text.is_empty() {
                out.line(|b| b.extend_from_slice(text.trim_end().as_bytes()))?;
            }
        }
        self.by_cpu.clear();
        out.flush()
    }
}

impl Consumer for Session<'_> {
    fn event(&mut self, record: Record<'_>) -> Result<Flow> {
        match decode::decode(record.bytes) {
            Some(Message::Event(event)) => return self.message(event, record.late),
            Some(Message::Gap(gap)) => self.culprits.gap(gap),
            Some(Message::Sample(sample)) => self.culprits.sample(sample),
            None => self.undecodable += 1,
        }
        Ok(Flow::Continue)
    }

    fn reached(&mut self, until: u64) {
        self.reached = until;
    }

    fn tick(&mut self) -> Result<Flow> {
        // What is younger may still have events in the buffers.
        let flow = self.release(self.reached)?;
        self.interval()?;
        self.out.flush()?;
        Ok(flow)
    }
}
