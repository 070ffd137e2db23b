//! PACKET: the number of a tracked packet; the number of an sk_buff's life.

use crate::text::columns::pad;
use crate::text::json::Object;
use crate::tools::skb::event::{Event, Packet, SECTION_LIFE, SECTION_PACKET};
use crate::tools::skb::view::View;

use super::column::{Before, Column, Of, word};

use crate::bpf::skb::types::skb_packet;

const CPU_BITS: u32 = skb_packet::SKB_PACKET_CPU_BITS.0;

pub const PACKET: Column = Column {
    before: Some(Before {
        titles: &[("PACKET", 6)],
        text,
    }),
    json: Some(json),
    ..Column::new(SECTION_PACKET, 8, decode)
};

/// For relative time alone. XDP packets have none: their memory serves one packet after the other.
pub const LIFE: Column = Column {
    of: Of::Skbs,
    ..Column::new(SECTION_LIFE, 8, decode_life)
};

fn decode_life<'b>(event: &mut Event, bytes: &'b [u8], _: usize) -> Option<&'b [u8]> {
    let (life, rest) = word(bytes)?;
    event.life = Some(life);
    Some(rest)
}

fn decode<'b>(event: &mut Event, bytes: &'b [u8], _: usize) -> Option<&'b [u8]> {
    let (id, rest) = word(bytes)?;
    event.packet = Some(Packet {
        number: id >> CPU_BITS,
        cpu: id as u16,
    });
    Some(rest)
}

fn text(view: &mut View, event: &Event, line: &mut Vec<u8>) {
    let start = line.len();
    if let Some(packet) = event.packet {
        line.extend_from_slice(packet_name(packet).as_bytes());
    }
    pad(line, start, view.width(SECTION_PACKET));
}

fn json(_: &mut View, event: &Event, object: &mut Object<'_>) {
    object.some("packet", event.packet.map(packet_name).as_ref());
}

/// A number that the packet keeps through all its skbs: `7` on CPU 0, `7@3` on others.
pub fn packet_name(p: Packet) -> String {
    match p.cpu {
        0 => p.number.to_string(),
        cpu => format!("{}@{cpu}", p.number),
    }
}
