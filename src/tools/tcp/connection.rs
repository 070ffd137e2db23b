//! Bytes of an event (src/bpf/tcp/tcp.h) to a connection. Pure; short or odd data gives `None`.

use std::net::SocketAddr;

use serde::Serialize;

use crate::bpf::read;
use crate::bpf::tcp::types::{
    conn_ends, conn_event, conn_flag, conn_kind, conn_life, conn_owner, conn_role,
};
use crate::event::tuple::address;

const KIND_END: u16 = conn_kind::CONN_KIND_END.0 as u16;
const ROLE_CONNECT: u8 = conn_role::CONN_ROLE_CONNECT.0 as u8;
const ROLE_ACCEPT: u8 = conn_role::CONN_ROLE_ACCEPT.0 as u8;

/// include/net/tcp_states.h
pub const SYN_SENT: u8 = 2;
const STATES: [&str; 12] = [
    "ESTABLISHED",
    "SYN_SENT",
    "SYN_RECV",
    "FIN_WAIT1",
    "FIN_WAIT2",
    "TIME_WAIT",
    "CLOSE",
    "CLOSE_WAIT",
    "LAST_ACK",
    "LISTEN",
    "CLOSING",
    "NEW_SYN_RECV",
];

/// The name of a state, without TCP_.
pub fn state_name(state: u8) -> &'static str {
    let index = usize::from(state).wrapping_sub(1);
    STATES.get(index).copied().unwrap_or("an unknown state")
}

/// A part of its time that is worth a word, of a hundred.
const MUCH: u64 = 10;

/// Which end this is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Role {
    Connect,
    Accept,
    /// older than the run
    #[default]
    Unknown,
}

/// The process: it connected, accepted, or, where that was not seen, closed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Owner {
    /// id of its cgroup (v2)
    pub cgroup: u64,
    pub tgid: u32,
    pub uid: u32,
    /// NUL-padded
    comm: [u8; 16],
}

impl Owner {
    pub fn new(tgid: u32, uid: u32, cgroup: u64, name: &[u8]) -> Self {
        let mut comm = [0; 16];
        let len = name.len().min(comm.len());
        comm[..len].copy_from_slice(&name[..len]);
        Self {
            cgroup,
            tgid,
            uid,
            comm,
        }
    }

    /// Its name, as it was then.
    pub fn comm(&self) -> &[u8] {
        let end = self.comm.iter().position(|&byte| byte == 0);
        &self.comm[..end.unwrap_or(self.comm.len())]
    }
}

/// Which end closed first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Here,
    Peer,
}

/// What held a connection up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Limit {
    PeersWindow,
    SendBuffer,
    /// there was something to send all the time: the network, by congestion control
    Network,
    /// nothing to send
    Application,
}

/// A connection that has ended, or that exists.
#[derive(Debug, Clone, PartialEq)]
pub struct Connection {
    /// of the end, or of the look at it; ns of CLOCK_MONOTONIC
    pub end: u64,
    /// SYN sent or received, ns
    pub start: Option<u64>,
    pub established: Option<u64>,
    pub role: Role,
    pub owner: Option<Owner>,
    pub local: SocketAddr,
    pub remote: SocketAddr,
    pub netns: u32,
    pub sock: u64,
    /// it was there before the run
    pub old: bool,
    pub closed_first: Option<Side>,
    pub fin_received: bool,
    pub reset_sent: bool,
    pub reset_received: bool,
    pub mptcp: bool,
    /// closed by the end of its process
    pub exiting: bool,
    /// errno; 0: none
    pub error: u32,
    /// before the end, or now: TCP_* of include/net/tcp_states.h
    pub last_state: u8,
    /// it exists
    pub open: bool,
    pub counters: Counters,
    /// times that the peer's window was zero, and ns until it was open again, or to the end; `None`: not looked at
    pub zero_windows: Option<(u32, u64)>,
}

/// What the kernel counted in its struct tcp_sock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// bytes of data, each once
    pub sent: u64,
    /// bytes that were sent again
    pub sent_again: u64,
    /// bytes of data, each once
    pub received: u64,
    pub segs_out: u32,
    pub segs_in: u32,
    pub data_segs_out: u32,
    pub data_segs_in: u32,
    /// segments, those of the SYN included
    pub retransmitted: u32,
    pub lost: u32,
    pub reordered: u32,
    pub duplicates: u32,
    pub out_of_order: u32,
    /// us; 0: not measured
    pub rtt: u32,
    pub rttvar: u32,
    pub min_rtt: u32,
    /// ns with data to send; of these, ns that waited for the peer's window and for the send buffer
    pub busy: u64,
    pub window_limited: u64,
    pub buffer_limited: u64,
}

