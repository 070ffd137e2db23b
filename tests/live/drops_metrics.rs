//! `netprobe drops --metrics-listen` and `--max-cpu`: what is scraped, by Prometheus itself too, and what gives way.

use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::common::{Case, Netprobe, Pair, Running, case, deadline, wait_for};
use crate::who::Container;

pub fn cases() -> Vec<Case> {
    vec![
        case("drops_metrics_scraped", scraped)
            .once_on("5.10")
            .trace(),
        case("drops_metrics_containers", containers)
            .once_on("6.12")
            .trace(),
        case("drops_metrics_prometheus", prometheus)
            .once_on("6.12")
            .trace()
            .program("prometheus")
            .limit(180),
        case("drops_max_cpu", max_cpu).once_on("6.12").trace(),
    ]
}

const SENT: u64 = 30;

/// One UDP datagram a port: nobody listens there.
fn lose(net: &Pair, ports: std::ops::Range<u16>) -> Result<()> {
    net.client.enter(|| -> Result<()> {
        for port in ports {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            let _ = socket.send_to(b"to be lost", net.server.v4(port));
        }
        Ok(())
    })?
}

pub fn begin(args: &[&str]) -> Result<(Running, String)> {
    let run = Netprobe::new("drops")
        .args(["--metrics-listen", "0", "-i", "1", "--max-cpu", "80"])
        .args(args)
        .start()?;
    let line = run.wait_stderr("metrics at http://")?;
    let url = line.split("http://").nth(1).context("no address")?;
    let address = url.trim().trim_end_matches("/metrics").to_owned();
    ensure!(address.starts_with("127.0.0.1:"), "{line}");
    Ok((run, address))
}

/// The whole answer.
pub fn get(address: &str, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(deadline()))?;
    let host = address.split(':').next().unwrap_or_default();
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    )?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// The value of the first series of this name with all of these labels.
pub fn value(text: &str, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
    let fits = |line: &&str| {
        line.starts_with(name)
            && labels
                .iter()
                .all(|(label, value)| line.contains(&format!("{label}=\"{value}\"")))
    };
    let line = text.lines().find(fits)?;
    line.rsplit(' ').next()?.parse().ok()
}

/// Drops in a container's namespace have its name, in rows and as a label; in another namespace they have none.
fn containers() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let web = Container::new("npt-drops", "b1")?;
    let script = format!("echo 0 > {}/cgroup.procs && exec cat", web.cgroup.display());
    let mut inside = net.server.enter(|| {
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", &script]).stdin(Stdio::piped()).spawn()
    })??;
    wait_for("a process in the container", || {
        let procs = std::fs::read_to_string(web.cgroup.join("cgroup.procs"))?;
        Ok((!procs.is_empty()).then_some(()))
    })?;
    let (run, address) = begin(&["--output-json"])?;
    lose(&net, 7000..7001)?;
    let other = net.client.v4(7002);
    net.server.udp_send(other, b"to be lost")?;
    let line = run.wait_line("\"dport\":7000")?;
    ensure!(line.contains("\"container\":\"npt-drops\""), "{line}");
    let line = run.wait_line("\"dport\":7002")?;
    ensure!(line.contains("\"container\":null"), "{line}");
    let (server, client) = (net.server.name().to_owned(), net.client.name().to_owned());
    for (netns, container) in [(server, "npt-drops"), (client, "")] {
        let labels = [("netns", netns.as_str()), ("container", container)];
        wait_for("the container's series", || {
            let text = get(&address, "/metrics")?;
            Ok(value(&text, "netprobe_drops_total", &labels).filter(|n| *n == 1.0))
        })?;
    }
    run.stop()?.expect_success()?;
    drop(inside.stdin.take());
    inside.wait()?;
    Ok(())
}

