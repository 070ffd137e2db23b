//! The flags of `netprobe xdpdump`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::{ArgAction, ValueEnum};

use crate::engine::usage;
use crate::kernel::xdp::Mode;
use crate::output::OutputArgs;
use crate::output::pcapng::{Format, MAX_SNAPLEN};
use crate::tools::EngineArgs;

/// The most of a packet that one event can carry (NP_XDP_MAX_CAPTURE).
const MAX_CAPTURE: u32 = 65_400;

/// How our own program is attached where no program is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum XdpMode {
    /// native where the driver can, else generic; generic on veth, where native mode
    /// takes offloads from the peer and can send back only to a peer with NAPI
    Auto,
    /// in the driver
    Native,
    /// in the stack's receive path; every interface
    Skb,
}

/// Capture at XDP, before the stack, beside whatever XDP program is there.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Interfaces to capture at; several by commas or repeated
    #[arg(short, long, value_name = "NAME", value_delimiter = ',')]
    pub iface: Vec<String>,

    /// Look for the interfaces in this network namespace: a name under /run/netns, a path, or inode:N
    #[arg(long, value_name = "NETNS")]
    pub netns: Option<String>,

    /// Only packets that match this tcpdump expression; decided in the kernel
    #[arg(value_name = "EXPRESSION")]
    pub expression: Vec<String>,

    /// Bytes of each packet to capture (0: all of it, up to 65400)
    #[arg(short, long, value_name = "LEN", default_value_t = MAX_SNAPLEN)]
    pub snaplen: u32,

    /// End after N packets (0: no limit)
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    pub count: u64,

    /// End after this many seconds
    #[arg(long, value_name = "SECONDS")]
    pub duration: Option<f64>,

    /// Send one in N matching packets (of each CPU); decided in the kernel
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub sample: u32,

    /// How to attach where no XDP program is
    #[arg(long, alias = "load-xdp-mode", value_enum, default_value_t = XdpMode::Auto)]
    pub xdp_mode: XdpMode,

    /// Promiscuous mode while capturing
    #[arg(short = 'P', long)]
    pub promiscuous: bool,

    /// Show each packet in hex and ASCII; twice: with its link header
    #[arg(short = 'x', action = ArgAction::Count)]
    pub hex: u8,

    /// Show more of the IP header, and each packet's id
    #[arg(short = 'v')]
    pub details: bool,

    /// Show the link header
    #[arg(short = 'e')]
    pub link: bool,

    /// Write packets to FILE (-: stdout) as pcapng
    #[arg(short, long, value_name = "FILE")]
    pub write: Option<PathBuf>,

    /// Write classic pcap, without interface, queue and packet id
    #[arg(long, requires = "write")]
    pub use_pcap: bool,

    /// Begin another file when one has reached this many MB; files are numbered
    #[arg(long, value_name = "MB", requires = "write")]
    pub rotate_size: Option<u64>,

    /// Begin another file after this many seconds; files are numbered
    #[arg(long, value_name = "SECONDS", requires = "write")]
    pub rotate_seconds: Option<u64>,

    /// Keep the last N files only
    #[arg(long, value_name = "N", requires = "write")]
    pub rotate_files: Option<usize>,

    /// Print the packets of a pcapng or pcap FILE (-: stdin) that match EXPRESSION
    #[arg(short, long, value_name = "FILE", conflicts_with_all = ["iface", "netns", "restore", "list"])]
    pub read: Option<PathBuf>,

    /// List interfaces, their XDP programs and chains
    #[arg(short = 'D', long = "list-interfaces", id = "list")]
    pub list: bool,

    /// Put back what a killed netprobe left at the interfaces (without --iface: at all of them)
    #[arg(long, conflicts_with = "list")]
    pub restore: bool,

    #[command(flatten)]
    pub output: OutputArgs,

    #[command(flatten)]
    pub engine: EngineArgs,
}

