//! What a translation must get right, a test for each.

use super::packets::{self, Random};
use super::{Runner, check};
use crate::filter::cbpf::*;
use crate::filter::ebpf::{FarLoad, LoadMode, translate};
use crate::filter::expr::{self, Compiled};
use crate::filter::pcap::Linktype;

const ALL: u32 = 0xffff_ffff;

fn program(insns: &[Insn]) -> Program {
    Program::new(insns.to_vec()).unwrap()
}

/// Bytes that differ from each other.
fn counting(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 13 + i / 256 + 1) as u8).collect()
}

/// Packets of lengths around the sizes that matter.
fn lengths() -> Vec<Vec<u8>> {
    [
        0, 1, 13, 14, 15, 20, 23, 24, 25, 59, 60, 61, 64, 95, 96, 97, 98, 200, 1500,
    ]
    .map(counting)
    .to_vec()
}

fn stmt(code: u16, k: u32) -> Insn {
    Insn::stmt(code, k)
}

fn checks(insns: &[Insn]) {
    check(&program(insns), &lengths());
}

#[test]
#[cfg_attr(not(is_root), ignore = "loading BPF programs needs root")]
fn every_arithmetic_with_k_and_x() {
    for op in [
        ALU_ADD, ALU_SUB, ALU_MUL, ALU_DIV, ALU_OR, ALU_AND, ALU_LSH, ALU_RSH, ALU_MOD, ALU_XOR,
    ] {
        for k in [1, 3, 16, 31, 32, 33, 0x7fff_ffff, 0x8000_0000, ALL] {
            checks(&[
                stmt(LDX_IMM, k),
                stmt(LD_W_ABS, 10),
                stmt(CLASS_ALU | op | SRC_X, 0),
                stmt(RET_A, 0),
            ]);
            if !(matches!(op, ALU_LSH | ALU_RSH) && k > 31) {
                checks(&[stmt(LD_W_ABS, 10), stmt(CLASS_ALU | op, k), stmt(RET_A, 0)]);
            }
        }
    }
    checks(&[
        stmt(LD_W_ABS, 3),
        stmt(CLASS_ALU | ALU_NEG, 0),
        stmt(RET_A, 0),
    ]);
}

#[test]
#[cfg_attr(not(is_root), ignore = "loading BPF programs needs root")]
fn division_and_modulo_by_x_of_0_do_not_match() {
    for op in [ALU_DIV, ALU_MOD] {
        checks(&[
            stmt(LD_IMM, 7),
            stmt(CLASS_ALU | op | SRC_X, 0),
            stmt(RET_K, 1),
        ]);
    }
}

#[test]
#[cfg_attr(not(is_root), ignore = "loading BPF programs needs root")]
fn every_jump_with_k_and_x_and_large_k() {
    for cond in [JMP_EQ, JMP_GT, JMP_GE, JMP_SET] {
        for k in [
            0,
            1,
            0x7fff_ffff,
            0x8000_0000,
            0x8000_0001,
            0xffff_fffe,
            ALL,
        ] {
            for a in [0, 1, 0x7fff_ffff, 0x8000_0000, 0x8000_0001, ALL] {
                let ends = [stmt(RET_K, 1), stmt(RET_K, 2), stmt(RET_K, 3)];
                for (jt, jf) in [(0, 1), (1, 0), (1, 2), (2, 1), (1, 1), (0, 0)] {
                    let by_k = [stmt(LD_IMM, a), Insn::new(CLASS_JMP | cond, jt, jf, k)];
                    let by_x = [
                        stmt(LDX_IMM, k),
                        stmt(LD_IMM, a),
                        Insn::new(CLASS_JMP | cond | SRC_X, jt, jf, 0),
                    ];
                    for start in [&by_k[..], &by_x[..]] {
                        let program = program(&[start, &ends[..]].concat());
                        let (mode, want) = (LoadMode::PROBE, program.run(&[], 0));
                        // Without loads any mode is the same code; one run is enough.
                        assert!(translate(&program, mode).is_ok());
                        assert_eq!(super::expected(&program, &[], 0), want);
                    }
                }
            }
        }
        // In the kernel with what the packet holds.
        for k in [0x10, 0x8000_0000, ALL] {
            for x in [0, SRC_X] {
                checks(&[
                    stmt(LDX_IMM, k),
                    stmt(LD_W_ABS, 0),
                    Insn::new(CLASS_JMP | cond | x, 1, 0, k),
                    stmt(RET_K, 5),
                    stmt(RET_K, 6),
                ]);
            }
        }
    }
}

