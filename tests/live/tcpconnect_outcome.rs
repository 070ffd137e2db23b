//! `netprobe tcpconnect --outcome`: what became of each connect, of all kinds of sockets.

use std::io::{self, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{self, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn};
use serde_json::Value;

use super::tcpconnect::{blocking, connect, mapped, net};
use super::tcpconnect_stack::the_caller_of_connect;
use crate::common::{Case, Netns, Netprobe, Pair, SHORT, case, deadline, wait_for};

pub fn cases() -> Vec<Case> {
    vec![
        case("tcpconnect_outcomes", outcomes)
            .trace()
            .limit(600)
            .program("nft")
            .program("nc"),
        case("tcpconnect_outcome_drop", outcome_drop)
            .trace()
            .program("nft"),
        case("tcpconnect_sockets", sockets).trace().limit(400),
    ]
}

/// The row of one connect with --outcome, as JSON.
fn outcome<T>(
    net: &Netns,
    args: &[&str],
    port: u16,
    connect: impl FnOnce() -> Result<T>,
) -> Result<Value> {
    let ns = format!("inode:{}", net.inode()?);
    let run = Netprobe::new("tcpconnect")
        .args(["--outcome", "--output-json", "--netns", &ns])
        .args(args)
        .start()?;
    connect()?;
    let line = run.wait_line(&format!("\"dport\":{port},"))?;
    let done = run.stop()?;
    done.expect_success()?;
    ensure!(done.json_of("connect")?.len() == 1, "{done}");
    Ok(serde_json::from_str(&line)?)
}

fn expect(row: &Value, outcome: &str, error: Value, nonblocking: bool) -> Result<()> {
    ensure!(
        row["outcome"] == outcome && row["error"] == error && row["nonblocking"] == nonblocking,
        "not {outcome}, {error}, non-blocking {nonblocking}: {row}"
    );
    Ok(())
}

fn outcomes() -> Result<()> {
    let (net, v4, v6) = net()?;
    let ns = format!("inode:{}", net.client.inode()?);
    // SYNs to these are dropped, answered by a reset or by ICMP, on the server's side.
    net.server.nft(
        "add table inet t; add chain inet t in { type filter hook input priority 0; }; \
         add rule inet t in tcp dport 90 drop; \
         add rule inet t in tcp dport 91 reject with icmpx type host-unreachable; \
         add rule inet t in tcp dport 92 reject with tcp reset; \
         add rule inet t in tcp dport 95 drop",
    )?;
    net.client.sysctl("net/ipv4/tcp_syn_retries", "1")?;
    let run = Netprobe::new("tcpconnect")
        .args(["--outcome", "--output-json", "--netns", &ns])
        .start()?;
    let client = &net.client;
    connect(client, v4.address())?;
    blocking(client, v6.address())??;
    ensure!(blocking(client, net.server.v4(99))?.is_err());
    ensure!(client.tcp_connect(net.server.v6(98), deadline())?.is_err());
    ensure!(blocking(client, net.server.v4(90))?.is_err());
    // Given up by its process: the socket closes without an answer.
    ensure!(client.tcp_connect(net.server.v6(90), SHORT)?.is_err());
    ensure!(blocking(client, net.server.v4(91))?.is_err());
    ensure!(blocking(client, net.server.v4(92))?.is_err());
    ensure!(blocking(client, net.server.v6(91))?.is_err());
    let sixth = net.server.tcp_listen(net.server.v4(82))?;
    connect(client, mapped(sixth.address()))?;
    ensure!(blocking(client, mapped(net.server.v4(96)))?.is_err());
    // Ended by a signal while it waits for an answer.
    let mut nc = Command::new("nc");
    nc.args([&net.server.v4(0).ip().to_string(), "95"])
        .stdin(Stdio::null());
    let mut nc = client.enter(|| nc.spawn())??;
    wait_for("the SYN of nc", || {
        let table = client.enter(|| std::fs::read_to_string("/proc/thread-self/net/tcp"))??;
        // Port 95, state SYN_SENT.
        Ok(table.contains(":005F 02 ").then_some(()))
    })?;
    nc.kill()?;
    nc.wait()?;
    run.wait_line("\"dport\":95,")?;
    ensure!(blocking(client, "192.0.2.1:97".parse()?)?.is_err());
    run.wait_line("192.0.2.1")?;
    reset(&net, || run.stdout().contains("\"outcome\":\"reset\""))?;
    let done = run.stop()?;
    done.expect_success()?;
    let rows = done.json_of("connect")?;
    let row = |port: u16, ip: u8| {
        rows.iter()
            .find(|r| r["dport"] == port && r["ip"] == ip)
            .with_context(|| format!("no row of port {port}, IPv{ip}:\n{done}"))
    };
    ensure!(rows.len() == 14, "{done}");
    expect(row(80, 4)?, "established", Value::Null, true)?;
    expect(row(81, 6)?, "established", Value::Null, false)?;
    expect(row(99, 4)?, "refused", "ECONNREFUSED".into(), false)?;
    expect(row(98, 6)?, "refused", "ECONNREFUSED".into(), true)?;
    expect(row(90, 4)?, "timed-out", "ETIMEDOUT".into(), false)?;
    expect(row(90, 6)?, "interrupted", Value::Null, true)?;
    expect(row(91, 4)?, "unreachable", "EHOSTUNREACH".into(), false)?;
    expect(row(92, 4)?, "refused", "ECONNREFUSED".into(), false)?;
    expect(row(97, 4)?, "failed", "ENETUNREACH".into(), false)?;
    expect(row(91, 6)?, "unreachable", "EHOSTUNREACH".into(), false)?;
    expect(row(82, 4)?, "established", Value::Null, true)?;
    expect(row(96, 4)?, "refused", "ECONNREFUSED".into(), false)?;
    for r in &rows {
        let is_mapped = r["dport"] == 82 || r["dport"] == 96;
        ensure!(r["v4_mapped"] == is_mapped, "{r}");
        ensure!(r["mptcp"] == false && r["fast_open"] == false, "{r}");
        ensure!(r["process_ended"] == (r["dport"] == 95), "{r}");
    }
    expect(row(95, 4)?, "interrupted", Value::Null, false)?;
    ensure!(row(95, 4)?["comm"] == "nc", "{done}");
    expect(row(RESET_PORT, 4)?, "reset", "ECONNRESET".into(), true)?;
    ensure!(row(97, 4)?["syn_sent"] == false, "{done}");
    let timed_out = row(90, 4)?;
    // One in a second and two more to wait; newer kernels send two, a second apart.
    ensure!(timed_out["retransmits"].as_u64() >= Some(1), "{done}");
    let latency = timed_out["latency_ns"].as_u64().context("latency")?;
    ensure!(latency > 2_500_000_000, "{done}");
    // Without an error the socket's own memory of one is not made up: an interrupted connect took at least its patience.
    let given_up = row(90, 6)?["latency_ns"].as_u64().context("latency")?;
    ensure!(
        given_up >= SHORT.as_nanos() as u64 - Duration::from_millis(20).as_nanos() as u64,
        "{done}"
    );

    // --min-ms: the slow one is told, the fast one is not.
    let row = outcome(client, &["--min-ms", "1500"], 90, || {
        connect(client, v4.address())?;
        blocking(client, net.server.v4(90))
    })?;
    expect(&row, "timed-out", "ETIMEDOUT".into(), false)
}

const RESET_PORT: u16 = 950;

/// A connect that is reset after the peer's SYN has come and before it is answered (a connect of both ends at once): else a reset is a
/// refusal. The peer is a raw socket.
fn reset(net: &Pair, done: impl Fn() -> bool) -> Result<()> {
    const PORT: u16 = 40_950;
    net.server
        .nft(&format!("add rule inet t in tcp dport {RESET_PORT} drop"))?;
    let address = |a: SocketAddr| match a {
        SocketAddr::V4(a) => Ok(a),
        SocketAddr::V6(_) => Err(anyhow::anyhow!("not IPv4")),
    };
    let here = address(net.client.v4(PORT))?;
    let there = address(net.server.v4(RESET_PORT))?;
    let client = net.client.enter(|| {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd = socket::socket(socket::AddressFamily::Inet, SockType::Stream, flags, None)?;
        socket::bind(fd.as_raw_fd(), &SockaddrIn::from(here))?;
        Ok::<_, nix::Error>(fd)
    })??;
    let started = socket::connect(client.as_raw_fd(), &SockaddrIn::from(there));
    ensure!(started == Err(nix::Error::EINPROGRESS), "{started:?}");
    let raw = net.server.enter(|| {
        socket::socket(
            socket::AddressFamily::Inet,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::Tcp,
        )
    })??;
    let to = SockaddrIn::from(SocketAddrV4::new(*here.ip(), 0));
    // Again, where they came in the wrong order.
    wait_for("the connect to be reset", || {
        for (sequence, flag) in [(1000u32, 0x02), (1001, 0x04)] {
            let segment = segment(there, here, sequence, flag);
            socket::sendto(raw.as_raw_fd(), &segment, &to, MsgFlags::empty())?;
        }
        Ok(done().then_some(()))
    })
}

/// A TCP header with this flag and no data.
fn segment(from: SocketAddrV4, to: SocketAddrV4, sequence: u32, flag: u8) -> Vec<u8> {
    let mut tcp = Vec::new();
    tcp.extend(from.port().to_be_bytes());
    tcp.extend(to.port().to_be_bytes());
    tcp.extend(sequence.to_be_bytes());
    tcp.extend([0, 0, 0, 0, 0x50, flag, 0x20, 0, 0, 0, 0, 0]);
    let mut summed = Vec::new();
    summed.extend(from.ip().octets());
    summed.extend(to.ip().octets());
    summed.extend([0, 6, 0, tcp.len() as u8]);
    summed.extend(&tcp);
    let mut sum: u32 = summed
        .chunks(2)
        .map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    tcp[16..18].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    tcp
}

/// The kernel drops the SYN: on this side, and on the other.
fn outcome_drop() -> Result<()> {
    let (net, _v4, _v6) = net()?;
    net.client.nft(
        "add table inet t; add chain inet t out { type filter hook output priority 0; }; add rule inet t out tcp dport 93 drop",
    )?;
    net.server.nft(
        "add table inet t; add chain inet t in { type filter hook input priority 0; }; add rule inet t in tcp dport 94 drop",
    )?;
    let reasons = std::fs::read("/sys/kernel/btf/vmlinux")?
        .windows(31)
        .any(|w| w == b"SKB_DROP_REASON_NETFILTER_DROP\0");
    for to in [net.server.v4(93), net.server.v6(94)] {
        let row = outcome(&net.client, &[], to.port(), || {
            net.client.tcp_connect(to, SHORT)
        })?;
        expect(&row, "interrupted", Value::Null, true)?;
        let drop = &row["drop"];
        ensure!(drop["packets"].as_u64() >= Some(1), "{row}");
        if reasons {
            ensure!(drop["reason"] == "SKB_DROP_REASON_NETFILTER_DROP", "{row}");
        } else {
            ensure!(drop["reason"].is_null(), "{row}");
        }
        ensure!(
            drop["at"].as_str().is_some_and(|at| at.starts_with("nf")),
            "{row}"
        );
    }
    // An address that answers is not blamed.
    let server = net.server.tcp_listen(SocketAddr::from((
        Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 2),
        0,
    )))?;
    let to = server.address();
    let row = outcome(&net.client, &[], to.port(), || connect(&net.client, to))?;
    ensure!(row["drop"].is_null(), "{row}");
    Ok(())
}

