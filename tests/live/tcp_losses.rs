//! `netprobe tcp --events`: each kind of what is sent again, made on purpose, and ends of connections that a peer, a
//! firewall or an administrator makes; over IPv6, a tunnel and a bridge; the subflows of MPTCP.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Result, ensure};
use nix::sys::socket::{Backlog, SockaddrStorage, bind, connect, listen, setsockopt, sockopt};
use serde_json::Value;

use super::tcp::{connected, ends, listen as listen_at, read_all, row, start};
use super::tcp_events::event;
use crate::common::{Case, Env, Pair, Running, case, deadline};

pub fn cases() -> Vec<Case> {
    vec![
        case("tcp_kinds_of_loss", kinds).trace().program("nft"),
        case("tcp_ends_by_others", ends_by_others)
            .once_on("6.1")
            .trace()
            .program("nft")
            .program("ss"),
        case("tcp_vxlan_bridge_v6", vxlan_bridge_v6)
            .once_on("newest")
            .trace()
            .program("nft"),
        case("tcp_mptcp_subflows", subflows)
            .trace()
            .when(lacks_mptcp),
    ]
}

/// A segment of so much data is this long on the way over IPv4, with time stamps.
pub const SMALL: usize = 500;
pub const SMALL_V4: usize = SMALL + 52;
/// Each piece a segment of its own.
pub fn write(client: &mut TcpStream, pieces: &[usize]) -> Result<()> {
    client.set_nodelay(true)?;
    for &len in pieces {
        client.write_all(&vec![7; len])?;
    }
    Ok(())
}

pub fn finish(mut server: TcpStream, client: TcpStream) -> Result<()> {
    drop(client);
    read_all(&mut server)?;
    Ok(())
}

/// What was sent again to or from a port so far.
pub fn again(run: &Running, port: u16) -> Vec<(String, String)> {
    let text = run.stdout();
    let rows = text.lines().filter_map(|l| serde_json::from_str(l).ok());
    let of_port = |e: &Value| e["local"]["port"] == port || e["remote"]["port"] == port;
    let word = |e: &Value, key: &str| e[key].as_str().unwrap_or("-").to_owned();
    rows.filter(|e: &Value| e["happened"] == "retransmit" && of_port(e))
        .map(|e: Value| (word(&e, "how"), word(&e["dropped"], "packet")))
        .collect()
}

/// What was sent again begins so, and no more of it was dropped: a slow machine sends a probe more.
fn begins(run: &Running, port: u16, wanted: &[(&str, &str)]) -> Result<()> {
    let all = again(run, port);
    let is = |((a, b), (how, packet)): (&(String, String), &(&str, &str))| a == how && b == packet;
    let (first, rest) = all.split_at(wanted.len().min(all.len()));
    ensure!(
        first.len() == wanted.len()
            && first.iter().zip(wanted).all(is)
            && rest.iter().all(|(_, packet)| packet == "-"),
        "port {port}: {all:?}"
    );
    Ok(())
}

fn kinds() -> Result<()> {
    let net = Pair::new()?;
    net.client.sysctl("net/ipv4/tcp_autocorking", "0")?;
    let small = SMALL_V4;
    net.server.nft(&format!(
        "add table inet t; add chain inet t in {{ type filter hook input priority 0; }}; \
         add rule inet t in tcp dport 71 meta length {small} quota until {} bytes drop; \
         add rule inet t in tcp dport 72 meta length {small} quota until {} bytes drop; \
         add rule inet t in tcp dport 73 meta length {small} quota until {} bytes drop; \
         add rule inet t in tcp dport 78 meta length 60 quota until 121 bytes drop",
        small + 1,
        2 * small + 1,
        small + 1
    ))?;
    // The first answer to a SYN.
    net.client.nft(
        "add table inet t; add chain inet t in { type filter hook input priority 0; }; \
         add rule inet t in tcp sport 70 tcp flags & (syn | ack) == syn | ack quota until 100 bytes drop",
    )?;
    // Kernels from 6.5 wait for as long before the first four.
    let _ = net.client.sysctl("net/ipv4/tcp_syn_linear_timeouts", "0");
    let run = start(&["--events"])?;
    let slow = start(&["--min-ms", "900", "--only", "slow", "--port", "78"])?;
    // Two SYNs are lost, while the others go on.
    std::thread::scope(|scope| {
        let syns = scope.spawn(|| {
            let (client, server) = connected(&net, 78)?;
            finish(server, client)
        });
        each_kind(&net, &run)?;
        syns.join().expect("the thread ends")
    })?;
    ends(&run, "connect", 78, "closed-here")?;
    run.stop()?.expect_success()?;
    sentence(
        &slow,
        78,
        "tcp-syn-dropped",
        "it was repeated after 1.00 s and 2.00 s",
    )?;
    slow.stop()?.expect_success()
}

