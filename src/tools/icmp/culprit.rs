//! Why a softirq waited: what ran on its CPU from the raise to the entry. [`Culprits`] is pure; [`Names`] knows the names that
//! addresses and cgroup ids stand for.

use std::collections::{HashMap, VecDeque};
use std::io::Write;

use anyhow::Result;
use serde::Serialize;

use crate::kernel::cgroup::CgroupNames;
use crate::kernel::ksyms::{KernelSymbols, Symbol};
use crate::text::columns::us;
use crate::text::escape::escaped;

use super::decode::{Gap, Run, Sample, Times};

/// Gaps, and softirqs with samples, that are remembered until their echo comes.
const REMEMBERED: usize = 1024;
/// Samples of one gap that are kept.
const SAMPLES: usize = 4096;

/// A CPU and the time of the raise: what gap, samples and echoes of one softirq have in common.
type Softirq = (u16, u64);

/// What is known of a gap.
#[derive(Debug, Default)]
pub struct Waited {
    gap: Option<Gap>,
    samples: Vec<Sample>,
}

/// Gaps and samples by softirq.
#[derive(Debug, Default)]
pub struct Culprits {
    by_softirq: HashMap<Softirq, Waited>,
    order: VecDeque<Softirq>,
}

impl Culprits {
    pub fn gap(&mut self, gap: Gap) {
        let softirq = (gap.cpu, gap.raise);
        self.entry(softirq).gap = Some(gap);
    }

    pub fn sample(&mut self, sample: Sample) {
        let waited = self.entry((sample.head.cpu, sample.raise));
        if waited.samples.len() < SAMPLES {
            waited.samples.push(sample);
        }
    }

    /// What is known of the gap before the softirq that handled a request; `None` where that was short.
    pub fn of(&self, t: &Times) -> Option<&Waited> {
        self.by_softirq
            .get(&(t.receive_cpu, t.last.raise?))
            .filter(|w| w.gap.is_some())
    }

    /// What is known of the longest gap of this CPU that began or ended between these times.
    pub fn within(&self, cpu: u16, from: u64, to: u64) -> Option<&Waited> {
        let shared = |waited: &Waited| {
            let gap = waited.gap.as_ref().filter(|gap| gap.cpu == cpu)?;
            let ns = gap.entry.min(to).saturating_sub(gap.raise.max(from));
            (ns > 0).then_some(ns)
        };
        let all = self
            .by_softirq
            .values()
            .filter_map(|w| Some((shared(w)?, w)));
        all.max_by_key(|(ns, _)| *ns).map(|(_, waited)| waited)
    }

    fn entry(&mut self, softirq: Softirq) -> &mut Waited {
        if !self.by_softirq.contains_key(&softirq) {
            if self.order.len() >= REMEMBERED {
                if let Some(oldest) = self.order.pop_front() {
                    self.by_softirq.remove(&oldest);
                }
            }
            self.order.push_back(softirq);
        }
        self.by_softirq.entry(softirq).or_default()
    }
}

impl Waited {
    /// The task that ran longest, and the others.
    fn by_time(&self) -> Option<(&Run, Vec<&Run>)> {
        let mut runs: Vec<&Run> = self.gap.as_ref()?.runs.iter().collect();
        runs.sort_by_key(|r| std::cmp::Reverse(r.ns));
        let first = runs.first().copied()?;
        Some((first, runs.split_off(1)))
    }
}

/// Who made an echo wait.
#[derive(Debug, Serialize)]
pub struct Culprit {
    cpu: u16,
    waited_ns: u64,
    #[serde(flatten)]
    task: Task,
    /// samples of this task in the gap
    samples: usize,
    /// how many of them have the stack below (the most frequent, told apart by functions)
    samples_of_stack: usize,
    stack: Vec<Frame>,
    others: Vec<Task>,
}

/// A task that ran in the gap.
#[derive(Debug, Serialize)]
struct Task {
    tgid: u32,
    pid: u32,
    comm: String,
    ran_ns: u64,
    cgroup_id: u64,
    /// null: not a cgroup v2 that still is there
    cgroup: Option<String>,
}

#[derive(Debug, Serialize)]
struct Frame {
    addr: String,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    symbol: Option<Symbol>,
}

