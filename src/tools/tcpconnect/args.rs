//! The flags of `netprobe tcpconnect`, and what they mean as filters.

use std::path::PathBuf;

use anyhow::Result;

use crate::bpf::tcpconnect::types::{tcp_filter_bit, tcp_mode};
use crate::kernel::netns::Netns;
use crate::kernel::{cgroup, containers, pods};
use crate::run::output::OutputArgs;
use crate::tools::fields;
use crate::tools::{EngineArgs, TransportArgs, TypesArgs};
use crate::usage::usage;

/// TCP_FILTER_* of src/bpf/tcp/tcpconnect.h
pub const PID: u32 = tcp_filter_bit::TCP_FILTER_PID.0;
pub const UID: u32 = tcp_filter_bit::TCP_FILTER_UID.0;
pub const COMM: u32 = tcp_filter_bit::TCP_FILTER_COMM.0;
pub const CGROUP: u32 = tcp_filter_bit::TCP_FILTER_CGROUP.0;
pub const CGROUPMAP: u32 = tcp_filter_bit::TCP_FILTER_CGROUPMAP.0;
pub const MNTNSMAP: u32 = tcp_filter_bit::TCP_FILTER_MNTNSMAP.0;
pub const PORTS: u32 = tcp_filter_bit::TCP_FILTER_PORTS.0;
pub const FAMILY: u32 = tcp_filter_bit::TCP_FILTER_FAMILY.0;
pub const DADDR: u32 = tcp_filter_bit::TCP_FILTER_DADDR.0;
pub const NETNS: u32 = tcp_filter_bit::TCP_FILTER_NETNS.0;

/// TCP_MODE_*
pub const MODE_COUNT: u32 = tcp_mode::TCP_MODE_COUNT.0;
pub const MODE_LPORT: u32 = tcp_mode::TCP_MODE_LPORT.0;
pub const MODE_OUTCOME: u32 = tcp_mode::TCP_MODE_OUTCOME.0;
pub const MODE_STACKS: u32 = tcp_mode::TCP_MODE_STACKS.0;

/// A thread's name as the kernel keeps it: 15 bytes and a NUL.
const COMM_MAX: usize = 15;

/// Which process connects where over TCP, and what became of it.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Args {
    /// Show seconds since the first event
    #[arg(short = 't', long)]
    pub timestamp: bool,

    /// Show the user id
    #[arg(short = 'U', long)]
    pub print_uid: bool,

    /// Show the local port; with -c, count each one for itself
    #[arg(
        short = 'L',
        long,
        visible_short_alias = 's',
        visible_alias = "source-port"
    )]
    pub lport: bool,

    /// Show the name that this process resolved the address from (DNS, port 53)
    #[arg(short = 'd', long)]
    pub dns: bool,

    /// Show the process's cgroup (v2) by its path
    #[arg(long)]
    pub cgroup_name: bool,

    /// Count connects by source, destination and port in the kernel; the table is printed at the end
    #[arg(short = 'c', long, conflicts_with_all = ["timestamp", "print_uid", "dns", "cgroup_name", "outcome", "output_stack"])]
    pub count: bool,

    /// With -c: print the table every SECONDS
    #[arg(short = 'i', long, value_name = "SECONDS", requires = "count", value_parser = clap::value_parser!(u64).range(1..))]
    pub interval: Option<u64>,

    /// With -c: print the N largest counts only
    #[arg(long, value_name = "N", requires = "count")]
    pub top: Option<usize>,

    /// With -c: the most flows that the kernel counts; those beyond are told
    #[arg(long, value_name = "N", default_value_t = 65_536, requires = "count", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_flows: u32,

    /// One row when a connect is decided: established, refused, timed out, …; with latency, SYN retransmits and drops
    #[arg(long)]
    pub outcome: bool,

    /// With --outcome: only those that took at least MS milliseconds
    #[arg(long, value_name = "MS", requires = "outcome", value_parser = milliseconds)]
    pub min_ms: Option<f64>,

    /// Show the kernel and the user stack that called connect
    #[arg(long)]
    pub output_stack: bool,

    #[command(flatten)]
    pub filter: FilterArgs,

    #[command(flatten)]
    pub output: OutputArgs,

    #[command(flatten)]
    pub engine: EngineArgs,

    #[command(flatten)]
    pub types: TypesArgs,

    #[command(flatten)]
    pub transport: TransportArgs,

    /// The same as --verbose
    #[arg(short = 'v', help_heading = "Engine")]
    pub v: bool,
}

/// Filters decided in the kernel. All that are given must hold.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(
    next_help_heading = "Filter (all must hold; decided in the kernel; a ! before the value: all others)"
)]
pub struct FilterArgs {
    /// This process only
    #[arg(short = 'p', long, value_name = "[!]PID")]
    pub pid: Option<String>,

    /// This user only
    #[arg(short = 'u', long, value_name = "[!]UID")]
    pub uid: Option<String>,

