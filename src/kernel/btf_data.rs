//! The bytes of one BTF: its types and strings, by number. Must not know what a type means.
//!
//! Layout: Documentation/bpf/btf.rst, include/uapi/linux/btf.h: a header, types of 12 bytes and a tail that depends on their kind,
//! strings that end with a NUL. All numbers in the byte order of the machine.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail, ensure};
use libbpf_sys as sys;
use memchr::memchr;

use super::bpf_object::{check, owned};

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
const KIND_DECL_TAG: u32 = 17;
pub(super) const KIND_TYPE_TAG: u32 = 18;
pub(super) const KIND_ENUM64: u32 = 19;

const MAGIC: u16 = 0xeb9f;
/// `struct btf_header` as far as it has ever been needed.
const HEADER: usize = 24;
/// `struct btf_type` without its tail.
const TYPE: usize = 12;
/// Bytes of strings that are held at once; a string is shorter (BTF_MAX_NAME_OFFSET aside, KSYM_NAME_LEN is 512).
const CHUNK: usize = 1 << 16;
/// Bytes of strings that are read for one: a file of the kernel's gives a page at a time.
const WINDOW: usize = 4096;

/// A BTF as the kernel shows it.
#[derive(Debug)]
pub(super) struct Data {
    types: Vec<u8>,
    /// where each type begins
    index: Vec<u32>,
    strings: Strings,
    /// where names are that were looked for
    places: RefCell<BTreeMap<String, Vec<u32>>>,
}

#[derive(Debug)]
enum Strings {
    Held(Vec<u8>),
    /// Two fifths of the kernel's BTF, of which a run needs a hundredth: they stay in the file.
    Kept {
        file: File,
        at: u64,
        length: u32,
    },
}

