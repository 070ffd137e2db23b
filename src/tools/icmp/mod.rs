//! `netprobe icmp`: who handles an echo request, on which CPU, and where the time went.

mod answers;
pub mod args;
mod decode;
mod present;
mod probes;
mod stages;
mod summary;

use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{MapCore, MapFlags};
use serde::Serialize;

use crate::bpf::bytes_of;
use crate::bpf::icmp::{IcmpSkel, IcmpSkelBuilder};
use crate::bpf::skb::types::np_config;
use crate::engine::drain::{Drain, monotonic_ns};
use crate::engine::loss::Loss;
use crate::engine::merge::Record;
use crate::engine::pins::Pins;
use crate::engine::session::{self, Consumer, Flow};
use crate::engine::{log, signals};
use crate::kernel::features::Features;
use crate::output::{self, Output};
use crate::tools::fields;

use answers::{Answer, Answers};
use args::Args;
use present::{Presenter, json_line};
use summary::{ByCpu, FigureRow, Figures};

pub fn run(args: &Args) -> Result<()> {
    // What can be wrong on the command line comes first: it needs no privilege.
    let config = args.filter.config()?;
    log::init(args.engine.verbose);
    let features = Features::detect();
    features.require_tracing("icmp")?;

    let stop = signals::stop_channel()?;
    let mut out = Output::open(&args.output)?;
    let mut storage = MaybeUninit::uninit();
    let mut skel = load(args, &features, &mut storage)?;
    let pins = Pins::create("icmp");
    if let Some(pins) = &pins {
        pins.pin(&mut skel.maps.cfg_map, "config")?;
        pins.pin(&mut skel.maps.stats, "stats")?;
    }
    set_config(&skel, &config)?;

    let drain = Drain::start(skel.maps.events.as_fd(), args.engine.buffer())?;
    let attached = probes::attach(&skel, args)?;
    eprintln!("netprobe: {}", attached.summary());
    let mut session = Session::new(args, &mut out)?;
    output::ready(args.output.ready_file.as_deref())?;

    let ended = session::run(drain, &stop, None, &mut session, || {
        // From here on no probe sends anything; the links go when this function returns.
        let paused = np_config {
            fields: config.fields | fields::PAUSED,
            ..config
        };
        if let Err(e) = set_config(&skel, &paused) {
            eprintln!("netprobe: {e:#}");
        }
    });
    let received = ended?;
    session.finish()?;
    let mut loss = Loss {
        received: received.events,
        late: received.late,
        undecodable: session.undecodable + received.short,
        missed: attached.missed(),
        ..Loss::default()
    };
    loss.add_stats(&skel.maps.stats)?;
    session.presenter.loss(session.out, &loss)?;
    drop(pins);
    Ok(())
}

/// Opens, configures and loads the programs that the run needs.
fn load<'a>(
    args: &Args,
    features: &Features,
    storage: &'a mut MaybeUninit<libbpf_rs::OpenObject>,
) -> Result<IcmpSkel<'a>> {
    let mut open = IcmpSkelBuilder::default()
        .open(storage)
        .context("failed to open the BPF object")?;
    let rodata = open
        .maps
        .rodata_data
        .as_mut()
        .context("the BPF object has no .rodata")?;
    rodata.use_cast = u8::from(features.rdonly_cast);
    rodata.with_stages = u8::from(args.with_stages());
    rodata.want_id = args.filter.filter_id.map_or(-1, i32::from);
    rodata.want_cpu = args.filter.filter_cpu.map_or(-1, i32::from);
    probes::prepare(&mut open, args);
    open.load().map_err(|e| {
        let log = log::take();
        anyhow!("failed to load the BPF programs: {e:?}\n{log}")
    })
}

fn set_config(skel: &IcmpSkel<'_>, config: &np_config) -> Result<()> {
    skel.maps
        .cfg_map
        .update(&0u32.to_ne_bytes(), bytes_of(config), MapFlags::ANY)
        .context("failed to set the filter")
}

/// Events to lines and figures.
struct Session<'a> {
    out: &'a mut Output,
    presenter: Presenter,
    answers: Answers,
    figures: Figures,
    requests: u64,
    replies: u64,
    min_ns: u64,
    legacy: bool,
    stages: bool,
    histograms: Option<Histograms>,
    undecodable: u64,
}

/// Histograms in place of lines.
struct Histograms {
    by_cpu: ByCpu,
    interval: Option<Duration>,
    since: Instant,
}

