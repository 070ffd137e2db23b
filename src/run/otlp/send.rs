//! Batches of records, and how a collector is asked to take them (OTLP/HTTP, opentelemetry-proto 1.x: POST of a protobuf
//! to /v1/logs, /v1/metrics and /v1/traces).

use std::fmt;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use crossbeam_channel::{Receiver, RecvTimeoutError};
use opentelemetry_proto::tonic::collector::logs::v1::{
    ExportLogsServiceRequest, ExportLogsServiceResponse,
};
use opentelemetry_proto::tonic::collector::metrics::v1::{
    ExportMetricsServiceRequest, ExportMetricsServiceResponse,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::InstrumentationScope;
use opentelemetry_proto::tonic::logs::v1::{ResourceLogs, ScopeLogs};
use opentelemetry_proto::tonic::metrics::v1::{ResourceMetrics, ScopeMetrics};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans};
use prost::Message;
use ureq::Agent;

use crate::kernel::clock::WallClock;

use super::rows::{Records, Rows, text};

/// A batch is sent when it has so many rows, or when its first row has waited so long.
const ROWS: u64 = 1000;
const WAIT: Duration = Duration::from_secs(1);
/// For one request.
const REQUEST: Duration = Duration::from_secs(10);
/// The waits between tries of one batch; after them it is given up.
const RETRIES: [u64; 6] = [1, 2, 4, 8, 15, 30];

/// `http://HOST:PORT`, and a path before /v1 where there is one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint(String);

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `URL` of the command line.
pub fn endpoint(text: &str) -> Result<Endpoint, String> {
    if text.starts_with("https://") {
        return Err(
            "netprobe has no TLS: give http:// and a collector on this machine that sends on"
                .into(),
        );
    }
    const FORM: &str = "give http://HOST:PORT (an OpenTelemetry collector listens at 4318)";
    let uri = ureq::http::Uri::try_from(text).map_err(|e| format!("{e}: {FORM}"))?;
    if uri.scheme_str() != Some("http") || uri.host().is_none_or(str::is_empty) {
        return Err(FORM.into());
    }
    if uri.query().is_some() {
        return Err(
            "/v1/logs, /v1/metrics and /v1/traces are added to it, so it has no query".into(),
        );
    }
    Ok(Endpoint(text.trim_end_matches('/').to_owned()))
}

/// What the two threads share.
#[derive(Debug, Default)]
pub struct Shared {
    /// bytes of rows in the queue
    pub queued: AtomicUsize,
    /// rows that are not with the collector and never will be
    pub undelivered: AtomicU64,
    /// rows that the collector took
    pub delivered: AtomicU64,
}

/// Why a batch was not taken.
enum Refused {
    /// another try may help
    Now(String),
    Ever(String),
}

pub struct Sender {
    endpoint: Endpoint,
    agent: Agent,
    shared: Arc<Shared>,
    /// closed: the run is over
    over: Receiver<()>,
    resource: Resource,
    scope: InstrumentationScope,
    rows: Rows,
    batch: Records,
    /// rows in it
    count: u64,
    /// what was told last of a failure
    told: Option<String>,
}

impl Sender {
    pub fn new(
        endpoint: Endpoint,
        tool: &str,
        shared: Arc<Shared>,
        over: Receiver<()>,
    ) -> Result<Self> {
        let agent = Agent::config_builder()
            .timeout_global(Some(REQUEST))
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(None)
            .build()
            .into();
        let version = env!("CARGO_PKG_VERSION");
        let uname = nix::sys::utsname::uname()?;
        let attributes = [
            ("service.name", "netprobe".into()),
            ("service.version", version.into()),
            ("host.name", uname.nodename().to_string_lossy()),
            ("os.type", "linux".into()),
            ("os.version", uname.release().to_string_lossy()),
        ];
        let resource = Resource {
            attributes: attributes.map(|(key, value)| text(key, &value)).into(),
            ..Resource::default()
        };
        let scope = InstrumentationScope {
            name: format!("netprobe {tool}"),
            version: version.to_owned(),
            ..InstrumentationScope::default()
        };
        Ok(Self {
            endpoint,
            agent,
            shared,
            over,
            resource,
            scope,
            rows: Rows::new(tool, WallClock::new()?)?,
            batch: Records::default(),
            count: 0,
            told: None,
        })
    }

