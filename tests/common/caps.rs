//! Capabilities by number (capabilities(7)), and a process that has these alone.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

pub const DAC_OVERRIDE: u32 = 1;
pub const DAC_READ_SEARCH: u32 = 2;
pub const NET_ADMIN: u32 = 12;
pub const IPC_LOCK: u32 = 14;
pub const SYS_PTRACE: u32 = 19;
pub const SYS_ADMIN: u32 = 21;
pub const SYS_RESOURCE: u32 = 24;
pub const SYSLOG: u32 = 34;
pub const PERFMON: u32 = 38;
pub const BPF: u32 = 39;

/// By name, as a systemd unit has them.
pub const NAMES: [(&str, u32); 10] = [
    ("CAP_DAC_OVERRIDE", DAC_OVERRIDE),
    ("CAP_DAC_READ_SEARCH", DAC_READ_SEARCH),
    ("CAP_NET_ADMIN", NET_ADMIN),
    ("CAP_IPC_LOCK", IPC_LOCK),
    ("CAP_SYS_PTRACE", SYS_PTRACE),
    ("CAP_SYS_ADMIN", SYS_ADMIN),
    ("CAP_SYS_RESOURCE", SYS_RESOURCE),
    ("CAP_SYSLOG", SYSLOG),
    ("CAP_PERFMON", PERFMON),
    ("CAP_BPF", BPF),
];

/// What is known to capset.
const MOST: u32 = 63;
const NOBODY: u32 = 65534;
const VERSION_3: u32 = 0x2008_0522;

/// `struct __user_cap_data_struct`
#[repr(C)]
#[derive(Clone, Copy)]
struct Half {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// The command runs as nobody, with these capabilities (bits), which it can neither lose by exec nor extend.
pub fn confine(command: &mut Command, caps: u64) {
    // SAFETY: `become_nobody` only makes system calls.
    unsafe { command.pre_exec(move || become_nobody(caps)) };
}

fn become_nobody(caps: u64) -> io::Result<()> {
    let done = |code: i64| match code {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    let half = |shift: u32| {
        let bits = (caps >> shift) as u32;
        Half {
            effective: bits,
            permitted: bits,
            inheritable: bits,
        }
    };
    let header = [VERSION_3, 0];
    let halves = [half(0), half(32)];
    let has = |cap: &u32| caps & (1 << cap) != 0;
    for cap in (0..=MOST).filter(|cap| !has(cap)) {
        // A number that this kernel does not know is refused.
        // SAFETY: numbers only.
        unsafe { libc::prctl(libc::PR_CAPBSET_DROP, cap, 0, 0, 0) };
    }
    // SAFETY: numbers only; an empty list has no address.
    unsafe {
        done(libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0).into())?;
        done(libc::setgroups(0, std::ptr::null()).into())?;
        done(libc::setresgid(NOBODY, NOBODY, NOBODY).into())?;
        done(libc::setresuid(NOBODY, NOBODY, NOBODY).into())?;
    }
    // SAFETY: both are as the kernel's structs, and valid for the call.
    done(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), halves.as_ptr()) })?;
    for cap in (0..=MOST).filter(has) {
        let (how, raise) = (libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE);
        // SAFETY: numbers only.
        done(unsafe { libc::prctl(how, raise, cap, 0, 0) }.into())?;
    }
    Ok(())
}
