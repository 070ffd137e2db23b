//! eBPF instructions: constructors, labels, text. Knows nothing of cBPF, packets or libbpf.

use std::fmt;

use anyhow::{Result, bail};

/// A register of eBPF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Reg {
    R0,
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    R9,
    Fp,
}

/// Width of a load or store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    B,
    H,
    W,
    Dw,
}

impl Size {
    /// The size bits of an opcode.
    fn bits(self) -> u8 {
        match self {
            Size::W => 0x00,
            Size::H => 0x08,
            Size::B => 0x10,
            Size::Dw => 0x18,
        }
    }

    pub fn bytes(self) -> u32 {
        match self {
            Size::B => 1,
            Size::H => 2,
            Size::W => 4,
            Size::Dw => 8,
        }
    }
}

/// Operations of the ALU classes (the upper four bits of an opcode).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Alu {
    Add = 0x00,
    Sub = 0x10,
    Mul = 0x20,
    Div = 0x30,
    Or = 0x40,
    And = 0x50,
    Lsh = 0x60,
    Rsh = 0x70,
    Neg = 0x80,
    Mod = 0x90,
    Xor = 0xa0,
    Mov = 0xb0,
    Arsh = 0xc0,
}

/// Conditions of the jump classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Cond {
    Eq = 0x10,
    Gt = 0x20,
    Ge = 0x30,
    Set = 0x40,
    Ne = 0x50,
    Sgt = 0x60,
    Sge = 0x70,
    Lt = 0xa0,
    Le = 0xb0,
    Slt = 0xc0,
    Sle = 0xd0,
}

pub(super) const CLASS_LDX: u8 = 0x01;
pub(super) const CLASS_ST: u8 = 0x02;
pub(super) const CLASS_STX: u8 = 0x03;
pub(super) const CLASS_ALU: u8 = 0x04;
pub(super) const CLASS_JMP: u8 = 0x05;
pub(super) const CLASS_JMP32: u8 = 0x06;
pub(super) const CLASS_ALU64: u8 = 0x07;
pub(super) const MODE_MEM: u8 = 0x60;
pub(super) const SRC_X: u8 = 0x08;
pub(super) const JA: u8 = 0x00;
pub(super) const CALL: u8 = 0x80;
pub(super) const EXIT: u8 = 0x90;
pub(super) const END: u8 = 0xd0;
pub(super) const PSEUDO_CALL: u8 = 1;
pub(super) const PSEUDO_KFUNC_CALL: u8 = 2;
/// `src` of a 64-bit constant that is the distance to a function (a callback).
pub(super) const PSEUDO_FUNC: u8 = 4;
pub(super) const MODE_ATOMIC: u8 = 0xc0;
/// A jump by `may_goto`.
pub(super) const JCOND: u8 = 0xe0;

/// One instruction, laid out as the kernel's `struct bpf_insn` on a little-endian machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Insn {
    pub code: u8,
    pub regs: u8,
    pub off: i16,
    pub imm: i32,
}

impl Insn {
    pub fn new(code: u8, dst: Reg, src: Reg, off: i16, imm: i32) -> Self {
        Insn {
            code,
            regs: dst as u8 | (src as u8) << 4,
            off,
            imm,
        }
    }

    pub fn dst(self) -> u8 {
        self.regs & 0xf
    }

    pub fn src(self) -> u8 {
        self.regs >> 4
    }

    /// `goto +0`: does nothing.
    pub fn nop() -> Self {
        Insn::new(CLASS_JMP | JA, Reg::R0, Reg::R0, 0, 0)
    }

    pub fn exit() -> Self {
        Insn::new(CLASS_JMP | EXIT, Reg::R0, Reg::R0, 0, 0)
    }

    /// A call of one of the kernel's helpers.
    pub fn call(helper: i32) -> Self {
        Insn::new(CLASS_JMP | CALL, Reg::R0, Reg::R0, 0, helper)
    }

    /// A call of a subprogram; `imm` is the distance, from the next instruction.
    pub fn call_subprogram(imm: i32) -> Self {
        Insn {
            regs: PSEUDO_CALL << 4,
            ..Insn::call(imm)
        }
    }

