//! The programs of `netprobe tcpconnect`: which are loaded, how maps and filters are set, where they attach.

use std::any::Any;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use libbpf_rs::skel::{OpenSkel, Skel};
use libbpf_rs::{Link, MapCore, MapFlags, MapHandle, MapType, ProgramMut};

use crate::bpf::tcpconnect::{OpenTcpconnectSkel, TcpconnectSkel, TcpconnectSkelBuilder, types};
use crate::kernel::bpf_object;
use crate::kernel::btf::Btf;
use crate::kernel::btf_core::CoreBtf;
use crate::kernel::drop_reason::DropReasons;
use crate::kernel::features::Features;
use crate::kernel::trampoline::{self, Targets};
use crate::run::object;
use crate::usage::usage;

use super::args::{Args, Filter, FilterArgs};

/// Connects that can be undecided at one time; one more is counted as refused by a full map.
const PENDING: u32 = 65_536;

/// Threads that wait for a DNS answer at one time; one more is counted as refused by a full map.
const DNS_CALLS: u32 = 16_384;

/// Where connects are seen.
const CONNECT: [&str; 2] = ["tcp_v4_connect", "tcp_v6_connect"];
/// Where answers of DNS servers are.
const RECEIVE: [&str; 3] = ["udp_recvmsg", "udpv6_recvmsg", "tcp_recvmsg"];

/// How the entry and the return of connect are seen; src/bpf/tcp/tcpconnect.bpf.c says what each is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pair {
    /// kprobe.multi: any number of threads can be inside, and none is passed over
    Multi,
    /// trampolines at the return alone: any number of threads, but where the kernel preempts some are passed over (and counted)
    Fexit,
    /// trampolines at both
    Fentry,
    /// kprobe and kretprobe: every kernel, but few threads at once
    Kprobe,
}

/// The ways to try, the best first.
pub fn pairs(args: &Args, features: &Features, btf: &Btf) -> Vec<Pair> {
    let mut pairs = Vec::new();
    // Up to 6.13 returns come from a pool of some ten (`rethook`), from then on they are kept by task.
    let pool = btf
        .struct_named("fprobe")
        .is_none_or(|id| btf.members(id).iter().any(|m| m.name == "rethook"));
    if features.kprobe_multi && !pool {
        pairs.push(Pair::Multi);
    }
    pairs.push(match args.outcome || args.output_stack {
        true => Pair::Fentry,
        false => Pair::Fexit,
    });
    pairs.push(Pair::Kprobe);
    pairs
}

/// What is known of the running kernel.
pub struct Kernel {
    pub features: Features,
    /// arguments of udp_recvmsg
    recv_args: Option<usize>,
    /// drop reasons of copies; 0: none
    reason_otherhost: u32,
    reason_packet_sock: u32,
    targets: Targets,
}

impl Kernel {
    pub fn new(args: &Args, features: Features, btf: &Btf, reasons: &DropReasons) -> Self {
        let reason = |name| reasons.number(name).unwrap_or(0);
        let receive = RECEIVE.iter().filter(|_| args.dns);
        Self {
            features,
            recv_args: btf.argument_count("udp_recvmsg"),
            reason_otherhost: reason("OTHERHOST"),
            reason_packet_sock: reason("PACKET_SOCK_ERROR"),
            targets: Targets::new(btf, CONNECT.iter().chain(receive)),
        }
    }
}

