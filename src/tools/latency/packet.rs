//! Bytes of an event (src/bpf/latency/latency.h) to a slow packet. Pure; short or odd data gives `None`.

use crate::bpf::latency::types::{
    lat_flag, lat_kind, lat_packet, lat_reader, lat_sent, np_head, np_tuple,
};
use crate::bpf::read;
use crate::event::tuple::{Tuple, address};
use crate::tools::icmp::decode as softirq;

use super::stages::{Stage, Way};

const KIND_PACKET: u16 = lat_kind::LAT_KIND_PACKET.0 as u16;
const KIND_READER: u16 = lat_kind::LAT_KIND_READER.0 as u16;
const KIND_SENT: u16 = lat_kind::LAT_KIND_SENT.0 as u16;

/// An event of any kind.
#[allow(clippy::large_enum_variant, reason = "short-lived, never stored")]
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    Packet(Packet),
    /// before the packet that it is about
    Reader(Reader),
    /// before the packet that it is about
    Sent(Sent),
    Softirq(softirq::Message),
}

/// What a process that read late did since it had read before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reader {
    /// [`Packet::ts`]
    pub packet: u64,
    /// ns; when it read before
    pub since: u64,
    /// the longest time off its CPU, ns of CLOCK_MONOTONIC
    pub off: (u64, u64),
    /// ns on a CPU since then, and ns in which it wanted one
    pub ran: u64,
    pub waited: u64,
    /// task_struct.__state in that time
    pub state: u32,
    /// kernel addresses, innermost first
    pub stack: Vec<u64>,
}

/// The last packets that left a device: time, bytes, whose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sent {
    pub netns: u32,
    pub ifindex: u32,
    pub frames: Vec<(u64, u32, Option<Tuple>)>,
}

/// A process that wrote or read a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    pub tgid: u32,
    /// id (v2)
    pub cgroup: u64,
    /// NUL-padded
    comm: [u8; 16],
}

impl Owner {
    pub fn comm(&self) -> &[u8] {
        let end = self.comm.iter().position(|&byte| byte == 0);
        &self.comm[..end.unwrap_or(self.comm.len())]
    }
}

/// A packet that took long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// the last place, ns of CLOCK_MONOTONIC
    pub ts: u64,
    pub way: Way,
    /// the stages that it passed, and their ns, in the order of [`Stage::all`]
    pub stages: Vec<(Stage, u64)>,
    pub total: u64,
    pub tuple: Option<Tuple>,
    pub owner: Option<Owner>,
    pub netns: u32,
    pub ifindex: u32,
    pub len: u32,
    pub cpu: u16,
    /// packets in the queue of the device before it
    pub backlog: u32,
    /// kind of that queue, NUL-padded
    pub qdisc: [u8; 16],
    /// when it came into that queue, ns of CLOCK_MONOTONIC
    pub queued: u64,
    /// of stage write: by the peer's window, by the send buffer; parts of 1,000
    pub limited: Option<(u64, u64)>,
    pub split: bool,
    pub again: bool,
    pub hole: bool,
    /// read by a process, or given to a driver
    pub whole: bool,
    /// of a request: which end serves is a guess by the ports
    pub by_port: bool,
}

/// Decodes one event, without the padding that perf adds.
pub fn decode(bytes: &[u8]) -> Option<Message> {
    let (head, _) = read::<np_head>(bytes)?;
    match head.kind {
        KIND_PACKET => packet(bytes).map(Message::Packet),
        KIND_READER => reader(bytes).map(Message::Reader),
        KIND_SENT => sent(bytes).map(Message::Sent),
        _ => match softirq::decode(bytes)? {
            softirq::Message::Event(_) => None,
            message => Some(Message::Softirq(message)),
        },
    }
}

fn reader(bytes: &[u8]) -> Option<Reader> {
    let (r, _) = read::<lat_reader>(bytes)?;
    let frames = (r.len as usize / size_of::<u64>()).min(r.stack.len());
    Some(Reader {
        packet: r.packet,
        since: r.since,
        off: (r.from, r.to),
        ran: r.ran,
        waited: r.waited,
        state: r.state,
        stack: r.stack[..frames].to_vec(),
    })
}

fn sent(bytes: &[u8]) -> Option<Sent> {
    let (s, _) = read::<lat_sent>(bytes)?;
    let used = s.frame.iter().filter(|f| f.ts != 0);
    Some(Sent {
        netns: s.netns,
        ifindex: s.ifindex,
        frames: used.map(|f| (f.ts, f.len, tuple(&f.tuple))).collect(),
    })
}

