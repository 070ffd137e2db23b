//! The blocks of a recording, out of a file that may be damaged, cut off, foreign or hostile. What cannot be read is counted and left
//! out: behind it the next block of ours is searched for. No more is kept than one block and its contents.

use std::io::{self, Read};

use crate::capture::pcapng::{BLOCK_SHB, BYTE_ORDER};

use super::block::{self, BLOCK, Bad, FRAME, Info, MAGIC, MAX_BLOCK};

/// Bytes that are read at a time.
const PIECE: usize = 256 << 10;

/// What of a file could not be read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Damage {
    /// blocks of ours with a wrong checksum or contents
    pub blocks: u64,
    /// the first reason
    pub why: Option<Bad>,
    /// blocks that are missing between others, by their numbers
    pub missing: u64,
    /// bytes that are no block
    pub bytes: u64,
    /// The file ends within a block.
    pub cut: bool,
}

impl Damage {
    pub fn any(&self) -> bool {
        *self != Self::default()
    }
}

/// A file's blocks, one after the other.
pub struct Reader<R> {
    from: R,
    buffer: Vec<u8>,
    /// what of the buffer was used
    used: usize,
    /// the file has no more
    ended: bool,
    /// number of the next block of ours
    number: u32,
    pub damage: Damage,
    /// contents of the block at hand
    contents: Vec<u8>,
}

impl<R: Read> Reader<R> {
    pub fn new(from: R) -> Self {
        Self {
            from,
            buffer: Vec::new(),
            used: 0,
            ended: false,
            number: 0,
            damage: Damage::default(),
            contents: Vec::new(),
        }
    }

    /// The file begins as pcapng in little-endian order does.
    pub fn is_pcapng(&mut self) -> io::Result<bool> {
        let head = self.peek(FRAME)?;
        Ok(head.len() == FRAME
            && head[..4] == BLOCK_SHB.to_le_bytes()
            && head[8..] == BYTE_ORDER.to_le_bytes())
    }

    /// The next block of ours that can be read, and its contents.
    pub fn next_block(&mut self) -> io::Result<Option<(Info, &[u8])>> {
        while let Some(len) = self.find_block()? {
            let start = self.used;
            self.used += len;
            let block = &self.buffer[start..self.used];
            if block[..4] != BLOCK.to_le_bytes() {
                continue;
            }
            match block::unpack(&block[8..len - 4], &mut self.contents) {
                Ok(info) => {
                    self.count(info.number);
                    return Ok(Some((info, &self.contents)));
                }
                Err(Bad::Foreign) => {}
                Err(bad) => {
                    self.damage.blocks += 1;
                    self.damage.why.get_or_insert(bad);
                    self.number = self.number.wrapping_add(1);
                }
            }
        }
        Ok(None)
    }

    /// Blocks are numbered from 0 on in each section.
    fn count(&mut self, number: u32) {
        if number > self.number {
            self.damage.missing += u64::from(number - self.number);
        }
        self.number = number.wrapping_add(1);
    }

    /// The length of the next whole block, which is in the buffer from `used` on.
    fn find_block(&mut self) -> io::Result<Option<usize>> {
        loop {
            let head = self.peek(FRAME)?;
            if head.is_empty() {
                return Ok(None);
            }
            if head.len() < FRAME {
                self.damage.cut = true;
                self.used = self.buffer.len();
                return Ok(None);
            }
            let len = block_len(head);
            let whole = match len {
                Some(len) => self.peek(len)?,
                None => &[],
            };
            match len {
                Some(len) if whole.len() == len && whole[len - 4..] == whole[4..8] => {
                    return Ok(Some(len));
                }
                // The last block, of which only a part was written.
                Some(len) if whole.len() < len && !holds_ours(&whole[4..]) => {
                    self.damage.cut = true;
                    self.used = self.buffer.len();
                    return Ok(None);
                }
                _ => self.skip_to_ours()?,
            }
        }
    }

    /// Leaves out what is no block, up to the next one of ours or of a section.
    fn skip_to_ours(&mut self) -> io::Result<()> {
        loop {
            let piece = self.peek(PIECE)?;
            let at_end = piece.len() < PIECE;
            let from = 1.min(piece.len());
            match ours(&piece[from..]) {
                Some(at) => {
                    self.damage.bytes += (from + at) as u64;
                    self.used += from + at;
                    return Ok(());
                }
                None if at_end => {
                    self.damage.bytes += piece.len() as u64;
                    self.used = self.buffer.len();
                    return Ok(());
                }
                None => {
                    // The beginning of one may be at the piece's end.
                    let skip = piece.len() - OURS;
                    self.damage.bytes += skip as u64;
                    self.used += skip;
                }
            }
        }
    }

