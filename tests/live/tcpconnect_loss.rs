//! `netprobe tcpconnect --outcome`: the drop, the copy and the error belong to this connect, whatever the network does to its packets.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrStorage};
use serde_json::Value;

use super::tcpconnect::{blocking, connect, net};
use crate::common::{Case, Finished, Netns, Netprobe, Pair, Running, SHORT, case};

pub fn cases() -> Vec<Case> {
    vec![
        case("tcpconnect_drop_behind_nat", behind_nat)
            .trace()
            .program("nft"),
        case("tcpconnect_drop_same_addresses", same_addresses)
            .once_on("5.10")
            .trace()
            .program("nft"),
        case("tcpconnect_drop_listen_queue", listen_queue).trace(),
        case("tcpconnect_copies", copies).once_on("newest").trace(),
        case("tcpconnect_errors", errors)
            .old_and_new()
            .trace()
            .program("nft")
            .limit(400),
    ]
}

fn start(args: &[&str]) -> Result<Running> {
    Netprobe::new("tcpconnect")
        .args(["--outcome", "--output-json", "-p"])
        .arg(std::process::id().to_string())
        .args(args)
        .start()
}

/// The one row of the connects to this port.
fn row(done: &Finished, port: u16) -> Result<Value> {
    let rows = done.json_of("connect")?;
    let mut found = rows.into_iter().filter(|r| r["dport"] == port);
    let row = found
        .next()
        .with_context(|| format!("no row of port {port}:\n{done}"))?;
    ensure!(found.next().is_none(), "two rows of port {port}:\n{done}");
    Ok(row)
}

fn has_reasons() -> Result<bool> {
    let btf = std::fs::read("/sys/kernel/btf/vmlinux")?;
    Ok(btf
        .windows(31)
        .any(|w| w == b"SKB_DROP_REASON_NETFILTER_DROP\0"))
}

fn is_netfilter_drop(row: &Value) -> Result<()> {
    let drop = &row["drop"];
    ensure!(drop["packets"].as_u64() >= Some(1), "no drop: {row}");
    ensure!(
        drop["at"].as_str().is_some_and(|at| at.starts_with("nf")),
        "{row}"
    );
    match has_reasons()? {
        true => ensure!(drop["reason"] == "SKB_DROP_REASON_NETFILTER_DROP", "{row}"),
        false => ensure!(drop["reason"].is_null(), "{row}"),
    }
    Ok(())
}

/// A service address that is translated on this side, IPv4 and IPv6, and masquerading on the way: the drop is on the other side, of a
/// packet with other addresses and ports.
fn behind_nat() -> Result<()> {
    let (net, v4, _v6) = net()?;
    net.client.nft(&format!(
        "add table ip n; add chain ip n o {{ type nat hook output priority -100; }}; \
         add rule ip n o ip daddr 10.96.0.1 tcp dport 80 dnat to 10.77.0.2:8081; \
         add rule ip n o ip daddr 10.96.0.2 tcp dport 80 dnat to {}; \
         add chain ip n p {{ type nat hook postrouting priority 100; }}; \
         add rule ip n p tcp dport 8081 masquerade to :30000-30999; \
         add table ip6 n; add chain ip6 n o {{ type nat hook output priority -100; }}; \
         add rule ip6 n o ip6 daddr fd96::1 tcp dport 81 dnat to [fd77::2]:8081",
        v4.address()
    ))?;
    net.client.ip("route add 10.96.0.0/16 via 10.77.0.2")?;
    net.client.ip("route add fd96::/64 via fd77::2")?;
    net.server.nft(
        "add table inet t; add chain inet t in { type filter hook input priority 0; }; add rule inet t in tcp dport 8081 drop",
    )?;
    let run = start(&[])?;
    ensure!(
        net.client
            .tcp_connect("10.96.0.1:80".parse()?, SHORT)?
            .is_err()
    );
    ensure!(
        net.client
            .tcp_connect("[fd96::1]:81".parse()?, SHORT)?
            .is_err()
    );
    connect(&net.client, "10.96.0.2:80".parse()?)?;
    run.wait_lines("three rows", |t| (t.lines().count() >= 3).then_some(()))?;
    let done = run.stop()?;
    done.expect_success()?;
    let rows = done.json_of("connect")?;
    ensure!(rows.len() == 3, "{done}");
    for r in &rows {
        if r["daddr"] == "10.96.0.2" {
            ensure!(r["outcome"] == "established" && r["drop"].is_null(), "{r}");
            continue;
        }
        ensure!(r["outcome"] == "interrupted", "{r}");
        is_netfilter_drop(r)?;
    }
    Ok(())
}

