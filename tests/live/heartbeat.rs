//! netprobe is stopped, as by Ctrl-Z or a debugger: its programs stand still, go on when it does, and the gap is told.
//! What the programs do is read from the kernel: how many events they have sent.

use anyhow::{Context, Result, ensure};
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use nix::sys::signal::Signal;

use crate::common::{Case, Netprobe, Pair, Running, SHORT, case, wait_for};
use crate::run_ends::Offline;

pub fn cases() -> Vec<Case> {
    vec![
        case("heartbeat_skb", || stops(&SKB)).trace(),
        case("heartbeat_skb_tracked", || stops(&TRACKED))
            .once_on("6.1")
            .trace(),
        case("heartbeat_ringbuf", || stops(&RINGBUF))
            .once_on("newest")
            .trace(),
        case("heartbeat_why", || stops(&WHY))
            .once_on("6.12")
            .trace(),
        case("heartbeat_icmp", || stops(&ICMP))
            .once_on("6.1")
            .trace(),
        case("heartbeat_latency", || stops(&LATENCY))
            .once_on("newest")
            .trace(),
        case("heartbeat_tcp", || stops(&TCP))
            .once_on("6.12")
            .trace(),
        case("heartbeat_tcpconnect", || stops(&TCPCONNECT))
            .once_on("6.1")
            .trace(),
        case("heartbeat_drops", drops).once_on("5.10").trace(),
        case("heartbeat_record", record).once_on("5.10").trace(),
        case("heartbeat_clock_goes", clock_goes)
            .once_on("newest")
            .trace(),
    ]
}

/// A subcommand, and what makes at least one event of it.
struct Tool {
    args: &'static [&'static str],
    traffic: fn(&Pair) -> Result<()>,
}

fn datagram(net: &Pair) -> Result<()> {
    net.client
        .udp_send(net.server.v4(4000), b"x")
        .map(|_port| ())
}

fn connect(net: &Pair) -> Result<()> {
    let listener = net.server.tcp_listen(net.server.v4(0))?;
    net.client.tcp_connect(listener.address(), SHORT)?.ok();
    Ok(())
}

const SKB: Tool = Tool {
    args: &["skb", "--filter-func", "ip_output", "--filter-proto", "udp"],
    traffic: datagram,
};

const TRACKED: Tool = Tool {
    args: &[
        "skb",
        "--filter-func",
        "ip_output|ip_rcv|kfree_skbmem|consume_skb",
        "--filter-track-skb",
        "--filter-proto",
        "udp",
    ],
    traffic: datagram,
};

const RINGBUF: Tool = Tool {
    args: &[
        "skb",
        "--filter-func",
        "ip_output",
        "--filter-proto",
        "udp",
        "--transport",
        "ringbuf",
    ],
    traffic: datagram,
};

const WHY: Tool = Tool {
    args: &["why", "--filter-dst-port", "4000"],
    traffic: datagram,
};

const ICMP: Tool = Tool {
    args: &["icmp"],
    traffic: |net| net.client.ping(net.server.v4(0), 1).map(|_| ()),
};

const LATENCY: Tool = Tool {
    args: &["latency", "--min-us", "1"],
    traffic: |net| {
        let server = net.server.udp_bind(net.server.v4(4000))?;
        datagram(net)?;
        server.recv(&mut [0; 16])?;
        Ok(())
    },
};

const TCP: Tool = Tool {
    args: &["tcp"],
    traffic: connect,
};

const TCPCONNECT: Tool = Tool {
    args: &["tcpconnect"],
    traffic: connect,
};

/// The map of this name that a process has open.
fn map_of(run: &Running, name: &str) -> Result<MapHandle> {
    let folder = format!("/proc/{}/fdinfo", run.pid());
    for entry in std::fs::read_dir(&folder)? {
        let text = std::fs::read_to_string(entry?.path()).unwrap_or_default();
        let id = text.lines().find_map(|l| l.strip_prefix("map_id:"));
        let Some(id) = id.and_then(|id| id.trim().parse().ok()) else {
            continue;
        };
        let map = MapHandle::from_map_id(id)?;
        if map.name() == name {
            return Ok(map);
        }
    }
    anyhow::bail!("no map {name} in {folder}")
}

