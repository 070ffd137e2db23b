//! Reads capture files: pcapng (both byte orders, several sections) and classic pcap, micro- and nanoseconds.
//!
//! Files come from anywhere, so nothing here panics or trusts a length: a broken block ends the reading with an error.

use std::io::{self, Read};

use super::pcapng::{
    BLOCK_EPB, BLOCK_IDB, BLOCK_SHB, BLOCK_SPB, BYTE_ORDER, Direction, EPB_DROPCOUNT, EPB_FLAGS,
    EPB_PACKETID, EPB_QUEUE, EPB_VERDICT, IF_DESCRIPTION, IF_FILTER, IF_NAME, IF_TSOFFSET,
    IF_TSRESOL, Interface, LINKTYPE_ETHERNET, OPT_COMMENT, OPT_END, PCAP_MAGIC_NS, PCAP_MAGIC_US,
    Packet, VERDICT_XDP,
};

/// No block or packet of a sane file is larger.
const MAX_BLOCK: u32 = 64 << 20;

/// One packet as read; `as_packet` lends it to a writer or a printer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OwnedPacket {
    pub interface: u32,
    pub ts: u64,
    pub len: u32,
    pub data: Vec<u8>,
    pub direction: Option<Direction>,
    pub id: Option<u64>,
    pub queue: Option<u32>,
    pub verdict: Option<u64>,
    pub dropped: Option<u64>,
    pub comment: Option<String>,
}

impl OwnedPacket {
    pub fn as_packet(&self) -> Packet<'_> {
        Packet {
            interface: self.interface,
            ts: self.ts,
            len: self.len,
            data: &self.data,
            direction: self.direction,
            id: self.id,
            queue: self.queue,
            verdict: self.verdict,
            dropped: self.dropped,
            comment: self.comment.as_deref(),
        }
    }
}

#[derive(Clone, Debug)]
struct Source {
    interface: Interface,
    /// Timestamp units a second: a power of 10 or of 2.
    units: u64,
    offset: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Pcapng,
    Pcap { nanoseconds: bool },
}

/// Reads packets one by one.
pub struct Reader<R: Read> {
    input: R,
    kind: Kind,
    big_endian: bool,
    sources: Vec<Source>,
    /// Index in `sources` of this section's first interface.
    base: usize,
    body: Vec<u8>,
}

impl<R: Read> Reader<R> {
    /// Reads the file's head and tells the format by it.
    pub fn new(mut input: R) -> io::Result<Self> {
        let mut magic = [0; 4];
        input
            .read_exact(&mut magic)
            .map_err(|_| bad("not a capture file: shorter than 4 bytes"))?;
        let number = u32::from_le_bytes(magic);
        let mut reader = Reader {
            input,
            kind: Kind::Pcapng,
            big_endian: false,
            sources: Vec::new(),
            base: 0,
            body: Vec::new(),
        };
        if number == BLOCK_SHB {
            reader.section_header()?;
            return Ok(reader);
        }
        for (magic, nanoseconds) in [(PCAP_MAGIC_US, false), (PCAP_MAGIC_NS, true)] {
            if number == magic || number == magic.swap_bytes() {
                reader.kind = Kind::Pcap { nanoseconds };
                reader.big_endian = number != magic;
                reader.pcap_header()?;
                return Ok(reader);
            }
        }
        Err(bad("not a capture file: neither pcapng nor pcap"))
    }

    /// The interfaces seen so far; those of a pcapng file come before their packets.
    pub fn interface(&self, index: u32) -> Option<&Interface> {
        self.sources
            .get(index as usize)
            .map(|source| &source.interface)
    }

    /// The next packet, or nothing at the end of the file.
    pub fn next_packet(&mut self) -> io::Result<Option<OwnedPacket>> {
        match self.kind {
            Kind::Pcap { nanoseconds } => self.pcap_packet(nanoseconds),
            Kind::Pcapng => self.pcapng_packet(),
        }
    }

    fn pcap_header(&mut self) -> io::Result<()> {
        let mut head = [0; 20];
        self.input
            .read_exact(&mut head)
            .map_err(|_| bad("pcap header is cut"))?;
        let linktype = (self.u32(&head, 16) & 0xffff) as u16;
        let snaplen = self.u32(&head, 12);
        let interface = Interface {
            snaplen,
            linktype,
            ..Interface::default()
        };
        self.sources.push(Source {
            interface,
            units: 1_000_000_000,
            offset: 0,
        });
        Ok(())
    }

