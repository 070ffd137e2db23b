//! What a pcapng file says of its packets beside their bytes: the interface's name, comment, id, queue, verdict, packets lost.
//!
//! libpcap reads the packets and gives none of this. [`Notes`] sees the same bytes on their way to libpcap and keeps a note for each
//! packet block, in the order in which libpcap hands out the packets. It judges nothing: what is damaged, libpcap says.

use std::collections::VecDeque;
use std::rc::Rc;

use super::pcapng::{
    BLOCK_EPB, BLOCK_IDB, BLOCK_PB, BLOCK_SHB, BLOCK_SPB, BYTE_ORDER, Direction, EPB_DROPCOUNT,
    EPB_FLAGS, EPB_PACKETID, EPB_QUEUE, EPB_VERDICT, IF_NAME, OPT_COMMENT, OPT_END, VERDICT_XDP,
};

/// libpcap refuses longer blocks.
const MAX_BLOCK: usize = 16 << 20;
/// The head of a block: type and length; of a section, its byte order too.
const HEAD: usize = 12;

/// What is known of one packet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Note {
    /// Empty where the file has none.
    pub interface: Rc<str>,
    pub direction: Option<Direction>,
    pub id: Option<u64>,
    pub queue: Option<u32>,
    /// XDP return code.
    pub verdict: Option<u64>,
    /// Packets lost between this packet and the one before it.
    pub dropped: Option<u64>,
    pub comment: Option<String>,
}

/// Takes a file's bytes in pieces, and gives a note for each packet.
#[derive(Default)]
pub struct Notes {
    /// What is not decoded yet: less than a block.
    rest: Vec<u8>,
    /// The file is no pcapng, or a block has no sound length: nothing more is looked at.
    off: bool,
    begun: bool,
    big_endian: bool,
    /// Names of this section's interfaces.
    interfaces: Vec<Rc<str>>,
    found: VecDeque<Note>,
}

