//! `netprobe icmp`: the culprits of late softirqs, and requests by a network card.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::icmp::{collect, cpus, pair, pinned_ping, program_path, records, steer};
use crate::common::{Case, Env, Netns, Netprobe, case, wait_for};

pub fn cases() -> Vec<Case> {
    vec![
        case("icmp_nic", nic)
            .once_on("6.1")
            .trace()
            .program("ping")
            .when(no_cards)
            .limit(400),
        case("icmp_culprit", culprit)
            .once_on("5.10")
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
    ]
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
    for i in 0..250 {
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
        .args(["--culprit-hz", "1999"])
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
            // Where the wait was longer than --min-us, and not the whole way alone.
            let waited = e["stages_ns"]["wait"].as_u64() >= Some(1_000_000);
            (c["pid"] == hog.0.id() && in_rules && waited).then_some(e)
        };
        // The last line may not be whole.
        Ok(text.lines().find_map(held_up))
    })?;
    let c = &found["culprit"];
    ensure!(found["cpu"] == 1 && c["cpu"] == 1, "{found}");
    ensure!(c["comm"] == "ping" && c["tgid"] == hog.0.id(), "{found}");
    ensure!(c["cgroup"] == "/np-live-hog", "{found}");
    ensure!(c["ran_ns"].as_u64() <= c["waited_ns"].as_u64(), "{found}");
    ensure!(c["samples"].as_u64() >= Some(1), "{found}");
    probe.stop()?.expect_success()?;
    // The same by netprobe latency, of any packet; alone, since each of the two holds packets up that the other one looks at.
    let latency = Netprobe::new("latency")
        .args(["--output-json", "--culprit", "--min-us", "1000"])
        .args(["--culprit-hz", "999", "--filter-proto", "icmp"])
        .start()?;
    let found = wait_for("a packet that the load held up", || {
        let _ = net
            .client
            .output(&mut pinned_ping(&["-i", "0.05", "-c", "10"])?);
        let held_up = |line: &str| {
            let p: Value = serde_json::from_str(line).ok()?;
            let by_load = p["why"]["rule"] == "softirq-task" && p["way"] == "in";
            (by_load && p["why"]["text"].as_str()?.contains("ran ping[")).then_some(p)
        };
        Ok(latency.stdout().lines().find_map(held_up))
    })?;
    ensure!(
        found["cpu"] == 1 && found["why"]["stage"] == "softirq",
        "{found}"
    );
    drop(hog);
    latency.stop()?.expect_success()
}

pub fn no_cards(_: &Env) -> Option<String> {
    std::env::var_os("NETPROBE_LIVE_CARDS")
        .is_none()
        .then(|| "needs the two network cards of tests/vm/live".to_owned())
}

/// Two network cards of the virtual machine (tests/vm/run) on one cable; their driver goes with them, back to where they came from.
pub struct Cards;

impl Cards {
    /// Makes their driver look for them.
    pub fn new() -> Result<Self> {
        for module in ["virtio_pci", "virtio_net"] {
            // Built in, in some kernels.
            let _ = Command::new("modprobe").args(["-q", module]).status();
        }
        Ok(Self)
    }

    /// Moves the card with this MAC address into a namespace as `nic0`, with an address.
    pub fn give(&self, mac: &str, netns: &Netns, address: &str) -> Result<()> {
        let name = wait_for("a network card of the virtual machine", || {
            for entry in fs::read_dir("/sys/class/net")? {
                let entry = entry?;
                if fs::read_to_string(entry.path().join("address")).is_ok_and(|a| a.trim() == mac) {
                    return Ok(Some(entry.file_name().to_string_lossy().into_owned()));
                }
            }
            Ok(None)
        })?;
        let status = Command::new("ip")
            .args(["link", "set", &name, "netns", netns.name(), "name", "nic0"])
            .status()?;
        ensure!(status.success(), "ip link set {name}: {status}");
        netns.ip(&format!("addr add {address} dev nic0"))?;
        netns.ip("link set nic0 up")?;
        Ok(())
    }
}

impl Drop for Cards {
    fn drop(&mut self) {
        let _ = Command::new("modprobe").args(["-r", "virtio_net"]).status();
    }
}

/// Requests that come in by a hard interrupt: the IRQ stage, which a veth pair does not have.
fn nic() -> Result<()> {
    let cards = Cards::new()?;
    let (client, server) = (Netns::new("nicc")?, Netns::new("nics")?);
    cards.give("52:54:00:6e:70:01", &client, "10.78.0.1/24")?;
    cards.give("52:54:00:6e:70:02", &server, "10.78.0.2/24")?;
    client.ip("addr add fd78::1/64 dev nic0 nodad")?;
    server.ip("addr add fd78::2/64 dev nic0 nodad")?;
    client.wait_up("nic0")?;
    server.wait_up("nic0")?;
    let probe = Netprobe::new("icmp").arg("--output-json").start()?;
    let text = Netprobe::new("icmp").start()?;
    client.cmd("ping -q -i 0.05 -c 4 -W 10 10.78.0.2")?;
    client.cmd("ping -q -i 0.05 -c 4 -W 10 fd78::2")?;
    let (done, all) = collect(probe, "echo", 8)?;
    let echoes = records(&all, "echo");
    ensure!(echoes.len() == 8, "{done}");
    let mut with_irq = 0;
    for e in &echoes {
        ensure!(e["iface"] == "nic0", "{e}");
        let t = &e["times"];
        let stage = |name: &str| e["stages_ns"][name].as_u64();
        for name in ["poll", "stack", "reply", "total"] {
            ensure!(stage(name).is_some(), "no stage {name}: {e}");
        }
        // Where the card was polled already when the request came, there was no interrupt for it.
        let Some(irq) = stage("irq") else { continue };
        let order = [
            &t["softirq"]["irq"],
            &t["softirq"]["raise"],
            &t["softirq"]["entry"],
            &t["receive"],
            &t["echo"],
            &t["reply"],
        ];
        let order: Vec<u64> = order.iter().filter_map(|v| v.as_u64()).collect();
        ensure!(order.len() == 6 && order.is_sorted(), "order of times: {e}");
        ensure!(order[1] - order[0] == irq, "{e}");
        let sum: u64 = ["irq", "wait", "poll", "stack", "reply"]
            .into_iter()
            .filter_map(stage)
            .sum();
        ensure!(
            stage("total") == Some(sum),
            "the parts are not the whole: {e}"
        );
        with_irq += 1;
    }
    ensure!(
        with_irq >= 4,
        "{with_irq} of 8 came by an interrupt:\n{done}"
    );
    let summary = records(&all, "summary");
    ensure!(summary[0]["stages"]["irq"]["count"] == with_irq, "{done}");

    // The same in the columns.
    text.wait_lines("eight rows", |t| (t.lines().count() > 8).then_some(()))?;
    let done = text.stop()?;
    done.expect_success()?;
    let column = done
        .stdout
        .lines()
        .next()
        .and_then(|h| h.split_whitespace().position(|w| w == "IRQ"))
        .context("no column IRQ")?;
    let shown = done.stdout.lines().skip(1).filter(|l| {
        l.split_whitespace()
            .nth(column)
            .is_some_and(|w| w.parse::<f64>().is_ok())
    });
    ensure!(shown.count() >= 4, "{done}");
    Ok(())
}
