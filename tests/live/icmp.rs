//! `netprobe icmp`: who handled a ping, and where the time went.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::common::{Case, Finished, Netns, Netprobe, Pair, case, wait_for};

pub fn cases() -> Vec<Case> {
    vec![
        case("icmp_rows", rows).trace().program("ping").limit(400),
        case("icmp_text", text).trace().program("ping").limit(400),
        case("icmp_legacy", legacy)
            .trace()
            .program("ping")
            .limit(400),
        case("icmp_filters", filters)
            .trace()
            .program("ping")
            .limit(400),
        case("icmp_rps", rps)
            .trace()
            .program("ping")
            .when(|_| (cpus() < 2).then(|| "needs two CPUs".to_owned())),
        case("icmp_flood", flood).trace().program("ping").limit(400),
        case("icmp_gap", gap).trace().program("ping").limit(400),
        case("icmp_histogram", histogram)
            .trace()
            .program("ping")
            .limit(400),
        case("icmp_limit_and_file", limit_and_file)
            .trace()
            .program("ping")
            .limit(400),
        case("icmp_culprit", culprit)
            .trace()
            .program("ping")
            .program("iptables-legacy")
            .when(|_| {
                let legacy = Command::new("iptables-legacy").arg("-nL").output();
                (!legacy.is_ok_and(|o| o.status.success()))
                    .then(|| "this kernel has no legacy iptables, the load of this test".to_owned())
            })
            .when(|_| (cpus() < 2).then(|| "needs two CPUs".to_owned()))
            .limit(400),
        case("icmp_sent", sent).trace().program("ping").limit(400),
        case("icmp_sent_lost", sent_lost)
            .trace()
            .program("ping")
            .program("iptables")
            .limit(400),
        case("icmp_sent_flood", sent_flood)
            .trace()
            .program("ping")
            .limit(400),
        case("icmp_usage", usage),
    ]
}

fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Two namespaces whose neighbours are resolved, so that the first reply leaves at once.
fn pair() -> Result<Pair> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    Ok(net)
}

/// Records of one type.
fn records<'a>(all: &'a [Value], kind: &str) -> Vec<&'a Value> {
    all.iter().filter(|r| r["type"] == kind).collect()
}

