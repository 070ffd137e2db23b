//! The JSON form of an event: one object a line. Zeros are kept; a field is missing only where its section was not asked for or does not
//! apply. The fields of a section are written by its column.

use crate::text::escape::Escaped;
use crate::text::format::Hex;
use crate::text::json::{Error, Object};

use super::columns::Column;
use super::event::Event;
use super::view::View;

/// When an event was, in the parts that a line begins with.
#[derive(Debug, Clone, Copy)]
pub struct When {
    pub wall: u64,
    pub since: Option<u64>,
    pub late: bool,
}

/// Appends an event. `columns`: those that may be in it.
pub fn push(
    line: &mut Vec<u8>,
    view: &mut View,
    event: &Event,
    when: When,
    columns: &[&Column],
) -> Result<(), Error> {
    let mut object = Object::new(line);
    object.field(
        "type",
        match (event.dropped, event.retval) {
            (true, _) => "drop",
            (_, Some(_)) => "return",
            _ => "event",
        },
    );
    object.field("ts_ns", &event.head.ts);
    object.field("wall_ns", &when.wall);
    object.some("since_ns", when.since.as_ref());
    if when.late {
        object.field("late", &true);
    }
    object.field("skb", &Hex(event.skb));
    object.field("cpu", &event.head.cpu);
    object.field("pid", &event.head.tgid);
    object.field("tid", &event.head.pid);
    object.field("comm", &Escaped(&event.head.comm));
    if event.dropped {
        object.field("location", &view.frame(view.drop_place(event)));
    } else {
        object.field("func", view.name(event.func));
    }
    object.some("reason", view.reason(event).as_ref());
    object.some("retval", event.retval.as_ref());
    object.some("program", view.program(event).as_ref());
    let reason = view.reason_number(event);
    let subsystem = reason.and_then(|r| view.reasons.subsystem(r));
    object.some("subsystem", subsystem.as_ref());
    for column in columns {
        if let (true, Some(json)) = (event.sections & column.section != 0, column.json) {
            json(view, event, &mut object);
        }
    }
    object.close()
}
