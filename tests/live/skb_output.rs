//! `netprobe skb`: what is shown of an event, and where it is written.

use std::fs;
use std::net::SocketAddr;

use anyhow::{Result, ensure};

use crate::common::{Case, Netprobe, Pair, case, deadline, wait_for};

pub fn cases() -> Vec<Case> {
    vec![
        case("skb_output_tunnel", tunnel).once_on("newest").trace(),
        case("skb_output_structs", structs).once_on("5.10").trace(),
        case("skb_output_netns_names", netns_names)
            .once_on("5.10")
            .trace(),
        case("skb_output_rotates", rotates).once_on("5.10").trace(),
        case("skb_output_pcapng", pcapng).once_on("5.10").trace(),
        case("skb_output_modules", modules).once_on("6.1").trace(),
        case("skb_output_kprobe_batch", batch)
            .old_and_new()
            .trace()
            .kprobe_multi(),
        case("skb_output_wrong_values", wrong_values)
            .once_on("5.10")
            .trace(),
        case("skb_output_retval", retval)
            .once_on("6.1")
            .trace()
            .program("nft")
            .kernel(5, 15),
        case("skb_output_retval_refused", retval_refused)
            .once_on("5.10")
            .trace()
            .kernel_before(5, 15),
        case("skb_output_non_skb_funcs", non_skb_funcs)
            .once_on("newest")
            .trace(),
        case("skb_output_columns", columns).once_on("5.10").trace(),
        case("skb_output_metadata", metadata)
            .once_on("5.10")
            .trace(),
        case("skb_output_const_parameters", const_parameters)
            .once_on("newest")
            .trace(),
        case("skb_output_kernel_btf", kernel_btf)
            .old_and_new()
            .trace()
            .fentry(),
        case("skb_output_netns_without_device", netns_without_device)
            .once_on("newest")
            .trace(),
        case("skb_output_tcp_flags_and_caller", flags_and_caller)
            .once_on("5.10")
            .trace(),
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
    let old = dir.path().join("trace-2020-01-01T00-00-00.000.log");
    fs::File::create(&old)?.set_modified(std::time::UNIX_EPOCH)?;
    let probe = Netprobe::new("skb")
        .arg("--output-file")
        .arg(&file)
        .args(["--output-file-max-size", "1", "--output-file-compress"])
        .args(["--output-file-max-age=1", "--output-file-max-backups=1"])
        .args(["--filter-proto", "udp", "--filter-func", "ip_rcv"])
        .args(["--output-skb", "--output-skb-shared-info", "--output-json"])
        .start()?;
    // Of three that were put aside the last one stays.
    let mut seen = std::collections::BTreeSet::new();
    let mut before = None;
    wait_for("compressed files", || {
        // More when the last ones have been written: what waits in the buffers holds up the end.
        // Between being put aside and being made anew the file is not there.
        let len = fs::metadata(&file).map_or(0, |metadata| metadata.len());
        let now = Some((seen.len(), len));
        if before != now {
            before = now;
            for _ in 0..50 {
                net.client.udp_send(net.server.v4(9), b"x")?;
            }
        }
        seen.extend(aside(dir.path())?);
        Ok((seen.len() >= 3).then_some(()))
    })?;
    probe.stop()?.expect_success()?;
    let left = aside(dir.path())?;
    ensure!(
        left.len() == 1 && left.last() >= seen.last(),
        "{left:?} of {seen:?}"
    );
    ensure!(!old.exists(), "older than a day and still there");
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

/// Compressed files that were put aside.
fn aside(dir: &std::path::Path) -> Result<Vec<String>> {
    let names = fs::read_dir(dir)?.flatten();
    let mut names: Vec<String> = names
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with("trace-") && name.ends_with(".log.gz"))
        .collect();
    names.sort();
    Ok(names)
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
        .args(["--snaplen", "64"])
        .start()?;
    net.client
        .udp_send(net.server.v4(9), b"payload-of-the-test")?;
    net.client.udp_send(net.server.v4(9), &[7; 500])?;
    probe.wait_lines("both packets", |text| {
        (text.matches(" ip_rcv").count() >= 2).then_some(())
    })?;
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
    // Blocks: type, length, body, length. An enhanced packet block (6) for each event;
    let (mut at, mut packets, mut links, mut cut) = (0, 0, Vec::new(), 0);
    while let Some(head) = bytes.get(at..at + 12) {
        let word = |i: usize| {
            let word = bytes.get(at + i..at + i + 4);
            word.map_or(0, |w| u32::from_le_bytes([w[0], w[1], w[2], w[3]]))
        };
        packets += usize::from(word(0) == 6);
        // Bytes of the packet that are in the file, and that it had.
        if word(0) == 6 {
            // 14: an Ethernet header that is made up
            ensure!(word(20) <= 64 + 14, "{} bytes", word(20));
            cut += usize::from(word(20) >= 64 && word(24) > 500);
        }
        if word(0) == 1 {
            links.push(head[8]);
        }
        at += word(4).max(12) as usize;
    }
    ensure!(at == bytes.len(), "the blocks do not end with the file");
    ensure!(cut >= 2, "no packet was cut:\n{done}");
    let events = done.lines_with(":9(udp)").len();
    ensure!(
        packets == events,
        "{packets} packets, {events} events:\n{done}"
    );
    // ip_output begins with IP, ip_rcv with Ethernet (1): one link type in the file.
    ensure!(
        links.contains(&1) && links.iter().all(|link| *link == 1),
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
        ensure!(count(&["--kmods", "nf_tables"])?.contains("tracing 1 function "));
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

/// Columns that were not asked for are not there, and time in its forms.
fn columns() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let line = |args: &[&str], port: u16| -> Result<String> {
        let run = Netprobe::new("skb")
            .args([
                "--filter-func",
                "ip_rcv",
                "--filter-dst-port",
                &port.to_string(),
            ])
            .args(args)
            .start()?;
        net.client.udp_send(net.server.v4(port), b"x")?;
        let line = run.wait_line(" ip_rcv")?;
        run.stop()?.expect_success()?;
        Ok(line)
    };
    let netns = format!(" {} ", net.server.inode()?);
    let shape = |line: &str| -> String {
        let digit = |c: char| if c.is_ascii_digit() { '0' } else { c };
        line.chars().map(digit).collect()
    };
    let absolute = line(&["--output-meta=false", "--timestamp", "absolute"], 9)?;
    ensure!(
        !absolute.contains(&netns) && !absolute.contains("veth0"),
        "{absolute}"
    );
    ensure!(absolute.contains(":9(udp)"), "{absolute}");
    ensure!(shape(&absolute).contains(" 00:00:00.000000 "), "{absolute}");
    let current = line(&["--output-tuple=false", "--timestamp", "current"], 10)?;
    ensure!(
        current.contains(&netns) && !current.contains("(udp)"),
        "{current}"
    );
    ensure!(shape(&current).contains(".000000000 "), "{current}");
    Ok(())
}

/// Members of the sk_buff, a bit field and one behind a pointer that may be NULL included.
fn metadata() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let paths = "skb->mark,skb->dev->ifindex,skb->pkt_type";
    let probe = |port: &str| {
        Netprobe::new("skb")
            .args(["--output-skb-metadata", paths])
            .args(["--filter-func", "ip_output|dev_hard_start_xmit|ip_rcv"])
            .args(["--filter-dst-port", port])
    };
    let send = |port: u16| -> Result<()> {
        let socket = net.client.udp_bind("0.0.0.0:0".parse()?)?;
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Mark, &18)?;
        socket.send_to(b"hello", net.server.v4(port))?;
        Ok(())
    };
    let run = probe("9").start()?;
    send(9)?;
    let line = run.wait_line("dev_hard_start_xmit")?;
    let index = net.client.ifindex(Pair::IFACE)?;
    let shown = format!(" skb->mark=18 skb->dev->ifindex={index} skb->pkt_type=");
    ensure!(line.contains(&shown), "{line}");
    run.stop()?.expect_success()?;

    let run = probe("10").arg("--output-json").start()?;
    send(10)?;
    run.wait_line("\"ip_rcv\"")?;
    let done = run.stop()?;
    done.expect_success()?;
    let rows = done.json()?;
    let of = |func: &str| {
        rows.iter()
            .find(|r| r["func"] == func)
            .map(|r| &r["skb_metadata"])
    };
    // The device is set within ip_output.
    ensure!(
        of("ip_output").is_some_and(|m| m["skb->dev->ifindex"].is_null() && m["skb->mark"] == 18),
        "{done}"
    );
    let index = net.server.ifindex(Pair::IFACE)?;
    // PACKET_HOST; veth takes the mark away on the way to another namespace.
    ensure!(
        of("ip_rcv").is_some_and(|m| m["skb->dev->ifindex"] == index && m["skb->pkt_type"] == 0),
        "{done}"
    );
    for (wrong, says) in [
        ("skb->marks", "skb->mark"),
        ("mark", "begins with skb"),
        ("skb->cb", "array"),
        ("skb->len,skb->len,skb->len,skb->len,skb->len", "4 members"),
    ] {
        let done = Netprobe::new("skb")
            .args(["--output-skb-metadata", wrong])
            .run()?;
        done.expect_code(2)?;
        done.expect_stderr("--output-skb-metadata")?;
        done.expect_stderr(says.trim_start_matches("skb->"))?;
    }
    Ok(())
}

