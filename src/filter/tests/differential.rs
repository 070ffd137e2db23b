//! Random valid programs and random expressions over real and changed packets: translation against interpreters.
//! A fixed part with a fixed seed by default; `make fuzz-filter` goes on (FUZZ_FILTER_PAIRS, FUZZ_FILTER_SEED).

use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;

use super::cases::EXPRESSIONS;
use super::packets::{self, Random, mutate};
use super::{Modes, expected, listing};
use crate::filter::cbpf::*;
use crate::filter::ebpf::{FarLoad, LoadMode, translate};
use crate::filter::expr;
use crate::filter::pcap::Linktype;
use crate::filter::run::socket_filter;

/// Pairs of program and packet (in each load mode) that `cargo test` compares.
const PAIRS: u64 = 60_000;
const SEED: u64 = 20_261_121;

fn setting(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{name}={text}: not a number")),
        Err(_) => default,
    }
}

/// A number that is interesting as an offset, a constant or an operand.
fn number(random: &mut Random) -> u32 {
    match random.below(6) {
        0 => random.below(8),
        1 => random.below(100),
        2 => random.pick(&[
            0x0800, 0x86dd, 0x0806, 0x8100, 80, 53, 17, 6, 1, 0x45, 0xff, 0xffff,
        ]),
        3 => random.pick(&[0, 1, 0x7fff_ffff, 0x8000_0000, 0xffff_fffe, 0xffff_ffff]),
        4 => 1 << random.below(32),
        _ => random.next() as u32,
    }
}

fn offset(random: &mut Random) -> u32 {
    match random.below(40) {
        0 => number(random) & 0xffdf_ffff,
        1..=4 => random.below(1600),
        5..=9 => random.pick(&[
            10, 12, 14, 20, 22, 23, 56, 57, 58, 59, 60, 61, 92, 93, 94, 95, 96, 97,
        ]),
        _ => random.below(80),
    }
}

/// A program that passes the checks.
fn random_program(random: &mut Random) -> Program {
    loop {
        let longest = random.pick(&[40, 40, 40, 40, 40, 40, 40, 300]);
        let len = 2 + random.below(longest);
        // Words written at the start, so that later reads are valid.
        let words = random.below(4);
        let mut insns: Vec<Insn> = (0..words)
            .map(|word| Insn::stmt(if random.below(2) == 0 { ST } else { STX }, word * 5))
            .collect();
        while insns.len() < len as usize {
            let left = len - insns.len() as u32;
            insns.push(random_insn(random, words, left));
        }
        insns.push(Insn::stmt(
            random.pick(&[RET_K, RET_A, RET_A]),
            number(random),
        ));
        if let Ok(program) = Program::new(insns) {
            return program;
        }
    }
}

fn random_insn(random: &mut Random, words: u32, left: u32) -> Insn {
    let source = random.pick(&[0, SRC_X]);
    match random.below(20) {
        0..=5 => Insn::stmt(random.pick(&[LD_B_ABS, LD_H_ABS, LD_W_ABS]), offset(random)),
        6..=7 => {
            // k negative now and then: X + k wraps.
            let k = if random.below(4) == 0 {
                random.below(64).wrapping_neg()
            } else {
                offset(random)
            };
            Insn::stmt(random.pick(&[LD_B_IND, LD_H_IND, LD_W_IND]), k)
        }
        8 => Insn::stmt(LDX_MSH, offset(random)),
        9 => Insn::stmt(random.pick(&[LD_IMM, LDX_IMM, LDX_IMM]), number(random)),
        10 => Insn::stmt(random.pick(&[LD_LEN, LDX_LEN, TAX, TXA, TAX]), 0),
        11 if words > 0 => Insn::stmt(
            random.pick(&[LD_MEM, LDX_MEM, ST, STX]),
            random.below(words) * 5,
        ),
        12..=14 => {
            let op = random.pick(&[
                ALU_ADD, ALU_SUB, ALU_MUL, ALU_DIV, ALU_OR, ALU_AND, ALU_LSH, ALU_RSH, ALU_MOD,
                ALU_XOR,
            ]);
            let k = match op {
                ALU_LSH | ALU_RSH => random.below(32),
                _ => number(random).max(1),
            };
            Insn::stmt(CLASS_ALU | op | source, k)
        }
        15 => Insn::stmt(CLASS_ALU | ALU_NEG, 0),
        16 if random.below(4) == 0 => Insn::stmt(random.pick(&[RET_K, RET_A]), number(random)),
        17 => Insn::stmt(JA, random.below(left.min(20) + 1)),
        _ => {
            let reach = left.min(200) + 1;
            let far = |random: &mut Random| {
                let reach = random.pick(&[reach, reach.min(5), reach.min(5)]);
                random.below(reach) as u8
            };
            let (jt, jf) = (far(random), far(random));
            Insn::new(
                CLASS_JMP | random.pick(&[JMP_EQ, JMP_GT, JMP_GE, JMP_SET]) | source,
                jt,
                jf,
                number(random),
            )
        }
    }
}

