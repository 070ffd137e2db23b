//! From cBPF to eBPF: one pure function, `translate`. It must not know libbpf, nor what program the code is put into.
//!
//! The result is the body of a subprogram `u64 stub(r1, r2, r3, r4)` that returns 0 for no match, else what the cBPF
//! program returns. What the arguments are, `LoadMode` says.
//!
//! Registers: A is r0 and X is r5; r1 and r2 keep their arguments, r3 and r4 are scratch. Nothing is kept in r6 to r9,
//! so that the JIT saves none of them; a slow load (a helper or a subprogram is called) puts on the stack what the
//! call destroys. A and X are always zero-extended 32-bit values.
//!
//! A program that loads from several constant offsets is written twice: first for packets that reach past all of
//! them, without any check of bounds, then for shorter ones, where every load has its own check. No guard is ever
//! shared between instructions in any other way. `typed` has the whole filter of an sk_buff by typed loads.

mod by_cast;
mod by_copy;
mod far_load;
mod known;

use anyhow::Result;

pub use by_cast::translate_by_cast;
pub use by_copy::translate_by_copy;

use super::cbpf::{self, Acc, Offset, Op, Operand, Operand2, Program, Value};
use crate::bpf::skb::types::np_filter_answer;
use crate::insn::asm::{Alu, Assembler, Cond, Insn, Label, Reg, Size};
use known::Known;

/// How packet bytes are loaded, and with it what the arguments of the subprogram are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadMode {
    /// r1: pointer to `size` readable bytes, the packet's first; r2: how many bytes of the packet lie in one piece
    /// (may be more than `size`); r3: what `far` says; r4: the packet's length.
    ByBlock { size: u32, far: FarLoad },
    /// r1 and r2: start and end of the packet, known as such to the verifier (XDP, tc); r3, r4 as above.
    ByPacket { far: FarLoad },
    /// As `translate_by_cast` has it; what lies beyond by `FarLoad::Subprogram`. `data_len`: where an sk_buff has it.
    ByCast { data_len: u32 },
    /// As `translate_by_copy` has it. `base`: where the program's packet begins in the copy.
    ByCopy { base: u32 },
}

impl LoadMode {
    /// Every load by bpf_probe_read_kernel. r1: unused; r2: bytes at the address; r3: the packet's address; r4: its
    /// length.
    pub const PROBE: LoadMode = LoadMode::ByBlock {
        size: 0,
        far: FarLoad::ProbeRead,
    };
}

/// How bytes are loaded that the first way does not reach; the filter does not match where this fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FarLoad {
    /// Nothing is there.
    Nothing,
    /// r3: the packet's address; bpf_probe_read_kernel, as far as r2 says.
    ProbeRead,
    /// r3: the context of an XDP program; bpf_xdp_load_bytes.
    XdpLoad,
    /// r3: the `__sk_buff`; bpf_skb_load_bytes.
    SkbLoad,
    /// r3: its third argument; a subprogram `s64 load(u64 offset, u64 size, u64 source)`: the value in host order, or less
    /// than 0. The call has `LOAD_CALL` in its imm, for `inject` to fill in.
    Subprogram,
}

/// The imm of a call whose distance is not known yet.
pub const LOAD_CALL: i32 = i32::MIN;
/// The imm of a call of bpf_rdonly_cast, and of the instruction before it, which sets r2 to the struct's BTF id.
pub const CAST_CALL: i32 = i32::MIN + 1;
/// Bytes of the struct that lie before its array of bytes.
pub const TYPED_LEAD: u32 = 2;
/// Bytes of the struct.
const TYPED_SIZE: u32 = 128;
/// The length of an IPv4 header without options, as most are.
const IP_HEADER: u32 = 20;

const A: Reg = Reg::R0;
const X: Reg = Reg::R5;
const DATA: Reg = Reg::R1;
const END: Reg = Reg::R2;
const T: Reg = Reg::R3;
const T2: Reg = Reg::R4;

/// What a filter returns for a match of what begins with an IP header, if it is an IP packet.
const YES_BARE: u32 = np_filter_answer::NP_FILTER_YES_BARE.0;

/// The offset of an sk_buff's header that is not set.
const UNSET: u32 = 0xffff;

