//! `--metrics-listen`: the histograms since the start for Prometheus.

use std::fmt;
use std::net::SocketAddr;

use anyhow::Result;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

use crate::text::histogram::Histogram;
use crate::tools::metrics::{Exporter, Labels, OVERFLOW, SERIES, Series, of_process};

use super::args::By;
use super::names::Names;
use super::rows::{Counts, Key};

/// Bounds of buckets are these powers of two, ns: 1 us, 4 us, 16 us ... 69 s. A kernel's part lies in one bucket.
const POWERS: std::ops::RangeInclusive<u32> = 10..=36;
const STEP: usize = 2;

/// The page.
pub struct Metrics {
    exporter: Exporter,
}

impl Metrics {
    pub fn listen(address: SocketAddr) -> Result<Self> {
        Ok(Self {
            exporter: Exporter::listen(address)?,
        })
    }

    /// Gives out the histograms since the start.
    pub fn update(
        &self,
        all: &[(Key, Counts)],
        by: Option<By>,
        names: &mut Names,
        missed: u64,
    ) -> Result<()> {
        let mut series: Series<Buckets> = Vec::new();
        let mut rest = Buckets::default();
        for (key, counts) in all.iter().filter(|(_, c)| c.parts.iter().any(|n| *n > 0)) {
            let buckets = Buckets::of(counts);
            if series.len() >= SERIES {
                rest.add(&buckets);
                continue;
            }
            let by = by.map_or_else(String::new, |by| names.by(by, key.by));
            series.push((labels(key.way.name(), key.stage.name(), by), buckets));
        }
        if rest.count > 0 {
            series.push((labels(OVERFLOW, OVERFLOW, OVERFLOW.to_owned()), rest));
        }
        self.exporter.give_out(Snapshot {
            series,
            missed,
            started: self.exporter.started,
        })
    }
}

fn labels(way: &str, stage: &str, by: String) -> Labels {
    vec![
        ("way", way.to_owned()),
        ("stage", stage.to_owned()),
        ("by", by),
    ]
}

/// A histogram as it is scraped.
#[derive(Debug, Default)]
struct Buckets {
    /// upper bounds in seconds, and how many values lie in each; the last one has no bound
    counts: Vec<(f64, u64)>,
    sum: f64,
    count: u64,
}

impl Buckets {
    fn of(counts: &Counts) -> Self {
        let bounds: Vec<u32> = POWERS.step_by(STEP).collect();
        let second = |ns: u64| ns as f64 / 1e9;
        let mut all: Vec<(f64, u64)> = bounds.iter().map(|p| (second(1 << p), 0)).collect();
        all.push((f64::MAX, 0));
        let mut count = 0;
        for (part, n) in counts.parts.iter().enumerate() {
            let value = Histogram::highest_of(part);
            let at = bounds.iter().position(|p| value < 1 << p);
            all[at.unwrap_or(bounds.len())].1 += n;
            count += n;
        }
        Self {
            counts: all,
            sum: second(counts.sum),
            count,
        }
    }

    fn add(&mut self, other: &Self) {
        self.counts.resize(other.counts.len(), (0.0, 0));
        for (sum, (bound, n)) in self.counts.iter_mut().zip(&other.counts) {
            *sum = (*bound, sum.1 + n);
        }
        self.sum += other.sum;
        self.count += other.count;
    }
}

impl EncodeMetric for Buckets {
    fn encode(&self, mut to: MetricEncoder<'_>) -> fmt::Result {
        to.encode_histogram::<NoLabelSet>(self.sum, self.count, &self.counts, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

/// All that a scrape gives.
#[derive(Debug)]
struct Snapshot {
    series: Series<Buckets>,
    missed: u64,
    started: f64,
}

impl Collector for Snapshot {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> fmt::Result {
        let help = "Time that packets take, by way and stage";
        let name = "netprobe_latency_seconds";
        let mut family = to.encode_descriptor(name, help, None, MetricType::Histogram)?;
        for (labels, buckets) in &self.series {
            buckets.encode(family.encode_family(labels)?)?;
        }
        let missed = prometheus_client::metrics::counter::ConstCounter::new(self.missed);
        let help = "Hits that the kernel skipped, and rows that found no room";
        crate::tools::metrics::metric(&mut to, "netprobe_latency_missed", help, &missed)?;
        of_process(&mut to, self.started)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_value_is_in_the_bucket_that_holds_it() {
        let mut parts = vec![0; 544];
        for ns in [0, 1023, 1024, 5_000_000, 1 << 36] {
            parts[Histogram::part(ns)] += 1;
        }
        let counts = Counts {
            sum: 5_002_047,
            max: 5_000_000,
            parts,
        };
        let buckets = Buckets::of(&counts);
        let full: Vec<_> = buckets.counts.iter().filter(|(_, n)| *n > 0).collect();
        assert_eq!(full[0], &(1.024e-6, 2));
        assert_eq!(full[1], &(4.096e-6, 1));
        assert!(full[2].0 > 0.005 && full[2].0 < 0.02, "{full:?}");
        assert_eq!(full[3], &(f64::MAX, 1));
        assert_eq!(buckets.count, 5);
    }
}
