//! The whole filter of an sk_buff by typed loads (bpf_rdonly_cast): its fields, then the packet, without a copy and without a call in
//! the end. A load is 8 machine instructions so. What the kernel's sk_buff looks like, the caller says.
//!
//! Registers as in `ebpf`, but for the number of bytes in one piece, which is on the stack: a cast destroys r1 to r5 as the verifier
//! sees it, so that what lasts is kept there only where it is needed behind one.

use anyhow::Result;

use super::super::cbpf::{Acc, Offset, Op, Operand, Operand2, Program};
use super::{
    A, CAST_CALL, DATA, IP_HEADER, Load, LoadMode, Right, SLOT_ADDRESS, SLOT_DATA, SLOT_END,
    SLOT_SOURCE, SLOT_X, T, T2, TYPED_LEAD, UNSET, Writer, X, YES_BARE, width,
};
use crate::insn::asm::{Alu, Assembler, Cond, Insn, Label, Reg, Size};
use crate::kernel::features::SkbFields;

/// The body of a subprogram `u64 stub(struct sk_buff *)` that returns 0 for no match: `l2` for a packet with a link header, `l3` for
/// one without. Neither may ask for the packet's length.
pub fn translate_by_cast(l2: &Program, l3: &Program, fields: SkbFields) -> Result<Vec<Insn>> {
    let mut asm = Assembler::default();
    let without_link = asm.label();
    let mode = LoadMode::ByCast {
        data_len: fields.data_len,
    };
    asm.push(Insn::store(Size::Dw, Reg::Fp, SLOT_SOURCE, Reg::R1));
    // The struct begins with 16 bits.
    let lead = fields.network_header - TYPED_LEAD;
    asm.push(Insn::alu64_imm(Alu::Add, Reg::R1, lead as i32));
    cast(&mut asm);
    let at = |field: u32| (field - lead) as i16;
    let mut field = |size, to, field| asm.push(Insn::load(size, to, Reg::R0, at(field)));
    // network_header, mac_header, tail: 16, 16 and 32 bits
    field(Size::Dw, Reg::R4, fields.network_header);
    field(Size::Dw, Reg::R1, fields.head);
    // A link header that is not set; or one that is not Ethernet's, with up to two tags (np_is_ethernet).
    let with_link = asm.label();
    asm.jump32_if_imm(Reg::R4, Cond::Ge, UNSET << 16, without_link);
    asm.push(Insn::alu32(Alu::Mov, Reg::R2, Reg::R4));
    asm.push(Insn::alu32_imm(Alu::Rsh, Reg::R2, 16));
    asm.push(Insn::alu32(Alu::Mov, Reg::R5, Reg::R4));
    asm.push(Insn::alu32_imm(Alu::And, Reg::R5, 0xffff));
    asm.push(Insn::alu32(Alu::Sub, Reg::R5, Reg::R2));
    asm.jump_if_imm(Reg::R5, Cond::Eq, 14, with_link);
    asm.jump_if_imm(Reg::R5, Cond::Eq, 18, with_link);
    asm.jump_if_imm(Reg::R5, Cond::Ne, 22, without_link);
    asm.place(with_link);
    let mut writer = Writer::new(l2, mode, asm);
    writer.packet(true);
    let mut asm = writer.asm;
    asm.place(without_link);
    let mut writer = Writer::new(&l3.returning(YES_BARE), mode, asm);
    writer.packet(false);
    writer.asm.finish()
}

/// r0 = r1 as a typed pointer; `inject` fills in what is called.
fn cast(asm: &mut Assembler) {
    asm.push(Insn::alu32_imm(Alu::Mov, Reg::R2, CAST_CALL as u32));
    asm.push(Insn::call_kfunc(CAST_CALL));
}

/// Does it load bytes of both the struct's first member and its array?
pub(super) fn is_split(load: Load) -> bool {
    let Some(end) = load.usual_end() else {
        return false;
    };
    end > TYPED_LEAD && end - load.size < TYPED_LEAD
}

