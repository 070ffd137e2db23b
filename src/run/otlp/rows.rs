//! From a row of JSON to records of OpenTelemetry: a log record for an event, data points for a row of counts, a trace for
//! what became of a packet. Names are those of the semantic conventions where these have one, else `netprobe.FIELD`.

use std::collections::HashMap;

use anyhow::Result;
use opentelemetry_proto::tonic::common::v1::{
    AnyValue, ArrayValue, KeyValue, KeyValueList, any_value,
};
use opentelemetry_proto::tonic::logs::v1::{LogRecord, SeverityNumber};
use opentelemetry_proto::tonic::metrics::v1::{
    AggregationTemporality, Histogram, HistogramDataPoint, Metric, NumberDataPoint, Sum, metric,
    number_data_point,
};
use opentelemetry_proto::tonic::trace::v1::{Span, Status, span, status};
use serde_json::{Map, Value};

use crate::kernel::clock::WallClock;

type Row = Map<String, Value>;

/// What is to be sent.
#[derive(Debug, Default)]
pub struct Records {
    pub logs: Vec<LogRecord>,
    pub metrics: Vec<Metric>,
    pub spans: Vec<Span>,
}

impl Records {
    /// The data of the metric of this name; `empty`, where there is none yet.
    fn metric(&mut self, name: String, unit: &str, empty: metric::Data) -> &mut metric::Data {
        let known = self.metrics.iter().position(|m| m.name == name);
        let at = known.unwrap_or_else(|| {
            self.metrics.push(Metric {
                name,
                unit: unit.to_owned(),
                ..Metric::default()
            });
            self.metrics.len() - 1
        });
        self.metrics[at].data.get_or_insert(empty)
    }
}

/// A kind of row that counts: its `type`, its counts, and fields that are no attributes, since they differ from row to row
/// or are counts in another form.
struct Counts {
    kind: &'static str,
    /// counts since the start of the run, else since the row before
    whole: bool,
    fields: &'static [&'static str],
    without: &'static [&'static str],
}

const COUNTS: [Counts; 7] = [
    Counts {
        kind: "drops",
        whole: false,
        fields: &["packets", "bytes"],
        without: &[
            "per_second",
            "example",
            "change",
            "offset",
            "backlog",
            "limit",
        ],
    },
    Counts {
        kind: "program",
        whole: false,
        fields: &["packets"],
        without: &[],
    },
    Counts {
        kind: "unexplained",
        whole: false,
        fields: &["packets"],
        without: &["grew", "seen", "parts"],
    },
    Counts {
        kind: "uncounted",
        whole: false,
        fields: &["packets"],
        without: &["grew", "seen", "parts"],
    },
    Counts {
        kind: "table",
        whole: false,
        fields: &[
            "lost",
            "expected",
            "unexplained",
            "in_no_counter",
            "examples_left_out",
        ],
        without: &["seconds", "expected_kinds", "counters", "tables_delayed"],
    },
    Counts {
        kind: "count",
        whole: true,
        fields: &["connects"],
        without: &[],
    },
    Counts {
        kind: "loss",
        whole: true,
        fields: &[
            "sent",
            "received",
            "lost",
            "missed",
            "unreturned",
            "map_full",
            "late",
            "undecodable",
        ],
        without: &["lost_by_cpu"],
    },
];

/// Fields that the semantic conventions have a name for.
const NAMES: [(&str, &str); 18] = [
    ("pid", "process.pid"),
    ("comm", "process.executable.name"),
    ("uid", "process.user.id"),
    ("container", "container.name"),
    ("iface", "network.interface.name"),
    ("saddr", "source.address"),
    ("source", "source.address"),
    ("sport", "source.port"),
    ("lport", "source.port"),
    ("daddr", "destination.address"),
    ("destination", "destination.address"),
    ("dport", "destination.port"),
    ("proto_name", "network.transport"),
    ("local.ip", "network.local.address"),
    ("local.port", "network.local.port"),
    ("remote.ip", "network.peer.address"),
    ("remote.port", "network.peer.port"),
    ("query", "dns.question.name"),
];

