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

/// Flags of every tool that drains perf buffers.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Engine")]
pub struct EngineArgs {
    /// Pages of each CPU's perf buffer (a power of two); larger loses less in a burst, and takes memory
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub buffer_pages: usize,

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
    pub fn buffer(&self) -> crate::engine::drain::BufferOptions {
        crate::engine::drain::BufferOptions {
            pages: self.buffer_pages,
            threads: self.drain_threads,
            wakeup: self.perf_wakeup.unwrap_or(0),
        }
    }
}