const SLOT_SOURCE: i16 = -8;
const SLOT_LENGTH: i16 = -16;
const SLOT_DATA: i16 = -24;
const SLOT_END: i16 = -32;
const SLOT_X: i16 = -40;
const SLOT_A: i16 = -48;
const SLOT_BYTES: i16 = -56;
const SLOT_ADDRESS: i16 = -64;
/// Scratch word 0; the others lie below it.
const SLOT_WORDS: i16 = -68;

/// Programs up to this length keep slow loads out of the way, behind the code, and may be written twice.
const SHORT: usize = 512;
/// Up to where the loads of the version without checks may reach: within the smallest Ethernet frame, so that it is
/// taken for nearly every packet.
const UNCHECKED_REACH: u32 = 60;
/// The verifier's bound for offsets into a packet.
const MAX_PACKET_OFFSET: u32 = 0xffff;

/// The body of the subprogram.
pub fn translate(program: &Program, mode: LoadMode) -> Result<Vec<Insn>> {
    let mut writer = Writer::new(program, mode, Assembler::default());
    writer.program();
    writer.asm.finish()
}

/// Which instructions can be reached; the verifier refuses code that cannot.
fn reachable(ops: &[Op]) -> Vec<bool> {
    let mut reached = vec![false; ops.len()];
    reached[0] = true;
    for (at, op) in ops.iter().enumerate() {
        if !reached[at] {
            continue;
        }
        match *op {
            Op::Return(_) => {}
            Op::Jump { k } => reached[at + 1 + k as usize] = true,
            Op::Branch { jt, jf, .. } => {
                reached[at + 1 + usize::from(jt)] = true;
                reached[at + 1 + usize::from(jf)] = true;
            }
            _ => reached[at + 1] = true,
        }
    }
    reached
}

/// A load of packet bytes.
#[derive(Clone, Copy)]
struct Load {
    size: u32,
    offset: Offset,
    /// `ldxb 4*([k]&0xf)`: X gets it, and A stays.
    header_length: bool,
    /// It stays in network order.
    network: bool,
    /// At an offset from the end of an IPv4 header (X is its length).
    header: bool,
}

impl Load {
    /// Where it ends; behind a header that this is one without options. None where that is beyond every packet.
    fn usual_end(&self) -> Option<u32> {
        let k = match self.offset {
            Offset::Absolute(k) => k,
            Offset::Indexed(k) => k.wrapping_add(IP_HEADER),
        };
        k.checked_add(self.size)
    }
}

/// What a load of so many bytes is called.
fn width(size: u32) -> Size {
    match size {
        1 => Size::B,
        2 => Size::H,
        _ => Size::W,
    }
}

/// A slow load that is written behind the code.
struct Slow {
    entry: Label,
    back: Label,
    load: Load,
    checked: bool,
}

/// The right side of a comparison of whole registers.
#[derive(Clone, Copy)]
enum Right {
    Reg(Reg),
    Imm(i32),
}

struct Writer {
    asm: Assembler,
    mode: LoadMode,
    ops: Vec<Op>,
    reachable: Vec<bool>,
    known: Known,
    short: bool,
    /// Where each operation of the version being written begins.
    labels: Vec<Label>,
    /// The version being written need not check loads that end up to here.
    unchecked: u32,
    /// The `return 0` behind the version being written, once something goes there.
    zero: Option<Label>,
    slow: Vec<Slow>,
    /// Where the program goes in the end; none: it returns its value.
    exits: Option<by_copy::Exits>,
}

impl Writer {
    fn new(program: &Program, mode: LoadMode, asm: Assembler) -> Self {
        let ops: Vec<Op> = program.ops().collect();
        let reachable = reachable(&ops);
        Writer {
            asm,
            mode,
            known: Known::of(&ops, &reachable),
            reachable,
            short: ops.len() <= SHORT,
            ops,
            labels: Vec::new(),
            unchecked: 0,
            zero: None,
            slow: Vec::new(),
            exits: None,
        }
    }

    fn far_load(&self) -> FarLoad {
        match self.mode {
            LoadMode::ByBlock { far, .. } | LoadMode::ByPacket { far } => far,
            LoadMode::ByCast { .. } => FarLoad::Subprogram,
            LoadMode::ByCopy { .. } => FarLoad::Nothing,
        }
    }

