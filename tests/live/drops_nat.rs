//! Drops after a translation of addresses: a filter that held before it holds for them, in `skb --drops` and in `drops`.

use anyhow::{Result, ensure};
use serde_json::Value;

use crate::common::{Case, Netns, Netprobe, Pair, Running, SHORT, case};

pub fn cases() -> Vec<Case> {
    vec![
        case("drops_after_dnat", dnat)
            .once_on("newest")
            .trace()
            .program("nft"),
        case("drops_after_snat", snat)
            .once_on("newest")
            .trace()
            .program("nft"),
        case("drops_after_nat_tracked", tracked)
            .once_on("newest")
            .trace()
            .program("nft"),
    ]
}

/// `skb --drops`, one line a drop.
fn lines(netns: &Netns, filter: &[&str]) -> Result<Running> {
    Netprobe::new("skb")
        .args(["--drops", "--output-json", "--filter-netns", netns.name()])
        .args(["--output-nft=false", "--output-owner=false"])
        .args(filter)
        .start()
}

fn tables(filter: &[&str]) -> Result<Running> {
    Netprobe::new("drops")
        .args(["--output-json", "-i", "3600"])
        .args(filter)
        .start()
}

/// Destination ports of what was dropped, as it was then.
fn ports(run: Running) -> Result<Vec<u64>> {
    let done = run.stop()?;
    done.expect_success()?;
    let of_row = |row: &Value| row["dport"].as_u64();
    let of_line = |row: &Value| row["tuple"]["dport"].as_u64();
    let mut ports = Vec::new();
    for row in done.json()? {
        match row["type"].as_str() {
            Some("drop") => ports.extend(of_line(&row)),
            Some("drops") => ports.extend(of_row(&row)),
            _ => {}
        }
    }
    ports.sort_unstable();
    ports.dedup();
    Ok(ports)
}

/// Port 80 of the server is 81 inside, and dropped as 83 is: a filter for 80 shows what came to 80 alone.
fn dnat() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    net.server.nft(
        "table inet n { \
         chain pre { type nat hook prerouting priority dstnat; \
         ip daddr 10.77.0.2 tcp dport 80 dnat ip to 10.77.0.2:81; \
         ip6 daddr fd77::2 tcp dport 80 dnat ip6 to [fd77::2]:81; }; \
         chain in { type filter hook input priority filter; tcp dport { 81, 83 } drop; }; }",
    )?;
    let expression = lines(&net.server, &["tcp port 80"])?;
    let table = tables(&["tcp port 80"])?;
    let field = tables(&["--filter-dst-port", "80"])?;
    for port in [83, 80] {
        for address in [net.server.v4(port), net.server.v6(port)] {
            let _ = net.client.tcp_connect(address, SHORT)?;
        }
    }
    for address in ["10.77.0.2", "fd77::2"] {
        expression.wait_line(&format!("\"daddr\":\"{address}\""))?;
    }
    for run in [expression, table, field] {
        let found = ports(run)?;
        ensure!(found == [81], "{found:?}");
    }
    Ok(())
}

/// The source is translated, and the packet dropped after that.
fn snat() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    net.client.nft(
        "table ip n { \
         chain post { type nat hook postrouting priority srcnat; udp dport 70 snat to 10.77.0.77:7070; }; \
         chain out { type filter hook postrouting priority 200; ip saddr 10.77.0.77 drop; }; }",
    )?;
    let before = lines(&net.client, &["src", "host", "10.77.0.1"])?;
    let field = tables(&["--filter-src-ip", "10.77.0.1", "--filter-proto", "udp"])?;
    net.client.udp_send(net.server.v4(70), b"x")?;
    before.wait_line("\"saddr\":\"10.77.0.77\"")?;
    for run in [before, field] {
        let found = ports(run)?;
        ensure!(found == [70], "{found:?}");
    }
    Ok(())
}

/// A UDP socket's look-up takes the entry of conntrack away: the packet's identity is what is left.
fn tracked() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    net.server.nft(
        "table ip n { chain pre { type nat hook prerouting priority dstnat; \
         udp dport 60 dnat to 10.77.0.2:61; }; }",
    )?;
    let run = lines(&net.server, &["--filter-track-skb", "udp dst port 60"])?;
    for port in [61, 60] {
        net.client.udp_send(net.server.v4(port), b"x")?;
    }
    let line = run.wait_line("\"dport\":61")?;
    let row: Value = serde_json::from_str(&line)?;
    ensure!(
        row["packet"].is_string() && row["class"] == "socket",
        "{row}"
    );
    let done = run.stop()?;
    done.expect_success()?;
    ensure!(done.json_of("drop")?.len() == 1, "{done}");
    Ok(())
}
