//! The flags of `netprobe latency`.

use std::net::SocketAddr;

use anyhow::Result;
use clap::ValueEnum;

use crate::bpf::latency::types::lat_by;
use crate::run::http;
use crate::run::output::OutputArgs;
use crate::tools::expression::ExpressionArgs;
use crate::tools::fields::FieldArgs;
use crate::tools::{EngineArgs, TransportArgs, TypesArgs};
use crate::usage::usage;

use super::whose::WhoseArgs;

/// What rows are made by, beside way and stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum By {
    /// the CPU that took the packet in, or gave it to the driver
    Cpu,
    /// the device that it came by, or leaves by
    Device,
    /// the lower one of its ports, which mostly is the service's
    Port,
    /// the process that read or wrote it
    Process,
    /// the container of that process
    Container,
}

/// What a run looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Packets,
    Between,
    Requests,
}

/// How long packets take from place to place in this kernel, and, with --min-us, each slow packet.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Args {
    /// Seconds between two tables (default: 10; with --min-us one table, at the end)
    #[arg(short = 'i', long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    pub interval: Option<u64>,

    /// End after one table
    #[arg(long)]
    pub once: bool,

    /// Make rows by this, too
    #[arg(long, value_enum, value_name = "WHAT")]
    pub by: Option<By>,

    /// Show each packet that took at least US microseconds, with its stages. Decided in the kernel: other packets send no event
    #[arg(long, value_name = "US", value_parser = clap::value_parser!(u64).range(1..))]
    pub min_us: Option<u64>,

    /// With --min-us: say what made the packet slow: what ran on its CPU while the softirq waited, what its reader did, which flow
    /// filled the queue. Looks at each switch of tasks, and at each CPU --culprit-hz times a second
    #[arg(long, requires = "min_us", conflicts_with = "from")]
    pub culprit: bool,

    /// Samples a second on each CPU
    #[arg(long, value_name = "HZ", default_value_t = 999, requires = "culprit", value_parser = clap::value_parser!(u64).range(1..=20_000))]
    pub culprit_hz: u64,

    /// Time packets from this function of the kernel (one that takes an sk_buff) to that of --to
    #[arg(long, value_name = "FUNC", requires = "to")]
    pub from: Option<String>,

    /// See --from
    #[arg(long, value_name = "FUNC", requires = "from")]
    pub to: Option<String>,

    /// Time requests over TCP, whatever the protocol: unread in the socket, from read to the first byte of the answer, and the
    /// network's round trip. The end that accepted the connection serves. Requests that overlap (pipelining,
    /// multiplexing) are counted, not timed. --min-us shows slow requests
    #[arg(long, conflicts_with_all = ["from", "culprit", "expression", "filter_tunnel_pcap_l2", "filter_tunnel_pcap_l3", "filter_skb_expr"])]
    pub requests: bool,

    /// Serve the histograms for Prometheus at http://ADDR:PORT/metrics (a PORT alone: at 127.0.0.1); they are as new as the last table
    #[arg(long, value_name = "ADDR:PORT", value_parser = http::address)]
    pub metrics_listen: Option<SocketAddr>,

    #[command(flatten)]
    pub fields: FieldArgs,

    #[command(flatten)]
    pub whose: WhoseArgs,

    #[command(flatten)]
    pub expression: ExpressionArgs,

    #[command(flatten)]
    pub output: OutputArgs,

    #[command(flatten)]
    pub engine: EngineArgs,

    #[command(flatten)]
    pub types: TypesArgs,

    #[command(flatten)]
    pub transport: TransportArgs,
}

impl Args {
    /// Flags that contradict each other.
    pub fn check(&self) -> Result<()> {
        self.transport.check(&self.engine)?;
        if self.once && self.min_us.is_some() && self.interval.is_none() {
            return Err(usage(
                "--once: --min-us shows one table at the end of the run; give -i SECONDS",
            ));
        }
        let fields = &self.fields;
        if self.requests && (fields.packet.filter_mark.is_some() || fields.filter_ifname.is_some())
        {
            return Err(usage(
                "--requests: a connection has no mark and no interface; leave --filter-mark and --filter-ifname out",
            ));
        }
        Ok(())
    }

    /// What is attached.
    pub fn mode(&self) -> Mode {
        match () {
            () if self.requests => Mode::Requests,
            () if self.from.is_some() => Mode::Between,
            () => Mode::Packets,
        }
    }

    /// Between two tables; `None`: only at the end.
    pub fn period(&self) -> Option<u64> {
        match (self.interval, self.min_us, self.metrics_listen) {
            (None, Some(_), None) => None,
            (given, ..) => Some(given.unwrap_or(10)),
        }
    }

    /// The value of the programs' `by`.
    pub fn by(&self) -> u8 {
        let by = match self.by {
            None => lat_by::LAT_BY_NOTHING,
            Some(By::Cpu) => lat_by::LAT_BY_CPU,
            Some(By::Device) => lat_by::LAT_BY_DEVICE,
            Some(By::Port) => lat_by::LAT_BY_PORT,
            Some(By::Process) => lat_by::LAT_BY_PROCESS,
            Some(By::Container) => lat_by::LAT_BY_CGROUP,
        };
        by.0 as u8
    }

    /// The value of the programs' `min_ns`.
    pub fn min_ns(&self) -> u64 {
        self.min_us.map_or(0, |us| us.saturating_mul(1000))
    }
}
