//! `netprobe skb` beyond the functions themselves: tracking, drops, owners.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::common::{Case, Env, Netns, Netprobe, Pair, SHORT, case};

pub fn cases() -> Vec<Case> {
    vec![
        case("skb_more_drops_nft", drops_nft).trace().program("nft"),
        case("skb_more_drops_text", drops_text).trace(),
        case("skb_more_drops_filters", drops_filters).trace(),
        case("skb_more_owner_of_retransmits", owner_of_retransmits)
            .trace()
            .program("nft"),
        case("skb_more_owner_older_than_the_trace", owner_older).trace(),
        case("skb_more_track_nat_bridge_vxlan", track_path)
            .trace()
            .program("nft")
            .limit(300),
        case("skb_more_track_full_map", track_full_map).trace(),
        case("skb_more_track_address_reuse", track_reuse).trace(),
        case("skb_more_track_by_stack", track_by_stack).trace(),
        case("skb_more_tcp_flags_and_caller", flags_and_caller).trace(),
    ]
}

fn text<'a>(row: &'a Value, key: &str) -> &'a str {
    row[key].as_str().unwrap_or_default()
}

/// This kernel says why it drops (from 5.17).
fn has_reasons() -> bool {
    std::fs::read("/sys/kernel/btf/vmlinux").is_ok_and(|btf| {
        let wanted = b"SKB_DROP_REASON_NO_SOCKET";
        btf.windows(wanted.len()).any(|w| w == wanted)
    })
}

const DROP_OUTPUT: &str = "add table inet t; add chain inet t out { type filter hook output priority 0; }; add rule inet t out tcp dport 81 drop";

/// One line for each dropped packet: a SYN that nft drops, each time it is sent.
fn drops_nft() -> Result<()> {
    let net = Pair::new()?;
    net.client.nft(DROP_OUTPUT)?;
    let probe = Netprobe::new("skb")
        .args(["--drops", "--output-json", "--filter-dst-port", "81"])
        .args(["--filter-netns", net.client.name()])
        .start()?;
    let _ = net.client.tcp_connect(net.server.v4(81), SHORT)?;
    probe.wait_line("\"location\"")?;
    let done = probe.stop()?;
    done.expect_success()?;
    let rows = done.json_of("drop")?;
    // Within 300 ms there is no retransmit as yet, but for a slow machine.
    ensure!(!rows.is_empty() && rows.len() <= 3, "{done}");
    let row = &rows[0];
    // Since 6.9 nft frees the packet itself, before that the hook did.
    let place = text(&row["location"], "name");
    ensure!(matches!(place, "nf_hook_slow" | "nft_do_chain"), "{done}");
    ensure!(row["location"]["offset"].as_u64() > Some(0), "{done}");
    ensure!(row["tuple"]["daddr"] == "10.77.0.2" && row["tuple"]["dport"] == 81);
    ensure!(row["netns"].as_u64() == Some(net.client.inode()?), "{done}");
    let reason = text(row, "reason");
    if has_reasons() {
        ensure!(reason == "SKB_DROP_REASON_NETFILTER_DROP", "{done}");
    } else {
        ensure!(row.get("reason").is_none(), "{done}");
    }
    Ok(())
}

/// The text form: reason (where the kernel has reasons) and place.
fn drops_text() -> Result<()> {
    let net = Pair::new()?;
    let probe = Netprobe::new("skb")
        .args(["--drops", "--filter-proto", "udp", "--filter-dst-port", "9"])
        .start()?;
    net.client.udp_send(net.server.v4(9), b"nobody listens")?;
    let line = probe.wait_line("10.77.0.2:9(udp)")?;
    ensure!(line.contains("+0x"), "no place: {line}");
    ensure!(
        line.contains("NO_SOCKET ") == has_reasons(),
        "reason: {line}"
    );
    ensure!(line.contains("veth0:"), "no interface: {line}");
    let done = probe.stop()?;
    done.expect_success()?;
    ensure!(
        done.lines_with(":9(udp)").len() == 1,
        "not one line:\n{done}"
    );
    Ok(())
}

