//! Numbers and addresses as text, for lines that are written a hundred thousand times a second: `write!` costs some 100 to 600
//! instructions a value, these 10 to 60. It must not know what the values mean.

use std::net::IpAddr;

use serde::{Serialize, Serializer};

/// Longest text of a u64: 20 digits.
const MOST: usize = 20;

/// Appends `value` in decimal.
pub fn push_dec(out: &mut Vec<u8>, mut value: u64) {
    if value < 10 {
        out.push(b'0' + value as u8);
        return;
    }
    let mut text = [0; MOST];
    let mut at = MOST;
    while value > 0 {
        at -= 1;
        text[at] = b'0' + (value % 10) as u8;
        value /= 10;
    }
    out.extend_from_slice(&text[at..]);
}

/// Appends `value` in hexadecimal with at least `digits` digits, without `0x`.
pub fn push_hex(out: &mut Vec<u8>, mut value: u64, digits: usize) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let mut text = [b'0'; MOST];
    let mut at = MOST;
    while value > 0 {
        at -= 1;
        text[at] = HEX[(value & 15) as usize];
        value >>= 4;
    }
    out.extend_from_slice(&text[at.min(MOST - digits.clamp(1, 16))..]);
}

/// Appends an address; IPv6 as RFC 5952 has it.
pub fn push_ip(out: &mut Vec<u8>, addr: IpAddr) {
    match addr {
        IpAddr::V4(a) => {
            let [a, b, c, d] = a.octets();
            push_dec(out, a.into());
            for byte in [b, c, d] {
                out.push(b'.');
                push_dec(out, byte.into());
            }
        }
        IpAddr::V6(a) => {
            use std::io::Write;
            // Writes to a Vec do not fail.
            let _ = write!(out, "{a}");
        }
    }
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
        const HEX: &[u8; 16] = b"0123456789abcdef";
        let mut text = *b"0x0000000000000000";
        let digits = (16 - self.0.leading_zeros() as usize / 4).max(1);
        for (i, digit) in text[2..2 + digits].iter_mut().rev().enumerate() {
            *digit = HEX[(self.0 >> (4 * i) & 15) as usize];
        }
        serializer.serialize_str(std::str::from_utf8(&text[..2 + digits]).unwrap_or_default())
    }
}

/// An address that is a string in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addr(pub IpAddr);

impl Serialize for Addr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut text = Vec::with_capacity(40);
        push_ip(&mut text, self.0);
        serializer.serialize_str(std::str::from_utf8(&text).unwrap_or_default())
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
