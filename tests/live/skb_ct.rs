//! `netprobe skb --output-ct`: what a packet's lines say of conntrack is what the kernel's own list of entries says.

use std::fs;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::common::{Case, Finished, Netns, Netprobe, Pair, case, deadline, wait_for};

pub fn cases() -> Vec<Case> {
    let listed = |name, body| {
        case(name, body).trace().program("nft").when(|_| {
            let file = "/proc/net/nf_conntrack";
            (!std::path::Path::new(file).exists()).then(|| format!("this kernel has no {file}"))
        })
    };
    vec![
        listed("skb_ct_nat_v4", || nat(false)),
        listed("skb_ct_nat_v6", || nat(true)).once_on("6.1"),
        listed("skb_ct_zones_and_untracked", zones)
            .once_on("6.1")
            .program("ping"),
        case("skb_ct_given_back", given_back)
            .trace()
            .program("nft")
            .function("kfree_skbmem"),
    ]
}

/// The kernel's own line of an entry of this namespace.
fn listed(netns: &Netns, with: &str) -> Result<String> {
    wait_for(&format!("an entry with {with}"), || {
        let list = netns.enter(|| fs::read_to_string("/proc/thread-self/net/nf_conntrack"))??;
        Ok(list.lines().find(|l| l.contains(with)).map(str::to_owned))
    })
}

/// The values of `key=value` in it, in their order.
fn values<'l>(line: &'l str, key: &str) -> Vec<&'l str> {
    let words = line.split_whitespace();
    let pairs = words.filter_map(|word| word.split_once('='));
    pairs.filter(|(k, _)| *k == key).map(|(_, v)| v).collect()
}

/// A tuple of it as our JSON has it; 0: the original, 1: the reply.
fn tuple(line: &str, which: usize) -> Result<Value> {
    let value = |key| values(line, key).get(which).copied().context(key);
    let addr = |key| -> Result<String> { Ok(value(key)?.parse::<IpAddr>()?.to_string()) };
    let port = |key| -> Result<u16> { Ok(value(key)?.parse()?) };
    Ok(json!({
        "saddr": addr("src")?, "daddr": addr("dst")?, "sport": port("sport")?, "dport": port("dport")?,
        "proto": 6, "proto_name": "tcp",
    }))
}

/// The rows of a function.
fn of<'r>(rows: &'r [Value], funcs: &[&str], done: &Finished) -> Result<Vec<&'r Value>> {
    let of: Vec<_> = rows
        .iter()
        .filter(|r| funcs.iter().any(|f| r["func"] == *f))
        .map(|r| &r["ct"])
        .collect();
    ensure!(!of.is_empty(), "no line of {funcs:?}:\n{done}");
    Ok(of)
}

/// A connection to an address that is translated, both ways, with a mark.
fn nat(v6: bool) -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let (family, service, at) = match v6 {
        false => ("ip", "10.96.0.1", net.server.v4(0)),
        true => ("ip6", "fd96::1", net.server.v6(0)),
    };
    let server = net.server.tcp_listen(at)?;
    let version = if v6 { "-6 " } else { "" };
    net.client.ip(&format!(
        "{version}route add {service} via {} dev {}",
        at.ip(),
        Pair::IFACE
    ))?;
    net.client.nft(&format!(
        "add table {family} n; \
         add chain {family} n m {{ type filter hook output priority -150; }}; \
         add chain {family} n o {{ type nat hook output priority -100; }}; \
         add chain {family} n p {{ type nat hook postrouting priority 100; }}; \
         add rule {family} n m ct mark set 0x2a; \
         add rule {family} n o {family} daddr {service} tcp dport 80 dnat to {}; \
         add rule {family} n p tcp dport {} masquerade to :30000-30999",
        server.address(),
        server.address().port(),
    ))?;
    let probe = Netprobe::new("skb")
        .args(["--output-ct", "--output-json", "--filter-proto", "tcp"])
        .args(["--filter-netns", net.client.name(), "--filter-func"])
        .arg("__ip_local_out|ip6?_output|dev_hard_start_xmit|ip_rcv|ipv6_rcv|ip_local_deliver|ip6_input")
        .start()?;
    let to = SocketAddr::new(service.parse()?, 80);
    let mut stream = net.client.tcp_connect(to, deadline())??;
    std::io::Write::write_all(&mut stream, b"x")?;
    std::io::Read::read_exact(&mut stream, &mut [0])?;
    let line = listed(&net.client, "dport=80 ")?;
    let (original, reply) = (tuple(&line, 0)?, tuple(&line, 1)?);
    ensure!(
        original["daddr"] == service && values(&line, "mark") == ["42"],
        "{line}"
    );
    // The answer to the byte, the last packet that is looked at, is both received and acknowledged.
    probe.wait_lines("both directions", |text| {
        let has = |what: &str| text.contains(what).then_some(());
        has("\"state\":\"established\",\"direction\":\"reply\"")?;
        has("\"state\":\"established\",\"direction\":\"original\"")
    })?;
    let done = probe.stop()?;
    done.expect_success()?;
    let rows = done.json_of("event")?;
    // No hook has seen the packet yet. TCP over IPv6 does not call __ip6_local_out.
    let mut unseen = of(&rows, &["ip_rcv", "ipv6_rcv"], &done)?;
    if !v6 {
        unseen.extend(of(&rows, &["__ip_local_out"], &done)?);
    }
    ensure!(unseen.iter().all(|ct| ct.is_null()), "{unseen:?}");
    // Conntrack and DNAT have; masquerade is to come, and the confirmation.
    let first = of(&rows, &["ip_output", "ip6_output"], &done)?[0];
    ensure!(
        (&first["state"], &first["direction"], &first["confirmed"])
            == (&json!("new"), &json!("original"), &json!(false)),
        "{first}"
    );
    ensure!(
        first["original"] == original && first["reply"]["saddr"] == reply["saddr"],
        "{first}\n{line}"
    );
    ensure!(
        (&first["mark"], &first["zone"]) == (&json!(42), &json!(0)),
        "{first}"
    );
    // On the wire the entry is in the table, and in the list as it is here.
    let sent = of(&rows, &["dev_hard_start_xmit"], &done)?;
    let received = of(&rows, &["ip_local_deliver", "ip6_input"], &done)?;
    for (cts, direction) in [(sent, "original"), (received, "reply")] {
        for ct in cts {
            ensure!(
                ct["original"] == original && ct["reply"] == reply && ct["confirmed"] == true,
                "{ct}\n{line}"
            );
            ensure!(ct["direction"] == direction && ct["mark"] == 42, "{ct}");
        }
    }
    Ok(())
}

