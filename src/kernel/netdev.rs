//! Network interfaces of the current namespace: names, indices, drivers, promiscuous mode.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::net::if_::{if_nameindex, if_nametoindex};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::usage::usage;

/// The index of an interface of the current namespace.
pub fn index(name: &str) -> Result<u32> {
    if_nametoindex(name).map_err(|_| {
        let known = all()
            .unwrap_or_default()
            .into_iter()
            .map(|(_, name)| name)
            .collect::<Vec<_>>();
        usage(format!(
            "no interface {name} in this network namespace (there are: {})",
            known.join(", ")
        ))
    })
}

/// All interfaces of the current namespace, by index.
pub fn all() -> Result<Vec<(u32, String)>> {
    let list = if_nameindex().context("failed to list the interfaces")?;
    let mut all = list
        .iter()
        .map(|interface| {
            (
                interface.index(),
                interface.name().to_string_lossy().into_owned(),
            )
        })
        .collect::<Vec<_>>();
    all.sort_unstable();
    Ok(all)
}

/// The name of an interface's driver (`veth`, `virtio_net`), as ethtool gives it; nothing where the interface has none.
pub fn driver(name: &str) -> Option<String> {
    const SIOCETHTOOL: libc::c_ulong = 0x8946;
    const ETHTOOL_GDRVINFO: u32 = 3;
    /// `struct ethtool_drvinfo`: 196 bytes, of which the command and the driver's name matter here.
    #[repr(C, align(4))]
    struct DrvInfo {
        command: u32,
        driver: [u8; 32],
        rest: [u8; 160],
    }
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .ok()?;
    let mut info = DrvInfo {
        command: ETHTOOL_GDRVINFO,
        driver: [0; 32],
        rest: [0; 160],
    };
    // SAFETY: ifreq is integers, arrays and a pointer: all zeros is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return None;
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = (&raw mut info).cast();
    // SAFETY: the request and the struct behind its pointer live through the call; the kernel writes 196 bytes, its size.
    if unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL as _, &raw mut request) } < 0 {
        return None;
    }
    let len = info.driver.iter().position(|b| *b == 0)?;
    String::from_utf8(info.driver[..len].to_vec()).ok()
}

/// Puts an interface into promiscuous mode for as long as the result lives.
pub fn promiscuous(ifindex: u32) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers, returns an fd that nobody else owns. Protocol 0: the socket receives nothing.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made, owned by nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let request = libc::packet_mreq {
        mr_ifindex: ifindex as i32,
        mr_type: libc::PACKET_MR_PROMISC as u16,
        mr_alen: 0,
        mr_address: [0; 8],
    };
    // SAFETY: the request lives through the call and its length is given.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_ADD_MEMBERSHIP,
            (&raw const request).cast(),
            size_of::<libc::packet_mreq>() as u32,
        )
    };
    if done < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(socket)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_there_and_has_an_index() {
        let all = all().unwrap();
        assert!(
            all.iter()
                .any(|(index, name)| name == "lo" && *index == super::index("lo").unwrap())
        );
        let error = format!("{:#}", super::index("nosuchif0").unwrap_err());
        assert!(
            error.contains("nosuchif0") && error.contains("lo"),
            "{error}"
        );
    }
}
