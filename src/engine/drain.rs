//! Takes events out of the kernel's buffers, in batches, on a bounded crossbeam channel.
//!
//! One thread, or one per group of CPUs. A round: wait until a buffer is a quarter full or 50 ms have passed
//! (250 where nobody waits for a line), note the time, take all that is in the buffers, send it as one [`Batch`] with a watermark. So no system call per event, and a line
//! within 100 ms on a quiet system. A full channel blocks the thread; then the kernel's buffers fill, and what they refuse is
//! counted where it happens, in the BPF program (`np_stats`). How a buffer is read is the business of
//! [`super::perf`] and [`super::ringbuf`].

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::batch::{Batch, BufferOptions};
use super::heartbeat::Pulse;
use super::hotplug::Hotplug;
use super::perf::PerfBuffers;
use super::ringbuf::RingBuffers;
use crate::os::{monotonic_ns, online_cpus};

/// How much older than the start of a round an event may be that the round misses: a program that took its time stamp, and was
/// interrupted (or whose virtual CPU was descheduled) before it wrote the event.
const SLACK_NS: u64 = 20_000_000;
/// Batches in flight between a drain thread and the tool.
const CHANNEL: usize = 64;
/// Bytes of events that may wait for the tool; past it the threads leave them in the kernel's buffers (--buffer-pages says so).
const WAITING_BYTES: usize = 32 << 20;
/// Batches whose memory is kept for the next ones.
const RECYCLED: usize = 4;
/// The map that a tool's programs write to.
#[derive(Debug, Clone, Copy)]
pub enum EventMap<'a> {
    /// a perf event array
    Perf(BorrowedFd<'a>),
    /// an array with room for a ring buffer of each CPU
    Rings(BorrowedFd<'a>),
}

impl<'a> From<BorrowedFd<'a>> for EventMap<'a> {
    fn from(map: BorrowedFd<'a>) -> Self {
        Self::Perf(map)
    }
}

enum Buffers {
    Perf(PerfBuffers),
    Rings(RingBuffers),
}

impl Buffers {
    fn open(source: EventMap<'_>, options: BufferOptions, cpus: Vec<i32>) -> Result<Self> {
        Ok(match source {
            EventMap::Perf(map) => Self::Perf(PerfBuffers::open(map.as_raw_fd(), options, cpus)?),
            EventMap::Rings(map) => Self::Rings(RingBuffers::open(map.as_raw_fd(), options, cpus)?),
        })
    }

