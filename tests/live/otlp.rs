//! `--otlp`: what a collector gets, one of this test's own that decodes it by OpenTelemetry's messages.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsServiceRequest;
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value::Value};
use opentelemetry_proto::tonic::logs::v1::LogRecord;
use opentelemetry_proto::tonic::metrics::v1::{
    AggregationTemporality, HistogramDataPoint, metric, number_data_point,
};
use opentelemetry_proto::tonic::trace::v1::{Span, status::StatusCode};
use prost::Message;

use crate::common::{Case, Netprobe, Pair, case, wait_for};

pub fn cases() -> Vec<Case> {
    vec![
        case("otlp_drops_are_logs", logs).once_on("6.12").trace(),
        case("otlp_counts_are_metrics", metrics)
            .once_on("6.12")
            .trace(),
        case("otlp_journeys_are_traces", traces)
            .once_on("6.12")
            .trace(),
        case("otlp_tcp_tcpconnect_icmp", other_tools)
            .once_on("6.12")
            .trace(),
        case("otlp_collector_away", away).once_on("6.12").trace(),
    ]
}

#[derive(Default)]
struct Got {
    logs: Vec<LogRecord>,
    /// name, attributes, count of each point
    points: Vec<(String, Vec<KeyValue>, i64)>,
    histograms: Vec<HistogramDataPoint>,
    spans: Vec<Span>,
    /// service.name and the scopes' names
    names: Vec<String>,
    wrong: Option<String>,
}

/// Takes all, from a thread that ends with the process.
struct Collector {
    at: SocketAddr,
    got: Arc<Mutex<Got>>,
}

impl Collector {
    /// Answers the first requests with these statuses.
    fn new(at: SocketAddr, statuses: &[&'static str]) -> Result<Self> {
        let listener = TcpListener::bind(at)?;
        let at = listener.local_addr()?;
        let got = Arc::new(Mutex::new(Got::default()));
        let to = got.clone();
        let mut statuses = statuses.to_vec();
        statuses.reverse();
        let statuses = Arc::new(Mutex::new(statuses));
        // A thread for each connection: they stay open, and several tools send at once.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (to, statuses) = (to.clone(), statuses.clone());
                std::thread::spawn(move || {
                    if let Err(e) = serve(stream, &to, &statuses) {
                        to.lock().expect("no panic").wrong = Some(format!("{e:#}"));
                    }
                });
            }
        });
        Ok(Self { at, got })
    }

    fn url(&self) -> String {
        format!("http://{}", self.at)
    }

    fn got<T>(&self, look: impl FnOnce(&Got) -> T) -> Result<T> {
        let got = self.got.lock().expect("no panic");
        ensure!(got.wrong.is_none(), "{:?}", got.wrong);
        Ok(look(&got))
    }

    fn logs(&self, name: &str) -> Result<Vec<LogRecord>> {
        let named = |l: &&LogRecord| l.event_name == name;
        self.got(|got| got.logs.iter().filter(named).cloned().collect())
    }
}

/// The requests of a connection, one after another.
fn serve(stream: TcpStream, to: &Mutex<Got>, statuses: &Mutex<Vec<&'static str>>) -> Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut stream = stream;
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            match reader.read_line(&mut head) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::ConnectionReset => return Ok(()),
                Err(e) => return Err(e.into()),
            }
        }
        let lower = head.to_lowercase();
        ensure!(
            lower.contains("content-type: application/x-protobuf\r\n"),
            "{head}"
        );
        let length = lower
            .split("content-length: ")
            .nth(1)
            .context(head.clone())?;
        let mut body = vec![0; length.lines().next().unwrap_or_default().parse()?];
        reader.read_exact(&mut body)?;
        let status = statuses.lock().expect("no panic").pop();
        let status = status.unwrap_or("200 OK");
        if status == "200 OK" {
            take(&head, &body, &mut to.lock().expect("no panic"))?;
        }
        write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n")?;
    }
}