    fn pcap_packet(&mut self, nanoseconds: bool) -> io::Result<Option<OwnedPacket>> {
        let mut head = [0; 16];
        if !read_or_end(&mut self.input, &mut head)? {
            return Ok(None);
        }
        let fraction = u64::from(self.u32(&head, 4)) * if nanoseconds { 1 } else { 1000 };
        let captured = self.u32(&head, 8);
        let len = self.u32(&head, 12);
        let ts = u64::from(self.u32(&head, 0))
            .saturating_mul(1_000_000_000)
            .saturating_add(fraction);
        let data = read_bytes(&mut self.input, captured)?;
        Ok(Some(OwnedPacket {
            ts,
            len,
            data,
            ..OwnedPacket::default()
        }))
    }

    /// Reads a section header, its type already taken.
    fn section_header(&mut self) -> io::Result<()> {
        let mut head = [0; 8];
        self.input
            .read_exact(&mut head)
            .map_err(|_| bad("section header is cut"))?;
        let order = [head[4], head[5], head[6], head[7]];
        self.big_endian = match u32::from_le_bytes(order) {
            BYTE_ORDER => false,
            other if other.swap_bytes() == BYTE_ORDER => true,
            _ => return Err(bad("section header has no byte-order magic")),
        };
        let total = self.u32(&head, 0);
        if total < 28 || total % 4 != 0 || total > MAX_BLOCK {
            return Err(bad("section header has a wrong length"));
        }
        self.body = read_bytes(&mut self.input, total - 12)?;
        self.base = self.sources.len();
        Ok(())
    }

    fn pcapng_packet(&mut self) -> io::Result<Option<OwnedPacket>> {
        loop {
            let mut kind = [0; 4];
            if !read_or_end(&mut self.input, &mut kind)? {
                return Ok(None);
            }
            if u32::from_le_bytes(kind) == BLOCK_SHB {
                self.section_header()?;
                continue;
            }
            let kind = self.u32(&kind, 0);
            let mut length = [0; 4];
            self.input
                .read_exact(&mut length)
                .map_err(|_| bad("block is cut"))?;
            let total = self.u32(&length, 0);
            if total < 12 || total % 4 != 0 || total > MAX_BLOCK {
                return Err(bad("block has a wrong length"));
            }
            let mut body = read_bytes(&mut self.input, total - 8)?;
            body.truncate(total as usize - 12);
            match kind {
                BLOCK_IDB => self.interface_block(&body)?,
                BLOCK_EPB => return self.enhanced_packet(&body).map(Some),
                BLOCK_SPB => return self.simple_packet(&body).map(Some),
                _ => {}
            }
        }
    }

    fn interface_block(&mut self, body: &[u8]) -> io::Result<()> {
        if body.len() < 8 {
            return Err(bad("interface block is cut"));
        }
        let mut source = Source {
            interface: Interface {
                linktype: self.u16(body, 0),
                snaplen: self.u32(body, 4),
                ..Interface::default()
            },
            units: 1_000_000,
            offset: 0,
        };
        for (code, value) in self.options(&body[8..]) {
            match (code, value) {
                (IF_NAME, text) => source.interface.name = lossy(text),
                (IF_DESCRIPTION, text) => source.interface.description = Some(lossy(text)),
                (IF_FILTER, [0, text @ ..]) => source.interface.filter = Some(lossy(text)),
                (IF_TSRESOL, [resolution]) => source.units = units(*resolution)?,
                (IF_TSOFFSET, value) if value.len() == 8 => {
                    source.offset = self.u64(value, 0) as i64
                }
                _ => {}
            }
        }
        self.sources.push(source);
        Ok(())
    }

