//! `netprobe drops`: which nft rule dropped, exact to the packet.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::common::{Case, Netprobe, Pair, Running, case, wait_for};
use crate::drops_metrics::{begin, get, value};
use crate::skb_netfilter::handle;

pub fn cases() -> Vec<Case> {
    let rules = |name, body| case(name, body).trace().program("nft").kernel(5, 17);
    vec![
        rules("drops_nft_rules", nft_rules).old_and_new(),
        rules("drops_nft_rules_that_change", rules_that_change).once_on("6.1"),
        rules("drops_nft_in_metrics", in_metrics).once_on("newest"),
    ]
}

/// Packets to each port.
const SENT: u64 = 20;

fn drops(net: &Pair, args: &[&str]) -> Result<Running> {
    Netprobe::new("drops")
        .args(["--output-json", "-i", "3600", "--filter-proto", "udp"])
        .args(["--filter-netns", net.client.name()])
        .args(args)
        .start()
}

fn rows(run: Running) -> Result<Vec<Value>> {
    let done = run.stop()?;
    done.expect_success()?;
    let mut rows = done.json()?;
    ensure!(!rows.iter().any(|row| row["type"] == "loss"), "{done}");
    rows.retain(|row| row["type"] == "drops" && row["class"] == "firewall");
    Ok(rows)
}

/// Packets of the rows with this rule.
fn of_rule(rows: &[Value], rule: &Value) -> u64 {
    let rows = rows.iter().filter(|row| row["nft"] == *rule);
    rows.filter_map(|row| row["packets"].as_u64()).sum()
}

fn send(net: &Pair, port: u16, times: u64) -> Result<()> {
    for _ in 0..times {
        // A rule may make it an error of the call.
        let _ = net.client.udp_send(net.server.v4(port), b"to be lost");
    }
    Ok(())
}

fn rule(net: &Pair, chain: &str, with: &str) -> Result<Value> {
    let handle = handle(&net.client, &format!("inet t {chain}"), with)?;
    Ok(json!({ "family": "inet", "table": "t", "chain": chain, "handle": handle }))
}

/// In a base chain, in one jumped to, one that rejects, a verdict map's, one behind a set's look-up; and a policy.
fn nft_rules() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    net.client.nft(
        "table inet t { chain before { udp dport 99 drop; }; \
         chain sub { udp dport 99 drop; udp dport 9 counter drop; }; \
         chain out { type filter hook output priority 0; jump before; udp dport 9 jump sub; udp dport 10 drop; udp dport 11 reject; udp dport vmap { 14 : drop, 15 : accept }; udp dport { 16, 17 } drop; }; }; \
         table ip p { chain o { type filter hook output priority 1; policy drop; udp dport vmap { 15 : accept }; udp dport != 12 accept; }; }",
    )?;
    let policy =
        json!({ "family": "ip", "table": "p", "chain": "o", "handle": null, "policy": true });
    let expected = [
        (9, rule(&net, "sub", "dport 9 ")?),
        (10, rule(&net, "out", "dport 10 ")?),
        (11, rule(&net, "out", "reject")?),
        (14, rule(&net, "out", "vmap")?),
        (16, rule(&net, "out", "16, 17")?),
        (12, policy),
    ];
    let run = drops(&net, &[])?;
    for (port, _) in &expected {
        send(&net, *port, SENT)?;
    }
    // Passes both chains.
    send(&net, 15, SENT)?;
    let found = rows(run)?;
    for (port, rule) in &expected {
        let row = found.iter().find(|row| row["dport"] == *port);
        let row = row.with_context(|| format!("no row of port {port}: {found:#?}"))?;
        ensure!(
            row["nft"] == *rule && row["packets"] == SENT,
            "{rule}: {row}"
        );
    }
    ensure!(found.len() == expected.len(), "{found:#?}");

    // In words; two rules are two rows without the port, too.
    let run = Netprobe::new("drops")
        .args([
            "-i",
            "3600",
            "--by",
            "reason,place,rule",
            "--filter-proto",
            "udp",
        ])
        .start()?;
    send(&net, 10, 3)?;
    send(&net, 14, 4)?;
    let text = run.stop()?;
    text.expect_success()?;
    for (packets, with) in [(3, "dport 10 "), (4, "vmap")] {
        let handle = handle(&net.client, "inet t out", with)?;
        let line = text
            .stdout
            .lines()
            .find(|line| line.contains(&format!("firewall rule (nft inet t out {handle}) ")));
        let line = line.with_context(|| format!("no {handle}: {text}"))?;
        ensure!(
            line.trim_start().starts_with(&format!("{packets} ")),
            "{text}"
        );
    }
    // Not asked for.
    let run = drops(&net, &["--by", "reason,place"])?;
    send(&net, 10, 3)?;
    send(&net, 14, 4)?;
    let found = rows(run)?;
    ensure!(
        found.len() == 1 && of_rule(&found, &Value::Null) == 7,
        "{found:#?}"
    );
    Ok(())
}

/// Rules are replaced while netprobe runs: the kernel may put another one where one was.
fn rules_that_change() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    net.client.nft(
        "table inet t { chain out { type filter hook output priority 0; udp dport 20 drop; udp dport 21 drop; }; }",
    )?;
    let run = drops(&net, &["--by", "reason,place,rule"])?;
    let mut expected = Vec::new();
    for round in 0..6u64 {
        let (first, second) = (
            rule(&net, "out", "dport 20 ")?,
            rule(&net, "out", "dport 21 ")?,
        );
        send(&net, 20, SENT + round)?;
        send(&net, 21, 1)?;
        expected.push((first, SENT + round));
        expected.push((second, 1));
        // Each time the other rule is the first one, and both are new.
        let (a, b) = if round % 2 == 0 { (21, 20) } else { (20, 21) };
        net.client.nft(&format!(
            "flush chain inet t out; add rule inet t out udp dport {a} drop; add rule inet t out udp dport {b} drop"
        ))?;
    }
    let found = rows(run)?;
    for (rule, packets) in &expected {
        let seen = of_rule(&found, rule);
        ensure!(
            seen == *packets,
            "{seen} of {packets} by {rule}: {found:#?}"
        );
    }
    Ok(())
}

/// The rule is a label.
fn in_metrics() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    net.client.nft(
        "table inet t { chain out { type filter hook output priority 0; udp dport 20 drop; udp dport 21 drop; }; }",
    )?;
    let (run, address) = begin(&[])?;
    send(&net, 20, 2)?;
    send(&net, 21, 3)?;
    for (with, packets) in [("dport 20 ", 2.0), ("dport 21 ", 3.0)] {
        let handle = handle(&net.client, "inet t out", with)?;
        let rule = format!("nft inet t out {handle}");
        let labels = [("class", "firewall"), ("nft", rule.as_str())];
        wait_for("the rule's series", || {
            let text = get(&address, "/metrics")?;
            let found = value(&text, "netprobe_drops_total", &labels);
            Ok((found == Some(packets)).then_some(()))
        })?;
    }
    run.stop()?.expect_success()
}
