//! The pins of a session: `/sys/fs/bpf/netprobe/<tool>-<pid>/` (0700), removed when the session ends, and by the next start
//! where a `kill -9` left them.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use libbpf_rs::MapMut;

/// Where bpffs is mounted.
pub const BPFFS: &str = "/sys/fs/bpf";
/// The parent of all sessions' folders.
pub const ROOT: &str = "/sys/fs/bpf/netprobe";

/// Makes the parent of all sessions' folders; an error where somebody else could change what is in it.
pub fn make_root() -> Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.mode(0o700).recursive(true);
    builder
        .create(ROOT)
        .with_context(|| format!("failed to make {ROOT}"))?;
    must_be_ours(Path::new(ROOT))
}

/// Programs that are pinned there run, and what is left there is removed: it must be a folder of root or of this user, which
/// nobody else may write to. (bpffs may be open to all, as /tmp is.)
fn must_be_ours(root: &Path) -> Result<()> {
    let meta = fs::symlink_metadata(root)
        .with_context(|| format!("failed to look at {}", root.display()))?;
    let us = nix::unistd::geteuid().as_raw();
    let problem = match (meta.uid(), meta.mode() & 0o022) {
        _ if !meta.is_dir() => "is no folder".to_owned(),
        (uid, _) if uid != 0 && uid != us => format!("belongs to the user {uid}"),
        (_, 0) => return Ok(()),
        (_, _) => "may be written to by others".to_owned(),
    };
    anyhow::bail!(
        "{} {problem}; look at it, and remove it: netprobe makes its own",
        root.display()
    );
}

/// The folder of this session's pins; dropping it removes them.
#[derive(Debug)]
pub struct Pins {
    dir: PathBuf,
}

impl Pins {
    /// Makes the session's folder and removes those of dead processes. `None`, with a line on stderr, where bpffs is not mounted
    /// or cannot be written: the run goes on without pins.
    pub fn create(tool: &str) -> Option<Self> {
        match Self::try_create(tool) {
            Ok(pins) => Some(pins),
            Err(e) => {
                eprintln!(
                    "netprobe: no pinned maps in this run ({e:#}); `netprobe ctl` cannot reach it"
                );
                None
            }
        }
    }

    fn try_create(tool: &str) -> Result<Self> {
        if !is_bpffs(Path::new(BPFFS)) {
            anyhow::bail!("bpffs is not mounted at {BPFFS}: mount -t bpf bpf {BPFFS}");
        }
        make_root()?;
        clean_dead(Path::new(ROOT));
        let dir = Path::new(ROOT).join(format!("{tool}-{}", std::process::id()));
        // Left by a dead process of the same number; whether it could be removed is seen at the next step.
        let _ = fs::remove_dir_all(&dir);
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .with_context(|| format!("failed to make {}", dir.display()))?;
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700))
            .with_context(|| format!("failed to protect {}", dir.display()))?;
        super::signals::remember(dir.clone());
        Ok(Self { dir })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Pins `map` as `name` in the session's folder.
    pub fn pin(&self, map: &mut MapMut<'_>, name: &str) -> Result<()> {
        let path = self.dir.join(name);
        map.pin(&path)
            .with_context(|| format!("failed to pin the map {name} at {}", path.display()))
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        remove(&self.dir);
    }
}

/// A session found in the pins' root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// `<tool>-<pid>`
    pub name: String,
    pub tool: String,
    pub pid: u32,
    pub dir: PathBuf,
    /// the process is a netprobe that still runs
    pub alive: bool,
}

/// All sessions that have a pin folder.
pub fn sessions(root: &Path) -> Vec<Session> {
    let Ok(entries) = fs::read_dir(root) else {
        return Vec::new();
    };
    let mut found: Vec<Session> = entries
        .flatten()
        .filter_map(|e| {
            let name = e.file_name().into_string().ok()?;
            let (tool, pid) = name.rsplit_once('-')?;
            let pid = pid.parse().ok()?;
            Some(Session {
                tool: tool.to_string(),
                pid,
                dir: e.path(),
                alive: is_netprobe(pid),
                name,
            })
        })
        .collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

fn clean_dead(root: &Path) {
    for session in sessions(root).iter().filter(|s| !s.alive) {
        remove(&session.dir);
    }
}

/// Whether `pid` runs, and is a process with this program's name (a number may be used again).
fn is_netprobe(pid: u32) -> bool {
    let comm = |p: &str| fs::read_to_string(format!("/proc/{p}/comm"));
    match (comm(&pid.to_string()), comm("self")) {
        (Ok(theirs), Ok(ours)) => theirs == ours || theirs.trim() == "netprobe",
        _ => false,
    }
}

fn remove(dir: &Path) {
    match fs::remove_dir_all(dir) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => eprintln!("netprobe: failed to remove {}: {e}", dir.display()),
    }
}

fn is_bpffs(path: &Path) -> bool {
    nix::sys::statfs::statfs(path)
        .is_ok_and(|s| s.filesystem_type() == nix::sys::statfs::BPF_FS_MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_are_read_from_folder_names() {
        let root = tempfile::tempdir().unwrap();
        for name in ["skb-4294967295", "xdp", "tcp-connect-7x"] {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        let found = sessions(root.path());
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].tool, "skb");
        assert!(!found[0].alive);
        clean_dead(root.path());
        assert!(!root.path().join("skb-4294967295").exists());
        assert!(root.path().join("xdp").exists(), "other folders stay");
    }

    #[test]
    fn a_root_of_somebody_else_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("netprobe");
        let mode = |mode| fs::set_permissions(&root, fs::Permissions::from_mode(mode)).unwrap();
        fs::create_dir(&root).unwrap();
        mode(0o700);
        must_be_ours(&root).unwrap();
        mode(0o755);
        must_be_ours(&root).unwrap();
        mode(0o770);
        let refused = must_be_ours(&root).unwrap_err().to_string();
        assert!(refused.contains("written to by others"), "{refused}");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&root, &link).unwrap();
        assert!(
            must_be_ours(&link)
                .unwrap_err()
                .to_string()
                .contains("no folder")
        );
        mode(0o700);
        // Only root may give it away.
        if std::os::unix::fs::chown(&root, Some(65_534), None).is_ok() {
            let refused = must_be_ours(&root).unwrap_err().to_string();
            assert!(refused.contains("the user 65534"), "{refused}");
        }
    }
}
