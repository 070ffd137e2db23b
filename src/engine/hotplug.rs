//! CPUs that come online while a run goes on: the kernel's own messages (uevents, lib/kobject_uevent.c) over netlink, so that nobody
//! looks when nothing happens.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// A socket on which the kernel says what happens to its devices.
pub struct Hotplug(OwnedFd);

impl Hotplug {
    /// Fails where the socket may not be opened: then CPUs that come later are not drained.
    pub fn open() -> io::Result<Self> {
        let flags = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: numbers alone.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, flags, libc::NETLINK_KOBJECT_UEVENT) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a fresh fd that nothing else owns.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: zeros are a value of sockaddr_nl.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
        // The kernel's own group; 2 is udev's.
        address.nl_groups = 1;
        // SAFETY: the address lives through the call, which gets its size.
        let status = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of_val(&address) as libc::socklen_t,
            )
        };
        if status < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(socket))
    }

    /// The CPUs that have come online since the last call.
    pub fn online(&self) -> Vec<i32> {
        let mut cpus = Vec::new();
        let mut message = [0; 4096];
        // A message that did not fit into the socket's buffer is lost (ENOBUFS): read on.
        loop {
            match nix::sys::socket::recv(
                self.0.as_raw_fd(),
                &mut message,
                nix::sys::socket::MsgFlags::empty(),
            ) {
                Ok(len) => cpus.extend(cpu_online(&message[..len])),
                Err(nix::errno::Errno::ENOBUFS | nix::errno::Errno::EINTR) => {}
                Err(_) => return cpus,
            }
        }
    }
}

impl AsFd for Hotplug {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The CPU in `online@/devices/system/cpu/cpuN`, the first of the zero-terminated strings of a message.
fn cpu_online(message: &[u8]) -> Option<i32> {
    let first = message.split(|&b| b == 0).next()?;
    let number = first.strip_prefix(b"online@/devices/system/cpu/cpu")?;
    std::str::from_utf8(number).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_cpus() {
        let of = |text: &str| cpu_online(text.as_bytes());
        assert_eq!(
            of("online@/devices/system/cpu/cpu13\0ACTION=online\0"),
            Some(13)
        );
        assert_eq!(of("offline@/devices/system/cpu/cpu13\0"), None);
        assert_eq!(of("add@/devices/virtual/net/v0\0"), None);
        assert_eq!(of(""), None);
    }
}