fn take(head: &str, body: &[u8], got: &mut Got) -> Result<()> {
    let service = |r: Option<opentelemetry_proto::tonic::resource::v1::Resource>| {
        let attributes = r.map(|r| r.attributes).unwrap_or_default();
        text(&attributes, "service.name").unwrap_or_default()
    };
    match head.split(' ').nth(1) {
        Some("/v1/logs") => {
            for resource in ExportLogsServiceRequest::decode(body)?.resource_logs {
                got.names.push(service(resource.resource));
                for scope in resource.scope_logs {
                    got.names.extend(scope.scope.map(|s| s.name));
                    got.logs.extend(scope.log_records);
                }
            }
        }
        Some("/v1/metrics") => {
            let scopes = ExportMetricsServiceRequest::decode(body)?.resource_metrics;
            for metric in scopes
                .into_iter()
                .flat_map(|r| r.scope_metrics)
                .flat_map(|s| s.metrics)
            {
                let sum = match metric.data {
                    Some(metric::Data::Sum(sum)) => sum,
                    Some(metric::Data::Histogram(all)) => {
                        got.histograms.extend(all.data_points);
                        continue;
                    }
                    _ => anyhow::bail!("{} is neither a sum nor a histogram", metric.name),
                };
                // What a run counts of its own losses is since its start.
                let wanted = match metric.name.contains(".loss.") {
                    true => AggregationTemporality::Cumulative,
                    false => AggregationTemporality::Delta,
                };
                ensure!(sum.aggregation_temporality == wanted as i32);
                for point in sum.data_points {
                    ensure!(point.start_time_unix_nano < point.time_unix_nano);
                    if let Some(number_data_point::Value::AsInt(n)) = point.value {
                        got.points.push((metric.name.clone(), point.attributes, n));
                    }
                }
            }
        }
        Some("/v1/traces") => {
            let resources = ExportTraceServiceRequest::decode(body)?.resource_spans;
            let scopes = resources.into_iter().flat_map(|r| r.scope_spans);
            got.spans.extend(scopes.flat_map(|s| s.spans));
        }
        _ => anyhow::bail!("{head}"),
    }
    Ok(())
}

fn text(attributes: &[KeyValue], key: &str) -> Option<String> {
    let attribute = attributes.iter().find(|a| a.key == key)?;
    match attribute.value.as_ref()?.value.as_ref()? {
        Value::StringValue(text) => Some(text.clone()),
        Value::IntValue(number) => Some(number.to_string()),
        _ => None,
    }
}

fn now() -> Result<u64> {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    Ok(since.as_nanos() as u64)
}

fn loopback() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

/// A record for each drop, with the packet's addresses and the time; nothing is on stdout.
fn logs() -> Result<()> {
    let net = Pair::new()?;
    let collector = Collector::new(loopback(), &[])?;
    let before = now()?;
    let run = Netprobe::new("skb").args(["--drops", "--otlp", &collector.url(), "udp port 9"]);
    let run = run.start()?;
    let mut ports = Vec::new();
    for _ in 0..20 {
        ports.push(
            net.client
                .udp_send(net.server.v4(9), b"nobody")?
                .to_string(),
        );
    }
    let done = run.stop()?;
    done.expect_success()?;
    ensure!(done.stdout.is_empty(), "{done}");
    let logs = collector.logs("netprobe.skb.drop")?;
    let mut sources = Vec::new();
    for log in &logs {
        let of = |key: &str| text(&log.attributes, key).unwrap_or_default();
        ensure!(
            of("destination.port") == "9" && of("network.transport") == "udp",
            "{log:#?}"
        );
        ensure!(
            of("source.address") == net.client.v4(0).ip().to_string(),
            "{log:#?}"
        );
        ensure!(
            (before..now()?).contains(&log.time_unix_nano),
            "{before} {log:#?}"
        );
        ensure!(log.severity_text == "WARN", "{log:#?}");
        sources.push(of("source.port"));
    }
    ensure!(sources == ports, "{sources:?} {ports:?} {done}");
    let names = collector.got(|got| got.names.clone())?;
    ensure!(
        names.contains(&"netprobe skb".to_owned()) && names.contains(&"netprobe".to_owned()),
        "{names:?}"
    );
    Ok(())
}