/// Fields that say no more than the record has elsewhere.
const ELSEWHERE: [&str; 3] = ["type", "wall_ns", "text"];

pub struct Rows {
    tool: String,
    clock: WallClock,
    /// of the run, ns since 1970
    start: u64,
    /// of the counts that come next
    since: u64,
    /// of the histogram of a stage and a CPU that comes next, where there was one
    histograms: HashMap<(String, u64), u64>,
    /// of the last trace
    trace: u128,
    span: u64,
}

impl Rows {
    pub fn new(tool: &str, clock: WallClock) -> Result<Self> {
        let mut random = [0; 24];
        let (trace, span) = random.split_at_mut(16);
        for half in [&mut *trace, &mut *span] {
            // SAFETY: the buffer is as long as it is said to be.
            let got = unsafe { libc::getrandom(half.as_mut_ptr().cast(), half.len(), 0) };
            nix::errno::Errno::result(got)?;
        }
        let mut rows = Self {
            tool: tool.to_owned(),
            clock,
            start: 0,
            since: 0,
            histograms: HashMap::new(),
            trace: u128::from_ne_bytes(trace.try_into()?),
            span: u64::from_ne_bytes(span.try_into()?),
        };
        rows.start = rows.now();
        rows.since = rows.start;
        Ok(rows)
    }

    /// ns since 1970
    fn now(&mut self) -> u64 {
        let monotonic = crate::os::monotonic_ns().unwrap_or(0);
        // The offset before serves where the clocks cannot be read.
        let _ = self.clock.refresh();
        self.clock.wall(monotonic)
    }

    /// A row as it was printed. What is no JSON object becomes a log record with the text.
    pub fn add(&mut self, line: &[u8], to: &mut Records) {
        let now = self.now();
        let Ok(Value::Object(row)) = serde_json::from_slice(line) else {
            let body = String::from_utf8_lossy(line);
            to.logs.push(LogRecord {
                time_unix_nano: now,
                observed_time_unix_nano: now,
                body: Some(string(&body)),
                ..LogRecord::default()
            });
            return;
        };
        let kind = row.get("type").and_then(Value::as_str).unwrap_or("row");
        if let Some(counts) = COUNTS.iter().find(|c| c.kind == kind) {
            self.counts(counts, &row, now, to);
        } else if kind == "histogram" {
            self.histogram(&row, now, to);
        } else if row.contains_key("stages") && row.contains_key("end") {
            self.journey(&row, now, to);
        } else {
            to.logs.push(self.log(kind, &row, now));
        }
    }

    fn time(&self, row: &Row, now: u64) -> u64 {
        let number = |name: &str| row.get(name).and_then(Value::as_u64);
        let monotonic = || number("ts_ns").map(|ns| self.clock.wall(ns));
        number("wall_ns").or_else(monotonic).unwrap_or(now)
    }

    fn log(&self, kind: &str, row: &Row, now: u64) -> LogRecord {
        let words = ["text", "what", "reason", "func", "outcome"];
        let body = words.iter().find_map(|name| row.get(*name)?.as_str());
        let severity = match kind {
            "drop" => SeverityNumber::Warn,
            _ => SeverityNumber::Info,
        };
        LogRecord {
            time_unix_nano: self.time(row, now),
            observed_time_unix_nano: now,
            severity_number: severity as i32,
            severity_text: match severity {
                SeverityNumber::Warn => "WARN",
                _ => "INFO",
            }
            .to_owned(),
            body: Some(string(body.unwrap_or(kind))),
            attributes: attributes(row, &[]),
            event_name: format!("netprobe.{}.{kind}", self.tool),
            ..LogRecord::default()
        }
    }