/// Filters hold for drops too, and function flags are refused with them.
fn drops_filters() -> Result<()> {
    let net = Pair::new()?;
    let probe = Netprobe::new("skb")
        .args(["--drops", "--filter-dst-port", "9"])
        .start()?;
    net.client.udp_send(net.server.v4(10), b"filtered out")?;
    net.client.udp_send(net.server.v4(9), b"shown")?;
    probe.wait_line(":9(udp)")?;
    let done = probe.stop()?;
    ensure!(done.lines_with(":10(udp)").is_empty(), "{done}");
    let refused = Netprobe::new("skb")
        .args(["--drops", "--filter-func", "ip_rcv"])
        .run()?;
    refused.expect_code(2)?;
    refused.expect_stderr("--filter-func")
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

/// client -veth- router: SNAT, a bridge with VXLAN on it, -veth- far: decapsulated. The filter matches the first form only.
fn track_path() -> Result<()> {
    // client 10.1.0.2 -> router (SNAT to 10.2.0.1) -> br0 -> vxlan over 10.77.0.0/24 -> server vx0 10.2.0.2
    let net = Pair::new()?;
    let (router, far) = (&net.client, &net.server);
    let client = Netns::new("inner")?;
    client.ip(&format!(
        "link add eth0 type veth peer name down0 netns {}",
        router.name()
    ))?;
    client.ip("addr add 10.1.0.2/24 dev eth0")?;
    client.ip("link set eth0 up")?;
    router.ip("addr add 10.1.0.1/24 dev down0")?;
    router.ip("link set down0 up")?;
    client.ip("route add default via 10.1.0.1")?;
    router.sysctl("net/ipv4/ip_forward", "1")?;
    router.ip("link add br0 type bridge")?;
    router.ip(
        "link add vx0 type vxlan id 7 remote 10.77.0.2 local 10.77.0.1 dstport 4789 dev veth0",
    )?;
    router.ip("link set vx0 master br0")?;
    router.ip("addr add 10.2.0.1/24 dev br0")?;
    router.ip("link set vx0 up")?;
    router.ip("link set br0 up")?;
    far.ip("link add vx0 type vxlan id 7 remote 10.77.0.1 local 10.77.0.2 dstport 4789 dev veth0")?;
    far.ip("addr add 10.2.0.2/24 dev vx0")?;
    far.ip("link set vx0 up")?;
    router.nft("add table ip n; add chain ip n post { type nat hook postrouting priority 100; }; add rule ip n post ip saddr 10.1.0.2 oif br0 snat to 10.2.0.1")?;
    let socket = far.udp_bind("10.2.0.2:5555".parse()?)?;
    // Neighbours are resolved by a first packet that nobody looks at.
    let to: SocketAddr = "10.2.0.2:5555".parse()?;
    client.udp_send(to, b"first")?;
    let mut buffer = [0; 64];
    socket.recv_from(&mut buffer)?;

    // All functions, where attaching to them takes no minute.
    let few = [
        "--filter-func",
        "ip_output|ip_forward|ip_finish_output|br_dev_xmit|br_handle_frame|vxlan_xmit|udp_rcv|udp_queue_rcv_skb|ip_rcv|ip_send_skb|vxlan_rcv|veth_xmit|__netif_receive_skb_core.*|dev_hard_start_xmit|consume_skb|skb_consume_udp|netif_rx.*",
    ];
    let all = Env::look().lacks_kprobe_multi().is_none();
    let probe = Netprobe::new("skb")
        .args(["--filter-track-skb", "--output-json"])
        .args(["--filter-src-ip", "10.1.0.2", "--filter-dst-port", "5555"])
        .args(if all { &few[..0] } else { &few[..] })
        .start()?;
    client.udp_send(to, b"second")?;
    let (_, from) = socket.recv_from(&mut buffer)?;
    ensure!(from.ip().to_string() == "10.2.0.1", "no SNAT: {from}");
    probe.wait_lines("the packet at its end", |text| {
        text.lines()
            .any(|l| l.contains("\"skb_consume_udp\"") || l.contains("\"udp_queue_rcv_skb\""))
            .then_some(())
    })?;
    let done = probe.stop()?;
    done.expect_success()?;
    let rows = done.json()?;
    let rows: Vec<&Value> = rows.iter().filter(|r| r["type"] == "event").collect();
    let first = text(rows[0], "packet");
    ensure!(!first.is_empty(), "{done}");
    ensure!(
        rows.iter().all(|r| text(r, "packet") == first),
        "more than one identity:\n{done}"
    );
    let seen = |what: &str, is: &dyn Fn(&Value) -> bool| {
        ensure!(rows.iter().any(|r| is(r)), "not seen: {what}\n{done}");
        Ok(())
    };
    let in_netns = |r: &Value, netns: &Netns| r["netns"].as_u64() == netns.inode().ok();
    let (inner, snat) = ("10.1.0.2", "10.2.0.1");
    seen("in the client", &|r| {
        in_netns(r, &client) && r["tuple"]["saddr"] == inner
    })?;
    seen("in the router", &|r| {
        in_netns(r, router) && r["tuple"]["saddr"] == inner
    })?;
    seen("after SNAT", &|r| {
        in_netns(r, router) && r["tuple"]["saddr"] == snat
    })?;
    seen("on the bridge", &|r| text(r, "iface") == "br0")?;
    seen("encapsulated", &|r| {
        in_netns(r, router) && r["tuple"]["dport"] == 4789
    })?;
    seen("arrived, encapsulated", &|r| {
        in_netns(r, far) && r["tuple"]["dport"] == 4789
    })?;
    seen("decapsulated", &|r| {
        in_netns(r, far) && text(r, "iface") == "vx0" && r["tuple"]["dport"] == 5555
    })
}

/// A map too small for the packets in flight: counted and told.
fn track_full_map() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let socket = net.server.udp_bind(net.server.v4(0))?;
    let to = socket.local_addr()?;
    let probe = Netprobe::new("skb")
        .args(["--filter-track-skb", "--track-entries", "4"])
        .args(["--filter-dst-port", &to.port().to_string()])
        .args(["--filter-func", "ip_rcv|ip_output"])
        .start()?;
    // Nobody reads: they stay in the socket's queue.
    for _ in 0..200 {
        net.client.udp_send(to, b"x")?;
    }
    probe.wait_lines("200 packets", |text| {
        (text.lines().filter(|l| l.contains("ip_rcv")).count() >= 200).then_some(())
    })?;
    let done = probe.stop()?;
    done.expect_success()?;
    done.expect_stderr("full map refused")
}