/// Text: a zone, what is exempt from tracking, an ICMP entry; the template that carries the zone to conntrack.
fn zones() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    net.client.nft(
        "add table ip n; \
         add chain ip n o { type filter hook output priority -300; }; \
         add chain ip n i { type filter hook prerouting priority -300; }; \
         add chain ip n t { type filter hook output priority 0; }; \
         add rule ip n o udp dport 9 notrack; \
         add rule ip n o ip protocol icmp ct zone set 5; \
         add rule ip n i ip protocol icmp ct zone set 5; \
         add rule ip n t ct state new accept",
    )?;
    let modules = std::path::Path::new("/sys/kernel/btf/nf_conntrack").exists();
    let probe = Netprobe::new("skb")
        .args([
            "--output-ct",
            "--filter-netns",
            net.client.name(),
            "--filter-func",
        ])
        .args([
            "__ip_local_out|ip_output|ip_local_deliver|nf_conntrack_in",
            "ip and (icmp or udp)",
        ])
        .start()?;
    net.client.udp_send(net.server.v4(9), b"x")?;
    ensure!(net.client.ping(net.server.v4(0), 1)?, "no answer");
    let line = listed(&net.client, "zone=5 ")?;
    let ids = values(&line, "id");
    // Below the line of the function, that of its entry.
    let says = |func: &str, what: &str| {
        probe.wait_lines(&format!("{func} with ct: {what}"), |text| {
            let lines: Vec<_> = text.lines().collect();
            let mut pairs = lines.windows(2);
            let found =
                pairs.any(|l| l[0].contains(func) && l[1].starts_with(&format!("    ct: {what}")));
            found.then_some(())
        })
    };
    says("__ip_local_out", "-")?;
    says("ip_output", "untracked")?;
    says(
        "ip_output",
        &format!(
            "new unconfirmed zone 5 mark 0x0, original 10.77.0.1->10.77.0.2(icmp,type 8,code 0,id {}), \
             reply 10.77.0.2->10.77.0.1(icmp,type 0,code 0,id {})",
            ids[0], ids[1]
        ),
    )?;
    says(
        "ip_local_deliver",
        "established reply zone 5 mark 0x0, original 10.77.0.1->",
    )?;
    if modules {
        says("nf_conntrack_in", "template zone 5")?;
    }
    probe.stop()?.expect_success()
}

/// A packet that is dropped gives its entry back before its memory goes: what its address then leads to is not shown.
fn given_back() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    net.client.nft(
        "add table ip n; add chain ip n o { type filter hook output priority 0; }; \
         add rule ip n o ct state new udp dport 99 drop",
    )?;
    let probe = Netprobe::new("skb")
        .args(["--output-ct", "--output-json", "--filter-func"])
        .args([
            "kfree_skbmem|ip_output|nf_hook_slow|kfree_skb|kfree_skb_reason|sk_skb_reason_drop",
            "udp port 99",
        ])
        .start()?;
    net.client.udp_send(net.server.v4(99), b"x")?;
    probe.wait_line("\"kfree_skbmem\"")?;
    let done = probe.stop()?;
    done.expect_success()?;
    let rows = done.json_of("event")?;
    ensure!(
        rows.iter()
            .any(|r| r["reason"].is_string() || r["func"] == "kfree_skb")
            && of(
                &rows,
                &["kfree_skb", "kfree_skb_reason", "sk_skb_reason_drop"],
                &done
            )?
            .iter()
            .all(|ct| ct["state"] == "new" && ct["confirmed"] == false),
        "{done}"
    );
    let last = of(&rows, &["kfree_skbmem"], &done)?[0];
    // Newest kernels (7.x) set the address to 0 then.
    let given_back = json!({ "state": "given back" });
    ensure!(last.is_null() || *last == given_back, "{last}\n{done}");
    Ok(())
}
