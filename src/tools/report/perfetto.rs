//! Chrome's trace format (JSON), which ui.perfetto.dev shows: a process for each network namespace; in it a track for each device and CPU
//! with the events, and each packet's journey as slices: the whole way, and in it the stay at each device.

use std::collections::BTreeMap;

use anyhow::Result;
use serde::Serialize;

use crate::run::Flow;
use crate::run::loss::Loss;
use crate::run::output::Output;
use crate::text::escape::escaped;
use crate::text::format::Hex;
use crate::text::json;
use crate::tools::skb::event::Event;
use crate::tools::skb::record::{Head, identity};
use crate::tools::skb::recorded::Recorded;

use super::show::Show;

/// Tracks of devices and CPUs, at most: events of further ones share the last.
const TRACKS: usize = 4096;

/// A record of the format; times are microseconds.
#[derive(Serialize)]
struct Trace<'a, A: Serialize> {
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    cat: Option<&'static str>,
    ph: &'static str,
    ts: f64,
    pid: u32,
    tid: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    s: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    args: Option<A>,
}

#[derive(Serialize)]
struct Named<'a> {
    name: &'a str,
}

#[derive(Serialize)]
struct Facts {
    skb: Hex,
    cpu: u16,
    process: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    tuple: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    len: u32,
}

/// The packet whose events come.
struct Journey {
    packet: u64,
    name: String,
    netns: u32,
    /// where it is: namespace, name of the device
    at: (u32, String),
    /// of its last event, microseconds
    last: f64,
}

pub struct Perfetto {
    out: Output,
    opened: bool,
    /// a record has been written
    begun: bool,
    tracks: BTreeMap<(u32, String), usize>,
    named: BTreeMap<u32, ()>,
    journey: Option<Journey>,
    number: u64,
}

impl Perfetto {
    pub fn new(out: Output) -> Self {
        Self {
            out,
            opened: false,
            begun: false,
            tracks: BTreeMap::new(),
            named: BTreeMap::new(),
            journey: None,
            number: 0,
        }
    }

    fn write<A: Serialize>(&mut self, trace: &Trace<'_, A>) -> Result<()> {
        let first = !std::mem::replace(&mut self.begun, true);
        let mut made = Ok(());
        self.out.line(|line| {
            line.push(if first { b' ' } else { b',' });
            made = json::push(line, trace);
        })?;
        Ok(made?)
    }

    /// Begin (`b`) or end (`e`) of a slice of a journey.
    fn slice(&mut self, ph: &'static str, name: &str, ts: f64, pid: u32) -> Result<()> {
        let trace = Trace::<()> {
            name,
            cat: Some("packet"),
            ph,
            ts,
            pid,
            tid: 0,
            id: Some(self.number),
            s: None,
            args: None,
        };
        self.write(&trace)
    }

    fn name(&mut self, kind: &'static str, pid: u32, tid: usize, name: &str) -> Result<()> {
        let trace = Trace {
            name: kind,
            cat: None,
            ph: "M",
            ts: 0.0,
            pid,
            tid,
            id: None,
            s: None,
            args: Some(Named { name }),
        };
        self.write(&trace)
    }

    /// The number of a track, which gets its name with its first event.
    fn track(&mut self, of: &mut Recorded, netns: u32, name: String) -> Result<usize> {
        if !self.named.contains_key(&netns) && self.named.len() < TRACKS {
            let named = of.netns_name(netns).map(|n| escaped(n.as_bytes()));
            let process = named.map_or_else(|| format!("netns {netns}"), |n| format!("netns {n}"));
            self.named.insert(netns, ());
            self.name("process_name", netns, 0, &process)?;
            self.name("thread_name", netns, 0, "packets")?;
        }
        if let Some(track) = self.tracks.get(&(netns, name.clone())) {
            return Ok(*track);
        }
        if self.tracks.len() >= TRACKS {
            return Ok(TRACKS);
        }
        let track = self.tracks.len() + 1;
        self.name("thread_name", netns, track, &name)?;
        self.tracks.insert((netns, name), track);
        Ok(track)
    }

    fn end_journey(&mut self) -> Result<()> {
        let Some(journey) = self.journey.take() else {
            return Ok(());
        };
        self.slice("e", &journey.at.1, journey.last, journey.netns)?;
        self.slice("e", &journey.name, journey.last, journey.netns)
    }

    /// The event's part of its packet's journey.
    fn go_on(&mut self, event: &Event, at: (u32, String), ts: f64) -> Result<()> {
        let packet = identity(event).unwrap_or(u64::MAX);
        let same = |j: &Journey| j.packet == packet && packet != u64::MAX;
        if !self.journey.as_ref().is_some_and(same) {
            self.end_journey()?;
            self.number += 1;
            let tuple = event.tuple.flatten();
            let what = tuple.map_or_else(|| "packet".to_owned(), |t| t.to_string());
            let name = format!("{what} #{}", self.number);
            self.slice("b", &name, ts, at.0)?;
            self.slice("b", &at.1, ts, at.0)?;
            self.journey = Some(Journey {
                packet,
                name,
                netns: at.0,
                at,
                last: ts,
            });
            return Ok(());
        }
        let Some(mut journey) = self.journey.take() else {
            return Ok(());
        };
        if journey.at != at {
            self.slice("e", &journey.at.1, ts, journey.netns)?;
            self.slice("b", &at.1, ts, journey.netns)?;
            journey.at = at;
        }
        journey.last = ts;
        self.journey = Some(journey);
        Ok(())
    }
}

/// Microseconds on the recorded machine's monotonic clock: a double is exact to the nanosecond for 100 days of it.
fn micros(ns: u64) -> f64 {
    ns as f64 / 1000.0
}

impl Show for Perfetto {
    fn begin(&mut self, _: &Recorded, _: &Head) -> Result<()> {
        if !std::mem::replace(&mut self.opened, true) {
            self.out
                .line(|b| b.extend_from_slice(b"{\"displayTimeUnit\":\"ns\",\"traceEvents\":["))?;
        }
        Ok(())
    }

    fn event(&mut self, of: &mut Recorded, event: &Event, _: bool) -> Result<Flow> {
        let function = of.function(event);
        let meta = event.meta.as_ref();
        let netns = meta.map_or(0, |m| m.netns);
        let device = match meta {
            Some(m) if m.ifindex != 0 => escaped(&m.ifname),
            _ => "no device".to_owned(),
        };
        let ts = micros(event.head.ts);
        self.go_on(event, (netns, device.clone()), ts)?;
        let track = self.track(of, netns, format!("{device} cpu {}", event.head.cpu))?;
        let mut process = Vec::new();
        event.head.push_process(&mut process);
        let facts = Facts {
            skb: Hex(event.skb),
            cpu: event.head.cpu,
            process: String::from_utf8_lossy(&process).into_owned(),
            tuple: event.tuple.flatten().map(|t| t.to_string()),
            reason: of.reason(event),
            len: meta.map_or(0, |m| m.len),
        };
        let trace = Trace {
            name: &function,
            cat: Some("event"),
            ph: "i",
            ts,
            pid: netns,
            tid: track,
            id: None,
            s: Some("t"),
            args: Some(facts),
        };
        self.write(&trace)?;
        Ok(Flow::Continue)
    }

    fn end(&mut self, loss: Option<&Loss>) -> Result<()> {
        self.end_journey()?;
        if let Some(loss) = loss {
            loss.tell();
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.out.flush()
    }

    fn finish(&mut self) -> Result<()> {
        if self.opened {
            self.out.line(|b| b.extend_from_slice(b"]}"))?;
        }
        self.out.flush()
    }
}
