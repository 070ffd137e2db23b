//! One folder or file per subcommand: `args` (its flags), `probes` (what it attaches), `decode` (its events), `present` (its lines).

pub mod completions;
pub mod ctl;
pub mod drop_facts;
pub mod drops;
pub mod expression;
pub mod extcap;
pub mod features;
pub mod fields;
pub mod filter;
pub mod icmp;
pub mod join;
pub mod latency;
pub mod man;
pub mod metrics;
pub mod record;
pub mod report;
pub mod rules;
pub mod skb;
pub mod tcp;
pub mod tcpconnect;
pub mod who;
pub mod why;
pub mod xdpchain;
pub mod xdpdump;

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use libbpf_rs::OpenMapMut;

use crate::engine::batch::{BufferOptions, POLL_MS};
use crate::engine::drain::EventMap;
use crate::kernel::btf::Btf;
use crate::kernel::features::Features;
use crate::os::{online_cpus, page_size};
use crate::usage::usage;

/// Pages of each CPU's buffer, unless the user asks for others.
const DEFAULT_PAGES: usize = 256;

/// Flags of every tool that drains buffers.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Engine")]
pub struct EngineArgs {
    /// Pages of each CPU's buffer (a power of two). A larger buffer loses less in a burst and takes more memory (default: 256;
    /// xdpdump: up to 2048, by the number of CPUs). Events that wait for a slow reader take at most 32 MiB and one round of all
    /// buffers; netprobe counts further events as lost
    #[arg(long, value_name = "N", value_parser = power_of_two)]
    pub buffer_pages: Option<usize>,

    /// Wake up after every N events of a CPU; 1: at each event (default: when a quarter of its buffer is full, or after 50 ms; xdpdump -w to a
    /// file: 250 ms)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub perf_wakeup: Option<u32>,

    /// Threads that drain the buffers; each thread serves some of the CPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub drain_threads: usize,

    /// Show libbpf's log
    #[arg(long)]
    pub verbose: bool,
}

/// Flags of every tool that traces the kernel.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Engine")]
pub struct TypesArgs {
    /// Take the kernel's types from FILE (BTF, or an ELF file with it) instead of from /sys/kernel/btf/vmlinux: for a
    /// kernel without CONFIG_DEBUG_INFO_BTF
    #[arg(long, value_name = "FILE")]
    pub kernel_btf: Option<PathBuf>,
}

impl TypesArgs {
    pub fn file(&self) -> Option<&Path> {
        self.kernel_btf.as_deref()
    }

    /// The kernel's types and features. `objects`: the names in `crate::bpf::*_TYPES`, which are looked for together. A
    /// file that was asked for by name and cannot be used is an error; no types of the running kernel are for
    /// [`Features`] to explain.
    pub fn load(&self, objects: &[&str]) -> Result<(Result<Btf>, Features)> {
        let mut btf = Btf::vmlinux(self.file());
        if self.kernel_btf.is_some() {
            btf = Ok(btf.context("--kernel-btf")?);
        }
        if let Ok(btf) = &btf {
            objects.iter().for_each(|names| btf.await_names(names));
        }
        let mut features = Features::with(btf.as_ref().ok());
        if self.kernel_btf.is_some() {
            features.take_casts(Btf::vmlinux(None).ok().as_ref());
        }
        Ok((btf, features))
    }
}

/// How events come out of the kernel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Transport {
    /// perf buffers, one a CPU
    #[default]
    Perf,
    /// BPF ring buffers, one a CPU: cheaper in the kernel by a third; kernels from 5.8
    Ringbuf,
}

/// The flag of tools that can do both.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
#[command(next_help_heading = "Engine")]
pub struct TransportArgs {
    /// How events come out of the kernel
    #[arg(long, value_enum, default_value_t)]
    pub transport: Transport,
}

impl TransportArgs {
    /// Flags that contradict each other.
    pub fn check(self, engine: &EngineArgs) -> Result<()> {
        if self.transport == Transport::Ringbuf && engine.perf_wakeup.is_some() {
            return Err(usage(
                "--perf-wakeup: there are no perf buffers with --transport ringbuf",
            ));
        }
        Ok(())
    }

    /// What the programs' `np_ring_wakeup` is set to: a quarter of a ring; 0 with perf buffers.
    pub fn wakeup(self, engine: &EngineArgs) -> u32 {
        match self.transport {
            Transport::Perf => 0,
            Transport::Ringbuf => (engine.buffer().pages * page_size() / 4) as u32,
        }
    }

    /// Makes room in the map `rings`, or has none made, so that kernels before 5.8 are not asked for one.
    pub fn prepare(self, rings: &mut OpenMapMut<'_>) -> Result<()> {
        if self.transport == Transport::Perf {
            return rings
                .set_autocreate(false)
                .context("failed to leave out the ring buffers");
        }
        let cpus = libbpf_rs::num_possible_cpus().context("failed to count the CPUs")?;
        rings
            .set_max_entries(cpus as u32)
            .context("failed to set the size of a map")
    }

    /// The map that events come through.
    pub fn source<'a>(self, events: BorrowedFd<'a>, rings: BorrowedFd<'a>) -> EventMap<'a> {
        match self.transport {
            Transport::Perf => EventMap::Perf(events),
            Transport::Ringbuf => EventMap::Rings(rings),
        }
    }
}

fn power_of_two(text: &str) -> Result<usize> {
    let n: usize = text.parse()?;
    anyhow::ensure!(n.is_power_of_two(), "it must be a power of two, as 256");
    Ok(n)
}

impl EngineArgs {
    pub fn buffer(&self) -> BufferOptions {
        BufferOptions {
            pages: self.buffer_pages.unwrap_or(DEFAULT_PAGES),
            threads: self.drain_threads,
            wakeup: self.perf_wakeup.unwrap_or(0),
            poll_ms: POLL_MS,
        }
    }

    /// For events that hold whole packets: a burst fills such a buffer some ten times as fast. 64 MiB over all CPUs by default, 1 to
    /// 8 MiB for each. Nobody waits for those that go `to_file`.
    pub fn packet_buffer(&self, to_file: bool) -> Result<BufferOptions> {
        const FILE_POLL_MS: u16 = 250;
        let cpus = online_cpus()?.len();
        let pages = (16_384 / cpus).clamp(DEFAULT_PAGES, 2048);
        Ok(BufferOptions {
            pages: self.buffer_pages.unwrap_or(1 << pages.ilog2()),
            poll_ms: if to_file { FILE_POLL_MS } else { POLL_MS },
            ..self.buffer()
        })
    }
}
