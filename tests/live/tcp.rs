//! `netprobe tcp`: a row for each connection, beside what its sockets and the kernel's counters say.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::Value;

use super::who::{Container, run_in};
use crate::common::{Case, Netns, Netprobe, Pair, Running, case, wait_for};

pub fn cases() -> Vec<Case> {
    vec![
        case("tcp_endings", || endings(Netprobe::new("tcp")))
            .trace()
            .program("nft")
            .program("nc"),
        case("tcp_endings_without_btf", || {
            endings(Netprobe::new("tcp").types_by_file()?)
        })
        .once_on("5.10")
        .trace()
        .program("nft")
        .program("nc"),
        case("tcp_counters", counters).trace().program("nft"),
        case("tcp_burst_and_filters", burst).once_on("6.12").trace(),
        case("tcp_live", live).once_on("5.10"),
        case("tcp_whose", whose).once_on("newest").trace(),
    ]
}

pub fn start(args: &[&str]) -> Result<Running> {
    Netprobe::new("tcp").arg("--output-json").args(args).start()
}

/// Both ends of a connection from the client to a port of the server.
pub fn connected(net: &Pair, port: u16) -> Result<(TcpStream, TcpStream)> {
    let listener = listen(&net.server, net.server.v4(port))?;
    let to = listener.local_addr()?;
    let client = net.client.enter(|| TcpStream::connect(to))??;
    let (server, _) = listener.accept()?;
    Ok((client, server))
}

pub fn listen(netns: &Netns, at: SocketAddr) -> Result<TcpListener> {
    Ok(netns.enter(|| TcpListener::bind(at))??)
}

/// The row of the end that has this role, of the connection to the port.
pub fn row(run: &Running, role: &str, port: u16) -> Result<Value> {
    let end = if role == "accept" { "local" } else { "remote" };
    let what = format!("the row of role {role}, port {port}");
    run.wait_lines(&what, |text| {
        let rows = text
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        rows.into_iter()
            .filter(|row| row["type"] == "connection")
            .find(|row| row["role"] == role && row[end]["port"] == port)
    })
    .with_context(|| run.stdout())
}

pub fn read_all(stream: &mut TcpStream) -> Result<usize> {
    let mut bytes = Vec::new();
    Ok(stream.read_to_end(&mut bytes)?)
}

pub fn ends(run: &Running, role: &str, port: u16, end: &str) -> Result<Value> {
    let row = row(run, role, port)?;
    ensure!(row["end"] == end, "port {port} is not {end}: {row}");
    Ok(row)
}

