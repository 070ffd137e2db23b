//! `netprobe tcpconnect`: which process connects where over TCP, and what became of it.

pub mod args;
mod attach;
mod consumer;
mod counts;
mod decode;
mod names;
mod outcome;
mod present;
mod probes;
mod stacks;

use std::mem::MaybeUninit;

use anyhow::Result;

use crate::bpf;
use crate::kernel::btf_core::CoreBtf;
use crate::kernel::drop_reason::DropReasons;
use crate::kernel::trampoline::Ahead;
use crate::run::output::{self, Output};
use crate::run::{log, session, signals};

use args::Args;
use consumer::Lines;
use present::Presenter;
use probes::{Kernel, PAIRS};

pub fn run(args: &Args) -> Result<()> {
    // What can be wrong on the command line comes first: it needs no privilege.
    args.transport.check(&args.engine)?;
    let filter = args.filter.resolve()?;
    log::init(args.verbose());
    let (btf, features) = args.types.load(&[bpf::TCPCONNECT_TYPES])?;
    features.require_tracing("tcpconnect")?;
    log::lacking();
    let btf = btf?;
    let reasons = match args.outcome {
        true => DropReasons::load(&btf),
        false => DropReasons::default(),
    };
    let kernel = Kernel::new(args, features, &btf, &reasons);
    let ahead = kernel.begins_with_trampolines().then(|| Ahead::start(&btf));
    let core = CoreBtf::new(&btf, bpf::TCPCONNECT_TYPES)?;
    // 3 MB less while libbpf works.
    drop(btf);
    let stop = signals::stop_channel()?;
    let mut out = Output::open(&args.output)?;
    let mut storages = [const { MaybeUninit::uninit() }; PAIRS];
    let (skel, drain, attached) = attach::start(args, &filter, &kernel, &core, &mut storages)?;
    drop((core, ahead));
    let mut presenter = Presenter::new(args, reasons)?;
    eprintln!("Tracing connect ... Hit Ctrl-C to end");
    if !args.count {
        presenter.header(&mut out)?;
    }
    output::ready(args.output.ready_file.as_deref())?;

    let mut consumer = Lines::new(args, &skel, attached, &mut presenter, &mut out)?;
    session::run(drain, &stop, None, &mut consumer)
}