/// Waits for so many lines of JSON of one type, then stops it.
fn collect(
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
fn steer(netns: &Netns, mask: &str) -> Result<()> {
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
fn program_path(name: &str) -> Result<PathBuf> {
    let path = std::env::var("PATH")?;
    path.split(':')
        .chain(["/usr/sbin", "/sbin"])
        .map(|dir| PathBuf::from(dir).join(name))
        .find(|p| fs::canonicalize(p).is_ok_and(|real| !real.ends_with("busybox")))
        .with_context(|| format!("no {name}"))
}

/// A ping to the server on CPU 0.
fn pinned_ping(args: &[&str]) -> Result<Command> {
    let mut command = Command::new("taskset");
    command.arg("1").arg(program_path("ping")?).arg("-q");
    command.args(args).arg("10.77.0.2");
    Ok(command)
}

fn flood() -> Result<()> {
    const COUNT: u64 = 2000;
    let net = pair()?;
    // Large buffers lose nothing, small ones do: either way the figures agree.
    for pages in ["256", "1"] {
        let probe = Netprobe::new("icmp")
            .args(["--output-json", "--buffer-pages", pages, "--stages=false"])
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
            "{pages} pages: {} seen + {lost} lost is not {COUNT}: {}",
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

/// A cgroup of our own.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(name: &str) -> Result<Self> {
        let path = PathBuf::from("/sys/fs/cgroup").join(name);
        fs::create_dir(&path).with_context(|| format!("failed to make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // The process that was in it may take a moment to leave.
        let _ = wait_for(
            "the cgroup to be empty",
            || Ok(fs::remove_dir(&self.0).ok()),
        );
    }
}

/// A process that is ended when dropped.
struct Child(std::process::Child);

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A ping that sends without a pause through so many iptables rules (they are walked with softirqs held off), to an interface that
/// swallows everything, on CPU 1.
fn hog(netns: &Netns, cgroup: &Cgroup) -> Result<Child> {
    netns.ip("link add d0 type dummy")?;
    netns.ip("addr add 10.9.0.1/24 dev d0")?;
    netns.ip("link set d0 up")?;
    netns.ip("neigh add 10.9.0.2 lladdr 02:00:00:00:00:01 dev d0")?;
    let mut rules = String::from("*filter\n");
    for i in 0..120 {
        for j in 0..250 {
            rules += &format!("-A OUTPUT -p tcp -s 1.2.{i}.{j}/32 -j DROP\n");
        }
    }
    rules += "COMMIT\n";
    let file = tempfile::NamedTempFile::new()?;
    fs::write(file.path(), rules)?;
    // One program, which goes by the name that it is called by.
    let dir = tempfile::tempdir()?;
    let restore = dir.path().join("iptables-legacy-restore");
    std::os::unix::fs::symlink(
        fs::canonicalize(program_path("iptables-legacy")?)?,
        &restore,
    )?;
    netns.output(
        Command::new("sh")
            .args(["-c", "\"$1\" <\"$2\"", "sh"])
            .arg(&restore)
            .arg(file.path()),
    )?;
    let script = "echo $$ >\"$1/cgroup.procs\" && exec taskset 2 \"$2\" -q -f -l 65000 10.9.0.2";
    let mut command = Command::new("sh");
    command
        .args(["-c", script, "sh"])
        .arg(&cgroup.0)
        .arg(program_path("ping")?)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let child = Child(netns.enter(|| command.spawn())??);
    let pid = child.0.id();
    wait_for("the load", || {
        let comm = fs::read_to_string(format!("/proc/{pid}/comm"))?;
        Ok((comm.trim() == "ping").then_some(()))
    })?;
    Ok(child)
}

fn culprit() -> Result<()> {
    let net = pair()?;
    let elsewhere = Netns::new("hog")?;
    let cgroup = Cgroup::new("np-live-hog")?;
    steer(&net.server, "2")?;
    let probe = Netprobe::new("icmp")
        .args(["--output-json", "--culprit", "--min-us", "1000"])
        .args(["--filter-dst-ip", "10.77.0.2"])
        .start()?;
    let hog = hog(&elsewhere, &cgroup)?;
    // Until one of them waited for the load, and was sampled in it.
    let found = wait_for("an echo that the load held up", || {
        let _ = net
            .client
            .output(&mut pinned_ping(&["-i", "0.05", "-c", "10"])?);
        let text = probe.stdout();
        let held_up = |line: &str| {
            let e: Value = serde_json::from_str(line).ok()?;
            let c = &e["culprit"];
            let in_rules = c["stack"].as_array()?.iter().any(|f| {
                f["name"]
                    .as_str()
                    .is_some_and(|n| n.starts_with("ipt_do_table"))
            });
            (c["pid"] == hog.0.id() && in_rules).then_some(e)
        };
        // The last line may not be whole.
        Ok(text.lines().find_map(held_up))
    })?;
    let wait = found["stages_ns"]["wait"].as_u64();
    let c = &found["culprit"];
    ensure!(found["cpu"] == 1 && c["cpu"] == 1, "{found}");
    ensure!(wait >= Some(1_000_000), "the delay is not in WAIT: {found}");
    ensure!(c["comm"] == "ping" && c["tgid"] == hog.0.id(), "{found}");
    ensure!(c["cgroup"] == "/np-live-hog", "{found}");
    ensure!(c["ran_ns"].as_u64() <= c["waited_ns"].as_u64(), "{found}");
    ensure!(c["samples"].as_u64() >= Some(1), "{found}");
    drop(hog);
    probe.stop()?.expect_success()
}

fn sent() -> Result<()> {
    let net = pair()?;
    let probe = Netprobe::new("icmp")
        .args(["--sent", "--timeout", "60", "--output-json"])
        .start()?;
    let (v4, v6) = ("10.77.0.2", "fd77::2");
    // Raw sockets, then ping sockets (root's group may have them).
    for range in ["1 0", "0 0"] {
        net.client.sysctl("net/ipv4/ping_group_range", range)?;
        net.client.cmd(&format!("ping -q -i 0.01 -c 2 {v4}"))?;
        net.client
            .cmd(&format!("ping -q -i 0.01 -c 2 -s 100 {v6}"))?;
    }
    let (done, all) = collect(probe, "request", 8)?;
    let requests = records(&all, "request");
    ensure!(requests.len() == 8, "{done}");
    let netns = net.client.inode()?;
    let ifindex = net.client.ifindex("veth0")?;
    for (i, r) in requests.iter().enumerate() {
        let (from, to, len) = if i % 4 < 2 {
            ("10.77.0.1", v4, 84)
        } else {
            ("fd77::1", v6, 148)
        };
        ensure!(r["result"] == "reply" && r["seq"] == i % 2 + 1, "{r}");
        ensure!(
            r["saddr"] == from && r["daddr"] == to && r["len"] == len,
            "{r}"
        );
        ensure!(r["comm"] == "ping" && r["pid"].as_u64() > Some(0), "{r}");
        ensure!(
            r["netns"] == netns && r["iface"] == "veth0" && r["ifindex"] == ifindex,
            "{r}"
        );
        let part = |name: &str| r["stages_ns"][name].as_u64();
        let sum: u64 = ["out", "wire", "in", "read"]
            .into_iter()
            .filter_map(part)
            .sum();
        ensure!(
            ["out", "wire", "in", "read"]
                .iter()
                .all(|n| part(n).is_some()),
            "a part is missing: {r}"
        );
        ensure!(
            part("total") == Some(sum),
            "the parts are not the whole: {r}"
        );
    }
    let summary = records(&all, "summary");
    ensure!(
        summary[0]["side"] == "sent" && summary[0]["requests"] == 8 && summary[0]["replies"] == 8,
        "{done}"
    );
    Ok(())
}

fn sent_lost() -> Result<()> {
    let net = pair()?;
    let probe = Netprobe::new("icmp")
        .args(["--sent", "--timeout", "5", "--output-json"])
        .start()?;
    let has_reasons = fs::read("/sys/kernel/btf/vmlinux")?
        .windows(27)
        .any(|w| w == b"SKB_DROP_REASON_NOT_SPECIFI");
    // Who drops what, and how it is told.
    let rule = "INPUT -p icmp -j DROP";
    let drops = [
        (&net.server, rule, "this kernel dropped the request"),
        (
            &net.client,
            "OUTPUT -p icmp -j DROP",
            "this kernel dropped the request",
        ),
        (&net.client, rule, "this kernel dropped the reply"),
    ];
    for (i, (netns, rule, _)) in drops.iter().enumerate() {
        netns.cmd(&format!("iptables -I {rule}"))?;
        let _ = net
            .client
            .cmd(&format!("ping -q -c 1 -W 0.1 -e {} 10.77.0.2", 100 + i));
        netns.cmd(&format!("iptables -D {rule}"))?;
    }
    // Nobody has this address, and nobody answers for it.
    net.client
        .ip("neigh add 10.77.0.9 lladdr 02:00:00:00:00:09 dev veth0")?;
    let _ = net.client.cmd("ping -q -c 1 -W 0.1 -e 103 10.77.0.9");
    let (done, all) = collect(probe, "request", 4)?;
    let requests = records(&all, "request");
    for (i, (r, (_, _, why))) in requests.iter().zip(&drops).enumerate() {
        ensure!(r["result"] == "lost" && r["id"] == 100 + i, "{r}");
        ensure!(r["lost"]["why"] == *why, "{r}");
        ensure!(
            r["lost"]["location"]
                .as_str()
                .is_some_and(|l| l.contains('+')),
            "{r}"
        );
        if has_reasons {
            ensure!(r["lost"]["reason"] == "NETFILTER_DROP", "{r}");
        } else {
            ensure!(r["lost"]["reason"].is_null(), "{r}");
        }
    }
    ensure!(requests.len() == 4, "{done}");
    // Its packet went to the other end, which is not 10.77.0.9 and throws it away: by the MAC address, before the stack looks.
    ensure!(
        requests[3]["id"] == 103 && requests[3]["result"] == "lost",
        "{done}"
    );
    let summary = records(&all, "summary")[0];
    ensure!(summary["lost"] == 4 && summary["replies"] == 0, "{done}");
    Ok(())
}

fn sent_flood() -> Result<()> {
    const COUNT: u64 = 1000;
    let net = pair()?;
    // Every third request does not arrive.
    net.server.nft(
        "add table netdev t; add chain netdev t in { type filter hook ingress device veth0 priority 0; }; add rule netdev t in icmp type echo-request icmp sequence & 3 == 3 drop",
    )?;
    let probe = Netprobe::new("icmp")
        .args(["--sent", "--output-json", "--timeout", "60"])
        .start()?;
    let told = net.client.output(Command::new("sh").args([
        "-c",
        &format!("ping -q -f -c {COUNT} -W 1 10.77.0.2 || true"),
    ]))?;
    let done = probe.stop()?;
    done.expect_success()?;
    let all = done.json()?;
    let summary = records(&all, "summary")[0];
    let n = |name: &str| summary[name].as_u64().unwrap_or(0);
    ensure!(n("requests") == COUNT, "{summary}\n{told}");
    ensure!(n("replies") + n("lost") + n("open") == COUNT, "{summary}");
    // The kernel says which: nothing but those that were dropped is lost.
    ensure!(
        told.contains(&format!("{} received", n("replies"))),
        "{summary}\n{told}"
    );
    ensure!(records(&all, "loss").is_empty(), "{}", done.stderr);
    Ok(())
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
