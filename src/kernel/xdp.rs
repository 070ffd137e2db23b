//! XDP programs at interfaces: which one is there and how it got there, atomic attach, swap and detach, over netlink or bpf_link.
//!
//! It knows no tool and keeps no state: what to put back, and when, is the caller's.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use libbpf_sys as sys;

use super::bpf_object::{check, for_each_link, link_info, owned, pinned, program_info};
use super::rtnl;

/// How a program runs at an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// In the driver.
    Native,
    /// In the stack's receive path, after the sk_buff was made.
    Generic,
    /// In the network card.
    Offload,
}

impl Mode {
    /// The flag of netlink and of bpf_link.
    pub fn flag(self) -> u32 {
        match self {
            Mode::Native => sys::XDP_FLAGS_DRV_MODE,
            Mode::Generic => sys::XDP_FLAGS_SKB_MODE,
            Mode::Offload => sys::XDP_FLAGS_HW_MODE,
        }
    }

    pub fn from_flag(flag: u32) -> Option<Self> {
        [Mode::Native, Mode::Generic, Mode::Offload]
            .into_iter()
            .find(|mode| mode.flag() == flag)
    }

    pub fn name(self) -> &'static str {
        match self {
            Mode::Native => "native",
            Mode::Generic => "generic",
            Mode::Offload => "offload",
        }
    }
}

/// The program that an interface runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attached {
    pub program: u32,
    pub mode: Mode,
}

/// What XDP programs of one chain have to agree in: the kernel refuses a tail call between others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traits {
    /// Takes packets of several buffers.
    pub frags: bool,
    /// BPF_XDP, or 0 for programs of old loaders.
    pub attach_type: u32,
}

impl Traits {
    /// The best that this kernel has.
    pub fn of_kernel() -> Self {
        Traits {
            frags: has_frags(),
            attach_type: sys::BPF_XDP,
        }
    }

    /// Flags for loading a program.
    pub fn flags(self) -> u32 {
        if self.frags {
            sys::BPF_F_XDP_HAS_FRAGS
        } else {
            0
        }
    }
}

/// The program at an interface, if there is one, and an interface.
pub fn query(ifindex: u32) -> io::Result<Option<Attached>> {
    let link = match rtnl::link(ifindex) {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(None),
        link => link?,
    };
    // With several attached (offload beside another) the one that runs first in software counts.
    let mut found = link
        .xdp
        .into_iter()
        .zip([Mode::Native, Mode::Generic, Mode::Offload]);
    Ok(found
        .find(|(program, _)| *program != 0)
        .map(|(program, mode)| Attached { program, mode }))
}

/// Attaches over netlink, only where nothing is attached. `None` detaches.
pub fn attach(ifindex: u32, program: BorrowedFd<'_>, mode: Mode) -> io::Result<()> {
    set(
        ifindex,
        Some(program),
        mode.flag() | sys::XDP_FLAGS_UPDATE_IF_NOEXIST,
        None,
    )
}

/// Atomically puts `new` (or nothing) in the place of `old`; fails when `old` is not there (any more).
pub fn replace(
    ifindex: u32,
    new: Option<BorrowedFd<'_>>,
    old: BorrowedFd<'_>,
    mode: Mode,
) -> io::Result<()> {
    set(
        ifindex,
        new,
        mode.flag() | sys::XDP_FLAGS_REPLACE,
        Some(old),
    )
}

fn set(
    ifindex: u32,
    new: Option<BorrowedFd<'_>>,
    flags: u32,
    old: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let opts = sys::bpf_xdp_attach_opts {
        sz: size_of::<sys::bpf_xdp_attach_opts>() as _,
        old_prog_fd: old.map_or(0, |fd| fd.as_raw_fd()),
        ..Default::default()
    };
    let fd = new.map_or(-1, |fd| fd.as_raw_fd());
    // SAFETY: opts lives through the call and states its own size; the fds are borrowed, hence open.
    check(unsafe { sys::bpf_xdp_attach(ifindex as i32, fd, flags, &opts) })
}

