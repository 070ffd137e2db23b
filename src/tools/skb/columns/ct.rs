//! --output-ct: the packet's entry in the kernel's table of connections (conntrack), as it is when the function is entered.

use std::io::Write;

use anyhow::{Result, bail};
use plain::Plain;
use serde::Serialize;

use crate::bpf::skb::types::{
    skb_ct, skb_ct_info, skb_ct_known, skb_ct_status, skb_ct_zone, skb_section,
};
use crate::event::tuple::{Tuple, proto_name};
use crate::kernel::btf::{self, Btf};
use crate::text::format::Addr;
use crate::text::json::Object;
use crate::tools::skb::event::Event;
use crate::tools::skb::view::View;

use super::column::{Column, Flag, Of, Types};
use super::tuple::tuple;

pub const SECTION_CT: u32 = skb_section::SKB_SECTION_CT.0;
const UNTRACKED: u8 = skb_ct_info::SKB_CT_UNTRACKED.0 as u8;
const REPLY: u8 = skb_ct_info::SKB_CT_REPLY.0 as u8;

pub const CT: Column = Column {
    flag: Some(Flag::new(
        "output-ct",
        "Show the packet's entry of connection tracking below its line: state, direction, zone, mark, and the tuples of both directions; - where it has none",
    )),
    of: Of::Skbs,
    types,
    below: Some(text),
    json: Some(json),
    ..Column::new(SECTION_CT, size_of::<skb_ct>(), |event, bytes, _| {
        event.keep(SECTION_CT, size_of::<skb_ct>(), bytes)
    })
};

// SAFETY: a C struct of integers and arrays of integers with explicit padding: any bits are a valid value.
unsafe impl Plain for skb_ct {}

/// What of the kernel's types it needs; an error where the kernel does not have them.
pub fn types(btf: &Btf) -> Result<Types> {
    if btf.struct_named("nf_conn").is_some() {
        return Ok(Types::Kernel);
    }
    if !btf::modules().iter().any(|m| m == "nf_conntrack") {
        bail!(
            "--output-ct: this kernel does not say what a struct nf_conn is: its BTF has none, and no module nf_conntrack with BTF is loaded (modprobe nf_conntrack; kernels from 5.11)"
        );
    }
    Ok(Types::Modules)
}

/// What an event says of it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Ct {
    /// the packet has no entry: it was not looked at yet, or conntrack finds it invalid
    None,
    /// it is exempt from tracking
    Untracked,
    /// not an entry of the table: it says how the packet will be tracked
    Template {
        zone: Option<Zone>,
    },
    /// the packet has given its entry back
    Gone,
    /// it could not be read
    Unknown,
    Entry(Entry),
}

/// An entry of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    state: &'static str,
    reply: bool,
    confirmed: bool,
    zone: Option<Zone>,
    mark: Option<u32>,
    /// original, reply; `None` where it is neither IPv4 nor IPv6
    tuples: [Option<Tuple>; 2],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Zone {
    id: u16,
    /// the only direction for which it counts
    only: Option<&'static str>,
}

impl Ct {
    fn new(c: &skb_ct) -> Self {
        let known = |what: skb_ct_known| c.known & what.0 != 0;
        let status = |what: skb_ct_status| c.status & what.0 != 0;
        if !known(skb_ct_known::SKB_CT_INFO) {
            return Self::None;
        }
        if c.info == UNTRACKED {
            return Self::Untracked;
        }
        if known(skb_ct_known::SKB_CT_GONE) {
            return Self::Gone;
        }
        let zone = known(skb_ct_known::SKB_CT_ZONE).then_some(Zone {
            id: c.zone,
            only: match skb_ct_zone(c.zone_dir.into()) {
                skb_ct_zone::SKB_CT_ZONE_ORIGINAL => Some("original"),
                skb_ct_zone::SKB_CT_ZONE_REPLY => Some("reply"),
                _ => None,
            },
        });
        let reply = c.info >= REPLY;
        let state = match skb_ct_info(u32::from(c.info % REPLY)) {
            _ if !known(skb_ct_known::SKB_CT_ENTRY) || c.info >= 2 * REPLY => return Self::Unknown,
            _ if status(skb_ct_status::SKB_CT_TEMPLATE) => return Self::Template { zone },
            skb_ct_info::SKB_CT_ESTABLISHED => "established",
            skb_ct_info::SKB_CT_RELATED => "related",
            _ => "new",
        };
        Self::Entry(Entry {
            state,
            reply,
            confirmed: status(skb_ct_status::SKB_CT_CONFIRMED),
            zone,
            mark: known(skb_ct_known::SKB_CT_MARK).then_some(c.mark),
            tuples: [tuple(&c.tuples[0]), tuple(&c.tuples[1])],
        })
    }
}

