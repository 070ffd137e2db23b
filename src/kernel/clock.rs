//! From the clock of BPF programs (CLOCK_MONOTONIC) to the wall clock, and to the time of day as the user reads it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::time::{ClockId, clock_gettime};

/// The wall clock is adjusted while a run goes on: the offset is measured anew after this long.
const REFRESH: Duration = Duration::from_secs(1);
/// Measurements of which the tightest is taken.
const TRIES: u32 = 8;

/// Turns monotonic time stamps into nanoseconds since 1970. Exact to well under a microsecond.
#[derive(Debug)]
pub struct WallClock {
    offset: i64,
    /// `None`: out of a recording
    measured: Option<Instant>,
}

impl WallClock {
    pub fn new() -> Result<Self> {
        Ok(WallClock {
            offset: measure()?,
            measured: Some(Instant::now()),
        })
    }

    /// With this offset (wall clock minus monotonic clock, ns), whatever this machine's clocks say.
    pub fn recorded(offset: i64) -> Self {
        WallClock {
            offset,
            measured: None,
        }
    }

    /// Wall clock minus monotonic clock, ns.
    pub fn offset(&self) -> i64 {
        self.offset
    }

    /// To be called now and then.
    pub fn refresh(&mut self) -> Result<()> {
        if self.measured.is_some_and(|then| then.elapsed() >= REFRESH) {
            *self = Self::new()?;
        }
        Ok(())
    }

    pub fn wall(&self, monotonic: u64) -> u64 {
        monotonic.saturating_add_signed(self.offset)
    }
}

/// Wall clock minus monotonic clock, by the reading that took the least time.
fn measure() -> Result<i64> {
    let mut best = (i64::MAX, 0);
    for _ in 0..TRIES {
        let before = read(ClockId::CLOCK_MONOTONIC)?;
        let wall = read(ClockId::CLOCK_REALTIME)?;
        let after = read(ClockId::CLOCK_MONOTONIC)?;
        best = best.min((after - before, wall - before - (after - before) / 2));
    }
    Ok(best.1)
}

fn read(clock: ClockId) -> Result<i64> {
    let time = clock_gettime(clock).context("failed to read the clock")?;
    Ok(time.tv_sec() * 1_000_000_000 + time.tv_nsec())
}

/// Hours, minutes and seconds in the local time zone.
pub fn time_of_day(wall: u64) -> (u8, u8, u8) {
    let seconds = (wall / 1_000_000_000) as libc::time_t;
    // SAFETY: struct tm is integers and a pointer: all zeros is a value.
    let mut tm: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to live values; localtime_r keeps neither.
    unsafe { libc::localtime_r(&seconds, &mut tm) };
    (tm.tm_hour as u8, tm.tm_min as u8, tm.tm_sec as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn now_is_now() {
        let clock = WallClock::new().unwrap();
        let monotonic = read(ClockId::CLOCK_MONOTONIC).unwrap() as u64;
        let wall = read(ClockId::CLOCK_REALTIME).unwrap() as u64;
        assert!(clock.wall(monotonic).abs_diff(wall) < 50_000_000);
    }
}
