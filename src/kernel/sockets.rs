//! The sockets of this thread's network namespace, from /proc/net.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// TCP_LISTEN
const LISTEN: u8 = 10;

/// A socket with a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Socket {
    pub proto: u8,
    pub local: (IpAddr, u16),
    pub remote: (IpAddr, u16),
    /// TCP_*; an unconnected UDP socket has 7
    pub state: u8,
    pub listens: bool,
    pub uid: u32,
    /// 0: no process has it any longer
    pub inode: u64,
}

/// All of them, TCP and UDP. Each is read on its own: what cannot be is left out.
pub fn all() -> Vec<Socket> {
    let tables = [("tcp", 6), ("tcp6", 6), ("udp", 17), ("udp6", 17)];
    tables
        .iter()
        .flat_map(|(file, proto)| of(file, *proto))
        .collect()
}

/// Those of one table.
pub fn of(file: &str, proto: u8) -> Vec<Socket> {
    let text = fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap_or_default();
    text.lines()
        .skip(1)
        .filter_map(|line| parse(line, proto))
        .collect()
}

/// `sl local remote state queues timer retransmits uid timeout inode …`
fn parse(line: &str, proto: u8) -> Option<Socket> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let state = u8::from_str_radix(fields.get(3)?, 16).ok()?;
    Some(Socket {
        proto,
        local: end(fields.get(1)?)?,
        remote: end(fields.get(2)?)?,
        state,
        listens: proto == 6 && state == LISTEN,
        uid: fields.get(7)?.parse().ok()?,
        inode: fields.get(9)?.parse().ok()?,
    })
}

/// `0100007F:1F90`: words in memory order.
fn end(text: &str) -> Option<(IpAddr, u16)> {
    let (address, port) = text.split_once(':')?;
    let word = |at: usize| {
        let hex = address.get(at * 8..at * 8 + 8)?;
        Some(u32::from_str_radix(hex, 16).ok()?.to_ne_bytes())
    };
    let ip = match address.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?)),
        _ => {
            let bytes: Vec<u8> = (0..4).map(word).collect::<Option<Vec<_>>>()?.concat();
            IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?))
        }
    };
    Some((ip, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_proc() {
        let v4 = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4711 1 0";
        let socket = parse(v4, 6).unwrap();
        assert_eq!(socket.local, ("127.0.0.1".parse().unwrap(), 8080));
        assert_eq!(
            (socket.listens, socket.uid, socket.inode),
            (true, 1000, 4711)
        );
        let v6 = "  0: 00000000000000000000000001000000:0050 00000000000000000000000000000000:0000 07 0:0 00:0 0 0 0 9 2 0 0";
        let socket = parse(v6, 17).unwrap();
        assert_eq!(socket.local, ("::1".parse().unwrap(), 80));
        assert!(!socket.listens && socket.state == 7);
        for junk in ["", "junk", "0: 0100007F:1F90 00000000:0000 0A"] {
            assert_eq!(parse(junk, 6), None);
        }
    }
}
