//! `netprobe why`: two kinds of packets compared, the rules and connections on a packet's way, and the packets as a file.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::common::{Case, Env, Netprobe, Pair, case};

pub fn cases() -> Vec<Case> {
    vec![
        case("why_compare_rule", by_rule)
            .once_on("6.12")
            .trace()
            .program("nft"),
        case("why_compare_route", by_route).once_on("6.12").trace(),
        case("why_rules_and_connections", rules)
            .once_on("newest")
            .trace()
            .program("nft")
            .program("ping"),
        case("why_burst", burst).once_on("6.1").trace(),
        case("why_too_many", too_many)
            .once_on("6.12")
            .trace()
            .program("tc"),
    ]
}

fn compared(rows: &[Value]) -> Result<&Value> {
    let row = rows.iter().find(|r| r["type"] == "compare");
    let row = row.with_context(|| format!("no comparison: {rows:#?}"))?;
    let packets = rows.iter().filter(|r| r["type"] == "packet");
    ensure!(packets.count() == 0, "that alone: {rows:#?}");
    Ok(row)
}

fn compare(first: &str, second: &str, json: bool) -> Netprobe<'static> {
    let format = if json { "--output-json" } else { "-v" };
    Netprobe::new("why").args([format, "--compare", first, "--with", second])
}

/// A rule for one port: where the kernel shows the rule it is what differs, else the packet is dropped behind the hook.
fn by_rule() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let (client, server) = (&net.client, &net.server);
    client.nft("table inet t { chain o { type filter hook output priority 0; udp dport 81 counter drop; }; }")?;
    let socket = server.udp_bind(server.v4(80))?;
    let _other = server.udp_bind(server.v4(82))?;
    let send = |ports: &[u16]| -> Result<()> {
        for port in ports {
            client.udp_send(server.v4(*port), b"x")?;
        }
        Ok(())
    };
    let run = compare("dst port 80", "dst port 81", true)
        .arg("udp")
        .start()?;
    send(&[80, 81, 80, 81, 81, 82])?;
    socket.recv(&mut [0; 8])?;
    let done = run.stop()?;
    done.expect_success()?;
    let rows = done.json()?;
    let row = compared(&rows)?;
    let says = |row: &Value, side: &str| row[side]["is"].to_string();
    ensure!(row["same"] == false && row["class"] == "UDP", "{row:#}");
    ensure!(
        row["first"]["packets"] == 2 && row["first"]["end"] == "delivered",
        "{row:#}"
    );
    ensure!(
        row["second"]["packets"] == 3 && row["second"]["end"] == "lost",
        "{row:#}"
    );
    ensure!(row["function"] == "nf_hook_slow", "{row:#}");
    ensure!(row["netns"] == client.name(), "{row:#}");
    if Env::look().kernel >= (5, 17) {
        ensure!(
            row["by"] == serde_json::json!(["rule"]) && row["hook"] == "OUTPUT",
            "{row:#}"
        );
        ensure!(
            says(row, "first").contains("nft inet t o policy let it pass"),
            "{row:#}"
        );
        let drops = says(row, "second");
        ensure!(
            drops.contains("dropped it (now: udp dport 81 counter packets 3"),
            "{row:#}"
        );
    } else {
        ensure!(
            row["by"] == serde_json::json!(["next"]) && row["after"] == true,
            "{row:#}"
        );
        ensure!(says(row, "second").contains("dropped: "), "{row:#}");
    }
    let run = compare("dst port 80", "dst port 82", false).start()?;
    send(&[80, 82])?;
    let done = run.stop()?;
    done.expect_success()?;
    done.expect_stdout("UDP: both kinds took the same way")?;
    done.expect_stdout("dst port 82  1 of 1 packets: DELIVERED to a UDP socket")?;
    let run = compare("dst port 81", "dst port 99", false).start()?;
    send(&[81])?;
    let done = run.stop()?;
    done.expect_success()?;
    done.expect_stderr("netprobe: no packet matched 'dst port 99'")?;
    Netprobe::new("why")
        .args(["--compare", "udp"])
        .run()?
        .expect_code(2)
}

/// Policy routing by mark for one port: the mark is what differs first, and the route with it.
fn by_route() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let (client, server) = (&net.client, &net.server);
    client.ip("link add other type dummy")?;
    client.ip("link set dev other up")?;
    client.ip("route add 10.77.0.2 dev other table 100")?;
    client.ip("rule add fwmark 7 lookup 100")?;
    let marked = client.udp_bind("0.0.0.0:0".parse()?)?;
    nix::sys::socket::setsockopt(&marked, nix::sys::socket::sockopt::Mark, &7)?;
    let run = compare("dst port 80", "dst port 81", true).start()?;
    client.udp_send(server.v4(80), b"x")?;
    marked.send_to(b"x", server.v4(81))?;
    let done = run.stop()?;
    done.expect_success()?;
    let rows = done.json()?;
    let row = compared(&rows)?;
    let by = row["by"].to_string();
    ensure!(by.contains("mark") && by.contains("route"), "{row:#}");
    ensure!(row["common"] == 0 && row["stage"] == "route", "{row:#}");
    let says = |side: &str| row[side]["is"].to_string();
    ensure!(says("first").contains("dev veth0"), "{row:#}");
    ensure!(
        says("second").contains("0x7") && says("second").contains("dev other"),
        "{row:#}"
    );
    Ok(())
}