impl Args {
    /// What clap cannot check.
    pub fn check(&self) -> Result<()> {
        let captures = self.read.is_none() && !self.list && !self.restore;
        if captures && self.iface.is_empty() {
            return Err(usage(
                "xdpdump needs --iface NAME (or -r FILE, -D, --restore)",
            ));
        }
        if !self.expression.is_empty() {
            return Err(usage("expressions are not built into xdpdump yet"));
        }
        if self.sample == 0 {
            return Err(usage("--sample 0: must be 1 or more"));
        }
        if self.duration.is_some_and(|s| !s.is_finite() || s < 0.0) {
            return Err(usage("--duration: must be a number of seconds"));
        }
        if self.rotate_files == Some(0)
            || self.rotate_size == Some(0)
            || self.rotate_seconds == Some(0)
        {
            return Err(usage("--rotate-…: must be 1 or more"));
        }
        if self.write.is_some() && (self.output.output_json || self.output.output_file.is_some()) {
            return Err(usage(
                "--write cannot be combined with --output-json or --output-file",
            ));
        }
        let mut names = self.iface.clone();
        names.sort_unstable();
        names.dedup();
        if names.len() < self.iface.len() {
            return Err(usage("--iface names an interface twice"));
        }
        Ok(())
    }

    /// Bytes of each packet that are sent.
    pub fn capture_len(&self) -> u32 {
        if self.snaplen == 0 {
            MAX_CAPTURE
        } else {
            self.snaplen.min(MAX_CAPTURE)
        }
    }

    /// The snap length as capture files tell it.
    pub fn told_snaplen(&self) -> u32 {
        if self.snaplen == 0 {
            MAX_SNAPLEN
        } else {
            self.snaplen
        }
    }

    pub fn format(&self) -> Format {
        if self.use_pcap {
            Format::Pcap
        } else {
            Format::Pcapng
        }
    }

    pub fn duration(&self) -> Option<Duration> {
        self.duration.map(Duration::from_secs_f64)
    }

    /// The first of the two limits to be reached; 0: none.
    pub fn limit(&self) -> u64 {
        match (self.count, self.output.output_limit_lines) {
            (0, limit) | (limit, 0) => limit,
            (a, b) => a.min(b),
        }
    }
}

impl XdpMode {
    /// What to try, in this order.
    pub fn modes(self, driver: Option<&str>) -> Vec<Mode> {
        match (self, driver) {
            (XdpMode::Native, _) => vec![Mode::Native],
            (XdpMode::Skb, _) | (XdpMode::Auto, Some("veth")) => vec![Mode::Generic],
            (XdpMode::Auto, _) => vec![Mode::Native, Mode::Generic],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn parse(line: &str) -> Args {
        Cli::try_parse_from(std::iter::once("xdpdump").chain(line.split_whitespace()))
            .unwrap()
            .args
    }

    #[test]
    fn interfaces_and_expression() {
        let args = parse("--iface enp0s9,v0 -i v1 tcp port 80 or icmp");
        assert_eq!(args.iface, ["enp0s9", "v0", "v1"]);
        assert_eq!(args.expression.join(" "), "tcp port 80 or icmp");
        parse("-i a").check().unwrap();
        assert!(parse("tcp").check().is_err());
        assert!(parse("-i a,a").check().is_err());
    }

    #[test]
    fn lengths_and_limits() {
        assert_eq!(parse("-i a").capture_len(), MAX_CAPTURE);
        assert_eq!(parse("-i a -s 16").capture_len(), 16);
        assert_eq!(parse("-i a -s 0").told_snaplen(), MAX_SNAPLEN);
        assert_eq!(parse("-i a -c 5").limit(), 5);
        assert_eq!(parse("-i a -c 5 --output-limit-lines 3").limit(), 3);
        assert_eq!(parse("-i a -xx").hex, 2);
    }

    #[test]
    fn modes_by_driver() {
        assert_eq!(XdpMode::Auto.modes(Some("veth")), [Mode::Generic]);
        assert_eq!(
            XdpMode::Auto.modes(Some("virtio_net")),
            [Mode::Native, Mode::Generic]
        );
        assert_eq!(
            parse("-i a --load-xdp-mode native")
                .xdp_mode
                .modes(Some("veth")),
            [Mode::Native]
        );
    }
}
