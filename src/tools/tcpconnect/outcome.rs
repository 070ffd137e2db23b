//! What a connect came to, in words. Pure; the rules are the table at the end.

use crate::text::format::errno_name;

use super::decode::{self, Connect, DECIDED_AT_ONCE, DECIDED_ESTABLISHED, Drop};

/// The word for it. One of: established, failed, interrupted, refused, reset, timed-out, unreachable, aborted.
pub fn word(c: &Connect) -> &'static str {
    match c.decided {
        DECIDED_ESTABLISHED => "established",
        DECIDED_AT_ONCE => "failed",
        _ => RULES
            .iter()
            .find(|(errors, _)| errors.contains(&(c.error as i32)))
            .map_or("failed", |(_, word)| word),
    }
}

/// `ECONNREFUSED`; `None` where there was no error.
pub fn error_name(c: &Connect) -> Option<String> {
    if c.error == 0 {
        return None;
    }
    Some(errno_name(c.error))
}

/// A soft error of the socket that its process never asked for: by SO_ERROR it would have got it.
pub fn unread_error(c: &Connect) -> Option<String> {
    let unread = word(c) == "interrupted" && c.fate.soft_error != 0;
    unread.then(|| errno_name(c.fate.soft_error))
}

/// What the kernel's drops of packets of a handshake were.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Dropped {
    /// packets of the handshake
    pub drop: Option<Drop>,
    /// copies of them: another one went on
    pub copy: Option<Drop>,
    /// by a host that they were not addressed to: copies, or packets with a wrong hardware address
    pub other_host: Option<Drop>,
}

/// Sorts the drops. `place` names the function at an address.
pub fn dropped(c: &Connect, place: impl Fn(u64) -> String) -> Dropped {
    let (mut drop, mut copy) = (c.fate.drop, c.fate.copy);
    // Without a reason to go by, the program takes all that is for another host's hardware address for a copy: a bridge drops such too.
    if let Some(c) = copy.filter(|c| c.reason == 0 && !receives(&place(c.at))) {
        copy = None;
        drop = drop.or(Some(c));
    }
    if let Some(d) = drop.filter(|d| is_packet_socket(&place(d.at))) {
        drop = None;
        copy = copy.or(Some(d));
    }
    if c.answered_at_once() {
        return Dropped {
            copy: drop.or(copy),
            ..Dropped::default()
        };
    }
    let certain =
        c.has(decode::FLAG_FLOODED) || copy.is_some_and(|d| is_packet_socket(&place(d.at)));
    Dropped {
        drop,
        copy: copy.filter(|_| certain),
        other_host: copy.filter(|_| !certain),
    }
}

/// ip_rcv, ip_rcv_core and the like: where a packet for another host's hardware address ends.
fn receives(function: &str) -> bool {
    function.starts_with("ip_rcv") || function.starts_with("ip6_rcv")
}

/// packet_rcv, tpacket_rcv: a packet socket has no room for its copy.
fn is_packet_socket(function: &str) -> bool {
    function.starts_with("packet_rcv") || function.starts_with("tpacket_rcv")
}

/// What else is worth telling, as words without blanks.
pub fn notes(c: &Connect) -> Vec<&'static str> {
    NOTES
        .iter()
        .filter(|(flag, _)| c.has(*flag))
        .map(|(_, note)| *note)
        .collect()
}

const NOTES: [(u32, &str); 7] = [
    (decode::FLAG_NONBLOCK, "non-blocking"),
    (decode::FLAG_MAPPED, "v4-mapped"),
    (decode::FLAG_MPTCP, "mptcp"),
    (decode::FLAG_FASTOPEN, "fast-open"),
    (decode::FLAG_SYN_DATA, "syn-data"),
    (decode::FLAG_DEFERRED, "syn-deferred"),
    (decode::FLAG_EXITING, "process-ended"),
];

/// The socket's error when it closed, and the word for it. No error: its process closed it before it was decided.
const RULES: [(&[i32], &str); 6] = [
    (&[0], "interrupted"),
    (&[libc::ECONNREFUSED], "refused"),
    (&[libc::ETIMEDOUT], "timed-out"),
    (
        &[
            libc::EHOSTUNREACH,
            libc::ENETUNREACH,
            libc::EHOSTDOWN,
            libc::ENOPROTOOPT,
            libc::EACCES,
            libc::EPROTO,
        ],
        "unreachable",
    ),
    (&[libc::ECONNRESET, libc::EPIPE], "reset"),
    (&[libc::ECONNABORTED], "aborted"),
];

