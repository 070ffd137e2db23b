//! One link as the kernel describes it over netlink (RTM_GETLINK). It asks for that link alone: a list of all links needs a larger
//! receive buffer than `net.core.rmem_default` may give.

use std::io;
use std::os::fd::AsRawFd;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

/// Bytes of `struct nlmsghdr` and of `struct ifinfomsg`.
const HEADER: usize = 16;
/// More than the description of one link takes.
const ANSWER: usize = 1 << 16;

// Attributes of a link (IFLA_*), and of its XDP programs (IFLA_XDP_*).
const ADDRESS: u16 = 1;
const BROADCAST: u16 = 2;
const XDP: u16 = 43;
const DRV_PROG_ID: u16 = 5;
const SKB_PROG_ID: u16 = 6;
const HW_PROG_ID: u16 = 7;
/// NLA_F_NESTED and NLA_F_NET_BYTEORDER
const FLAGS: u16 = 0xc000;

/// What is asked for of a link.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// A tunnel's own end.
    pub address: Vec<u8>,
    /// A tunnel's far end.
    pub broadcast: Vec<u8>,
    /// Ids of its XDP programs in the driver, in the stack and in the network card; 0: none.
    pub xdp: [u32; 3],
}

/// The link of this index in the current namespace; ENODEV where there is none.
pub fn link(ifindex: u32) -> io::Result<Link> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    send(socket.as_raw_fd(), &request(ifindex), MsgFlags::empty())?;
    let mut answer = vec![0; ANSWER];
    let len = recv(socket.as_raw_fd(), &mut answer, MsgFlags::MSG_TRUNC)?;
    let answer = answer.get(..len).ok_or(io::ErrorKind::InvalidData)?;
    parse(answer)
}

fn request(ifindex: u32) -> [u8; 2 * HEADER] {
    let mut request = [0; 2 * HEADER];
    request[..4].copy_from_slice(&(2 * HEADER as u32).to_ne_bytes());
    request[4..6].copy_from_slice(&libc::RTM_GETLINK.to_ne_bytes());
    request[6..8].copy_from_slice(&(libc::NLM_F_REQUEST as u16).to_ne_bytes());
    // The index, behind the family and the kind of device.
    request[HEADER + 4..HEADER + 8].copy_from_slice(&ifindex.to_ne_bytes());
    request
}

fn parse(answer: &[u8]) -> io::Result<Link> {
    let kind = u16_at(answer, 4).ok_or(io::ErrorKind::InvalidData)?;
    let body = answer.get(HEADER..).ok_or(io::ErrorKind::InvalidData)?;
    if kind == libc::NLMSG_ERROR as u16 {
        let errno = u32_of(body).map_or(0, |negative| (negative as i32).saturating_neg());
        return Err(io::Error::from_raw_os_error(errno));
    }
    if kind != libc::RTM_NEWLINK {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut link = Link::default();
    for (kind, value) in Attributes(body.get(HEADER..).unwrap_or_default()) {
        match kind {
            ADDRESS => link.address = value.to_vec(),
            BROADCAST => link.broadcast = value.to_vec(),
            XDP => link.xdp = programs(value),
            _ => {}
        }
    }
    Ok(link)
}

fn programs(attributes: &[u8]) -> [u32; 3] {
    let mut programs = [0; 3];
    for (kind, value) in Attributes(attributes) {
        let at = [DRV_PROG_ID, SKB_PROG_ID, HW_PROG_ID]
            .iter()
            .position(|of_mode| *of_mode == kind);
        if let (Some(at), Some(id)) = (at, u32_of(value)) {
            programs[at] = id;
        }
    }
    programs
}

/// Attributes, each with its length in front, until one does not fit.
struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let len = usize::from(u16_at(self.0, 0)?);
        let kind = u16_at(self.0, 2)? & !FLAGS;
        let value = self.0.get(4..len)?;
        self.0 = self.0.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at + 2)?;
    Some(u16::from_ne_bytes(bytes.try_into().ok()?))
}

fn u32_of(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_loopback_is_there_and_another_is_not() {
        let link = link(1).unwrap();
        assert_eq!((link.address.len(), link.xdp), (6, [0; 3]));
        let error = super::link(0x7fff_fff0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
    }

    #[test]
    fn programs_by_mode() {
        let attribute = |kind: u16, value: &[u8]| {
            let len = (4 + value.len()) as u16;
            [&len.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat()
        };
        let nested = [
            attribute(2, &[1, 0, 0, 0]),
            attribute(SKB_PROG_ID, &9u32.to_ne_bytes()),
        ];
        let mut answer = vec![0; 2 * HEADER];
        answer[4..6].copy_from_slice(&libc::RTM_NEWLINK.to_ne_bytes());
        answer.extend(attribute(ADDRESS, &[10, 9, 0, 2]));
        answer.extend(attribute(XDP | 0x8000, &nested.concat()));
        let link = parse(&answer).unwrap();
        assert_eq!(
            (&link.address[..], link.xdp),
            (&[10, 9, 0, 2][..], [0, 9, 0])
        );
    }

    proptest! {
        #[test]
        fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
            let mut bytes = bytes;
            if let Some(kind) = bytes.get_mut(4..6) {
                kind.copy_from_slice(&libc::RTM_NEWLINK.to_ne_bytes());
            }
            let _ = parse(&bytes);
        }
    }
}
