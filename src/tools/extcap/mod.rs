//! `netprobe extcap`: netprobe as interfaces of Wireshark and tshark, by Wireshark's extcap protocol (its doc/extcap.adoc).
//!
//! Wireshark runs each program in its extcap folder: first to list interfaces, then to describe an interface's options, at last to
//! capture into a pipe. The capture is that of `skb -w` or `xdpdump -w`, whose own flags are the options.

mod options;

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{ArgMatches, Args as _, Command, FromArgMatches};

use crate::filter::expr;
use crate::kernel::netdev;
use crate::run::log;
use crate::tools::why::stages::Stages;
use crate::tools::{skb, xdpdump};
use crate::usage::usage;

/// The program's name as Wireshark calls it, through the link in its extcap folder.
const LINK: &str = "netprobe-extcap";
const SKB: &str = "netprobe-skb";
const DROPS: &str = "netprobe-drops";
const XDP: &str = "netprobe-xdp-";

/// Be interfaces of Wireshark and tshark: "netprobe: drops", "netprobe: skb", and "netprobe: XDP on NAME" for each network interface.
/// Wireshark runs it, by a link netprobe-extcap in its extcap folder
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub struct Args {
    /// The arguments of the extcap protocol, and with --capture the flags of skb (netprobe-skb, netprobe-drops) or xdpdump
    /// (netprobe-xdp-NAME): --extcap-interfaces; --extcap-interface NAME with --extcap-dlts, --extcap-config, --extcap-capture-filter
    /// EXPRESSION, or --capture --fifo FILE (-: stdout). --lua-dissector prints a Lua script for Wireshark, which makes fields of what
    /// netprobe says of packets
    #[arg(
        value_name = "ARGUMENT",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    words: Vec<OsString>,
}

const ABOUT: &str =
    "What Wireshark asks of netprobe; with --capture, the flags of skb or xdpdump can follow";

/// What Wireshark asks.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Wireshark's extcap protocol")]
struct Protocol {
    /// List the interfaces
    #[arg(long)]
    extcap_interfaces: bool,
    /// The version of the program that asks
    #[arg(long, value_name = "VERSION")]
    extcap_version: Option<String>,
    /// The interface that the other arguments are about
    #[arg(long, value_name = "NAME")]
    extcap_interface: Option<String>,
    /// Print the interface's link type
    #[arg(long, requires = "extcap_interface")]
    extcap_dlts: bool,
    /// Print the interface's options
    #[arg(long, requires = "extcap_interface")]
    extcap_config: bool,
    /// Packets to capture, in tcpdump's language. Without --capture: print what is wrong with it
    #[arg(long, value_name = "EXPRESSION", requires = "extcap_interface")]
    extcap_capture_filter: Option<String>,
    /// Capture into the pipe
    #[arg(long, requires = "extcap_interface", requires = "fifo")]
    capture: bool,
    /// Where the capture goes (-: stdout)
    #[arg(long, value_name = "FILE")]
    fifo: Option<PathBuf>,
    /// Print a Lua script that shows netprobe's comments as fields
    #[arg(long)]
    lua_dissector: bool,
}

/// What an interface captures by.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    Skb,
    Drops,
    Xdp(String),
}

impl Source {
    fn of(interface: &str) -> Result<Self> {
        match interface {
            SKB => Ok(Self::Skb),
            DROPS => Ok(Self::Drops),
            other => match other.strip_prefix(XDP) {
                Some(name) if !name.is_empty() => Ok(Self::Xdp(name.to_owned())),
                _ => Err(usage(format!(
                    "--extcap-interface {other}: there is no such interface; --extcap-interfaces lists them"
                ))),
            },
        }
    }

    /// The flags of its tool.
    fn command(&self) -> Command {
        let command = Command::new("netprobe extcap").disable_help_flag(true);
        match self {
            Self::Skb | Self::Drops => skb::args::Args::augment_args(command),
            Self::Xdp(_) => xdpdump::args::Args::augment_args(command),
        }
    }
}

/// The arguments of the program, with the subcommand where the program is called by the link's name.
pub fn called(mut words: Vec<OsString>) -> Vec<OsString> {
    let name = words.first().map(PathBuf::from);
    if name.is_some_and(|name| name.file_stem().is_some_and(|stem| stem == LINK)) {
        words.insert(1, "extcap".into());
    }
    words
}

