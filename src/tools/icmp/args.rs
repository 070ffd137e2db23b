//! The flags of `netprobe icmp`.

use anyhow::Result;
use clap::ValueEnum;

use crate::bpf::skb::types::np_config;
use crate::kernel::{containers, pods};
use crate::run::output::OutputArgs;
use crate::tools::expression::ExpressionArgs;
use crate::tools::fields::{FieldArgs, PacketFieldArgs};
use crate::tools::{EngineArgs, TransportArgs, TypesArgs};
use crate::usage::usage;

/// What a time stamp counts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Timestamp {
    /// no time stamp
    None,
    /// the kernel's monotonic clock, seconds
    Current,
    /// since the first line, seconds
    Relative,
    /// wall clock, UTC
    Absolute,
}

/// Who answered a ping, on which core, and where the time went.
///
/// One line for each echo request that this kernel handles (IPv4 and IPv6): who was current on the CPU when icmp_echo or
/// icmpv6_echo_reply ran, and the microseconds of each stage on the way there:
///   IRQ    start of the hard interrupt to the softirq raise
///   RPS    queued by one CPU to the raise on another (receive packet steering)
///   WAIT   NET_RX softirq raised to entered
///   POLL   softirq entered to netif_receive_skb
///   STACK  netif_receive_skb to icmp_echo
///   REPLY  icmp_echo to the reply handed to the device's driver
///   TOTAL  the first that was seen to the last
/// A stage that was not seen, or that this packet did not have, is `-`.
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Print exactly what the script traceicmpsoftirq.py prints: TGID, PID, COMM and SEQ of IPv4 requests, without a header.
    /// Like the script, it does not convert SEQ to the machine's byte order: on a little-endian machine sequence 1 is 256
    #[arg(long, conflicts_with_all = ["output_json", "otlp", "timestamp", "min_us", "stages"])]
    pub legacy: bool,

    /// Look at the sending side instead: one line for each request that a process of this machine sends by a raw or ping socket, when
    /// it has read the reply, or the request is lost:
    ///   OUT    sendmsg to the request handed to the device's driver
    ///   WIRE   from there to the first that was seen of the reply (the wire, and the peer)
    ///   IN     from there to the socket's queue
    ///   READ   in the queue until the process reads it
    ///   TOTAL  sendmsg to read
    #[arg(long, verbatim_doc_comment, conflicts_with_all = ["legacy", "stages", "culprit"])]
    pub sent: bool,

    /// Count a request as lost if its reply has not been read after SECONDS
    #[arg(long, value_name = "SECONDS", default_value_t = 2, requires = "sent", value_parser = clap::value_parser!(u64).range(1..))]
    pub timeout: u64,

    /// Measure the stages (on; =false attaches the probes on icmp_echo and icmpv6_echo_reply and nothing else)
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_value_t = true, default_missing_value = "true", require_equals = true, action = clap::ArgAction::Set)]
    pub stages: bool,

    /// Only echoes whose TOTAL is N microseconds or more
    #[arg(long, value_name = "N")]
    pub min_us: Option<u64>,

    /// If an echo's softirq WAITed --min-us or longer (default 1000), show what ran on that CPU in the meantime: task, process,
    /// cgroup and kernel stack. A timer samples it --culprit-hz times a second. On x86 this timer waits while interrupts are
    /// off; the stack then shows the code that switched them on again
    #[arg(long, conflicts_with_all = ["legacy", "histogram"])]
    pub culprit: bool,

    /// Samples a second on each CPU
    #[arg(long, value_name = "HZ", default_value_t = 999, requires = "culprit", value_parser = clap::value_parser!(u64).range(1..=20_000))]
    pub culprit_hz: u64,

    /// Print histograms of each stage on each CPU (powers of two, microseconds) at the end, and no lines
    #[arg(long, conflicts_with_all = ["legacy", "timestamp", "min_us", "output_limit_lines"])]
    pub histogram: bool,

    /// Print histograms every SECONDS, each of these seconds alone
    #[arg(short, long, value_name = "SECONDS", requires = "histogram", value_parser = clap::value_parser!(u64).range(1..))]
    pub interval: Option<u64>,

    #[command(flatten)]
    pub expression: ExpressionArgs,

    #[command(flatten)]
    pub filter: IcmpFilterArgs,

    /// Show a time stamp
    #[arg(long, value_enum, default_value_t = Timestamp::None, help_heading = "Output")]
    pub timestamp: Timestamp,

    #[command(flatten)]
    pub output: OutputArgs,

    #[command(flatten)]
    pub engine: EngineArgs,

    #[command(flatten)]
    pub types: TypesArgs,

    #[command(flatten)]
    pub transport: TransportArgs,
}

