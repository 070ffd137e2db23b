//! Makes bytes of the kernel or the network fit for a terminal: a name may hold escape sequences.

use serde::{Serialize, Serializer};

/// Appends `bytes` (up to the first NUL), control characters, backslashes and what is not UTF-8 as `\xNN`.
pub fn push_escaped(out: &mut Vec<u8>, bytes: &[u8]) {
    let bytes = shown(bytes);
    if plain(bytes) {
        out.extend_from_slice(bytes);
        return;
    }
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() || c == '\\' || is_invisible(c) {
                let mut utf8 = [0; 4];
                for b in c.encode_utf8(&mut utf8).bytes() {
                    push_hex(out, b);
                }
            } else {
                out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
            }
        }
        for &b in chunk.invalid() {
            push_hex(out, b);
        }
    }
}

/// The same as a string.
pub fn escaped(bytes: &[u8]) -> String {
    let mut out = Vec::with_capacity(bytes.len());
    push_escaped(&mut out, bytes);
    String::from_utf8(out).unwrap_or_default()
}

/// A text that may be escaped already, without control characters and those that hide or reorder: each becomes `?`.
pub fn printable(text: &str) -> String {
    let hidden = |c: char| c.is_control() || is_invisible(c);
    text.replace(hidden, "?")
}

/// The same of a text of several lines, with tabs.
pub fn printable_lines(text: &str) -> String {
    let tabs = |line: &str| {
        let parts: Vec<_> = line.split('\t').map(printable).collect();
        parts.join("\t")
    };
    let lines: Vec<_> = text.split('\n').map(tabs).collect();
    lines.join("\n")
}

/// The same as a string in JSON, without a copy where nothing is to be escaped.
#[derive(Debug, Clone, Copy)]
pub struct Escaped<'a>(pub &'a [u8]);

impl Serialize for Escaped<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match std::str::from_utf8(shown(self.0)) {
            Ok(text) if plain(text.as_bytes()) => serializer.serialize_str(text),
            _ => serializer.serialize_str(&escaped(self.0)),
        }
    }
}

/// Up to the first NUL.
fn shown(bytes: &[u8]) -> &[u8] {
    bytes
        .iter()
        .position(|b| *b == 0)
        .map_or(bytes, |end| &bytes[..end])
}

/// The common case: printable ASCII that needs no escape.
fn plain(bytes: &[u8]) -> bool {
    bytes
        .iter()
        .all(|&b| (0x20..0x7f).contains(&b) && b != b'\\')
}

/// Characters that reorder or hide text (bidirectional controls, zero width).
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

fn push_hex(out: &mut Vec<u8>, b: u8) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    out.extend_from_slice(&[
        b'\\',
        b'x',
        HEX[usize::from(b >> 4)],
        HEX[usize::from(b & 15)],
    ]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names() {
        assert_eq!(escaped(b"curl\0\0"), "curl");
        assert_eq!(escaped(b"a\x1b[31mb"), "a\\x1b[31mb");
        assert_eq!(escaped(b"a\\x1b"), "a\\x5cx1b");
        assert_eq!(escaped("näme".as_bytes()), "näme");
        assert_eq!(escaped(b"\xff\xfe"), "\\xff\\xfe");
        assert_eq!(escaped("a\u{202e}b".as_bytes()), "a\\xe2\\x80\\xaeb");
    }

    proptest! {
        #[test]
        fn never_a_control_character(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            prop_assert!(escaped(&bytes).chars().all(|c| !c.is_control()));
            prop_assert_eq!(serde_json::to_string(&Escaped(&bytes)).unwrap(), serde_json::to_string(&escaped(&bytes)).unwrap());
        }
    }
}