/// Two networks with the same addresses, and the same ports on both ends: the drop is of the one, not of the other.
fn same_addresses() -> Result<()> {
    const FROM: u16 = 41_000;
    const TO: u16 = 8_090;
    let pairs = [Pair::new()?, Pair::new()?];
    for net in &pairs {
        net.fix_neighbours()?;
    }
    // The first one's SYN ends at its server's firewall, that of the second in a server that is not there for it (no answer either).
    pairs[0].server.nft(
        "add table inet t; add chain inet t in { type filter hook input priority 0; }; add rule inet t in tcp dport 8090 drop",
    )?;
    pairs[1]
        .client
        .ip("neigh replace 10.77.0.2 lladdr 02:00:00:00:00:09 dev veth0 nud permanent")?;
    let run = start(&[])?;
    let mut sockets = Vec::new();
    // Both are on their way at once.
    for net in [&pairs[1], &pairs[0]] {
        sockets.push(
            net.client
                .enter(|| begin(net.client.v4(FROM), net.server.v4(TO)))??,
        );
    }
    drop(sockets);
    run.wait_lines("two rows", |t| (t.lines().count() >= 2).then_some(()))?;
    let done = run.stop()?;
    done.expect_success()?;
    let rows = done.json_of("connect")?;
    ensure!(rows.len() == 2, "{done}");
    for (net, dropped) in [(&pairs[0], true), (&pairs[1], false)] {
        let inode = net.client.inode()?;
        let r = rows
            .iter()
            .find(|r| r["netns"] == inode)
            .context("no row")?;
        ensure!(r["lport"] == FROM && r["outcome"] == "interrupted", "{r}");
        if dropped {
            is_netfilter_drop(r)?;
        } else {
            // Its frame went to the other end with a hardware address that nobody has.
            ensure!(r["drop"].is_null(), "{r}");
            let other = &r["other_host"];
            ensure!(other["packets"].as_u64() >= Some(1), "{r}");
            ensure!(
                other["at"]
                    .as_str()
                    .is_some_and(|at| at.starts_with("ip_rcv")),
                "{r}"
            );
        }
    }
    Ok(())
}

/// A socket that has begun to connect, without waiting for the answer.
fn begin(from: SocketAddr, to: SocketAddr) -> io::Result<OwnedFd> {
    let family = match to {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    };
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let fd = socket::socket(family, SockType::Stream, flags, None)?;
    socket::bind(fd.as_raw_fd(), &SockaddrStorage::from(from))?;
    match socket::connect(fd.as_raw_fd(), &SockaddrStorage::from(to)) {
        Ok(()) | Err(nix::Error::EINPROGRESS) => Ok(fd),
        Err(e) => Err(e.into()),
    }
}

/// A server that accepts nothing: the accept queue is full after two, and SYNs are given back as if they had been used. IPv4 and IPv6.
fn listen_queue() -> Result<()> {
    let (net, _v4, _v6) = net()?;
    net.server.sysctl("net/core/somaxconn", "1")?;
    let mut listeners = Vec::new();
    for at in [net.server.v4(8082), net.server.v6(8083)] {
        listeners.push(net.server.enter(|| TcpListener::bind(at))??);
    }
    let run = start(&[])?;
    let mut kept = Vec::new();
    for to in [net.server.v4(8082), net.server.v6(8083)] {
        kept.push(net.client.fill_accept_queue(&net.server, to, 2)?);
        ensure!(net.client.tcp_connect(to, SHORT)?.is_err());
    }
    run.wait_lines("six rows", |t| (t.lines().count() >= 6).then_some(()))?;
    let done = run.stop()?;
    done.expect_success()?;
    let rows = done.json_of("connect")?;
    ensure!(rows.len() == 6, "{done}");
    for port in [8082, 8083] {
        let of = rows.iter().filter(|r| r["dport"] == port);
        let (open, lost): (Vec<_>, Vec<_>) = of.partition(|r| r["outcome"] == "established");
        ensure!(open.len() == 2 && lost.len() == 1, "{done}");
        ensure!(open.iter().all(|r| r["drop"].is_null()), "{done}");
        let drop = &lost[0]["drop"];
        ensure!(
            drop["reason"] == "ACCEPT_QUEUE_FULL" && drop["at"] == "tcp_conn_request",
            "{}",
            lost[0]
        );
    }
    Ok(())
}

