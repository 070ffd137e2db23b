//! What the kernel answers by rtnetlink, in the calling thread's network namespace: routes, neighbours, queue disciplines, devices.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

/// Bytes of an answer, at most.
const ANSWER: usize = 32 * 1024;
/// Messages of a dump that are read, at most.
const MESSAGES: usize = 65_536;
const HEADER: usize = 16;
/// struct rtmsg, struct ndmsg, struct tcmsg, struct ifinfomsg
const RTMSG: usize = 12;
const NDMSG: usize = 12;
const TCMSG: usize = 20;
const IFINFOMSG: usize = 16;
/// include/uapi/linux/rtnetlink.h
const RTM_F_LOOKUP_TABLE: u32 = 0x1000;
/// enum tca_stats (TCA_STATS2's)
const TCA_STATS_BASIC: u16 = 1;
const TCA_STATS_QUEUE: u16 = 3;

/// A route as the kernel chose it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Route {
    /// index of the device
    pub oif: u32,
    pub gateway: Option<IpAddr>,
    pub source: Option<IpAddr>,
    pub table: u32,
    /// RTN_*
    pub kind: u8,
}

/// A neighbour entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    pub ifindex: u32,
    /// NUD_*
    pub state: u16,
    pub mac: Option<[u8; 6]>,
}

/// A queue discipline with its own counters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Qdisc {
    pub kind: String,
    /// major << 16 | minor
    pub handle: u32,
    pub parent: u32,
    pub packets: u64,
    pub dropped: u32,
    pub overlimits: u32,
    pub queued: u32,
    pub backlog: u32,
}

/// A device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Device {
    pub name: String,
    /// IFF_*
    pub flags: u32,
    pub mtu: u32,
    pub mac: Option<[u8; 6]>,
    pub master: Option<u32>,
    /// id of its XDP program
    pub xdp: Option<u32>,
}

/// A device's counters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LinkStats {
    pub index: u32,
    pub name: String,
    /// struct rtnl_link_stats64
    pub stats: Vec<u64>,
}

/// The route to `to`, for packets from `from` that came in by the device `iif` (0: own packets). An errno where there is none.
pub fn route(to: IpAddr, from: Option<IpAddr>, iif: u32) -> Result<Result<Route, Errno>> {
    let family = family_of(to);
    let bits = if to.is_ipv4() { 32 } else { 128 };
    let mut body = vec![
        family,
        bits,
        if from.is_some() { bits } else { 0 },
        0,
        0,
        0,
        0,
        0,
    ];
    // Without this the kernel says that each route is of the table main.
    body.extend_from_slice(&RTM_F_LOOKUP_TABLE.to_ne_bytes());
    attribute(&mut body, libc::RTA_DST, &octets(to));
    if let Some(from) = from {
        attribute(&mut body, libc::RTA_SRC, &octets(from));
    }
    if iif != 0 {
        attribute(&mut body, libc::RTA_IIF, &iif.to_ne_bytes());
    }
    let answers = match ask(libc::RTM_GETROUTE, 0, &body)? {
        Ok(answers) => answers,
        Err(errno) => return Ok(Err(errno)),
    };
    let Some(message) = answers.first() else {
        return Ok(Err(Errno::ENODATA));
    };
    let found = attributes(message, RTMSG);
    let address = |kind| found.get(&kind).and_then(|b| ip(b));
    Ok(Ok(Route {
        oif: number(&found, libc::RTA_OIF),
        gateway: address(libc::RTA_GATEWAY),
        source: address(libc::RTA_PREFSRC),
        table: number(&found, libc::RTA_TABLE),
        kind: message.get(7).copied().unwrap_or_default(),
    }))
}

/// The entries of this address.
pub fn neighbours(of: IpAddr) -> Result<Vec<Neighbour>> {
    let mut body = vec![0; NDMSG];
    body[0] = family_of(of);
    let messages = ask(libc::RTM_GETNEIGH, libc::NLM_F_DUMP, &body)?.unwrap_or_default();
    let entry = |message: &Vec<u8>| {
        let found = attributes(message, NDMSG);
        let is_it = found.get(&libc::NDA_DST).and_then(|b| ip(b)) == Some(of);
        is_it.then(|| Neighbour {
            ifindex: u32_at(message, 4),
            state: message
                .get(8..10)
                .map_or(0, |b| u16::from_ne_bytes([b[0], b[1]])),
            mac: found
                .get(&libc::NDA_LLADDR)
                .and_then(|b| b.as_slice().try_into().ok()),
        })
    };
    Ok(messages.iter().filter_map(entry).collect())
}