/// skb_copy_datagram_iter(const struct sk_buff *, ...)
fn const_parameters() -> Result<()> {
    let net = Pair::new()?;
    let probe = Netprobe::new("skb")
        .args(["--filter-func", "skb_copy_datagram_iter"])
        .args(["--filter-proto", "icmp", "--verbose"])
        .start()?;
    ensure!(net.client.ping(net.server.v4(0), 1)?);
    let line = probe.wait_line(" skb_copy_datagram_iter")?;
    ensure!(line.contains("10.77.0.2->10.77.0.1(icmp)"), "{line}");
    let done = probe.stop()?;
    done.expect_success()?;
    // --verbose: what libbpf has to say.
    done.expect_stderr("libbpf: ")
}

/// Types out of a file in the place of the kernel's own: the whole way, from the functions' arguments to the struct that is shown.
fn kernel_btf() -> Result<()> {
    let net = Pair::new()?;
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("types.btf");
    fs::copy("/sys/kernel/btf/vmlinux", &file)?;
    let probe = Netprobe::new("skb")
        .arg("--kernel-btf")
        .arg(&file)
        .args(["--filter-func", "ip_rcv", "--filter-dst-port=9"])
        .args(["--output-skb-metadata", "skb->len", "--output-skb"])
        .arg("--filter-trace-tc")
        .start()?;
    net.client.udp_send(net.server.v4(9), b"0123456789")?;
    let line = probe.wait_line(" ip_rcv")?;
    ensure!(line.ends_with(" skb->len=38"), "{line}");
    probe.wait_line(".len = (unsigned int)38")?;
    probe.stop()?.expect_success()
}

/// Where TCP has taken the device away, or has used its place for a tree, the namespace is the socket's (the filter finds the packet by
/// it), and no device is made up.
fn netns_without_device() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let server = net.server.tcp_listen(net.server.v4(0))?;
    let run = Netprobe::new("skb")
        .args(["--output-json", "--filter-netns", net.client.name()])
        .args(["--filter-func", "tcp_rcv_established|tcp_rcv_state_process|tcp_data_queue|__tcp_transmit_skb|__ip_queue_xmit"])
        .start()?;
    let mut stream = net.client.tcp_connect(server.address(), deadline())??;
    std::io::Write::write_all(&mut stream, b"hello")?;
    std::io::Read::read_exact(&mut stream, &mut [0; 5])?;
    run.wait_line("\"tcp_rcv_established\"")?;
    run.wait_line("\"__ip_queue_xmit\"")?;
    let done = run.stop()?;
    done.expect_success()?;
    for row in done.json()?.iter().filter(|r| r["type"] == "event") {
        ensure!(row["netns"].as_u64() == net.client.inode().ok(), "{row}");
        let iface = row["iface"].as_str().unwrap_or_default();
        ensure!(matches!(iface, "" | "veth0"), "iface: {row}");
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