    /// These destination ports only; any number of them
    #[arg(short = 'P', long, value_name = "[!]PORT,…")]
    pub port: Option<String>,

    /// IPv4 only, also by IPv6 sockets (::ffff:a.b.c.d)
    #[arg(short = '4', long, conflicts_with = "ipv6")]
    pub ipv4: bool,

    /// IPv6 only
    #[arg(short = '6', long)]
    pub ipv6: bool,

    /// Destinations within these networks only
    #[arg(long, value_name = "[!]ADDR[/LEN],…")]
    pub daddr: Option<String>,

    /// Threads of this name only
    #[arg(long, value_name = "[!]NAME")]
    pub comm: Option<String>,

    /// Processes in this cgroup (v2) or below it: a path, from /sys/fs/cgroup on or whole
    #[arg(long, value_name = "[!]PATH")]
    pub cgroup: Option<String>,

    /// Processes of this container: its name, or the beginning of its id
    #[arg(long, value_name = "[!]NAME|ID", conflicts_with_all = ["cgroup", "pod"])]
    pub container: Option<String>,

    /// Processes of this pod of Kubernetes on this node
    #[arg(long, value_name = "[!]NAMESPACE/NAME", conflicts_with = "cgroup")]
    pub pod: Option<String>,

    /// In this network namespace: /proc/PID/ns/net, a name under /run/netns, or inode:N
    #[arg(long, value_name = "[!]NETNS")]
    pub netns: Option<String>,

    /// Cgroups whose ids are keys of this pinned map (u64 to u64)
    #[arg(long, value_name = "PATH")]
    pub cgroupmap: Option<PathBuf>,

    /// Mount namespaces whose inodes are keys of this pinned map (u64 to u32)
    #[arg(long, value_name = "PATH")]
    pub mntnsmap: Option<PathBuf>,
}

/// The filters as the BPF programs take them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    pub on: u32,
    pub negated: u32,
    pub pid: u32,
    pub uid: u32,
    pub version: u32,
    pub netns: u32,
    pub cgroup: u64,
    pub comm: [u8; 16],
    pub ports: Vec<u16>,
    /// prefix length (of 128) and address, IPv4 as ::ffff:a.b.c.d
    pub daddrs: Vec<(u32, [u8; 16])>,
}

impl Args {
    /// TCP_MODE_*
    pub fn mode(&self) -> u32 {
        let mut mode = 0;
        for (on, bit) in [
            (self.count, MODE_COUNT),
            (self.lport, MODE_LPORT),
            (self.outcome, MODE_OUTCOME),
            (self.output_stack, MODE_STACKS),
        ] {
            if on {
                mode |= bit;
            }
        }
        mode
    }

    pub fn verbose(&self) -> bool {
        self.v || self.engine.verbose
    }

    /// --min-ms in ns.
    pub fn min_ns(&self) -> u64 {
        self.min_ms.map_or(0, |ms| (ms * 1e6) as u64)
    }
}

impl FilterArgs {
    /// Looks up namespaces and cgroups.
    pub fn resolve(&self) -> Result<Filter> {
        let mut f = Filter::default();
        if let Some(text) = &self.pid {
            f.pid = number(f.take(PID, text), "-p", "a process id")?;
        }
        if let Some(text) = &self.uid {
            f.uid = number(f.take(UID, text), "-u", "a user id")?;
        }
        if let Some(text) = &self.port {
            f.ports = list(f.take(PORTS, text))
                .map(|p| number(p, "-P", "a port, 0 to 65535"))
                .collect::<Result<_>>()?;
        }
        if self.ipv4 || self.ipv6 {
            f.on |= FAMILY;
            f.version = if self.ipv4 { 4 } else { 6 };
        }
        if let Some(text) = &self.daddr {
            f.daddrs = list(f.take(DADDR, text))
                .map(fields::prefix_bits)
                .collect::<Result<_>>()?;
        }
        if let Some(text) = &self.comm {
            let name = f.take(COMM, text).as_bytes();
            if name.is_empty() || name.len() > COMM_MAX {
                return Err(usage(format!(
                    "--comm {text}: the kernel's thread names have 1 to {COMM_MAX} bytes"
                )));
            }
            f.comm[..name.len()].copy_from_slice(name);
        }
        if let Some(text) = &self.cgroup {
            f.cgroup = cgroup::id(f.take(CGROUP, text))?;
        }
        if let Some(text) = &self.container {
            let name = f.take(CGROUP, text);
            f.cgroup = containers::find(name)?.cgroup_id(name)?;
        }
        if let Some(text) = &self.pod {
            let name = f.take(CGROUP, text);
            f.cgroup = pods::find(name)?.cgroup_id(name)?;
        }
        if let Some(text) = &self.netns {
            f.netns = Netns::parse(f.take(NETNS, text))?.inode;
        }
        if self.cgroupmap.is_some() {
            f.on |= CGROUPMAP;
        }
        if self.mntnsmap.is_some() {
            f.on |= MNTNSMAP;
        }
        Ok(f)
    }
}