    fn wait(&self, also: &[BorrowedFd<'_>]) -> Result<()> {
        match self {
            Self::Perf(buffers) => buffers.wait(also),
            Self::Rings(buffers) => buffers.wait(),
        }
    }

    /// A CPU has come online.
    fn add(&mut self, cpu: i32, batch: &mut Batch) -> Result<()> {
        match self {
            Self::Perf(buffers) => buffers.add(cpu, batch),
            Self::Rings(buffers) => buffers.add(cpu),
        }
    }

    fn consume(&mut self, batch: &mut Batch) {
        match self {
            Self::Perf(buffers) => buffers.consume(batch),
            Self::Rings(buffers) => buffers.consume(batch),
        }
    }
}

/// What the drain threads and the tool's thread share.
struct Shared {
    /// asks the threads for a last round
    stop: AtomicBool,
    /// wakes them to see it
    awake: EventFd,
    /// bytes of batches that the tool has not given back
    waiting: AtomicUsize,
    /// what is told of each round
    pulse: OnceLock<Pulse>,
}

/// The drain threads of a session.
pub struct Drain {
    pub batches: Receiver<Batch>,
    recycle: Vec<Sender<Batch>>,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Drain {
    /// Opens the buffers of `source` and starts to drain them.
    pub fn start<'a>(source: impl Into<EventMap<'a>>, options: BufferOptions) -> Result<Self> {
        let source = source.into();
        let cpus = online_cpus()?;
        let groups = options.threads.clamp(1, cpus.len());
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            awake: EventFd::from_flags(EfdFlags::EFD_CLOEXEC)
                .context("failed to make an eventfd")?,
            waiting: AtomicUsize::new(0),
            pulse: OnceLock::new(),
        });
        let (tx, batches) = bounded(CHANNEL);
        let mut drain = Self {
            batches,
            recycle: Vec::new(),
            shared: shared.clone(),
            threads: Vec::new(),
        };
        for group in 0..groups {
            let mine: Vec<i32> = cpus.iter().copied().skip(group).step_by(groups).collect();
            let buffer = Buffers::open(source, options, mine)?;
            let (back, recycled) = unbounded();
            let (tx, shared) = (tx.clone(), shared.clone());
            drain.recycle.push(back);
            drain.threads.push(
                std::thread::Builder::new()
                    .name(format!("drain-{group}"))
                    .spawn(move || drain_loop(buffer, (group, groups), &tx, &recycled, &shared))
                    .context("failed to start a drain thread")?,
            );
        }
        Ok(drain)
    }

    /// Number of groups, each with its own watermark.
    pub fn groups(&self) -> usize {
        self.recycle.len()
    }

    /// The threads tell `pulse` of each of their rounds from now on.
    pub fn tell(&self, pulse: Pulse) {
        // Another one would be that of another run.
        let _ = self.shared.pulse.set(pulse);
    }

    /// Gives a batch back, so that its memory is used again.
    pub fn give_back(&self, batch: Batch) {
        self.shared
            .waiting
            .fetch_sub(batch.data.len(), Ordering::Relaxed);
        let to = self.recycle.get(batch.group);
        if let Some(to) = to.filter(|to| to.len() < RECYCLED) {
            // The thread may be gone; then the memory is freed.
            let _ = to.send(batch);
        }
    }

    /// Asks the threads for a last round; then [`Drain::batches`] disconnects.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        // Without it they see the flag a bit later.
        let _ = self.shared.awake.write(1);
    }

    /// The threads' own errors, after the channel has disconnected.
    pub fn join(self) -> Result<()> {
        drop(self.batches);
        for thread in self.threads {
            thread
                .join()
                .map_err(|_| anyhow!("a drain thread panicked"))??;
        }
        Ok(())
    }
}

fn drain_loop(
    mut buffer: Buffers,
    (group, groups): (usize, usize),
    tx: &Sender<Batch>,
    recycled: &Receiver<Batch>,
    shared: &Shared,
) -> Result<()> {
    let hotplug = Hotplug::open().ok();
    loop {
        let last = shared.stop.load(Ordering::Acquire);
        if !last {
            let plugged = hotplug.as_ref().map(AsFd::as_fd);
            let also: Vec<_> = plugged.into_iter().chain([shared.awake.as_fd()]).collect();
            buffer.wait(&also)?;
            if shared.waiting.load(Ordering::Relaxed) > WAITING_BYTES {
                // The tool is behind. What the buffers refuse meanwhile is counted.
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
        }
        let mut batch = recycled.try_recv().unwrap_or_default();
        batch.clear();
        batch.group = group;
        let now = monotonic_ns()?;
        batch.watermark = if last {
            u64::MAX
        } else {
            now.saturating_sub(SLACK_NS)
        };
        for cpu in hotplug.iter().flat_map(Hotplug::online) {
            if cpu as usize % groups == group {
                // It may have gone again.
                let _ = buffer.add(cpu, &mut batch);
            }
        }
        buffer.consume(&mut batch);
        if let Some(pulse) = shared.pulse.get() {
            pulse.beat(now);
        }
        shared
            .waiting
            .fetch_add(batch.data.len(), Ordering::Relaxed);
        // A tool that has ended takes no more.
        if tx.send(batch).is_err() || last {
            return Ok(());
        }
    }
}
