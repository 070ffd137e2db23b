//! `netprobe latency`: delays made on purpose, each in the stage that it belongs to.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    self, AddressFamily, SockFlag, SockType, SockaddrStorage, setsockopt, sockopt,
};
use nix::unistd::Pid;
use serde_json::Value;

use super::who::{Container, Pod, run_in};
use crate::common::{Case, Finished, Netns, Netprobe, Pair, Running, case, wait_for};

pub fn cases() -> Vec<Case> {
    vec![
        case("latency_stages", || stages(Netprobe::new("latency"))).trace(),
        case("latency_stages_without_btf", || {
            stages(Netprobe::new("latency").types_by_file()?)
        })
        .once_on("6.1")
        .trace(),
        case("latency_tables_and_filters", tables)
            .once_on("5.10")
            .trace(),
        case("latency_whose", whose)
            .once_on("5.10")
            .trace()
            .program("nc"),
        case("latency_ways", ways).once_on("6.1").trace(),
        case("latency_culprits", culprits)
            .once_on("newest")
            .trace()
            .program("nc"),
        case("latency_requests", requests).once_on("newest").trace(),
        // An XDP program makes veth hand packets on by GRO.
        case("latency_gro", gro)
            .old_and_new()
            .trace()
            .xdp()
            .kernel(5, 18),
    ]
}

/// What a delay is, ms.
const DELAY: u64 = 60;

pub fn start(args: &[&str]) -> Result<Running> {
    Netprobe::new("latency")
        .arg("--output-json")
        .args(args)
        .start()
}

fn tcp_pair(net: &Pair, to: SocketAddr) -> Result<(TcpStream, TcpStream)> {
    let listener = net.server.enter(|| TcpListener::bind(to))??;
    let client = net.client.enter(|| TcpStream::connect(to))??;
    client.set_nodelay(true)?;
    Ok((client, listener.accept()?.0))
}

