//! `netprobe man`: manual pages, made of the help texts.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Command;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};

/// Write manual pages, netprobe.1 and one for each subcommand, into a folder
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The folder; it is made where it is missing
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

/// A command line of a subcommand's page, and what it does.
pub const EXAMPLES: [(&str, &str, &str); 26] = [
    (
        "why",
        "netprobe why -- curl -m 2 http://10.77.1.2/",
        "Run curl, and say what became of its packets.",
    ),
    (
        "why",
        "netprobe why --only lost 'tcp port 443'",
        "Say which packets of HTTPS are lost, where, and why.",
    ),
    (
        "skb",
        "netprobe skb 'host 10.0.0.7 and tcp port 80'",
        "Print each function of the kernel that handles these packets.",
    ),
    (
        "skb",
        "netprobe skb --drops --output-nft --output-owner",
        "Print each dropped packet with its reason, the firewall rule, and the process that owns its socket.",
    ),
    (
        "record",
        "netprobe record -o trace.pcapng 'host 10.0.0.7'",
        "Record what `skb` would print of these packets.",
    ),
    (
        "record",
        "netprobe record -o fault.pcapng --flight 30s --trigger drop:NEIGH_FAILED --trigger retransmit:3",
        "Write a file only when one of these happens, with the 30 seconds before it.",
    ),
    (
        "report",
        "netprobe report trace.pcapng",
        "Print what was recorded, as the live run would have.",
    ),
    (
        "report",
        "netprobe report trace.pcapng --stats",
        "Count what was recorded: events by function, drops by kind.",
    ),
    (
        "extcap",
        "netprobe extcap --extcap-interface netprobe-drops --capture --fifo - | tshark -r -",
        "Show drops in tshark; by ssh, those of another host.",
    ),
    (
        "join",
        "netprobe join web.pcapng database.pcapng",
        "Follow packets from one recorded host to the other: which were lost between them, and how long the others took.",
    ),
    (
        "tcp",
        "netprobe tcp --only resets,retransmits -P 443",
        "Show connections to or of port 443 that were reset, or had to send again, when they end.",
    ),
    (
        "latency",
        "netprobe latency -i 5 --by device 'tcp port 443'",
        "Show how long the packets of port 443 take in each stage, by device, every 5 seconds.",
    ),
    (
        "latency",
        "netprobe latency --min-us 10000 --culprit",
        "Show each packet that took 10 ms or more, with its stages and what made it slow.",
    ),
    (
        "latency",
        "netprobe latency --requests --filter-dst-port 6379",
        "Show how long the server of port 6379 takes to answer, and the network.",
    ),
    (
        "drops",
        "netprobe drops",
        "Show what this machine loses, every 10 seconds.",
    ),
    (
        "drops",
        "netprobe drops --once -i 60 --output-json",
        "Count for a minute, and print the table as JSON.",
    ),
    (
        "icmp",
        "netprobe icmp --min-us 500",
        "Show echo requests that took half a millisecond or more, with their stages.",
    ),
    (
        "xdpdump",
        "netprobe xdpdump --iface eth0 -w packets.pcapng",
        "Write packets that arrive at XDP into a file.",
    ),
    (
        "xdpchain",
        "netprobe xdpchain list",
        "List the XDP programs of each interface, in the order in which they run.",
    ),
    (
        "filter",
        "netprobe filter 'tcp port 80'",
        "Show what the expression compiles to.",
    ),
    (
        "filter",
        "netprobe filter -r packets.pcap 'tcp port 80'",
        "Show which packets of a file match.",
    ),
    ("ctl", "netprobe ctl list", "List the runs in progress."),
    (
        "tcpconnect",
        "netprobe tcpconnect -P 80,443 --outcome",
        "Show connects to these ports and what became of them.",
    ),
    (
        "features",
        "netprobe features",
        "Say what this kernel can do.",
    ),
    (
        "completions",
        "netprobe completions bash",
        "Print the completion script for bash.",
    ),
    (
        "man",
        "netprobe man /usr/local/share/man/man1",
        "Write the manual pages where man looks for them.",
    ),
];

pub fn run(args: &Args, command: Command) -> Result<()> {
    fs::create_dir_all(&args.dir).with_context(|| args.dir.display().to_string())?;
    let mut command = command.disable_help_subcommand(true);
    command.build();
    page(&args.dir, &command, "netprobe", None)?;
    for sub in command.get_subcommands() {
        let name = sub.get_name();
        page(&args.dir, sub, &format!("netprobe-{name}"), Some(name))?;
        for inner in sub.get_subcommands() {
            let title = format!("netprobe-{name}-{}", inner.get_name());
            page(&args.dir, inner, &title, None)?;
        }
    }
    Ok(())
}

/// One page. `examples`: of this subcommand.
fn page(dir: &Path, command: &Command, title: &str, examples: Option<&str>) -> Result<()> {
    let man = Man::new(command.clone().display_name(title)).title(title);
    let mut text = Vec::new();
    man.render(&mut text)?;
    let mut roff = Roff::new();
    let own = EXAMPLES.iter().filter(|(of, ..)| Some(*of) == examples);
    for (i, (_, line, meaning)) in own.enumerate() {
        if i == 0 {
            roff.control("SH", ["EXAMPLES"]);
        }
        roff.control("TP", []);
        roff.text([roman(*line)]);
        roff.text([roman(*meaning)]);
    }
    roff.to_writer(&mut text)?;
    let path = dir.join(format!("{title}.1"));
    fs::write(&path, text).with_context(|| path.display().to_string())
}