/// The sum of all points of a row is what was lost.
fn metrics() -> Result<()> {
    let net = Pair::new()?;
    let collector = Collector::new(loopback(), &[])?;
    let run = Netprobe::new("drops")
        .args(["-i", "1", "--max-cpu", "80", "--otlp", &collector.url()])
        .args(["--filter-netns", &net.server.path().to_string_lossy()]);
    let run = run.start()?;
    let sum = || -> Result<i64> {
        let counted = |(name, of, _): &&(String, Vec<KeyValue>, i64)| {
            name == "netprobe.drops.drops.packets"
                && text(of, "destination.port").as_deref() == Some("9")
        };
        collector.got(|got| got.points.iter().filter(counted).map(|p| p.2).sum())
    };
    for round in 1..3 {
        for _ in 0..10 {
            net.client.udp_send(net.server.v4(9), b"nobody")?;
        }
        wait_for("the drops of a round", || {
            Ok((sum()? == 10 * round).then_some(()))
        })?;
    }
    let done = run.stop()?;
    done.expect_success()?;
    ensure!(done.stdout.is_empty() && sum()? == 20, "{done}");
    let lost = collector.got(|got| {
        let lost = got
            .points
            .iter()
            .filter(|p| p.0 == "netprobe.drops.table.lost");
        lost.map(|p| p.2).sum::<i64>()
    })?;
    ensure!(lost >= 20, "{lost}");
    Ok(())
}

/// A trace for each way; that of a loss is an error, at the stage where it was lost.
fn traces() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let collector = Collector::new(loopback(), &[])?;
    let open = net.server.udp_bind(net.server.v4(0))?;
    let good = open.local_addr()?;
    let expression = format!("udp port 9 or udp port {}", good.port());
    let run = Netprobe::new("why")
        .args(["--otlp", &collector.url(), &expression])
        .start()?;
    let before = now()?;
    net.client.udp_send(net.server.v4(9), b"nobody")?;
    net.client.udp_send(good, b"somebody")?;
    open.recv_from(&mut [0; 64])?;
    let done = run.stop()?;
    done.expect_success()?;
    ensure!(done.stdout.is_empty(), "{done}");
    let spans = collector.got(|got| got.spans.clone())?;
    let root = |port: u16| {
        let port = port.to_string();
        let to = |s: &&Span| text(&s.attributes, "destination.port").as_ref() == Some(&port);
        spans
            .iter()
            .filter(|s| s.parent_span_id.is_empty())
            .find(to)
    };
    for (port, code) in [(9, StatusCode::Error), (good.port(), StatusCode::Unset)] {
        let whole = root(port).with_context(|| format!("port {port}: {spans:#?}"))?;
        let status = whole.status.clone().context("no status")?;
        ensure!(
            status.code == code as i32 && !status.message.is_empty(),
            "{whole:#?}"
        );
        let time = whole.start_time_unix_nano..=whole.end_time_unix_nano;
        ensure!(*time.start() > before && *time.end() < now()?, "{whole:#?}");
        let inner = spans.iter().filter(|s| s.parent_span_id == whole.span_id);
        let stages: Vec<&Span> = inner.collect();
        ensure!(stages.len() >= 3, "{spans:#?}");
        for stage in &stages {
            ensure!(stage.trace_id == whole.trace_id && stage.trace_id.len() == 16);
            ensure!(
                time.contains(&stage.start_time_unix_nano),
                "{stage:#?} {whole:#?}"
            );
            ensure!(
                time.contains(&stage.end_time_unix_nano),
                "{stage:#?} {whole:#?}"
            );
        }
        let failed = stages.iter().filter(|s| s.status.is_some()).count();
        ensure!(failed == usize::from(port == 9), "{stages:#?}");
    }
    let (a, b) = (
        root(9).map(|s| &s.trace_id),
        root(good.port()).map(|s| &s.trace_id),
    );
    ensure!(a != b, "one trace for two ways");
    Ok(())
}