    /// The load that is at this place.
    fn load_at(&self, at: usize) -> Option<Load> {
        let (size, offset, header_length) = match self.ops[at] {
            Op::Load { size, offset } => (size, offset, false),
            Op::HeaderLength { k } => (1, Offset::Absolute(k), true),
            _ => return None,
        };
        Some(Load {
            size,
            offset,
            header_length,
            network: self.known.network[at].is_some(),
            header: self.known.header[at] && matches!(offset, Offset::Indexed(_)),
        })
    }

    /// The loads that can be reached.
    fn loads(&self) -> impl Iterator<Item = Load> + '_ {
        let reached = (0..self.ops.len()).filter(|at| self.reachable[*at]);
        reached.filter_map(|at| self.load_at(at))
    }

    fn program(&mut self) {
        let reach = self.unchecked_reach();
        if self.far_load() != FarLoad::Nothing && self.loads().next().is_some() {
            self.asm
                .push(Insn::store(Size::Dw, Reg::Fp, SLOT_SOURCE, Reg::R3));
        }
        if self.ops.iter().any(Op::asks_length) {
            self.asm
                .push(Insn::store(Size::Dw, Reg::Fp, SLOT_LENGTH, Reg::R4));
        }
        self.asm.push(Insn::alu32_imm(Alu::Mov, A, 0));
        self.asm.push(Insn::alu32_imm(Alu::Mov, X, 0));

        if reach > 0 {
            let careful = self.asm.label();
            if let LoadMode::ByPacket { .. } = self.mode {
                self.asm.push(Insn::alu64(Alu::Mov, T, DATA));
                self.asm.push(Insn::alu64_imm(Alu::Add, T, reach as i32));
                self.asm.jump_if(T, Cond::Gt, END, careful);
            } else {
                self.asm.jump_if_imm(END, Cond::Lt, reach as i32, careful);
            }
            self.version(reach);
            self.asm.place(careful);
        }
        self.version(0);
    }

    /// How far the version without checks reaches; 0 where it would not pay.
    fn unchecked_reach(&self) -> u32 {
        let limit = match self.mode {
            LoadMode::ByBlock { size, .. } => size.min(UNCHECKED_REACH),
            LoadMode::ByPacket { .. } | LoadMode::ByCast { .. } | LoadMode::ByCopy { .. } => {
                UNCHECKED_REACH
            }
        };
        let ends: Vec<u32> = self
            .loads()
            .filter(|load| match load.offset {
                Offset::Absolute(_) => true,
                Offset::Indexed(_) => load.header && matches!(self.mode, LoadMode::ByCast { .. }),
            })
            .filter_map(|load| load.usual_end().filter(|end| *end <= limit))
            .collect();
        match ends.iter().max() {
            Some(reach) if self.short && ends.len() > 1 => *reach,
            _ => 0,
        }
    }

    /// The whole program once, with the slow loads and the `return 0` that it needs behind it.
    fn version(&mut self, unchecked: u32) {
        self.unchecked = unchecked;
        self.zero = None;
        self.labels = self.ops.iter().map(|_| self.asm.label()).collect();
        for at in 0..self.ops.len() {
            if self.reachable[at] {
                self.asm.place(self.labels[at]);
                self.op(at, self.ops[at]);
            }
        }
        for slow in std::mem::take(&mut self.slow) {
            self.asm.place(slow.entry);
            self.slow_load(slow.load, slow.checked);
            self.asm.jump(slow.back);
        }
        if let Some(zero) = self.zero {
            self.asm.place(zero);
            self.return_zero();
        }
    }

    fn return_zero(&mut self) {
        if let Some(exits) = self.exits {
            return self.leave(exits.fails);
        }
        self.asm.push(Insn::alu32_imm(Alu::Mov, Reg::R0, 0));
        self.asm.push(Insn::exit());
    }

    fn compare(&mut self, left: Reg, cond: Cond, right: Right, to: Label) {
        match right {
            Right::Reg(right) => self.asm.jump_if(left, cond, right, to),
            Right::Imm(right) => self.asm.jump_if_imm(left, cond, right, to),
        }
    }

    /// Returns 0 where the condition holds. In a long program on the spot, as the end may be out of a jump's reach.
    fn fail_if(&mut self, left: Reg, cond: Cond, right: Right) {
        if self.short {
            let zero = match self.zero {
                Some(zero) => zero,
                None => self.asm.label(),
            };
            self.zero = Some(zero);
            self.compare(left, cond, right, zero);
        } else {
            let (fail, go_on) = (self.asm.label(), self.asm.label());
            self.compare(left, cond, right, fail);
            self.asm.jump(go_on);
            self.asm.place(fail);
            self.return_zero();
            self.asm.place(go_on);
        }
    }

    /// Returns 0, in a way that leaves what follows reachable for the verifier's first pass.
    fn fail(&mut self) {
        self.fail_if(A, Cond::Ge, Right::Imm(0));
    }

    fn op(&mut self, at: usize, op: Op) {
        let register = |acc: Acc| match acc {
            Acc::A => A,
            Acc::X => X,
        };
        let word = |word: u32| SLOT_WORDS - 4 * word as i16;
        match op {
            Op::Load { .. } | Op::HeaderLength { .. } => {
                let load = self.load_at(at);
                self.load(load.expect("it is a load"));
            }
            Op::Set { to, value } => self.asm.push(match value {
                Value::Constant(k) => Insn::alu32_imm(Alu::Mov, register(to), k),
                Value::Word(k) => Insn::load(Size::W, register(to), Reg::Fp, word(k)),
                Value::Length => Insn::load(Size::W, register(to), Reg::Fp, SLOT_LENGTH),
            }),
            Op::Store { from, word: k } => {
                self.asm
                    .push(Insn::store(Size::W, Reg::Fp, word(k), register(from)));
            }
            Op::Alu { op, operand } => self.alu(op, operand),
            Op::Neg => self.asm.push(Insn::alu32_imm(Alu::Neg, A, 0)),
            Op::TakeX => self.asm.push(Insn::alu32(Alu::Mov, A, X)),
            Op::GiveX => self.asm.push(Insn::alu32(Alu::Mov, X, A)),
            Op::Jump { k: 0 } => {}
            Op::Jump { k } => self.asm.jump(self.labels[at + 1 + k as usize]),
            Op::Branch {
                cond,
                operand,
                jt,
                jf,
            } => {
                let jt = (jt > 0).then(|| self.labels[at + 1 + usize::from(jt)]);
                let jf = (jf > 0).then(|| self.labels[at + 1 + usize::from(jf)]);
                let operand = match (operand, self.known.network[at]) {
                    (Operand::K(k), Some(2)) => Operand::K(
                        // Equal to no load otherwise.
                        u16::try_from(k).map_or(k, |k| k.swap_bytes().into()),
                    ),
                    (Operand::K(k), Some(_)) => Operand::K(k.swap_bytes()),
                    (operand, _) => operand,
                };
                self.branch(cond, operand, jt, jf);
            }
            Op::Return(value) => match (self.exits, value) {
                (Some(exits), Operand2::K(k)) => self.leave_with(exits, k),
                (Some(exits), Operand2::A) => self.leave_with_a(exits),
                (None, value) => {
                    if let Operand2::K(k) = value {
                        self.asm.push(Insn::alu32_imm(Alu::Mov, Reg::R0, k));
                    }
                    self.asm.push(Insn::exit());
                }
            },
        }
    }

    fn alu(&mut self, op: u16, operand: Operand) {
        let name = match op {
            cbpf::ALU_ADD => Alu::Add,
            cbpf::ALU_SUB => Alu::Sub,
            cbpf::ALU_MUL => Alu::Mul,
            cbpf::ALU_DIV => Alu::Div,
            cbpf::ALU_OR => Alu::Or,
            cbpf::ALU_AND => Alu::And,
            cbpf::ALU_LSH => Alu::Lsh,
            cbpf::ALU_RSH => Alu::Rsh,
            cbpf::ALU_MOD => Alu::Mod,
            _ => Alu::Xor,
        };
        match (operand, name) {
            (Operand::K(k), _) => self.asm.push(Insn::alu32_imm(name, A, k)),
            (Operand::X, Alu::Lsh | Alu::Rsh) => {
                self.asm.push(Insn::alu32(Alu::Mov, T, X));
                self.asm.push(Insn::alu32_imm(Alu::And, T, 31));
                self.asm.push(Insn::alu32(name, A, T));
            }
            (Operand::X, _) => {
                if matches!(name, Alu::Div | Alu::Mod) {
                    self.fail_if(X, Cond::Eq, Right::Imm(0));
                }
                self.asm.push(Insn::alu32(name, A, X));
            }
        }
    }

    /// `jt` and `jf`: where to go, none for what follows.
    fn branch(&mut self, cond: u16, operand: Operand, jt: Option<Label>, jf: Option<Label>) {
        if jt == jf {
            if let Some(to) = jt {
                self.asm.jump(to);
            }
            return;
        }
        let (yes, no) = match cond {
            cbpf::JMP_EQ => (Cond::Eq, Some(Cond::Ne)),
            cbpf::JMP_GT => (Cond::Gt, Some(Cond::Le)),
            cbpf::JMP_GE => (Cond::Ge, Some(Cond::Lt)),
            _ => (Cond::Set, None),
        };
        let mut jump_if = |cond: Cond, to: Label| match operand {
            Operand::K(k) => self.asm.jump32_if_imm(A, cond, k, to),
            Operand::X => self.asm.jump32_if(A, cond, X, to),
        };
        match (jt, jf, no) {
            (Some(jt), None, _) => jump_if(yes, jt),
            (None, Some(jf), Some(no)) => jump_if(no, jf),
            (None, jf, _) => {
                let next = self.asm.label();
                self.branch(cond, operand, Some(next), jf);
                self.asm.place(next);
            }
            (Some(jt), Some(jf), _) => {
                jump_if(yes, jt);
                self.asm.jump(jf);
            }
        }
    }

    /// Bytes of the packet to A or X, the fast way where it reaches.
    fn load(&mut self, load: Load) {
        if let Some(exits) = self.exits {
            return self.copied_load(load, exits);
        }
        if let (LoadMode::ByBlock { size, .. }, Offset::Absolute(cbpf::VLAN_TAG)) =
            (self.mode, load.offset)
        {
            // Just behind the block (np_filter_tagged).
            let tag = Insn::load(width(load.size), A, DATA, size as i16);
            self.asm.push(tag);
            self.finish_load(load, A, true);
            return;
        }
        let slow = self.asm.label();
        if let (LoadMode::ByCast { .. }, Offset::Indexed(k)) = (self.mode, load.offset) {
            let checked = self.typed_load(k, load, slow);
            self.rejoin(load, slow, checked);
            return;
        }
        let Some((base, off)) = self.fast_address(load, slow) else {
            // Out of the fast way's reach for every packet.
            match (self.far_load(), load.offset) {
                (FarLoad::Nothing, _) => self.fail(),
                (_, Offset::Absolute(k)) if k.checked_add(load.size).is_none() => self.fail(),
                _ => self.slow_load(load, false),
            }
            return;
        };
        if matches!(self.mode, LoadMode::ByCast { .. }) && by_cast::is_split(load) {
            self.load_bytes(base, off, load);
        } else {
            let to = if load.header_length { X } else { A };
            self.asm.push(Insn::load(width(load.size), to, base, off));
            self.finish_load(load, to, true);
        }
        self.rejoin(load, slow, true);
    }

    /// Behind a load the fast way: the slow one, if anything goes there, and back. `checked`: as for `slow_load`.
    fn rejoin(&mut self, load: Load, slow: Label, checked: bool) {
        if !self.asm.is_used(slow) {
            return;
        }
        let back = self.asm.label();
        if self.short {
            self.asm.place(back);
            self.slow.push(Slow {
                entry: slow,
                back,
                load,
                checked,
            });
        } else {
            self.asm.jump(back);
            self.asm.place(slow);
            self.slow_load(load, checked);
            self.asm.place(back);
        }
    }

    /// The checks of a load and where its bytes are then: a register and an offset. A packet that it does not reach
    /// is sent to `slow`, or returns 0 where nothing lies beyond. None where no packet can be reached so.
    fn fast_address(&mut self, load: Load, slow: Label) -> Option<(Reg, i16)> {
        let Load { size, offset, .. } = load;
        match (self.mode, offset) {
            (LoadMode::ByBlock { size: block, .. }, Offset::Absolute(k)) => {
                let end = k.checked_add(size).filter(|end| *end <= block)?;
                if end > self.unchecked {
                    self.leave_if(END, Cond::Lt, Right::Imm(end as i32), slow);
                }
                Some((DATA, i16::try_from(k).ok()?))
            }
            (LoadMode::ByBlock { size: block, .. }, Offset::Indexed(k)) => {
                let last = block.checked_sub(size)?;
                self.index(k);
                // First what keeps the verifier content, then what the packet has.
                self.leave_if(T, Cond::Gt, Right::Imm(last as i32), slow);
                self.end_of(size);
                self.leave_if(T2, Cond::Gt, Right::Reg(END), slow);
                self.asm.push(Insn::alu64(Alu::Add, T, DATA));
                Some((T, 0))
            }
            (LoadMode::ByCast { .. }, Offset::Absolute(k)) => {
                let end = k.checked_add(size).filter(|end| *end <= TYPED_SIZE)?;
                if end > self.unchecked {
                    self.typed_check(end, slow);
                }
                Some((DATA, i16::try_from(k).ok()?))
            }
            // `load` has its own way for it: a cast.
            (LoadMode::ByCast { .. }, Offset::Indexed(_)) | (LoadMode::ByCopy { .. }, _) => None,
            (LoadMode::ByPacket { .. }, Offset::Absolute(k)) => {
                let end = k
                    .checked_add(size)
                    .filter(|end| *end <= MAX_PACKET_OFFSET)?;
                if end <= self.unchecked {
                    return Some((DATA, i16::try_from(k).ok()?));
                }
                self.asm.push(Insn::alu64(Alu::Mov, T, DATA));
                self.asm.push(Insn::alu64_imm(Alu::Add, T, end as i32));
                self.leave_if(T, Cond::Gt, Right::Reg(END), slow);
                Some((T, -(size as i16)))
            }
            (LoadMode::ByPacket { .. }, Offset::Indexed(k)) => {
                self.index(k);
                let last = MAX_PACKET_OFFSET - size;
                self.leave_if(T, Cond::Gt, Right::Imm(last as i32), slow);
                self.asm.push(Insn::alu64(Alu::Add, T, DATA));
                self.end_of(size);
                self.leave_if(T2, Cond::Gt, Right::Reg(END), slow);
                Some((T, 0))
            }
        }
    }

    /// T = X + k, in 32 bits. The constant first: to a copy of X plus a constant the verifier ties what it learns of
    /// either, and in 6.12 loses the bounds over it.
    fn index(&mut self, k: u32) {
        if k == 0 {
            self.asm.push(Insn::alu32(Alu::Mov, T, X));
        } else {
            self.asm.push(Insn::alu32_imm(Alu::Mov, T, k));
            self.asm.push(Insn::alu32(Alu::Add, T, X));
        }
    }

    /// T2 = T + size, for the reason above the constant first.
    fn end_of(&mut self, size: u32) {
        self.asm.push(Insn::alu32_imm(Alu::Mov, T2, size));
        self.asm.push(Insn::alu64(Alu::Add, T2, T));
    }

    /// To the slow way where the condition holds, or out where there is none.
    fn leave_if(&mut self, left: Reg, cond: Cond, right: Right, slow: Label) {
        if self.far_load() == FarLoad::Nothing {
            self.fail_if(left, cond, right);
        } else {
            self.compare(left, cond, right, slow);
        }
    }

    /// A load to A, byte by byte, where no wider one is allowed.
    fn load_bytes(&mut self, base: Reg, off: i16, load: Load) {
        self.asm.push(Insn::load(Size::B, A, base, off));
        for more in 1..load.size as i16 {
            self.asm.push(Insn::alu32_imm(Alu::Lsh, A, 8));
            self.asm.push(Insn::load(Size::B, T, base, off + more));
            self.asm.push(Insn::alu32(Alu::Or, A, T));
        }
        self.finish_load(load, A, false);
    }

    /// The order that is asked for, and for a header length the rest of its arithmetic.
    fn finish_load(&mut self, load: Load, to: Reg, network_order: bool) {
        if network_order != load.network && load.size > 1 {
            self.asm.push(Insn::from_be(to, 8 * load.size as i32));
        }
        if load.header_length {
            self.asm.push(Insn::alu32_imm(Alu::And, to, 0xf));
            self.asm.push(Insn::alu32_imm(Alu::Lsh, to, 2));
        }
    }
}
