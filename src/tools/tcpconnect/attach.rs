//! Loads the programs of `netprobe tcpconnect` in the first of the ways that works, and attaches them.

use std::any::Any;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::{Context, Result, anyhow, bail};
use libbpf_rs::skel::Skel;
use libbpf_rs::{Link, OpenObject, ProgramMut};

use crate::bpf::tcpconnect::TcpconnectSkel;
use crate::engine::drain::Drain;
use crate::kernel::bpf_object;
use crate::kernel::btf_core::CoreBtf;
use crate::kernel::trampoline;
use crate::run::programs;
use crate::usage::UsageError;

use super::args::{Args, Filter};
use super::probes::{self, CONNECT, Kernel, PAIRS, Pair, RECEIVE};

/// What is attached; dropping it detaches.
#[derive(Default)]
pub struct Attached {
    /// libbpf's, and those of trampolines
    links: Vec<Box<dyn Any>>,
    /// programs of trampolines: asked after their links have gone
    programs: Vec<OwnedFd>,
    /// programs whose misses count, and their links: the returns' are seen as connects without one where there is an entry
    counted: Vec<(i32, Option<i32>)>,
    missed: u64,
}

/// The programs of a run, loaded and attached in the first of the ways that works, and their buffers.
pub fn start<'a>(
    args: &Args,
    filter: &Filter,
    kernel: &Kernel,
    core: &CoreBtf,
    storages: &'a mut [MaybeUninit<OpenObject>; PAIRS],
) -> Result<(TcpconnectSkel<'a>, Drain, Attached)> {
    let mut pairs = kernel.pairs.iter().peekable();
    for storage in storages {
        let Some(&pair) = pairs.next() else { break };
        match start_pair(args, filter, kernel, core, pair, storage) {
            Ok(started) => return Ok(started),
            Err(e) if e.is::<UsageError>() || pairs.peek().is_none() => return Err(e),
            // Lockdown, an architecture without trampolines, another tracer's hands on the function.
            Err(_) => {}
        }
    }
    bail!("no way to see the return of connect")
}

/// Loads and attaches, with the buffers read from the first event on.
fn start_pair<'a>(
    args: &Args,
    filter: &Filter,
    kernel: &Kernel,
    core: &CoreBtf,
    pair: Pair,
    storage: &'a mut MaybeUninit<OpenObject>,
) -> Result<(TcpconnectSkel<'a>, Drain, Attached)> {
    let skel = probes::load(args, filter, kernel, core, pair, storage)?;
    let (events, rings) = (skel.maps.events.as_fd(), skel.maps.rings.as_fd());
    let drain = Drain::start(args.transport.source(events, rings), args.engine.buffer())?;
    let attached = attach(args, kernel, pair, &skel)?;
    Ok((skel, drain, attached))
}

/// Attaches the programs that were loaded; those that tell what follows before those that start it.
fn attach(args: &Args, kernel: &Kernel, pair: Pair, skel: &TcpconnectSkel<'_>) -> Result<Attached> {
    let p = &skel.progs;
    let mut attached = Attached::default();
    if args.dns {
        attach_dns(kernel, pair, skel, &mut attached)?;
    }
    if args.outcome {
        attach_losses(skel, &mut attached)?;
        attached.counted(&p.drop, p.drop.attach(), "the tracepoint kfree_skb")?;
        attached.counted(
            &p.state,
            p.state.attach(),
            "the tracepoint inet_sock_set_state",
        )?;
    }
    let syn = |attached: &mut Attached| match args.outcome {
        true => attached.counted(&p.syn, p.syn.attach(), "tcp_connect"),
        false => Ok(()),
    };
    match pair {
        Pair::Fexit => {
            attached.trampoline(kernel, skel, &p.v4_connected, true)?;
            attached.trampoline(kernel, skel, &p.v6_connected, true)?;
        }
        Pair::Fentry => {
            attached.trampoline(kernel, skel, &p.v4_fexit, false)?;
            attached.trampoline(kernel, skel, &p.v6_fexit, false)?;
            syn(&mut attached)?;
            attached.trampoline(kernel, skel, &p.v4_fentry, true)?;
            attached.trampoline(kernel, skel, &p.v6_fentry, true)?;
        }
        Pair::Multi => {
            let multi = |program: &ProgramMut<'_>, function, returns| {
                program.attach_kprobe_multi(returns, vec![function])
            };
            for (program, function) in [&p.v4_multi_return, &p.v6_multi_return]
                .into_iter()
                .zip(CONNECT)
            {
                attached.add(multi(program, function, true), function)?;
            }
            syn(&mut attached)?;
            for (program, function) in [&p.v4_multi_entry, &p.v6_multi_entry]
                .into_iter()
                .zip(CONNECT)
            {
                attached.counted(program, multi(program, function, false), function)?;
            }
        }
        Pair::Kprobe => {
            for (program, function) in [&p.v4_return, &p.v6_return].into_iter().zip(CONNECT) {
                attached.add(program.attach(), function)?;
            }
            syn(&mut attached)?;
            for (program, function) in [&p.v4_entry, &p.v6_entry].into_iter().zip(CONNECT) {
                attached.counted(program, program.attach(), function)?;
            }
        }
    }
    Ok(attached)
}