impl Notes {
    /// The next bytes of the file.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.off {
            return;
        }
        self.rest.extend_from_slice(bytes);
        let rest = std::mem::take(&mut self.rest);
        let mut at = 0;
        while let Some(len) = self.block_len(&rest[at..]) {
            let Some(block) = rest.get(at..at + len) else {
                break;
            };
            self.block(&block[..len - 4]);
            at += len;
        }
        if !self.off {
            self.rest.extend_from_slice(&rest[at..]);
        }
    }

    /// The note of the packet that libpcap hands out next.
    pub fn next(&mut self) -> Note {
        self.found.pop_front().unwrap_or_default()
    }

    /// The length of the block that begins here. None: its head is not there yet, or it is none.
    fn block_len(&mut self, bytes: &[u8]) -> Option<usize> {
        let head = bytes.get(..HEAD)?;
        let is_section = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) == BLOCK_SHB;
        if is_section {
            match u32::from_le_bytes([head[8], head[9], head[10], head[11]]) {
                BYTE_ORDER => self.big_endian = false,
                order if order.swap_bytes() == BYTE_ORDER => self.big_endian = true,
                _ => self.off = true,
            }
        }
        let len = self.u32(head, 4) as usize;
        self.off |= !self.begun && !is_section || !(HEAD..=MAX_BLOCK).contains(&len) || len % 4 > 0;
        self.begun = true;
        (!self.off).then_some(len)
    }

    /// A block without its second length.
    fn block(&mut self, block: &[u8]) {
        let body = block.get(8..).unwrap_or_default();
        match self.u32(block, 0) {
            BLOCK_SHB => self.interfaces.clear(),
            BLOCK_IDB => {
                let options = self.options(body.get(8..).unwrap_or_default());
                let name = options.into_iter().find(|(code, _)| *code == IF_NAME);
                let name = name.map_or(String::new(), |(_, text)| lossy(text));
                self.interfaces.push(name.into());
            }
            BLOCK_EPB => {
                let mut note = self.note(self.u32(body, 0) as usize);
                self.options_of_packet(&mut note, body);
                self.found.push_back(note);
            }
            BLOCK_PB => {
                let mut note = self.note(self.u16(body, 0).into());
                let dropped = self.u16(body, 2);
                note.dropped = (dropped != u16::MAX && dropped > 0).then_some(dropped.into());
                self.options_of_packet(&mut note, body);
                self.found.push_back(note);
            }
            BLOCK_SPB => {
                let note = self.note(0);
                self.found.push_back(note);
            }
            _ => {}
        }
    }

    fn note(&self, interface: usize) -> Note {
        Note {
            interface: self.interfaces.get(interface).cloned().unwrap_or_default(),
            ..Note::default()
        }
    }

    /// The options behind the bytes of a packet block, of either kind.
    fn options_of_packet(&self, note: &mut Note, body: &[u8]) {
        let captured = self.u32(body, 12) as usize;
        let at = captured
            .checked_next_multiple_of(4)
            .and_then(|padded| padded.checked_add(20));
        let options = at.and_then(|at| body.get(at..)).unwrap_or_default();
        for (code, value) in self.options(options) {
            match (code, value.len()) {
                (OPT_COMMENT, _) => note.comment = Some(lossy(value)),
                (EPB_FLAGS, 4) => {
                    note.direction = match self.u32(value, 0) & 3 {
                        1 => Some(Direction::Inbound),
                        2 => Some(Direction::Outbound),
                        _ => None,
                    }
                }
                (EPB_DROPCOUNT, 8) => note.dropped = Some(self.u64(value, 0)),
                (EPB_PACKETID, 8) => note.id = Some(self.u64(value, 0)),
                (EPB_QUEUE, 4) => note.queue = Some(self.u32(value, 0)),
                (EPB_VERDICT, 9) if value[0] == VERDICT_XDP => {
                    note.verdict = Some(self.u64(value, 1));
                }
                _ => {}
            }
        }
    }

    /// The options of a block: code and value, up to the end mark or the first broken one.
    fn options<'b>(&self, mut rest: &'b [u8]) -> Vec<(u16, &'b [u8])> {
        let mut found = Vec::new();
        while rest.len() >= 4 {
            let (code, len) = (self.u16(rest, 0), usize::from(self.u16(rest, 2)));
            let Some(value) = rest.get(4..4 + len).filter(|_| code != OPT_END) else {
                break;
            };
            found.push((code, value));
            rest = rest.get(4 + len.next_multiple_of(4)..).unwrap_or_default();
        }
        found
    }

    /// Numbers in the file's byte order; 0 where the block is too short.
    fn u16(&self, bytes: &[u8], at: usize) -> u16 {
        let value = bytes.get(at..at + 2).map_or([0; 2], |b| [b[0], b[1]]);
        if self.big_endian {
            u16::from_be_bytes(value)
        } else {
            u16::from_le_bytes(value)
        }
    }

    fn u32(&self, bytes: &[u8], at: usize) -> u32 {
        let (first, second) = (
            u32::from(self.u16(bytes, at)),
            u32::from(self.u16(bytes, at + 2)),
        );
        if self.big_endian {
            first << 16 | second
        } else {
            second << 16 | first
        }
    }

    fn u64(&self, bytes: &[u8], at: usize) -> u64 {
        let (first, second) = (
            u64::from(self.u32(bytes, at)),
            u64::from(self.u32(bytes, at + 4)),
        );
        if self.big_endian {
            first << 32 | second
        } else {
            second << 32 | first
        }
    }
}

fn lossy(text: &[u8]) -> String {
    String::from_utf8_lossy(text)
        .trim_end_matches('\0')
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever comes, in whatever pieces: no panic, and no more is kept than a block and a piece.
        #[test]
        fn any_bytes_in_any_pieces(
            bytes in proptest::collection::vec(any::<u8>(), 0..400),
            piece in 1usize..50,
            section: bool,
        ) {
            let mut notes = Notes::default();
            let mut file = Vec::new();
            if section {
                file.extend(BLOCK_SHB.to_le_bytes());
                file.extend(28u32.to_le_bytes());
                file.extend(BYTE_ORDER.to_le_bytes());
                file.extend([1, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255, 28, 0, 0, 0]);
            }
            file.extend(&bytes);
            for piece in file.chunks(piece) {
                notes.push(piece);
                prop_assert!(notes.rest.len() <= file.len());
            }
            let _ = notes.next();
        }
    }

    #[test]
    fn an_endless_block_is_not_kept() {
        let mut notes = Notes::default();
        let mut head = BLOCK_SHB.to_le_bytes().to_vec();
        head.extend(u32::MAX.to_le_bytes());
        head.extend(BYTE_ORDER.to_le_bytes());
        notes.push(&head);
        for _ in 0..100 {
            notes.push(&[0; 4096]);
        }
        assert!(notes.off && notes.rest.is_empty());
        let mut notes = Notes::default();
        notes.push(b"not a capture file at all");
        assert!(notes.off && notes.rest.capacity() == 0);
    }
}
