//! `netprobe skb`: what is shown of an event, and where it is written.

use std::fs;
use std::net::SocketAddr;

use anyhow::{Result, ensure};

use crate::common::{Case, Netprobe, Pair, case, wait_for};

pub fn cases() -> Vec<Case> {
    vec![
        case("skb_output_tunnel", tunnel).trace(),
        case("skb_output_structs", structs).trace(),
        case("skb_output_netns_names", netns_names).trace(),
        case("skb_output_rotates", rotates).trace(),
        case("skb_output_pcapng", pcapng).trace(),
        case("skb_output_modules", modules).trace(),
        case("skb_output_kprobe_batch", batch)
            .trace()
            .kprobe_multi(),
        case("skb_output_wrong_values", wrong_values).trace(),
        case("skb_output_retval", retval)
            .trace()
            .program("nft")
            .kernel(5, 15),
        case("skb_output_retval_refused", retval_refused)
            .trace()
            .kernel_before(5, 15),
        case("skb_output_non_skb_funcs", non_skb_funcs).trace(),
    ]
}

/// The packet inside VXLAN and inside GRE.
fn tunnel() -> Result<()> {
    let net = Pair::new()?;
    for (here, ours, theirs) in [
        (&net.client, "10.77.0.1", "10.77.0.2"),
        (&net.server, "10.77.0.2", "10.77.0.1"),
    ] {
        let host = &ours[8..];
        here.ip(&format!(
            "link add vx0 type vxlan id 7 local {ours} remote {theirs} dstport 4789 dev veth0"
        ))?;
        here.ip(&format!(
            "link add gre1 type gre local {ours} remote {theirs}"
        ))?;
        here.ip(&format!("addr add 10.3.0.{host}/24 dev vx0"))?;
        here.ip(&format!("addr add 10.4.0.{host}/24 dev gre1"))?;
        here.ip("link set vx0 up")?;
        here.ip("link set gre1 up")?;
    }
    for (inner, outer) in [("10.3.0.2:77", "(udp)"), ("10.4.0.2:77", "(gre)")] {
        let to: SocketAddr = inner.parse()?;
        let socket = net.server.udp_bind(to)?;
        let probe = Netprobe::new("skb")
            .args(["--output-tunnel", "--filter-func", "ip_rcv"])
            .args(["--filter-netns", net.server.name()])
            .args(["--filter-src-ip", "10.77.0.1"])
            .start()?;
        net.client.udp_send(to, b"inside")?;
        socket.recv_from(&mut [0; 16])?;
        let line = probe.wait_line(&format!("->{inner}(udp)"))?;
        ensure!(line.contains(outer) && line.contains("10.77.0.2"), "{line}");
        probe.stop()?.expect_success()?;
    }
    Ok(())
}

/// Whole structs, named by the kernel's own types, in text and in JSON.
fn structs() -> Result<()> {
    let net = Pair::new()?;
    let socket = net.server.udp_bind(net.server.v4(0))?;
    let to = socket.local_addr()?;
    let args = |json: bool| {
        let probe = Netprobe::new("skb")
            .args([
                "--output-skb",
                "--output-skb-shared-info",
                "--output-skb-cb",
            ])
            .args(["--filter-func", "ip_rcv", "--filter-proto", "udp"])
            .args(["--filter-dst-port", &to.port().to_string()]);
        if json {
            probe.arg("--output-json")
        } else {
            probe
        }
    };
    let probe = args(false).start()?;
    net.client.udp_send(to, b"0123456789")?;
    let needle = "(struct skb_shared_info)";
    let line = probe.wait_line(needle)?;
    // The end of it is there: not cut.
    ensure!(line.contains(".dataref = "), "{line}");
    let done = probe.stop()?;
    let dump = done.lines_with("(struct sk_buff)");
    // 10 bytes, UDP's 8, IP's 20
    ensure!(
        dump.iter().any(|l| l.contains(".len = (unsigned int)38")),
        "{done}"
    );
    ensure!(dump.iter().any(|l| l.contains(".users = ")), "{done}");
    ensure!(done.stdout.contains("    cb: "), "{done}");

    let probe = args(true).start()?;
    net.client.udp_send(to, b"0123456789")?;
    probe.wait_line("ip_rcv")?;
    let rows = probe.stop()?.json()?;
    let text = rows[0]["sk_buff"].as_str().unwrap_or_default();
    ensure!(text.contains(".head = "), "{rows:?}");
    ensure!(rows[0]["shared_info"].is_string(), "{rows:?}");
    ensure!(
        rows[0]["cb"].as_array().is_some_and(|cb| cb.len() == 12),
        "{rows:?}"
    );
    Ok(())
}

