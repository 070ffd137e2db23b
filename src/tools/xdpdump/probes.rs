//! The capture programs: loaded as the interface wants them, put in front of its chain, counted and taken away.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use anyhow::{Context, Result, anyhow};
use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{
    MapCore, MapFlags, MapHandle, MapType, OpenObject, OpenProgramMut, ProgramAttachType,
};

use crate::bpf;
use crate::bpf::xdpdump::types::np_xdp_stats;
use crate::bpf::xdpdump::{OpenXdpdumpSkel, XdpdumpSkel, XdpdumpSkelBuilder};
use crate::filter::{self, cbpf::Program};
use crate::kernel;
use crate::kernel::netdev::TunnelEnds;
use crate::kernel::xdp::{Mode, Traits};
use crate::run::log;
use crate::run::loss::Loss;

use crate::chain::attach::{Chain, Parts, Plan};
use crate::chain::place::{self, CHAIN_EMPTY, EMPTY, Lock, Place};

/// What the programs of an interface are to send.
pub struct Options {
    pub snaplen: u32,
    pub sample: u32,
    /// For the link type of the interface.
    pub filter: Option<Program>,
    /// Where outer headers may lie in front of its packets.
    pub tunnel: Option<Tunnel>,
}

/// A device whose packets begin with IP, by its kind (ARPHRD_*) and ends.
#[derive(Clone, Copy, Debug)]
pub struct Tunnel {
    pub hatype: u16,
    pub ends: TunnelEnds,
}

/// The constants of both objects.
macro_rules! set_tunnel {
    ($rodata:expr, $tunnel:expr) => {
        if let Some(tunnel) = $tunnel {
            $rodata.has_outer = 1;
            $rodata.tunnel.r#type = tunnel.hatype.into();
            $rodata.tunnel.local = tunnel.ends.local;
            $rodata.tunnel.remote = tunnel.ends.remote;
        }
    };
}
pub(super) use set_tunnel;

/// Packets at one interface, as the kernel counted them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// All packets that came to our program.
    pub seen: u64,
    /// Those that matched the filter.
    pub matched: u64,
    /// Those handed to the buffers: as many, but for sampling.
    pub sent: u64,
    /// Those of them that full buffers refused.
    pub lost: u64,
}

impl Counts {
    /// Of the CPUs' packets before and after the filter, and what was sent and lost of them.
    pub fn sum(
        per_cpu: impl Iterator<Item = (u64, u64)>,
        add_loss: impl FnOnce(&mut Loss) -> Result<()>,
    ) -> Result<Self> {
        let mut counts = Self::default();
        for (seen, matched) in per_cpu {
            counts.seen += seen;
            counts.matched += matched;
        }
        let mut loss = Loss::default();
        add_loss(&mut loss)?;
        (counts.sent, counts.lost) = (loss.sent, loss.lost);
        Ok(counts)
    }

    pub fn add(&mut self, other: &Self) {
        self.seen += other.seen;
        self.matched += other.matched;
        self.sent += other.sent;
        self.lost += other.lost;
    }
}

/// The perf event array that all programs of a run send to.
pub fn event_map() -> Result<MapHandle> {
    let opts = libbpf_sys::bpf_map_create_opts {
        sz: size_of::<libbpf_sys::bpf_map_create_opts>() as _,
        ..Default::default()
    };
    let cpus = libbpf_rs::num_possible_cpus().context("failed to count the CPUs")?;
    MapHandle::create(
        MapType::PerfEventArray,
        Some("events"),
        4,
        4,
        cpus as u32,
        &opts,
    )
    .context("failed to make the perf event array")
}

/// The programs loaded for one interface, and their place there.
pub struct Capture<'a> {
    skel: XdpdumpSkel<'a>,
    chain: Option<Chain>,
    /// What the programs count by itself: see `struct np_xdp_stats`.
    filtered: bool,
    sampled: bool,
    pub place: Place,
    pub mode: Mode,
    /// The program that was there before: its id.
    pub before: Option<u32>,
}

impl<'a> Capture<'a> {
    /// Loads the programs and puts them to the interface. `events`: the perf buffers of all interfaces.
    pub fn begin(
        iface: &str,
        options: &Options,
        modes: Vec<Mode>,
        events: BorrowedFd<'_>,
        storage: &'a mut MaybeUninit<OpenObject>,
    ) -> Result<Self> {
        let lock = Lock::take()?;
        let place = Place::find(iface, &lock)?;
        place::sweep();
        let plan = Plan::make(place.clone(), &lock)?;
        let before = plan.found.map(|found| found.program);
        let skel = load(&plan, options, events, storage)?;
        // Not pinned: what we know of the chain has to end with this process.
        let alone = skel.progs.xdp_alone.as_fd().as_raw_fd();
        skel.maps
            .chain_knowledge
            .update(&EMPTY.to_ne_bytes(), &alone.to_ne_bytes(), MapFlags::ANY)
            .context("failed to put a program into a program array")?;
        let parts = Parts {
            root: skel.progs.xdp_dump.as_fd(),
            standby: skel.progs.xdp_chain.as_fd(),
            maps: vec![
                ("next_prog_map", skel.maps.next_prog_map.as_fd()),
                ("chain_stats", skel.maps.chain_stats.as_fd()),
                ("chain_state", skel.maps.chain_state.as_fd()),
                ("event_map", skel.maps.events.as_fd()),
                (CHAIN_EMPTY, skel.maps.bss.as_fd()),
            ],
            modes,
            owned: true,
        };
        let chain = Chain::install(plan, &parts, &lock)?;
        let mode = chain.mode();
        Ok(Capture {
            skel,
            chain: Some(chain),
            filtered: options.filter.is_some(),
            sampled: options.sample > 1,
            place,
            mode,
            before,
        })
    }

