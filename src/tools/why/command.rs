//! `netprobe why -- COMMAND`: a command in a cgroup (v2) of its own, by which the kernel knows its sockets, those of its children too.

use std::fs::{self, OpenOptions};
use std::io::Write;
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

/// A cgroup that is made for one command, and removed with it.
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
        let dir = root.join(format!("netprobe-why-{}", std::process::id()));
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

/// Cgroup v2 on a folder of our own, where nobody has mounted it.
fn own_mount() -> Result<PathBuf> {
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
        return Err(e)
            .context("a COMMAND needs cgroup v2, which is not mounted here and cannot be");
    }
    Ok(root)
}

/// The command, as it runs.
pub struct Running {
    child: Child,
    name: String,
    ended: Option<(ExitStatus, Instant)>,
    /// dropped after the child
    _cgroup: Cgroup,
}

impl Running {
    /// Starts it in the cgroup.
    pub fn start(command: &[String], cgroup: Cgroup) -> Result<Self> {
        let (name, args) = command.split_first().context("no command")?;
        let procs = cgroup.dir.join("cgroup.procs");
        let mut procs = OpenOptions::new()
            .write(true)
            .open(&procs)
            .with_context(|| format!("failed to open {}", procs.display()))?;
        let mut command = Command::new(name);
        command.args(args);
        // SAFETY: between fork and exec only a write to an open file and system calls about signals are made.
        unsafe {
            command.pre_exec(move || {
                procs.write_all(b"0")?;
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
            _cgroup: cgroup,
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