#[cfg(test)]
mod tests {
    use super::super::decode::Fate;
    use super::*;
    use crate::event::head::Head;
    use std::net::Ipv4Addr;

    fn connect(decided: u8, error: i32, flags: u32) -> Connect {
        Connect {
            head: Head::default(),
            sock: 0,
            start: 0,
            syn: 0,
            cgroup: 0,
            saddr: Ipv4Addr::LOCALHOST.into(),
            daddr: Ipv4Addr::LOCALHOST.into(),
            sport: 0,
            dport: 0,
            version: 4,
            netns: 0,
            uid: 0,
            retransmits: 0,
            decided,
            error: error as u32,
            flags,
            stacks: None,
            fate: Fate::default(),
        }
    }

    #[test]
    fn words() {
        for (decided, error, expected) in [
            (1, 0, "established"),
            (2, libc::ENETUNREACH, "failed"),
            (3, 0, "interrupted"),
            (3, libc::ECONNREFUSED, "refused"),
            (3, libc::ETIMEDOUT, "timed-out"),
            (3, libc::EHOSTUNREACH, "unreachable"),
            (3, libc::ECONNRESET, "reset"),
            (3, libc::ENOMEM, "failed"),
        ] {
            assert_eq!(word(&connect(decided, error, 0)), expected);
        }
    }

    #[test]
    fn errors_and_notes() {
        let c = connect(
            2,
            libc::ENETUNREACH,
            decode::FLAG_NONBLOCK | decode::FLAG_MPTCP,
        );
        assert_eq!(error_name(&c).as_deref(), Some("ENETUNREACH"));
        assert_eq!(notes(&c), ["non-blocking", "mptcp"]);
        assert_eq!(error_name(&connect(1, 0, 0)), None);
        assert_eq!(
            error_name(&connect(3, 9999, 0)).as_deref(),
            Some("errno 9999")
        );
    }

    #[test]
    fn drops_and_copies() {
        let place = |at: u64| {
            ["nf_hook_slow", "ip_rcv_core", "br_forward", "tpacket_rcv"][at as usize].to_owned()
        };
        let at = |at: u64, reason: u32| {
            Some(Drop {
                at,
                reason,
                packets: 1,
            })
        };
        let mut c = connect(3, 0, 0);
        c.fate.drop = at(0, 5);
        c.fate.copy = at(1, 6);
        let d = dropped(&c, place);
        assert_eq!((d.drop, d.copy, d.other_host), (at(0, 5), None, at(1, 6)));
        c.flags = decode::FLAG_FLOODED;
        assert_eq!(dropped(&c, place).copy, at(1, 6));
        // A packet that got through and was sent once was lost nowhere.
        let mut c = connect(1, 0, 0);
        c.fate.drop = at(0, 5);
        let d = dropped(&c, place);
        assert_eq!((d.drop, d.copy), (None, at(0, 5)));
        c.retransmits = 1;
        assert_eq!(dropped(&c, place).drop, at(0, 5));
        // Without reasons the place tells.
        let mut c = connect(3, 0, 0);
        c.fate.copy = at(2, 0);
        assert_eq!(dropped(&c, place).drop, at(2, 0));
        c.fate.copy = at(1, 0);
        assert_eq!(dropped(&c, place).other_host, at(1, 0));
        c.fate = Fate {
            drop: at(3, 0),
            ..Fate::default()
        };
        let d = dropped(&c, place);
        assert_eq!((d.drop, d.copy), (None, at(3, 0)));
    }

    #[test]
    fn a_soft_error_that_nobody_read() {
        let mut c = connect(3, 0, 0);
        assert_eq!(unread_error(&c), None);
        c.fate.soft_error = libc::EHOSTUNREACH as u32;
        assert_eq!(unread_error(&c).as_deref(), Some("EHOSTUNREACH"));
        c.error = libc::ETIMEDOUT as u32;
        assert_eq!(unread_error(&c), None);
    }
}
