//! Loads the programs of `netprobe tcp` and attaches them.

use std::any::Any;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::{Context, Result, anyhow};
use libbpf_rs::skel::{OpenSkel, Skel};
use libbpf_rs::{MapCore, MapFlags, OpenObject, ProgramMut};

use crate::bpf::tcp::types::conn_what;
use crate::bpf::tcp::{TcpSkel, TcpSkelBuilder};
use crate::engine::drain::Drain;
use crate::filter;
use crate::kernel::bpf_object;
use crate::kernel::btf::Btf;
use crate::kernel::btf_core::CoreBtf;
use crate::kernel::features::Features;
use crate::kernel::trampoline::{self, Targets};
use crate::run::{log, object};

use super::args::Args;

/// What [`Kernel::new`] asks the BTF for.
pub const NAMES: &str = "sk_rst_reason\ntcp_undo_cwnd_reduction\ntcp_ack\nsecurity_sock_graft\nbtf_trace_inet_sock_set_state\n\
     bpf_fentry_test1\nregister_ftrace_direct\nregister_ftrace_direct_cb";
/// accept()
const GRAFT: &str = "security_sock_graft";
/// the tracepoint of changes of state
const STATE: &str = "inet_sock_set_state";
/// an acknowledgement comes
const ACK: &str = "tcp_ack";

/// What is known of the running kernel.
#[derive(Debug)]
pub struct Kernel {
    targets: Targets,
    /// the tracepoint kfree_skb says why (5.17)
    pub has_drop_reason: bool,
    /// the tracepoint tcp_send_reset says why (6.10)
    pub has_reset_reason: bool,
    /// the function that takes a reaction to a loss back can be probed
    pub tells_undone: bool,
}

impl Kernel {
    pub fn new(features: &Features, btf: &Btf) -> Self {
        Self {
            targets: Targets::new(btf, [&GRAFT, &ACK].into_iter()).with_tracepoints(btf, &[STATE]),
            has_drop_reason: features.drop_reasons,
            has_reset_reason: btf.has_enum("sk_rst_reason"),
            tells_undone: btf.has_function("tcp_undo_cwnd_reduction"),
        }
    }
}

/// What is attached; dropping it detaches.
#[derive(Default)]
pub struct Attached {
    /// libbpf's, and those of typed programs
    links: Vec<Box<dyn Any>>,
    /// typed programs
    loaded: Vec<OwnedFd>,
    /// of programs whose misses count
    programs: Vec<i32>,
}

pub fn load<'a>(
    args: &Args,
    (kernel, features): (&Kernel, &Features),
    core: &CoreBtf,
    storage: &'a mut MaybeUninit<OpenObject>,
) -> Result<TcpSkel<'a>> {
    let mut open = object::open(TcpSkelBuilder::default(), Some(core.path()), storage)?;
    let notes = args.notes();
    let rodata = open.maps.rodata_data.as_mut();
    let rodata = rodata.context("the BPF object has no .rodata")?;
    rodata.use_cast = features.rdonly_cast.into();
    rodata.np_ring_wakeup = args.transport().wakeup(&args.engine);
    rodata.notes = notes;
    rodata.has_drop_reason = kernel.has_drop_reason.into();
    rodata.has_reset_reason = kernel.has_reset_reason.into();
    let wants = |what: conn_what| notes & 1 << what.0 != 0;
    let retransmits = wants(conn_what::CONN_WHAT_RETRANSMIT);
    let windows = wants(conn_what::CONN_WHAT_PEER_SHUT);
    let resets = wants(conn_what::CONN_WHAT_RST_OUT);
    let pressure = wants(conn_what::CONN_WHAT_PRESSURE);
    let p = &mut open.progs;
    p.note_drop.set_autoload(retransmits);
    p.note_retransmit.set_autoload(retransmits);
    p.note_retransmit_synack.set_autoload(retransmits);
    p.note_undone
        .set_autoload(retransmits && kernel.tells_undone);
    p.note_acked
        .set_autoload(retransmits && kernel.targets.has(ACK));
    p.note_rst_in.set_autoload(resets);
    p.note_rst_out.set_autoload(resets);
    p.note_segment.set_autoload(windows);
    p.note_read.set_autoload(windows);
    p.note_pressure.set_autoload(pressure);
    p.note_relief.set_autoload(pressure);
    if !retransmits {
        open.maps.drops.set_max_entries(1)?;
        open.maps.resent.set_max_entries(1)?;
    }
    open.maps.stacks.set_autocreate(resets)?;
    if !windows {
        open.maps.windows.set_max_entries(1)?;
    }
    args.transport().prepare(&mut open.maps.rings)?;
    open.maps.lives.set_max_entries(args.max_connections)?;
    let targets = &kernel.targets;
    open.progs.conn_accepted.set_autoload(targets.has(GRAFT));
    let typed = targets.has_tracepoint(STATE);
    open.progs.conn_state.set_autoload(typed);
    open.progs.conn_state_raw.set_autoload(!typed);
    let prepared = targets.prepare(open.open_object_mut(), |object| {
        filter::prune_with_casts(object, features)
    });
    prepared.map_err(object::failed)?;
    object::load(open)
}