/// When the program of the heartbeat ran last; 0: never.
fn looked(heartbeat: &MapHandle) -> Result<u64> {
    let value = heartbeat.lookup(&0u32.to_ne_bytes(), MapFlags::ANY)?;
    let value = value.context("no heartbeat")?;
    // struct np_heartbeat: drained, limit, looked
    Ok(u64::from_ne_bytes(value[16..24].try_into()?))
}

/// netprobe is ready a moment before its heartbeat begins.
fn wait_clock(run: &Running) -> Result<MapHandle> {
    let heartbeat = map_of(run, ".data.heartbeat")?;
    wait_for("the clock", || Ok((looked(&heartbeat)? > 0).then_some(())))
        .with_context(|| run.stderr())?;
    Ok(heartbeat)
}

/// Events that the programs have handed to the buffers, lost ones included: the first number of struct np_stats.
fn sent(stats: &MapHandle) -> Result<u64> {
    let per_cpu = stats.lookup_percpu(&0u32.to_ne_bytes(), MapFlags::ANY)?;
    let first = |bytes: &Vec<u8>| u64::from_ne_bytes(bytes[..8].try_into().unwrap_or_default());
    Ok(per_cpu.context("no counters")?.iter().map(first).sum())
}

/// Traffic that nobody looks at is enough for a pause to be seen.
const QUIET_ROUNDS: usize = 10;

/// Stops netprobe, and waits until its programs stand still under traffic; how many events they had sent.
fn stop_and_wait(
    run: &Running,
    stats: &MapHandle,
    traffic: impl Fn() -> Result<()>,
) -> Result<u64> {
    run.signal(Signal::SIGSTOP)?;
    let (mut before, mut quiet) = (sent(stats)?, 0);
    wait_for("the programs to stand still", || {
        traffic()?;
        let now = sent(stats)?;
        quiet = if now == before { quiet + 1 } else { 0 };
        before = now;
        Ok((quiet == QUIET_ROUNDS).then_some(now))
    })
}

/// Lets netprobe go on, and waits until its programs do.
fn go_on(run: &Running, stats: &MapHandle, traffic: impl Fn() -> Result<()>) -> Result<()> {
    let before = sent(stats)?;
    run.signal(Signal::SIGCONT)?;
    wait_for("the programs to go on", || {
        traffic()?;
        Ok((sent(stats)? > before).then_some(()))
    })
}

fn stops(tool: &Tool) -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let mut probe = Netprobe::new(tool.args[0]).args(&tool.args[1..]);
    if tool.args[0] != "tcpconnect" && tool.args[0] != "tcp" {
        probe = probe.netns(&net.client);
    }
    let run = probe.arg("--output-json").start()?;
    let stats = map_of(&run, "stats")?;
    let traffic = || (tool.traffic)(&net);
    wait_for("the first event", || {
        traffic()?;
        Ok((sent(&stats)? > 0).then_some(()))
    })?;
    wait_clock(&run)?;
    stop_and_wait(&run, &stats, traffic)?;
    go_on(&run, &stats, traffic)?;
    // Once more.
    stop_and_wait(&run, &stats, traffic)?;
    go_on(&run, &stats, traffic)?;
    let done = run.stop()?;
    done.expect_success()?;
    let rows = done.json()?;
    let loss = rows.iter().find(|row| row["type"] == "loss");
    let loss = loss.with_context(|| format!("no loss is told: {done}"))?;
    ensure!(
        loss["gaps"].as_u64() >= Some(2) && loss["gap_ns"].as_u64() > Some(0),
        "{loss}"
    );
    ensure!(
        loss["received"].as_u64() == Some(sent_of(loss) - loss["lost"].as_u64().unwrap_or(0)),
        "{loss}"
    );
    done.expect_stderr("looked at nothing for ")?;
    done.expect_stderr(" times): netprobe was stopped or behind")
}

