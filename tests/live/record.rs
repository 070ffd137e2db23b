//! `netprobe record` and `netprobe report`: what was recorded is shown as the live run showed it.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};

use crate::common::{Case, Finished, Netprobe, Pair, case, wait_for};

pub fn cases() -> Vec<Case> {
    vec![
        case("record_text_as_live", text_as_live)
            .once_on("5.10")
            .trace(),
        case("record_json_as_live", || drops_as_live(&["--output-json"]))
            .trace()
            .program("nft"),
        case("record_netfilter", || drops_as_live(&["--output-nft"]))
            .trace()
            .program("nft")
            .kernel(5, 17),
        case("record_flood", flood)
            .once_on("6.12")
            .trace()
            .kprobe_multi()
            .program("ping"),
        case("record_structs_and_tracking", structs_and_tracking)
            .once_on("5.10")
            .trace(),
        case("record_views", views)
            .once_on("6.12")
            .trace()
            .program("tcpdump"),
        case("record_killed", killed)
            .once_on("6.12")
            .trace()
            .limit(900),
        case("record_sizes", sizes).once_on("5.10").trace(),
        case("record_why", why_as_live).once_on("6.12").trace(),
    ]
}

/// A few dozen functions, which old kernels attach to in a second.
const FUNCTIONS: &str = "ip_rcv|ip_local_deliver|ip_output|udp_rcv|udp_send_skb|icmp_rcv|icmp_send|__icmp_send|__dev_queue_xmit|netif_rx|\
     kfree_skb.*|sk_skb_reason_drop|consume_skb|__kfree_skb|kfree_skbmem|skb_release_data|nf_hook_slow";

/// Datagrams to a port that somebody reads, and to one that nobody has.
fn traffic(net: &Pair, count: usize) -> Result<()> {
    let socket = net.server.udp_bind(net.server.v4(0))?;
    let to = socket.local_addr()?;
    for i in 0..count {
        net.client
            .udp_send(to, format!("datagram {i}").as_bytes())?;
        socket.recv_from(&mut [0; 32])?;
        net.client.udp_send(net.server.v4(9), b"nobody")?;
    }
    Ok(())
}

fn report(file: &Path) -> Netprobe<'static> {
    Netprobe::new("report").arg(file)
}

/// Runs it to its end, which is no error.
fn good(run: Netprobe<'_>) -> Result<Finished> {
    let done = run.run()?;
    done.expect_success()?;
    Ok(done)
}

/// Lines with addresses and times: the same from the file, and again with the flags that change how they look.
fn text_as_live() -> Result<()> {
    let net = Pair::new()?;
    let folder = tempfile::tempdir()?;
    let (file, lines) = (folder.path().join("r.pcapng"), folder.path().join("lines"));
    let probe = Netprobe::new("record")
        .arg("-o")
        .arg(&file)
        .arg("--output-file")
        .arg(&lines)
        .args(["--filter-func", FUNCTIONS, "--timestamp", "relative"])
        .args(["--output-caller", "--output-stack", "--output-owner"])
        .args(["--output-netns-names", "--output-tcp-flags"])
        .args(["--filter-src-ip", "10.77.0.0/16"])
        .start()?;
    traffic(&net, 5)?;
    wait_for("lines", || {
        let text = fs::read_to_string(&lines)?;
        Ok((text.matches("udp_rcv").count() >= 10).then_some(()))
    })?;
    let done = probe.stop()?;
    done.expect_success()?;
    ensure!(done.stdout.is_empty(), "{done}");
    let live = fs::read_to_string(&lines)?;
    let shown = good(report(&file))?;
    same(&live, &shown.stdout)?;
    ensure!(!shown.stderr.contains("damaged"), "{shown}");
    // Also where each event goes back and forth through a temporary file.
    let sorted = report(&file).args(["--sort", "time"]).run()?;
    let late = live.contains(" [late]");
    ensure!(late || sorted.stdout == live, "{sorted}");
    let other = report(&file).args(["--timestamp", "absolute"]).run()?;
    ensure!(
        other.stdout.starts_with("SKB") && other.stdout.contains("TIME  "),
        "{other}"
    );
    Ok(())
}

