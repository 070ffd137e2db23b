//! What sockets have dropped, by sock_diag, in the calling thread's network namespace.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::Result;
use nix::sys::socket::SockProtocol;

use super::routing;

/// SOCK_DIAG_BY_FAMILY of include/uapi/linux/sock_diag.h.
const BY_FAMILY: u16 = 20;
/// Bytes of struct inet_diag_req_v2 and inet_diag_msg.
const REQUEST: usize = 56;
const MESSAGE: usize = 72;
/// INET_DIAG_SKMEMINFO, and where SK_MEMINFO_DROPS lies in it.
const SKMEMINFO: u16 = 7;
const DROPS: usize = 8 * 4;
/// TCP_LISTEN as a bit of the states that are asked for.
const LISTEN: u32 = 1 << 10;

/// What is asked for: the counter's name, protocol, states.
const KINDS: [(&str, u8, u32); 3] = [
    ("udp_drops", libc::IPPROTO_UDP as u8, u32::MAX),
    ("listener_drops", libc::IPPROTO_TCP as u8, LISTEN),
    ("raw_drops", libc::IPPROTO_RAW as u8, u32::MAX),
];

/// Tells `found` the kind, port, name and drops of each socket. Kinds that the kernel does not list have none.
pub fn drops(mut found: impl FnMut(&str, u16, String, u64)) {
    for (kind, protocol, states) in KINDS {
        for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
            for message in ask(family, protocol, states).unwrap_or_default() {
                if let Some(socket) = socket(&message, protocol) {
                    found(kind, socket.port, socket.name, socket.drops);
                }
            }
        }
    }
}

fn ask(family: u8, protocol: u8, states: u32) -> Result<Vec<Vec<u8>>> {
    let mut body = [0; REQUEST];
    body[..3].copy_from_slice(&[family, protocol, 1 << (SKMEMINFO - 1)]);
    body[4..8].copy_from_slice(&states.to_ne_bytes());
    let answers = routing::ask_by(
        SockProtocol::NetlinkSockDiag,
        BY_FAMILY,
        libc::NLM_F_DUMP,
        &body,
    )?;
    Ok(answers.unwrap_or_default())
}

struct Socket {
    port: u16,
    /// address, port and inode: it stands for one socket only
    name: String,
    drops: u64,
}

fn socket(message: &[u8], protocol: u8) -> Option<Socket> {
    let fixed = message.get(..MESSAGE)?;
    let memory = routing::attributes(message, MESSAGE).remove(&SKMEMINFO)?;
    let drops = u32::from_ne_bytes(memory.get(DROPS..DROPS + 4)?.try_into().ok()?);
    let address: IpAddr = match i32::from(fixed[0]) {
        libc::AF_INET => Ipv4Addr::from(<[u8; 4]>::try_from(&fixed[8..12]).ok()?).into(),
        _ => Ipv6Addr::from(<[u8; 16]>::try_from(&fixed[8..24]).ok()?).into(),
    };
    let inode = u32::from_ne_bytes(fixed[68..72].try_into().ok()?);
    let number = u16::from_be_bytes([fixed[4], fixed[5]]);
    // A raw socket has its protocol there.
    let (port, name) = match i32::from(protocol) {
        libc::IPPROTO_RAW => (0, format!("{address} protocol {number}")),
        _ => (number, SocketAddr::new(address, number).to_string()),
    };
    Some(Socket {
        port,
        name: format!("{name} (inode {inode})"),
        drops: drops.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_listing_of_our_own_socket() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        let mut all = Vec::new();
        drops(|kind, port, name, drops| all.push((kind.to_owned(), port, name, drops)));
        // A kernel without udp_diag lists none.
        let ours = all.iter().find(|(k, p, ..)| k == "udp_drops" && *p == port);
        assert!(
            all.is_empty()
                || ours.is_some_and(|(_, _, name, n)| name.contains("127.0.0.1") && *n == 0)
        );
    }

    proptest! {
        #[test]
        fn odd_bytes_never_panic(b in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = socket(&b, libc::IPPROTO_UDP as u8);
        }
    }
}
