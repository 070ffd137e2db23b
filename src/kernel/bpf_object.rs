//! BPF programs, links and maps as the kernel's objects: by id, by pin, by file descriptor, and what the kernel says of them.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, Result};
use libbpf_rs::{AsRawLibbpf, OpenObject};
use libbpf_sys as sys;

/// A program as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramInfo {
    pub id: u32,
    pub name: String,
    pub tag: [u8; 8],
    pub kind: u32,
    pub btf: u32,
    /// Offloaded to this interface, if not 0.
    pub ifindex: u32,
}

/// Turns libbpf's negative errno into an error.
pub fn check(code: i32) -> io::Result<()> {
    if code < 0 {
        Err(io::Error::from_raw_os_error(-code))
    } else {
        Ok(())
    }
}

/// The file that a call of libbpf's has just given.
pub fn owned(fd: i32) -> io::Result<OwnedFd> {
    check(fd)?;
    // SAFETY: the call just returned this fd, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes an object's maps and relocates its programs, which are not loaded yet. Read-only data, autoload, pins and reused maps must be set
/// before this; the object's `load()` may come after it.
pub fn prepare(object: &mut OpenObject) -> Result<()> {
    // SAFETY: the object is open, and borrowed for as long as this takes.
    let status = unsafe { sys::bpf_object__prepare(object.as_libbpf_object().as_ptr()) };
    check(status).context("failed to prepare the BPF object")
}

pub fn for_each_link(mut each: impl FnMut(u32, &sys::bpf_link_info, OwnedFd)) -> io::Result<()> {
    let mut id = 0;
    loop {
        // SAFETY: the pointer is to a live integer.
        if unsafe { sys::bpf_link_get_next_id(id, &mut id) } < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::NotFound {
                Ok(())
            } else {
                Err(error)
            };
        }
        // A link may go between the two calls.
        let Ok(fd) = link_by_id(id) else { continue };
        let Ok(info) = link_info(fd.as_fd()) else {
            continue;
        };
        each(id, &info, fd);
    }
}

pub fn link_by_id(id: u32) -> io::Result<OwnedFd> {
    // SAFETY: takes a number, returns an fd that nobody else owns.
    owned(unsafe { sys::bpf_link_get_fd_by_id(id) })
}

pub fn link_info(link: BorrowedFd<'_>) -> io::Result<sys::bpf_link_info> {
    let mut info = sys::bpf_link_info::default();
    let mut len = size_of::<sys::bpf_link_info>() as u32;
    // SAFETY: info is writable for len bytes.
    check(unsafe { sys::bpf_link_get_info_by_fd(link.as_raw_fd(), &mut info, &mut len) })?;
    Ok(info)
}

pub fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    // SAFETY: takes a number, returns an fd that nobody else owns.
    owned(unsafe { sys::bpf_prog_get_fd_by_id(id) })
}

pub fn program_info(program: BorrowedFd<'_>) -> io::Result<ProgramInfo> {
    let mut info = sys::bpf_prog_info::default();
    let mut len = size_of::<sys::bpf_prog_info>() as u32;
    // SAFETY: info is writable for len bytes, and all its pointers are null, so the kernel copies no arrays.
    check(unsafe { sys::bpf_prog_get_info_by_fd(program.as_raw_fd(), &mut info, &mut len) })?;
    let name = info
        .name
        .iter()
        .take_while(|c| **c != 0)
        .map(|c| *c as u8)
        .collect::<Vec<_>>();
    Ok(ProgramInfo {
        id: info.id,
        name: String::from_utf8_lossy(&name).into_owned(),
        tag: info.tag,
        kind: info.type_,
        btf: info.btf_id,
        ifindex: info.ifindex,
    })
}

/// Pins any BPF object.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    // SAFETY: the path is a live C string.
    check(unsafe { sys::bpf_obj_pin(object.as_raw_fd(), path.as_ptr()) })
}

/// Opens a pinned BPF object.
pub fn pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    // SAFETY: the path is a live C string.
    owned(unsafe { sys::bpf_obj_get(path.as_ptr()) })
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Hits of the program `fd` that the kernel skipped, since another BPF program ran on the same CPU (counted from 5.12).
pub fn missed(fd: i32) -> u64 {
    let mut info = sys::bpf_prog_info::default();
    let mut len = size_of::<sys::bpf_prog_info>() as u32;
    // SAFETY: info and len are valid for the call, len is the size of info.
    let err = unsafe { sys::bpf_prog_get_info_by_fd(fd, &mut info, &mut len) };
    if err == 0 { info.recursion_misses } else { 0 }
}

/// Hits of the kprobes of link `fd` that the kernel skipped before it came to their program (counted from 6.7; 0 for other links).
pub fn missed_by_link(fd: i32) -> u64 {
    let mut info = sys::bpf_link_info::default();
    let mut len = size_of::<sys::bpf_link_info>() as u32;
    // SAFETY: info and len are valid for the call, len is the size of info; info asks for no array.
    let err = unsafe { sys::bpf_link_get_info_by_fd(fd, &mut info, &mut len) };
    if err != 0 {
        return 0;
    }
    let u = &info.__bindgen_anon_1;
    // SAFETY: `type_` says which member of the union the kernel has filled; what an older kernel does not fill is 0 from above.
    unsafe {
        match info.type_ {
            sys::BPF_LINK_TYPE_KPROBE_MULTI => u.kprobe_multi.missed,
            sys::BPF_LINK_TYPE_PERF_EVENT
                if matches!(
                    u.perf_event.type_,
                    sys::BPF_PERF_EVENT_KPROBE | sys::BPF_PERF_EVENT_KRETPROBE
                ) =>
            {
                u.perf_event.__bindgen_anon_1.kprobe.missed
            }
            _ => 0,
        }
    }
}
