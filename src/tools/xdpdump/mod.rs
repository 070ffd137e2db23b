//! `netprobe xdpdump`: packets captured at XDP, before the stack, beside whatever XDP program is there.

pub mod args;
mod attach;
mod consumer;
mod decode;
mod diff;
mod errors;
mod file;
mod list;
mod plan;
mod present;
pub mod probes;
mod read;
mod sink;
mod trace;

use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::time::{Instant, SystemTime};

use anyhow::Result;

use crate::capture::linktype::Linktype;
use crate::chain::attach as chain;
use crate::chain::place::{self, Lock, Place, Watch};
use crate::engine::drain::Drain;
use crate::kernel::clock::WallClock;
use crate::kernel::features::Features;
use crate::kernel::netns::Netns;
use crate::run::{log, output, session, signals};

use args::Args;
use attach::{Probe, Storage};
use consumer::Live;
use diff::Pairs;
use errors::Errors;
use sink::Sink;

pub fn run(args: &Args) -> Result<()> {
    args.check()?;
    if let Some(path) = &args.read {
        return read::run(args, path);
    }
    if let Some(netns) = &args.netns {
        Netns::parse(netns)?.enter()?;
    }
    log::init(args.engine.verbose);
    if args.list {
        return list::run(&args.output);
    }
    Features::detect().require_xdp("xdpdump")?;
    if args.restore {
        return restore(&args.iface);
    }
    capture(args)
}

fn restore(ifaces: &[String]) -> Result<()> {
    let lock = Lock::take()?;
    if ifaces.is_empty() {
        return chain::restore_all(&lock);
    }
    for iface in ifaces {
        let place = Place::find(iface, &lock)?;
        if let Some(owner) = chain::recover(&place)?.as_ref().and_then(place::owner) {
            eprintln!("netprobe: {iface} is being captured by process {owner}; end that first");
        }
    }
    Ok(())
}

fn capture(args: &Args) -> Result<()> {
    let planned = args
        .iface
        .iter()
        .map(|iface| plan::plan(args, iface))
        .collect::<Result<Vec<_>>>()?;
    let stop = signals::stop_channel()?;
    let clock = WallClock::new()?;
    let begun = SystemTime::now();
    let mut storage = planned
        .iter()
        .map(|planned| Storage {
            chain: MaybeUninit::uninit(),
            traces: planned
                .targets
                .iter()
                .map(|_| MaybeUninit::uninit())
                .collect(),
        })
        .collect::<Vec<_>>();

    // The buffers are drained before the first program can write to them.
    let events = probes::event_map()?;
    let drain = Drain::start(
        events.as_fd(),
        args.engine.packet_buffer(args.is_to_file())?,
    )?;
    let mut probes: Vec<Probe<'_>> = Vec::new();
    for (planned, storage) in planned.iter().zip(&mut storage) {
        let first = probes.len() as u32;
        probes.extend(attach::begin(
            args,
            planned,
            first,
            events.as_fd(),
            storage,
        )?);
    }
    let ifindices = planned
        .iter()
        .map(|planned| planned.ifindex)
        .collect::<Vec<_>>();
    let mut error_storage = MaybeUninit::uninit();
    let errors = match Errors::begin(&ifindices, events.as_fd(), &mut error_storage) {
        Ok(errors) => Some(errors),
        Err(error) => {
            eprintln!(
                "netprobe: aborted packets and failed redirects are not explained here: {error:#}"
            );
            None
        }
    };
    let _promiscuous = attach::promiscuous(args, &planned)?;
    let mut sources = probes.iter().flat_map(Probe::sources).collect::<Vec<_>>();
    for source in &mut sources {
        let planned = planned.iter().find(|p| p.ifindex == source.ifindex);
        source.linktype = planned.map_or(Linktype::ETHERNET, |planned| planned.linktype);
    }
    let mut sink = Sink::open(args, sources)?;
    let chains = probes.iter().filter_map(Probe::chain);
    let _watch = Watch::start(chains)?;
    output::ready(args.output.ready_file.as_deref())?;

    let deadline = args.duration().map(|duration| Instant::now() + duration);
    let mut live = Live {
        stats: probes.iter().map(Probe::stats).collect::<Result<_>>()?,
        sink: &mut sink,
        clock,
        captured: 0,
        limit: args.limit(),
        undecodable: 0,
        pairs: args.diff.then(Pairs::default),
        lost: 0,
        probes,
        errors,
        begun,
    };
    session::run(drain, &stop, deadline, &mut live)
}
