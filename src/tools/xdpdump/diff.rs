//! `--diff`: what a traced program changed in a packet, from what it was at entry and at exit. It knows no output format.
//!
//! How far the start of the packet was moved is known (bpf_xdp_adjust_head), and with the lengths what was done at its end
//! (bpf_xdp_adjust_tail). Where the bytes in front were put in or taken out is told by what else had to change: a VLAN tag
//! stands behind the addresses though the room for it was made before them.

use std::collections::HashMap;

use crate::capture::linktype::Linktype;
use crate::event::layout::{self, Field};

use super::decode::Seen;

/// Bytes of a packet that are shown of one change.
const SHOWN: usize = 32;

/// What was changed; all offsets are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Diff {
    /// In order: what was put in or taken out, then each field.
    Changes(Vec<Change>),
    /// The packet at entry was lost on its way, or was too far back.
    Unknown,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// `at`: in the packet at exit.
    Inserted {
        at: usize,
        len: usize,
        bytes: Vec<u8>,
    },
    /// `at`: in the packet at entry.
    Removed {
        at: usize,
        len: usize,
        bytes: Vec<u8>,
    },
    /// `at`: in the packet at entry; `field`: the header field there.
    Replaced {
        at: usize,
        field: Option<Field>,
        old: Vec<u8>,
        new: Vec<u8>,
    },
}

/// Packets that were seen at entry and are expected at exit: one for each program and CPU, since XDP does not nest.
#[derive(Default)]
pub struct Pairs {
    waiting: HashMap<(u32, u16), Packet>,
}

struct Packet {
    id: u64,
    len: u32,
    data: Vec<u8>,
}

impl Pairs {
    /// A packet at entry.
    pub fn enter(&mut self, seen: &Seen<'_>) {
        let packet = self
            .waiting
            .entry((seen.program, seen.cpu))
            .or_insert_with(|| Packet {
                id: 0,
                len: 0,
                data: Vec::new(),
            });
        packet.id = seen.id;
        packet.len = seen.len;
        packet.data.clear();
        packet.data.extend_from_slice(seen.data);
    }

    /// The same packet at exit.
    pub fn exit(&self, seen: &Seen<'_>, linktype: Linktype) -> Diff {
        match self.waiting.get(&(seen.program, seen.cpu)) {
            Some(old) if old.id == seen.id => Diff::Changes(changes(
                (&old.data, old.len as usize),
                (seen.data, seen.len as usize),
                i64::from(seen.moved),
                linktype,
            )),
            _ => Diff::Unknown,
        }
    }
}

/// From one packet to the other, each with what was captured of it and its true length. `moved`: see [`Seen::moved`].
fn changes(
    (old, old_len): (&[u8], usize),
    (new, new_len): (&[u8], usize),
    moved: i64,
    linktype: Linktype,
) -> Vec<Change> {
    let mut changes = Vec::new();
    let grown = usize::try_from(-moved).unwrap_or(0);
    let cut = usize::try_from(moved).unwrap_or(0);
    // Front: bytes old[at..at + cut] are gone, or new[at..at + grown] have come.
    let at = if moved == 0 {
        0
    } else {
        seam(old, cut, new, grown, linktype)
    };
    if grown > 0 {
        changes.push(Change::Inserted {
            at,
            len: grown,
            bytes: excerpt(new, at, grown),
        });
    }
    if cut > 0 {
        changes.push(Change::Removed {
            at,
            len: cut,
            bytes: excerpt(old, at, cut),
        });
    }
    replaced(&mut changes, old, new, (0..at, 0), linktype);
    let rest = at + cut..old.len().min((new.len() + cut).saturating_sub(grown));
    replaced(
        &mut changes,
        old,
        new,
        (rest, grown as i64 - cut as i64),
        linktype,
    );
    // End.
    let expected = (old_len + grown).saturating_sub(cut);
    if new_len > expected {
        changes.push(Change::Inserted {
            at: expected,
            len: new_len - expected,
            bytes: excerpt(new, expected, new_len - expected),
        });
    } else if new_len < expected {
        let at = old_len.saturating_sub(expected - new_len);
        changes.push(Change::Removed {
            at,
            len: expected - new_len,
            bytes: excerpt(old, at, expected - new_len),
        });
    }
    changes
}

