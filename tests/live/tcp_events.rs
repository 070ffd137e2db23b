//! `netprobe tcp --events`: what is sent again and why, resets, windows of zero, and the drops behind them, each made on purpose.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::Value;

use super::tcp::{connected, ends, info, listen, read_all, resent};
use super::tcp_losses::in_stack;
use crate::common::{Case, Env, Finished, Netprobe, Pair, Running, case, wait_for};

pub fn cases() -> Vec<Case> {
    vec![
        case("tcp_events", events)
            .once_on("6.1")
            .trace()
            .program("nft"),
    ]
}

/// The first event of the port that is like this.
pub fn event(run: &Running, port: u16, like: impl Fn(&Value) -> bool) -> Result<Value> {
    let found = run.wait_lines(&format!("an event of port {port}"), |text| {
        let rows = text.lines().filter_map(|l| serde_json::from_str(l).ok());
        let of_port = |r: &Value| r["local"]["port"] == port || r["remote"]["port"] == port;
        let mut events = rows.filter(|r: &Value| r["type"] == "event" && of_port(r));
        events.find(|r| like(r))
    });
    found.with_context(|| run.stdout())
}

fn events() -> Result<()> {
    let net = Pair::new()?;
    net.client.sysctl("net/ipv4/tcp_syn_retries", "1")?;
    net.server.nft(
        "add table inet t; add chain inet t in { type filter hook input priority 0; }; \
         add rule inet t in tcp dport 90 drop; \
         add rule inet t in tcp dport 91 meta length > 200 numgen inc mod 4 0 drop",
    )?;
    // The first acknowledgement of data.
    net.client.nft(
        "add table inet t; add chain inet t in { type filter hook input priority 0; }; \
         add rule inet t in tcp sport 92 tcp flags & (syn | fin | rst) == 0 quota until 100 bytes drop",
    )?;
    let run = Netprobe::new("tcp")
        .args(["--output-json", "--events"])
        .start()?;
    let text = Netprobe::new("tcp")
        .args(["--events=retransmits", "--port", "91"])
        .start()?;
    let slow = Netprobe::new("tcp")
        .args(["--output-json", "--min-ms", "300", "--port", "90,93"])
        .start()?;
    lost_syn(&net, &run)?;
    lost_data(&net, &run)?;
    lost_ack(&net, &run)?;
    windows(&net, &run)?;
    window_to_the_end(&net, &run)?;
    resets(&net, &run)?;
    why_slow(&slow.stop()?)?;
    let done = run.stop()?;
    done.expect_success()?;
    let text = text.stop()?;
    text.expect_success()?;
    text.expect_stdout("TIME ")?;
    text.expect_stdout(" it was dropped here ")?;
    text.expect_stdout("ended: closed here first, after ")?;
    ensure!(!text.stdout.contains("SYN_SENT"), "{text}");
    in_order(&done)
}

fn lost_syn(net: &Pair, run: &Running) -> Result<()> {
    let to = net.server.v4(90);
    ensure!(net.client.enter(|| TcpStream::connect(to))?.is_err());
    let again = event(run, 90, |e| e["happened"] == "retransmit")?;
    ensure!(
        again["how"] == "syn" && again["role"] == "connect" && again["pid"] == std::process::id(),
        "{again}"
    );
    let dropped = &again["dropped"];
    ensure!(
        dropped["packet"] == "original" && dropped["netns"] == net.server.inode()?,
        "{again}"
    );
    // Kernels before 5.17 know no reasons: the place says what it was.
    ensure!(dropped["class"] == "firewall", "{again}");
    // The first one waits for a second.
    let rto = again["rto_ns"].as_u64();
    ensure!(
        rto.is_some_and(|ns| (900_000_000..1_200_000_000).contains(&ns)),
        "{again}"
    );
    Ok(())
}

