//! The flags of `netprobe report`.

use std::path::PathBuf;

use clap::ValueEnum;

use crate::run::output::OutputArgs;
use crate::run::rotate::RotateArgs;
use crate::tools::fields::PacketFieldArgs;
use crate::tools::skb::style::Timestamp;

/// What to make of a recording.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// the lines of netprobe skb
    Text,
    /// the lines of netprobe skb --output-json
    Json,
    /// a capture file with a packet for each event
    Pcapng,
    /// a capture file with each packet once
    Packets,
    /// one page that needs no network: what was lost, and packets' journeys to be searched, looked at and compared
    Html,
    /// Chrome's trace format, for ui.perfetto.dev: packets' journeys, and events by namespace, device and CPU
    Perfetto,
}

/// In which order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Sort {
    /// of time, also those events that came late
    Time,
    /// packet by packet, in the order of their first events
    Packet,
    /// packet by packet, the slowest first
    Latency,
}

/// Show a recording, on any machine, without privilege.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Recordings (netprobe record), shown one after the other; - is stdin
    #[arg(value_name = "FILE", required = true)]
    pub files: Vec<PathBuf>,

    /// What to make of them
    #[arg(long, value_enum, default_value_t = Format::Text, help_heading = "Output")]
    pub format: Format,

    /// The same as --format json
    #[arg(long, conflicts_with = "format", help_heading = "Output")]
    pub output_json: bool,

    /// Write to FILE instead of stdout
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub output_file: Option<PathBuf>,

    /// End after N events (0: no limit)
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Output")]
    pub output_limit_lines: u64,

    /// Count instead: events, packets, drops by kind, functions
    #[arg(long, conflicts_with_all = ["sort", "output_limit_lines"], help_heading = "Output")]
    pub stats: bool,

    /// Show the events in this order (default: as they were recorded)
    #[arg(long, value_enum, help_heading = "Output")]
    pub sort: Option<Sort>,

    /// Show this time stamp (default: as in the recorded run)
    #[arg(long, value_enum, help_heading = "Output")]
    pub timestamp: Option<Timestamp>,

    /// Show normal frees among drops too, as if the recorded run had done so
    #[arg(long, help_heading = "Output")]
    pub all: bool,

    /// Show TCP flags after the addresses, as if the recorded run had done so
    #[arg(long, help_heading = "Output")]
    pub output_tcp_flags: bool,

    /// Show the names of network namespaces in place of their inodes, as if the recorded run had done so
    #[arg(long, help_heading = "Output")]
    pub output_netns_names: bool,

    #[command(flatten)]
    pub filter: FilterArgs,
}

/// Which events to show. All that are given must hold.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Filter (all must hold)")]
pub struct FilterArgs {
    /// Packets that match, in tcpdump's language (pcap-filter(7)), by their recorded bytes
    #[arg(short = 'f', long, value_name = "EXPRESSION")]
    pub filter: Option<String>,

    /// Only functions whose whole name matches this regular expression
    #[arg(long, value_name = "REGEX")]
    pub filter_func: Option<String>,

    #[command(flatten)]
    pub packet: PacketFieldArgs,

    /// In this network namespace: its name then, or inode:N
    #[arg(long, value_name = "NETNS")]
    pub filter_netns: Option<String>,

    /// On interfaces of this name
    #[arg(long, value_name = "NAME")]
    pub filter_ifname: Option<String>,
}

impl Args {
    pub fn format(&self) -> Format {
        match self.output_json {
            true => Format::Json,
            false => self.format,
        }
    }

    /// Where lines go.
    pub fn output(&self) -> OutputArgs {
        OutputArgs {
            output_json: self.format() == Format::Json,
            otlp: None,
            output_file: self.output_file.clone(),
            rotate: RotateArgs::never(),
            output_limit_lines: self.output_limit_lines,
            ready_file: None,
        }
    }
}
