use proptest::prelude::*;

use super::*;
use crate::insn::asm::{Assembler, Cond, Size};

/// The map 7: bytes 1, 0, and the 32-bit number 0x80000001 at 4.
fn pruned(functions: &[&str], insns: Vec<Insn>) -> (Vec<String>, Vec<usize>) {
    let firsts = functions.iter().map(|text| {
        let (name, first) = text.split_once(' ').unwrap();
        (name.to_owned(), first.parse().unwrap())
    });
    let mut code = Code {
        insns,
        functions: firsts.collect(),
    };
    let constants = Constants(vec![(7, vec![1, 0, 0, 0, 1, 0, 0, 0x80])]);
    prune(&mut code, &constants);
    let text = code.insns.iter().map(Insn::to_string).collect();
    (
        text,
        code.functions.iter().map(|(_, first)| *first).collect(),
    )
}

/// `to` = the constant's byte at `offset`.
fn load(asm: &mut Assembler, to: Reg, offset: i16) {
    asm.extend(Insn::load_imm64(to, Insn::MAP_VALUE, 7, 0));
    asm.push(Insn::load(Size::B, to, to, offset));
}

#[test]
fn a_branch_that_is_switched_off_goes_with_the_load_that_says_so() {
    for (byte, kept) in [(0, "call helper#8"), (1, "call helper#5")] {
        let mut asm = Assembler::default();
        let (off, end) = (asm.label(), asm.label());
        load(&mut asm, Reg::R2, byte);
        asm.jump_if_imm(Reg::R2, Cond::Ne, 0, off);
        asm.push(Insn::call(5));
        asm.jump(end);
        asm.place(off);
        asm.push(Insn::call(8));
        asm.place(end);
        asm.push(Insn::exit());
        let (text, _) = pruned(&["main 0"], asm.finish().unwrap());
        assert_eq!(text, [kept, "exit"]);
    }
}

#[test]
fn what_is_used_stays_as_a_number() {
    let mut asm = Assembler::default();
    asm.extend(Insn::load_imm64(Reg::R6, Insn::MAP_VALUE, 7, 0));
    asm.push(Insn::load(Size::W, Reg::R0, Reg::R6, 4));
    asm.push(Insn::load(Size::B, Reg::R3, Reg::R6, 9));
    asm.push(Insn::load(Size::B, Reg::R4, Reg::R1, 0));
    asm.push(Insn::alu64_imm(Alu::Add, Reg::R5, 1));
    asm.push(Insn::exit());
    let (text, _) = pruned(&["main 0"], asm.finish().unwrap());
    // What lies outside the map is the verifier's to refuse; loads of other memory stay, used or not.
    assert_eq!(
        text,
        [
            "r6 = 0x7 ll",
            "(second half, 0x0)",
            "w0 = 0x80000001",
            "r3 = *(u8 *)(r6 +9)",
            "r4 = *(u8 *)(r1 +0)",
            "exit"
        ]
    );
}

#[test]
fn two_ways_that_differ_decide_nothing() {
    let mut asm = Assembler::default();
    let (other, both, end) = (asm.label(), asm.label(), asm.label());
    asm.push(Insn::alu64_imm(Alu::Mov, Reg::R6, 1));
    asm.jump_if_imm(Reg::R1, Cond::Eq, 5, other);
    asm.jump(both);
    asm.place(other);
    asm.push(Insn::alu64_imm(Alu::Mov, Reg::R6, 2));
    asm.place(both);
    asm.push(Insn::alu64_imm(Alu::Mov, Reg::R0, 0));
    asm.jump_if_imm(Reg::R6, Cond::Eq, 2, end);
    asm.push(Insn::alu64_imm(Alu::Mov, Reg::R0, 1));
    asm.place(end);
    asm.push(Insn::exit());
    let code = asm.finish().unwrap();
    let before: Vec<String> = code.iter().map(Insn::to_string).collect();
    assert_eq!(pruned(&["main 0"], code).0, before);
}

/// What a call takes is used; more than it takes is not.
#[test]
fn arguments_of_calls() {
    let mut asm = Assembler::default();
    for to in [Reg::R1, Reg::R2, Reg::R3, Reg::R4, Reg::R5] {
        load(&mut asm, to, 0);
    }
    asm.push(Insn::call(1));
    load(&mut asm, Reg::R1, 1);
    asm.push(Insn::call_kfunc(9));
    asm.push(Insn::exit());
    let (text, _) = pruned(&["main 0"], asm.finish().unwrap());
    let kept = [
        "r1 = 1",
        "r2 = 1",
        "call helper#1",
        "r1 = 0",
        "call helper#9",
        "exit",
    ];
    assert_eq!(text, kept);
}

