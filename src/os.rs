//! The machine: its clock, page size and CPUs.

use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::resource::{UsageWho, getrusage};
use nix::time::{ClockId, clock_gettime};

/// Now, on the clock of `bpf_ktime_get_ns`.
pub fn monotonic_ns() -> Result<u64> {
    let t = clock_gettime(ClockId::CLOCK_MONOTONIC).context("failed to read the clock")?;
    Ok(t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
}

/// What CLOCK_REALTIME and CLOCK_TAI are before CLOCK_MONOTONIC, ns: a card's clock goes by one of them. (All three are
/// slewed alike.)
pub fn clocks_of_cards() -> Result<[i64; 2]> {
    let read = |clock| -> Result<i64> {
        let time = clock_gettime(clock).context("failed to read the clock")?;
        Ok(time.tv_sec() * 1_000_000_000 + time.tv_nsec())
    };
    let monotonic = read(ClockId::CLOCK_MONOTONIC)?;
    let (utc, tai) = (read(ClockId::CLOCK_REALTIME)?, read(ClockId::CLOCK_TAI)?);
    Ok([utc - monotonic, tai - monotonic])
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

/// CPU time of this process, in user space and for its system calls.
pub fn cpu_time() -> Duration {
    let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) else {
        return Duration::ZERO;
    };
    let times = [usage.user_time(), usage.system_time()];
    let of = |t: &nix::sys::time::TimeVal| {
        let micros = t.tv_sec() as u64 * 1_000_000 + t.tv_usec() as u64;
        Duration::from_micros(micros)
    };
    times.iter().map(of).sum()
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
}
