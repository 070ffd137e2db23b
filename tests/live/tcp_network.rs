//! `netprobe tcp`: what the network does to a connection and nothing on this host drops: answers that come late, packets
//! that overtake one another, the last acknowledgement lost; and many connections at once.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::tcp::{connected, ends, info, listen, read_all, row, start};
use super::tcp_events::event;
use super::tcp_losses::{SMALL, SMALL_V4, again, finish, write};
use crate::common::{Case, Finished, Netns, Netprobe, Pair, Running, case, wait_for};

pub fn cases() -> Vec<Case> {
    vec![
        case("tcp_spurious", spurious)
            .once_on("6.12")
            .trace()
            .fentry(),
        case("tcp_reordering", reordering).once_on("newest").trace(),
        case("tcp_lost_last_ack", lost_last_ack)
            .old_and_new()
            .trace()
            .program("nft"),
        case("tcp_sentence_of_the_network", network)
            .once_on("newest")
            .trace()
            .program("nft"),
        case("tcp_memory_pressure", memory_pressure)
            .once_on("6.1")
            .trace(),
        case("tcp_burst_counted", burst).old_and_new().trace(),
    ]
}

/// include/uapi/linux/tcp.h, offsets of words: tcpi_unacked, tcpi_dsack_dups, tcpi_reord_seen, tcpi_rcv_ooopack
const UNACKED: usize = 24;
const DSACK_DUPS: usize = 216;
const REORD_SEEN: usize = 220;
const OUT_OF_ORDER: usize = 224;

fn word(stream: &TcpStream, offset: usize) -> Result<u64> {
    Ok(info(stream, offset)? & 0xffff_ffff)
}

/// Counters of a namespace's TcpExt line, added up.
fn counted(netns: &Netns, names: &[&str]) -> Result<u64> {
    let text = netns.enter(|| std::fs::read_to_string("/proc/thread-self/net/netstat"))??;
    let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
    let (heads, values) = (
        lines.next().context("TcpExt")?,
        lines.next().context("TcpExt")?,
    );
    let both = heads.split(' ').zip(values.split(' '));
    let wanted = both.filter(|(name, _)| names.contains(name));
    Ok(wanted.filter_map(|(_, n)| n.parse::<u64>().ok()).sum())
}

/// What was sent again for nothing, to a port, as the kernel found out: by undoing, and segments by DSACK.
fn found_out(run: &Running, port: u16) -> (u64, u64) {
    let text = run.stdout();
    let rows = text.lines().filter_map(|l| serde_json::from_str(l).ok());
    let told = rows.filter(|e: &Value| e["happened"] == "spurious" && e["remote"]["port"] == port);
    told.fold((0, 0), |(undone, twice), e: Value| {
        match e["how"] == "undo" {
            true => (undone + 1, twice),
            false => (undone, twice + e["segments"].as_u64().unwrap_or(0)),
        }
    })
}

/// Data and its answer, so that both ends know the round trip.
fn turns(client: &mut TcpStream, server: &mut TcpStream, count: usize) -> Result<()> {
    for _ in 0..count {
        client.write_all(b"?")?;
        server.read_exact(&mut [0])?;
        server.write_all(b"!")?;
        client.read_exact(&mut [0])?;
    }
    Ok(())
}