fn same(live: &str, shown: &str) -> Result<()> {
    for (number, (live, shown)) in live.lines().zip(shown.lines()).enumerate() {
        ensure!(live == shown, "line {number}\nlive  {live}\nshown {shown}");
    }
    let counts = (live.lines().count(), shown.lines().count());
    ensure!(live == shown, "live and shown lines: {counts:?}");
    Ok(())
}

/// Lines of drops, as JSON or with the rule that dropped.
fn drops_as_live(flags: &[&str]) -> Result<()> {
    let net = Pair::new()?;
    net.server.nft("add table ip t; add chain ip t in { type filter hook input priority 0; }; add rule ip t in udp dport 9 drop")?;
    let folder = tempfile::tempdir()?;
    let (file, lines) = (folder.path().join("r.pcapng"), folder.path().join("lines"));
    let probe = Netprobe::new("record")
        .arg("--to")
        .arg(&file)
        .arg("--output-file")
        .arg(&lines)
        .args(["--drops", "--output-owner", "-s", "64"])
        .args(flags)
        .args(["--filter-src-ip", "10.77.0.0/16"])
        .start()?;
    traffic(&net, 3)?;
    wait_for("lines", || {
        let text = fs::read_to_string(&lines)?;
        Ok((text.lines().count() >= 3).then_some(()))
    })?;
    probe.stop()?.expect_success()?;
    let live = fs::read_to_string(&lines)?;
    let json = flags.contains(&"--output-json");
    let form = if json { "json" } else { "text" };
    let shown = good(report(&file).args(["--format", form]))?;
    same(&live, &shown.stdout)?;
    if !json {
        ensure!(live.contains("[nft ip t in handle "), "{live}");
        return Ok(());
    }
    let stats = good(report(&file).args(["--stats", "--output-json"]))?;
    let rows = stats.json()?;
    let counted: u64 = rows[0]["drops"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|d| d["count"].as_u64())
        .sum();
    let told = live
        .lines()
        .filter(|l| l.contains("\"type\":\"drop\""))
        .count();
    ensure!(counted == told as u64, "{stats}");
    Ok(())
}

/// Whole structs, tracked packets, members: what each event has of its own.
fn structs_and_tracking() -> Result<()> {
    let net = Pair::new()?;
    let folder = tempfile::tempdir()?;
    let (file, lines) = (folder.path().join("r.pcapng"), folder.path().join("lines"));
    let probe = Netprobe::new("record")
        .arg("-o")
        .arg(&file)
        .arg("--output-file")
        .arg(&lines)
        .args([
            "--filter-func",
            "ip_rcv|udp_rcv|__dev_queue_xmit|consume_skb",
        ])
        .args([
            "--filter-track-skb",
            "--output-skb",
            "--output-skb-shared-info",
        ])
        .args(["--output-skb-metadata", "skb->mark,skb->dev->ifindex"])
        .args(["--filter-src-ip", "10.77.0.1", "--filter-proto", "udp"])
        .start()?;
    traffic(&net, 3)?;
    wait_for("lines", || {
        let text = fs::read_to_string(&lines)?;
        Ok((text.matches(" udp_rcv ").count() >= 3).then_some(()))
    })?;
    probe.stop()?.expect_success()?;
    let live = fs::read_to_string(&lines)?;
    same(&live, &good(report(&file))?.stdout)?;
    // Sorted, each event keeps the structs that are its own.
    let sorted = good(report(&file).args(["--sort", "packet"]))?;
    let blocks = |text: &str| {
        let mut blocks: Vec<_> = text
            .split("\n0x")
            .map(|b| b.trim_end().to_owned())
            .collect();
        blocks.sort();
        blocks
    };
    ensure!(blocks(&live).len() > 5, "{live}");
    // The columns' widths depend on the order.
    let squeezed = |text: &str| {
        let words: Vec<_> = text.split_whitespace().map(str::to_owned).collect();
        words.join(" ")
    };
    let all = |text: &str| blocks(text).iter().map(|b| squeezed(b)).collect::<Vec<_>>();
    ensure!(all(&live) == all(&sorted.stdout), "{sorted}");
    Ok(())
}