    fn enhanced_packet(&self, body: &[u8]) -> io::Result<OwnedPacket> {
        if body.len() < 20 {
            return Err(bad("packet block is cut"));
        }
        let index = self.base + self.u32(body, 0) as usize;
        let source = self
            .sources
            .get(index)
            .ok_or_else(|| bad("packet of an interface that was not described"))?;
        let raw = u64::from(self.u32(body, 4)) << 32 | u64::from(self.u32(body, 8));
        let captured = self.u32(body, 12) as usize;
        let padded = captured
            .checked_next_multiple_of(4)
            .ok_or_else(|| bad("packet is longer than its block"))?;
        let data = body
            .get(20..20 + captured)
            .ok_or_else(|| bad("packet is longer than its block"))?;
        let mut packet = OwnedPacket {
            interface: index as u32,
            ts: wall_clock(raw, source.units, source.offset),
            len: self.u32(body, 16),
            data: data.to_vec(),
            ..OwnedPacket::default()
        };
        for (code, value) in self.options(body.get(20 + padded..).unwrap_or_default()) {
            match (code, value.len()) {
                (OPT_COMMENT, _) => packet.comment = Some(lossy(value)),
                (EPB_FLAGS, 4) => {
                    packet.direction = match self.u32(value, 0) & 3 {
                        1 => Some(Direction::Inbound),
                        2 => Some(Direction::Outbound),
                        _ => None,
                    }
                }
                (EPB_DROPCOUNT, 8) => packet.dropped = Some(self.u64(value, 0)),
                (EPB_PACKETID, 8) => packet.id = Some(self.u64(value, 0)),
                (EPB_QUEUE, 4) => packet.queue = Some(self.u32(value, 0)),
                (EPB_VERDICT, 9) if value[0] == VERDICT_XDP => {
                    packet.verdict = Some(self.u64(value, 1))
                }
                _ => {}
            }
        }
        Ok(packet)
    }

    /// A simple packet block: interface 0, no time.
    fn simple_packet(&self, body: &[u8]) -> io::Result<OwnedPacket> {
        let source = self
            .sources
            .get(self.base)
            .ok_or_else(|| bad("packet before any interface"))?;
        if body.len() < 4 {
            return Err(bad("packet block is cut"));
        }
        let len = self.u32(body, 0);
        let mut captured = (len as usize).min(body.len() - 4);
        if source.interface.snaplen != 0 {
            captured = captured.min(source.interface.snaplen as usize);
        }
        let data = body[4..4 + captured].to_vec();
        Ok(OwnedPacket {
            interface: self.base as u32,
            len,
            data,
            ..OwnedPacket::default()
        })
    }