/// Names of namespaces, one that no process is in included.
fn netns_names() -> Result<()> {
    let net = Pair::new()?;
    let probe = Netprobe::new("skb")
        .args(["--output-netns-names", "--filter-func", "ip_rcv"])
        .args(["--filter-dst-port", "9"])
        .start()?;
    net.client.udp_send(net.server.v4(9), b"x")?;
    let line = probe.wait_line(":9(udp)")?;
    ensure!(line.contains(net.server.name()), "{line}");
    probe.stop()?.expect_success()
}

/// Files of a megabyte, whole lines in each, the older ones compressed.
fn rotates() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("trace.log");
    let probe = Netprobe::new("skb")
        .arg("--output-file")
        .arg(&file)
        .args(["--output-file-max-size", "1", "--output-file-compress"])
        .args([
            "--filter-proto",
            "udp",
            "--filter-func",
            "ip_rcv|ip_output|udp_rcv",
        ])
        .args(["--output-skb", "--output-skb-shared-info", "--output-json"])
        .start()?;
    wait_for("a compressed file", || {
        for _ in 0..50 {
            net.client.udp_send(net.server.v4(9), b"x")?;
        }
        let aside = fs::read_dir(dir.path())?.flatten().any(|e| {
            let name = e.file_name().to_string_lossy().into_owned();
            name.starts_with("trace-") && name.ends_with(".log.gz")
        });
        Ok(aside.then_some(()))
    })?;
    probe.stop()?.expect_success()?;
    let last = fs::read_to_string(&file)?;
    ensure!(
        last.len() <= 1_000_000 && last.ends_with('\n'),
        "{}",
        last.len()
    );
    ensure!(
        last.lines()
            .all(|l| serde_json::from_str::<serde_json::Value>(l).is_ok()),
        "a torn line"
    );
    Ok(())
}

/// Packets with their way through the kernel as comments.
fn pcapng() -> Result<()> {
    let net = Pair::new()?;
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("trace.pcapng");
    let probe = Netprobe::new("skb")
        .arg("-w")
        .arg(&file)
        .args([
            "--filter-func",
            "ip_rcv|ip_output|__dev_queue_xmit|kfree_skb.*",
        ])
        .args(["--filter-proto", "udp", "--filter-dst-port", "9"])
        .start()?;
    net.client
        .udp_send(net.server.v4(9), b"payload-of-the-test")?;
    probe.wait_line("ip_rcv")?;
    let done = probe.stop()?;
    done.expect_success()?;
    let bytes = fs::read(&file)?;
    let text = String::from_utf8_lossy(&bytes);
    for needle in [
        "ip_output skb 0x",
        "ip_rcv skb 0x",
        "payload-of-the-test",
        "veth0",
    ] {
        ensure!(text.contains(needle), "no {needle:?} in the file\n{done}");
    }
    // Blocks: type, length, body, length. An enhanced packet block (6) for each event; one interface for each first header.
    let (mut at, mut packets, mut links) = (0, 0, Vec::new());
    while let Some(head) = bytes.get(at..at + 12) {
        let word = |i: usize| u32::from_le_bytes([head[i], head[i + 1], head[i + 2], head[i + 3]]);
        packets += usize::from(word(0) == 6);
        if word(0) == 1 {
            links.push(head[8]);
        }
        at += word(4).max(12) as usize;
    }
    ensure!(at == bytes.len(), "the blocks do not end with the file");
    let events = done.lines_with(":9(udp)").len();
    ensure!(
        packets == events,
        "{packets} packets, {events} events:\n{done}"
    );
    // ip_output begins with IP (101), ip_rcv with Ethernet (1).
    ensure!(
        links.contains(&101) && links.contains(&1),
        "{links:?}\n{done}"
    );
    Ok(())
}

/// Functions of one module, or of none; 5.10 does not tell what is in a module.
fn modules() -> Result<()> {
    let args = |flags: &[&str]| {
        Netprobe::new("skb")
            .args(["--filter-func", "veth_xmit|ip_rcv"])
            .args(flags)
    };
    let told = std::path::Path::new("/sys/kernel/btf/veth").exists();
    let tables = std::path::Path::new("/sys/kernel/btf/nf_tables").exists();
    let count = |flags: &[&str]| -> Result<String> {
        let probe = args(flags).start()?;
        let line = probe.wait_stderr("tracing")?;
        probe.stop()?.expect_success()?;
        Ok(line)
    };
    if told && tables {
        ensure!(count(&["--kmods", "veth"])?.contains("tracing 2 functions"));
        ensure!(count(&["--kmods", "nf_tables"])?.contains("tracing 1 functions"));
        ensure!(count(&["--all-kmods"])?.contains("tracing 2 functions"));
    } else {
        let done = args(&["--all-kmods"]).run()?;
        done.expect_code(1)?;
        done.expect_stderr("no BTF of modules")?;
    }
    let done = args(&["--kmods", "no_such_module"]).run()?;
    done.expect_code(2)?;
    done.expect_stderr("no_such_module")
}

