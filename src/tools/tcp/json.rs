//! The lines of `netprobe tcp` as JSON.

use std::net::SocketAddr;

use serde::Serialize;

use crate::text::escape::escaped;
use crate::text::format::errno_name;

use super::blame::Blame;
use super::connection::{Connection, Limit, Owner, Role, Side, state_name};
use super::ending::{ending, sentence};
use super::happenings::Happening;

/// When, who and where: what each line has. What is not known is missing.
#[derive(Serialize)]
pub struct Place {
    #[serde(rename = "type")]
    kind: &'static str,
    ts_ns: u64,
    wall_ns: u64,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    late: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    uid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    comm: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cgroup_id: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    container: Option<String>,
    role: &'static str,
    local: Address,
    remote: Address,
    netns: u32,
}

impl Place {
    pub fn new(
        kind: &'static str,
        (ts_ns, wall_ns, late): (u64, u64, bool),
        (owner, container): (Option<&Owner>, Option<String>),
        role: Role,
        (netns, local, remote): (u32, SocketAddr, SocketAddr),
    ) -> Self {
        Self {
            kind,
            ts_ns,
            wall_ns,
            late,
            pid: owner.map(|o| o.tgid),
            uid: owner.map(|o| o.uid),
            comm: owner.map(|o| escaped(o.comm())),
            cgroup_id: owner.map(|o| o.cgroup),
            container,
            role: match role {
                Role::Connect => "connect",
                Role::Accept => "accept",
                Role::Unknown => "unknown",
            },
            local: local.into(),
            remote: remote.into(),
            netns,
        }
    }
}

/// A connection (docs/json/tcp.json).
#[derive(Serialize)]
pub struct Row {
    #[serde(flatten)]
    place: Place,
    #[serde(skip_serializing_if = "Option::is_none")]
    duration_ns: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    handshake_ns: Option<u64>,
    before_run: bool,
    end: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    state: Option<&'static str>,
    text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    closed_first: Option<&'static str>,
    reset_sent: bool,
    reset_received: bool,
    process_ended: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    mptcp: bool,
    bytes_sent: u64,
    bytes_sent_again: u64,
    bytes_received: u64,
    segments_out: u32,
    segments_in: u32,
    data_segments_out: u32,
    data_segments_in: u32,
    retransmitted: u32,
    lost: u32,
    reordered: u32,
    duplicates: u32,
    out_of_order: u32,
    rtt_us: u32,
    rttvar_us: u32,
    min_rtt_us: u32,
    busy_ns: u64,
    window_limited_ns: u64,
    buffer_limited_ns: u64,
    network_limited_ns: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    application_limited_ns: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    zero_windows: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    zero_windows_ns: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    limited_by: Option<Limit>,
    #[serde(skip_serializing_if = "Option::is_none")]
    slow: Option<Blame>,
}

/// Something has happened to a connection.
#[derive(Serialize)]
pub struct NoteRow {
    #[serde(flatten)]
    pub place: Place,
    #[serde(flatten)]
    pub happening: Happening,
}

#[derive(Serialize)]
struct Address {
    ip: String,
    port: u16,
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self {
            ip: address.ip().to_string(),
            port: address.port(),
        }
    }
}

impl Row {
    pub fn of(c: &Connection, place: Place, slow: Option<Blame>) -> Self {
        let n = &c.counters;
        Self {
            place,
            duration_ns: c.duration(),
            handshake_ns: c.handshake(),
            before_run: c.old,
            end: ending(c).id(),
            state: c.open.then(|| state_name(c.last_state)),
            text: sentence(c),
            closed_first: c.closed_first.map(|side| match side {
                Side::Here => "here",
                Side::Peer => "peer",
            }),
            reset_sent: c.reset_sent,
            reset_received: c.reset_received,
            process_ended: c.exiting,
            error: (c.error != 0).then(|| errno_name(c.error)),
            mptcp: c.mptcp,
            bytes_sent: n.sent,
            bytes_sent_again: n.sent_again,
            bytes_received: n.received,
            segments_out: n.segs_out,
            segments_in: n.segs_in,
            data_segments_out: n.data_segs_out,
            data_segments_in: n.data_segs_in,
            retransmitted: n.retransmitted,
            lost: n.lost,
            reordered: n.reordered,
            duplicates: n.duplicates,
            out_of_order: n.out_of_order,
            rtt_us: n.rtt,
            rttvar_us: n.rttvar,
            min_rtt_us: n.min_rtt,
            busy_ns: n.busy,
            window_limited_ns: n.window_limited,
            buffer_limited_ns: n.buffer_limited,
            network_limited_ns: c.network_limited(),
            application_limited_ns: c.application_limited(),
            zero_windows: c.zero_windows.map(|(times, _)| times),
            zero_windows_ns: c.zero_windows.map(|(_, ns)| ns),
            limited_by: c.limit().map(|(limit, _)| limit),
            slow,
        }
    }
}
