//! fentry and fexit programs that watch other BPF programs: one object, opened and prepared once, its programs loaded as often as
//! there are programs to watch. libbpf itself would open the object anew for each. It knows no tool.

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use anyhow::{Context, Result, anyhow};
use libbpf_rs::{AsRawLibbpf, OpenObject};
use libbpf_sys as sys;

use super::owned;

/// BPF_ALU64 | BPF_MOV | BPF_K
const MOVE_CONSTANT: u8 = 0xb7;
/// Room for what the verifier says of a program that it refuses.
const LOG: usize = 64 * 1024;

/// What is watched: a function of a loaded program.
#[derive(Clone, Copy)]
pub struct Target<'a> {
    pub program: BorrowedFd<'a>,
    /// The function's type in that program's BTF.
    pub btf_id: u32,
}

/// Where a watching program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    Entry,
    Exit,
}

impl Point {
    fn attach_type(self) -> u32 {
        match self {
            Point::Entry => sys::BPF_TRACE_FENTRY,
            Point::Exit => sys::BPF_TRACE_FEXIT,
        }
    }
}

/// A constant of the program's code that is another one for each target.
#[derive(Clone, Copy)]
pub struct Patch {
    pub placeholder: i32,
    pub value: i32,
}

/// A watching program that is loaded and attached; it goes when this is dropped.
#[derive(Debug)]
pub struct Watch {
    program: OwnedFd,
    _link: OwnedFd,
}

impl Watch {
    /// For queries.
    pub fn program_fd(&self) -> i32 {
        self.program.as_raw_fd()
    }
}

/// Loads the program `name` of a prepared object for a target, and attaches it.
pub fn watch(
    object: &OpenObject,
    name: &str,
    target: Target<'_>,
    point: Point,
    patch: Patch,
) -> Result<Watch> {
    let program = load(object, name, target, point, patch)?;
    // SAFETY: the program is open; without a name the kernel takes the target that it was loaded for.
    let link = unsafe { sys::bpf_raw_tracepoint_open(std::ptr::null(), program.as_raw_fd()) };
    let link = owned(link).with_context(|| format!("failed to attach {name}"))?;
    Ok(Watch {
        program,
        _link: link,
    })
}

fn load(
    object: &OpenObject,
    name: &str,
    target: Target<'_>,
    point: Point,
    patch: Patch,
) -> Result<OwnedFd> {
    let c_name = CString::new(name).context("a program name with a NUL byte")?;
    let raw = object.as_libbpf_object();
    // SAFETY: the object is open and the name is a C string.
    let program = unsafe { sys::bpf_object__find_program_by_name(raw.as_ptr(), c_name.as_ptr()) };
    let program = NonNull::new(program)
        .with_context(|| format!("the BPF object has no program {name}"))?
        .as_ptr();
    // SAFETY: libbpf's array of the program's instructions, which lives as long as the object, and its length.
    let mut insns = unsafe {
        std::slice::from_raw_parts(
            sys::bpf_program__insns(program),
            sys::bpf_program__insn_cnt(program) as usize,
        )
    }
    .to_vec();
    for insn in &mut insns {
        if insn.code == MOVE_CONSTANT && insn.imm == patch.placeholder {
            insn.imm = patch.value;
        }
    }
    // SAFETY: the program and the object are valid; its BTF is loaded since it was prepared.
    let mut opts = unsafe {
        sys::bpf_prog_load_opts {
            sz: size_of::<sys::bpf_prog_load_opts>() as _,
            expected_attach_type: point.attach_type(),
            attach_prog_fd: target.program.as_raw_fd() as _,
            attach_btf_id: target.btf_id,
            prog_btf_fd: sys::btf__fd(sys::bpf_object__btf(raw.as_ptr())) as u32,
            func_info: sys::bpf_program__func_info(program).cast(),
            func_info_cnt: sys::bpf_program__func_info_cnt(program),
            func_info_rec_size: size_of::<sys::bpf_func_info>() as u32,
            line_info: sys::bpf_program__line_info(program).cast(),
            line_info_cnt: sys::bpf_program__line_info_cnt(program),
            line_info_rec_size: size_of::<sys::bpf_line_info>() as u32,
            ..Default::default()
        }
    };
    let result = load_with(&c_name, &insns, &mut opts);
    let Err(error) = result else { return result };
    let mut log = vec![0u8; LOG];
    (opts.log_level, opts.log_size) = (1, LOG as u32);
    opts.log_buf = log.as_mut_ptr().cast();
    // What the verifier has to say it says where it is asked to.
    if let Ok(program) = load_with(&c_name, &insns, &mut opts) {
        return Ok(program);
    }
    Err(match verdict(&log) {
        Some(why) => anyhow!(error).context(why),
        None => anyhow!(error),
    })
}

fn load_with(
    name: &CStr,
    insns: &[sys::bpf_insn],
    opts: &mut sys::bpf_prog_load_opts,
) -> Result<OwnedFd> {
    // SAFETY: name, license and instructions outlive the call; opts states its own size, and what it points to (libbpf's arrays,
    // the log) is as long as it says.
    owned(unsafe {
        sys::bpf_prog_load(
            sys::BPF_PROG_TYPE_TRACING,
            name.as_ptr(),
            c"Dual BSD/GPL".as_ptr(),
            insns.as_ptr(),
            insns.len() as _,
            opts,
        )
    })
    .map_err(Into::into)
}

/// The last line of a verifier's log that says something.
fn verdict(log: &[u8]) -> Option<String> {
    let end = log.iter().position(|b| *b == 0).unwrap_or(log.len());
    let text = String::from_utf8_lossy(&log[..end]);
    text.lines()
        .rev()
        .map(str::trim)
        .find(|line| !line.is_empty() && !line.starts_with("processed "))
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verifiers_last_word() {
        let log = b"func#0 @0\nCannot trace it\nprocessed 0 insns\n\0\0\0";
        assert_eq!(verdict(log).as_deref(), Some("Cannot trace it"));
        assert_eq!(verdict(b"\0"), None);
    }
}
