//! `--programs`: what XDP, tc and cgroup programs drop, by program. A fexit program on each counts its verdicts; run counts
//! (bpf_enable_stats) have no verdicts in them.

use std::collections::{HashMap, HashSet};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;

use anyhow::{Context, Result, bail};
use libbpf_rs::skel::OpenSkel;
use libbpf_rs::{MapCore, MapFlags, MapHandle, MapType, OpenObject};
use libbpf_sys as sys;

use crate::bpf::drops_prog::types::{drop_program, drop_verdict};
use crate::bpf::drops_prog::{DropsProgSkelBuilder, OpenDropsProgSkel};
use crate::bpf::read;
use crate::kernel::program::{self, Loaded};
use crate::kernel::trampoline::{self, AttachPoint, Patch, Target, Watch};
use crate::kernel::{attach, bpf_object};
use crate::run::object;
use crate::text::escape::escaped;

/// What stands in the programs where the id of the watched one belongs.
const PROGRAM_ID: i32 = drop_program::DROP_PROGRAM_ID.0 as i32;

/// What a program works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Xdp,
    Tc,
    Cgroup,
}

impl Kind {
    fn of_type(kind: u32) -> Option<Self> {
        match kind {
            sys::BPF_PROG_TYPE_XDP => Some(Self::Xdp),
            sys::BPF_PROG_TYPE_SCHED_CLS | sys::BPF_PROG_TYPE_SCHED_ACT => Some(Self::Tc),
            sys::BPF_PROG_TYPE_CGROUP_SKB => Some(Self::Cgroup),
            _ => None,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Xdp => "xdp",
            Self::Tc => "tc",
            Self::Cgroup => "cgroup",
        }
    }

    fn watcher(self) -> &'static str {
        match self {
            Self::Xdp => "drops_xdp",
            Self::Tc => "drops_tc",
            Self::Cgroup => "drops_cgroup",
        }
    }

    fn verdict(self, value: i32) -> &'static str {
        match (self, value) {
            (Self::Xdp, 0) => "XDP_ABORTED",
            (Self::Xdp, _) => "XDP_DROP",
            (Self::Tc, _) => "TC_ACT_SHOT",
            (Self::Cgroup, _) => "refused",
        }
    }
}

/// Packets that a program dropped in an interval.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    pub kind: Kind,
    pub id: u32,
    /// escaped
    pub name: String,
    pub verdict: &'static str,
    pub ifindex: u32,
    pub netns: u32,
    pub packets: u64,
}

/// The watched programs.
pub struct Verdicts<'a> {
    open: OpenDropsProgSkel<'a>,
    counts: MapHandle,
    programs: HashMap<u32, (Kind, String)>,
    watches: HashMap<u32, Watch>,
    /// those that could not be watched
    left: HashSet<u32>,
    /// counts that were given already
    given: HashMap<Vec<u8>, u64>,
}

impl<'a> Verdicts<'a> {
    pub fn begin(storage: &'a mut MaybeUninit<OpenObject>) -> Result<Self> {
        let mut open = object::open(DropsProgSkelBuilder::default(), None, storage)?;
        let options = sys::bpf_map_create_opts {
            sz: size_of::<sys::bpf_map_create_opts>() as _,
            ..Default::default()
        };
        let sizes = (size_of::<drop_verdict>() as u32, size_of::<u64>() as u32);
        let counts = MapHandle::create(
            MapType::Hash,
            Some("verdicts"),
            sizes.0,
            sizes.1,
            open.maps.verdicts.max_entries(),
            &options,
        )
        .context("failed to make a map")?;
        let shared = open.maps.verdicts.reuse_fd(counts.as_fd());
        shared.context("failed to share a map")?;
        bpf_object::prepare(open.open_object_mut())?;
        let mut verdicts = Self {
            open,
            counts,
            programs: HashMap::new(),
            watches: HashMap::new(),
            left: HashSet::new(),
            given: HashMap::new(),
        };
        verdicts.look()?;
        eprintln!(
            "netprobe: counting verdicts of {} XDP, tc and cgroup programs by fexit",
            verdicts.watches.len()
        );
        Ok(verdicts)
    }

    /// Watches programs that were loaded since. What is watched stays loaded.
    pub fn look(&mut self) -> Result<()> {
        let mut id = 0;
        while let Some(next) = program::next_id(id) {
            id = next;
            if self.watches.contains_key(&id) || self.left.contains(&id) {
                continue;
            }
            let Some(loaded) = program::open(id)? else {
                continue;
            };
            let Some(kind) = Kind::of_type(loaded.info.kind) else {
                self.left.insert(id);
                continue;
            };
            match self.watch(kind, &loaded) {
                Ok((watch, name)) => {
                    self.watches.insert(id, watch);
                    self.programs.insert(id, (kind, name));
                }
                Err(why) => {
                    self.left.insert(id);
                    eprintln!(
                        "netprobe: drops of {} program {} (id {id}) are not counted: {why:#}",
                        kind.name(),
                        escaped(loaded.info.name.as_bytes())
                    );
                }
            }
        }
        Ok(())
    }

    fn watch(&self, kind: Kind, loaded: &Loaded) -> Result<(Watch, String)> {
        if loaded.info.ifindex != 0 {
            bail!("it runs in a network card");
        }
        let main = program::functions(loaded.fd.as_fd())?.into_iter().next();
        let main = main.context("its BTF does not name its main function")?;
        let target = Target {
            program: Some(loaded.fd.as_fd()),
            btf_id: main.btf,
        };
        let patch = Patch {
            placeholder: PROGRAM_ID,
            value: loaded.info.id as i32,
        };
        attach::make_room(1)?;
        let object = self.open.open_object();
        let watch = trampoline::watch(object, kind.watcher(), target, AttachPoint::Exit, patch)?;
        Ok((watch, escaped(main.name.as_bytes())))
    }

    /// What was dropped since the last call.
    pub fn take(&mut self) -> Result<Vec<Verdict>> {
        let mut taken = Vec::new();
        for bytes in self.counts.keys() {
            let value = self.counts.lookup(&bytes, MapFlags::ANY);
            let value = value.context("failed to read the verdicts")?;
            let packets = value.and_then(|v| Some(u64::from_ne_bytes(v.try_into().ok()?)));
            let (Some(packets), Some((key, _))) = (packets, read::<drop_verdict>(&bytes)) else {
                continue;
            };
            let before = self.given.insert(bytes, packets).unwrap_or(0);
            let Some((kind, name)) = self.programs.get(&key.program) else {
                continue;
            };
            if packets > before {
                taken.push(Verdict {
                    kind: *kind,
                    id: key.program,
                    name: name.clone(),
                    verdict: kind.verdict(key.verdict),
                    ifindex: key.ifindex,
                    netns: key.netns,
                    packets: packets - before,
                });
            }
        }
        taken.sort_by_key(|v| std::cmp::Reverse(v.packets));
        Ok(taken)
    }
}