fn endings(tcp: Netprobe<'_>) -> Result<()> {
    let net = Pair::new()?;
    net.client.sysctl("net/ipv4/tcp_syn_retries", "1")?;
    net.server.nft(
        "add table inet t; add chain inet t in { type filter hook input priority 0; }; \
         add rule inet t in tcp dport 84 drop",
    )?;
    let (mut old, _old) = connected(&net, 79)?;
    let run = tcp.arg("--output-json").start()?;

    let before = (resent(&net.client)?, resent(&net.server)?);
    let (mut client, mut server) = connected(&net, 80)?;
    client.write_all(&[1; 100_000])?;
    server.read_exact(&mut vec![0; 100_000])?;
    server.write_all(b"answer!")?;
    client.read_exact(&mut [0; 7])?;
    let local = client.local_addr()?;
    drop(client);
    ensure!(read_all(&mut server)? == 0);
    drop(server);
    let sent = ends(&run, "connect", 80, "closed-here")?;
    let received = ends(&run, "accept", 80, "closed-by-peer")?;
    for (row, sent, received, netns, before) in [
        (&sent, 100_000, 7, &net.client, before.0),
        (&received, 7, 100_000, &net.server, before.1),
    ] {
        ensure!(
            row["bytes_sent"] == sent && row["bytes_received"] == received,
            "{row}"
        );
        ensure!(
            row["pid"] == std::process::id() && row["netns"] == netns.inode()?,
            "{row}"
        );
        ensure!(
            row["duration_ns"].as_u64() > row["handshake_ns"].as_u64(),
            "{row}"
        );
        // Nothing is lost, but a slow machine sends probes.
        let again = resent(netns)? - before;
        ensure!(
            row["retransmitted"] == again && row["before_run"] == false,
            "{again}: {row}"
        );
        ensure!(row["min_rtt_us"].as_u64() > Some(0), "{row}");
    }
    ensure!(sent["local"]["port"] == local.port() && received["remote"] == sent["local"]);
    ensure!(
        sent["text"] == "closed here first" && sent["closed_first"] == "here",
        "{sent}"
    );

    let (client, server) = connected(&net, 81)?;
    let abort = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&client, sockopt::Linger, &abort)?;
    drop(client);
    ends(&run, "connect", 81, "reset-here")?;
    ends(&run, "accept", 81, "reset-by-peer")?;
    drop(server);

    // Closed with data that nobody has read.
    let (mut client, server) = connected(&net, 82)?;
    client.write_all(b"hello")?;
    server.set_nonblocking(false)?;
    ensure!(server.peek(&mut [0; 5])? == 5);
    drop(server);
    ends(&run, "accept", 82, "reset-here")?;
    ends(&run, "connect", 82, "reset-by-peer")?;
    drop(client);

    let nobody = net.server.v4(83);
    ensure!(net.client.enter(|| TcpStream::connect(nobody))?.is_err());
    let row = ends(&run, "connect", 83, "refused")?;
    ensure!(
        row["error"] == "ECONNREFUSED" && row.get("handshake_ns").is_none(),
        "{row}"
    );

    let dropped = net.server.v4(84);
    ensure!(net.client.enter(|| TcpStream::connect(dropped))?.is_err());
    let row = ends(&run, "connect", 84, "unanswered")?;
    ensure!(row["retransmitted"].as_u64() > Some(0), "{row}");

    let (mut client, server) = connected(&net, 85)?;
    drop(server);
    ensure!(read_all(&mut client)? == 0);
    drop(client);
    ends(&run, "connect", 85, "closed-by-peer")?;
    ends(&run, "accept", 85, "closed-here")?;

    // The process of a connection is killed.
    let listener = listen(&net.server, net.server.v4(86))?;
    let mut nc = Command::new("nc");
    nc.args([&net.server.v4(0).ip().to_string(), "86"]);
    nc.stdin(Stdio::piped());
    let mut nc = net.client.enter(|| nc.spawn())??;
    let (mut server, _) = listener.accept()?;
    nc.kill()?;
    nc.wait()?;
    ensure!(read_all(&mut server)? == 0);
    drop(server);
    let row = ends(&run, "connect", 86, "closed-here")?;
    ensure!(row["process_ended"] == true && row["comm"] == "nc", "{row}");

    // Older than the run: its role and duration are not known.
    old.write_all(b"x")?;
    drop(old);
    let text = run.wait_line("\"before_run\":true")?;
    let row: Value = serde_json::from_str(&text)?;
    ensure!(
        row["role"] == "unknown" && row.get("duration_ns").is_none(),
        "{row}"
    );
    ensure!(row["bytes_sent"] == 1, "{row}");

    let done = run.stop()?;
    done.expect_success()?;
    ensure!(done.json_of("loss")?.is_empty(), "{done}");
    Ok(())
}

/// A number of `struct tcp_info` at this offset.
pub fn info(stream: &TcpStream, offset: usize) -> Result<u64> {
    let mut bytes = [0u8; 256];
    let mut len = bytes.len() as libc::socklen_t;
    // SAFETY: `len` states how many bytes there are.
    let code = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            bytes.as_mut_ptr().cast(),
            &mut len,
        )
    };
    ensure!(
        code == 0 && len as usize >= offset + 8,
        "TCP_INFO: {len} bytes"
    );
    Ok(u64::from_ne_bytes(bytes[offset..offset + 8].try_into()?))
}