/// Whatever the instructions: they are refused, or translated; nothing panics.
#[test]
fn any_instructions_are_refused_or_translated() {
    let mut random = Random(SEED);
    let codes: Vec<u16> = (0..=0xb7).chain([0x100, 0x8000, 0xffff]).collect();
    let mut translated = 0;
    for _ in 0..20_000 {
        let insns = (0..1 + random.below(6)).map(|_| {
            let (jt, jf) = (random.below(6) as u8, random.next() as u8 % 6);
            Insn::new(random.pick(&codes), jt, jf, number(&mut random))
        });
        let insns: Vec<Insn> = insns.chain([Insn::stmt(RET_K, 1)]).collect();
        let Ok(program) = Program::new(insns) else {
            continue;
        };
        for mode in [
            LoadMode::PROBE,
            LoadMode::ByBlock {
                size: 96,
                far: FarLoad::Subprogram,
            },
            LoadMode::ByPacket {
                far: FarLoad::XdpLoad,
            },
        ] {
            translate(&program, mode).unwrap();
        }
        translated += 1;
    }
    assert!(translated > 200, "only {translated} were valid");
}

/// Some of the named expressions, joined.
fn random_expression(random: &mut Random) -> String {
    let mut text = String::new();
    for i in 0..1 + random.below(4) {
        if i > 0 {
            text += random.pick(&[" and ", " or ", " or not ", " and not "]);
        }
        text += &format!("({})", random.pick(EXPRESSIONS));
    }
    text
}

/// Programs until `pairs` (program, packet, mode) were compared.
fn compare(
    seed: u64,
    pairs: u64,
    mut next: impl FnMut(&mut Random) -> Option<Program>,
) -> (u64, u64) {
    let mut random = Random(seed);
    let corpus = packets::all();
    let (mut compared, mut programs) = (0, 0);
    while compared < pairs {
        let Some(program) = next(&mut random) else {
            continue;
        };
        let mut modes = Modes::load(&program);
        programs += 1;
        for _ in 0..60 {
            let packet = random.pick(&corpus);
            compared += modes.check(&mutate(&mut random, &packet));
        }
    }
    (compared, programs)
}

#[test]
#[cfg_attr(not(is_root), ignore = "loading BPF programs needs root")]
fn random_programs() {
    let (pairs, seed) = (
        setting("FUZZ_FILTER_PAIRS", PAIRS),
        setting("FUZZ_FILTER_SEED", SEED),
    );
    let (compared, programs) = compare(seed, pairs, |random| Some(random_program(random)));
    println!(
        "seed {seed}: {compared} pairs of {programs} random programs and packets, no difference"
    );
}

#[test]
#[cfg_attr(not(is_root), ignore = "loading BPF programs needs root")]
fn random_expressions() {
    let (pairs, seed) = (
        setting("FUZZ_FILTER_PAIRS", PAIRS),
        setting("FUZZ_FILTER_SEED", SEED),
    );
    let (compared, programs) = compare(seed, pairs, |random| {
        let linktype = random.pick(&[Linktype::ETHERNET, Linktype::ETHERNET, Linktype::RAW_IP]);
        expr::compile(&random_expression(random), linktype, expr::SNAPLEN).ok()
    });
    println!("seed {seed}: {compared} pairs of {programs} expressions and packets, no difference");
}

/// The kernel's own socket filter, on a pair of Unix sockets: it decides how much of a datagram arrives.
struct SocketFilter {
    from: UnixDatagram,
    to: UnixDatagram,
}

impl SocketFilter {
    fn new(program: &Program) -> std::io::Result<Self> {
        let (from, to) = UnixDatagram::pair()?;
        to.set_nonblocking(true)?;
        socket_filter(to.as_fd(), program)?;
        Ok(SocketFilter { from, to })
    }

    /// How many bytes the filter lets through; none where it refuses the packet.
    fn run(&self, packet: &[u8]) -> usize {
        self.from.send(packet).unwrap();
        let mut buffer = vec![0; packet.len() + 1];
        match self.to.recv(&mut buffer) {
            Ok(len) => len,
            // Delivery is part of sending: what is not there now was refused.
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => 0,
            Err(error) => panic!("{error}"),
        }
    }
}

/// The plain interpreter is what decides where libpcap and the kernel differ: it must be as the kernel is.
#[test]
fn the_interpreter_is_as_the_kernels_socket_filter() {
    let mut random = Random(setting("FUZZ_FILTER_SEED", SEED));
    let corpus = packets::all();
    let mut only_kernel = 0;
    for _ in 0..setting("FUZZ_FILTER_PAIRS", PAIRS) / 100 {
        let program = random_program(&mut random);
        let filter = SocketFilter::new(&program).unwrap();
        for _ in 0..30 {
            let packet = random.pick(&corpus);
            let packet = mutate(&mut random, &packet);
            if packet.is_empty() {
                continue;
            }
            let len = packet.len() as u32;
            let value = expected(&program, &packet, len);
            only_kernel += u32::from(program.run_noting(&packet, len).1);
            assert_eq!(
                filter.run(&packet),
                value.min(len) as usize,
                "the interpreter returns {value}\n{}\n{packet:02x?}",
                listing(&program)
            );
        }
    }
    assert!(
        only_kernel > 100,
        "only {only_kernel} pairs in which libpcap and the kernel differ"
    );
}