/// Filters, orders, counts, capture files, Perfetto's JSON: all from one file, which others can read too.
fn views() -> Result<()> {
    let net = Pair::new()?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("r.pcapng");
    let probe = Netprobe::new("record")
        .arg("-o")
        .arg(&file)
        .args(["--filter-func", FUNCTIONS, "--output-limit-lines", "60"])
        .args(["--filter-src-ip", "10.77.0.0/16", "-s", "96"])
        .start()?;
    traffic(&net, 20)?;
    // It ends by its limit.
    probe.wait()?.expect_success()?;
    let all = good(report(&file))?;
    ensure!(all.stdout.lines().count() == 61, "{all}");
    let lines = |flags: &[&str]| -> Result<Vec<String>> {
        let done = good(report(&file).args(flags))?;
        Ok(done.stdout.lines().skip(1).map(str::to_owned).collect())
    };
    // A filter gives the lines that grep finds.
    let found = |needle: &str| all.stdout.lines().filter(|l| l.contains(needle)).count();
    ensure!(lines(&["-f", "icmp"])?.len() == found("(icmp)"), "{all}");
    ensure!(
        lines(&["--filter", "udp port 9"])?.len() == found(":9(udp)"),
        "{all}"
    );
    ensure!(
        lines(&["--filter-proto", "udp"])?.len() == found("(udp)"),
        "{all}"
    );
    ensure!(
        lines(&["--filter-func", "udp_rcv"])?.len() == found(" udp_rcv"),
        "{all}"
    );
    ensure!(
        lines(&["--filter-dst-port", "9"])?.len() == found(":9(udp)"),
        "{all}"
    );
    ensure!(lines(&["--filter-src-port", "9"])?.is_empty(), "{all}");
    ensure!(
        lines(&["--filter-dst-ip", "10.77.0.1"])?.len() == found("->10.77.0.1"),
        "{all}"
    );
    ensure!(
        lines(&["--filter-src-ip", "10.77.0.1"])?.len() == found(" 10.77.0.1"),
        "{all}"
    );
    ensure!(
        lines(&["--filter-ifname", "veth0"])?.len() == found(" veth0:"),
        "{all}"
    );
    ensure!(lines(&["--filter-mark", "7"])?.is_empty(), "{all}");
    let named = report(&file)
        .args(["--filter-netns", net.server.name(), "--output-netns-names"])
        .args(["--output-tcp-flags", "--output-limit-lines", "2"])
        .run()?;
    ensure!(named.stdout.lines().count() == 3, "{named}");
    ensure!(named.stdout.contains(net.server.name()), "{named}");
    // Packet by packet: no address comes back once its packet is over.
    let json = report(&file)
        .args(["--sort", "packet", "--format", "json"])
        .run()?;
    let mut order: Vec<String> = Vec::new();
    for row in json.json()? {
        order.extend(row["skb"].as_str().map(str::to_owned));
    }
    order.dedup();
    ensure!(order.len() < 60 && order.len() > 2, "{order:?}");
    ensure!(lines(&["--sort", "latency"])?.len() == 60, "{all}");
    let stats = good(report(&file).arg("--stats"))?;
    ensure!(stats.stdout.contains("60 events of "), "{stats}");
    ensure!(stats.stdout.contains(" udp_rcv"), "{stats}");
    captures(&file, folder.path())?;
    let trace = folder.path().join("trace.json");
    good(
        report(&file)
            .args(["--format", "perfetto", "--output-file"])
            .arg(&trace),
    )?;
    perfetto(&fs::read(&trace)?)?;
    let page = good(report(&file).args(["--format", "html"]))?;
    ensure!(
        page.stdout.ends_with("</html>\n\n") && page.stdout.contains("\"udp_rcv\""),
        "{page}"
    );
    Ok(())
}

