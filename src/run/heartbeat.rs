//! A run's programs stand still while user space does: stopped (SIGSTOP, a debugger), hung, or without memory. What
//! asks is a program of its own that a clock of the kernel runs (src/bpf/common/heartbeat.bpf.h); it goes with this
//! process however that ends.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result};

use super::log;
use super::loss::Loss;
use crate::bpf::skb::types::np_heartbeat_rate;
use crate::engine::heartbeat::{Gaps, Pulse};
use crate::kernel::attach;
use crate::os::{monotonic_ns, online_cpus};

/// The program's name in each object.
pub const PROGRAM: &str = "heartbeat";
/// How long a tool may leave its events in the buffers.
pub const LIMIT: Duration = Duration::from_secs(1);
/// A clock that has been silent for so long was of a CPU that has gone offline.
const CLOCK_GONE_NS: u64 = 2_000_000_000;

/// The heartbeat of a loaded skeleton: `heartbeat!(skel, LIMIT)`. A macro, since each skeleton has types of its own.
macro_rules! heartbeat {
    ($skel:expr, $limit:expr) => {{
        use std::os::fd::AsFd;
        let (program, map) = (&$skel.progs.heartbeat, &$skel.maps.data_heartbeat);
        $crate::run::heartbeat::Heartbeat::new(program.as_fd(), map.as_fd(), $limit)
    }};
}
pub(crate) use heartbeat;

/// The heartbeat of a run.
pub struct Heartbeat {
    program: OwnedFd,
    pub pulse: Pulse,
    clock: Option<OwnedFd>,
    /// when the clock was opened last
    opened: u64,
    /// what there was when it ended
    ended: Option<Gaps>,
}

impl Heartbeat {
    /// Of a loaded object: its program [`PROGRAM`] and its map `data_heartbeat`. The programs do not stand still before
    /// it has begun.
    pub fn new(program: BorrowedFd<'_>, map: BorrowedFd<'_>, limit: Duration) -> Result<Self> {
        Ok(Self {
            program: program
                .try_clone_to_owned()
                .context("failed to keep a program")?,
            pulse: Pulse::map(map, limit)?,
            clock: None,
            opened: 0,
            ended: None,
        })
    }

    /// From here on user space has to be heard.
    pub fn begin(&mut self) {
        if let Err(e) = self.open() {
            log::note(&format!(
                "the programs go on while netprobe is stopped or hangs: {e:#}"
            ));
        }
    }

    fn open(&mut self) -> Result<()> {
        let now = monotonic_ns()?;
        let cpus = online_cpus()?;
        // Interrupts of devices mostly come to the first ones.
        let cpu = cpus.last().context("no CPU is online")?;
        self.pulse.beat(now);
        self.opened = now;
        self.clock = None;
        let hz = u64::from(np_heartbeat_rate::NP_HEARTBEAT_HZ.0);
        self.clock = Some(attach::cpu_clock_of(self.program.as_fd(), *cpu, hz)?);
        Ok(())
    }

    /// For a run without events: user space is there.
    pub fn beat(&self) {
        if let Ok(now) = monotonic_ns() {
            self.pulse.beat(now);
        }
    }

    /// Called at each round of the loop.
    pub fn look(&mut self) {
        if self.clock.is_none() {
            return;
        }
        let now = monotonic_ns().unwrap_or(0);
        let heard = self.pulse.looked().max(self.opened);
        if now.saturating_sub(heard) > CLOCK_GONE_NS {
            self.begin();
        }
    }

    /// The program runs no more, and pauses nothing; once more changes nothing.
    pub fn end(&mut self) {
        self.clock = None;
        self.ended = Some(self.gaps());
    }

    /// Up to now, or to the end.
    pub fn gaps(&self) -> Gaps {
        let now = || self.pulse.gaps(monotonic_ns().unwrap_or(0));
        self.ended.unwrap_or_else(now)
    }

    /// Adds what was not seen.
    pub fn count(&self, loss: &mut Loss) {
        let gaps = self.gaps();
        loss.gaps += gaps.times;
        loss.gap_ns += gaps.ns;
    }
}
