//! `netprobe drops`: whose drops, which rows, how many tables; and the same words as `skb --drops` has.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::who::{self, Container};
use crate::common::{Case, Env, Netprobe, Pair, Running, case};

pub fn cases() -> Vec<Case> {
    vec![
        case("drops_of_whom", of_whom).once_on("newest").trace(),
        case("drops_of_a_container", of_a_container)
            .once_on("newest")
            .trace()
            .program("ping"),
        case("drops_grouped", grouped).once_on("6.12").trace(),
        case("drops_tables_one_after_the_other", tables)
            .once_on("6.12")
            .trace(),
        case("drops_words_of_skb", words_of_skb)
            .once_on("newest")
            .trace()
            .program("nft"),
    ]
}

/// Before the server's sockets, and behind the client's.
const UNREACHED: &str =
    "table ip t { chain i { type filter hook input priority 0; udp dport 90 drop; }; }";
const UNSENT: &str =
    "table ip t { chain o { type filter hook output priority 0; udp dport { 91, 92 } drop; }; }";

fn start(args: &[&str]) -> Result<Running> {
    Netprobe::new("drops")
        .args(["--output-json", "-i", "3600"])
        .args(args)
        .start()
}

fn rows(run: Running) -> Result<(Vec<Value>, Value)> {
    let done = run.stop()?;
    done.expect_success()?;
    let all = done.json()?;
    let table = all.iter().find(|row| row["type"] == "table").cloned();
    let lost = all.into_iter().filter(|row| row["type"] == "drops");
    Ok((lost.collect(), table.context("no table")?))
}

/// Destination ports and packets, in the order of the rows.
fn ports(rows: &[Value]) -> Vec<(u64, u64)> {
    let number = |row: &Value, name: &str| row[name].as_u64().unwrap_or(u64::MAX);
    let both = rows
        .iter()
        .map(|row| (number(row, "dport"), number(row, "packets")));
    both.collect()
}

/// By process and by a thread's name: what is dropped on its way to a socket, or from one; nobody else's.
fn of_whom() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let (client, server) = (&net.client, &net.server);
    let _full = server.udp_bind("0.0.0.0:90".parse()?)?;
    server.nft(UNREACHED)?;
    client.nft(UNSENT)?;
    let me = std::process::id().to_string();
    let run = start(&["--pid", &me, "udp and net 10.77.0.0/24"])?;
    for port in [90, 90] {
        who::other_sends(client, server.v4(port))?;
    }
    // Who sends this is told that it was dropped.
    let _ = who::other_sends(client, server.v4(91));
    client.udp_send(server.v4(92), b"x")?;
    let (found, table) = rows(run)?;
    ensure!(ports(&found) == [(90, 2), (92, 1)], "{found:#?}");
    ensure!(
        found.iter().all(|row| row["class"] == "firewall"),
        "{found:#?}"
    );
    // Of some drops alone nothing can be balanced.
    ensure!(table["unexplained"].is_null(), "{table}");
    let run = start(&["--comm", "np-who", "udp and net 10.77.0.0/24"])?;
    who::as_other(|| client.udp_send(server.v4(91), b"x"))??;
    let _ = who::other_sends(client, server.v4(92));
    let (found, _) = rows(run)?;
    ensure!(ports(&found) == [(91, 1)], "{found:#?}");
    Ok(())
}

fn of_a_container() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let (client, server) = (&net.client, &net.server);
    client.nft("table ip t { chain o { type filter hook output priority 0; icmp type echo-request drop; }; }")?;
    let web = Container::new("npt-lost", "b7")?;
    let to = server.v4(0).ip().to_string();
    let path = web.cgroup.to_string_lossy().into_owned();
    for (flag, value) in [("--container", "npt-lost"), ("--cgroup", &*path)] {
        let run = start(&[flag, value, "icmp"])?;
        let ping = ["-c", "1", "-W", "1", &to];
        // Neither has an answer.
        let _ = client.output(std::process::Command::new("ping").args(ping));
        let _ = web.run(client, &format!("ping {}", ping.join(" ")));
        let (found, _) = rows(run)?;
        let [row] = &found[..] else {
            anyhow::bail!("{found:#?}");
        };
        ensure!(row["packets"] == 1 && row["class"] == "firewall", "{row:#}");
        ensure!(row["container"] == "npt-lost", "{row:#}");
    }
    Ok(())
}

fn send(net: &Pair, port: u16, times: usize) -> Result<()> {
    for _ in 0..times {
        net.client.udp_send(net.server.v4(port), b"to be lost")?;
    }
    Ok(())
}