/// Each segment that the kernel counts as sent again is an event.
fn lost_data(net: &Pair, run: &Running) -> Result<()> {
    let before = resent(&net.client)?;
    let (mut client, mut server) = connected(net, 91)?;
    let reader = std::thread::spawn(move || read_all(&mut server).map(|read| (read, server)));
    for _ in 0..40 {
        client.write_all(&[7; 1000])?;
    }
    drop(client);
    let (read, server) = reader.join().expect("the reader ends")?;
    ensure!(read == 40_000);
    drop(server);
    let row = run.wait_line("\"before_run\":false,\"end\":\"closed-here\"")?;
    let counted = resent(&net.client)? - before;
    let all = run.stdout();
    let again: Vec<Value> = all
        .lines()
        .filter_map(|l| serde_json::from_str(l).ok())
        .filter(|e: &Value| e["happened"] == "retransmit" && e["remote"]["port"] == 91)
        .collect();
    ensure!(counted > 0, "nothing was sent again: {row}");
    // A segment of several packets counts as so many; an event tells its bytes.
    let mss = 1448;
    let segments: u64 = again
        .iter()
        .filter_map(|e| e["bytes"].as_u64())
        .map(|bytes| bytes.div_ceil(mss).max(1))
        .sum();
    ensure!(segments == counted, "{counted} counted: {again:#?}");
    let behind = |e: &&Value| e["dropped"]["packet"] == "original";
    let known = again.iter().filter(behind).count();
    ensure!(known > 0, "{again:#?}");
    ensure!(
        again
            .iter()
            .all(|e| ["rto", "fast", "tlp"].iter().any(|how| e["how"] == *how)),
        "{again:#?}"
    );
    Ok(())
}

fn lost_ack(net: &Pair, run: &Running) -> Result<()> {
    let (mut client, mut server) = connected(net, 92)?;
    client.write_all(&[1; 10])?;
    server.read_exact(&mut [0; 10])?;
    let again = event(run, 92, |e| e["happened"] == "retransmit")?;
    ensure!(
        again["dropped"]["packet"] == "ack" && again["dropped"]["netns"] == net.client.inode()?,
        "{again}"
    );
    ensure!(
        again["bytes"] == 10 && (again["how"] == "tlp" || again["how"] == "rto"),
        "{again}"
    );
    Ok(())
}

/// A line that is there by now.
fn event_of(run: &Running, is_it: impl Fn(&Value) -> bool) -> Option<Value> {
    let text = run.stdout();
    let mut all = text.lines().filter_map(|l| serde_json::from_str(l).ok());
    all.find(is_it)
}

/// Writes until the peer's window is zero, and for 400 ms more; the event, and how much was written.
fn shut_window(run: &Running, client: &mut TcpStream, port: u16) -> Result<(Value, usize)> {
    client.set_nonblocking(true)?;
    let mut written = 0;
    let is_it = |e: &Value| e["happened"] == "peer-window-zero" && e["remote"]["port"] == port;
    // Until the peer has no room: the buffer here grows meanwhile.
    let shut = wait_for("a window of zero", || {
        loop {
            match client.write(&[0; 65_536]) {
                Ok(n) => written += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => return Err(e.into()),
            }
        }
        Ok(event_of(run, is_it))
    })?;
    ensure!(shut["role"] == "connect", "{shut}");
    // tcpi_rwnd_limited
    wait_for("400 ms of a closed window", || {
        Ok((info(client, 176)? >= 400_000).then_some(()))
    })?;
    Ok((shut, written))
}

fn windows(net: &Pair, run: &Running) -> Result<()> {
    let (mut client, mut server) = connected(net, 93)?;
    let (_, written) = shut_window(run, &mut client, 93)?;
    let mut rest = written;
    let mut bytes = vec![0; 65_536];
    while rest > 0 {
        rest -= server.read(&mut bytes)?;
    }
    drop(client);
    drop(server);
    // The row has the sum of both.
    let done = ends(run, "connect", 93, "closed-here")?;
    let text = run.stdout();
    let of_port = |e: &Value| e["remote"]["port"] == 93;
    let all = text.lines().filter_map(|l| serde_json::from_str(l).ok());
    let all: Vec<Value> = all.filter(of_port).collect();
    let shut = all.iter().filter(|e| e["happened"] == "peer-window-zero");
    let open = all.iter().filter(|e| e["happened"] == "peer-window-open");
    let waited: u64 = open.filter_map(|e| e["waited_ns"].as_u64()).sum();
    ensure!(
        done["zero_windows"] == shut.count() && done["zero_windows_ns"] == waited,
        "{waited}: {done}"
    );
    let open = event(run, 93, |e| e["happened"] == "peer-window-open")?;
    ensure!(
        open["waited_ns"].as_u64() > Some(0) && open["role"] == "connect",
        "{open}"
    );
    let read = event(run, 93, |e| e["happened"] == "window-zero-until-read")?;
    ensure!(
        read["role"] == "accept" && read["waited_ns"].as_u64().is_some(),
        "{read}"
    );
    Ok(())
}

