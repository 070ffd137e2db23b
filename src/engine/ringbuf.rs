//! Ring buffers, one a CPU (`--transport ringbuf`, kernels from 5.8): made and mapped here, and put into the map of maps that the
//! programs look into. One ring for all CPUs would be one lock for all; each has its own, as with perf buffers.
//!
//! The programs wake the reader only when a ring comes to be a quarter full (event.bpf.h); epoll is asked for edges, since a ring
//! with anything in it is readable.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use anyhow::{Context, Result};
use libbpf_sys as sys;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::batch::{Batch, BufferOptions, POLL_MS};
use crate::os::page_size;

/// In front of each record: u32 length and flags, u32 page offset.
const HEADER: usize = 8;
/// Flags in a record's length: reserved, and not written yet; given up.
const BUSY: u32 = sys::BPF_RINGBUF_BUSY_BIT;
const DISCARDED: u32 = sys::BPF_RINGBUF_DISCARD_BIT;

/// The mapped ring of one CPU.
struct Ring {
    cpu: u32,
    /// where the reader is: a page that it may write
    consumer: NonNull<AtomicU64>,
    /// where the programs are; the data lie behind it, twice in a row
    producer: NonNull<AtomicU64>,
    size: usize,
    /// keeps the map
    _map: OwnedFd,
}

/// The ring buffers of some CPUs.
pub struct RingBuffers {
    outer: RawFd,
    pages: usize,
    rings: Vec<Ring>,
    epoll: Epoll,
}

// SAFETY: the mappings are used through this value alone, and are not tied to the thread that made them.
unsafe impl Send for RingBuffers {}

impl RingBuffers {
    /// `outer`: the array of rings.
    pub fn open(outer: RawFd, options: BufferOptions, cpus: Vec<i32>) -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .context("failed to make an epoll instance")?;
        let mut buffers = Self {
            outer,
            pages: options.pages,
            rings: Vec::new(),
            epoll,
        };
        cpus.into_iter().try_for_each(|cpu| buffers.add(cpu))?;
        Ok(buffers)
    }

    /// Opens the ring of a CPU, if it has none: a ring outlives its CPU's absence.
    pub fn add(&mut self, cpu: i32) -> Result<()> {
        if self.rings.iter().any(|ring| ring.cpu == cpu as u32) {
            return Ok(());
        }
        let ring = Ring::open(self.outer, cpu as u32, self.pages * page_size())
            .with_context(|| {
                format!(
                    "failed to make a ring buffer of {} pages for CPU {cpu} (--transport ringbuf needs kernel 5.8; a smaller --buffer-pages may help)",
                    self.pages
                )
            })?;
        let edges = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        self.epoll
            .add(ring._map.as_fd(), EpollEvent::new(edges, cpu as u64))
            .context("failed to wait for a ring buffer")?;
        self.rings.push(ring);
        Ok(())
    }

    /// Waits until a ring has filled to its watermark or the time is up.
    pub fn wait(&self) -> Result<()> {
        let mut events = [EpollEvent::empty(); 16];
        match self.epoll.wait(&mut events, EpollTimeout::from(POLL_MS)) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(e) => Err(e).context("failed to wait for the ring buffers"),
        }
    }

    /// Takes all that is in the rings into `batch`.
    pub fn consume(&mut self, batch: &mut Batch) {
        for ring in &self.rings {
            let from = batch.data.len();
            ring.copy(&mut batch.data);
            note_records(batch, ring.cpu, from);
        }
    }
}

impl Ring {
    fn open(outer: RawFd, cpu: u32, size: usize) -> Result<Self> {
        // SAFETY: a name, numbers and no options; the fd is owned at once.
        let fd = unsafe {
            sys::bpf_map_create(
                sys::BPF_MAP_TYPE_RINGBUF,
                c"np_ring".as_ptr(),
                0,
                0,
                size as u32,
                std::ptr::null(),
            )
        };
        if fd < 0 {
            return Err(std::io::Error::from_raw_os_error(-fd).into());
        }
        // SAFETY: a fresh fd that nothing else owns.
        let map = unsafe { OwnedFd::from_raw_fd(fd) };
        let page = page_size();
        let consumer = mapped(map.as_fd(), page, libc::PROT_READ | libc::PROT_WRITE, 0)?;
        let producer = mapped(map.as_fd(), page + 2 * size, libc::PROT_READ, page);
        let ring = Self {
            cpu,
            consumer: consumer.cast(),
            producer: match producer {
                Ok(producer) => producer.cast(),
                Err(e) => {
                    // SAFETY: mapped above, used by nobody.
                    unsafe { libc::munmap(consumer.as_ptr().cast(), page) };
                    return Err(e);
                }
            },
            size,
            _map: map,
        };
        // SAFETY: pointers to a key and a value of four bytes, as the map has them.
        let err = unsafe {
            sys::bpf_map_update_elem(outer, (&raw const cpu).cast(), (&raw const fd).cast(), 0)
        };
        if err < 0 {
            return Err(std::io::Error::from_raw_os_error(-err).into());
        }
        Ok(ring)
    }

