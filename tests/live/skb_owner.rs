//! `netprobe skb --output-owner`: the process whose socket a packet belongs to, on its way out and in.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::skb_drops::{DROP_OUTPUT, is_ours};
use crate::common::{Case, Netprobe, Pair, case};
use nix::sys::socket;

pub fn cases() -> Vec<Case> {
    vec![
        case("skb_owner_of_retransmits", owner_of_retransmits)
            .once_on("newest")
            .trace()
            .program("nft"),
        case("skb_owner_older_than_the_trace", owner_older)
            .once_on("newest")
            .trace(),
        case("skb_owner_of_arrivals", owner_of_arrivals)
            .once_on("newest")
            .trace(),
    ]
}

/// A dropped SYN and its retransmits, which timers send, name the program that connects, each time.
fn owner_of_retransmits() -> Result<()> {
    let net = Pair::new()?;
    net.client.nft(DROP_OUTPUT)?;
    let probe = Netprobe::new("skb")
        .args(["--drops", "--output-owner", "--output-json"])
        .args(["--filter-dst-port", "81"])
        .start()?;
    let to = net.server.v4(81);
    let connecting = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("np-connector".into())
            .spawn_scoped(scope, || {
                net.client.enter(|| {
                    // The thread that enters the namespace is another one: it needs the name.
                    let _ = nix::sys::prctl::set_name(c"np-connector");
                    std::net::TcpStream::connect_timeout(&to, Duration::from_secs(20))
                })
            })?;
        // The SYN and two retransmits (after 1 s and 3 s).
        let seen = probe.wait_lines("three drops", |text| {
            (text.lines().count() >= 3).then(|| text.to_owned())
        });
        // Ends the connect: nothing drops any more, and the server refuses.
        net.client.nft("flush ruleset")?;
        let _ = thread.join();
        seen
    });
    let seen = connecting?;
    for line in seen.lines() {
        let row: Value = serde_json::from_str(line)?;
        let owner = &row["owner"];
        ensure!(owner["comm"] == "np-connector", "owner: {line}");
        ensure!(
            owner["pid"].as_u64() == Some(std::process::id().into()),
            "pid: {line}"
        );
        ensure!(owner["uid"].as_u64() == Some(0), "uid: {line}");
    }
    let first: Value = serde_json::from_str(seen.lines().next().context("no line")?)?;
    ensure!(first["comm"] == "np-connector", "the SYN itself: {first}");
    probe.stop()?.expect_success()
}

/// A socket that was connected before the trace began is found by /proc; one that nobody holds is `?` or `-`.
fn owner_older() -> Result<()> {
    let net = Pair::new()?;
    let server = net.server.tcp_listen(net.server.v4(0))?;
    let mut stream = net
        .client
        .tcp_connect(server.address(), crate::common::deadline())??;
    let probe = Netprobe::new("skb")
        .args(["--output-owner", "--filter-func", "__ip_queue_xmit"])
        .args(["--output-json", "--filter-netns", net.client.name()])
        .start()?;
    std::io::Write::write_all(&mut stream, b"hello")?;
    let line = probe.wait_line("__ip_queue_xmit")?;
    let row: Value = serde_json::from_str(&line)?;
    ensure!(
        row["owner"]["pid"].as_u64() == Some(std::process::id().into()),
        "{line}"
    );
    probe.stop()?.expect_success()
}

/// A receive buffer that is full, v4 and v6, and a connection's socket: the drops name the process that should have read.
fn owner_of_arrivals() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    for address in [net.server.v4(0), net.server.v6(0)] {
        let run = Netprobe::new("skb")
            .args(["--drops", "--output-owner", "--output-json"])
            .args(["--filter-proto", "udp", "--filter-netns", net.server.name()])
            .start()?;
        let socket = net.server.udp_bind(address)?;
        socket::setsockopt(&socket, socket::sockopt::RcvBuf, &2048)?;
        let to = socket.local_addr()?;
        for _ in 0..20 {
            net.client.udp_send(to, &[0; 1000])?;
        }
        let line = run.wait_line("\"drop\"")?;
        let row: Value = serde_json::from_str(&line)?;
        ensure!(row["tuple"]["dport"] == to.port(), "{row}");
        is_ours(&row)?;
        // A port that nobody listens at has no owner.
        drop(socket);
        net.client.udp_send(to, b"nobody")?;
        let last = run.wait_lines("a drop without an owner", |text| {
            let rows = text.lines().filter(|l| l.contains("\"drop\""));
            let mut rows = rows.filter_map(|l| serde_json::from_str::<Value>(l).ok());
            rows.find(|r| r["len"].as_u64() < Some(100))
        })?;
        ensure!(last["owner"].is_null(), "{last}");
        run.stop()?.expect_success()?;
    }
    Ok(())
}
