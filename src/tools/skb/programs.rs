//! `--filter-trace-tc` and `--filter-trace-xdp`: every loaded tc and XDP program, watched by fentry and fexit; programs that are loaded
//! later too; and the kernel functions that they call. A program that cannot be watched is told once and left out.

use std::mem::MaybeUninit;
use std::os::fd::AsFd;

use anyhow::{Context, Result, bail};
use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{MapMut, OpenMapMut, OpenObject};
use libbpf_sys as sys;

use crate::bpf::skb::SkbSkel;
use crate::bpf::skb::types::skb_program;
use crate::bpf::skb_prog::{OpenSkbProgSkel, SkbProgSkelBuilder};
use crate::filter::members::Condition;
use crate::filter::{Filters, set_filter};
use crate::kernel::bpf_object;
use crate::kernel::features::Features;
use crate::kernel::program::{self, Function, Loaded};
use crate::kernel::trampoline::{self, AttachPoint, Patch, Target, Watch};
use crate::kernel::{attach, xdp};
use crate::run::log;
use crate::text::escape::escaped;
use crate::tools::Transport;

use super::args::Args;
use super::columns::{self, Of};
use super::event::SECTION_MEMBERS;
use super::helpers::Helpers;
use super::members::Members;
use super::traced_program::{Kind, TracedProgram};

/// What stands in the programs where the id of the watched one belongs.
const PROGRAM_ID: i32 = skb_program::SKB_PROGRAM_ID.0 as i32;

/// What decides which runs of programs are shown, and which members with them.
#[derive(Clone, Copy)]
pub struct Watched<'a> {
    pub filters: &'a Filters,
    /// --filter-xdp-expr
    pub xdp_filter: Option<&'a Condition>,
    pub members: &'a Members,
    pub xdp_members: &'a Members,
}

/// An object whose programs watch programs of one kind.
struct Watcher<'a> {
    kind: Kind,
    open: OpenSkbProgSkel<'a>,
}

/// What the programs of [`Watcher`]s are kept in.
pub type Storage = [MaybeUninit<OpenObject>; 2];

/// All that is watched.
pub struct Programs<'a> {
    watchers: Vec<Watcher<'a>>,
    watches: Vec<Watch>,
    /// id of the last program that was looked at: later ones have larger ids
    last: u32,
    /// watched programs by kind: tc, XDP
    counts: [usize; 2],
    helpers: Option<Helpers<'a>>,
    started: bool,
}

impl<'a> Programs<'a> {
    /// Prepares what is to be attached; `None` where no program is to be watched.
    pub fn prepare(
        args: &Args,
        features: &Features,
        watched: Watched<'_>,
        main: &SkbSkel<'_>,
        helpers: Option<Helpers<'a>>,
        storage: &'a mut Storage,
    ) -> Result<Option<Self>> {
        let [tc, xdp] = storage;
        let mut watchers = Vec::new();
        if args.filter_trace_tc {
            watchers.push(Watcher::prepare(
                Kind::Tc,
                args,
                features,
                watched,
                main,
                tc,
            )?);
        }
        if args.filter_trace_xdp {
            watchers.push(Watcher::prepare(
                Kind::Xdp,
                args,
                features,
                watched,
                main,
                xdp,
            )?);
        }
        Ok((!watchers.is_empty() || helpers.is_some()).then(|| Self {
            watchers,
            watches: Vec::new(),
            last: 0,
            counts: [0; 2],
            helpers,
            started: false,
        }))
    }

    /// Watches the programs that are loaded now, and tells how many they are.
    pub fn start(&mut self) -> Result<Vec<TracedProgram>> {
        let programs = self.look()?;
        self.started = true;
        let count = |kind: Kind| match self.counts[kind as usize] {
            1 => format!("1 {} program", kind.name()),
            n => format!("{n} {} programs", kind.name()),
        };
        let mut counts: Vec<String> = self.watchers.iter().map(|w| count(w.kind)).collect();
        counts.extend(self.helpers.as_ref().map(Helpers::summary));
        log::note(&format!(
            "tracing {}, and those that are loaded later",
            counts.join(", ")
        ));
        Ok(programs)
    }

