//! One block of a recording: a pcapng block of a type for local use, with a head, a checksum and a zstd frame. Pure.

use std::fmt;
use std::io;

use zstd::bulk::{Compressor, Decompressor};

/// The type of all our blocks: its highest bit says that it is for local use.
pub const BLOCK: u32 = 0x8000_4e50;
/// How the body of each of them begins.
pub const MAGIC: [u8; 8] = *b"netprobe";
/// Of the format that is written.
pub const FORMAT: u16 = 1;
/// Bytes of a block's contents before compression, at most.
pub const MAX_CONTENTS: usize = 8 << 20;
/// Bytes of a block, at most: libpcap and Wireshark refuse longer ones.
pub const MAX_BLOCK: usize = 16 << 20;
/// Of the type, the length, and the length once more at the end.
pub const FRAME: usize = 12;
/// Bytes of a body in front of its zstd frame.
const HEAD: usize = 48;
/// Of the body: where the checksum is.
const SUM: usize = 40;
/// zstd's: the fastest of the usual ones. Higher ones take twice the time for a tenth of the size.
const LEVEL: i32 = 1;

/// What a block holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// what the recording is of
    Head = 1,
    /// events and news
    Events = 2,
    /// the recording ended as asked: what was lost
    End = 3,
}

/// What is known of a block beside its contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Info {
    pub kind: Kind,
    /// Blocks of a file are numbered from 0 on.
    pub number: u32,
    /// events in it
    pub events: u32,
    /// time stamps of the first and the last event
    pub times: (u64, u64),
}

/// Why a block's contents cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bad {
    /// another program's block
    Foreign,
    /// a newer format
    Version(u16),
    Checksum,
    /// a sound checksum, but contents that nobody writes
    Contents,
}

impl fmt::Display for Bad {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Bad::Foreign => f.write_str("another program's block"),
            Bad::Version(version) => {
                write!(f, "format {version}, which is newer than this netprobe")
            }
            Bad::Checksum => f.write_str("a wrong checksum"),
            Bad::Contents => f.write_str("contents that cannot be decoded"),
        }
    }
}

/// The contents of a block, compressed: it can wait for its place in a file.
#[derive(Debug, Clone)]
pub struct Packed {
    pub kind: Kind,
    pub events: u32,
    pub times: (u64, u64),
    /// bytes of the contents
    size: u32,
    pub bytes: Vec<u8>,
}

/// Makes blocks.
pub struct Packer {
    compressor: Compressor<'static>,
    /// number of the next block
    number: u32,
}

impl Packer {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            compressor: Compressor::new(LEVEL)?,
            number: 0,
        })
    }

    /// Blocks of a new file follow.
    pub fn restart(&mut self) {
        self.number = 0;
    }

    /// Compresses a block's contents. `events` and `times`: as in [`Info`].
    pub fn pack(
        &mut self,
        kind: Kind,
        (events, times): (u32, (u64, u64)),
        contents: &[u8],
    ) -> io::Result<Packed> {
        if contents.len() > MAX_CONTENTS {
            return Err(io::Error::other("a block that is too long"));
        }
        Ok(Packed {
            kind,
            events,
            times,
            size: contents.len() as u32,
            bytes: self.compress(contents)?,
        })
    }

    /// One zstd frame.
    pub fn compress(&mut self, contents: &[u8]) -> io::Result<Vec<u8>> {
        let mut packed = vec![0; zstd::zstd_safe::compress_bound(contents.len())];
        let compressor = &mut self.compressor;
        let len = compressor.compress_to_buffer(contents, &mut packed[..])?;
        packed.truncate(len);
        Ok(packed)
    }

    /// Appends the block to `to`, by the next number.
    pub fn frame(&mut self, to: &mut Vec<u8>, packed: &Packed) {
        let start = to.len();
        to.extend_from_slice(&BLOCK.to_le_bytes());
        to.extend_from_slice(&[0; 4]);
        let body = to.len();
        to.extend_from_slice(&MAGIC);
        to.extend_from_slice(&FORMAT.to_le_bytes());
        to.extend_from_slice(&(packed.kind as u16).to_le_bytes());
        to.extend_from_slice(&self.number.to_le_bytes());
        to.extend_from_slice(&packed.events.to_le_bytes());
        to.extend_from_slice(&packed.size.to_le_bytes());
        to.extend_from_slice(&packed.times.0.to_le_bytes());
        to.extend_from_slice(&packed.times.1.to_le_bytes());
        let len = packed.bytes.len() as u32;
        let sum = checksum(&to[body..], len, &packed.bytes);
        to.extend_from_slice(&sum.to_le_bytes());
        to.extend_from_slice(&len.to_le_bytes());
        to.extend_from_slice(&packed.bytes);
        to.resize(to.len().next_multiple_of(4), 0);
        let total = (to.len() - start + 4) as u32;
        to.extend_from_slice(&total.to_le_bytes());
        to[start + 4..start + 8].copy_from_slice(&total.to_le_bytes());
        self.number = self.number.wrapping_add(1);
    }

    /// Appends a block with these contents to `to`.
    pub fn push(
        &mut self,
        to: &mut Vec<u8>,
        kind: Kind,
        about: (u32, (u64, u64)),
        contents: &[u8],
    ) -> io::Result<()> {
        let packed = self.pack(kind, about, contents)?;
        self.frame(to, &packed);
        Ok(())
    }
}

