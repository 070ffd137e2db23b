//! Capture files: writes pcapng (with packet id, queue, verdict, drop counts, comments) and classic pcap.
//!
//! It must not know where packets come from: any tool fills [`Packet`] and [`Interface`]. Reading is in `savefile`.
//! The blocks follow draft-ietf-opsawg-pcapng; everything is written in little-endian order.

use std::io::{self, Write};

use super::linktype::Linktype;

/// Snap length that means "whole packets" to every reader of capture files.
pub const MAX_SNAPLEN: u32 = 262_144;

pub const BLOCK_SHB: u32 = 0x0a0d_0d0a;
pub const BLOCK_IDB: u32 = 1;
/// Obsolete: a packet, as older programs wrote it.
pub(super) const BLOCK_PB: u32 = 2;
pub(super) const BLOCK_SPB: u32 = 3;
pub(super) const BLOCK_ISB: u32 = 5;
pub(super) const BLOCK_EPB: u32 = 6;
pub const BYTE_ORDER: u32 = 0x1a2b_3c4d;
const PCAP_MAGIC_NS: u32 = 0xa1b2_3c4d;

pub(super) const OPT_END: u16 = 0;
pub(super) const OPT_COMMENT: u16 = 1;
const SHB_HARDWARE: u16 = 2;
const SHB_OS: u16 = 3;
const SHB_APPL: u16 = 4;
pub(super) const IF_NAME: u16 = 2;
const IF_DESCRIPTION: u16 = 3;
const IF_TSRESOL: u16 = 9;
const IF_FILTER: u16 = 11;
const IF_HARDWARE: u16 = 15;
pub(super) const EPB_FLAGS: u16 = 2;
pub(super) const EPB_DROPCOUNT: u16 = 4;
pub(super) const EPB_PACKETID: u16 = 5;
pub(super) const EPB_QUEUE: u16 = 6;
pub(super) const EPB_VERDICT: u16 = 7;
const ISB_STARTTIME: u16 = 2;
const ISB_ENDTIME: u16 = 3;
const ISB_IFRECV: u16 = 4;
const ISB_IFDROP: u16 = 5;
const ISB_FILTERACCEPT: u16 = 6;
const ISB_USRDELIV: u16 = 8;

/// Type octet of an `epb_verdict` that holds an XDP return code in eight bytes.
pub(super) const VERDICT_XDP: u8 = 2;

/// Who wrote the file; goes into the section header block.
#[derive(Clone, Debug, Default)]
pub struct Section {
    pub hardware: Option<String>,
    pub os: Option<String>,
    pub application: Option<String>,
    pub comment: Option<String>,
}

/// One capture point: an interface, or one program's entry or exit on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub description: Option<String>,
    pub hardware: Option<String>,
    /// The expression that packets had to match.
    pub filter: Option<String>,
    /// 0 for no limit.
    pub snaplen: u32,
    pub linktype: Linktype,
}

impl Interface {
    pub fn new(name: impl Into<String>, linktype: Linktype) -> Self {
        Interface {
            name: name.into(),
            description: None,
            hardware: None,
            filter: None,
            snaplen: 0,
            linktype,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Inbound,
    Outbound,
}

/// One packet with what is known about it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packet<'a> {
    /// Index of the interface, in the order of `add_interface`.
    pub interface: u32,
    /// Wall clock, nanoseconds since 1970.
    pub ts: u64,
    /// Length on the wire; `data` may be shorter.
    pub len: u32,
    pub data: &'a [u8],
    pub direction: Option<Direction>,
    pub id: Option<u64>,
    pub queue: Option<u32>,
    /// XDP return code.
    pub verdict: Option<u64>,
    /// Packets lost between this packet and the one before it.
    pub dropped: Option<u64>,
    pub comment: Option<&'a str>,
}

/// Counters of one interface, written at the end of a capture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Wall clock, nanoseconds.
    pub start: u64,
    pub end: u64,
    /// Packets that the interface handed to XDP.
    pub received: Option<u64>,
    /// Packets that matched the filter.
    pub accepted: Option<u64>,
    /// Packets lost for lack of room in the buffer.
    pub dropped: Option<u64>,
    /// Packets in the file.
    pub delivered: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Pcapng,
    /// Classic pcap with nanoseconds: no interfaces, ids or verdicts.
    Pcap,
}

