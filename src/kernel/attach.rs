//! Ways to attach and detach that libbpf-rs does not have.

use std::ffi::CString;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::ptr::NonNull;

use anyhow::{Context, Result, anyhow, bail};
use libbpf_rs::{AsRawLibbpf, Link, ProgramMut};
use libbpf_sys as sys;
use nix::poll::{PollFd, PollFlags, PollTimeout};

use super::caps;

/// One kprobe.multi link on the functions at `addrs`, or on their `returns`. The kernel refuses all of them if it refuses one.
pub fn kprobe_multi_addrs(program: &ProgramMut<'_>, addrs: &[u64], returns: bool) -> Result<Link> {
    let opts = sys::bpf_kprobe_multi_opts {
        sz: size_of::<sys::bpf_kprobe_multi_opts>() as _,
        addrs: addrs.as_ptr().cast(),
        cnt: addrs.len() as _,
        retprobe: returns,
        ..Default::default()
    };
    multi(program, &opts)
}

/// The same by name, where addresses are hidden.
pub fn kprobe_multi_names(program: &ProgramMut<'_>, names: &[&str], returns: bool) -> Result<Link> {
    let owned: Vec<CString> = names
        .iter()
        .map(|n| CString::new(*n))
        .collect::<Result<_, _>>()
        .context("a function name with a NUL byte")?;
    let mut pointers: Vec<_> = owned.iter().map(|n| n.as_ptr()).collect();
    let opts = sys::bpf_kprobe_multi_opts {
        sz: size_of::<sys::bpf_kprobe_multi_opts>() as _,
        syms: pointers.as_mut_ptr(),
        cnt: pointers.len() as _,
        retprobe: returns,
        ..Default::default()
    };
    multi(program, &opts)
}

fn multi(program: &ProgramMut<'_>, opts: &sys::bpf_kprobe_multi_opts) -> Result<Link> {
    // SAFETY: the program is loaded and valid; opts and the arrays that it points to outlive the call.
    let link = unsafe {
        sys::bpf_program__attach_kprobe_multi_opts(
            program.as_libbpf_object().as_ptr(),
            std::ptr::null(),
            opts,
        )
    };
    let link = NonNull::new(link).ok_or_else(|| {
        anyhow!(
            "failed to attach kprobe.multi to {} functions: {}",
            opts.cnt,
            std::io::Error::last_os_error()
        )
    })?;
    // SAFETY: a valid link that nothing else owns.
    Ok(unsafe { Link::from_ptr(link) })
}

/// Raises the limit of open files so that `links` more fit: a single kprobe holds one or two.
pub fn make_room(links: usize) -> Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let wanted = 2 * links as u64 + 1024;
    let (soft, hard) =
        getrlimit(Resource::RLIMIT_NOFILE).context("failed to read the limit of open files")?;
    if soft >= wanted {
        return Ok(());
    }
    setrlimit(Resource::RLIMIT_NOFILE, wanted, hard.max(wanted)).with_context(|| {
        format!("failed to raise the limit of open files from {soft} to {wanted} (ulimit -n)")
    })
}

/// Runs `program` `hz` times a second on each of `cpus`, by the kernel's own clock: it needs no PMU.
pub fn cpu_clock(program: &ProgramMut<'_>, cpus: &[i32], hz: u64) -> Result<Vec<Link>> {
    cpus.iter()
        .map(|&cpu| {
            // The link owns the fd from here on.
            program
                .attach_perf_event(open_cpu_clock(cpu, hz)?.into_raw_fd())
                .with_context(|| format!("failed to attach to the cpu-clock event on CPU {cpu}"))
        })
        .collect()
}

/// PERF_EVENT_IOC_SET_BPF (linux/perf_event.h)
const SET_BPF: libc::Ioctl = libc::_IOW::<u32>(b'$' as u32, 8);

/// The same of one CPU, until the fd is closed.
pub fn cpu_clock_of(program: BorrowedFd<'_>, cpu: i32, hz: u64) -> Result<OwnedFd> {
    let event = open_cpu_clock(cpu, hz)?;
    // SAFETY: two fds that are open; no pointers.
    let status = unsafe { libc::ioctl(event.as_raw_fd(), SET_BPF, program.as_raw_fd()) };
    if status < 0 {
        return Err(std::io::Error::last_os_error())
            .with_context(|| format!("failed to attach to the cpu-clock event on CPU {cpu}"));
    }
    Ok(event)
}

fn open_cpu_clock(cpu: i32, hz: u64) -> Result<OwnedFd> {
    let mut attr = sys::perf_event_attr {
        type_: sys::PERF_TYPE_SOFTWARE,
        size: size_of::<sys::perf_event_attr>() as u32,
        config: u64::from(sys::PERF_COUNT_SW_CPU_CLOCK),
        ..Default::default()
    };
    attr.__bindgen_anon_1.sample_freq = hz;
    attr.set_freq(1);
    // SAFETY: attr is valid for the call and says its size; the other arguments are plain numbers.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const attr,
            -1,
            cpu,
            -1,
            sys::PERF_FLAG_FD_CLOEXEC,
        )
    };
    if fd < 0 {
        let e = std::io::Error::last_os_error();
        let why = match e.raw_os_error() {
            Some(libc::EACCES) => caps::why_no_perf(),
            _ => e.to_string(),
        };
        bail!("failed to open a cpu-clock event on CPU {cpu}: {why}");
    }
    // SAFETY: a fresh fd that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Leaves the closing of `links` to a child process, which outlives this one and holds the last references; so this process can
/// end at once. Falls back to closing them here.
pub fn close_in_child(links: Vec<Link>) {
    // SAFETY: no pointers; gives an fd or a negative number.
    let parent = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) };
    if parent < 0 {
        return;
    }
    // SAFETY: a fresh fd that nothing else owns.
    let parent = unsafe { OwnedFd::from_raw_fd(parent as i32) };
    // SAFETY: the child calls only async-signal-safe functions (setsid, dup2, poll, _exit).
    match unsafe { libc::fork() } {
        0 => {
            let mut fds = [PollFd::new(
                std::os::fd::AsFd::as_fd(&parent),
                PollFlags::POLLIN,
            )];
            // SAFETY: plain system calls on fds of this process. The standard streams go, so that no reader of a pipe waits for this
            // child.
            unsafe {
                libc::setsid();
                for fd in 0..3 {
                    libc::close(fd);
                }
            }
            // Readable once the parent has ended and closed its files (do_exit: exit_files comes before exit_notify).
            let _ = nix::poll::poll(&mut fds, PollTimeout::NONE);
            // SAFETY: ends the child; the kernel closes its files.
            unsafe { libc::_exit(0) }
        }
        -1 => {}
        _ => {
            // The child has its own references; what libbpf would do to ours (disable, close) takes the time that we mean to save.
            std::mem::forget(links);
            let _ = parent.as_raw_fd();
        }
    }
}
