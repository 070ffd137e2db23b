//! Takes out of a program what its constants switch off, before the kernel sees it. The verifier does so too, but it checks first and then
//! moves all that lies behind each piece that it takes out; and it leaves the loads of the constants, which then happen at every
//! hit. Must not know what the instructions do.
//!
//! Constants are what lies in maps that programs only read (.rodata). One walk over each function finds what registers hold and
//! which jumps are decided by it (conditional constant propagation), another which results nobody uses (liveness).

use std::collections::BTreeSet;
use std::ops::Range;

use anyhow::{Context, Result, ensure};

use super::code::Code;
use crate::insn::asm::{Alu, Insn, Reg};
use crate::insn::effects::Operand;

/// Maps that programs only read: a file descriptor and the bytes.
#[derive(Debug, Default)]
pub(super) struct Constants(pub Vec<(i32, Vec<u8>)>);

impl Constants {
    fn number(&self, map: i32, offset: u64, bytes: usize) -> Option<u64> {
        let (_, value) = self.0.iter().find(|(fd, _)| *fd == map)?;
        let start = usize::try_from(offset).ok()?;
        let mut number = [0; 8];
        number[..bytes].copy_from_slice(value.get(start..start.checked_add(bytes)?)?);
        Some(u64::from_le_bytes(number))
    }
}

/// What a register holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Value {
    Any,
    Number(u64),
    /// the address of a constant: a map's file descriptor, bytes from the beginning of its value
    Place(i32, u64),
}

type Registers = [Value; 11];

/// Where a jump goes.
#[derive(Clone, Copy, Debug)]
enum Target {
    /// an instruction of the old code
    Old(usize),
    /// code that is never reached
    Dead,
}

/// An instruction that stays.
struct Op {
    /// where it was
    old: usize,
    insn: Insn,
    /// the second half of a 64-bit constant
    more: Option<Insn>,
    jump: Option<Target>,
}

/// Shortens the program; one that is not understood stays as it is.
pub(super) fn prune(code: &mut Code, constants: &Constants) {
    // What is wrong with it the verifier tells better.
    if let Ok(shorter) = shortened(code, constants) {
        *code = shorter;
    }
}