    /// Takes our program away; what it has sent until then can still be read.
    pub fn end(&mut self) -> Result<()> {
        let Some(chain) = self.chain.take() else {
            return Ok(());
        };
        chain.release()
    }

    pub fn counts(&self) -> Result<Counts> {
        let per_cpu = self.per_cpu()?;
        let counts = per_cpu.iter().map(|count| {
            let seen = if self.filtered {
                count.seen
            } else {
                count.matched
            };
            (seen, count.matched)
        });
        Counts::sum(counts, |loss| self.add_loss(loss))
    }

    fn per_cpu(&self) -> Result<Vec<np_xdp_stats>> {
        let per_cpu = self
            .skel
            .maps
            .stats
            .lookup_percpu(&0u32.to_ne_bytes(), MapFlags::ANY)
            .context("failed to read the packet counters")?
            .unwrap_or_default();
        let counts = per_cpu.iter().filter_map(|bytes| bpf::read(bytes));
        Ok(counts.map(|(count, _)| count).collect())
    }

    /// The counters of what was sent and lost.
    pub fn stats(&self) -> Result<MapHandle> {
        MapHandle::try_from(&self.skel.maps.stats).context("failed to duplicate an fd")
    }

    pub fn add_loss(&self, loss: &mut Loss) -> Result<()> {
        if !self.sampled {
            let per_cpu = self.per_cpu()?;
            loss.sent += per_cpu.iter().map(|count| count.matched).sum::<u64>();
        }
        loss.add_stats(&self.skel.maps.stats)
    }
}

fn load<'a>(
    plan: &Plan,
    options: &Options,
    events: BorrowedFd<'_>,
    storage: &'a mut MaybeUninit<OpenObject>,
) -> Result<XdpdumpSkel<'a>> {
    let mut open = open(plan, storage)?;
    let rodata = open
        .maps
        .rodata_data
        .as_mut()
        .context("the BPF object has no .rodata")?;
    rodata.snaplen = options.snaplen;
    rodata.sample_every = options.sample;
    rodata.np_filter_on = u32::from(options.filter.is_some());
    rodata.np_filter_xdp_frags = u32::from(plan.traits.frags);
    set_tunnel!(rodata, options.tunnel);
    open.maps
        .events
        .reuse_fd(events)
        .context("failed to share the perf buffers")?;
    let object = open.open_object_mut();
    match &options.filter {
        Some(filter) => filter::inject_xdp(object, filter, plan.traits.frags)?,
        None => {
            kernel::bpf_object::prepare(object)?;
            filter::prune(object)?;
        }
    }
    open.load().map_err(|error| {
        anyhow!(
            "failed to load the XDP programs: {error:?}\n{}",
            log::take()
        )
    })
}

/// Opens the object with the traits and the maps of the chain that it is going to join.
pub fn open<'a>(
    plan: &Plan,
    storage: &'a mut MaybeUninit<OpenObject>,
) -> Result<OpenXdpdumpSkel<'a>> {
    let mut open = XdpdumpSkelBuilder::default()
        .open(storage)
        .context("failed to open the BPF object")?;
    set_traits(&mut open.progs.xdp_dump, plan.traits);
    set_traits(&mut open.progs.xdp_chain, plan.traits);
    set_traits(&mut open.progs.xdp_alone, plan.traits);
    let maps = [
        (&mut open.maps.next_prog_map, "next_prog_map"),
        (&mut open.maps.chain_stats, "chain_stats"),
        (&mut open.maps.chain_state, "chain_state"),
    ];
    for (map, name) in maps {
        if let Some(shared) = plan.shared(name)? {
            map.reuse_fd(shared.as_fd())
                .with_context(|| format!("failed to share the map {name}"))?;
        }
    }
    Ok(open)
}

/// Makes a program fit for a chain.
pub fn set_traits(program: &mut OpenProgramMut<'_>, traits: Traits) {
    program.set_flags(traits.flags());
    let old = traits.attach_type != libbpf_sys::BPF_XDP;
    program.set_attach_type(if old {
        ProgramAttachType::CgroupInetIngress
    } else {
        ProgramAttachType::Xdp
    });
}