/// tcpdump reads the recording, and the capture files that are made of it.
fn captures(file: &Path, folder: &Path) -> Result<()> {
    let packets = |file: &Path| -> Result<usize> {
        let output = Command::new("tcpdump")
            .args(["-Z", "root", "-n", "-r"])
            .arg(file)
            .output()?;
        ensure!(output.status.success(), "{output:?}");
        Ok(String::from_utf8_lossy(&output.stdout).lines().count())
    };
    let once = packets(file)?;
    ensure!((2..40).contains(&once), "{once} packets in the recording");
    for (format, count) in [("pcapng", 60), ("packets", once)] {
        let to = folder.join(format);
        good(
            report(file)
                .args(["--format", format, "--output-file"])
                .arg(&to),
        )?;
        ensure!(packets(&to)? == count, "{format}");
    }
    Ok(())
}

/// Each slice that begins ends, and no time goes backwards in it.
fn perfetto(bytes: &[u8]) -> Result<()> {
    let value: serde_json::Value = serde_json::from_slice(bytes)?;
    let events = value["traceEvents"].as_array().context("no traceEvents")?;
    let mut open: Vec<(u64, String, f64)> = Vec::new();
    let mut instants = 0;
    for event in events {
        let name = event["name"].as_str().context("no name")?.to_owned();
        let (ts, id) = (event["ts"].as_f64().context("no ts")?, event["id"].as_u64());
        match event["ph"].as_str() {
            Some("b") => open.push((id.context("no id")?, name, ts)),
            Some("e") => {
                let (of, begun, then) = open.pop().context("an end without a begin")?;
                ensure!((Some(of), &begun) == (id, &name) && then <= ts, "{event}");
            }
            Some("i") => instants += 1,
            Some("M") => {}
            _ => ensure!(false, "{event}"),
        }
    }
    ensure!(open.is_empty() && instants == 60, "{open:?} {instants}");
    Ok(())
}

/// A ping flood takes at most 24 bytes an event on disk, with its packets' first bytes.
fn flood() -> Result<()> {
    let net = Pair::new()?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("r.pcapng");
    let probe = Netprobe::new("record")
        .arg("-o")
        .arg(&file)
        .args(["--filter-src-ip", "10.77.0.0/16"])
        .start()?;
    net.client.cmd("ping -q -f -c 300 10.77.0.2")?;
    probe.stop()?.expect_success()?;
    let stats = good(report(&file).args(["--stats", "--output-json"]))?;
    let events = stats.json()?[0]["events"].as_u64().unwrap_or(0);
    let size = fs::metadata(&file)?.len();
    ensure!(
        events > 5000 && size <= 24 * events,
        "{size} bytes, {events} events"
    );
    Ok(())
}

/// `kill -9` at moments of any kind leaves a file that reads, to its last whole block.
fn killed() -> Result<()> {
    let net = Pair::new()?;
    let folder = tempfile::tempdir()?;
    let times = match std::env::var_os("NETPROBE_SOAK") {
        Some(_) => 100,
        None => 5,
    };
    let to = net.server.v4(9);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let _ = net.client.udp_send(to, b"flood");
            }
        });
        let result = kills(folder.path(), times);
        over.store(true, Ordering::Relaxed);
        result
    })
}