impl Entry {
    /// The entry that an event has.
    pub fn of(event: &Event) -> Option<Self> {
        match Ct::new(&event.kept(SECTION_CT)?) {
            Ct::Entry(entry) => Some(entry),
            _ => None,
        }
    }

    /// The connection is the same, with the same addresses: replies belong to it, too.
    pub fn is_like(&self, other: &Self) -> bool {
        (self.tuples, self.zone) == (other.tuples, other.zone)
    }
}

impl std::fmt::Display for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut line = Vec::new();
        push_entry(&mut line, self);
        f.write_str(&String::from_utf8_lossy(&line))
    }
}

impl Serialize for Entry {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        Row::of(self).serialize(to)
    }
}

fn text(_: &mut View, event: &Event, line: &mut Vec<u8>) {
    let Some(c) = event.kept(SECTION_CT) else {
        return;
    };
    line.extend_from_slice(b"\n    ct: ");
    match Ct::new(&c) {
        Ct::None => line.push(b'-'),
        Ct::Untracked => line.extend_from_slice(b"untracked"),
        Ct::Gone => line.extend_from_slice(b"given back"),
        Ct::Unknown => line.push(b'?'),
        Ct::Template { zone } => {
            line.extend_from_slice(b"template");
            push_zone(line, zone);
        }
        Ct::Entry(entry) => push_entry(line, &entry),
    }
}

fn push_entry(line: &mut Vec<u8>, entry: &Entry) {
    line.extend_from_slice(entry.state.as_bytes());
    if entry.reply {
        line.extend_from_slice(b" reply");
    }
    if !entry.confirmed {
        line.extend_from_slice(b" unconfirmed");
    }
    push_zone(line, entry.zone);
    if let Some(mark) = entry.mark {
        let _ = write!(line, " mark {mark:#x}");
    }
    for (name, tuple) in ["original", "reply"].into_iter().zip(entry.tuples) {
        let _ = write!(line, ", {name} ");
        match tuple {
            Some(t) => push_tuple(line, &t),
            None => line.push(b'?'),
        }
    }
}

fn push_zone(line: &mut Vec<u8>, zone: Option<Zone>) {
    if let Some(zone) = zone {
        let _ = write!(line, " zone {}", zone.id);
        if let Some(only) = zone.only {
            let _ = write!(line, " ({only} only)");
        }
    }
}

fn push_tuple(line: &mut Vec<u8>, t: &Tuple) {
    t.push(line);
    if is_icmp(t) {
        // Behind the protocol, within its bracket.
        line.pop();
        let (kind, code, id) = (t.icmp_type, t.icmp_code, t.sport);
        let _ = write!(line, ",type {kind},code {code},id {id})");
    }
}

fn is_icmp(t: &Tuple) -> bool {
    matches!(t.proto, 1 | 58)
}

#[derive(Serialize)]
struct Row {
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    direction: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    confirmed: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    zone: Option<u16>,
    /// the only direction for which the zone counts
    #[serde(skip_serializing_if = "Option::is_none")]
    zone_direction: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mark: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    original: Option<TupleRow>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reply: Option<TupleRow>,
}

#[derive(Serialize)]
struct TupleRow {
    saddr: Addr,
    daddr: Addr,
    #[serde(skip_serializing_if = "Option::is_none")]
    sport: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dport: Option<u16>,
    proto: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    proto_name: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    icmp_type: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    icmp_code: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    icmp_id: Option<u16>,
}

impl TupleRow {
    fn new(t: Tuple) -> Self {
        let (ports, icmp) = (!is_icmp(&t), is_icmp(&t));
        Self {
            saddr: Addr(t.saddr),
            daddr: Addr(t.daddr),
            sport: ports.then_some(t.sport),
            dport: ports.then_some(t.dport),
            proto: t.proto,
            proto_name: proto_name(t.proto),
            icmp_type: icmp.then_some(t.icmp_type),
            icmp_code: icmp.then_some(t.icmp_code),
            icmp_id: icmp.then_some(t.sport),
        }
    }
}

impl Row {
    fn of(entry: &Entry) -> Self {
        Row {
            direction: Some(if entry.reply { "reply" } else { "original" }),
            confirmed: Some(entry.confirmed),
            mark: entry.mark,
            original: entry.tuples[0].map(TupleRow::new),
            reply: entry.tuples[1].map(TupleRow::new),
            ..Row::new(entry.state, entry.zone)
        }
    }

    /// Its state alone, and a zone.
    fn new(state: &'static str, zone: Option<Zone>) -> Self {
        Self {
            state,
            direction: None,
            confirmed: None,
            zone: zone.map(|zone| zone.id),
            zone_direction: zone.and_then(|zone| zone.only),
            mark: None,
            original: None,
            reply: None,
        }
    }
}