    /// Watches what has been loaded since the last look: one system call where nothing has.
    pub fn look(&mut self) -> Result<Vec<TracedProgram>> {
        let mut found = Vec::new();
        while let Some(id) = program::next_id(self.last) {
            self.last = id;
            found.extend(self.consider(id)?);
        }
        Ok(found)
    }

    fn consider(&mut self, id: u32) -> Result<Option<TracedProgram>> {
        let Some(loaded) = program::open(id)? else {
            return Ok(None);
        };
        let of_type = kind_of_type(loaded.info.kind);
        let extension = loaded.info.kind == sys::BPF_PROG_TYPE_EXT;
        if let (Some(helpers), true) = (&mut self.helpers, extension || of_type.is_some()) {
            helpers.add(loaded.fd.as_fd())?;
        }
        if !extension && !self.watchers.iter().any(|w| Some(w.kind) == of_type) {
            return Ok(None);
        }
        let main = main_function(&loaded);
        let kind = match (&main, of_type) {
            (_, Some(kind)) => kind,
            // What an extension (libxdp's dispatcher calls such) works on, its main function says.
            (Ok(main), None) => match main.context.as_deref() {
                Some("xdp_md") => Kind::Xdp,
                Some("__sk_buff") => Kind::Tc,
                _ => return Ok(None),
            },
            (Err(_), None) => return Ok(None),
        };
        let Some(watcher) = self.watchers.iter().find(|w| w.kind == kind) else {
            return Ok(None);
        };
        let watched = main.and_then(|main| Ok((watcher.watch(&loaded, &main)?, main)));
        match watched {
            Ok((watches, main)) => {
                self.watches.extend(watches);
                self.counts[kind as usize] += 1;
                let program = TracedProgram {
                    id,
                    name: escaped(main.name.as_bytes()),
                    kind,
                };
                if self.started {
                    eprintln!(
                        "netprobe: {} program {} (id {id}) was loaded: traced from now on",
                        kind.name(),
                        program.name
                    );
                }
                Ok(Some(program))
            }
            Err(why) => {
                eprintln!(
                    "netprobe: {} program {} (id {id}) is not traced: {why:#}{}",
                    kind.name(),
                    escaped(loaded.info.name.as_bytes()),
                    hint(&why)
                );
                Ok(None)
            }
        }
    }

    /// Hits that the kernel skipped.
    pub fn missed(&self) -> u64 {
        self.watches
            .iter()
            .map(|w| bpf_object::missed(w.program_fd()))
            .sum()
    }
}

impl<'a> Watcher<'a> {
    fn prepare(
        kind: Kind,
        args: &Args,
        features: &Features,
        watched: Watched<'_>,
        main: &SkbSkel<'_>,
        storage: &'a mut MaybeUninit<OpenObject>,
    ) -> Result<Self> {
        let mut builder = SkbProgSkelBuilder::default();
        if let Some(file) = &args.types.kernel_btf {
            builder
                .obj_builder
                .btf_custom_path(file)
                .context("--kernel-btf")?;
        }
        let mut open = builder
            .open(storage)
            .context("failed to open the BPF object")?;
        let rodata = open
            .maps
            .rodata_data
            .as_mut()
            .context("the BPF object has no .rodata")?;
        rodata.use_cast = u8::from(features.rdonly_cast);
        rodata.np_ring_wakeup = args.transport.wakeup(&args.engine);
        rodata.has_buff_len = u8::from(kind == Kind::Xdp && xdp::has_frags());
        let members = match kind {
            Kind::Tc => watched.members,
            Kind::Xdp => watched.xdp_members,
        };
        rodata.sections = args.sections()
            & columns::sections(|column| match column.of {
                Of::All => true,
                Of::Skbs => kind == Kind::Tc,
                Of::Functions => false,
            });
        if !members.paths().is_empty() {
            rodata.sections |= SECTION_MEMBERS;
        }
        rodata.np_path_count = members.paths().len() as u32;
        for (to, from) in rodata.np_paths.iter_mut().zip(members.paths()) {
            (to.pointers, to.offsets) = (from.pointers, from.offsets);
            (to.offset, to.size) = (from.offset, from.size);
        }
        rodata.snap_len = args.snap_len();
        rodata.track = u8::from(args.track());
        rodata.track_stack = u8::from(args.track_stack());
        let on = match kind {
            Kind::Tc => watched.filters.on(features.skb_fields),
            Kind::Xdp => watched.filters.on_xdp(watched.xdp_filter),
        };
        set_filter!(rodata, on);
        share(&mut open, main)?;
        match args.transport.transport {
            Transport::Perf => open.maps.rings.set_autocreate(false),
            Transport::Ringbuf => open.maps.rings.reuse_fd(main.maps.rings.as_fd()),
        }
        .context("failed to share a map between BPF objects")?;
        let (enter, leave) = kind.watchers();
        for mut p in open.open_object_mut().progs_mut() {
            let name = p.name().to_string_lossy().into_owned();
            p.set_autoload(name == enter || name == leave);
        }
        match kind {
            Kind::Tc => watched.filters.prepare(open.open_object_mut(), features)?,
            Kind::Xdp => {
                watched
                    .filters
                    .prepare_xdp(open.open_object_mut(), watched.xdp_filter, features)?
            }
        }
        Ok(Self { kind, open })
    }

