//! What `netprobe skb` has attached: links, the functions' names by address, what the kernel refused and what it skipped.

use std::collections::HashSet;
use std::os::fd::{AsFd, AsRawFd};

use anyhow::{Context, Result, anyhow};
use crossbeam_channel::Receiver;
use libbpf_rs::skel::Skel;
use libbpf_rs::{Link, ProgramMut};
use nix::sys::signal::Signal;

use crate::bpf::skb::SkbSkel;
use crate::kernel::attach;
use crate::kernel::bpf_object;
use crate::kernel::functions::ByAddress;
use crate::run::programs;
use crate::run::progress::Progress;

use super::args::Backend;

/// A program of skb.bpf.c, by name.
pub type Prog = &'static str;

/// A function to attach to.
#[derive(Debug, Clone)]
pub struct Target {
    pub name: String,
    /// 0 where only the name is known
    pub addr: u64,
}

/// A loaded program by its name.
pub fn program<'a>(skel: &'a SkbSkel<'_>, name: &str) -> Result<ProgramMut<'a>> {
    skel.object()
        .progs_mut()
        .find(|p| p.name() == name)
        .with_context(|| format!("the BPF object has no program {name}"))
}

/// What is attached; dropping it detaches.
pub struct Attached {
    links: Vec<Link>,
    /// names of the functions by address, where the addresses are known
    names: ByAddress<String>,
    /// fds of the programs, open as long as the skeleton
    progs: Vec<i32>,
    backend: Backend,
    drops: bool,
    batch: usize,
    /// what is attached now goes to the functions' returns
    pub(super) at_return: bool,
    pub(super) functions: usize,
    pub(super) refused: usize,
    /// the first function that the kernel refused, and why
    pub(super) refusal: Option<String>,
    /// functions of netfilter's hooks whose entries are seen
    netfilter: HashSet<String>,
    /// what is attached now goes to such functions
    pub(super) of_netfilter: bool,
}

impl Attached {
    /// Nothing yet. `batch`: functions to a link of kprobe.multi; 0: all.
    pub fn new(backend: Backend, drops: bool, batch: usize) -> Self {
        Self {
            links: Vec::new(),
            names: ByAddress::default(),
            progs: Vec::new(),
            backend,
            drops,
            batch,
            at_return: false,
            functions: 0,
            refused: 0,
            refusal: None,
            netfilter: HashSet::new(),
            of_netfilter: false,
        }
    }

    /// A link of a program that was attached otherwise.
    pub fn add(&mut self, program: &ProgramMut<'_>, link: Link) {
        self.progs.push(program.as_fd().as_raw_fd());
        self.links.push(link);
    }

    pub(super) fn group(
        &mut self,
        skel: &SkbSkel<'_>,
        prog: Prog,
        targets: &[Target],
        progress: &mut Progress,
        stop: &Receiver<Signal>,
    ) -> Result<()> {
        let program = program(skel, prog)?;
        self.progs.push(program.as_fd().as_raw_fd());
        match self.backend {
            Backend::KprobeMulti => {
                let batch = match self.batch {
                    0 => targets.len(),
                    n => n,
                };
                targets
                    .chunks(batch.max(1))
                    .try_for_each(|part| self.many(&program, part, progress, stop))
            }
            Backend::Kprobe => self.singly(&program, targets, progress, stop),
        }
    }

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
            attach::kprobe_multi_addrs(program, &addrs, self.at_return)
        } else {
            let names: Vec<&str> = targets.iter().map(|t| t.name.as_str()).collect();
            attach::kprobe_multi_names(program, &names, self.at_return)
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
            match program.attach_kprobe(self.at_return, &t.name) {
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
        if self.of_netfilter {
            self.netfilter.insert(t.name.clone());
        }
        if t.addr != 0 {
            self.name_at(t.addr, &t.name);
        }
    }

    /// Names the function at `addr`. Asking blazesym for a name that is known would cost half a second at the first event.
    pub(super) fn name_at(&mut self, addr: u64, name: &str) {
        self.names.insert(addr, name.to_string());
        // ftrace's place in a function is behind the `endbr64` of CONFIG_X86_KERNEL_IBT, where there is one; bpf_get_func_ip
        // gives the start.
        if cfg!(target_arch = "x86_64") {
            self.names
                .entry(addr - 4)
                .or_insert_with(|| name.to_string());
        }
    }

    /// One line for stderr.
    pub fn summary(&self) -> String {
        if self.drops {
            return "tracing drops (tracepoint skb:kfree_skb)".to_string();
        }
        let how = match self.backend {
            Backend::Kprobe => "kprobe",
            Backend::KprobeMulti => "kprobe-multi",
        };
        let refused = match self.refused {
            0 => String::new(),
            n => format!(" ({n} more cannot be probed)"),
        };
        let functions = match self.functions {
            1 => "1 function".to_string(),
            n => format!("{n} functions"),
        };
        format!("tracing {functions} by {how}{refused}")
    }

    /// How functions are attached to.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Functions of netfilter's hooks whose entries are seen.
    pub fn netfilter_hooks(&self) -> &HashSet<String> {
        &self.netfilter
    }

    /// Names by address.
    pub fn names(&self) -> &ByAddress<String> {
        &self.names
    }
}

impl programs::Attached for Attached {
    /// Hits that the kernel skipped. Those of functions that BPF programs call (`Helpers`) are not among them: our own programs
    /// call these too, and are to be skipped.
    fn missed(&self) -> u64 {
        let by_link = |link: &Link| bpf_object::missed_by_link(link.as_fd().as_raw_fd());
        self.progs
            .iter()
            .map(|&fd| bpf_object::missed(fd))
            .sum::<u64>()
            + self.links.iter().map(by_link).sum::<u64>()
    }
}

/// Detaches, however the run ends. A single kprobe takes the kernel up to 100 ms, and so does a link of many: where there are many
/// links, a child process that holds the last reference to them does the waiting, and the user does not. The run pauses the programs.
impl Drop for Attached {
    fn drop(&mut self) {
        if self.links.len() > 16 {
            attach::close_in_child(std::mem::take(&mut self.links));
        }
    }
}

fn interrupted(stop: &Receiver<Signal>) -> Result<()> {
    match stop.try_recv() {
        Ok(signal) => Err(anyhow!("stopped by {signal} while attaching")),
        Err(_) => Ok(()),
    }
}
