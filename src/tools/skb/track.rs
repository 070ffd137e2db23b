//! Sweeps the map of tracked skbs: what was given up and never seen again is removed.
//!
//! Most entries go in the kernel, with kfree_skbmem. An skb that goes into napi's cache, or is freed in bulk, stays marked as dying
//! (src/bpf/skb/skb_track.bpf.h); this keeps such entries from filling the map.
//!
//! Key by key, and not in batches: while the kernel puts a batch together (over all empty buckets, without a pause) it skips every
//! probe that is hit on that CPU.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags, MapKeyIter, MapMut};

use crate::bpf::read;
use crate::bpf::skb::types::skb_track;

/// The shortest time between two looks.
const EVERY: Duration = Duration::from_millis(500);
/// The longest that a tick is held up; the look goes on with the next one.
const SLICE: Duration = Duration::from_millis(5);
/// A look is followed by this many times its own length without one: it takes 5% of a CPU at most.
const PAUSE: u32 = 20;

/// Looks through the map now and then.
pub struct Sweeper<'a> {
    map: &'a MapMut<'a>,
    /// the look in progress
    look: Option<Look<'a>>,
    next: Instant,
    /// entries that were marked at the last look: skb and packet
    marked: HashMap<u64, u64>,
}

/// One pass over the map.
struct Look<'a> {
    keys: MapKeyIter<'a>,
    /// The kernel begins anew where the key that it was to go on from has gone: no look is longer than the map.
    left: u32,
    spent: Duration,
    marked: HashMap<u64, u64>,
}

impl<'a> Sweeper<'a> {
    pub fn new(map: &'a MapMut<'a>) -> Self {
        Self {
            map,
            look: None,
            next: Instant::now() + EVERY,
            marked: HashMap::new(),
        }
    }

    /// Sweeps, when it is time to. An entry goes when two looks find it marked: nothing is being freed for that long.
    pub fn tick(&mut self) -> Result<()> {
        let now = Instant::now();
        let mut look = match self.look.take() {
            Some(look) => look,
            None if now < self.next => return Ok(()),
            None => Look {
                keys: self.map.keys(),
                left: self.map.max_entries(),
                spent: Duration::ZERO,
                marked: HashMap::new(),
            },
        };
        let done = self.sweep(&mut look, now)?;
        let spent = now.elapsed();
        look.spent += spent;
        if done {
            self.marked = look.marked;
            self.next = Instant::now() + EVERY.max(look.spent * PAUSE);
        } else {
            self.look = Some(look);
        }
        Ok(())
    }

    /// Goes on with a look; true: it is over.
    fn sweep(&self, look: &mut Look<'_>, start: Instant) -> Result<bool> {
        // Removed when the kernel has told the key behind it: from a key that is not there it begins anew.
        let mut goes: Option<Vec<u8>> = None;
        while look.left > 0 {
            look.left -= 1;
            let key = look.keys.next();
            if let Some(key) = goes.take() {
                // Gone already, where the kernel was faster.
                let _ = self.map.delete(&key);
            }
            let Some(key) = key else {
                return Ok(true);
            };
            let value = self
                .map
                .lookup(&key, MapFlags::ANY)
                .context("failed to read the map of tracked skbs")?;
            let late = start.elapsed() >= SLICE;
            if let Some((skb, packet)) = value.and_then(|value| dying(&key, &value)) {
                if self.marked.get(&skb) == Some(&packet) && !late {
                    goes = Some(key);
                } else {
                    look.marked.insert(skb, packet);
                }
            }
            if late {
                return Ok(false);
            }
        }
        if let Some(key) = goes {
            let _ = self.map.delete(&key);
        }
        Ok(true)
    }
}

/// Address and packet of an entry that is marked.
fn dying(key: &[u8], value: &[u8]) -> Option<(u64, u64)> {
    let skb = u64::from_ne_bytes(key.try_into().ok()?);
    let (track, _) = read::<skb_track>(value)?;
    (track.dying != 0).then_some((skb, track.packet))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_marked_entries() {
        let entry = |dying| skb_track {
            packet: 7,
            dying,
            ..skb_track::default()
        };
        for (mark, expected) in [(0, None), (1, Some((5, 7)))] {
            let value = entry(mark);
            // SAFETY: skb_track is Plain: its bytes are its value.
            let bytes = unsafe { plain::as_bytes(&value) };
            assert_eq!(dying(&5u64.to_ne_bytes(), bytes), expected);
        }
        assert_eq!(dying(&[1], &[2]), None);
    }
}
