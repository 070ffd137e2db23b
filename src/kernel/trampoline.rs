//! Programs of type tracing (fentry, fexit, tp_btf), loaded without libbpf: on other BPF programs, one object, opened
//! and prepared once, its programs loaded as often as there are programs to watch (libbpf would open the object anew
//! for each); on functions of the kernel, by the number that `btf` knows (libbpf would read all of the kernel's BTF to
//! find it, and hold it twice meanwhile: 9 MB). It knows no tool.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, OsStr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result, anyhow};
use libbpf_rs::{AsRawLibbpf, OpenObject, ProgramMut};
use libbpf_sys as sys;

use super::bpf_object::owned;
use super::btf::{self, Btf};

/// BPF_ALU64 | BPF_MOV | BPF_K
const MOVE_CONSTANT: u8 = 0xb7;
/// BPF_JMP | BPF_EXIT
const EXIT: u8 = 0x95;
/// Room for what the verifier says of a program that it refuses.
const LOG: usize = 64 * 1024;

/// What is watched: a function of a loaded program, or of the kernel.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    pub program: Option<BorrowedFd<'a>>,
    /// The function's type in that program's BTF, or in the kernel's.
    pub btf_id: u32,
}

impl Target<'_> {
    /// A function of vmlinux.
    fn kernel(btf: &Btf, function: &str) -> Option<Self> {
        Some(Self {
            program: None,
            btf_id: btf.function_id(function)?,
        })
    }
}

/// Where a watching program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachPoint {
    Entry,
    Exit,
    /// a tracepoint, with typed arguments
    Tracepoint,
}

