//! Bytes of a note (src/bpf/tcp/tcp.h) to what has happened to a connection. Pure; short or odd data gives `None`.

use std::net::SocketAddr;

use crate::bpf::read;
use crate::bpf::tcp::types::{conn_kind, conn_lost, conn_note, conn_what};

use super::connection::{self, Owner, Role, SYN_SENT};

/// What is sent again, and why (the connection's state of congestion control, enum tcp_ca_state).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Syn,
    SynAck,
    /// the retransmission timeout has passed
    Rto,
    /// acknowledgements told of a hole (fast retransmit, RACK)
    Fast,
    /// tail-loss probe: the last segment once more, before the timeout
    Tlp,
}

/// A packet that this kernel dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dropped {
    /// ns of CLOCK_MONOTONIC
    pub ts: u64,
    /// address of the code that dropped it
    pub at: u64,
    /// enum skb_drop_reason
    pub reason: u32,
    /// inode; 0: not known
    pub netns: u32,
    /// it acknowledged what is sent again; else it is the original
    pub acknowledges: bool,
}

/// What has happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    Retransmit {
        kind: Kind,
        /// of the connection then, TCP_*; 0: it is a request still
        state: u8,
        /// sequence numbers: the first, and the one after the last
        seq: (u32, u32),
        /// the last one is a FIN, which is no byte
        fin: bool,
        /// the timeout that has passed, ns
        rto: Option<u64>,
        dropped: Option<Dropped>,
    },
    /// what was sent again had arrived: the kernel takes its reaction back
    Undone,
    /// so many segments were there already, says the peer (DSACK)
    Duplicates(u32),
    /// in this state, TCP_*; enum sk_rst_reason
    ResetSent {
        state: u8,
        reason: u32,
    },
    ResetReceived {
        state: u8,
    },
    /// its end waits for this sequence number
    PeerShut {
        seq: u32,
    },
    /// after ns
    PeerOpen(u64),
    /// a process reads while the window is zero, and this end waits for a sequence number; ns since data came last
    ReadHere {
        seq: u32,
        ns: u64,
    },
    Pressure,
    Relief,
    State {
        from: u8,
        to: u8,
    },
}

/// Something has happened to a connection.
#[derive(Debug, Clone, PartialEq)]
pub struct Note {
    /// ns of CLOCK_MONOTONIC
    pub ts: u64,
    /// the current process and its name, NUL-padded
    pub current: (u32, [u8; 16]),
    pub owner: Option<Owner>,
    pub role: Role,
    pub local: SocketAddr,
    pub remote: SocketAddr,
    pub netns: u32,
    /// address of the struct sock; 0: none
    pub sock: u64,
    /// of a RST: the number of its stack in the kernel's map
    pub stack: Option<u32>,
    pub what: What,
}

/// enum tcp_ca_state
const CA_RECOVERY: u8 = 3;
const CA_LOSS: u8 = 4;

/// Decodes one note, without the padding that perf adds.
pub fn decode(bytes: &[u8]) -> Option<Note> {
    let (n, _) = read::<conn_note>(bytes)?;
    if n.head.kind != conn_kind::CONN_KIND_NOTE.0 as u16 {
        return None;
    }
    let (local, remote) = connection::ends(&n.ends)?;
    Some(Note {
        ts: n.head.ts,
        current: (n.head.tgid, n.head.comm),
        owner: connection::owner(&n.life.owner),
        role: connection::role(n.life.role),
        local,
        remote,
        netns: n.ends.netns,
        sock: n.sock,
        stack: n.stack.checked_sub(1),
        what: what(&n)?,
    })
}

