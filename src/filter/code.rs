//! A program's instructions between libbpf's preparation and the kernel: taken out of libbpf, and put back after a change. Must not
//! know what the instructions do.

use std::ffi::CStr;
use std::ptr::NonNull;

use anyhow::{Context, Result, bail};
use libbpf_sys as sys;

use crate::insn::asm::Insn;

/// A program with its subprograms, as libbpf will load it.
pub(super) struct Code {
    pub insns: Vec<Insn>,
    /// Names and first instructions, in order of the latter.
    pub functions: Vec<(String, usize)>,
}

impl Code {
    pub fn function(&self, name: &str) -> Option<usize> {
        self.functions
            .iter()
            .position(|(function, _)| function == name)
    }
}

/// A slice of `count` things that libbpf has at `first`.
///
/// # Safety
/// As `slice::from_raw_parts`, but null is allowed.
pub(super) unsafe fn slice<'a, T>(first: *const T, count: usize) -> &'a [T] {
    if first.is_null() {
        return &[];
    }
    // SAFETY: the caller promises that `count` things are there.
    unsafe { std::slice::from_raw_parts(first, count) }
}

/// The program's instructions and functions, as libbpf has prepared them.
pub(super) fn read(
    object: NonNull<sys::bpf_object>,
    program: NonNull<sys::bpf_program>,
) -> Result<Code> {
    let program = program.as_ptr();
    // SAFETY: the program belongs to the open object, whose memory does not change while these slices are read. An
    // `Insn` has the layout of `bpf_insn`: eight bytes, the registers in one of them.
    let (insns, functions, btf) = unsafe {
        (
            slice(
                sys::bpf_program__insns(program).cast::<Insn>(),
                sys::bpf_program__insn_cnt(program) as usize,
            ),
            slice(
                sys::bpf_program__func_info(program),
                sys::bpf_program__func_info_cnt(program) as usize,
            ),
            sys::bpf_object__btf(object.as_ptr()),
        )
    };
    let name = |type_id: u32| -> Result<String> {
        // SAFETY: the object's BTF lives as long as the object; a wrong id gives null.
        let name = unsafe {
            match sys::btf__type_by_id(btf, type_id).as_ref() {
                Some(kind) => sys::btf__name_by_offset(btf, kind.name_off),
                None => std::ptr::null(),
            }
        };
        if name.is_null() {
            bail!("a function has no name");
        }
        // SAFETY: not null: a string of the BTF.
        Ok(unsafe { CStr::from_ptr(name) }
            .to_string_lossy()
            .into_owned())
    };
    let functions = functions
        .iter()
        .map(|info| Ok((name(info.type_id)?, info.insn_off as usize)))
        .collect::<Result<Vec<_>>>()?;
    Ok(Code {
        insns: insns.to_vec(),
        functions,
    })
}

/// Gives libbpf changed instructions; as many functions as [`read`] found.
pub(super) fn write(program: NonNull<sys::bpf_program>, code: &Code) -> Result<()> {
    let program = program.as_ptr();
    // SAFETY: libbpf's own arrays of this program, as many entries as `read` found in them; nothing else reads or
    // writes them meanwhile. `set_insns` copies the instructions.
    let status = unsafe {
        let functions = sys::bpf_program__func_info(program);
        for (i, (_, first)) in code.functions.iter().enumerate() {
            (*functions.add(i)).insn_off = u32::try_from(*first)?;
        }
        sys::bpf_program__set_insns(
            program,
            code.insns.as_ptr().cast_mut().cast(),
            code.insns.len() as _,
        )
    };
    if status != 0 {
        let error = std::io::Error::from_raw_os_error(-status);
        return Err(error).context("failed to put the filter into the program");
    }
    Ok(())
}
