//! Network interfaces of the current namespace: names, indices, drivers, promiscuous mode.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::net::if_::{if_nameindex, if_nametoindex};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::rtnl;
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

/// A question to the kernel about an interface: `fill` completes the request, which holds the answer afterwards.
fn ask(
    name: &str,
    question: libc::c_ulong,
    fill: impl FnOnce(&mut libc::ifreq),
) -> io::Result<libc::ifreq> {
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: ifreq is integers, arrays and a pointer: all zeros is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    fill(&mut request);
    // SAFETY: the request, and what the caller let it point to, live through the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), question as _, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(request)
}

/// What kind of interface it is (ARPHRD_*).
pub fn hardware(name: &str) -> Result<u16> {
    let answer = ask(name, libc::SIOCGIFHWADDR, |_| ())
        .with_context(|| format!("failed to ask for the kind of {name}"))?;
    // SAFETY: this answer is a socket address.
    Ok(unsafe { answer.ifr_ifru.ifru_hwaddr }.sa_family)
}

/// The addresses of a tunnel device: IPv4 or IPv6, zeros where it has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TunnelEnds {
    pub local: [u8; 16],
    pub remote: [u8; 16],
}

/// The ends of a tunnel device, which are its link addresses.
pub fn tunnel_ends(ifindex: u32) -> io::Result<TunnelEnds> {
    let link = rtnl::link(ifindex)?;
    let padded = |address: Vec<u8>| {
        let mut bytes = [0; 16];
        let len = address.len().min(bytes.len());
        bytes[..len].copy_from_slice(&address[..len]);
        bytes
    };
    Ok(TunnelEnds {
        local: padded(link.address),
        remote: padded(link.broadcast),
    })
}

/// The mask of the interface's first IPv4 address, in network byte order; none where it has no address.
pub fn netmask(name: &str) -> Option<u32> {
    let answer = ask(name, libc::SIOCGIFNETMASK, |_| ()).ok()?;
    // SAFETY: this answer is an IPv4 socket address: family, port, address.
    let address = unsafe { answer.ifr_ifru.ifru_netmask };
    let bytes = address.sa_data.get(2..6)?;
    Some(u32::from_ne_bytes([
        bytes[0] as u8,
        bytes[1] as u8,
        bytes[2] as u8,
        bytes[3] as u8,
    ]))
}

const SIOCETHTOOL: libc::c_ulong = 0x8946;

/// Whether the device takes VLAN tags off the packets that it receives, and keeps them beside (`rx-vlan-offload`).
pub fn takes_vlan_tags(name: &str) -> bool {
    const ETHTOOL_GFLAGS: u32 = 0x25;
    const ETH_FLAG_RXVLAN: u32 = 1 << 8;
    /// `struct ethtool_value`
    #[repr(C)]
    struct Value {
        command: u32,
        data: u32,
    }
    let mut value = Value {
        command: ETHTOOL_GFLAGS,
        data: 0,
    };
    let answer = ask(name, SIOCETHTOOL, |request| {
        request.ifr_ifru.ifru_data = (&raw mut value).cast();
    });
    answer.is_ok() && value.data & ETH_FLAG_RXVLAN != 0
}

/// The VLAN interfaces that lie above an interface of this namespace.
pub fn vlans_above(name: &str) -> Vec<String> {
    // `vlan5  | 5  | eth0`, below two lines of titles.
    let table = std::fs::read_to_string("/proc/thread-self/net/vlan/config").unwrap_or_default();
    table
        .lines()
        .filter_map(|line| {
            let mut cells = line.split('|').map(str::trim);
            let vlan = cells.next()?;
            (cells.nth(1)? == name).then(|| vlan.to_owned())
        })
        .collect()
}

