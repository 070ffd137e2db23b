//! Connects to lines, and the end of a run.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags};

use crate::bpf::tcpconnect::TcpconnectSkel;
use crate::engine::merge::Record;
use crate::run::Flow;
use crate::run::heartbeat::{Heartbeat, LIMIT, heartbeat};
use crate::run::loss::{CpuStats, Loss};
use crate::run::output::Output;
use crate::run::programs::Attached as _;
use crate::run::session::{Consumer, Tool};

use super::args::Args;
use super::attach::Attached;
use super::counts;
use super::decode::{self, Event};
use super::names::Names;
use super::present::{Presenter, Row};
use super::stacks::StackTable;

/// Entries that a later connect of the same thread took the place of: np_stats.hits.
fn overwritten(skel: &TcpconnectSkel<'_>) -> Result<u64> {
    let per_cpu = skel
        .maps
        .stats
        .lookup_percpu(&0u32.to_ne_bytes(), MapFlags::ANY)
        .context("failed to read the counters of the run")?
        .unwrap_or_default();
    Ok(per_cpu
        .iter()
        .filter_map(|bytes| {
            let mut s = CpuStats::default();
            plain::copy_from_bytes(&mut s, bytes).ok()?;
            Some(s.hits)
        })
        .sum())
}

/// Events to lines.
pub struct Lines<'a, 'o> {
    args: &'a Args,
    skel: &'a TcpconnectSkel<'o>,
    attached: Attached,
    heartbeat: Heartbeat,
    presenter: &'a mut Presenter,
    out: &'a mut Output,
    names: Names,
    stacks: StackTable,
    next_table: Option<Instant>,
    undecodable: u64,
}

impl<'a, 'o> Lines<'a, 'o> {
    pub fn new(
        args: &'a Args,
        skel: &'a TcpconnectSkel<'o>,
        attached: Attached,
        presenter: &'a mut Presenter,
        out: &'a mut Output,
    ) -> Result<Self> {
        let interval = args.interval.map(Duration::from_secs);
        Ok(Self {
            args,
            skel,
            attached,
            heartbeat: heartbeat!(skel, LIMIT)?,
            presenter,
            out,
            names: Names::default(),
            stacks: StackTable::default(),
            next_table: interval.map(|interval| Instant::now() + interval),
            undecodable: 0,
        })
    }
}

impl Consumer for Lines<'_, '_> {
    fn event(&mut self, record: Record<'_>) -> Result<Flow> {
        let connect = match decode::decode(record.bytes) {
            Some(Event::Answer(answer)) => {
                self.names.add(&answer);
                return Ok(Flow::Continue);
            }
            Some(Event::Connect(connect)) => {
                self.stacks.add(&connect)?;
                if self.args.outcome {
                    // It only brings the stacks.
                    return Ok(Flow::Continue);
                }
                connect
            }
            Some(Event::Outcome(connect)) => connect,
            None => {
                self.undecodable += 1;
                return Ok(Flow::Continue);
            }
        };
        let stacks = self.stacks.take(&connect);
        let row = Row {
            connect: &connect,
            stacks: stacks.as_ref(),
            late: record.late,
            name: self.names.get(connect.head.tgid, connect.daddr),
        };
        self.presenter.row(self.out, &row)
    }

    fn tick(&mut self) -> Result<Flow> {
        if let (Some(next), Some(seconds)) = (self.next_table, self.args.interval) {
            if Instant::now() >= next {
                self.next_table = Some(next + Duration::from_secs(seconds));
                let counts = counts::read(&self.skel.maps.counts)?;
                if counts::print(self.out, &counts, self.args.top, self.args.lport)? == Flow::Stop {
                    self.out.flush()?;
                    return Ok(Flow::Stop);
                }
            }
        }
        self.out.flush()?;
        Ok(Flow::Continue)
    }
}

impl Tool for Lines<'_, '_> {
    fn heartbeat(&mut self) -> Option<&mut Heartbeat> {
        Some(&mut self.heartbeat)
    }

    fn pause(&mut self) -> Result<()> {
        self.attached.detach();
        Ok(())
    }

    fn count(&mut self, loss: &mut Loss) -> Result<()> {
        let maps = &self.skel.maps;
        loss.undecodable += self.undecodable;
        loss.missed += self.attached.missed();
        self.heartbeat.count(loss);
        // A thread that entered connect and was not seen to return.
        loss.unreturned += maps.inside.keys().count() as u64 + overwritten(self.skel)?;
        loss.add_stats(&maps.stats)
    }

    fn report(&mut self, loss: &Loss) -> Result<()> {
        let counted = if self.args.count {
            counts::read(&self.skel.maps.counts)
                .and_then(|counts| counts::print(self.out, &counts, self.args.top, self.args.lport))
        } else {
            Ok(Flow::Stop)
        };
        if self.args.outcome {
            let pending = self.skel.maps.pending.keys().count();
            if pending > 0 {
                eprintln!("netprobe: {pending} connects were not decided yet");
            }
        }
        counted.and(loss.report(self.out))
    }
}