#[test]
#[cfg_attr(not(is_root), ignore = "loading BPF programs needs root")]
fn each_load_size_at_the_last_bytes() {
    for (code, size) in [(LD_B_ABS, 1), (LD_H_ABS, 2), (LD_W_ABS, 4)] {
        for end in [14, 15, 24, 25, 60, 61, 96, 97, 98, 200] {
            checks(&[stmt(code, end - size), stmt(RET_A, 0)]);
        }
    }
    for (code, size) in [(LD_B_IND, 1), (LD_H_IND, 2), (LD_W_IND, 4)] {
        for end in [14, 15, 24, 25, 60, 61, 96, 97, 98, 200] {
            checks(&[stmt(LDX_IMM, 7), stmt(code, end - size - 7), stmt(RET_A, 0)]);
        }
    }
}

#[test]
#[cfg_attr(not(is_root), ignore = "loading BPF programs needs root")]
fn offsets_near_32767_and_65535() {
    let packets = [
        32_760, 32_768, 32_770, 32_775, 59_990, 65_530, 65_535, 65_536, 65_540, 70_000,
    ]
    .map(counting);
    for offset in [
        32_763, 32_764, 32_766, 32_767, 32_768, 59_980, 65_531, 65_534, 65_535, 65_536, 69_000,
    ] {
        for code in [LD_B_ABS, LD_H_ABS, LD_W_ABS] {
            check(&program(&[stmt(code, offset), stmt(RET_A, 0)]), &packets);
        }
        check(
            &program(&[
                stmt(LDX_IMM, 30_000),
                stmt(LD_H_IND, offset - 30_000),
                stmt(RET_A, 0),
            ]),
            &packets,
        );
        check(
            &program(&[stmt(LDX_MSH, offset), stmt(TXA, 0), stmt(RET_A, 0)]),
            &packets,
        );
    }
}

#[test]
#[cfg_attr(not(is_root), ignore = "loading BPF programs needs root")]
fn a_negative_sum_of_x_and_k() {
    // X + k wraps at 32 bits: to an offset in the packet, and to one far outside.
    for (x, k) in [
        (20, ALL - 9),
        (4, ALL - 9),
        (ALL, 1),
        (ALL, 15),
        (0x8000_0000, 0x8000_0004),
        (ALL, ALL),
    ] {
        checks(&[stmt(LDX_IMM, x), stmt(LD_H_IND, k), stmt(RET_A, 0)]);
    }
}

#[test]
#[cfg_attr(not(is_root), ignore = "loading BPF programs needs root")]
fn two_loads_far_apart_and_x_clobbered_between() {
    checks(&[
        stmt(LDX_IMM, 4),
        stmt(LD_H_IND, 10),
        stmt(ST, 0),
        stmt(LDX_IMM, 90),
        stmt(LD_W_IND, 100),
        stmt(LDX_MEM, 0),
        stmt(CLASS_ALU | ALU_ADD | SRC_X, 0),
        stmt(TAX, 0),
        stmt(LD_B_ABS, 1),
        stmt(CLASS_ALU | ALU_AND, 3),
        stmt(TAX, 0),
        stmt(LD_B_IND, 5),
        stmt(RET_A, 0),
    ]);
}

#[test]
#[cfg_attr(not(is_root), ignore = "loading BPF programs needs root")]
fn paths_with_different_guards_join() {
    // One way here has read up to byte 64, the other up to 16; then both read 40.
    checks(&[
        stmt(LD_B_ABS, 2),
        Insn::new(CLASS_JMP | JMP_GT, 0, 2, 0x1a),
        stmt(LD_W_ABS, 60),
        stmt(JA, 1),
        stmt(LD_W_ABS, 12),
        stmt(LD_H_ABS, 40),
        stmt(RET_A, 0),
    ]);
    checks(&[
        stmt(LD_B_ABS, 0),
        Insn::new(CLASS_JMP | JMP_SET, 1, 0, 0xff),
        stmt(LD_W_ABS, 190),
        stmt(LDX_MSH, 3),
        stmt(LD_W_IND, 90),
        stmt(RET_A, 0),
    ]);
}

