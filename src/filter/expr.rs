//! Packet expressions in tcpdump's language: compiled by libpcap, checked, ready to be translated. What cannot be
//! filtered is an error here, before anything is loaded.

use anyhow::{Context, Result, anyhow};

use super::cbpf::{Insn, Invalid, Program, VLAN_TAG};
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
    let insns = compile_insns(expression, packets)?;
    Program::new(insns)
        .map_err(|invalid| anyhow!(invalid))
        .with_context(|| wrong(expression))
}

fn wrong(expression: &str) -> String {
    format!("invalid filter expression '{}'", shortened(expression))
}

fn compile_insns(expression: &str, packets: Packets<'_>) -> Result<Vec<Insn>> {
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

fn compile_here(expression: &str, packets: Packets<'_>) -> Result<Vec<Insn>> {
    let wrong = || wrong(expression);
    let plain = pcap::compile(expression, packets, false).with_context(wrong)?;
    if plain.len() > OPTIMIZE_UP_TO {
        return Err(anyhow!(Invalid::TooLong(plain.len()))).with_context(wrong);
    }
    pcap::compile(expression, packets, true).with_context(wrong)
}

/// An expression for packets that are seen with their link header and without it.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// For packets with an Ethernet header.
    pub l2: Program,
    /// For packets that begin with the IP header; or why there is no such program.
    pub l3: Result<Program, String>,
    /// For packets with an Ethernet header, and their outer VLAN tag beside them. None where the expression has no `vlan`: then `l2` is
    /// right for them.
    pub tagged: Option<Program>,
}

impl Compiled {
    pub fn new(expression: &str) -> Result<Self> {
        let l2 = compile(expression, Linktype::ETHERNET, SNAPLEN)?;
        // `arp` is "expression rejects all packets" here.
        let l3 = compile(expression, Linktype::RAW_IP, SNAPLEN)
            .map_err(|reason| reason.root_cause().to_string());
        let tagged = tag_beside(expression)
            .map(|text| compile_tagged(&text))
            .transpose()?;
        Ok(Compiled { l2, l3, tagged })
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

/// An expression with `vlan` for packets whose outer tag is beside them. tcpdump asks the kernel for that tag at the first `vlan`, and
/// what stands behind it is where it is without a tag; each further `vlan` looks into the packet. So it is in this text, whose load at
/// VLAN_TAG is the tag.
fn tag_beside(expression: &str) -> Option<String> {
    let at = vlan_words(expression).next()?;
    let (before, rest) = (&expression[..at], &expression[at + "vlan".len()..]);
    // Inside Geneve the tag is in the packet.
    if before.contains("geneve") {
        return Some(expression.to_owned());
    }
    Some(match vlan_id(rest) {
        Some((id, behind)) => format!("{before}(ether[{VLAN_TAG}:2] & 0xfff = {id}){behind}"),
        None => format!("{before}(len >= 0){rest}"),
    })
}

/// The number behind `vlan`, perhaps in brackets, and what follows.
fn vlan_id(text: &str) -> Option<(&str, &str)> {
    let open = |c: char| c.is_ascii_whitespace() || c == '(';
    let inner = text.trim_start_matches(open);
    let mut brackets = text[..text.len() - inner.len()].matches('(').count();
    let end = inner.find(|c: char| !c.is_ascii_alphanumeric());
    let (id, mut behind) = inner.split_at(end.unwrap_or(inner.len()));
    if !id.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    while brackets > 0 {
        behind = behind.trim_start().strip_prefix(')')?;
        brackets -= 1;
    }
    Some((id, behind))
}

/// The program of such a text; none matches where libpcap says that all packets are refused.
fn compile_tagged(text: &str) -> Result<Program> {
    let packets = Packets::Of {
        linktype: Linktype::ETHERNET,
        snaplen: SNAPLEN,
        netmask: None,
    };
    match compile_insns(text, packets) {
        Ok(insns) => Ok(Program::new_tagged(insns)?),
        Err(error)
            if error
                .root_cause()
                .to_string()
                .contains("rejects all packets") =>
        {
            Ok(Program::nothing())
        }
        Err(error) => Err(error),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keyword_vlan() {
        for text in ["vlan", "icmp and vlan 5", "not(vlan)", "vlan&&ip"] {
            assert!(asks_vlan(text), "{text}");
        }
        for text in [
            "icmp",
            "host vlan.example.com",
            "host my-vlan",
            "ether proto \\vlan",
            "vlanx",
        ] {
            assert!(!asks_vlan(text), "{text}");
        }
    }

    #[test]
    fn the_first_vlan_asks_for_the_tag() {
        let tag = |id| format!("(ether[{VLAN_TAG}:2] & 0xfff = {id})");
        for (text, want) in [
            ("vlan 5 and icmp", format!("{} and icmp", tag(5))),
            (
                "ip or (vlan (7) && vlan 6)",
                format!("ip or ({} && vlan 6)", tag(7)),
            ),
            ("not vlan and ip", "not (len >= 0) and ip".to_owned()),
            ("vlan", "(len >= 0)".to_owned()),
        ] {
            assert_eq!(tag_beside(text).as_deref(), Some(&*want), "{text}");
            Compiled::new(text).unwrap();
        }
        assert_eq!(tag_beside("icmp"), None);
        // Without a tag in the packet nothing is left of this one.
        assert!(Compiled::new("not vlan").unwrap().tagged.is_some());
        assert!(Compiled::new("vlan 5000").is_err());
    }

    /// The tag of a packet is loaded; nothing else that a socket has beside it.
    #[test]
    fn other_ancillary_loads_are_refused() {
        assert!(Compiled::new("ether[0xfffff02c:2] = 5").is_err());
        assert!(Compiled::new("vlan 5 and ether[0xfffff004:2] = 5").is_err());
    }
}
