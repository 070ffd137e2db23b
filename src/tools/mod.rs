//! One folder or file per subcommand: `args` (its flags), `probes` (what it attaches), `decode` (its events), `present` (its lines).

pub mod ctl;
pub mod expression;
pub mod features;
pub mod fields;
pub mod filter;
pub mod icmp;
pub mod skb;
pub mod tcpconnect;
pub mod xdpchain;
pub mod xdpdump;

use anyhow::Result;

use crate::engine::drain::{BufferOptions, online_cpus};

/// Pages of each CPU's perf buffer, unless the user asks for others.
const DEFAULT_PAGES: usize = 256;

/// Flags of every tool that drains perf buffers.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Engine")]
pub struct EngineArgs {
    /// Pages of each CPU's perf buffer (a power of two); larger loses less in a burst, and takes memory
    /// (default: 256; xdpdump: up to 2048, by the number of CPUs)
    #[arg(long, value_name = "N")]
    pub buffer_pages: Option<usize>,

    /// Wake up for every N events of a CPU; 1: for each at once (default: when a quarter of its buffer is full, or after 50 ms)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub perf_wakeup: Option<u32>,

    /// Threads that drain the buffers, each a part of the CPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub drain_threads: usize,

    /// Show libbpf's log
    #[arg(long)]
    pub verbose: bool,
}

impl EngineArgs {
    pub fn buffer(&self) -> BufferOptions {
        BufferOptions {
            pages: self.buffer_pages.unwrap_or(DEFAULT_PAGES),
            threads: self.drain_threads,
            wakeup: self.perf_wakeup.unwrap_or(0),
        }
    }

    /// For events that hold whole packets: a burst fills such a buffer some ten times as fast. 64 MiB over all CPUs by default, 1 to
    /// 8 MiB for each.
    pub fn packet_buffer(&self) -> Result<BufferOptions> {
        let cpus = online_cpus()?.len();
        let pages = (16_384 / cpus).clamp(DEFAULT_PAGES, 2048);
        Ok(BufferOptions {
            pages: self.buffer_pages.unwrap_or(1 << pages.ilog2()),
            ..self.buffer()
        })
    }
}
