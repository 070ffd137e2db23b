//! With --drops: what is known of a drop beyond the kernel's reason.

use crate::bpf::read;
use crate::bpf::skb::types::skb_drop;
use crate::text::json::Object;
use crate::tools::skb::drops::Drop;
use crate::tools::skb::event::{Event, SECTION_DROP};
use crate::tools::skb::view::View;

use super::column::Column;

pub const DROP: Column = Column {
    prepare: Some(|view, event| match &event.drop {
        Some(drop) => view.symbols.resolve(&drop.addresses()),
        None => Ok(()),
    }),
    behind: Some((2, text)),
    json: Some(json),
    ..Column::new(SECTION_DROP, size_of::<skb_drop>(), |event, bytes, _| {
        let (d, rest) = read::<skb_drop>(bytes)?;
        event.drop = Some(Box::new(Drop::new(&d)));
        Some(rest)
    })
};

fn text(view: &mut View, event: &Event, line: &mut Vec<u8>) {
    if let Some(drop) = &event.drop {
        drop.push(line, view.place_name(event));
    }
}

fn json(view: &mut View, event: &Event, object: &mut Object<'_>) {
    if let Some(drop) = &event.drop {
        object.some("listen", drop.listen().as_ref());
        object.some("copy", drop.copies(view.place_name(event)).as_ref());
    }
    if let Some(words) = view.meaning(event) {
        object.field("class", &words.class);
        object.field("what", &words.what);
        object.field("change", &words.change);
    }
}
