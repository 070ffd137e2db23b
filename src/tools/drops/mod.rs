//! `netprobe drops`: what this machine loses, by cause, against the kernel's own counters.

pub mod args;
mod kernel;
mod ledger;
mod present;
mod rows;

use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

use anyhow::Result;
use libbpf_rs::MapCore;

use crate::bpf;
use crate::bpf::drops::types::drop_key;
use crate::engine::merge::Record;
use crate::kernel::btf::Btf;
use crate::kernel::btf_core::CoreBtf;
use crate::kernel::drop_reason::DropReasons;
use crate::kernel::features::Features;
use crate::run::Flow;
use crate::run::config::Config;
use crate::run::loss::Loss;
use crate::run::output::{self, Output};
use crate::run::pins::Pins;
use crate::run::session::{self, Consumer, Tool};
use crate::run::{log, signals};
use crate::tools::rules;
use crate::tools::who::{self, command::Running};

use args::Args;
use kernel::{Count, Programs};
use ledger::Ledger;
use present::{Presenter, Table};
use rows::Names;

pub fn run(args: &Args) -> Result<()> {
    let rules = rules::load(args.rules.as_deref())?;
    if let Some(reason) = &args.explain {
        return rules::explain(&rules, reason, &args.output);
    }
    let config = args.fields.config()?;
    let mut who = args.who.resolve()?;
    let filters = args.expression.filters(None)?;
    log::init(args.verbose);
    let btf = Btf::vmlinux(None);
    if let Ok(btf) = &btf {
        btf.await_names(bpf::DROPS_TYPES);
    }
    let features = Features::with(btf.as_ref().ok());
    features.require_drops("drops")?;
    let btf = btf?;
    let reasons = DropReasons::load(&btf);
    let core = CoreBtf::new(&btf, bpf::DROPS_TYPES)?;
    drop(btf);
    let stop = signals::stop_channel()?;
    let out = Output::open(&args.output)?;
    let mut storage = MaybeUninit::uninit();
    let mut programs = Programs::begin(args, &features, (&filters, &who), &core, &mut storage)?;
    drop(core);
    let pins = Pins::create("drops");
    if let Some(pins) = &pins {
        pins.pin(&mut programs.skel.maps.data_config, "config")?;
    }
    let config = Config::set(&programs.skel.maps.data_config, config)?;
    let maps = who::Maps {
        tgids: &programs.skel.maps.who_tgids,
        inodes: &programs.skel.maps.who_inodes,
        ends: &programs.skel.maps.who_ends,
        flows: &programs.skel.maps.who_flows,
    };
    who.seed(&maps)?;
    // Read before the ledger: a drop between the two is in the programs' book alone.
    let start = programs.rows()?;
    let mut drops = Drops {
        command: None,
        args,
        presenter: Presenter::new(args),
        names: Names::new(rules, reasons),
        before: start.clone(),
        start,
        ledger: args.is_whole().then(Ledger::begin),
        since: Instant::now(),
        total: Total::default(),
        programs: &programs,
        config,
        out,
        _pins: pins,
    };
    eprintln!("netprobe: counting drops (Ctrl-C ends)");
    output::ready(args.output.ready_file.as_deref())?;
    drops.command = who.start(&maps, false)?;
    let period = Duration::from_secs(args.interval);
    session::run_periodic(&stop, period, &mut drops)
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
    /// counts at the last table, and at the start
    before: HashMap<drop_key, Count>,
    start: HashMap<drop_key, Count>,
    since: Instant,
    total: Total,
    programs: &'a Programs<'a>,
    config: Config<'a, M>,
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
        let now = self.programs.rows()?;
        let unexplained = match &mut self.ledger {
            Some(ledger) => {
                let seen = self.names.seen(&rows::grown(&self.start, &now))?;
                Some(ledger.balance(&seen, last))
            }
            None => None,
        };
        let grown = rows::grown(&self.before, &now);
        let rows = self.names.rows(&grown, |key| self.programs.example(key))?;
        let table = Table::new(rows, unexplained, self.since.elapsed(), self.args);
        self.total.lost += table.lost;
        self.total.expected += table.expected;
        self.before = now;
        self.since = Instant::now();
        let flow = self.presenter.table(&mut self.out, &table)?;
        self.out.flush()?;
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
        self.table(false)
    }
}

impl<M: MapCore> Tool for Drops<'_, M> {
    fn is_over(&mut self) -> bool {
        self.command.as_mut().is_some_and(|c| c.is_over(true))
    }

    fn pause(&mut self) -> Result<()> {
        if let Some(command) = &mut self.command {
            command.stop();
        }
        // Drops after this are in neither book.
        if let Some(ledger) = &mut self.ledger {
            ledger.read();
        }
        self.config.pause()
    }

    fn count(&mut self, loss: &mut Loss) -> Result<()> {
        loss.map_full += self.programs.overflow()?.packets;
        loss.missed += self.programs.missed();
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
