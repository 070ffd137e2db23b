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

/// Decodes one event, without the padding that perf adds. `snap_len`: bytes of each packet that events carry.
pub fn decode(bytes: &[u8], snap_len: usize) -> Option<Event> {
    let (e, mut rest) = read::<skb_event>(bytes)?;
    let mut event = fixed(&e);
    // By name, which the compiler can inline: most events have these two and no others.
    if e.sections & SECTION_META != 0 {
        rest = meta::decode(&mut event, rest, snap_len)?;
    }
    if e.sections & SECTION_TUPLE != 0 {
        rest = tuple::decode(&mut event, rest, snap_len)?;
    }
    let mut left = e.sections & !(SECTION_META | SECTION_TUPLE);
    while left != 0 {
        let section = 1 << left.trailing_zeros();
        rest = (columns::of(section)?.decode)(&mut event, rest, snap_len)?;
        left &= !section;
    }
    Some(event)
}

/// The part that all events have.
fn fixed(e: &skb_event) -> Event {
    Event {
        head: Head {
            ts: e.head.ts,
            kind: e.head.kind,
            cpu: e.head.cpu,
            tgid: e.head.tgid,
            pid: e.head.pid,
            comm: e.head.comm,
        },
        skb: e.skb,
        func: e.func,
        sections: e.sections,
        dropped: e.head.kind == KIND_DROPPED,
        reason: matches!(e.head.kind, KIND_DROP | KIND_DROPPED).then_some(e.reason),
        retval: (e.head.kind == KIND_RETURN).then_some(e.reason as i32),
        program: match e.head.kind {
            KIND_ENTER => Some(Point::Enter),
            KIND_LEAVE => Some(Point::Leave(e.reason as i32)),
            _ => None,
        },
        icmp: (e.head.kind == KIND_ICMP).then_some(((e.reason >> 8) as u8, e.reason as u8)),
        no_route: (e.head.kind == KIND_NO_ROUTE).then_some(e.reason as i32),
        ..Event::default()
    }
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
        let got = decode(&b, 0).unwrap();
        assert_eq!(got.reason, Some(5));
        assert_eq!(got.meta.unwrap().netns, 4_026_531_840);
        assert_eq!(
            got.tuple.unwrap().unwrap().to_string(),
            "10.0.0.1:1234->10.0.0.2:80(tcp)"
        );
        assert_eq!(got.stack.unwrap(), [7, 8]);
        // Cut anywhere in the fixed sections: refused, not misread.
        for cut in 0..b.len() - 16 {
            assert_eq!(decode(&b[..cut], 0), None, "{cut}");
        }
    }

    proptest! {
        #[test]
        fn odd_bytes_never_panic(b in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = decode(&b, 64);
        }
    }
}
