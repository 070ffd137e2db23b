//! Without root: the capabilities that each subcommand needs (docs/permissions.md), and the systemd unit with its own.

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::common::caps::{self, BPF, DAC_OVERRIDE, IPC_LOCK, NET_ADMIN, PERFMON, SYS_RESOURCE};
use crate::common::{Case, Env, Netprobe, Pair, SHORT, case, wait_for};
use crate::drops_metrics::{get, value};

pub fn cases() -> Vec<Case> {
    vec![
        case("caps_suffice", suffice).once_on("6.12").trace(),
        case("caps_missing", missing).once_on("5.10").trace(),
        case("caps_unit", unit).once_on("5.10").trace(),
    ]
}

/// Those that each run needs, and some more. Before 5.11 maps count as locked memory.
fn with(more: &[u32]) -> Vec<u32> {
    let old = Env::look().kernel < (5, 11);
    let resource = old.then_some(SYS_RESOURCE);
    let base = [BPF, PERFMON, NET_ADMIN].into_iter().chain(resource);
    base.chain(more.iter().copied()).collect()
}

/// kernel.perf_event_paranoid; as it was when dropped. Above 2, Debian's kernels want CAP_SYS_ADMIN for any perf event.
struct Paranoid(String);

impl Paranoid {
    const FILE: &str = "/proc/sys/kernel/perf_event_paranoid";

    fn set(level: &str) -> Result<Self> {
        let before = fs::read_to_string(Self::FILE)?;
        fs::write(Self::FILE, level)?;
        Ok(Self(before))
    }
}

impl Drop for Paranoid {
    fn drop(&mut self) {
        let _ = fs::write(Self::FILE, &self.0);
    }
}

/// A datagram to a closed port, a connection that is refused, and a ping.
fn traffic(net: &Pair) -> Result<()> {
    net.client.udp_send(net.server.v4(7000), b"to be lost")?;
    let refused = net.client.tcp_connect(net.server.v4(7001), SHORT)?;
    ensure!(refused.is_err(), "it should be refused");
    ensure!(net.client.ping(net.server.v4(0), 1)?, "no answer");
    Ok(())
}

/// Every subcommand that traces sees its packets with three capabilities; what it cannot know has one line each.
fn suffice() -> Result<()> {
    let _level = Paranoid::set("2")?;
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let dir = tempfile::tempdir()?;
    fs::set_permissions(
        dir.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o777),
    )?;
    let file = dir.path().join("drops.pcapng");
    let file = file.to_str().context("a path")?;
    let runs: [(&[&str], &str); 9] = [
        (&["skb", "--filter-func", "ip_rcv|ip_output"], "7000(udp)"),
        (&["skb", "--drops"], "7000(udp)"),
        (&["why", "udp"], "10.77.0.2.7000: UDP"),
        (&["drops", "-i", "3600"], "10.77.0.2:7000"),
        (&["record", "--drops", "-o", file], ""),
        (&["tcpconnect", "--outcome"], "refused"),
        (&["tcp"], "refused"),
        (&["latency"], "in       ip "),
        (&["icmp"], "10.77.0.1"),
    ];
    for (args, says) in runs {
        let run = Netprobe::new(args[0])
            .args(&args[1..])
            .caps(&with(&[]))
            .start()?;
        traffic(&net)?;
        let done = run.stop()?;
        done.expect_success()?;
        ensure!(done.stdout.contains(says), "{args:?}: no {says:?}: {done}");
        for cap in ["SYS_ADMIN", "SYSLOG", "SYS_PTRACE", "DAC_READ_SEARCH"] {
            done.expect_stderr(&format!("netprobe: without CAP_{cap}: "))?;
        }
        ensure!(!done.stderr.contains("failed to attach"), "{done}");
    }
    let report = Netprobe::new("report").arg(file).caps(&[]).run()?;
    report.expect_success()?;
    ensure!(report.stdout.contains("7000(udp)"), "{report}");
    // Programs at XDP have pins, in a folder of root's.
    let pins = "/sys/fs/bpf/netprobe";
    fs::create_dir_all(pins)?;
    std::os::unix::fs::chown(pins, Some(0), Some(0))?;
    fs::set_permissions(pins, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
    let xdp = ["--iface", "lo", "--buffer-pages", "64"];
    let no_pins = Netprobe::new("xdpdump").args(xdp).caps(&with(&[])).run()?;
    no_pins.expect_code(1)?;
    no_pins.expect_stderr("/sys/fs/bpf/netprobe")?;
    let pins = with(&[DAC_OVERRIDE]);
    let run = Netprobe::new("xdpdump").args(xdp).caps(&pins).start()?;
    run.stop()?.expect_success()?;
    let chain = Netprobe::new("xdpchain").arg("list").caps(&pins).run()?;
    chain.expect_success()
}

