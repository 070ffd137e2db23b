//! The loop of a run: batches in, merged events out to the tool, until a signal, a limit or an error ends it.

use std::time::{Duration, Instant};

use anyhow::Result;
use crossbeam_channel::{Receiver, select};
use nix::sys::signal::Signal;

use crate::engine::batch::Batch;
use crate::engine::drain::Drain;
use crate::engine::merge::{Merge, Record};

use super::Flow;
use super::heartbeat::Heartbeat;
use super::loss::Loss;

/// The longest time between two calls of [`Consumer::tick`].
const TICK: Duration = Duration::from_millis(100);

/// What a tool does with its events.
pub trait Consumer {
    /// One event, in order of time. `record.bytes` begins with `struct np_head`.
    fn event(&mut self, record: Record<'_>) -> Result<Flow>;
    /// All events up to this time (ns of CLOCK_MONOTONIC) have been handed out. A clock does not say that: a drain thread may be held up.
    fn reached(&mut self, _until: u64) {}
    /// After each batch and at least every 100 ms: the place to flush output.
    fn tick(&mut self) -> Result<Flow>;
}

/// A tool's whole part in a run: its events, and how it ends.
pub trait Tool: Consumer {
    /// The terminal has another size.
    fn resized(&mut self) -> Result<()> {
        Ok(())
    }
    /// What tells the programs that user space is there. It begins with the loop, and ends before [`Tool::pause`].
    fn heartbeat(&mut self) -> Option<&mut Heartbeat> {
        None
    }
    /// Keeps the programs from sending more. Called once, before the last events are taken out of the buffers.
    fn pause(&mut self) -> Result<()>;
    /// What it was started for has ended. Asked by [`run_periodic`] at least every 100 ms.
    fn is_over(&mut self) -> bool {
        false
    }
    /// Adds what programs, links and maps have counted to `loss`, which has what the loop counted.
    fn count(&mut self, loss: &mut Loss) -> Result<()>;
    /// Ends capture files.
    fn close(&mut self, _loss: &Loss) -> Result<()> {
        Ok(())
    }
    /// What is left to say: rows that were still open, the summary, and the loss (by [`Loss::report`]).
    fn report(&mut self, loss: &Loss) -> Result<()>;
}

/// Why the loop left the inner part.
enum End {
    Stop,
    Error(anyhow::Error),
}

impl From<anyhow::Error> for End {
    fn from(e: anyhow::Error) -> Self {
        Self::Error(e)
    }
}

/// Hands events to `tool` until `stop` has a message, `deadline` has passed, the tool stops or an error ends it. The end is the same
/// whatever the cause: pause, the last events, counters, capture files, loss. The first
/// error of all that is the run's.
pub fn run(
    drain: Drain,
    stop: &Receiver<Signal>,
    deadline: Option<Instant>,
    tool: &mut dyn Tool,
) -> Result<()> {
    give_back_memory();
    let mut state = Loop {
        merge: Merge::new(drain.groups()),
        loss: Loss::default(),
    };
    if let Some(heartbeat) = tool.heartbeat() {
        heartbeat.begin();
        drain.tell(heartbeat.pulse.clone());
    }
    let end = state.until_end(&drain, stop, deadline, tool);
    if let Some(heartbeat) = tool.heartbeat() {
        heartbeat.end();
    }
    let paused = tool.pause();
    drain.stop();
    let ended = match end {
        End::Error(e) => {
            // What goes wrong from here on has the same cause.
            let _ = state.rest(&drain, tool);
            Err(e)
        }
        End::Stop => state.rest(&drain, tool),
    };
    let joined = drain.join();
    state.loss.late = state.merge.late;
    finish(tool, state.loss, ended.and(paused).and(joined))
}

/// A run without events: `tool.tick` every `period`, until `stop` has a message or the tool stops. Its end is that of [`run`].
/// `resized` has a message when the terminal has another size.
pub fn run_periodic(
    stop: &Receiver<Signal>,
    resized: &Receiver<()>,
    period: Duration,
    tool: &mut dyn Tool,
) -> Result<()> {
    give_back_memory();
    let mut next = Instant::now() + period;
    if let Some(heartbeat) = tool.heartbeat() {
        heartbeat.begin();
    }
    let ended = loop {
        if let Some(heartbeat) = tool.heartbeat() {
            heartbeat.beat();
            heartbeat.look();
        }
        let wait = next.saturating_duration_since(Instant::now());
        select! {
            recv(stop) -> _ => break Ok(()),
            recv(resized) -> _ => {
                if let Err(e) = tool.resized() {
                    break Err(e);
                }
                continue;
            }
            default(wait.min(TICK)) => {}
        }
        if tool.is_over() {
            break Ok(());
        }
        if Instant::now() < next {
            continue;
        }
        match tool.tick() {
            Ok(Flow::Continue) => next += period,
            Ok(Flow::Stop) => break Ok(()),
            Err(e) => break Err(e),
        }
    };
    if let Some(heartbeat) = tool.heartbeat() {
        heartbeat.end();
    }
    let paused = tool.pause();
    finish(tool, Loss::default(), ended.and(paused))
}

/// The end of a run after its last event: counters, capture files, loss; gives back the first error, which may have come before.
fn finish(tool: &mut dyn Tool, mut loss: Loss, before: Result<()>) -> Result<()> {
    let counted = tool.count(&mut loss);
    let closed = tool.close(&loss);
    let reported = tool.report(&loss);
    before.and(counted).and(closed).and(reported)
}

/// What only the start needed (the kernel's types and symbols, several MB), which the allocator keeps.
fn give_back_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes a number; any thread may call it.
    unsafe {
        libc::malloc_trim(0);
    }
}

