//! `netprobe record`: a run of `netprobe skb` into a file that `netprobe report` shows anywhere.

mod files;

use std::path::PathBuf;

use anyhow::Result;

use crate::tools::skb;
use crate::usage::usage;

use files::Files;

/// Record a run of skb, to be shown anywhere by netprobe report.
#[derive(Debug, clap::Args)]
#[group(skip)]
#[command(mut_arg("write", |arg| arg.hide(true)))]
pub struct Args {
    /// Write the recording to FILE: pcapng, with each packet once for Wireshark and tcpdump, and all events for netprobe report
    #[arg(
        short = 'o',
        long = "to",
        value_name = "FILE",
        required = true,
        group = "packets",
        help_heading = "Recording"
    )]
    pub to: PathBuf,

    /// End when the recording reaches this size (0: no limit); with --rotate-size, all of its files together
    #[arg(
        long,
        value_name = "MB",
        default_value_t = 0,
        help_heading = "Recording"
    )]
    pub max_size: u64,

    /// When FILE reaches this size, rename it to NAME-TIME.EXTENSION and begin a new file, which can be shown without the others
    #[arg(long, value_name = "MB", value_parser = clap::value_parser!(u64).range(1..=1_000_000), help_heading = "Recording")]
    pub rotate_size: Option<u64>,

    /// Keep only the newest N renamed files (0: all)
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        requires = "rotate_size",
        help_heading = "Recording"
    )]
    pub rotate_keep: usize,

    #[command(flatten)]
    pub skb: skb::args::Args,
}

pub fn run(mut args: Args) -> Result<()> {
    if args.skb.output.output_json && args.skb.output.output_file.is_none() {
        return Err(usage(
            "--output-json: a recording prints no lines; with --output-file it writes them beside it",
        ));
    }
    if cfg!(target_endian = "big") {
        anyhow::bail!("recordings are little-endian, and this machine is not");
    }
    args.skb.recorded = true;
    let files = Files {
        path: args.to,
        max_size: args.max_size.saturating_mul(1_000_000),
        rotate_size: args.rotate_size.map(|mb| mb * 1_000_000),
        keep: args.rotate_keep,
    };
    skb::run_recorded(&args.skb, Some(&files))
}