/// What a missing one disables is one line, and an exit status of 1 where nothing is left.
fn missing() -> Result<()> {
    let level = Paranoid::set("2")?;
    let refused = |args: &[&str], caps: &[u32], says: &[&str]| -> Result<()> {
        let done = Netprobe::new(args[0]).args(&args[1..]).caps(caps).run()?;
        done.expect_code(1)?;
        for says in says {
            done.expect_stderr(says)?;
        }
        ensure!(done.stderr.lines().count() == 1, "{done}");
        Ok(())
    };
    refused(&["tcp"], &[PERFMON, NET_ADMIN], &["CAP_BPF missing"])?;
    refused(&["tcp"], &[BPF, NET_ADMIN], &["CAP_PERFMON missing"])?;
    refused(&["why"], &[BPF, PERFMON], &["CAP_NET_ADMIN missing"])?;
    let xdp = ["xdpdump", "--iface", "lo"];
    // CAP_SYS_RESOURCE lets libbpf raise the limit.
    if Env::look().kernel >= (5, 11) {
        refused(
            &xdp,
            &with(&[DAC_OVERRIDE]),
            &["CAP_IPC_LOCK", "--buffer-pages"],
        )?;
    } else {
        refused(
            &["tcp"],
            &[BPF, PERFMON, NET_ADMIN],
            &["CAP_SYS_RESOURCE missing"],
        )?;
    }
    let lock = with(&[DAC_OVERRIDE, IPC_LOCK]);
    let run = Netprobe::new("xdpdump").args(&xdp[1..]).caps(&lock);
    run.start()?.stop()?.expect_success()?;
    drop(level);
    let _level = Paranoid::set("3")?;
    let why = ["kernel.perf_event_paranoid is 3", "CAP_SYS_ADMIN"];
    refused(&["tcp"], &with(&[]), &why)?;
    refused(&["xdpdump", "--iface", "lo"], &with(&[]), &why)?;
    // What drops counts comes by maps.
    let drops = Netprobe::new("drops").args(["-i", "3600"]).caps(&with(&[]));
    let drops = drops.start()?.stop()?;
    drops.expect_success()?;
    drops
        .expect_stderr("full queues of listening sockets are not seen: perf events are refused")?;
    let features = Netprobe::new("features").caps(&with(&[])).run()?;
    features.expect_success()?;
    for says in why.into_iter().chain(["without CAP_SYSLOG: "]) {
        ensure!(features.stdout.contains(says), "{features}");
    }
    for args in [
        &["completions", "bash"][..],
        &["filter", "ip"],
        &["ctl", "list"],
        &["why", "--explain", "NO_SOCKET"],
        &["extcap", "--extcap-interfaces"],
    ] {
        let done = Netprobe::new(args[0]).args(&args[1..]).caps(&[]).run()?;
        done.expect_success()?;
    }
    Ok(())
}

/// The unit's command with the unit's capabilities: it sees another namespace's drops and counters, by name, and lacks
/// nothing.
fn unit() -> Result<()> {
    let unit = include_str!("../../packaging/netprobe-drops.service");
    let of = |key: &str| {
        let mut lines = unit.lines();
        let line = lines.find_map(|l| l.strip_prefix(key)?.strip_prefix('='));
        line.with_context(|| format!("the unit has no {key}"))
    };
    ensure!(
        of("AmbientCapabilities")? == of("CapabilityBoundingSet")?,
        "{unit}"
    );
    let caps: Vec<u32> = of("AmbientCapabilities")?
        .split(' ')
        .map(|name| {
            caps::NAMES
                .iter()
                .find(|(n, _)| *n == name)
                .map(|(_, n)| *n)
        })
        .collect::<Option<_>>()
        .context("a capability that the test does not know")?;
    let command = of("ExecStart")?.replace("127.0.0.1:9477", "0");
    let command = command.replace("-i 60", "-i 1");
    let mut words = command.split(' ');
    ensure!(words.next() == Some("/usr/bin/netprobe"), "{command}");
    let subcommand = words.next().context("no subcommand")?;
    let _level = Paranoid::set("3")?;
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let run = Netprobe::new(subcommand)
        .args(["--max-cpu", "80"])
        .args(words)
        .caps(&caps)
        .start()?;
    let line = run.wait_stderr("metrics at http://")?;
    let address = line.split("http://").nth(1).context("no address")?;
    let address = address.trim().trim_end_matches("/metrics").to_owned();
    traffic(&net)?;
    let labels = [("netns", net.server.name()), ("rule", "NO_SOCKET")];
    let text = wait_for("the drop in the metrics", || {
        let text = get(&address, "/metrics")?;
        Ok((value(&text, "netprobe_drops_total", &labels) >= Some(1.0)).then_some(text))
    })
    .with_context(|| {
        format!(
            "{}{}",
            run.stderr(),
            get(&address, "/metrics").unwrap_or_default()
        )
    })?;
    let labels = [("netns", net.server.name()), ("counter", "UdpNoPorts")];
    let counter = value(&text, "netprobe_kernel_counter_total", &labels);
    ensure!(counter == Some(1.0), "{counter:?}: {text}");
    ensure!(
        text.contains("place=\"__udp4_lib_rcv\"") || text.contains("place=\"udp_"),
        "{text}"
    );
    let done = run.stop()?;
    done.expect_success()?;
    ensure!(!done.stderr.contains("without CAP"), "{done}");
    Ok(())
}