/// Opens, configures and loads what this run needs.
pub fn load<'a>(
    args: &Args,
    filter: &Filter,
    kernel: &Kernel,
    core: &CoreBtf,
    pair: Pair,
    storage: &'a mut MaybeUninit<libbpf_rs::OpenObject>,
) -> Result<TcpconnectSkel<'a>> {
    let mut open = object::open(TcpconnectSkelBuilder::default(), Some(core.path()), storage)?;
    let rodata = open
        .maps
        .rodata_data
        .as_mut()
        .context("the BPF object has no .rodata")?;
    rodata.np_ring_wakeup = args.transport.wakeup(&args.engine);
    rodata.has_drop_reason = u8::from(kernel.features.drop_reasons);
    rodata.reason_otherhost = kernel.reason_otherhost;
    rodata.reason_packet_sock = kernel.reason_packet_sock;
    rodata.mode = args.mode();
    rodata.filter = types::tcp_filter {
        cgroup: filter.cgroup,
        min_ns: args.min_ns(),
        on: filter.on,
        negated: filter.negated,
        pid: filter.pid,
        uid: filter.uid,
        netns: filter.netns,
        comm: filter.comm,
        version: filter.version,
    };
    if let Some(n) = kernel.recv_args {
        rodata.recv_args = n as u32;
    }
    args.transport.prepare(&mut open.maps.rings)?;
    set_programs(args, pair, &mut open);
    let user_maps = UserMaps::open(&args.filter)?;
    set_maps(args, pair, filter, &user_maps, &mut open)?;
    let loaded = kernel
        .targets
        .prepare(open.open_object_mut(), crate::filter::prune);
    loaded.map_err(object::failed)?;
    let skel = object::load(open)?;
    fill_filters(filter, &user_maps, &skel)?;
    Ok(skel)
}

fn set_programs(args: &Args, pair: Pair, open: &mut OpenTcpconnectSkel<'_>) {
    for program in [
        &mut open.progs.v4_multi_entry,
        &mut open.progs.v6_multi_entry,
        &mut open.progs.v4_multi_return,
        &mut open.progs.v6_multi_return,
    ] {
        program.set_autoload(pair == Pair::Multi);
    }
    for program in [&mut open.progs.v4_connected, &mut open.progs.v6_connected] {
        program.set_autoload(pair == Pair::Fexit);
    }
    for program in [
        &mut open.progs.v4_fentry,
        &mut open.progs.v6_fentry,
        &mut open.progs.v4_fexit,
        &mut open.progs.v6_fexit,
    ] {
        program.set_autoload(pair == Pair::Fentry);
    }
    for program in [
        &mut open.progs.v4_entry,
        &mut open.progs.v6_entry,
        &mut open.progs.v4_return,
        &mut open.progs.v6_return,
    ] {
        program.set_autoload(pair == Pair::Kprobe);
    }
    for program in [
        &mut open.progs.syn,
        &mut open.progs.state,
        &mut open.progs.drop,
        &mut open.progs.flooded,
        &mut open.progs.listener,
        &mut open.progs.listener_return,
        &mut open.progs.icmp4,
        &mut open.progs.icmp4_return,
        &mut open.progs.icmp6,
        &mut open.progs.icmp6_return,
    ] {
        program.set_autoload(args.outcome);
    }
    for program in [
        &mut open.progs.dns_udp4,
        &mut open.progs.dns_udp6,
        &mut open.progs.dns_tcp,
    ] {
        program.set_autoload(args.dns && pair != Pair::Multi);
    }
    for program in [
        &mut open.progs.dns_udp4_entry,
        &mut open.progs.dns_udp6_entry,
        &mut open.progs.dns_tcp_entry,
        &mut open.progs.dns_udp4_return,
        &mut open.progs.dns_udp6_return,
        &mut open.progs.dns_tcp_return,
    ] {
        program.set_autoload(args.dns && pair == Pair::Multi);
    }
}

fn set_maps(
    args: &Args,
    pair: Pair,
    filter: &Filter,
    user_maps: &UserMaps,
    open: &mut OpenTcpconnectSkel<'_>,
) -> Result<()> {
    let maps = &mut open.maps;
    if pair == Pair::Fexit {
        maps.inside.set_max_entries(1)?;
    }
    if args.count {
        maps.counts.set_max_entries(args.max_flows)?;
    }
    if args.outcome {
        maps.pending.set_max_entries(PENDING)?;
        maps.pending_by_isn.set_max_entries(PENDING)?;
    }
    if args.dns && pair == Pair::Multi {
        maps.dns_calls.set_max_entries(DNS_CALLS)?;
    }
    maps.ports.set_max_entries(room(filter.ports.len()))?;
    maps.daddrs.set_max_entries(room(filter.daddrs.len()))?;
    for (map, given) in [
        (&mut maps.cgroupmap, &user_maps.cgroups),
        (&mut maps.mntnsmap, &user_maps.mntns),
    ] {
        if let Some(given) = given {
            map.set_inner_map_fd(given.as_fd())
                .context("failed to prepare a map for a map of yours")?;
        }
    }
    Ok(())
}

