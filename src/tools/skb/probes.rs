//! Which functions `netprobe skb` attaches to, by which program, and how.

use std::collections::HashMap;
use std::os::fd::AsRawFd;

use anyhow::{Result, anyhow, bail};
use crossbeam_channel::Receiver;
use libbpf_rs::{Link, OpenProgramMut, ProgramAttachType, ProgramMut};
use nix::sys::signal::Signal;
use regex::Regex;

use crate::bpf::skb::{OpenSkbSkel, SkbSkel};
use crate::engine::progress::Progress;
use crate::engine::{loss, usage};
use crate::kernel::attach;
use crate::kernel::btf::{self, Btf, Function};
use crate::kernel::features::Features;
use crate::kernel::functions::TraceableSet;

use super::args::Backend;

/// A program of skb.bpf.c.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Prog {
    /// the skb is the nth argument
    Arg(u8),
    /// the skb is the nth argument, the drop reason the one after it
    Drop(u8),
}

impl Prog {
    const ALL: [Self; 7] = [
        Self::Arg(1),
        Self::Arg(2),
        Self::Arg(3),
        Self::Arg(4),
        Self::Arg(5),
        Self::Drop(1),
        Self::Drop(2),
    ];

    fn of(f: &Function) -> Self {
        // Others that take a reason (skb_release_data) do so for every skb, a dropped one or not.
        let drops = f.name.contains("kfree_skb") || f.name.contains("drop");
        match (f.arg, f.reason_arg) {
            (1, Some(2)) if drops => Self::Drop(1),
            (2, Some(3)) if drops => Self::Drop(2),
            (n, _) => Self::Arg(n),
        }
    }

    fn open<'a, 'o>(self, skel: &'a mut OpenSkbSkel<'o>) -> &'a mut OpenProgramMut<'o> {
        let p = &mut skel.progs;
        match self {
            Self::Arg(1) => &mut p.skb_1,
            Self::Arg(2) => &mut p.skb_2,
            Self::Arg(3) => &mut p.skb_3,
            Self::Arg(4) => &mut p.skb_4,
            Self::Arg(_) => &mut p.skb_5,
            Self::Drop(1) => &mut p.skb_drop_1,
            Self::Drop(_) => &mut p.skb_drop_2,
        }
    }

    fn loaded<'a, 'o>(self, skel: &'a SkbSkel<'o>) -> &'a ProgramMut<'o> {
        let p = &skel.progs;
        match self {
            Self::Arg(1) => &p.skb_1,
            Self::Arg(2) => &p.skb_2,
            Self::Arg(3) => &p.skb_3,
            Self::Arg(4) => &p.skb_4,
            Self::Arg(_) => &p.skb_5,
            Self::Drop(1) => &p.skb_drop_1,
            Self::Drop(_) => &p.skb_drop_2,
        }
    }
}

/// A function to attach to.
#[derive(Debug, Clone)]
struct Target {
    name: String,
    /// 0 where only the name is known
    addr: u64,
}

/// What is to be attached.
#[derive(Debug)]
pub struct Plan {
    backend: Backend,
    targets: HashMap<Prog, Vec<Target>>,
    count: usize,
    /// functions with an skb that the kernel does not let one trace
    untraceable: usize,
}

impl Plan {
    /// Functions that take an skb, from BTF, that `pattern` matches, and that the kernel lets one trace.
    pub fn make(
        btf: &Btf,
        features: &Features,
        backend: Option<Backend>,
        pattern: Option<&Regex>,
    ) -> Result<Self> {
        let backend = match backend {
            Some(Backend::KprobeMulti) if !features.kprobe_multi => {
                bail!(
                    "kernel {} has no kprobe.multi (it needs 5.18 with CONFIG_FPROBE=y): use --backend kprobe",
                    features.release
                );
            }
            Some(b) => b,
            None if features.kprobe_multi => Backend::KprobeMulti,
            None => Backend::Kprobe,
        };
        let mut functions = btf.functions_taking("sk_buff", &btf::modules())?;
        let all = functions.len();
        if let Some(pattern) = pattern {
            functions.retain(|f| pattern.is_match(&f.name));
        }
        if functions.is_empty() {
            return Err(usage(format!(
                "--filter-func {}: none of the {all} functions with an skb has such a name (the whole name must match: try .*NAME.*)",
                pattern.map_or("", Regex::as_str)
            )));
        }
        let names: std::collections::HashSet<&str> =
            functions.iter().map(|f| f.name.as_str()).collect();
        let traceable = TraceableSet::load(|n| names.contains(n));
        let mut plan = Self {
            backend,
            targets: HashMap::new(),
            count: 0,
            untraceable: 0,
        };
        for f in &functions {
            plan.add(f, &traceable);
        }
        if plan.count == 0 {
            bail!(
                "none of the {} functions asked for can be traced on this kernel (they are inlined, or marked notrace)",
                functions.len()
            );
        }
        Ok(plan)
    }

    fn add(&mut self, f: &Function, traceable: &TraceableSet) {
        let places = traceable.get(&f.name, f.module.as_deref());
        let by_addr = places.iter().all(|p| p.addr != 0);
        let found: Vec<Target> = places
            .iter()
            .map(|p| Target {
                name: f.name.clone(),
                addr: p.addr,
            })
            .collect();
        // A name that several functions share cannot be attached to by name; by address it can, many at once.
        let usable = match self.backend {
            Backend::KprobeMulti if by_addr => found,
            _ if found.len() == 1 => found,
            _ => Vec::new(),
        };
        if usable.is_empty() {
            self.untraceable += 1;
        }
        self.count += usable.len();
        if !usable.is_empty() {
            self.targets.entry(Prog::of(f)).or_default().extend(usable);
        }
    }

