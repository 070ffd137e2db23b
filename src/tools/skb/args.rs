//! The flags of `netprobe skb`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::ValueEnum;
use regex::Regex;

use crate::engine::batch::BufferOptions;
use crate::filter::members::Condition;
use crate::kernel::btf::Btf;
use crate::run::output::OutputArgs;
use crate::tools::expression::ExpressionArgs;
use crate::tools::fields::FieldArgs;
use crate::tools::who::WhoArgs;
use crate::tools::{EngineArgs, TransportArgs, TypesArgs};
use crate::usage::usage;

use super::columns::{self, ColumnArgs, Types};
use super::event::{
    SECTION_DATA, SECTION_DROP, SECTION_LIFE, SECTION_MAP, SECTION_MEMBERS, SECTION_PACKET,
};
use super::style::{Style, Timestamp};
use super::trigger::Triggers;

/// What has not woken the reader of a flight recorder's buffers waits so long for it.
const FLIGHT_POLL_MS: u16 = 250;

/// How functions are attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// one by one; every kernel
    Kprobe,
    /// many at once; kernels from 5.18 with CONFIG_FPROBE
    KprobeMulti,
}

/// Follow packets through the kernel, function by function.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// How to attach; the default is kprobe-multi where the kernel has it
    #[arg(long, value_enum)]
    pub backend: Option<Backend>,

    /// Only functions whose whole name matches this regular expression
    #[arg(long, value_name = "REGEX")]
    pub filter_func: Option<String>,

    #[command(flatten)]
    pub expression: ExpressionArgs,

    /// Functions of the kernel proper and of these modules only
    #[arg(
        long,
        value_name = "NAME,..",
        value_delimiter = ',',
        conflicts_with = "all_kmods"
    )]
    pub kmods: Option<Vec<String>>,

    /// Functions of all loaded modules. This is the default; with the flag, a kernel that does not list them (before 5.11) is an
    /// error
    #[arg(long)]
    pub all_kmods: bool,

    /// Attach this many functions at a time (with kprobe-multi; 0: all)
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub filter_kprobe_batch: usize,

    #[command(flatten)]
    pub fields: FieldArgs,

    /// Follow a packet that has matched once through NAT, tunnels, clones, copies, segments and other namespaces. The column
    /// PACKET numbers the packets
    #[arg(long, help_heading = "Tracking")]
    pub filter_track_skb: bool,

    /// As --filter-track-skb, and also through free and rebuild: if a function that handles the packet calls one that makes a new
    /// skb, the new skb counts as the same packet
    #[arg(long, help_heading = "Tracking")]
    pub filter_track_skb_by_stackid: bool,

    /// Also show these functions, which take no skb, when a function that handles a packet calls them. Implies
    /// --filter-track-skb-by-stackid
    #[arg(
        long,
        value_name = "NAME,..",
        value_delimiter = ',',
        help_heading = "Tracking"
    )]
    pub filter_non_skb_funcs: Vec<String>,

    /// Show each run of a tc, tcx or netkit program, with its verdict. Programs that are loaded later are traced within 0.1 s
    #[arg(long, help_heading = "BPF programs", conflicts_with_all = ["drops", "pid", "comm", "uid", "cgroup", "container", "pod", "command"])]
    pub filter_trace_tc: bool,

    /// Show each run of an XDP program, with its verdict. Programs that are loaded later are traced within 0.1 s
    #[arg(long, help_heading = "BPF programs", conflicts_with_all = ["drops", "pid", "comm", "uid", "cgroup", "container", "pod", "command"])]
    pub filter_trace_xdp: bool,

    /// A condition in C on members of an XDP packet's xdp_buff: 'xdp->rxq->queue_index == 3' (--filter-skb-expr does not apply to
    /// XDP packets)
    #[arg(
        long,
        value_name = "CONDITION",
        help_heading = "BPF programs",
        requires = "filter_trace_xdp"
    )]
    pub filter_xdp_expr: Option<String>,

    /// Show the kernel functions (helpers, map functions, kfuncs) that tc and XDP programs call for a traced packet. Implies
    /// --filter-track-skb-by-stackid
    #[arg(long, help_heading = "BPF programs", conflicts_with = "drops")]
    pub filter_track_bpf_helpers: bool,

    /// Show map, key and value when a program looks up, updates or deletes an element of a BPF map
    #[arg(
        long,
        help_heading = "BPF programs",
        requires = "filter_track_bpf_helpers"
    )]
    pub output_bpfmap: bool,

    /// Track at most N skbs at the same time
    #[arg(long, value_name = "N", default_value_t = 65_536, value_parser = clap::value_parser!(u32).range(1..=16_777_216), help_heading = "Tracking")]
    pub track_entries: u32,

    /// Print one line for each dropped packet: its reason, its place, what that means, the owner of its socket, and the firewall rule.
    /// Uses the kernel's tracepoint of drops, and probes on functions that drop handshakes, make sockets and run firewall rules
    #[arg(long, conflicts_with_all = ["filter_func", "filter_track_skb_by_stackid", "filter_non_skb_funcs", "filter_kprobe_batch", "kmods", "all_kmods", "output_retval", "output-caller"])]
    pub drops: bool,

    /// With --drops: show the normal frees too (a TCP acknowledgement that was taken, multicast that nobody asked for). Without the
    /// flag their number is told at the end
    #[arg(long, requires = "drops")]
    pub all: bool,

    /// With --drops: rules that say what a drop means, before the built-in ones
    #[arg(long, value_name = "FILE", requires = "drops")]
    pub rules: Option<PathBuf>,

    #[command(flatten)]
    pub columns: ColumnArgs,

    /// Show the return value of functions that return a number (kernels from 5.15)
    #[arg(long, help_heading = "Output")]
    pub output_retval: bool,

    /// Show TCP flags after the addresses
    #[arg(long, help_heading = "Output")]
    pub output_tcp_flags: bool,

    /// Show members of the sk_buff, and of what it points to: 'skb->mark,skb->dev->ifindex' (4 at most)
    #[arg(
        long,
        value_name = "PATH,..",
        value_delimiter = ',',
        help_heading = "Output"
    )]
    pub output_skb_metadata: Vec<String>,

    /// Show members of XDP packets' xdp_buff, and of what it points to: 'xdp->rxq->queue_index' (4 at most)
    #[arg(
        long,
        value_name = "PATH,..",
        value_delimiter = ',',
        help_heading = "Output",
        requires = "filter_trace_xdp"
    )]
    pub output_xdp_metadata: Vec<String>,

    /// Show the names of network namespaces (under /run/netns) in place of their inodes
    #[arg(long, help_heading = "Output")]
    pub output_netns_names: bool,

    /// Write each event's packet to FILE (-: stdout) as pcapng, with function, reason, skb and process as its comment (beside the lines)
    #[arg(
        short = 'w',
        long,
        value_name = "FILE",
        group = "packets",
        help_heading = "Output"
    )]
    pub write: Option<PathBuf>,

    /// Bytes of each packet that --write takes at most
    #[arg(short = 's', long, value_name = "N", default_value_t = 256, requires = "packets", value_parser = clap::value_parser!(u32).range(16..=1536), help_heading = "Output")]
    pub snaplen: u32,

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

    #[command(flatten)]
    pub types: TypesArgs,

    #[command(flatten)]
    pub transport: TransportArgs,

    /// The events are recorded (`netprobe record`), with the packets' bytes and the numbers of sk_buffs' lives.
    #[arg(skip)]
    pub recorded: bool,

    /// What writes the files of a flight recorder (`netprobe record --flight`).
    #[arg(skip)]
    pub triggers: Triggers,

    // Last: its COMMAND comes behind the expression.
    #[command(flatten)]
    pub who: WhoArgs,
}

