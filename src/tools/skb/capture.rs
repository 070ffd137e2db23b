//! `--write`: each event's packet in a pcapng file, with what happened to it as its comment.
//!
//! An interface block for each network namespace and interface. An skb begins with an Ethernet header in one function and with that of
//! IP in the next, and most programs read files of one link type only. Every packet is written as an Ethernet frame: where there is
//! no such header, one is made up, and the comment says so.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};

use crate::capture::linktype::Linktype;
use crate::capture::pcapng::{Counters, Format, Interface, Packet, Section, Writer};
use crate::event::link;
use crate::run::stream::Stream;
use crate::text::escape::escaped;

use super::event::{Data, Event};

/// What tells one interface block from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Place {
    netns: u32,
    ifindex: u32,
}

/// A packet as an Ethernet frame.
pub struct Frame<'d> {
    pub bytes: Cow<'d, [u8]>,
    /// Of the whole frame.
    pub len: u32,
    made_up: bool,
}

impl<'d> Frame<'d> {
    /// The first `most` bytes, with the tag beside the packet. No bytes where the packet is neither Ethernet nor IP.
    pub fn of(data: &'d Data, most: usize) -> Self {
        let bytes = data.bytes.get(..most).unwrap_or(&data.bytes);
        if let (true, Some((kind, tag)), Some((macs, rest))) =
            (data.ethernet, data.vlan, bytes.split_at_checked(12))
        {
            let tag = [kind.to_be_bytes(), tag.to_be_bytes()].concat();
            return Frame {
                len: data.len + tag.len() as u32,
                bytes: [macs, &tag, rest].concat().into(),
                made_up: false,
            };
        }
        let header = match data.ethernet {
            true => None,
            false => link::made_up_header(bytes),
        };
        match header {
            Some(header) => Frame {
                bytes: [&header[..], bytes].concat().into(),
                len: data.len + header.len() as u32,
                made_up: true,
            },
            None => Frame {
                bytes: if data.ethernet { bytes } else { &[] }.into(),
                len: data.len,
                made_up: false,
            },
        }
    }
}

/// A capture file that is being written.
pub struct Capture<W: Write> {
    writer: Writer<W>,
    name: String,
    snaplen: u32,
    places: HashMap<Place, (u32, u64)>,
    start: u64,
    last: u64,
}

impl Capture<BufWriter<Stream>> {
    pub fn create(path: &Path, snaplen: u32) -> Result<Self> {
        let name = path.display().to_string();
        let file = Stream::create(path).with_context(|| format!("failed to create {name}"))?;
        Self::begin(BufWriter::new(file), name, snaplen)
    }
}

impl<W: Write> Capture<W> {
    /// `name`: of what `out` writes to.
    pub fn begin(out: W, name: String, snaplen: u32) -> Result<Self> {
        let section = Section {
            os: nix::sys::utsname::uname()
                .ok()
                .map(|u| format!("Linux {}", u.release().to_string_lossy())),
            application: Some(format!("netprobe {}", env!("CARGO_PKG_VERSION"))),
            ..Section::default()
        };
        let writer = Writer::new(out, Format::Pcapng, &section, snaplen, Linktype::ETHERNET)
            .with_context(|| format!("failed to write to {name}"))?;
        Ok(Self {
            writer,
            name,
            snaplen,
            places: HashMap::new(),
            start: 0,
            last: 0,
        })
    }

    /// Where the bytes go.
    pub fn target(&mut self) -> &mut W {
        self.writer.target()
    }

    /// Writes the event's packet; `wall`: its time. An event without bytes of IP or Ethernet is there too, with its comment and no bytes.
    pub fn packet(&mut self, event: &Event, wall: u64, comment: &str) -> Result<()> {
        let Some(data) = &event.data else {
            return Ok(());
        };
        let meta = event.meta.as_ref();
        let place = Place {
            netns: meta.map_or(0, |m| m.netns),
            ifindex: meta.map_or(0, |m| m.ifindex),
        };
        let known = self.places.get(&place).map(|(index, _)| *index);
        let interface = match known {
            Some(index) => index,
            None => self.add(place, meta.map_or(String::new(), |m| escaped(&m.ifname)))?,
        };
        let frame = Frame::of(data, self.snaplen as usize);
        let comment = match frame.made_up {
            true => &format!("{comment} ({})", link::MADE_UP),
            false => comment,
        };
        self.last = wall;
        if self.start == 0 {
            self.start = self.last;
        }
        let packet = Packet {
            interface,
            ts: self.last,
            len: frame.len,
            data: &frame.bytes,
            comment: Some(comment),
            ..Packet::default()
        };
        let written = self.writer.packet(&packet);
        written.with_context(|| format!("failed to write to {}", self.name))?;
        if let Some((_, count)) = self.places.get_mut(&place) {
            *count += 1;
        }
        Ok(())
    }

    fn add(&mut self, place: Place, name: String) -> Result<u32> {
        let name = if name.is_empty() {
            "(none)".to_string()
        } else {
            name
        };
        let interface = Interface {
            description: Some(format!("netns {} ifindex {}", place.netns, place.ifindex)),
            snaplen: self.snaplen + link::MADE_UP_LEN,
            ..Interface::new(name, Linktype::ETHERNET)
        };
        let index = self.writer.add_interface(&interface);
        let index = index.with_context(|| format!("failed to write to {}", self.name))?;
        self.places.insert(place, (index, 0));
        Ok(index)
    }

    pub fn flush(&mut self) -> Result<()> {
        let flushed = self.writer.flush();
        flushed.with_context(|| format!("failed to write to {}", self.name))
    }

    /// The end of the file.
    pub fn finish(mut self, lost: u64) -> Result<()> {
        self.statistics(lost)?;
        self.flush()
    }

