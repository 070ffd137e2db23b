//! Figures over many echoes: by stage for the summary at the end, by stage and CPU for the histograms. Pure.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;

use crate::text::columns::us;
use crate::text::histogram::{Bucket, Histogram};

/// A stage: its place in the order, its name.
type Name = (u8, &'static str);

/// Durations of each stage.
#[derive(Debug, Default)]
pub struct Figures {
    stages: BTreeMap<Name, Histogram>,
}

impl Figures {
    /// `parts`: place, name and ns of each stage.
    pub fn add(&mut self, parts: impl Iterator<Item = (u8, &'static str, u64)>) {
        for (place, name, ns) in parts {
            self.stages.entry((place, name)).or_default().add(ns);
        }
    }

    /// A table with one line a stage, those that were seen only.
    pub fn table(&self) -> String {
        table(self.stages.iter().map(|((_, name), h)| (*name, h)))
    }

    pub fn rows(&self) -> BTreeMap<&'static str, FigureRow> {
        rows(self.stages.iter().map(|((_, name), h)| (*name, h)))
    }
}

/// Lines `name count min avg max p99`, in microseconds; empty where nothing was seen.
fn table<'a>(figures: impl Iterator<Item = (&'static str, &'a Histogram)>) -> String {
    let mut text = String::new();
    for (name, h) in figures.filter(|(_, h)| h.count > 0) {
        if text.is_empty() {
            let _ = writeln!(
                text,
                "{:<8} {:>8} {:>10} {:>10} {:>10} {:>10}",
                "(us)", "count", "min", "avg", "max", "p99"
            );
        }
        // Writes to a String do not fail.
        let _ = writeln!(
            text,
            "{name:<8} {:>8} {:>10} {:>10} {:>10} {:>10}",
            h.count,
            us(h.min),
            us(h.average()),
            us(h.max),
            us(h.quantile(0.99))
        );
    }
    text
}

/// The same for JSON.
fn rows<'a>(
    figures: impl Iterator<Item = (&'static str, &'a Histogram)>,
) -> BTreeMap<&'static str, FigureRow> {
    figures
        .filter(|(_, h)| h.count > 0)
        .map(|(name, h)| {
            let row = FigureRow {
                count: h.count,
                min_ns: h.min,
                avg_ns: h.average(),
                max_ns: h.max,
                p99_ns: h.quantile(0.99),
            };
            (name, row)
        })
        .collect()
}

/// Figures of one stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct FigureRow {
    pub count: u64,
    pub min_ns: u64,
    pub avg_ns: u64,
    pub max_ns: u64,
    pub p99_ns: u64,
}

/// Durations of each stage on each CPU.
#[derive(Debug, Default)]
pub struct ByCpu {
    histograms: BTreeMap<(Name, u16), Histogram>,
}

/// A histogram for JSON.
#[derive(Debug, Serialize)]
pub struct HistogramRow {
    #[serde(rename = "type")]
    kind: &'static str,
    stage: &'static str,
    cpu: u16,
    unit: &'static str,
    count: u64,
    buckets: Vec<Bucket>,
}

impl ByCpu {
    pub fn add(&mut self, cpu: u16, parts: impl Iterator<Item = (u8, &'static str, u64)>) {
        for (place, name, ns) in parts {
            self.histograms
                .entry(((place, name), cpu))
                .or_default()
                .add(ns);
        }
    }

    /// A title and a histogram for each.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for (((_, stage), cpu), h) in &self.histograms {
            let _ = write!(
                text,
                "{} (us), cpu {cpu}, {} echoes\n{}\n",
                stage,
                h.count,
                h.lines()
            );
        }
        text
    }

    pub fn rows(&self) -> Vec<HistogramRow> {
        self.histograms
            .iter()
            .map(|(((_, stage), cpu), h)| HistogramRow {
                kind: "histogram",
                stage,
                cpu: *cpu,
                unit: "us",
                count: h.count,
                buckets: h.buckets(),
            })
            .collect()
    }

    pub fn clear(&mut self) {
        self.histograms.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::super::decode::{Softirq, Times};
    use super::super::stages::Stages;
    use super::*;

    fn stages(wait: u64) -> Stages {
        let t = Times {
            receive: Some(100_000 + wait),
            last: Softirq {
                raise: Some(100_000),
                entry: Some(100_000 + wait),
                irq: None,
            },
            ..Times::default()
        };
        Stages::of(&t, 110_000 + wait, None)
    }

    #[test]
    fn a_table_has_the_stages_that_were_seen() {
        let mut f = Figures::default();
        assert!(f.table().is_empty());
        f.add(stages(2_000).parts());
        f.add(stages(4_000).parts());
        let text = f.table();
        let wait = text.lines().find(|l| l.starts_with("wait")).unwrap();
        let words: Vec<_> = wait.split_whitespace().collect();
        assert_eq!(words, ["wait", "2", "2.0", "3.0", "4.0", "4.0"]);
        assert!(!text.contains("reply"), "{text}");
        assert_eq!(f.rows()["stack"].max_ns, 10_000);
    }

    #[test]
    fn histograms_are_by_cpu() {
        let mut h = ByCpu::default();
        h.add(0, stages(2_000).parts());
        h.add(3, stages(70_000).parts());
        let text = h.text();
        assert!(text.contains("wait (us), cpu 0, 1 echoes"), "{text}");
        assert!(text.contains("64 -> 127"), "{text}");
        assert_eq!(h.rows().iter().filter(|r| r.stage == "wait").count(), 2);
        h.clear();
        assert!(h.text().is_empty());
    }
}
