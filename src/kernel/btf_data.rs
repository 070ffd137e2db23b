//! The bytes of one BTF: its types and strings, by number. Must not know what a type means.
//!
//! Layout: Documentation/bpf/btf.rst, include/uapi/linux/btf.h: a header, types of 12 bytes and a tail that depends on their kind,
//! strings that end with a NUL. All numbers in the byte order of the machine.

use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};

pub(super) const KIND_INT: u32 = 1;
pub(super) const KIND_PTR: u32 = 2;
pub(super) const KIND_ARRAY: u32 = 3;
pub(super) const KIND_STRUCT: u32 = 4;
pub(super) const KIND_UNION: u32 = 5;
pub(super) const KIND_ENUM: u32 = 6;
pub(super) const KIND_FWD: u32 = 7;
pub(super) const KIND_TYPEDEF: u32 = 8;
pub(super) const KIND_VOLATILE: u32 = 9;
pub(super) const KIND_CONST: u32 = 10;
pub(super) const KIND_RESTRICT: u32 = 11;
pub(super) const KIND_FUNC: u32 = 12;
pub(super) const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
pub(super) const KIND_FLOAT: u32 = 16;
const KIND_DECL_TAG: u32 = 17;
pub(super) const KIND_TYPE_TAG: u32 = 18;
pub(super) const KIND_ENUM64: u32 = 19;

const MAGIC: u16 = 0xeb9f;
/// `struct btf_header` as far as it has ever been needed.
const HEADER: usize = 24;
/// `struct btf_type` without its tail.
const TYPE: usize = 12;

/// A BTF as the kernel shows it.
#[derive(Debug)]
pub(super) struct Data {
    bytes: Vec<u8>,
    /// where each type begins
    types: Vec<u32>,
    strings: Range<usize>,
}

impl Data {
    pub fn parse(bytes: Vec<u8>) -> Result<Self> {
        ensure!(bytes.len() >= HEADER, "{} bytes are no BTF", bytes.len());
        let magic = u16::from_ne_bytes([bytes[0], bytes[1]]);
        ensure!(
            magic == MAGIC,
            "no BTF: it begins with {magic:#x}, not {MAGIC:#x}"
        );
        let header = word(&bytes, 4) as usize;
        let section = |at: usize| -> Result<Range<usize>> {
            let start = header.checked_add(word(&bytes, at) as usize);
            start
                .and_then(|start| Some(start..start.checked_add(word(&bytes, at + 4) as usize)?))
                .filter(|range| range.end <= bytes.len())
                .context("the BTF ends too early")
        };
        let (range, strings) = (section(8)?, section(16)?);
        let mut types = Vec::with_capacity(range.len() / 24);
        let mut at = range.start;
        while at < range.end {
            let info = bytes.get(at..at + TYPE).map(|head| word(head, 4));
            let size = TYPE + 4 * tail(info.context("the BTF ends within a type")?)?;
            ensure!(range.end - at >= size, "the BTF ends within a type");
            types.push(u32::try_from(at)?);
            at += size;
        }
        Ok(Self {
            bytes,
            types,
            strings,
        })
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How many types it has.
    pub fn len(&self) -> u32 {
        self.types.len() as u32
    }

    /// The type at `index`, from 0.
    pub fn get(&self, index: u32) -> Option<Type<'_>> {
        let at = *self.types.get(index as usize)? as usize;
        Some(Type(&self.bytes[at..self.strings.start.max(at)]))
    }

    /// Bytes of strings.
    pub fn string_bytes(&self) -> u32 {
        self.strings.len() as u32
    }

    /// The strings from this offset on; nothing where there is none.
    pub fn string_from(&self, offset: u32) -> &[u8] {
        let strings = &self.bytes[self.strings.clone()];
        strings.get(offset as usize..).unwrap_or_default()
    }
}

/// Which strings may be one of some names, told by their first four bytes: of a hundred that are none, one or two pass.
pub(super) struct Heads {
    bits: [u64; 64],
    /// a name is shorter than that
    short: bool,
}

impl Heads {
    pub fn new<'a>(names: impl Iterator<Item = &'a str>) -> Self {
        let mut heads = Self {
            bits: [0; 64],
            short: false,
        };
        for name in names {
            match name.as_bytes().first_chunk() {
                Some(head) => {
                    let (word, bit) = Self::place(*head);
                    heads.bits[word] |= bit;
                }
                None => heads.short = true,
            }
        }
        heads
    }

    /// `bytes` begin with a string that may be one of them.
    pub fn may_begin(&self, bytes: &[u8]) -> bool {
        let head = bytes.first_chunk().map(|head| Self::place(*head));
        self.short || head.is_some_and(|(word, bit)| self.bits[word] & bit != 0)
    }

    fn place(head: [u8; 4]) -> (usize, u64) {
        // Fibonacci hashing to 12 bits.
        let hash = u32::from_ne_bytes(head).wrapping_mul(0x9e37_79b9) >> 20;
        ((hash >> 6) as usize, 1 << (hash & 63))
    }
}