/// What else becomes of the packets of a handshake, each by entry and return. What a kernel does not have is told.
fn attach_losses(skel: &TcpconnectSkel<'_>, attached: &mut Attached) -> Result<()> {
    let p = &skel.progs;
    for (returns, entry, function, blank) in [
        (
            &p.listener_return,
            &p.listener,
            "tcp_conn_request",
            "SYNs that a full listener drops are not named",
        ),
        (
            &p.icmp4_return,
            &p.icmp4,
            "tcp_v4_err",
            "errors by ICMP during connect are not known",
        ),
        (
            &p.icmp6_return,
            &p.icmp6,
            "tcp_v6_err",
            "errors by ICMPv6 during connect are not known",
        ),
    ] {
        match returns.attach() {
            Ok(link) => attached.add(Ok(link), function)?,
            Err(e) => {
                eprintln!("netprobe: the kernel refuses a probe on {function} ({e:#}): {blank}");
                continue;
            }
        };
        attached.counted(entry, entry.attach(), function)?;
    }
    // The module may not be there: then nothing floods.
    if let Ok(link) = p.flooded.attach() {
        attached.counted(&p.flooded, Ok(link), "br_flood")?;
    }
    Ok(())
}

/// What processes receive: by entry and return, or by the return alone.
fn attach_dns(
    kernel: &Kernel,
    pair: Pair,
    skel: &TcpconnectSkel<'_>,
    attached: &mut Attached,
) -> Result<()> {
    let p = &skel.progs;
    if !pair.sees_entries() {
        for program in [&p.dns_udp4, &p.dns_udp6, &p.dns_tcp] {
            attached.trampoline(kernel, skel, program, true)?;
        }
        return Ok(());
    }
    let returns = [&p.dns_udp4_return, &p.dns_udp6_return, &p.dns_tcp_return];
    let entries = [&p.dns_udp4_entry, &p.dns_udp6_entry, &p.dns_tcp_entry];
    for ((returns, entry), function) in returns.into_iter().zip(entries).zip(RECEIVE) {
        let attach = |program: &ProgramMut<'_>, returns| match pair {
            Pair::Multi => program.attach_kprobe_multi(returns, vec![function]),
            _ => program.attach_kprobe(returns, function),
        };
        attached.counted(returns, attach(returns, true), function)?;
        attached.counted(entry, attach(entry, false), function)?;
    }
    Ok(())
}

impl Attached {
    /// Gives the link's fd.
    fn add(&mut self, link: libbpf_rs::Result<Link>, to: &str) -> Result<i32> {
        let link = link.map_err(|e| anyhow!("failed to attach to {to}: {e:?}"))?;
        let fd = link.as_fd().as_raw_fd();
        self.links.push(Box::new(link));
        Ok(fd)
    }

    fn counted(
        &mut self,
        program: &ProgramMut<'_>,
        link: libbpf_rs::Result<Link>,
        to: &str,
    ) -> Result<()> {
        let link = self.add(link, to)?;
        let program = program.as_fd().as_raw_fd();
        self.counted.push((program, Some(link)));
        Ok(())
    }

    /// Loads a program and attaches it by a trampoline to the function that its section names.
    fn trampoline(
        &mut self,
        kernel: &Kernel,
        skel: &TcpconnectSkel<'_>,
        program: &ProgramMut<'_>,
        counted: bool,
    ) -> Result<()> {
        let to = program.section().to_string_lossy();
        let fd = match kernel.targets.load(skel.object(), program)? {
            // A module's function (IPv6 may be one): libbpf has loaded it.
            None => {
                self.add(program.attach_trace(), &to)?;
                program.as_fd().as_raw_fd()
            }
            Some(loaded) => {
                let link = trampoline::attach(loaded.as_fd());
                let link = link.with_context(|| format!("failed to attach to {to}"))?;
                self.links.push(Box::new(link));
                let fd = loaded.as_raw_fd();
                self.programs.push(loaded);
                fd
            }
        };
        if counted {
            self.counted.push((fd, None));
        }
        Ok(())
    }

    /// Nothing is sent any more.
    pub fn detach(&mut self) {
        // The programs outlive their links and are asked later; links must be asked now.
        let links = self.counted.iter().filter_map(|c| c.1);
        self.missed = links.map(bpf_object::missed_by_link).sum();
        // In the order of attaching backwards: connects that start are not followed, those that return are.
        while self.links.pop().is_some() {}
    }
}

impl programs::Attached for Attached {
    /// Hits that the kernel passed over, returns apart; to be asked after [`Attached::detach`].
    fn missed(&self) -> u64 {
        let programs = self.counted.iter().map(|c| c.0);
        self.missed + programs.map(bpf_object::missed).sum::<u64>()
    }
}
