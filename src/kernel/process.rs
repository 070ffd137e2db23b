//! Which process holds a socket, from /proc: for sockets that are older than a trace.

use std::collections::HashMap;
use std::fs;
use std::time::{Duration, Instant};

/// A look at all of /proc takes some ms on a busy machine: not more often than this.
const AGAIN: Duration = Duration::from_secs(1);

/// A process by number and name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    pub pid: u32,
    pub comm: String,
}

/// Sockets' inodes and the (first) process that holds each open.
#[derive(Debug)]
pub struct SocketHolders {
    by_inode: HashMap<u64, Process>,
    looked: Instant,
}

impl SocketHolders {
    /// Looks at every process.
    pub fn look() -> Self {
        let mut holders = Self {
            by_inode: HashMap::new(),
            looked: Instant::now(),
        };
        holders.scan();
        holders
    }

    /// Who holds the socket `inode`.
    pub fn of(&mut self, inode: u64) -> Option<&Process> {
        if inode == 0 {
            return None;
        }
        if !self.by_inode.contains_key(&inode) && self.looked.elapsed() >= AGAIN {
            self.scan();
        }
        self.by_inode.get(&inode)
    }

    fn scan(&mut self) {
        self.by_inode.clear();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
                continue;
            };
            let path = entry.path();
            let mut comm = None;
            for fd in fs::read_dir(path.join("fd"))
                .into_iter()
                .flatten()
                .flatten()
            {
                let Some(inode) = fs::read_link(fd.path())
                    .ok()
                    .and_then(|l| socket_inode(l.to_str()?))
                else {
                    continue;
                };
                let comm = comm.get_or_insert_with(|| {
                    let text = fs::read_to_string(path.join("comm")).unwrap_or_default();
                    text.trim_end().to_string()
                });
                self.by_inode.entry(inode).or_insert_with(|| Process {
                    pid,
                    comm: comm.clone(),
                });
            }
        }
        self.looked = Instant::now();
    }
}

/// `socket:[12345]`
fn socket_inode(link: &str) -> Option<u64> {
    link.strip_prefix("socket:[")?
        .strip_suffix(']')?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn our_own_socket_is_found() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let link = fs::read_link(format!("/proc/self/fd/{}", socket.as_raw_fd())).unwrap();
        let inode = socket_inode(link.to_str().unwrap()).unwrap();
        let mut holders = SocketHolders::look();
        assert_eq!(holders.of(inode).unwrap().pid, std::process::id());
        assert!(holders.of(0).is_none());
    }

    #[test]
    fn links_of_other_files() {
        assert_eq!(socket_inode("socket:[7]"), Some(7));
        for other in ["pipe:[7]", "/dev/null", "socket:[x]", "socket:[7"] {
            assert_eq!(socket_inode(other), None);
        }
    }
}
