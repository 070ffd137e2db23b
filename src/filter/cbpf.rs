//! Classic BPF: instructions, programs that passed the kernel's own checks, and a plain interpreter of the kernel's
//! semantics. Pure: no libpcap, no libbpf.

use std::fmt;

/// One instruction, laid out as the kernel's `struct sock_filter` and libpcap's `struct bpf_insn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Insn {
    pub code: u16,
    pub jt: u8,
    pub jf: u8,
    pub k: u32,
}

impl Insn {
    pub const fn new(code: u16, jt: u8, jf: u8, k: u32) -> Self {
        Insn { code, jt, jf, k }
    }

    pub const fn stmt(code: u16, k: u32) -> Self {
        Insn::new(code, 0, 0, k)
    }
}

/// The longest program, as in the kernel (BPF_MAXINSNS).
pub const MAX_INSNS: usize = 4096;
/// Words of scratch memory (BPF_MEMWORDS).
pub const MEM_WORDS: usize = 16;
/// From here on an absolute offset does not mean the packet: the link header, network header or ancillary data
/// (SKF_LL_OFF; SKF_NET_OFF and SKF_AD_OFF lie above it).
const SKF_LL_OFF: u32 = 0xffe0_0000;

/// Where the kernel's socket filters have the tag beside a packet (SKF_AD_OFF + SKF_AD_VLAN_TAG): 16 bits.
pub const VLAN_TAG: u32 = 0xffff_f02c;

pub const RET_K: u16 = 0x06;
pub const RET_A: u16 = 0x16;
pub const LD_W_ABS: u16 = 0x20;
pub const LD_H_ABS: u16 = 0x28;
pub const LD_B_ABS: u16 = 0x30;
pub const LD_W_IND: u16 = 0x40;
pub const LD_H_IND: u16 = 0x48;
pub const LD_B_IND: u16 = 0x50;
pub const LD_IMM: u16 = 0x00;
pub const LD_MEM: u16 = 0x60;
pub const LD_LEN: u16 = 0x80;
pub const LDX_IMM: u16 = 0x01;
pub const LDX_MEM: u16 = 0x61;
pub const LDX_LEN: u16 = 0x81;
pub const LDX_MSH: u16 = 0xb1;
pub const ST: u16 = 0x02;
pub const STX: u16 = 0x03;
pub const TAX: u16 = 0x07;
pub const TXA: u16 = 0x87;
pub const JA: u16 = 0x05;

/// The class of arithmetic; the operation is in the upper bits, 0x08 means X.
pub const CLASS_ALU: u16 = 0x04;
/// The class of jumps.
pub const CLASS_JMP: u16 = 0x05;
/// The operand is X instead of K.
pub const SRC_X: u16 = 0x08;

pub const ALU_ADD: u16 = 0x00;
pub const ALU_SUB: u16 = 0x10;
pub const ALU_MUL: u16 = 0x20;
pub const ALU_DIV: u16 = 0x30;
pub const ALU_OR: u16 = 0x40;
pub const ALU_AND: u16 = 0x50;
pub const ALU_LSH: u16 = 0x60;
pub const ALU_RSH: u16 = 0x70;
pub const ALU_NEG: u16 = 0x80;
pub const ALU_MOD: u16 = 0x90;
pub const ALU_XOR: u16 = 0xa0;

pub const JMP_EQ: u16 = 0x10;
pub const JMP_GT: u16 = 0x20;
pub const JMP_GE: u16 = 0x30;
pub const JMP_SET: u16 = 0x40;

/// What an instruction does, its operands read out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// A = bytes at k, or at X + k.
    Load {
        size: u32,
        offset: Offset,
    },
    /// A or X = constant, scratch word, packet length.
    Set {
        to: Acc,
        value: Value,
    },
    /// X = 4 * (byte at k & 15)
    HeaderLength {
        k: u32,
    },
    Store {
        from: Acc,
        word: u32,
    },
    Alu {
        op: u16,
        operand: Operand,
    },
    Neg,
    /// Go on behind the next `k` instructions.
    Jump {
        k: u32,
    },
    Branch {
        cond: u16,
        operand: Operand,
        jt: u8,
        jf: u8,
    },
    TakeX,
    GiveX,
    Return(Operand2),
}

impl Op {
    /// Does it read the packet's length?
    pub fn asks_length(&self) -> bool {
        let length = Value::Length;
        matches!(self, Op::Set { value, .. } if *value == length)
    }
}

/// Where a load reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offset {
    Absolute(u32),
    /// X + k
    Indexed(u32),
}