/// The same from an address; a port of 0 is any.
fn tcp_pair_from(
    net: &Pair,
    from: Option<SocketAddr>,
    to: SocketAddr,
) -> Result<(TcpStream, TcpStream)> {
    let Some(from) = from else {
        return tcp_pair(net, to);
    };
    let listener = net.server.enter(|| TcpListener::bind(to))??;
    let client = net.client.enter(|| -> Result<TcpStream> {
        let fd = socket::socket(
            AddressFamily::Inet,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        socket::bind(fd.as_raw_fd(), &SockaddrStorage::from(from))?;
        socket::connect(fd.as_raw_fd(), &SockaddrStorage::from(to))?;
        Ok(TcpStream::from(fd))
    })??;
    client.set_nodelay(true)?;
    Ok((client, listener.accept()?.0))
}

fn udp_pair(net: &Pair, to: SocketAddr) -> Result<(UdpSocket, UdpSocket)> {
    let server = net.server.udp_bind(to)?;
    let any: SocketAddr = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse()?;
    let client = net.client.udp_bind(any)?;
    client.connect(to)?;
    Ok((client, server))
}

fn ms(ns: &Value) -> u64 {
    ns.as_u64().unwrap_or(0) / 1_000_000
}

/// ms that a packet spent in a stage; 0 where it did not pass it.
pub fn spent(packet: &Value, stage: &str) -> u64 {
    let stages = packet["stages"].as_array();
    let found = stages.and_then(|all| all.iter().find(|s| s["stage"] == stage));
    found.map_or(0, |s| ms(&s["ns"]))
}

/// The slow packet to (or from) this port that goes this way; its stages add up to its total.
pub fn slow(run: &Running, way: &str, port: u16, len: Option<u64>) -> Result<Value> {
    let what = format!("a slow packet, {way}, port {port}");
    let found = run.wait_lines(&what, |text| {
        let mut lines = text
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.find(|p| {
            p["type"] == "packet"
                && p["way"] == way
                && (p["dport"] == port || p["sport"] == port)
                && len.is_none_or(|len| p["len"].as_u64() >= Some(len))
        })
    });
    let packet = found.with_context(|| run.stdout())?;
    let stages = packet["stages"].as_array().context("no stages")?;
    let sum: u64 = stages.iter().filter_map(|s| s["ns"].as_u64()).sum();
    ensure!(packet["total_ns"] == sum, "{packet} adds up to {sum}");
    Ok(packet)
}

/// The delay is in this stage, more than in all others, and no longer than the test itself took since then.
fn delayed_in(packet: &Value, stage: &str, since: Instant) -> Result<()> {
    let (here, total) = (spent(packet, stage), ms(&packet["total_ns"]));
    let most = since.elapsed().as_millis() as u64;
    ensure!(
        here >= DELAY && 2 * here > total && total <= most,
        "not delayed in {stage}, or more than {most} ms: {packet}"
    );
    Ok(())
}

/// By trampolines; by kprobes, where the kernel makes none.
fn stages(latency: Netprobe<'_>) -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let device = Pair::IFACE;
    let run = latency
        .args(["--output-json", "--min-us", &min_us()])
        .start()?;

    for v6 in [false, true] {
        // Of its own, so that a packet of the other family is not taken for it.
        let ports = [7001, 7002, 7003, 7004].map(|port| port + u16::from(v6) * 100);
        let at = |port| match v6 {
            true => net.server.v6(port),
            false => net.server.v4(port),
        };
        let [late_udp, late_tcp, queued_udp, queued_tcp] = ports;
        // The reader of a datagram, and of a segment, is late.
        let (client, server) = udp_pair(&net, at(late_udp))?;
        let since = Instant::now();
        client.send(b"late")?;
        busy_elsewhere(DELAY);
        server.recv(&mut [0; 16])?;
        let packet = slow(&run, "in", late_udp, None)?;
        delayed_in(&packet, "socket", since)?;
        ensure!(packet["pid"] == std::process::id(), "{packet}");
        ensure!(packet["netns"] == net.server.inode()?, "{packet}");

        let (mut client, mut server) = tcp_pair(&net, at(late_tcp))?;
        let since = Instant::now();
        client.write_all(b"late")?;
        busy_elsewhere(DELAY);
        server.read_exact(&mut [0; 4])?;
        let packet = slow(&run, "in", late_tcp, None)?;
        delayed_in(&packet, "socket", since)?;
        ensure!(
            packet["pid"] == std::process::id() && packet["hole"] == false,
            "{packet}"
        );

        // A queue of the device holds them back.
        net.client.cmd(&format!(
            "tc qdisc add dev {device} root netem delay {DELAY}ms"
        ))?;
        let (client, server) = udp_pair(&net, at(queued_udp))?;
        let since = Instant::now();
        client.send(b"queued")?;
        server.recv(&mut [0; 16])?;
        let packet = slow(&run, "out", queued_udp, None)?;
        delayed_in(&packet, "qdisc", since)?;
        ensure!(packet["pid"] == std::process::id(), "{packet}");
        let (mut client, mut server) = tcp_pair(&net, at(queued_tcp))?;
        let since = Instant::now();
        // More than a frame has: GSO.
        client.write_all(&[7; 9000])?;
        server.read_exact(&mut [0; 9000])?;
        let packet = slow(&run, "out", queued_tcp, Some(2000))?;
        delayed_in(&packet, "qdisc", since)?;
        net.client.cmd(&format!("tc qdisc del dev {device} root"))?;
    }
    let done = run.stop()?;
    done.expect_success()?;
    ensure!(done.json_of("loss")?.is_empty(), "{done}");
    // Each place is watched.
    ensure!(!done.stderr.contains("not seen"), "{done}");
    Ok(())
}

/// A process does something else for so long: the delay that the test is about, not a wait for something to happen.
fn busy_elsewhere(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

fn min_us() -> String {
    (DELAY * 1000 - 5000).to_string()
}

/// Packets of a row of all tables.
pub fn count(done: &Finished, way: &str, stage: &str) -> Result<u64> {
    let rows = done.json_of("latency")?;
    let rows = rows
        .iter()
        .filter(|r| r["way"] == way && r["stage"] == stage);
    Ok(rows.filter_map(|row| row["packets"].as_u64()).sum())
}

fn tables() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let args = ["--filter-proto", "udp", "--filter-dst-port", "7010", "--by"];
    let run = start(&[&args[..], &["process", "--metrics-listen", "0", "-i", "1"]].concat())?;
    let between = start(&[
        "--from",
        "ip_local_deliver",
        "--to",
        "udp_rcv",
        "udp port 7010",
    ])?;
    let (client, server) = udp_pair(&net, net.server.v4(7010))?;
    let (other, others) = udp_pair(&net, net.server.v4(7011))?;
    for _ in 0..20 {
        client.send(b"x")?;
        server.recv(&mut [0; 16])?;
        other.send(b"x")?;
        others.recv(&mut [0; 16])?;
    }
    let line = run.wait_stderr("metrics at http://")?;
    let address = line.split("http://").nth(1).context("no address")?;
    let address = address.trim().trim_end_matches("/metrics").to_owned();
    let want = "netprobe_latency_seconds_count{way=\"in\",stage=\"total\"";
    let text = wait_for("the histograms", || {
        let mut stream = TcpStream::connect(&address)?;
        write!(stream, "GET /metrics HTTP/1.1\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let line = text.lines().find(|line| line.starts_with(want));
        Ok(line.filter(|line| line.ends_with(" 20")).map(str::to_owned))
    })
    .with_context(|| run.stdout())?;
    ensure!(
        text.contains(&format!("[{}]", std::process::id())),
        "{text}"
    );
    let done = run.stop()?;
    done.expect_success()?;
    for stage in ["softirq", "ip", "transport", "queue", "socket", "total"] {
        ensure!(count(&done, "in", stage)? == 20, "in, {stage}: {done}");
    }
    for stage in ["write", "output", "qdisc", "total"] {
        ensure!(count(&done, "out", stage)? == 20, "out, {stage}: {done}");
    }
    let by = |row: &Value| {
        let by = row["by"].as_str().unwrap_or_default();
        by.contains(&format!("[{}]", std::process::id()))
    };
    ensure!(done.json_of("latency")?.iter().any(by), "{done}");
    let done = between.stop()?;
    done.expect_success()?;
    ensure!(count(&done, "between", "between")? == 20, "{done}");

    for by in ["cpu", "device", "port", "container"] {
        let run = start(&["--by", by, "--once", "-i", "1", "udp port 7010"])?;
        client.send(b"x")?;
        server.recv(&mut [0; 16])?;
        let done = run.wait()?;
        done.expect_success()?;
        let rows = done.json_of("latency")?;
        let row = rows
            .iter()
            .find(|r| r["way"] == "in" && r["stage"] == "total");
        let name = row.and_then(|row| row["by"].as_str()).unwrap_or_default();
        let right = match by {
            "port" => name == "7010",
            "device" => name.starts_with("veth0@"),
            "cpu" => name.parse::<u32>().is_ok(),
            _ => !name.is_empty(),
        };
        ensure!(right, "--by {by}: {done}");
    }
    let refused = Netprobe::new("latency").args(["--from", "no_such_function", "--to", "udp_rcv"]);
    refused.run()?.expect_code(2)?;
    let refused = Netprobe::new("latency").args(["--container", "npt-nobody"]);
    refused.run()?.expect_code(2)
}

/// Packets that a process like this reads or writes.
fn whose() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let web = Container::new("npt-latency", "a3")?;
    let pod = Pod::new("npt", "lat-1", "0b3c1d52-4a7e-4f0e-9d5f-2f6c1d0e7a12")?;
    let me = std::process::id().to_string();
    let filters: [&[&str]; 5] = [
        &["--pid", &me, "--uid", "0", "--cgroup", "/sys/fs/cgroup"],
        &["--comm", "nobody-has-it"],
        &["--pid", "1"],
        &["--container", "npt-latency"],
        &["--pod", "npt/lat-1"],
    ];
    let start = |filter: &&[&str]| start(&[filter, &["-i", "100", "port 7010"][..]].concat());
    let runs: Vec<Running> = filters.iter().map(start).collect::<Result<_>>()?;
    let (client, server) = udp_pair(&net, net.server.v4(7010))?;
    for _ in 0..5 {
        client.send(b"x")?;
        server.recv(&mut [0; 16])?;
    }
    // And one that a process of the container, and of the pod, writes, which this process reads.
    let to = net.server.v4(0).ip();
    let send = format!("/bin/sh -c 'echo x | nc {to} 7010'");
    for cgroup in [&web.cgroup, &pod.container] {
        let listener = net
            .server
            .enter(|| TcpListener::bind(net.server.v4(7010)))??;
        let reader = std::thread::spawn(move || listener.accept()?.0.read_exact(&mut [0; 2]));
        run_in(cgroup, &net.client, &send)?;
        reader.join().expect("the reader ends")?;
    }
    let wanted = [(7, 5), (0, 0), (0, 0), (0, 1), (0, 1)];
    for (run, (incoming, outgoing)) in runs.into_iter().zip(wanted) {
        let done = run.stop()?;
        done.expect_success()?;
        for (way, wanted) in [("in", incoming), ("out", outgoing)] {
            ensure!(
                count(&done, way, "total")? == wanted,
                "{way}: {wanted}: {done}"
            );
        }
    }
    Ok(())
}

/// From one device to another, through a tunnel, and by a bridge.
fn ways() -> Result<()> {
    let net = Pair::new()?;
    let far = Netns::new("far")?;
    net.server.ip(&format!(
        "link add veth1 type veth peer name veth0 netns {}",
        far.name()
    ))?;
    net.server.ip("addr add 10.78.0.1/24 dev veth1")?;
    net.server.ip("link set veth1 up")?;
    far.ip("addr add 10.78.0.2/24 dev veth0")?;
    far.ip("link set veth0 up")?;
    far.ip("route add default via 10.78.0.1")?;
    net.server.sysctl("net/ipv4/ip_forward", "1")?;
    net.client.ip("route add 10.78.0.0/24 via 10.77.0.2")?;
    for (netns, id, remote) in [(&net.client, 1, 2), (&net.server, 2, 1)] {
        netns.ip(&format!(
            "link add vx0 type vxlan id 7 remote 10.77.0.{remote} local 10.77.0.{id} dstport 4789 dev veth0"
        ))?;
        netns.ip("link add br0 type bridge")?;
        netns.ip("link set vx0 master br0")?;
        netns.ip(&format!("addr add 10.79.0.{id}/24 dev br0"))?;
        netns.ip("link set vx0 up")?;
        netns.ip("link set br0 up")?;
    }
    // Neighbours are known before anything is delayed.
    net.client.ping(SocketAddr::from(([10, 78, 0, 2], 0)), 1)?;
    net.client.ping(SocketAddr::from(([10, 79, 0, 2], 0)), 1)?;
    net.server.cmd(&format!(
        "tc qdisc add dev veth1 root netem delay {DELAY}ms"
    ))?;
    let run = start(&["--min-us", &min_us()])?;
    let server = far.udp_bind(SocketAddr::from(([10, 78, 0, 2], 7020)))?;
    let since = Instant::now();
    net.client.udp_send(server.local_addr()?, b"forwarded")?;
    server.recv(&mut [0; 16])?;
    let packet = slow(&run, "through", 7020, None)?;
    delayed_in(&packet, "qdisc", since)?;

    net.client.cmd(&format!(
        "tc qdisc add dev veth0 root netem delay {DELAY}ms"
    ))?;
    let inner = SocketAddr::from(([10, 79, 0, 2], 7021));
    let server = net.server.udp_bind(inner)?;
    let since = Instant::now();
    net.client.udp_send(inner, b"tunnelled")?;
    busy_elsewhere(DELAY);
    busy_elsewhere(DELAY);
    server.recv(&mut [0; 16])?;
    // The bridge, the tunnel and the device below it: one packet, known by its outer or inner ports.
    let outs = run.wait_lines("the tunnelled packet", |text| {
        let lines = text
            .lines()
            .filter_map(|l| serde_json::from_str::<Value>(l).ok());
        let mut outs = lines.filter(|p| p["way"] == "out" && spent(p, "qdisc") >= DELAY);
        outs.find(|p| p["dport"] == 7021 || p["dport"] == 4789)
    })?;
    delayed_in(&outs, "qdisc", since)?;
    let packet = slow(&run, "in", 7021, None)?;
    ensure!(spent(&packet, "socket") >= DELAY - 5, "{packet}");
    let passed = packet["stages"].as_array().context("no stages")?;
    ensure!(passed.iter().any(|s| s["stage"] == "device"), "{packet}");
    run.stop()?.expect_success()
}

/// The reason of the slow packet of this port.
fn reason(run: &Running, way: &str, port: u16, rule: &str) -> Result<Value> {
    let what = format!("a packet, {way}, port {port}, with {rule}");
    let found = run.wait_lines(&what, |text| {
        let mut lines = text
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.find(|p| {
            p["way"] == way
                && (p["dport"] == port || p["sport"] == port)
                && p["why"]["rule"] == rule
        })
    });
    found.with_context(|| run.stdout())
}

pub fn says(packet: &Value, words: &str) -> Result<()> {
    let text = packet["why"]["text"].as_str().unwrap_or_default();
    ensure!(text.contains(words), "not \"{words}\": {packet}");
    Ok(())
}

fn culprits() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let run = start(&["--min-us", &min_us(), "--culprit"])?;

    // The reader sleeps; its second read is late.
    let (client, server) = udp_pair(&net, net.server.v4(7031))?;
    client.send(b"first")?;
    server.recv(&mut [0; 16])?;
    client.send(b"second")?;
    busy_elsewhere(DELAY);
    server.recv(&mut [0; 16])?;
    let packet = reason(&run, "in", 7031, "reader-slept")?;
    says(&packet, "nanosleep")?;

    // The reader is stopped.
    let mut nc = Command::new("nc");
    nc.args(["-l", "-p", "7032"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut nc = net.server.enter(|| nc.spawn())??;
    let to = net.server.v4(7032);
    let mut client = wait_for("nc", || {
        Ok(net.client.tcp_connect(to, Duration::from_secs(5))?.ok())
    })?;
    client.write_all(b"first\n")?;
    nc.stdout
        .as_mut()
        .context("no stdout")?
        .read_exact(&mut [0; 6])?;
    let pid = Pid::from_raw(nc.id() as i32);
    kill(pid, Signal::SIGSTOP)?;
    client.write_all(b"second\n")?;
    busy_elsewhere(DELAY);
    kill(pid, Signal::SIGCONT)?;
    nc.stdout
        .as_mut()
        .context("no stdout")?
        .read_exact(&mut [0; 7])?;
    let packet = reason(&run, "in", 7032, "reader-stopped")?;
    says(&packet, &format!("nc[{}] was stopped", nc.id()))?;
    nc.kill()?;
    nc.wait()?;

    // The reader is busy.
    let (client, server) = udp_pair(&net, net.server.v6(7033))?;
    client.send(b"first")?;
    server.recv(&mut [0; 16])?;
    client.send(b"second")?;
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(DELAY) {
        std::hint::black_box(0);
    }
    server.recv(&mut [0; 16])?;
    reason(&run, "in", 7033, "reader-ran")?;

    // The window of the peer is shut.
    let listener = net
        .server
        .enter(|| TcpListener::bind(net.server.v4(7034)))??;
    setsockopt(&listener, sockopt::RcvBuf, &8192)?;
    let to = listener.local_addr()?;
    let mut client = net.client.enter(|| TcpStream::connect(to))??;
    let mut server = listener.accept()?.0;
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| client.write_all(&[7; 300_000]));
        busy_elsewhere(DELAY);
        busy_elsewhere(DELAY);
        server.read_exact(&mut vec![0; 300_000])?;
        writer.join().map_err(|_| anyhow::anyhow!("the writer"))??;
        anyhow::Ok(())
    })?;
    reason(&run, "out", 7034, "write-window")?;

    // A flow fills the queue; another one waits.
    net.client
        .cmd("tc qdisc add dev veth0 root tbf rate 2mbit burst 3000 limit 100000")?;
    let (filler, _filled) = udp_pair(&net, net.server.v4(7035))?;
    let (client, server) = udp_pair(&net, net.server.v4(7036))?;
    let since = Instant::now();
    for _ in 0..30 {
        filler.send(&[0; 1000])?;
    }
    client.send(b"behind")?;
    server.recv(&mut [0; 16])?;
    let packet = reason(&run, "out", 7036, "qdisc-flow")?;
    says(&packet, ":7035(udp)")?;
    says(&packet, "in the queue tbf of veth0@")?;
    // 30 frames of 1,042 bytes at 2 Mbit/s, but for the burst.
    let took = spent(&packet, "qdisc");
    let most = since.elapsed().as_millis() as u64;
    ensure!((100..=most).contains(&took), "of {most} ms: {packet}");
    run.stop()?.expect_success()
}