fn shortened(code: &Code, constants: &Constants) -> Result<Code> {
    ensure!(
        code.functions.first().is_some_and(|(_, first)| *first == 0)
            && !code.insns.iter().any(|insn| insn.is_unusual()),
        "not understood"
    );
    let ranges: Vec<Range<usize>> = (0..code.functions.len())
        .map(|i| code.functions[i].1..code.functions.get(i + 1).map_or(code.insns.len(), |f| f.1))
        .collect();
    let mut flows: Vec<Option<Dataflow>> = ranges.iter().map(|_| None).collect();
    let mut left = vec![0];
    while let Some(function) = left.pop() {
        if flows[function].is_none() {
            let flow = Dataflow::of(&code.insns, ranges[function].clone(), constants);
            for callee in flow.callees(&code.insns) {
                left.push(function_at(&code.functions, callee)?);
            }
            flows[function] = Some(flow);
        }
    }
    // The kernel wants each function to be called from somewhere; which of them only from where nothing comes, it finds.
    let unused: Vec<usize> = (0..flows.len()).filter(|&i| flows[i].is_none()).collect();
    let hub = match unused.is_empty() {
        true => None,
        false => {
            let mut jumps = flows.iter().enumerate();
            let hub = jumps.find_map(|(i, flow)| Some((i, flow.as_ref()?.spare(&code.insns)?)));
            Some(hub.context("functions that nobody calls, and no jump to call them from")?)
        }
    };

    let mut bodies = Vec::new();
    for (i, flow) in flows.iter().enumerate() {
        let keep = hub.and_then(|(function, jump)| (function == i).then_some(jump));
        bodies.push(match flow {
            Some(flow) => flow.ops(&code.insns, keep),
            None => Vec::new(),
        });
    }
    // The code behind the jump that never happens: it calls what nobody calls.
    let dead = unused.len() + 2;
    let length = |i: usize| match (&bodies[i], hub) {
        (body, _) if body.is_empty() => 2,
        (body, Some((function, _))) if function == i => size(body) + dead,
        (body, _) => size(body),
    };
    let mut starts = Vec::new();
    let mut at = 0;
    for i in 0..bodies.len() {
        starts.push(at);
        at += length(i);
    }

    let mut insns = Vec::with_capacity(at);
    let nothing = [Insn::alu64_imm(Alu::Mov, Reg::R0, 0), Insn::exit()];
    for (i, body) in bodies.iter().enumerate() {
        if body.is_empty() {
            insns.extend(nothing);
            continue;
        }
        let places = places(body, starts[i]);
        let end = starts[i] + size(body);
        for (op, &place) in body.iter().zip(&places) {
            let mut insn = op.insn;
            if let Some(target) = op.jump {
                let to = match target {
                    Target::Dead => end,
                    Target::Old(old) => {
                        let inside = ranges[i].contains(&old);
                        let op = body.partition_point(|op| op.old < old);
                        let to = places.get(op).filter(|_| inside);
                        *to.context("a jump leaves its function")?
                    }
                };
                insn.off = i16::try_from(to as i64 - place as i64 - 1).context("a jump too far")?;
            }
            if let Some(callee) = insn.callee(op.old) {
                let to = starts[function_at(&code.functions, callee)?];
                insn.imm = i32::try_from(to as i64 - place as i64 - 1)?;
            }
            insns.push(insn);
            insns.extend(op.more);
        }
        if hub.is_some_and(|(function, _)| function == i) {
            for &function in &unused {
                let distance = starts[function] as i64 - insns.len() as i64 - 1;
                insns.push(Insn::call_subprogram(i32::try_from(distance)?));
            }
            insns.extend(nothing);
        }
    }
    let names = code.functions.iter().map(|(name, _)| name.clone());
    Ok(Code {
        insns,
        functions: names.zip(starts).collect(),
    })
}

/// The function that begins at this instruction.
fn function_at(functions: &[(String, usize)], first: usize) -> Result<usize> {
    functions
        .binary_search_by_key(&first, |(_, first)| *first)
        .ok()
        .context("a call goes to no function")
}

/// Instructions, of eight bytes each.
fn size(body: &[Op]) -> usize {
    body.iter()
        .map(|op| 1 + usize::from(op.more.is_some()))
        .sum()
}

/// Where each begins.
fn places(body: &[Op], start: usize) -> Vec<usize> {
    let mut at = start;
    let place = |op: &Op| {
        let place = at;
        at += 1 + usize::from(op.more.is_some());
        place
    };
    body.iter().map(place).collect()
}

/// What can happen in a function.
struct Dataflow {
    range: Range<usize>,
    reached: Vec<bool>,
    /// what a conditional jump that can be reached always does
    decided: Vec<Option<bool>>,
    /// what a load always gives
    loaded: Vec<Option<u64>>,
}