impl Connection {
    /// One of which nothing is known.
    pub fn nothing(local: SocketAddr, remote: SocketAddr) -> Self {
        Self {
            end: 0,
            start: None,
            established: None,
            role: Role::Unknown,
            owner: None,
            local,
            remote,
            netns: 0,
            sock: 0,
            old: false,
            closed_first: None,
            fin_received: false,
            reset_sent: false,
            reset_received: false,
            mptcp: false,
            exiting: false,
            error: 0,
            last_state: 0,
            open: false,
            counters: Counters::default(),
            zero_windows: None,
        }
    }

    /// From the SYN to the end, ns; `None` where the start was not seen.
    pub fn duration(&self) -> Option<u64> {
        Some(self.end.saturating_sub(self.start?))
    }

    /// What most of the established time went into, and how much of a hundred.
    pub fn limit(&self) -> Option<(Limit, u64)> {
        let n = &self.counters;
        let whole = match self.established {
            Some(since) => self.end.saturating_sub(since),
            // How long it stands is not known: of the time with data to send.
            None if self.open => n.busy,
            None => return None,
        };
        let share = |ns: u64| (ns * 100).checked_div(whole).map(|share| share.min(100));
        let (window, buffer) = (share(n.window_limited)?, share(n.buffer_limited)?);
        Some(match () {
            () if window >= MUCH && window >= buffer => (Limit::PeersWindow, window),
            () if buffer >= MUCH => (Limit::SendBuffer, buffer),
            () if share(n.busy)? >= 50 => (Limit::Network, share(n.busy)?),
            () => (Limit::Application, 100 - share(n.busy)?),
        })
    }

    /// Seen, or known by what only established connections have: the state before the end, an acknowledgement, data.
    pub fn was_established(&self) -> bool {
        let n = &self.counters;
        self.established.is_some()
            || self.old
            || self.closed_first.is_some()
            || n.rtt > 0
            || n.data_segs_in > 0
    }

    /// ns with data to send that waited for neither window nor buffer: for the network, by congestion control.
    pub fn network_limited(&self) -> u64 {
        let n = &self.counters;
        n.busy.saturating_sub(n.window_limited + n.buffer_limited)
    }

    /// ns with nothing to send since it was established: by the application; `None`: since when is not known.
    pub fn application_limited(&self) -> Option<u64> {
        let whole = self.end.saturating_sub(self.established?);
        Some(whole.saturating_sub(self.counters.busy))
    }

    /// From the SYN to the established connection, ns.
    pub fn handshake(&self) -> Option<u64> {
        Some(self.established?.saturating_sub(self.start?))
    }
}

/// Decodes one event, without the padding that perf adds.
pub fn decode(bytes: &[u8]) -> Option<Connection> {
    let (e, _) = read::<conn_event>(bytes)?;
    if e.head.kind != KIND_END {
        return None;
    }
    let (local, remote) = ends(&e.ends)?;
    let life: conn_life = e.life;
    let has = |flag: conn_flag| life.flags & flag.0 != 0;
    let seen = |ns: u64| (ns != 0).then_some(ns);
    let fin_received = has(conn_flag::CONN_FLAG_FIN_IN);
    let hz = hz(e.jiffies, e.head.ts);
    let ns = |ticks: u32| u64::from(ticks) * 1_000_000_000 / hz;
    let [busy, window, buffer] = e.limited.map(ns);
    Some(Connection {
        end: seen(life.end).unwrap_or(e.head.ts),
        start: seen(life.start),
        established: seen(life.established),
        role: role(life.role),
        owner: owner(&life.owner),
        local,
        remote,
        netns: e.ends.netns,
        sock: e.sock,
        old: has(conn_flag::CONN_FLAG_OLD),
        closed_first: closed_first(life.last),
        fin_received,
        reset_sent: has(conn_flag::CONN_FLAG_RST_OUT),
        reset_received: has(conn_flag::CONN_FLAG_RST_IN),
        mptcp: has(conn_flag::CONN_FLAG_MPTCP),
        exiting: has(conn_flag::CONN_FLAG_EXITING),
        error: e.error,
        last_state: life.last,
        open: false,
        counters: Counters {
            sent: e.bytes_sent.saturating_sub(e.bytes_retrans),
            sent_again: e.bytes_retrans,
            // The kernel counts sequence numbers, of which the FIN has one.
            received: e.bytes_received.saturating_sub(fin_received.into()),
            segs_out: e.segs_out,
            segs_in: e.segs_in,
            data_segs_out: e.data_segs_out,
            data_segs_in: e.data_segs_in,
            retransmitted: e.retransmitted,
            lost: e.lost,
            reordered: e.reordered,
            duplicates: e.duplicates,
            out_of_order: e.out_of_order,
            rtt: e.srtt,
            // Before the first sample the kernel assumes one.
            rttvar: if e.srtt == 0 { 0 } else { e.rttvar },
            min_rtt: e.min_rtt,
            busy: busy + window + buffer,
            window_limited: window,
            buffer_limited: buffer,
        },
        zero_windows: None,
    })
}