    /// The options of a block: code and value, up to the end mark or the first broken one.
    fn options<'b>(&self, mut rest: &'b [u8]) -> Vec<(u16, &'b [u8])> {
        let mut found = Vec::new();
        while rest.len() >= 4 {
            let (code, len) = (self.u16(rest, 0), usize::from(self.u16(rest, 2)));
            let Some(value) = rest.get(4..4 + len) else {
                break;
            };
            if code == OPT_END {
                break;
            }
            found.push((code, value));
            rest = rest.get(4 + len.next_multiple_of(4)..).unwrap_or_default();
        }
        found
    }

    fn u16(&self, bytes: &[u8], at: usize) -> u16 {
        let value = bytes.get(at..at + 2).map_or([0; 2], |b| [b[0], b[1]]);
        if self.big_endian {
            u16::from_be_bytes(value)
        } else {
            u16::from_le_bytes(value)
        }
    }

    fn u32(&self, bytes: &[u8], at: usize) -> u32 {
        let value = bytes
            .get(at..at + 4)
            .map_or([0; 4], |b| [b[0], b[1], b[2], b[3]]);
        if self.big_endian {
            u32::from_be_bytes(value)
        } else {
            u32::from_le_bytes(value)
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

/// Whether a link type's packets are Ethernet frames, which is all that the printers know.
pub fn is_ethernet(interface: &Interface) -> bool {
    interface.linktype == LINKTYPE_ETHERNET
}

/// Timestamp units a second of an `if_tsresol` octet.
fn units(resolution: u8) -> io::Result<u64> {
    let exponent = u32::from(resolution & 0x7f);
    let base: u64 = if resolution & 0x80 == 0 { 10 } else { 2 };
    base.checked_pow(exponent)
        .ok_or_else(|| bad("interface has an impossible timestamp resolution"))
}

fn wall_clock(raw: u64, units: u64, offset: i64) -> u64 {
    let units = u128::from(units.max(1));
    let ns = u128::from(raw) * 1_000_000_000 / units;
    let ns = ns as i128 + i128::from(offset) * 1_000_000_000;
    ns.clamp(0, i128::from(u64::MAX)) as u64
}

fn lossy(text: &[u8]) -> String {
    String::from_utf8_lossy(text)
        .trim_end_matches('\0')
        .to_owned()
}

fn bad(text: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// Fills `out`, or returns false when the input ends right here.
fn read_or_end(input: &mut impl Read, out: &mut [u8]) -> io::Result<bool> {
    let mut filled = 0;
    while filled < out.len() {
        match input.read(&mut out[filled..]) {
            Ok(0) if filled == 0 => return Ok(false),
            Ok(0) => return Err(bad("file is cut in the middle of a packet")),
            Ok(n) => filled += n,
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(err) => return Err(err),
        }
    }
    Ok(true)
}

/// Reads `len` bytes without trusting `len` for the allocation.
fn read_bytes(input: &mut impl Read, len: u32) -> io::Result<Vec<u8>> {
    if len > MAX_BLOCK {
        return Err(bad("packet is impossibly long"));
    }
    let mut out = Vec::new();
    input.take(u64::from(len)).read_to_end(&mut out)?;
    if out.len() < len as usize {
        return Err(bad("file is cut in the middle of a packet"));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::super::pcapng::{Counters, Format, Section, Writer};
    use super::*;
    use proptest::prelude::*;

    fn read_all(file: &[u8]) -> io::Result<Vec<OwnedPacket>> {
        let mut reader = Reader::new(file)?;
        let mut all = Vec::new();
        while let Some(packet) = reader.next_packet()? {
            all.push(packet);
        }
        Ok(all)
    }

    fn sample(format: Format) -> (Vec<u8>, OwnedPacket) {
        let mut file = Vec::new();
        let section = Section {
            comment: Some("é".into()),
            ..Section::default()
        };
        let mut writer = Writer::new(&mut file, format, &section, 0).unwrap();
        let described = Interface {
            description: Some("exit".into()),
            filter: Some("icmp".into()),
            snaplen: 64,
            ..Interface::ethernet("v0")
        };
        writer.add_interface(&Interface::ethernet("other")).unwrap();
        let interface = writer.add_interface(&described).unwrap();
        let packet = OwnedPacket {
            interface,
            ts: 1_790_000_000_123_456_789,
            len: 98,
            data: (0..61).collect(),
            direction: Some(Direction::Inbound),
            id: Some(u64::MAX - 1),
            queue: Some(3),
            verdict: Some(4),
            dropped: Some(12),
            comment: Some("why".into()),
        };
        writer.packet(&packet.as_packet()).unwrap();
        let counters = Counters {
            end: packet.ts,
            delivered: Some(1),
            ..Counters::default()
        };
        writer.statistics(interface, &counters).unwrap();
        (file, packet)
    }

    #[test]
    fn pcapng_comes_back_as_written() {
        let (file, packet) = sample(Format::Pcapng);
        assert_eq!(read_all(&file).unwrap(), vec![packet]);
        let mut reader = Reader::new(file.as_slice()).unwrap();
        reader.next_packet().unwrap();
        let interface = reader.interface(1).unwrap();
        assert_eq!(
            (interface.name.as_str(), interface.filter.as_deref()),
            ("v0", Some("icmp"))
        );
        assert!(is_ethernet(interface));
    }

    #[test]
    fn pcap_keeps_time_length_and_bytes() {
        let (file, packet) = sample(Format::Pcap);
        let want = OwnedPacket {
            ts: packet.ts,
            len: packet.len,
            data: packet.data,
            ..OwnedPacket::default()
        };
        assert_eq!(read_all(&file).unwrap(), vec![want]);
    }

    #[test]
    fn big_endian_microsecond_pcap() {
        let mut file = PCAP_MAGIC_US.to_be_bytes().to_vec();
        file.extend([
            0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 1,
        ]);
        file.extend([0, 0, 0, 2, 0, 0, 0, 5, 0, 0, 0, 1, 0, 0, 0, 60, 0xaa]);
        let packet = read_all(&file).unwrap().remove(0);
        assert_eq!(
            (packet.ts, packet.len, packet.data),
            (2_000_005_000, 60, vec![0xaa])
        );
    }

    #[test]
    fn resolutions() {
        assert_eq!(wall_clock(5, units(6).unwrap(), 0), 5_000);
        assert_eq!(wall_clock(3, units(0x81).unwrap(), 1), 2_500_000_000);
        assert!(units(0x7f).is_err());
    }

    #[test]
    fn cut_files_are_errors_not_panics() {
        for format in [Format::Pcapng, Format::Pcap] {
            let (file, _) = sample(format);
            for end in 0..file.len() {
                let _ = read_all(&file[..end]);
            }
            assert!(read_all(&file[..3]).is_err());
        }
    }

    proptest! {
        #[test]
        fn any_damage_is_survived(at in 0usize..400, value: u8, tail in proptest::collection::vec(any::<u8>(), 0..64)) {
            let (mut file, _) = sample(Format::Pcapng);
            let at = at % file.len();
            file[at] = value;
            file.extend(tail);
            let _ = read_all(&file);
        }
    }
}
