//! Drains per-CPU perf buffers into batches on a bounded crossbeam channel.
//!
//! One thread, or one per group of CPUs. A round: wait until a buffer is a quarter full or 50 ms have passed, note the
//! time, take all that is in the buffers, send it as one [`Batch`] with a watermark. So no system call per event, and a line
//! within 100 ms on a quiet system. A full channel blocks the thread; then the kernel's buffers fill, and what they refuse is
//! counted where it happens, in the BPF program (`np_stats`).

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, bail};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use libbpf_sys as sys;
use nix::poll::{PollFd, PollFlags, PollTimeout};

/// The longest that an event waits in a buffer that is not filling, in ms.
const POLL_MS: u16 = 50;
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
}

/// What one round took out of the buffers of one group of CPUs.
#[derive(Debug, Default)]
pub struct Batch {
    pub group: usize,
    /// all events of the group up to this time (ns of CLOCK_MONOTONIC) are in this batch or an earlier one
    pub watermark: u64,
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

    /// Takes one raw sample (padded by perf to 8 bytes); the head's `len` cuts the padding off.
    fn take(&mut self, cpu: u32, sample: &[u8]) {
        let Some(head) = sample.get(..HEAD) else {
            self.short += 1;
            return;
        };
        let ts = u64::from_ne_bytes(head[..8].try_into().unwrap_or_default());
        let len = u32::from_ne_bytes(head[8..12].try_into().unwrap_or_default()) as usize;
        let bytes = sample.get(..len).unwrap_or(sample);
        self.records.push(BatchRecord {
            ts,
            offset: self.data.len() as u32,
            len: bytes.len() as u32,
            cpu,
        });
        self.data.extend_from_slice(bytes);
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
}

/// The drain threads of a session.
pub struct Drain {
    pub batches: Receiver<Batch>,
    recycle: Vec<Sender<Batch>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Drain {
    /// Opens the buffers of the perf event array `map` and starts to drain them.
    pub fn start(map: BorrowedFd<'_>, options: BufferOptions) -> Result<Self> {
        if !options.pages.is_power_of_two() {
            return Err(super::usage(format!(
                "buffer of {} pages: the number must be a power of two",
                options.pages
            )));
        }
        let cpus = online_cpus()?;
        let groups = options.threads.clamp(1, cpus.len());
        let stop = Arc::new(AtomicBool::new(false));
        let (tx, batches) = bounded(CHANNEL);
        let mut drain = Self {
            batches,
            recycle: Vec::new(),
            stop: stop.clone(),
            threads: Vec::new(),
        };
        for group in 0..groups {
            let mine: Vec<i32> = cpus.iter().copied().skip(group).step_by(groups).collect();
            let buffer = RawBuffer::open(map.as_raw_fd(), options, mine)?;
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
        self.stop.store(true, Ordering::Release);
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
    mut buffer: RawBuffer,
    group: usize,
    tx: &Sender<Batch>,
    recycled: &Receiver<Batch>,
    stop: &AtomicBool,
) -> Result<()> {
    loop {
        let last = stop.load(Ordering::Acquire);
        if !last {
            buffer.wait()?;
        }
        let mut batch = recycled.try_recv().unwrap_or_default();
        batch.clear();
        batch.group = group;
        batch.watermark = monotonic_ns()?.saturating_sub(SLACK_NS);
        let mut batch = buffer.consume(batch)?;
        if last {
            batch.watermark = u64::MAX;
        }
        // A tool that has ended takes no more.
        if tx.send(batch).is_err() || last {
            return Ok(());
        }
    }
}

/// libbpf's raw perf buffers over some CPUs.
struct RawBuffer {
    pb: NonNull<sys::perf_buffer>,
    /// where the callback puts samples: libbpf keeps this pointer too, so it is no Box (which would promise the compiler that
    /// nobody else writes there: a release build then sees empty batches)
    batch: NonNull<Batch>,
}

// SAFETY: the perf_buffer and the batch that its callback writes to are owned by this value alone, and libbpf ties neither to
// the thread that made them.
unsafe impl Send for RawBuffer {}

impl RawBuffer {
    fn open(map_fd: RawFd, options: BufferOptions, cpus: Vec<i32>) -> Result<Self> {
        let pages = options.pages;
        let mut attr = sys::perf_event_attr {
            type_: sys::PERF_TYPE_SOFTWARE,
            size: size_of::<sys::perf_event_attr>() as u32,
            config: u64::from(sys::PERF_COUNT_SW_BPF_OUTPUT),
            sample_type: u64::from(sys::PERF_SAMPLE_RAW),
            ..Default::default()
        };
        attr.__bindgen_anon_1.sample_period = 1;
        // The poll's time-out takes what did not wake the reader.
        if options.wakeup > 0 {
            attr.__bindgen_anon_2.wakeup_events = options.wakeup;
        } else {
            attr.set_watermark(1);
            attr.__bindgen_anon_2.wakeup_watermark = (pages * page_size() / 4) as u32;
        }

        let mut keys = cpus.clone();
        let mut cpus = cpus;
        let opts = sys::perf_buffer_raw_opts {
            sz: size_of::<sys::perf_buffer_raw_opts>() as _,
            cpu_cnt: cpus.len() as i32,
            cpus: cpus.as_mut_ptr(),
            map_keys: keys.as_mut_ptr(),
            ..Default::default()
        };
        let batch = NonNull::from(Box::leak(Box::<Batch>::default()));
        // SAFETY: all pointers are valid for the call; libbpf copies attr and opts. `batch` is freed after perf_buffer__free, in
        // drop.
        let pb = unsafe {
            sys::perf_buffer__new_raw(
                map_fd,
                pages as _,
                &mut attr,
                Some(on_event),
                batch.as_ptr().cast(),
                &opts,
            )
        };
        let Some(pb) = NonNull::new(pb) else {
            let e = std::io::Error::last_os_error();
            // SAFETY: leaked above, and there is no perf_buffer that knows it.
            drop(unsafe { Box::from_raw(batch.as_ptr()) });
            bail!(
                "failed to open perf buffers of {pages} pages on {} CPUs: {e} (a smaller --buffer-pages may help)",
                cpus.len()
            );
        };
        Ok(Self { pb, batch })
    }

    /// Waits until a buffer has filled to its watermark or the time is up.
    fn wait(&self) -> Result<()> {
        // SAFETY: the perf_buffer is valid; its epoll fd lives as long as it does.
        let fd = unsafe { BorrowedFd::borrow_raw(sys::perf_buffer__epoll_fd(self.pb.as_ptr())) };
        let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
        match nix::poll::poll(&mut fds, PollTimeout::from(POLL_MS)) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(e) => Err(e).context("failed to wait for the perf buffers"),
        }
    }

    /// Takes all that is in the buffers into `batch`.
    fn consume(&mut self, batch: Batch) -> Result<Batch> {
        // SAFETY: the batch is valid until drop, and only perf_buffer__consume lets the callback write to it.
        unsafe { *self.batch.as_ptr() = batch };
        // SAFETY: the perf_buffer is valid, and the callback's context is `self.batch`, which nothing else touches meanwhile.
        let err = unsafe { sys::perf_buffer__consume(self.pb.as_ptr()) };
        if err < 0 {
            bail!(
                "failed to read the perf buffers: {}",
                std::io::Error::from_raw_os_error(-err)
            );
        }
        // SAFETY: as above; the call has returned.
        Ok(unsafe { std::mem::take(self.batch.as_mut()) })
    }
}

impl Drop for RawBuffer {
    fn drop(&mut self) {
        // SAFETY: made by perf_buffer__new_raw and by Box::leak, each freed once; libbpf lets go of the batch first.
        unsafe {
            sys::perf_buffer__free(self.pb.as_ptr());
            drop(Box::from_raw(self.batch.as_ptr()));
        }
    }
}

/// libbpf's callback, once a record. It must not panic (it is called from C).
unsafe extern "C" fn on_event(
    ctx: *mut std::os::raw::c_void,
    cpu: i32,
    event: *mut sys::perf_event_header,
) -> sys::bpf_perf_event_ret {
    // SAFETY: ctx is the Batch of the RawBuffer that consumes; event is a whole record of `size` bytes (libbpf copies one
    // that wraps around the end of the buffer).
    let (batch, record) = unsafe {
        let size = usize::from((*event).size);
        (
            &mut *ctx.cast::<Batch>(),
            std::slice::from_raw_parts(event.cast::<u8>(), size),
        )
    };
    // SAFETY: as above; the header is within the record.
    match unsafe { (*event).type_ } {
        // struct { header (8 bytes); u32 size; u8 data[size]; }
        sys::PERF_RECORD_SAMPLE => batch.take(cpu as u32, record.get(12..).unwrap_or_default()),
        // struct { header; u64 id; u64 lost; }
        sys::PERF_RECORD_LOST => {
            let lost = record
                .get(16..24)
                .and_then(|b| b.try_into().ok())
                .map_or(0, u64::from_ne_bytes);
            batch.lost += lost;
        }
        _ => {}
    }
    sys::LIBBPF_PERF_EVENT_CONT
}

/// Now, on the clock of `bpf_ktime_get_ns`.
pub fn monotonic_ns() -> Result<u64> {
    let t = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .context("failed to read the clock")?;
    Ok(t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
}

fn page_size() -> usize {
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

    #[test]
    fn a_sample_loses_its_padding_and_a_short_one_is_counted() {
        let mut batch = Batch::default();
        let mut sample = Vec::new();
        sample.extend_from_slice(&7u64.to_ne_bytes());
        sample.extend_from_slice(&14u32.to_ne_bytes());
        sample.extend_from_slice(&[1, 2, 9, 9]);
        batch.take(3, &sample);
        batch.take(3, &sample[..8]);
        assert_eq!(batch.short, 1);
        assert_eq!(batch.records.len(), 1);
        let r = batch.records[0];
        assert_eq!((r.ts, r.len, r.cpu), (7, 14, 3));
        assert_eq!(batch.data, &sample[..14]);
    }

    #[test]
    fn a_length_past_the_sample_takes_what_is_there() {
        let mut batch = Batch::default();
        let mut sample = vec![0u8; 16];
        sample[8..12].copy_from_slice(&1000u32.to_ne_bytes());
        batch.take(0, &sample);
        assert_eq!(batch.records[0].len, 16);
    }
}