fn packet(bytes: &[u8]) -> Option<Packet> {
    let (p, _) = read::<lat_packet>(bytes)?;
    let has = |flag: lat_flag| u32::from(p.flags) & flag.0 != 0;
    let stage = |stage: Stage| {
        let ns = *p.stage.get(stage.0 as usize)?;
        (p.seen & 1 << stage.0 != 0).then_some((stage, ns))
    };
    Some(Packet {
        ts: p.last,
        way: Way(p.way.into()),
        stages: Stage::all().filter_map(stage).collect(),
        total: p.last.saturating_sub(p.first),
        tuple: tuple(&p.tuple),
        owner: (p.tgid != 0).then_some(Owner {
            tgid: p.tgid,
            cgroup: p.cgroup,
            comm: p.comm,
        }),
        netns: p.netns,
        ifindex: p.ifindex,
        len: p.len,
        cpu: p.cpu,
        backlog: p.backlog,
        qdisc: p.qdisc,
        queued: p.queued,
        limited: limited(&p).filter(|_| has(lat_flag::LAT_FLAG_LIMITS)),
        split: has(lat_flag::LAT_FLAG_SPLIT),
        again: has(lat_flag::LAT_FLAG_AGAIN),
        hole: has(lat_flag::LAT_FLAG_HOLE),
        whole: has(lat_flag::LAT_FLAG_WHOLE),
        by_port: has(lat_flag::LAT_FLAG_BY_PORT),
    })
}

/// Parts of 1,000 of the time in which the segment waited to be sent.
fn limited(p: &lat_packet) -> Option<(u64, u64)> {
    let [window, buffer, all] = p.limited.map(u64::from);
    let part = |n: u64| (n * 1000).checked_div(all).map(|part| part.min(1000));
    Some((part(window)?, part(buffer)?))
}

impl Packet {
    /// ns in a stage; `None` where it did not pass it.
    pub fn spent(&self, stage: Stage) -> Option<u64> {
        let mut all = self.stages.iter();
        all.find(|(s, _)| *s == stage).map(|(_, ns)| *ns)
    }
}

fn tuple(t: &np_tuple) -> Option<Tuple> {
    matches!(t.l3_version, 4 | 6).then(|| Tuple {
        saddr: address(t.saddr, t.l3_version),
        daddr: address(t.daddr, t.l3_version),
        sport: t.sport,
        dport: t.dport,
        proto: t.l4_proto,
        tcp_flags: t.tcp_flags,
        icmp_type: t.icmp_type,
        icmp_code: t.icmp_code,
        fragment: t.fragment != 0,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use crate::event::head::any_event;

    use super::*;
    use crate::bpf::bytes_of;
    use crate::bpf::latency::types::lat_stage;

    #[test]
    fn stages_of_a_packet() {
        let mut raw = lat_packet {
            first: 100,
            last: 175,
            seen: 1 << lat_stage::LAT_WRITE.0 | 1 << lat_stage::LAT_QDISC.0,
            way: 1,
            ..lat_packet::default()
        };
        raw.head.kind = KIND_PACKET;
        raw.stage[lat_stage::LAT_WRITE.0 as usize] = 25;
        raw.stage[lat_stage::LAT_QDISC.0 as usize] = 50;
        let packet = packet(bytes_of(&raw)).unwrap();
        let stages: Vec<_> = packet
            .stages
            .iter()
            .map(|(s, ns)| (s.name(), *ns))
            .collect();
        assert_eq!(stages, [("write", 25), ("qdisc", 50)]);
        assert_eq!((packet.total, packet.way.name()), (75, "out"));
        assert!(packet.tuple.is_none() && packet.owner.is_none());
    }

    #[test]
    fn short_and_odd_bytes() {
        assert!(decode(&[]).is_none());
        let raw = lat_packet::default();
        assert!(decode(bytes_of(&raw)).is_none(), "a kind that is none");
        let mut odd = bytes_of(&raw).to_vec();
        odd.fill(0xff);
        odd[12..14].copy_from_slice(&KIND_PACKET.to_ne_bytes());
        let Some(Message::Packet(packet)) = decode(&odd) else {
            panic!("no packet")
        };
        assert_eq!(packet.way.name(), "unknown");
        assert!(packet.tuple.is_none());
        let mut reader = bytes_of(&lat_reader {
            len: u32::MAX,
            ..lat_reader::default()
        })
        .to_vec();
        reader[12..14].copy_from_slice(&KIND_READER.to_ne_bytes());
        let Some(Message::Reader(reader)) = decode(&reader) else {
            panic!("no reader")
        };
        assert_eq!(reader.stack.len(), 24);
    }

    proptest! {
        #[test]
        fn any_bytes(bytes in any_event()) {
            let _ = decode(&bytes);
        }
    }
}
