//! The flags of `netprobe why`.

use std::path::PathBuf;

use clap::ValueEnum;

use crate::engine::batch::BufferOptions;
use crate::run::output::OutputArgs;
use crate::tools::expression::ExpressionArgs;
use crate::tools::fields::FieldArgs;
use crate::tools::skb::args::Backend;
use crate::tools::who::WhoArgs;
use crate::tools::{EngineArgs, TransportArgs, TypesArgs};

use super::ends::End;
use super::expect::{Expect, Format};

/// Bytes of a packet that a line needs.
const SNAP_LEN: u32 = 96;

/// Which packets are shown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Only {
    /// every packet; with --details also those that are freed in the normal course of things
    #[default]
    All,
    /// those that did not get where they should: lost, rejected, still here, unknown
    Lost,
    /// those that took at least --min-ms
    Slow,
}

/// Say what became of packets, in words, with proof.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// How to attach; the default is kprobe-multi where the kernel has it
    #[arg(long, value_enum)]
    pub backend: Option<Backend>,

    /// Which packets to show; the last line counts all
    #[arg(long, value_enum, default_value_t)]
    pub only: Only,

    /// With --only slow: packets that took at least this long, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 100)]
    pub min_ms: u64,

    /// Show the stages of packets that got where they should, too, and packets that are freed in the normal course of things
    #[arg(short = 'v', long)]
    pub details: bool,

    /// Also show what processes change in the network meanwhile (links, addresses, routes, rules, neighbours, tc, nft, the older iptables,
    /// sysctls), and with a loss the last change before it
    #[arg(long)]
    pub changes: bool,

    /// Show where the ways of two kinds of packets part first, and that alone: packets that match this expression, and those of --with
    #[arg(long, value_name = "EXPRESSION", requires = "with")]
    pub compare: Option<String>,

    /// The other kind of packets of --compare
    #[arg(
        long,
        value_name = "EXPRESSION",
        requires = "compare",
        conflicts_with = "expect_format"
    )]
    pub with: Option<String>,

    /// Write the packets to a pcapng file, each once, with what became of it as its comment; - for stdout. The file is a recording, too:
    /// netprobe report shows the answers again
    #[arg(short = 'w', long, value_name = "FILE")]
    pub write: Option<PathBuf>,

    /// Bytes of each packet that --write takes at most
    #[arg(short = 's', long, value_name = "N", default_value_t = 256, requires = "write", value_parser = clap::value_parser!(u32).range(96..=1536))]
    pub snaplen: u32,

    /// End after this many seconds
    #[arg(long, value_name = "SECONDS")]
    pub duration: Option<u64>,

    /// Exit with status 3 unless this is what became of the packets: delivered (some were, and none was lost or rejected), lost or lost:RULE
    /// (at least one was), rejected (at least one was)
    #[arg(long, value_name = "delivered|lost[:RULE]|rejected")]
    pub expect: Option<Expect>,

    /// Write a test's result in this format to stdout, with the blocks in it; what COMMAND prints goes to stderr
    #[arg(long, value_enum, requires = "expect", conflicts_with_all = ["output_json", "otlp"])]
    pub expect_format: Option<Format>,

    /// Read further rules from FILE (TOML, like src/explain/reasons.toml); they take precedence over the built-in rules
    #[arg(long, value_name = "FILE")]
    pub rules: Option<PathBuf>,

    /// Explain a drop reason and end; `all` explains every reason of this kernel
    #[arg(long, value_name = "REASON")]
    pub explain: Option<String>,

    /// Follow at most N packets at the same time
    #[arg(long, value_name = "N", default_value_t = 65_536, value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    pub track_entries: u32,

    #[command(flatten)]
    pub fields: FieldArgs,

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

    // Last: its COMMAND comes behind the expression.
    #[command(flatten)]
    pub who: WhoArgs,
}

impl Args {
    /// Events hold a packet's first bytes and more: four times the buffers of other tools.
    pub fn buffer(&self) -> BufferOptions {
        BufferOptions {
            pages: self.engine.buffer_pages.unwrap_or(1024),
            ..self.engine.buffer()
        }
    }

    /// Bytes of a packet that travel with its events: a multiple of 8 keeps what follows aligned.
    pub fn snap_len(&self) -> u32 {
        match self.write {
            Some(_) => self.snaplen.next_multiple_of(8),
            None => SNAP_LEN,
        }
    }

    /// The two expressions of --compare.
    pub fn compared(&self) -> Option<[&str; 2]> {
        Some([self.compare.as_deref()?, self.with.as_deref()?])
    }

    /// The expressions that packets must match: with --compare one of its two, too.
    pub fn expressions(&self) -> ExpressionArgs {
        let mut all = self.expression.clone();
        if let Some([first, second]) = self.compared() {
            let either = format!("(({first}) or ({second}))");
            let and = match all.expression.as_slice() {
                [] => either,
                words => format!("({}) and {either}", words.join(" ")),
            };
            all.expression = vec![and];
        }
        all
    }

    /// Is a packet with this end, that took this long (ns), shown?
    pub fn shows(&self, end: End, took: u64) -> bool {
        match self.only {
            // What is freed in the normal course is counted in the last line.
            Only::All => self.details || end != End::Expected,
            Only::Lost => !end.is_good(),
            Only::Slow => took >= self.min_ms.saturating_mul(1_000_000),
        }
    }
}