/// Writes one capture file. The interfaces must be added before their packets.
pub struct Writer<W: Write> {
    out: W,
    format: Format,
    interfaces: u32,
    snaplen: u32,
    scratch: Vec<u8>,
    written: u64,
}

impl<W: Write> Writer<W> {
    /// Writes the file's head. `snaplen` and `linktype` are for classic pcap, which has one for the whole file.
    pub fn new(
        out: W,
        format: Format,
        section: &Section,
        snaplen: u32,
        linktype: Linktype,
    ) -> io::Result<Self> {
        let snaplen = if snaplen == 0 { MAX_SNAPLEN } else { snaplen };
        let mut writer = Writer {
            out,
            format,
            interfaces: 0,
            snaplen,
            scratch: Vec::with_capacity(4096),
            written: 0,
        };
        match format {
            Format::Pcapng => writer.section_header(section)?,
            Format::Pcap => writer.pcap_header(linktype)?,
        }
        Ok(writer)
    }

    fn section_header(&mut self, section: &Section) -> io::Result<()> {
        let body = &mut self.scratch;
        body.clear();
        put32(body, BYTE_ORDER);
        put16(body, 1);
        put16(body, 0);
        body.extend_from_slice(&u64::MAX.to_le_bytes()); // section length: not given
        let options = [
            (OPT_COMMENT, &section.comment),
            (SHB_HARDWARE, &section.hardware),
            (SHB_OS, &section.os),
            (SHB_APPL, &section.application),
        ];
        for (code, value) in options {
            if let Some(value) = value {
                put_option(body, code, value.as_bytes());
            }
        }
        put32(body, u32::from(OPT_END));
        self.block(BLOCK_SHB)
    }

    fn pcap_header(&mut self, linktype: Linktype) -> io::Result<()> {
        let head = &mut self.scratch;
        head.clear();
        put32(head, PCAP_MAGIC_NS);
        put16(head, 2);
        put16(head, 4);
        put32(head, 0);
        put32(head, 0);
        put32(head, self.snaplen.max(1));
        put32(head, linktype.in_file().into());
        self.written += self.scratch.len() as u64;
        self.out.write_all(&self.scratch)
    }

    /// Adds a capture point and returns its index.
    pub fn add_interface(&mut self, interface: &Interface) -> io::Result<u32> {
        let index = self.interfaces;
        self.interfaces += 1;
        if self.format == Format::Pcap {
            return Ok(index);
        }
        let body = &mut self.scratch;
        body.clear();
        put16(body, interface.linktype.in_file());
        put16(body, 0);
        put32(body, interface.snaplen);
        put_option(body, IF_NAME, interface.name.as_bytes());
        if let Some(text) = &interface.description {
            put_option(body, IF_DESCRIPTION, text.as_bytes());
        }
        if let Some(text) = &interface.hardware {
            put_option(body, IF_HARDWARE, text.as_bytes());
        }
        put_option(body, IF_TSRESOL, &[9]);
        if let Some(filter) = &interface.filter {
            // The first byte says that the filter is a libpcap expression.
            let mut value = vec![0];
            value.extend_from_slice(filter.as_bytes());
            put_option(body, IF_FILTER, &value);
        }
        put32(body, u32::from(OPT_END));
        self.block(BLOCK_IDB)?;
        Ok(index)
    }

    pub fn packet(&mut self, packet: &Packet<'_>) -> io::Result<()> {
        match self.format {
            Format::Pcapng => self.enhanced_packet(packet),
            Format::Pcap => self.pcap_packet(packet),
        }
    }

