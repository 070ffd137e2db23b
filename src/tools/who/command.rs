//! `-- COMMAND`: a command in a cgroup (v2) of its own, by which the kernel knows its sockets, those of its children too. Where there is
//! none, the command is known by its processes.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::kernel::cgroup;
use crate::run::signals;

/// How long the command may take to end once the run is stopped: the terminal's Ctrl-C has reached it too.
const PATIENCE: Duration = Duration::from_millis(500);
/// How long after a command's end its last packets are waited for, at least and at most.
const LAST: (Duration, Duration) = (Duration::from_millis(300), Duration::from_millis(1500));

/// What the kernel side knows a command by.
#[derive(Debug)]
pub enum Grounds {
    Cgroup(Cgroup),
    /// its process and what it forks; why there is no cgroup
    Tree(String),
}

impl Grounds {
    pub fn prepare() -> Self {
        match Cgroup::create() {
            Ok(cgroup) => Self::Cgroup(cgroup),
            Err(e) => Self::Tree(format!("{e:#}")),
        }
    }

    /// The file that takes a process into the cgroup.
    fn door(&self) -> Result<Option<File>> {
        let Self::Cgroup(cgroup) = self else {
            return Ok(None);
        };
        let procs = cgroup.dir.join("cgroup.procs");
        let file = OpenOptions::new().write(true).open(&procs);
        file.map(Some)
            .with_context(|| format!("failed to open {}", procs.display()))
    }
}

/// A cgroup that is made for one command, and removed with it.
#[derive(Debug)]
pub struct Cgroup {
    dir: PathBuf,
    /// where cgroup v2 was mounted for it alone
    mounted: Option<PathBuf>,
    pub id: u64,
}

impl Cgroup {
    pub fn create() -> Result<Self> {
        let (root, mounted) = match cgroup::mount() {
            Some(root) => (root.to_path_buf(), None),
            None => {
                let root = own_mount()?;
                (root.clone(), Some(root))
            }
        };
        remove_dead(&root, "netprobe-");
        let dir = root.join(format!("netprobe-{}", std::process::id()));
        let mut made = Self {
            dir,
            mounted,
            id: 0,
        };
        fs::create_dir(&made.dir)
            .with_context(|| format!("failed to make the cgroup {}", made.dir.display()))?;
        made.id = fs::metadata(&made.dir)
            .context("failed to look at a cgroup")?
            .ino();
        Ok(made)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_dir(&self.dir) {
            eprintln!(
                "netprobe: the cgroup {} stays: {e} (processes of the command are left)",
                self.dir.display()
            );
        }
        if let Some(root) = &self.mounted {
            let _ = umount2(root, MntFlags::MNT_DETACH);
            let _ = fs::remove_dir(root);
        }
    }
}

/// Removes what netprobes that were killed have left: folders in `root` whose names end in the number of a process that has gone. A cgroup
/// with processes in it stays.
fn remove_dead(root: &Path, prefix: &str) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(prefix));
        let Some(pid) = pid.and_then(|pid| pid.parse::<u32>().ok()) else {
            continue;
        };
        if !Path::new(&format!("/proc/{pid}")).exists() {
            let _ = umount2(&entry.path(), MntFlags::MNT_DETACH);
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// Cgroup v2 on a folder of our own, where nobody has mounted it.
fn own_mount() -> Result<PathBuf> {
    remove_dead(Path::new("/run"), "netprobe-cgroup-");
    let root = PathBuf::from(format!("/run/netprobe-cgroup-{}", std::process::id()));
    fs::create_dir(&root).with_context(|| format!("failed to make {}", root.display()))?;
    let done = mount(
        Some("cgroup2"),
        &root,
        Some("cgroup2"),
        MsFlags::empty(),
        None::<&Path>,
    );
    if let Err(e) = done {
        let _ = fs::remove_dir(&root);
        return Err(e).context("it is not mounted here and cannot be");
    }
    Ok(root)
}

/// The command, as it runs.
pub struct Running {
    child: Child,
    name: String,
    ended: Option<(ExitStatus, Instant)>,
    /// dropped after the child
    _grounds: Grounds,
}

impl Running {
    /// Starts it, in its cgroup if it has one. `aside`: what it prints goes to stderr.
    pub fn start(command: &[String], grounds: Grounds, aside: bool) -> Result<Self> {
        let (name, args) = command.split_first().context("no command")?;
        let mut door = grounds.door()?;
        let mut command = Command::new(name);
        command.args(args);
        if aside {
            let stderr = std::io::stderr().as_fd().try_clone_to_owned();
            command.stdout(stderr.context("failed to give stderr to the command")?);
        }
        // SAFETY: between fork and exec only a write to an open file and system calls about signals are made.
        unsafe {
            command.pre_exec(move || {
                if let Some(door) = &mut door {
                    door.write_all(b"0")?;
                }
                signals::unblock();
                Ok(())
            });
        }
        let child = command
            .spawn()
            .with_context(|| format!("failed to run {name}"))?;
        Ok(Self {
            child,
            name: name.clone(),
            ended: None,
            _grounds: grounds,
        })
    }

    /// How long ago it ended; tells its exit status once.
    pub fn ended(&mut self) -> Option<Duration> {
        if self.ended.is_none() {
            let status = self.child.try_wait().ok()??;
            eprintln!("netprobe: {} {}", self.name, told(status));
            self.ended = Some((status, Instant::now()));
        }
        self.ended.map(|(_, when)| when.elapsed())
    }

    /// It has ended, and so have its packets: nothing more comes, as far as the caller knows (`quiet`).
    pub fn is_over(&mut self, quiet: bool) -> bool {
        self.ended()
            .is_some_and(|ended| ended >= LAST.1 || ended >= LAST.0 && quiet)
    }

    /// The run ends: so does the command. A Ctrl-C at the terminal has reached it already.
    pub fn stop(&mut self) {
        for signal in [Signal::SIGINT, Signal::SIGKILL] {
            let start = Instant::now();
            while start.elapsed() < PATIENCE {
                if self.ended().is_some() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            let _ = kill(Pid::from_raw(self.child.id() as i32), signal);
        }
        let _ = self.child.wait();
    }
}

fn told(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit status {code}"),
        (None, Some(signal)) => match Signal::try_from(signal) {
            Ok(signal) => format!("was ended by {signal}"),
            Err(_) => format!("was ended by signal {signal}"),
        },
        (None, None) => "ended".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_the_dead_go() {
        let root = tempfile::tempdir().unwrap();
        let own = format!("netprobe-{}", std::process::id());
        for name in [
            "netprobe-4294967295",
            own.as_str(),
            "netprobe-x",
            "4294967295",
        ] {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        remove_dead(root.path(), "netprobe-");
        let mut left: Vec<_> = fs::read_dir(root.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, ["4294967295", own.as_str(), "netprobe-x"]);
    }
}