/// Segments that a namespace has sent again: RetransSegs of /proc/net/snmp.
pub fn resent(netns: &Netns) -> Result<u64> {
    let text = netns.enter(|| std::fs::read_to_string("/proc/thread-self/net/snmp"))??;
    let mut tcp = text.lines().filter(|line| line.starts_with("Tcp:"));
    let (names, values) = (tcp.next().context("Tcp:")?, tcp.next().context("Tcp:")?);
    let mut both = names.split(' ').zip(values.split(' '));
    let (_, value) = both
        .find(|(name, _)| *name == "RetransSegs")
        .context("RetransSegs")?;
    Ok(value.parse()?)
}

/// include/uapi/linux/tcp.h: tcpi_rwnd_limited, us
const RWND_LIMITED: usize = 176;

fn counters() -> Result<()> {
    let net = Pair::new()?;
    // One in four packets with data is lost.
    net.server.nft(
        "add table inet t; add chain inet t in { type filter hook input priority 0; }; \
         add rule inet t in tcp dport 89 meta length > 200 numgen inc mod 4 0 drop",
    )?;
    let run = start(&[])?;
    let before = resent(&net.client)?;
    let (mut client, mut server) = connected(&net, 89)?;
    let reader = std::thread::spawn(move || read_all(&mut server).map(|read| (read, server)));
    for _ in 0..40 {
        client.write_all(&[7; 1000])?;
    }
    drop(client);
    let (read, server) = reader.join().expect("the reader ends")?;
    ensure!(read == 40_000);
    drop(server);
    let row1 = ends(&run, "connect", 89, "closed-here")?;
    let again = resent(&net.client)? - before;
    ensure!(
        again > 0 && row1["retransmitted"] == again,
        "{again} were sent again: {row1}"
    );
    ensure!(
        row1["bytes_sent"] == 40_000 && row1["bytes_sent_again"].as_u64() > Some(0),
        "{row1}"
    );

    // A reader that does not read.
    let (mut client, mut server) = connected(&net, 88)?;
    client.set_nonblocking(true)?;
    let mut written = 0;
    let limited = wait_for("200 ms of a closed window", || {
        loop {
            match client.write(&[0; 65_536]) {
                Ok(n) => written += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => return Err(e.into()),
            }
        }
        let us = info(&client, RWND_LIMITED)?;
        Ok((us >= 200_000).then_some(us))
    })?;
    let reader = std::thread::spawn(move || read_all(&mut server).map(|read| (read, server)));
    drop(client);
    let (read, server) = reader.join().expect("the reader ends")?;
    ensure!(read == written);
    drop(server);
    let row = ends(&run, "connect", 88, "closed-here")?;
    ensure!(
        row["window_limited_ns"].as_u64() >= Some(limited * 1000 * 9 / 10),
        "{limited} us: {row}"
    );
    ensure!(
        row["window_limited_ns"].as_u64() <= row["duration_ns"].as_u64(),
        "{row}"
    );
    ensure!(
        row["limited_by"] == "peers-window" && row["bytes_sent"] == written,
        "{row}"
    );
    run.stop()?.expect_success()
}