impl Filter {
    /// Switches the filter `bit` on; gives the value without a leading `!`, which negates it.
    fn take<'a>(&mut self, bit: u32, text: &'a str) -> &'a str {
        self.on |= bit;
        match text.strip_prefix('!') {
            Some(rest) => {
                self.negated |= bit;
                rest
            }
            None => text,
        }
    }
}

/// The members of a list with commas.
pub fn list(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim)
}

/// `what` `flag` wants.
pub fn number<T: std::str::FromStr>(text: &str, flag: &str, what: &str) -> Result<T> {
    text.parse()
        .map_err(|_| usage(format!("{flag} {text:?}: give {what}")))
}

/// Not negative and finite.
fn milliseconds(text: &str) -> Result<f64, String> {
    text.parse::<f64>()
        .ok()
        .filter(|ms| (0.0..1e12).contains(ms))
        .ok_or_else(|| "give milliseconds, such as 50 or 0.5".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::usage::UsageError;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn parse(words: &[&str]) -> Result<Args, clap::Error> {
        Cli::try_parse_from(std::iter::once(&"tcpconnect").chain(words)).map(|c| c.args)
    }

    fn filter(words: &[&str]) -> Result<Filter> {
        parse(words).unwrap().filter.resolve()
    }

    #[test]
    fn short_and_long_names() {
        for words in [
            &[
                "-t", "-U", "-L", "-d", "-v", "-4", "-p", "1", "-u", "0", "-P", "80,81",
            ][..],
            &[
                "--timestamp",
                "--print-uid",
                "--lport",
                "--dns",
                "--verbose",
                "--ipv4",
                "--pid",
                "1",
                "--uid",
                "0",
                "--port",
                "80,81",
            ],
        ] {
            let args = parse(words).unwrap();
            assert!(args.timestamp && args.print_uid && args.lport && args.dns);
            assert!(args.verbose());
            let f = args.filter.resolve().unwrap();
            assert_eq!(f.on, PID | UID | PORTS | FAMILY);
            assert_eq!((f.pid, f.uid, f.version, f.ports), (1, 0, 4, vec![80, 81]));
        }
        assert!(parse(&["-s"]).unwrap().lport);
        assert_eq!(
            parse(&["-c", "-L"]).unwrap().mode(),
            MODE_COUNT | MODE_LPORT
        );
        assert_eq!(
            parse(&["--outcome", "--min-ms", "0.5"]).unwrap().min_ns(),
            500_000
        );
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        for words in [
            &["-4", "-6"][..],
            &["-c", "-t"],
            &["-c", "-d"],
            &["-c", "--outcome"],
            &["-i", "1"],
            &["--top", "3"],
            &["-c", "-i", "0"],
            &["--min-ms", "3"],
            &["--outcome", "--min-ms", "-1"],
        ] {
            assert!(parse(words).is_err(), "{words:?}");
        }
    }

    #[test]
    fn any_number_of_ports() {
        let text: Vec<String> = (1..=1000).map(|p| p.to_string()).collect();
        let f = filter(&["-P", &text.join(",")]).unwrap();
        assert_eq!(f.ports.len(), 1000);
        assert_eq!(f.negated, 0);
    }

    #[test]
    fn negation() {
        let f = filter(&[
            "-P",
            "!80,443",
            "-p",
            "!7",
            "-u",
            "!0",
            "--comm",
            "!curl",
            "--daddr",
            "!10.0.0.0/8",
        ])
        .unwrap();
        assert_eq!(f.negated, PORTS | PID | UID | COMM | DADDR);
        assert_eq!(f.on, f.negated);
        assert_eq!(f.ports, [80, 443]);
        assert_eq!(&f.comm[..5], b"curl\0");
        assert_eq!(f.daddrs[0].0, 104);
        assert_eq!(f.daddrs[0].1[10..13], [0xff, 0xff, 10]);
    }

    #[test]
    fn wrong_values_are_usage_errors_that_name_them() {
        for (words, named) in [
            (&["-P", "80,x"][..], "x"),
            (&["-P", "65536"], "65536"),
            (&["-P", ""], ""),
            (&["-p", "-"], "-"),
            (&["-u", "root"], "root"),
            (&["--comm", "a-name-too-long-x"], "a-name-too-long-x"),
            (&["--daddr", "10.0.0.0/33"], "10.0.0.0/33"),
            (&["--cgroup", "/no/such/group"], "/no/such/group"),
            (&["--netns", "no-such"], "no-such"),
        ] {
            let e = filter(words).unwrap_err();
            assert!(e.is::<UsageError>(), "{words:?}: {e:#}");
            assert!(e.to_string().contains(named), "{words:?}: {e:#}");
        }
    }
}