    /// Until the queue is closed and empty.
    pub fn run(mut self, chunks: &Receiver<Vec<u8>>) {
        let mut until = None;
        loop {
            let chunk = match until {
                Some(until) => chunks.recv_deadline(until),
                None => chunks.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match chunk {
                Ok(chunk) => {
                    for line in chunk.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
                        self.count += 1;
                        self.rows.add(line, &mut self.batch);
                        if self.count >= ROWS {
                            self.deliver();
                        }
                    }
                    self.shared.queued.fetch_sub(chunk.len(), Ordering::Relaxed);
                    let waits = self.count > 0;
                    until = waits.then(|| until.unwrap_or_else(|| Instant::now() + WAIT));
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.deliver();
                    until = None;
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        self.deliver();
    }

    /// Sends the batch, each kind of record by itself.
    fn deliver(&mut self) {
        if self.count == 0 {
            return;
        }
        let (batch, rows) = (std::mem::take(&mut self.batch), self.count);
        self.count = 0;
        let (resource, scope) = (Some(self.resource.clone()), Some(self.scope.clone()));
        let mut taken = true;
        if !batch.logs.is_empty() {
            let logs = ScopeLogs {
                scope: scope.clone(),
                log_records: batch.logs,
                ..ScopeLogs::default()
            };
            let request = ExportLogsServiceRequest {
                resource_logs: vec![ResourceLogs {
                    resource: resource.clone(),
                    scope_logs: vec![logs],
                    ..ResourceLogs::default()
                }],
            };
            taken &= self.post("logs", &request, |r: ExportLogsServiceResponse| {
                let said = r.partial_success?;
                Some((said.rejected_log_records, said.error_message))
            });
        }
        if !batch.metrics.is_empty() {
            let metrics = ScopeMetrics {
                scope: scope.clone(),
                metrics: batch.metrics,
                ..ScopeMetrics::default()
            };
            let request = ExportMetricsServiceRequest {
                resource_metrics: vec![ResourceMetrics {
                    resource: resource.clone(),
                    scope_metrics: vec![metrics],
                    ..ResourceMetrics::default()
                }],
            };
            taken &= self.post("metrics", &request, |r: ExportMetricsServiceResponse| {
                let said = r.partial_success?;
                Some((said.rejected_data_points, said.error_message))
            });
        }
        if !batch.spans.is_empty() {
            let spans = ScopeSpans {
                scope,
                spans: batch.spans,
                ..ScopeSpans::default()
            };
            let request = ExportTraceServiceRequest {
                resource_spans: vec![ResourceSpans {
                    resource,
                    scope_spans: vec![spans],
                    ..ResourceSpans::default()
                }],
            };
            taken &= self.post("traces", &request, |r: ExportTraceServiceResponse| {
                let said = r.partial_success?;
                Some((said.rejected_spans, said.error_message))
            });
        }
        let counter = match taken {
            true => &self.shared.delivered,
            false => &self.shared.undelivered,
        };
        counter.fetch_add(rows, Ordering::Relaxed);
    }

    /// Whether the collector has all of it now.
    fn post<R: Message + Default>(
        &mut self,
        kind: &str,
        request: &impl Message,
        rejected: impl Fn(R) -> Option<(i64, String)>,
    ) -> bool {
        let body = request.encode_to_vec();
        let mut waits = RETRIES.iter();
        loop {
            let refused = match self.try_post(kind, &body) {
                Ok(answer) => {
                    let said = R::decode(&answer[..]).ok().and_then(&rejected);
                    let Some((number, why)) = said.filter(|(number, _)| *number > 0) else {
                        if self.told.take().is_some() {
                            self.say("it takes rows again");
                        }
                        return true;
                    };
                    let why = crate::text::escape::escaped(why.as_bytes());
                    Refused::Ever(format!("{number} records of a batch were rejected: {why}"))
                }
                Err(refused) => refused,
            };
            let (why, wait) = match refused {
                Refused::Now(why) => (why, waits.next()),
                Refused::Ever(why) => (why, None),
            };
            if self.told.as_ref() != Some(&why) {
                self.say(&why);
                self.told = Some(why);
            }
            let Some(wait) = wait else {
                return false;
            };
            // Nothing is ever sent there.
            if self.over.recv_timeout(Duration::from_secs(*wait)) != Err(RecvTimeoutError::Timeout)
            {
                return false;
            }
        }
    }

    fn try_post(&self, kind: &str, body: &[u8]) -> Result<Vec<u8>, Refused> {
        let url = format!("{}/v1/{kind}", self.endpoint);
        let request = self
            .agent
            .post(&url)
            .header("content-type", "application/x-protobuf");
        let mut answer = request
            .send(body)
            .map_err(|e| Refused::Now(e.to_string()))?;
        let status = answer.status();
        if !status.is_success() {
            let why = format!("/v1/{kind}: {status}");
            // Those that OTLP calls retryable.
            return Err(match status.as_u16() {
                429 | 502 | 503 | 504 => Refused::Now(why),
                _ => Refused::Ever(why),
            });
        }
        let body = answer
            .body_mut()
            .with_config()
            .limit(64 * 1024)
            .read_to_vec();
        body.map_err(|e| Refused::Now(e.to_string()))
    }

    fn say(&self, what: &str) {
        let _ = writeln!(std::io::stderr(), "netprobe: {}: {what}", self.endpoint);
    }
}
