//! What a connect came to, in words. Pure; the rules are the table at the end.

use nix::errno::Errno;

use super::decode::{self, Connect};

/// TCP_DECIDED_*
const DECIDED_ESTABLISHED: u8 = 1;
const DECIDED_AT_ONCE: u8 = 2;

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
    match Errno::from_raw(c.error as i32) {
        Errno::UnknownErrno => Some(format!("errno {}", c.error)),
        e => Some(format!("{e:?}")),
    }
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
            drops: 0,
            drop_at: 0,
            drop_reason: 0,
            stacks: None,
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
}