fn what(n: &conn_note) -> Option<What> {
    let is = |what: conn_what| u32::from(n.what) == what.0;
    Some(match () {
        () if is(conn_what::CONN_WHAT_RETRANSMIT) => retransmit(n),
        () if is(conn_what::CONN_WHAT_RETRANSMIT_SYNACK) => What::Retransmit {
            kind: Kind::SynAck,
            state: 0,
            seq: (n.seq, n.end_seq),
            fin: false,
            rto: None,
            dropped: dropped(n),
        },
        () if is(conn_what::CONN_WHAT_UNDONE) => What::Undone,
        () if is(conn_what::CONN_WHAT_DUPLICATES) => What::Duplicates(n.seq),
        () if is(conn_what::CONN_WHAT_RST_OUT) => What::ResetSent {
            state: n.from,
            reason: n.reason,
        },
        () if is(conn_what::CONN_WHAT_RST_IN) => What::ResetReceived { state: n.from },
        () if is(conn_what::CONN_WHAT_PEER_SHUT) => What::PeerShut { seq: n.seq },
        () if is(conn_what::CONN_WHAT_PEER_OPEN) => What::PeerOpen(n.waited),
        () if is(conn_what::CONN_WHAT_HERE_READ) => What::ReadHere {
            seq: n.seq,
            ns: jiffies(n),
        },
        () if is(conn_what::CONN_WHAT_PRESSURE) => What::Pressure,
        () if is(conn_what::CONN_WHAT_RELIEF) => What::Relief,
        () if is(conn_what::CONN_WHAT_STATE) => What::State {
            from: n.from,
            to: n.to,
        },
        () => return None,
    })
}

fn retransmit(n: &conn_note) -> What {
    let kind = match (n.from, n.ca_state) {
        (SYN_SENT, _) => Kind::Syn,
        (_, CA_LOSS) => Kind::Rto,
        (_, CA_RECOVERY) => Kind::Fast,
        _ => Kind::Tlp,
    };
    let timed = matches!(kind, Kind::Syn | Kind::Rto);
    What::Retransmit {
        kind,
        state: n.from,
        seq: (n.seq, n.end_seq),
        fin: n.fin != 0,
        rto: timed.then(|| jiffies(n)),
        dropped: dropped(n),
    }
}

/// A time in jiffies, ns.
fn jiffies(n: &conn_note) -> u64 {
    u64::from(n.jiffies) * 1_000_000_000 / connection::hz(n.waited, n.head.ts)
}

fn dropped(n: &conn_note) -> Option<Dropped> {
    let is = |lost: conn_lost| u32::from(n.lost) == lost.0;
    (!is(conn_lost::CONN_LOST_NONE)).then(|| Dropped {
        ts: n.drop.ts,
        at: n.drop.at,
        reason: n.drop.reason,
        netns: n.drop.netns,
        acknowledges: is(conn_lost::CONN_LOST_ACK),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use crate::event::head::any_event;

    use super::*;

    #[test]
    fn kinds_of_what_is_sent_again() {
        let mut n = conn_note::default();
        n.head.kind = conn_kind::CONN_KIND_NOTE.0 as u16;
        n.ends.version = 4;
        n.what = conn_what::CONN_WHAT_RETRANSMIT.0 as u8;
        for (state, ca_state, wanted) in [
            (SYN_SENT, 4, Kind::Syn),
            (1, 4, Kind::Rto),
            (1, 3, Kind::Fast),
            (1, 0, Kind::Tlp),
            (8, 2, Kind::Tlp),
        ] {
            (n.from, n.ca_state) = (state, ca_state);
            let note = decode(crate::bpf::bytes_of(&n)).unwrap();
            let What::Retransmit {
                kind,
                dropped,
                state: told,
                ..
            } = note.what
            else {
                panic!("{note:?}");
            };
            assert_eq!((kind, dropped, told), (wanted, None, state));
        }
        let bytes = crate::bpf::bytes_of(&n).to_vec();
        assert_eq!(decode(&bytes[..bytes.len() - 1]), None);
        n.what = 200;
        assert_eq!(decode(crate::bpf::bytes_of(&n)), None);
    }

    proptest! {
        #[test]
        fn any_bytes(bytes in any_event()) {
            let _ = decode(&bytes);
        }
    }
}
