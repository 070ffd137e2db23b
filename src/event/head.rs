//! The head of every event: when, where, and who was current.

use crate::text::escape::push_escaped;
use crate::text::format::push_dec;

/// `struct np_head` of src/bpf/common/event.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Head {
    /// ns of CLOCK_MONOTONIC
    pub ts: u64,
    pub kind: u16,
    pub cpu: u16,
    pub tgid: u32,
    pub pid: u32,
    /// name of the current thread as it was in the kernel then, NUL-padded
    pub comm: [u8; 16],
}

impl Head {
    /// `comm:pid`, escaped.
    pub fn push_process(&self, out: &mut Vec<u8>) {
        push_escaped(out, &self.comm);
        out.push(b':');
        push_dec(out, self.tgid.into());
    }
}

/// For property tests of decoders: any bytes, with one of the first kinds in the head.
#[cfg(test)]
pub fn any_event() -> impl proptest::strategy::Strategy<Value = Vec<u8>> {
    use proptest::prelude::*;
    let at = std::mem::offset_of!(crate::bpf::skb::types::np_head, kind);
    let bytes = prop::collection::vec(any::<u8>(), 0..600);
    (bytes, 0u16..12).prop_map(move |(mut bytes, kind)| {
        if let Some(place) = bytes.get_mut(at..at + size_of_val(&kind)) {
            place.copy_from_slice(&kind.to_ne_bytes());
        }
        bytes
    })
}