fn requests() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let run = start(&["--requests", "--min-us", &min_us(), "-i", "100"])?;
    for to in [net.server.v4(7041), net.server.v6(7042)] {
        let (mut client, mut server) = tcp_pair(&net, to)?;
        let since = Instant::now();
        for delay in [0, DELAY] {
            client.write_all(b"GET")?;
            server.read_exact(&mut [0; 3])?;
            busy_elsewhere(delay);
            server.write_all(b"200")?;
            client.read_exact(&mut [0; 3])?;
        }
        for way in ["serves", "asks"] {
            let request = slow(&run, way, to.port(), None)?;
            // The end that asks knows the time of the other one but for the smoothed round trip.
            let (rule, took) = match way {
                "serves" => ("requests-served", spent(&request, "process")),
                _ => {
                    let took = spent(&request, "process") + spent(&request, "network");
                    ("requests-asked", took + 1)
                }
            };
            let most = since.elapsed().as_millis() as u64 + 1;
            ensure!((DELAY..=most).contains(&took), "of {most} ms: {request}");
            ensure!(request["why"]["rule"] == rule, "{request}");
            says(&request, " took ")?;
            ensure!(request["dport"] == to.port(), "{request}");
        }
        // Two requests at once: the first answer leaves while the second is unread.
        client.write_all(b"1")?;
        client.write_all(b"2")?;
        wait_for("both requests", || {
            Ok((server.peek(&mut [0; 8])? == 2).then_some(()))
        })?;
        server.read_exact(&mut [0; 1])?;
        server.write_all(b"a")?;
        client.read_exact(&mut [0; 1])?;
    }
    // The end that accepts serves, whatever the ports.
    let at = |ip: std::net::IpAddr, port| SocketAddr::new(ip, port);
    for (from, known) in [
        (Some(at(net.client.v4(0).ip(), 7044)), true),
        (Some(at(net.client.v4(0).ip(), 0)), false),
        (None, true),
    ] {
        let to = net.server.v4(61_043);
        let (mut client, mut server) = tcp_pair_from(&net, from, to)?;
        client.write_all(b"GET")?;
        server.read_exact(&mut [0; 3])?;
        busy_elsewhere(DELAY);
        server.write_all(b"200")?;
        client.read_exact(&mut [0; 3])?;
        let port = client.local_addr()?.port();
        let served = slow(&run, "serves", port, None)?;
        ensure!(
            served["dport"] == 61_043 && served.get("by_port").is_none(),
            "{served}"
        );
        if known {
            let asked = slow(&run, "asks", port, None)?;
            ensure!(
                asked["dport"] == 61_043 && asked.get("by_port").is_none(),
                "{asked}"
            );
        }
    }
    let done = run.stop()?;
    done.expect_success()?;
    ensure!(count(&done, "serves", "process")? == 7, "{done}");
    ensure!(count(&done, "serves", "overlap")? == 2, "{done}");
    ensure!(count(&done, "asks", "total")? >= 4, "{done}");
    Ok(())
}

/// Frames that GRO merges are one packet, from when the first of them was handed over. Memory that is used again is another packet.
fn gro() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let xdp = Netprobe::new("xdpdump")
        .args(["--iface", Pair::IFACE, "--xdp-mode", "native", "udp port 9"])
        .netns(&net.server)
        .start()?;
    let run = start(&["--min-us", &min_us(), "tcp portrange 7051-7052"])?;
    for to in [net.server.v4(7051), net.server.v6(7052)] {
        let (mut client, mut server) = tcp_pair(&net, to)?;
        let since = Instant::now();
        client.write_all(&[7; 20_000])?;
        busy_elsewhere(DELAY);
        server.read_exact(&mut [0; 20_000])?;
        let packet = slow(&run, "in", to.port(), None)?;
        delayed_in(&packet, "socket", since)?;
    }
    let done = run.stop()?;
    done.expect_success()?;
    ensure!(count(&done, "in", "softirq")? > 0, "{done}");
    ensure!(count(&done, "through", "total")? == 0, "{done}");
    ensure!(!done.stderr.contains("not seen"), "{done}");
    xdp.stop()?.expect_success()
}
