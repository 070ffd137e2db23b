//! Sockets that are older than a run, from /proc: whose they are, and their addresses in every network namespace.

use std::collections::{HashMap, HashSet};
use std::fs;

use crate::bpf::skb::types::{who_end, who_flow};
use crate::kernel::netns::Netns;
use crate::kernel::process;
use crate::kernel::sockets::{self, Socket};

const TCP: u8 = 6;

/// Whose sockets. All that are given must hold.
pub struct Wanted<'a> {
    pub uid: Option<u32>,
    pub pids: Option<&'a HashSet<u32>>,
    pub members: Option<&'a HashSet<u32>>,
    pub name: Option<&'a str>,
}

/// What the kernel side is to know of them.
#[derive(Debug, Default)]
pub struct Older {
    pub inodes: HashSet<u64>,
    pub ends: HashMap<who_end, u32>,
    pub flows: Vec<who_flow>,
}

impl Wanted<'_> {
    pub fn look(&self) -> Older {
        let of_processes = self.pids.is_some() || self.members.is_some() || self.name.is_some();
        let mut older = Older::default();
        if of_processes {
            older.inodes = process::sockets_of(|pid| self.is_process(pid));
            if older.inodes.is_empty() {
                return older;
            }
        }
        let mut of_user = HashSet::new();
        for netns in Netns::all() {
            let Ok(sockets) = netns.run(sockets::all) else {
                continue;
            };
            for socket in sockets {
                let is_theirs = !of_processes || older.inodes.contains(&socket.inode);
                if !is_theirs || self.uid.is_some_and(|uid| uid != socket.uid) {
                    continue;
                }
                of_user.insert(socket.inode);
                older.add(&socket, netns.inode);
            }
        }
        if self.uid.is_some() {
            older.inodes.retain(|inode| of_user.contains(inode));
        }
        older
    }

    fn is_process(&self, pid: u32) -> bool {
        let named = |name: &str| {
            let comm = fs::read_to_string(format!("/proc/{pid}/comm"));
            comm.is_ok_and(|c| c.trim_end_matches('\n') == name)
        };
        self.pids.is_none_or(|pids| pids.contains(&pid))
            && self.members.is_none_or(|members| members.contains(&pid))
            && self.name.is_none_or(named)
    }
}

impl Older {
    fn add(&mut self, socket: &Socket, netns: u32) {
        if socket.proto == TCP && !socket.listens {
            self.flows.push(who_flow {
                saddr: words(socket.remote.0),
                daddr: words(socket.local.0),
                sport: socket.remote.1,
                dport: socket.local.1,
                netns,
                l4_proto: TCP.into(),
                pad: 0,
            });
            return;
        }
        let any = socket.local.0.is_unspecified();
        let family = match socket.local.0 {
            std::net::IpAddr::V4(_) => 4,
            std::net::IpAddr::V6(a) if a.to_ipv4_mapped().is_some() => 4,
            // It may be for IPv6 alone: /proc does not say.
            std::net::IpAddr::V6(_) if any => 0,
            std::net::IpAddr::V6(_) => 6,
        };
        let end = who_end {
            addr: if any { [0; 2] } else { words(socket.local.0) },
            netns,
            port: socket.local.1,
            l4_proto: socket.proto,
            family,
        };
        *self.ends.entry(end).or_default() += 1;
    }
}

/// As `struct np_tuple` has addresses: IPv4 as ::ffff:a.b.c.d, in memory order.
fn words(address: std::net::IpAddr) -> [u64; 2] {
    let bytes = match address {
        std::net::IpAddr::V4(a) => a.to_ipv6_mapped().octets(),
        std::net::IpAddr::V6(a) => a.octets(),
    };
    let half = |at: usize| u64::from_ne_bytes(std::array::from_fn(|i| bytes[at + i]));
    [half(0), half(8)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_sockets_are_found() {
        let bound = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let own = HashSet::from([std::process::id()]);
        let none = HashSet::new();
        let wanted = |pids, uid| Wanted {
            uid,
            pids: Some(pids),
            members: None,
            name: None,
        };
        let older = wanted(&own, None).look();
        let has_end = |port: u16, proto: u8| {
            older
                .ends
                .keys()
                .any(|e| (e.port, e.l4_proto, e.family) == (port, proto, 4))
        };
        assert!(has_end(bound.local_addr().unwrap().port(), 17));
        assert!(has_end(listener.local_addr().unwrap().port(), TCP));
        let port = stream.local_addr().unwrap().port();
        assert!(older.flows.iter().any(|f| f.dport == port), "{older:?}");
        assert!(wanted(&none, None).look().inodes.is_empty());
        assert!(wanted(&own, Some(u32::MAX)).look().inodes.is_empty());
    }

    #[test]
    fn addresses_as_tuples_have_them() {
        let v4 = words("10.0.0.1".parse().unwrap());
        assert_eq!(v4, words("::ffff:10.0.0.1".parse().unwrap()));
        assert_eq!(v4[1].to_ne_bytes(), [0, 0, 255, 255, 10, 0, 0, 1]);
    }
}