/// Both ends of a connection that exists, as their sockets' TCP_INFO has them; nobody waits for an end.
fn live() -> Result<()> {
    let net = Pair::new()?;
    let (mut client, mut server) = connected(&net, 80)?;
    client.write_all(&[1; 5000])?;
    server.read_exact(&mut [0; 5000])?;
    let (closing, mut closed) = connected(&net, 81)?;
    drop(closing);
    ensure!(read_all(&mut closed)? == 0);
    let list = |args: &[&str]| -> Result<crate::common::Finished> {
        let done = Netprobe::new("tcp").arg("--live").args(args).run()?;
        done.expect_success()?;
        Ok(done)
    };
    let pid = std::process::id().to_string();
    let done = list(&["--output-json", "--port", "80", "--pid", &pid])?;
    let rows = done.json_of("connection")?;
    ensure!(rows.len() == 2, "{done}");
    for (stream, netns) in [(&client, &net.client), (&server, &net.server)] {
        let port = stream.local_addr()?.port();
        let row = rows.iter().find(|r| r["local"]["port"] == port);
        let row = row.with_context(|| done.to_string())?;
        // tcpi_bytes_sent, tcpi_bytes_received, and tcpi_rtt in a word of two
        let (sent, received) = (info(stream, 200)?, info(stream, 128)?);
        ensure!(
            row["bytes_sent"] == sent && row["bytes_received"] == received,
            "{row}"
        );
        ensure!(row["rtt_us"] == info(stream, 68)? & 0xffff_ffff, "{row}");
        ensure!(
            row["end"] == "open"
                && row["state"] == "ESTABLISHED"
                && row["netns"] == netns.inode()?,
            "{row}"
        );
        ensure!(row["pid"] == std::process::id(), "{row}");
    }
    let text = list(&["-v", "--port", "81"])?;
    text.expect_stdout("open, CLOSE_WAIT")?;
    // The other end has no process any more.
    text.expect_stdout("open, FIN_WAIT2")?;
    let done = Netprobe::new("tcp")
        .args(["--live", "--min-ms", "1"])
        .run()?;
    ensure!(done.code() == 2, "{done}");
    Ok(())
}

/// A connection of a container and one of this process, to two addresses: each filter takes its own, with ! all others.
fn whose() -> Result<()> {
    let net = Pair::new()?;
    let web = Container::new("npt-tcp", "c9")?;
    let path = web.cgroup.to_string_lossy().into_owned();
    let me = std::process::id().to_string();
    let v6 = format!("{}/128", net.server.v6(0).ip());
    let its_end: &[(&str, u16)] = &[("connect", 70)];
    let others: &[(&str, u16)] = &[("accept", 70), ("accept", 71), ("connect", 71)];
    let to_v4: &[(&str, u16)] = &[("accept", 70), ("connect", 70)];
    let to_v6: &[(&str, u16)] = &[("accept", 71), ("connect", 71)];
    let runs = [
        ("--container", "npt-tcp".to_owned(), its_end),
        ("--container", "!npt-tcp".to_owned(), others),
        ("--cgroup", path, its_end),
        ("--comm", "busybox".to_owned(), its_end),
        ("--pid", format!("!{me}"), its_end),
        ("--daddr", format!("192.0.2.0/24,{v6}"), to_v6),
        ("--daddr", format!("!{v6}"), to_v4),
        ("--port", "!71".to_owned(), to_v4),
    ];
    let runs = runs.map(|(flag, value, wanted)| start(&[flag, &value]).map(|run| (run, wanted)));
    // Below the container's cgroup, and made when the runs had begun.
    let below = web.cgroup.join("later");
    std::fs::create_dir(&below)?;
    let (v4, v6) = (net.server.v4(70), net.server.v6(71));
    let listener = listen(&net.server, v4)?;
    let nc = format!("busybox nc {} 70 </dev/null", v4.ip());
    std::thread::scope(|scope| -> Result<()> {
        let client = scope.spawn(|| run_in(&below, &net.client, &nc));
        read_all(&mut listener.accept()?.0)?;
        client.join().expect("the client ends").map(|_| ())
    })?;
    let listener = listen(&net.server, v6)?;
    drop(net.client.enter(|| TcpStream::connect(v6))??);
    read_all(&mut listener.accept()?.0)?;
    for run in runs {
        let (run, wanted) = run?;
        for (role, port) in wanted {
            row(&run, role, *port)?;
        }
        let done = run.stop()?;
        let rows = done.json_of("connection")?;
        let known = |row: &Value| {
            let role = row["role"].as_str()?;
            let end = if role == "accept" { "local" } else { "remote" };
            let port = row[end]["port"].as_u64()?;
            matches!(port, 70 | 71).then(|| (role.to_owned(), port))
        };
        let found: BTreeSet<(String, u64)> = rows.iter().filter_map(known).collect();
        let wanted = wanted
            .iter()
            .map(|(role, port)| (role.to_string(), u64::from(*port)));
        ensure!(found == wanted.collect(), "{done}");
    }
    std::fs::remove_dir(&below)?;
    let done = Netprobe::new("tcp").args(["--pod", "!npt/none"]).run()?;
    done.expect_code(2)?;
    done.expect_stderr("npt/none")
}

