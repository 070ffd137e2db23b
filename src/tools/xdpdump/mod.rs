//! `netprobe xdpdump`: packets captured at XDP, before the stack, beside whatever XDP program is there.

pub mod args;
mod decode;
mod diff;
mod errors;
mod file;
mod list;
mod present;
pub mod probes;
mod read;
mod sink;
mod trace;

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Instant, SystemTime};

use anyhow::{Context, Result};
use libbpf_rs::{MapHandle, OpenObject};

use crate::capture::linktype::Linktype;
use crate::chain::attach as chain;
use crate::chain::place::{self, Lock, Place, Watch};
use crate::engine::drain::Drain;
use crate::engine::merge::Record;
use crate::filter::expr::{self, SNAPLEN};
use crate::filter::pcap::Packets;
use crate::kernel::clock::WallClock;
use crate::kernel::features::Features;
use crate::kernel::netns::Netns;
use crate::kernel::{netdev, xdp};
use crate::run::Flow;
use crate::run::loss::Loss;
use crate::run::output;
use crate::run::session::{self, Consumer, Tool};
use crate::run::{log, signals};
use crate::usage::UsageError;

use args::{Args, Mode};
use decode::SeenAt;
use diff::Pairs;
use errors::Errors;

use probes::{Capture, Counts, Options, Tunnel};
use sink::{CapturePoint, Sink};
use trace::{Target, Trace};

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

/// An interface and what is to be traced at it; nothing: capture in front of its programs.
struct Planned {
    iface: String,
    ifindex: u32,
    linktype: Linktype,
    options: Options,
    targets: Vec<Target>,
}

/// The BPF objects of one interface live here.
struct Storage {
    chain: MaybeUninit<OpenObject>,
    traces: Vec<MaybeUninit<OpenObject>>,
}

fn capture(args: &Args) -> Result<()> {
    let planned = args
        .iface
        .iter()
        .map(|iface| plan(args, iface))
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
        probes.extend(begin(args, planned, first, events.as_fd(), storage)?);
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
    let _promiscuous = promiscuous(args, &planned)?;
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

/// Decides what is to be watched at an interface.
fn plan(args: &Args, iface: &str) -> Result<Planned> {
    let ifindex = netdev::index(iface)?;
    let hatype = netdev::hardware(iface)?;
    let linktype = linktype(iface, hatype)?;
    let packets = Packets::Of {
        linktype,
        snaplen: SNAPLEN,
        netmask: netdev::netmask(iface),
    };
    let filter = args.filter(packets);
    note_tags(args, iface);
    let tunnel = (linktype == Linktype::RAW_IP).then(|| -> Result<Tunnel> {
        let ends = netdev::tunnel_ends(ifindex)
            .with_context(|| format!("failed to ask for the addresses of {iface}"))?;
        Ok(Tunnel { hatype, ends })
    });
    let mut planned = Planned {
        iface: iface.to_owned(),
        ifindex,
        linktype,
        options: Options {
            snaplen: args.capture_len(),
            sample: args.sample,
            filter: filter.with_context(|| format!("{iface} ({})", linktype.name()))?,
            tunnel: tunnel.transpose()?,
        },
        targets: Vec::new(),
    };
    let trace = match args.mode {
        Mode::Chain => false,
        Mode::Trace => true,
        Mode::Auto => {
            // A chain of netprobe's own is joined; a capture without a program to look at makes its own.
            let lock = Lock::take()?;
            let chained = chain::recover(&Place::find(iface, &lock)?)?.is_some();
            let attached = xdp::query(ifindex)
                .with_context(|| format!("failed to ask for the XDP program of {iface}"))?;
            !chained && attached.is_some()
        }
    };
    if trace {
        match trace::targets(iface, ifindex, &args.program_names) {
            Ok(targets) => planned.targets = targets,
            Err(error) if args.mode == Mode::Trace || error.is::<UsageError>() => {
                return Err(error);
            }
            Err(error) => eprintln!("netprobe: {iface}: {error:#}"),
        }
    }
    Ok(planned)
}

/// Says that VLAN tags are not in the packets, where somebody may look for them: where the expression does, and below VLAN interfaces.
fn note_tags(args: &Args, iface: &str) {
    let asks = args
        .filter_text()
        .is_some_and(|text| expr::asks_vlan(&text));
    let above = netdev::vlans_above(iface);
    if (asks || !above.is_empty()) && netdev::takes_vlan_tags(iface) {
        eprintln!(
            "netprobe: {iface} takes VLAN tags off before XDP (rx-vlan-offload): packets are shown, and matched by `vlan`, without \
             their outer tag; ethtool -K {iface} rxvlan off leaves it in the packet"
        );
    }
}

/// What the packets of an interface begin with.
fn linktype(iface: &str, hatype: u16) -> Result<Linktype> {
    Linktype::of_device(hatype).with_context(|| {
        format!(
            "{iface}: its packets have a link header that netprobe does not know (ARPHRD {hatype})"
        )
    })
}

/// Attaches to one interface. In auto mode tracing gives way to the chain where the kernel refuses it.
fn begin<'a>(
    args: &Args,
    planned: &Planned,
    first: u32,
    events: BorrowedFd<'_>,
    storage: &'a mut Storage,
) -> Result<Vec<Probe<'a>>> {
    let mut traces = Vec::new();
    let mut refused = None;
    for ((target, storage), index) in planned.targets.iter().zip(&mut storage.traces).zip(first..) {
        match Trace::begin(
            target,
            index,
            &planned.options,
            args.points(),
            events,
            storage,
        ) {
            Ok(trace) => traces.push(Probe::Trace {
                trace,
                iface: planned.iface.clone(),
                index,
            }),
            Err(error) if args.mode == Mode::Trace => return Err(error),
            Err(error) => refused = Some(error),
        }
    }
    if let Some(error) = refused {
        eprintln!("netprobe: {}: {error}: chaining instead", planned.iface);
        if !args.action.is_empty() || !args.program_names.is_empty() || args.diff {
            return Err(error);
        }
        traces.clear();
    }
    if !traces.is_empty() {
        let names = planned
            .targets
            .iter()
            .map(Target::name)
            .collect::<Vec<_>>()
            .join(", ");
        eprintln!("netprobe: capturing at {}, tracing {names}", planned.iface);
        return Ok(traces);
    }
    args.check_chain()?;
    let modes = args
        .xdp_mode
        .modes(netdev::driver(&planned.iface).as_deref());
    let capture = Capture::begin(
        &planned.iface,
        &planned.options,
        modes,
        events,
        &mut storage.chain,
    )?;
    tell(&capture);
    Ok(vec![Probe::Chain(capture)])
}