/// Three machines on a switch that sends everything everywhere: what the third one drops are copies.
fn copies() -> Result<()> {
    let hub = Netns::new("hub")?;
    // As long as no address is learnt, and here none is.
    hub.ip("link add br0 type bridge ageing_time 0")?;
    hub.ip("link set br0 up")?;
    let mut hosts = Vec::new();
    for i in 1..=3 {
        let host = Netns::new("host")?;
        hub.ip(&format!(
            "link add p{i} type veth peer name veth0 netns {}",
            host.name()
        ))?;
        hub.ip(&format!("link set p{i} master br0 up"))?;
        host.ip(&format!("addr add 10.78.0.{i}/24 dev veth0"))?;
        host.ip("link set veth0 up")?;
        host.wait_up("veth0")?;
        hosts.push(host);
    }
    for (here, there) in [(0, 1), (1, 0)] {
        let mac = hosts[there].mac("veth0")?;
        hosts[here].ip(&format!(
            "neigh replace 10.78.0.{} lladdr {mac} dev veth0 nud permanent",
            there + 1
        ))?;
    }
    let server = hosts[1].tcp_listen("10.78.0.2:8084".parse()?)?;
    let run = start(&[])?;
    // The third machine has dropped its copy when the connect is there: the bridge hands out all in one go, in the order of the ports.
    connect(&hosts[0], server.address())?;
    // The second does not answer, and drops nothing.
    hosts[1].sysctl("net/ipv4/ip_forward", "1")?;
    hosts[1].ip("link add d0 type dummy")?;
    hosts[1].ip("link set d0 up")?;
    hosts[1].ip("addr del 10.78.0.2/24 dev veth0")?;
    hosts[1].ip("neigh add 10.99.0.2 lladdr 02:00:00:00:00:09 dev d0")?;
    hosts[1].ip("route add 10.78.0.2/32 via 10.99.0.2 dev d0 onlink")?;
    ensure!(
        hosts[0]
            .tcp_connect("10.78.0.2:8085".parse()?, SHORT)?
            .is_err()
    );
    run.wait_lines("two rows", |t| (t.lines().count() >= 2).then_some(()))?;
    let done = run.stop()?;
    done.expect_success()?;
    for (port, outcome) in [(8084, "established"), (8085, "interrupted")] {
        let r = row(&done, port)?;
        ensure!(r["outcome"] == outcome, "{r}");
        ensure!(r["drop"].is_null() && r["other_host"].is_null(), "{r}");
        let copy = &r["copy"];
        ensure!(copy["packets"].as_u64() >= Some(1), "no copy: {r}");
        ensure!(
            copy["at"]
                .as_str()
                .is_some_and(|at| at.starts_with("ip_rcv")),
            "{r}"
        );
    }
    Ok(())
}

/// What a program got of a connect, and by what way it asks.
struct Got {
    port: u16,
    v6: bool,
    blocking: bool,
    error: i32,
}