    /// Appends all records that are whole to `to`, and gives their room back.
    fn copy(&self, to: &mut Vec<u8>) {
        // SAFETY: both mappings live as long as this value; the kernel uses these words as atomics too.
        let (consumer, producer) = unsafe { (self.consumer.as_ref(), self.producer.as_ref()) };
        let (start, end) = (
            consumer.load(Ordering::Relaxed),
            producer.load(Ordering::Acquire),
        );
        let mut len = 0;
        while len < (end.wrapping_sub(start) as usize).min(self.size) {
            let at = (start as usize + len) & (self.size - 1);
            // SAFETY: records begin at multiples of 8 within the data, which the kernel wrote before it moved the producer; the
            // length is written with release when the record is whole.
            let head = unsafe { AtomicU32::from_ptr(self.data().add(at).as_ptr().cast()) };
            let head = head.load(Ordering::Acquire);
            if head & BUSY != 0 {
                break;
            }
            len += record_size(head);
        }
        let len = len.min(self.size);
        let at = start as usize & (self.size - 1);
        // SAFETY: the data are mapped twice in a row, so that what begins within the first ends within the second; the kernel does not
        // write to records that it has submitted until the consumer has moved past them.
        let bytes = unsafe { std::slice::from_raw_parts(self.data().add(at).as_ptr(), len) };
        to.extend_from_slice(bytes);
        consumer.store(start.wrapping_add(len as u64), Ordering::Release);
    }

    fn data(&self) -> NonNull<u8> {
        // SAFETY: the mapping is one page and the data behind it.
        unsafe { self.producer.cast::<u8>().add(page_size()) }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let page = page_size();
        // SAFETY: mapped in open with these sizes, unmapped once.
        unsafe {
            libc::munmap(self.consumer.as_ptr().cast(), page);
            libc::munmap(self.producer.as_ptr().cast(), page + 2 * self.size);
        }
    }
}

fn mapped(map: BorrowedFd<'_>, size: usize, access: i32, offset: usize) -> Result<NonNull<u8>> {
    // SAFETY: a new mapping at an address of the kernel's choice.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size,
            access,
            libc::MAP_SHARED,
            map.as_raw_fd(),
            offset as libc::off_t,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error()).context("failed to map it");
    }
    NonNull::new(address.cast()).context("mapped at 0")
}

/// Bytes that a record takes, its header and padding included.
fn record_size(head: u32) -> usize {
    ((head & !(BUSY | DISCARDED)) as usize + HEADER).next_multiple_of(8)
}

/// Notes the records in the batch's data from `from` on, which CPU `cpu` wrote.
fn note_records(batch: &mut Batch, cpu: u32, from: usize) {
    let mut at = from;
    while let Some(head) = batch.data.get(at..).and_then(<[u8]>::first_chunk) {
        let head = u32::from_ne_bytes(*head);
        if head & DISCARDED == 0 {
            batch.note(cpu, at + HEADER, (head & !BUSY) as usize);
        }
        at += record_size(head);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn whole_records_and_discarded_ones() {
        let mut batch = Batch::default();
        for (len, flags) in [(13u32, 0), (16, DISCARDED), (20, 0)] {
            batch.data.extend_from_slice(&(len | flags).to_ne_bytes());
            batch.data.extend_from_slice(&[0; 4]);
            let mut event = u64::from(len).to_ne_bytes().to_vec();
            event.extend_from_slice(&len.to_ne_bytes());
            event.resize((len as usize).next_multiple_of(8), 0);
            batch.data.extend_from_slice(&event);
        }
        note_records(&mut batch, 1, 0);
        let found: Vec<_> = batch
            .records
            .iter()
            .map(|r| (r.ts, r.offset, r.len))
            .collect();
        assert_eq!(found, [(13, 8, 13), (20, 24 + 24 + 8, 20)]);
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