/// A loop's counter is a number at first only.
#[test]
fn loops_stay() {
    let mut asm = Assembler::default();
    let (again, end) = (asm.label(), asm.label());
    asm.push(Insn::alu64_imm(Alu::Mov, Reg::R0, 0));
    asm.place(again);
    asm.jump_if_imm(Reg::R0, Cond::Ge, 8, end);
    asm.push(Insn::alu64_imm(Alu::Add, Reg::R0, 1));
    asm.jump(again);
    asm.place(end);
    asm.push(Insn::exit());
    let code = asm.finish().unwrap();
    let before: Vec<String> = code.iter().map(Insn::to_string).collect();
    assert_eq!(pruned(&["main 0"], code).0, before);
}

/// The kernel refuses functions that nobody calls: they shrink to nothing, called from where nothing comes.
#[test]
fn functions_of_a_branch_that_is_switched_off() {
    let mut asm = Assembler::default();
    let end = asm.label();
    load(&mut asm, Reg::R6, 1);
    asm.jump_if_imm(Reg::R6, Cond::Eq, 0, end);
    asm.push(Insn::call_subprogram(4)); // unused: 4 + 1 + 4
    asm.place(end);
    asm.push(Insn::call_subprogram(1)); // used: 5 + 1 + 1
    asm.push(Insn::exit());
    // used
    asm.push(Insn::exit());
    // also called by what nobody calls
    asm.push(Insn::exit());
    asm.push(Insn::call_subprogram(-3));
    asm.push(Insn::exit());
    let insns = asm.finish().unwrap();
    let (text, firsts) = pruned(&["main 0", "used 7", "unused 8"], insns);
    assert_eq!(
        text,
        [
            "r6 = 0",
            "if r6 != 0 goto +2",
            "call pc+4",
            "exit",
            "call pc+3",
            "r0 = 0",
            "exit",
            // used
            "exit",
            // unused
            "r0 = 0",
            "exit",
        ]
    );
    assert_eq!(firsts, [0, 7, 8]);
}

/// A step of a random program.
#[derive(Clone, Debug)]
enum Step {
    /// a constant's byte into a register
    Load(u8, u8),
    Compute(u8, u8, Result<u8, i32>),
    /// over so many steps
    Jump(u8, u8, Result<u8, i32>, u8),
    Skip(u8),
    /// r0 to r5 become what the arguments make them
    Call,
    Exit,
}

const OPS: [Alu; 8] = [
    Alu::Add,
    Alu::Sub,
    Alu::And,
    Alu::Or,
    Alu::Xor,
    Alu::Lsh,
    Alu::Rsh,
    Alu::Mov,
];
const CONDS: [Cond; 11] = [
    Cond::Eq,
    Cond::Gt,
    Cond::Ge,
    Cond::Set,
    Cond::Ne,
    Cond::Sgt,
    Cond::Sge,
    Cond::Lt,
    Cond::Le,
    Cond::Slt,
    Cond::Sle,
];
const REGISTERS: [Reg; 10] = [
    Reg::R0,
    Reg::R1,
    Reg::R2,
    Reg::R3,
    Reg::R4,
    Reg::R5,
    Reg::R6,
    Reg::R7,
    Reg::R8,
    Reg::R9,
];

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let register = 0..10u8;
    let operand = prop_oneof![
        register.clone().prop_map(Ok),
        (-3..4i32).prop_map(Err),
        any::<i32>().prop_map(Err)
    ];
    let step = prop_oneof![
        3 => (register.clone(), 0..8u8).prop_map(|(to, at)| Step::Load(to, at)),
        4 => (0..16u8, register.clone(), operand.clone()).prop_map(|(o, r, x)| Step::Compute(o, r, x)),
        4 => (0..22u8, register, operand, 0..6u8).prop_map(|(c, r, x, n)| Step::Jump(c, r, x, n)),
        1 => (0..6u8).prop_map(Step::Skip),
        1 => Just(Step::Call),
        1 => Just(Step::Exit),
    ];
    proptest::collection::vec(step, 0..40)
}