/// `"ct": null` where the packet has no entry.
fn json(_: &mut View, event: &Event, object: &mut Object<'_>) {
    let Some(c) = event.kept(SECTION_CT) else {
        return;
    };
    let row = match Ct::new(&c) {
        Ct::None => None,
        Ct::Untracked => Some(Row::new("untracked", None)),
        Ct::Gone => Some(Row::new("given back", None)),
        Ct::Unknown => Some(Row::new("unknown", None)),
        Ct::Template { zone } => Some(Row::new("template", zone)),
        Ct::Entry(entry) => Some(Row::of(&entry)),
    };
    object.field("ct", &row);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `line` and JSON of these bytes.
    fn shown(c: &skb_ct) -> (String, String) {
        let mut event = Event::default();
        event.keep(SECTION_CT, size_of::<skb_ct>(), crate::bpf::bytes_of(c));
        let (mut line, mut object) = (Vec::new(), Vec::new());
        text(&mut View::default(), &event, &mut line);
        let mut fields = Object::new(&mut object);
        json(&mut View::default(), &event, &mut fields);
        fields.close().unwrap();
        let string = |bytes| String::from_utf8(bytes).unwrap();
        (string(line).trim_start().to_owned(), string(object))
    }

    fn is(c: &skb_ct, line: &str, json: &str) {
        assert_eq!(
            shown(c),
            (format!("ct: {line}"), format!("{{\"ct\":{json}}}"))
        );
    }

    #[test]
    fn without_an_entry() {
        let mut c = skb_ct::default();
        is(&c, "-", "null");
        c.known = skb_ct_known::SKB_CT_INFO.0;
        c.info = UNTRACKED;
        is(&c, "untracked", r#"{"state":"untracked"}"#);
        // There is an entry that could not be read.
        c.info = 2;
        is(&c, "?", r#"{"state":"unknown"}"#);
        c.known |= skb_ct_known::SKB_CT_GONE.0;
        is(&c, "given back", r#"{"state":"given back"}"#);
        c.known = skb_ct_known::SKB_CT_INFO.0
            | skb_ct_known::SKB_CT_ENTRY.0
            | skb_ct_known::SKB_CT_ZONE.0;
        (c.status, c.zone, c.zone_dir) = (skb_ct_status::SKB_CT_TEMPLATE.0, 7, 1);
        is(
            &c,
            "template zone 7 (original only)",
            r#"{"state":"template","zone":7,"zone_direction":"original"}"#,
        );
        // A value that no kernel has.
        (c.status, c.info) = (0, 6);
        is(&c, "?", r#"{"state":"unknown"}"#);
    }

    #[test]
    fn an_entry() {
        let mut c = skb_ct {
            known: !skb_ct_known::SKB_CT_GONE.0,
            info: 3,
            mark: 0x2a,
            zone_dir: 3,
            ..skb_ct::default()
        };
        for (t, last) in c.tuples.iter_mut().zip([1, 2]) {
            (t.l3_version, t.l4_proto, t.sport, t.icmp_type) = (4, 1, 77, 8);
            t.saddr[1] = u64::from_ne_bytes([0, 0, 0xff, 0xff, 10, 0, 0, last]);
            t.daddr[1] = u64::from_ne_bytes([0, 0, 0xff, 0xff, 10, 0, 0, 9]);
        }
        let tuple = |last| {
            format!(
                r#"{{"saddr":"10.0.0.{last}","daddr":"10.0.0.9","proto":1,"proto_name":"icmp","icmp_type":8,"icmp_code":0,"icmp_id":77}}"#
            )
        };
        is(
            &c,
            "established reply unconfirmed zone 0 mark 0x2a, \
             original 10.0.0.1->10.0.0.9(icmp,type 8,code 0,id 77), reply 10.0.0.2->10.0.0.9(icmp,type 8,code 0,id 77)",
            &format!(
                r#"{{"state":"established","direction":"reply","confirmed":false,"zone":0,"mark":42,"original":{},"reply":{}}}"#,
                tuple(1),
                tuple(2)
            ),
        );
        (c.info, c.status) = (2, skb_ct_status::SKB_CT_CONFIRMED.0);
        for t in &mut c.tuples {
            (t.l4_proto, t.dport, t.icmp_type) = (6, 80, 0);
        }
        assert_eq!(
            shown(&c).0,
            "ct: new zone 0 mark 0x2a, original 10.0.0.1:77->10.0.0.9:80(tcp), reply 10.0.0.2:77->10.0.0.9:80(tcp)"
        );
    }
}