/// By the state before the end: a state in which a FIN was sent first, or received first.
fn closed_first(last: u8) -> Option<Side> {
    match state_name(last) {
        "FIN_WAIT1" | "FIN_WAIT2" | "CLOSING" | "TIME_WAIT" => Some(Side::Here),
        "CLOSE_WAIT" | "LAST_ACK" => Some(Side::Peer),
        _ => None,
    }
}

pub(super) fn role(role: u8) -> Role {
    match role {
        ROLE_CONNECT => Role::Connect,
        ROLE_ACCEPT => Role::Accept,
        _ => Role::Unknown,
    }
}

pub(super) fn owner(owner: &conn_owner) -> Option<Owner> {
    (owner.tgid != 0).then_some(Owner {
        cgroup: owner.cgroup,
        tgid: owner.tgid,
        uid: owner.uid,
        comm: owner.comm,
    })
}

/// The local end and the remote one.
pub(super) fn ends(e: &conn_ends) -> Option<(SocketAddr, SocketAddr)> {
    let at = |addr: [u64; 2], port| SocketAddr::new(address(addr, e.version), port);
    matches!(e.version, 4 | 6).then(|| (at(e.saddr, e.sport), at(e.daddr, e.dport)))
}

/// How many jiffies a second has: the counter starts five minutes before it overflows 32 bits (INITIAL_JIFFIES), so that one value and
/// the time since the boot decide between the rates that kernels are built with.
pub(super) fn hz(jiffies: u64, ns: u64) -> u64 {
    let distance = |hz: u64| {
        let start = u64::from(u32::MAX) + 1 - 300 * hz;
        let ticks = jiffies.wrapping_sub(start);
        let expected = ns as f64 * hz as f64 / 1e9;
        (ticks as f64 / expected.max(1.0)).ln().abs()
    };
    let rates = [100, 250, 300, 1000];
    let nearest = |a: &u64, b: &u64| distance(*a).total_cmp(&distance(*b));
    rates.into_iter().min_by(nearest).unwrap_or(250)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use crate::event::head::any_event;

    use super::*;

    #[test]
    fn rates_of_the_clock() {
        for hz_of_kernel in [100, 250, 300, 1000] {
            for seconds in [3, 60, 299, 301, 86_400, 20_000_000] {
                let jiffies = (1u64 << 32) - 300 * hz_of_kernel + seconds * hz_of_kernel;
                assert_eq!(
                    hz(jiffies, seconds * 1_000_000_000),
                    hz_of_kernel,
                    "{seconds}"
                );
            }
        }
        // Whatever comes.
        assert!(hz(0, 0) > 0 && hz(u64::MAX, u64::MAX) > 0);
    }

    #[test]
    fn who_closed_first() {
        let sides = [1, 4, 5, 6, 8, 9, 11, 0].map(closed_first);
        let (here, peer) = (Some(Side::Here), Some(Side::Peer));
        assert_eq!(sides, [None, here, here, here, peer, peer, here, None]);
    }

    #[test]
    fn short_and_odd_bytes() {
        let mut event = conn_event::default();
        event.ends.version = 4;
        let bytes = crate::bpf::bytes_of(&event);
        assert_eq!(decode(bytes), None, "no kind");
        event.head.kind = KIND_END;
        event.bytes_received = 11;
        event.life.flags = conn_flag::CONN_FLAG_FIN_IN.0;
        let bytes = crate::bpf::bytes_of(&event).to_vec();
        assert_eq!(decode(&bytes).unwrap().counters.received, 10);
        assert_eq!(decode(&bytes[..bytes.len() - 1]), None);
    }

    proptest! {
        #[test]
        fn any_bytes(bytes in any_event()) {
            let _ = decode(&bytes);
        }
    }
}
