//! `netprobe filter`: what becomes of a packet expression, shown, and tried on the packets of a file in this kernel;
//! no network is touched.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::ValueEnum;

use crate::capture::savefile::{Reader, Writer};
use crate::filter::cbpf::Program;
use crate::filter::ebpf::{self, FarLoad, LOAD_CALL, LoadMode};
use crate::filter::expr::{self, Compiled, SNAPLEN};
use crate::filter::pcap::{self, Linktype, Packets};
use crate::filter::run::Runner;
use crate::filter::{self};
use crate::insn::asm::Insn;
use crate::usage::usage;

/// What kind of program the filter is translated for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Target {
    /// tracing programs (skb): a copied block of headers, then a function for what lies behind it
    Skb,
    /// XDP programs: the packet itself, then bpf_xdp_load_bytes
    Xdp,
}

/// Show what a packet expression is compiled to, or try it on a file's packets in this kernel.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The packets, in tcpdump's language (pcap-filter(7)); the words are joined; none: every packet
    #[arg(value_name = "EXPRESSION")]
    expression: Vec<String>,

    /// Print the translated eBPF instructions, not the cBPF ones
    #[arg(long, conflicts_with = "read")]
    ebpf: bool,

    /// For which kind of program --ebpf translates
    #[arg(long, value_enum, default_value_t = Target::Skb, requires = "ebpf")]
    program: Target,

    /// Link type of the packets: EN10MB, RAW, … (tcpdump -L)
    #[arg(
        long,
        value_name = "NAME",
        default_value = "EN10MB",
        conflicts_with = "read"
    )]
    linktype: String,

    /// Run the translated filter in the kernel over the packets of this pcap or pcapng file (`-`: stdin), and say how many match
    #[arg(long, short, value_name = "FILE")]
    read: Option<PathBuf>,

    /// Write the packets that match (pcap; `-`: stdout)
    #[arg(long, short, value_name = "FILE", requires = "read")]
    write: Option<PathBuf>,
}

pub fn run(args: &Args) -> Result<()> {
    let text = args.expression.join(" ");
    match &args.read {
        Some(file) => match_file(args, file, &text),
        None => show(args, &text),
    }
}

fn compile(text: &str, linktype: Linktype) -> Result<Program> {
    expr::compile(text, linktype, SNAPLEN).map_err(|e| usage(format!("{e:#}")))
}

fn show(args: &Args, text: &str) -> Result<()> {
    let linktype = Linktype::from_name(&args.linktype).ok_or_else(|| {
        usage(format!(
            "--linktype {}: unknown; EN10MB and RAW are the usual ones",
            args.linktype
        ))
    })?;
    let program = compile(text, linktype)?;
    if linktype == Linktype::ETHERNET {
        if let Some(note) = Compiled::new(text)?.note() {
            eprintln!("netprobe: {note}");
        }
    }
    let mut out = io::stdout().lock();
    if args.ebpf {
        let mode = match args.program {
            Target::Skb => LoadMode::ByBlock {
                size: filter::BLOCK,
                far: FarLoad::Subprogram,
            },
            Target::Xdp => LoadMode::ByPacket {
                far: FarLoad::XdpLoad,
            },
        };
        for (at, insn) in ebpf::translate(&program, mode)?.iter().enumerate() {
            writeln!(out, "{at:4}: {}", text_of(insn))?;
        }
    } else {
        for (at, insn) in program.insns().iter().enumerate() {
            writeln!(out, "{}", pcap::image(*insn, at))?;
        }
    }
    Ok(out.flush()?)
}

fn text_of(insn: &Insn) -> String {
    if insn.is_subprogram_call() && insn.imm == LOAD_CALL {
        return "call np_filter_load".to_owned();
    }
    insn.to_string()
}

fn match_file(args: &Args, file: &std::path::Path, text: &str) -> Result<()> {
    let name = file.display();
    let mut reader = Reader::open(file).with_context(|| format!("failed to read {name}"))?;
    let linktype = reader.linktype();
    let program =
        expr::compile_for(text, Packets::in_file(&reader)).map_err(|e| usage(format!("{e:#}")))?;
    let mut runner = Runner::traced(&program, filter::BLOCK)
        .context("the filter could not be loaded into this kernel (it needs root)")?;
    let mut writer = match &args.write {
        Some(path) => Some(
            Writer::for_packets_of(&reader, path)
                .with_context(|| format!("failed to write {}", path.display()))?,
        ),
        None => None,
    };
    let (mut matched, mut read) = (0u64, 0u64);
    while let Some(packet) = reader
        .next_packet()
        .with_context(|| format!("failed to read {name} after {read} packets"))?
    {
        read += 1;
        if runner.run(&packet.bytes, packet.wire_len)? != 0 {
            matched += 1;
            if let Some(writer) = &mut writer {
                writer.write(&packet);
            }
        }
    }
    if let Some(writer) = writer {
        writer
            .finish()
            .context("failed to write the packets that match")?;
    }
    let summary = format!("{matched} of {read} packets match ({})", linktype.name());
    // The standard output may be the capture itself.
    if args.write.as_deref() == Some(std::path::Path::new("-")) {
        eprintln!("netprobe: {summary}");
        return Ok(());
    }
    let mut out = io::stdout().lock();
    writeln!(out, "{summary}")?;
    Ok(out.flush()?)
}
