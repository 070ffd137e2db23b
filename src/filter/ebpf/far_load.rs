//! Loads by a call: what the fast way does not reach.

use super::super::cbpf::Offset;
use super::{
    A, DATA, END, FarLoad, LOAD_CALL, Load, LoadMode, Right, SLOT_A, SLOT_BYTES, SLOT_DATA,
    SLOT_END, SLOT_SOURCE, SLOT_X, T, T2, Writer, X, width,
};
use crate::insn::asm::{
    Alu, Cond, HELPER_PROBE_READ_KERNEL, HELPER_SKB_LOAD_BYTES, HELPER_XDP_LOAD_BYTES, Insn, Reg,
    Size,
};

impl Writer {
    /// A load by a call; what the call destroys is kept on the stack. `checked`: it was seen that the bytes do not lie in one piece
    /// with the packet's first.
    pub(super) fn slow_load(&mut self, load: Load, checked: bool) {
        let far = self.far_load();
        let mut kept = vec![(X, SLOT_X)];
        if !matches!(self.mode, LoadMode::ByCast { .. }) {
            kept.push((END, SLOT_END));
        }
        if !matches!(self.mode, LoadMode::ByBlock { size: 0, .. }) {
            kept.push((DATA, SLOT_DATA));
        }
        if load.header_length {
            kept.push((A, SLOT_A));
        }
        for (reg, slot) in &kept {
            self.asm.push(Insn::store(Size::Dw, Reg::Fp, *slot, *reg));
        }
        // In a long program the verifier would have too many ways to follow.
        if let (LoadMode::ByCast { data_len }, true) = (self.mode, checked && self.short) {
            self.fail_without_more(data_len);
        }
        match load.offset {
            Offset::Absolute(k) => self.asm.push(Insn::alu32_imm(Alu::Mov, T, k)),
            Offset::Indexed(k) => self.index(k),
        }
        if far == FarLoad::ProbeRead {
            self.end_of(load.size);
            self.fail_if(T2, Cond::Gt, Right::Reg(END));
        }
        let source = |to: Reg| Insn::load(Size::Dw, to, Reg::Fp, SLOT_SOURCE);
        let bytes = |to: Reg| {
            [
                Insn::alu64(Alu::Mov, to, Reg::Fp),
                Insn::alu64_imm(Alu::Add, to, SLOT_BYTES.into()),
            ]
        };
        match far {
            FarLoad::Nothing | FarLoad::ProbeRead => {
                self.asm.push(source(Reg::R1));
                self.asm.push(Insn::alu64(Alu::Add, Reg::R3, Reg::R1));
                self.asm.extend(bytes(Reg::R1));
                self.asm.push(Insn::alu32_imm(Alu::Mov, Reg::R2, load.size));
                self.asm.push(Insn::call(HELPER_PROBE_READ_KERNEL));
            }
            FarLoad::XdpLoad | FarLoad::SkbLoad => {
                self.asm.push(Insn::alu64(Alu::Mov, Reg::R2, T));
                self.asm.push(source(Reg::R1));
                self.asm.extend(bytes(Reg::R3));
                self.asm.push(Insn::alu32_imm(Alu::Mov, Reg::R4, load.size));
                self.asm.push(Insn::call(if far == FarLoad::XdpLoad {
                    HELPER_XDP_LOAD_BYTES
                } else {
                    HELPER_SKB_LOAD_BYTES
                }));
            }
            FarLoad::Subprogram => {
                self.asm.push(Insn::alu64(Alu::Mov, Reg::R1, T));
                self.asm.push(Insn::alu32_imm(Alu::Mov, Reg::R2, load.size));
                self.asm.push(source(Reg::R3));
                self.asm.push(Insn::call_subprogram(LOAD_CALL));
            }
        }
        let to = if load.header_length { X } else { A };
        let by_value = far == FarLoad::Subprogram;
        let failed = if by_value { Cond::Slt } else { Cond::Ne };
        self.fail_if(Reg::R0, failed, Right::Imm(0));
        for (reg, slot) in &kept {
            if *reg != to && *reg != A {
                self.asm.push(Insn::load(Size::Dw, *reg, Reg::Fp, *slot));
            }
        }
        if by_value {
            self.asm.push(Insn::alu32(Alu::Mov, to, Reg::R0));
        } else {
            let size = width(load.size);
            self.asm.push(Insn::load(size, to, Reg::Fp, SLOT_BYTES));
        }
        self.finish_load(load, to, !by_value);
        if load.header_length {
            self.asm.push(Insn::load(Size::Dw, A, Reg::Fp, SLOT_A));
        }
    }
}