/// Many packets one after the other use the same few addresses: each has an identity of its own.
fn track_reuse() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let socket = net.server.udp_bind(net.server.v4(0))?;
    let to = socket.local_addr()?;
    let probe = Netprobe::new("skb")
        .args(["--filter-track-skb", "--output-json"])
        .args(["--filter-dst-port", &to.port().to_string()])
        .args(["--filter-func", "ip_rcv|ip_output|skb_consume_udp"])
        .start()?;
    let mut buffer = [0; 64];
    for n in 0..100u32 {
        net.client.udp_send(to, &n.to_ne_bytes())?;
        socket.recv_from(&mut buffer)?;
        // Others in between, which the filter does not match.
        net.client.udp_send(net.server.v4(9), b"other")?;
    }
    let count = |text: &str, what: &str| text.lines().filter(|l| l.contains(what)).count();
    probe.wait_lines("100 packets", |text| {
        (count(text, "\"skb_consume_udp\"") >= 100).then_some(())
    })?;
    let done = probe.stop()?;
    done.expect_success()?;
    let rows = done.json()?;
    let sent: Vec<&str> = rows
        .iter()
        .filter(|r| r["func"] == "ip_output")
        .map(|r| text(r, "packet"))
        .collect();
    let distinct: std::collections::HashSet<&&str> = sent.iter().collect();
    ensure!(sent.len() == 100 && distinct.len() == 100, "{done}");
    ensure!(
        rows.iter()
            .all(|r| r["type"] != "event" || r["tuple"]["dport"] == to.port()),
        "another packet was taken for one of them:\n{done}"
    );
    Ok(())
}

/// An echo reply is a new skb, made below the function that handles the request.
fn track_by_stack() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let args = |flag: &'static str| {
        Netprobe::new("skb")
            .args([flag, "--output-json", "--filter-proto", "icmp"])
            .args(["--filter-src-ip", "10.77.0.1"])
            .args([
                "--filter-func",
                "icmp_rcv|ip_rcv|ip_output|ip_send_skb|__ip_local_out|ip_local_deliver",
            ])
    };
    for (flag, rebuilt) in [
        ("--filter-track-skb", false),
        ("--filter-track-skb-by-stackid", true),
    ] {
        // Probes of returns put an address of their own on the stack in the place of the caller's.
        let returns = rebuilt && Env::look().kernel >= (5, 16);
        let probe = args(flag)
            .args(returns.then_some("--output-retval"))
            .start()?;
        ensure!(net.client.ping(net.server.v4(0), 1)?);
        probe.wait_line("icmp_rcv")?;
        let done = probe.stop()?;
        let rows = done.json()?;
        let reply = rows.iter().find(|r| r["tuple"]["saddr"] == "10.77.0.2");
        ensure!(reply.is_some() == rebuilt, "{flag}:\n{done}");
        if let Some(reply) = reply {
            let request = rows
                .iter()
                .find(|r| r["func"] == "icmp_rcv")
                .context("no request")?;
            ensure!(reply["packet"] == request["packet"], "{done}");
            ensure!(reply["skb"] != request["skb"], "{done}");
        }
    }
    Ok(())
}

fn flags_and_caller() -> Result<()> {
    let net = Pair::new()?;
    let server = net.server.tcp_listen(net.server.v4(0))?;
    let port = server.address().port().to_string();
    let probe = Netprobe::new("skb")
        .args(["--output-tcp-flags", "--output-caller"])
        .args(["--filter-dst-port", &port, "--filter-func", "tcp_v4_rcv"])
        .start()?;
    drop(
        net.client
            .tcp_connect(server.address(), crate::common::deadline())??,
    );
    probe.wait_line("(tcp,SYN)")?;
    let line = probe.wait_line("FIN|ACK)")?;
    ensure!(
        line.contains("tcp_v4_rcv ip_protocol_deliver_rcu+0x"),
        "{line}"
    );
    probe.stop()?.expect_success()
}