/// A connection, its connect and an echo.
fn other_tools() -> Result<()> {
    let net = Pair::new()?;
    let server = net.server.tcp_listen(net.server.v4(0))?;
    let port = server.address().port().to_string();
    let collector = Collector::new(loopback(), &[])?;
    let mut runs = Vec::new();
    for tool in ["tcp", "tcpconnect", "icmp", "icmp --histogram"] {
        let mut words = tool.split(' ');
        let run = Netprobe::new(words.next().unwrap_or_default()).args(words);
        runs.push(run.args(["--otlp", &collector.url()]).start()?);
    }
    let connect = net
        .client
        .tcp_connect(server.address(), crate::common::deadline())?;
    drop(connect.context("connect")?);
    ensure!(net.client.ping(net.server.v4(0), 1)?, "ping");
    let to = |log: &LogRecord, key: &str| text(&log.attributes, key).as_ref() == Some(&port);
    wait_for("records of all three", || {
        let connects = collector.logs("netprobe.tcpconnect.connect")?;
        let ends = collector.logs("netprobe.tcp.connection")?;
        let echoes = collector.logs("netprobe.icmp.echo")?;
        let all = connects.iter().any(|l| to(l, "destination.port"))
            && ends.iter().any(|l| to(l, "network.peer.port"))
            && !echoes.is_empty();
        Ok(all.then_some(()))
    })?;
    for run in runs {
        let done = run.stop()?;
        done.expect_success()?;
        ensure!(done.stdout.is_empty(), "{done}");
    }
    // At its end: the one echo, in the histogram of each stage.
    let stages = collector.got(|got| got.histograms.clone())?;
    ensure!(
        !stages.is_empty() && stages.iter().all(|p| p.count == 1),
        "{stages:#?}"
    );
    Ok(())
}

/// A collector that comes late, and says no at first, gets all; without one the run ends, and says how many rows are lost.
fn away() -> Result<()> {
    let net = Pair::new()?;
    let at = TcpListener::bind(loopback())?.local_addr()?;
    let url = format!("http://{at}");
    let skb = || {
        Netprobe::new("skb")
            .args(["--drops", "--otlp", &url, "udp port 9"])
            .start()
    };
    let lose = || -> Result<()> {
        for _ in 0..5 {
            net.client.udp_send(net.server.v4(9), b"nobody")?;
        }
        Ok(())
    };
    let run = skb()?;
    lose()?;
    run.wait_stderr(&format!("netprobe: {url}: "))?;
    let collector = Collector::new(at, &["503 Service Unavailable"])?;
    run.wait_stderr("it takes rows again")?;
    let done = run.stop()?;
    done.expect_success()?;
    done.expect_stderr("503 Service Unavailable")?;
    let logs = collector.logs("netprobe.skb.drop")?;
    ensure!(
        logs.len() == 5 && !done.stderr.contains("not delivered"),
        "{} {done}",
        logs.len()
    );

    let silent = TcpListener::bind(loopback())?;
    let url = format!("http://{}", silent.local_addr()?);
    drop(silent);
    let run = Netprobe::new("skb")
        .args(["--drops", "--otlp", &url, "udp port 9"])
        .start()?;
    lose()?;
    run.wait_stderr(&format!("netprobe: {url}: "))?;
    let done = run.stop()?;
    done.expect_stderr(&format!(
        "netprobe: 5 rows were not delivered to {url}, 0 were"
    ))?;
    Ok(())
}
