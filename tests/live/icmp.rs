//! `netprobe icmp`: who handled a ping, and where the time went.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::common::{Case, Finished, Netns, Netprobe, Pair, case};

pub fn cases() -> Vec<Case> {
    vec![
        case("icmp_rows", rows).trace().program("ping").limit(400),
        case("icmp_text", text)
            .once_on("5.10")
            .trace()
            .program("ping")
            .limit(400),
        case("icmp_legacy", legacy)
            .once_on("5.10")
            .trace()
            .program("ping")
            .limit(400),
        case("icmp_filters", filters)
            .once_on("5.10")
            .trace()
            .program("ping")
            .limit(400),
        case("icmp_rps", rps)
            .once_on("newest")
            .trace()
            .program("ping")
            .when(|_| (cpus() < 2).then(|| "needs two CPUs".to_owned())),
        case("icmp_flood", flood)
            .once_on("5.10")
            .trace()
            .program("ping")
            .limit(400),
        case("icmp_gap", gap)
            .once_on("5.10")
            .trace()
            .program("ping")
            .limit(400),
        case("icmp_histogram", histogram)
            .once_on("5.10")
            .trace()
            .program("ping")
            .limit(400),
        case("icmp_limit_and_file", limit_and_file)
            .once_on("5.10")
            .trace()
            .program("ping")
            .limit(400),
        case("icmp_usage", usage).once_on("5.10"),
    ]
}

pub fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Two namespaces whose neighbours are resolved, so that the first reply leaves at once.
pub fn pair() -> Result<Pair> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    Ok(net)
}

/// Records of one type.
pub fn records<'a>(all: &'a [Value], kind: &str) -> Vec<&'a Value> {
    all.iter().filter(|r| r["type"] == kind).collect()
}

/// Waits for so many lines of JSON of one type, then stops it.
pub fn collect(
    probe: crate::common::Running,
    kind: &str,
    count: usize,
) -> Result<(Finished, Vec<Value>)> {
    let needle = format!("\"type\":\"{kind}\"");
    probe.wait_lines(&format!("{count} records {kind}"), |text| {
        (text.lines().filter(|l| l.contains(&needle)).count() >= count).then_some(())
    })?;
    let done = probe.stop()?;
    done.expect_success()?;
    let all = done.json()?;
    Ok((done, all))
}

fn rows() -> Result<()> {
    let net = pair()?;
    let probe = Netprobe::new("icmp").arg("--output-json").start()?;
    net.client.cmd("ping -q -i 0.01 -c 3 -e 4242 10.77.0.2")?;
    net.client
        .cmd("ping -q -i 0.01 -c 3 -e 4343 -s 100 fd77::2")?;
    let (done, all) = collect(probe, "echo", 6)?;
    let echoes = records(&all, "echo");
    ensure!(echoes.len() == 6, "{done}");
    let netns = net.server.inode()?;
    let ifindex = net.server.ifindex("veth0")?;
    for (i, e) in echoes.iter().enumerate() {
        let (from, to, id, len, icmp_type) = if i < 3 {
            ("10.77.0.1", "10.77.0.2", 4242, 84, 8)
        } else {
            ("fd77::1", "fd77::2", 4343, 148, 128)
        };
        ensure!(e["saddr"] == from && e["daddr"] == to, "addresses: {e}");
        ensure!(e["id"] == id && e["seq"] == i % 3 + 1, "id, seq: {e}");
        ensure!(
            e["len"] == len && e["icmp_type"] == icmp_type,
            "len, type: {e}"
        );
        ensure!(
            e["iface"] == "veth0" && e["ifindex"] == ifindex && e["netns"] == netns,
            "interface: {e}"
        );
        ensure!(
            e["cpu"].as_u64().is_some_and(|c| c < cpus() as u64),
            "cpu: {e}"
        );
        // veth hands the packet over in the sender's own context, unless ksoftirqd had to step in.
        match e["context"].as_str() {
            Some("task") => ensure!(e["pid"].as_u64() > Some(0) && e["comm"] != "", "{e}"),
            Some("ksoftirqd") => {
                ensure!(
                    e["comm"]
                        .as_str()
                        .is_some_and(|c| c.starts_with("ksoftirqd/")),
                    "{e}"
                );
            }
            Some("idle") => ensure!(e["pid"] == 0 && e["tgid"] == 0, "{e}"),
            _ => anyhow::bail!("context: {e}"),
        }
        for stage in ["wait", "poll", "stack", "reply", "total"] {
            ensure!(e["stages_ns"][stage].is_u64(), "no stage {stage}: {e}");
        }
        let t = &e["times"];
        let order = [
            &t["queued"],
            &t["softirq"]["entry"],
            &t["receive"],
            &t["echo"],
            &t["reply"],
        ];
        let order: Vec<u64> = order.iter().filter_map(|v| v.as_u64()).collect();
        ensure!(order.len() == 5 && order.is_sorted(), "order of times: {e}");
        ensure!(e["gap"] == 0, "{e}");
    }
    ensure!(
        echoes
            .iter()
            .any(|e| e["comm"] == "ping" && e["context"] == "task"),
        "ping was never current:\n{done}"
    );
    let summary = records(&all, "summary");
    ensure!(summary.len() == 1 && summary[0]["requests"] == 6, "{done}");
    ensure!(
        summary[0]["replies"] == 6 && summary[0]["missing"] == 0,
        "{done}"
    );
    ensure!(summary[0]["stages"]["stack"]["count"] == 6, "{done}");
    ensure!(!done.stderr.contains("no tracepoint"), "{done}");
    Ok(())
}