impl Dataflow {
    fn of(insns: &[Insn], range: Range<usize>, constants: &Constants) -> Self {
        let start = range.start;
        let mut flow = Self {
            reached: vec![false; range.len()],
            decided: vec![None; range.len()],
            loaded: vec![None; range.len()],
            range: range.clone(),
        };
        // What is found in the registers where ways meet or part.
        let mut before: Vec<Option<Box<Registers>>> = vec![None; range.len()];
        let mut meets = vec![false; range.len()];
        for at in range.clone().filter(|&at| insns[at].is_jump()) {
            // What lies outside is the verifier's to refuse.
            for to in [insns[at].target(at), at + 1] {
                if let Some(meets) = to.checked_sub(start).and_then(|i| meets.get_mut(i)) {
                    *meets = true;
                }
            }
        }
        before[0] = Some(Box::new([Value::Any; 11]));
        let mut left = BTreeSet::from([start]);
        while let Some(first) = left.pop_first() {
            let Some(mut registers) = before[first - start].as_deref().copied() else {
                continue;
            };
            let mut at = first;
            while at < range.end {
                let insn = insns[at];
                flow.reached[at - start] = true;
                let next = at + insn.width();
                let mut goes = [None; 2];
                if insn.is_jump() {
                    let taken = decide(insn, &registers);
                    flow.decided[at - start] = taken;
                    goes[0] = (taken != Some(true)).then_some(next);
                    goes[1] = (taken != Some(false)).then(|| insn.target(at));
                } else if !insn.is_exit() {
                    flow.loaded[at - start] =
                        step(insn, insns.get(at + 1), &mut registers, constants);
                    if meets.get(next - start) == Some(&false) {
                        at = next;
                        continue;
                    }
                    goes[0] = Some(next);
                }
                for to in goes.into_iter().flatten() {
                    let Some(before) = to.checked_sub(start).and_then(|i| before.get_mut(i)) else {
                        continue;
                    };
                    let changed = match before {
                        Some(before) => merge(before, &registers),
                        None => {
                            *before = Some(Box::new(registers));
                            true
                        }
                    };
                    if changed {
                        left.insert(to);
                    }
                }
                break;
            }
        }
        flow
    }

    fn reached(&self) -> impl Iterator<Item = usize> {
        self.range
            .clone()
            .zip(&self.reached)
            .filter_map(|(at, reached)| reached.then_some(at))
    }

    /// First instructions of the functions that can be called from here.
    fn callees(&self, insns: &[Insn]) -> Vec<usize> {
        self.reached()
            .filter_map(|at| insns[at].callee(at))
            .collect()
    }

    /// The last decided jump that can be turned into one that never happens.
    fn spare(&self, insns: &[Insn]) -> Option<usize> {
        let fit = |&at: &usize| match self.decided[at - self.range.start] {
            Some(true) => insns[at].negated().is_some(),
            Some(false) => true,
            None => false,
        };
        self.reached().filter(fit).last()
    }

    /// What stays of it. `keep`: the jump that stays although it never happens.
    fn ops(&self, insns: &[Insn], keep: Option<usize>) -> Vec<Op> {
        let mut ops = Vec::new();
        for at in self.reached() {
            let insn = insns[at];
            let mut op = Op {
                old: at,
                insn,
                more: (insn.width() == 2).then(|| insns[at + 1]),
                jump: insn.is_jump().then(|| Target::Old(insn.target(at))),
            };
            let decided = self.decided[at - self.range.start].filter(|_| insn.is_jump());
            if keep == Some(at) {
                ops.push(Op {
                    insn: match decided {
                        Some(true) => insn.negated().unwrap_or(insn),
                        _ => insn,
                    },
                    jump: Some(Target::Dead),
                    more: None,
                    old: at,
                });
            }
            match decided {
                Some(true) => op.insn = Insn::nop(),
                Some(false) => continue,
                None => {}
            }
            if let Some(mov) = self.loaded[at - self.range.start].and_then(|n| insn.instead(n)) {
                op.insn = mov;
            }
            ops.push(op);
        }
        without_unused(&mut ops);
        without_jumps_to_the_next(&mut ops);
        ops
    }
}

/// Takes out what computes something that nobody uses.
fn without_unused(ops: &mut Vec<Op>) {
    let next = |i: usize, ops: &[Op]| {
        let op = &ops[i];
        let jump = match op.jump {
            Some(Target::Old(old)) => Some(ops.partition_point(|op| op.old < old)),
            _ => None,
        };
        let falls = op.insn != Insn::nop() && !op.insn.is_exit();
        (falls.then_some(i + 1), jump)
    };
    let next: Vec<_> = (0..ops.len()).map(|i| next(i, ops)).collect();
    // Bits of registers that are used after, and before, each.
    let mut before = vec![0u16; ops.len() + 1];
    let unused = |op: &Op, after: u16| op.insn.is_pure() && after & op.insn.writes() == 0;
    let after = |i: usize, before: &[u16]| {
        let (falls, jump) = next[i];
        falls
            .into_iter()
            .chain(jump)
            .fold(0, |all, to| all | before[to])
    };
    let mut changed = true;
    while changed {
        changed = false;
        for (i, op) in ops.iter().enumerate().rev() {
            let after = after(i, &before);
            let now = match unused(op, after) {
                true => after,
                false => after & !op.insn.writes() | op.insn.reads(),
            };
            changed |= now != before[i];
            before[i] = now;
        }
    }
    let mut i = 0;
    ops.retain(|op| {
        let stays = !unused(op, after(i, &before));
        i += 1;
        stays
    });
}

