//! `netprobe record`: a run of `netprobe skb` into a file that `netprobe report` shows anywhere.

mod files;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

use crate::run::signals;
use crate::tools::skb;
use crate::tools::skb::trigger::{Trigger, Triggers, duration};
use crate::usage::usage;

use files::{Files, Flights};

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
    pub flight: FlightArgs,

    #[command(flatten)]
    pub skb: skb::args::Args,
}

/// A file is written only when something happens, and has what came before it.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Flight recorder")]
pub struct FlightArgs {
    /// Keep the last TIME (30s, 500ms, 2m) in memory, and write a file NAME-TIME.EXTENSION of FILE only when a --trigger happens
    #[arg(long, value_name = "TIME", value_parser = duration, requires = "trigger", conflicts_with_all = ["max_size", "rotate_size", "output_limit_lines"])]
    pub flight: Option<Duration>,

    /// What writes a file (may be repeated): a drop; retransmit:N, a connection's Nth retransmission in a row; connect-slower:TIME; rst, a TCP
    /// reset sent or received; SIGUSR1
    #[arg(
        long,
        value_name = "drop[:REASON]|retransmit:N|connect-slower:TIME|rst|SIGUSR1",
        requires = "flight"
    )]
    pub trigger: Vec<Trigger>,

    /// Go on for so long after the trigger
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "5s", requires = "flight")]
    pub after: Duration,

    /// Keep only the newest N files of the flight recorder (0: all)
    #[arg(long, value_name = "N", default_value_t = 0, requires = "flight")]
    pub keep: usize,

    /// Begin no second file within this time; triggers in it are counted
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "60s", requires = "flight")]
    pub min_interval: Duration,

    /// Keep at most so much in memory (compressed), even if it is less than --flight asks for
    #[arg(long, value_name = "MB", default_value_t = 64, requires = "flight", value_parser = clap::value_parser!(u64).range(1..=65_536))]
    pub flight_memory: u64,
}

pub fn run(mut args: Args) -> Result<()> {
    if args.skb.output.output_json && args.skb.output.output_file.is_none() {
        return Err(usage(
            "--output-json: a recording prints no lines; with --output-file it writes them beside it",
        ));
    }
    if args.skb.output.otlp.is_some() {
        return Err(usage(
            "--otlp: a recording prints no rows; use it with netprobe skb",
        ));
    }
    if cfg!(target_endian = "big") {
        anyhow::bail!("recordings are little-endian, and this machine is not");
    }
    args.skb.recorded = true;
    let flight = &args.flight;
    let Some(before) = flight.flight else {
        let files = Files {
            path: args.to,
            max_size: args.max_size.saturating_mul(1_000_000),
            rotate_size: args.rotate_size.map(|mb| mb * 1_000_000),
            keep: args.rotate_keep,
        };
        return skb::run_recorded(&args.skb, Some(&files));
    };
    if args.to.as_os_str() == "-" {
        return Err(usage("--flight: its files need a name: -o FILE"));
    }
    args.skb.triggers = Triggers(flight.trigger.clone());
    let by_signal = flight.trigger.contains(&Trigger::Sigusr1);
    let files = Flights {
        path: args.to,
        keep: flight.keep,
        before,
        after: flight.after,
        interval: flight.min_interval,
        memory: flight.flight_memory as usize * 1_000_000,
        triggers: args.skb.triggers.clone(),
        usr1: by_signal.then(signals::usr1_channel).transpose()?,
    };
    skb::run_recorded(&args.skb, Some(&files))
}
