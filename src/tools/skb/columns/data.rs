//! The packet's bytes, for a capture file alone (`--write`).

use crate::bpf::read;
use crate::bpf::skb::types::skb_data;
use crate::tools::skb::event::{Data, Event, SECTION_DATA};

use super::column::Column;

pub const DATA: Column = Column::new(SECTION_DATA, 0, decode);

fn decode<'b>(event: &mut Event, bytes: &'b [u8], snap_len: usize) -> Option<&'b [u8]> {
    let (d, rest) = read::<skb_data>(bytes)?;
    let (bytes, rest) = rest.split_at_checked(snap_len)?;
    event.data = Some(Data {
        len: d.len,
        ethernet: d.ethernet != 0,
        hatype: d.hatype,
        vlan: (d.vlan_type != 0).then_some((d.vlan_type, d.vlan)),
        bytes: bytes.get(..d.captured as usize)?.to_vec(),
    });
    Some(rest)
}