fn text() -> Result<()> {
    let net = pair()?;
    let probe = Netprobe::new("icmp").start()?;
    net.client.cmd("ping -q -c 1 -e 77 10.77.0.2")?;
    let line = probe.wait_line("10.77.0.2")?;
    let done = probe.stop()?;
    done.expect_success()?;
    let header: Vec<&str> = done
        .stdout
        .lines()
        .next()
        .context("no header")?
        .split_whitespace()
        .collect();
    ensure!(
        header[..12]
            == [
                "TGID",
                "PID",
                "COMM",
                "CPU",
                "CONTEXT",
                "SOURCE",
                "DESTINATION",
                "ID",
                "SEQ",
                "IFACE",
                "NETNS",
                "LEN"
            ],
        "{done}"
    );
    let words: Vec<&str> = line.split_whitespace().collect();
    ensure!(words.len() == 19, "{line}");
    let netns = net.server.inode()?.to_string();
    let iface = format!("veth0:{}", net.server.ifindex("veth0")?);
    ensure!(
        words[5..12] == ["10.77.0.1", "10.77.0.2", "77", "1", &iface, &netns, "84"],
        "{line}"
    );
    done.expect_stderr("1 requests, 1 replies handed to a device, 0 missing")
}

fn legacy() -> Result<()> {
    let net = pair()?;
    let probe = Netprobe::new("icmp").arg("--legacy").start()?;
    net.client.cmd("ping -q -i 0.01 -c 2 10.77.0.2")?;
    // Not seen by the script, which knows icmp_echo only.
    net.client.cmd("ping -q -c 1 fd77::2")?;
    probe.wait_lines("two lines", |text| {
        (text.lines().count() >= 2).then_some(())
    })?;
    let done = probe.stop()?;
    done.expect_success()?;
    let lines: Vec<&str> = done.stdout.lines().collect();
    ensure!(lines.len() == 2, "{done}");
    for (i, line) in lines.iter().enumerate() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (tgid, pid) = (words[0], words[1]);
        let comm = words[2..words.len() - 1].join(" ");
        // Sequences 1 and 2 as the script prints them, the bytes not swapped.
        let seq = u16::from_ne_bytes((i as u16 + 1).to_be_bytes());
        let exact = format!("{tgid:<7} {pid:<7} {comm:<15} {seq}");
        ensure!(*line == exact, "{line:?} is not {exact:?}");
        ensure!(tgid.parse::<u32>().is_ok() && pid.parse::<u32>().is_ok());
    }
    Ok(())
}

