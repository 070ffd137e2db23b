//! Which packets were seen, and when events were lost: of a packet that was under way then, stages and the end may be missing; one whose
//! events were lost from the first on is not seen at all. The kernel side numbers packets, by CPU.

use std::collections::VecDeque;

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags};
use rustc_hash::FxHashMap;

use crate::tools::skb::event::Packet;

/// Numbers are remembered in words of so many; older ones count as seen.
const WORDS: usize = 1 << 14;

/// Numbers of one CPU.
#[derive(Debug, Default)]
struct Window {
    /// the number of the first bit
    base: u64,
    words: VecDeque<u64>,
}

impl Window {
    /// Whether this number is new.
    fn add(&mut self, number: u64) -> bool {
        let Some(at) = number.checked_sub(self.base) else {
            return false;
        };
        let mut word = (at / 64) as usize;
        if word >= self.words.len() + WORDS {
            self.words.clear();
            (self.base, word) = (number & !63, 0);
        }
        while self.words.len() <= word {
            self.words.push_back(0);
        }
        let bit = 1 << (number % 64);
        let new = self.words.get(word).is_some_and(|w| w & bit == 0);
        if let Some(w) = self.words.get_mut(word) {
            *w |= bit;
        }
        while self.words.len() > WORDS {
            self.words.pop_front();
            self.base += 64;
        }
        new
    }
}

/// Packets whose journey has begun.
#[derive(Debug, Default)]
pub struct Seen {
    cpus: FxHashMap<u16, Window>,
    count: u64,
}

impl Seen {
    pub fn add(&mut self, packet: Packet) {
        if self.cpus.entry(packet.cpu).or_default().add(packet.number) {
            self.count += 1;
        }
    }

    /// Packets that the kernel side has numbered (the map `packets`), without those that were seen.
    pub fn missing(&self, packets: &impl MapCore) -> Result<u64> {
        let values = packets.lookup_percpu(&0u32.to_ne_bytes(), MapFlags::ANY);
        let values = values.context("failed to read the count of packets")?;
        let numbers = values.unwrap_or_default();
        let number = |bytes: &Vec<u8>| bytes.first_chunk().map_or(0, |b| u64::from_ne_bytes(*b));
        let given: u64 = numbers.iter().map(number).sum();
        Ok(given.saturating_sub(self.count))
    }
}

/// When events were lost: between two looks at the counter. Monotonic, ns.
#[derive(Debug, Default)]
pub struct Gaps {
    all: Vec<(u64, u64)>,
    lost: u64,
    looked: u64,
}

impl Gaps {
    /// `lost`: how many events so far.
    pub fn look(&mut self, now: u64, lost: u64) {
        if lost > self.lost {
            match self.all.last_mut() {
                Some(last) if last.1 == self.looked => last.1 = now,
                _ => self.all.push((self.looked, now)),
            }
        }
        (self.lost, self.looked) = (lost, now);
    }

    /// Something was lost in this time.
    pub fn touch(&self, from: u64, until: u64) -> bool {
        let after = self.all.partition_point(|gap| gap.1 < from);
        self.all.get(after).is_some_and(|gap| gap.0 <= until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_packet_counts_once() {
        let mut seen = Seen::default();
        let mut add = |cpu, number| {
            seen.add(Packet { number, cpu });
            seen.count
        };
        assert_eq!((add(0, 1), add(0, 1), add(1, 1)), (1, 1, 2));
        assert_eq!((add(0, 70), add(0, 69), add(0, 69)), (3, 4, 4));
        assert_eq!(add(0, 1 << 40), 5, "far away");
        assert_eq!(add(0, 2), 5, "too old to be told");
        for number in 0..3_000_000 {
            add(2, number);
        }
        assert_eq!(seen.count, 3_000_005);
        assert!(seen.cpus[&2].words.len() <= WORDS);
    }

    #[test]
    fn times_of_loss() {
        let mut gaps = Gaps::default();
        gaps.look(100, 0);
        gaps.look(200, 5);
        gaps.look(300, 7);
        gaps.look(400, 7);
        gaps.look(500, 8);
        assert_eq!(gaps.all, [(100, 300), (400, 500)]);
        assert!(gaps.touch(50, 100) && gaps.touch(250, 260) && gaps.touch(350, 450));
        assert!(!gaps.touch(0, 99) && !gaps.touch(301, 399) && !gaps.touch(501, 900));
    }
}
