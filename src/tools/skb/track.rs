//! Sweeps the map of tracked skbs: what was given up and never seen again is removed.
//!
//! Most entries go in the kernel, with kfree_skbmem. An skb that goes into napi's cache, or is freed in bulk, stays marked as dying
//! (src/bpf/skb_track.bpf.h); this keeps such entries from filling the map.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags, MapMut};

use crate::bpf::read;
use crate::bpf::skb::types::skb_track;

/// Twice this long an entry stays at most once it is marked.
const EVERY: Duration = Duration::from_millis(500);
/// Entries read by one system call.
const BATCH: u32 = 4096;

/// Looks through the map now and then.
pub struct Sweeper<'a> {
    map: &'a MapMut<'a>,
    last: Instant,
    /// entries that were marked at the last look: skb and packet
    marked: HashMap<u64, u64>,
}

impl<'a> Sweeper<'a> {
    pub fn new(map: &'a MapMut<'a>) -> Self {
        Self {
            map,
            last: Instant::now(),
            marked: HashMap::new(),
        }
    }

    /// Sweeps, when it is time to. An entry goes when two looks find it marked: nothing is being freed for that long.
    pub fn tick(&mut self) -> Result<()> {
        if self.last.elapsed() < EVERY {
            return Ok(());
        }
        self.last = Instant::now();
        let mut marked = HashMap::new();
        let entries = self
            .map
            .lookup_batch(BATCH, MapFlags::ANY, MapFlags::ANY)
            .context("failed to read the map of tracked skbs")?;
        for (key, value) in entries {
            let Some((skb, packet)) = dying(&key, &value) else {
                continue;
            };
            if self.marked.get(&skb) == Some(&packet) {
                // Gone already, where the kernel was faster.
                let _ = self.map.delete(&key);
            } else {
                marked.insert(skb, packet);
            }
        }
        self.marked = marked;
        Ok(())
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