/// The peer goes with its window shut: what it has not read is answered by a RST, which opens no window.
fn window_to_the_end(net: &Pair, run: &Running) -> Result<()> {
    let (mut client, server) = connected(net, 97)?;
    let (shut, _) = shut_window(run, &mut client, 97)?;
    drop(server);
    let done = ends(run, "connect", 97, "reset-by-peer")?;
    let opened = event_of(run, |e| {
        e["happened"] == "peer-window-open" && e["remote"]["port"] == 97
    });
    ensure!(opened.is_none(), "{opened:?}");
    let ns = |row: &Value| row["ts_ns"].as_u64().unwrap_or_default();
    ensure!(
        done["zero_windows"] == 1 && done["zero_windows_ns"] == ns(&done) - ns(&shut),
        "{shut} {done}"
    );
    Ok(())
}

fn resets(net: &Pair, run: &Running) -> Result<()> {
    let (client, server) = connected(net, 94)?;
    let abort = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&client, sockopt::Linger, &abort)?;
    drop(client);
    let sent = event(run, 94, |e| e["happened"] == "reset-sent")?;
    let received = event(run, 94, |e| e["happened"] == "reset-received")?;
    ensure!(
        sent["role"] == "connect" && received["role"] == "accept",
        "{sent} {received}"
    );
    // A process closes; a packet comes.
    ensure!(sent["by"]["pid"] == std::process::id(), "{sent}");
    in_stack(&sent, "tcp_disconnect")?;
    ensure!(received.get("by").is_none(), "{received}");
    in_stack(&received, "tcp_rcv_established")?;
    if Env::look().kernel >= (6, 12) {
        ensure!(sent["reason"].as_str().is_some(), "{sent}");
    }
    drop(server);
    let nobody = net.server.v4(95);
    ensure!(net.client.enter(|| TcpStream::connect(nobody))?.is_err());
    event(run, 95, |e| e["happened"] == "reset-received")?;
    // An end that goes its way has all its states.
    let (client, mut server) = connected(net, 96)?;
    drop(client);
    ensure!(read_all(&mut server)? == 0);
    for to in ["SYN_SENT", "ESTABLISHED", "FIN_WAIT1", "CLOSE_WAIT"] {
        event(run, 96, |e| e["happened"] == "state" && e["to"] == to)?;
    }
    drop((server, listen(&net.server, net.server.v4(97))?));
    Ok(())
}

/// The sentences of what took long.
fn why_slow(done: &Finished) -> Result<()> {
    done.expect_success()?;
    let rows = done.json_of("connection")?;
    let slow = |port: u16| rows.iter().find(|r| r["remote"]["port"] == port);
    let syn = slow(90).with_context(|| done.to_string())?;
    let text = syn["slow"]["text"].as_str().unwrap_or_default();
    ensure!(
        syn["slow"]["rule"] == "tcp-syn-dropped"
            && text.contains("s: the SYN, or its answer, was dropped here: firewall rule (")
            && text.contains("it was repeated after 1.00 s"),
        "{syn}"
    );
    let window = slow(93).with_context(|| done.to_string())?;
    let text = window["slow"]["text"].as_str().unwrap_or_default();
    ensure!(
        window["slow"]["rule"] == "tcp-window-reader" && text.ends_with("] did not read"),
        "{window}"
    );
    ensure!(done.json_of("event")?.is_empty(), "{done}");
    Ok(())
}

/// Events stand in the order of time.
fn in_order(done: &Finished) -> Result<()> {
    let times: Vec<u64> = done
        .json_of("event")?
        .iter()
        .filter(|e| e.get("late").is_none())
        .filter_map(|e| e["ts_ns"].as_u64())
        .collect();
    ensure!(!times.is_empty() && times.is_sorted(), "{done}");
    Ok(())
}
