//! `netprobe tcp`: one line for each TCP connection when it ends, or for those that exist.

pub mod args;
mod attach;
mod blame;
mod connection;
mod ending;
mod filter;
mod happenings;
mod json;
mod live;
mod notes;
mod present;

use std::mem::MaybeUninit;

use anyhow::Result;

use crate::bpf;
use crate::bpf::tcp::TcpSkel;
use crate::engine::merge::Record;
use crate::kernel::btf_core::CoreBtf;
use crate::kernel::trampoline::Ahead;
use crate::run::heartbeat::{Heartbeat, LIMIT, heartbeat};
use crate::run::loss::Loss;
use crate::run::output::{self, Output};
use crate::run::session::{self, Consumer, Tool};
use crate::run::{Flow, log, signals};

use args::{Args, Happening};
use attach::{Attached, Kernel};
use filter::Filter;
use happenings::Reasons;
use present::Presenter;

pub fn run(args: &Args) -> Result<()> {
    // What can be wrong on the command line comes first: it needs no privilege.
    args.transport().check(&args.engine)?;
    if args.live {
        return live::run(args);
    }
    let filter = args.filter.resolve()?;
    log::init(args.engine.verbose);
    let (btf, features) = args.types.load(&[bpf::TCP_TYPES, attach::NAMES])?;
    features.require_tracing("tcp")?;
    log::lacking();
    let btf = btf?;
    let kernel = Kernel::new(&features, &btf);
    let reasons = match args.notes() {
        0 => Reasons::default(),
        _ => Reasons::load(&btf),
    };
    let ahead = Ahead::start(&btf);
    let core = CoreBtf::new(&btf, bpf::TCP_TYPES)?;
    drop(btf);
    let stop = signals::stop_channel()?;
    let mut out = Output::open(&args.output)?;
    let mut storage = MaybeUninit::uninit();
    let skel = attach::load(args, (&kernel, &features), &core, &mut storage)?;
    let (drain, attached) = attach::start(args, &kernel, &skel)?;
    drop((core, ahead));
    let presenter = Presenter::of_run(args, reasons)?;
    log::note("following TCP connections until they end; Ctrl-C ends");
    if args.events.contains(&Happening::Retransmits) && !kernel.tells_undone {
        log::note(
            "this kernel tells what was sent again for nothing by DSACK alone (it has no tcp_undo_cwnd_reduction)",
        );
    }
    presenter.header(&mut out)?;
    output::ready(args.output.ready_file.as_deref())?;
    let mut rows = Rows {
        filter,
        skel: &skel,
        attached,
        heartbeat: heartbeat!(skel, LIMIT)?,
        presenter,
        out: &mut out,
        ended: 0,
        shown: 0,
        undecodable: 0,
    };
    session::run(drain, &stop, None, &mut rows)
}

/// Events to lines.
struct Rows<'a, 'o> {
    filter: Filter,
    skel: &'a TcpSkel<'o>,
    attached: Attached,
    heartbeat: Heartbeat,
    presenter: Presenter,
    out: &'a mut Output,
    ended: u64,
    shown: u64,
    undecodable: u64,
}

impl Consumer for Rows<'_, '_> {
    fn event(&mut self, record: Record<'_>) -> Result<Flow> {
        if let Some(note) = notes::decode(record.bytes) {
            let shown = self.filter.takes_note(&note);
            let stack = match note.stack {
                Some(id) if shown => attach::stack(self.skel, id),
                _ => Vec::new(),
            };
            let note = (&note, &stack[..]);
            return self.presenter.note(self.out, note, record.late, shown);
        }
        let Some(mut connection) = connection::decode(record.bytes) else {
            self.undecodable += 1;
            return Ok(Flow::Continue);
        };
        self.ended += 1;
        connection.zero_windows = self.presenter.zero_windows(&connection);
        let blame = self.presenter.blame(&connection);
        if !self.filter.takes(&connection) {
            return Ok(Flow::Continue);
        }
        self.shown += 1;
        self.presenter
            .row(self.out, &connection, record.late, blame)
    }

    fn tick(&mut self) -> Result<Flow> {
        self.out.flush()?;
        Ok(Flow::Continue)
    }
}

impl Tool for Rows<'_, '_> {
    fn heartbeat(&mut self) -> Option<&mut Heartbeat> {
        Some(&mut self.heartbeat)
    }

    fn pause(&mut self) -> Result<()> {
        self.attached.detach();
        Ok(())
    }

    fn count(&mut self, loss: &mut Loss) -> Result<()> {
        loss.undecodable += self.undecodable;
        loss.missed += self.attached.missed();
        self.heartbeat.count(loss);
        loss.add_stats(&self.skel.maps.stats)
    }

    fn report(&mut self, loss: &Loss) -> Result<()> {
        log::note(&format!(
            "{} connections ended, {} shown; {} that began meanwhile are open",
            self.ended,
            self.shown,
            attach::open_connections(self.skel)
        ));
        let cut = self.presenter.cut();
        if cut > 0 {
            log::note(&format!(
                "{cut} notes had no room: some causes may be missing"
            ));
        }
        loss.report(self.out)
    }
}