/// One of the two registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acc {
    A,
    X,
}

/// What a register is set to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    Constant(u32),
    Word(u32),
    Length,
}

/// The right side of arithmetic and comparisons.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operand {
    K(u32),
    X,
}

/// What a program returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operand2 {
    K(u32),
    A,
}

/// Why a list of instructions is no program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Invalid {
    Empty,
    TooLong(usize),
    UnknownOpcode { at: usize, code: u16 },
    BackwardJump { at: usize },
    JumpOutside { at: usize },
    DivisionByZero { at: usize },
    ShiftTooFar { at: usize, k: u32 },
    NoSuchWord { at: usize, k: u32 },
    WordReadFirst { at: usize, word: u32 },
    Ancillary { at: usize, k: u32 },
    NoReturn,
}

impl std::error::Error for Invalid {}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Invalid::Empty => write!(f, "the program is empty"),
            Invalid::TooLong(n) => write!(
                f,
                "the filter is too long: {n} instructions, and the limit is {MAX_INSNS}; \
                 use networks (net 10.0.0.0/8) in place of many hosts"
            ),
            Invalid::UnknownOpcode { at, code } => {
                write!(f, "instruction {at}: unknown opcode {code:#06x}")
            }
            Invalid::BackwardJump { at } => write!(
                f,
                "instruction {at} jumps backward, which the kernel's filters do not allow \
                 (`protochain` is compiled to such a loop; name the header, as in `ip6 proto`)"
            ),
            Invalid::JumpOutside { at } => {
                write!(f, "instruction {at} jumps outside the program")
            }
            Invalid::DivisionByZero { at } => write!(f, "instruction {at} divides by 0"),
            Invalid::ShiftTooFar { at, k } => {
                write!(f, "instruction {at} shifts by {k}, and the limit is 31")
            }
            Invalid::NoSuchWord { at, k } => {
                write!(
                    f,
                    "instruction {at}: scratch word {k}, and there are {MEM_WORDS}"
                )
            }
            Invalid::WordReadFirst { at, word } => write!(
                f,
                "instruction {at} reads scratch word {word} before it is written"
            ),
            Invalid::Ancillary { at, k } => write!(
                f,
                "instruction {at} loads from {k:#010x}: ancillary data of a socket, which a traced packet does not have"
            ),
            Invalid::NoReturn => write!(f, "the program does not end in a return"),
        }
    }
}

/// A program that passed the checks of the kernel (bpf_check_classic); every instruction is known, every jump goes
/// forward and inside, and no scratch word is read before it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    insns: Vec<Insn>,
}

impl Program {
    pub fn new(insns: Vec<Insn>) -> Result<Self, Invalid> {
        if insns.is_empty() {
            return Err(Invalid::Empty);
        }
        if insns.len() > MAX_INSNS {
            return Err(Invalid::TooLong(insns.len()));
        }
        for (at, insn) in insns.iter().enumerate() {
            check(at, *insn, insns.len())?;
        }
        if !matches!(insns[insns.len() - 1].code, RET_K | RET_A) {
            return Err(Invalid::NoReturn);
        }
        check_words(&insns)?;
        Ok(Program { insns })
    }

    /// The same for packets with a VLAN tag beside them, which the program may load.
    pub fn new_tagged(insns: Vec<Insn>) -> Result<Self, Invalid> {
        let is_tag = |insn: &Insn| insn.code == LD_H_ABS && insn.k == VLAN_TAG;
        let checked = insns.iter().map(|insn| match is_tag(insn) {
            true => Insn::stmt(LD_H_ABS, 0),
            false => *insn,
        });
        Program::new(checked.collect())?;
        Ok(Program { insns })
    }

    /// The same program, and for a match it returns this number.
    pub fn returning(&self, number: u32) -> Self {
        let insns = self.insns.iter().map(|insn| match insn.code {
            RET_K if insn.k != 0 => Insn::stmt(RET_K, number),
            _ => *insn,
        });
        Program {
            insns: insns.collect(),
        }
    }

    /// The program that matches no packet.
    pub fn nothing() -> Self {
        Program {
            insns: vec![Insn::stmt(RET_K, 0)],
        }
    }

    pub fn insns(&self) -> &[Insn] {
        &self.insns
    }