impl Data {
    /// Of the file of vmlinux's, which never changes. Its strings are read when they are asked for.
    pub fn read(file: File) -> Result<Self> {
        let length = file.metadata()?.len();
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0).context("no BTF")?;
        let (types, strings) = sections(&header, length)?;
        let bytes = match vmlinux(types.end, length) {
            Some(mut bytes) if bytes.starts_with(&header) => {
                bytes.drain(..types.start);
                bytes
            }
            _ => {
                let mut bytes = vec![0; types.len()];
                file.read_exact_at(&mut bytes, types.start as u64)?;
                bytes
            }
        };
        let strings = Strings::Kept {
            file,
            at: strings.start as u64,
            length: u32::try_from(strings.len())?,
        };
        Self::of(bytes, strings)
    }

    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let (types, strings) = sections(bytes, bytes.len() as u64)?;
        let strings = Strings::Held(bytes[strings].to_vec());
        Self::of(bytes[types].to_vec(), strings)
    }

    fn of(types: Vec<u8>, strings: Strings) -> Result<Self> {
        let mut index = Vec::with_capacity(types.len() / 24);
        let mut at = 0;
        while at < types.len() {
            let info = types.get(at..at + TYPE).map(|head| word(head, 4));
            let size = TYPE + 4 * tail(info.context("the BTF ends within a type")?)?;
            ensure!(types.len() - at >= size, "the BTF ends within a type");
            index.push(u32::try_from(at)?);
            at += size;
        }
        Ok(Self {
            types,
            index,
            strings,
            places: RefCell::default(),
        })
    }

    /// All of it, as a file has it.
    pub fn bytes(&self) -> io::Result<Vec<u8>> {
        let words: Vec<u32> = self.types.chunks_exact(4).map(|w| word(w, 0)).collect();
        let mut strings = vec![0; self.string_bytes() as usize];
        self.copy_strings(0, &mut strings)?;
        Ok(encode(&words, &strings))
    }

    /// How many types it has.
    pub fn len(&self) -> u32 {
        self.index.len() as u32
    }

    /// The type at `index`, from 0.
    pub fn get(&self, index: u32) -> Option<Type<'_>> {
        let at = *self.index.get(index as usize)? as usize;
        Some(Type(&self.types[at..]))
    }

    /// All types.
    pub fn types(&self) -> impl Iterator<Item = Type<'_>> {
        let at = |&at: &u32| Type(&self.types[at as usize..]);
        self.index.iter().map(at)
    }

    /// Bytes of strings.
    pub fn string_bytes(&self) -> u32 {
        match &self.strings {
            Strings::Held(bytes) => bytes.len() as u32,
            Strings::Kept { length, .. } => *length,
        }
    }

    /// Strings from this offset on, as many bytes as `to` has: they must be there.
    fn copy_strings(&self, offset: u32, to: &mut [u8]) -> io::Result<()> {
        match &self.strings {
            Strings::Held(bytes) => {
                let from = offset as usize;
                let there = bytes.get(from..from + to.len());
                to.copy_from_slice(there.ok_or(io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
            Strings::Kept { file, at, .. } => file.read_exact_at(to, at + u64::from(offset)),
        }
    }

    /// The strings at these offsets, which rise, without their NUL; empty where there is none.
    pub fn strings(&self, offsets: impl Iterator<Item = u32>) -> io::Result<Vec<Vec<u8>>> {
        let mut window = vec![0; WINDOW];
        // What is in it: strings from an offset on.
        let (mut start, mut held) = (0, 0);
        let mut found = Vec::new();
        for offset in offsets {
            loop {
                let there = window[..held].get((offset - start) as usize..);
                let there = there.unwrap_or_default();
                let end = memchr(0, there);
                if end.is_some() || start + held as u32 >= self.string_bytes() && held > 0 {
                    found.push(there[..end.unwrap_or(there.len())].to_vec());
                    break;
                }
                // It is not whole: from it on. Longer than the window is none that means anything.
                if offset == start && held > 0 {
                    found.push(there.to_vec());
                    break;
                }
                start = offset;
                held = WINDOW.min(self.string_bytes().saturating_sub(offset) as usize);
                self.copy_strings(start, &mut window[..held])?;
                if held == 0 {
                    found.push(Vec::new());
                    break;
                }
            }
        }
        Ok(found)
    }

    /// Where the strings have these names: each in one pass over all strings, and only once.
    pub fn places<'a>(&self, names: &BTreeSet<&'a str>) -> io::Result<Vec<(u32, &'a str)>> {
        let mut places = self.places.borrow_mut();
        let new = |name: &&&str| !places.contains_key(**name);
        let new: BTreeSet<&str> = names.iter().filter(new).copied().collect();
        if !new.is_empty() {
            let mut found: BTreeMap<&str, Vec<u32>> =
                new.iter().map(|&n| (n, Vec::new())).collect();
            let mut ends = Words::default();
            for end in new.iter().filter_map(|name| end_of(name.as_bytes())) {
                ends.add(end);
            }
            self.each_that_may_be(&Heads::new(new.iter().copied()), |at, string| {
                if end_of(string).is_none_or(|end| ends.may_have(end))
                    && let Ok(string) = std::str::from_utf8(string)
                    && let Some(places) = found.get_mut(string)
                {
                    places.push(at);
                }
            })?;
            places.extend(found.into_iter().map(|(name, at)| (name.to_owned(), at)));
        }
        let of = |&name: &&'a str| {
            let at = places.get(name).into_iter().flatten();
            at.map(|&at| (at, name)).collect::<Vec<_>>()
        };
        Ok(names.iter().flat_map(of).collect())
    }

    /// Those strings that may be one of the names, with their offsets and without their NUL. Some others too.
    fn each_that_may_be(&self, heads: &Heads, mut found: impl FnMut(u32, &[u8])) -> io::Result<()> {
        if let Strings::Held(bytes) = &self.strings {
            scan(bytes, heads, found);
            return Ok(());
        }
        let length = self.string_bytes();
        let mut bytes = vec![0; CHUNK];
        // What it holds: strings from an offset on, the first one whole.
        let (mut start, mut held) = (0u32, 0);
        loop {
            let end = bytes.len().min((length - start) as usize);
            self.copy_strings(start + held as u32, &mut bytes[held..end])?;
            held = end;
            let used = scan(&bytes[..held], heads, |at, string| {
                found(start + at, string)
            });
            if start + held as u32 == length {
                return Ok(());
            }
            if used == 0 {
                return Err(io::ErrorKind::InvalidData.into());
            }
            bytes.copy_within(used..held, 0);
            start += used as u32;
            held -= used;
        }
    }
}

/// The first bytes of the kernel's BTF, which has so many in all, by one system call, where it is the first of all and this process may
/// ask: its file gives a page at a time.
fn vmlinux(bytes: usize, whole: u64) -> Option<Vec<u8>> {
    // SAFETY: a number.
    let btf = owned(unsafe { sys::bpf_btf_get_fd_by_id(1) }).ok()?;
    let mut to = vec![0; bytes];
    let mut info = sys::bpf_btf_info {
        btf: to.as_mut_ptr() as u64,
        btf_size: u32::try_from(bytes).ok()?,
        ..Default::default()
    };
    let mut size = size_of_val(&info) as u32;
    // SAFETY: `info` states how many bytes `to` has, which outlives the call, and `size` how many `info` has.
    let code = unsafe { sys::bpf_btf_get_info_by_fd(btf.as_raw_fd(), &mut info, &mut size) };
    (check(code).is_ok() && info.kernel_btf == 1 && u64::from(info.btf_size) == whole).then_some(to)
}

