//! Takes events out of the kernel's buffers, in batches, on a bounded crossbeam channel.
//!
//! One thread, or one per group of CPUs. A round: wait until a buffer is a quarter full or 50 ms have passed
//! (250 where nobody waits for a line), note the time, take all that is in the buffers, send it as one [`Batch`] with a watermark. So no system call per event, and a line
//! within 100 ms on a quiet system. A full channel blocks the thread; then the kernel's buffers fill, and what they refuse is
//! counted where it happens, in the BPF program (`np_stats`). How a buffer is read is the business of
//! [`super::perf`] and [`super::ringbuf`].

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::perf::PerfBuffers;
use super::ringbuf::RingBuffers;

/// The longest that an event waits in a buffer that is not filling, in ms.
pub const POLL_MS: u16 = 50;
/// How much older than the start of a round an event may be that the round misses: a program that took its time stamp, and was
/// interrupted (or whose virtual CPU was descheduled) before it wrote the event.
const SLACK_NS: u64 = 20_000_000;
/// Batches in flight between a drain thread and the tool.
const CHANNEL: usize = 64;
/// Size of a head that has a time stamp and a length (`struct np_head`: ts at 0, len at 8).
const HEAD: usize = 12;

/// One event within [`Batch::data`].
#[derive(Debug, Clone, Copy)]
pub struct BatchRecord {
    pub ts: u64,
    pub offset: u32,
    pub len: u32,
    pub cpu: u32,
    /// the merge's number of the batch
    pub batch: u32,
}

/// What one round took out of the buffers of one group of CPUs.
#[derive(Debug, Default)]
pub struct Batch {
    pub group: usize,
    /// all events of the group up to this time (ns of CLOCK_MONOTONIC) are in this batch or an earlier one
    pub watermark: u64,
    /// the buffers' bytes, headers of their records included
    pub data: Vec<u8>,
    pub records: Vec<BatchRecord>,
    /// samples that the kernel says its buffer lost (PERF_RECORD_LOST); the exact count is in `np_stats`
    pub lost: u64,
    /// samples too short to hold a head
    pub short: u64,
}

impl Batch {
    fn clear(&mut self) {
        self.data.clear();
        self.records.clear();
        self.lost = 0;
        self.short = 0;
    }

    /// Notes the event at `offset` of the data, in a sample of `room` bytes (perf pads it to 8): its own `len` cuts the padding
    /// off.
    pub fn note(&mut self, cpu: u32, offset: usize, room: usize) {
        let sample = self.data.get(offset..offset + room).unwrap_or_default();
        let Some((ts, rest)) = sample.get(..HEAD).and_then(<[u8]>::split_first_chunk) else {
            self.short += 1;
            return;
        };
        let len = rest.first_chunk().map_or(0, |len| u32::from_ne_bytes(*len));
        self.records.push(BatchRecord {
            ts: u64::from_ne_bytes(*ts),
            offset: offset as u32,
            len: if len as usize <= room {
                len
            } else {
                room as u32
            },
            cpu,
            batch: 0,
        });
    }
}

/// How the buffers are laid out.
#[derive(Debug, Clone, Copy)]
pub struct BufferOptions {
    /// pages of each CPU's buffer; a power of two
    pub pages: usize,
    /// drain threads
    pub threads: usize,
    /// events of a CPU that wake its reader; 0: a quarter of its buffer does
    pub wakeup: u32,
    /// the longest that what has not woken the reader waits for it (a ring buffer's: POLL_MS)
    pub poll_ms: u16,
}

/// The map that a tool's programs write to.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// a perf event array
    Perf(BorrowedFd<'a>),
    /// an array with room for a ring buffer of each CPU
    Rings(BorrowedFd<'a>),
}

impl<'a> From<BorrowedFd<'a>> for Source<'a> {
    fn from(map: BorrowedFd<'a>) -> Self {
        Self::Perf(map)
    }
}

enum Buffers {
    Perf(PerfBuffers),
    Rings(RingBuffers),
}

impl Buffers {
    fn open(source: Source<'_>, options: BufferOptions, cpus: Vec<i32>) -> Result<Self> {
        Ok(match source {
            Source::Perf(map) => Self::Perf(PerfBuffers::open(map.as_raw_fd(), options, cpus)?),
            Source::Rings(map) => Self::Rings(RingBuffers::open(map.as_raw_fd(), options, cpus)?),
        })
    }

    fn wait(&self, stop: BorrowedFd<'_>) -> Result<()> {
        match self {
            Self::Perf(buffers) => buffers.wait(Some(stop)),
            Self::Rings(buffers) => buffers.wait(),
        }
    }

    fn consume(&mut self, batch: &mut Batch) {
        match self {
            Self::Perf(buffers) => buffers.consume(batch),
            Self::Rings(buffers) => buffers.consume(batch),
        }
    }
}

/// Asks the threads for a last round: the flag, and what wakes them to see it.
struct Stop {
    flag: AtomicBool,
    awake: EventFd,
}

