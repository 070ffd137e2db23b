//! `--mode trace`: the loaded programs watched from outside by fentry and fexit. Nothing at the interface is changed.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{ErrorKind, Link, MapCore, MapFlags, MapHandle, OpenObject};

use crate::bpf;
use crate::bpf::xdpdump::types::np_xdp_count;
use crate::bpf::xdptrace::{XdptraceSkel, XdptraceSkelBuilder};
use crate::filter;
use crate::kernel::bpf_object;
use crate::kernel::features;
use crate::kernel::netns::Netns;
use crate::kernel::program::{self, Function};
use crate::kernel::xdp::{self, Replaced};
use crate::run::log;
use crate::run::loss::Loss;
use crate::text::escape::escaped;
use crate::usage::usage;

use super::decode::SeenAt;
use super::probes::{Counts, Options, set_tunnel};

/// A function of a loaded program, to be watched.
#[derive(Debug)]
pub struct Target {
    pub ifindex: u32,
    pub program: u32,
    pub function: String,
    fd: Rc<OwnedFd>,
}

/// Chooses what to watch at an interface: the programs that `wanted` names (name, name@id, id, `all`), or the main one.
pub fn targets(iface: &str, ifindex: u32, wanted: &[String]) -> Result<Vec<Target>> {
    let attached = xdp::query(ifindex)
        .with_context(|| format!("failed to ask for the XDP program of {iface}"))?
        .with_context(|| format!("{iface} has no XDP program to trace"))?;
    let mut candidates = Vec::new();
    let extensions = xdp::extensions(attached.program).unwrap_or_default();
    // Of a function that was replaced, its replacement runs, and the kernel lets nobody watch it.
    let is_replaced = |function: &Function| {
        extensions
            .iter()
            .any(|extension| match &extension.replaced {
                Replaced::Id(id) => *id == function.btf,
                Replaced::Name(name) => *name == function.name,
            })
    };
    let mut ids = vec![attached.program];
    ids.extend(extensions.iter().map(|extension| extension.program));
    for id in ids {
        let fd = bpf_object::program_by_id(id)
            .with_context(|| format!("failed to open program {id}"))?;
        let fd = Rc::new(fd);
        for function in program::functions(fd.as_fd())? {
            // A fexit program reads the packet through the context: a subprogram without it cannot be watched.
            let is_gone = id == attached.program && is_replaced(&function);
            if function.takes_context && !is_gone {
                candidates.push(Target {
                    ifindex,
                    program: id,
                    function: function.name,
                    fd: fd.clone(),
                });
            }
        }
    }
    if wanted.is_empty() {
        candidates.truncate(1);
    } else if !wanted.iter().any(|name| name == "all") {
        check_names(iface, &candidates, wanted)?;
        candidates.retain(|target| wanted.iter().any(|name| target.is_named(name)));
    }
    ensure!(
        !candidates.is_empty(),
        "no function of program {} of {iface} takes a packet",
        attached.program
    );
    Ok(candidates)
}

/// Each name has to be there, and only once.
fn check_names(iface: &str, candidates: &[Target], wanted: &[String]) -> Result<()> {
    let known = candidates
        .iter()
        .map(Target::name)
        .collect::<Vec<_>>()
        .join(", ");
    for name in wanted {
        match candidates
            .iter()
            .filter(|target| target.is_named(name))
            .count()
        {
            0 => bail!(usage(format!(
                "no program {name} at {iface}; there are: {known}"
            ))),
            1 => {}
            _ if name.bytes().all(|b| b.is_ascii_digit()) => {}
            _ => bail!(usage(format!(
                "{name} is not the only one of its name at {iface}: {known}"
            ))),
        }
    }
    Ok(())
}

impl Target {
    /// By function, by function@id, or by the program's id alone.
    fn is_named(&self, name: &str) -> bool {
        name == self.function || name == self.name() || name.parse() == Ok(self.program)
    }

    /// `function@program`, as a user may name it.
    pub fn name(&self) -> String {
        format!("{}@{}", escaped(self.function.as_bytes()), self.program)
    }
}

/// A watched function.
pub struct Trace<'a> {
    skel: XdptraceSkel<'a>,
    links: Vec<Link>,
    points: Points,
    ifindex: u32,
    function: String,
}