/// Filters by field. Source and destination are those of the request.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Filter (all must hold; decided in the kernel)")]
pub struct IcmpFilterArgs {
    /// The request comes from this address
    #[arg(long, value_name = "ADDR[/LEN]")]
    pub filter_src_ip: Option<String>,

    /// The request goes to this address
    #[arg(long, value_name = "ADDR[/LEN]")]
    pub filter_dst_ip: Option<String>,

    /// The echo's id
    #[arg(long, value_name = "ID")]
    pub filter_id: Option<u16>,

    /// Received (--sent: routed) on this interface, in the namespace of --filter-netns or the current one
    #[arg(long, value_name = "NAME")]
    pub filter_ifname: Option<String>,

    /// In this network namespace: a path such as /proc/PID/ns/net, a name under /run/netns, or inode:N
    #[arg(long, value_name = "NETNS")]
    pub filter_netns: Option<String>,

    /// In the network namespace of this container (its name, or the beginning of its id): the host's, where it has none of its own
    #[arg(long, value_name = "NAME|ID", conflicts_with_all = ["filter_netns", "pod"])]
    pub container: Option<String>,

    /// In the network namespace of this pod of Kubernetes on this node: the node's, where it has none of its own (hostNetwork)
    #[arg(long, value_name = "NAMESPACE/NAME", conflicts_with = "filter_netns")]
    pub pod: Option<String>,

    /// Handled on this CPU (--sent: sent on it)
    #[arg(long, value_name = "CPU")]
    pub filter_cpu: Option<u16>,

    /// icmp: IPv4 only, icmp6: IPv6 only
    #[arg(long, value_name = "PROTO")]
    pub filter_proto: Option<String>,

    /// skb->mark is MARK, decimal or 0x…; with a mask: (mark & MASK) == MARK
    #[arg(long, value_name = "MARK[/MASK]")]
    pub filter_mark: Option<String>,
}

impl IcmpFilterArgs {
    /// The value of the config map. Looks up namespaces and interfaces.
    pub fn config(&self) -> Result<np_config> {
        let filter_netns = match (&self.container, &self.pod) {
            (Some(name), _) => Some(containers::find(name)?.netns(name)?),
            (None, Some(name)) => Some(pods::find(name)?.netns(name)?),
            (None, None) => self.filter_netns.clone(),
        };
        FieldArgs {
            packet: PacketFieldArgs {
                filter_mark: self.filter_mark.clone(),
                filter_proto: self.filter_proto.clone(),
                filter_src_ip: self.filter_src_ip.clone(),
                filter_dst_ip: self.filter_dst_ip.clone(),
                ..PacketFieldArgs::default()
            },
            filter_netns,
            filter_ifname: self.filter_ifname.clone(),
        }
        .config()
    }
}

/// A gap that has a culprit, where --min-us does not say.
const GAP_US: u64 = 1000;

impl Args {
    /// Refuses what has nothing to show without the stages.
    pub fn check_stages(&self) -> Result<()> {
        if self.stages {
            return Ok(());
        }
        let without = [
            ("--min-us", self.min_us.is_some()),
            ("--histogram", self.histogram),
            ("--culprit", self.culprit),
        ];
        match without.iter().find(|(_, given)| *given) {
            Some((flag, _)) => Err(usage(format!(
                "{flag}: --stages=false measures nothing that it could look at; leave one of them out"
            ))),
            None => Ok(()),
        }
    }

    /// ns that a softirq must have waited, for its culprit to be told.
    pub fn gap_ns(&self) -> u64 {
        self.min_us.unwrap_or(GAP_US).saturating_mul(1000)
    }

    /// Stages of requests that are handled here are measured.
    pub fn with_stages(&self) -> bool {
        self.stages && !self.legacy && !self.sent
    }
}