fn filters() -> Result<()> {
    let net = pair()?;
    net.server.ip("addr add 10.77.0.3/24 dev veth0")?;
    let server = net.server.name();
    let elsewhere = net.client.name();
    // Each with the pings (by id) that must be seen.
    let runs: [(&[&str], &[u64]); 5] = [
        (&["icmp[4:2] = 12 and src host 10.77.0.1"], &[12]),
        (
            &["--filter-src-ip", "10.77.0.1/32", "--filter-id", "11"],
            &[11],
        ),
        (&["--filter-proto", "icmp6"], &[13]),
        (
            &["--filter-netns", server, "--filter-ifname", "veth0"],
            &[11, 12, 13],
        ),
        (
            &["--filter-netns", elsewhere, "--filter-dst-ip", "10.77.0.3"],
            &[],
        ),
    ];
    // All at once: each is a session of its own, and a last ping to the client shows that all that came before is in.
    let mut probes = Vec::new();
    for (args, _) in &runs {
        probes.push(
            Netprobe::new("icmp")
                .arg("--output-json")
                .args(*args)
                .start()?,
        );
    }
    net.client.cmd("ping -q -c 1 -e 11 10.77.0.2")?;
    net.client.cmd("ping -q -c 1 -e 12 10.77.0.3")?;
    net.client.cmd("ping -q -c 1 -e 13 fd77::2")?;
    for (probe, (args, expected)) in probes.into_iter().zip(&runs) {
        // Ending takes out what is in the buffers.
        let done = probe.stop()?;
        done.expect_success()?;
        let all = done.json()?;
        let ids: Vec<u64> = records(&all, "echo")
            .iter()
            .filter_map(|e| e["id"].as_u64())
            .collect();
        ensure!(
            ids == *expected,
            "{args:?}: {ids:?}, not {expected:?}:\n{done}"
        );
    }
    Ok(())
}

/// Makes `netns` hand what veth0 receives to the CPUs of this mask.
pub fn steer(netns: &Netns, mask: &str) -> Result<()> {
    // sysfs shows the interfaces of the namespace that it was mounted in.
    let script = format!(
        "mount -t sysfs sysfs /sys && echo {mask} >/sys/class/net/veth0/queues/rx-0/rps_cpus"
    );
    netns
        .output(Command::new("unshare").args(["-m", "sh", "-c", &script]))
        .map(|_| ())
}

fn rps() -> Result<()> {
    let net = pair()?;
    steer(&net.server, "2")?;
    let probe = Netprobe::new("icmp")
        .args(["--output-json", "--filter-cpu", "1"])
        .start()?;
    net.client
        .output(&mut pinned_ping(&["-i", "0.01", "-c", "5"])?)?;
    let (done, all) = collect(probe, "echo", 5)?;
    for e in records(&all, "echo") {
        ensure!(e["cpu"] == 1 && e["steered"] == true, "not steered: {e}");
        ensure!(e["times"]["queued_cpu"] == 0, "queued elsewhere: {e}");
        // Nothing had to be raised where the softirq ran already.
        let t = &e["times"];
        let joined = t["softirq"]["raise"].as_u64() < t["queued"].as_u64();
        let rps = e["stages_ns"]["rps"].as_u64();
        ensure!(rps > Some(0) || joined && rps == Some(0), "RPS stage: {e}");
        ensure!(e["comm"] != "ping", "ping is on the other CPU:\n{done}");
    }
    Ok(())
}

/// The real program (busybox' taskset and sh prefer its own of the same name).
pub fn program_path(name: &str) -> Result<PathBuf> {
    let path = std::env::var("PATH")?;
    path.split(':')
        .chain(["/usr/sbin", "/sbin"])
        .map(|dir| PathBuf::from(dir).join(name))
        .find(|p| fs::canonicalize(p).is_ok_and(|real| !real.ends_with("busybox")))
        .with_context(|| format!("no {name}"))
}

/// A ping to the server on CPU 0.
pub fn pinned_ping(args: &[&str]) -> Result<Command> {
    let mut command = Command::new("taskset");
    command.arg("1").arg(program_path("ping")?).arg("-q");
    command.args(args).arg("10.77.0.2");
    Ok(command)
}

fn flood() -> Result<()> {
    const COUNT: u64 = 2000;
    let net = pair()?;
    // Large buffers lose nothing, small ones do: either way the figures agree.
    for (pages, transport) in [("256", "perf"), ("1", "perf"), ("256", "ringbuf")] {
        let probe = Netprobe::new("icmp")
            .args(["--output-json", "--buffer-pages", pages, "--stages=false"])
            .args(["--transport", transport])
            .start()?;
        let told = net
            .client
            .cmd(&format!("ping -q -f -c {COUNT} 10.77.0.2"))?;
        ensure!(
            told.contains(&format!("{COUNT} packets transmitted")),
            "{told}"
        );
        let done = probe.stop()?;
        done.expect_success()?;
        let all = done.json()?;
        let seqs: BTreeSet<u64> = records(&all, "echo")
            .iter()
            .filter_map(|e| e["seq"].as_u64())
            .collect();
        let lost = records(&all, "loss").first().map_or(0, |l| {
            l["lost"].as_u64().unwrap_or(0) + l["missed"].as_u64().unwrap_or(0)
        });
        ensure!(
            seqs.len() as u64 + lost == COUNT,
            "{pages} pages, {transport}: {} seen + {lost} lost is not {COUNT}: {}",
            seqs.len(),
            done.stderr
        );
        if pages == "256" {
            ensure!(lost == 0, "lost {lost}: {}", done.stderr);
        }
    }
    Ok(())
}