#[test]
#[cfg_attr(not(is_root), ignore = "loading BPF programs needs root")]
fn header_length_keeps_a() {
    for k in [0, 14, 60, 97, 150] {
        checks(&[
            stmt(LD_W_ABS, 0),
            stmt(LDX_MSH, k),
            stmt(CLASS_ALU | ALU_ADD | SRC_X, 0),
            stmt(RET_A, 0),
        ]);
    }
}

#[test]
#[cfg_attr(not(is_root), ignore = "loading BPF programs needs root")]
fn scratch_words_0_and_15() {
    checks(&[
        stmt(LD_W_ABS, 4),
        stmt(ST, 0),
        stmt(LDX_MSH, 1),
        stmt(STX, 15),
        stmt(LD_IMM, 0),
        stmt(LDX_IMM, 0),
        stmt(LD_MEM, 15),
        stmt(LDX_MEM, 0),
        stmt(CLASS_ALU | ALU_SUB | SRC_X, 0),
        stmt(RET_A, 0),
    ]);
}

#[test]
#[cfg_attr(not(is_root), ignore = "loading BPF programs needs root")]
fn a_and_x_start_at_0() {
    checks(&[stmt(RET_A, 0)]);
    checks(&[stmt(TXA, 0), stmt(CLASS_ALU | ALU_ADD, 1), stmt(RET_A, 0)]);
    checks(&[stmt(LD_B_IND, 3), stmt(RET_A, 0)]);
}

#[test]
#[cfg_attr(not(is_root), ignore = "loading BPF programs needs root")]
fn returns_are_32_bits() {
    for k in [0, 1, 0x7fff_ffff, 0x8000_0000, ALL] {
        checks(&[stmt(RET_K, k)]);
        checks(&[stmt(LD_IMM, k), stmt(RET_A, 0)]);
    }
}

#[test]
#[cfg_attr(not(is_root), ignore = "loading BPF programs needs root")]
fn length_of_the_packet() {
    checks(&[stmt(LD_LEN, 0), stmt(RET_A, 0)]);
    checks(&[
        stmt(LDX_LEN, 0),
        stmt(LD_B_ABS, 0),
        stmt(TXA, 0),
        stmt(RET_A, 0),
    ]);
    // The last byte of the packet.
    checks(&[stmt(LDX_LEN, 0), stmt(LD_B_IND, ALL), stmt(RET_A, 0)]);
}

#[test]
#[cfg_attr(not(is_root), ignore = "loading BPF programs needs root")]
fn both_ways_of_a_jump_to_one_place() {
    checks(&[
        stmt(LD_B_ABS, 0),
        Insn::new(CLASS_JMP | JMP_EQ, 1, 1, 7),
        stmt(RET_K, 1),
        stmt(RET_K, 2),
    ]);
}

#[test]
#[cfg_attr(not(is_root), ignore = "loading BPF programs needs root")]
fn dead_code() {
    checks(&[
        stmt(LD_B_ABS, 0),
        stmt(JA, 2),
        stmt(LD_W_ABS, 1000),
        stmt(RET_K, 1),
        Insn::new(CLASS_JMP | JMP_EQ, 0, 1, 1),
        stmt(RET_K, 2),
        stmt(RET_A, 0),
        stmt(RET_K, 9),
    ]);
}

