//! `netprobe tcpconnect`: bursts, and the same traffic beside another tool.

use std::collections::BTreeMap;
use std::io;
use std::net::TcpStream;
use std::os::fd::{FromRawFd, OwnedFd};
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};

use super::tcpconnect::me;
use crate::common::{Case, Netns, Netprobe, Pair, case, deadline};

pub fn cases() -> Vec<Case> {
    vec![
        case("tcpconnect_burst", burst)
            .once_on("5.10")
            .trace()
            .limit(600),
        case("tcpconnect_beside", beside)
            .once_on("newest")
            .trace()
            .limit(400)
            .program("peer-tcpconnect"),
    ]
}

/// 20,000 connects as fast as they come: each is printed, or counted as lost.
fn burst() -> Result<()> {
    const THREADS: u64 = 4;
    const EACH: u64 = 5_000;
    let net = Netns::new("burst")?;
    let run = Netprobe::new("tcpconnect")
        .args(["--output-json", "-p", &me(), "--netns", net.name()])
        .start()?;
    net.enter(|| {
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    // Nothing listens: a connect all the same.
                    for _ in 0..EACH {
                        let _ = TcpStream::connect("127.0.0.1:9");
                    }
                });
            }
        });
    })?;
    let done = run.stop()?;
    done.expect_success()?;
    let rows = done.json()?;
    let printed = rows.iter().filter(|r| r["type"] == "connect").count() as u64;
    let loss = rows.iter().find(|r| r["type"] == "loss");
    let count = |key: &str| loss.and_then(|l| l[key].as_u64()).unwrap_or(0);
    let lost = count("lost") + count("missed") + count("unreturned") + count("map_full");
    eprintln!("tcpconnect_burst: {printed} printed, {lost} counted as lost");
    ensure!(
        printed + lost == THREADS * EACH,
        "{printed} printed, {lost} lost of {}: {loss:?}",
        THREADS * EACH
    );
    Ok(())
}

/// The same traffic beside libbpf-tools' tcpconnect: every row of it is one of ours.
fn beside() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let v4 = net.server.tcp_listen(net.server.v4(80))?;
    let v6 = net.server.tcp_listen(net.server.v6(81))?;
    let run = Netprobe::new("tcpconnect")
        .args(["-s", "-p", &me()])
        .start()?;
    // Into a pipe it would write nothing before its end.
    let (ours, terminal) = terminal()?;
    let mut peer = Command::new("peer-tcpconnect")
        .args(["-s", "-p", &me()])
        .stdout(terminal)
        .stderr(Stdio::null())
        .spawn()?;
    let mut out = io::BufReader::new(std::fs::File::from(ours));
    let mut header = String::new();
    // Printed once it has attached.
    io::BufRead::read_line(&mut out, &mut header)?;
    let mut open = Vec::new();
    for _ in 0..20 {
        for to in [v4.address(), v6.address(), net.server.v4(99)] {
            open.extend(net.client.tcp_connect(to, deadline())?.ok());
        }
    }
    run.wait_lines("60 rows", |t| (t.lines().count() > 60).then_some(()))?;
    // Its rows come in batches; its local port stands behind the address, where bcc's stands before it.
    let mut theirs = BTreeMap::new();
    while theirs.values().sum::<usize>() < 60 {
        let mut line = String::new();
        ensure!(
            io::BufRead::read_line(&mut out, &mut line)? > 0,
            "the peer ended"
        );
        *theirs.entry(key(&line, [0, 2, 3, 5, 4, 6])).or_insert(0) += 1;
    }
    peer.kill()?;
    peer.wait()?;
    let done = run.stop()?;
    done.expect_success()?;
    let mut ours = BTreeMap::new();
    for line in done.stdout.lines().skip(1) {
        *ours.entry(key(line, [0, 2, 3, 4, 5, 6])).or_insert(0) += 1;
    }
    ensure!(ours == theirs, "theirs: {theirs:?}\n{done}");
    Ok(())
}

/// A pseudo terminal: the end to read from, and the terminal.
pub fn terminal() -> Result<(OwnedFd, OwnedFd)> {
    let (mut ours, mut terminal) = (-1, -1);
    // SAFETY: both numbers are valid for the call; no name, settings or size are given.
    let err = unsafe {
        libc::openpty(
            &mut ours,
            &mut terminal,
            std::ptr::null_mut(),
            std::ptr::null(),
            std::ptr::null(),
        )
    };
    ensure!(err == 0, "no terminal: {}", io::Error::last_os_error());
    // SAFETY: fresh fds that nothing else owns.
    unsafe { Ok((OwnedFd::from_raw_fd(ours), OwnedFd::from_raw_fd(terminal))) }
}

/// The words of a row but the name, which the two cut at different places, in the order of these places.
fn key(line: &str, order: [usize; 6]) -> Vec<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    order
        .iter()
        .map(|&i| words.get(i).unwrap_or(&"").to_string())
        .collect()
}