    /// A call of a function of the kernel's own; `imm` is its BTF id.
    pub fn call_kfunc(imm: i32) -> Self {
        Insn {
            regs: PSEUDO_KFUNC_CALL << 4,
            ..Insn::call(imm)
        }
    }

    pub fn is_kfunc_call(self) -> bool {
        self.code == CLASS_JMP | CALL && self.src() == PSEUDO_KFUNC_CALL
    }

    /// `dst = imm`, 32 or 64 bits
    pub fn is_move_imm(self) -> bool {
        let class = self.code & 0x07;
        matches!(class, CLASS_ALU | CLASS_ALU64) && self.code & 0xf8 == Alu::Mov as u8
    }

    pub fn is_subprogram_call(self) -> bool {
        self.code == CLASS_JMP | CALL && self.src() == PSEUDO_CALL
    }

    /// `dst = *(size *)(src + off)`
    pub fn load(size: Size, dst: Reg, src: Reg, off: i16) -> Self {
        Insn::new(CLASS_LDX | MODE_MEM | size.bits(), dst, src, off, 0)
    }

    /// `*(size *)(dst + off) = src`
    pub fn store(size: Size, dst: Reg, off: i16, src: Reg) -> Self {
        Insn::new(CLASS_STX | MODE_MEM | size.bits(), dst, src, off, 0)
    }

    /// `*(size *)(dst + off) = imm`
    pub fn store_imm(size: Size, dst: Reg, off: i16, imm: i32) -> Self {
        Insn::new(CLASS_ST | MODE_MEM | size.bits(), dst, Reg::R0, off, imm)
    }

    pub fn alu32(op: Alu, dst: Reg, src: Reg) -> Self {
        Insn::new(CLASS_ALU | op as u8 | SRC_X, dst, src, 0, 0)
    }

    pub fn alu32_imm(op: Alu, dst: Reg, imm: u32) -> Self {
        Insn::new(CLASS_ALU | op as u8, dst, Reg::R0, 0, imm as i32)
    }

    pub fn alu64(op: Alu, dst: Reg, src: Reg) -> Self {
        Insn::new(CLASS_ALU64 | op as u8 | SRC_X, dst, src, 0, 0)
    }

    /// `imm` is extended by its sign to 64 bits.
    pub fn alu64_imm(op: Alu, dst: Reg, imm: i32) -> Self {
        Insn::new(CLASS_ALU64 | op as u8, dst, Reg::R0, 0, imm)
    }

    /// The value of `bits` (16, 32 or 64) from network to host order.
    pub fn from_be(dst: Reg, bits: i32) -> Self {
        Insn::new(CLASS_ALU | END | SRC_X, dst, Reg::R0, 0, bits)
    }

    /// The two instructions of a 64-bit constant; `src` 1 is a map's descriptor, 2 a map's value.
    pub fn load_imm64(dst: Reg, src: u8, low: i32, high: i32) -> [Self; 2] {
        let first = Insn {
            code: 0x18,
            regs: dst as u8 | src << 4,
            off: 0,
            imm: low,
        };
        let second = Insn {
            code: 0,
            regs: 0,
            off: 0,
            imm: high,
        };
        [first, second]
    }

    /// Is it the first of the two instructions of a 64-bit constant?
    pub fn is_load_imm64(self) -> bool {
        self.code == 0x18
    }

    /// Does it jump inside its subprogram by `off`?
    pub fn is_jump(self) -> bool {
        let class = self.code & 0x07;
        let op = self.code & 0xf0;
        (class == CLASS_JMP && op != CALL && op != EXIT) || (class == CLASS_JMP32 && op != JA)
    }
}