/// What let a packet pass, what translated it and its connection, in text, JSON and a file.
fn rules() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let (client, server) = (&net.client, &net.server);
    server.nft(
        "table ip n { chain pre { type nat hook prerouting priority dstnat; udp dport 60 dnat to 10.77.0.2:61 comment \"there\"; udp dport 64 redirect to :61; }; \
         chain in { type filter hook input priority 0; udp dport 61 counter accept; }; }",
    )?;
    client.nft("table ip n { chain post { type nat hook postrouting priority srcnat; udp dport 62 masquerade; udp dport 63 snat to 10.77.0.1:4000; }; }")?;
    let socket = server.udp_bind(server.v4(61))?;
    let others = [
        server.udp_bind(server.v4(62))?,
        server.udp_bind(server.v4(63))?,
    ];
    let file = tempfile::NamedTempFile::new()?;
    let run = Netprobe::new("why")
        .args(["--output-json", "-s", "128", "-w"])
        .arg(file.path())
        .arg("udp and host 10.77.0.1")
        .start()?;
    for port in [60, 62, 63, 64] {
        client.udp_send(server.v4(port), b"x")?;
    }
    for _ in 0..2 {
        socket.recv(&mut [0; 8])?;
    }
    for other in &others {
        other.recv(&mut [0; 8])?;
    }
    client.udp_send(server.v4(65), b"nobody")?;
    let done = run.stop()?;
    done.expect_success()?;
    let rows = done.json()?;
    let stages = |port: u16| -> Result<Vec<Value>> {
        let row = rows.iter().find(|r| r["dport"] == port);
        let row = row.with_context(|| format!("no packet to port {port}: {rows:#?}"))?;
        ensure!(row["end"] == "delivered", "{row:#}");
        row["stages"].as_array().cloned().context("no stages")
    };
    let has_rules = Env::look().kernel >= (5, 17);
    for (port, hook, rule) in [
        (60, "PREROUTING", "dnat to 10.77.0.2:61 comment \"there\""),
        (62, "POSTROUTING", "masquerade"),
        (63, "POSTROUTING", "snat to 10.77.0.1:4000"),
        (64, "PREROUTING", "redirect to :61"),
    ] {
        let all = stages(port)?;
        let by = |s: &&Value| {
            let fact = s["fact"].as_str().unwrap_or_default();
            fact.starts_with(hook) && fact.ends_with("translates it")
        };
        let found: Vec<&Value> = all.iter().filter(by).collect();
        ensure!(
            found.len() == usize::from(has_rules),
            "port {port}: {all:#?}"
        );
        for step in found {
            let text = step["rule"].as_str().unwrap_or_default();
            ensure!(text.ends_with(rule), "port {port}: {step:#}");
            ensure!(step["nft"]["handle"].is_u64(), "port {port}: {step:#}");
        }
    }
    let connections = |port: u16| -> Result<Vec<Value>> {
        let entries = stages(port)?.into_iter().filter(|s| s["ct"].is_object());
        Ok(entries.map(|s| s["ct"].clone()).collect())
    };
    if Env::look().kernel >= (5, 11) {
        let found = connections(60)?;
        let at_server = |c: &&Value| c["original"]["dport"] == 60 && c["reply"]["sport"] == 61;
        ensure!(found.iter().any(|c| at_server(&c)), "{found:#?}");
        let found = connections(63)?;
        let translated = |c: &&Value| c["reply"]["dport"] == 4000 && c["state"] == "new";
        ensure!(found.iter().any(|c| translated(&c)), "{found:#?}");
    }
    if has_rules {
        let all = stages(60)?;
        let accepted = all.iter().find(|s| {
            let fact = s["fact"].as_str().unwrap_or_default();
            fact.starts_with("INPUT") && fact.ends_with("accepted")
        });
        let accepted = accepted.with_context(|| format!("{all:#?}"))?;
        let text = accepted["rule"].as_str().unwrap_or_default();
        ensure!(
            text.starts_with("udp dport 61 counter packets"),
            "{accepted:#}"
        );
    }
    let bytes = std::fs::read(file.path())?;
    let text = String::from_utf8_lossy(&bytes);
    for comment in [
        "DELIVERED to a UDP socket, netns ",
        "REJECTED no socket listens here (",
        "sent by ",
    ] {
        ensure!(text.contains(comment), "no comment {comment:?}: {done}");
    }
    let dumped = server.cmd(&format!("tcpdump -nr {}", file.path().display()));
    if let Ok(dumped) = dumped {
        ensure!(dumped.lines().count() == 5 + 1, "{dumped}");
        ensure!(dumped.contains("10.77.0.2.60: UDP, length 1"), "{dumped}");
    }
    let run = Netprobe::new("why")
        .args(["-v", "udp dst port 60"])
        .start()?;
    client.udp_send(server.v4(60), b"x")?;
    let done = run.stop()?;
    done.expect_success()?;
    if has_rules {
        done.expect_stdout(
            "translates it (now: udp dport 60 dnat to 10.77.0.2:61 comment \"there\")",
        )?;
        done.expect_stdout("conntrack   new unconfirmed zone 0")?;
    }
    // A comparison of translated packets: the rule, too.
    let run = compare("dst port 61", "dst port 60", true)
        .arg("udp")
        .args(["--duration", "60"])
        .start()?;
    client.udp_send(server.v4(60), b"x")?;
    client.udp_send(server.v4(61), b"x")?;
    let done = run.stop()?;
    done.expect_success()?;
    let rows = done.json()?;
    let row = compared(&rows)?;
    ensure!(
        row["function"] == "nf_hook_slow" || row["by"].to_string().contains("addresses"),
        "{row:#}"
    );
    Ok(())
}