/// Of a head up to the checksum, of the length behind it, and of the zstd frame.
fn checksum(head: &[u8], len: u32, packed: &[u8]) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    sum.update(head);
    sum.update(&len.to_le_bytes());
    sum.update(packed);
    sum.finalize()
}

/// Reads a block's body. The contents come in `contents`, whose memory is used again.
pub fn unpack(body: &[u8], contents: &mut Vec<u8>) -> Result<Info, Bad> {
    contents.clear();
    let (head, packed) = body.split_at_checked(HEAD).ok_or(Bad::Foreign)?;
    if head[..8] != MAGIC {
        return Err(Bad::Foreign);
    }
    let u16_at = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
    let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
    let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
    let packed = packed.get(..u32_at(44) as usize).ok_or(Bad::Checksum)?;
    if checksum(&head[..SUM], u32_at(44), packed) != u32_at(SUM) {
        return Err(Bad::Checksum);
    }
    match u16_at(8) {
        FORMAT => {}
        version if version > FORMAT => return Err(Bad::Version(version)),
        _ => return Err(Bad::Contents),
    }
    let kind = match u16_at(10) {
        1 => Kind::Head,
        2 => Kind::Events,
        3 => Kind::End,
        _ => return Err(Bad::Contents),
    };
    let size = u32_at(20) as usize;
    if size > MAX_CONTENTS {
        return Err(Bad::Contents);
    }
    contents.reserve(size);
    let mut unpacker = Decompressor::new().map_err(|_| Bad::Contents)?;
    let unpacked = unpacker.decompress_to_buffer(packed, contents);
    if unpacked.ok() != Some(size) {
        contents.clear();
        return Err(Bad::Contents);
    }
    Ok(Info {
        kind,
        number: u32_at(12),
        events: u32_at(16),
        times: (u64_at(24), u64_at(32)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(contents: &[u8]) -> Vec<u8> {
        let mut block = Vec::new();
        let mut packer = Packer::new().unwrap();
        packer
            .push(&mut block, Kind::Events, (3, (5, 9)), contents)
            .unwrap();
        assert_eq!(block.len() % 4, 0);
        block[8..block.len() - 4].to_vec()
    }

    #[test]
    fn what_is_packed_is_unpacked() {
        let mut got = vec![1];
        let info = unpack(&body(b"some bytes"), &mut got).unwrap();
        assert_eq!(got, b"some bytes");
        assert_eq!(
            (info.kind, info.events, info.times),
            (Kind::Events, 3, (5, 9))
        );
    }

    #[test]
    fn each_flipped_bit_is_found() {
        let body = body(&[7; 100]);
        let mut got = Vec::new();
        let whole = HEAD + u32::from_le_bytes(body[44..48].try_into().unwrap()) as usize;
        for at in 0..whole {
            for bit in 0..8 {
                let mut broken = body.clone();
                broken[at] ^= 1 << bit;
                assert!(unpack(&broken, &mut got).is_err(), "byte {at}");
            }
        }
        for cut in 0..whole {
            assert!(unpack(&body[..cut], &mut got).is_err(), "{cut}");
        }
    }

    #[test]
    fn a_newer_format_is_named() {
        let mut body = body(b"x");
        body[8] = 2;
        let len = u32::from_le_bytes(body[44..48].try_into().unwrap());
        let sum = checksum(&body[..SUM], len, &body[HEAD..HEAD + len as usize]);
        body[SUM..SUM + 4].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(unpack(&body, &mut Vec::new()), Err(Bad::Version(2)));
    }
}
