//! The command line: the subcommands, and how their results become exit codes.
//!
//! 0: the run ended as asked (also by a signal, a limit or a closed pipe). 1: it failed. 2: wrong usage. 3: an expectation (why --expect)
//! is not met.

use std::io;
use std::process::ExitCode;

use anyhow::Result;
use clap::{CommandFactory, Parser, Subcommand};

use crate::run::{build, signals};
use crate::tools;
use crate::usage::{Unexpected, UsageError};

/// Where did my packet go, why, and how slowly? Answers from a live Linux kernel, by eBPF.
#[derive(Debug, Parser)]
#[command(name = "netprobe", version, long_version = build::long_version(), max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say what became of packets, in words, with proof
    Why(Box<tools::why::args::Args>),
    /// Follow packets through the kernel, function by function
    Skb(Box<tools::skb::args::Args>),
    /// Count what this machine loses, by cause, and balance it against the kernel's own counters
    Drops(Box<tools::drops::args::Args>),
    /// Record a run of skb, to be shown anywhere by report
    Record(Box<tools::record::Args>),
    /// Show a recording, on any machine, without privilege
    Report(Box<tools::report::args::Args>),
    /// Follow packets from one recorded host to another
    Join(Box<tools::join::args::Args>),
    /// Who answered a ping, on which core, and where the time went
    Icmp(Box<tools::icmp::args::Args>),
    /// Capture packets at XDP, before the stack
    Xdpdump(Box<tools::xdpdump::args::Args>),
    /// Run several XDP programs on one interface in an order: add, list, remove
    Xdpchain(tools::xdpchain::Args),
    /// Show what a packet expression is compiled to, or try it on a file's packets in this kernel
    Filter(tools::filter::Args),
    /// List running netprobes, and change their field filters
    Ctl(tools::ctl::Args),
    /// Show which process connects where over TCP, and what became of it
    Tcpconnect(Box<tools::tcpconnect::args::Args>),
    /// Show each TCP connection when it ends: how long, how much, how fast, what held it up, how it ended
    Tcp(Box<tools::tcp::args::Args>),
    /// Show how long packets take from place to place in this kernel, and which are slow
    Latency(Box<tools::latency::args::Args>),
    /// Say what this kernel can do, and what that means for each subcommand
    Features(tools::features::Args),
    /// Be interfaces of Wireshark and tshark, which run it
    Extcap(tools::extcap::Args),
    /// Print the script by which a shell completes netprobe's command line
    Completions(tools::completions::Args),
    /// Write manual pages into a folder
    Man(tools::man::Args),
}

/// Runs the program.
pub fn main() -> ExitCode {
    if tools::completions::answer(Cli::command) {
        return ExitCode::SUCCESS;
    }
    let cli = Cli::parse_from(tools::extcap::called(std::env::args_os().collect()));
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if is_closed_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("netprobe: {e:#}");
            ExitCode::from(match () {
                () if e.is::<UsageError>() => 2,
                () if e.is::<Unexpected>() => 3,
                () => 1,
            })
        }
    }
}

fn run(command: Command) -> Result<()> {
    signals::block()?;
    match command {
        Command::Why(args) => tools::why::run(&args),
        Command::Skb(args) => tools::skb::run(&args),
        Command::Record(args) => tools::record::run(*args),
        Command::Report(args) => tools::report::run(&args),
        Command::Join(args) => tools::join::run(&args),
        Command::Drops(args) => tools::drops::run(&args),
        Command::Icmp(args) => tools::icmp::run(&args),
        Command::Xdpdump(args) => tools::xdpdump::run(&args),
        Command::Xdpchain(args) => tools::xdpchain::run(&args),
        Command::Filter(args) => tools::filter::run(&args),
        Command::Ctl(args) => tools::ctl::run(&args),
        Command::Tcpconnect(args) => tools::tcpconnect::run(&args),
        Command::Tcp(args) => tools::tcp::run(&args),
        Command::Latency(args) => tools::latency::run(&args),
        Command::Features(args) => tools::features::run(&args),
        Command::Extcap(args) => tools::extcap::run(&args),
        Command::Completions(args) => tools::completions::run(&args),
        Command::Man(args) => tools::man::run(&args, Cli::command()),
    }
}

/// The reader of our output went away: an end as any other (`netprobe skb | head`).
fn is_closed_pipe(e: &anyhow::Error) -> bool {
    e.chain().any(|cause| {
        cause
            .downcast_ref::<io::Error>()
            .is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