    /// The statistics of each interface. Nobody knows which one a lost event was of: `lost` stands with the first.
    pub fn statistics(&mut self, lost: u64) -> Result<()> {
        let mut places: Vec<(u32, u64)> = self.places.values().copied().collect();
        places.sort_unstable();
        for (index, delivered) in places {
            let counters = Counters {
                start: self.start,
                end: self.last,
                dropped: Some(if index == 0 { lost } else { 0 }),
                delivered: Some(delivered),
                ..Counters::default()
            };
            let written = self.writer.statistics(index, &counters);
            written.with_context(|| format!("failed to write to {}", self.name))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::head::Head;
    use crate::tools::skb::event::Data;

    #[test]
    fn one_link_type_whatever_the_first_header() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut capture = Capture::create(file.path(), 64).unwrap();
        let mut event = Event {
            head: Head::default(),
            data: Some(Data {
                len: 100,
                ethernet: true,
                hatype: 1,
                vlan: None,
                bytes: vec![0; 64],
            }),
            ..Event::default()
        };
        capture.packet(&event, 1, "dev_queue_xmit skb 0x1").unwrap();
        let data = event.data.as_mut().unwrap();
        (data.ethernet, data.bytes[0]) = (false, 0x60);
        capture.packet(&event, 1, "ip6_output skb 0x1").unwrap();
        event.data.as_mut().unwrap().bytes[0] = 0;
        capture.packet(&event, 1, "arp_rcv skb 0x1").unwrap();
        assert_eq!(capture.places.len(), 1);
        capture.finish(3).unwrap();
        let mut reader = crate::capture::savefile::Reader::open(file.path()).unwrap();
        assert_eq!(reader.linktype(), Linktype::ETHERNET);
        let packets: Vec<_> = std::iter::from_fn(|| reader.next_packet().unwrap()).collect();
        let seen = packets.iter().map(|p| (p.bytes.len(), p.wire_len));
        assert_eq!(seen.collect::<Vec<_>>(), [(64, 100), (78, 114), (0, 100)]);
        let comments = packets.iter().map(|p| p.note.comment.as_deref().unwrap());
        let wanted = [
            "dev_queue_xmit skb 0x1",
            "ip6_output skb 0x1 (made-up Ethernet header)",
            "arp_rcv skb 0x1",
        ];
        assert_eq!(comments.collect::<Vec<_>>(), wanted);
        assert_eq!(packets[1].bytes[12..15], [0x86, 0xdd, 0x60]);
    }

    /// Stock tshark reads interfaces, comments and drop counts, and has nothing to say on stderr.
    #[test]
    #[cfg_attr(not(has_tshark), ignore = "needs tshark")]
    fn tshark_reads_it_without_a_warning() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut capture = Capture::create(file.path(), 64).unwrap();
        let ip = [
            0x45, 0, 0, 28, 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 0, 9, 0, 9, 0,
            8, 0, 0,
        ];
        let mut frame = vec![2; 12];
        frame.extend([8, 0]);
        frame.extend(ip);
        for (ethernet, bytes, ifindex, comment) in [
            (false, ip.to_vec(), 0, "ip_output skb 0x1 cpu 0 \u{fe}"),
            (true, frame.clone(), 3, "dev_hard_start_xmit skb 0x1 cpu 0"),
            (
                true,
                frame,
                4,
                "kfree_skb_reason(SKB_DROP_REASON_NO_SOCKET) skb 0x1",
            ),
            (true, Vec::new(), 4, "consume_skb skb 0x1"),
        ] {
            let event = Event {
                head: Head::default(),
                meta: Some(crate::tools::skb::event::Meta {
                    netns: 4_026_531_840,
                    mark: 0,
                    ifindex,
                    len: 28,
                    mtu: 1500,
                    protocol: 0x0800,
                    vlan: None,
                    ifname: *b"veth0\0\0\0\0\0\0\0\0\0\0\0",
                }),
                data: Some(Data {
                    len: bytes.len() as u32,
                    ethernet,
                    hatype: 1,
                    vlan: (ifindex == 4).then_some((0x8100, 0x2005)),
                    bytes,
                }),
                ..Event::default()
            };
            capture.packet(&event, 1, comment).unwrap();
        }
        capture.finish(5).unwrap();
        let run = |fields: &[&str]| {
            let mut tshark = std::process::Command::new("tshark");
            tshark.arg("-r").arg(file.path()).args(["-T", "fields"]);
            tshark.args(fields.iter().flat_map(|f| ["-e", *f])).output()
        };
        let Ok(output) = run(&[
            "frame.interface_id",
            "udp.dstport",
            "frame.comment",
            "vlan.id",
        ]) else {
            panic!("failed to start tshark");
        };
        // Root is told off by some versions.
        let stderr = String::from_utf8_lossy(&output.stderr);
        let said: Vec<&str> = stderr
            .lines()
            .filter(|l| !l.is_empty() && !l.contains("Running as user \"root\""))
            .collect();
        assert!(output.status.success() && said.is_empty(), "{said:?}");
        let rows = String::from_utf8_lossy(&output.stdout);
        let rows: Vec<&str> = rows.lines().collect();
        assert_eq!(rows.len(), 4, "{rows:?}");
        assert!(rows[0].starts_with("0\t9\tip_output") && rows[0].contains("made-up Ethernet"));
        assert_eq!(rows[1], "1\t9\tdev_hard_start_xmit skb 0x1 cpu 0\t");
        assert!(rows[2].starts_with("2\t9\tkfree_skb_reason(SKB_DROP_REASON_NO_SOCKET)"));
        assert!(rows[2].ends_with("\t5"), "no tag: {rows:?}");
    }
}
