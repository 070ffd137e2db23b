//! Sorts more events than memory holds: by runs in a temporary file that has no name, which are merged.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};

/// What an event is sorted by; the last words tell those that are alike in the others apart.
pub type Key = [u64; 4];

/// Bytes of events that are sorted in memory.
const RUN: usize = 64 << 20;
/// Bytes of a run that are read at a time.
const PIECE: usize = 32 << 10;
/// Bytes in front of each event in a file: its key and its length.
const HEAD: usize = 36;
const FAILED: &str = "failed to use a temporary file (TMPDIR says where)";

/// Takes events in any order.
pub struct Sorter {
    events: Vec<u8>,
    /// key, and where its event is
    keys: Vec<(Key, u32, u32)>,
    most: usize,
    file: Option<File>,
    /// begin and end of each run in the file
    runs: Vec<(u64, u64)>,
}

impl Default for Sorter {
    fn default() -> Self {
        Self::new(RUN)
    }
}

impl Sorter {
    /// With so many bytes of events in memory.
    fn new(most: usize) -> Self {
        Self {
            events: Vec::new(),
            keys: Vec::new(),
            most,
            file: None,
            runs: Vec::new(),
        }
    }

    pub fn push(&mut self, key: Key, event: &[u8]) -> Result<()> {
        self.keys
            .push((key, self.events.len() as u32, event.len() as u32));
        self.events.extend_from_slice(event);
        if self.events.len() + self.keys.len() * size_of::<(Key, u32, u32)>() >= self.most {
            self.spill()?;
        }
        Ok(())
    }

    /// Writes what is in memory as a run.
    fn spill(&mut self) -> Result<()> {
        if self.keys.is_empty() {
            return Ok(());
        }
        self.keys.sort_unstable_by_key(|(key, ..)| *key);
        let file = match self.file.take() {
            Some(file) => file,
            None => tempfile::tempfile().context(FAILED)?,
        };
        let begin = self.runs.last().map_or(0, |(_, end)| *end);
        let mut out = BufWriter::with_capacity(1 << 20, &file);
        let mut end = begin;
        for (key, at, len) in &self.keys {
            let event = &self.events[*at as usize..(*at + *len) as usize];
            for word in key {
                out.write_all(&word.to_le_bytes()).context(FAILED)?;
            }
            out.write_all(&len.to_le_bytes()).context(FAILED)?;
            out.write_all(event).context(FAILED)?;
            end += (HEAD + event.len()) as u64;
        }
        out.flush().context(FAILED)?;
        drop(out);
        self.runs.push((begin, end));
        self.keys.clear();
        self.events.clear();
        self.file = Some(file);
        Ok(())
    }

    /// The events in order, which can be had more than once.
    pub fn sorted(&mut self) -> Result<Sorted<'_>> {
        self.spill()?;
        let mut sorted = Sorted {
            runs: Vec::new(),
            heads: BinaryHeap::new(),
        };
        let Some(file) = &self.file else {
            return Ok(sorted);
        };
        for (at, end) in &self.runs {
            let mut run = Run {
                file,
                at: *at,
                end: *end,
                piece: Vec::new(),
                used: 0,
            };
            if let Some(key) = run.key()? {
                sorted.heads.push(Reverse((key, sorted.runs.len())));
            }
            sorted.runs.push(run);
        }
        Ok(sorted)
    }
}

/// One run of a file.
struct Run<'a> {
    file: &'a File,
    at: u64,
    end: u64,
    piece: Vec<u8>,
    used: usize,
}

impl Run<'_> {
    /// The next `len` bytes are in memory.
    fn fill(&mut self, len: usize) -> Result<()> {
        if self.piece.len() - self.used >= len {
            return Ok(());
        }
        self.piece.drain(..self.used);
        self.used = 0;
        let have = self.piece.len();
        let want = PIECE.max(len - have).min((self.end - self.at) as usize);
        self.piece.resize(have + want, 0);
        self.file
            .read_exact_at(&mut self.piece[have..], self.at)
            .context(FAILED)?;
        self.at += want as u64;
        Ok(())
    }

    /// The key of the next event.
    fn key(&mut self) -> Result<Option<Key>> {
        if self.at == self.end && self.used == self.piece.len() {
            return Ok(None);
        }
        self.fill(HEAD)?;
        let bytes = &self.piece[self.used..];
        let word = |i: usize| std::array::from_fn(|k| bytes[8 * i + k]);
        Ok(Some(std::array::from_fn(|i| u64::from_le_bytes(word(i)))))
    }

    /// Takes the next event.
    fn take(&mut self, event: &mut Vec<u8>) -> Result<()> {
        self.fill(HEAD)?;
        let len = &self.piece[self.used + HEAD - 4..self.used + HEAD];
        let len = len.first_chunk().map_or(0, |len| u32::from_le_bytes(*len)) as usize;
        self.fill(HEAD + len)?;
        let start = self.used + HEAD;
        event.clear();
        event.extend_from_slice(&self.piece[start..start + len]);
        self.used = start + len;
        Ok(())
    }
}

/// Events in the order of their keys.
pub struct Sorted<'a> {
    runs: Vec<Run<'a>>,
    heads: BinaryHeap<Reverse<(Key, usize)>>,
}

impl Sorted<'_> {
    /// The key of the event that comes next.
    pub fn peek(&self) -> Option<Key> {
        self.heads.peek().map(|Reverse((key, _))| *key)
    }

    /// The next event, into `event`.
    pub fn next(&mut self, event: &mut Vec<u8>) -> Result<Option<Key>> {
        let Some(Reverse((key, from))) = self.heads.pop() else {
            return Ok(None);
        };
        let run = &mut self.runs[from];
        run.take(event)?;
        if let Some(key) = run.key()? {
            self.heads.push(Reverse((key, from)));
        }
        Ok(Some(key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(sorter: &mut Sorter) -> Vec<(Key, Vec<u8>)> {
        let mut sorted = sorter.sorted().unwrap();
        let (mut found, mut event) = (Vec::new(), Vec::new());
        while let Some(key) = sorted.next(&mut event).unwrap() {
            found.push((key, event.clone()));
        }
        found
    }

    proptest! {
        #[test]
        fn many_runs_give_the_order(
            events in prop::collection::vec((0u64..9, prop::collection::vec(any::<u8>(), 0..60)), 0..200),
            most in 60usize..4000,
        ) {
            let mut sorter = Sorter::new(most);
            let mut expected = Vec::new();
            for (i, (first, bytes)) in events.into_iter().enumerate() {
                let key = [first, i as u64, 0, 0];
                sorter.push(key, &bytes).unwrap();
                expected.push((key, bytes));
            }
            expected.sort();
            prop_assert_eq!(&all(&mut sorter), &expected);
            prop_assert_eq!(&all(&mut sorter), &expected, "and once more");
        }
    }
}
