//! `--write`: each event's packet in a pcapng file, with what happened to it as its comment.
//!
//! An interface block for each network namespace, interface and kind of first header: an skb begins with an Ethernet header in
//! one function and with that of IP in the next.

use std::collections::HashMap;
use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use anyhow::{Context, Result};

use crate::capture::pcapng::{
    Counters, Format, Interface, LINKTYPE_ETHERNET, Packet, Section, Writer,
};
use crate::kernel::clock::WallClock;
use crate::text::escape::escaped;

use super::decode::Event;

/// LINKTYPE_RAW: begins with an IP header, of version 4 or 6.
const LINKTYPE_RAW: u16 = 101;

/// What tells one interface block from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Place {
    netns: u32,
    ifindex: u32,
    ethernet: bool,
}

/// A capture file that is being written.
pub struct Capture {
    writer: Writer<BufWriter<File>>,
    name: String,
    snaplen: u32,
    places: HashMap<Place, (u32, u64)>,
    clock: WallClock,
    start: u64,
    last: u64,
}

impl Capture {
    pub fn create(path: &Path, snaplen: u32) -> Result<Self> {
        let name = path.display().to_string();
        let file = File::create(path).with_context(|| format!("failed to create {name}"))?;
        let section = Section {
            os: nix::sys::utsname::uname()
                .ok()
                .map(|u| format!("Linux {}", u.release().to_string_lossy())),
            application: Some(format!("netprobe {}", env!("CARGO_PKG_VERSION"))),
            ..Section::default()
        };
        let writer = Writer::new(BufWriter::new(file), Format::Pcapng, &section, snaplen)
            .with_context(|| format!("failed to write to {name}"))?;
        Ok(Self {
            writer,
            name,
            snaplen,
            places: HashMap::new(),
            clock: WallClock::new()?,
            start: 0,
            last: 0,
        })
    }

    /// Writes the event's packet. An event without bytes of IP or Ethernet is there too, with its comment and no bytes.
    pub fn packet(&mut self, event: &Event, comment: &str) -> Result<()> {
        let Some(data) = &event.data else {
            return Ok(());
        };
        let meta = event.meta.as_ref();
        let place = Place {
            netns: meta.map_or(0, |m| m.netns),
            ifindex: meta.map_or(0, |m| m.ifindex),
            ethernet: data.ethernet,
        };
        let known = self.places.get(&place).map(|(index, _)| *index);
        let interface = match known {
            Some(index) => index,
            None => self.add(place, meta.map_or(String::new(), |m| escaped(&m.ifname)))?,
        };
        let is_ip = data.bytes.first().is_some_and(|b| matches!(b >> 4, 4 | 6));
        let bytes = match data.bytes.get(..self.snaplen as usize) {
            Some(cut) => cut,
            None => &data.bytes[..],
        };
        self.last = self.clock.wall(event.head.ts);
        if self.start == 0 {
            self.start = self.last;
        }
        let packet = Packet {
            interface,
            ts: self.last,
            len: data.len,
            data: if data.ethernet || is_ip { bytes } else { &[] },
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
        let interface = Interface {
            name: if name.is_empty() {
                "(none)".to_string()
            } else {
                name
            },
            description: Some(format!(
                "netns {} ifindex {}{}",
                place.netns,
                place.ifindex,
                if place.ethernet { "" } else { ", from IP on" }
            )),
            linktype: if place.ethernet {
                LINKTYPE_ETHERNET
            } else {
                LINKTYPE_RAW
            },
            snaplen: self.snaplen,
            ..Interface::default()
        };
        let index = self.writer.add_interface(&interface);
        let index = index.with_context(|| format!("failed to write to {}", self.name))?;
        self.places.insert(place, (index, 0));
        Ok(index)
    }

    pub fn flush(&mut self) -> Result<()> {
        self.clock.refresh()?;
        let flushed = self.writer.flush();
        flushed.with_context(|| format!("failed to write to {}", self.name))
    }

    /// The statistics of each interface. Nobody knows which one a lost event was of: `lost` stands with the first.
    pub fn finish(mut self, lost: u64) -> Result<()> {
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
        self.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::head::Head;
    use crate::tools::skb::decode::Data;

    #[test]
    fn a_block_for_each_first_header() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut capture = Capture::create(file.path(), 64).unwrap();
        let mut event = Event {
            head: Head::default(),
            data: Some(Data {
                len: 100,
                ethernet: true,
                hatype: 1,
                bytes: vec![0; 64],
            }),
            ..Event::default()
        };
        capture.packet(&event, "dev_queue_xmit skb 0x1").unwrap();
        event.data.as_mut().unwrap().ethernet = false;
        capture.packet(&event, "arp_rcv skb 0x1").unwrap();
        assert_eq!(capture.places.len(), 2);
        capture.finish(3).unwrap();
        let bytes = std::fs::read(file.path()).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.contains("arp_rcv skb 0x1") && text.contains("netprobe"));
    }

    /// Stock tshark reads interfaces, comments and drop counts, and has nothing to say on stderr.
    #[test]
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
                meta: Some(crate::tools::skb::decode::Meta {
                    netns: 4_026_531_840,
                    mark: 0,
                    ifindex,
                    len: 28,
                    mtu: 1500,
                    protocol: 0x0800,
                    ifname: *b"veth0\0\0\0\0\0\0\0\0\0\0\0",
                }),
                data: Some(Data {
                    len: bytes.len() as u32,
                    ethernet,
                    hatype: 1,
                    bytes,
                }),
                ..Event::default()
            };
            capture.packet(&event, comment).unwrap();
        }
        capture.finish(5).unwrap();
        let run = |fields: &[&str]| {
            let mut tshark = std::process::Command::new("tshark");
            tshark.arg("-r").arg(file.path()).args(["-T", "fields"]);
            tshark.args(fields.iter().flat_map(|f| ["-e", *f])).output()
        };
        let Ok(output) = run(&["frame.interface_id", "udp.dstport", "frame.comment"]) else {
            println!("skipped: no tshark here");
            return;
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
        assert_eq!(rows[1], "1\t9\tdev_hard_start_xmit skb 0x1 cpu 0");
        assert!(rows[2].starts_with("2\t9\tkfree_skb_reason(SKB_DROP_REASON_NO_SOCKET)"));
    }
}
