//! The JSON form of an event: one object a line. Zeros are kept; a field is missing only where its section was not asked for
//! or does not apply.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::event::tuple::Tuple;
use crate::event::tuple::proto_name;
use crate::kernel::ksyms::Symbol;
use crate::text::escape::{Escaped, escaped};
use crate::text::format::{Addr, Hex};

use super::decode::{Event, MapCall, Owner, Packet, Point};
use super::drops::{Copies, Drop, Listen};
use super::extras::cb_words;
use super::netfilter::{Hook, Legacy, Nft};
use super::programs::Program;

/// An event.
#[derive(Serialize)]
pub struct Row<'a> {
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub ts_ns: u64,
    pub wall_ns: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since_ns: Option<u64>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub late: bool,
    pub skb: Hex,
    pub cpu: u16,
    pub pid: u32,
    pub tid: u32,
    pub comm: Escaped<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub func: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub location: Option<Frame<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retval: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub program: Option<ProgramRow>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub map: Option<MapRow>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subsystem: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packet: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<Option<OwnerRow>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub netns: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub netns_name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mark: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ifindex: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iface: Option<Escaped<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<u16>,
    /// id of the tag beside the packet
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vlan: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vlan_priority: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub len: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tuple: Option<TupleRow>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tunnel: Option<TupleRow>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cb: Option<Vec<String>>,
    /// null where there was a NULL pointer on the way
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skb_metadata: Option<BTreeMap<&'a str, Option<i128>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub xdp_metadata: Option<BTreeMap<&'a str, Option<i128>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nft: Option<Nft>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iptables: Option<Legacy>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub netfilter: Option<Option<Hook>>,
    /// the queue that was full
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<Listen>,
    /// there were other sk_buffs with this packet
    #[serde(skip_serializing_if = "Option::is_none")]
    pub copy: Option<Copies>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sk_buff: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shared_info: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caller: Option<Frame<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stack: Option<Vec<Frame<'a>>>,
}

#[derive(Serialize)]
pub struct TupleRow {
    pub saddr: Addr,
    pub daddr: Addr,
    pub sport: u16,
    pub dport: u16,
    pub proto: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proto_name: Option<&'static str>,
    pub tcp_flags: u8,
    pub fragment: bool,
}

#[derive(Serialize)]
pub struct Frame<'a> {
    pub addr: Hex,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub symbol: Option<&'a Symbol>,
}

/// Whose socket it is. `pid` and `comm` are null where nobody knows.
#[derive(Serialize)]
pub struct OwnerRow {
    pub pid: Option<u32>,
    pub comm: Option<String>,
    pub uid: u32,
    pub cgroup: u64,
    pub sock: Hex,
    pub cookie: u64,
    pub inode: u64,
}

/// A tc or XDP program; its name is the event's `func`.
#[derive(Serialize)]
pub struct ProgramRow {
    pub id: u32,
    pub kind: &'static str,
    /// `entry` or `exit`
    pub at: &'static str,
    /// at exit: TC_ACT_* or XDP_*, or the number where it has no name
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verdict: Option<String>,
}

impl ProgramRow {
    pub fn new(program: &Program, point: Point) -> Self {
        let verdict = |value| match program.kind.verdict(value) {
            Some(name) => name.to_owned(),
            None => value.to_string(),
        };
        let (at, verdict) = match point {
            Point::Enter => ("entry", None),
            Point::Leave(value) => ("exit", Some(verdict(value))),
        };
        Self {
            id: program.id,
            kind: program.kind.name(),
            at,
            verdict,
        }
    }
}

/// What a BPF program does with a map. `key` and `value` in hexadecimal, 256 bytes of them at most; `value` is null where a look-up finds
/// nothing, and where a call has none.
#[derive(Serialize)]
pub struct MapRow {
    pub id: u32,
    pub name: String,
    pub key: Option<String>,
    pub key_size: u32,
    pub value: Option<String>,
    pub value_size: u32,
}