/// What rows are made of, which are shown, and in which order: none of it changes how many packets are counted.
fn grouped() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let filter = ["--filter-proto", "udp", "--filter-netns", net.server.name()];
    let inode = net.server.inode()?;
    let lose = || -> Result<()> {
        send(&net, 4501, 3)?;
        send(&net, 4502, 5)
    };
    // One field, what it tells the rows, and how many rows.
    for (by, field, count) in [
        ("reason", "reason", 1),
        ("place", "place", 1),
        ("iface", "ifindex", 1),
        ("netns", "netns", 1),
        ("proto", "proto", 1),
        ("port", "dport", 2),
        ("reason,place,port", "dport", 2),
        ("rule", "reason", 1),
    ] {
        let run = start(&[&["--by", by][..], &filter].concat())?;
        lose()?;
        let (found, table) = rows(run)?;
        ensure!(found.len() == count, "{by}: {found:#?}");
        let packets = found.iter().filter_map(|row| row["packets"].as_u64());
        ensure!(packets.sum::<u64>() == 8, "{by}: {found:#?}");
        ensure!(table["lost"] == 8, "{by}: {table}");
        let values: BTreeSet<String> = found.iter().map(|row| row[field].to_string()).collect();
        ensure!(values.len() == count, "{by}: {found:#?}");
        let row = &found[0];
        let has_reasons = Env::look().kernel >= (5, 17);
        let known = |name: &str| match name {
            "reason" => row["reason"] == "NO_SOCKET",
            "place" => row["place"].as_str().is_some_and(|p| !p.is_empty()),
            "netns" => row["netns"] == inode,
            "proto" => row["proto"] == 17,
            "iface" => row["ifindex"].as_u64() > Some(0),
            _ => row["dport"].as_u64() > Some(0),
        };
        for name in ["reason", "place", "netns", "proto", "iface", "port"] {
            let asked = by.split(',').any(|b| b == name);
            let may = name != "reason" || has_reasons;
            ensure!(known(name) == (asked && may), "{by}: {name}: {row:#}");
        }
    }
    let of_first = [
        ("lost", vec![(4502, 5), (4501, 3)]),
        ("what", vec![(4502, 5), (4501, 3)]),
    ];
    for (sort, order) in of_first {
        let run = start(&[&["--sort", sort][..], &filter].concat())?;
        lose()?;
        let (found, _) = rows(run)?;
        ensure!(ports(&found) == order, "{sort}: {found:#?}");
    }
    // The rest is counted, and text tells it.
    let top = [&["--top", "1"][..], &filter].concat();
    let run = start(&top)?;
    let text = Netprobe::new("drops").args(&top).start()?;
    lose()?;
    let (found, table) = rows(run)?;
    ensure!(
        ports(&found) == [(4502, 5)] && table["lost"] == 8,
        "{found:#?}, {table}"
    );
    let done = text.stop()?;
    done.expect_success()?;
    ensure!(done.stdout.contains("8 lost"), "{done}");
    ensure!(
        done.stdout.contains(":4502") && !done.stdout.contains(":4501"),
        "{done}"
    );
    Ok(())
}

/// -i: each drop is in one table, and in no other. --once: one table, of what was lost until then.
fn tables() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let filter = ["--filter-proto", "udp", "--filter-netns", net.server.name()];
    let begin = |more: &[&str]| {
        Netprobe::new("drops")
            .args(["--output-json", "-i", "1"])
            .args(more)
            .args(filter)
            .start()
    };
    let run = begin(&[])?;
    for port in [4601, 4602, 4603] {
        send(&net, port, 7)?;
        run.wait_line(&format!("\"dport\":{port}"))?;
        // The end of its table.
        let tables = |text: &str| {
            let behind = text.split_once(&format!("\"dport\":{port}"))?.1;
            behind.contains("\"table\"").then_some(())
        };
        run.wait_lines("the table", tables)?;
    }
    let done = run.stop()?;
    done.expect_success()?;
    let all = done.json()?;
    for port in [4601, 4602, 4603] {
        let of = all.iter().filter(|row| row["dport"] == port);
        let packets: u64 = of.filter_map(|row| row["packets"].as_u64()).sum();
        ensure!(packets == 7, "{port}: {done}");
    }
    let tables = all.iter().filter(|row| row["type"] == "table");
    let with: Vec<_> = tables.filter(|table| table["lost"] != 0).collect();
    ensure!(with.len() >= 3, "{done}");
    done.expect_stderr("netprobe: 21 packets lost, 0 freed in the normal course")?;

    let run = begin(&["--once"])?;
    send(&net, 4604, 7)?;
    let done = run.wait()?;
    done.expect_success()?;
    let all = done.json()?;
    let tables = all.iter().filter(|row| row["type"] == "table");
    ensure!(tables.count() == 1, "{done}");
    done.expect_stderr(" packets lost, 0 freed in the normal course")
}

/// A drop has the same class, sentence and cure in both views: a socket that is not there, a firewall's rule.
fn words_of_skb() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let filter = ["--filter-proto", "udp", "--filter-netns", net.server.name()];
    net.server.nft(
        "table ip t { chain i { type filter hook input priority 0; udp dport 4702 drop; }; }",
    )?;
    let one_by_one = Netprobe::new("skb")
        .args(["--drops", "--output-json"])
        .args(filter)
        .start()?;
    let counted = start(&filter)?;
    for port in [4701, 4702] {
        send(&net, port, 1)?;
        one_by_one.wait_line(&format!("\"dport\":{port}"))?;
    }
    let (rows, _) = rows(counted)?;
    let done = one_by_one.stop()?;
    done.expect_success()?;
    let drops = done.json_of("drop")?;
    for port in [4701, 4702] {
        let drop = drops.iter().find(|row| row["tuple"]["dport"] == port);
        let row = rows.iter().find(|row| row["dport"] == port);
        let (drop, row) = (drop.context("no drop")?, row.context("no row")?);
        for word in ["class", "what", "change"] {
            ensure!(
                drop[word] == row[word] && !row[word].is_null(),
                "{word}: {drop:#} {row:#}"
            );
        }
        let reason = row["reason"].as_str().unwrap_or_default();
        let full = format!("SKB_DROP_REASON_{reason}");
        ensure!(
            drop["reason"].is_null() == reason.is_empty()
                && drop["reason"].as_str().is_none_or(|r| r == full),
            "{drop:#} {row:#}"
        );
        ensure!(drop["location"]["name"] == row["place"], "{drop:#} {row:#}");
        if port == 4702 && Env::look().kernel >= (5, 17) {
            ensure!(
                drop["nft"]["handle"] == row["nft"]["handle"] && row["nft"]["table"] == "t",
                "{drop:#} {row:#}"
            );
        }
    }
    Ok(())
}
