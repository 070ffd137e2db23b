//! Network namespaces: their inodes, their files, and the interfaces inside them.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};

use crate::usage::usage;

/// A network namespace as the user names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Netns {
    /// inode number, as skbs are filtered by
    pub inode: u32,
    /// a file through which it can be entered, where one was found
    pub path: Option<PathBuf>,
}

/// Where `ip netns` keeps its names.
const NAMED: &str = "/run/netns";

impl Netns {
    /// The namespace of this thread.
    pub fn current() -> Result<Self> {
        Self::of(Path::new("/proc/thread-self/ns/net"))
    }

    fn of(path: &Path) -> Result<Self> {
        let inode = inode(path).with_context(|| {
            format!("failed to look at the network namespace {}", path.display())
        })?;
        Ok(Self {
            inode,
            path: Some(path.to_path_buf()),
        })
    }

    /// Every namespace that has a name or a process, the own one first, each once.
    pub fn all() -> Vec<Self> {
        let mut seen = std::collections::HashSet::new();
        let own = PathBuf::from("/proc/thread-self/ns/net");
        std::iter::once(own)
            .chain(files())
            .filter_map(|path| {
                let inode = inode(&path).ok()?;
                seen.insert(inode).then_some(Self {
                    inode,
                    path: Some(path),
                })
            })
            .collect()
    }

    /// A path (`/proc/PID/ns/net`, `/run/netns/NAME`), `inode:N` or N, or a name under /run/netns.
    pub fn parse(text: &str) -> Result<Self> {
        let number = text.strip_prefix("inode:").unwrap_or(text);
        if let Ok(inode) = number.parse::<u32>() {
            return Ok(Self {
                inode,
                path: find(inode),
            });
        }
        let path = if text.contains('/') {
            PathBuf::from(text)
        } else {
            Path::new(NAMED).join(text)
        };
        let inode = inode(&path).map_err(|e| {
            usage(format!(
                "network namespace {text}: {} ({e}); give a path such as /proc/PID/ns/net, a name under {NAMED}, or inode:N",
                path.display()
            ))
        })?;
        Ok(Self {
            inode,
            path: Some(path),
        })
    }

    /// Moves the calling thread, and those that it starts from now on, into the namespace. The mount namespace stays, so that
    /// bpffs stays in sight.
    pub fn enter(&self) -> Result<()> {
        // No privilege is needed to stay.
        if Self::current().is_ok_and(|own| own.inode == self.inode) {
            return Ok(());
        }
        let path = self.file()?;
        let file =
            File::open(path).with_context(|| format!("failed to open {}", path.display()))?;
        setns(&file, CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("failed to enter the network namespace {}", path.display()))
    }

    fn file(&self) -> Result<&Path> {
        self.path.as_deref().ok_or_else(|| {
            anyhow!(
                "network namespace inode:{} has no process and no name, so it cannot be entered",
                self.inode
            )
        })
    }

    /// Runs `f` inside the namespace, on a thread of its own.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        self.file()?;
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    self.enter()?;
                    Ok(f())
                })
                .join()
                .map_err(|_| anyhow!("the thread in the network namespace panicked"))?
        })
    }

    /// The index of the interface `name` inside the namespace.
    pub fn ifindex(&self, name: &str) -> Result<u32> {
        let found = self.run(|| nix::net::if_::if_nametoindex(name))?;
        found.map_err(|e| match e {
            nix::errno::Errno::ENODEV => {
                let known = self
                    .run(|| {
                        nix::net::if_::if_nameindex()
                            .map(|list| {
                                list.iter()
                                    .map(|i| i.name().to_string_lossy().into_owned())
                                    .collect::<Vec<_>>()
                                    .join(", ")
                            })
                            .unwrap_or_default()
                    })
                    .unwrap_or_default();
                usage(format!(
                    "no interface {name} in the network namespace {} (it has: {known})",
                    self.inode
                ))
            }
            e => anyhow!("failed to look up the interface {name}: {e}"),
        })
    }
}

/// Names under /run/netns (and `init`, the first process's) by inode.
pub fn names() -> HashMap<u32, String> {
    let named = fs::read_dir(NAMED).into_iter().flatten().flatten();
    let mut names: HashMap<u32, String> = named
        .filter_map(|e| {
            let inode = inode(&e.path()).ok()?;
            Some((inode, e.file_name().to_string_lossy().into_owned()))
        })
        .collect();
    if let Ok(inode) = inode(Path::new("/proc/1/ns/net")) {
        names.entry(inode).or_insert_with(|| "init".to_string());
    }
    names
}

/// A process of each namespace that has one.
pub fn processes() -> HashMap<u32, u32> {
    let mut found = HashMap::new();
    for pid in super::process::all() {
        if let Ok(inode) = inode(Path::new(&format!("/proc/{pid}/ns/net"))) {
            found.entry(inode).or_insert(pid);
        }
    }
    found
}

fn inode(path: &Path) -> std::io::Result<u32> {
    Ok(fs::metadata(path)?.ino() as u32)
}

/// A file of the namespace with this inode: a name under /run/netns, else a process in it, else where it is mounted.
fn find(wanted: u32) -> Option<PathBuf> {
    files()
        .chain(mounted(wanted))
        .find(|p| inode(p).is_ok_and(|i| i == wanted))
}

/// The names under /run/netns and the namespaces of all processes.
fn files() -> impl Iterator<Item = PathBuf> {
    let named = fs::read_dir(NAMED)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path());
    let of_processes = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| {
            e.file_name()
                .to_str()
                .is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit()))
        })
        .map(|e| e.path().join("ns/net"));
    named.chain(of_processes)
}

/// Where the namespace with this inode is mounted, as container engines do.
fn mounted(wanted: u32) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let root = format!("net:[{wanted}]");
    // id, parent, device, root, mount point, ...
    table
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(3);
            (fields.next()? == root).then(|| fields.next().map(PathBuf::from))?
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_current_one_by_path_and_by_inode() {
        let current = Netns::current().unwrap();
        assert_eq!(
            Netns::parse("/proc/self/ns/net").unwrap().inode,
            current.inode
        );
        let by_number = Netns::parse(&format!("inode:{}", current.inode)).unwrap();
        assert_eq!(by_number.inode, current.inode);
        assert!(by_number.path.is_some());
    }

    #[test]
    fn a_missing_one_is_a_usage_error_that_names_it() {
        let e = Netns::parse("no-such-netns").unwrap_err();
        assert!(e.is::<crate::usage::UsageError>());
        assert!(e.to_string().contains("no-such-netns"));
    }
}
