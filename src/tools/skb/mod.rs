//! `netprobe skb`: a packet's way through the kernel, function by function.

pub mod args;
pub(super) mod attached;
pub(super) mod capture;
pub(super) mod columns;
pub(super) mod decode;
pub(super) mod drops;
mod dump;
pub(super) mod event;
mod helpers;
pub(super) mod hooks;
mod json;
mod json_tails;
mod members;
pub(super) mod netfilter;
mod netns_names;
mod news;
mod present;
pub(super) mod probes;
mod programs;
pub(super) mod record;
pub(super) mod recorded;
pub mod replay;
mod since;
pub mod style;
mod told;
mod traced_program;
pub(super) mod track;
mod view;

use std::io::BufWriter;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;

use anyhow::{Context, Result};
use libbpf_rs::skel::OpenSkel;
use libbpf_rs::{MapCore, OpenMapMut};

use crate::bpf;
use crate::bpf::skb::{SkbSkel, SkbSkelBuilder};
use crate::engine::drain::Drain;
use crate::engine::merge::Record;
use crate::filter::{Filters, set_filter};
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
use crate::run::stream::Stream;
use crate::run::{log, object, signals};
use crate::tools::who::{self, Who, command::Running};
use crate::usage::usage;

use args::Args;
use attached::Attached;
use capture::Capture;
use columns::Types;
use event::{Event, SECTION_NFT, SECTION_OWNER};
use helpers::Helpers;
use members::Members;
use present::Presenter;
use probes::{Plan, Wants};
use programs::{Programs, Storage, Watched};
use record::{Head, MakeSink, Recorder};
use track::Sweeper;

pub fn run(args: &Args) -> Result<()> {
    run_recorded(args, None)
}

/// A run whose events go into a recording, too: `record` makes its file, once everything that can be wrong has been looked at.
pub(super) fn run_recorded(args: &Args, record: Option<&dyn MakeSink>) -> Result<()> {
    // What can be wrong on the command line comes first: it needs no privilege.
    let config = args.fields.config()?;
    let mut who = args.who.resolve()?;
    args.transport.check(&args.engine)?;
    let pattern = args.function_pattern()?;
    let filters = args.expression.filters(args.kernel_btf.as_deref())?;
    let xdp_members = args.xdp_members()?;
    log::init(args.engine.verbose);
    let mut btf = Btf::vmlinux(args.kernel_btf.as_deref());
    if args.kernel_btf.is_some() {
        // What was asked for by name is told by name.
        btf = Ok(btf.context("--kernel-btf")?);
    }
    if let Ok(btf) = &btf {
        btf.await_names(bpf::SKB_TYPES);
    }
    let mut features = Features::with(btf.as_ref().ok());
    if args.kernel_btf.is_some() {
        features.take_casts(Btf::vmlinux(None).ok().as_ref());
    }
    let wants = Wants {
        track: args.track(),
        lives: args.lives(),
        owner: args.asks(SECTION_OWNER),
        drops: args.drops,
        listens: args.drops && features.why_no_tracing().is_none(),
        receivers: args.drops && args.asks(SECTION_OWNER) && !features.drop_sock,
        returns: args.output_retval,
        xdp: args.filter_trace_xdp,
        nft: args.asks(SECTION_NFT),
        icmp: false,
        routes: false,
        who: who.wants(),
        changes: false,
    };
    if args.drops && !wants.owner && !wants.nft && !wants.who.any {
        features.require_drops("skb --drops")?;
    } else {
        features.require_tracing("skb")?;
    }
    let btf = btf?;
    let types = args.types(&btf)?;
    let plan = if args.drops {
        Plan::drops(&btf, &features, args.backend, wants)?
    } else {
        Plan::make(&btf, &features, args, pattern.as_ref(), wants)?
    };
    let members = Members::parse(&args.output_skb_metadata, ("skb", "sk_buff"), &btf)
        .map_err(|e| usage(format!("--output-skb-metadata: {e:#}")))?;
    let xdp_shown = Members::parse(&args.output_xdp_metadata, ("xdp", "xdp_buff"), &btf)
        .map_err(|e| usage(format!("--output-xdp-metadata: {e:#}")))?;
    let reasons = DropReasons::load(&btf);
    // In modules libbpf has to look for types itself. So it has in the user's file.
    let core = (args.kernel_btf.is_none() && types == Types::Kernel)
        .then(|| CoreBtf::new(&btf, bpf::SKB_TYPES))
        .transpose()?;
    // Some 3 MB, which only a few need any longer.
    let btf = args.filter_track_bpf_helpers.then_some(btf);

    let stop = signals::stop_channel()?;
    let mut out = Output::open(&args.output)?;
    let sink = record.map(MakeSink::make).transpose()?;
    let capture = args.write.as_deref();
    let capture = capture
        .map(|path| Capture::create(path, args.snaplen))
        .transpose()?;
    let mut storage = MaybeUninit::uninit();
    let mut skel = load(
        args,
        &features,
        (&plan, &filters, &members, &reasons),
        (wants, &who),
        core.as_ref(),
        &mut storage,
    )?;
    drop(core);
    let pins = Pins::create("skb");
    if let Some(pins) = &pins {
        pins.pin(&mut skel.maps.data_config, "config")?;
        pins.pin(&mut skel.maps.stats, "stats")?;
    }
    let config = Config::set(&skel.maps.data_config, config)?;

    let (events, rings) = (skel.maps.events.as_fd(), skel.maps.rings.as_fd());
    let drain = Drain::start(args.transport.source(events, rings), args.engine.buffer())?;
    let attached = match plan.attach(&skel, &stop) {
        Ok(attached) => attached,
        Err(e) => {
            // The kernel may be busy for a while removing single kprobes.
            config.pause()?;
            return Err(e);
        }
    };
    eprintln!("netprobe: {}", attached.summary());
    let mut kinds: Storage = [MaybeUninit::uninit(), MaybeUninit::uninit()];
    let watched = Watched {
        filters: &filters,
        xdp_filter: xdp_members.as_ref(),
        members: &members,
        xdp_members: &xdp_shown,
    };
    let helpers = match btf {
        Some(btf) => Some(Helpers::new(args, attached.backend(), &btf, &skel)?),
        None => None,
    };
    let mut programs = Programs::prepare(args, &features, watched, &skel, helpers, &mut kinds)?;
    let head = sink
        .as_ref()
        .map(|_| Head::new(args.style(), [&members, &xdp_shown]));
    let names = attached.names().clone();
    let mut presenter = Presenter::new(args, names, reasons, [members, xdp_shown])?;
    presenter.hooks(attached.netfilter_hooks());
    if let Some(programs) = &mut programs {
        presenter.programs(programs.start()?);
    }
    let options = record::Options {
        snaplen: args.snaplen,
        lines: args.output.output_file.is_some(),
        limit: args.output.output_limit_lines,
    };
    let recorder = match sink.zip(head) {
        Some((sink, head)) => Some(Recorder::new(sink, head, &mut presenter, &options)?),
        None => None,
    };
    if recorder.is_none() || options.lines {
        presenter.header(&mut out)?;
    }
    let maps = who::Maps {
        tgids: &skel.maps.who_tgids,
        inodes: &skel.maps.who_inodes,
        ends: &skel.maps.who_ends,
        flows: &skel.maps.who_flows,
    };
    who.seed(&maps)?;
    output::ready(args.output.ready_file.as_deref())?;
    let command = who.start(&maps, false)?;
    let mut run = Skb {
        command,
        lines: Lines {
            presenter: &mut presenter,
            capture,
            out: &mut out,
            sweeper: (wants.track || wants.lives).then(|| Sweeper::new(&skel.maps.tracked)),
            snap_len: args.snap_len() as usize,
            programs,
            undecodable: 0,
            event: Event::default(),
        },
        recorder,
        config,
        attached,
        stats: &skel.maps.stats,
        _pins: pins,
    };
    session::run(drain, &stop, None, &mut run)
}

