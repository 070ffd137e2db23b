//! Members of the sk_buff, or of an XDP packet's xdp_buff, that were asked for by their paths.

use std::collections::BTreeMap;
use std::io::Write;

use crate::bpf::read;
use crate::bpf::skb::types::np_members;
use crate::text::json::Object;
use crate::tools::skb::event::{Event, SECTION_MEMBERS};
use crate::tools::skb::view::View;

use super::column::{Column, Of};

/// Which of them there are, each kind of program has its own say.
pub const MEMBERS: Column = Column {
    of: Of::Functions,
    behind: Some((3, text)),
    json: Some(json),
    ..Column::new(
        SECTION_MEMBERS,
        size_of::<np_members>(),
        |event, bytes, _| {
            let (m, rest) = read::<np_members>(bytes)?;
            let known = |i: usize| m.known & (1 << i) != 0;
            event.members = Some(Box::new(std::array::from_fn(|i| {
                known(i).then(|| m.values[i])
            })));
            Some(rest)
        },
    )
};

fn text(view: &mut View, event: &Event, line: &mut Vec<u8>) {
    for (path, value) in view.members(event).iter().flat_map(|(values, _)| values) {
        let _ = match value {
            Some(number) => write!(line, " {path}={number}"),
            None => write!(line, " {path}=-"),
        };
    }
}

fn json(view: &mut View, event: &Event, object: &mut Object<'_>) {
    if let Some((values, xdp)) = view.members(event) {
        // null where there was a NULL pointer on the way
        let values: BTreeMap<_, _> = values.into_iter().collect();
        match xdp {
            true => object.field("xdp_metadata", &values),
            false => object.field("skb_metadata", &values),
        }
    }
}