/// Why the connection to this port took long.
fn sentence(run: &Running, port: u16, rule: &str, text: &str) -> Result<()> {
    let done = row(run, "connect", port)?;
    let said = done["slow"]["text"].as_str().unwrap_or_default();
    ensure!(
        done["slow"]["rule"] == rule && said.contains(text),
        "{done}"
    );
    Ok(())
}

fn each_kind(net: &Pair, run: &Running) -> Result<()> {
    lost_syn_ack(net, run)?;
    // The tail alone is lost: a probe, before the timeout.
    let (mut client, server) = connected(net, 71)?;
    write(&mut client, &[1000, SMALL])?;
    event(run, 71, |e| e["how"] == "tlp")?;
    finish(server, client)?;
    let done = ends(run, "connect", 71, "closed-here")?;
    ensure!(done["retransmitted"].as_u64() > Some(0), "{done}");
    begins(run, 71, &[("tlp", "original")])?;
    // The probe is lost, too.
    let (mut client, server) = connected(net, 72)?;
    write(&mut client, &[1000, SMALL])?;
    let rto = event(run, 72, |e| e["how"] == "rto")?;
    finish(server, client)?;
    ensure!(rto["rto_ns"].as_u64() >= Some(200_000_000), "{rto}");
    ends(run, "connect", 72, "closed-here")?;
    begins(run, 72, &[("tlp", "original"), ("rto", "original")])?;
    // Acknowledgements tell of the hole.
    let (mut client, server) = connected(net, 73)?;
    write(&mut client, &[SMALL, 1000, 1000, 1000, 1000])?;
    event(run, 73, |e| e["how"] == "fast")?;
    finish(server, client)?;
    let done = ends(run, "connect", 73, "closed-here")?;
    ensure!(done["lost"].as_u64() > Some(0), "{done}");
    begins(run, 73, &[("fast", "original")])?;
    Ok(())
}

fn lost_syn_ack(net: &Pair, run: &Running) -> Result<()> {
    let (client, server) = connected(net, 70)?;
    finish(server, client)?;
    let syn_ack = event(run, 70, |e| e["how"] == "syn-ack")?;
    ensure!(
        syn_ack["role"] == "accept" && syn_ack["dropped"]["netns"] == net.client.inode()?,
        "{syn_ack}"
    );
    let done = ends(run, "connect", 70, "closed-here")?;
    ensure!(done["handshake_ns"].as_u64() > Some(900_000_000), "{done}");
    Ok(())
}

fn ends_by_others() -> Result<()> {
    let net = Pair::new()?;
    net.server.nft(
        "add table inet t; add chain inet t in { type filter hook input priority 0; }; \
         add rule inet t in tcp dport 60 reject with tcp reset; \
         add rule inet t in tcp dport 61 tcp flags & (syn | ack) == ack quota until 60 bytes drop",
    )?;
    net.server.sysctl("net/ipv4/tcp_abort_on_overflow", "1")?;
    let run = start(&["--events=resets"])?;
    // A firewall refuses it.
    let to = net.server.v4(60);
    ensure!(net.client.enter(|| TcpStream::connect(to))?.is_err());
    let refused = ends(&run, "connect", 60, "refused")?;
    ensure!(refused["error"] == "ECONNREFUSED", "{refused}");
    let reset = event(&run, 60, |e| e["happened"] == "reset-received")?;
    // No process asked for it.
    ensure!(
        reset["state"] == "SYN_SENT" && reset.get("by").is_none(),
        "{reset}"
    );
    in_stack(&reset, "tcp_rcv_state_process")?;
    // The listener has no room: another comes first, as the end of the first handshake is lost.
    let (_listener, to) = net.server.tcp_listen_only(net.server.v4(61), 0)?;
    let mut over = net.client.tcp_connect(to, deadline())??;
    let held = net.client.fill_accept_queue(&net.server, to, 1)?;
    over.write_all(b"x")?;
    ensure!(over.read(&mut [0]).is_err());
    drop(over);
    let reset = event(&run, 61, |e| e["happened"] == "reset-sent")?;
    ensure!(reset["local"]["port"] == 61, "{reset}");
    ends(&run, "connect", 61, "reset-by-peer")?;
    drop(held);
    // An administrator ends it.
    let (client, server) = connected(&net, 62)?;
    net.client.cmd("ss -K dport = 62")?;
    let killed = ends(&run, "connect", 62, "killed")?;
    ensure!(killed["error"] == "ECONNABORTED", "{killed}");
    let sent = event(&run, 62, |e| e["happened"] == "reset-sent")?;
    ensure!(sent["by"]["comm"] == "ss", "{sent}");
    in_stack(&sent, "tcp_abort")?;
    drop((client, server));
    // The peer acknowledges no more.
    let (mut client, server) = connected(&net, 63)?;
    setsockopt(&client, sockopt::TcpUserTimeout, &300)?;
    net.server.nft("add rule inet t in tcp dport 63 drop")?;
    client.write_all(b"x")?;
    let timed = ends(&run, "connect", 63, "timed-out")?;
    ensure!(timed["error"] == "ETIMEDOUT", "{timed}");
    drop((client, server));
    run.stop()?.expect_success()
}