/// The summary as a JSON record.
#[derive(Serialize)]
struct SummaryRow {
    #[serde(rename = "type")]
    kind: &'static str,
    requests: u64,
    replies: u64,
    missing: u64,
    stages: std::collections::BTreeMap<&'static str, FigureRow>,
}

impl<'a> Session<'a> {
    fn new(args: &Args, out: &'a mut Output) -> Result<Self> {
        let presenter = Presenter::new(args)?;
        if !args.histogram {
            presenter.header(out)?;
        }
        Ok(Self {
            out,
            presenter,
            answers: Answers::new(args.with_stages(), args.filter.filter_cpu.is_none()),
            figures: Figures::default(),
            requests: 0,
            replies: 0,
            min_ns: args.min_us.saturating_mul(1000),
            legacy: args.legacy,
            stages: args.with_stages(),
            histograms: args.histogram.then(|| Histograms {
                by_cpu: ByCpu::default(),
                interval: args.interval.map(Duration::from_secs),
                since: Instant::now(),
            }),
            undecodable: 0,
        })
    }

    /// Prints the answers that are complete at `now`.
    fn release(&mut self, now: u64) -> Result<Flow> {
        while let Some(answer) = self.answers.next(now) {
            if self.answer(&answer)? == Flow::Stop {
                return Ok(Flow::Stop);
            }
        }
        Ok(Flow::Continue)
    }

    fn answer(&mut self, answer: &Answer) -> Result<Flow> {
        self.requests += 1;
        self.replies += u64::from(answer.reply.is_some());
        self.figures.add(&answer.stages);
        if let Some(h) = &mut self.histograms {
            h.by_cpu.add(answer.event.head.cpu, &answer.stages);
            return Ok(Flow::Continue);
        }
        let total = answer.stages.get(stages::Stage::Total).unwrap_or(0);
        if total < self.min_ns {
            return Ok(Flow::Continue);
        }
        self.presenter.answer(self.out, answer)
    }

    /// Prints the histograms of the interval, if it is over.
    fn interval(&mut self) -> Result<()> {
        if let Some(h) = &mut self.histograms {
            if h.interval.is_some_and(|i| h.since.elapsed() >= i) {
                h.since = Instant::now();
                h.print(self.out)?;
            }
        }
        Ok(())
    }

    /// What still waits, the last histograms, the summary.
    fn finish(&mut self) -> Result<()> {
        let _ = self.release(u64::MAX)?;
        if let Some(h) = &mut self.histograms {
            h.print(self.out)?;
        }
        if self.legacy {
            return self.out.flush();
        }
        if self.out.json() {
            let row = SummaryRow {
                kind: "summary",
                requests: self.requests,
                replies: self.replies,
                missing: self.answers.missing(),
                stages: self.figures.rows(),
            };
            json_line(self.out, &row)?;
        } else {
            eprint!("{}", self.summary());
        }
        self.out.flush()
    }

    fn summary(&self) -> String {
        let replies = if self.stages {
            format!(", {} replies handed to a device", self.replies)
        } else {
            String::new()
        };
        format!(
            "--- echo requests handled\n{} requests{replies}, {} missing in the sequences\n{}",
            self.requests,
            self.answers.missing(),
            self.figures.table()
        )
    }
}

impl Histograms {
    fn print(&mut self, out: &mut Output) -> Result<()> {
        if out.json() {
            for row in self.by_cpu.rows() {
                json_line(out, &row)?;
            }
        } else {
            let text = self.by_cpu.text();
            if !text.is_empty() {
                out.line(|b| b.extend_from_slice(text.trim_end().as_bytes()))?;
            }
        }
        self.by_cpu.clear();
        out.flush()
    }
}

impl Consumer for Session<'_> {
    fn event(&mut self, record: Record<'_>) -> Result<Flow> {
        let Some(event) = decode::decode(record.bytes) else {
            self.undecodable += 1;
            return Ok(Flow::Continue);
        };
        let now = event.head.ts;
        match event.head.kind {
            decode::KIND_ECHO => self.answers.echo(event, record.late),
            decode::KIND_REPLY => self.answers.reply(&event.key, event.head.ts),
            _ => self.undecodable += 1,
        }
        self.release(now)
    }

    fn tick(&mut self) -> Result<Flow> {
        // Events younger than the drain's slack are still on their way: their replies are not late.
        let flow = self.release(monotonic_ns()?.saturating_sub(100_000_000))?;
        self.interval()?;
        self.out.flush()?;
        Ok(flow)
    }
}