impl MapRow {
    pub fn new(map: &MapCall) -> Self {
        let hex = |bytes: &Option<Vec<u8>>| {
            let bytes = bytes.as_ref()?;
            Some(bytes.iter().map(|b| format!("{b:02x}")).collect())
        };
        Self {
            id: map.id,
            name: escaped(&map.name),
            key: hex(&map.key),
            key_size: map.key_size,
            value: hex(&map.value),
            value_size: map.value_size,
        }
    }
}

impl fmt::Display for MapRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |part: &Option<String>, size: u32| match part {
            // Two digits a byte.
            Some(hex) if hex.len() < 2 * size as usize => format!("{hex}…"),
            Some(hex) => hex.clone(),
            None => "-".to_owned(),
        };
        write!(
            f,
            "map {} {}: key {} value {}",
            self.id,
            self.name,
            shown(&self.key, self.key_size),
            shown(&self.value, self.value_size)
        )
    }
}

impl OwnerRow {
    pub fn new(owner: &Owner, process: Option<(u32, String)>) -> Self {
        let (pid, comm) = process.unzip();
        Self {
            pid,
            comm,
            uid: owner.uid,
            cgroup: owner.cgroup,
            sock: Hex(owner.sock),
            cookie: owner.cookie,
            inode: owner.inode,
        }
    }
}

impl TupleRow {
    pub fn new(t: &Tuple) -> Self {
        Self {
            saddr: Addr(t.saddr),
            daddr: Addr(t.daddr),
            sport: t.sport,
            dport: t.dport,
            proto: t.proto,
            proto_name: proto_name(t.proto),
            tcp_flags: t.tcp_flags,
            fragment: t.fragment,
        }
    }
}

/// A number that the packet keeps through all its skbs: `7` on CPU 0, `7@3` on others.
pub fn packet_name(p: Packet) -> String {
    match p.cpu {
        0 => p.number.to_string(),
        cpu => format!("{}@{cpu}", p.number),
    }
}

impl<'a> Row<'a> {
    /// What needs no look-up; the rest is for the caller to fill in.
    pub fn new(event: &'a Event) -> Self {
        let meta = event.meta.as_ref();
        Self {
            kind: match (event.dropped, event.retval) {
                (true, _) => "drop",
                (_, Some(_)) => "return",
                _ => "event",
            },
            ts_ns: event.head.ts,
            wall_ns: 0,
            since_ns: None,
            late: false,
            skb: Hex(event.skb),
            cpu: event.head.cpu,
            pid: event.head.tgid,
            tid: event.head.pid,
            comm: Escaped(&event.head.comm),
            func: None,
            location: None,
            reason: None,
            retval: event.retval,
            program: None,
            map: event.map.as_ref().map(MapRow::new),
            subsystem: None,
            packet: event.packet.map(packet_name),
            owner: None,
            netns: meta.map(|m| m.netns),
            netns_name: None,
            mark: meta.map(|m| m.mark),
            ifindex: meta.map(|m| m.ifindex),
            iface: meta.map(|m| Escaped(&m.ifname)),
            protocol: meta.map(|m| m.protocol),
            vlan: meta.and_then(|m| m.vlan).map(|tag| tag & 0xfff),
            vlan_priority: meta.and_then(|m| m.vlan).map(|tag| tag >> 13),
            mtu: meta.map(|m| m.mtu),
            len: meta.map(|m| m.len),
            tuple: event.tuple.flatten().as_ref().map(TupleRow::new),
            tunnel: event.tunnel.flatten().as_ref().map(TupleRow::new),
            cb: event.cb.as_ref().map(cb_words),
            skb_metadata: None,
            xdp_metadata: None,
            nft: None,
            iptables: None,
            netfilter: None,
            listen: event.drop.as_ref().and_then(Drop::listen),
            copy: None,
            sk_buff: None,
            shared_info: None,
            caller: None,
            stack: None,
        }
    }
}