/// Tells the strings of `bytes` that may be one of the names. Gives back how many bytes whole strings take.
fn scan(bytes: &[u8], heads: &Heads, mut found: impl FnMut(u32, &[u8])) -> usize {
    const LOW: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    const ONES: u64 = 0x0101_0101_0101_0101;
    let mut start = 0;
    let mut may_be = heads.may_begin(bytes);
    let mut ends_at = |end: usize| {
        if may_be {
            found(start as u32, &bytes[start..end]);
        }
        start = end + 1;
        may_be = heads.may_begin(&bytes[start..]);
    };
    let words = bytes.chunks_exact(8);
    let rest = bytes.len() - words.remainder().len();
    for (i, word) in words.enumerate() {
        let word = word.try_into().map_or(0, u64::from_le_bytes);
        // No byte is 0: most words.
        if word.wrapping_sub(ONES) & !word & !LOW == 0 {
            continue;
        }
        // 0x80 in each byte that is 0
        let mut zeros = !(((word & LOW) + LOW) | word | LOW);
        while zeros != 0 {
            ends_at(8 * i + (zeros.trailing_zeros() / 8) as usize);
            zeros &= zeros - 1;
        }
    }
    for (i, byte) in bytes.iter().enumerate().skip(rest) {
        if *byte == 0 {
            ends_at(i);
        }
    }
    start
}

/// Where a BTF of so many bytes has its types and its strings.
fn sections(header: &[u8], length: u64) -> Result<(Range<usize>, Range<usize>)> {
    ensure!(header.len() >= HEADER, "{} bytes are no BTF", header.len());
    let magic = u16::from_ne_bytes([header[0], header[1]]);
    ensure!(
        magic == MAGIC,
        "no BTF: it begins with {magic:#x}, not {MAGIC:#x}"
    );
    let size = word(header, 4) as usize;
    let section = |at: usize| -> Result<Range<usize>> {
        let start = size.checked_add(word(header, at) as usize);
        start
            .and_then(|start| Some(start..start.checked_add(word(header, at + 4) as usize)?))
            .filter(|range| range.end as u64 <= length)
            .context("the BTF ends too early")
    };
    Ok((section(8)?, section(16)?))
}

type Bits = [u64; 64];

/// Words that may be among some: of a hundred that are not, a few pass.
#[derive(Debug, Clone)]
pub(super) struct Words(Bits);

impl Default for Words {
    fn default() -> Self {
        Self([0; 64])
    }
}

impl Words {
    pub fn add(&mut self, word: u32) {
        let (at, bit) = Self::place(word);
        self.0[at] |= bit;
    }

    pub fn may_have(&self, word: u32) -> bool {
        let (at, bit) = Self::place(word);
        self.0[at] & bit != 0
    }

    fn place(word: u32) -> (usize, u64) {
        let hash = word.wrapping_mul(Heads::FACTOR) >> Heads::SHIFT;
        ((hash >> 6) as usize, 1 << (hash & 63))
    }
}

/// Which strings may be one of some names, told by their first four bytes, the NUL at the end among them.
#[derive(Debug, Clone)]
pub(super) struct Heads(Words);

impl Heads {
    /// Fibonacci hashing: the first four bytes are multiplied with this ...
    pub const FACTOR: u32 = 0x9e37_79b9;
    /// ... and the upper 12 bits of the product say which bit it is.
    pub const SHIFT: u32 = 20;

    pub fn new<'a>(names: impl Iterator<Item = &'a str>) -> Self {
        let mut words = Words::default();
        for name in names {
            let mut add = |head| words.add(u32::from_ne_bytes(head));
            match *name.as_bytes() {
                [a, b, c, d, ..] => add([a, b, c, d]),
                [a, b, c] => add([a, b, c, 0]),
                // Whatever comes behind its end.
                [a, b] => (0..=u8::MAX).for_each(|c| add([a, b, 0, c])),
                _ => words.0.fill(u64::MAX),
            }
        }
        Self(words)
    }

    /// `bytes` begin with a string that may be one of them.
    pub fn may_begin(&self, bytes: &[u8]) -> bool {
        let head = bytes.first_chunk().map(|head| u32::from_ne_bytes(*head));
        head.is_none_or(|head| self.0.may_have(head))
    }

    pub fn bits(&self) -> &Bits {
        &self.0.0
    }
}

