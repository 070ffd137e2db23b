//! The programs of `netprobe tcpconnect`: which are loaded, how maps and filters are set, where they attach.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use libbpf_rs::skel::OpenSkel;
use libbpf_rs::{MapCore, MapFlags, MapHandle, MapType};

use crate::bpf::tcpconnect::{OpenTcpconnectSkel, TcpconnectSkel, TcpconnectSkelBuilder, types};
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
pub const CONNECT: [&str; 2] = ["tcp_v4_connect", "tcp_v6_connect"];
/// Where answers of DNS servers are.
pub const RECEIVE: [&str; 3] = ["udp_recvmsg", "udpv6_recvmsg", "tcp_recvmsg"];

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

impl Pair {
    /// DNS needs entries and returns, which trampolines see both at the return.
    pub fn sees_entries(self) -> bool {
        matches!(self, Self::Multi | Self::Kprobe)
    }
}

/// Ways to try at most.
pub const PAIRS: usize = 3;

/// The ways to try, the best first.
fn pairs(args: &Args, features: &Features, btf: &Btf) -> Vec<Pair> {
    let mut pairs = Vec::new();
    // Up to 6.13 returns come from a pool of some ten (`rethook`), from then on they are kept by task.
    let pool = btf
        .struct_named("fprobe")
        .is_none_or(|id| btf.members(id).iter().any(|m| m.name == "rethook"));
    if features.kprobe_multi && !pool {
        pairs.push(Pair::Multi);
    }
    if trampoline::are_made(btf) {
        pairs.push(match args.outcome || args.output_stack {
            true => Pair::Fentry,
            false => Pair::Fexit,
        });
    }
    pairs.push(Pair::Kprobe);
    pairs
}

/// What is known of the running kernel.
pub struct Kernel {
    pub features: Features,
    /// the ways to try
    pub pairs: Vec<Pair>,
    /// arguments of udp_recvmsg
    recv_args: Option<usize>,
    /// drop reasons of copies; 0: none
    reason_otherhost: u32,
    reason_packet_sock: u32,
    pub targets: Targets,
}

impl Kernel {
    pub fn new(args: &Args, features: Features, btf: &Btf, reasons: &DropReasons) -> Self {
        let reason = |name| reasons.number(name).unwrap_or(0);
        let receive = RECEIVE.iter().filter(|_| args.dns);
        Self {
            pairs: pairs(args, &features, btf),
            features,
            recv_args: btf.argument_count("udp_recvmsg"),
            reason_otherhost: reason("OTHERHOST"),
            reason_packet_sock: reason("PACKET_SOCK_ERROR"),
            targets: Targets::new(btf, CONNECT.iter().chain(receive)),
        }
    }

    /// Trampolines are tried first.
    pub fn begins_with_trampolines(&self) -> bool {
        matches!(self.pairs.first(), Some(Pair::Fexit | Pair::Fentry))
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
        program.set_autoload(args.dns && !pair.sees_entries());
    }
    for program in [
        &mut open.progs.dns_udp4_entry,
        &mut open.progs.dns_udp6_entry,
        &mut open.progs.dns_tcp_entry,
        &mut open.progs.dns_udp4_return,
        &mut open.progs.dns_udp6_return,
        &mut open.progs.dns_tcp_return,
    ] {
        program.set_autoload(args.dns && pair.sees_entries());
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
    if args.dns && pair.sees_entries() {
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