impl Args {
    /// The sections that events carry: those of the columns' own flags, and those that follow from others.
    pub fn sections(&self) -> u32 {
        let others = [
            (self.track(), SECTION_PACKET),
            (self.takes_packets(), SECTION_DATA),
            (!self.output_skb_metadata.is_empty(), SECTION_MEMBERS),
            (self.lives(), SECTION_LIFE),
            (self.drops, SECTION_DROP),
        ];
        let others = others.iter().filter(|(wanted, _)| *wanted);
        let with_drops = if self.drops {
            self.columns.with_drops
        } else {
            0
        };
        let columns = self.columns.sections | with_drops;
        others.fold(columns, |sum, (_, section)| sum | section)
    }

    /// The same, with those that only some events have.
    pub fn shown_sections(&self) -> u32 {
        let mut sections = self.sections();
        if self.output_bpfmap {
            sections |= SECTION_MAP;
        }
        if !self.output_xdp_metadata.is_empty() {
            sections |= SECTION_MEMBERS;
        }
        sections
    }

    /// Where the kernel's types are that the sections' C code reads; an error where it lacks them.
    pub fn types(&self, btf: &Btf) -> Result<Types> {
        let mut types = Types::Kernel;
        for column in &columns::ALL {
            if self.asks(column.section) && (column.types)(btf)? == Types::Modules {
                types = Types::Modules;
            }
        }
        Ok(types)
    }

