//! What tells the programs that somebody reads: one word in the kernel's memory, mapped, so that saying so costs no
//! system call (src/bpf/common/heartbeat.h).

use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::bpf::skb::types::np_heartbeat;
use crate::os::page_size;

/// `struct np_heartbeat`, which both sides write: user space the first two, the program the others.
#[repr(C)]
struct Shared {
    drained: AtomicU64,
    limit: AtomicU64,
    looked: AtomicU64,
    since: AtomicU64,
    gaps: AtomicU64,
    gap_ns: AtomicU64,
}

const _: () = {
    assert!(size_of::<Shared>() == size_of::<np_heartbeat>());
    assert!(offset_of!(Shared, limit) == offset_of!(np_heartbeat, limit));
    assert!(offset_of!(Shared, looked) == offset_of!(np_heartbeat, looked));
    assert!(offset_of!(Shared, since) == offset_of!(np_heartbeat, since));
    assert!(offset_of!(Shared, gaps) == offset_of!(np_heartbeat, gaps));
};

/// How often and how long the programs have stood still.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Gaps {
    pub times: u64,
    pub ns: u64,
}

/// The map of one run.
#[derive(Debug, Clone)]
pub struct Pulse(Arc<Mapping>);

#[derive(Debug)]
struct Mapping(NonNull<Shared>);

// SAFETY: the mapping is of atomics, and lives until the last of its users has gone.
unsafe impl Send for Mapping {}
// SAFETY: see above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn get(&self) -> &Shared {
        // SAFETY: mapped until dropped, a page long, aligned to one; any bits are a value.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: what map() got, and nobody refers to it any more.
        unsafe { libc::munmap(self.0.as_ptr().cast(), page_size()) };
    }
}

impl Pulse {
    /// The map `data_heartbeat`. `limit`: how long user space may be silent.
    pub fn map(map: BorrowedFd<'_>, limit: Duration) -> Result<Self> {
        // SAFETY: a new mapping, at a place that the kernel chooses.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                page_size(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        let at = NonNull::new(at.cast()).filter(|_| at != libc::MAP_FAILED);
        let at = at.with_context(|| {
            let e = io::Error::last_os_error();
            format!("failed to map the heartbeat's map: {e}")
        })?;
        let pulse = Self(Arc::new(Mapping(at)));
        let limit = u64::try_from(limit.as_nanos())?;
        pulse.0.get().limit.store(limit, Ordering::Relaxed);
        Ok(pulse)
    }

    /// A round of user space began at `now` (ns of CLOCK_MONOTONIC), and has taken all that was there.
    pub fn beat(&self, now: u64) {
        self.0.get().drained.store(now, Ordering::Relaxed);
    }

    /// When the program ran last; 0: never.
    pub fn looked(&self) -> u64 {
        self.0.get().looked.load(Ordering::Relaxed)
    }

    /// Up to `now`.
    pub fn gaps(&self, now: u64) -> Gaps {
        let shared = self.0.get();
        let since = shared.since.load(Ordering::Relaxed);
        let open = match since {
            0 => 0,
            since => now.saturating_sub(since),
        };
        Gaps {
            times: shared.gaps.load(Ordering::Relaxed),
            ns: shared.gap_ns.load(Ordering::Relaxed) + open,
        }
    }
}
