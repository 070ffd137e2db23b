//! NETNS to LEN: where a packet is, and what the sk_buff says of it.

use std::io::Write;

use crate::bpf::read;
use crate::bpf::skb::types::{skb_meta, skb_mtu};
use crate::text::columns::pad;
use crate::text::escape::{Escaped, escaped, push_escaped};
use crate::text::format::{self, push_dec, push_hex};
use crate::text::json::Object;
use crate::tools::skb::event::{Event, Meta, SECTION_META};
use crate::tools::skb::view::{View, Widths, number};

use super::column::{Before, Column, Default, Flag};

const MTU_TAGGED: u32 = skb_mtu::SKB_MTU_TAGGED.0;
/// Places of the titles.
const NETNS: usize = 0;
const IFACE: usize = 2;

pub const META: Column = Column {
    flag: Some(Flag {
        name: "output-meta",
        help: "Show netns, mark, interface, protocol, MTU and length (on; =false switches it off)",
        default: Default::Yes,
    }),
    before: Some(Before {
        titles: &[
            ("NETNS", 10),
            ("MARK/x", 8),
            ("IFACE", 10),
            ("PROTO", 6),
            ("MTU", 5),
            ("LEN", 5),
        ],
        text,
    }),
    behind: Some((4, tag)),
    json: Some(json),
    ..Column::new(SECTION_META, size_of::<skb_meta>(), decode)
};

#[inline]
pub fn decode<'b>(event: &mut Event, bytes: &'b [u8], _: usize) -> Option<&'b [u8]> {
    let (m, rest) = read::<skb_meta>(bytes)?;
    event.meta = Some(Meta {
        netns: m.netns,
        mark: m.mark,
        ifindex: m.ifindex,
        len: m.len,
        mtu: m.mtu & !MTU_TAGGED,
        protocol: m.protocol,
        vlan: (m.mtu & MTU_TAGGED != 0).then_some(m.vlan),
        ifname: m.ifname,
    });
    Some(rest)
}

fn text(view: &mut View, event: &Event, line: &mut Vec<u8>) {
    let Some(m) = &event.meta else {
        return;
    };
    let widths = &mut view.widths[META.bit()];
    match view.netns.of(m.netns) {
        Some(name) => push(line, m, Some(name), widths),
        None => {
            let make = |line: &mut _, widths: &mut _| push(line, m, None, widths);
            (view.last_meta).push(line, event.like, m.clone(), widths, make);
        }
    }
}

/// `name`: that of the namespace, where it is shown in place of its inode.
fn push(line: &mut Vec<u8>, m: &Meta, name: Option<&str>, widths: &mut Widths) {
    let start = line.len();
    match name {
        Some(name) => push_escaped(line, name.as_bytes()),
        None => push_dec(line, m.netns.into()),
    }
    pad(line, start, &mut widths[NETNS]);
    let start = line.len();
    push_hex(line, m.mark.into(), 1);
    format::pad(line, start, 8);
    let start = line.len();
    if m.ifindex != 0 {
        push_escaped(line, &m.ifname);
        line.push(b':');
        push_dec(line, m.ifindex.into());
    } else {
        line.push(b'-');
    }
    pad(line, start, &mut widths[IFACE]);
    line.extend_from_slice(b"0x");
    push_hex(line, m.protocol.into(), 4);
    line.push(b' ');
    number(line, m.mtu.into(), 5);
    number(line, m.len.into(), 5);
}

/// The tag beside the packet.
fn tag(_: &mut View, event: &Event, line: &mut Vec<u8>) {
    if let Some(tag) = event.meta.as_ref().and_then(|meta| meta.vlan) {
        let _ = write!(line, " vlan={},p={}", tag & 0xfff, tag >> 13);
    }
}

fn json(view: &mut View, event: &Event, object: &mut Object<'_>) {
    let Some(m) = &event.meta else {
        return;
    };
    object.field("netns", &m.netns);
    let name = view.netns.of(m.netns);
    let name = name.map(|name| escaped(name.as_bytes()));
    object.some("netns_name", name.as_ref());
    object.field("mark", &m.mark);
    object.field("ifindex", &m.ifindex);
    object.field("iface", &Escaped(&m.ifname));
    object.field("protocol", &m.protocol);
    if let Some(tag) = m.vlan {
        object.field("vlan", &(tag & 0xfff));
        object.field("vlan_priority", &(tag >> 13));
    }
    object.field("mtu", &m.mtu);
    object.field("len", &m.len);
}
