//! The contents of a block of events: events as the kernel wrote them, and between them the news that the events from there on need.
//! Pure.

use super::block::MAX_CONTENTS;

/// In place of an event's CPU: news follow.
const NEWS: u16 = 0x7fff;
/// With an event's CPU: it came late.
const LATE: u16 = 0x8000;
/// Bytes that a chunk is closed at: more compress little better, and a crash costs more.
const FULL: usize = 1 << 20;

/// Bytes of one event or of one piece of news.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Item<'a> {
    Event {
        /// the CPU whose buffer it came through
        cpu: u32,
        /// older than an event in front of it
        late: bool,
        bytes: &'a [u8],
    },
    News(&'a [u8]),
}

/// A chunk that is being filled.
#[derive(Debug, Default)]
pub struct Chunk {
    pub contents: Vec<u8>,
    pub events: u32,
    /// time stamps of the first and the last event
    pub times: (u64, u64),
}

impl Chunk {
    pub fn clear(&mut self) {
        self.contents.clear();
        self.events = 0;
        self.times = (0, 0);
    }

    pub fn is_empty(&self) -> bool {
        self.contents.is_empty()
    }

    pub fn is_full(&self) -> bool {
        self.contents.len() >= FULL
    }

    /// Appends an event. Events longer than 65,535 bytes do not come out of the kernel's buffers.
    #[inline]
    pub fn event(&mut self, ts: u64, cpu: u32, late: bool, bytes: &[u8]) {
        let bytes = &bytes[..bytes.len().min(u16::MAX.into())];
        let cpu = (cpu.min(u32::from(NEWS) - 1)) as u16;
        let cpu = if late { cpu | LATE } else { cpu };
        self.contents.extend_from_slice(&cpu.to_le_bytes());
        let len = bytes.len() as u16;
        self.contents.extend_from_slice(&len.to_le_bytes());
        self.contents.extend_from_slice(bytes);
        if self.events == 0 {
            self.times.0 = ts;
        }
        self.times.1 = ts;
        self.events += 1;
    }

    /// Appends news, if they have room in a chunk at all.
    pub fn news(&mut self, bytes: &[u8]) {
        if bytes.len() > MAX_CONTENTS / 2 {
            return;
        }
        self.contents.extend_from_slice(&NEWS.to_le_bytes());
        self.contents.extend_from_slice(&[0; 2]);
        let len = bytes.len() as u32;
        self.contents.extend_from_slice(&len.to_le_bytes());
        self.contents.extend_from_slice(bytes);
    }
}

/// The items of a chunk's contents; ends where they make no sense.
pub struct Items<'a>(pub &'a [u8]);

impl<'a> Iterator for Items<'a> {
    type Item = Item<'a>;

    fn next(&mut self) -> Option<Item<'a>> {
        let (head, rest) = self.0.split_first_chunk::<4>()?;
        let [cpu, len] = [[head[0], head[1]], [head[2], head[3]]].map(u16::from_le_bytes);
        if cpu & !LATE == NEWS {
            let (len, rest) = rest.split_first_chunk()?;
            let (news, rest) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
            self.0 = rest;
            return Some(Item::News(news));
        }
        let (bytes, rest) = rest.split_at_checked(len.into())?;
        self.0 = rest;
        Some(Item::Event {
            cpu: (cpu & !LATE).into(),
            late: cpu & LATE != 0,
            bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn items_come_back_in_their_order() {
        let mut chunk = Chunk::default();
        chunk.news(b"{}");
        chunk.event(7, 3, false, b"one");
        chunk.news(b"more");
        chunk.event(6, 511, true, b"");
        let items: Vec<_> = Items(&chunk.contents).collect();
        let event = |cpu, late, bytes| Item::Event { cpu, late, bytes };
        assert_eq!(
            items,
            [
                Item::News(b"{}"),
                event(3, false, b"one"),
                Item::News(b"more"),
                event(511, true, b"")
            ]
        );
        assert_eq!((chunk.events, chunk.times), (2, (7, 6)));
    }

    proptest! {
        #[test]
        fn odd_bytes_end(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut items = Items(&bytes);
            let count = items.by_ref().count();
            prop_assert!(count <= bytes.len() / 4);
        }
    }
}