/// The run: what it does with events, and what its end needs.
struct Skb<'a, 'p, M> {
    command: Option<Running>,
    lines: Lines<'a, 'p>,
    recorder: Option<Recorder>,
    config: Config<'a, M>,
    attached: Attached,
    stats: &'a M,
    _pins: Option<Pins>,
}

impl<M: MapCore> Consumer for Skb<'_, '_, M> {
    fn event(&mut self, record: Record<'_>) -> Result<Flow> {
        match &mut self.recorder {
            None => self.lines.event(record),
            Some(recorder) => recorder.event(record, &mut self.lines),
        }
    }

    fn tick(&mut self) -> Result<Flow> {
        if let Some(recorder) = &mut self.recorder {
            recorder.tick(self.lines.presenter)?;
        }
        let flow = self.lines.tick()?;
        // Nobody knows here which packets are still under way.
        match self.command.as_mut().is_some_and(|c| c.is_over(false)) {
            true => Ok(Flow::Stop),
            false => Ok(flow),
        }
    }
}

impl<M: MapCore> Tool for Skb<'_, '_, M> {
    fn pause(&mut self) -> Result<()> {
        if let Some(command) = &mut self.command {
            command.stop();
        }
        self.config.pause()
    }

    fn count(&mut self, loss: &mut Loss) -> Result<()> {
        let programs = self.lines.programs.as_ref().map_or(0, Programs::missed);
        loss.undecodable += self.lines.undecodable;
        loss.missed += self.attached.missed() + programs;
        loss.add_stats(self.stats)
    }

    fn close(&mut self, loss: &Loss) -> Result<()> {
        let capture = self.lines.capture.take();
        let recorder = self.recorder.as_mut();
        let closed = recorder.map_or(Ok(()), |r| r.close(self.lines.presenter, loss));
        let captured = capture.map_or(Ok(()), |capture| capture.finish(loss.lost));
        closed.and(captured)
    }

