//! What an instruction reads, changes, computes, and where it goes: for whoever changes code that is there.

use super::asm::*;

/// The second operand of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operand {
    Imm(i32),
    /// a register's number
    Reg(u8),
}

impl Insn {
    /// `src` of a 64-bit constant that is the address of a map's value (BPF_PSEUDO_MAP_VALUE).
    pub const MAP_VALUE: u8 = 2;

    fn class(self) -> u8 {
        self.code & 0x07
    }

    fn op(self) -> u8 {
        self.code & 0xf0
    }

    /// Instructions of eight bytes that it takes.
    pub fn width(self) -> usize {
        1 + usize::from(self.is_load_imm64())
    }

    pub fn is_exit(self) -> bool {
        self.code == CLASS_JMP | EXIT
    }

    /// `goto`
    pub fn is_unconditional(self) -> bool {
        self.code == CLASS_JMP | JA
    }

    /// Goes somewhere, or reads something, that the methods here do not tell.
    pub fn is_unusual(self) -> bool {
        match self.class() {
            // Of a jump without a condition also the one by a register.
            CLASS_JMP => self.op() == JCOND || self.op() == JA && self.code & SRC_X != 0,
            CLASS_JMP32 => self.op() == JA,
            // Loads that acquire.
            CLASS_STX => self.code & 0xe0 == MODE_ATOMIC && self.imm == 0x100,
            // Of the class of 64-bit constants and their second halves; others load from an sk_buff.
            0x00 => !matches!(self.code, 0x18 | 0),
            _ => false,
        }
    }

    /// Where a jump at this place goes.
    pub fn target(self, at: usize) -> usize {
        (at + 1).wrapping_add_signed(self.off.into())
    }

    /// First instruction of the function that is called at this place, or whose address is taken.
    pub fn callee(self, at: usize) -> Option<usize> {
        let callback = self.is_load_imm64() && self.src() == PSEUDO_FUNC;
        (self.is_subprogram_call() || callback)
            .then(|| (at + 1).wrapping_add_signed(self.imm as isize))
    }

    /// What the second operand is.
    pub fn operand(self) -> Operand {
        match self.code & SRC_X {
            0 => Operand::Imm(self.imm),
            _ => Operand::Reg(self.src()),
        }
    }

    /// Does nothing but to set a register.
    pub fn is_pure(self) -> bool {
        matches!(self.class(), CLASS_ALU | CLASS_ALU64) || self.is_load_imm64()
    }

    /// Registers that it may read, a bit each.
    pub fn reads(self) -> u16 {
        let (dst, src) = (1 << self.dst(), 1 << self.src());
        let operand = if self.code & SRC_X == 0 { 0 } else { src };
        match (self.class(), self.op()) {
            (CLASS_LDX, _) => src,
            (CLASS_ST, _) => dst,
            // r0 by a compare and exchange
            (CLASS_STX, _) => dst | src | 1,
            (CLASS_ALU | CLASS_ALU64, op) if op == Alu::Mov as u8 => operand,
            (CLASS_ALU | CLASS_ALU64, END) => dst,
            (CLASS_ALU | CLASS_ALU64, _) => dst | operand,
            // from r1 on
            (CLASS_JMP, CALL) => match self.src() {
                0 => (2 << helper_arguments(self.imm)) - 2,
                _ => 0x3e,
            },
            (CLASS_JMP, EXIT) => 1,
            (CLASS_JMP, JA) => 0,
            (CLASS_JMP | CLASS_JMP32, _) => dst | operand,
            _ => 0,
        }
    }

    /// Registers that it may change, a bit each; all of them are read before, or changed for certain.
    pub fn writes(self) -> u16 {
        let (dst, src) = (1 << self.dst(), 1 << self.src());
        match self.class() {
            CLASS_LDX | CLASS_ALU | CLASS_ALU64 => dst,
            CLASS_STX if self.code & 0xe0 == MODE_ATOMIC => src | 1,
            // r0 to r5
            CLASS_JMP if self.op() == CALL => 0x3f,
            _ if self.is_load_imm64() => dst,
            _ => 0,
        }
    }

    /// `dst = operand`, 64 bits
    pub fn is_move64(self) -> bool {
        self.class() == CLASS_ALU64 && self.op() == Alu::Mov as u8 && self.off == 0
    }

    /// `dst += operand`, 64 bits
    pub fn is_add64(self) -> bool {
        self.class() == CLASS_ALU64 && self.op() == Alu::Add as u8
    }

    /// Bytes that it loads from memory, without a sign.
    pub fn loads(self) -> Option<usize> {
        let bytes = match self.code & 0x18 {
            0x00 => 4,
            0x08 => 2,
            0x10 => 1,
            _ => 8,
        };
        (self.class() == CLASS_LDX && self.code & 0xe0 == MODE_MEM).then_some(bytes)
    }