fn without_jumps_to_the_next(ops: &mut Vec<Op>) {
    loop {
        let to_the_next = |i: usize| match (ops[i].insn == Insn::nop(), ops[i].jump) {
            (true, Some(Target::Old(old))) => ops.partition_point(|op| op.old < old) == i + 1,
            _ => false,
        };
        let stay: Vec<bool> = (0..ops.len()).map(|i| !to_the_next(i)).collect();
        if stay.iter().all(|stays| *stays) {
            return;
        }
        let mut stay = stay.into_iter();
        ops.retain(|_| stay.next() == Some(true));
    }
}

/// Keeps what both know. False: that is what the first knew.
fn merge(known: &mut Registers, other: &Registers) -> bool {
    let mut changed = false;
    for (to, from) in known.iter_mut().zip(other) {
        if to != from && *to != Value::Any {
            *to = Value::Any;
            changed = true;
        }
    }
    changed
}

/// What a jump does with these registers; `None`: it depends.
fn decide(insn: Insn, registers: &Registers) -> Option<bool> {
    if insn.is_unconditional() {
        return Some(true);
    }
    let Value::Number(left) = registers[insn.dst() as usize] else {
        return None;
    };
    let right = match insn.operand() {
        Operand::Imm(imm) => i64::from(imm) as u64,
        Operand::Reg(register) => match registers[register as usize] {
            Value::Number(number) => number,
            _ => return None,
        },
    };
    insn.holds(left, right)
}

/// The registers after an instruction. Gives back what a load of a constant gives.
fn step(
    insn: Insn,
    more: Option<&Insn>,
    registers: &mut Registers,
    constants: &Constants,
) -> Option<u64> {
    let dst = insn.dst() as usize;
    if insn.is_load_imm64() {
        let high = more.map_or(0, |more| more.imm);
        registers[dst] = match insn.src() {
            0 => Value::Number(u64::from(high as u32) << 32 | u64::from(insn.imm as u32)),
            Insn::MAP_VALUE => Value::Place(insn.imm, u64::from(high as u32)),
            _ => Value::Any,
        };
        return None;
    }
    if let Some(bytes) = insn.loads() {
        let loaded = match registers[insn.src() as usize] {
            Value::Place(map, offset) => {
                let at = offset.wrapping_add_signed(insn.off.into());
                constants.number(map, at, bytes)
            }
            _ => None,
        };
        registers[dst] = loaded.map_or(Value::Any, Value::Number);
        return loaded;
    }
    let operand = match insn.operand() {
        Operand::Imm(imm) => Value::Number(i64::from(imm) as u64),
        Operand::Reg(register) => registers[register as usize],
    };
    let result = match (registers[dst], operand) {
        (_, value) if insn.is_move64() => value,
        (Value::Place(map, offset), Value::Number(n)) if insn.is_add64() => {
            Value::Place(map, offset.wrapping_add(n))
        }
        (left, Value::Number(right)) => {
            let left = match left {
                Value::Number(left) => Some(left),
                _ => None,
            };
            insn.computes(left, right).map_or(Value::Any, Value::Number)
        }
        _ => Value::Any,
    };
    for (i, register) in registers.iter_mut().enumerate() {
        if insn.writes() & 1 << i != 0 {
            *register = Value::Any;
        }
    }
    if insn.is_pure() {
        registers[dst] = result;
    }
    None
}

#[cfg(test)]
mod tests;