fn batch() -> Result<()> {
    let net = Pair::new()?;
    let probe = Netprobe::new("skb")
        .args(["--filter-kprobe-batch", "3", "--filter-func", "ip_.*"])
        .args(["--filter-dst-port", "9"])
        .start()?;
    net.client.udp_send(net.server.v4(9), b"x")?;
    probe.wait_line("ip_rcv")?;
    probe.stop()?.expect_success()?;
    let done = Netprobe::new("skb")
        .args(["--filter-kprobe-batch", "3", "--backend", "kprobe"])
        .run()?;
    done.expect_code(2)
}

fn wrong_values() -> Result<()> {
    for (args, code, says) in [
        (&["--kernel-btf", "/no/such/file"][..], 1, "/no/such/file"),
        (&["--kernel-btf", "/dev/null"], 1, "/dev/null"),
        (&["--snaplen", "64"], 2, "--write"),
        (
            &["-w", "/no/such/dir/x", "--filter-func", "ip_rcv"],
            1,
            "/no/such/dir/x",
        ),
        (&["-w", "/tmp/x", "-s", "1"], 2, "--snaplen"),
        (&["--output-file-compress"], 2, "--output-file"),
        (
            &["--output-file", "/tmp/x", "--output-file-max-size", "0"],
            2,
            "--output-file-max-size",
        ),
        (&["--track-entries", "0"], 2, "--track-entries"),
        (&["--kmods", "veth", "--all-kmods"], 2, "--all-kmods"),
    ] {
        let done = Netprobe::new("skb").args(args).run()?;
        done.expect_code(code)?;
        done.expect_stderr(says)?;
    }
    Ok(())
}

/// nf_hook_slow gives back -1 (-EPERM) for a packet that a rule drops.
fn retval() -> Result<()> {
    let net = Pair::new()?;
    net.client.nft("add table inet t; add chain inet t out { type filter hook output priority 0; }; add rule inet t out udp dport 9 drop")?;
    let probe = Netprobe::new("skb")
        .args(["--output-retval", "--output-json", "--filter-dst-port", "9"])
        .args(["--filter-func", "nf_hook_slow|ip_send_skb|consume_skb"])
        .start()?;
    net.client.udp_send(net.server.v4(9), b"x")?;
    let line = probe.wait_line("\"type\":\"return\"")?;
    let done = probe.stop()?;
    done.expect_success()?;
    let row: serde_json::Value = serde_json::from_str(&line)?;
    let rows = done.json()?;
    ensure!(
        row["func"] == "nf_hook_slow" && row["retval"] == -1,
        "{done}"
    );
    let entry = rows
        .iter()
        .find(|r| r["func"] == "nf_hook_slow" && r["type"] == "event");
    ensure!(entry.is_some_and(|e| e["skb"] == row["skb"]), "{done}");
    ensure!(
        !rows
            .iter()
            .any(|r| r["type"] == "return" && r["func"] == "consume_skb"),
        "a function that returns nothing:\n{done}"
    );
    Ok(())
}

fn retval_refused() -> Result<()> {
    let done = Netprobe::new("skb")
        .args(["--output-retval", "--filter-func", "ip_rcv"])
        .run()?;
    done.expect_code(1)?;
    done.expect_stderr("5.15")
}

/// fib_table_lookup has no skb; below ip_rcv of our packet it is shown, elsewhere it is not.
fn non_skb_funcs() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let probe = Netprobe::new("skb")
        .args(["--filter-non-skb-funcs", "fib_table_lookup", "--output-json"])
        .args(["--filter-func", "ip_rcv|ip_rcv_finish_core.*|netif_receive_skb.*|__netif_receive_skb.*|ip_route_input_noref"])
        .args(["--filter-dst-port", "9"])
        .start()?;
    net.client.udp_send(net.server.v4(10), b"not this one")?;
    net.client.udp_send(net.server.v4(9), b"x")?;
    probe.wait_line("fib_table_lookup")?;
    let done = probe.stop()?;
    done.expect_success()?;
    let rows = done.json()?;
    let near = rows.iter().find(|r| r["func"] == "fib_table_lookup");
    let packet = rows
        .iter()
        .find(|r| r["func"] == "ip_rcv")
        .map(|r| &r["packet"]);
    ensure!(near.map(|r| &r["packet"]) == packet, "{done}");
    let done = Netprobe::new("skb")
        .args(["--filter-non-skb-funcs", "no_such_function"])
        .run()?;
    done.expect_code(2)?;
    done.expect_stderr("no_such_function")
}