/// What a name ends in, and its length, as a word. A short one is rare enough to be looked up at once.
fn end_of(name: &[u8]) -> Option<u32> {
    let end = name.last_chunk().map(|end| u32::from_ne_bytes(*end));
    end.map(|end| end.wrapping_add(name.len() as u32))
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
pub(super) fn tail(info: u32) -> Result<usize> {
    let kind = (info >> 24) & 0x1f;
    match TAILS[kind as usize] {
        Some((words, per_entry)) => Ok(words + per_entry * (info & 0xffff) as usize),
        None => bail!("the BTF has a kind of type that netprobe does not know ({kind})"),
    }
}

/// By kind: 32-bit words behind a type, and how many for each of its entries.
const TAILS: [Option<(usize, usize)>; 32] = {
    let mut tails = [None; 32];
    let mut kind = KIND_INT;
    while kind <= KIND_ENUM64 {
        tails[kind as usize] = Some(match kind {
            KIND_INT | KIND_VAR | KIND_DECL_TAG => (1, 0),
            KIND_ARRAY => (3, 0),
            KIND_STRUCT | KIND_UNION | KIND_ENUM64 | KIND_DATASEC => (0, 3),
            KIND_ENUM | KIND_FUNC_PROTO => (0, 2),
            _ => (0, 0),
        });
        kind += 1;
    }
    tails
};

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

    /// The `i`th 32-bit word behind the type, which a type of this kind has ([`Data::of`] saw to it).
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
    use std::io::Write;

    use super::*;

    const KIND_FLOAT: u32 = 16;

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
        let bytes = encode(&types, b"\0int\0one\0member\0");
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        for data in [Data::parse(&bytes).unwrap(), Data::read(file).unwrap()] {
            assert_eq!(data.len(), 2);
            let one = data.get(1).unwrap();
            assert_eq!((one.kind(), one.vlen(), one.word(0)), (KIND_STRUCT, 1, 9));
            let at = [0, 1, 5, 6, 9, 1000];
            let strings = data.strings(at.into_iter()).unwrap();
            assert_eq!(strings, [&b""[..], b"int", b"one", b"ne", b"member", b""]);
            assert!(data.get(2).is_none());
            let mut found = Vec::new();
            let heads = Heads::new(["one", "member", "int"].into_iter());
            data.each_that_may_be(&heads, |at, string| found.push((at, string.to_vec())))
                .unwrap();
            let found: Vec<_> = found.iter().map(|(at, s)| (*at, s.as_slice())).collect();
            assert_eq!(found, [(1, &b"int"[..]), (5, b"one"), (9, b"member")]);
            assert_eq!(data.bytes().unwrap(), bytes);
        }
    }

    /// Strings that lie across the pieces in which a file is read.
    #[test]
    fn many_strings_in_a_file() {
        let names: Vec<String> = (0..30_000).map(|i| "x".repeat(i % 300)).collect();
        let mut strings = String::new();
        let mut places = Vec::new();
        for name in &names {
            places.push(strings.len() as u32);
            strings += name;
            strings.push('\0');
        }
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&encode(&[], strings.as_bytes())).unwrap();
        let data = Data::read(file).unwrap();
        let mut found = Vec::new();
        let any = Heads::new([""].into_iter());
        data.each_that_may_be(&any, |at, string| {
            found.push((at, String::from_utf8(string.to_vec()).unwrap()));
        })
        .unwrap();
        let all: Vec<_> = places.iter().copied().zip(names.iter().cloned()).collect();
        assert!(found == all);
        let read = data.strings(places.into_iter()).unwrap();
        assert!(
            read.iter()
                .map(Vec::as_slice)
                .eq(names.iter().map(String::as_bytes))
        );
        // One that does not end: it cannot be read in pieces.
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&encode(&[], &vec![b'x'; 2 * CHUNK]))
            .unwrap();
        let data = Data::read(file).unwrap();
        assert!(data.each_that_may_be(&any, |_, _| ()).is_err());
        assert_eq!(data.strings([5].into_iter()).unwrap()[0].len(), WINDOW);
    }

    #[test]
    fn heads_of_names() {
        let heads = Heads::new(["net", "u8", "sk_buff"].into_iter());
        for name in ["net\0x", "u8\0x", "u8\0\0", "sk_buff", "sk_bound"] {
            assert!(heads.may_begin(name.as_bytes()), "{name}");
        }
        for name in ["\0net", "ne\0x", "network", "u\0xx", "sock"] {
            assert!(!heads.may_begin(name.as_bytes()), "{name}");
        }
    }

    #[test]
    fn what_is_cut_or_unknown_is_refused() {
        let types = [1, KIND_STRUCT << 24 | 2, 4, 9, 1, 0];
        let e = |bytes: Vec<u8>| Data::parse(&bytes).unwrap_err().to_string();
        assert!(e(encode(&types, b"\0")).contains("ends within a type"));
        assert!(e(encode(&[0, 31 << 24, 0], b"\0")).contains("(31)"));
        assert!(e(vec![0; 24]).contains("no BTF"));
        assert!(e(vec![0; 3]).contains("no BTF"));
        let whole = encode(&[0, KIND_FLOAT << 24, 4], b"\0");
        for length in 24..whole.len() {
            assert!(Data::parse(&whole[..length]).is_err(), "{length}");
        }
    }
}