fn gap() -> Result<()> {
    let net = pair()?;
    let probe = Netprobe::new("icmp").arg("--output-json").start()?;
    // Of each three requests the middle one does not come in.
    net.server.nft(
        "add table netdev t; add chain netdev t in { type filter hook ingress device veth0 priority 0; }; add rule netdev t in icmp type echo-request icmp sequence 2 drop",
    )?;
    // The exit status says that not all were answered.
    let _ = net.client.cmd("ping -q -i 0.01 -W 1 -c 3 -e 5 10.77.0.2");
    let (done, all) = collect(probe, "echo", 2)?;
    let gaps: Vec<_> = records(&all, "echo")
        .iter()
        .map(|e| (e["seq"].clone(), e["gap"].clone()))
        .collect();
    ensure!(
        gaps == [(1.into(), 0.into()), (3.into(), 1.into())],
        "{done}"
    );
    ensure!(records(&all, "summary")[0]["missing"] == 1, "{done}");
    Ok(())
}

fn histogram() -> Result<()> {
    let net = pair()?;
    let probe = Netprobe::new("icmp").arg("--histogram").start()?;
    net.client.cmd("ping -q -i 0.01 -c 20 10.77.0.2")?;
    let done = probe.stop()?;
    done.expect_success()?;
    // On whatever CPUs: all together there are 20.
    let count: u64 = done
        .lines_with("total (us), cpu ")
        .iter()
        .filter_map(|l| l.split_whitespace().nth(4)?.parse::<u64>().ok())
        .sum();
    ensure!(count == 20, "{done}");
    ensure!(
        done.stdout.contains(" -> ") && done.stdout.contains("*|"),
        "{done}"
    );

    let probe = Netprobe::new("icmp")
        .args(["--histogram", "-i", "1", "--output-json"])
        .start()?;
    net.client.cmd("ping -q -c 1 10.77.0.2")?;
    // Printed while it runs.
    probe.wait_line("\"stage\":\"stack\"")?;
    probe.stop()?.expect_success()
}

fn limit_and_file() -> Result<()> {
    let net = pair()?;
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("out");
    let probe = Netprobe::new("icmp")
        .args([
            "--output-limit-lines",
            "2",
            "--timestamp",
            "absolute",
            "--output-file",
        ])
        .arg(&file)
        .start()?;
    net.client.cmd("ping -q -i 0.01 -c 4 10.77.0.2")?;
    let done = probe.wait()?;
    done.expect_success()?;
    ensure!(done.stdout.is_empty(), "{done}");
    let text = fs::read_to_string(&file)?;
    ensure!(text.lines().count() == 3, "a header and two lines:\n{text}");

    // What no echo reaches is not printed.
    let probe = Netprobe::new("icmp")
        .args(["--min-us", "60000000"])
        .start()?;
    net.client.cmd("ping -q -c 1 10.77.0.2")?;
    let done = probe.stop()?;
    done.expect_success()?;
    ensure!(done.stdout.lines().count() == 1, "{done}");
    done.expect_stderr("1 requests")
}

fn usage() -> Result<()> {
    for (args, needle) in [
        (&["--legacy", "--output-json"][..], "--legacy"),
        (&["-i", "1"], "--histogram"),
        (&["--sent", "--culprit"], "--culprit"),
        (&["--timeout", "3"], "--sent"),
        (&["icmp[99999999"], "icmp[99999999"),
        (&["--filter-src-ip", "nonsense"], "nonsense"),
        (&["--filter-ifname", "nope0"], "nope0"),
    ] {
        let done = Netprobe::new("icmp").args(args).run()?;
        done.expect_code(2)?;
        done.expect_stderr(needle)?;
        ensure!(done.stdout.is_empty(), "{done}");
    }
    Ok(())
}
