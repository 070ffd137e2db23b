//! Merges the streams of all CPUs into one order of time. Pure: bytes in, bytes out.
//!
//! Each batch brings a watermark: every event older than it has arrived (up to a slack that [`super::drain`] chooses). What
//! is older than the watermark is handed out, sorted; the rest waits. An event that comes older than one already handed out is
//! marked late and counted, never dropped. Batches are kept until all of their events are gone, so that no byte is copied. Cost: one
//! sort of 24-byte keys per batch (Rust's stable sort takes the per-CPU runs as they are).

use std::collections::VecDeque;

use super::batch::{Batch, BatchRecord};

/// An event as it leaves the merge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// ns of CLOCK_MONOTONIC
    pub ts: u64,
    pub cpu: u32,
    /// older than an event that was handed out before it
    pub late: bool,
    /// the event as the kernel wrote it, padding cut off
    pub bytes: &'a [u8],
}

/// Holds what is younger than the watermark.
#[derive(Debug)]
pub struct Merge {
    keys: Vec<BatchRecord>,
    /// batches with events that wait, and how many do
    batches: VecDeque<(Batch, usize)>,
    /// number of the first of them
    first: u32,
    spent: Vec<Batch>,
    /// last watermark of each drain thread
    watermarks: Vec<u64>,
    last_ts: u64,
    /// events handed out after a younger one
    pub late: u64,
}

impl Merge {
    /// `groups`: the number of drain threads, each with a watermark of its own.
    pub fn new(groups: usize) -> Self {
        Self {
            keys: Vec::new(),
            batches: VecDeque::new(),
            first: 0,
            spent: Vec::new(),
            watermarks: vec![0; groups.max(1)],
            last_ts: 0,
            late: 0,
        }
    }

    /// Takes in a batch.
    pub fn push(&mut self, batch: Batch) {
        if let Some(mark) = self.watermarks.get_mut(batch.group) {
            *mark = (*mark).max(batch.watermark);
        }
        let number = self.first.wrapping_add(self.batches.len() as u32);
        self.keys.extend(batch.records.iter().map(|r| BatchRecord {
            batch: number,
            ..*r
        }));
        let waiting = batch.records.len();
        self.batches.push_back((batch, waiting));
    }

    /// All events up to this time have come and were handed out, but for late ones.
    pub fn reached(&self) -> u64 {
        self.watermarks.iter().copied().min().unwrap_or(u64::MAX)
    }

    /// Events that wait for the watermark.
    pub fn pending(&self) -> usize {
        self.keys.len()
    }

    /// Batches whose events have all been handed out.
    pub fn spent(&mut self) -> impl Iterator<Item = Batch> {
        self.spent.drain(..)
    }

    /// Hands out, in order of time, all that is not younger than the lowest watermark. Stops at the first error of `each`;
    /// the event it failed on counts as handed out.
    pub fn drain<E>(&mut self, each: impl FnMut(Record<'_>) -> Result<(), E>) -> Result<(), E> {
        let result = self.drain_until(self.reached(), each);
        while self
            .batches
            .front()
            .is_some_and(|(_, waiting)| *waiting == 0)
        {
            self.spent.extend(self.batches.pop_front().map(|(b, _)| b));
            self.first = self.first.wrapping_add(1);
        }
        result
    }

    fn drain_until<E>(
        &mut self,
        mark: u64,
        mut each: impl FnMut(Record<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.keys.sort_by_key(|k| k.ts);
        let ready = self.keys.partition_point(|k| k.ts <= mark);
        let mut result = Ok(());
        let mut done = 0;
        for key in &self.keys[..ready] {
            done += 1;
            let late = key.ts < self.last_ts;
            self.late += u64::from(late);
            self.last_ts = self.last_ts.max(key.ts);
            let (batch, waiting) = &mut self.batches[key.batch.wrapping_sub(self.first) as usize];
            *waiting -= 1;
            let start = key.offset as usize;
            result = each(Record {
                ts: key.ts,
                cpu: key.cpu,
                late,
                bytes: &batch.data[start..start + key.len as usize],
            });
            if result.is_err() {
                break;
            }
        }
        self.keys.drain(..done);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn batch(group: usize, watermark: u64, events: &[(u64, u32)]) -> Batch {
        let mut b = Batch {
            group,
            watermark,
            ..Batch::default()
        };
        for &(ts, cpu) in events {
            let offset = b.data.len() as u32;
            b.data.extend_from_slice(&ts.to_ne_bytes());
            b.records.push(BatchRecord {
                ts,
                offset,
                len: 8,
                cpu,
                batch: 0,
            });
        }
        b
    }

    fn all(merge: &mut Merge) -> Vec<(u64, bool)> {
        let mut out = Vec::new();
        merge
            .drain(|r| {
                assert_eq!(r.bytes, r.ts.to_ne_bytes());
                out.push((r.ts, r.late));
                Ok::<(), ()>(())
            })
            .unwrap();
        out
    }

    #[test]
    fn holds_back_what_is_younger_than_the_watermark() {
        let mut m = Merge::new(1);
        m.push(batch(0, 10, &[(3, 0), (12, 0), (5, 1), (11, 1)]));
        assert_eq!(all(&mut m), [(3, false), (5, false)]);
        assert_eq!(m.pending(), 2);
        m.push(batch(0, 20, &[(10, 0)]));
        assert_eq!(m.spent().count(), 0, "the first batch waits");
        assert_eq!(all(&mut m), [(10, false), (11, false), (12, false)]);
        assert_eq!(m.spent().count(), 2);
    }

    #[test]
    fn the_slowest_group_sets_the_pace() {
        let mut m = Merge::new(2);
        m.push(batch(0, 100, &[(1, 0), (50, 0)]));
        assert_eq!(all(&mut m), []);
        assert_eq!(m.reached(), 0);
        m.push(batch(1, 10, &[(2, 1)]));
        assert_eq!(all(&mut m), [(1, false), (2, false)]);
        assert_eq!(m.reached(), 10);
    }

    #[test]
    fn a_late_event_is_marked_counted_and_kept() {
        let mut m = Merge::new(1);
        m.push(batch(0, 10, &[(9, 0)]));
        all(&mut m);
        m.push(batch(0, 20, &[(4, 1)]));
        assert_eq!(all(&mut m), [(4, true)]);
        assert_eq!(m.late, 1);
    }

    #[test]
    fn an_error_loses_only_what_was_handed_out() {
        let mut m = Merge::new(1);
        m.push(batch(0, 10, &[(1, 0), (2, 0), (3, 0)]));
        let r = m.drain(|r| if r.ts == 2 { Err("stop") } else { Ok(()) });
        assert_eq!(r, Err("stop"));
        assert_eq!(all(&mut m), [(3, false)]);
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_order_holds(streams in prop::collection::vec(prop::collection::vec(0u64..1000, 0..50), 1..5)) {
            let mut m = Merge::new(1);
            let mut expected: Vec<u64> = streams.iter().flatten().copied().collect();
            for (cpu, s) in streams.iter().enumerate() {
                let mut s = s.clone();
                s.sort_unstable();
                let events: Vec<_> = s.into_iter().map(|t| (t, cpu as u32)).collect();
                m.push(batch(0, 0, &events));
            }
            m.push(batch(0, u64::MAX, &[]));
            let got = all(&mut m);
            expected.sort_unstable();
            prop_assert!(got.iter().all(|(_, late)| !late));
            prop_assert_eq!(got.into_iter().map(|(t, _)| t).collect::<Vec<_>>(), expected);
            prop_assert_eq!(m.pending(), 0);
        }
    }
}
