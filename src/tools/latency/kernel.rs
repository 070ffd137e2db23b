//! Loads the programs of `netprobe latency` and attaches them.

use std::any::Any;
use std::collections::BTreeSet;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::{Context, Result};
use libbpf_rs::skel::{OpenSkel, Skel};
use libbpf_rs::{Link, OpenObject, ProgramMut};

use crate::bpf::latency::types::lat_hist;
use crate::bpf::latency::{LatencySkel, LatencySkelBuilder};
use crate::filter::{Filters, set_filter};
use crate::kernel::attach;
use crate::kernel::bpf_object;
use crate::kernel::btf::{Btf, modules};
use crate::kernel::btf_core::CoreBtf;
use crate::kernel::features::Features;
use crate::kernel::trampoline::{self, Targets};
use crate::os::{self, online_cpus};
use crate::run::{heartbeat, object, programs};
use crate::usage::usage;

use super::args::{Args, Mode};
use super::whose::Whose;

/// What a program is attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Tracepoint(&'static str),
    /// the function that its section names
    Function(&'static str),
    /// the same, only where the kernel lacks the other one
    Instead(&'static str, &'static str),
    /// the clock of each CPU
    Clock,
    /// the function of --from, of --to
    From,
    To,
}

use Place::{Clock, From, Function, Instead, To, Tracepoint};

/// A program, its place, and what is not seen without it.
type Probe = (&'static str, Place, &'static str);

/// A packet's later places come before its earlier ones.
const PACKETS: &[Probe] = &[
    (
        "lat_tcp_gone",
        Tracepoint("tcp_destroy_sock"),
        "the end of sockets",
    ),
    ("lat_dropped", Tracepoint("kfree_skb"), "drops"),
    ("lat_consumed", Tracepoint("consume_skb"), "completion"),
    (
        "lat_tcp_read",
        Tracepoint("tcp_rcv_space_adjust"),
        "reads of TCP",
    ),
    ("lat_udp_read", Function("skb_consume_udp"), "reads of UDP"),
    (
        "lat_tcp_queue",
        Function("tcp_rcv_established"),
        "queues of TCP",
    ),
    (
        "lat_udp_queue",
        Function("__udp_enqueue_schedule_skb"),
        "queues of UDP",
    ),
    ("lat_found", Function(TRIM), "the end of stage transport"),
    (
        "lat_found_by_lsm",
        Instead("security_sock_rcv_skb", TRIM),
        "the end of stage transport",
    ),
    (
        "lat_local_4",
        Function("ip_local_deliver"),
        "the end of stage ip",
    ),
    (
        "lat_local_6",
        Function("ip6_input"),
        "the end of stage ip, IPv6",
    ),
    (
        "lat_xmit",
        Tracepoint("net_dev_xmit"),
        "packets that a driver has",
    ),
    ("lat_start", Tracepoint("net_dev_start_xmit"), "qdisc"),
    ("lat_queue", Tracepoint("net_dev_queue"), "output, forward"),
    ("lat_receive", Tracepoint("netif_receive_skb"), "softirq"),
    ("lat_netif_rx", Tracepoint("netif_rx"), "softirq"),
    (
        "lat_netif_rx",
        Tracepoint("napi_gro_receive_entry"),
        "softirq",
    ),
    (
        "lat_netif_rx",
        Tracepoint("netif_receive_skb_entry"),
        "softirq",
    ),
    ("lat_tcp_out_4", Function("ip_queue_xmit"), "write, TCP"),
    (
        "lat_tcp_out_6",
        Function("inet6_csk_xmit"),
        "write, TCP and IPv6",
    ),
    ("lat_datagram_4", Function("ip_send_skb"), "write, UDP"),
    (
        "lat_datagram_6",
        Function("ip6_send_skb"),
        "write, UDP and IPv6",
    ),
    ("lat_sendmsg_4", Function("inet_sendmsg"), "write"),
    ("lat_sendmsg_6", Function("inet6_sendmsg"), "write, IPv6"),
];