#[test]
#[cfg_attr(not(is_root), ignore = "loading BPF programs needs root")]
fn long_jumps_and_long_programs() {
    // Loads all along: the longest code there is, in each mode.
    let mut insns = vec![
        stmt(LD_B_ABS, 0),
        Insn::new(CLASS_JMP | JMP_GT, 0, 1, 0x80),
        stmt(JA, 3000),
    ];
    for i in 0..3500 {
        insns.push(match i % 5 {
            0 => stmt(LD_H_ABS, i % 120),
            1 => stmt(TAX, 0),
            2 => stmt(CLASS_ALU | ALU_AND, 0x3f),
            3 => stmt(CLASS_ALU | ALU_ADD | SRC_X, 0),
            _ => stmt(CLASS_ALU | ALU_XOR, i),
        });
    }
    insns.push(stmt(RET_A, 0));
    checks(&insns);
    // Branches over 255 instructions.
    let mut insns = vec![stmt(LD_W_ABS, 0)];
    for i in 0..8 {
        insns.push(Insn::new(CLASS_JMP | JMP_SET, 255, 254, 1 << i));
        insns.extend((0..255).map(|k| stmt(CLASS_ALU | ALU_ADD, k)));
    }
    insns.extend([stmt(RET_A, 0), stmt(RET_A, 0)]);
    checks(&insns);
}

#[test]
fn backward_jumps_are_a_clear_error() {
    let error = format!("{:#}", Compiled::new("ip6 protochain 6").unwrap_err());
    assert!(
        error.contains("jumps backward") && error.contains("protochain"),
        "{error}"
    );
}

#[test]
fn what_the_kernel_refuses_is_refused() {
    let ret = stmt(RET_K, 0);
    let refused = |insns: &[Insn]| Program::new(insns.to_vec()).unwrap_err();
    assert_eq!(refused(&[]), Invalid::Empty);
    assert_eq!(refused(&vec![ret; 4097]), Invalid::TooLong(4097));
    assert_eq!(
        refused(&[stmt(0xffff, 0), ret]),
        Invalid::UnknownOpcode {
            at: 0,
            code: 0xffff
        }
    );
    assert_eq!(
        refused(&[stmt(JA, ALL), ret]),
        Invalid::BackwardJump { at: 0 }
    );
    assert_eq!(refused(&[stmt(JA, 1), ret]), Invalid::JumpOutside { at: 0 });
    assert_eq!(
        refused(&[Insn::new(CLASS_JMP | JMP_EQ, 0, 1, 0), ret]),
        Invalid::JumpOutside { at: 0 }
    );
    assert_eq!(
        refused(&[stmt(CLASS_ALU | ALU_MOD, 0), ret]),
        Invalid::DivisionByZero { at: 0 }
    );
    assert_eq!(
        refused(&[stmt(CLASS_ALU | ALU_LSH, 32), ret]),
        Invalid::ShiftTooFar { at: 0, k: 32 }
    );
    assert_eq!(
        refused(&[stmt(ST, 16), ret]),
        Invalid::NoSuchWord { at: 0, k: 16 }
    );
    assert_eq!(
        refused(&[stmt(LD_MEM, 3), ret]),
        Invalid::WordReadFirst { at: 0, word: 3 }
    );
    assert_eq!(
        refused(&[stmt(LD_W_ABS, 0xffff_f004), ret]),
        Invalid::Ancillary {
            at: 0,
            k: 0xffff_f004
        }
    );
    assert_eq!(refused(&[stmt(LD_IMM, 0)]), Invalid::NoReturn);
    // Written on one way only.
    assert_eq!(
        refused(&[
            Insn::new(CLASS_JMP | JMP_EQ, 0, 1, 0),
            stmt(ST, 2),
            stmt(LD_MEM, 2),
            ret
        ]),
        Invalid::WordReadFirst { at: 2, word: 2 }
    );
}

#[test]
fn an_expression_for_the_link_layer_only_is_said_to_be_so() {
    for text in [
        "arp",
        "ether host 02:00:00:00:00:01",
        "vlan 5",
        "ether proto 0x88cc",
    ] {
        let compiled = Compiled::new(text).unwrap();
        let note = compiled.note().unwrap();
        assert!(
            compiled.l3.is_err() && note.contains("link header"),
            "{text}: {note}"
        );
    }
    assert!(Compiled::new("icmp").unwrap().note().is_none());
    assert!(Compiled::new("no such thing").is_err());
    let error = format!("{:#}", Compiled::new("ip and arp").unwrap_err());
    assert!(error.contains("rejects all packets"), "{error}");
}

