//! What `netprobe icmp` attaches: two kprobes, and the tracepoints that the run needs.

use std::collections::BTreeSet;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};

use anyhow::{Context, Result, bail};
use libbpf_rs::skel::OpenSkel;
use libbpf_rs::{Link, OpenObject, OpenProgramMut, ProgramMut};

use crate::bpf::icmp::{IcmpSkel, IcmpSkelBuilder, OpenIcmpSkel};
use crate::filter::{Filters, set_filter};
use crate::kernel::attach;
use crate::kernel::bpf_object;
use crate::kernel::btf_core::CoreBtf;
use crate::kernel::features::Features;
use crate::os::online_cpus;
use crate::run::{self, object};

use super::args::Args;

/// What belongs together: without one of its probes, something is blank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// handling of IPv4 requests
    Echo4,
    /// handling of IPv6 requests
    Echo6,
    /// interrupts, for both sides
    Irqs,
    /// where requests come in and replies go out
    Ways,
    /// processes that send requests
    Sent,
    /// what ran while a softirq waited
    Culprit,
}

/// How a program is attached.
#[derive(Debug, Clone, Copy)]
enum AttachTo {
    /// the first of these functions that the kernel has
    Function(&'static [&'static str]),
    /// a tracepoint, and what is blank without it
    Tracepoint(&'static str, &'static str),
    /// the clock of each CPU
    Clock,
}

/// A program of icmp.bpf.c.
struct Probe {
    part: Part,
    point: AttachTo,
    open: for<'a, 'o> fn(&'a mut OpenIcmpSkel<'o>) -> &'a mut OpenProgramMut<'o>,
    loaded: for<'a, 'o> fn(&'a IcmpSkel<'o>) -> &'a ProgramMut<'o>,
}

/// A row of [`PROBES`].
macro_rules! probe {
    ($part:ident, $prog:ident, $point:expr) => {
        Probe {
            part: Part::$part,
            point: $point,
            open: |s| &mut s.progs.$prog,
            loaded: |s| &s.progs.$prog,
        }
    };
}

use AttachTo::{Clock, Function, Tracepoint};

const PROBES: &[Probe] = &[
    probe!(Irqs, irq_entry, Tracepoint("irq_handler_entry", "IRQ")),
    probe!(Irqs, irq_exit, Tracepoint("irq_handler_exit", "IRQ")),
    probe!(
        Irqs,
        softirq_raise,
        Tracepoint("softirq_raise", "IRQ, RPS and WAIT")
    ),
    probe!(
        Irqs,
        softirq_entry,
        Tracepoint("softirq_entry", "WAIT and POLL")
    ),
    probe!(
        Irqs,
        softirq_exit,
        Tracepoint(
            "softirq_exit",
            "nothing (but WAIT may be wrong in threaded NAPI)"
        )
    ),
    probe!(Ways, netif_rx, Tracepoint("netif_rx", "RPS")),
    probe!(
        Ways,
        receive_entry,
        Tracepoint("netif_receive_skb_entry", "RPS")
    ),
    probe!(
        Ways,
        receive_entry,
        Tracepoint("napi_gro_receive_entry", "RPS")
    ),
    probe!(
        Ways,
        receive,
        Tracepoint("netif_receive_skb", "POLL and STACK")
    ),
    probe!(Ways, xmit, Tracepoint("net_dev_start_xmit", "REPLY")),
    probe!(
        Sent,
        sent_netif_rx,
        Tracepoint("netif_rx", "the begin of IN")
    ),
    probe!(
        Sent,
        sent_receive_entry,
        Tracepoint("netif_receive_skb_entry", "the begin of IN")
    ),
    probe!(
        Sent,
        sent_receive_entry,
        Tracepoint("napi_gro_receive_entry", "the begin of IN")
    ),
    probe!(
        Sent,
        sent_receive,
        Tracepoint("netif_receive_skb", "WIRE and IN")
    ),
    probe!(
        Sent,
        sent_xmit,
        Tracepoint("net_dev_start_xmit", "OUT and WIRE")
    ),
    probe!(Sent, raw_sendmsg_4, Function(&["raw_sendmsg"])),
    probe!(Sent, raw_sendmsg_6, Function(&["rawv6_sendmsg"])),
    probe!(Sent, ping_sendmsg_4, Function(&["ping_v4_sendmsg"])),
    probe!(Sent, ping_sendmsg_6, Function(&["ping_v6_sendmsg"])),
    probe!(
        Sent,
        delivered,
        Function(&["sk_filter_trim_cap", "security_sock_rcv_skb"])
    ),
    probe!(
        Sent,
        read,
        Tracepoint("skb_copy_datagram_iovec", "READ and TOTAL")
    ),
    probe!(
        Sent,
        dropped,
        Tracepoint("kfree_skb", "where this kernel dropped a lost one")
    ),
    probe!(Sent, copied, Function(&["__pskb_copy_fclone"])),
    probe!(Sent, replies_4, Function(&["icmp_echo"])),
    probe!(
        Sent,
        replies_6,
        Function(&["icmpv6_echo_reply", "icmpv6_rcv"])
    ),
    probe!(Sent, sent_4, Function(&["__ip_local_out"])),
    probe!(Sent, sent_6, Function(&["__ip6_local_out"])),
    probe!(
        Culprit,
        sched_switch,
        Tracepoint("sched_switch", "the culprits' times")
    ),
    probe!(Culprit, sample, Clock),
    probe!(Echo4, icmp_echo, Function(&["icmp_echo"])),
    probe!(
        Echo6,
        icmpv6_echo,
        Function(&["icmpv6_echo_reply", "icmpv6_rcv"])
    ),
];

