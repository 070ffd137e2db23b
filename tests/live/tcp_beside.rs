//! `netprobe tcp` beside others' tools, with the same traffic in the same machine: libbpf-tools' tcplife, bpftrace's
//! tcpretrans.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::tcp::{connected, listen as listen_at, read_all, start};
use super::tcp_losses::finish;
use super::tcpconnect_beside::terminal;
use crate::common::{Case, Pair, case, wait_for};

pub fn cases() -> Vec<Case> {
    vec![
        case("tcp_beside_tcplife", beside)
            .once_on("newest")
            .trace()
            .program("peer-tcplife"),
        case("tcp_beside_tcpretrans", beside_tcpretrans)
            .once_on("6.12")
            .trace()
            .program("nft")
            .program("peer-bpftrace"),
    ]
}

/// A connection as both tools see it: both ends, and KB sent and received.
type Seen = (SocketAddr, SocketAddr, u64, u64);

/// The same traffic beside libbpf-tools' tcplife: its rows are ours, and its durations.
fn beside() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let me = std::process::id().to_string();
    let run = start(&["--pid", &me])?;
    // Into a pipe it would write nothing before its end.
    let (ours, terminal) = terminal()?;
    let mut peer = Command::new("peer-tcplife")
        .stdout(terminal)
        .stderr(Stdio::null())
        .spawn()?;
    let mut out = BufReader::new(std::fs::File::from(ours));
    let mut line = String::new();
    // Printed once it has attached.
    out.read_line(&mut line)?;
    // The first, and the last that ends.
    let (held, accepted) = connected(&net, 82)?;
    for to in [net.server.v4(80), net.server.v6(81)] {
        let listener = listen_at(&net.server, to)?;
        for kilobytes in [0, 1, 10, 70] {
            let mut client = net.client.enter(|| TcpStream::connect(to))??;
            let (mut server, _) = listener.accept()?;
            let sends = std::thread::spawn(move || -> Result<()> {
                client.write_all(&vec![1; kilobytes * 1024])?;
                client.read_exact(&mut [0; 2048])?;
                Ok(())
            });
            server.read_exact(&mut vec![0; kilobytes * 1024])?;
            server.write_all(&[2; 2048])?;
            sends.join().expect("the client ends")?;
            ensure!(read_all(&mut server)? == 0);
        }
    }
    finish(accepted, held)?;
    const ROWS: usize = 18;
    let mut theirs = BTreeSet::new();
    let mut durations = Vec::new();
    while theirs.len() < ROWS {
        line.clear();
        ensure!(out.read_line(&mut line)? > 0, "the peer ended");
        let (seen, ms) = their_row(&line)?;
        durations.push((seen, ms));
        theirs.insert(seen);
    }
    peer.kill()?;
    peer.wait()?;
    run.wait_lines("all rows", |t| (t.lines().count() >= ROWS).then_some(()))?;
    let done = run.stop()?;
    done.expect_success()?;
    let rows = done.json_of("connection")?;
    let ours: Vec<(Seen, f64)> = rows.iter().map(our_row).collect::<Result<_>>()?;
    let seen: BTreeSet<Seen> = ours.iter().map(|(seen, _)| *seen).collect();
    ensure!(seen == theirs, "theirs: {theirs:?}\n{done}");
    for (seen, ms) in durations {
        let (_, ours) = ours.iter().find(|(s, _)| *s == seen).context("no row")?;
        // Either program may be held up before it reads the clock.
        ensure!(
            (ours - ms).abs() < 20.0 + ms / 20.0,
            "{ours} ms, theirs {ms}: {seen:?}"
        );
    }
    Ok(())
}

fn end(end: &Value) -> Result<SocketAddr> {
    let ip = end["ip"].as_str().context("no address")?.parse()?;
    let port = end["port"].as_u64().context("no port")? as u16;
    Ok(SocketAddr::new(ip, port))
}

fn our_row(row: &Value) -> Result<(Seen, f64)> {
    let kb = |key: &str| row[key].as_u64().unwrap_or(0) / 1024;
    let seen = (
        end(&row["local"])?,
        end(&row["remote"])?,
        kb("bytes_sent"),
        kb("bytes_received"),
    );
    // It begins to count when the connection is established.
    let ns = |key: &str| row[key].as_u64().with_context(|| format!("no {key}"));
    Ok((
        seen,
        (ns("duration_ns")? - ns("handshake_ns")?) as f64 / 1e6,
    ))
}