/// The drain threads of a session.
pub struct Drain {
    pub batches: Receiver<Batch>,
    recycle: Vec<Sender<Batch>>,
    stop: Arc<Stop>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Drain {
    /// Opens the buffers of `source` and starts to drain them.
    pub fn start<'a>(source: impl Into<Source<'a>>, options: BufferOptions) -> Result<Self> {
        let source = source.into();
        let cpus = online_cpus()?;
        let groups = options.threads.clamp(1, cpus.len());
        let stop = Arc::new(Stop {
            flag: AtomicBool::new(false),
            awake: EventFd::from_flags(EfdFlags::EFD_CLOEXEC)
                .context("failed to make an eventfd")?,
        });
        let (tx, batches) = bounded(CHANNEL);
        let mut drain = Self {
            batches,
            recycle: Vec::new(),
            stop: stop.clone(),
            threads: Vec::new(),
        };
        for group in 0..groups {
            let mine: Vec<i32> = cpus.iter().copied().skip(group).step_by(groups).collect();
            let buffer = Buffers::open(source, options, mine)?;
            let (back, recycled) = unbounded();
            let (tx, stop) = (tx.clone(), stop.clone());
            drain.recycle.push(back);
            drain.threads.push(
                std::thread::Builder::new()
                    .name(format!("drain-{group}"))
                    .spawn(move || drain_loop(buffer, group, &tx, &recycled, &stop))
                    .context("failed to start a drain thread")?,
            );
        }
        Ok(drain)
    }

    /// Number of groups, each with its own watermark.
    pub fn groups(&self) -> usize {
        self.recycle.len()
    }

    /// Gives a batch back, so that its memory is used again.
    pub fn give_back(&self, batch: Batch) {
        if let Some(to) = self.recycle.get(batch.group) {
            // The thread may be gone; then the memory is freed.
            let _ = to.send(batch);
        }
    }

    /// Asks the threads for a last round; then [`Drain::batches`] disconnects.
    pub fn stop(&self) {
        self.stop.flag.store(true, Ordering::Release);
        // Without it they see the flag a bit later.
        let _ = self.stop.awake.write(1);
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
    group: usize,
    tx: &Sender<Batch>,
    recycled: &Receiver<Batch>,
    stop: &Stop,
) -> Result<()> {
    loop {
        let last = stop.flag.load(Ordering::Acquire);
        if !last {
            buffer.wait(stop.awake.as_fd())?;
        }
        let mut batch = recycled.try_recv().unwrap_or_default();
        batch.clear();
        batch.group = group;
        batch.watermark = if last {
            u64::MAX
        } else {
            monotonic_ns()?.saturating_sub(SLACK_NS)
        };
        buffer.consume(&mut batch);
        // A tool that has ended takes no more.
        if tx.send(batch).is_err() || last {
            return Ok(());
        }
    }
}

/// Now, on the clock of `bpf_ktime_get_ns`.
pub fn monotonic_ns() -> Result<u64> {
    let t = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .context("failed to read the clock")?;
    Ok(t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
}

/// Bytes of a page of memory.
pub fn page_size() -> usize {
    nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .map_or(4096, |n| n as usize)
}

/// CPUs that are online (/sys/devices/system/cpu/online, a list such as `0-3,5`).
pub fn online_cpus() -> Result<Vec<i32>> {
    let path = "/sys/devices/system/cpu/online";
    let text = std::fs::read_to_string(path).with_context(|| format!("failed to read {path}"))?;
    parse_cpu_list(&text).with_context(|| format!("unexpected content of {path}: {text:?}"))
}

/// A list of CPUs as the kernel prints it.
fn parse_cpu_list(text: &str) -> Option<Vec<i32>> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        cpus.extend(first.parse::<i32>().ok()?..=last.parse::<i32>().ok()?);
    }
    (!cpus.is_empty()).then_some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists() {
        assert_eq!(parse_cpu_list("0\n"), Some(vec![0]));
        assert_eq!(parse_cpu_list("0-2,5\n"), Some(vec![0, 1, 2, 5]));
        assert_eq!(parse_cpu_list("x"), None);
        assert_eq!(parse_cpu_list(""), None);
    }

    /// A batch with one sample in it.
    fn noted(ts: u64, len: u32, room: usize) -> Batch {
        let mut batch = Batch {
            data: vec![9; 4],
            ..Batch::default()
        };
        batch.data.extend_from_slice(&ts.to_ne_bytes());
        batch.data.extend_from_slice(&len.to_ne_bytes());
        batch.data.resize(4 + room.max(HEAD), 1);
        batch.note(3, 4, room);
        batch
    }

    #[test]
    fn a_sample_loses_its_padding_and_a_short_one_is_counted() {
        let batch = noted(7, 14, 16);
        let r = batch.records[0];
        assert_eq!((r.ts, r.offset, r.len, r.cpu), (7, 4, 14, 3));
        let short = noted(7, 14, 8);
        assert_eq!((short.short, short.records.len()), (1, 0));
    }

    #[test]
    fn a_length_past_the_sample_takes_what_is_there() {
        assert_eq!(noted(7, 1000, 16).records[0].len, 16);
        // ... and one that is no sample at all counts as short.
        let mut batch = noted(7, 16, 16);
        batch.note(0, 100, 16);
        assert_eq!(batch.short, 1);
    }
}