/// --culprit
const CULPRIT: &[Probe] = &[
    (
        "softirq_raise",
        Tracepoint("softirq_raise"),
        "what a softirq waited for",
    ),
    (
        "softirq_entry",
        Tracepoint("softirq_entry"),
        "what a softirq waited for",
    ),
    (
        "sched_switch",
        Tracepoint("sched_switch"),
        "what ran meanwhile",
    ),
    ("lat_switch", Tracepoint("sched_switch"), "what readers do"),
    ("sample", Clock, "stacks of what ran meanwhile"),
];

/// --requests
const REQUESTS: &[Probe] = &[
    (
        "lat_talk_ends",
        Tracepoint("tcp_destroy_sock"),
        "the end of sockets",
    ),
    (
        "lat_talk_reads",
        Tracepoint("tcp_rcv_space_adjust"),
        "reads",
    ),
    (
        "lat_talk_arrives",
        Function("tcp_rcv_established"),
        "unread",
    ),
    ("lat_talk_sendmsg_4", Function("inet_sendmsg"), "requests"),
    (
        "lat_talk_sendmsg_6",
        Function("inet6_sendmsg"),
        "requests of IPv6",
    ),
];

/// --from, --to
const BETWEEN: &[Probe] = &[
    ("lat_dropped", Tracepoint("kfree_skb"), "drops"),
    ("lat_between_consumed", Tracepoint("consume_skb"), "frees"),
    ("lat_to", To, "packets"),
    ("lat_from", From, "packets"),
];

fn probes(args: &Args) -> impl Iterator<Item = &'static Probe> + Clone {
    let main = match args.mode() {
        Mode::Packets => PACKETS,
        Mode::Requests => REQUESTS,
        Mode::Between => BETWEEN,
    };
    let culprit = if args.culprit { CULPRIT } else { &[] };
    culprit.iter().chain(main)
}

/// A function that takes an sk_buff, and as which argument.
type Taking = (String, u8);

/// What packets are timed between.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Between {
    from: Taking,
    to: Taking,
}

/// The functions of --from and --to.
pub fn between(args: &Args, btf: &Btf) -> Result<Option<Between>> {
    let (Some(from), Some(to)) = (&args.from, &args.to) else {
        return Ok(None);
    };
    let modules = modules();
    let all = btf.functions_taking("sk_buff", &modules)?;
    let find = |flag: &str, name: &String| {
        let found = all.iter().find(|f| f.name == *name);
        found.map(|f| (f.name.clone(), f.arg)).ok_or_else(|| {
            usage(format!(
                "{flag} {name}: this kernel has no such function that takes an sk_buff"
            ))
        })
    };
    Ok(Some(Between {
        from: find("--from", from)?,
        to: find("--to", to)?,
    }))
}

const TRIM: &str = "sk_filter_trim_cap";
/// Memory for the rows of --by, over all CPUs.
const ROWS_BYTES: usize = 8 << 20;

/// What is attached; dropping it detaches.
pub struct Attached {
    links: Vec<Box<dyn Any>>,
    /// programs of trampolines
    loaded: Vec<OwnedFd>,
    programs: Vec<i32>,
}

/// What this run asks the BTF for, a name a line: all in one pass over its strings.
pub fn names(args: &Args) -> String {
    let functions = probes(args).flat_map(|(_, place, _)| match place {
        Function(name) => vec![*name],
        Instead(name, other) => vec![*name, *other],
        _ => Vec::new(),
    });
    let of_trampolines = [
        "bpf_fentry_test1",
        "register_ftrace_direct",
        "register_ftrace_direct_cb",
    ];
    functions
        .chain(of_trampolines)
        .collect::<Vec<_>>()
        .join("\n")
}

/// The functions of this run's probes that this kernel has, and how their programs get there.
pub struct Functions {
    trampolines: Targets,
    /// where the kernel makes no trampolines (src/bpf/common/entry.bpf.h)
    kprobes: BTreeSet<&'static str>,
}

