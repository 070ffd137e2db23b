//! `netprobe skb --drops`: one line for each drop, losses that the kernel does not call drops, copies, reasons of subsystems.

use std::io::Read;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::common::{Case, Env, Netns, Netprobe, Pair, Running, SHORT, case, deadline, wait_for};

pub fn cases() -> Vec<Case> {
    vec![
        case("skb_drops_accept_queue", accept_queue)
            .once_on("6.1")
            .trace(),
        case("skb_drops_syn_queue", syn_queue)
            .once_on("5.10")
            .trace()
            .program("nft"),
        case("skb_drops_end_of_handshake", end_of_handshake)
            .once_on("6.1")
            .trace()
            .program("nft"),
        case("skb_drops_place_of_list_frees", place_of_list_frees)
            .once_on("5.10")
            .trace()
            .program("tc"),
        case("skb_drops_copies", copies).once_on("5.10").trace(),
        case("skb_drops_nft", drops_nft).trace().program("nft"),
        case("skb_drops_text", drops_text).once_on("5.10").trace(),
        case("skb_drops_filters", drops_filters)
            .once_on("6.12")
            .trace(),
        case("skb_drops_normal_frees", normal_frees)
            .once_on("6.12")
            .trace()
            .kernel(5, 17),
        case("skb_drops_rules_of_a_file", rules_of_a_file)
            .once_on("5.10")
            .trace(),
        case("skb_drops_another_hosts_address", another_hosts_address)
            .once_on("newest")
            .trace()
            .program("tcpdump"),
    ]
}

fn drops(netns: &Netns) -> Result<Running> {
    Netprobe::new("skb")
        .args(["--drops", "--output-owner", "--output-json"])
        .args(["--filter-proto", "tcp", "--filter-netns", netns.name()])
        .start()
}

/// The first drop for this reason.
fn row(run: &Running, reason: &str) -> Result<Value> {
    let line = run.wait_line(&format!("\"reason\":\"{reason}\""))?;
    Ok(serde_json::from_str(&line)?)
}

/// Each row's packet was on its way to a socket of this process.
pub fn is_ours(row: &Value) -> Result<()> {
    let pid = row["owner"]["pid"].as_u64();
    ensure!(pid == Some(std::process::id().into()), "owner: {row}");
    Ok(())
}

/// SYNs to a server that does not accept: the kernel frees them as consumed. One line for each, v4 and v6; the connects before them
/// have none.
fn accept_queue() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    for address in [net.server.v4(0), net.server.v6(0)] {
        let (_listener, to) = net.server.tcp_listen_only(address, 1)?;
        let run = drops(&net.server)?;
        let _held = net.client.fill_accept_queue(&net.server, to, 2)?;
        let lost = net.client.tcp_connect(to, SHORT)?;
        ensure!(lost.is_err(), "the queue was not full");
        let row = row(&run, "ACCEPT_QUEUE_FULL")?;
        ensure!(row["location"]["name"] == "tcp_conn_request", "{row}");
        ensure!(
            row["listen"] == serde_json::json!({ "backlog": 2, "limit": 1 }),
            "{row}"
        );
        ensure!(row["tuple"]["dport"] == to.port(), "{row}");
        ensure!(row.get("copy").is_none(), "{row}");
        is_ours(&row)?;
        let done = run.stop()?;
        done.expect_success()?;
        // The SYN, and a retransmit where the machine is slow.
        let rows = done.json_of("drop")?;
        ensure!((1..=2).contains(&rows.len()), "{done}");
    }
    Ok(())
}

