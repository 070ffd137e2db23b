//! TUPLE and INNER: addresses, ports and protocol of a packet, and of the packet inside it.

use std::fmt;
use std::io::Write;

use serde::Serialize;

use crate::bpf::read;
use crate::bpf::skb::types::np_tuple;
use crate::event::tuple::{Tuple, address, proto_name};
use crate::text::columns::pad;
use crate::text::format::Addr;
use crate::text::json::Object;
use crate::tools::skb::event::{Event, SECTION_TUNNEL, SECTION_TUPLE};
use crate::tools::skb::view::View;

use super::column::{Before, Column, Default, Flag};

pub const TUPLE: Column = Column {
    flag: Some(Flag {
        name: "output-tuple",
        help: "Show addresses, ports and protocol (on; =false switches it off)",
        default: Default::Yes,
    }),
    before: Some(Before {
        titles: &[("TUPLE", 36)],
        text,
    }),
    json: Some(|_, event, object| {
        let row = event.tuple.flatten().as_ref().map(TupleRow::new);
        object.some("tuple", row.as_ref());
    }),
    ..Column::new(SECTION_TUPLE, size_of::<np_tuple>(), decode)
};

pub const TUNNEL: Column = Column {
    flag: Some(Flag::new(
        "output-tunnel",
        "Show the addresses of the packet inside a tunnel (VXLAN, Geneve, GRE, IPIP, SIT)",
    )),
    before: Some(Before {
        titles: &[("INNER", 36)],
        text: |view, event, line| {
            let start = line.len();
            push(line, event.tunnel.flatten().as_ref(), view.tcp_flags);
            pad(line, start, view.width(SECTION_TUNNEL));
        },
    }),
    json: Some(|_, event, object: &mut Object<'_>| {
        let row = event.tunnel.flatten().as_ref().map(TupleRow::new);
        object.some("tunnel", row.as_ref());
    }),
    ..Column::new(SECTION_TUNNEL, size_of::<np_tuple>(), |event, bytes, _| {
        let (t, rest) = read::<np_tuple>(bytes)?;
        event.tunnel = Some(tuple(&t));
        Some(rest)
    })
};

#[inline]
pub fn decode<'b>(event: &mut Event, bytes: &'b [u8], _: usize) -> Option<&'b [u8]> {
    let (t, rest) = read::<np_tuple>(bytes)?;
    event.tuple = Some(tuple(&t));
    Some(rest)
}

/// `None`: it is no IP.
pub fn tuple(t: &np_tuple) -> Option<Tuple> {
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

fn text(view: &mut View, event: &Event, line: &mut Vec<u8>) {
    let tuple = event.tuple.flatten();
    let (flags, width) = (view.tcp_flags, &mut view.widths[TUPLE.bit()][0]);
    (view.last_tuple).push(line, event.like, tuple, width, |line, width| {
        let start = line.len();
        push(line, tuple.as_ref(), flags);
        pad(line, start, width);
    });
}

fn push(line: &mut Vec<u8>, tuple: Option<&Tuple>, tcp_flags: bool) {
    let Some(t) = tuple else {
        line.push(b'-');
        return;
    };
    t.push(line);
    if tcp_flags && t.proto == 6 && !t.fragment {
        // Behind the protocol, within its bracket.
        line.pop();
        let _ = write!(line, ",{})", TcpFlags(t.tcp_flags));
    }
}

#[derive(Serialize)]
struct TupleRow {
    saddr: Addr,
    daddr: Addr,
    sport: u16,
    dport: u16,
    proto: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    proto_name: Option<&'static str>,
    tcp_flags: u8,
    fragment: bool,
}

impl TupleRow {
    fn new(t: &Tuple) -> Self {
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

/// `SYN|ACK`
struct TcpFlags(u8);

impl fmt::Display for TcpFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // From bit 0 on, RFC 9293 section 3.1.
        const NAMES: [&str; 8] = ["FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR"];
        let mut first = true;
        for (bit, name) in NAMES.iter().enumerate() {
            if self.0 & (1 << bit) != 0 {
                f.write_str(if first { "" } else { "|" })?;
                f.write_str(name)?;
                first = false;
            }
        }
        if first { f.write_str("-") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_by_name() {
        assert_eq!(TcpFlags(0x12).to_string(), "SYN|ACK");
        assert_eq!(TcpFlags(0).to_string(), "-");
        assert_eq!(TcpFlags(0xff).to_string().split('|').count(), 8);
    }
}
