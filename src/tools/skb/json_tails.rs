//! The JSON line of an event whose process, meta and tuple came before: all but its time, skb, CPU and function is
//! copied from the line that [`super::json`] wrote then. A packet passes some 60 functions with ten different tails;
//! an event costs 2,700 instructions in user space with this, 6,300 without (BENCHMARKS.md).

use crate::event::tuple::Tuple;
use crate::text::format::{push_dec, push_hex};
use crate::text::json::push_str;

use super::event::{Event, Meta, SECTION_DATA, SECTION_LIFE, SECTION_META, SECTION_TUPLE};
use super::json::When;

/// Tails that are remembered; a power of two.
const SLOTS: usize = 256;

/// What follows the CPU in the lines of events that have all of this in common.
pub struct Tail {
    tgid: u32,
    pid: u32,
    comm: [u8; 16],
    meta: Option<Meta>,
    tuple: Option<Option<Tuple>>,
    text: Vec<u8>,
    /// where the function's name belongs in the text
    func: usize,
}

/// The tails, each in the place that its event's hash says; no places before the first.
#[derive(Default)]
pub struct Tails(Vec<Option<Tail>>);

/// The event has nothing that a tail does not know: no section but these, of which the bytes are not for lines.
fn is_plain(event: &Event) -> bool {
    let more = event.sections & !(SECTION_META | SECTION_TUPLE | SECTION_DATA | SECTION_LIFE);
    !event.dropped
        && event.reason.is_none()
        && event.retval.is_none()
        && event.program.is_none()
        && more == 0
}

impl Tails {
    /// The tail of the event, where it is known.
    pub fn of(&self, event: &Event) -> Option<&Tail> {
        let tail = self.0.get(event.like as usize % SLOTS)?.as_ref()?;
        let same = tail.meta == event.meta
            && tail.tuple == event.tuple
            && (tail.tgid, tail.pid) == (event.head.tgid, event.head.pid)
            && tail.comm == event.head.comm
            && is_plain(event);
        same.then_some(tail)
    }

    /// Remembers what follows the CPU in the event's `line`.
    pub fn learn(&mut self, event: &Event, line: &[u8]) {
        if is_plain(event) {
            if let Some((text, func)) = cut(line) {
                self.0.resize_with(SLOTS, || None);
                self.0[event.like as usize % SLOTS] = Some(Tail {
                    tgid: event.head.tgid,
                    pid: event.head.pid,
                    comm: event.head.comm,
                    meta: event.meta.clone(),
                    tuple: event.tuple,
                    text,
                    func,
                });
            }
        }
    }
}

impl Tail {
    /// Appends the event's line; `func`: the function's name.
    pub fn push(&self, line: &mut Vec<u8>, event: &Event, when: When, func: &str) {
        line.extend_from_slice(b"{\"type\":\"event\",\"ts_ns\":");
        push_dec(line, event.head.ts);
        line.extend_from_slice(b",\"wall_ns\":");
        push_dec(line, when.wall);
        if let Some(since) = when.since {
            line.extend_from_slice(b",\"since_ns\":");
            push_dec(line, since);
        }
        if when.late {
            line.extend_from_slice(b",\"late\":true");
        }
        line.extend_from_slice(b",\"skb\":\"0x");
        push_hex(line, event.skb, 1);
        line.extend_from_slice(b"\",\"cpu\":");
        push_dec(line, event.head.cpu.into());
        let (before, behind) = self.text.split_at(self.func);
        line.extend_from_slice(before);
        push_str(line, func);
        line.extend_from_slice(behind);
    }
}

/// The line from its process on without the function's name, and where that was. No string in the line can hold a quote that is
/// not escaped, so that what is searched for is no part of one.
fn cut(line: &[u8]) -> Option<(Vec<u8>, usize)> {
    let find = |from: usize, what: &[u8]| {
        let at = line
            .get(from..)?
            .windows(what.len())
            .position(|w| w == what)?;
        Some(from + at)
    };
    let process = find(0, b",\"pid\":")?;
    let name = find(process, b",\"func\":\"")? + b",\"func\":".len();
    let end = find(name + 1, b"\"")? + 1;
    if line[name..end].contains(&b'\\') {
        return None;
    }
    let mut text = line[process..name].to_vec();
    let func = text.len();
    text.extend_from_slice(&line[end..]);
    Some((text, func))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::head::Head;
    use crate::tools::skb::columns::ALL;
    use crate::tools::skb::event::SECTION_OWNER;
    use crate::tools::skb::json;
    use crate::tools::skb::view::View;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn as_the_row_has_it(
            numbers in any::<(u64, u64, u32, u32, u16)>(),
            names in any::<([u8; 16], [u8; 16])>(),
            func in "[a-z_.\"\\\\]{1,20}",
            with in any::<(bool, bool, bool)>(),
            when in any::<(u64, Option<u64>, bool)>(),
        ) {
            let (ts, skb, a, b, c) = numbers;
            let tuple = Tuple {
                saddr: std::net::IpAddr::from(a.to_be_bytes()),
                daddr: std::net::IpAddr::from(std::net::Ipv6Addr::from(u128::from(skb))),
                sport: c,
                dport: a as u16,
                proto: b as u8,
                tcp_flags: a as u8,
                icmp_type: 0,
                icmp_code: 0,
                fragment: with.2,
            };
            let mut event = Event {
                head: Head { ts, kind: 1, cpu: c, tgid: a, pid: b, comm: names.0 },
                skb,
                sections: if with.0 { SECTION_META } else { 0 } | if with.1 { SECTION_TUPLE } else { 0 },
                meta: with.0.then_some(Meta {
                    netns: a, mark: b, ifindex: a, len: b, mtu: a, protocol: c, vlan: with.2.then_some(c), ifname: names.1,
                }),
                tuple: with.1.then_some(with.2.then_some(tuple)),
                ..Event::default()
            };
            let columns: Vec<_> = ALL.iter().collect();
            let row = |event: &Event, when: When, func: &str| {
                let mut line = Vec::new();
                let mut view = View::default();
                view.names.insert(event.func, func.to_owned());
                json::push(&mut line, &mut view, event, when, &columns).unwrap();
                String::from_utf8(line).unwrap()
            };
            let then = When { wall: 7, since: None, late: false };
            let mut tails = Tails::default();
            prop_assert!(tails.of(&event).is_none());
            tails.learn(&event, row(&event, then, "ip_rcv").as_bytes());
            (event.head.ts, event.skb) = (skb, ts);
            let now = When { wall: when.0, since: when.1, late: when.2 };
            let mut line = Vec::new();
            tails.of(&event).unwrap().push(&mut line, &event, now, &func);
            prop_assert_eq!(String::from_utf8(line).unwrap(), row(&event, now, &func));
            let other = Event { dropped: true, ..event.clone() };
            prop_assert!(tails.of(&other).is_none());
            let more = Event { sections: event.sections | SECTION_OWNER, ..event };
            prop_assert!(tails.of(&more).is_none());
        }
    }
}
