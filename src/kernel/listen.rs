//! Why a listener had no room for a SYN (src/bpf/common/listen.h): the kernel frees such a SYN as if it had been used, without a reason.

use crate::bpf::tcpconnect::types::np_listen;

/// In the form of a drop reason's name; `None` for the kernel's own reasons.
pub fn reason(value: u32) -> Option<&'static str> {
    match np_listen(value) {
        np_listen::NP_LISTEN_ACCEPT_QUEUE_FULL => Some("ACCEPT_QUEUE_FULL"),
        np_listen::NP_LISTEN_SYN_QUEUE_FULL => Some("SYN_QUEUE_FULL"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_own_reasons_are_not_ours() {
        assert_eq!(reason(2), None);
        assert_eq!(reason(0x3_0001), None);
        assert_eq!(reason(0xffff_0002), Some("ACCEPT_QUEUE_FULL"));
    }
}