/// Says on stderr where the programs stand.
fn tell(capture: &Capture<'_>) {
    let mode = capture.mode.name();
    match capture.before {
        Some(id) => eprintln!(
            "netprobe: capturing at {} ({mode} XDP), in front of program {id}, by tail call",
            capture.place.name
        ),
        None => eprintln!("netprobe: capturing at {} ({mode} XDP)", capture.place.name),
    }
}

fn promiscuous(args: &Args, planned: &[Planned]) -> Result<Vec<OwnedFd>> {
    let wanted = planned.iter().filter(|_| args.promiscuous);
    wanted
        .map(|planned| {
            netdev::promiscuous(planned.ifindex)
                .with_context(|| format!("failed to make {} promiscuous", planned.iface))
        })
        .collect()
}

/// What captures: in front of an interface's programs, or beside one of them.
enum Probe<'a> {
    Chain(Capture<'a>),
    Trace {
        trace: Trace<'a>,
        iface: String,
        index: u32,
    },
}

impl Probe<'_> {
    /// The places where its packets are seen.
    fn sources(&self) -> Vec<CapturePoint> {
        match self {
            Probe::Chain(capture) => vec![CapturePoint {
                iface: capture.place.name.clone(),
                ifindex: capture.place.ifindex,
                point: SeenAt::Chain,
                program: 0,
                function: None,
                linktype: Linktype::ETHERNET,
            }],
            Probe::Trace {
                trace,
                iface,
                index,
            } => trace
                .points()
                .into_iter()
                .map(|point| CapturePoint {
                    iface: iface.clone(),
                    ifindex: trace.ifindex(),
                    point,
                    program: *index,
                    function: Some(trace.function().to_owned()),
                    linktype: Linktype::ETHERNET,
                })
                .collect(),
        }
    }

    fn end(&mut self) -> Result<()> {
        match self {
            Probe::Chain(capture) => capture.end(),
            Probe::Trace { trace, .. } => {
                trace.end();
                Ok(())
            }
        }
    }

    fn counts(&self) -> Result<Counts> {
        match self {
            Probe::Chain(capture) => capture.counts(),
            Probe::Trace { trace, .. } => trace.counts(),
        }
    }

    fn stats(&self) -> Result<MapHandle> {
        match self {
            Probe::Chain(capture) => capture.stats(),
            Probe::Trace { trace, .. } => trace.stats(),
        }
    }

    /// Where its packets go on to programs in slots.
    fn chain(&self) -> Option<&Place> {
        match self {
            Probe::Chain(capture) => Some(&capture.place),
            Probe::Trace { .. } => None,
        }
    }

    fn add_loss(&self, loss: &mut Loss) -> Result<()> {
        match self {
            Probe::Chain(capture) => capture.add_loss(loss),
            Probe::Trace { trace, .. } => trace.add_loss(loss),
        }
    }
}

