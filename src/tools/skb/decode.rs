//! Bytes of an event (src/bpf/skb/skb.h) to an owned value. Pure; short or odd data gives `None`.

use crate::bpf::read;
use crate::bpf::skb::types::{skb_event, skb_kind};
use crate::event::head::Head;

use super::columns::{self, meta, tuple};
use super::event::{Event, Point, SECTION_META, SECTION_TUPLE};

const KIND_DROP: u16 = skb_kind::SKB_KIND_DROP.0 as u16;
const KIND_DROPPED: u16 = skb_kind::SKB_KIND_DROPPED.0 as u16;
const KIND_RETURN: u16 = skb_kind::SKB_KIND_RETURN.0 as u16;
const KIND_ENTER: u16 = skb_kind::SKB_KIND_ENTER.0 as u16;
const KIND_LEAVE: u16 = skb_kind::SKB_KIND_LEAVE.0 as u16;
const KIND_ICMP: u16 = skb_kind::SKB_KIND_ICMP.0 as u16;
const KIND_NO_ROUTE: u16 = skb_kind::SKB_KIND_NO_ROUTE.0 as u16;
const KIND_TRANSLATED: u16 = skb_kind::SKB_KIND_TRANSLATED.0 as u16;

/// Sections that most events have, and no others.
const USUAL: u32 = SECTION_META | SECTION_TUPLE;

/// Decodes one event, without the padding that perf adds, into one that may have been used before: a new one, of half a kilobyte,
/// would be moved twice. `snap_len`: bytes of each packet that events carry.
pub fn decode(event: &mut Event, bytes: &[u8], snap_len: usize) -> Option<()> {
    let (e, mut rest) = read::<skb_event>(bytes)?;
    if event.sections & !USUAL != 0 {
        *event = Event::default();
    }
    fixed(event, &e);
    // By name, which the compiler can inline.
    (event.meta, event.tuple) = (None, None);
    if e.sections & SECTION_META != 0 {
        rest = meta::decode(event, rest, snap_len)?;
    }
    if e.sections & SECTION_TUPLE != 0 {
        rest = tuple::decode(event, rest, snap_len)?;
    }
    let mut left = e.sections & !USUAL;
    while left != 0 {
        let section = 1 << left.trailing_zeros();
        rest = (columns::of(section)?.decode)(event, rest, snap_len)?;
        left &= !section;
    }
    event.like = event.like();
    Some(())
}

/// The part that all events have.
fn fixed(event: &mut Event, e: &skb_event) {
    event.head = Head {
        ts: e.head.ts,
        kind: e.head.kind,
        cpu: e.head.cpu,
        tgid: e.head.tgid,
        pid: e.head.pid,
        comm: e.head.comm,
    };
    event.skb = e.skb;
    event.func = e.func;
    event.sections = e.sections;
    event.dropped = e.head.kind == KIND_DROPPED;
    event.reason = matches!(e.head.kind, KIND_DROP | KIND_DROPPED).then_some(e.reason);
    event.retval = (e.head.kind == KIND_RETURN).then_some(e.reason as i32);
    event.program = match e.head.kind {
        KIND_ENTER => Some(Point::Enter),
        KIND_LEAVE => Some(Point::Leave(e.reason as i32)),
        _ => None,
    };
    event.icmp = (e.head.kind == KIND_ICMP).then_some(((e.reason >> 8) as u8, e.reason as u8));
    event.translated = e.head.kind == KIND_TRANSLATED;
    event.no_route = (e.head.kind == KIND_NO_ROUTE).then_some(e.reason as i32);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpf::skb::types::{np_tuple, skb_meta};
    use crate::tools::skb::event::SECTION_STACK;
    use proptest::prelude::*;

    fn bytes<T: plain::Plain>(v: &T) -> &[u8] {
        // SAFETY: Plain types are their bytes.
        unsafe { plain::as_bytes(v) }
    }

    #[test]
    fn a_whole_event() {
        let mut e = skb_event {
            skb: 0xffff_8880_0000_1000,
            func: 42,
            sections: SECTION_META | SECTION_TUPLE | SECTION_STACK,
            reason: 5,
            ..skb_event::default()
        };
        e.head.kind = KIND_DROP;
        e.head.comm[..4].copy_from_slice(b"curl");
        let m = skb_meta {
            netns: 4_026_531_840,
            protocol: 0x0800,
            ..skb_meta::default()
        };
        let mut t = np_tuple {
            l3_version: 4,
            l4_proto: 6,
            sport: 1234,
            dport: 80,
            ..np_tuple::default()
        };
        t.saddr[1] = u64::from_ne_bytes([0, 0, 0xff, 0xff, 10, 0, 0, 1]);
        t.daddr[1] = u64::from_ne_bytes([0, 0, 0xff, 0xff, 10, 0, 0, 2]);
        let mut b = bytes(&e).to_vec();
        b.extend_from_slice(bytes(&m));
        b.extend_from_slice(bytes(&t));
        b.extend_from_slice(&7u64.to_ne_bytes());
        b.extend_from_slice(&8u64.to_ne_bytes());
        let mut got = Event::default();
        decode(&mut got, &b, 0).unwrap();
        assert_eq!(got.reason, Some(5));
        assert_eq!(got.meta.as_ref().unwrap().netns, 4_026_531_840);
        assert_eq!(
            got.tuple.unwrap().unwrap().to_string(),
            "10.0.0.1:1234->10.0.0.2:80(tcp)"
        );
        assert_eq!(got.stack.as_ref().unwrap(), &[7, 8]);
        // Cut anywhere in the fixed sections: refused, not misread.
        for cut in 0..b.len() - 16 {
            assert_eq!(decode(&mut got, &b[..cut], 0), None, "{cut}");
        }
        // Nothing of an event is left in the next one.
        e.sections = 0;
        e.head.kind = KIND_RETURN;
        decode(&mut got, bytes(&e), 0).unwrap();
        let mut new = Event::default();
        decode(&mut new, bytes(&e), 0).unwrap();
        assert_eq!(got, new);
        assert_eq!((got.reason, got.retval), (None, Some(5)));
    }

    proptest! {
        #[test]
        fn odd_bytes_never_panic(b in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = decode(&mut Event::default(), &b, 64);
        }
    }
}
