//! `netprobe tcp --live`: the connections that exist now, as the kernel's socket tables list them.

use anyhow::Result;

use crate::kernel::netns::Netns;
use crate::kernel::process::SocketHolders;
use crate::kernel::tcp_sockets::{self, TcpSocket};
use crate::os;
use crate::run::Flow;
use crate::run::log;
use crate::run::output::Output;

use super::args::Args;
use super::connection::{Connection, Counters, Owner};
use super::present::Presenter;

/// One line for each connection of each network namespace of this host; ends then.
pub fn run(args: &Args) -> Result<()> {
    let mut filter = args.filter.resolve()?;
    log::init(args.engine.verbose);
    let mut out = Output::open(&args.output)?;
    let mut presenter = Presenter::new(args.details)?;
    let mut holders = SocketHolders::look();
    let now = os::monotonic_ns()?;
    let mut found = Vec::new();
    for netns in Netns::all() {
        // One that is gone meanwhile has none.
        let sockets = match netns.run(tcp_sockets::all) {
            Ok(sockets) => sockets?,
            Err(e) => {
                log::note(&format!("{e:#}"));
                continue;
            }
        };
        found.extend(sockets.into_iter().map(|socket| (netns.inode, socket)));
    }
    presenter.header(&mut out)?;
    let mut shown = 0;
    for (netns, socket) in &found {
        let holder = holders.of(socket.inode);
        let owner = holder.map(|p| Owner::new(p.pid, socket.uid, socket.cgroup, p.comm.as_bytes()));
        let connection = connection(socket, owner, *netns, now);
        if !filter.takes(&connection) {
            continue;
        }
        shown += 1;
        if presenter.row(&mut out, &connection, false, None)? == Flow::Stop {
            break;
        }
    }
    out.flush()?;
    log::note(&format!("{} connections exist, {shown} shown", found.len()));
    Ok(())
}

/// Offsets are those of struct tcp_info.
fn connection(socket: &TcpSocket, owner: Option<Owner>, netns: u32, now: u64) -> Connection {
    let word = |offset| socket.word(offset);
    let us = |offset| socket.long(offset).saturating_mul(1000);
    let again = socket.long(208);
    let rtt = word(68);
    // The kernel counts sequence numbers: the peer's FIN has one (TCP_CLOSE_WAIT, TCP_LAST_ACK, TCP_CLOSING).
    let fin_received = matches!(socket.state, 8 | 9 | 11);
    Connection {
        end: now,
        owner,
        netns,
        old: true,
        fin_received,
        mptcp: socket.mptcp,
        last_state: socket.state,
        open: true,
        counters: Counters {
            sent: socket.long(200).saturating_sub(again),
            sent_again: again,
            received: socket.long(128).saturating_sub(fin_received.into()),
            segs_out: word(136),
            segs_in: word(140),
            data_segs_out: word(156),
            data_segs_in: word(152),
            retransmitted: word(100),
            lost: word(32),
            reordered: word(220),
            duplicates: word(216),
            out_of_order: word(224),
            rtt,
            rttvar: if rtt == 0 { 0 } else { word(72) },
            // Before the first sample it is the greatest number.
            min_rtt: Some(word(148)).filter(|us| *us != u32::MAX).unwrap_or(0),
            busy: us(168),
            window_limited: us(176),
            buffer_limited: us(184),
        },
        ..Connection::nothing(socket.local, socket.remote)
    }
}