fn kills(folder: &Path, times: u64) -> Result<()> {
    let (mut events, mut seed) = (0, 0x1234_5678_u64);
    // Some run beside each other, which takes less time than one after the other.
    for batch in 0..times.div_ceil(5) {
        let mut running = Vec::new();
        for i in batch * 5..times.min(batch * 5 + 5) {
            let file = folder.join(format!("{i}.pcapng"));
            let probe = Netprobe::new("record")
                .arg("-o")
                .arg(&file)
                .args(["--filter-func", "udp_rcv"])
                .start()?;
            // One at once, others in the midst of a later block, by the size that the file has reached.
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let size = match i % 5 {
                0 => 0,
                _ => 4000 + (seed >> 33) % 12_000,
            };
            running.push((size, file, probe));
        }
        for (size, file, probe) in running {
            wait_for("bytes in the file", || {
                Ok((fs::metadata(&file)?.len() >= size).then_some(()))
            })?;
            probe.kill9()?;
            events += read_of_killed(&file)?;
        }
    }
    ensure!(events > 300, "{events} events in all");
    Ok(())
}

/// The events of a file whose recorder was killed.
fn read_of_killed(file: &Path) -> Result<u64> {
    let done = good(report(file).args(["--stats", "--output-json"]))?;
    ensure!(done.stderr.contains("has no end"), "{done}");
    ensure!(!done.stderr.contains("damaged"), "{done}");
    let row = &done.json()?[0];
    ensure!(row["loss"].is_null(), "{done}");
    row["events"].as_u64().context("no events")
}

/// Files of a size, of which each stands for itself; the end of all by their size.
fn sizes() -> Result<()> {
    let net = Pair::new()?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("r.pcapng");
    let probe = Netprobe::new("record")
        .arg("-o")
        .arg(&file)
        .args(["--filter-func", "udp_rcv", "-s", "1536", "--max-size", "3"])
        .args(["--rotate-size", "1", "--rotate-keep", "1"])
        .start()?;
    // Nothing that can be compressed.
    let mut seed = 1u64;
    let mut packet = [0; 1400];
    while !probe.has_ended()? {
        for word in packet.chunks_exact_mut(8) {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            word.copy_from_slice(&seed.to_le_bytes());
        }
        net.client.udp_send(net.server.v4(9), &packet)?;
    }
    probe.wait()?.expect_success()?;
    let mut files: Vec<_> = fs::read_dir(folder.path())?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    files.sort();
    ensure!(files.len() == 2, "{files:?}");
    let mut sum = 0;
    for file in &files {
        let done = good(report(file))?;
        sum += done.lines_with("udp_rcv").len();
        ensure!(!done.stderr.contains("has no end"), "{done}");
    }
    // In the order of their names, which is that of time: the one that has no time in its name comes last.
    files.sort_by_key(|f| f == &file);
    let together = good(Netprobe::new("report").args(&files))?;
    ensure!(together.lines_with("udp_rcv").len() == sum, "{sum}");
    ensure!(together.lines_with("SKB ").len() == 1, "one header");
    Ok(())
}

/// The answers of why are in the file that it writes, as they were printed, with the proofs of then.
fn why_as_live() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("w.pcapng");
    let run = Netprobe::new("why")
        .args(["-v", "-w"])
        .arg(&file)
        .arg("udp and host 10.77.0.1")
        .start()?;
    traffic(&net, 2)?;
    let live = run.stop()?;
    live.expect_success()?;
    ensure!(live.stdout.contains("no socket"), "{live}");
    same(&live.stdout, &good(report(&file))?.stdout)?;
    let json = good(report(&file).args(["--format", "json"]))?;
    let rows = json.json()?;
    let of = |kind: &str| rows.iter().filter(|r| r["type"] == kind).count();
    ensure!(of("packet") >= 2 && of("summary") == 1, "{json}");
    let stats = report(&file).arg("--stats").run()?;
    stats.expect_code(1)?;
    stats.expect_stderr("a recording of why has no events")?;
    Ok(())
}
