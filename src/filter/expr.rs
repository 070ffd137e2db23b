//! Packet expressions in tcpdump's language: compiled by libpcap, checked, ready to be translated. What cannot be
//! filtered is an error here, before anything is loaded.

use anyhow::{Context, Result, anyhow};

use super::cbpf::{Invalid, Program};
use super::pcap::{self, Linktype, Packets};

/// As much of a packet as a filter may accept; large, so that no length limits a match.
pub const SNAPLEN: u32 = 262_144;

/// libpcap's optimizer needs a time that grows with the square of a program's length (some 10 s for this one, 500
/// hosts, where it leaves 2700 instructions): longer ones are refused, as what is left would be too long too.
const OPTIMIZE_UP_TO: usize = 16_000;

/// libpcap's compiler calls itself once for each part of an expression: long ones need more stack than a thread has.
const LONG_TEXT: usize = 4096;
const LARGE_STACK: usize = 512 << 20;

/// One expression for packets of one link type.
pub fn compile(expression: &str, linktype: Linktype, snaplen: u32) -> Result<Program> {
    let packets = Packets::Of {
        linktype,
        snaplen,
        netmask: None,
    };
    compile_for(expression, packets)
}

/// One expression for packets of one kind.
pub fn compile_for(expression: &str, packets: Packets<'_>) -> Result<Program> {
    if expression.len() <= LONG_TEXT {
        return compile_here(expression, packets);
    }
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .stack_size(LARGE_STACK)
            .spawn_scoped(scope, || compile_here(expression, packets))
            .context("failed to start a thread for libpcap")?
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn compile_here(expression: &str, packets: Packets<'_>) -> Result<Program> {
    let wrong = || format!("invalid filter expression '{}'", shortened(expression));
    let plain = pcap::compile(expression, packets, false).with_context(wrong)?;
    if plain.len() > OPTIMIZE_UP_TO {
        return Err(anyhow!(Invalid::TooLong(plain.len()))).with_context(wrong);
    }
    let insns = pcap::compile(expression, packets, true).with_context(wrong)?;
    Program::new(insns)
        .map_err(|invalid| anyhow!(invalid))
        .with_context(wrong)
}

/// An expression for packets that are seen with their link header and without it.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// For packets with an Ethernet header.
    pub l2: Program,
    /// For packets that begin with the IP header; or why there is no such program.
    pub l3: Result<Program, String>,
}

impl Compiled {
    pub fn new(expression: &str) -> Result<Self> {
        let l2 = compile(expression, Linktype::ETHERNET, SNAPLEN)?;
        // `arp` is "expression rejects all packets" here.
        let l3 = compile(expression, Linktype::RAW_IP, SNAPLEN)
            .map_err(|reason| reason.root_cause().to_string());
        Ok(Compiled { l2, l3 })
    }

    /// What to tell the user: the expression says nothing about packets without a link header, and so matches none
    /// of them.
    pub fn note(&self) -> Option<String> {
        let why = self.l3.as_ref().err()?;
        Some(format!(
            "the expression needs the link header ({why}): packets are not matched where the kernel handles them \
             without one (between the IP layer and the device, say)"
        ))
    }
}

/// Does an expression have the keyword `vlan`? Words are split as libpcap's scanner does; `\\vlan` is a name.
pub fn asks_vlan(expression: &str) -> bool {
    vlan_words(expression).next().is_some()
}

/// Where each keyword `vlan` begins.
fn vlan_words(expression: &str) -> impl Iterator<Item = usize> + '_ {
    let is_word =
        |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.' | b':' | b'\\');
    let bytes = expression.as_bytes();
    expression
        .match_indices("vlan")
        .filter_map(move |(at, word)| {
            let before = at.checked_sub(1).and_then(|at| bytes.get(at));
            let after = bytes.get(at + word.len());
            let alone = |c: Option<&u8>| c.is_none_or(|c| !is_word(*c));
            (alone(before) && alone(after)).then_some(at)
        })
}

/// The words of a command line, joined to one expression; none where there are no words.
pub fn join(words: &[String]) -> Option<String> {
    let text = words.join(" ");
    (!text.trim().is_empty()).then_some(text)
}

/// The beginning of an expression, enough to recognize it in an error.
fn shortened(expression: &str) -> String {
    const SHOWN: usize = 200;
    match expression.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &expression[..end]),
        None => expression.to_owned(),
    }
}
