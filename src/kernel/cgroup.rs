//! Cgroups (v2): ids from paths, and paths from ids.
//!
//! The id that BPF programs see is the inode number of the cgroup's folder (kernfs, kernels from 5.5).

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::usage::usage;

use anyhow::{Context, Result};

/// Where cgroup v2 is mounted: alone, or beside v1.
const MOUNTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// Where the processes of a container or a pod are.
#[derive(Debug, PartialEq, Eq)]
pub enum Place {
    /// the folder of its cgroup (v2)
    Cgroup(PathBuf),
    /// there is no cgroup v2: these
    Processes(HashSet<u32>),
}

impl Place {
    /// The id of its cgroup; an error that names `of` where it has none.
    pub fn cgroup_id(&self, of: &str) -> Result<u64> {
        match self {
            Self::Cgroup(folder) => {
                id_of(folder).with_context(|| format!("failed to look at the cgroup of {of}"))
            }
            Self::Processes(_) => Err(usage(format!(
                "{of}: a container is known by its cgroup (v2) here, which is not mounted at {}; give a process",
                MOUNTS[0]
            ))),
        }
    }

    /// The network namespace of its processes, of which the first one stands for all: `/proc/PID/ns/net`.
    pub fn netns(&self, of: &str) -> Result<String> {
        let pids = match self {
            Self::Cgroup(folder) => members(folder),
            Self::Processes(pids) => pids.clone(),
        };
        let first = pids.iter().min().ok_or_else(|| {
            usage(format!(
                "{of}: no process runs in it, which would tell its network namespace"
            ))
        })?;
        Ok(format!("/proc/{first}/ns/net"))
    }
}

/// The id of the cgroup at a path, whole or from the mount on.
pub fn id(text: &str) -> Result<u64> {
    let path = folder(text)?;
    id_of(&path).with_context(|| format!("failed to look at the cgroup {text}"))
}

/// The id of the cgroup with this folder.
pub fn id_of(folder: &Path) -> std::io::Result<u64> {
    fs::metadata(folder).map(|meta| meta.ino())
}

/// The folder of a cgroup, by its path, whole or from the mount on.
pub fn folder(text: &str) -> Result<PathBuf> {
    let root = mount().ok_or_else(|| {
        usage(format!(
            "cgroup {text}: cgroup v2 is not mounted at {}",
            MOUNTS[0]
        ))
    })?;
    let path = if Path::new(text).starts_with(root) {
        PathBuf::from(text)
    } else {
        root.join(text.trim_start_matches('/'))
    };
    let bad = |e: String| {
        usage(format!(
            "cgroup {text}: {e}; give the path of a folder under {}",
            root.display()
        ))
    };
    let path = path
        .canonicalize()
        .map_err(|e| bad(format!("{} ({e})", path.display())))?;
    if !path.starts_with(root) || !path.is_dir() {
        return Err(bad(format!("{} is none", path.display())));
    }
    Ok(path)
}

/// The folders at and below `folder`, each before those below it.
pub fn below(folder: &Path) -> Vec<PathBuf> {
    let mut all = vec![folder.to_path_buf()];
    let mut at = 0;
    while let Some(dir) = all.get(at) {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        let dirs = entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
        let dirs: Vec<PathBuf> = dirs.map(|e| e.path()).collect();
        all.extend(dirs);
        at += 1;
    }
    all
}

/// The processes in a cgroup and below it.
pub fn members(folder: &Path) -> HashSet<u32> {
    let mut pids = HashSet::new();
    for dir in below(folder) {
        let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        pids.extend(text.lines().filter_map(|l| l.parse::<u32>().ok()));
    }
    pids
}

/// Where cgroup v2 is mounted.
pub fn mount() -> Option<&'static Path> {
    MOUNTS.iter().map(Path::new).find(|p| {
        nix::sys::statfs::statfs(*p)
            .is_ok_and(|s| s.filesystem_type() == nix::sys::statfs::CGROUP2_SUPER_MAGIC)
    })
}

/// Ids of the BPF programs that see what sockets of this cgroup send, those of cgroups above it included; `None`: it cannot be asked.
pub fn programs_at_egress(path: &str) -> Option<Vec<u32>> {
    const MOST: usize = 64;
    let folder = std::fs::File::open(mount()?.join(path.trim_start_matches('/'))).ok()?;
    let (mut ids, mut count, mut flags) = ([0u32; MOST], MOST as u32, 0u32);
    // SAFETY: an open file; room for as many ids as `count` says.
    let code = unsafe {
        libbpf_sys::bpf_prog_query(
            folder.as_raw_fd(),
            libbpf_sys::BPF_CGROUP_INET_EGRESS,
            libbpf_sys::BPF_F_QUERY_EFFECTIVE,
            &mut flags,
            ids.as_mut_ptr(),
            &mut count,
        )
    };
    (code == 0).then(|| ids.into_iter().take(count as usize).collect())
}

/// Paths by id, read from the mount when an unknown id comes.
#[derive(Debug, Default)]
pub struct CgroupNames {
    names: HashMap<u64, Option<String>>,
}

impl CgroupNames {
    /// `/system.slice/x.service`; `None` where the cgroup has gone.
    pub fn get(&mut self, id: u64) -> Option<&str> {
        if !self.names.contains_key(&id) {
            if let Some(root) = mount() {
                self.scan(root);
            }
            self.names.entry(id).or_insert(None);
        }
        self.names.get(&id)?.as_deref()
    }

    fn scan(&mut self, root: &Path) {
        for dir in below(root) {
            if let (Ok(id), Ok(path)) = (id_of(&dir), dir.strip_prefix(root)) {
                self.names.insert(id, Some(format!("/{}", path.display())));
            }
        }
    }
}
