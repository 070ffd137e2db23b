//! The kernel's histograms as rows: what came since the last table.

use std::collections::HashMap;

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags};

use crate::bpf::latency::LatencySkel;
use crate::bpf::latency::types::{lat_hist, lat_key};
use crate::bpf::{bytes_of, read};
use crate::text::histogram::Histogram;

use super::stages::{STAGES, Stage, Way};

/// What a row is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// the value of --by; 0 without it
    pub by: u64,
    pub way: Way,
    pub stage: Stage,
}

/// A histogram since the start, over all CPUs.
#[derive(Debug, Clone, Default)]
pub struct Counts {
    pub sum: u64,
    pub max: u64,
    pub parts: Vec<u64>,
}

/// A row of a table.
#[derive(Debug)]
pub struct Row {
    pub key: Key,
    pub hist: Histogram,
}

/// What the last table showed.
#[derive(Debug, Default)]
pub struct Rows {
    before: HashMap<Key, Counts>,
}

impl Counts {
    fn add(&mut self, bytes: &[u8]) {
        let Some((hist, _)) = read::<lat_hist>(bytes) else {
            return;
        };
        self.sum += hist.sum;
        self.max = self.max.max(hist.max);
        self.parts.resize(hist.buckets.len(), 0);
        for (sum, n) in self.parts.iter_mut().zip(hist.buckets) {
            *sum += u64::from(n);
        }
    }

    pub fn of(per_cpu: &[Vec<u8>]) -> Self {
        let mut counts = Self::default();
        for bytes in per_cpu {
            counts.add(bytes);
        }
        counts
    }

    /// What came since `before`. The longest time is known to the ns where it is the run's, else to a part.
    pub fn since(&self, before: &Self) -> Histogram {
        let mut hist = Histogram::default();
        for (part, n) in self.parts.iter().enumerate() {
            // Of 32 bits in the kernel.
            let n = (*n as u32).wrapping_sub(before.parts.get(part).map_or(0, |n| *n as u32));
            hist.add_part(part, n.into());
        }
        hist.sum = self.sum.saturating_sub(before.sum);
        if self.max > before.max {
            hist.max = self.max;
        }
        hist
    }
}

/// The kernel's histograms since the start.
pub fn read_all(skel: &LatencySkel<'_>, by: bool) -> Result<Vec<(Key, Counts)>> {
    if by {
        return read_by(&skel.maps.hists_by);
    }
    let mut all = Vec::new();
    for way in Way::all() {
        for stage in Stage::all() {
            let at = way.0 * STAGES as u32 + stage.0;
            let per_cpu = skel
                .maps
                .hists
                .lookup_percpu(&at.to_ne_bytes(), MapFlags::ANY)
                .context("failed to read the histograms")?;
            let key = Key { by: 0, way, stage };
            all.push((key, Counts::of(&per_cpu.unwrap_or_default())));
        }
    }
    Ok(all)
}

fn read_by(map: &impl MapCore) -> Result<Vec<(Key, Counts)>> {
    let mut all = Vec::new();
    for bytes in map.keys() {
        let Some((key, _)) = read::<lat_key>(&bytes) else {
            continue;
        };
        let per_cpu = map
            .lookup_percpu(bytes_of(&key), MapFlags::ANY)
            .context("failed to read the histograms")?;
        let key = Key {
            by: key.by,
            way: Way(key.way),
            stage: Stage(key.stage),
        };
        all.push((key, Counts::of(&per_cpu.unwrap_or_default())));
    }
    Ok(all)
}

impl Rows {
    /// The rows with values since the last call, in order.
    pub fn next(&mut self, all: Vec<(Key, Counts)>) -> Vec<Row> {
        let mut rows = Vec::new();
        for (key, counts) in all {
            let before = self.before.entry(key).or_default();
            let hist = counts.since(before);
            *before = counts;
            if hist.count > 0 {
                rows.push(Row { key, hist });
            }
        }
        rows.sort_by_key(|row| row.key);
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpf::latency::types::lat_buckets;

    fn counts(values: &[u64]) -> Counts {
        let mut hist = lat_hist::default();
        for v in values {
            hist.sum += v;
            hist.max = hist.max.max(*v);
            hist.buckets[Histogram::part(*v)] += 1;
        }
        Counts::of(&[bytes_of(&hist).to_vec()])
    }

    #[test]
    fn the_kernel_counts_by_the_same_parts() {
        let longest = (1 << lat_buckets::LAT_BITS.0) - 1;
        let buckets = lat_buckets::LAT_BUCKETS.0 as usize;
        assert_eq!(Histogram::part(longest), buckets - 1);
        assert_eq!(Histogram::part(lat_buckets::LAT_FINE.0.into()), 16);
    }

    #[test]
    fn a_table_has_what_came_since_the_last_one() {
        let key = Key {
            by: 0,
            way: Way(0),
            stage: Stage::SOCKET,
        };
        let mut rows = Rows::default();
        let first = rows.next(vec![(key, counts(&[1000, 5_000_000]))]);
        assert_eq!((first[0].hist.count, first[0].hist.max), (2, 5_000_000));
        let second = rows.next(vec![(key, counts(&[1000, 5_000_000, 70_000]))]);
        let hist = &second[0].hist;
        assert_eq!((hist.count, hist.sum), (1, 70_000));
        assert!((70_000..75_000).contains(&hist.max), "{}", hist.max);
        assert!(
            rows.next(vec![(key, counts(&[1000, 5_000_000, 70_000]))])
                .is_empty()
        );
    }
}
