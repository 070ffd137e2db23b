//! Events of src/bpf/xdpdump.h into owned packets. Pure.

use crate::bpf;
use crate::bpf::xdpdump::types::np_xdp_event;

/// NP_XDP_*: where a packet was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// Before all programs of the chain.
    Chain,
    /// A traced program was entered.
    Entry,
    /// A traced program returned.
    Exit,
}

/// One packet as it came out of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen<'a> {
    /// ns of CLOCK_MONOTONIC
    pub ts: u64,
    pub point: Point,
    pub cpu: u16,
    pub id: u64,
    pub ifindex: u32,
    pub queue: u32,
    /// Of the whole packet.
    pub len: u32,
    /// What the traced program returned.
    pub verdict: Option<u32>,
    /// Index of the traced program.
    pub program: u32,
    /// At exit: bytes by which the program moved the packet's start; negative: it made room in front.
    pub moved: i32,
    /// What was captured.
    pub data: &'a [u8],
}

/// Nothing for bytes that are no event of ours.
pub fn decode(bytes: &[u8]) -> Option<Seen<'_>> {
    let (event, rest) = bpf::read::<np_xdp_event>(bytes)?;
    let point = match event.head.kind {
        1 => Point::Chain,
        2 => Point::Entry,
        3 => Point::Exit,
        _ => return None,
    };
    let captured = (event.head.len as usize).checked_sub(size_of::<np_xdp_event>())?;
    Some(Seen {
        ts: event.head.ts,
        point,
        cpu: event.head.cpu,
        id: event.id,
        ifindex: event.ifindex,
        queue: event.queue,
        len: event.len,
        verdict: (point == Point::Exit).then_some(event.verdict),
        program: event.program,
        moved: event.moved,
        data: rest.get(..captured)?,
    })
}

/// The name of an XDP return code.
pub fn verdict_name(verdict: u32) -> &'static str {
    ["ABORTED", "DROP", "PASS", "TX", "REDIRECT"]
        .get(verdict as usize)
        .copied()
        .unwrap_or("UNKNOWN")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample(kind: u16, len: u32, data: &[u8]) -> Vec<u8> {
        let mut event = np_xdp_event {
            id: 9,
            ifindex: 3,
            queue: 1,
            len: 60,
            verdict: 1,
            ..Default::default()
        };
        event.head.kind = kind;
        event.head.len = len;
        let mut bytes = bpf::bytes_of(&event).to_vec();
        bytes.extend_from_slice(data);
        bytes
    }

    #[test]
    fn length_and_padding() {
        let bytes = sample(1, 75, &[1, 2, 3, 0, 0]);
        let seen = decode(&bytes).unwrap();
        assert_eq!(
            (seen.data, seen.len, seen.verdict),
            (&[1u8, 2, 3][..], 60, None)
        );
        assert_eq!(decode(&sample(3, 72, &[])).unwrap().verdict, Some(1));
        assert_eq!(decode(&sample(1, 71, &[])), None);
        assert_eq!(decode(&sample(1, 80, &[1])), None);
        assert_eq!(decode(&sample(9, 72, &[])), None);
        assert_eq!(verdict_name(77), "UNKNOWN");
    }

    proptest! {
        #[test]
        fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..150)) {
            let _ = decode(&bytes);
        }
    }
}