/// The way back takes longer at once: a probe, and a timeout, for nothing.
fn spurious() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    net.client.sysctl("net/ipv4/tcp_autocorking", "0")?;
    let run = start(&["--events=retransmits"])?;
    let undo = [
        "TCPFullUndo",
        "TCPPartialUndo",
        "TCPDSACKUndo",
        "TCPLossUndo",
    ];
    for (port, delay, how) in [(50, 150, "tlp"), (51, 900, "rto")] {
        let (mut client, mut server) = connected(&net, port)?;
        client.set_nodelay(true)?;
        turns(&mut client, &mut server, 20)?;
        net.server.cmd(&format!(
            "tc qdisc add dev veth0 root netem delay {delay}ms"
        ))?;
        write(&mut client, &[1000, SMALL])?;
        server.read_exact(&mut [0; 1000 + SMALL])?;
        event(&run, port, |e| e["how"] == how)?;
        // Each segment that was sent again comes back as one that the peer had.
        let dups = wait_for("what the peer had twice", || {
            let dups = word(&client, DSACK_DUPS)?;
            let sent = again(&run, port).len() as u64;
            Ok((dups > 0 && dups == sent && word(&client, UNACKED)? == 0).then_some(dups))
        })?;
        net.server.cmd("tc qdisc del dev veth0 root")?;
        // Where the kernel skipped the program at the last acknowledgement, the next one tells.
        let (told, dups) = wait_for("the events", || {
            turns(&mut client, &mut server, 1)?;
            let dups = word(&client, DSACK_DUPS)?.max(dups);
            let told = found_out(&run, port);
            Ok((told.1 == dups).then_some((told, dups)))
        })?;
        ensure!(told.0 > 0 || how == "tlp", "{}", run.stdout());
        finish(server, client)?;
        let done = ends(&run, "connect", port, "closed-here")?;
        ensure!(done["duplicates"] == dups, "{dups}: {done}");
        ensure!(done["retransmitted"].as_u64() >= Some(dups), "{done}");
    }
    let undone = found_out(&run, 50).0 + found_out(&run, 51).0;
    let counted = counted(&net.client, &undo)?;
    ensure!(undone == counted, "{counted} counted: {}", run.stdout());
    run.stop()?.expect_success()
}

/// Each fifth packet overtakes those before it.
fn reordering() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    net.client.sysctl("net/ipv4/tcp_autocorking", "0")?;
    let run = start(&[])?;
    let text = Netprobe::new("tcp").args(["-v", "--port", "52"]).start()?;
    let (mut client, mut server) = connected(&net, 52)?;
    net.client
        .cmd("tc qdisc add dev veth0 root netem delay 20ms reorder 100% gap 5")?;
    let sends = std::thread::spawn(move || write(&mut client, &[1000; 100]).map(|()| client));
    server.read_exact(&mut [0; 100_000])?;
    let client = sends.join().expect("the client ends")?;
    wait_for("the last acknowledgement", || {
        Ok((word(&client, UNACKED)? == 0).then_some(()))
    })?;
    let reordered = word(&client, REORD_SEEN)?;
    let early = word(&server, OUT_OF_ORDER)?;
    ensure!(reordered > 0 && early > 0, "nothing was reordered");
    finish(server, client)?;
    let sent = ends(&run, "connect", 52, "closed-here")?;
    ensure!(sent["reordered"] == reordered, "{reordered}: {sent}");
    let received = ends(&run, "accept", 52, "closed-by-peer")?;
    ensure!(received["out_of_order"] == early, "{early}: {received}");
    run.stop()?.expect_success()?;
    text.wait_line(&format!(" reordered {reordered},"))?;
    text.stop()?.expect_success()
}