/// The queue disciplines of a device.
pub fn qdiscs(ifindex: u32) -> Result<Vec<Qdisc>> {
    let mut body = vec![0; TCMSG];
    body[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    let messages = ask(libc::RTM_GETQDISC, libc::NLM_F_DUMP, &body)?.unwrap_or_default();
    let of_it = messages.iter().filter(|m| u32_at(m, 4) == ifindex);
    Ok(of_it.map(|m| qdisc(m)).collect())
}

/// The queue disciplines of all devices, with the devices' indices.
pub fn all_qdiscs() -> Result<Vec<(u32, Qdisc)>> {
    let messages = ask(libc::RTM_GETQDISC, libc::NLM_F_DUMP, &[0; TCMSG])?.unwrap_or_default();
    Ok(messages.iter().map(|m| (u32_at(m, 4), qdisc(m))).collect())
}

/// All devices with their counters.
pub fn links() -> Result<Vec<LinkStats>> {
    let messages = ask(libc::RTM_GETLINK, libc::NLM_F_DUMP, &[0; IFINFOMSG])?.unwrap_or_default();
    let link = |message: &Vec<u8>| {
        let found = attributes(message, IFINFOMSG);
        let stats = found.get(&libc::IFLA_STATS64).map_or(&[][..], |b| b);
        LinkStats {
            index: u32_at(message, 4),
            name: found
                .get(&libc::IFLA_IFNAME)
                .map_or_else(String::new, |b| text(b)),
            stats: stats
                .chunks_exact(8)
                .map(|b| u64::from_ne_bytes(b.try_into().unwrap_or_default()))
                .collect(),
        }
    };
    Ok(messages.iter().map(link).collect())
}

fn qdisc(message: &[u8]) -> Qdisc {
    let found = attributes(message, TCMSG);
    let stats = found
        .get(&libc::TCA_STATS2)
        .map_or_else(HashMap::new, |b| attributes(b, 0));
    let at = |kind, offset| stats.get(&kind).map_or(0, |b: &Vec<u8>| u32_at(b, offset));
    Qdisc {
        kind: found
            .get(&libc::TCA_KIND)
            .map_or_else(String::new, |b| text(b)),
        handle: u32_at(message, 8),
        parent: u32_at(message, 12),
        packets: at(TCA_STATS_BASIC, 8).into(),
        queued: at(TCA_STATS_QUEUE, 0),
        backlog: at(TCA_STATS_QUEUE, 4),
        dropped: at(TCA_STATS_QUEUE, 8),
        overlimits: at(TCA_STATS_QUEUE, 16),
    }
}

/// The device with this index; `None` where there is none.
pub fn device(ifindex: u32) -> Result<Option<Device>> {
    let mut body = vec![0; IFINFOMSG];
    body[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    let answers = ask(libc::RTM_GETLINK, 0, &body)?.unwrap_or_default();
    Ok(answers.first().map(|message| {
        let found = attributes(message, IFINFOMSG);
        let xdp = found.get(&libc::IFLA_XDP).map(|b| attributes(b, 0));
        // IFLA_XDP_PROG_ID
        let xdp = xdp.map_or(0, |x| number(&x, 4));
        let master = number(&found, libc::IFLA_MASTER);
        Device {
            name: found
                .get(&libc::IFLA_IFNAME)
                .map_or_else(String::new, |b| text(b)),
            flags: u32_at(message, 8),
            mtu: number(&found, libc::IFLA_MTU),
            mac: found
                .get(&libc::IFLA_ADDRESS)
                .and_then(|b| b.as_slice().try_into().ok()),
            master: (master != 0).then_some(master),
            xdp: (xdp != 0).then_some(xdp),
        }
    }))
}

/// Sends a request; its answers without their headers, or the kernel's errno.
fn ask(kind: u16, flags: i32, body: &[u8]) -> Result<Result<Vec<Vec<u8>>, Errno>> {
    ask_by(SockProtocol::NetlinkRoute, kind, flags, body)
}

/// The same by another protocol of netlink.
pub(super) fn ask_by(
    protocol: SockProtocol,
    kind: u16,
    flags: i32,
    body: &[u8],
) -> Result<Result<Vec<Vec<u8>>, Errno>> {
    let fd = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        protocol,
    )
    .context("failed to open a netlink socket")?;
    setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::seconds(2))
        .context("failed to set a netlink socket's time limit")?;
    let flags = (libc::NLM_F_REQUEST | flags) as u16;
    let mut request = Vec::new();
    request.extend_from_slice(&((HEADER + body.len()) as u32).to_ne_bytes());
    request.extend_from_slice(&kind.to_ne_bytes());
    request.extend_from_slice(&flags.to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    request.extend_from_slice(body);
    send(fd.as_raw_fd(), &request, MsgFlags::empty()).context("failed to ask by netlink")?;
    answers(&fd, flags & libc::NLM_F_DUMP as u16 != 0)
}

fn answers(fd: &OwnedFd, dump: bool) -> Result<Result<Vec<Vec<u8>>, Errno>> {
    let mut found = Vec::new();
    let mut buffer = vec![0; ANSWER];
    loop {
        let len = match recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(0) => return Ok(Ok(found)),
            Ok(len) => len,
            Err(Errno::EINTR) => continue,
            Err(e) => return Err(io::Error::from(e)).context("failed to read a netlink answer"),
        };
        let mut rest = &buffer[..len];
        while rest.len() >= HEADER {
            let size = (u32_at(rest, 0) as usize).clamp(HEADER, rest.len());
            let kind = i32::from(u16::from_ne_bytes([rest[4], rest[5]]));
            let body = &rest[HEADER..size];
            match kind {
                libc::NLMSG_DONE => return Ok(Ok(found)),
                libc::NLMSG_ERROR => {
                    let errno = (u32_at(body, 0) as i32).wrapping_neg();
                    return Ok(match errno {
                        0 => Ok(found),
                        errno => Err(Errno::from_raw(errno)),
                    });
                }
                _ => found.push(body.to_vec()),
            }
            rest = &rest[size.next_multiple_of(4).min(rest.len())..];
        }
        if !dump || found.len() >= MESSAGES {
            return Ok(Ok(found));
        }
    }
}

fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    body.extend_from_slice(&((4 + value.len()) as u16).to_ne_bytes());
    body.extend_from_slice(&kind.to_ne_bytes());
    body.extend_from_slice(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// The attributes behind a message's fixed part.
pub(super) fn attributes(message: &[u8], fixed: usize) -> HashMap<u16, Vec<u8>> {
    /// NLA_TYPE_MASK
    const KIND: u16 = 0x3fff;
    let mut found = HashMap::new();
    let mut rest = message.get(fixed..).unwrap_or_default();
    while rest.len() >= 4 {
        let size = usize::from(u16::from_ne_bytes([rest[0], rest[1]])).clamp(4, rest.len());
        let kind = u16::from_ne_bytes([rest[2], rest[3]]) & KIND;
        found.insert(kind, rest[4..size].to_vec());
        rest = &rest[size.next_multiple_of(4).min(rest.len())..];
    }
    found
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let word = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    word.map_or(0, u32::from_ne_bytes)
}

fn number(found: &HashMap<u16, Vec<u8>>, kind: u16) -> u32 {
    found.get(&kind).map_or(0, |b| u32_at(b, 0))
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

fn family_of(ip: IpAddr) -> u8 {
    if ip.is_ipv4() {
        libc::AF_INET as u8
    } else {
        libc::AF_INET6 as u8
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_way_to_ourselves() {
        let route = route("127.0.0.1".parse().unwrap(), None, 0)
            .unwrap()
            .unwrap();
        // RTN_LOCAL
        assert_eq!(route.kind, 2);
        let lo = device(route.oif).unwrap().unwrap();
        assert_eq!(lo.name, "lo");
        assert!(device(1 << 30).unwrap().is_none());
        assert!(
            neighbours("192.0.2.77".parse().unwrap())
                .unwrap()
                .is_empty()
        );
    }

    proptest! {
        #[test]
        fn odd_bytes_never_panic(b in prop::collection::vec(any::<u8>(), 0..200), fixed in 0usize..40) {
            let _ = attributes(&b, fixed);
            let _ = qdisc(&b);
        }
    }
}