/// Events of a running capture.
struct Live<'a> {
    sink: &'a mut Sink,
    clock: WallClock,
    captured: u64,
    /// 0: none
    limit: u64,
    undecodable: u64,
    /// With --diff: packets between entry and exit.
    pairs: Option<Pairs>,
    /// The counters of all probes, to tell in the file where packets were lost.
    stats: Vec<MapHandle>,
    lost: u64,
    probes: Vec<Probe<'a>>,
    errors: Option<Errors<'a>>,
    begun: SystemTime,
}

impl Live<'_> {
    fn watch_loss(&mut self) -> Result<()> {
        if !self.sink.tells_loss() {
            return Ok(());
        }
        let mut loss = Loss::default();
        for stats in &self.stats {
            loss.add_stats(stats)?;
        }
        self.sink.lost(loss.lost - self.lost);
        self.lost = loss.lost;
        Ok(())
    }
}

impl Tool for Live<'_> {
    /// Takes the programs away: what they have sent until then can still be read.
    fn pause(&mut self) -> Result<()> {
        if let Some(errors) = &mut self.errors {
            errors.end();
        }
        let ended = self.probes.iter_mut().map(Probe::end);
        let ended = ended.fold(Ok(()), Result::and);
        xdp::settle();
        ended
    }

    fn count(&mut self, loss: &mut Loss) -> Result<()> {
        loss.undecodable += self.undecodable;
        if let Some(errors) = &self.errors {
            errors.add_loss(loss)?;
        }
        self.probes
            .iter()
            .try_for_each(|probe| probe.add_loss(loss))
    }

    fn close(&mut self, _loss: &Loss) -> Result<()> {
        let mut of_sources = Vec::new();
        for probe in &self.probes {
            let counts = probe.counts()?;
            of_sources.extend(probe.sources().iter().map(|_| counts));
        }
        self.sink.close(&of_sources, self.begun)
    }

    fn report(&mut self, loss: &Loss) -> Result<()> {
        let mut total = Counts::default();
        for probe in &self.probes {
            total.add(&probe.counts()?);
        }
        self.sink.report(total, self.captured, loss)
    }
}

impl Consumer for Live<'_> {
    fn event(&mut self, record: Record<'_>) -> Result<Flow> {
        if self.limit > 0 && self.captured >= self.limit {
            return Ok(Flow::Stop);
        }
        if let Some(problem) = errors::decode(record.bytes) {
            self.sink.problem(&problem, self.clock.wall(problem.ts))?;
            return Ok(Flow::Continue);
        }
        let Some(seen) = decode::decode(record.cpu, record.bytes) else {
            self.undecodable += 1;
            return Ok(Flow::Continue);
        };
        let mut diff = None;
        if let Some(pairs) = &mut self.pairs {
            if seen.point == SeenAt::Entry {
                pairs.enter(&seen);
                return Ok(Flow::Continue);
            }
            diff = Some(pairs.exit(&seen, self.sink.linktype(&seen)));
        }
        self.captured += 1;
        let wall = self.clock.wall(seen.ts);
        let flow = self.sink.packet(&seen, diff.as_ref(), wall, record.late)?;
        Ok(if self.captured == self.limit {
            Flow::Stop
        } else {
            flow
        })
    }

    fn tick(&mut self) -> Result<Flow> {
        self.clock.refresh()?;
        self.watch_loss()?;
        self.sink.flush()?;
        Ok(Flow::Continue)
    }
}