impl Functions {
    pub fn new(args: &Args, btf: &Btf) -> Self {
        let names = probes(args).filter_map(|(_, place, _)| match place {
            Function(name) => Some(name),
            Instead(name, other) => (!btf.has_function(other)).then_some(name),
            _ => None,
        });
        let kprobes = match trampoline::are_made(btf) {
            true => BTreeSet::new(),
            false => {
                let there = names.clone().filter(|name| btf.has_function(name));
                there.copied().collect()
            }
        };
        Self {
            trampolines: Targets::new(btf, names),
            kprobes,
        }
    }

    /// The name of the program `name` for a place, if this kernel has that.
    fn program(&self, name: &str, place: Place) -> Option<String> {
        match place {
            Function(f) | Instead(f, _) if self.kprobes.contains(f) => {
                Some(format!("{name}_probe"))
            }
            Function(f) | Instead(f, _) if !self.trampolines.has(f) => None,
            _ => Some(name.to_owned()),
        }
    }
}

pub fn load<'a>(
    args: &Args,
    features: &Features,
    (filters, whose, functions, between): (&Filters, &Whose, &Functions, Option<&Between>),
    core: &CoreBtf,
    storage: &'a mut MaybeUninit<OpenObject>,
) -> Result<LatencySkel<'a>> {
    let mut open = object::open(LatencySkelBuilder::default(), Some(core.path()), storage)?;
    let rodata = open
        .maps
        .rodata_data
        .as_mut()
        .context("the BPF object has no .rodata")?;
    rodata.use_cast = u8::from(features.rdonly_cast);
    rodata.np_ring_wakeup = args.transport.wakeup(&args.engine);
    rodata.by = args.by();
    rodata.min_ns = args.min_ns();
    rodata.with_culprit = u8::from(args.culprit);
    rodata.whose = whose.on;
    rodata.whose_tgid = whose.tgid;
    rodata.whose_uid = whose.uid;
    rodata.whose_cgroup = whose.cgroup;
    rodata.whose_comm = whose.comm;
    rodata.nic_clock = os::clocks_of_cards()?;
    rodata.gap_min_ns = args.min_ns() / 2;
    if let Some(between) = between {
        rodata.from_arg = between.from.1;
        rodata.to_arg = between.to.1;
    }
    set_filter!(rodata, filters.on(features.skb_fields));
    args.transport.prepare(&mut open.maps.rings)?;
    open.maps.hists_by.set_autocreate(args.by.is_some())?;
    open.maps.no_hist.set_autocreate(args.by.is_some())?;
    open.maps.hists_by.set_max_entries(rows()?)?;
    let requests = args.mode() == Mode::Requests;
    for (map, wanted) in [
        (&mut open.maps.threads, args.culprit),
        (&mut open.maps.no_thread, args.culprit),
        (&mut open.maps.sent_by, args.culprit),
        (&mut open.maps.none_sent, args.culprit),
        (&mut open.maps.softirqs, args.culprit),
        (&mut open.maps.samples, args.culprit),
        (&mut open.maps.talks, requests),
        (&mut open.maps.no_talk, requests),
        (&mut open.maps.packets, !requests),
        (&mut open.maps.unread, args.mode() == Mode::Packets),
        (&mut open.maps.readers, args.mode() == Mode::Packets),
        (&mut open.maps.written, args.mode() == Mode::Packets),
        (&mut open.maps.no_writes, args.mode() == Mode::Packets),
        (&mut open.maps.writing, args.mode() == Mode::Packets),
    ] {
        map.set_autocreate(wanted)?;
    }
    let wanted = probes(args).filter_map(|(name, place, _)| functions.program(name, *place));
    let wanted: BTreeSet<String> = wanted.collect();
    for mut program in open.open_object_mut().progs_mut() {
        let name = program.name().to_string_lossy().into_owned();
        program.set_autoload(wanted.contains(&name) || name == heartbeat::PROGRAM);
    }
    let trampolines = &functions.trampolines;
    trampolines.prepare(open.open_object_mut(), |object| {
        filters.put_into(object, features)
    })?;
    object::load(open)
}