/// Attaches the programs, with the buffers read from the first event on.
pub fn start(args: &Args, kernel: &Kernel, skel: &TcpSkel<'_>) -> Result<(Drain, Attached)> {
    let (events, rings) = (skel.maps.events.as_fd(), skel.maps.rings.as_fd());
    let drain = Drain::start(args.transport().source(events, rings), args.engine.buffer())?;
    let mut attached = Attached::default();
    let p = &skel.progs;
    // What follows is attached before what begins.
    for (program, to) in [
        (&p.note_relief, "tcp_leave_memory_pressure"),
        (&p.note_pressure, "tcp_enter_memory_pressure"),
        (&p.note_read, "the tracepoint tcp_rcv_space_adjust"),
        (&p.note_segment, "the tracepoint tcp_probe"),
        (&p.note_undone, "tcp_undo_cwnd_reduction"),
        (
            &p.note_retransmit_synack,
            "the tracepoint tcp_retransmit_synack",
        ),
        (&p.note_retransmit, "the tracepoint tcp_retransmit_skb"),
        (&p.note_drop, "the tracepoint kfree_skb"),
        (&p.note_rst_out, "the tracepoint tcp_send_reset"),
        (&p.note_rst_in, "the tracepoint tcp_receive_reset"),
        (&p.conn_destroyed, "the tracepoint tcp_destroy_sock"),
        (&p.conn_rst_out, "the tracepoint tcp_send_reset"),
        (&p.conn_rst_in, "the tracepoint tcp_receive_reset"),
    ] {
        if program.autoload() {
            attached.add(program, to)?;
        }
    }
    if args.notes() & 1 << conn_what::CONN_WHAT_RETRANSMIT.0 != 0
        && let Err(e) = attached.typed(kernel, skel, &p.note_acked)
    {
        log::note(&format!(
            "what the peer has had twice (DSACK) is not seen: {e:#}"
        ));
    }
    // No trampolines on this architecture, or another tracer's hands on the function.
    if attached.typed(kernel, skel, &p.conn_accepted).is_err() {
        attached.add(&p.conn_accepted_probe, GRAFT)?;
    }
    if p.conn_state_raw.autoload() {
        attached.add(&p.conn_state_raw, "the tracepoint inet_sock_set_state")?;
    } else {
        attached.typed(kernel, skel, &p.conn_state)?;
    }
    Ok((drain, attached))
}

impl Attached {
    fn add(&mut self, program: &ProgramMut<'_>, to: &str) -> Result<()> {
        let link = program.attach();
        let link = link.map_err(|e| anyhow!("failed to attach to {to}: {e:?}"))?;
        self.links.push(Box::new(link));
        self.programs.push(program.as_fd().as_raw_fd());
        Ok(())
    }

    /// Loads a program whose arguments have types, and attaches it to what its section names.
    fn typed(
        &mut self,
        kernel: &Kernel,
        skel: &TcpSkel<'_>,
        program: &ProgramMut<'_>,
    ) -> Result<()> {
        let to = program.section().to_string_lossy();
        let missing = || format!("this kernel has no {to}");
        let loaded = kernel.targets.load(skel.object(), program)?;
        let loaded = loaded.with_context(missing)?;
        let link = trampoline::attach(loaded.as_fd());
        let link = link.with_context(|| format!("failed to attach to {to}"))?;
        self.links.push(Box::new(link));
        self.programs.push(loaded.as_raw_fd());
        self.loaded.push(loaded);
        Ok(())
    }

    /// Nothing is sent any more.
    pub fn detach(&mut self) {
        // No connection begins any more before its end is no longer seen.
        while self.links.pop().is_some() {}
    }

    /// Hits that the kernel passed over.
    pub fn missed(&self) -> u64 {
        self.programs.iter().map(|&fd| bpf_object::missed(fd)).sum()
    }
}

/// Connections that are there still.
pub fn open_connections(skel: &TcpSkel<'_>) -> usize {
    skel.maps.lives.keys().count()
}

/// A stack of a RST, innermost call first; empty where it is not known.
pub fn stack(skel: &TcpSkel<'_>, id: u32) -> Vec<u64> {
    let found = skel.maps.stacks.lookup(&id.to_ne_bytes(), MapFlags::ANY);
    let bytes = found.ok().flatten().unwrap_or_default();
    let words = bytes.chunks_exact(size_of::<u64>());
    let addrs = words.filter_map(|word| Some(u64::from_ne_bytes(word.try_into().ok()?)));
    addrs.take_while(|&addr| addr != 0).collect()
}