    fn watch(&self, loaded: &Loaded, main: &Function) -> Result<[Watch; 2]> {
        let object = self.open.open_object();
        let target = Target {
            program: Some(loaded.fd.as_fd()),
            btf_id: main.btf,
        };
        let patch = Patch {
            placeholder: PROGRAM_ID,
            value: loaded.info.id as i32,
        };
        let (enter, leave) = self.kind.watchers();
        attach::make_room(2)?;
        // The exit first: it does nothing until an entry has remembered the packet.
        let leave = trampoline::watch(object, leave, target, AttachPoint::Exit, patch)?;
        let enter = trampoline::watch(object, enter, target, AttachPoint::Entry, patch)?;
        Ok([enter, leave])
    }
}

/// The maps of the main object in the place of this one's.
fn share(open: &mut OpenSkbProgSkel<'_>, main: &SkbSkel<'_>) -> Result<()> {
    let same = |map: &mut OpenMapMut<'_>, of: &MapMut<'_>| {
        map.reuse_fd(of.as_fd())
            .context("failed to share a map between BPF objects")
    };
    let (maps, of) = (&mut open.maps, &main.maps);
    same(&mut maps.events, &of.events)?;
    same(&mut maps.stats, &of.stats)?;
    same(&mut maps.data_config, &of.data_config)?;
    same(&mut maps.tracked, &of.tracked)?;
    same(&mut maps.contexts, &of.contexts)?;
    same(&mut maps.packets, &of.packets)?;
    same(&mut maps.owners, &of.owners)?;
    same(&mut maps.watching, &of.watching)?;
    same(&mut maps.xdp_links, &of.xdp_links)
}

fn kind_of_type(kind: u32) -> Option<Kind> {
    match kind {
        sys::BPF_PROG_TYPE_SCHED_CLS | sys::BPF_PROG_TYPE_SCHED_ACT => Some(Kind::Tc),
        sys::BPF_PROG_TYPE_XDP => Some(Kind::Xdp),
        _ => None,
    }
}

fn main_function(loaded: &Loaded) -> Result<Function> {
    if loaded.info.ifindex != 0 {
        bail!("it runs in a network card");
    }
    program::functions(loaded.fd.as_fd())?
        .into_iter()
        .next()
        .context("its BTF does not name its main function")
}

/// What to do, where the reason alone does not say it.
fn hint(why: &anyhow::Error) -> &'static str {
    match why
        .downcast_ref::<std::io::Error>()
        .map(std::io::Error::kind)
    {
        Some(std::io::ErrorKind::PermissionDenied) => {
            " (a locked-down kernel refuses fentry and fexit: boot with lockdown=none)"
        }
        _ => "",
    }
}
