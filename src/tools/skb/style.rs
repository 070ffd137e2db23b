//! How events are shown: what of the flags of a run its lines depend on. A recording has it.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// What a time stamp counts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Timestamp {
    /// no time stamp
    None,
    /// the kernel's monotonic clock, seconds
    Current,
    /// since the last event of the same skb (with tracking: of the same packet), microseconds
    Relative,
    /// wall clock, UTC
    Absolute,
}

/// The choices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Style {
    /// SKB_SECTION_* that events may have
    pub shown: u32,
    /// bytes of each packet that events carry
    pub snap_len: u32,
    pub timestamp: Timestamp,
    /// one line a drop
    pub drops: bool,
    /// with those that are no losses
    #[serde(default)]
    pub all: bool,
    pub tcp_flags: bool,
    /// names of namespaces in place of their inodes
    pub netns_names: bool,
}
