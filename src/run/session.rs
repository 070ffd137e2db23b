//! The loop of a run: batches in, merged events out to the tool, until a signal, a limit or an error ends it.

use std::time::{Duration, Instant};

use anyhow::Result;
use crossbeam_channel::{Receiver, select};
use nix::sys::signal::Signal;

use crate::engine::batch::Batch;
use crate::engine::drain::Drain;
use crate::engine::merge::{Merge, Record};

/// The longest time between two calls of [`Consumer::tick`].
const TICK: Duration = Duration::from_millis(100);

/// Whether the run goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    Continue,
    /// a limit is reached
    Stop,
}

/// What a tool does with its events.
pub trait Consumer {
    /// One event, in order of time. `record.bytes` begins with `struct np_head`.
    fn event(&mut self, record: Record<'_>) -> Result<Flow>;
    /// After each batch and at least every 100 ms: the place to flush output.
    fn tick(&mut self) -> Result<Flow>;
}

/// What the loop itself counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Received {
    /// events that came out of the buffers
    pub events: u64,
    pub late: u64,
    /// samples without a whole head
    pub short: u64,
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

/// Hands events to `consumer` until `stop` has a message, `deadline` has passed, the consumer stops or an error ends it. Then calls
/// `pause` (which keeps the programs from sending more), hands out what is still in the buffers and returns. What was counted comes
/// back after an error too.
pub fn run(
    drain: Drain,
    stop: &Receiver<Signal>,
    deadline: Option<Instant>,
    consumer: &mut dyn Consumer,
    pause: impl FnOnce(),
) -> (Received, Result<()>) {
    give_back_memory();
    let mut state = Loop {
        merge: Merge::new(drain.groups()),
        received: Received::default(),
    };
    let end = state.until_end(&drain, stop, deadline, consumer);
    pause();
    drain.stop();
    let result = match end {
        End::Error(e) => {
            // Let the threads finish; what they bring cannot be shown any more.
            while let Ok(batch) = drain.batches.recv() {
                state.count(&batch);
            }
            Err(e)
        }
        End::Stop => state.rest(&drain, consumer),
    };
    let joined = drain.join();
    state.received.late = state.merge.late;
    (state.received, result.and(joined))
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
    received: Received,
}

impl Loop {
    fn until_end(
        &mut self,
        drain: &Drain,
        stop: &Receiver<Signal>,
        deadline: Option<Instant>,
        consumer: &mut dyn Consumer,
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
        self.received.events += batch.records.len() as u64;
        self.received.short += batch.short;
    }

    fn take(
        &mut self,
        drain: &Drain,
        batch: Batch,
        consumer: &mut dyn Consumer,
    ) -> Result<(), End> {
        self.count(&batch);
        self.merge.push(batch);
        let result = self.merge.drain(|record| match consumer.event(record)? {
            Flow::Continue => Ok(()),
            Flow::Stop => Err(End::Stop),
        });
        for batch in self.merge.spent() {
            drain.give_back(batch);
        }
        result
    }

    /// The last batches, after the programs have been paused. After a limit the consumer goes on answering `Stop`, and the rest is
    /// only counted.
    fn rest(&mut self, drain: &Drain, consumer: &mut dyn Consumer) -> Result<()> {
        let mut stopped = false;
        while let Ok(batch) = drain.batches.recv() {
            self.count(&batch);
            if stopped {
                continue;
            }
            self.merge.push(batch);
            match self.merge.drain(|record| match consumer.event(record)? {
                Flow::Continue => Ok(()),
                Flow::Stop => Err(End::Stop),
            }) {
                Ok(()) => {}
                Err(End::Stop) => stopped = true,
                Err(End::Error(e)) => return Err(e),
            }
        }
        consumer.tick().map(|_| ())
    }
}