/// Room for rows of --by.
fn rows() -> Result<u32> {
    let cpus = libbpf_rs::num_possible_cpus().context("failed to count the CPUs")?;
    let rows = ROWS_BYTES / (cpus * size_of::<lat_hist>());
    Ok(rows.clamp(256, 4096) as u32)
}

/// Attaches everything. What this kernel does not have is told on stderr, with what is not seen without it.
pub fn attach(
    args: &Args,
    skel: &LatencySkel<'_>,
    functions: &Functions,
    between: Option<&Between>,
) -> Result<Attached> {
    let mut attached = Attached {
        links: Vec::new(),
        loaded: Vec::new(),
        programs: Vec::new(),
    };
    for (name, place, blank) in probes(args) {
        match place {
            Tracepoint(to) => {
                let link = attached.libbpf(skel, name, |p| p.attach_raw_tracepoint(to));
                link.with_context(|| format!("failed to attach to the tracepoint {to}"))?;
            }
            Clock => {
                if let Err(e) = attached.clock(skel, name, args.culprit_hz) {
                    eprintln!("netprobe: not seen: {blank}: {e:#}");
                }
            }
            From | To => {
                let between = between.context("no functions are given")?;
                let function = match place {
                    From => &between.from.0,
                    _ => &between.to.0,
                };
                let link = attached.libbpf(skel, name, |p| p.attach_kprobe(false, function));
                link.with_context(|| format!("failed to attach to {function}"))?;
            }
            Function(function) | Instead(function, _) => match functions.program(name, *place) {
                Some(program) => {
                    if let Err(e) = attached.function(skel, functions, (&program, function)) {
                        eprintln!(
                            "netprobe: {function} cannot be watched ({e:#}): not seen: {blank}"
                        );
                    }
                }
                None if matches!(place, Function(_)) && *function != TRIM => {
                    eprintln!("netprobe: this kernel has no {function}: not seen: {blank}");
                }
                None => {}
            },
        }
    }
    Ok(attached)
}

impl Attached {
    fn libbpf(
        &mut self,
        skel: &LatencySkel<'_>,
        name: &str,
        attach: impl FnOnce(&ProgramMut<'_>) -> libbpf_rs::Result<Link>,
    ) -> Result<()> {
        let mut programs = skel.object().progs_mut();
        let program = programs.find(|p| p.name() == name);
        let program = program.with_context(|| format!("the BPF object has no program {name}"))?;
        self.links.push(Box::new(attach(&program)?));
        let fd = program.as_fd().as_raw_fd();
        if !self.programs.contains(&fd) {
            self.programs.push(fd);
        }
        Ok(())
    }

    fn clock(&mut self, skel: &LatencySkel<'_>, name: &str, hz: u64) -> Result<()> {
        let mut programs = skel.object().progs_mut();
        let program = programs.find(|p| p.name() == name);
        let program = program.with_context(|| format!("the BPF object has no program {name}"))?;
        for link in attach::cpu_clock(&program, &online_cpus()?, hz)? {
            self.links.push(Box::new(link));
        }
        Ok(())
    }

    /// A program at a kernel function.
    fn function(
        &mut self,
        skel: &LatencySkel<'_>,
        functions: &Functions,
        (name, function): (&str, &str),
    ) -> Result<()> {
        if functions.kprobes.contains(function) {
            return self.libbpf(skel, name, |p| p.attach());
        }
        let mut programs = skel.object().progs_mut();
        let program = programs.find(|p| p.name() == name);
        let program = program.with_context(|| format!("the BPF object has no program {name}"))?;
        let Some(loaded) = functions.trampolines.load(skel.object(), &program)? else {
            return Ok(());
        };
        self.links
            .push(Box::new(trampoline::attach(loaded.as_fd())?));
        self.programs.push(loaded.as_raw_fd());
        self.loaded.push(loaded);
        Ok(())
    }
}

impl programs::Attached for Attached {
    fn missed(&self) -> u64 {
        self.programs.iter().map(|&fd| bpf_object::missed(fd)).sum()
    }
}