/// PID COMM LADDR LPORT RADDR RPORT TX_KB RX_KB MS
fn their_row(line: &str) -> Result<(Seen, f64)> {
    let words: Vec<&str> = line.split_whitespace().rev().collect();
    ensure!(words.len() >= 9, "{line}");
    let at = |ip: usize, port: usize| -> Result<SocketAddr> {
        Ok(SocketAddr::new(words[ip].parse()?, words[port].parse()?))
    };
    let kb = |word: usize| words[word].parse::<f64>();
    let seen = (at(6, 5)?, at(4, 3)?, kb(2)? as u64, kb(1)? as u64);
    Ok((seen, words[0].parse()?))
}

/// A segment that was sent again: from, to, state of the connection.
type Again = (SocketAddr, SocketAddr, String);

/// Lost data, over IPv4 and IPv6, and a lost SYN. It has no tail-loss probes, which do not go by tcp_retransmit_skb().
fn beside_tcpretrans() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    net.client.sysctl("net/ipv4/tcp_syn_retries", "1")?;
    net.server.nft(
        "add table inet t; add chain inet t in { type filter hook input priority 0; }; \
         add rule inet t in tcp dport { 90, 91 } drop; \
         add rule inet t in tcp dport { 80, 81 } meta length > 200 numgen inc mod 4 0 drop",
    )?;
    let run = start(&["--events=retransmits"])?;
    let output = tempfile::NamedTempFile::new()?;
    // All that it takes from the C library.
    let headers = tempfile::tempdir()?;
    std::fs::create_dir(headers.path().join("sys"))?;
    let families = "#define AF_INET 2\n#define AF_INET6 10\n";
    std::fs::write(headers.path().join("sys/socket.h"), families)?;
    let script = "mount -t debugfs none /sys/kernel/debug 2>/dev/null; exec peer-bpftrace -B line -I \"$1\" /usr/local/bin/peer-tcpretrans.bt";
    let mut peer = Command::new("sh")
        .args(["-c", script, "sh"])
        .arg(headers.path())
        .stdout(output.reopen()?)
        .stderr(Stdio::null())
        .spawn()?;
    let theirs = |port: u16| -> Result<Vec<Again>> {
        let text = std::fs::read_to_string(output.path())?;
        let rows = text.lines().filter_map(their_again);
        Ok(rows.filter(|(_, to, _)| to.port() == port).collect())
    };
    let connect = |port| {
        net.client
            .enter(|| TcpStream::connect(net.server.v4(port)).is_err())
    };
    // It has attached once it shows one.
    wait_for("the peer's first row", || {
        ensure!(peer.try_wait()?.is_none(), "the peer ended");
        ensure!(connect(90)?);
        Ok((!theirs(90)?.is_empty()).then_some(()))
    })?;
    ensure!(connect(91)?);
    for to in [net.server.v4(80), net.server.v6(81)] {
        let listener = listen_at(&net.server, to)?;
        let mut client = net.client.enter(|| TcpStream::connect(to))??;
        let (mut server, _) = listener.accept()?;
        let reader = std::thread::spawn(move || read_all(&mut server));
        for _ in 0..40 {
            client.write_all(&[7; 1000])?;
        }
        drop(client);
        ensure!(reader.join().expect("the reader ends")? == 40_000);
    }
    let ours = |port: u16| -> Result<Vec<Again>> {
        let text = run.stdout();
        let rows = text.lines().filter_map(|l| serde_json::from_str(l).ok());
        let again = rows.filter(|e: &Value| {
            e["happened"] == "retransmit" && e["how"] != "tlp" && e["remote"]["port"] == port
        });
        let row = |e: Value| {
            let state = e["state"].as_str().unwrap_or_default().to_owned();
            Ok((end(&e["local"])?, end(&e["remote"])?, state))
        };
        again.map(row).collect()
    };
    for (port, least) in [(91, 1), (80, 5), (81, 5)] {
        let both = || -> Result<(Vec<Again>, Vec<Again>)> {
            let (mut ours, mut theirs) = (ours(port)?, theirs(port)?);
            ours.sort();
            theirs.sort();
            Ok((ours, theirs))
        };
        // Either writes a moment later.
        let same = wait_for("the same rows", || {
            let (ours, theirs) = both()?;
            Ok((ours == theirs && ours.len() >= least).then_some(()))
        });
        same.with_context(|| format!("port {port}, ours and theirs: {:#?}", both()))?;
    }
    peer.kill()?;
    peer.wait()?;
    run.stop()?.expect_success()
}

/// TIME PID LADDR:LPORT RADDR:RPORT STATE
fn their_again(line: &str) -> Option<Again> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [_, _, local, remote, state] = words[..] else {
        return None;
    };
    let at = |word: &str| {
        let (ip, port) = word.rsplit_once(':')?;
        Some(SocketAddr::new(ip.parse().ok()?, port.parse().ok()?))
    };
    Some((at(local)?, at(remote)?, state.to_owned()))
}