    fn counts(&mut self, counts: &Counts, row: &Row, now: u64, to: &mut Records) {
        let (since, temporality) = match counts.whole {
            true => (self.start, AggregationTemporality::Cumulative),
            false => (self.since, AggregationTemporality::Delta),
        };
        let without: Vec<&str> = [counts.fields, counts.without].concat();
        let attributes = attributes(row, &without);
        for field in counts.fields {
            let Some(number) = row.get(*field).and_then(Value::as_u64) else {
                continue;
            };
            let point = NumberDataPoint {
                attributes: attributes.clone(),
                start_time_unix_nano: since,
                time_unix_nano: now,
                value: Some(number_data_point::Value::AsInt(number as i64)),
                ..NumberDataPoint::default()
            };
            let name = format!("netprobe.{}.{}.{field}", self.tool, counts.kind);
            let unit = match *field {
                "bytes" => "By",
                "connects" => "{connection}",
                _ if counts.kind == "loss" => "{event}",
                _ => "{packet}",
            };
            let empty = metric::Data::Sum(Sum {
                data_points: Vec::new(),
                aggregation_temporality: temporality as i32,
                is_monotonic: true,
            });
            if let metric::Data::Sum(sum) = to.metric(name, unit, empty) {
                sum.data_points.push(point);
            }
        }
        // A table of drops ends with this row.
        if counts.kind == "table" {
            self.since = now;
        }
    }

    /// What a stage took, on a CPU, since the row before: buckets of `low` to `high`, both in them.
    fn histogram(&mut self, row: &Row, now: u64, to: &mut Records) {
        let number = |of: &Value, name: &str| of.get(name).and_then(Value::as_u64).unwrap_or(0);
        let text = |name: &str| row.get(name).and_then(Value::as_str).unwrap_or_default();
        let cpu = row.get("cpu").and_then(Value::as_u64).unwrap_or(0);
        let series = (text("stage").to_owned(), cpu);
        let since = self.histograms.insert(series, now).unwrap_or(self.start);
        let (mut bounds, mut counts) = (Vec::new(), Vec::new());
        for bucket in row
            .get("buckets")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
        {
            bounds.push(number(bucket, "high") as f64);
            counts.push(number(bucket, "count"));
        }
        // Above the last bound.
        counts.push(0);
        let point = HistogramDataPoint {
            attributes: attributes(row, &["unit", "count", "buckets"]),
            start_time_unix_nano: since,
            time_unix_nano: now,
            count: counts.iter().sum(),
            bucket_counts: counts,
            explicit_bounds: bounds,
            ..HistogramDataPoint::default()
        };
        let name = format!("netprobe.{}.stage.duration", self.tool);
        let empty = metric::Data::Histogram(Histogram {
            data_points: Vec::new(),
            aggregation_temporality: AggregationTemporality::Delta as i32,
        });
        if let metric::Data::Histogram(all) = to.metric(name, text("unit"), empty) {
            all.data_points.push(point);
        }
    }

