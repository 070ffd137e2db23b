//! Text in columns that line up: padding that grows, time stamps, microseconds. Pure.

use std::io::Write;

use super::format;

/// Fills up with spaces what stands in `line` from `start` on to the column's width, which grows where the text is longer, and one
/// space more.
pub fn pad(line: &mut Vec<u8>, start: usize, width: &mut usize) {
    *width = (*width).max(format::chars(&line[start..]));
    format::pad(line, start, *width);
}

/// Texts that an [`TextCache`] remembers.
const SLOTS: usize = 256;

/// Texts and what they were made of, each in the place that a hash says: what comes again is copied, which costs a tenth of making
/// it. `W`: the widths
/// of the columns that the text fills.
pub struct TextCache<K, W> {
    slots: Vec<Option<(K, W, Vec<u8>)>>,
}

impl<K, W> Default for TextCache<K, W> {
    fn default() -> Self {
        Self {
            slots: std::iter::repeat_with(|| None).take(SLOTS).collect(),
        }
    }
}

impl<K: PartialEq, W: PartialEq + Copy> TextCache<K, W> {
    /// Appends the text of `key` to `line`: `make` writes it where it is not the last one of this `hash` (of its 8 lowest bits), or
    /// where columns have grown since.
    pub fn push(
        &mut self,
        line: &mut Vec<u8>,
        hash: u64,
        key: K,
        widths: &mut W,
        make: impl FnOnce(&mut Vec<u8>, &mut W),
    ) {
        let slot = &mut self.slots[hash as usize % SLOTS];
        match slot {
            Some((last, then, text)) if *last == key && *then == *widths => {
                line.extend_from_slice(text);
            }
            _ => {
                let start = line.len();
                make(line, widths);
                *slot = Some((key, *widths, line[start..].to_vec()));
            }
        }
    }
}

/// `HH:MM:SS.µµµµµµ`, UTC, of ns since 1970.
pub fn push_time_of_day(line: &mut Vec<u8>, wall: u64) {
    let (s, us) = (wall / 1_000_000_000, wall % 1_000_000_000 / 1000);
    // Writes to a Vec do not fail.
    let _ = write!(
        line,
        "{:02}:{:02}:{:02}.{us:06}",
        s / 3600 % 24,
        s / 60 % 60,
        s % 60
    );
}

/// ns as microseconds with one decimal: `12.3`.
pub fn us(ns: u64) -> String {
    format!("{}.{}", ns / 1000, ns % 1000 / 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_grows_and_stays_grown() {
        let mut width = 4;
        let mut line = b"ab".to_vec();
        pad(&mut line, 0, &mut width);
        assert_eq!(line, b"ab   ");
        line = b"abcdef".to_vec();
        pad(&mut line, 0, &mut width);
        assert_eq!((line.as_slice(), width), (&b"abcdef "[..], 6));
    }

    #[test]
    fn again_until_the_key_or_a_width_changes() {
        let (mut again, mut width, mut made) = (TextCache::default(), 2, 0);
        let mut line = Vec::new();
        for (hash, key) in [(0, "a"), (0, "a"), (1, "a"), (0, "bcd"), (1, "a"), (1, "a")] {
            again.push(&mut line, hash, key, &mut width, |line, width| {
                made += 1;
                let start = line.len();
                line.extend_from_slice(key.as_bytes());
                pad(line, start, width);
            });
        }
        assert_eq!(String::from_utf8(line).unwrap(), "a  a  a  bcd a   a   ");
        assert_eq!(made, 4);
    }

    #[test]
    fn times() {
        let mut line = Vec::new();
        push_time_of_day(&mut line, 3_723_000_042_999);
        assert_eq!(line, b"01:02:03.000042");
        assert_eq!(us(12_345), "12.3");
        assert_eq!(us(99), "0.0");
    }
}