    /// What sets the register that it sets to this number; `None`: no single instruction does.
    pub fn instead(self, number: u64) -> Option<Self> {
        let imm = u32::try_from(number).ok()? as i32;
        let class = if imm < 0 { CLASS_ALU } else { CLASS_ALU64 };
        Some(Self {
            code: class | Alu::Mov as u8,
            regs: self.dst(),
            off: 0,
            imm,
        })
    }

    /// What an ALU instruction gives; `None`: it is not known here. `left`: what `dst` holds.
    pub fn computes(self, left: Option<u64>, right: u64) -> Option<u64> {
        let wide = match self.class() {
            CLASS_ALU64 => true,
            CLASS_ALU => false,
            _ => return None,
        };
        // Divisions and moves with a sign have something here.
        if self.off != 0 {
            return None;
        }
        if self.op() == Alu::Mov as u8 {
            return Some(if wide { right } else { right & 0xffff_ffff });
        }
        let (left, right) = match wide {
            true => (left?, right),
            false => (left? & 0xffff_ffff, right & 0xffff_ffff),
        };
        let shift = right as u32 & if wide { 63 } else { 31 };
        let result = match self.op() {
            op if op == Alu::Add as u8 => left.wrapping_add(right),
            op if op == Alu::Sub as u8 => left.wrapping_sub(right),
            op if op == Alu::And as u8 => left & right,
            op if op == Alu::Or as u8 => left | right,
            op if op == Alu::Xor as u8 => left ^ right,
            op if op == Alu::Lsh as u8 => left << shift,
            op if op == Alu::Rsh as u8 => left >> shift,
            _ => return None,
        };
        Some(if wide { result } else { result & 0xffff_ffff })
    }

    /// Does a conditional jump happen with these operands?
    pub fn holds(self, left: u64, right: u64) -> Option<bool> {
        let (left, right, signed_left, signed_right) = match self.class() {
            CLASS_JMP => (left, right, left as i64, right as i64),
            _ => {
                let (left, right) = (left as u32, right as u32);
                let signed = |n: u32| i64::from(n as i32);
                (left.into(), right.into(), signed(left), signed(right))
            }
        };
        let cond = |cond: Cond| cond as u8 == self.op();
        Some(match () {
            () if cond(Cond::Eq) => left == right,
            () if cond(Cond::Ne) => left != right,
            () if cond(Cond::Set) => left & right != 0,
            () if cond(Cond::Gt) => left > right,
            () if cond(Cond::Ge) => left >= right,
            () if cond(Cond::Lt) => left < right,
            () if cond(Cond::Le) => left <= right,
            () if cond(Cond::Sgt) => signed_left > signed_right,
            () if cond(Cond::Sge) => signed_left >= signed_right,
            () if cond(Cond::Slt) => signed_left < signed_right,
            () if cond(Cond::Sle) => signed_left <= signed_right,
            () => return None,
        })
    }

    /// The conditional jump that happens where this one does not.
    pub fn negated(self) -> Option<Self> {
        const PAIRS: [(Cond, Cond); 5] = [
            (Cond::Eq, Cond::Ne),
            (Cond::Gt, Cond::Le),
            (Cond::Ge, Cond::Lt),
            (Cond::Sgt, Cond::Sle),
            (Cond::Sge, Cond::Slt),
        ];
        let both = PAIRS.into_iter().chain(PAIRS.map(|(a, b)| (b, a)));
        let mut other = both.filter(|(cond, _)| self.is_jump() && *cond as u8 == self.op());
        let (_, other) = other.next()?;
        Some(Self {
            code: self.code & 0x0f | other as u8,
            ..self
        })
    }
}

/// How many registers a helper takes; all five where it is not told here.
fn helper_arguments(id: i32) -> u32 {
    match id {
        // bpf_ktime_get_ns, bpf_get_smp_processor_id, bpf_get_current_pid_tgid, bpf_get_current_uid_gid, bpf_get_current_task,
        // bpf_get_current_cgroup_id
        5 | 8 | 14 | 15 | 35 | 80 => 0,
        // bpf_get_func_ip, bpf_xdp_get_buff_len
        173 | 188 => 1,
        // bpf_map_lookup_elem, bpf_map_delete_elem, bpf_get_current_comm, bpf_ringbuf_query
        1 | 3 | 16 | 134 => 2,
        // bpf_tail_call, bpf_probe_read_user
        12 | 112 | HELPER_PROBE_READ_KERNEL => 3,
        // bpf_map_update_elem, bpf_ringbuf_output
        2 | 130 | HELPER_SKB_LOAD_BYTES | HELPER_XDP_LOAD_BYTES => 4,
        _ => 5,
    }
}
