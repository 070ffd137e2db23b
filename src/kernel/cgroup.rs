//! Cgroups (v2): ids from paths, and paths from ids.
//!
//! The id that BPF programs see is the inode number of the cgroup's folder (kernfs, kernels from 5.5).

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::usage::usage;

use anyhow::Result;

/// Where cgroup v2 is mounted: alone, or beside v1.
const MOUNTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// The id of the cgroup at a path, whole or from the mount on.
pub fn id(text: &str) -> Result<u64> {
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
    fs::metadata(&path)
        .map(|meta| meta.ino())
        .map_err(|e| bad(e.to_string()))
}

/// Where cgroup v2 is mounted.
pub fn mount() -> Option<&'static Path> {
    MOUNTS.iter().map(Path::new).find(|p| {
        nix::sys::statfs::statfs(*p)
            .is_ok_and(|s| s.filesystem_type() == nix::sys::statfs::CGROUP2_SUPER_MAGIC)
    })
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
                self.scan(root, root);
            }
            self.names.entry(id).or_insert(None);
        }
        self.names.get(&id)?.as_deref()
    }

    fn scan(&mut self, root: &Path, dir: &Path) {
        if let (Ok(meta), Ok(below)) = (fs::metadata(dir), dir.strip_prefix(root)) {
            self.names
                .insert(meta.ino(), Some(format!("/{}", below.display())));
        }
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                self.scan(root, &entry.path());
            }
        }
    }
}