/// Each of many connections is a row, and filters take those that they name.
fn burst() -> Result<()> {
    const COUNT: usize = 400;
    let net = Pair::new()?;
    let all = start(&[
        "--port",
        "80,81",
        "--only",
        "failed,resets,retransmits",
        "--max-connections",
        "4096",
    ])?;
    let pid = std::process::id().to_string();
    let inode = format!("inode:{}", net.client.inode()?);
    let mine = start(&["--pid", &pid, "--netns", &inode, "--uid", "0", "-4"])?;
    let none = start(&["--port", "80", "-6"])?;
    let text = Netprobe::new("tcp")
        .args(["-v", "--comm", "nobody-has-it"])
        .start()?;
    let slow = start(&["--min-ms", "3600000"])?;
    let few = start(&["--max-connections", "1"])?;
    let listener = listen(&net.server, net.server.v4(80))?;
    let to = listener.local_addr()?;
    let server = std::thread::spawn(move || -> Result<()> {
        for stream in listener.incoming().take(COUNT) {
            read_all(&mut stream?)?;
        }
        Ok(())
    });
    let (mut held, _peer) = connected(&net, 82)?;
    net.client.enter(|| -> Result<()> {
        for _ in 0..COUNT {
            TcpStream::connect(to)?.write_all(b"x")?;
        }
        Ok(())
    })??;
    server.join().expect("the server ends")?;
    let refused = net.server.v4(81);
    ensure!(net.client.enter(|| TcpStream::connect(refused))?.is_err());
    held.write_all(b"still open")?;
    wait_for("the end of the connections to port 80", || {
        let sockets = net.client.cmd("cat /proc/net/tcp")?;
        // Remote address and state; TIME_WAIT is no socket any more.
        let mut open = sockets.lines().filter_map(|l| {
            let mut words = l.split_whitespace().skip(2);
            Some((words.next()?, words.next()?))
        });
        let ended = open.all(|(to, state)| !to.ends_with(":0050") || state == "06");
        Ok(ended.then_some(()))
    })?;
    ends(&mine, "connect", 81, "refused")?;
    let done = mine.stop()?;
    done.expect_success()?;
    let rows = done.json_of("connection")?;
    // Where the kernel skipped a hit, a row may be missing, which is told.
    let missed = done
        .json_of("loss")?
        .first()
        .and_then(|l| l["missed"].as_u64());
    let missed = missed.unwrap_or(0) as usize;
    // Or the row does not say which end it is, where the hit at its begin was skipped.
    let known = |r: &&Value| r["role"] == "connect";
    let roles = rows.iter().filter(known).count();
    ensure!(
        rows.len() <= COUNT + 1 && roles + missed > COUNT,
        "{} rows, {roles} of role connect, {missed} missed",
        rows.len()
    );
    done.expect_stderr("that began meanwhile are open")?;
    row(&all, "connect", 81)?;
    let done = all.stop()?;
    done.expect_success()?;
    // A full accept queue makes some of the others send again.
    for row in done.json_of("connection")? {
        let again = row["retransmitted"].as_u64() > Some(0) || row["lost"].as_u64() > Some(0);
        ensure!(again || row["remote"]["port"] == 81, "{row}");
    }
    ensure!(none.stop()?.json_of("connection")?.is_empty());
    ensure!(slow.stop()?.json_of("connection")?.is_empty());
    let done = few.stop()?;
    done.expect_stderr("insertions into a full map refused")?;
    let done = text.stop()?;
    ensure!(
        done.stdout.lines().count() == 1 && done.stdout.starts_with("PROCESS"),
        "{done}"
    );
    Ok(())
}
