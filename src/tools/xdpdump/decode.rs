//! Events of src/bpf/xdp/xdpdump.h into owned packets. Pure.

use crate::bpf;
use crate::bpf::xdpdump::types::{np_xdp_event, np_xdp_kind, np_xdp_packet, np_xdp_sent};

/// Where a packet was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SeenAt {
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
    pub point: SeenAt,
    pub cpu: u16,
    pub id: u64,
    pub ifindex: u32,
    pub queue: u32,
    /// Of the whole frame: outer headers and packet.
    pub len: u32,
    /// What the traced program returned.
    pub verdict: Option<u32>,
    /// Index of the traced program.
    pub program: u32,
    /// At exit: bytes by which the program moved the packet's start; negative: it made room in front.
    pub moved: i32,
    /// Bytes of outer headers in front of the packet, and those of them that are a link header (see src/bpf/outer.bpf.h).
    pub outer: u8,
    pub outer_link: u8,
    /// What was captured of the frame.
    pub data: &'a [u8],
}

impl<'a> Seen<'a> {
    /// What was captured of the packet that the device has received, without outer headers, and its length.
    pub fn packet(&self) -> (&'a [u8], u32) {
        let data = self.data.get(self.outer.into()..).unwrap_or_default();
        (data, self.len.saturating_sub(self.outer.into()))
    }
}

/// Bytes of `np_xdp_packet` in an event.
const PACKET_SENT: usize = np_xdp_sent::NP_XDP_PACKET_SENT.0 as usize;

/// What the buffer of CPU `cpu` held. Nothing for bytes that are no event of ours.
pub fn decode(cpu: u32, bytes: &[u8]) -> Option<Seen<'_>> {
    // All events have their kind at this place.
    let (sent, rest) = bytes.split_first_chunk::<PACKET_SENT>()?;
    let mut packet = [0; size_of::<np_xdp_packet>()];
    packet[..PACKET_SENT].copy_from_slice(sent);
    let (packet, _) = bpf::read::<np_xdp_packet>(&packet)?;
    if np_xdp_kind(packet.kind.into()) == np_xdp_kind::NP_XDP_CHAIN {
        let captured = (packet.len as usize).checked_sub(PACKET_SENT)?;
        return Some(Seen {
            ts: packet.ts,
            point: SeenAt::Chain,
            cpu: cpu as u16,
            id: u64::from(cpu) << 48 | packet.number,
            ifindex: packet.ifindex,
            queue: packet.queue.into(),
            len: packet.whole,
            verdict: None,
            program: 0,
            moved: 0,
            outer: 0,
            outer_link: 0,
            data: rest.get(..captured)?,
        });
    }
    let (event, rest) = bpf::read::<np_xdp_event>(bytes)?;
    let point = match np_xdp_kind(event.head.kind.into()) {
        np_xdp_kind::NP_XDP_ENTRY => SeenAt::Entry,
        np_xdp_kind::NP_XDP_EXIT => SeenAt::Exit,
        _ => return None,
    };
    let captured = (event.head.len as usize).checked_sub(size_of::<np_xdp_event>())?;
    Some(Seen {
        ts: event.head.ts,
        point,
        cpu: event.head.cpu,
        id: event.id,
        ifindex: event.ifindex,
        queue: event.queue.into(),
        len: event.len,
        verdict: (point == SeenAt::Exit).then_some(event.verdict),
        program: event.program,
        moved: event.moved,
        outer: event.outer,
        outer_link: event.outer_link,
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

    fn chained(len: u32, data: &[u8]) -> Vec<u8> {
        let packet = np_xdp_packet {
            ts: 5,
            len,
            kind: 1,
            queue: 2,
            number: 9,
            ifindex: 3,
            whole: 60,
        };
        let mut bytes = bpf::bytes_of(&packet)[..PACKET_SENT].to_vec();
        bytes.extend_from_slice(data);
        bytes
    }

    #[test]
    fn length_and_padding() {
        let bytes = sample(2, 75, &[1, 2, 3, 0, 0]);
        let seen = decode(0, &bytes).unwrap();
        assert_eq!(
            (seen.data, seen.len, seen.verdict),
            (&[1u8, 2, 3][..], 60, None)
        );
        assert_eq!(seen.packet(), (&[1u8, 2, 3][..], 60));
        let inner = Seen { outer: 2, ..seen };
        assert_eq!(inner.packet(), (&[3u8][..], 58));
        let cut = Seen { outer: 90, ..seen };
        assert_eq!(cut.packet(), (&[][..], 0));
        assert_eq!(decode(0, &sample(3, 72, &[])).unwrap().verdict, Some(1));
        assert_eq!(decode(0, &sample(2, 71, &[])), None);
        assert_eq!(decode(0, &sample(2, 80, &[1])), None);
        assert_eq!(decode(0, &sample(9, 72, &[])), None);
        assert_eq!(verdict_name(77), "UNKNOWN");
    }

    #[test]
    fn a_packet_of_the_chain() {
        let bytes = chained(33, &[1, 2, 3, 0, 0]);
        let seen = decode(4, &bytes).unwrap();
        assert_eq!((seen.point, seen.cpu, seen.ts), (SeenAt::Chain, 4, 5));
        assert_eq!((seen.id, seen.queue, seen.ifindex), (4 << 48 | 9, 2, 3));
        assert_eq!((seen.data, seen.len), (&[1u8, 2, 3][..], 60));
        assert_eq!(decode(4, &chained(29, &[])), None);
        assert_eq!(decode(4, &chained(40, &[1])), None);
    }

    proptest! {
        #[test]
        fn any_bytes(cpu: u32, bytes in proptest::collection::vec(any::<u8>(), 0..150)) {
            let _ = decode(cpu, &bytes);
        }
    }
}