fn room(values: usize) -> u32 {
    u32::try_from(values).unwrap_or(u32::MAX).max(1)
}

/// Pinned maps of the user's making, as filters.
struct UserMaps {
    cgroups: Option<MapHandle>,
    mntns: Option<MapHandle>,
}

impl UserMaps {
    fn open(args: &FilterArgs) -> Result<Self> {
        let open = |path: &Option<PathBuf>, flag, value_size| {
            path.as_deref()
                .map(|path| pinned(path, flag, value_size))
                .transpose()
        };
        Ok(Self {
            cgroups: open(&args.cgroupmap, "--cgroupmap", 8)?,
            mntns: open(&args.mntnsmap, "--mntnsmap", 4)?,
        })
    }
}

/// Opens the pinned hash map at `path` with keys of 8 bytes.
fn pinned(path: &Path, flag: &str, value_size: u32) -> Result<MapHandle> {
    let map = MapHandle::from_pinned_path(path).map_err(|e| {
        usage(format!(
            "{flag} {}: no pinned BPF map can be opened there ({e:?})",
            path.display()
        ))
    })?;
    let hash = matches!(map.map_type(), MapType::Hash | MapType::LruHash);
    if !hash || map.key_size() != 8 || map.value_size() != value_size {
        return Err(usage(format!(
            "{flag} {}: it is a {:?} map with keys of {} and values of {} bytes; it must be a hash map with 8 and {value_size}",
            path.display(),
            map.map_type(),
            map.key_size(),
            map.value_size()
        )));
    }
    Ok(map)
}

fn fill_filters(filter: &Filter, user_maps: &UserMaps, skel: &TcpconnectSkel<'_>) -> Result<()> {
    for port in &filter.ports {
        skel.maps
            .ports
            .update(&port.to_ne_bytes(), &[1], MapFlags::ANY)
            .context("failed to set the filter of ports")?;
    }
    for (bits, addr) in &filter.daddrs {
        let key = types::tcp_prefix {
            bits: *bits,
            addr: *addr,
        };
        // SAFETY: tcp_prefix is Plain: its bytes are its value.
        let key = unsafe { plain::as_bytes(&key) };
        skel.maps
            .daddrs
            .update(key, &[1], MapFlags::ANY)
            .context("failed to set the filter of addresses")?;
    }
    for (map, given) in [
        (&skel.maps.cgroupmap, &user_maps.cgroups),
        (&skel.maps.mntnsmap, &user_maps.mntns),
    ] {
        if let Some(given) = given {
            let fd = given.as_fd().as_raw_fd().to_ne_bytes();
            map.update(&0u32.to_ne_bytes(), &fd, MapFlags::ANY)
                .context("failed to set a map of yours as a filter")?;
        }
    }
    Ok(())
}

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

/// Attaches the programs that were loaded; those that tell what follows before those that start it.
pub fn attach(
    args: &Args,
    kernel: &Kernel,
    pair: Pair,
    skel: &TcpconnectSkel<'_>,
) -> Result<Attached> {
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
    if pair != Pair::Multi {
        for program in [&p.dns_udp4, &p.dns_udp6, &p.dns_tcp] {
            attached.trampoline(kernel, skel, program, true)?;
        }
        return Ok(());
    }
    let returns = [&p.dns_udp4_return, &p.dns_udp6_return, &p.dns_tcp_return];
    let entries = [&p.dns_udp4_entry, &p.dns_udp6_entry, &p.dns_tcp_entry];
    for ((returns, entry), function) in returns.into_iter().zip(entries).zip(RECEIVE) {
        let returns_at = returns.attach_kprobe_multi(true, vec![function]);
        attached.counted(returns, returns_at, function)?;
        let enters_at = entry.attach_kprobe_multi(false, vec![function]);
        attached.counted(entry, enters_at, function)?;
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

    /// Hits that the kernel passed over, returns apart; to be asked after [`Attached::detach`].
    pub fn missed(&self) -> u64 {
        let programs = self.counted.iter().map(|c| c.0);
        self.missed + programs.map(bpf_object::missed).sum::<u64>()
    }
}
