//! How a connection ended. Pure.

use nix::errno::Errno;

use crate::text::format::errno_name;

use super::connection::{Connection, SYN_SENT, Side, state_name};

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// the SYN was answered by a RST
    Refused,
    /// nobody answered the SYN
    Unanswered,
    /// the handshake was not completed for another reason
    NotEstablished,
    /// the peer no longer acknowledged
    TimedOut,
    ResetByPeer,
    /// this end sent a RST: it was closed with unread data, or without lingering, or the peer sent what it cannot take
    ResetHere,
    /// closed by an administrator (`ss -K`)
    Killed,
    /// by an error, such as one of ICMP
    Failed,
    ClosedHere,
    ClosedByPeer,
    /// no FIN and no RST was seen
    Silent,
    /// it has not ended
    Open,
}

pub fn ending(c: &Connection) -> Ending {
    if c.open {
        return Ending::Open;
    }
    let error = Errno::from_raw(c.error as i32);
    let connecting = c.last_state == SYN_SENT;
    match error {
        Errno::ETIMEDOUT if connecting => return Ending::Unanswered,
        Errno::ETIMEDOUT => return Ending::TimedOut,
        Errno::ECONNABORTED => return Ending::Killed,
        _ => {}
    }
    match () {
        () if c.reset_received && connecting => Ending::Refused,
        () if c.reset_received => Ending::ResetByPeer,
        () if c.reset_sent => Ending::ResetHere,
        () if !c.was_established() => Ending::NotEstablished,
        () if c.error != 0 => Ending::Failed,
        () => match c.closed_first {
            Some(Side::Here) => Ending::ClosedHere,
            Some(Side::Peer) => Ending::ClosedByPeer,
            None => Ending::Silent,
        },
    }
}

impl Ending {
    /// The value in JSON, which stays.
    pub fn id(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Unanswered => "unanswered",
            Self::NotEstablished => "not-established",
            Self::TimedOut => "timed-out",
            Self::ResetByPeer => "reset-by-peer",
            Self::ResetHere => "reset-here",
            Self::Killed => "killed",
            Self::Failed => "failed",
            Self::ClosedHere => "closed-here",
            Self::ClosedByPeer => "closed-by-peer",
            Self::Silent => "silent",
            Self::Open => "open",
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Refused => "refused by the peer",
            Self::Unanswered => "no answer to the SYN",
            Self::NotEstablished => "never established",
            Self::TimedOut => "timed out: the peer acknowledged no more",
            Self::ResetByPeer => "reset by the peer",
            Self::ResetHere => "reset by this end",
            Self::Killed => "killed on this host",
            Self::Failed => "failed",
            Self::ClosedHere => "closed here first",
            Self::ClosedByPeer => "closed by the peer first",
            Self::Silent => "ended without FIN or RST",
            Self::Open => "open",
        }
    }
}

/// The same in words.
pub fn sentence(c: &Connection) -> String {
    let ending = ending(c);
    let mut text = ending.words().to_owned();
    if ending == Ending::Open {
        text += &format!(", {}", state_name(c.last_state));
    }
    if matches!(ending, Ending::Failed | Ending::NotEstablished) && c.error != 0 {
        text += &format!(" ({})", errno_name(c.error));
    }
    if ending == Ending::ResetHere && c.fin_received {
        text += ", after the peer's FIN";
    }
    if c.exiting {
        text += ", its process ended";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tools::tcp::connection::{Counters, Role};

    fn connection() -> Connection {
        let any = "10.0.0.1:1".parse().unwrap();
        Connection {
            end: 2,
            start: Some(1),
            established: Some(1),
            role: Role::Connect,
            last_state: 1,
            ..Connection::nothing(any, any)
        }
    }

    #[test]
    fn each_end() {
        let not = Connection {
            established: None,
            last_state: SYN_SENT,
            ..connection()
        };
        for (c, wanted) in [
            (
                Connection {
                    closed_first: Some(Side::Here),
                    ..connection()
                },
                "closed here first",
            ),
            // The kernel skipped the program when it was established.
            (
                Connection {
                    established: None,
                    closed_first: Some(Side::Here),
                    ..connection()
                },
                "closed here first",
            ),
            (
                Connection {
                    established: None,
                    counters: Counters {
                        rtt: 9000,
                        ..Counters::default()
                    },
                    ..connection()
                },
                "ended without FIN or RST",
            ),
            (
                Connection {
                    closed_first: Some(Side::Peer),
                    exiting: true,
                    ..connection()
                },
                "closed by the peer first, its process ended",
            ),
            (
                Connection {
                    reset_received: true,
                    error: 104,
                    ..connection()
                },
                "reset by the peer",
            ),
            (
                Connection {
                    reset_received: true,
                    error: 111,
                    ..not.clone()
                },
                "refused by the peer",
            ),
            (
                Connection {
                    reset_sent: true,
                    ..connection()
                },
                "reset by this end",
            ),
            (
                Connection {
                    error: 103,
                    reset_sent: true,
                    ..connection()
                },
                "killed on this host",
            ),
            (
                Connection {
                    error: 110,
                    ..connection()
                },
                "timed out: the peer acknowledged no more",
            ),
            (
                Connection {
                    error: 110,
                    ..not.clone()
                },
                "no answer to the SYN",
            ),
            (
                Connection {
                    error: 113,
                    ..not.clone()
                },
                "never established (EHOSTUNREACH)",
            ),
            (
                Connection {
                    error: 113,
                    ..connection()
                },
                "failed (EHOSTUNREACH)",
            ),
            (
                Connection {
                    open: true,
                    last_state: 8,
                    ..connection()
                },
                "open, CLOSE_WAIT",
            ),
            (not, "never established"),
            (connection(), "ended without FIN or RST"),
        ] {
            assert_eq!(sentence(&c), wanted);
        }
    }
}
