//! Histograms of durations: powers of two to look at, finer inside for quantiles. Pure.

use std::fmt::Write;

use serde::Serialize;

/// Parts that each power of two is cut into: a quantile is off by 1/16 at most.
const PARTS: usize = 16;
/// Powers of two count microseconds.
const UNIT: u64 = 1000;
/// Width of the widest bar.
const BAR: usize = 40;

/// Counts of values (ns) by size; 8 KiB, whatever the number of values.
#[derive(Debug, Clone)]
pub struct Histogram {
    counts: Vec<u64>,
    /// by bits of the value in microseconds
    powers: [u64; 65],
    pub count: u64,
    pub sum: u64,
    pub min: u64,
    pub max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: vec![0; 64 * PARTS],
            powers: [0; 65],
            count: 0,
            sum: 0,
            min: u64::MAX,
            max: 0,
        }
    }
}

/// One line of a histogram: microseconds from `low` up to and with `high`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Bucket {
    pub low: u64,
    pub high: u64,
    pub count: u64,
}

impl Histogram {
    pub fn add(&mut self, value: u64) {
        self.counts[index(value)] += 1;
        self.powers[power(value / UNIT)] += 1;
        self.count += 1;
        self.sum = self.sum.saturating_add(value);
        self.min = self.min.min(value);
        self.max = self.max.max(value);
    }

    /// The part of a value: the kernel side counts by it, too.
    pub fn part(value: u64) -> usize {
        index(value)
    }

    /// The highest value of a part.
    pub fn highest_of(part: usize) -> u64 {
        highest(part)
    }

    /// `n` values of which the part is known: as the highest ones in it. `sum` is left to the caller.
    pub fn add_part(&mut self, part: usize, n: u64) {
        if n == 0 || part >= self.counts.len() {
            return;
        }
        let value = highest(part);
        self.counts[part] += n;
        self.powers[power(value / UNIT)] += n;
        self.count += n;
        let lowest = part.checked_sub(1).map_or(0, |below| highest(below) + 1);
        self.min = self.min.min(lowest);
        self.max = self.max.max(value);
    }

    pub fn average(&self) -> u64 {
        self.sum.checked_div(self.count).unwrap_or(0)
    }

    /// The value that `share` (0 to 1) of the values do not exceed, within 1/16; 0 where there are none.
    pub fn quantile(&self, share: f64) -> u64 {
        let wanted = ((self.count as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        for (i, n) in self.counts.iter().enumerate() {
            seen += n;
            if seen >= wanted {
                return highest(i).clamp(self.min, self.max);
            }
        }
        0
    }

    /// The powers of two, of microseconds, from the lowest with values to the highest.
    pub fn buckets(&self) -> Vec<Bucket> {
        let Some(first) = self.powers.iter().position(|n| *n > 0) else {
            return Vec::new();
        };
        let last = self.powers.iter().rposition(|n| *n > 0).unwrap_or(first);
        (first..=last)
            .map(|p| Bucket {
                low: if p == 0 { 0 } else { 1 << (p - 1) },
                high: if p == 0 { 0 } else { u64::MAX >> (64 - p) },
                count: self.powers[p],
            })
            .collect()
    }

    /// The histogram as lines; nothing where there are no values.
    pub fn lines(&self) -> String {
        let buckets = self.buckets();
        let most = buckets.iter().map(|b| b.count).max().unwrap_or(0).max(1);
        let mut text = String::new();
        for b in buckets {
            let range = format!("{} -> {}", b.low, b.high);
            let stars = (b.count as usize * BAR).div_ceil(most as usize).min(BAR);
            // Writes to a String do not fail.
            let _ = writeln!(
                text,
                "{range:>23} : {:<9} |{:<BAR$}|",
                b.count,
                "*".repeat(stars)
            );
        }
        text
    }
}

/// 0 for 0, else the number of bits.
fn power(value: u64) -> usize {
    (64 - value.leading_zeros()) as usize
}

/// Values below 16 stand alone; above, each power of two has 16 parts.
fn index(value: u64) -> usize {
    let bits = power(value);
    if bits <= 4 {
        return value as usize;
    }
    let part = (value >> (bits - 5)) as usize & (PARTS - 1);
    (bits - 4) * PARTS + part
}

/// The highest value of the part `index`.
fn highest(index: usize) -> u64 {
    let (row, part) = (index / PARTS, (index % PARTS) as u64);
    if row == 0 {
        return part;
    }
    let width = 1u64 << (row - 1);
    let start = (PARTS as u64 + part).saturating_mul(width);
    start.saturating_add(width - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn quantiles_and_average() {
        let mut h = Histogram::default();
        assert_eq!(h.quantile(0.99), 0);
        for v in 1..=1000 {
            h.add(v * 1000);
        }
        assert_eq!((h.count, h.min, h.max), (1000, 1000, 1_000_000));
        assert_eq!(h.average(), 500_500);
        let p99 = h.quantile(0.99);
        assert!((990_000..=1_000_000).contains(&p99), "{p99}");
        let p50 = h.quantile(0.5);
        assert!((500_000..=532_000).contains(&p50), "{p50}");
    }

    #[test]
    fn values_by_their_part() {
        let mut h = Histogram::default();
        h.add_part(Histogram::part(7_095_430), 1);
        // The caller knows it better.
        h.max = 7_095_430;
        assert_eq!(h.quantile(0.5), 7_095_430);
        h.add_part(usize::MAX, 1);
        assert_eq!(h.count, 1);
    }

    #[test]
    fn lines_are_powers_of_two() {
        let mut h = Histogram::default();
        for v in [0, 1_000, 2_000, 3_999, 9_000] {
            h.add(v);
        }
        let buckets = h.buckets();
        assert_eq!(
            buckets
                .iter()
                .map(|b| (b.low, b.high, b.count))
                .collect::<Vec<_>>(),
            [(0, 0, 1), (1, 1, 1), (2, 3, 2), (4, 7, 0), (8, 15, 1)]
        );
        let text = h.lines();
        assert!(
            text.contains("2 -> 3 : 2         |****************************************|"),
            "{text}"
        );
        assert!(Histogram::default().lines().is_empty());
    }

    proptest! {
        #[test]
        fn every_value_is_in_its_part(v in any::<u64>()) {
            let i = index(v);
            prop_assert!(i < 64 * PARTS);
            prop_assert!(v <= highest(i));
            prop_assert!(i == 0 || v > highest(i - 1));
        }
    }
}