    fn report(&mut self, loss: &Loss) -> Result<()> {
        loss.report(self.lines.out)
    }
}

/// Opens, configures and loads the programs: those that the plan needs, as kprobe or kprobe.multi.
fn load<'a>(
    args: &Args,
    features: &Features,
    (plan, filters, members, reasons): (&Plan, &Filters, &Members, &DropReasons),
    (wants, who): (Wants, &Who),
    core: Option<&CoreBtf>,
    storage: &'a mut MaybeUninit<libbpf_rs::OpenObject>,
) -> Result<SkbSkel<'a>> {
    let btf = args.kernel_btf.clone().or(core.map(CoreBtf::path));
    let mut open = object::open(SkbSkelBuilder::default(), btf, storage)?;
    let rodata = open
        .maps
        .rodata_data
        .as_mut()
        .context("the BPF object has no .rodata")?;
    rodata.use_cast = u8::from(features.rdonly_cast);
    rodata.np_ring_wakeup = args.transport.wakeup(&args.engine);
    rodata.has_func_ip = u8::from(features.func_ip);
    rodata.has_reasons = u8::from(features.drop_reasons);
    rodata.sections = args.sections();
    rodata.snap_len = args.snap_len();
    set_filter!(rodata, filters.on(features.skb_fields));
    rodata.np_path_count = members.paths().len() as u32;
    for (to, from) in rodata.np_paths.iter_mut().zip(members.paths()) {
        *to = from;
    }
    rodata.nf_drop_reason = reasons.number("NETFILTER_DROP").unwrap_or(0);
    rodata.track = u8::from(args.track());
    rodata.listens = u8::from(wants.listens);
    rodata.rx_watched = u8::from(wants.receivers);
    rodata.has_rx_sock = u8::from(features.drop_sock);
    rodata.lives = u8::from(args.lives());
    rodata.track_stack = u8::from(args.track_stack());
    rodata.returns_on = u8::from(args.output_retval);
    rodata.who_on = who.on;
    rodata.who_uid = who.uid;
    rodata.who_cgroup = who.cgroup;
    rodata.who_comm = who.comm;
    let size = |map: &mut OpenMapMut<'_>, entries: u32| {
        map.set_max_entries(entries)
            .context("failed to set the size of a map")
    };
    if args.track() || args.lives() {
        size(&mut open.maps.tracked, args.track_entries)?;
    }
    if args.track() {
        size(&mut open.maps.contexts, 4096)?;
    }
    if args.output_retval {
        size(&mut open.maps.entered, 16_384)?;
    }
    if args.output_bpfmap {
        size(&mut open.maps.map_calls, 4096)?;
    }
    if wants.owner {
        size(&mut open.maps.owners, args.track_entries)?;
    }
    if wants.nft {
        size(&mut open.maps.nf_ways, 4096)?;
        size(&mut open.maps.nft_calls, 4096)?;
    }
    let maps = &mut open.maps;
    who.prepare(
        [
            &mut maps.who_ends,
            &mut maps.who_inodes,
            &mut maps.who_tgids,
            &mut maps.who_socks,
            &mut maps.who_binds,
        ],
        &mut maps.who_flows,
        0,
    )?;
    args.transport.prepare(&mut open.maps.rings)?;
    plan.prepare(&mut open);
    filters.prepare(open.open_object_mut(), features)?;
    object::load(open)
}

/// Events to lines.
struct Lines<'a, 'p> {
    presenter: &'a mut Presenter,
    capture: Option<Capture<BufWriter<Stream>>>,
    out: &'a mut Output,
    sweeper: Option<Sweeper<'a>>,
    snap_len: usize,
    programs: Option<Programs<'p>>,
    undecodable: u64,
    /// the one that is shown
    event: Event,
}

impl Lines<'_, '_> {
    /// The line of the event, and its packet in a capture file.
    fn shown(&mut self, late: bool) -> Result<Flow> {
        let event = &self.event;
        let flow = self.presenter.event(self.out, event, late)?;
        if let Some(capture) = &mut self.capture {
            let comment = self.presenter.comment(event);
            capture.packet(event, self.presenter.wall(event.head.ts), &comment)?;
        }
        Ok(flow)
    }
}

impl Consumer for Lines<'_, '_> {
    fn event(&mut self, record: Record<'_>) -> Result<Flow> {
        if decode::decode(&mut self.event, record.bytes, self.snap_len).is_none() {
            self.undecodable += 1;
            return Ok(Flow::Continue);
        }
        self.shown(record.late)
    }

    fn tick(&mut self) -> Result<Flow> {
        self.out.flush()?;
        self.presenter.tick()?;
        if let Some(capture) = &mut self.capture {
            capture.flush()?;
        }
        if let Some(sweeper) = &mut self.sweeper {
            sweeper.tick()?;
        }
        if let Some(programs) = &mut self.programs {
            self.presenter.programs(programs.look()?);
        }
        Ok(Flow::Continue)
    }
}
