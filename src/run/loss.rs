//! What a run lost, by cause. Told on stderr at the end whenever any of it is not 0, and as a record in JSON output.

use std::collections::BTreeMap;
use std::io::Write;

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags};
use serde::{Deserialize, Serialize};

use super::output::Output;

/// `struct np_stats` of src/bpf/common/event.h: one CPU's counters since the start of the run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct CpuStats {
    /// events handed to the buffer, lost ones included
    pub sent: u64,
    /// events that the full buffer refused
    pub lost: u64,
    /// insertions that a full map refused
    pub map_full: u64,
    pub hits: u64,
}

// SAFETY: four u64, no padding, valid for any bits.
unsafe impl plain::Plain for CpuStats {}

/// A loss as a JSON record.
#[derive(Serialize)]
struct Row<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(flatten)]
    loss: &'a Loss,
}

/// Everything that a run can lose.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Loss {
    /// events that the BPF programs handed to the buffers
    pub sent: u64,
    /// events that reached user space
    pub received: u64,
    /// events that a full buffer refused
    pub lost: u64,
    /// the same by CPU, those with a loss only
    pub lost_by_cpu: BTreeMap<usize, u64>,
    /// hits of a probe while another ran on the same CPU: the kernel skips those
    pub missed: u64,
    /// calls whose return was not seen: the kernel had no place left for it
    #[serde(skip_serializing_if = "is_zero")]
    pub unreturned: u64,
    /// times that the programs stood still, since user space did
    #[serde(skip_serializing_if = "is_zero")]
    pub gaps: u64,
    /// how long in all, ns
    #[serde(skip_serializing_if = "is_zero")]
    pub gap_ns: u64,
    /// insertions that a full map refused
    pub map_full: u64,
    /// printed, but out of the order of time
    pub late: u64,
    /// events that could not be decoded
    pub undecodable: u64,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl Loss {
    /// Adds the counters of the map `stats`.
    pub fn add_stats(&mut self, stats: &impl MapCore) -> Result<()> {
        let per_cpu = stats
            .lookup_percpu(&0u32.to_ne_bytes(), MapFlags::ANY)
            .context("failed to read the counters of the run")?
            .unwrap_or_default();
        for (cpu, bytes) in per_cpu.iter().enumerate() {
            let mut s = CpuStats::default();
            if plain::copy_from_bytes(&mut s, bytes).is_ok() {
                self.add_cpu(cpu, s);
            }
        }
        Ok(())
    }

    fn add_cpu(&mut self, cpu: usize, s: CpuStats) {
        self.sent += s.sent;
        self.lost += s.lost;
        self.map_full += s.map_full;
        if s.lost > 0 {
            *self.lost_by_cpu.entry(cpu).or_default() += s.lost;
        }
    }

    /// What was lost since `earlier`, an account of the same run.
    pub fn since(&self, earlier: &Self) -> Self {
        let cpu = |(cpu, n): (&usize, &u64)| {
            let before = earlier.lost_by_cpu.get(cpu).unwrap_or(&0);
            Some((*cpu, n.saturating_sub(*before))).filter(|(_, n)| *n > 0)
        };
        Self {
            sent: self.sent.saturating_sub(earlier.sent),
            received: self.received.saturating_sub(earlier.received),
            lost: self.lost.saturating_sub(earlier.lost),
            lost_by_cpu: self.lost_by_cpu.iter().filter_map(cpu).collect(),
            missed: self.missed.saturating_sub(earlier.missed),
            unreturned: self.unreturned.saturating_sub(earlier.unreturned),
            gaps: self.gaps.saturating_sub(earlier.gaps),
            gap_ns: self.gap_ns.saturating_sub(earlier.gap_ns),
            map_full: self.map_full.saturating_sub(earlier.map_full),
            late: self.late.saturating_sub(earlier.late),
            undecodable: self.undecodable.saturating_sub(earlier.undecodable),
        }
    }

    /// Anything to tell?
    pub fn any(&self) -> bool {
        let some = self.lost + self.missed + self.unreturned + self.map_full;
        some + self.late + self.undecodable + self.gaps + self.gap_ns > 0
    }

    /// One line a cause, for stderr.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if self.lost > 0 {
            let cpus: Vec<String> = self
                .lost_by_cpu
                .iter()
                .map(|(cpu, n)| format!("cpu {cpu}: {n}"))
                .collect();
            lines.push(format!(
                "lost {} of {} events, the buffers were full ({}); a larger --buffer-pages or a narrower filter helps",
                self.lost,
                self.sent,
                cpus.join(", ")
            ));
        }
        if self.missed > 0 {
            lines.push(format!(
                "missed {} hits: the kernel skips a probe that is hit while another runs on the same CPU",
                self.missed
            ));
        }
        if self.unreturned > 0 {
            lines.push(format!(
                "{} calls are missing, their return was not seen: the kernel has places for the returns of few threads at once",
                self.unreturned
            ));
        }
        if self.gaps + self.gap_ns > 0 {
            let times = match self.gaps {
                1 => "once".to_owned(),
                n => format!("{n} times"),
            };
            lines.push(format!(
                "looked at nothing for {:.1} s ({times}): netprobe was stopped or behind, and its programs stood still",
                self.gap_ns as f64 / 1e9
            ));
        }
        if self.map_full > 0 {
            lines.push(format!(
                "{} insertions into a full map refused",
                self.map_full
            ));
        }
        if self.late > 0 {
            lines.push(format!(
                "{} events came late and stand out of the order of time",
                self.late
            ));
        }
        if self.undecodable > 0 {
            lines.push(format!("{} events could not be decoded", self.undecodable));
        }
        lines
    }

    /// The end of a run's output: the loss on stderr, and in JSON as the last record.
    pub fn report(&self, out: &mut Output) -> Result<()> {
        self.tell();
        if out.json() && self.any() {
            let row = Row {
                kind: "loss",
                loss: self,
            };
            out.json_line(&row)?;
        }
        out.flush()?;
        out.report_unwritten();
        Ok(())
    }

    /// Writes [`Loss::lines`] to stderr. Its reader may be the one that closed stdout (`2>&1 | head`), which is no reason to fail.
    pub fn tell(&self) {
        for line in self.lines() {
            let _ = writeln!(std::io::stderr(), "netprobe: {line}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silent_without_loss_and_one_line_a_cause() {
        let mut loss = Loss {
            sent: 10,
            received: 10,
            ..Loss::default()
        };
        assert!(!loss.any());
        assert!(loss.lines().is_empty());
        loss.add_cpu(
            3,
            CpuStats {
                sent: 5,
                lost: 2,
                map_full: 1,
                hits: 0,
            },
        );
        loss.late = 1;
        loss.missed = 4;
        loss.undecodable = 1;
        (loss.gaps, loss.gap_ns) = (1, 2_300_000_000);
        assert!(loss.any());
        let text = loss.lines().join("\n");
        assert!(text.contains("lost 2 of 15 events"), "{text}");
        assert!(text.contains("cpu 3: 2"), "{text}");
        assert!(text.contains("nothing for 2.3 s (once)"), "{text}");
        assert_eq!(loss.lines().len(), 6);
    }
}