    /// A section is asked for.
    pub fn asks(&self, section: u32) -> bool {
        self.sections() & section != 0
    }

    /// --filter-xdp-expr
    pub fn xdp_members(&self) -> Result<Option<Condition>> {
        let Some(text) = &self.filter_xdp_expr else {
            return Ok(None);
        };
        let mut btf = Btf::vmlinux(self.types.kernel_btf.as_deref());
        if self.types.kernel_btf.is_some() {
            btf = btf.context("--kernel-btf");
        }
        let btf = btf?;
        Condition::parse(text, ("xdp", "xdp_buff"), &btf)
            .map(Some)
            .map_err(|e| usage(format!("--filter-xdp-expr '{text}': {e:#}")))
    }

    /// A capture and lines cannot both go to stdout.
    pub fn check_write(&self) -> Result<()> {
        let both = self.write.as_deref() == Some(Path::new("-"));
        if both && self.output.output_file.is_none() {
            return Err(usage(
                "--write -: stdout has the lines; write them elsewhere, by --output-file FILE",
            ));
        }
        Ok(())
    }

    /// Packets are followed by their skb.
    pub fn track(&self) -> bool {
        self.filter_track_skb || self.track_stack()
    }

    /// The lives of sk_buffs are numbered: time counts from the last event of the same life.
    pub fn lives(&self) -> bool {
        let wanted = self.recorded || self.timestamp() == Timestamp::Relative;
        wanted && !self.track() && !self.drops
    }

    /// Events carry the packets' bytes.
    fn takes_packets(&self) -> bool {
        self.write.is_some() || self.recorded
    }

    /// Nobody waits for the events of a flight recorder: its readers sleep longer.
    pub fn buffer(&self) -> BufferOptions {
        let buffer = self.engine.buffer();
        BufferOptions {
            poll_ms: match self.triggers.0.is_empty() {
                true => buffer.poll_ms,
                false => FLIGHT_POLL_MS,
            },
            ..buffer
        }
    }

    /// How events are shown.
    pub fn style(&self) -> Style {
        Style {
            shown: self.shown_sections(),
            snap_len: self.snap_len(),
            timestamp: self.timestamp(),
            drops: self.drops,
            all: self.all,
            tcp_flags: self.output_tcp_flags,
            netns_names: self.output_netns_names,
        }
    }

    /// Packets are followed by the stack too.
    pub fn track_stack(&self) -> bool {
        self.filter_track_skb_by_stackid
            || !self.filter_non_skb_funcs.is_empty()
            || self.filter_track_bpf_helpers
    }

    /// Bytes of a packet that travel with its event: a multiple of 8 keeps what follows aligned.
    pub fn snap_len(&self) -> u32 {
        if self.takes_packets() {
            self.snaplen.next_multiple_of(8)
        } else {
            0
        }
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