/// The end that closes last repeats its FIN.
fn lost_last_ack() -> Result<()> {
    let net = Pair::new()?;
    net.server
        .nft("add table inet t; add chain inet t in { type filter hook input priority 0; }")?;
    let run = start(&["--events=retransmits"])?;
    let text = Netprobe::new("tcp")
        .args(["--events=retransmits", "--port", "55"])
        .start()?;
    for (port, to) in [(55, net.server.v4(55)), (56, net.server.v6(56))] {
        let listener = listen(&net.server, to)?;
        let mut client = net.client.enter(|| TcpStream::connect(to))??;
        let (mut server, _) = listener.accept()?;
        turns(&mut client, &mut server, 1)?;
        drop(client);
        ensure!(read_all(&mut server)? == 0);
        // The first is the last that comes: all before it is acknowledged.
        net.server.nft(&format!(
            "add rule inet t in tcp dport {port} tcp flags & (fin | syn | rst | ack) == ack quota until 80 bytes drop"
        ))?;
        drop(server);
        let fin = event(&run, port, |e| e["fin"] == true)?;
        ensure!(
            fin["role"] == "accept" && fin["local"]["port"] == port && fin["bytes"] == 0,
            "{fin}"
        );
        ensure!(
            fin["dropped"]["packet"] == "ack"
                && fin["dropped"]["class"] == "firewall"
                && fin["dropped"]["netns"] == net.server.inode()?,
            "{fin}"
        );
        let done = ends(&run, "accept", port, "closed-by-peer")?;
        ensure!(done["retransmitted"].as_u64() > Some(0), "{done}");
        let done = ends(&run, "connect", port, "closed-here")?;
        ensure!(done["retransmitted"] == 0, "{done}");
    }
    run.stop()?.expect_success()?;
    let text = text.stop()?;
    text.expect_stdout(" FIN sent again by ")?;
    text.expect_stdout("; its acknowledgement was dropped here ")
}

/// A long way, and two timeouts.
fn network() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    net.client.sysctl("net/ipv4/tcp_autocorking", "0")?;
    let run = start(&["--events=retransmits", "--min-ms", "100", "--port", "57"])?;
    let slow = start(&["--only", "slow", "--port", "57,60"])?;
    let (client, server) = connected(&net, 60)?;
    finish(server, client)?;
    net.client
        .cmd("tc qdisc add dev veth0 root netem delay 80ms")?;
    let (mut client, mut server) = connected(&net, 57)?;
    client.set_nodelay(true)?;
    turns(&mut client, &mut server, 15)?;
    // The segment, the probe, and what the first timeout sends.
    net.server.nft(&format!(
        "add table inet t; add chain inet t in {{ type filter hook input priority 0; }}; \
         add rule inet t in tcp dport 57 meta length {SMALL_V4} quota until {} bytes drop",
        3 * SMALL_V4 + 1
    ))?;
    client.write_all(&[7; SMALL])?;
    server.read_exact(&mut [0; SMALL])?;
    turns(&mut client, &mut server, 15)?;
    wait_for("the last acknowledgement", || {
        Ok((word(&client, UNACKED)? == 0).then_some(()))
    })?;
    finish(server, client)?;
    let done = row(&run, "connect", 57)?;
    let sent = again(&run, 57);
    let timeouts = sent.iter().filter(|(how, _)| how == "rto").count();
    let said = done["slow"]["text"].as_str().unwrap_or_default();
    ensure!(
        timeouts > 1 && done["slow"]["rule"] == "tcp-network-lossy",
        "{done}"
    );
    let long = |row: &Value| row["duration_ns"].as_u64() >= Some(1_000_000_000);
    row(&slow, "connect", 57)?;
    let rows = slow.stop()?.json_of("connection")?;
    ensure!(long(&done) && rows.iter().all(long), "{rows:#?}");
    let rtt = done["rtt_us"].as_u64().unwrap_or(0);
    let wanted = format!(
        "the network: a round trip of {}.{:03} ms, {} segments sent again, {timeouts} of them by timeout (RTO)",
        rtt / 1000,
        rtt % 1000,
        sent.len()
    );
    ensure!(said.ends_with(&wanted) && rtt >= 80_000, "{wanted}: {done}");
    run.stop()?.expect_success()
}

const TCP_MEM: &str = "/proc/sys/net/ipv4/tcp_mem";

/// What TCP may have, in pages: as it was before, when dropped.
struct TcpMem(String);

impl TcpMem {
    /// It is short of memory from the third page on.
    fn short() -> Result<Self> {
        let before = Self(std::fs::read_to_string(TCP_MEM)?);
        let most = before.0.split_whitespace().last().context(TCP_MEM)?;
        std::fs::write(TCP_MEM, format!("1 2 {most}"))?;
        Ok(before)
    }
}

impl Drop for TcpMem {
    fn drop(&mut self) {
        let _ = std::fs::write(TCP_MEM, &self.0);
    }
}