/// Attaches by a bpf_link: it detaches when the last fd and pin of it are gone.
pub fn link(ifindex: u32, program: BorrowedFd<'_>, mode: Mode) -> io::Result<OwnedFd> {
    let opts = sys::bpf_link_create_opts {
        sz: size_of::<sys::bpf_link_create_opts>() as _,
        flags: mode.flag(),
        ..Default::default()
    };
    // SAFETY: opts lives through the call and states its own size; the program's fd is open.
    let fd =
        unsafe { sys::bpf_link_create(program.as_raw_fd(), ifindex as i32, sys::BPF_XDP, &opts) };
    owned(fd)
}

/// Atomically puts `new` in the place of `old` at a link; fails when `old` is not there (any more).
pub fn link_update(
    link: BorrowedFd<'_>,
    new: BorrowedFd<'_>,
    old: BorrowedFd<'_>,
) -> io::Result<()> {
    let opts = sys::bpf_link_update_opts {
        sz: size_of::<sys::bpf_link_update_opts>() as _,
        flags: sys::BPF_F_REPLACE,
        old_prog_fd: old.as_raw_fd() as u32,
        ..Default::default()
    };
    // SAFETY: opts lives through the call and states its own size; the fds are borrowed, hence open.
    check(unsafe { sys::bpf_link_update(link.as_raw_fd(), new.as_raw_fd(), &opts) })
}

/// Detaches a link at once: when its last fd and pin go it detaches too, but some time later.
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the fd is borrowed, hence open.
    check(unsafe { sys::bpf_link_detach(link.as_raw_fd()) })
}

/// The XDP links that claim this interface index and program. Indices repeat in other network namespaces, so there may be several.
pub fn links(ifindex: u32, program: u32) -> io::Result<Vec<(u32, OwnedFd)>> {
    let mut found = Vec::new();
    for_each_link(|id, info, fd| {
        // SAFETY: the kernel filled the union's member that belongs to the type of the link.
        let at = unsafe { info.__bindgen_anon_1.xdp.ifindex };
        if info.type_ == sys::BPF_LINK_TYPE_XDP && at == ifindex && info.prog_id == program {
            found.push((id, fd));
        }
    })?;
    Ok(found)
}

/// A program that has replaced a function of another (freplace), as libxdp's dispatcher has its programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// Its id.
    pub program: u32,
    pub replaced: Replaced,
}

/// Which function of the other program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Replaced {
    /// Its BTF id in the other program's types.
    Id(u32),
    Name(String),
}

/// The extensions of the program `target`. Links tell their targets from kernel 5.13 on; before, libxdp's pins do.
pub fn extensions(target: u32) -> io::Result<Vec<Extension>> {
    let mut found = Vec::new();
    for_each_link(|_, info, _| {
        if info.type_ != sys::BPF_LINK_TYPE_TRACING {
            return;
        }
        // SAFETY: the kernel filled the union's member that belongs to the type of the link.
        let tracing = unsafe { info.__bindgen_anon_1.tracing };
        // Extensions have no attach type of their own (0); fentry and fexit do.
        if tracing.target_obj_id == target && tracing.attach_type == 0 {
            found.push(Extension {
                program: info.prog_id,
                replaced: Replaced::Id(tracing.target_btf_id),
            });
        }
    })?;
    if found.is_empty() {
        found = pinned_extensions(target);
    }
    Ok(found)
}

/// What libxdp pinned for its dispatcher `target`: dispatch-IFINDEX-ID/progN-prog has replaced the dispatcher's function progN.
fn pinned_extensions(target: u32) -> Vec<Extension> {
    let ending = format!("-{target}");
    let folders = fs::read_dir("/sys/fs/bpf/xdp")
        .into_iter()
        .flatten()
        .flatten();
    let pins = folders
        .filter(|folder| {
            let name = folder.file_name();
            name.to_str()
                .is_some_and(|name| name.starts_with("dispatch-") && name.ends_with(&ending))
        })
        .flat_map(|folder| fs::read_dir(folder.path()).into_iter().flatten().flatten());
    let mut found = pins
        .filter_map(|pin| {
            let name = pin.file_name().to_str()?.strip_suffix("-prog")?.to_owned();
            let program = program_info(pinned(&pin.path()).ok()?.as_fd()).ok()?.id;
            Some(Extension {
                program,
                replaced: Replaced::Name(name),
            })
        })
        .collect::<Vec<_>>();
    found.sort_by_key(|extension| extension.program);
    found
}

