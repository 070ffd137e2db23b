//! Perf buffers, one a CPU: opened and mapped by libbpf, read here. What is in a buffer is copied out in one piece, then looked at: a
//! callback from C for each record, with a copy each, costs 300 instructions more an event.

use std::os::fd::{BorrowedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail};
use libbpf_sys as sys;
use nix::poll::{PollFd, PollFlags, PollTimeout};

use super::batch::{Batch, BufferOptions};
use crate::kernel::caps;
use crate::os::page_size;

/// `struct perf_event_header`: u32 type, u16 misc, u16 size (of the whole record, a multiple of 8).
const HEADER: usize = 8;
/// Where a sample's bytes begin: behind the header and their own u32 size.
const SAMPLE: usize = HEADER + 4;

/// The mapped buffer of one CPU.
struct Ring {
    cpu: u32,
    page: NonNull<sys::perf_event_mmap_page>,
    data: NonNull<u8>,
    /// bytes; a power of two
    size: usize,
}

/// Perf buffers that libbpf has opened together.
struct Opened {
    pb: NonNull<sys::perf_buffer>,
    rings: Vec<Ring>,
}

/// The perf buffers of some CPUs.
pub struct PerfBuffers {
    map_fd: RawFd,
    options: BufferOptions,
    opened: Vec<Opened>,
}

// SAFETY: the perf_buffer and its mappings are used through this value alone, and libbpf ties neither to the thread that made them.
unsafe impl Send for PerfBuffers {}

/// libbpf wants a callback; nobody calls what would call it.
unsafe extern "C" fn unused(
    _: *mut std::os::raw::c_void,
    _: i32,
    _: *mut sys::perf_event_header,
) -> sys::bpf_perf_event_ret {
    sys::LIBBPF_PERF_EVENT_CONT
}

impl PerfBuffers {
    pub fn open(map_fd: RawFd, options: BufferOptions, cpus: Vec<i32>) -> Result<Self> {
        let opened = vec![Opened::open(map_fd, options, &cpus)?];
        Ok(Self {
            map_fd,
            options,
            opened,
        })
    }

    /// Opens the buffer of a CPU that has come online. One that was there before has lost its perf event: what it still has comes into
    /// `batch`, then it is opened anew.
    pub fn add(&mut self, cpu: i32, batch: &mut Batch) -> Result<()> {
        let is_old = |opened: &Opened| opened.rings.iter().all(|r| r.cpu == cpu as u32);
        self.consume(batch);
        // The old one's end takes its place out of the map: it goes first.
        self.opened.retain(|opened| !is_old(opened));
        self.opened
            .push(Opened::open(self.map_fd, self.options, &[cpu])?);
        Ok(())
    }

    /// Waits until a buffer has filled to its watermark, the time is up, or one of `also` can be read.
    pub fn wait(&self, also: &[BorrowedFd<'_>]) -> Result<()> {
        let epoll = |opened: &Opened| {
            // SAFETY: the perf_buffer is valid; its epoll fd lives as long as it does.
            unsafe { BorrowedFd::borrow_raw(sys::perf_buffer__epoll_fd(opened.pb.as_ptr())) }
        };
        let fds = self.opened.iter().map(epoll).chain(also.iter().copied());
        let mut fds: Vec<_> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match nix::poll::poll(&mut fds, PollTimeout::from(self.options.poll_ms)) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(e) => Err(e).context("failed to wait for the perf buffers"),
        }
    }

    /// Takes all that is in the buffers into `batch`.
    pub fn consume(&mut self, batch: &mut Batch) {
        for ring in self.opened.iter().flat_map(|opened| &opened.rings) {
            let from = batch.data.len();
            ring.copy(&mut batch.data);
            note_records(batch, ring.cpu, from);
        }
    }
}

impl Opened {
    fn open(map_fd: RawFd, options: BufferOptions, cpus: &[i32]) -> Result<Self> {
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

        let mut keys = cpus.to_vec();
        let mut numbers = cpus.to_vec();
        let opts = sys::perf_buffer_raw_opts {
            sz: size_of::<sys::perf_buffer_raw_opts>() as _,
            cpu_cnt: cpus.len() as i32,
            cpus: numbers.as_mut_ptr(),
            map_keys: keys.as_mut_ptr(),
            ..Default::default()
        };
        // SAFETY: all pointers are valid for the call; libbpf copies attr and opts, and hands the context (none) to the callback
        // only.
        let pb = unsafe {
            sys::perf_buffer__new_raw(
                map_fd,
                pages as _,
                &mut attr,
                Some(unused),
                std::ptr::null_mut(),
                &opts,
            )
        };
        let Some(pb) = NonNull::new(pb) else {
            let e = std::io::Error::last_os_error();
            let why = match e.raw_os_error() {
                Some(libc::EACCES) => caps::why_no_perf(),
                Some(libc::EPERM) => "this user may lock no more memory: CAP_IPC_LOCK is missing, or take a smaller --buffer-pages".into(),
                _ => format!("{e} (a smaller --buffer-pages may help)"),
            };
            bail!(
                "failed to open perf buffers of {pages} pages on {} CPUs: {why}",
                cpus.len()
            );
        };
        let mut opened = Self {
            pb,
            rings: Vec::new(),
        };
        // libbpf keeps the order of the CPUs it was given.
        for (i, &cpu) in cpus.iter().enumerate() {
            opened.rings.push(opened.ring(i, cpu)?);
        }
        Ok(opened)
    }