    fn enhanced_packet(&mut self, packet: &Packet<'_>) -> io::Result<()> {
        debug_assert!(packet.interface < self.interfaces);
        // What follows the packet; its bytes themselves are copied once only.
        let tail = &mut self.scratch;
        tail.clear();
        if let Some(text) = packet.comment {
            put_option(tail, OPT_COMMENT, text.as_bytes());
        }
        if let Some(direction) = packet.direction {
            let flags: u32 = if direction == Direction::Inbound {
                1
            } else {
                2
            };
            put_option(tail, EPB_FLAGS, &flags.to_le_bytes());
        }
        if let Some(dropped) = packet.dropped {
            put_option(tail, EPB_DROPCOUNT, &dropped.to_le_bytes());
        }
        if let Some(id) = packet.id {
            put_option(tail, EPB_PACKETID, &id.to_le_bytes());
        }
        if let Some(queue) = packet.queue {
            put_option(tail, EPB_QUEUE, &queue.to_le_bytes());
        }
        if let Some(verdict) = packet.verdict {
            let mut value = [VERDICT_XDP; 9];
            value[1..].copy_from_slice(&verdict.to_le_bytes());
            put_option(tail, EPB_VERDICT, &value);
        }
        if !tail.is_empty() {
            put32(tail, u32::from(OPT_END));
        }
        let captured = packet.data.len() as u32;
        let padding = &[0; 3][..captured.wrapping_neg() as usize % 4];
        // 28: this head; 4: the length once more at the end
        let total = 28 + captured + padding.len() as u32 + tail.len() as u32 + 4;
        put32(tail, total);
        let mut head = [0; 28];
        for (to, value) in head.chunks_exact_mut(4).zip([
            BLOCK_EPB,
            total,
            packet.interface,
            (packet.ts >> 32) as u32,
            packet.ts as u32,
            captured,
            packet.len.max(captured),
        ]) {
            to.copy_from_slice(&value.to_le_bytes());
        }
        self.written += u64::from(total);
        self.out.write_all(&head)?;
        self.out.write_all(packet.data)?;
        self.out.write_all(padding)?;
        self.out.write_all(&self.scratch)
    }

    fn pcap_packet(&mut self, packet: &Packet<'_>) -> io::Result<()> {
        let head = &mut self.scratch;
        head.clear();
        put32(head, (packet.ts / 1_000_000_000) as u32);
        put32(head, (packet.ts % 1_000_000_000) as u32);
        put32(head, packet.data.len() as u32);
        put32(head, packet.len.max(packet.data.len() as u32));
        self.written += (self.scratch.len() + packet.data.len()) as u64;
        self.out.write_all(&self.scratch)?;
        self.out.write_all(packet.data)
    }

    /// Writes an interface statistics block; classic pcap has no place for it.
    pub fn statistics(&mut self, interface: u32, counters: &Counters) -> io::Result<()> {
        if self.format == Format::Pcap {
            return Ok(());
        }
        let body = &mut self.scratch;
        body.clear();
        put32(body, interface);
        put_time(body, counters.end);
        let mut time = Vec::with_capacity(8);
        put_time(&mut time, counters.start);
        put_option(body, ISB_STARTTIME, &time);
        time.clear();
        put_time(&mut time, counters.end);
        put_option(body, ISB_ENDTIME, &time);
        let values = [
            (ISB_IFRECV, counters.received),
            (ISB_IFDROP, counters.dropped),
            (ISB_FILTERACCEPT, counters.accepted),
            (ISB_USRDELIV, counters.delivered),
        ];
        for (code, value) in values {
            if let Some(value) = value {
                put_option(body, code, &value.to_le_bytes());
            }
        }
        put32(body, u32::from(OPT_END));
        self.block(BLOCK_ISB)
    }

