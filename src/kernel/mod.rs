//! What the running kernel has and knows. No tool's knowledge here.

pub mod attach;
pub mod btf;
pub mod btf_core;
mod btf_data;
pub mod btf_dump;
pub mod cgroup;
pub mod clock;
pub mod drop_reason;
pub mod features;
mod ftrace;
pub mod functions;
pub mod ksyms;
pub mod members;
pub mod netdev;
pub mod netns;
pub mod pages;
pub mod process;
pub mod program;
pub mod trampoline;
pub mod usyms;
pub mod xdp;

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use anyhow::{Context, Result};
use libbpf_rs::{AsRawLibbpf, OpenObject};

/// Turns libbpf's negative errno into an error.
fn check(code: i32) -> io::Result<()> {
    if code < 0 {
        Err(io::Error::from_raw_os_error(-code))
    } else {
        Ok(())
    }
}

/// The file that a call of libbpf's has just given.
fn owned(fd: i32) -> io::Result<OwnedFd> {
    check(fd)?;
    // SAFETY: the call just returned this fd, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes an object's maps and relocates its programs, which are not loaded yet. Read-only data, autoload, pins and reused maps must be set
/// before this; the object's `load()` may come after it.
pub fn prepare(object: &mut OpenObject) -> Result<()> {
    // SAFETY: the object is open, and borrowed for as long as this takes.
    let status = unsafe { libbpf_sys::bpf_object__prepare(object.as_libbpf_object().as_ptr()) };
    check(status).context("failed to prepare the BPF object")
}
