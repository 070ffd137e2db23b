//! Attaches a capture to its interfaces, by the chain or by tracing.

use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use anyhow::{Context, Result};
use libbpf_rs::{MapHandle, OpenObject};

use crate::capture::linktype::Linktype;
use crate::chain::place::Place;
use crate::kernel::netdev;
use crate::run::log;
use crate::run::loss::Loss;

use super::args::{Args, Mode};
use super::decode::SeenAt;
use super::plan::Planned;
use super::probes::{Capture, Counts};
use super::sink::CapturePoint;
use super::trace::{Target, Trace};

/// The BPF objects of one interface live here.
pub struct Storage {
    pub chain: MaybeUninit<OpenObject>,
    pub traces: Vec<MaybeUninit<OpenObject>>,
}

/// Attaches to one interface. In auto mode tracing gives way to the chain where the kernel refuses it.
pub fn begin<'a>(
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
        log::note(&format!("capturing at {}, tracing {names}", planned.iface));
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
    let before = capture.before.map_or(String::new(), |id| {
        format!(", in front of program {id}, by tail call")
    });
    log::note(&format!(
        "capturing at {} ({mode} XDP){before}",
        capture.place.name
    ));
}

pub fn promiscuous(args: &Args, planned: &[Planned]) -> Result<Vec<OwnedFd>> {
    let wanted = planned.iter().filter(|_| args.promiscuous);
    wanted
        .map(|planned| {
            netdev::promiscuous(planned.ifindex)
                .with_context(|| format!("failed to make {} promiscuous", planned.iface))
        })
        .collect()
}

/// What captures: in front of an interface's programs, or beside one of them.
pub enum Probe<'a> {
    Chain(Capture<'a>),
    Trace {
        trace: Trace<'a>,
        iface: String,
        index: u32,
    },
}

impl Probe<'_> {
    /// The places where its packets are seen.
    pub fn sources(&self) -> Vec<CapturePoint> {
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

    pub fn end(&mut self) -> Result<()> {
        match self {
            Probe::Chain(capture) => capture.end(),
            Probe::Trace { trace, .. } => {
                trace.end();
                Ok(())
            }
        }
    }

    pub fn counts(&self) -> Result<Counts> {
        match self {
            Probe::Chain(capture) => capture.counts(),
            Probe::Trace { trace, .. } => trace.counts(),
        }
    }

    pub fn stats(&self) -> Result<MapHandle> {
        match self {
            Probe::Chain(capture) => capture.stats(),
            Probe::Trace { trace, .. } => trace.stats(),
        }
    }

    /// Where its packets go on to programs in slots.
    pub fn chain(&self) -> Option<&Place> {
        match self {
            Probe::Chain(capture) => Some(&capture.place),
            Probe::Trace { .. } => None,
        }
    }

    pub fn add_loss(&self, loss: &mut Loss) -> Result<()> {
        match self {
            Probe::Chain(capture) => capture.add_loss(loss),
            Probe::Trace { trace, .. } => trace.add_loss(loss),
        }
    }
}