impl AttachPoint {
    fn attach_type(self) -> u32 {
        match self {
            AttachPoint::Entry => sys::BPF_TRACE_FENTRY,
            AttachPoint::Exit => sys::BPF_TRACE_FEXIT,
            AttachPoint::Tracepoint => sys::BPF_TRACE_RAW_TP,
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
    object: &impl AsRawLibbpf<LibbpfType = sys::bpf_object>,
    name: &str,
    target: Target<'_>,
    point: AttachPoint,
    patch: Patch,
) -> Result<Watch> {
    let program = load(object, name, target, point, Some(patch))?;
    let link = attach(program.as_fd()).with_context(|| format!("failed to attach {name}"))?;
    Ok(Watch {
        program,
        _link: link,
    })
}

/// Attaches a program to the target that it was loaded for, as long as the result lives.
pub fn attach(program: BorrowedFd<'_>) -> Result<OwnedFd> {
    // SAFETY: the program is open; without a name the kernel takes the target that it was loaded for.
    let link = unsafe { sys::bpf_raw_tracepoint_open(std::ptr::null(), program.as_raw_fd()) };
    Ok(owned(link)?)
}

/// The kernel makes trampolines for its functions: they have types, and ftrace can call them directly, which x86 always
/// could, and arm64 from 6.4 on (CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS; 5.10's BTF has no function of ftrace.c).
pub fn are_made(btf: &Btf) -> bool {
    let direct = cfg!(target_arch = "x86_64") || btf.has_function("register_ftrace_direct");
    btf::is_in_the_kernel() && direct
}

/// What the kernel's BTF calls the type of a tracepoint's arguments.
const TRACEPOINT: &str = "btf_trace_";

/// Functions and tracepoints of vmlinux, by the names that sections of BPF objects have: `fentry/NAME`, `fexit/NAME`,
/// `tp_btf/NAME`.
#[derive(Debug)]
pub struct Targets(BTreeMap<String, Target<'static>>);

impl Targets {
    /// Those that vmlinux has; none where the kernel makes no trampolines for its functions.
    pub fn new<'n>(btf: &Btf, names: impl Iterator<Item = &'n &'n str>) -> Self {
        let target = |name: &&str| Some(((*name).to_owned(), Target::kernel(btf, name)?));
        match are_made(btf) {
            true => Self(names.filter_map(target).collect()),
            false => Self(BTreeMap::new()),
        }
    }

    /// And these tracepoints, as far as vmlinux has them; none where the kernel has no types of its own.
    pub fn with_tracepoints(mut self, btf: &Btf, names: &[&str]) -> Self {
        let names = names.iter().filter(|_| btf::is_in_the_kernel());
        for name in names.map(|name| format!("{TRACEPOINT}{name}")) {
            if let Some(btf_id) = btf.typedef_id(&name) {
                let target = Target {
                    program: None,
                    btf_id,
                };
                self.0.insert(name, target);
            }
        }
        self
    }

    /// vmlinux has this tracepoint.
    pub fn has_tracepoint(&self, name: &str) -> bool {
        self.has(&format!("{TRACEPOINT}{name}"))
    }

    /// vmlinux has this one.
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// What a program's section says.
    fn of(&self, section: &OsStr) -> Option<(AttachPoint, Target<'static>)> {
        let (kind, name) = section.to_str()?.split_once('/')?;
        let point = match kind {
            "fentry" => AttachPoint::Entry,
            "fexit" => AttachPoint::Exit,
            "tp_btf" => {
                let target = self.0.get(&format!("{TRACEPOINT}{name}"))?;
                return Some((AttachPoint::Tracepoint, *target));
            }
            _ => return None,
        };
        Some((point, *self.0.get(name)?))
    }

    /// Prepares an object (see [`super::bpf_object::prepare`]) and has its code changed; of its programs those at these functions are left to
    /// [`Targets::load`], its own load passes over them.
    pub fn prepare(
        &self,
        object: &mut OpenObject,
        change: impl FnOnce(&mut OpenObject) -> Result<()>,
    ) -> Result<()> {
        // To libbpf they are programs on another program, for which it reads no BTF. Any number but 0 is one.
        const NO_PROGRAM: i32 = i32::MAX;
        let mut ours = Vec::new();
        for mut program in object.progs_mut() {
            if program.autoload() && self.of(program.section()).is_some() {
                program
                    .set_attach_target(NO_PROGRAM, None)
                    .context("failed to prepare a program of a trampoline")?;
                ours.push(program.name().to_owned());
            }
        }
        super::bpf_object::prepare(object)?;
        change(object)?;
        for mut program in object.progs_mut() {
            if ours.iter().any(|name| name == program.name()) {
                program.set_autoload(false);
            }
        }
        Ok(())
    }

    /// Loads a program at one of these functions; none where it is at another.
    pub fn load(
        &self,
        object: &impl AsRawLibbpf<LibbpfType = sys::bpf_object>,
        program: &ProgramMut<'_>,
    ) -> Result<Option<OwnedFd>> {
        let Some((point, target)) = self.of(program.section()) else {
            return Ok(None);
        };
        let name = program.name().to_string_lossy();
        let loaded = load(object, &name, target, point, None);
        Ok(Some(loaded.with_context(|| {
            format!("failed to load the BPF program {name}")
        })?))
    }
}

/// Loads the program `name` of a prepared object for a target.
fn load(
    object: &impl AsRawLibbpf<LibbpfType = sys::bpf_object>,
    name: &str,
    target: Target<'_>,
    point: AttachPoint,
    patch: Option<Patch>,
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
    if let Some(patch) = patch {
        for insn in &mut insns {
            if insn.code == MOVE_CONSTANT && insn.imm == patch.placeholder {
                insn.imm = patch.value;
            }
        }
    }
    // SAFETY: the program and the object are valid; its BTF is loaded since it was prepared.
    let mut opts = unsafe {
        sys::bpf_prog_load_opts {
            sz: size_of::<sys::bpf_prog_load_opts>() as _,
            expected_attach_type: point.attach_type(),
            attach_prog_fd: target.program.map_or(0, |p| p.as_raw_fd()) as _,
            attach_btf_id: target.btf_id,
            prog_btf_fd: sys::btf__fd(sys::bpf_object__btf(raw.as_ptr())) as u32,
            func_info: sys::bpf_program__func_info(program).cast(),
            func_info_cnt: sys::bpf_program__func_info_cnt(program),
            func_info_rec_size: size_of::<sys::bpf_func_info>() as u32,
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

/// Has the kernel make its first trampoline ahead of those that are waited for; it goes when this is dropped.
///
/// Up to 6.9 the kernel waits for a grace period of RCU tasks, a tenth of a second and more, whenever a function gets a trampoline and no
/// other function has one. A thread does that waiting meanwhile, at a function that nothing calls (the kernel's own tests do).
#[derive(Debug)]
pub struct Ahead {
    /// Tells the thread by its end.
    _done: mpsc::Sender<()>,
}

impl Ahead {
    /// Nothing where the kernel does not wait, or where there can be no trampolines.
    pub fn start(btf: &Btf) -> Option<Self> {
        // What came in the place of the waiting.
        if btf.has_function("register_ftrace_direct_cb") || !are_made(btf) {
            return None;
        }
        let target = Target::kernel(btf, "bpf_fentry_test1")?;
        let (done, wait) = mpsc::channel();
        let run = move || {
            let link = load_empty(target).and_then(|program| attach(program.as_fd()));
            let _ = wait.recv();
            // Waits again, which keeps others from attaching.
            drop(link);
        };
        thread::Builder::new()
            .name("trampoline".into())
            .spawn(run)
            .ok()?;
        Some(Self { _done: done })
    }
}

/// A program that does nothing.
fn load_empty(target: Target<'_>) -> Result<OwnedFd> {
    let insns = [(MOVE_CONSTANT, 0), (EXIT, 0)].map(|(code, imm)| sys::bpf_insn {
        code,
        imm,
        ..Default::default()
    });
    let mut opts = sys::bpf_prog_load_opts {
        sz: size_of::<sys::bpf_prog_load_opts>() as _,
        expected_attach_type: AttachPoint::Entry.attach_type(),
        attach_btf_id: target.btf_id,
        ..Default::default()
    };
    load_with(c"np_ahead", &insns, &mut opts)
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
    fn what_a_section_says() {
        let target = Target {
            program: None,
            btf_id: 7,
        };
        let tracepoint = Target {
            btf_id: 8,
            ..target
        };
        let targets = Targets(BTreeMap::from([
            ("tcp_v4_connect".to_owned(), target),
            ("btf_trace_kfree_skb".to_owned(), tracepoint),
        ]));
        let of = |section: &str| {
            let (point, target) = targets.of(OsStr::new(section))?;
            Some((point, target.btf_id))
        };
        assert_eq!(of("fexit/tcp_v4_connect"), Some((AttachPoint::Exit, 7)));
        assert_eq!(of("fentry/tcp_v4_connect"), Some((AttachPoint::Entry, 7)));
        assert_eq!(of("tp_btf/kfree_skb"), Some((AttachPoint::Tracepoint, 8)));
        for other in [
            "tp_btf/tcp_v4_connect",
            "fexit/tcp_v6_connect",
            "kprobe/tcp_v4_connect",
            "fexit",
            "",
        ] {
            assert_eq!(of(other), None, "{other}");
        }
    }

    #[test]
    fn the_verifiers_last_word() {
        let log = b"func#0 @0\nCannot trace it\nprocessed 0 insns\n\0\0\0";
        assert_eq!(verdict(log).as_deref(), Some("Cannot trace it"));
        assert_eq!(verdict(b"\0"), None);
    }
}
