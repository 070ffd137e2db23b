//! What one round of a drain thread takes out of the kernel's buffers: the bytes, and where each event is in them.

use std::mem::offset_of;

use crate::bpf::skb::types::np_head;

/// The longest that an event waits in a buffer that is not filling, in ms.
pub const POLL_MS: u16 = 50;
/// Size of a head that has a time stamp and a length.
const HEAD: usize = offset_of!(np_head, len) + size_of::<u32>();

/// One event within [`Batch::data`].
#[derive(Debug, Clone, Copy)]
pub struct BatchRecord {
    pub ts: u64,
    pub offset: u32,
    pub len: u32,
    pub cpu: u32,
    /// the merge's number of the batch
    pub batch: u32,
}

/// What one round took out of the buffers of one group of CPUs.
#[derive(Debug, Default)]
pub struct Batch {
    pub group: usize,
    /// all events of the group up to this time (ns of CLOCK_MONOTONIC) are in this batch or an earlier one
    pub watermark: u64,
    /// the buffers' bytes, headers of their records included
    pub data: Vec<u8>,
    pub records: Vec<BatchRecord>,
    /// samples that the kernel says its buffer lost (PERF_RECORD_LOST); the exact count is in `np_stats`
    pub lost: u64,
    /// samples too short to hold a head
    pub short: u64,
}

impl Batch {
    pub(super) fn clear(&mut self) {
        self.data.clear();
        self.records.clear();
        self.lost = 0;
        self.short = 0;
    }

    /// Notes the event at `offset` of the data, in a sample of `room` bytes (perf pads it to 8): its own `len` cuts the padding
    /// off.
    pub fn note(&mut self, cpu: u32, offset: usize, room: usize) {
        let sample = self.data.get(offset..offset + room).unwrap_or_default();
        let Some((ts, rest)) = sample.get(..HEAD).and_then(<[u8]>::split_first_chunk) else {
            self.short += 1;
            return;
        };
        let len = rest.first_chunk().map_or(0, |len| u32::from_ne_bytes(*len));
        self.records.push(BatchRecord {
            ts: u64::from_ne_bytes(*ts),
            offset: offset as u32,
            len: if len as usize <= room {
                len
            } else {
                room as u32
            },
            cpu,
            batch: 0,
        });
    }
}

/// How the buffers are laid out.
#[derive(Debug, Clone, Copy)]
pub struct BufferOptions {
    /// pages of each CPU's buffer; a power of two
    pub pages: usize,
    /// drain threads
    pub threads: usize,
    /// events of a CPU that wake its reader; 0: a quarter of its buffer does
    pub wakeup: u32,
    /// the longest that what has not woken the reader waits for it (a ring buffer's: POLL_MS)
    pub poll_ms: u16,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A batch with one sample in it.
    fn noted(ts: u64, len: u32, room: usize) -> Batch {
        let mut batch = Batch {
            data: vec![9; 4],
            ..Batch::default()
        };
        batch.data.extend_from_slice(&ts.to_ne_bytes());
        batch.data.extend_from_slice(&len.to_ne_bytes());
        batch.data.resize(4 + room.max(HEAD), 1);
        batch.note(3, 4, room);
        batch
    }

    #[test]
    fn a_sample_loses_its_padding_and_a_short_one_is_counted() {
        let batch = noted(7, 14, 16);
        let r = batch.records[0];
        assert_eq!((r.ts, r.offset, r.len, r.cpu), (7, 4, 14, 3));
        let short = noted(7, 14, 8);
        assert_eq!((short.short, short.records.len()), (1, 0));
    }

    #[test]
    fn a_length_past_the_sample_takes_what_is_there() {
        assert_eq!(noted(7, 1000, 16).records[0].len, 16);
        // ... and one that is no sample at all counts as short.
        let mut batch = noted(7, 16, 16);
        batch.note(0, 100, 16);
        assert_eq!(batch.short, 1);
    }
}