/// Id, interface index and program of an XDP link; the index is 0 once the interface has gone.
pub fn xdp_link(link: BorrowedFd<'_>) -> io::Result<(u32, u32, u32)> {
    let info = link_info(link)?;
    // SAFETY: the caller's link is an XDP link; for any other the number read is meaningless but initialized (zeroed).
    let ifindex = unsafe { info.__bindgen_anon_1.xdp.ifindex };
    Ok((info.id, ifindex, info.prog_id))
}

/// Finds out by trial what a loaded program's companions in a program array have to be like: the kernel tells it nowhere.
pub fn traits_of(program: BorrowedFd<'_>) -> io::Result<Traits> {
    let array = program_array()?;
    insert(array.as_fd(), program)?;
    // The array now takes only what is like its first program.
    for frags in [false, true] {
        for attach_type in [sys::BPF_XDP, 0] {
            let traits = Traits { frags, attach_type };
            // A kernel before 5.18 refuses the flag; no program has it there.
            let Ok(trial) = trivial_program(traits) else {
                continue;
            };
            if insert(array.as_fd(), trial.as_fd()).is_ok() {
                return Ok(traits);
            }
        }
    }
    Err(io::Error::other(
        "the program at the interface cannot be tail called",
    ))
}

/// Whether this kernel loads XDP programs for packets of several buffers (5.18).
pub fn has_frags() -> bool {
    trivial_program(Traits {
        frags: true,
        attach_type: sys::BPF_XDP,
    })
    .is_ok()
}

fn program_array() -> io::Result<OwnedFd> {
    // SAFETY: the name may be null, and the options are optional.
    owned(unsafe {
        sys::bpf_map_create(
            sys::BPF_MAP_TYPE_PROG_ARRAY,
            c"np_trial".as_ptr(),
            4,
            4,
            1,
            std::ptr::null(),
        )
    })
}

fn insert(array: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let (key, value) = (0u32, program.as_raw_fd());
    // SAFETY: key and value are as long as the map says, 4 bytes each.
    check(unsafe {
        sys::bpf_map_update_elem(
            array.as_raw_fd(),
            (&raw const key).cast(),
            (&raw const value).cast(),
            0,
        )
    })
}

/// Loads a program that returns XDP_PASS.
fn trivial_program(traits: Traits) -> io::Result<OwnedFd> {
    let mut mov = sys::bpf_insn {
        code: (sys::BPF_ALU64 | sys::BPF_MOV | sys::BPF_K) as u8,
        ..Default::default()
    };
    mov.imm = 2;
    let exit = sys::bpf_insn {
        code: (sys::BPF_JMP | sys::BPF_EXIT) as u8,
        ..Default::default()
    };
    let insns = [mov, exit];
    let mut opts = sys::bpf_prog_load_opts {
        sz: size_of::<sys::bpf_prog_load_opts>() as _,
        expected_attach_type: traits.attach_type,
        prog_flags: traits.flags(),
        ..Default::default()
    };
    // SAFETY: strings and instructions live through the call; opts states its own size.
    owned(unsafe {
        sys::bpf_prog_load(
            sys::BPF_PROG_TYPE_XDP,
            c"np_trial".as_ptr(),
            c"GPL".as_ptr(),
            insns.as_ptr(),
            insns.len() as _,
            &mut opts,
        )
    })
}

/// Waits until every program that was replaced or detached before has run to its end on all CPUs.
pub fn settle() {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: a system call of numbers alone; it waits for an RCU grace period. Where it is missing, a packet in flight may be counted late.
    unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
}
