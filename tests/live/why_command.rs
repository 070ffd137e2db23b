//! `netprobe why -- COMMAND` with what it expects of it, and `--changes`.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::why::finish;
use crate::common::{Case, Netns, Netprobe, Pair, case};

pub fn cases() -> Vec<Case> {
    vec![
        case("why_command", command)
            .once_on("6.12")
            .trace()
            .program("nft")
            .program("ping"),
        case("why_changes", changes)
            .once_on("6.12")
            .trace()
            .program("nft")
            .program("tc"),
    ]
}

/// `-- COMMAND`: its packets and the answers to them, nobody else's; its exit status; --expect.
fn command() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let client = &net.client;
    let server = net.server.v4(0).ip().to_string();
    let why = |args: &[&str], command: &[&str]| {
        let mut all = args.to_vec();
        all.push("--");
        all.extend(command);
        Netprobe::new("why").args(all).netns(client).run()
    };
    let ping = ["ping", "-c", "1", "-W", "5", &server];
    let done = why(&["-v", "--expect", "delivered"], &ping)?;
    done.expect_success()?;
    done.expect_stderr("netprobe: ping ended with exit status 0")?;
    done.expect_stdout("ANSWERED by this kernel with an echo reply")?;
    done.expect_stdout("DELIVERED to a raw socket of ping[")?;
    done.expect_stdout("socket      sent by ping[")?;
    done.expect_stdout("2 packets in 1 flow: 1 delivered, 1 answered by this kernel.")?;
    done.expect_stdout("bytes from")?;
    let ping = ["ping", "-c", "1", "-W", "1", &server];
    client.nft("table inet t { chain o { type filter hook output priority 0; icmp type echo-request drop; }; }")?;
    let done = why(&["--expect", "lost:NETFILTER_DROP"], &ping)?;
    done.expect_success()?;
    done.expect_stderr("netprobe: ping ended with exit status 1")?;
    done.expect_stdout("LOST")?;
    done.expect_stdout("1 lost (firewall rule 1)")?;
    let done = why(&["--expect", "delivered"], &ping)?;
    done.expect_code(3)?;
    // The same as a test's result: with a limit, and what ping prints aside.
    let done = why(
        &[
            "--duration",
            "60",
            "--expect",
            "delivered",
            "--expect-format",
            "tap",
        ],
        &ping,
    )?;
    done.expect_code(3)?;
    let what = format!("not ok 1 - {}: delivered\n# ", ping.join(" "));
    let begins = format!("TAP version 13\n1..1\n{what}");
    ensure!(
        done.stdout.starts_with(&begins) && !done.stdout.contains("PING"),
        "{done}"
    );
    done.expect_stdout("# 1 packet in 1 flow: 1 lost (firewall rule 1).")?;
    let expect = [
        "--expect",
        "lost:NETFILTER_DROP",
        "--expect-format",
        "junit",
    ];
    let done = why(&expect, &ping)?;
    done.expect_success()?;
    done.expect_stdout("tests=\"1\" failures=\"0\"")?;
    done.expect_stdout("</testsuites>")?;
    let done = why(&[], &["/no/such/program"])?;
    done.expect_code(1)?;
    done.expect_stderr("failed to run /no/such/program")
}

/// --changes: each kind of change with its process and its namespace, refused ones not; and the change before a loss.
fn changes() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let (client, server) = (&net.client, &net.server);
    client.nft("table inet t { chain o { type filter hook output priority 0; }; }")?;
    let run = Netprobe::new("why")
        .args(["--output-json", "--changes", "udp and dst port 88"])
        .start()?;
    client.udp_send(server.v4(88), b"x")?;
    client.ip("route add 10.99.0.0/24 via 10.77.0.2")?;
    ensure!(
        client.ip("route add 10.99.0.0/24 via 10.77.0.2").is_err(),
        "twice"
    );
    client.ip("addr add 10.66.0.1/32 dev veth0")?;
    client.ip("link set dev veth0 mtu 1400")?;
    client.ip("rule add from 10.66.0.1 table 100")?;
    client.ip("neigh replace 10.77.0.9 lladdr 02:00:00:00:00:09 dev veth0")?;
    client.cmd("tc qdisc add dev veth0 root pfifo")?;
    server.sysctl("net/ipv4/conf/veth0/rp_filter", "1")?;
    client.nft("insert rule inet t o udp dport 88 counter drop")?;
    client.udp_send(server.v4(88), b"x")?;
    let rows = finish(run, &[])?;
    let changes: Vec<&Value> = rows.iter().filter(|r| r["type"] == "change").collect();
    let me = std::process::id();
    let at = |netns: &Netns, comm: &str, what: &str| -> Result<()> {
        let inode = netns.inode()?;
        let of = |c: &&&Value| {
            c["netns"] == inode && c["what"].as_str().is_some_and(|w| w.contains(what))
        };
        let found: Vec<&&Value> = changes.iter().filter(of).collect();
        ensure!(found.len() == 1, "{what}: {found:#?} of {changes:#?}");
        let by = &found[0];
        let own = comm.is_empty() && by["pid"] == me;
        ensure!(own || by["comm"] == comm, "{what}: {by:#}");
        Ok(())
    };
    at(client, "ip", "added the route 10.99.0.0/24 via 10.77.0.2")?;
    at(client, "ip", "the address 10.66.0.1/32 of veth0")?;
    at(client, "ip", "the link veth0, mtu 1400")?;
    at(client, "ip", "the routing rule")?;
    at(
        client,
        "ip",
        "the neighbour 10.77.0.9 at 02:00:00:00:00:09 of veth0",
    )?;
    at(client, "tc", "added the queue discipline pfifo of veth0")?;
    at(server, "", "set net.ipv4.conf.veth0.rp_filter = 1")?;
    at(client, "nft", "nft")?;
    let lost = rows
        .iter()
        .find(|r| r["end"] == "lost")
        .context("nothing is lost")?;
    let before = &lost["change_before"];
    ensure!(before["comm"] == "nft" && before["of"] == "nft", "{lost:#}");
    let handle = &lost["drop"]["nft"]["handle"];
    let what = before["what"].as_str().unwrap_or_default();
    let named = what.contains(&format!("added nft rule handle {handle} of inet t o"));
    ensure!(handle.is_null() || named, "{lost:#}");
    let other = rows
        .iter()
        .find(|r| r["end"] == "rejected")
        .context("none is rejected")?;
    ensure!(other["change_before"].is_null(), "{other:#}");
    Ok(())
}