pub fn socket(family: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: plain numbers; gives a new fd or -1.
    let fd = unsafe { libc::socket(family, kind, protocol) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh fd that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// MPTCP, TCP Fast Open with the SYN put off to the first data, and what a plain socket's row says about these.
fn sockets() -> Result<()> {
    const MPTCP: i32 = 262;
    const TCP_FASTOPEN_CONNECT: i32 = 30;
    let net = Netns::new("sockets")?;
    let servers: Vec<_> = (0..4)
        .map(|_| net.tcp_listen("127.0.0.1:0".parse()?))
        .collect::<Result<_>>()?;
    let port = |i: usize| servers[i].address().port();
    // Data in the SYN without a cookie of an earlier connect.
    net.sysctl("net/ipv4/tcp_fastopen", "5")?;
    let run = Netprobe::new("tcpconnect")
        .args(["--outcome", "--output-json", "--netns", net.name()])
        .start()?;
    let plain = net.enter(|| socket(libc::AF_INET, libc::SOCK_STREAM, 0))??;
    ensure!(the_caller_of_connect(plain.as_raw_fd(), port(0)) == 0);
    let mptcp = net.enter(|| socket(libc::AF_INET, libc::SOCK_STREAM, MPTCP))?;
    if let Ok(mptcp) = &mptcp {
        ensure!(the_caller_of_connect(mptcp.as_raw_fd(), port(1)) == 0);
    }
    // Nothing listens at these.
    const NO_MPTCP: u16 = 11;
    const NO_FAST: u16 = 12;
    if mptcp.is_ok() {
        let refused = net.enter(|| socket(libc::AF_INET, libc::SOCK_STREAM, MPTCP))??;
        ensure!(the_caller_of_connect(refused.as_raw_fd(), NO_MPTCP) == -1);
    }
    for (port, listens) in [(port(2), true), (NO_FAST, false)] {
        let fast = net.enter(|| socket(libc::AF_INET, libc::SOCK_STREAM, 0))??;
        let on = 1i32;
        // SAFETY: the value is valid for the call, and its length is given.
        let set = unsafe {
            libc::setsockopt(
                fast.as_raw_fd(),
                libc::IPPROTO_TCP,
                TCP_FASTOPEN_CONNECT,
                (&raw const on).cast(),
                size_of::<i32>() as u32,
            )
        };
        ensure!(set == 0, "{}", io::Error::last_os_error());
        ensure!(the_caller_of_connect(fast.as_raw_fd(), port) == 0);
        ensure!(TcpStream::from(fast).write_all(b"data").is_ok() == listens);
    }
    // Connects and sends in one call: the SYN waits for nothing.
    let fast = net.enter(|| socket(libc::AF_INET, libc::SOCK_STREAM, 0))??;
    let to = SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port(3)));
    socket::sendto(
        fast.as_raw_fd(),
        b"data",
        &to,
        MsgFlags::from_bits_retain(libc::MSG_FASTOPEN),
    )?;
    let row = |port: u16| -> Result<Value> {
        let line = run.wait_line(&format!("\"dport\":{port},"))?;
        Ok(serde_json::from_str(&line)?)
    };
    let check = |port: u16, outcome: &str, mptcp: bool, fast: bool, deferred: bool| {
        let row = row(port)?;
        ensure!(
            row["outcome"] == outcome
                && row["nonblocking"] == false
                && row["mptcp"] == mptcp
                && row["fast_open"] == fast
                && row["syn_data"] == fast
                && row["syn_deferred"] == deferred,
            "not {outcome}, MPTCP {mptcp}, Fast Open {fast}, deferred {deferred}: {row}"
        );
        Ok(())
    };
    check(port(0), "established", false, false, false)?;
    if mptcp.is_ok() {
        check(port(1), "established", true, false, false)?;
        check(NO_MPTCP, "refused", true, false, false)?;
    }
    check(port(2), "established", false, true, true)?;
    check(NO_FAST, "refused", false, true, true)?;
    check(port(3), "established", false, true, false)?;
    run.stop()?.expect_success()
}