/// Half-open connections fill the queue of SYNs, without SYN cookies.
fn syn_queue() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    net.server.sysctl("net/ipv4/tcp_syncookies", "0")?;
    let (_listener, to) = net.server.tcp_listen_only(net.server.v4(0), 1)?;
    // No handshake comes to its end.
    net.client.nft("table ip t { chain i { type filter hook input priority 0; tcp flags & (syn | ack) == syn | ack drop; }; }")?;
    let run = drops(&net.server)?;
    for _ in 0..4 {
        let _ = net.client.tcp_connect(to, SHORT)?;
    }
    let row = row(&run, "SYN_QUEUE_FULL")?;
    ensure!(row["location"]["name"] == "tcp_conn_request", "{row}");
    let (backlog, limit) = (&row["listen"]["backlog"], &row["listen"]["limit"]);
    ensure!(
        backlog.as_u64() >= Some(1) && limit.as_u64() >= Some(1),
        "{row}"
    );
    is_ours(&row)?;
    run.stop()?.expect_success()
}

/// The queue is full when the last packet of a handshake comes: the kernel drops that one, and has no reason.
fn end_of_handshake() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let (_listener, to) = net.server.tcp_listen_only(net.server.v4(0), 0)?;
    // The first one's SYN-ACK is held back until another has filled the queue.
    net.client.nft("table ip t { chain i { type filter hook input priority 0; tcp flags & (syn | ack) == syn | ack drop; }; }")?;
    let run = drops(&net.server)?;
    let (client, rules) = (&net.client, "flush ruleset");
    std::thread::scope(|scope| -> Result<()> {
        let first = scope.spawn(|| client.tcp_connect(to, deadline()));
        let half_open = || -> Result<Option<()>> {
            let table = net.server.cmd("cat /proc/net/tcp")?;
            Ok(table.contains(" 03 ").then_some(()))
        };
        wait_for("a half-open connection", half_open)?;
        net.client.nft(rules)?;
        // Established at once; the first one's SYN-ACK is sent again after a second.
        let second = net.client.fill_accept_queue(&net.server, to, 1)?;
        let row = row(&run, "ACCEPT_QUEUE_FULL")?;
        ensure!(row["location"]["name"] != "tcp_conn_request", "{row}");
        ensure!(
            row["listen"] == serde_json::json!({ "backlog": 1, "limit": 0 }),
            "{row}"
        );
        is_ours(&row)?;
        drop(second);
        let mut stream = first
            .join()
            .map_err(|_| anyhow::anyhow!("the connect panicked"))???;
        // It thinks that it is connected.
        stream.set_read_timeout(Some(SHORT))?;
        let _ = stream.read(&mut [0; 1]);
        Ok(())
    })?;
    run.stop()?.expect_success()
}

/// A queue's limit: the place is the function that gave the list away to be freed; the reason has a name.
fn place_of_list_frees() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    net.client
        .cmd("tc qdisc add dev veth0 root tbf rate 8kbit burst 1600 limit 1600")?;
    let run = Netprobe::new("skb")
        .args(["--drops", "--output-json", "--filter-dst-port", "9"])
        .args(["--filter-netns", net.client.name()])
        .start()?;
    for _ in 0..10 {
        net.client.udp_send(net.server.v4(9), &[0; 1000])?;
    }
    let line = run.wait_line("\"drop\"")?;
    let row: Value = serde_json::from_str(&line)?;
    let place = row["location"]["name"].as_str().unwrap_or_default();
    ensure!(
        place.contains("xmit") || place.contains("qdisc") || place.contains("tbf"),
        "{row}"
    );
    if let Some(reason) = row["reason"].as_str() {
        ensure!(
            reason.starts_with("SKB_DROP_REASON_QDISC") || reason.starts_with("QDISC_DROP"),
            "{row}"
        );
    }
    // From 7.x on qdiscs have reasons of their own.
    let own = Env::look().has_function("__tcf_kfree_skb_list");
    ensure!((row["subsystem"] == "qdisc") == own, "{row}");
    run.stop()?.expect_success()
}