struct Loop {
    merge: Merge,
    /// what the loop itself counts: events received, late, too short to decode
    loss: Loss,
}

impl Loop {
    fn until_end(
        &mut self,
        drain: &Drain,
        stop: &Receiver<Signal>,
        deadline: Option<Instant>,
        consumer: &mut dyn Tool,
    ) -> End {
        loop {
            let wait = deadline.map_or(TICK, |d| {
                TICK.min(d.saturating_duration_since(Instant::now()))
            });
            let step = select! {
                recv(stop) -> _ => return End::Stop,
                recv(drain.batches) -> batch => match batch {
                    Ok(batch) => self.take(drain, batch, consumer),
                    // A drain thread ended by an error, which join() gives.
                    Err(_) => return End::Stop,
                },
                default(wait) => Ok(()),
            };
            if let Some(heartbeat) = consumer.heartbeat() {
                heartbeat.look();
            }
            let step = step.and_then(|()| match consumer.tick()? {
                Flow::Continue => Ok(()),
                Flow::Stop => Err(End::Stop),
            });
            if let Err(end) = step {
                return end;
            }
            if deadline.is_some_and(|d| Instant::now() >= d) {
                return End::Stop;
            }
        }
    }

    fn count(&mut self, batch: &Batch) {
        self.loss.received += batch.records.len() as u64;
        self.loss.undecodable += batch.short;
    }

    fn take(&mut self, drain: &Drain, batch: Batch, consumer: &mut dyn Tool) -> Result<(), End> {
        self.count(&batch);
        self.merge.push(batch);
        let result = self.merge.drain(|record| match consumer.event(record)? {
            Flow::Continue => Ok(()),
            Flow::Stop => Err(End::Stop),
        });
        for batch in self.merge.spent() {
            drain.give_back(batch);
        }
        consumer.reached(self.merge.reached());
        result
    }

    /// The last batches, after the programs have been paused: after a limit they are only counted. An error is no reason to keep the rest
    /// from the tool: an output that has failed counts the lines.
    fn rest(&mut self, drain: &Drain, consumer: &mut dyn Tool) -> Result<()> {
        let (mut stopped, mut result) = (false, Ok(()));
        while let Ok(batch) = drain.batches.recv() {
            self.count(&batch);
            if stopped {
                continue;
            }
            self.merge.push(batch);
            let end = self.merge.drain(|record| match consumer.event(record) {
                Ok(Flow::Continue) => Ok(()),
                Ok(Flow::Stop) => Err(()),
                Err(e) => {
                    if result.is_ok() {
                        result = Err(e);
                    }
                    Ok(())
                }
            });
            stopped = end.is_err();
        }
        result.and(consumer.tick().map(|_| ()))
    }
}