/// A BTF of these types and strings.
pub(super) fn encode(types: &[u32], strings: &[u8]) -> Vec<u8> {
    let length = 4 * types.len() as u32;
    // Behind magic, version 1 and flags: the header's length, where types and strings are from its end on.
    let header = [HEADER as u32, 0, length, length, strings.len() as u32];
    let mut bytes = Vec::with_capacity(HEADER + 4 * types.len() + strings.len());
    bytes.extend(MAGIC.to_ne_bytes());
    bytes.extend([1, 0]);
    for word in header.iter().chain(types) {
        bytes.extend(word.to_ne_bytes());
    }
    bytes.extend(strings);
    bytes
}

/// The 32-bit number at this offset, which is there.
fn word(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_ne_bytes(word)
}

/// 32-bit words behind a type with this `info`.
fn tail(info: u32) -> Result<usize> {
    let entries = (info & 0xffff) as usize;
    Ok(match (info >> 24) & 0x1f {
        KIND_INT | KIND_VAR | KIND_DECL_TAG => 1,
        KIND_ARRAY => 3,
        KIND_STRUCT | KIND_UNION | KIND_ENUM64 | KIND_DATASEC => 3 * entries,
        KIND_ENUM | KIND_FUNC_PROTO => 2 * entries,
        KIND_PTR | KIND_FWD | KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_RESTRICT
        | KIND_FUNC | KIND_FLOAT | KIND_TYPE_TAG => 0,
        kind => bail!("the BTF has a kind of type that netprobe does not know ({kind})"),
    })
}

/// `struct btf_type` and what follows it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Type<'a>(&'a [u8]);

impl<'a> Type<'a> {
    pub fn name_off(self) -> u32 {
        word(self.0, 0)
    }

    pub fn info(self) -> u32 {
        word(self.0, 4)
    }

    /// Its size in bytes or the type it refers to, by kind.
    pub fn size_or_type(self) -> u32 {
        word(self.0, 8)
    }

    pub fn kind(self) -> u32 {
        (self.info() >> 24) & 0x1f
    }

    pub fn vlen(self) -> usize {
        (self.info() & 0xffff) as usize
    }

    /// What it means depends on the kind: of a struct, that members' offsets have a bit field's size in the upper byte; of
    /// an enum, that it is signed.
    pub fn kind_flag(self) -> bool {
        self.info() >> 31 != 0
    }

    /// The `i`th 32-bit word behind the type, which a type of this kind has ([`Data::parse`] saw to it).
    pub fn word(self, i: usize) -> u32 {
        word(self.0, TYPE + 4 * i)
    }

    /// All words behind the type.
    pub fn words(self) -> impl Iterator<Item = u32> + 'a {
        let count = tail(self.info()).unwrap_or(0);
        (0..count).map(move |i| self.word(i))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_and_strings() {
        // int; struct of one member
        let types = [
            1,
            KIND_INT << 24,
            4,
            32,
            5,
            KIND_STRUCT << 24 | 1,
            4,
            9,
            1,
            0,
        ];
        let data = Data::parse(encode(&types, b"\0int\0one\0member\0")).unwrap();
        assert_eq!(data.len(), 2);
        let one = data.get(1).unwrap();
        assert_eq!((one.kind(), one.vlen(), one.word(0)), (KIND_STRUCT, 1, 9));
        assert_eq!(data.string_from(one.name_off()), b"one\0member\0");
        assert!(data.string_from(1000).is_empty());
        assert!(data.get(2).is_none());
    }

    #[test]
    fn what_is_cut_or_unknown_is_refused() {
        let types = [1, KIND_STRUCT << 24 | 2, 4, 9, 1, 0];
        let e = |bytes| Data::parse(bytes).unwrap_err().to_string();
        assert!(e(encode(&types, b"\0")).contains("ends within a type"));
        assert!(e(encode(&[0, 31 << 24, 0], b"\0")).contains("(31)"));
        assert!(e(vec![0; 24]).contains("no BTF"));
        assert!(e(vec![0; 3]).contains("no BTF"));
        let whole = encode(&[0, KIND_FLOAT << 24, 4], b"\0");
        for length in 24..whole.len() {
            assert!(Data::parse(whole[..length].to_vec()).is_err(), "{length}");
        }
    }
}