    /// Packets that are alike as a trace: a span for their way, one in it for each stage until the next.
    fn journey(&mut self, row: &Row, now: u64, to: &mut Records) {
        let start = self.time(row, now);
        let text = |name: &str| row.get(name).and_then(Value::as_str).unwrap_or_default();
        let us = |value: Option<&Value>| {
            (value.and_then(Value::as_f64).unwrap_or(0.0).max(0.0) * 1000.0) as u64
        };
        let end = start + us(row.get("longest_us"));
        self.trace = self.trace.wrapping_add(1);
        let trace_id = self.trace.to_be_bytes().to_vec();
        let root = self.next_span();
        let bad = matches!(text("end"), "lost" | "rejected");
        let without = ["stages", "proof", "seconds", "longest_us"];
        let mut whole = attributes(row, &without);
        let proof = row.get("proof").and_then(Value::as_array);
        let proofs = proof.into_iter().flatten().filter_map(|p| p.get("text"));
        let proofs: Vec<AnyValue> = proofs.map(value).collect();
        if !proofs.is_empty() {
            let value = any_value::Value::ArrayValue(ArrayValue { values: proofs });
            whole.push(pair(
                "netprobe.proof",
                Some(AnyValue { value: Some(value) }),
            ));
        }
        to.spans.push(Span {
            trace_id: trace_id.clone(),
            span_id: root.clone(),
            name: text("packet").to_owned(),
            kind: span::SpanKind::Internal as i32,
            start_time_unix_nano: start,
            end_time_unix_nano: end,
            attributes: whole,
            status: Some(Status {
                message: text("what").to_owned(),
                code: match bad {
                    true => status::StatusCode::Error,
                    false => status::StatusCode::Unset,
                } as i32,
            }),
            ..Span::default()
        });
        let stages = row.get("stages").and_then(Value::as_array);
        let stages: Vec<&Row> = stages
            .into_iter()
            .flatten()
            .filter_map(Value::as_object)
            .collect();
        for (number, stage) in stages.iter().enumerate() {
            let from = start + us(stage.get("us"));
            let next = stages.get(number + 1);
            let until = next.map_or(end, |next| start + us(next.get("us")));
            let name = stage
                .get("stage")
                .and_then(Value::as_str)
                .unwrap_or_default();
            // Where it was lost is where its way ended.
            let status = (bad && next.is_none()).then(|| Status {
                message: text("what").to_owned(),
                code: status::StatusCode::Error as i32,
            });
            let span_id = self.next_span();
            to.spans.push(Span {
                trace_id: trace_id.clone(),
                span_id,
                parent_span_id: root.clone(),
                name: name.to_owned(),
                kind: span::SpanKind::Internal as i32,
                start_time_unix_nano: from,
                end_time_unix_nano: until.max(from),
                attributes: attributes(stage, &["us", "stage"]),
                status,
                ..Span::default()
            });
        }
    }

    /// Never 0, which is no identity.
    fn next_span(&mut self) -> Vec<u8> {
        self.span = self.span.wrapping_add(1).max(1);
        self.span.to_be_bytes().to_vec()
    }
}

/// The fields but these. Objects are taken apart, `null` is left out.
fn attributes(row: &Row, without: &[&str]) -> Vec<KeyValue> {
    let mut to = Vec::with_capacity(row.len());
    for (name, value) in row {
        if !without.contains(&name.as_str()) && !ELSEWHERE.contains(&name.as_str()) {
            push(&mut to, name, value);
        }
    }
    to
}

fn push(to: &mut Vec<KeyValue>, name: &str, field: &Value) {
    match field {
        Value::Null => {}
        Value::Object(fields) => {
            for (inner, field) in fields {
                // The addresses of a packet are its own wherever they stand.
                let name = match name {
                    "tuple" => inner.clone(),
                    _ => format!("{name}.{inner}"),
                };
                push(to, &name, field);
            }
        }
        field => {
            let known = NAMES.iter().find(|(ours, _)| *ours == name);
            let mut value = value(field);
            let name = match known {
                Some((_, "network.transport")) => {
                    value = string(&field.as_str().unwrap_or_default().to_lowercase());
                    "network.transport".to_owned()
                }
                Some((_, theirs)) => (*theirs).to_owned(),
                None => format!("netprobe.{name}"),
            };
            to.push(pair(&name, Some(value)));
        }
    }
}

fn value(json: &Value) -> AnyValue {
    use any_value::Value as Any;
    let value = match json {
        Value::Null => None,
        Value::Bool(b) => Some(Any::BoolValue(*b)),
        Value::Number(n) => Some(match (n.as_i64(), n.as_f64()) {
            (Some(n), _) => Any::IntValue(n),
            // Above 2^63.
            (None, _) if n.is_u64() => Any::StringValue(n.to_string()),
            (None, n) => Any::DoubleValue(n.unwrap_or(0.0)),
        }),
        Value::String(s) => Some(Any::StringValue(s.clone())),
        Value::Array(a) => Some(Any::ArrayValue(ArrayValue {
            values: a.iter().map(value).collect(),
        })),
        Value::Object(o) => Some(Any::KvlistValue(KeyValueList {
            values: o.iter().map(|(k, v)| pair(k, Some(value(v)))).collect(),
        })),
    };
    AnyValue { value }
}