impl Writer {
    /// The program, from the head's address in r1 and the fields in r4 on: 16 bits where the IP header is, 16 where the link header is, 32
    /// where the linear part ends. `link`: the packet begins with the latter.
    fn packet(&mut self, link: bool) {
        let reach = self.unchecked_reach();
        let loads = self.loads().next().is_some();
        let far = self.loads().any(|load| self.asks_end(load, reach));
        if loads {
            self.asm.push(Insn::alu32(Alu::Mov, Reg::R2, Reg::R4));
            self.asm.push(if link {
                Insn::alu32_imm(Alu::Rsh, Reg::R2, 16)
            } else {
                Insn::alu32_imm(Alu::And, Reg::R2, 0xffff)
            });
            self.asm.push(Insn::alu64_imm(Alu::Rsh, Reg::R4, 32));
            self.asm.push(Insn::alu64(Alu::Sub, Reg::R4, Reg::R2));
            self.asm.push(Insn::alu64(Alu::Add, Reg::R1, Reg::R2));
        }
        if reach > 0 {
            let careful = self.asm.label();
            if far {
                self.keep_packet();
            }
            self.asm
                .jump_if_imm(Reg::R4, Cond::Slt, reach as i32, careful);
            self.begin(reach);
            self.version(reach);
            self.asm.place(careful);
        }
        if loads {
            let some = self.asm.label();
            self.asm.jump_if_imm(Reg::R4, Cond::Sge, 0, some);
            self.asm.push(Insn::alu32_imm(Alu::Mov, Reg::R4, 0));
            self.asm.place(some);
            self.keep_packet();
        }
        self.begin(0);
        self.version(0);
    }

    fn keep_packet(&mut self) {
        for (slot, reg) in [(SLOT_END, Reg::R4), (SLOT_ADDRESS, Reg::R1)] {
            self.asm.push(Insn::store(Size::Dw, Reg::Fp, slot, reg));
        }
    }

    /// The typed pointer, A and X.
    fn begin(&mut self, reach: u32) {
        if self.loads().next().is_some() {
            cast(&mut self.asm);
            self.asm.push(Insn::alu64(Alu::Mov, DATA, Reg::R0));
        }
        self.clear(reach);
    }

    /// A and X are 0 where they are asked for before they are set.
    pub(super) fn clear(&mut self, reach: u32) {
        for (reg, asked) in [A, X].into_iter().zip(self.asked_unset(reach)) {
            if asked {
                self.asm.push(Insn::alu32_imm(Alu::Mov, reg, 0));
            }
        }
    }

    /// May a load need to know where the packet is and ends, in the version that does not check up to `reach`?
    fn asks_end(&self, load: Load, reach: u32) -> bool {
        let usual = matches!(load.offset, Offset::Absolute(_)) || load.header && !is_split(load);
        !usual || load.usual_end().is_none_or(|end| end > reach)
    }

    /// May a load leave the fast way in the version that does not check up to `reach`?
    fn may_be_slow(&self, load: Load, reach: u32) -> bool {
        match load.offset {
            Offset::Absolute(k) => k.checked_add(load.size).is_none_or(|end| end > reach),
            Offset::Indexed(_) => true,
        }
    }

    /// Are A and X read on some way on which nothing set them? A slow load saves both.
    fn asked_unset(&self, reach: u32) -> [bool; 2] {
        let mut unset = vec![[false; 2]; self.ops.len() + 1];
        unset[0] = [true; 2];
        let mut asked = [false; 2];
        for (at, op) in self.ops.iter().enumerate() {
            if !self.reachable[at] {
                continue;
            }
            let slow = self.load_at(at);
            let slow = [slow.is_some_and(|load| self.may_be_slow(load, reach)); 2];
            let with = |a: bool, operand: &Operand| [a, matches!(operand, Operand::X)];
            let index = |acc: &Acc| usize::from(matches!(acc, Acc::X));
            let mut read = [false; 2];
            let mut set = [false; 2];
            match op {
                Op::Load { .. } => (read, set[0]) = (slow, true),
                Op::HeaderLength { .. } => (read, set[1]) = (slow, true),
                Op::Set { to, .. } => set[index(to)] = true,
                Op::Store { from, .. } => read[index(from)] = true,
                Op::Alu { operand, .. } | Op::Branch { operand, .. } => read = with(true, operand),
                Op::Neg => read[0] = true,
                Op::TakeX => (read[1], set[0]) = (true, true),
                Op::GiveX => (read[0], set[1]) = (true, true),
                Op::Return(value) => read[0] = matches!(value, Operand2::A),
                Op::Jump { .. } => {}
            }
            let mut behind = unset[at];
            for i in 0..2 {
                asked[i] |= read[i] && unset[at][i];
                behind[i] &= !set[i];
            }
            let ways: [Option<usize>; 2] = match *op {
                Op::Return(_) => [None, None],
                Op::Jump { k } => [Some(k as usize), None],
                Op::Branch { jt, jf, .. } => [Some(jt.into()), Some(jf.into())],
                _ => [Some(0), None],
            };
            for way in ways.into_iter().flatten() {
                for i in 0..2 {
                    unset[at + 1 + way][i] |= behind[i];
                }
            }
        }
        asked
    }