    /// The operations, in order.
    pub fn ops(&self) -> impl Iterator<Item = Op> + '_ {
        self.insns.iter().filter_map(|insn| decode(*insn))
    }

    /// Runs it over a packet of which `packet` is there and which was `wire_len` bytes long, by the kernel's
    /// semantics. The slow and obvious way, against which the others are tested.
    pub fn run(&self, packet: &[u8], wire_len: u32) -> u32 {
        self.run_noting(packet, wire_len).0
    }

    /// The same, and whether on the way something happened in which libpcap's interpreter differs from the kernel:
    /// X + k wrapped (libpcap: out of bounds), or a shift by X of 32 or more (libpcap: 0).
    pub fn run_noting(&self, packet: &[u8], wire_len: u32) -> (u32, bool) {
        let mut only_kernel = false;
        let (mut a, mut x) = (0u32, 0u32);
        let mut words = [0u32; MEM_WORDS];
        let ops: Vec<Op> = self.ops().collect();
        let mut at = 0;
        while let Some(op) = ops.get(at) {
            at += 1;
            match *op {
                Op::Load { size, offset } => {
                    let offset = match offset {
                        Offset::Absolute(k) => k,
                        Offset::Indexed(k) => {
                            only_kernel |= x.checked_add(k).is_none();
                            x.wrapping_add(k)
                        }
                    };
                    match load(packet, offset, size) {
                        Some(value) => a = value,
                        None => return (0, only_kernel),
                    }
                }
                Op::Set { to, value } => {
                    let value = match value {
                        Value::Constant(k) => k,
                        Value::Word(word) => words[word as usize],
                        Value::Length => wire_len,
                    };
                    match to {
                        Acc::A => a = value,
                        Acc::X => x = value,
                    }
                }
                Op::HeaderLength { k } => match load(packet, k, 1) {
                    Some(byte) => x = (byte & 0xf) << 2,
                    None => return (0, only_kernel),
                },
                Op::Store { from: Acc::A, word } => words[word as usize] = a,
                Op::Store { from: Acc::X, word } => words[word as usize] = x,
                Op::Alu { op, operand } => {
                    let right = match operand {
                        Operand::K(k) => k,
                        Operand::X => x,
                    };
                    only_kernel |= matches!(op, ALU_LSH | ALU_RSH) && right >= 32;
                    a = match op {
                        ALU_ADD => a.wrapping_add(right),
                        ALU_SUB => a.wrapping_sub(right),
                        ALU_MUL => a.wrapping_mul(right),
                        ALU_DIV | ALU_MOD if right == 0 => return (0, only_kernel),
                        ALU_DIV => a / right,
                        ALU_MOD => a % right,
                        ALU_OR => a | right,
                        ALU_AND => a & right,
                        ALU_XOR => a ^ right,
                        ALU_LSH => a.wrapping_shl(right),
                        _ => a.wrapping_shr(right),
                    };
                }
                Op::Neg => a = a.wrapping_neg(),
                Op::Jump { k } => at += k as usize,
                Op::Branch {
                    cond,
                    operand,
                    jt,
                    jf,
                } => {
                    let right = match operand {
                        Operand::K(k) => k,
                        Operand::X => x,
                    };
                    let taken = match cond {
                        JMP_EQ => a == right,
                        JMP_GT => a > right,
                        JMP_GE => a >= right,
                        _ => a & right != 0,
                    };
                    at += usize::from(if taken { jt } else { jf });
                }
                Op::TakeX => a = x,
                Op::GiveX => x = a,
                Op::Return(Operand2::K(k)) => return (k, only_kernel),
                Op::Return(Operand2::A) => return (a, only_kernel),
            }
        }
        (0, only_kernel)
    }
}

/// `size` bytes at `offset`, network order; none where one of them is outside.
fn load(packet: &[u8], offset: u32, size: u32) -> Option<u32> {
    let start = offset as usize;
    let bytes = packet.get(start..start.checked_add(size as usize)?)?;
    Some(
        bytes
            .iter()
            .fold(0, |value, byte| value << 8 | u32::from(*byte)),
    )
}