fn string(text: &str) -> AnyValue {
    AnyValue {
        value: Some(any_value::Value::StringValue(text.to_owned())),
    }
}

fn pair(key: &str, value: Option<AnyValue>) -> KeyValue {
    KeyValue {
        key: key.to_owned(),
        value,
        ..KeyValue::default()
    }
}

/// An attribute with a text.
pub fn text(key: &str, value: &str) -> KeyValue {
    pair(key, Some(string(value)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// tcpconnect -c -i prints each time what it has counted since its start.
    #[test]
    fn counts_say_since_when() {
        let mut rows = Rows::new("test", WallClock::new().unwrap()).unwrap();
        let mut to = Records::default();
        for line in [
            r#"{"type":"count","daddr":"10.0.0.1","connects":2}"#,
            r#"{"type":"table","lost":1}"#,
            r#"{"type":"count","daddr":"10.0.0.1","connects":3}"#,
            r#"{"type":"drops","packets":1}"#,
        ] {
            rows.add(line.as_bytes(), &mut to);
        }
        let sum = |name: &str| {
            let metric = to.metrics.iter().find(|m| m.name == name).unwrap();
            match &metric.data {
                Some(metric::Data::Sum(sum)) => sum.clone(),
                _ => panic!("{name} is no sum"),
            }
        };
        let whole = sum("netprobe.test.count.connects");
        let delta = AggregationTemporality::Delta as i32;
        assert_eq!(
            whole.aggregation_temporality,
            AggregationTemporality::Cumulative as i32
        );
        assert!(
            whole
                .data_points
                .iter()
                .all(|p| p.start_time_unix_nano == rows.start)
        );
        let drops = sum("netprobe.test.drops.packets");
        assert_eq!(drops.aggregation_temporality, delta);
        assert!(drops.data_points[0].start_time_unix_nano > rows.start);
    }
    #[test]
    fn histograms_begin_where_the_last_one_ended() {
        let mut rows = Rows::new("icmp", WallClock::new().unwrap()).unwrap();
        let mut to = Records::default();
        let row = |cpu: u32| {
            format!(
                r#"{{"type":"histogram","stage":"WAIT","cpu":{cpu},"unit":"us","count":3,
                "buckets":[{{"low":2,"high":3,"count":1}},{{"low":4,"high":7,"count":2}}]}}"#
            )
        };
        for line in [row(0), row(1), row(0)] {
            rows.add(line.as_bytes(), &mut to);
        }
        let [metric] = &to.metrics[..] else {
            panic!("{:?}", to.metrics);
        };
        let Some(metric::Data::Histogram(all)) = &metric.data else {
            panic!("{metric:?}");
        };
        assert_eq!(
            (&*metric.name, &*metric.unit),
            ("netprobe.icmp.stage.duration", "us")
        );
        let points = &all.data_points;
        assert!(points.iter().all(|p| p.count == 3));
        assert_eq!(points[0].explicit_bounds, [3.0, 7.0]);
        assert_eq!(points[0].bucket_counts, [1, 2, 0]);
        let [first, other, next] = [0, 1, 2].map(|i| points[i].start_time_unix_nano);
        assert_eq!((first, other), (rows.start, rows.start));
        assert_eq!(next, points[0].time_unix_nano);
        let names = points[1].attributes.iter().map(|a| &*a.key);
        assert_eq!(
            names.collect::<Vec<_>>(),
            ["netprobe.cpu", "netprobe.stage"]
        );
    }
}