/// Fragments, VLAN, MPLS, PPPoE, IPv6 extension headers, scratch memory: expressions over packets of each kind.
#[test]
#[cfg_attr(not(is_root), ignore = "loading BPF programs needs root")]
fn expressions_over_packets_of_each_kind() {
    let packets = packets::all();
    for text in EXPRESSIONS {
        let program = expr::compile(text, Linktype::ETHERNET, expr::SNAPLEN).unwrap();
        check(&program, &packets);
        if let Ok(program) = expr::compile(text, Linktype::RAW_IP, expr::SNAPLEN) {
            let inner: Vec<_> = packets
                .iter()
                .map(|p| p[14.min(p.len())..].to_vec())
                .collect();
            check(&program, &inner);
        }
    }
}

/// No expression is without a packet that it matches and one that it does not, or the test above would say little.
#[test]
fn most_expressions_match_some_packets() {
    let packets = packets::all();
    let telling = EXPRESSIONS.iter().filter(|text| {
        let program = expr::compile(text, Linktype::ETHERNET, expr::SNAPLEN).unwrap();
        let matched = packets
            .iter()
            .filter(|p| program.run(p, p.len() as u32) != 0)
            .count();
        matched > 0 && matched < packets.len()
    });
    assert!(telling.count() * 10 >= EXPRESSIONS.len() * 9);
}

pub const EXPRESSIONS: &[&str] = &[
    "ip",
    "ip6",
    "arp",
    "tcp",
    "udp",
    "icmp",
    "icmp6",
    "tcp port 80 or icmp",
    "port 53",
    "src port 80",
    "dst portrange 50-60",
    "host 10.0.0.1",
    "src host 10.0.0.2",
    "net 10.0.0.0/8 and not tcp",
    "ip6 host fd00::1",
    "dst net fd00::/16",
    "ether host 02:00:00:00:00:01",
    "ether dst ff:ff:ff:ff:ff:ff",
    "ether multicast",
    "ether proto 0x8847",
    "ip multicast or ether broadcast",
    "vlan",
    "vlan 100 and tcp port 80",
    "vlan 5 and vlan 100 and icmp",
    "mpls",
    "mpls 1024 and tcp",
    "mpls and mpls 1025 and host 10.0.0.1",
    "pppoes",
    "pppoes 7 and udp port 53",
    "tcp[tcpflags] = tcp-syn",
    "tcp[tcpflags] & (tcp-syn|tcp-ack) != 0",
    "ip6[53] & 0x3f = 0x2",
    "(((ip[2:2] - ((ip[0]&0xf)<<2)) - ((tcp[12]&0xf0)>>2)) != 0)",
    "tcp[((tcp[12:1] & 0xf0) >> 2):4] = 0x47455420",
    "ip[6:2] & 0x1fff != 0",
    "ip[6] & 0x20 != 0 or ip[8] < 5",
    "ip6 proto 17",
    "ip6[6] = 0 and ip6[40] = 44",
    "ip[0] & 0xf != 5",
    "ip[20] = 1",
    "len > 100",
    "less 80",
    "greater 1000 and udp",
    "len % 2 = 1",
    "ether[0] & 1 = 0 and ip[16] >= 224",
    "ether[len - 1] = 0x2f",
    "ether[1000:4] != 0",
    "udp[8:2] * 3 = 2048 * 3",
    "udp[4:2] / 2 > 20 or icmp[icmptype] = icmp-echo",
    "icmp6[icmp6type] = icmp6-echo",
    "sctp port 80",
    "proto 47 or proto 4",
    "ip proto 4 and ip[32:4] = 0x0a000001",
    "udp dst port 4789 and udp[42:4] = 0x0a000001",
    "not (ip or ip6)",
    "llc",
    "ip[2:2] ^ 0x55 > 100",
    "(ip[12:4] & 0xffffff00) = 0x0a000000",
    "ip[12:4] - ip[16:4] = 0xffffffff",
    "1 << (ip[9] & 7) = 64",
    "host 10.0.0.1 or host 10.0.0.9 or host 192.168.1.1 or host 172.16.0.1",
    "tcp port (80 or 443 or 8080) and dst host 10.0.0.2",
    "port 80 and (src net 10.0.0.0/24 or src net fd00::/64)",
];