/// Names for addresses and cgroup ids.
#[derive(Default)]
pub struct Names {
    symbols: KernelSymbols,
    cgroups: CgroupNames,
}

impl Names {
    /// `function+0x1f` for an address in the kernel.
    pub fn place(&mut self, addr: u64) -> Result<String> {
        self.symbols.resolve(&[addr])?;
        Ok(match self.symbols.get(addr) {
            Some(s) => format!("{}+{:#x}", escaped(s.name.as_bytes()), s.offset),
            None => format!("{addr:#x}"),
        })
    }

    pub fn culprit(&mut self, waited: &Waited) -> Result<Option<Culprit>> {
        let (Some(gap), Some((run, others))) = (&waited.gap, waited.by_time()) else {
            return Ok(None);
        };
        let samples: Vec<&Sample> = waited
            .samples
            .iter()
            .filter(|s| s.head.pid == run.pid)
            .collect();
        for s in &samples {
            self.symbols.resolve(&s.stack)?;
        }
        let (samples_of_stack, stack) = most_frequent(&samples, |a| {
            self.symbols
                .get(a)
                .map_or_else(|| format!("{a:#x}"), |s| s.name.clone())
        });
        let stack = stack
            .iter()
            .map(|&addr| Frame {
                addr: format!("{addr:#x}"),
                symbol: self.symbols.get(addr).cloned(),
            })
            .collect();
        Ok(Some(Culprit {
            cpu: gap.cpu,
            waited_ns: gap.entry.saturating_sub(gap.raise),
            task: self.task(run),
            samples: samples.len(),
            samples_of_stack,
            stack,
            others: others.into_iter().map(|r| self.task(r)).collect(),
        }))
    }

    fn task(&mut self, run: &Run) -> Task {
        Task {
            tgid: run.tgid,
            pid: run.pid,
            comm: escaped(&run.comm),
            ran_ns: run.ns,
            cgroup_id: run.cgroup,
            cgroup: self.cgroups.get(run.cgroup).map(|c| escaped(c.as_bytes())),
        }
    }
}

/// The stack that most samples have, by the names of its functions, and how many have it.
fn most_frequent(samples: &[&Sample], name: impl Fn(u64) -> String) -> (usize, Vec<u64>) {
    let mut counts: HashMap<Vec<String>, (usize, &Sample)> = HashMap::new();
    for s in samples.iter().filter(|s| !s.stack.is_empty()) {
        let names = s.stack.iter().map(|&a| name(a)).collect();
        counts.entry(names).or_insert((0, s)).0 += 1;
    }
    counts
        .into_values()
        // Of two as frequent the earlier: the same every time.
        .max_by_key(|(n, s)| (*n, std::cmp::Reverse(s.head.ts)))
        .map_or((0, Vec::new()), |(n, s)| (n, s.stack.clone()))
}

impl Culprit {
    /// Whether the CPU had nothing to run.
    pub fn is_idle(&self) -> bool {
        self.task.pid == 0
    }

    /// `name[pid]`, with the innermost function of its stack.
    pub fn who(&self) -> String {
        let symbol = self.stack.iter().find_map(|frame| frame.symbol.as_ref());
        let place = symbol.map_or(String::new(), |s| {
            format!(" in {}", escaped(s.name.as_bytes()))
        });
        format!("{}[{}]{place}", self.task.comm, self.task.tgid)
    }

    /// ns that this task ran in the gap.
    pub fn ran(&self) -> u64 {
        self.task.ran_ns
    }

    /// Lines below the echo's own, each begun by a newline.
    pub fn push_text(&self, line: &mut Vec<u8>) {
        // Writes to a Vec do not fail.
        let _ = write!(
            line,
            "\n    culprit: {} of {} us waited on cpu {}, {}",
            us(self.task.ran_ns),
            us(self.waited_ns),
            self.cpu,
            self.task.describe()
        );
        if self.task.pid == 0 {
            let _ = write!(
                line,
                " (nothing ran: the CPU was asleep, or its host took it)"
            );
        }
        if self.samples > 0 {
            let _ = write!(
                line,
                "; stack of {} of {} samples:",
                self.samples_of_stack, self.samples
            );
        }
        for frame in &self.stack {
            let _ = match &frame.symbol {
                Some(s) => {
                    let _ = write!(
                        line,
                        "\n        {}+{:#x}",
                        escaped(s.name.as_bytes()),
                        s.offset
                    );
                    match &s.module {
                        Some(m) => write!(line, " [{}]", escaped(m.as_bytes())),
                        None => Ok(()),
                    }
                }
                None => write!(line, "\n        {}", frame.addr),
            };
        }
        for other in &self.others {
            let _ = write!(
                line,
                "\n    also: {} us, {}",
                us(other.ran_ns),
                other.describe()
            );
        }
    }
}

