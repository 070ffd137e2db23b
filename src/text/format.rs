//! Numbers and addresses as text, for lines that are written a hundred thousand times a second: `write!` costs some 100 to 600
//! instructions a value, these 10 to 60. It must not know what the values mean.

use std::net::IpAddr;

use nix::errno::Errno;
use serde::{Serialize, Serializer};

/// Longest text of a u64: 20 digits.
const MOST: usize = 20;
/// `00` to `99`.
const TWO: [[u8; 2]; 100] = {
    let mut two = [[0; 2]; 100];
    let mut i = 0;
    while i < 100 {
        two[i] = [b'0' + i as u8 / 10, b'0' + i as u8 % 10];
        i += 1;
    }
    two
};
/// `00` to `ff`.
const BYTE: [[u8; 2]; 256] = {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let mut byte = [[0; 2]; 256];
    let mut i = 0;
    while i < 256 {
        byte[i] = [HEX[i >> 4], HEX[i & 15]];
        i += 1;
    }
    byte
};

/// Appends `value` in decimal.
#[inline]
pub fn push_dec(out: &mut Vec<u8>, value: u64) {
    let two = |n: u64| TWO[n as usize % 100];
    match value {
        0..10 => out.push(b'0' + value as u8),
        10..100 => out.extend_from_slice(&two(value)),
        100..1000 => {
            let [high, low] = two(value % 100);
            out.extend_from_slice(&[b'0' + (value / 100) as u8, high, low]);
        }
        1000..10_000 => {
            let ([a, b], [c, d]) = (two(value / 100), two(value % 100));
            out.extend_from_slice(&[a, b, c, d]);
        }
        _ => push_long(out, value),
    }
}

/// The same of a number with at least two digits.
fn push_long(out: &mut Vec<u8>, mut value: u64) {
    let mut text = [0; MOST];
    let mut at = MOST;
    while value >= 100 {
        at -= 2;
        text[at..at + 2].copy_from_slice(&TWO[(value % 100) as usize]);
        value /= 100;
    }
    let [high, low] = TWO[value as usize];
    text[at - 1] = low;
    at -= 1;
    if value >= 10 {
        text[at - 1] = high;
        at -= 1;
    }
    out.extend_from_slice(&text[at..]);
}

/// Appends `value` in decimal, with its sign.
#[inline]
pub fn push_signed(out: &mut Vec<u8>, value: i64) {
    if value < 0 {
        out.push(b'-');
    }
    push_dec(out, value.unsigned_abs());
}

/// Appends `value` in hexadecimal with at least `digits` digits (16 at most), without `0x`.
#[inline]
pub fn push_hex(out: &mut Vec<u8>, value: u64, digits: usize) {
    let (text, used) = hex(value);
    out.extend_from_slice(&text[16 - used.max(digits.clamp(1, 16))..]);
}

/// All 16 digits, and how many of them are needed.
#[inline]
fn hex(value: u64) -> ([u8; 16], usize) {
    let mut text = [0; 16];
    for (to, b) in text.chunks_exact_mut(2).zip(value.to_be_bytes()) {
        to.copy_from_slice(&BYTE[usize::from(b)]);
    }
    (text, 16 - value.leading_zeros() as usize / 4)
}

/// Appends an address; IPv6 as RFC 5952 has it.
pub fn push_ip(out: &mut Vec<u8>, addr: IpAddr) {
    match addr {
        IpAddr::V4(a) => {
            let (text, len) = v4(a.octets());
            out.extend_from_slice(&text[..len]);
        }
        IpAddr::V6(a) => {
            use std::io::Write;
            // Writes to a Vec do not fail.
            let _ = write!(out, "{a}");
        }
    }
}

/// An IPv4 address's text and its length.
fn v4(octets: [u8; 4]) -> ([u8; 16], usize) {
    let mut text = [b'.'; 16];
    let mut len = 0;
    for b in octets {
        let two = TWO[usize::from(b % 100)];
        if b >= 100 {
            text[len] = b'0' + b / 100;
            text[len + 1..len + 3].copy_from_slice(&two);
            len += 4;
        } else if b >= 10 {
            text[len..len + 2].copy_from_slice(&two);
            len += 3;
        } else {
            text[len] = two[1];
            len += 2;
        }
        // What the next number begins behind.
        text[(len - 1) & 15] = b'.';
    }
    (text, len - 1)
}

/// Fills up with spaces from `start` to a column of `width` characters, and one space more.
pub fn pad(out: &mut Vec<u8>, start: usize, width: usize) {
    let used = chars(&out[start..]);
    out.resize(out.len() + width.saturating_sub(used) + 1, b' ');
}

/// Characters of a text.
pub fn chars(text: &[u8]) -> usize {
    if text.is_ascii() {
        text.len()
    } else {
        String::from_utf8_lossy(text).chars().count()
    }
}

/// A number that is a string such as `"0xffff8880"` in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hex(pub u64);

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut text = *b"0x0000000000000000";
        let (digits, used) = hex(self.0);
        let used = used.max(1);
        text[2..2 + used].copy_from_slice(&digits[16 - used..]);
        serializer.serialize_str(std::str::from_utf8(&text[..2 + used]).unwrap_or_default())
    }
}

/// An address that is a string in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addr(pub IpAddr);

impl Serialize for Addr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            IpAddr::V4(a) => {
                let (text, len) = v4(a.octets());
                serializer.serialize_str(std::str::from_utf8(&text[..len]).unwrap_or_default())
            }
            IpAddr::V6(a) => serializer.collect_str(&a),
        }
    }
}

/// `ECONNREFUSED`
pub fn errno_name(error: u32) -> String {
    match Errno::from_raw(error as i32) {
        Errno::UnknownErrno => format!("errno {error}"),
        e => format!("{e:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(out: &[u8]) -> String {
        String::from_utf8(out.to_vec()).unwrap()
    }

    proptest! {
        #[test]
        fn as_write_has_it(value in any::<u64>(), shift in 0u32..64, digits in 1usize..=16, v4 in any::<u32>(), v6 in any::<u128>()) {
            let value = value >> shift;
            let mut out = Vec::new();
            push_dec(&mut out, value);
            prop_assert_eq!(text(&out), value.to_string());
            out.clear();
            push_signed(&mut out, value as i64);
            prop_assert_eq!(text(&out), (value as i64).to_string());
            out.clear();
            push_hex(&mut out, value, digits);
            prop_assert_eq!(text(&out), format!("{value:0digits$x}"));
            prop_assert_eq!(serde_json::to_string(&Hex(value)).unwrap(), format!("\"{value:#x}\""));
            for addr in [IpAddr::V4(v4.into()), IpAddr::V6(v6.into())] {
                out.clear();
                push_ip(&mut out, addr);
                prop_assert_eq!(text(&out), addr.to_string());
                prop_assert_eq!(serde_json::to_string(&Addr(addr)).unwrap(), format!("\"{addr}\""));
            }
        }
    }

    #[test]
    fn zero_and_columns() {
        let mut out = Vec::new();
        push_dec(&mut out, 0);
        push_hex(&mut out, 0, 1);
        assert_eq!(out, b"00");
        assert_eq!(serde_json::to_string(&Hex(0)).unwrap(), "\"0x0\"");
        pad(&mut out, 0, 4);
        assert_eq!(out, b"00   ");
        let start = out.len();
        out.extend_from_slice("näme".as_bytes());
        pad(&mut out, start, 5);
        assert_eq!(chars(&out[start..]), 6);
        pad(&mut out, start, 2);
        assert_eq!(chars(&out[start..]), 7);
    }
}
