//! `netprobe drops`: what this machine loses, by cause, against the kernel's own counters.

pub mod args;
mod device;
mod guard;
mod kernel;
mod ledger;
mod metrics;
mod nft;
mod present;
mod rows;
mod screen;
mod table;
mod verdicts;

use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

use anyhow::Result;
use libbpf_rs::MapCore;

use crate::bpf;
use crate::engine::merge::Record;
use crate::kernel::btf_core::CoreBtf;
use crate::kernel::drop_reason::DropReasons;
use crate::run::Flow;
use crate::run::config::Config;
use crate::run::heartbeat::{Heartbeat, heartbeat};
use crate::run::loss::Loss;
use crate::run::output::{self, Output};
use crate::run::pins::Pins;
use crate::run::session::{self, Consumer, Tool};
use crate::run::{log, signals};
use crate::tools::expression::ExpressionArgs;
use crate::tools::rules;
use crate::tools::who::{self, command::Running};

use args::{Args, By};
use guard::Guard;
use kernel::Programs;
use ledger::Ledger;
use metrics::Metrics;
use nft::RuleNames;
use present::{Presenter, Table};
use rows::Names;
use verdicts::Verdicts;

/// How long user space may be silent. Nothing waits for it in a buffer, and a table of a large machine takes a while.
const SILENT: Duration = Duration::from_secs(3);

/// The longest time between a counter of the kernel and the free of its packet.
const IN_FLIGHT: Duration = Duration::from_millis(2);

pub fn run(args: &Args) -> Result<()> {
    let rules = rules::load(args.rules.as_deref())?;
    if let Some(reason) = &args.explain {
        return rules::explain(&rules, reason, &args.output);
    }
    let config = args.fields.config()?;
    let mut who = args.who.resolve()?;
    let mut filters = args.expression.filters(args.types.file())?;
    log::init(args.verbose);
    let (btf, features) = args.types.load(&[bpf::DROPS_TYPES])?;
    features.require_drops("drops")?;
    log::lacking();
    let btf = btf?;
    ExpressionArgs::follow_translations(&mut filters, config.fields, &btf);
    let reasons = DropReasons::load(&btf);
    let nft = args.by.contains(&By::Rule);
    let nft = nft.then(|| nft::Types::find(&btf, &features)).flatten();
    let core = match nft {
        Some(nft::Types::Module) => CoreBtf::with_module(&btf, bpf::DROPS_TYPES, nft::MODULE)?,
        _ => CoreBtf::new(&btf, bpf::DROPS_TYPES)?,
    };
    let nft = nft.and_then(|_| reasons.number("NETFILTER_DROP"));
    let spans = kernel::spans(&btf, nft.is_some());
    drop(btf);
    let stop = signals::stop_channel()?;
    let presenter = Presenter::new(args);
    let resized = match presenter.redraws() {
        true => signals::resize_channel()?,
        false => crossbeam_channel::never(),
    };
    let out = Output::open(&args.output)?;
    let mut storage = MaybeUninit::uninit();
    let mut programs = Programs::begin(
        args,
        &features,
        (&filters, &who),
        (&core, nft, &spans),
        &mut storage,
    )?;
    drop(core);
    let pins = Pins::create("drops");
    if let Some(pins) = &pins {
        pins.pin(&mut programs.skel.maps.data_config, "config")?;
    }
    let config = Config::set(&programs.skel.maps.data_config, config)?;
    let maps = who::maps!(programs.skel);
    who.seed(&maps)?;
    let metrics = args.metrics_listen.map(Metrics::listen).transpose()?;
    let mut watchers = MaybeUninit::uninit();
    let verdicts = match args.programs {
        true => Some(Verdicts::begin(&mut watchers)?),
        false => None,
    };
    // What was dropped before the ledger begins is in no growth of its counters.
    programs.take(|| false)?;
    let ledger = args.is_whole().then(Ledger::begin);
    let mut drops = Drops {
        command: None,
        args,
        presenter,
        names: Names::new(rules, reasons, RuleNames::new(nft.is_some())),
        ledger,
        metrics,
        verdicts,
        guard: Guard::new(args.max_cpu),
        since: Instant::now(),
        total: Total::default(),
        programs: &programs,
        config,
        heartbeat: heartbeat!(programs.skel, SILENT)?,
        gap_ns: 0,
        out,
        _pins: pins,
    };
    if let Some(left_out) = drops.ledger.as_ref().map(|l| l.left_out).filter(|n| *n > 0) {
        eprintln!(
            "netprobe: counters of {left_out} network namespaces are not read: there are too many"
        );
    }
    eprintln!("netprobe: counting drops (Ctrl-C ends)");
    output::ready(args.output.ready_file.as_deref())?;
    drops.command = who.start(&maps, false)?;
    let period = Duration::from_secs(args.interval);
    session::run_periodic(&stop, &resized, period, &mut drops)
}

