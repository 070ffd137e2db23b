//! The flags of `netprobe tcp`.

use clap::ValueEnum;

use crate::bpf::tcp::types::conn_what;
use crate::run::output::OutputArgs;
use crate::tools::{EngineArgs, Transport, TransportArgs, TypesArgs};

/// Kinds of connections that are worth a look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Only {
    /// never established, or ended by an error
    Failed,
    /// with a RST, in either direction
    Resets,
    /// with segments that were sent again, or that the kernel took for lost
    Retransmits,
    /// a second or more from the SYN to the end (--min-ms chooses another bound, and says why)
    Slow,
}

/// What may happen to a connection before it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Happening {
    /// what is sent again: why, which bytes, and the drop on this host behind it; what was sent again for nothing
    Retransmits,
    /// each RST that is sent or received
    Resets,
    /// windows of zero, of the peer and of this end, and how long
    Windows,
    /// TCP's memory is short, or no longer
    Pressure,
    /// each change of state: connects, accepts, closes
    States,
}

/// One line for each TCP connection when it ends: how long, how much, how fast, what held it up, and how it ended.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Args {
    /// Show a second line with segments, round trips, reordering, and what limited the connection
    #[arg(short = 'v', long)]
    pub details: bool,

    /// List the connections that exist now, of all network namespaces, and end: as ss does, by the kernel's socket tables
    #[arg(long, conflicts_with_all = ["max_connections", "min_ms", "buffer_pages", "perf_wakeup", "drain_threads", "transport"])]
    pub live: bool,

    /// Show also what happens to connections before they end, as it happens; of these KINDs, or all
    #[arg(long, value_enum, value_name = "KIND,..", value_delimiter = ',', num_args = 0..=1, require_equals = true,
          default_missing_value = "retransmits,resets,windows,pressure,states", conflicts_with = "live")]
    pub events: Vec<Happening>,

    /// Follow at most N connections at the same time; connections beyond are counted
    #[arg(long, value_name = "N", default_value_t = 65_536, value_parser = clap::value_parser!(u32).range(1..=16_777_216))]
    pub max_connections: u32,

    #[command(flatten)]
    pub filter: FilterArgs,

    #[command(flatten)]
    pub output: OutputArgs,

    #[command(flatten)]
    pub engine: EngineArgs,

    #[command(flatten)]
    pub types: TypesArgs,

    /// How events come out of the kernel [default: ringbuf, or perf with --perf-wakeup]
    #[arg(long, value_enum, help_heading = "Engine")]
    pub transport: Option<Transport>,
}

/// Connections to show. All that are given must hold.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(
    next_help_heading = "Filter (all must hold; decided when a connection ends; a ! before the value: all others)"
)]
pub struct FilterArgs {
    /// This process only
    #[arg(short = 'p', long, value_name = "[!]PID")]
    pub pid: Option<String>,

    /// This user only
    #[arg(short = 'u', long, value_name = "[!]UID")]
    pub uid: Option<String>,

    /// Processes of this name only
    #[arg(long, value_name = "[!]NAME")]
    pub comm: Option<String>,

    /// These ports of the service only: the remote port of a connection from here, the local port of one to here
    #[arg(short = 'P', long, value_name = "[!]PORT,…")]
    pub port: Option<String>,

    /// IPv4 only, also by IPv6 sockets (::ffff:a.b.c.d)
    #[arg(short = '4', long, conflicts_with = "ipv6")]
    pub ipv4: bool,

    /// IPv6 only
    #[arg(short = '6', long)]
    pub ipv6: bool,

    /// Services within these networks only: the remote address of a connection from here, the local one of one to here
    #[arg(long, value_name = "[!]ADDR[/LEN],…")]
    pub daddr: Option<String>,

    /// Processes in this cgroup (v2) or below it: a path, from /sys/fs/cgroup on or whole
    #[arg(long, value_name = "[!]PATH")]
    pub cgroup: Option<String>,

    /// Processes of this container: its name, or the beginning of its id
    #[arg(long, value_name = "[!]NAME|ID")]
    pub container: Option<String>,

    /// Processes of this pod of Kubernetes on this node
    #[arg(long, value_name = "[!]NAMESPACE/NAME")]
    pub pod: Option<String>,

    /// In this network namespace: /proc/PID/ns/net, a name under /run/netns, or inode:N
    #[arg(long, value_name = "[!]NETNS")]
    pub netns: Option<String>,

    /// Only connections that took at least MS milliseconds (not those whose begin was not seen), and why they did
    #[arg(long, value_name = "MS")]
    pub min_ms: Option<u64>,

    /// Only these kinds
    #[arg(long, value_enum, value_name = "KIND,..", value_delimiter = ',')]
    pub only: Vec<Only>,
}

impl Args {
    /// A row is cheaper in a ring buffer by 700 instructions.
    pub fn transport(&self) -> TransportArgs {
        let default = match self.engine.perf_wakeup {
            Some(_) => Transport::Perf,
            None => Transport::Ringbuf,
        };
        TransportArgs {
            transport: self.transport.unwrap_or(default),
        }
    }

    /// Bits of conn_note.what that are wanted: of events to show, and of what says why a connection took long.
    pub fn notes(&self) -> u32 {
        let asked = self
            .filter
            .min_ms
            .map(|_| [Happening::Retransmits, Happening::Windows]);
        Self::bits(&self.events) | asked.map_or(0, |asked| Self::bits(&asked))
    }

    fn bits(happenings: &[Happening]) -> u32 {
        let bits = |whats: &[conn_what]| whats.iter().map(|what| 1 << what.0).sum::<u32>();
        let of = |happening: &Happening| match happening {
            Happening::Retransmits => bits(&[
                conn_what::CONN_WHAT_RETRANSMIT,
                conn_what::CONN_WHAT_RETRANSMIT_SYNACK,
                conn_what::CONN_WHAT_UNDONE,
                conn_what::CONN_WHAT_DUPLICATES,
            ]),
            Happening::Resets => bits(&[conn_what::CONN_WHAT_RST_OUT, conn_what::CONN_WHAT_RST_IN]),
            Happening::Windows => bits(&[
                conn_what::CONN_WHAT_PEER_SHUT,
                conn_what::CONN_WHAT_PEER_OPEN,
                conn_what::CONN_WHAT_HERE_READ,
            ]),
            Happening::Pressure => {
                bits(&[conn_what::CONN_WHAT_PRESSURE, conn_what::CONN_WHAT_RELIEF])
            }
            Happening::States => bits(&[conn_what::CONN_WHAT_STATE]),
        };
        happenings.iter().map(of).fold(0, |all, some| all | some)
    }
}