/// The name of an interface's driver (`veth`, `virtio_net`), as ethtool gives it; nothing where the interface has none.
pub fn driver(name: &str) -> Option<String> {
    const ETHTOOL_GDRVINFO: u32 = 3;
    /// `struct ethtool_drvinfo`: 196 bytes, of which the command and the driver's name matter here.
    #[repr(C, align(4))]
    struct DrvInfo {
        command: u32,
        driver: [u8; 32],
        rest: [u8; 160],
    }
    let mut info = DrvInfo {
        command: ETHTOOL_GDRVINFO,
        driver: [0; 32],
        rest: [0; 160],
    };
    ask(name, SIOCETHTOOL, |request| {
        request.ifr_ifru.ifru_data = (&raw mut info).cast();
    })
    .ok()?;
    let len = info.driver.iter().position(|b| *b == 0)?;
    String::from_utf8(info.driver[..len].to_vec()).ok()
}

/// The name of an interface of the current namespace.
pub fn name(ifindex: u32) -> Option<String> {
    let name = nix::net::if_::if_indextoname(ifindex).ok()?;
    Some(name.to_string_lossy().into_owned())
}

/// Counters of an interface's driver (`ethtool -S`), at most this many.
const STATISTICS: usize = 4096;
/// ETH_SS_STATS, and ETH_GSTRING_LEN
const STATS_SET: u32 = 1;
const STRING: usize = 32;

/// A request to a driver in `words`, of which the first is the command.
fn ethtool(name: &str, words: &mut [u64]) -> io::Result<()> {
    ask(name, SIOCETHTOOL, |request| {
        request.ifr_ifru.ifru_data = words.as_mut_ptr().cast();
    })
    .map(|_| ())
}

/// The counters of an interface's driver; none where it has none.
pub fn statistics(name: &str) -> Vec<(String, u64)> {
    const ETHTOOL_GSTRINGS: u64 = 0x1b;
    const ETHTOOL_GSTATS: u64 = 0x1d;
    const ETHTOOL_GSSET_INFO: u64 = 0x37;
    // struct ethtool_sset_info: command and 4 bytes, mask, data.
    let mut info = [ETHTOOL_GSSET_INFO, 1 << STATS_SET, 0];
    if ethtool(name, &mut info).is_err() {
        return Vec::new();
    }
    let count = info[2] as u32 as usize;
    if count == 0 || count > STATISTICS {
        return Vec::new();
    }
    // A driver may have more of them by the next request: room for as many again.
    let mut strings = vec![0u64; 2 + 2 * count * STRING / 8];
    strings[0] = ETHTOOL_GSTRINGS | u64::from(STATS_SET) << 32;
    strings[1] = count as u64;
    let mut values = vec![0u64; 1 + 2 * count];
    values[0] = ETHTOOL_GSTATS | (count as u64) << 32;
    if ethtool(name, &mut strings).is_err() || ethtool(name, &mut values).is_err() {
        return Vec::new();
    }
    // struct ethtool_gstrings has its bytes behind three numbers of 32 bits.
    let bytes: Vec<u8> = strings.iter().flat_map(|w| w.to_ne_bytes()).collect();
    let names = bytes[12..].chunks_exact(STRING).take(count);
    names
        .map(|name| {
            let len = name.iter().position(|b| *b == 0).unwrap_or(STRING);
            String::from_utf8_lossy(&name[..len]).into_owned()
        })
        .zip(values[1..].iter().copied())
        .collect()
}

/// How many packets the receive ring of an interface holds, and how many it may hold; none where the driver does not tell.
pub fn receive_ring(name: &str) -> Option<(u32, u32)> {
    const ETHTOOL_GRINGPARAM: u64 = 0x10;
    // struct ethtool_ringparam: command, four limits, four settings.
    let mut words = [ETHTOOL_GRINGPARAM, 0, 0, 0, 0];
    ethtool(name, &mut words).ok()?;
    let (most, now) = ((words[0] >> 32) as u32, (words[2] >> 32) as u32);
    (most > 0).then_some((now, most))
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