/// The last line of a run.
fn summary(rows: &[Value]) -> Result<&Value> {
    let last = rows.iter().find(|r| r["type"] == "summary");
    last.with_context(|| format!("no summary: {rows:#?}"))
}

/// A flood: each packet has one journey, in a row and in the last line, or is counted as one of which something is missing.
fn burst() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    // `make soak`: the long form.
    let packets = match std::env::var_os("NETPROBE_SOAK") {
        Some(_) => 20_000,
        None => 2_000,
    };
    flood(&net, packets, "4096")?;
    // Buffers of a page lose events, and of some packets every one.
    let last = flood(&net, 400, "1")?;
    let count = |name: &str| last[name].as_u64().unwrap_or(0);
    ensure!(count("incomplete") > 0 && count("unseen") > 0, "{last}");
    Ok(())
}

/// Sends packets; the last line.
fn flood(net: &Pair, packets: u64, pages: &str) -> Result<Value> {
    let (client, server) = (&net.client, &net.server);
    let run = Netprobe::new("why")
        .args(["--output-json", "--buffer-pages", pages])
        .arg("udp and dst port 53")
        .start()?;
    let socket = client.udp_bind(client.v4(0))?;
    for _ in 0..packets {
        // A message that the port is closed comes back as an error of the next send.
        while socket.send_to(b"x", server.v4(53)).is_err() {}
    }
    let done = run.stop()?;
    done.expect_success()?;
    let rows = done.json()?;
    let last = summary(&rows)?;
    let count = |name: &str| last[name].as_u64().context("no count");
    let shown = rows.iter().filter(|r| r["type"] == "packet");
    let shown: u64 = shown.filter_map(|r| r["count"].as_u64()).sum();
    let seen = count("packets")?;
    ensure!(shown == seen, "{shown} in rows, {seen} in all: {done}");
    let unseen = count("unseen")?;
    ensure!(seen + unseen == packets, "{seen} and {unseen}: {done}");
    let loss = rows.iter().find(|r| r["type"] == "loss");
    let lost = loss.map_or(0, |l| l["lost"].as_u64().unwrap_or(0));
    ensure!(lost > 0 || unseen + count("incomplete")? == 0, "{last}");
    ensure!(last["missed"] == loss.is_some(), "{last} {loss:?}");
    Ok(last.clone())
}

/// More packets at once than may be followed: memory has its bound, and what was cut is said.
fn too_many() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let (client, server) = (&net.client, &net.server);
    client.cmd("tc qdisc add dev veth0 root netem delay 100s limit 1000")?;
    let run = Netprobe::new("why")
        .args([
            "--output-json",
            "--track-entries",
            "64",
            "udp and dst port 53",
        ])
        .start()?;
    let socket = client.udp_bind(client.v4(0))?;
    for _ in 0..300 {
        socket.send_to(b"x", server.v4(53))?;
    }
    let done = run.stop()?;
    done.expect_success()?;
    let rows = done.json()?;
    let last = summary(&rows)?;
    ensure!(last["missed"] == true, "{last}: {done}");
    let here = last["ends"]["here"].as_u64().unwrap_or(0);
    ensure!(here >= 64, "those that wait are there: {last}");
    let said = done.stderr.contains("were followed to no end") || done.stderr.contains("map");
    ensure!(said, "{done}");
    Ok(())
}