fn wanted(part: Part, args: &Args) -> bool {
    match part {
        Part::Echo4 => !args.sent,
        Part::Echo6 => !args.sent && !args.legacy,
        Part::Irqs => args.with_stages() || args.sent,
        Part::Ways => args.with_stages(),
        Part::Sent => args.sent,
        Part::Culprit => args.culprit,
    }
}

/// Tells the open object which programs to load, and which maps to make: those of the other side are not.
fn prepare(open: &mut OpenIcmpSkel<'_>, args: &Args) -> Result<()> {
    for probe in PROBES {
        (probe.open)(open).set_autoload(wanted(probe.part, args));
    }
    let maps = &mut open.maps;
    maps.senders.set_autocreate(args.sent)?;
    maps.asking.set_autocreate(args.sent)?;
    maps.names.set_autocreate(args.sent)?;
    maps.replying.set_autocreate(args.sent)?;
    maps.answering.set_autocreate(!args.sent)?;
    Ok(())
}

/// What is attached; dropping it detaches.
pub struct Attached {
    links: Vec<Link>,
    /// of all links: a program may have several
    progs: BTreeSet<i32>,
    names: Vec<String>,
    tracepoints: usize,
}

/// Opens, configures and loads the programs that the run needs.
pub fn load<'a>(
    args: &Args,
    features: &Features,
    filters: &Filters,
    core: &CoreBtf,
    storage: &'a mut MaybeUninit<OpenObject>,
) -> Result<IcmpSkel<'a>> {
    let mut open = object::open(IcmpSkelBuilder::default(), Some(core.path()), storage)?;
    let rodata = open
        .maps
        .rodata_data
        .as_mut()
        .context("the BPF object has no .rodata")?;
    rodata.use_cast = u8::from(features.rdonly_cast);
    rodata.np_ring_wakeup = args.transport.wakeup(&args.engine);
    rodata.with_stages = u8::from(args.with_stages());
    rodata.has_reason = u8::from(features.drop_reasons);
    rodata.with_culprit = u8::from(args.culprit);
    rodata.gap_min_ns = args.gap_ns();
    rodata.want_id = args.filter.filter_id.map_or(-1, i32::from);
    rodata.want_cpu = args.filter.filter_cpu.map_or(-1, i32::from);
    set_filter!(rodata, filters.on(features.skb_fields));
    args.transport.prepare(&mut open.maps.rings)?;
    prepare(&mut open, args)?;
    filters.prepare(open.open_object_mut(), features)?;
    object::load(open)
}

/// Attaches everything. What this kernel does not have is told on stderr, with what is blank without it.
pub fn attach(skel: &IcmpSkel<'_>, args: &Args) -> Result<Attached> {
    let mut attached = Attached {
        links: Vec::new(),
        progs: BTreeSet::new(),
        names: Vec::new(),
        tracepoints: 0,
    };
    let mut refused = Vec::new();
    // In the order of the table: what a request begins with comes last, so that none is told that was seen only in part.
    for probe in PROBES.iter().filter(|p| wanted(p.part, args)) {
        let program = (probe.loaded)(skel);
        match probe.point {
            Tracepoint(name, blank) => match program.attach_raw_tracepoint(name) {
                Ok(link) => attached.add(link, program, None),
                Err(e) => eprintln!(
                    "netprobe: no tracepoint {name} on this kernel ({e:#}): blank without it: {blank}"
                ),
            },
            Clock => match attach::cpu_clock(program, &online_cpus()?, args.culprit_hz) {
                Ok(links) => {
                    attached.progs.insert(program.as_fd().as_raw_fd());
                    attached.links.extend(links);
                }
                Err(e) => eprintln!("netprobe: no samples of the culprits' stacks: {e:#}"),
            },
            Function(names) => {
                let found = names
                    .iter()
                    .find_map(|&n| program.attach_kprobe(false, n).ok().map(|link| (n, link)));
                match found {
                    Some((name, link)) => attached.add(link, program, Some(name)),
                    None => refused.push(names.join(" or ")),
                }
            }
        }
    }
    if attached.names.is_empty() {
        bail!(
            "the kernel refuses a kprobe on {}: no request can be seen",
            refused.join(" and ")
        );
    }
    for names in refused {
        eprintln!(
            "netprobe: the kernel refuses a kprobe on {names} (IPv6 as a module that is not loaded?): those requests are not seen"
        );
    }
    Ok(attached)
}

impl Attached {
    fn add(&mut self, link: Link, program: &ProgramMut<'_>, function: Option<&str>) {
        self.links.push(link);
        self.progs.insert(program.as_fd().as_raw_fd());
        match function {
            Some(name) => self.names.push(name.to_owned()),
            None => self.tracepoints += 1,
        }
    }

    /// One line for stderr.
    pub fn summary(&self) -> String {
        let others = match self.tracepoints {
            0 => String::new(),
            n => format!(" and {n} tracepoints"),
        };
        format!("tracing {}{others}", self.names.join(", "))
    }
}

impl run::programs::Attached for Attached {
    fn missed(&self) -> u64 {
        let by_link = |link: &Link| bpf_object::missed_by_link(link.as_fd().as_raw_fd());
        self.progs
            .iter()
            .map(|&fd| bpf_object::missed(fd))
            .sum::<u64>()
            + self.links.iter().map(by_link).sum::<u64>()
    }
}
