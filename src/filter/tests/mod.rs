//! The translation against independent implementations: libpcap's interpreter, the kernel's own socket filter, the
//! plain interpreter of `cbpf`. Programs run in this kernel by BPF_PROG_TEST_RUN; without the privilege to load them
//! the tests are ignored.

mod cases;
mod differential;
mod objects;
mod packets;

use super::cbpf::Program;
use super::pcap;
use super::run::Runner;

/// Has this kernel packets in several buffers (5.18)?
fn has_frags() -> bool {
    use std::sync::OnceLock;
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| Runner::xdp(&Program::nothing(), true).is_ok())
}

/// Has this kernel typed loads (bpf_rdonly_cast, 6.2)?
fn can_cast() -> bool {
    use std::sync::OnceLock;
    static CAN: OnceLock<bool> = OnceLock::new();
    *CAN.get_or_init(|| Runner::typed(&Program::nothing()).is_ok())
}

/// The smallest and largest packet that an XDP test run takes in one buffer.
const XDP_LENGTHS: std::ops::RangeInclusive<usize> = 14..=3000;
/// The largest in several.
const XDP_FRAGS_MAX: usize = 60_000;
/// tc's test run wants a whole IP header behind the Ethernet header.
const TC_LENGTHS: std::ops::RangeInclusive<usize> = 54..=2000;

/// A program, translated in every load mode and loaded.
struct Modes {
    program: Program,
    runners: Vec<(&'static str, Runner)>,
    /// for both kinds of packets
    copied: Option<Runner>,
}

impl Modes {
    fn load(program: &Program) -> Self {
        let mut runners = vec![
            ("probe", Runner::traced(program, 0)),
            ("block of 24", Runner::traced(program, 24)),
            ("block of 96", Runner::traced(program, 96)),
            ("XDP", Runner::xdp(program, false)),
            ("tc", Runner::tc(program)),
        ];
        // Programs that ask for the length are never translated so.
        if can_cast() && !program.ops().any(|op| op.asks_length()) {
            runners.push(("typed", Runner::typed(program)));
        }
        if has_frags() {
            runners.push(("XDP with frags", Runner::xdp(program, true)));
        }
        let runners = runners
            .into_iter()
            .map(|(name, runner)| match runner {
                Ok(runner) => (name, runner),
                Err(error) => panic!("{name}: {error:#}\n{}", listing(program)),
            })
            .collect();
        let copied = Runner::copied(program, program)
            .unwrap_or_else(|error| panic!("copied: {error:#}\n{}", listing(program)));
        Modes {
            program: program.clone(),
            runners,
            copied,
        }
    }

    /// Every mode returns for the packet what the interpreters do; how many were compared.
    fn check(&mut self, packet: &[u8]) -> u64 {
        let mut compared = 0;
        for (name, runner) in &mut self.runners {
            let len = packet.len();
            let runs = match *name {
                "XDP" => XDP_LENGTHS.contains(&len),
                "XDP with frags" => (14..=XDP_FRAGS_MAX).contains(&len),
                "tc" => TC_LENGTHS.contains(&len),
                _ => true,
            };
            if !runs {
                continue;
            }
            // A captured packet may have been cut.
            let wire_len = if name.starts_with("XDP") || *name == "tc" {
                len
            } else {
                len + 7
            } as u32;
            let want = expected(&self.program, packet, wire_len);
            let mut got = runner.run(packet, wire_len).unwrap();
            // A match without a link header is known by its number.
            if *name == "typed" && len % 2 == 0 && got == 3 && want != 0 {
                got = want;
            }
            assert_eq!(
                got,
                want,
                "{name}: the translation returns {got}, the interpreter {want}\n{}\npacket of {len} bytes: {packet:02x?}",
                listing(&self.program)
            );
            compared += 1;
        }
        compared + self.check_copied(packet)
    }

    /// What is known by a copy is so.
    fn check_copied(&mut self, packet: &[u8]) -> u64 {
        let Some(runner) = &mut self.copied else {
            return 0;
        };
        let wire_len = packet.len() as u32;
        let known = runner.run(packet, wire_len).unwrap();
        let yes = if packet.len() % 2 == 1 { 1 } else { 3 };
        let value = expected(&self.program, packet, wire_len);
        let right = if value == 0 { 0 } else { yes };
        assert!(
            known == 2 || known == right,
            "copied: {known}, the interpreter {value}\n{}\npacket of {wire_len} bytes: {packet:02x?}",
            listing(&self.program)
        );
        u64::from(known != 2)
    }
}

/// What libpcap's interpreter returns, by which `Program::run` is tested on the way; where the kernel's semantics
/// differ from libpcap's (X + k that wraps, shifts by X of 32 and more), what `Program::run` returns.
fn expected(program: &Program, packet: &[u8], wire_len: u32) -> u32 {
    let (value, only_kernel) = program.run_noting(packet, wire_len);
    if !only_kernel {
        assert_eq!(
            pcap::interpret(program, packet, wire_len),
            value,
            "the two interpreters differ\n{}\n{packet:02x?}",
            listing(program)
        );
    }
    value
}

fn listing(program: &Program) -> String {
    let lines = program.insns().iter().enumerate();
    lines
        .map(|(at, insn)| pcap::image(*insn, at) + "\n")
        .collect()
}

/// Checks a program over packets in every mode.
fn check(program: &Program, packets: &[Vec<u8>]) -> u64 {
    let mut modes = Modes::load(program);
    packets.iter().map(|packet| modes.check(packet)).sum()
}