/// Since the start, for the summary.
#[derive(Debug, Clone, Copy, Default)]
pub struct Total {
    pub lost: u64,
    pub expected: u64,
}

/// The run.
struct Drops<'a, M> {
    args: &'a Args,
    presenter: Presenter,
    names: Names,
    command: Option<Running>,
    ledger: Option<Ledger>,
    metrics: Option<Metrics>,
    verdicts: Option<Verdicts<'a>>,
    guard: Guard,
    since: Instant,
    total: Total,
    programs: &'a Programs<'a>,
    config: Config<'a, M>,
    heartbeat: Heartbeat,
    /// of it, told
    gap_ns: u64,
    out: Output,
    _pins: Option<Pins>,
}

impl<M: MapCore> Drops<'_, M> {
    /// One table: what was lost since the last one. `last`: the programs are paused.
    fn table(&mut self, last: bool) -> Result<Flow> {
        // The counters first: what they have counted is in the rows that are read after them.
        if let (Some(ledger), false) = (&mut self.ledger, last) {
            ledger.read();
        }
        let period = Duration::from_secs(self.args.interval);
        let (mut at, mut left_out) = (0, 0);
        let taken = self.programs.take(|| {
            let time = self.guard.has_time(at, period);
            at += 1;
            left_out += u64::from(!time);
            time
        })?;
        let rows = self.names.rows(&taken);
        let balance = self.ledger.as_mut().map(|ledger| {
            for row in &rows {
                ledger.add(row.seen(), row.count.packets);
            }
            ledger.balance(last)
        });
        let mut table = Table::new(&rows, balance, self.since.elapsed(), self.args);
        table.examples_left_out = left_out;
        if let Some(verdicts) = &mut self.verdicts {
            verdicts.look()?;
            table.verdicts = verdicts.take()?;
        }
        table.delayed = std::mem::take(&mut self.guard.delayed);
        self.total.lost += table.lost;
        self.total.expected += table.expected;
        self.since = Instant::now();
        if let Some(metrics) = &mut self.metrics {
            let missed = self.programs.overflow()?.packets + self.programs.missed();
            metrics.update(&rows, &table, self.ledger.as_ref(), missed)?;
        }
        let flow = self.presenter.table(&mut self.out, &table)?;
        self.out.flush()?;
        let gap = self.heartbeat.gaps().ns;
        if gap > self.gap_ns {
            eprintln!(
                "netprobe: {:.1} s of this table were not counted: netprobe had been stopped, or was behind",
                (gap - self.gap_ns) as f64 / 1e9
            );
            self.gap_ns = gap;
        }
        Ok(flow)
    }
}

impl<M: MapCore> Consumer for Drops<'_, M> {
    /// No event leaves the kernel.
    fn event(&mut self, _record: Record<'_>) -> Result<Flow> {
        Ok(Flow::Continue)
    }

    fn tick(&mut self) -> Result<Flow> {
        if self.args.once {
            // The only table is the last one.
            self.pause()?;
            self.table(true)?;
            return Ok(Flow::Stop);
        }
        if !self.guard.is_due() {
            return Ok(Flow::Continue);
        }
        self.guard.begin();
        self.table(false)
    }
}

impl<M: MapCore> Tool for Drops<'_, M> {
    fn is_over(&mut self) -> bool {
        self.command.as_mut().is_some_and(|c| c.is_over(true))
    }

    fn resized(&mut self) -> Result<()> {
        self.presenter.redraw(&mut self.out)?;
        self.out.flush()
    }

    fn heartbeat(&mut self) -> Option<&mut Heartbeat> {
        Some(&mut self.heartbeat)
    }

    fn pause(&mut self) -> Result<()> {
        if let Some(command) = &mut self.command {
            command.stop();
        }
        // What the counters have now has been freed before the programs pause; what is freed until then is in the counters when they are
        // read again.
        if let Some(ledger) = &mut self.ledger {
            ledger.read();
            ledger.settle();
            std::thread::sleep(IN_FLIGHT);
        }
        self.config.pause()?;
        if let Some(ledger) = &mut self.ledger {
            ledger.read();
        }
        Ok(())
    }

    fn count(&mut self, loss: &mut Loss) -> Result<()> {
        loss.map_full += self.programs.overflow()?.packets;
        loss.missed += self.programs.missed();
        self.heartbeat.count(loss);
        loss.add_stats(&self.programs.skel.maps.stats)
    }

    fn report(&mut self, loss: &Loss) -> Result<()> {
        let last = if self.args.once {
            Ok(Flow::Stop)
        } else {
            self.table(true)
        };
        eprintln!(
            "netprobe: {} packets lost, {} freed in the normal course",
            self.total.lost, self.total.expected
        );
        last.and(loss.report(&mut self.out))
    }
}