fn sent_of(loss: &serde_json::Value) -> u64 {
    loss["sent"].as_u64().unwrap_or(0)
}

/// Nothing waits in a buffer here: that the programs stand still is seen by what they have not counted.
fn drops() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let run = Netprobe::new("drops")
        .args(["--by", "port", "--interval", "1", "--output-json"])
        .args(["--filter-proto", "udp"])
        .netns(&net.server)
        .start()?;
    let send = |port| net.client.udp_send(net.server.v4(port), b"x").map(|_| ());
    wait_for("the first drop", || {
        send(4000)?;
        Ok(run.stdout().contains("\"dport\":4000").then_some(()))
    })?;
    wait_clock(&run)?;
    run.signal(Signal::SIGSTOP)?;
    let fields = || -> Result<u32> {
        let path = format!("/sys/fs/bpf/netprobe/drops-{}/config", run.pid());
        let map = MapHandle::from_pinned_path(&path)?;
        let value = map.lookup(&0u32.to_ne_bytes(), MapFlags::ANY)?;
        let value = value.context("no configuration")?;
        Ok(u32::from_ne_bytes(value[4..8].try_into()?))
    };
    let paused = || Ok::<_, anyhow::Error>(fields()? & 1 << 31 != 0);
    wait_for("the pause", || Ok(paused()?.then_some(())))?;
    for _ in 0..5 {
        send(4001)?;
    }
    ensure!(paused()?, "the pause has ended");
    run.signal(Signal::SIGCONT)?;
    wait_for("the end of the pause", || Ok((!paused()?).then_some(())))?;
    wait_for("drops after it", || {
        send(4002)?;
        Ok(run.stdout().contains("\"dport\":4002").then_some(()))
    })?;
    let done = run.stop()?;
    done.expect_success()?;
    ensure!(!done.stdout.contains("\"dport\":4001"), "{done}");
    let rows = done.json()?;
    let loss = rows.iter().find(|row| row["type"] == "loss");
    let loss = loss.with_context(|| format!("no loss is told: {done}"))?;
    ensure!(loss["gap_ns"].as_u64() > Some(0), "{loss}");
    done.expect_stderr("): netprobe was stopped or behind")
}

/// The gap is in the recording, for whoever reads it.
fn record() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("run.npr");
    let run = Netprobe::new("record")
        .args(["--filter-func", "ip_output", "--filter-proto", "udp", "-o"])
        .arg(&file)
        .netns(&net.client)
        .start()?;
    let stats = map_of(&run, "stats")?;
    let traffic = || datagram(&net);
    traffic()?;
    wait_clock(&run)?;
    stop_and_wait(&run, &stats, traffic)?;
    go_on(&run, &stats, traffic)?;
    run.stop()?.expect_success()?;
    let report = Netprobe::new("report").arg(&file).run()?;
    report.expect_success()?;
    report.expect_stderr("): netprobe was stopped or behind")
}

/// The CPU whose clock asks goes offline: another one's is taken.
fn clock_goes() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let run = Netprobe::new(SKB.args[0])
        .args(&SKB.args[1..])
        .arg("--output-json")
        .netns(&net.client)
        .start()?;
    let stats = map_of(&run, "stats")?;
    let heartbeat = wait_clock(&run)?;
    let offline = Offline::take()?;
    let last = looked(&heartbeat)?;
    wait_for("another clock", || {
        Ok((looked(&heartbeat)? > last).then_some(()))
    })?;
    let traffic = || datagram(&net);
    stop_and_wait(&run, &stats, traffic)?;
    go_on(&run, &stats, traffic)?;
    drop(offline);
    let done = run.stop()?;
    done.expect_success()?;
    done.expect_stderr("): netprobe was stopped or behind")
}
