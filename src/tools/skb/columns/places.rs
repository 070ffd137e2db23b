//! Where a function was called: its caller, the whole stack.

use crate::tools::skb::event::{SECTION_CALLER, SECTION_STACK};

use super::column::{Column, Flag, Of, word};

/// A program's caller is its hook in the kernel, the same for all.
pub const CALLER: Column = Column {
    flag: Some(Flag::new(
        "output-caller",
        "Show the caller of each function",
    )),
    of: Of::Functions,
    prepare: Some(|view, event| view.symbols.resolve(event.caller.as_slice())),
    behind: Some((0, |view, event, line| {
        if let Some(caller) = event.caller {
            line.push(b' ');
            view.push_address(line, caller);
        }
    })),
    json: Some(|view, event, object| {
        object.some("caller", event.caller.map(|c| view.frame(c)).as_ref());
    }),
    ..Column::new(SECTION_CALLER, 8, |event, bytes, _| {
        let (caller, rest) = word(bytes)?;
        event.caller = Some(caller);
        Some(rest)
    })
};

pub const STACK: Column = Column {
    flag: Some(Flag::new(
        "output-stack",
        "Show the kernel stack of each event",
    )),
    prepare: Some(|view, event| {
        view.symbols
            .resolve(event.stack.as_deref().unwrap_or_default())
    }),
    below: Some(|view, event, line| {
        for &addr in event.stack.iter().flatten() {
            line.extend_from_slice(b"\n    ");
            view.push_address(line, addr);
        }
    }),
    json: Some(|view, event, object| {
        let stack = event.stack.as_ref();
        let frames = stack.map(|s| s.iter().map(|&addr| view.frame(addr)).collect::<Vec<_>>());
        object.some("stack", frames.as_ref());
    }),
    // To the end of the event.
    ..Column::new(SECTION_STACK, 0, |event, bytes, _| {
        let words = bytes.chunks_exact(8).map_while(|c| Some(word(c)?.0));
        event.stack = Some(words.collect());
        Some(&[])
    })
};
