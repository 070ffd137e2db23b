//! The filter of an sk_buff where there are no typed loads. A read of kernel memory costs some 80 instructions there, and 7 for each 8
//! bytes: so it has two, and copies to the stack no more of the packet than the expression may ask for. It says only what is certain; what
//! these bytes do not tell is left to the filter that can load anything.
//!
//! A packet begins with an Ethernet header where its length lies between the offsets of the link and the network header
//! (np_is_ethernet); with tags in between it is left to the other filter.

use anyhow::Result;

use super::super::cbpf::{Offset, Op, Program};
use super::{A, END, IP_HEADER, Load, LoadMode, SHORT, UNSET, Writer, X, YES_BARE, width};
use crate::bpf::skb::types::np_filter_answer;
use crate::insn::asm::{Alu, Assembler, Cond, HELPER_PROBE_READ_KERNEL, Insn, Label, Reg, Size};
use crate::kernel::features::SkbFields;

/// What the subprogram returns, beside YES_BARE.
const NO: u32 = np_filter_answer::NP_FILTER_NO.0;
const YES: u32 = np_filter_answer::NP_FILTER_YES.0;
const UNSURE: u32 = np_filter_answer::NP_FILTER_UNSURE.0;

/// Bytes of an Ethernet header: so far behind the copy's beginning lies the IP header.
const LINK: u32 = 14;
/// What a packet must have, so that loads up to here need no check: the headers of Ethernet and IPv4.
const UNCHECKED: u32 = LINK + IP_HEADER;

/// The longest copy.
const LONGEST: u32 = 96;
/// Where it is on the stack: its IP header is aligned, as the verifier wants loads from there to be. Short, as the frames of all
/// functions that call each other share 512 bytes: a program with scratch words has no such form.
const COPY: i16 = LINEAR - LONGEST as i16 - 6;
/// Where the packet's bytes in one piece are kept.
const LINEAR: i16 = -8;
/// Where the sk_buff's fields are: its head and 16 bytes before it.
const FIELDS: i16 = COPY - 2 - (HEAD + 8);
const HEAD: i16 = 16;

/// The ends of a program over a copy: what it returns, and where it goes where these bytes do not tell.
#[derive(Clone, Copy)]
pub(super) struct Exits {
    matches: u32,
    pub(super) fails: u32,
    unsure: Label,
}

/// The body of a subprogram `u64 stub(struct sk_buff *)`. None where a copy does not help, or the fields lie apart.
pub fn translate_by_copy(
    l2: &Program,
    l3: &Program,
    fields: SkbFields,
) -> Result<Option<Vec<Insn>>> {
    let base = |base| LoadMode::ByCopy { base };
    let mut writer = Writer::new(l2, base(0), Assembler::default());
    let mut ends = writer.copied_ends();
    writer = Writer::new(l3, base(LINK), Assembler::default());
    ends.append(&mut writer.copied_ends());
    let Some(reach) = ends.into_iter().max() else {
        return Ok(None);
    };
    let before_head = i16::try_from(fields.head - fields.network_header)?;
    let other = |op: Op| op.asks_length() || matches!(op, Op::Store { .. });
    let simple = |p: &Program| p.ops().count() <= SHORT / 4 && !p.ops().any(other);
    if !simple(l2) || !simple(l3) || before_head > HEAD {
        return Ok(None);
    }

    let mut asm = Assembler::default();
    let [without_link, unsure] = std::array::from_fn(|_| asm.label());
    let first = Insn::alu64(Alu::Mov, Reg::R3, Reg::R1);
    let at = fields.head as i32 - i32::from(HEAD);
    asm.extend([first, Insn::alu64_imm(Alu::Add, Reg::R3, at)]);
    read(&mut asm, FIELDS, HEAD as u32 + 8);
    // A read that fails leaves zeros, and the packet is none of both kinds.
    let mut field = |to, size, at| asm.push(Insn::load(size, to, Reg::Fp, FIELDS + at));
    field(Reg::R2, Size::H, HEAD - before_head);
    field(Reg::R1, Size::H, HEAD - before_head + 2);
    field(Reg::R4, Size::W, HEAD - before_head + 4);
    field(Reg::R3, Size::Dw, HEAD);

    let checked = reach.min(UNCHECKED);
    // Something of the IP header in any case.
    let len = reach.max(LINK + 1).next_multiple_of(8).min(LONGEST);
    asm.jump_if_imm(Reg::R1, Cond::Eq, UNSET as i32, without_link);
    asm.push(Insn::alu64(Alu::Sub, Reg::R2, Reg::R1));
    asm.jump_if_imm(Reg::R2, Cond::Ne, LINK as i32, unsure);
    asm.push(Insn::alu64(Alu::Sub, Reg::R4, Reg::R1));
    asm.push(Insn::alu64(Alu::Add, Reg::R3, Reg::R1));
    copy(&mut asm, 0, len, checked, reach, unsure);
    for (program, at, yes) in [(l2, 0, YES), (l3, LINK, YES_BARE)] {
        if at == LINK {
            asm.place(without_link);
            // As if a link header were there.
            asm.push(Insn::alu64(Alu::Sub, Reg::R4, Reg::R2));
            asm.push(Insn::alu64_imm(Alu::Add, Reg::R4, LINK as i32));
            asm.push(Insn::alu64(Alu::Add, Reg::R3, Reg::R2));
            copy(&mut asm, LINK, len, checked, reach, unsure);
        }
        let mut writer = Writer::new(program, base(at), asm);
        writer.exits = Some(Exits {
            matches: yes,
            fails: NO,
            unsure,
        });
        writer.clear(LONGEST - at);
        writer.version(checked);
        asm = writer.asm;
    }
    asm.place(unsure);
    asm.push(Insn::alu32_imm(Alu::Mov, Reg::R0, UNSURE));
    asm.push(Insn::exit());
    Ok(Some(asm.finish()?))
}