impl Task {
    /// `comm` pid N (thread N), cgroup PATH.
    fn describe(&self) -> String {
        let thread = if self.tgid == self.pid {
            String::new()
        } else {
            format!(" thread {}", self.pid)
        };
        let cgroup = match &self.cgroup {
            Some(path) => path.clone(),
            None => format!("id {}", self.cgroup_id),
        };
        format!("{} pid {}{thread}, cgroup {cgroup}", self.comm, self.tgid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::head::Head;

    fn sample(ts: u64, pid: u32, stack: &[u64]) -> Sample {
        Sample {
            head: Head {
                ts,
                pid,
                cpu: 1,
                ..Head::default()
            },
            raise: 100,
            stack: stack.to_vec(),
        }
    }

    fn run(pid: u32, ns: u64) -> Run {
        Run {
            ns,
            cgroup: 1,
            tgid: pid,
            pid,
            comm: *b"hog\0\0\0\0\0\0\0\0\0\0\0\0\0",
        }
    }

    #[test]
    fn the_longest_run_is_the_culprit_and_an_echo_finds_it() {
        let mut c = Culprits::default();
        c.sample(sample(150, 7, &[1]));
        let t = Times {
            receive_cpu: 1,
            last: super::super::decode::Softirq {
                raise: Some(100),
                ..Default::default()
            },
            ..Times::default()
        };
        assert!(c.of(&t).is_none(), "samples alone are no gap");
        c.gap(Gap {
            cpu: 1,
            raise: 100,
            entry: 900,
            runs: vec![run(3, 200), run(7, 600)],
        });
        let waited = c.of(&t).unwrap();
        let (culprit, others) = waited.by_time().unwrap();
        assert_eq!((culprit.pid, others.len()), (7, 1));
        assert_eq!(waited.samples.len(), 1);
        let elsewhere = Times {
            receive_cpu: 0,
            ..t
        };
        assert!(c.of(&elsewhere).is_none());
    }

    #[test]
    fn a_packet_finds_the_gap_of_its_time() {
        let mut c = Culprits::default();
        for (cpu, raise, entry) in [(1, 100, 900), (1, 1000, 1100), (0, 100, 950)] {
            c.gap(Gap {
                cpu,
                raise,
                entry,
                runs: vec![run(3, entry - raise)],
            });
        }
        let ran = |from, to| {
            let waited = c.within(1, from, to)?;
            Some(waited.by_time()?.0.ns)
        };
        assert_eq!(ran(150, 920), Some(800));
        assert_eq!(ran(990, 1200), Some(100));
        assert_eq!(ran(920, 980), None);
    }

    #[test]
    fn memory_is_bounded() {
        let mut c = Culprits::default();
        for i in 0..5000 {
            c.sample(Sample {
                raise: i,
                ..sample(i, 1, &[])
            });
        }
        assert_eq!(c.by_softirq.len(), REMEMBERED);
        assert_eq!(c.order.len(), REMEMBERED);
    }

    #[test]
    fn stacks_are_told_apart_by_functions() {
        let samples = [
            sample(1, 7, &[0x10, 0x20]),
            sample(2, 7, &[0x11, 0x20]),
            sample(3, 7, &[0x30, 0x20]),
            sample(4, 7, &[]),
        ];
        let all: Vec<&Sample> = samples.iter().collect();
        // Functions of 16 bytes.
        let (n, stack) = most_frequent(&all, |a| (a / 16).to_string());
        assert_eq!((n, stack), (2, vec![0x10, 0x20]));
        assert_eq!(most_frequent(&[], |_| String::new()).0, 0);
    }
}
