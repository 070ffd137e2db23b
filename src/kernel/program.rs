//! Loaded BPF programs as their own type information describes them: the functions that can be traced.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result, bail};
use libbpf_rs::btf::types::{Func, FuncProto, Ptr};
use libbpf_rs::btf::{Btf, TypeId};
use libbpf_sys as sys;

use super::bpf_object;

/// Functions of one program that are looked at; a program has 256 at most.
const MAX_FUNCTIONS: u32 = 512;

/// A function of a loaded program: the program itself, or a subprogram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Whole, where the kernel's own name of the program is cut to 15 characters.
    pub name: String,
    /// Its id in the program's types.
    pub btf: u32,
    /// Its first argument is the packet's context (`struct xdp_md *`).
    pub takes_context: bool,
    /// The struct that its first argument points to.
    pub context: Option<String>,
}

/// A loaded program and what the kernel says of it.
#[derive(Debug)]
pub struct Loaded {
    pub fd: OwnedFd,
    pub info: bpf_object::ProgramInfo,
}

/// The next loaded program by its id, if it has not gone meanwhile; ids grow until they begin anew at 2^31.
pub fn next_id(after: u32) -> Option<u32> {
    let mut id = 0;
    // SAFETY: the pointer is to a live integer.
    let code = unsafe { sys::bpf_prog_get_next_id(after, &mut id) };
    (code == 0).then_some(id)
}

/// A program by its id; `None` where it has gone.
pub fn open(id: u32) -> Result<Option<Loaded>> {
    let fd = match bpf_object::program_by_id(id) {
        Ok(fd) => fd,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).with_context(|| format!("failed to open program {id}")),
    };
    let info = bpf_object::program_info(fd.as_fd())
        .with_context(|| format!("failed to look at program {id}"))?;
    Ok(Some(Loaded { fd, info }))
}

/// The functions of a program, its main one first.
pub fn functions(program: BorrowedFd<'_>) -> Result<Vec<Function>> {
    let (id, types) = function_types(program)?;
    let without = || format!("program {id} has no BTF of its functions: it was built without -g");
    if types.is_empty() {
        bail!("{}", without());
    }
    let btf = Btf::from_prog_id(id).with_context(without)?;
    Ok(types
        .into_iter()
        .filter_map(|id| function(&btf, id))
        .collect())
}

/// The program's id, and the BTF ids of its functions in the order of their code.
fn function_types(program: BorrowedFd<'_>) -> Result<(u32, Vec<u32>)> {
    let size = size_of::<sys::bpf_func_info>() as u32;
    let mut functions = vec![sys::bpf_func_info::default(); MAX_FUNCTIONS as usize];
    let mut info = sys::bpf_prog_info {
        nr_func_info: MAX_FUNCTIONS,
        func_info_rec_size: size,
        func_info: functions.as_mut_ptr() as u64,
        ..Default::default()
    };
    look(program, &mut info)?;
    functions.truncate(info.nr_func_info.min(MAX_FUNCTIONS) as usize);
    Ok((
        info.id,
        functions.iter().map(|function| function.type_id).collect(),
    ))
}

/// BPF_JMP | BPF_CALL
const CALL: u8 = 0x85;
/// What follows it is a helper, a function of the program itself (1) or a kernel function (BPF_PSEUDO_KFUNC_CALL).
const CALLS_OF_THE_KERNEL: [u8; 2] = [0, 2];

/// The kernel functions that a program calls, as the verifier left it: each one's distance from `__bpf_call_base`. 0 where the kernel
/// hides them.
pub fn calls(program: BorrowedFd<'_>) -> Result<Vec<i32>> {
    let mut info = sys::bpf_prog_info::default();
    look(program, &mut info)?;
    let size = size_of::<sys::bpf_insn>();
    let mut insns = vec![sys::bpf_insn::default(); info.xlated_prog_len as usize / size];
    let mut info = sys::bpf_prog_info {
        xlated_prog_len: (insns.len() * size) as u32,
        xlated_prog_insns: insns.as_mut_ptr() as u64,
        ..Default::default()
    };
    look(program, &mut info)?;
    let mut calls: Vec<i32> = insns
        .iter()
        .filter(|insn| insn.code == CALL && CALLS_OF_THE_KERNEL.contains(&insn.src_reg()))
        .map(|insn| insn.imm)
        .collect();
    calls.sort_unstable();
    calls.dedup();
    Ok(calls)
}

/// Fills the info of a program.
fn look(program: BorrowedFd<'_>, info: &mut sys::bpf_prog_info) -> Result<()> {
    let mut len = size_of::<sys::bpf_prog_info>() as u32;
    // SAFETY: info is writable for len bytes, and its arrays (of the callers, in this file) are as long as it says.
    let code = unsafe { sys::bpf_prog_get_info_by_fd(program.as_raw_fd(), info, &mut len) };
    if code < 0 {
        return Err(io::Error::from_raw_os_error(-code)).context("failed to look at a program");
    }
    Ok(())
}

fn function(btf: &Btf<'_>, id: u32) -> Option<Function> {
    let function = btf.type_by_id::<Func<'_>>(TypeId::from(id))?;
    let name = function.name()?.to_string_lossy().into_owned();
    let context = context(btf, &function);
    Some(Function {
        name,
        btf: id,
        takes_context: context.as_deref() == Some("xdp_md"),
        context,
    })
}

fn context(btf: &Btf<'_>, function: &Func<'_>) -> Option<String> {
    let proto = FuncProto::try_from(function.next_type()?).ok()?;
    let first = proto.iter().next()?;
    let pointer = btf.type_by_id::<Ptr<'_>>(first.ty)?;
    let pointee = pointer.next_type()?.skip_mods_and_typedefs();
    Some(pointee.name()?.to_string_lossy().into_owned())
}