/// The meaning of an instruction; none for an unknown opcode.
pub fn decode(insn: Insn) -> Option<Op> {
    let Insn { code, jt, jf, k } = insn;
    let operand = if code & SRC_X != 0 {
        Operand::X
    } else {
        Operand::K(k)
    };
    Some(match code {
        LD_W_ABS => Op::Load {
            size: 4,
            offset: Offset::Absolute(k),
        },
        LD_H_ABS => Op::Load {
            size: 2,
            offset: Offset::Absolute(k),
        },
        LD_B_ABS => Op::Load {
            size: 1,
            offset: Offset::Absolute(k),
        },
        LD_W_IND => Op::Load {
            size: 4,
            offset: Offset::Indexed(k),
        },
        LD_H_IND => Op::Load {
            size: 2,
            offset: Offset::Indexed(k),
        },
        LD_B_IND => Op::Load {
            size: 1,
            offset: Offset::Indexed(k),
        },
        LD_IMM => Op::Set {
            to: Acc::A,
            value: Value::Constant(k),
        },
        LD_MEM => Op::Set {
            to: Acc::A,
            value: Value::Word(k),
        },
        LD_LEN => Op::Set {
            to: Acc::A,
            value: Value::Length,
        },
        LDX_IMM => Op::Set {
            to: Acc::X,
            value: Value::Constant(k),
        },
        LDX_MEM => Op::Set {
            to: Acc::X,
            value: Value::Word(k),
        },
        LDX_LEN => Op::Set {
            to: Acc::X,
            value: Value::Length,
        },
        LDX_MSH => Op::HeaderLength { k },
        ST => Op::Store {
            from: Acc::A,
            word: k,
        },
        STX => Op::Store {
            from: Acc::X,
            word: k,
        },
        TAX => Op::GiveX,
        TXA => Op::TakeX,
        RET_K => Op::Return(Operand2::K(k)),
        RET_A => Op::Return(Operand2::A),
        JA => Op::Jump { k },
        0x84 => Op::Neg,
        _ => {
            let op = code & 0xf0;
            match code & 0xff07 {
                CLASS_ALU if op <= ALU_XOR && op != ALU_NEG => Op::Alu { op, operand },
                CLASS_JMP if (JMP_EQ..=JMP_SET).contains(&op) => Op::Branch {
                    cond: op,
                    operand,
                    jt,
                    jf,
                },
                _ => return None,
            }
        }
    })
}

/// The checks on one instruction.
fn check(at: usize, insn: Insn, len: usize) -> Result<(), Invalid> {
    let Some(op) = decode(insn) else {
        return Err(Invalid::UnknownOpcode {
            at,
            code: insn.code,
        });
    };
    // Instructions behind this one.
    let behind = len - at - 1;
    match op {
        Op::Load {
            offset: Offset::Absolute(k),
            ..
        }
        | Op::HeaderLength { k }
            if k >= SKF_LL_OFF =>
        {
            Err(Invalid::Ancillary { at, k })
        }
        Op::Set {
            value: Value::Word(k),
            ..
        }
        | Op::Store { word: k, .. }
            if k >= MEM_WORDS as u32 =>
        {
            Err(Invalid::NoSuchWord { at, k })
        }
        Op::Alu {
            op: ALU_DIV | ALU_MOD,
            operand: Operand::K(0),
        } => Err(Invalid::DivisionByZero { at }),
        Op::Alu {
            op: ALU_LSH | ALU_RSH,
            operand: Operand::K(k),
        } if k >= 32 => Err(Invalid::ShiftTooFar { at, k }),
        Op::Jump { k } if (k as i32) < 0 => Err(Invalid::BackwardJump { at }),
        Op::Jump { k } if k as usize >= behind => Err(Invalid::JumpOutside { at }),
        Op::Branch { jt, jf, .. } if usize::from(jt.max(jf)) >= behind => {
            Err(Invalid::JumpOutside { at })
        }
        _ => Ok(()),
    }
}

/// No scratch word is read before it is written, on any path (as the kernel's check_load_and_stores).
fn check_words(insns: &[Insn]) -> Result<(), Invalid> {
    // The words written on every way here; all ones where no way was seen yet.
    let mut written = vec![u16::MAX; insns.len()];
    let mut here = 0u16;
    for (at, insn) in insns.iter().enumerate() {
        here &= written[at];
        let mut reaches = |to: usize, words: u16| {
            if let Some(slot) = written.get_mut(to) {
                *slot &= words;
            }
        };
        match decode(*insn) {
            Some(Op::Store { word, .. }) => here |= 1 << word,
            Some(Op::Set {
                value: Value::Word(word),
                ..
            }) if here & 1 << word == 0 => {
                return Err(Invalid::WordReadFirst { at, word });
            }
            Some(Op::Jump { k }) => {
                reaches(at + 1 + k as usize, here);
                here = u16::MAX;
            }
            Some(Op::Branch { jt, jf, .. }) => {
                reaches(at + 1 + usize::from(jt), here);
                reaches(at + 1 + usize::from(jf), here);
                here = u16::MAX;
            }
            Some(Op::Return(_)) => here = u16::MAX,
            _ => {}
        }
    }
    Ok(())
}