    /// Tells the open object which programs to load, and for which kind of probe.
    pub fn prepare(&self, open: &mut OpenSkbSkel<'_>) {
        for prog in Prog::ALL {
            let p = prog.open(open);
            p.set_autoload(self.targets.contains_key(&prog));
            if self.backend == Backend::KprobeMulti {
                p.set_attach_type(ProgramAttachType::KprobeMulti);
            }
        }
    }

    /// Attaches everything. A function that the kernel refuses is left out and counted.
    pub fn attach(&self, skel: &SkbSkel<'_>, stop: &Receiver<Signal>) -> Result<Attached> {
        let mut attached = Attached {
            links: Vec::new(),
            names: HashMap::new(),
            progs: Vec::new(),
            backend: self.backend,
            functions: 0,
            refused: self.untraceable,
            refusal: None,
        };
        let mut progress = Progress::new("netprobe: attaching", self.count);
        let mut groups: Vec<_> = self.targets.iter().collect();
        groups.sort_by_key(|(prog, _)| **prog);
        for (prog, targets) in groups {
            let program = prog.loaded(skel);
            attached.progs.push(program.as_fd_raw());
            match self.backend {
                Backend::KprobeMulti => {
                    attached.many(program, targets, &mut progress, stop)?;
                }
                Backend::Kprobe => attached.singly(program, targets, &mut progress, stop)?,
            }
        }
        if attached.functions == 0 {
            bail!(
                "the kernel refused a probe on each of the {} functions",
                self.count
            );
        }
        Ok(attached)
    }
}

/// What is attached; dropping it detaches.
pub struct Attached {
    links: Vec<Link>,
    /// names of the functions by address, where the addresses are known
    names: HashMap<u64, String>,
    /// fds of the programs, open as long as the skeleton
    progs: Vec<i32>,
    backend: Backend,
    functions: usize,
    refused: usize,
    /// the first function that the kernel refused, and why
    refusal: Option<String>,
}

impl Attached {
    fn many(
        &mut self,
        program: &ProgramMut<'_>,
        targets: &[Target],
        progress: &mut Progress,
        stop: &Receiver<Signal>,
    ) -> Result<()> {
        interrupted(stop)?;
        let result = if targets.iter().all(|t| t.addr != 0) {
            let addrs: Vec<u64> = targets.iter().map(|t| t.addr).collect();
            attach::kprobe_multi_addrs(program, &addrs)
        } else {
            let names: Vec<&str> = targets.iter().map(|t| t.name.as_str()).collect();
            attach::kprobe_multi_names(program, &names)
        };
        match result {
            Ok(link) => {
                self.links.push(link);
                for t in targets {
                    self.taken(t);
                }
                progress.at(self.functions);
                Ok(())
            }
            // One function that cannot be probed fails the whole batch: halve it to find that one.
            Err(_) if targets.len() > 1 => {
                let (a, b) = targets.split_at(targets.len() / 2);
                self.many(program, a, progress, stop)?;
                self.many(program, b, progress, stop)
            }
            Err(e) => {
                for t in targets {
                    self.refuse(&t.name, &e);
                }
                Ok(())
            }
        }
    }

    fn singly(
        &mut self,
        program: &ProgramMut<'_>,
        targets: &[Target],
        progress: &mut Progress,
        stop: &Receiver<Signal>,
    ) -> Result<()> {
        for t in targets {
            interrupted(stop)?;
            match program.attach_kprobe(false, &t.name) {
                Ok(link) => {
                    self.links.push(link);
                    self.taken(t);
                    progress.at(self.functions);
                }
                Err(e) => self.refuse(&t.name, &e.into()),
            }
        }
        Ok(())
    }

    fn refuse(&mut self, name: &str, why: &anyhow::Error) {
        self.refused += 1;
        self.refusal
            .get_or_insert_with(|| format!("{name}: {why:?}"));
    }

    fn taken(&mut self, t: &Target) {
        self.functions += 1;
        if t.addr != 0 {
            self.names.insert(t.addr, t.name.clone());
        }
    }

    /// One line for stderr.
    pub fn summary(&self) -> String {
        let how = match self.backend {
            Backend::Kprobe => "kprobe",
            Backend::KprobeMulti => "kprobe-multi",
        };
        let refused = match self.refused {
            0 => String::new(),
            n => format!(" ({n} more cannot be probed)"),
        };
        format!("tracing {} functions by {how}{refused}", self.functions)
    }

    /// Names by address.
    pub fn names(&self) -> &HashMap<u64, String> {
        &self.names
    }

    /// Hits that the kernel skipped.
    pub fn missed(&self) -> u64 {
        self.progs.iter().map(|&fd| loss::missed(fd)).sum()
    }

    /// Detaches. Single kprobes take the kernel up to 100 ms each: where there are many, a child process that holds the last
    /// reference to them does the waiting, and the user does not. Nothing is traced any more: the programs are paused.
    pub fn detach(self) {
        if self.backend == Backend::Kprobe && self.links.len() > 16 {
            attach::close_in_child(self.links);
        }
    }
}

fn interrupted(stop: &Receiver<Signal>) -> Result<()> {
    match stop.try_recv() {
        Ok(signal) => Err(anyhow!("stopped by {signal} while attaching")),
        Err(_) => Ok(()),
    }
}

/// The fd of a program, for queries.
trait RawProgramFd {
    fn as_fd_raw(&self) -> i32;
}

impl RawProgramFd for ProgramMut<'_> {
    fn as_fd_raw(&self) -> i32 {
        use std::os::fd::AsFd;
        self.as_fd().as_raw_fd()
    }
}