/// Where the bytes were put in or taken out, so that the fewest others changed; a header's start where that leaves a choice.
fn seam(old: &[u8], cut: usize, new: &[u8], grown: usize, linktype: Linktype) -> usize {
    let ends = old
        .len()
        .saturating_sub(cut)
        .min(new.len().saturating_sub(grown));
    let differ = |a: Option<&u8>, b: Option<&u8>| usize::from(a != b);
    // With the seam at 0, all bytes behind it are compared.
    let mut cost = (0..ends)
        .map(|at| differ(old.get(at + cut), new.get(at + grown)))
        .sum::<usize>();
    let mut best = (cost, true, 0);
    let starts = layout::fields(linktype, old)
        .iter()
        .map(|field| field.at)
        .collect::<Vec<_>>();
    for at in 0..ends {
        cost += differ(old.get(at), new.get(at));
        cost -= differ(old.get(at + cut), new.get(at + grown));
        best = best.min((cost, !starts.contains(&(at + 1)), at + 1));
    }
    best.2
}

/// Differences between old[range] and the same bytes of `new`, `shift` further on: by header fields, what is in none by runs.
fn replaced(
    changes: &mut Vec<Change>,
    old: &[u8],
    new: &[u8],
    (range, shift): (std::ops::Range<usize>, i64),
    linktype: Linktype,
) {
    let new_at = |at: usize| at.checked_add_signed(shift as isize);
    let differs = |at: usize| new_at(at).and_then(|at| new.get(at)) != old.get(at);
    let pair = |at: usize, len: usize| {
        let old = excerpt(old, at, len);
        (
            old,
            new_at(at).map_or_else(Vec::new, |at| excerpt(new, at, len)),
        )
    };
    let fields = layout::fields(linktype, old);
    let mut at = range.start;
    while at < range.end {
        if !differs(at) {
            at += 1;
            continue;
        }
        let field = fields
            .iter()
            .find(|field| (field.at..field.at + field.len).contains(&at))
            .filter(|field| field.at >= range.start && field.at + field.len <= range.end);
        let (start, len) = match field {
            Some(field) => (field.at, field.len),
            None => {
                let stop = fields
                    .iter()
                    .map(|field| field.at)
                    .find(|start| *start > at);
                let stop = stop.unwrap_or(range.end).min(range.end);
                (at, (at..stop).take_while(|at| differs(*at)).count())
            }
        };
        let (old, new) = pair(start, len);
        changes.push(Change::Replaced {
            at: start,
            field: field.copied(),
            old,
            new,
        });
        at = start + len;
    }
}

/// As much of the bytes as was captured and is shown.
fn excerpt(bytes: &[u8], at: usize, len: usize) -> Vec<u8> {
    let end = bytes.len().min(at + len.min(SHOWN));
    bytes.get(at..end).unwrap_or_default().to_vec()
}

impl Change {
    /// `+0x000c 4 bytes inserted: 81000064`, `-0x003a 16 bytes removed: …`, `~0x0016 IP time to live: 64 -> 7`.
    pub fn words(&self) -> String {
        match self {
            Change::Inserted { at, len, bytes } => {
                format!("+{at:#06x} {len} bytes inserted: {}", hex(bytes, *len))
            }
            Change::Removed { at, len, bytes } => {
                format!("-{at:#06x} {len} bytes removed: {}", hex(bytes, *len))
            }
            Change::Replaced {
                at,
                field: Some(field),
                old,
                new,
            } => format!(
                "~{at:#06x} {}: {} -> {}",
                field.name,
                field.value(old),
                field.value(new)
            ),
            Change::Replaced { at, old, new, .. } => format!(
                "~{at:#06x} {} -> {}",
                hex(old, old.len()),
                hex(new, new.len())
            ),
        }
    }
}

