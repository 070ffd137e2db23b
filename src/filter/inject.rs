//! Instructions in place of a stub: between a BPF object's preparation (maps made, code relocated, subprograms
//! appended) and its loading. Must not know what the instructions do.

use std::ptr::NonNull;

use anyhow::{Result, anyhow, bail, ensure};
use libbpf_rs::{AsRawLibbpf, OpenObject};
use libbpf_sys as sys;

use super::code::{Code, read, slice, write};
use super::ebpf::{CAST_CALL, LOAD_CALL};
use super::prune::{self, Constants};
use crate::bpf::skb::types::{np_cast, np_type};
use crate::insn::asm::Insn;
use crate::kernel::bpf_object;
use crate::kernel::features::Casts;

/// The subprogram of `filter.bpf.h` that translated code calls for bytes out of its reach.
const LOAD_FUNCTION: &str = "np_filter_load";

/// What is called in the place of bpf_rdonly_cast (compat.bpf.h).
const CAST_PLACE: i32 = np_cast::NP_CAST_PLACE.0 as i32;
/// The first of `enum np_type` there.
const FIRST_TYPE: i32 = np_type::NP_TYPE___kernel_sockaddr_storage.0 as i32;

/// A stub's name and what its body becomes.
pub struct Body {
    pub stub: &'static str,
    pub insns: Vec<Insn>,
}

/// Prepares the object and replaces the stubs in every program that has them, and casts by those of the kernel (none:
/// constants switch them off). Then it takes out what the constants switch off. Read-only data, autoload, pins and reused maps must be set
/// before this; the skeleton's `load()` comes after it.
pub fn inject(object: &mut OpenObject, bodies: &[Body], casts: Option<&Casts>) -> Result<()> {
    bpf_object::prepare(object)?;
    change(object, bodies, casts)
}

/// The same for an object that is prepared.
pub fn change(object: &mut OpenObject, bodies: &[Body], casts: Option<&Casts>) -> Result<()> {
    let raw = object.as_libbpf_object();
    let constants = constants(raw);
    let mut found = vec![false; bodies.len()];
    let mut program: *mut sys::bpf_program = std::ptr::null_mut();
    loop {
        // SAFETY: the object is open; null asks for the first program.
        program = unsafe { sys::bpf_object__next_program(raw.as_ptr(), program) };
        let Some(current) = NonNull::new(program) else {
            break;
        };
        // SAFETY: the program belongs to the object.
        if !unsafe { sys::bpf_program__autoload(program) } {
            continue;
        }
        let mut code = read(raw, current)?;
        if let Some(casts) = casts {
            code.replace_casts(casts)?;
        }
        for (body, found) in bodies.iter().zip(&mut found) {
            if let Some(stub) = code.function(body.stub) {
                code.replace(stub, &body.insns)?;
                *found = true;
            }
        }
        prune::prune(&mut code, &constants);
        write(current, &code)?;
    }
    match found.iter().position(|found| !found) {
        Some(missing) => bail!("no program has the stub {}", bodies[missing].stub),
        None => Ok(()),
    }
}

impl Code {
    /// Every cast becomes one of the kernel's.
    fn replace_casts(&mut self, casts: &Casts) -> Result<()> {
        let place = Insn::call(CAST_PLACE);
        let mut at = 0;
        while let Some(insn) = self.insns.get_mut(at) {
            let number = usize::try_from(insn.imm.wrapping_sub(FIRST_TYPE)).ok();
            if *insn == place {
                *insn = Insn::call_kfunc(casts.function);
            } else if let Some(id) = number.and_then(|number| casts.types.get(number)) {
                ensure!(insn.is_move_imm(), "a cast's type is in {insn}");
                insn.imm = *id;
            }
            at += insn.width();
        }
        Ok(())
    }

    /// A body in place of a function's; what lies behind moves.
    fn replace(&mut self, function: usize, body: &[Insn]) -> Result<()> {
        let start = self.functions[function].1;
        let end = self
            .functions
            .get(function + 1)
            .map_or(self.insns.len(), |(_, next)| *next);
        let moved = |at: usize| {
            if at >= end {
                at - end + start + body.len()
            } else {
                at
            }
        };
        for (at, insn) in self.insns.iter_mut().enumerate() {
            if let Some(target) = insn.callee(at) {
                insn.imm = i32::try_from(moved(target) as i64 - moved(at) as i64 - 1)?;
            }
        }
        for (_, first) in &mut self.functions {
            *first = moved(*first);
        }
        let cast = self.insns[start..end]
            .windows(2)
            .position(|two| two[1].is_kfunc_call())
            .map(|at| &self.insns[start..end][..at + 2])
            .and_then(cast);
        self.insns.splice(start..end, body.iter().copied());

        let load = self
            .function(LOAD_FUNCTION)
            .map(|load| self.functions[load].1);
        for at in start..start + body.len() {
            let insn = &mut self.insns[at];
            if insn.is_subprogram_call() && insn.imm == LOAD_CALL {
                let load = load.ok_or_else(|| anyhow!("the program has no {LOAD_FUNCTION}"))?;
                insn.imm = i32::try_from(load as i64 - at as i64 - 1)?;
            }
            if insn.is_kfunc_call() && insn.imm == CAST_CALL {
                let (call, type_id) =
                    cast.ok_or_else(|| anyhow!("the stub does not show how to cast a pointer"))?;
                *insn = call;
                self.insns[at - 1].imm = type_id;
            }
        }
        Ok(())
    }
}

/// The call that ends this code, and the constant that it has in r2.
fn cast(code: &[Insn]) -> Option<(Insn, i32)> {
    let (call, before) = code.split_last()?;
    let sets_r2 = |insn: &&Insn| insn.dst() == 2 && (insn.is_load_imm64() || insn.is_move_imm());
    let type_id = before.iter().rev().find(sets_r2)?.imm;
    Some((*call, type_id))
}

/// What the object's programs can only read.
fn constants(object: NonNull<sys::bpf_object>) -> Constants {
    let mut found = Vec::new();
    let mut map: *const sys::bpf_map = std::ptr::null();
    loop {
        // SAFETY: the object is open and prepared; null asks for the first map. A map's value lives as long as the object; none changes one
        // that its programs only read, once it is made.
        unsafe {
            map = sys::bpf_object__next_map(object.as_ptr(), map);
            if map.is_null() {
                return Constants(found);
            }
            if sys::bpf_map__map_flags(map) & sys::BPF_F_RDONLY_PROG == 0 {
                continue;
            }
            let mut size = 0;
            let value = sys::bpf_map__initial_value(map, &mut size);
            let bytes = slice(value.cast::<u8>().cast_const(), size as usize);
            found.push((sys::bpf_map__fd(map), bytes.to_vec()));
        }
    }
}