pub fn run(args: &Args) -> Result<()> {
    let protocol = Protocol::augment_args(Command::new("netprobe extcap")).about(ABOUT);
    let words = || std::iter::once(OsString::from("netprobe extcap")).chain(args.words.clone());
    // Which tool's flags can stand here is known by the interface alone.
    let source = interface(&args.words)
        .map(|name| Source::of(&name))
        .transpose()?;
    let command = match &source {
        Some(source) => Protocol::augment_args(source.command()),
        None => protocol,
    };
    let matches = command.get_matches_from(words());
    let asked = Protocol::from_arg_matches(&matches)?;
    let mut out = Vec::new();
    match source {
        Some(source) if asked.capture => return capture(&source, &asked, &matches),
        Some(source) if asked.extcap_config => options::print(&source, &mut out)?,
        Some(_) if asked.extcap_dlts => {
            writeln!(out, "dlt {{number=1}}{{name=EN10MB}}{{display=Ethernet}}")?;
        }
        Some(_) => {
            if let Some(Err(e)) = asked
                .extcap_capture_filter
                .as_deref()
                .map(expr::Compiled::new)
            {
                writeln!(out, "{e:#}")?;
            }
        }
        None if asked.extcap_interfaces => interfaces(&mut out)?,
        None if asked.lua_dissector => dissector(&mut out)?,
        None => {
            return Err(usage(
                "extcap: Wireshark runs it; try: netprobe extcap --extcap-interfaces",
            ));
        }
    }
    Ok(io::stdout().write_all(&out)?)
}

/// The value of --extcap-interface.
fn interface(words: &[OsString]) -> Option<String> {
    const FLAG: &str = "--extcap-interface";
    let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
    words.iter().enumerate().find_map(|(at, word)| {
        let value = match word.strip_prefix(FLAG)? {
            "" => words.get(at + 1)?,
            rest => rest.strip_prefix('=')?,
        };
        Some(value.to_owned())
    })
}

fn interfaces(out: &mut Vec<u8>) -> Result<()> {
    let version = env!("CARGO_PKG_VERSION");
    writeln!(
        out,
        "extcap {{version={version}}}{{display=netprobe}}\n\
         interface {{value={DROPS}}}{{display=netprobe: drops}}\n\
         interface {{value={SKB}}}{{display=netprobe: skb}}"
    )?;
    for (_, name) in netdev::all()? {
        // The protocol has no way to write other names.
        let plain = |c: char| c.is_ascii_alphanumeric() || "_.:-".contains(c);
        if name.chars().all(plain) {
            writeln!(
                out,
                "interface {{value={XDP}{name}}}{{display=netprobe: XDP on {name}}}"
            )?;
        }
    }
    Ok(())
}

/// Runs the interface's tool until the signal or the closed pipe that ends the capture.
fn capture(source: &Source, asked: &Protocol, matches: &ArgMatches) -> Result<()> {
    options::refuse_others(source, matches)?;
    // Wireshark shows whatever is on stderr as an error.
    log::quiet();
    let expression = || asked.extcap_capture_filter.clone().into_iter();
    match source {
        Source::Skb | Source::Drops => {
            let mut args = skb::args::Args::from_arg_matches(matches)?;
            args.drops = *source == Source::Drops;
            args.expression.expression.extend(expression());
            args.write = asked.fifo.clone();
            // The lines that skb prints beside its capture.
            args.output.output_file = Some("/dev/null".into());
            skb::run(&args)
        }
        Source::Xdp(name) => {
            let mut args = xdpdump::args::Args::from_arg_matches(matches)?;
            args.iface = vec![name.clone()];
            args.expression.extend(expression());
            args.write = asked.fifo.clone();
            xdpdump::run(&args)
        }
    }
}