fn scraped() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let (run, address) = begin(&[])?;
    lose(&net, 7000..7000 + SENT as u16)?;
    let name = net.server.name().to_owned();
    let labels = [
        ("class", "socket"),
        ("rule", "NO_SOCKET"),
        ("netns", name.as_str()),
        ("interface", "veth0"),
    ];
    let text = wait_for("the drops in the metrics", || {
        let text = get(&address, "/metrics")?;
        let found = value(&text, "netprobe_drops_total", &labels);
        Ok((found == Some(SENT as f64)).then_some(text))
    })?;
    ensure!(
        text.contains("200 OK") && text.trim_end().ends_with("# EOF"),
        "{text}"
    );
    let counter = [("counter", "UdpNoPorts"), ("netns", name.as_str())];
    let counted = value(&text, "netprobe_kernel_counter_total", &counter);
    ensure!(counted == Some(SENT as f64), "{counted:?}: {text}");
    for metric in [
        "netprobe_unexplained_packets ",
        "netprobe_missed_drops_total ",
    ] {
        ensure!(value(&text, metric, &[]) == Some(0.0), "{metric}: {text}");
    }
    for metric in [
        "process_cpu_seconds_total ",
        "process_resident_memory_bytes ",
    ] {
        ensure!(value(&text, metric, &[]) > Some(0.0), "{metric}: {text}");
    }
    ensure!(get(&address, "/other")?.contains(" 404 "), "no such page");
    // With its interface a series goes; the sum stays.
    drop(net);
    let text = wait_for("the series to go", || {
        let text = get(&address, "/metrics")?;
        let stale = text.contains(&name);
        Ok((!stale).then_some(text))
    })?;
    let gone = value(
        &text,
        "netprobe_drops_total",
        &[("class", "socket"), ("netns", "gone")],
    );
    ensure!(gone == Some(SENT as f64), "{gone:?}: {text}");
    run.stop()?.expect_success()
}

/// A process that ends with its test.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Debian's Prometheus scrapes a running netprobe, and the alert of deploy/prometheus fires.
fn prometheus() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let (run, address) = begin(&[])?;
    let folder = tempfile::tempdir()?;
    let file = |name: &str| folder.path().join(name);
    std::fs::write(
        file("netprobe.rules.yml"),
        include_str!("../../deploy/prometheus/netprobe.rules.yml"),
    )?;
    std::fs::write(
        file("prometheus.yml"),
        format!(
            "global:\n  scrape_interval: 1s\n  evaluation_interval: 1s\nrule_files: [netprobe.rules.yml]\nscrape_configs:\n  - job_name: netprobe\n    static_configs: [{{targets: ['{address}']}}]\n"
        ),
    )?;
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let own = listener.local_addr()?.to_string();
    drop(listener);
    let child = Command::new("prometheus")
        .arg(format!(
            "--config.file={}",
            file("prometheus.yml").display()
        ))
        .arg(format!("--storage.tsdb.path={}", file("data").display()))
        .arg(format!("--web.listen-address={own}"))
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(file("log"))?)
        .spawn()?;
    let _server = Server(child);
    let log = || std::fs::read_to_string(file("log")).unwrap_or_default();
    // More is lost until the alert fires: a rate needs two scrapes that differ.
    let alerts = wait_for("the alert", || {
        lose(&net, 7000..7020)?;
        let answer = get(&own, "/api/v1/alerts").unwrap_or_default();
        Ok(answer.contains("\"state\":\"firing\"").then_some(answer))
    })
    .with_context(log)?;
    ensure!(
        alerts.contains("PacketsLost") && alerts.contains("NO_SOCKET"),
        "{alerts}"
    );
    let targets = get(&own, "/api/v1/targets")?;
    ensure!(targets.contains("\"health\":\"up\""), "{targets}");
    run.stop()?.expect_success()
}

/// Next to no CPU: only the twenty largest rows have an example, but each packet is counted.
fn max_cpu() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let run = Netprobe::new("drops")
        .args(["--output-json", "-i", "1", "--max-cpu", "0.0001"])
        .start()?;
    lose(&net, 7000..7000 + SENT as u16)?;
    let done = run.stop()?;
    done.expect_success()?;
    let lines = done.json()?;
    let inode = net.server.inode()?;
    let rows = lines
        .iter()
        .filter(|l| l["type"] == "drops" && l["netns"] == inode && l["class"] == "socket");
    let lost: u64 = rows.filter_map(|l| l["packets"].as_u64()).sum();
    ensure!(lost == SENT, "{lost}: {done}");
    let left_out = |l: &serde_json::Value| l["examples_left_out"].as_u64().unwrap_or(0);
    let left_out: u64 = lines.iter().map(left_out).sum();
    ensure!(left_out >= SENT - 20, "{left_out}: {done}");
    let wrong = Netprobe::new("drops").args(["--max-cpu", "0"]).run()?;
    wrong.expect_code(2)
}