    /// Returns 0 where the packet has no more than what lies in one piece: so it is for an sk_buff that is being made, which nearly
    /// every packet once is, and a call costs four times as much as all the rest. X is kept, in its slot too.
    pub(super) fn fail_without_more(&mut self, data_len: u32) {
        let source = Insn::load(Size::Dw, Reg::R1, Reg::Fp, SLOT_SOURCE);
        self.asm.push(source);
        let at = data_len as i32 - TYPED_LEAD as i32;
        self.asm.push(Insn::alu64_imm(Alu::Add, Reg::R1, at));
        cast(&mut self.asm);
        let more = Insn::load(Size::W, T, Reg::R0, TYPED_LEAD as i16);
        self.asm.push(more);
        self.fail_if(T, Cond::Eq, Right::Imm(0));
        self.asm.push(Insn::load(Size::Dw, X, Reg::Fp, SLOT_X));
    }

    /// To `slow` where fewer bytes than this lie in one piece.
    pub(super) fn typed_check(&mut self, end: u32, slow: Label) {
        self.asm.push(Insn::load(Size::Dw, T2, Reg::Fp, SLOT_END));
        self.asm.jump_if_imm(T2, Cond::Lt, end as i32, slow);
    }

    /// A load at X + k. Gives true where `slow` is for what does not lie in one piece alone.
    pub(super) fn typed_load(&mut self, k: u32, load: Load, slow: Label) -> bool {
        if !self.asks_end(load, self.unchecked) {
            let header = IP_HEADER as i32;
            self.asm.jump_if_imm(X, Cond::Ne, header, slow);
            let at = k.wrapping_add(IP_HEADER) as i16;
            self.asm.push(Insn::load(width(load.size), A, DATA, at));
            self.finish_load(load, A, true);
            return false;
        }
        // Through a pointer of its own: no variable may be added to a typed one.
        self.index(k);
        self.asm.push(Insn::load(Size::Dw, T2, Reg::Fp, SLOT_END));
        self.asm
            .push(Insn::alu64_imm(Alu::Sub, T2, load.size as i32));
        self.asm.jump_if(T, Cond::Sgt, T2, slow);
        for (slot, reg) in [(SLOT_X, X), (SLOT_DATA, DATA)] {
            self.asm.push(Insn::store(Size::Dw, Reg::Fp, slot, reg));
        }
        self.asm
            .push(Insn::load(Size::Dw, Reg::R1, Reg::Fp, SLOT_ADDRESS));
        self.asm.push(Insn::alu64(Alu::Add, Reg::R1, T));
        let lead = -(TYPED_LEAD as i32);
        self.asm.push(Insn::alu64_imm(Alu::Add, Reg::R1, lead));
        cast(&mut self.asm);
        self.asm
            .push(Insn::load(width(load.size), A, Reg::R0, TYPED_LEAD as i16));
        self.asm.push(Insn::load(Size::Dw, X, Reg::Fp, SLOT_X));
        self.asm
            .push(Insn::load(Size::Dw, DATA, Reg::Fp, SLOT_DATA));
        self.finish_load(load, A, true);
        true
    }
}