/// The Lua script, with the stages of `netprobe why`.
fn dissector(out: &mut Vec<u8>) -> Result<()> {
    let mut stages: Vec<_> = Stages::builtin().names().collect();
    stages.sort_unstable();
    let rows = stages.iter();
    let rows: Vec<_> = rows.map(|(f, s)| format!("\t[{f:?}] = {s:?},")).collect();
    let script = include_str!("netprobe.lua").replace("--STAGES--", &rows.join("\n"));
    out.write_all(script.as_bytes()).context("out of memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interface_stands_anywhere() {
        let of = |words: &[&str]| interface(&words.iter().map(OsString::from).collect::<Vec<_>>());
        assert_eq!(
            of(&["--pid", "3", "--extcap-interface", "x"]).as_deref(),
            Some("x")
        );
        assert_eq!(
            of(&["--extcap-interface=x", "--capture"]).as_deref(),
            Some("x")
        );
        assert_eq!(of(&["--extcap-interfaces", "--extcap-version=4.0"]), None);
        assert_eq!(of(&["--extcap-interface"]), None);
    }

    #[test]
    fn the_link_stands_for_the_subcommand() {
        let words = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
        let link = called(words(&["/x/extcap/netprobe-extcap", "--extcap-interfaces"]));
        assert_eq!(link[1], "extcap");
        assert_eq!(
            called(words(&["netprobe", "skb"])),
            words(&["netprobe", "skb"])
        );
    }

    /// Each comment that skb writes, as tshark's fields.
    #[test]
    #[cfg_attr(not(has_tshark), ignore = "needs tshark")]
    fn tshark_has_fields_by_the_lua_script() {
        use crate::capture::linktype::Linktype;
        use crate::capture::pcapng::{Format, Interface, Packet, Section, Writer};
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let mut script = Vec::new();
        dissector(&mut script).unwrap();
        std::fs::write(path("netprobe.lua"), script).unwrap();
        let out = std::fs::File::create(path("x.pcapng")).unwrap();
        let section = Section::default();
        let mut file = Writer::new(out, Format::Pcapng, &section, 64, Linktype::ETHERNET).unwrap();
        file.add_interface(&Interface::new("v0", Linktype::ETHERNET))
            .unwrap();
        for comment in [
            "nf_hook_slow skb 0xffff888004a1c200 cpu 3 ping:77 netns 4026531840 mark 0x10",
            "kfree_skb_reason(NO_SOCKET) skb 0x1 cpu 0 a b:7:8 packet 3 owner nc:9 netns 1 mark 0x0 (made-up Ethernet header)",
            "NETFILTER_DROP nft_do_chain+0x4e [nf_tables] by inet filter output handle 7 skb 0x2 cpu 0 x:1",
            "a comment of somebody else",
        ] {
            let packet = Packet {
                data: &[0; 60],
                len: 60,
                comment: Some(comment),
                ..Packet::default()
            };
            file.packet(&packet).unwrap();
        }
        file.flush().unwrap();
        drop(file);
        let fields = [
            "function", "reason", "stage", "detail", "skb", "cpu", "process", "pid", "packet",
            "owner", "netns", "mark", "made_up",
        ];
        let mut tshark = std::process::Command::new("tshark");
        let script = format!("lua_script:{}", path("netprobe.lua").display());
        tshark.args(["-X", &script, "-r"]).arg(path("x.pcapng"));
        tshark.args(["-T", "fields", "-E", "separator=;"]);
        tshark.args(
            fields
                .iter()
                .flat_map(|f| ["-e".to_owned(), format!("netprobe.{f}")]),
        );
        let done = tshark.output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr);
        let rows = String::from_utf8_lossy(&done.stdout);
        let rows: Vec<&str> = rows.lines().collect();
        let wanted = [
            "nf_hook_slow;;netfilter;;0xffff888004a1c200;3;ping;77;;;4026531840;0x00000010;",
            "kfree_skb_reason;NO_SOCKET;;;0x0000000000000001;0;a b:7;8;3;nc:9;1;0x00000000;1",
            "nft_do_chain;NETFILTER_DROP;;[nf_tables] by inet filter output handle 7;0x0000000000000002;0;x;1;;;;;",
            ";;;;;;;;;;;;",
        ];
        assert_eq!(rows, wanted, "{said}");
    }

    #[test]
    fn flags_of_the_protocol_are_no_flags_of_the_tools() {
        for source in [Source::Skb, Source::Drops, Source::Xdp("x".into())] {
            Protocol::augment_args(source.command()).debug_assert();
        }
    }
}