    fn ring(&self, i: usize, cpu: i32) -> Result<Ring> {
        let (mut base, mut size) = (std::ptr::null_mut(), 0);
        // SAFETY: the perf_buffer is valid, the others are places for the answer.
        let err =
            unsafe { sys::perf_buffer__buffer(self.pb.as_ptr(), i as _, &mut base, &mut size) };
        let base = NonNull::new(base.cast::<u8>())
            .filter(|_| err == 0)
            .with_context(|| format!("libbpf has no perf buffer of CPU {cpu}"))?;
        Ok(Ring {
            cpu: cpu as u32,
            page: base.cast(),
            // SAFETY: the mapping is one page and `size` bytes behind it.
            data: unsafe { base.add(page_size()) },
            size: size as usize,
        })
    }
}

impl Ring {
    /// Appends what is in the buffer to `to`, and gives the room back to the kernel.
    fn copy(&self, to: &mut Vec<u8>) {
        let page = self.page.as_ptr();
        // SAFETY: the mapping lives as long as the perf_buffer. The kernel writes data_head and reads data_tail while we are here: both
        // are aligned u64, used as atomics (acquire and release, as perf_event_open(2) asks).
        let (head, tail) = unsafe {
            (
                AtomicU64::from_ptr(&raw mut (*page).data_head),
                AtomicU64::from_ptr(&raw mut (*page).data_tail),
            )
        };
        let (start, end) = (tail.load(Ordering::Relaxed), head.load(Ordering::Acquire));
        let len = (end.wrapping_sub(start) as usize).min(self.size);
        let at = start as usize & (self.size - 1);
        let first = len.min(self.size - at);
        // SAFETY: both parts lie within the mapping, and the kernel does not write between tail and head.
        let (one, two) = unsafe {
            (
                std::slice::from_raw_parts(self.data.add(at).as_ptr(), first),
                std::slice::from_raw_parts(self.data.as_ptr(), len - first),
            )
        };
        to.extend_from_slice(one);
        to.extend_from_slice(two);
        tail.store(end, Ordering::Release);
    }
}

/// Notes the samples among the records in the batch's data from `from` on, which CPU `cpu` wrote.
pub fn note_records(batch: &mut Batch, cpu: u32, from: usize) {
    let mut at = from;
    while let Some(header) = batch.data.get(at..).and_then(<[u8]>::first_chunk::<HEADER>) {
        let header = u64::from_ne_bytes(*header);
        let (kind, size) = if cfg!(target_endian = "little") {
            (header as u32, (header >> 48) as usize)
        } else {
            ((header >> 32) as u32, header as u16 as usize)
        };
        match kind {
            // struct { header; u32 size; u8 data[size]; }
            sys::PERF_RECORD_SAMPLE => {
                batch.note(cpu, at + SAMPLE, size.saturating_sub(SAMPLE));
            }
            // struct { header; u64 id; u64 lost; }
            sys::PERF_RECORD_LOST => {
                let lost = batch.data.get(at + HEADER + 8..);
                let lost = lost.and_then(<[u8]>::first_chunk);
                batch.lost += lost.map_or(0, |n| u64::from_ne_bytes(*n));
            }
            _ => {}
        }
        // A size of less than a header would never end.
        at += size.max(HEADER);
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        // SAFETY: made by perf_buffer__new_raw, freed once; the rings, which point into its mappings, go with this value.
        unsafe { sys::perf_buffer__free(self.pb.as_ptr()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(kind: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = kind.to_ne_bytes().to_vec();
        bytes.extend_from_slice(&[0, 0]);
        bytes.extend_from_slice(&((HEADER + body.len()) as u16).to_ne_bytes());
        bytes.extend_from_slice(body);
        bytes
    }

    #[test]
    fn samples_and_losses() {
        let mut sample = 20u32.to_ne_bytes().to_vec();
        sample.extend_from_slice(&5u64.to_ne_bytes());
        sample.extend_from_slice(&14u32.to_ne_bytes());
        sample.extend_from_slice(&[1; 8]);
        let lost: Vec<u8> = [1u64, 7].iter().flat_map(|n| n.to_ne_bytes()).collect();
        let mut batch = Batch::default();
        batch.data.extend(record(sys::PERF_RECORD_SAMPLE, &sample));
        batch.data.extend(record(sys::PERF_RECORD_LOST, &lost));
        batch.data.extend(record(sys::PERF_RECORD_SAMPLE, &sample));
        note_records(&mut batch, 2, 0);
        assert_eq!((batch.lost, batch.short), (7, 0));
        let found: Vec<_> = batch
            .records
            .iter()
            .map(|r| (r.ts, r.offset, r.len))
            .collect();
        assert_eq!(found, [(5, 12, 14), (5, 12 + 32 + 24, 14)]);
    }

    proptest! {
        #[test]
        fn odd_bytes_end(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut batch = Batch { data: bytes, ..Batch::default() };
            note_records(&mut batch, 0, 0);
            for r in &batch.records {
                prop_assert!((r.offset + r.len) as usize <= batch.data.len());
            }
        }
    }
}
