//! The flags of `netprobe skb`.

use anyhow::Result;
use clap::ValueEnum;
use regex::Regex;

use crate::engine::usage;
use crate::output::OutputArgs;
use crate::tools::EngineArgs;
use crate::tools::expression::ExpressionArgs;
use crate::tools::fields::FieldArgs;

/// SKB_SECTION_* of src/bpf/skb.h
pub const SECTION_META: u32 = 1 << 0;
pub const SECTION_TUPLE: u32 = 1 << 1;
pub const SECTION_PACKET: u32 = 1 << 2;
pub const SECTION_OWNER: u32 = 1 << 3;
pub const SECTION_CALLER: u32 = 1 << 4;
pub const SECTION_STACK: u32 = 1 << 15;

/// How functions are attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// one by one; every kernel
    Kprobe,
    /// many at once; kernels from 5.18 with CONFIG_FPROBE
    KprobeMulti,
}

/// What a time stamp counts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Timestamp {
    /// no time stamp
    None,
    /// the kernel's monotonic clock, seconds
    Current,
    /// since the same skb's last event, microseconds
    Relative,
    /// wall clock, UTC
    Absolute,
}

/// Follow packets through the kernel, function by function.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// How to attach; the default is kprobe-multi where the kernel has it
    #[arg(long, value_enum)]
    pub backend: Option<Backend>,

    /// Only functions whose whole name matches this regular expression
    #[arg(long, value_name = "REGEX")]
    pub filter_func: Option<String>,

    #[command(flatten)]
    pub expression: ExpressionArgs,

    #[command(flatten)]
    pub fields: FieldArgs,

    /// Go on following a packet that matched once: NAT, tunnels, clones, copies, segments, other namespaces. Shows which events
    /// are of one packet
    #[arg(long, help_heading = "Tracking")]
    pub filter_track_skb: bool,

    /// The same, and through free and rebuild: an skb that is made by a function below one that handles the packet is taken for
    /// the same packet
    #[arg(long, help_heading = "Tracking")]
    pub filter_track_skb_by_stackid: bool,

    /// skbs that can be tracked at the same time
    #[arg(long, value_name = "N", default_value_t = 65_536, value_parser = clap::value_parser!(u32).range(1..=16_777_216), help_heading = "Tracking")]
    pub track_entries: u32,

    /// One line for each dropped packet, with its reason and where: by one tracepoint, without function probes
    #[arg(long, conflicts_with_all = ["filter_func", "filter_track_skb", "filter_track_skb_by_stackid"])]
    pub drops: bool,

    /// Show netns, mark, interface, protocol, MTU and length (on; =false switches it off)
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_value_t = true, default_missing_value = "true", require_equals = true, action = clap::ArgAction::Set, help_heading = "Output")]
    pub output_meta: bool,

    /// Show addresses, ports and protocol (on; =false switches it off)
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_value_t = true, default_missing_value = "true", require_equals = true, action = clap::ArgAction::Set, help_heading = "Output")]
    pub output_tuple: bool,

    /// Show the kernel stack of each event
    #[arg(long, help_heading = "Output")]
    pub output_stack: bool,

    /// Show whose function called each function
    #[arg(long, help_heading = "Output")]
    pub output_caller: bool,

    /// Show the flags of TCP packets behind their addresses
    #[arg(long, help_heading = "Output")]
    pub output_tcp_flags: bool,

    /// Show whose socket a packet belongs to: the process that made or connected it, not the one that happens to run
    #[arg(long, help_heading = "Output")]
    pub output_owner: bool,

    /// Show a time stamp
    #[arg(long, value_enum, default_value_t = Timestamp::None, help_heading = "Output")]
    pub timestamp: Timestamp,

    /// The same as --timestamp relative
    #[arg(long, conflicts_with = "timestamp", help_heading = "Output")]
    pub output_relative_timestamp: bool,

    #[command(flatten)]
    pub output: OutputArgs,

    #[command(flatten)]
    pub engine: EngineArgs,
}

impl Args {
    /// The sections that events carry.
    pub fn sections(&self) -> u32 {
        let mut sections = 0;
        if self.output_meta {
            sections |= SECTION_META;
        }
        if self.output_tuple {
            sections |= SECTION_TUPLE;
        }
        if self.track() {
            sections |= SECTION_PACKET;
        }
        if self.output_owner {
            sections |= SECTION_OWNER;
        }
        if self.output_caller {
            sections |= SECTION_CALLER;
        }
        if self.output_stack {
            sections |= SECTION_STACK;
        }
        sections
    }

    /// Packets are followed by their skb.
    pub fn track(&self) -> bool {
        self.filter_track_skb || self.filter_track_skb_by_stackid
    }

    pub fn timestamp(&self) -> Timestamp {
        if self.output_relative_timestamp {
            Timestamp::Relative
        } else {
            self.timestamp
        }
    }

    /// The function filter, anchored to the whole name.
    pub fn function_pattern(&self) -> Result<Option<Regex>> {
        self.filter_func
            .as_ref()
            .map(|text| {
                // Checked alone first: wrapped, an unbalanced pattern could pass.
                Regex::new(text)
                    .and_then(|_| Regex::new(&format!("^(?:{text})$")))
                    .map_err(|e| usage(format!("--filter-func {text}: {e}")))
            })
            .transpose()
    }
}