impl fmt::Display for Insn {
    /// As `bpftool prog dump xlated` and the verifier write it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let class = self.code & 0x07;
        let op = self.code & 0xf0;
        let wide = class == CLASS_ALU64 || class == CLASS_JMP;
        let name = |n: u8| format!("{}{n}", if wide { 'r' } else { 'w' });
        let operand = if self.code & SRC_X != 0 {
            name(self.src())
        } else if wide {
            self.imm.to_string()
        } else {
            format!("{:#x}", self.imm)
        };
        let bits = match self.code & 0x18 {
            0x00 => 32,
            0x08 => 16,
            0x10 => 8,
            _ => 64,
        };
        match class {
            CLASS_LDX => write!(
                f,
                "r{} = *(u{bits} *)(r{} {:+})",
                self.dst(),
                self.src(),
                self.off
            ),
            CLASS_STX => write!(
                f,
                "*(u{bits} *)(r{} {:+}) = r{}",
                self.dst(),
                self.off,
                self.src()
            ),
            CLASS_ST => write!(
                f,
                "*(u{bits} *)(r{} {:+}) = {}",
                self.dst(),
                self.off,
                self.imm
            ),
            CLASS_ALU if op == END => write!(f, "r{0} = be{1} r{0}", self.dst(), self.imm),
            CLASS_ALU | CLASS_ALU64 => match alu_sign(op) {
                "-" if op == Alu::Neg as u8 => write!(f, "{0} = -{0}", name(self.dst())),
                sign => write!(f, "{} {sign} {operand}", name(self.dst())),
            },
            CLASS_JMP | CLASS_JMP32 => match op {
                JA => write!(f, "goto {:+}", self.off),
                CALL if self.src() == PSEUDO_CALL => write!(f, "call pc{:+}", self.imm),
                CALL => write!(f, "call {}", helper_name(self.imm)),
                EXIT => f.write_str("exit"),
                _ => write!(
                    f,
                    "if {} {} {operand} goto {:+}",
                    name(self.dst()),
                    cond_sign(op),
                    self.off
                ),
            },
            _ if self.is_load_imm64() => write!(f, "r{} = {:#x} ll", self.dst(), self.imm),
            _ => write!(f, "(second half, {:#x})", self.imm),
        }
    }
}

fn alu_sign(op: u8) -> &'static str {
    const SIGNS: [&str; 16] = [
        "+=", "-=", "*=", "/=", "|=", "&=", "<<=", ">>=", "-", "%=", "^=", "=", "s>>=", "?", "?",
        "?",
    ];
    SIGNS[usize::from(op >> 4)]
}

fn cond_sign(op: u8) -> &'static str {
    const SIGNS: [&str; 16] = [
        "?", "==", ">", ">=", "&", "!=", "s>", "s>=", "?", "?", "<", "<=", "s<", "s<=", "?", "?",
    ];
    SIGNS[usize::from(op >> 4)]
}

fn helper_name(id: i32) -> String {
    match id {
        HELPER_SKB_LOAD_BYTES => "bpf_skb_load_bytes".to_owned(),
        HELPER_PROBE_READ_KERNEL => "bpf_probe_read_kernel".to_owned(),
        HELPER_XDP_LOAD_BYTES => "bpf_xdp_load_bytes".to_owned(),
        other => format!("helper#{other}"),
    }
}

/// `bpf_skb_load_bytes(skb, offset, to, len)`
pub const HELPER_SKB_LOAD_BYTES: i32 = 26;
/// `bpf_probe_read_kernel(to, len, address)`, kernels from 5.5 on.
pub const HELPER_PROBE_READ_KERNEL: i32 = 113;
/// `bpf_xdp_load_bytes(xdp, offset, to, len)`, kernels from 5.18 on.
pub const HELPER_XDP_LOAD_BYTES: i32 = 189;

/// A place in the code that jumps go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label(usize);

/// Code being written: instructions, labels, and the jumps that wait for their label's place.
#[derive(Default)]
pub struct Assembler {
    insns: Vec<Insn>,
    places: Vec<Option<usize>>,
    jumps: Vec<(usize, Label)>,
}

impl Assembler {
    /// How many instructions there are so far.
    pub fn position(&self) -> usize {
        self.insns.len()
    }

    pub fn label(&mut self) -> Label {
        self.places.push(None);
        Label(self.places.len() - 1)
    }

    /// The label's place is here.
    pub fn place(&mut self, label: Label) {
        debug_assert!(self.places[label.0].is_none(), "a label is placed once");
        self.places[label.0] = Some(self.insns.len());
    }

    /// Does any jump go to it?
    pub fn is_used(&self, label: Label) -> bool {
        self.jumps.iter().any(|(_, to)| *to == label)
    }

