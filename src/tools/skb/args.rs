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
pub const SECTION_STACK: u32 = 1 << 2;

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

    /// Show netns, mark, interface, protocol, MTU and length (on; =false switches it off)
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_value_t = true, default_missing_value = "true", require_equals = true, action = clap::ArgAction::Set, help_heading = "Output")]
    pub output_meta: bool,

    /// Show addresses, ports and protocol (on; =false switches it off)
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_value_t = true, default_missing_value = "true", require_equals = true, action = clap::ArgAction::Set, help_heading = "Output")]
    pub output_tuple: bool,

    /// Show the kernel stack of each event
    #[arg(long, help_heading = "Output")]
    pub output_stack: bool,

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
        if self.output_stack {
            sections |= SECTION_STACK;
        }
        sections
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