/// Rejects on the same machine and on the other, by each message: the error is what the program itself got, by connect or by SO_ERROR.
fn errors() -> Result<()> {
    let (net, _v4, _v6) = net()?;
    // Port, family, statement.
    let rejects = [
        (100, "ip", "with icmp type net-unreachable"),
        (101, "ip", "with icmp type host-unreachable"),
        (102, "ip", "with icmp type prot-unreachable"),
        (103, "ip", "with icmp type port-unreachable"),
        (104, "ip", "with icmp type net-prohibited"),
        (105, "ip", "with icmp type host-prohibited"),
        (106, "ip", "with icmp type admin-prohibited"),
        (107, "ip", "with tcp reset"),
        (110, "ip6", "with icmpv6 type no-route"),
        (111, "ip6", "with icmpv6 type admin-prohibited"),
        (112, "ip6", "with icmpv6 type addr-unreachable"),
        (113, "ip6", "with icmpv6 type port-unreachable"),
        (114, "ip6", "with tcp reset"),
    ];
    for (netns, hook, offset) in [(&net.client, "output", 0), (&net.server, "input", 100)] {
        let mut rules = String::new();
        for family in ["ip", "ip6"] {
            rules += &format!(
                "add table {family} r; add chain {family} r c {{ type filter hook {hook} priority 0; }}; "
            );
        }
        for (port, family, with) in rejects {
            let port = port + offset;
            rules += &format!("add rule {family} r c tcp dport {port} reject {with}; ");
        }
        netns.nft(&rules)?;
        // As many answers as there are connects.
        netns.sysctl("net/ipv4/icmp_ratelimit", "0")?;
        netns.sysctl("net/ipv6/icmp/ratelimit", "0")?;
    }
    let run = start(&[])?;
    let mut got = Vec::new();
    for (port, family, _) in rejects {
        for port in [port, port + 100] {
            let v6 = family == "ip6";
            let to = match v6 {
                true => net.server.v6(port),
                false => net.server.v4(port),
            };
            let error = net.client.enter(|| so_error(to))??;
            got.push(Got {
                port,
                v6,
                blocking: false,
                error,
            });
        }
    }
    // Blocking ones are slow at home: the kernel waits for the first retransmit.
    for to in [
        net.server.v4(103),
        net.server.v6(114),
        net.server.v4(205),
        net.server.v6(211),
    ] {
        let error = blocking(&net.client, to)?.err().context("connected")?;
        got.push(Got {
            port: to.port(),
            v6: to.is_ipv6(),
            blocking: true,
            error: error.raw_os_error().context("no errno")?,
        });
    }
    run.wait_lines("a row of each", |t| {
        (t.lines().count() >= got.len()).then_some(())
    })?;
    let done = run.stop()?;
    done.expect_success()?;
    let rows = done.json_of("connect")?;
    ensure!(rows.len() == got.len(), "{done}");
    for g in &got {
        let r = rows
            .iter()
            .find(|r| r["dport"] == g.port && r["nonblocking"] == !g.blocking)
            .with_context(|| format!("no row of port {}:\n{done}", g.port))?;
        let name = format!("{:?}", nix::errno::Errno::from_raw(g.error));
        ensure!(
            r["error"] == name.as_str() && r["ip"] == if g.v6 { 6 } else { 4 },
            "the program got {name}: {r}"
        );
        let word = match g.error {
            libc::ECONNREFUSED => "refused",
            _ => "unreachable",
        };
        ensure!(r["outcome"] == word, "{r}");
    }
    unread(&net)
}

/// A soft error that its process never asks for.
fn unread(net: &Pair) -> Result<()> {
    let run = start(&[])?;
    let home = net.client.v4(42_001);
    let to = net.server.v4(105);
    drop(net.client.enter(|| begin(home, to))??);
    run.wait_line("\"dport\":105,")?;
    let done = run.stop()?;
    done.expect_success()?;
    let r = row(&done, 105)?;
    // Where the answer was so late that connect had ended, the kernel closed the socket by it.
    ensure!(
        r["outcome"] == "interrupted" && r["unread_error"] == "EHOSTUNREACH"
            || r["outcome"] == "unreachable" && r["error"] == "EHOSTUNREACH",
        "{r}"
    );
    Ok(())
}

/// What a non-blocking connect comes to, as programs find out: poll, then SO_ERROR.
fn so_error(to: SocketAddr) -> io::Result<i32> {
    let any = match to {
        SocketAddr::V4(_) => "0.0.0.0:0",
        SocketAddr::V6(_) => "[::]:0",
    };
    let any: SocketAddr = any.parse().map_err(io::Error::other)?;
    let fd = begin(any, to)?;
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)];
    poll(&mut fds, PollTimeout::from(30_000u16))?;
    let error = TcpStream::from(fd.try_clone()?).take_error()?;
    let error = error.and_then(|e| e.raw_os_error());
    error.ok_or_else(|| io::Error::other("no error"))
}