    pub fn push(&mut self, insn: Insn) {
        self.insns.push(insn);
    }

    pub fn extend(&mut self, insns: impl IntoIterator<Item = Insn>) {
        self.insns.extend(insns);
    }

    pub fn jump(&mut self, to: Label) {
        self.branch(Insn::nop(), to);
    }

    /// Compares the whole registers.
    pub fn jump_if(&mut self, left: Reg, cond: Cond, right: Reg, to: Label) {
        self.branch(
            Insn::new(CLASS_JMP | cond as u8 | SRC_X, left, right, 0, 0),
            to,
        );
    }

    /// Compares the whole register; `right` is extended by its sign.
    pub fn jump_if_imm(&mut self, left: Reg, cond: Cond, right: i32, to: Label) {
        self.branch(
            Insn::new(CLASS_JMP | cond as u8, left, Reg::R0, 0, right),
            to,
        );
    }

    /// Compares the lower halves.
    pub fn jump32_if(&mut self, left: Reg, cond: Cond, right: Reg, to: Label) {
        self.branch(
            Insn::new(CLASS_JMP32 | cond as u8 | SRC_X, left, right, 0, 0),
            to,
        );
    }

    /// Compares the lower half.
    pub fn jump32_if_imm(&mut self, left: Reg, cond: Cond, right: u32, to: Label) {
        self.branch(
            Insn::new(CLASS_JMP32 | cond as u8, left, Reg::R0, 0, right as i32),
            to,
        );
    }

    fn branch(&mut self, insn: Insn, to: Label) {
        self.jumps.push((self.insns.len(), to));
        self.insns.push(insn);
    }

    /// The code with every jump's distance filled in.
    pub fn finish(mut self) -> Result<Vec<Insn>> {
        for (at, label) in self.jumps {
            let Some(place) = self.places[label.0] else {
                bail!("a jump goes to a label that has no place");
            };
            let distance = place as i64 - at as i64 - 1;
            match i16::try_from(distance) {
                Ok(off) => self.insns[at].off = off,
                Err(_) => bail!(
                    "the filter is too long: a jump over {distance} instructions, and eBPF allows 32767"
                ),
            }
        }
        Ok(self.insns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_as_bpftool_writes_it() {
        let text = |insn: Insn| insn.to_string();
        assert_eq!(
            text(Insn::load(Size::H, Reg::R0, Reg::R1, 12)),
            "r0 = *(u16 *)(r1 +12)"
        );
        assert_eq!(
            text(Insn::store(Size::Dw, Reg::Fp, -8, Reg::R3)),
            "*(u64 *)(r10 -8) = r3"
        );
        assert_eq!(
            text(Insn::alu32_imm(Alu::And, Reg::R0, 0xffff_0000)),
            "w0 &= 0xffff0000"
        );
        assert_eq!(text(Insn::alu64(Alu::Mov, Reg::R3, Reg::R1)), "r3 = r1");
        assert_eq!(text(Insn::alu32_imm(Alu::Neg, Reg::R0, 0)), "w0 = -w0");
        assert_eq!(text(Insn::from_be(Reg::R0, 16)), "r0 = be16 r0");
        assert_eq!(text(Insn::call(113)), "call bpf_probe_read_kernel");
        assert_eq!(text(Insn::call_subprogram(7)), "call pc+7");
    }

    #[test]
    fn jumps_are_filled_in_and_bounded() {
        let mut asm = Assembler::default();
        let end = asm.label();
        asm.jump32_if_imm(Reg::R0, Cond::Eq, 0x8000_0000, end);
        asm.push(Insn::nop());
        asm.place(end);
        asm.push(Insn::exit());
        let code = asm.finish().unwrap();
        assert_eq!(code[0].to_string(), "if w0 == 0x80000000 goto +1");

        let mut asm = Assembler::default();
        let end = asm.label();
        asm.jump(end);
        asm.extend(std::iter::repeat_n(Insn::nop(), 32768));
        asm.place(end);
        asm.push(Insn::exit());
        let error = asm.finish().unwrap_err().to_string();
        assert!(error.contains("too long"), "{error}");
    }
}