/// What a bridge floods to a port where nobody wants it is dropped as a copy, while the packet itself arrives; a packet's drop is none.
fn copies() -> Result<()> {
    let net = Pair::new()?;
    let (hub, third) = (Netns::new("hub")?, Netns::new("third")?);
    hub.ip("link add br0 type bridge ageing_time 0")?;
    hub.ip("link set br0 up")?;
    for (port, netns, host) in [(1, &net.client, 1), (2, &net.server, 2), (3, &third, 3)] {
        hub.ip(&format!(
            "link add p{port} type veth peer name eth0 netns {}",
            netns.name()
        ))?;
        hub.ip(&format!("link set p{port} master br0 up"))?;
        netns.ip(&format!("addr add 10.5.0.{host}/24 dev eth0"))?;
        netns.ip("link set eth0 up")?;
        netns.wait_up("eth0")?;
    }
    let to: SocketAddr = "10.5.0.2:5555".parse()?;
    let socket = net.server.udp_bind(to)?;
    // Neighbours are resolved, and all ports forward.
    net.client.udp_send(to, b"first")?;
    socket.recv_from(&mut [0; 16]).context("the first packet")?;
    let run = Netprobe::new("skb")
        .args(["--drops", "--output-json", "--filter-proto", "udp"])
        .args(["--filter-dst-ip", "10.5.0.2"])
        .start()?;
    net.client.udp_send(to, b"second")?;
    socket.recv_from(&mut [0; 16])?;
    let line = run.wait_line("\"dport\":5555")?;
    let row: Value = serde_json::from_str(&line)?;
    ensure!(row["netns"].as_u64() == Some(third.inode()?), "{row}");
    ensure!(row["copy"]["why"] == "other host", "{row}");
    // The packet itself: nobody listens there.
    drop(socket);
    let alone = Netprobe::new("skb")
        .args(["--drops", "--filter-proto", "udp", "--filter-dst-port", "7"])
        .start()?;
    net.client.udp_send(net.server.v4(7), b"x")?;
    let line = alone.wait_line(":7(udp)")?;
    ensure!(!line.contains("copy"), "{line}");
    alone.stop()?.expect_success()?;
    run.stop()?.expect_success()
}

/// This kernel says why it drops (from 5.17).
fn has_reasons() -> bool {
    std::fs::read("/sys/kernel/btf/vmlinux").is_ok_and(|btf| {
        let wanted = b"SKB_DROP_REASON_NO_SOCKET";
        btf.windows(wanted.len()).any(|w| w == wanted)
    })
}

pub const DROP_OUTPUT: &str = "add table inet t; add chain inet t out { type filter hook output priority 0; }; add rule inet t out tcp dport 81 drop";

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
    let place = row["location"]["name"].as_str().unwrap_or_default();
    ensure!(matches!(place, "nf_hook_slow" | "nft_do_chain"), "{done}");
    ensure!(row["location"]["offset"].as_u64() > Some(0), "{done}");
    ensure!(row["tuple"]["daddr"] == "10.77.0.2" && row["tuple"]["dport"] == 81);
    ensure!(row["netns"].as_u64() == Some(net.client.inode()?), "{done}");
    let reason = row["reason"].as_str().unwrap_or_default();
    // Unasked: what it means, whose packet it was, and the rule.
    ensure!(
        row["class"] == "firewall" && row["change"].is_string(),
        "{done}"
    );
    is_ours(row)?;
    if has_reasons() {
        ensure!(
            row["nft"]["table"] == "t" && row["nft"]["chain"] == "out",
            "{done}"
        );
        ensure!(row["nft"]["handle"].as_u64() > Some(0), "{done}");
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
    ensure!(line.contains(" (socket: "), "no words: {line}");
    let done = probe.stop()?;
    done.expect_success()?;
    ensure!(
        done.lines_with(":9(udp)").len() == 1,
        "not one line:\n{done}"
    );
    Ok(())
}