/// In hex; with an ellipsis where there are more than are known or shown.
fn hex(bytes: &[u8], len: usize) -> String {
    let more = if bytes.len() < len || bytes.len() == SHOWN {
        "…"
    } else {
        ""
    };
    layout::joined(bytes, "") + more
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame() -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
        frame.extend([
            0x45, 0, 0, 44, 0, 1, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ]);
        frame.extend([0, 9, 0, 80, 0, 24, 0, 0]);
        frame.extend([0x55; 16]);
        frame
    }

    fn words(old: &[u8], new: &[u8], moved: i64) -> Vec<String> {
        changes(
            (old, old.len()),
            (new, new.len()),
            moved,
            Linktype::ETHERNET,
        )
        .iter()
        .map(Change::words)
        .collect()
    }

    #[test]
    fn a_tag_is_put_in_behind_the_addresses() {
        let old = frame();
        let mut new = old.clone();
        new.splice(12..12, [0x81, 0, 0, 100]);
        assert_eq!(
            words(&old, &new, -4),
            ["+0x000c 4 bytes inserted: 81000064"]
        );
        assert_eq!(words(&new, &old, 4), ["-0x000c 4 bytes removed: 81000064"]);
    }

    #[test]
    fn an_outer_header_begins_where_the_inner_one_did() {
        let old = frame();
        let mut new = old.clone();
        let outer = [
            0x45, 0, 0, 64, 0, 1, 0, 0, 64, 4, 0, 0, 10, 0, 0, 1, 10, 0, 0, 0,
        ];
        new.splice(14..14, outer);
        let told = words(&old, &new, -20);
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(
            told[0].starts_with("+0x000e 20 bytes inserted: 4500"),
            "{told:?}"
        );
    }

    #[test]
    fn fields_and_payload() {
        let old = frame();
        let mut new = old.clone();
        new[22] = 7;
        new[33] = 9;
        new[45] = 0;
        assert_eq!(
            words(&old, &new, 0),
            [
                "~0x0016 IP time to live: 64 -> 7",
                "~0x001e IP destination: 10.0.0.2 -> 10.0.0.9",
                "~0x002d 55 -> 00"
            ]
        );
        assert!(words(&old, &old, 0).is_empty());
    }

    #[test]
    fn the_end_is_cut_or_grows() {
        let old = frame();
        assert_eq!(
            words(&old, &old[..54], 0),
            ["-0x0036 4 bytes removed: 55555555"]
        );
        assert_eq!(
            words(&old[..54], &old, 0),
            ["+0x0036 4 bytes inserted: 55555555"]
        );
        // Not captured: only the length is known.
        assert_eq!(
            changes((&old[..20], 58), (&old[..20], 42), 0, Linktype::ETHERNET),
            [Change::Removed {
                at: 42,
                len: 16,
                bytes: Vec::new()
            }]
        );
    }

    #[test]
    fn pairs_by_program_and_cpu() {
        let data = frame();
        let seen = |id, program, cpu| Seen {
            ts: 1,
            point: super::super::decode::SeenAt::Exit,
            cpu,
            id,
            ifindex: 1,
            queue: 0,
            len: data.len() as u32,
            verdict: Some(2),
            program,
            moved: 0,
            outer: 0,
            outer_link: 0,
            data: &data,
        };
        let mut pairs = Pairs::default();
        pairs.enter(&seen(5, 1, 0));
        pairs.enter(&seen(6, 1, 1));
        assert_eq!(
            pairs.exit(&seen(5, 1, 0), Linktype::ETHERNET),
            Diff::Changes(Vec::new())
        );
        assert_eq!(
            pairs.exit(&seen(6, 1, 0), Linktype::ETHERNET),
            Diff::Unknown
        );
        assert_eq!(
            pairs.exit(&seen(6, 2, 1), Linktype::ETHERNET),
            Diff::Unknown
        );
    }

    proptest! {
        #[test]
        fn any_two_packets(
            old in proptest::collection::vec(any::<u8>(), 0..80),
            new in proptest::collection::vec(any::<u8>(), 0..80),
            more in (0usize..100, 0usize..100),
            moved in -90i64..90,
        ) {
            for change in changes((&old, old.len() + more.0), (&new, new.len() + more.1), moved, Linktype::RAW_IP) {
                change.words();
            }
        }
    }
}
