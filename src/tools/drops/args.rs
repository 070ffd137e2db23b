//! The flags of `netprobe drops`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::ValueEnum;

use crate::bpf::drops::types::drop_by;
use crate::run::http;
use crate::run::output::OutputArgs;
use crate::tools::TypesArgs;
use crate::tools::expression::ExpressionArgs;
use crate::tools::fields::FieldArgs;
use crate::tools::who::WhoArgs;

/// What a row is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum By {
    Reason,
    Place,
    Iface,
    Netns,
    Proto,
    Port,
    /// the nft rule that dropped
    Rule,
}

/// What the rows are sorted by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Sort {
    /// packets lost
    #[default]
    Lost,
    /// bytes lost
    Bytes,
    /// what was lost, by name
    What,
}

/// More than 0, of one CPU.
fn percent(text: &str) -> Result<f64, String> {
    let wrong = || "give a number above 0".to_owned();
    let percent: f64 = text.parse().map_err(|_| wrong())?;
    if percent.is_finite() && percent > 0.0 {
        Ok(percent)
    } else {
        Err(wrong())
    }
}

/// Count what this machine loses, by cause, and balance it against the kernel's own counters.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Seconds between two tables
    #[arg(short = 'i', long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    pub interval: u64,

    /// End after one table
    #[arg(long)]
    pub once: bool,

    /// Show the N largest rows (0: all)
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub top: usize,

    /// Group drops by these; the class of a drop needs reason and place. `rule`, the nft rule that dropped, costs each packet that
    /// passes a chain of nft some instructions, where nf_tables is loaded when netprobe starts
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "reason,place,iface,netns,proto,port,rule"
    )]
    pub by: Vec<By>,

    /// Order of the rows
    #[arg(long, value_enum, default_value_t)]
    pub sort: Sort,

    /// Also show packets that the kernel frees in normal operation
    #[arg(long)]
    pub all: bool,

    /// Show places as symbol+offset
    #[arg(long)]
    pub offsets: bool,

    /// Read further rules from FILE (TOML, like src/explain/reasons.toml); they take precedence over the built-in rules
    #[arg(long, value_name = "FILE")]
    pub rules: Option<PathBuf>,

    /// Explain a drop reason and end; `all` explains every reason of this kernel
    #[arg(long, value_name = "REASON")]
    pub explain: Option<String>,

    /// Count what XDP, tc and cgroup programs drop, by program: a fexit program on each of them, which costs each run of it. A program
    /// that is loaded later is counted from the next table on
    #[arg(long)]
    pub programs: bool,

    /// Serve all counts for Prometheus at http://ADDR:PORT/metrics (a PORT alone: at 127.0.0.1); they are as new as the last table
    #[arg(long, value_name = "ADDR:PORT", value_parser = http::address)]
    pub metrics_listen: Option<SocketAddr>,

    /// Take at most PERCENT of one CPU: beyond it rows have no example and tables come later; counts stay exact
    #[arg(long, value_name = "PERCENT", default_value_t = 5.0, value_parser = percent)]
    pub max_cpu: f64,

    #[command(flatten)]
    pub fields: FieldArgs,

    #[command(flatten)]
    pub expression: ExpressionArgs,

    #[command(flatten)]
    pub output: OutputArgs,

    #[command(flatten)]
    pub types: TypesArgs,

    /// Show libbpf's log
    #[arg(long)]
    pub verbose: bool,

    // Last: its COMMAND comes behind the expression.
    #[command(flatten)]
    pub who: WhoArgs,
}

impl Args {
    /// The value of the programs' `by`.
    pub fn by(&self) -> u8 {
        let bit = |by: &By| match by {
            By::Reason => drop_by::DROP_BY_REASON,
            By::Place => drop_by::DROP_BY_PLACE,
            By::Iface => drop_by::DROP_BY_IFACE,
            By::Netns => drop_by::DROP_BY_NETNS,
            By::Proto => drop_by::DROP_BY_PROTO,
            By::Port => drop_by::DROP_BY_PORT,
            By::Rule => drop_by::DROP_BY_RULE,
        };
        self.by.iter().fold(0, |all, by| all | bit(by).0 as u8)
    }

    /// Whether every drop is counted, and by what the counters tell apart: only then do the kernel's counters balance.
    pub fn is_whole(&self) -> bool {
        [By::Reason, By::Place, By::Netns, By::Proto]
            .iter()
            .all(|by| self.by.contains(by))
            && self.expression.expression.is_empty()
            && self.expression.filter_skb_expr.is_none()
            && self.expression.filter_tunnel_pcap_l2.is_none()
            && self.expression.filter_tunnel_pcap_l3.is_none()
            && self.fields.is_empty()
            && self.who.is_empty()
    }
}