/// `Random` gives the same run for the same seed: the fixed part of the differential test stands on it.
#[test]
fn the_generator_is_the_same_everywhere() {
    let mut random = Random(1);
    assert_eq!(
        [random.next(), random.next()],
        [0x910a_2dec_8902_5cc1, 0xbeeb_8da1_658e_ec67]
    );
}

/// Nothing lies beyond in this mode: a load there does not match, and the code stays valid.
#[test]
#[cfg_attr(not(is_root), ignore = "loading BPF programs needs root")]
fn loads_past_every_reach() {
    for mode in [
        LoadMode::ByPacket {
            far: FarLoad::Nothing,
        },
        LoadMode::ByBlock {
            size: 96,
            far: FarLoad::Nothing,
        },
    ] {
        for k in [100_000, 0x7fff_ffff, 0xffdf_ffff] {
            let insns = translate(&program(&[stmt(LD_W_ABS, k), stmt(RET_K, 1)]), mode).unwrap();
            assert!(insns.len() < 12);
        }
    }
    checks(&[stmt(LD_W_ABS, 0xffdf_ffff), stmt(RET_K, 1)]);
    checks(&[stmt(LD_H_ABS, 0x7fff_ffff), stmt(RET_K, 1)]);
}

/// By a short copy the usual packets are decided, with a link header and without.
#[test]
#[cfg_attr(not(is_root), ignore = "loading BPF programs needs root")]
fn a_copy_decides_the_usual_packets() {
    for text in [
        "tcp port 80 or icmp",
        "host 10.0.0.1",
        "ether src 2:0:0:0:0:a",
    ] {
        let compiled = Compiled::new(text).unwrap();
        let nothing = Program::nothing();
        let l3 = compiled.l3.as_ref().unwrap_or(&nothing);
        let mut runner = Runner::copied(&compiled.l2, l3).unwrap().unwrap();
        for destination in [1u8, 2] {
            let mut packet = [0; 74];
            packet[..14].copy_from_slice(&[2, 0, 0, 0, 0, 0xb, 2, 0, 0, 0, 0, 0xc, 8, 0]);
            packet[14] = 0x45;
            packet[23] = 17;
            packet[26..34].copy_from_slice(&[10, 0, 0, 3, 10, 0, 0, destination]);
            // An odd length: with the link header.
            for (bytes, yes) in [(&packet[..73], 1), (&packet[14..], 3)] {
                let matches = text.starts_with("host") && destination == 1;
                let want = if matches { yes } else { 0 };
                let known = runner.run(bytes, bytes.len() as u32).unwrap();
                assert_eq!(known, want, "{text}: {bytes:02x?}");
            }
        }
    }
}

/// With scratch words it would have too long a frame.
#[test]
fn no_copy_with_scratch_words() {
    let program = Program::new(vec![
        Insn::stmt(LD_B_ABS, 0),
        Insn::stmt(ST, 3),
        Insn::stmt(LDX_MEM, 3),
        Insn::stmt(RET_A, 0),
    ]);
    let program = program.unwrap();
    assert!(Runner::copied(&program, &program).unwrap().is_none());
}

/// X + k below 2^32 wraps: a load before the end of an IP header with options, which lies where one without has its first bytes.
#[test]
#[cfg_attr(not(is_root), ignore = "loading BPF programs needs root")]
fn a_negative_offset_behind_a_header_with_options() {
    for (before, k) in [(16, 0), (20, 0), (20, 1), (14, 2), (0, 6)] {
        for words in [&[][..], &[stmt(ST, 0), stmt(ST, 5)]] {
            let load = [
                stmt(LDX_MSH, 15),
                stmt(LD_W_IND, 0u32.wrapping_sub(before) + k),
                stmt(RET_A, 0),
            ];
            let insns = [words, &load].concat();
            check(
                &program(&insns),
                &[vec![0xff; 49], vec![0x45; 49], counting(49), counting(20)],
            );
        }
    }
}