pub fn in_stack(event: &Value, function: &str) -> Result<()> {
    let calls = event["stack"].as_array().map(Vec::as_slice);
    let found = calls.unwrap_or_default().iter().any(|c| c == function);
    ensure!(found, "no {function}: {event}");
    Ok(())
}

/// A segment is lost at the end of a tunnel, above a bridge.
fn vxlan_bridge_v6() -> Result<()> {
    let net = Pair::new()?;
    for (here, there, host) in [(&net.client, &net.server, 1), (&net.server, &net.client, 2)] {
        here.ip(&format!(
            "link add vx0 type vxlan id 9 dstport 4789 dev veth0 local {} remote {}",
            here.v4(0).ip(),
            there.v4(0).ip()
        ))?;
        if host == 2 {
            here.ip("link add br0 type bridge")?;
            here.ip("link set vx0 master br0")?;
            here.ip("link set br0 up")?;
        }
        here.ip("link set vx0 up")?;
        let device = ["vx0", "br0"][host - 1];
        here.ip(&format!("addr add fd99::{host}/64 dev {device} nodad"))?;
    }
    let small = SMALL_V4 + 20;
    net.server.nft(&format!(
        "add table inet t; add chain inet t in {{ type filter hook input priority 0; }}; \
         add rule inet t in tcp dport 71 meta length {small} quota until {} bytes drop",
        small + 1
    ))?;
    let run = start(&["--events=retransmits"])?;
    let listener = listen_at(&net.server, "[fd99::2]:71".parse()?)?;
    let to = listener.local_addr()?;
    let mut client = net.client.enter(|| TcpStream::connect(to))??;
    let (mut server, _) = listener.accept()?;
    // Large segments go through, which GSO splits.
    client.write_all(&[1; 100_000])?;
    server.read_exact(&mut vec![0; 100_000])?;
    write(&mut client, &[1000, SMALL])?;
    let again = event(&run, 71, |e| e["happened"] == "retransmit")?;
    finish(server, client)?;
    ensure!(
        again["dropped"]["packet"] == "original"
            && again["dropped"]["netns"] == net.server.inode()?,
        "{again}"
    );
    let sent = ends(&run, "connect", 71, "closed-here")?;
    let received = ends(&run, "accept", 71, "closed-by-peer")?;
    ensure!(
        sent["local"]["ip"] == "fd99::1" && sent["remote"]["ip"] == "fd99::2",
        "{sent}"
    );
    ensure!(
        sent["bytes_sent"] == 101_500 && received["bytes_received"] == 101_500,
        "{sent} {received}"
    );
    ensure!(received["local"] == sent["remote"] && received["remote"] == sent["local"]);
    run.stop()?.expect_success()
}

const IPPROTO_MPTCP: libc::c_int = 262;

fn mptcp_socket() -> std::io::Result<OwnedFd> {
    // SAFETY: numbers alone are given.
    let fd = unsafe {
        libc::socket(
            libc::AF_INET,
            libc::SOCK_STREAM | libc::SOCK_CLOEXEC,
            IPPROTO_MPTCP,
        )
    };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: a fresh fd that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn lacks_mptcp(_: &Env) -> Option<String> {
    let error = mptcp_socket().err()?;
    Some(format!("this kernel has no MPTCP: {error}"))
}

fn subflows() -> Result<()> {
    let net = Pair::new()?;
    let run = start(&[])?;
    let to = net.server.v4(80);
    let listener = net.server.enter(|| -> Result<TcpListener> {
        let fd = mptcp_socket()?;
        bind(fd.as_raw_fd(), &SockaddrStorage::from(to))?;
        listen(&fd, Backlog::new(1)?)?;
        Ok(TcpListener::from(fd))
    })??;
    let mut client = net.client.enter(|| -> Result<TcpStream> {
        let fd = mptcp_socket()?;
        connect(fd.as_raw_fd(), &SockaddrStorage::from(to))?;
        Ok(TcpStream::from(fd))
    })??;
    let (mut server, _) = listener.accept()?;
    client.write_all(&[1; 5000])?;
    server.read_exact(&mut [0; 5000])?;
    drop(client);
    ensure!(read_all(&mut server)? == 0);
    drop(server);
    let (mut plain, mut accepted) = connected(&net, 81)?;
    plain.write_all(b"x")?;
    drop(plain);
    ensure!(read_all(&mut accepted)? == 1);
    drop(accepted);
    for role in ["connect", "accept"] {
        let subflow = row(&run, role, 80)?;
        ensure!(subflow["mptcp"] == true, "{subflow}");
        let plain = row(&run, role, 81)?;
        ensure!(plain["mptcp"] == false, "{plain}");
    }
    run.stop()?.expect_success()
}
