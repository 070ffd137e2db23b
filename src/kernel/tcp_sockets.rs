//! TCP sockets and what the kernel counted in them, by sock_diag, in the calling thread's network namespace.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result};
use nix::sys::socket::SockProtocol;

use super::routing;

/// SOCK_DIAG_BY_FAMILY of include/uapi/linux/sock_diag.h.
const BY_FAMILY: u16 = 20;
/// Bytes of struct inet_diag_req_v2 and inet_diag_msg.
const REQUEST: usize = 56;
const MESSAGE: usize = 72;
/// INET_DIAG_INFO, INET_DIAG_ULP_INFO and, from 5.9 on, INET_DIAG_CGROUP_ID.
const INFO: u16 = 2;
const ULP_INFO: u16 = 19;
const CGROUP_ID: u16 = 21;
/// TCP_TIME_WAIT, TCP_CLOSE, TCP_LISTEN and TCP_NEW_SYN_RECV of include/net/tcp_states.h: no connections, or no sockets.
const LEFT_OUT: u32 = 1 << 6 | 1 << 7 | 1 << 10 | 1 << 12;

/// A connection's socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcpSocket {
    /// TCP_* of include/net/tcp_states.h
    pub state: u8,
    pub local: SocketAddr,
    pub remote: SocketAddr,
    pub uid: u32,
    /// 0: no process has it any longer
    pub inode: u64,
    /// id (v2); 0: not known
    pub cgroup: u64,
    pub mptcp: bool,
    info: Vec<u8>,
}

impl TcpSocket {
    /// A number of struct tcp_info (include/uapi/linux/tcp.h) by its offset; 0 where the kernel has none.
    pub fn word(&self, offset: usize) -> u32 {
        let bytes = self.info.get(offset..offset + 4);
        bytes.map_or(0, |b| u32::from_ne_bytes(b.try_into().expect("four bytes")))
    }

    /// The same of 64 bits.
    pub fn long(&self, offset: usize) -> u64 {
        let bytes = self.info.get(offset..offset + 8);
        bytes.map_or(0, |b| {
            u64::from_ne_bytes(b.try_into().expect("eight bytes"))
        })
    }
}

/// All of them. An error is one of netlink.
pub fn all() -> Result<Vec<TcpSocket>> {
    let mut found = Vec::new();
    for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
        let mut body = [0; REQUEST];
        body[..3].copy_from_slice(&[family, libc::IPPROTO_TCP as u8, 1 << (INFO - 1)]);
        body[4..8].copy_from_slice(&(!LEFT_OUT).to_ne_bytes());
        let answers = routing::ask_by(
            SockProtocol::NetlinkSockDiag,
            BY_FAMILY,
            libc::NLM_F_DUMP,
            &body,
        )?;
        let answers = answers.context("the kernel does not list TCP sockets (module tcp_diag)")?;
        found.extend(answers.iter().filter_map(|message| socket(message)));
    }
    Ok(found)
}

fn socket(message: &[u8]) -> Option<TcpSocket> {
    let fixed = message.get(..MESSAGE)?;
    let mut attributes = routing::attributes(message, MESSAGE);
    let address = |at: usize| -> Option<IpAddr> {
        Some(match i32::from(fixed[0]) {
            libc::AF_INET => Ipv4Addr::from(<[u8; 4]>::try_from(&fixed[at..at + 4]).ok()?).into(),
            _ => Ipv6Addr::from(<[u8; 16]>::try_from(&fixed[at..at + 16]).ok()?).into(),
        })
    };
    let port = |at: usize| u16::from_be_bytes([fixed[at], fixed[at + 1]]);
    let word = |at: usize| Some(u32::from_ne_bytes(fixed[at..at + 4].try_into().ok()?));
    let cgroup = attributes.get(&CGROUP_ID);
    let cgroup = cgroup.and_then(|id| Some(u64::from_ne_bytes(id.get(..8)?.try_into().ok()?)));
    // The name of what lies above it, as a string in a nested attribute.
    let above = attributes.get(&ULP_INFO);
    Some(TcpSocket {
        state: fixed[1],
        local: SocketAddr::new(address(8)?, port(4)),
        remote: SocketAddr::new(address(24)?, port(6)),
        uid: word(64)?,
        inode: word(68)?.into(),
        cgroup: cgroup.unwrap_or(0),
        mptcp: above.is_some_and(|b| b.windows(5).any(|name| name == b"mptcp")),
        info: attributes.remove(&INFO).unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn both_ends_of_our_own_connection() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let client = std::net::TcpStream::connect(to).unwrap();
        let from = client.local_addr().unwrap();
        // A machine without tcp_diag lists none.
        let Ok(all) = all() else { return };
        for (local, remote) in [(from, to), (to, from)] {
            let ours = all.iter().find(|s| s.local == local && s.remote == remote);
            let ours = ours.unwrap_or_else(|| panic!("{local} to {remote} in {all:?}"));
            assert_eq!(ours.state, 1);
            // tcpi_rtt, tcpi_bytes_received
            assert!(ours.word(68) > 0 && ours.long(128) == 0);
        }
        assert!(all.iter().all(|s| s.local != to || s.remote.port() != 0));
    }

    proptest! {
        #[test]
        fn odd_bytes_never_panic(b in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Some(socket) = socket(&b) {
                socket.word(216);
                socket.long(200);
            }
        }
    }
}
