//! OWNER: whose socket a packet belongs to.

use std::io::Write;

use serde::Serialize;

use crate::bpf::read;
use crate::bpf::skb::types::skb_owner;
use crate::text::columns::pad;
use crate::text::format::Hex;
use crate::text::json::Object;
use crate::tools::skb::event::{Event, Owner, SECTION_OWNER};
use crate::tools::skb::view::View;

use super::column::{Before, Column, Default, Flag, Of};

pub const OWNER: Column = Column {
    flag: Some(Flag {
        name: "output-owner",
        help: "Show whose socket a packet belongs to: the process that made or connected it, not the one that happens to run. On with --drops; =false switches it off",
        default: Default::WithDrops,
    }),
    of: Of::Skbs,
    before: Some(Before {
        titles: &[("OWNER", 16)],
        text,
    }),
    json: Some(json),
    ..Column::new(SECTION_OWNER, size_of::<skb_owner>(), decode)
};

fn decode<'b>(event: &mut Event, bytes: &'b [u8], _: usize) -> Option<&'b [u8]> {
    let (o, rest) = read::<skb_owner>(bytes)?;
    event.owner = Some((o.sock != 0).then_some(Owner {
        sock: o.sock,
        cookie: o.cookie,
        cgroup: o.cgroup,
        inode: o.inode,
        uid: o.uid,
        pid: o.pid,
        comm: o.comm,
    }));
    Some(rest)
}

fn text(view: &mut View, event: &Event, line: &mut Vec<u8>) {
    let start = line.len();
    match event.owner.as_ref() {
        Some(Some(owner)) => match view.process(owner) {
            Some((pid, comm)) => {
                let _ = write!(line, "{comm}:{pid}");
                if let Some(container) = view.container(owner, pid) {
                    let _ = write!(line, "@{container}");
                }
            }
            None => line.push(b'?'),
        },
        _ => line.push(b'-'),
    }
    pad(line, start, view.width(SECTION_OWNER));
}

/// Whose socket it is. `pid` and `comm` are null where nobody knows.
#[derive(Serialize)]
struct OwnerRow {
    pid: Option<u32>,
    comm: Option<String>,
    uid: u32,
    cgroup: u64,
    /// its name, or the beginning of its id; null where the process is in none
    container: Option<String>,
    sock: Hex,
    cookie: u64,
    inode: u64,
}

fn json(view: &mut View, event: &Event, object: &mut Object<'_>) {
    let row = event.owner.as_ref().map(|owner| {
        let owner = owner.as_ref()?;
        let (pid, comm) = view.process(owner).unzip();
        let container = view.container(owner, pid.unwrap_or_default());
        Some(OwnerRow {
            container,
            pid,
            comm,
            uid: owner.uid,
            cgroup: owner.cgroup,
            sock: Hex(owner.sock),
            cookie: owner.cookie,
            inode: owner.inode,
        })
    });
    object.some("owner", row.as_ref());
}