    /// Writes `scratch` as the body of a block.
    fn block(&mut self, kind: u32) -> io::Result<()> {
        let total = self.scratch.len() as u32 + 12;
        let mut head = [0; 8];
        head[..4].copy_from_slice(&kind.to_le_bytes());
        head[4..].copy_from_slice(&total.to_le_bytes());
        self.scratch.extend_from_slice(&total.to_le_bytes());
        self.written += u64::from(total);
        self.out.write_all(&head)?;
        self.out.write_all(&self.scratch)
    }

    /// Bytes written so far, for rotation by size.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Where the file's bytes go.
    pub fn target(&mut self) -> &mut W {
        &mut self.out
    }

    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

fn put16(out: &mut Vec<u8>, value: u16) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

/// A timestamp as pcapng wants it: the high half first.
fn put_time(out: &mut Vec<u8>, ts: u64) {
    put32(out, (ts >> 32) as u32);
    put32(out, ts as u32);
}

fn pad4(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

/// An option; a value too long for its 16-bit length is cut at a character boundary.
fn put_option(out: &mut Vec<u8>, code: u16, value: &[u8]) {
    let mut len = value.len().min(usize::from(u16::MAX) - 3);
    if len < value.len() {
        while len > 0 && value[len] & 0xc0 == 0x80 {
            len -= 1;
        }
    }
    put16(out, code);
    put16(out, len as u16);
    out.extend_from_slice(&value[..len]);
    pad4(out);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packet_block_has_the_draft_layout() {
        let mut file = Vec::new();
        let mut writer = Writer::new(
            &mut file,
            Format::Pcapng,
            &Section::default(),
            0,
            Linktype::ETHERNET,
        )
        .unwrap();
        let interface = writer
            .add_interface(&Interface::new("v0", Linktype::ETHERNET))
            .unwrap();
        let start = writer.written() as usize;
        let packet = Packet {
            interface,
            ts: 0x0102_0304_0506_0708,
            len: 100,
            data: &[1, 2, 3, 4, 5],
            id: Some(7),
            verdict: Some(1),
            ..Packet::default()
        };
        writer.packet(&packet).unwrap();
        assert_eq!(writer.written() as usize, file.len());
        let block = &file[start..];
        let mut want: Vec<u8> = Vec::new();
        put32(&mut want, 6);
        put32(&mut want, block.len() as u32);
        put32(&mut want, 0);
        put32(&mut want, 0x0102_0304);
        put32(&mut want, 0x0506_0708);
        put32(&mut want, 5);
        put32(&mut want, 100);
        want.extend_from_slice(&[1, 2, 3, 4, 5, 0, 0, 0]);
        want.extend_from_slice(&[5, 0, 8, 0, 7, 0, 0, 0, 0, 0, 0, 0]);
        want.extend_from_slice(&[7, 0, 9, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        want.extend_from_slice(&[0, 0, 0, 0]);
        put32(&mut want, block.len() as u32);
        assert_eq!(block, want);
    }

    #[test]
    fn classic_header_is_nanosecond_little_endian() {
        let mut file = Vec::new();
        let mut writer = Writer::new(
            &mut file,
            Format::Pcap,
            &Section::default(),
            96,
            Linktype::ETHERNET,
        )
        .unwrap();
        writer
            .packet(&Packet {
                ts: 3_000_000_007,
                len: 60,
                data: &[9; 4],
                ..Packet::default()
            })
            .unwrap();
        assert_eq!(&file[..4], &[0x4d, 0x3c, 0xb2, 0xa1]);
        assert_eq!(&file[16..24], &[96, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(
            &file[24..],
            &[3, 0, 0, 0, 7, 0, 0, 0, 4, 0, 0, 0, 60, 0, 0, 0, 9, 9, 9, 9]
        );
    }

    #[test]
    fn long_option_is_cut_between_characters() {
        let mut out = Vec::new();
        let text = "é".repeat(40_000);
        put_option(&mut out, OPT_COMMENT, text.as_bytes());
        let len = usize::from(u16::from_le_bytes([out[2], out[3]]));
        assert!(std::str::from_utf8(&out[4..4 + len]).is_ok());
        assert_eq!(out.len() % 4, 0);
    }
}