/// Bytes that nobody reads, as many as go.
fn fill(client: &mut TcpStream) -> Result<()> {
    client.set_nonblocking(true)?;
    loop {
        match client.write(&[0; 65_536]) {
            Ok(_) => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(e) => return Err(e.into()),
        }
    }
}

fn memory_pressure() -> Result<()> {
    let net = Pair::new()?;
    let run = start(&["--events=pressure"])?;
    let short = TcpMem::short()?;
    let mut held = Vec::new();
    // Each CPU has a megabyte that is not counted, and the kernel looks only when it needs memory again.
    let mut until = |happened: &str| {
        wait_for(happened, || {
            let mut pair = connected(&net, 58)?;
            fill(&mut pair.0)?;
            held.push(pair);
            let text = run.stdout();
            let rows = text.lines().filter_map(|l| serde_json::from_str(l).ok());
            let mut rows = rows.filter(|r: &Value| r["happened"] == happened);
            Ok(rows.next())
        })
    };
    let pressure = until("memory-pressure")?;
    let ports = [&pressure["local"]["port"], &pressure["remote"]["port"]];
    ensure!(ports.iter().any(|port| **port == 58), "{pressure}");
    drop(short);
    until("memory-relief")?;
    run.stop()?.expect_success()
}

/// Both ends of each connection are rows, or counted.
fn burst() -> Result<()> {
    let count = match std::env::var_os("NETPROBE_SOAK") {
        Some(_) => 20_000,
        None => 2_000,
    };
    const THREADS: usize = 4;
    let net = Pair::new()?;
    net.client
        .sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
    let run = start(&[])?;
    let listener = listen(&net.server, net.server.v4(59))?;
    let to = listener.local_addr()?;
    let server = std::thread::spawn(move || -> Result<()> {
        for stream in listener.incoming().take(count) {
            read_all(&mut stream?)?;
        }
        Ok(())
    });
    let connects = || -> Result<()> {
        for _ in 0..count / THREADS {
            drop(TcpStream::connect(to)?);
        }
        Ok(())
    };
    std::thread::scope(|scope| -> Result<()> {
        let all: Vec<_> = (0..THREADS)
            .map(|_| scope.spawn(|| net.client.enter(connects)))
            .collect();
        for thread in all {
            thread.join().expect("a client ends")??;
        }
        Ok(())
    })?;
    server.join().expect("the server ends")?;
    let done = run.stop()?;
    done.expect_success()?;
    each_is_counted(&done, to, count)
}

fn each_is_counted(done: &Finished, to: SocketAddr, count: usize) -> Result<()> {
    let rows = done.json_of("connection")?;
    let of_port = |r: &&Value| r["remote"]["port"] == to.port() || r["local"]["port"] == to.port();
    let ends = rows.iter().filter(of_port);
    let ends: Vec<String> = ends
        .map(|r| format!("{} {} {}", r["local"], r["remote"], r["ts_ns"]))
        .collect();
    // A port may be used again.
    let distinct: BTreeSet<&String> = ends.iter().collect();
    ensure!(distinct.len() == ends.len(), "a connection is told twice");
    // Beside rows: what the run says was lost, and what had not ended when it stopped.
    let loss = done.json_of("loss")?;
    let lost = |key: &str| loss.iter().filter_map(|l| l[key].as_u64()).sum::<u64>() as usize;
    let open = done.stderr.split("that began meanwhile are open").next();
    let open = open.and_then(|text| text.trim_end().rsplit(' ').next()?.parse::<usize>().ok());
    let open = open.with_context(|| done.stderr.clone())?;
    let known = ends.len() + lost("lost") + lost("map_full") + open;
    ensure!(
        known <= 2 * count && known + lost("missed") >= 2 * count,
        "{} of {} rows; {open} open; {loss:?}; {}",
        ends.len(),
        2 * count,
        done.stderr
    );
    Ok(())
}
