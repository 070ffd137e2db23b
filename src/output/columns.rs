//! Text in columns that line up: padding that grows, time stamps, microseconds. Pure.

use std::io::Write;

use super::format;

/// Fills up with spaces what stands in `line` from `start` on to the column's width, which grows where the text is longer, and one
/// space more.
pub fn pad(line: &mut Vec<u8>, start: usize, width: &mut usize) {
    *width = (*width).max(format::chars(&line[start..]));
    format::pad(line, start, *width);
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
    fn times() {
        let mut line = Vec::new();
        push_time_of_day(&mut line, 3_723_000_042_999);
        assert_eq!(line, b"01:02:03.000042");
        assert_eq!(us(12_345), "12.3");
        assert_eq!(us(99), "0.0");
    }
}