/// The upper half of the choices: 32 bits wide.
fn assemble(steps: &[Step]) -> Vec<Insn> {
    let mut asm = Assembler::default();
    let labels: Vec<_> = (0..=steps.len()).map(|_| asm.label()).collect();
    for (i, step) in steps.iter().enumerate() {
        asm.place(labels[i]);
        let over = |n: u8| labels[(i + 1 + usize::from(n)).min(steps.len())];
        let reg = |r: u8| REGISTERS[usize::from(r)];
        match *step {
            Step::Load(to, at) => load(&mut asm, reg(to), at.into()),
            Step::Compute(op, to, operand) => {
                let alu = OPS[usize::from(op % 8)];
                asm.push(match (op < 8, operand) {
                    (true, Ok(from)) => Insn::alu64(alu, reg(to), reg(from)),
                    (true, Err(imm)) => Insn::alu64_imm(alu, reg(to), imm),
                    (false, Ok(from)) => Insn::alu32(alu, reg(to), reg(from)),
                    (false, Err(imm)) => Insn::alu32_imm(alu, reg(to), imm as u32),
                });
            }
            Step::Jump(cond, left, operand, n) => {
                let (wide, cond) = (cond < 11, CONDS[usize::from(cond % 11)]);
                match (wide, operand) {
                    (true, Ok(right)) => asm.jump_if(reg(left), cond, reg(right), over(n)),
                    (true, Err(imm)) => asm.jump_if_imm(reg(left), cond, imm, over(n)),
                    (false, Ok(right)) => asm.jump32_if(reg(left), cond, reg(right), over(n)),
                    (false, Err(imm)) => asm.jump32_if_imm(reg(left), cond, imm as u32, over(n)),
                }
            }
            Step::Skip(n) => asm.jump(over(n)),
            Step::Call => asm.push(Insn::call(1)),
            Step::Exit => asm.push(Insn::exit()),
        }
    }
    asm.place(labels[steps.len()]);
    asm.push(Insn::exit());
    asm.finish().unwrap()
}

/// What a program without loops gives back, and the arguments of its calls.
fn run(insns: &[Insn], constants: &Constants, first: u64) -> Vec<u64> {
    let mut registers = [0u64; 11];
    for (i, register) in registers.iter_mut().enumerate() {
        *register = first.wrapping_mul(i as u64 + 1);
    }
    // A constant's address is told from a number by this.
    const ADDRESS: u64 = 0xffff_8880_0000_0000;
    let (mut at, mut told) = (0, Vec::new());
    loop {
        let insn = insns[at];
        let dst = usize::from(insn.dst());
        let right = match insn.operand() {
            Operand::Imm(imm) => i64::from(imm) as u64,
            Operand::Reg(register) => registers[usize::from(register)],
        };
        let mut next = at + insn.width();
        if insn.is_exit() {
            told.push(registers[0]);
            return told;
        } else if insn.is_load_imm64() {
            registers[dst] = ADDRESS;
        } else if let Some(bytes) = insn.loads() {
            let place = registers[usize::from(insn.src())].wrapping_sub(ADDRESS);
            let place = place.wrapping_add_signed(insn.off.into());
            registers[dst] = constants.number(7, place, bytes).unwrap();
        } else if insn.is_jump() {
            if insn.is_unconditional() || insn.holds(registers[dst], right).unwrap() {
                next = insn.target(at);
            }
        } else if insn == Insn::call(1) {
            // bpf_map_lookup_elem: two arguments.
            told.extend([registers[1], registers[2]]);
            let sum = registers[1].wrapping_add(registers[2]);
            registers[..6].fill(sum);
        } else {
            registers[dst] = insn.computes(Some(registers[dst]), right).unwrap();
        }
        at = next;
    }
}

proptest! {
    #[test]
    fn a_pruned_program_does_the_same(steps in steps(), first in any::<u64>()) {
        let constants = Constants(vec![(7, vec![1, 0, 0, 0, 1, 0, 0, 0x80])]);
        let mut code = Code { insns: assemble(&steps), functions: vec![("main".to_owned(), 0)] };
        let before = code.insns.clone();
        prune(&mut code, &constants);
        prop_assert!(code.insns.len() <= before.len());
        for first in [first, 0, 1] {
            prop_assert_eq!(
                run(&code.insns, &constants, first),
                run(&before, &constants, first)
            );
        }
    }
}
