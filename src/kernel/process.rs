//! Which process holds a socket, from /proc: for sockets that are older than a trace.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// A look at all of /proc takes some ms on a busy machine: not more often than this.
const AGAIN: Duration = Duration::from_secs(1);

/// Answers that are remembered to tell new ones.
const TOLD: usize = 65_536;

/// A process by number and name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub pid: u32,
    pub comm: String,
    /// the container that it is in, where that is asked for
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
}

impl std::fmt::Display for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}[{}]", self.comm, self.pid)?;
        match &self.container {
            Some(container) => write!(f, " (container {container})"),
            None => Ok(()),
        }
    }
}

/// Sockets' inodes and the (first) process that holds each open.
#[derive(Debug)]
pub struct SocketHolders {
    by_inode: HashMap<u64, Process>,
    /// `None`: out of a recording, no /proc is looked at
    looked: Option<Instant>,
    told: Option<Told>,
}

/// Answers that were given, for a recording.
#[derive(Debug, Default)]
struct Told {
    last: HashMap<u64, Option<Process>>,
    new: Vec<(u64, Option<Process>)>,
}

impl Told {
    fn note(&mut self, inode: u64, answer: Option<&Process>) {
        if self.last.get(&inode).map(Option::as_ref) == Some(answer) {
            return;
        }
        if self.last.len() >= TOLD {
            self.last.clear();
        }
        self.last.insert(inode, answer.cloned());
        self.new.push((inode, answer.cloned()));
    }
}

impl SocketHolders {
    /// Looks at every process.
    pub fn look() -> Self {
        let mut holders = Self {
            by_inode: HashMap::new(),
            looked: Some(Instant::now()),
            told: None,
        };
        holders.scan();
        holders
    }

    /// Knows only what it is taught.
    pub fn recorded() -> Self {
        Self {
            by_inode: HashMap::new(),
            looked: None,
            told: None,
        }
    }

    /// Who holds a socket, from a recording.
    pub fn learn(&mut self, inode: u64, holder: Option<Process>) {
        match holder {
            Some(holder) => self.by_inode.insert(inode, holder),
            None => self.by_inode.remove(&inode),
        };
    }

    /// Every answer that was given is forgotten: [`SocketHolders::news`] has it again when it is given the next time.
    pub fn tell_anew(&mut self) {
        self.told = Some(Told::default());
    }

    /// Every answer that was given since [`SocketHolders::tell_anew`].
    pub fn told(&self) -> Vec<(u64, Option<Process>)> {
        let told = self.told.iter().flat_map(|told| &told.last);
        told.map(|(inode, holder)| (*inode, holder.clone()))
            .collect()
    }

    /// New answers since the last call.
    pub fn news(&mut self) -> Vec<(u64, Option<Process>)> {
        let told = self.told.as_mut();
        told.map_or_else(Vec::new, |told| std::mem::take(&mut told.new))
    }

    /// Who holds the socket `inode`.
    pub fn of(&mut self, inode: u64) -> Option<&Process> {
        if inode == 0 {
            return None;
        }
        let old = self.looked.is_some_and(|then| then.elapsed() >= AGAIN);
        if old && !self.by_inode.contains_key(&inode) {
            self.scan();
        }
        let holder = self.by_inode.get(&inode);
        if let Some(told) = &mut self.told {
            told.note(inode, holder);
        }
        holder
    }

    fn scan(&mut self) {
        self.by_inode.clear();
        for pid in all() {
            let mut comm = None;
            for inode in sockets(pid) {
                let comm = comm.get_or_insert_with(|| {
                    let text = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                    text.trim_end().to_string()
                });
                self.by_inode.entry(inode).or_insert_with(|| Process {
                    pid,
                    comm: comm.clone(),
                    container: None,
                });
            }
        }
        self.looked = Some(Instant::now());
    }
}

/// Every process.
pub fn all() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().to_str()?.parse().ok())
}

/// The inodes of the sockets that a process holds open.
fn sockets(pid: u32) -> impl Iterator<Item = u64> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"));
    let links = entries.into_iter().flatten().flatten();
    links.filter_map(|fd| socket_inode(fs::read_link(fd.path()).ok()?.to_str()?))
}

/// The inodes of the sockets of all processes that `is_wanted`.
pub fn sockets_of(is_wanted: impl Fn(u32) -> bool) -> HashSet<u64> {
    all()
        .filter(|pid| is_wanted(*pid))
        .flat_map(sockets)
        .collect()
}

/// `socket:[12345]`
fn socket_inode(link: &str) -> Option<u64> {
    link.strip_prefix("socket:[")?
        .strip_suffix(']')?
        .parse()
        .ok()
}

/// Bytes of memory that this process holds.
pub fn resident_memory() -> u64 {
    let text = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = text
        .split(' ')
        .nth(1)
        .and_then(|word| word.parse::<u64>().ok());
    pages.unwrap_or(0) * crate::os::page_size() as u64
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
