//! The flags of `netprobe xdpdump`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use clap::{ArgAction, ValueEnum};

use crate::bpf::xdpdump::types::np_xdp_capture;
use crate::capture::pcapng::{Format, MAX_SNAPLEN};
use crate::filter::cbpf::Program;
use crate::filter::expr;
use crate::filter::pcap::Packets;
use crate::kernel::xdp;
use crate::run::output::OutputArgs;
use crate::tools::EngineArgs;
use crate::usage::usage;

use super::trace::Points;

/// The most of a packet that one event can carry.
const MAX_CAPTURE: u32 = np_xdp_capture::NP_XDP_MAX_CAPTURE.0;

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

/// Where to capture beside programs that are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// trace if there is a program and the kernel allows it, else chain
    Auto,
    /// run before the program and tail-call it; every kernel
    Chain,
    /// fentry and fexit on the program: shows verdicts, leaves the interface as it is
    Trace,
}

/// Ends of a traced program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ProgramEnd {
    Entry,
    Exit,
}

/// What an XDP program said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Verdict {
    Aborted,
    Drop,
    Pass,
    Tx,
    Redirect,
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

    /// How to capture if the interface has an XDP program
    #[arg(long, value_enum, default_value_t = Mode::Auto)]
    pub mode: Mode,

    /// Capture at the traced program's entry, exit or both; exit shows its verdict
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [ProgramEnd::Entry])]
    pub rx_capture: Vec<ProgramEnd>,

    /// The programs to trace: function, function@id, id, or all (also those of a libxdp dispatcher, and subprograms that
    /// take the packet); the default is the main one
    #[arg(short, long, value_name = "NAME", value_delimiter = ',')]
    pub program_names: Vec<String>,

    /// Show what the traced program changed in each packet: inserted bytes, removed bytes, rewritten header fields
    #[arg(long, conflicts_with_all = ["rx_capture", "write", "read"])]
    pub diff: bool,

    /// Only packets with one of these verdicts, traced at exit or read from a file
    #[arg(long, value_enum, value_delimiter = ',')]
    pub action: Vec<Verdict>,

    /// How to attach if the interface has no XDP program
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

    /// Begin a new, numbered file after this many MB
    #[arg(long, value_name = "MB", requires = "write")]
    pub rotate_size: Option<u64>,

    /// Begin a new, numbered file after this many seconds
    #[arg(long, value_name = "SECONDS", requires = "write")]
    pub rotate_seconds: Option<u64>,

    /// Keep only the last N files
    #[arg(long, value_name = "N", requires = "write")]
    pub rotate_files: Option<usize>,

    /// Print the packets of a pcapng or pcap FILE (-: stdin) that match EXPRESSION
    #[arg(short, long, value_name = "FILE", conflicts_with_all = ["iface", "netns", "restore", "list"])]
    pub read: Option<PathBuf>,

    /// List interfaces, their XDP programs and chains
    #[arg(short = 'D', long = "list-interfaces", id = "list")]
    pub list: bool,

    /// Restore the XDP programs of interfaces that a killed netprobe has left changed (default: all interfaces)
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
        let traces = !self.program_names.is_empty() || !self.action.is_empty() || self.diff;
        if traces && captures && self.mode == Mode::Chain {
            return Err(usage(
                "-p, --action and --diff need --mode trace: a program in front of others knows no verdict",
            ));
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
        let output = &self.output;
        let rows = output.output_json || output.output_file.is_some() || output.otlp.is_some();
        if self.write.is_some() && rows {
            return Err(usage(
                "--write cannot be combined with --output-json, --output-file or --otlp",
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

    /// The expression.
    pub fn filter_text(&self) -> Option<String> {
        expr::join(&self.expression)
    }

    /// The expression for packets of one kind.
    pub fn filter(&self, packets: Packets<'_>) -> Result<Option<Program>> {
        self.filter_text()
            .map(|text| expr::compile_for(&text, packets).map_err(|e| usage(format!("{e:#}"))))
            .transpose()
    }

    /// What cannot be done in front of a chain.
    pub fn check_chain(&self) -> Result<()> {
        if self.program_names.is_empty()
            && self.action.is_empty()
            && !self.diff
            && !self.rx_capture.contains(&ProgramEnd::Exit)
        {
            return Ok(());
        }
        Err(usage(
            "--rx-capture exit, -p, --action and --diff need an XDP program that can be traced (--mode trace says why not)",
        ))
    }

    /// What to send of traced programs. Verdicts are asked for at exit alone, a difference takes both ends.
    pub fn points(&self) -> Points {
        let exit_only = !self.action.is_empty();
        Points {
            entry: self.diff || self.rx_capture.contains(&ProgramEnd::Entry) && !exit_only,
            exit: self.diff || self.rx_capture.contains(&ProgramEnd::Exit) || exit_only,
            verdicts: match self.action.as_slice() {
                [] => u32::MAX,
                some => some
                    .iter()
                    .fold(0, |bits, verdict| bits | 1 << *verdict as u32),
            },
        }
    }

    /// Whether a packet of a file is wanted.
    pub fn wants(&self, verdict: Option<u32>) -> bool {
        self.action.is_empty()
            || verdict.is_some_and(|verdict| self.action.iter().any(|one| *one as u32 == verdict))
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

    /// Not to a reader who may be waiting: to `-`, a pipe, a terminal.
    pub fn is_to_file(&self) -> bool {
        let waits = |path: &Path| path.metadata().is_ok_and(|file| !file.is_file());
        self.write
            .as_deref()
            .is_some_and(|path| path != Path::new("-") && !waits(path))
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
    pub fn modes(self, driver: Option<&str>) -> Vec<xdp::Mode> {
        match (self, driver) {
            (XdpMode::Native, _) => vec![xdp::Mode::Native],
            (XdpMode::Skb, _) | (XdpMode::Auto, Some("veth")) => vec![xdp::Mode::Generic],
            (XdpMode::Auto, _) => vec![xdp::Mode::Native, xdp::Mode::Generic],
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
        args.check().unwrap();
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
        assert_eq!(XdpMode::Auto.modes(Some("veth")), [xdp::Mode::Generic]);
        assert_eq!(
            XdpMode::Auto.modes(Some("virtio_net")),
            [xdp::Mode::Native, xdp::Mode::Generic]
        );
        assert_eq!(
            parse("-i a --load-xdp-mode native")
                .xdp_mode
                .modes(Some("veth")),
            [xdp::Mode::Native]
        );
    }
}