    /// The next `len` bytes, or all that is left.
    fn peek(&mut self, len: usize) -> io::Result<&[u8]> {
        if self.buffer.len() - self.used < len && !self.ended {
            self.buffer.drain(..self.used);
            self.used = 0;
            while self.buffer.len() < len && !self.ended {
                let have = self.buffer.len();
                let want = PIECE.max(len - have).min(MAX_BLOCK);
                let mut part = self.from.by_ref().take(want as u64);
                self.ended = part.read_to_end(&mut self.buffer)? < want;
            }
        }
        let end = self.buffer.len().min(self.used + len);
        Ok(&self.buffer[self.used..end])
    }
}

/// Type, length and magic of a block of ours.
const OURS: usize = 8 + MAGIC.len();

/// Where a block of ours begins.
fn ours(bytes: &[u8]) -> Option<usize> {
    memchr::memmem::find_iter(bytes, &MAGIC)
        .filter_map(|at| at.checked_sub(8))
        .find(|at| bytes[*at..*at + 4] == BLOCK.to_le_bytes())
}

fn holds_ours(bytes: &[u8]) -> bool {
    ours(bytes).is_some()
}

/// The length that a block's head says, if a block can have it.
fn block_len(head: &[u8]) -> Option<usize> {
    let len = u32::from_le_bytes(*head.get(4..)?.first_chunk()?) as usize;
    (len % 4 == 0 && (FRAME..=MAX_BLOCK).contains(&len)).then_some(len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recording::block::{Kind, Packer};
    use proptest::prelude::*;

    fn block(kind: u32, body: &[u8]) -> Vec<u8> {
        let len = (body.len() + FRAME) as u32;
        [
            &kind.to_le_bytes()[..],
            &len.to_le_bytes(),
            body,
            &len.to_le_bytes(),
        ]
        .concat()
    }

    /// A section, then blocks of ours with an unknown one between each two.
    fn file(contents: &[&[u8]]) -> Vec<u8> {
        let section = [&BYTE_ORDER.to_le_bytes()[..], &[1, 0, 0, 0], &[255; 8]].concat();
        let mut file = block(BLOCK_SHB, &section);
        let mut packer = Packer::new().unwrap();
        for part in contents {
            packer
                .push(&mut file, Kind::Events, (1, (0, 0)), part)
                .unwrap();
            file.extend(block(6, &[9; 40]));
        }
        file
    }

    fn read(file: &[u8]) -> (Vec<Vec<u8>>, Damage) {
        let mut reader = Reader::new(file);
        let mut found = Vec::new();
        while let Some((_, contents)) = reader.next_block().unwrap() {
            found.push(contents.to_vec());
        }
        (found, reader.damage)
    }

    #[test]
    fn a_whole_file() {
        let file = file(&[b"one", b"two"]);
        assert!(Reader::new(&file[..]).is_pcapng().unwrap());
        assert_eq!(
            read(&file),
            (vec![b"one".to_vec(), b"two".to_vec()], Damage::default())
        );
    }

    #[test]
    fn a_file_that_is_cut_anywhere_gives_its_whole_blocks() {
        let parts: [&[u8]; 3] = [b"one", b"two", b"three"];
        let file = file(&parts);
        for cut in 0..file.len() {
            let (found, damage) = read(&file[..cut]);
            assert!(found.len() <= 3);
            assert!(found.iter().zip(parts).all(|(a, b)| a == b), "{cut}");
            if found.len() == 3 {
                continue;
            }
            let at_border = damage == Damage::default();
            assert!(damage.cut || at_border, "{cut}: {damage:?}");
        }
    }

    #[test]
    fn behind_damage_it_goes_on() {
        let mut broken = file(&[b"one", b"two", b"three"]);
        let second = ours(&broken).unwrap() + 16;
        let second = second + ours(&broken[second..]).unwrap();
        // Its length.
        broken[second + 5] ^= 0x40;
        let (found, damage) = read(&broken);
        assert_eq!(found, [b"one".to_vec(), b"three".to_vec()]);
        assert!(damage.bytes > 0 && damage.missing == 1, "{damage:?}");
        broken[second + 5] ^= 0x40;
        // Its contents.
        broken[second + 60] ^= 1;
        let (found, damage) = read(&broken);
        assert_eq!(found.len(), 2);
        assert_eq!((damage.blocks, damage.missing), (1, 0));
    }

    proptest! {
        #[test]
        fn mutated_files_never_panic(
            at in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
            cut in any::<prop::sample::Index>(),
            insert in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            let mut file = file(&[&[1; 500], b"two", &[3; 70]]);
            for (index, byte) in at {
                let index = index.index(file.len());
                file[index] = byte;
            }
            let cut = cut.index(file.len());
            file.splice(cut..cut, insert);
            let (found, _) = read(&file);
            prop_assert!(found.len() <= 4);
        }
    }
}