/// What to send of the watched functions.
#[derive(Clone, Copy, Debug)]
pub struct Points {
    pub entry: bool,
    pub exit: bool,
    /// Bits of verdicts that are sent at exit.
    pub verdicts: u32,
}

impl<'a> Trace<'a> {
    /// Loads and attaches. `index`: the program's number in the events.
    pub fn begin(
        target: &Target,
        index: u32,
        options: &Options,
        points: Points,
        events: BorrowedFd<'_>,
        storage: &'a mut MaybeUninit<OpenObject>,
    ) -> Result<Self> {
        let mut open = XdptraceSkelBuilder::default()
            .open(storage)
            .context("failed to open the BPF object")?;
        let rodata = open
            .maps
            .rodata_data
            .as_mut()
            .context("the BPF object has no .rodata")?;
        rodata.snaplen = options.snaplen;
        rodata.sample_every = options.sample;
        rodata.use_buff_len = u8::from(xdp::has_frags());
        rodata.np_filter_on = u32::from(options.filter.is_some());
        rodata.send_entry = u8::from(points.entry);
        rodata.send_exit = u8::from(points.exit);
        rodata.verdicts = points.verdicts;
        rodata.program = index;
        set_tunnel!(rodata, options.tunnel);
        rodata.ifindex = target.ifindex;
        rodata.netns = Netns::current()?.inode;
        open.maps
            .events
            .reuse_fd(events)
            .context("failed to share the perf buffers")?;
        for program in [&mut open.progs.xdp_entry, &mut open.progs.xdp_exit] {
            program
                .set_attach_target(target.fd.as_raw_fd(), Some(target.function.clone()))
                .with_context(|| format!("failed to find {} in its program", target.name()))?;
        }
        if let Some(filter) = &options.filter {
            filter::inject_l2(open.open_object_mut(), filter)?;
        }
        let refused = |error: libbpf_rs::Error| {
            let locked = features::lockdown().is_some_and(|mode| mode != "none");
            let lockdown = if locked && error.kind() == ErrorKind::PermissionDenied {
                " (a locked-down kernel refuses fentry and fexit; --mode chain works)"
            } else {
                ""
            };
            anyhow!("{error:?}\n{}", log::take())
                .context(format!("cannot trace {}{lockdown}", target.name()))
        };
        let skel = open.load().map_err(refused)?;
        // The exit first: it does nothing until an entry has decided.
        let links = vec![
            skel.progs.xdp_exit.attach_trace().map_err(refused)?,
            skel.progs.xdp_entry.attach_trace().map_err(refused)?,
        ];
        Ok(Trace {
            skel,
            links,
            points,
            ifindex: target.ifindex,
            function: target.function.clone(),
        })
    }

    /// Where its packets are seen.
    pub fn points(&self) -> Vec<SeenAt> {
        let Points { entry, exit, .. } = self.points;
        [(entry, SeenAt::Entry), (exit, SeenAt::Exit)]
            .into_iter()
            .filter_map(|(wanted, point)| wanted.then_some(point))
            .collect()
    }

    pub fn ifindex(&self) -> u32 {
        self.ifindex
    }

    pub fn function(&self) -> &str {
        &self.function
    }

    pub fn end(&mut self) {
        self.links.clear();
    }

    pub fn counts(&self) -> Result<Counts> {
        let per_cpu = self
            .skel
            .maps
            .xdp_count
            .lookup_percpu(&0u32.to_ne_bytes(), MapFlags::ANY)
            .context("failed to read the packet counters")?
            .unwrap_or_default();
        let counts = per_cpu
            .iter()
            .filter_map(|bytes| bpf::read::<np_xdp_count>(bytes));
        Counts::sum(
            counts.map(|(count, _)| (count.seen, count.matched)),
            |loss| self.add_loss(loss),
        )
    }

    /// The counters of what was sent and lost.
    pub fn stats(&self) -> Result<MapHandle> {
        MapHandle::try_from(&self.skel.maps.stats).context("failed to duplicate an fd")
    }

    pub fn add_loss(&self, loss: &mut Loss) -> Result<()> {
        loss.add_stats(&self.skel.maps.stats)
    }
}