/// What is no loss is not shown, but counted; --all shows it.
fn normal_frees() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    net.server.ip("link set veth0 promisc on")?;
    let run = |all: &[&str]| {
        Netprobe::new("skb")
            .args(["--drops", "--output-nft=false", "--output-owner=false"])
            .args(["--filter-proto", "udp", "--filter-netns", net.server.name()])
            .args(all)
            .start()
    };
    let (quiet, all) = (run(&[])?, run(&["--all"])?);
    let to = net.server.v4(7).ip();
    net.client.ip(&format!(
        "neigh replace {to} lladdr 02:00:00:00:00:99 dev veth0 nud permanent"
    ))?;
    net.client.udp_send(net.server.v4(7), b"for another host")?;
    net.fix_neighbours()?;
    net.client.udp_send(net.server.v4(9), b"lost")?;
    let line = all.wait_line(":7(udp)")?;
    ensure!(
        line.contains(" (expected: frame for another host"),
        "{line}"
    );
    let line = quiet.wait_line(":9(udp)")?;
    // Neither the owner nor a rule: they were switched off.
    ensure!(line.ends_with("(socket: no socket listens here)"), "{line}");
    all.wait_line(":9(udp)")?;
    let done = quiet.stop()?;
    ensure!(done.lines_with(":7(udp)").is_empty(), "{done}");
    done.expect_stderr("1 normal frees of 1 kinds, --all shows them")?;
    let done = all.stop()?;
    ensure!(!done.stderr.contains("normal frees"), "{done}");
    Ok(())
}

/// --rules: the user's words come first, and a recording has them.
fn rules_of_a_file() -> Result<()> {
    let net = Pair::new()?;
    let dir = tempfile::tempdir()?;
    let (rules, file, lines) = (
        dir.path().join("r"),
        dir.path().join("f"),
        dir.path().join("l"),
    );
    std::fs::write(
        &rules,
        "[[place]]\nreasons = [\"NOT_SPECIFIED\", \"NO_SOCKET\"]\n\
         class = \"scan\"\nwhat = \"a port scan\"\n",
    )?;
    let run = Netprobe::new("record")
        .args(["--drops", "--output-nft=false", "--output-owner=false"])
        .args(["--filter-dst-port", "9", "--rules"])
        .arg(&rules)
        .arg("-o")
        .arg(&file)
        .arg("--output-file")
        .arg(&lines)
        .start()?;
    net.client.udp_send(net.server.v4(9), b"nobody listens")?;
    wait_for("a line", || {
        let text = std::fs::read_to_string(&lines)?;
        Ok(text.contains("(scan: a port scan)").then_some(()))
    })?;
    run.stop()?.expect_success()?;
    let shown = Netprobe::new("report").arg(&file).run()?;
    shown.expect_success()?;
    let live = std::fs::read_to_string(&lines)?;
    ensure!(shown.stdout == live, "{live}{shown}");
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

/// A frame for another host's link address, with no bridge near: the packet itself is lost, not a copy. Where a packet socket has
/// seen it too, that is not certain any more.
fn another_hosts_address() -> Result<()> {
    let net = Pair::new()?;
    let to = net.server.v4(7).ip();
    let wrong = format!("neigh replace {to} lladdr 02:00:00:00:00:99 dev veth0 nud permanent");
    net.client.ip(&wrong)?;
    let run = Netprobe::new("skb")
        .args(["--drops", "--filter-dst-port", "7"])
        .args(["--filter-netns", net.server.name()])
        .start()?;
    net.client.udp_send(net.server.v4(7), b"lost")?;
    let line = run.wait_line(":7(udp)")?;
    ensure!(line.ends_with(" [for another host]"), "{line}");
    // A segment is a clone of what TCP keeps for a retransmission.
    let client = &net.client;
    let _ = client.tcp_connect(net.server.v4(7), std::time::Duration::from_millis(50))?;
    let line = run.wait_line(":7(tcp)")?;
    ensure!(line.ends_with(" [for another host]"), "{line}");

    let dir = tempfile::tempdir()?;
    let tcpdump = crate::xdp::tcpdump(&net.client, &dir.path().join("x"))?;
    net.client.udp_send(net.server.v4(7), &[0; 200])?;
    let line = run.wait_line(" 228 ")?;
    ensure!(line.contains("a copy, for another host]"), "{line}");
    crate::xdp::end(tcpdump)?;
    run.stop()?.expect_success()
}