/// Reads from the address in r3.
fn read(asm: &mut Assembler, to: i16, len: u32) {
    asm.push(Insn::alu64(Alu::Mov, Reg::R1, Reg::Fp));
    asm.push(Insn::alu64_imm(Alu::Add, Reg::R1, to.into()));
    asm.push(Insn::alu32_imm(Alu::Mov, Reg::R2, len));
    asm.push(Insn::call(HELPER_PROBE_READ_KERNEL));
}

/// Copies the packet at the address in r3, all that is behind the first `skip` bytes of the copy, where so many as it takes lie in one
/// piece: r4. That is in `END` then, where a load asks for it.
fn copy(asm: &mut Assembler, skip: u32, len: u32, checked: u32, reach: u32, unsure: Label) {
    asm.jump_if_imm(Reg::R4, Cond::Slt, checked as i32, unsure);
    let asked = reach > checked;
    if asked {
        asm.push(Insn::store(Size::Dw, Reg::Fp, LINEAR, Reg::R4));
    }
    read(asm, COPY + skip as i16, len - skip);
    asm.jump_if_imm(Reg::R0, Cond::Ne, 0, unsure);
    if asked {
        asm.push(Insn::load(Size::Dw, END, Reg::Fp, LINEAR));
    }
}

impl Writer {
    /// Where a load ends in the copy; None where it cannot be in there.
    fn copied_end(&self, load: Load) -> Option<u32> {
        let LoadMode::ByCopy { base } = self.mode else {
            return None;
        };
        let end = load.usual_end()?.checked_add(base)?;
        (end <= LONGEST).then_some(end)
    }

    fn copied_ends(&self) -> Vec<u32> {
        let ends = self.loads().filter_map(|load| self.copied_end(load));
        ends.collect()
    }

    /// Returns a constant.
    pub(super) fn leave(&mut self, value: u32) {
        self.asm.push(Insn::alu32_imm(Alu::Mov, Reg::R0, value));
        self.asm.push(Insn::exit());
    }

    /// The program returns this constant.
    pub(super) fn leave_with(&mut self, exits: Exits, value: u32) {
        self.leave(if value == 0 {
            exits.fails
        } else {
            exits.matches
        });
    }

    /// The program returns A.
    pub(super) fn leave_with_a(&mut self, exits: Exits) {
        let fails = self.asm.label();
        self.asm.jump_if_imm(A, Cond::Eq, 0, fails);
        self.leave(exits.matches);
        self.asm.place(fails);
        self.leave(exits.fails);
    }

    /// A load from the copy, in host order; else it is not certain what the program says.
    pub(super) fn copied_load(&mut self, load: Load, exits: Exits) {
        let to = if load.header_length { X } else { A };
        if let Offset::Indexed(_) = load.offset {
            let header = IP_HEADER as i32;
            self.asm.jump_if_imm(X, Cond::Ne, header, exits.unsure);
        }
        let Some(end) = self.copied_end(load) else {
            // Always so, but what follows must look as if it could be reached.
            self.asm.jump_if_imm(A, Cond::Ge, 0, exits.unsure);
            return;
        };
        if end > self.unchecked {
            self.asm
                .jump_if_imm(END, Cond::Lt, end as i32, exits.unsure);
        }
        let at = COPY + (end - load.size) as i16;
        let bytes = |size, to, at| Insn::load(width(size), to, Reg::Fp, at);
        if at % load.size as i16 == 0 {
            self.asm.push(bytes(load.size, to, at));
            self.finish_load(load, to, true);
            return;
        }
        self.load_bytes(Reg::Fp, at, load);
    }
}
