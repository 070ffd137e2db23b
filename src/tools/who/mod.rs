//! Whose packets a run is about: --pid, --comm, --uid, --cgroup, --container, --pod and -- COMMAND, for each tool that
//! follows packets. Flags in, what the kernel side asks for (src/bpf/common/who.h) out. Sockets are what packets belong
//! to.

pub mod command;
mod sockets;

use std::collections::HashSet;
use std::path::Path;

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags, OpenMapMut};

use crate::bpf::bytes_of;
use crate::bpf::skb::types::{who_bit, who_process};
use crate::kernel::cgroup::{self, Place};
use crate::kernel::{containers, pods};
use crate::usage::usage;

use command::{Grounds, Running};
use sockets::Wanted;

/// The programs of src/bpf/common/who.bpf.h at tracepoints, for a tree of processes.
pub const FORKS: [(&str, &str); 2] = [
    ("who_forks", "sched_process_fork"),
    ("who_exits", "sched_process_exit"),
];

/// A thread's name as the kernel keeps it: 15 bytes and a NUL.
const COMM_MAX: usize = 15;
/// Sockets, ends and flows that the kernel side knows at once.
const ENTRIES: u32 = 16_384;

/// Packets of these sockets, and packets to them.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Whose packets (all must hold; both directions)")]
pub struct WhoArgs {
    /// Sockets of this process, also those that are older than the run
    #[arg(long, value_name = "PID")]
    pub pid: Option<u32>,

    /// Sockets of threads of this name (of sockets that are older than the run: of processes of this name)
    #[arg(long, value_name = "NAME")]
    pub comm: Option<String>,

    /// Sockets that this user made
    #[arg(long, value_name = "UID")]
    pub uid: Option<u32>,

    /// Sockets of processes in this cgroup (v2) or below it: a path, from /sys/fs/cgroup on or whole
    #[arg(long, value_name = "PATH")]
    pub cgroup: Option<String>,

    /// Sockets of this container: its name, or the beginning of its id (docker, containerd, CRI-O, podman, pods, LXC, nspawn)
    #[arg(long, value_name = "NAME|ID", conflicts_with = "cgroup")]
    pub container: Option<String>,

    /// Sockets of this pod of Kubernetes on this node
    #[arg(long, value_name = "NAMESPACE/NAME", conflicts_with_all = ["cgroup", "container"])]
    pub pod: Option<String>,

    /// Run COMMAND once all is attached, in a cgroup of its own, and follow the packets of its sockets and of its children's, and those to
    /// them; the run ends with it
    #[arg(last = true, value_name = "COMMAND", conflicts_with_all = ["pid", "cgroup", "container", "pod"])]
    pub command: Vec<String>,
}

/// What must be attached for it.
#[derive(Debug, Clone, Copy, Default)]
pub struct WhoWants {
    /// ports and connections of sockets
    pub any: bool,
    /// which process makes and uses a socket
    pub processes: bool,
    /// which process forks which
    pub forks: bool,
}

/// Whose packets.
#[derive(Debug, Default)]
pub struct Who {
    /// WHO_* of src/bpf/common/who.h; 0: everybody's
    pub on: u32,
    pub uid: u32,
    pub cgroup: u64,
    pub comm: [u64; 2],
    /// processes, where WHO_PROCESS is on
    pids: Option<HashSet<u32>>,
    /// members of the cgroup, for sockets that are older than their place in it
    members: Option<HashSet<u32>>,
    name: Option<String>,
    forks: bool,
    command: Vec<String>,
    grounds: Option<Grounds>,
}

impl WhoArgs {
    pub fn is_empty(&self) -> bool {
        self.pid.is_none()
            && self.comm.is_none()
            && self.uid.is_none()
            && self.cgroup.is_none()
            && self.container.is_none()
            && self.pod.is_none()
            && self.command.is_empty()
    }

    /// Looks everything up. Where there is no cgroup v2, processes and what they fork stand for one: stderr says so.
    pub fn resolve(&self) -> Result<Who> {
        let mut who = Who {
            command: self.command.clone(),
            ..Who::default()
        };
        if let Some(uid) = self.uid {
            who.on |= who_bit::WHO_UID.0;
            who.uid = uid;
        }
        if let Some(name) = &self.comm {
            who.set_comm(name)?;
        }
        if let Some(pid) = self.pid {
            if !Path::new(&format!("/proc/{pid}")).exists() {
                return Err(usage(format!("--pid {pid}: there is no such process")));
            }
            who.only(HashSet::from([pid]));
        }
        if let Some(path) = &self.cgroup {
            who.set_cgroup(&cgroup::folder(path)?)?;
        }
        if let Some(name) = &self.container {
            who.set_place(&format!("--container {name}"), containers::find(name)?)?;
        }
        if let Some(name) = &self.pod {
            who.set_place(&format!("--pod {name}"), pods::find(name)?)?;
        }
        if !self.command.is_empty() {
            who.set_command()?;
        }
        Ok(who)
    }
}

/// The name of --comm as the kernel has it: two words of 8 bytes.
pub fn comm_words(name: &str) -> Result<[u64; 2]> {
    let mut bytes = [0; 16];
    let fits = (1..=COMM_MAX).contains(&name.len());
    let Some(to) = bytes.get_mut(..name.len()).filter(|_| fits) else {
        return Err(usage(format!(
            "--comm {name}: the kernel's thread names have 1 to {COMM_MAX} bytes"
        )));
    };
    to.copy_from_slice(name.as_bytes());
    let half = |at: usize| {
        let word = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
        u64::from_ne_bytes(word.unwrap_or_default())
    };
    Ok([half(0), half(8)])
}

impl Who {
    fn set_comm(&mut self, name: &str) -> Result<()> {
        self.comm = comm_words(name)?;
        self.name = Some(name.to_owned());
        self.on |= who_bit::WHO_COMM.0;
        Ok(())
    }

    /// These processes only.
    fn only(&mut self, pids: HashSet<u32>) {
        self.on |= who_bit::WHO_PROCESS.0;
        self.pids = Some(match self.pids.take() {
            Some(before) => &before & &pids,
            None => pids,
        });
    }

    fn set_cgroup(&mut self, folder: &Path) -> Result<()> {
        self.on |= who_bit::WHO_CGROUP.0;
        let id = cgroup::id_of(folder);
        self.cgroup = id.with_context(|| format!("failed to look at {}", folder.display()))?;
        self.members = Some(cgroup::members(folder));
        Ok(())
    }

    /// `flag`: what the user asked for.
    fn set_place(&mut self, flag: &str, place: Place) -> Result<()> {
        match place {
            Place::Cgroup(folder) => self.set_cgroup(&folder)?,
            Place::Processes(pids) => {
                eprintln!(
                    "netprobe: {flag}: there is no cgroup v2; its {} processes and what they fork stand for it",
                    pids.len()
                );
                self.forks = self.pids.is_none();
                self.only(pids);
            }
        }
        Ok(())
    }

    fn set_command(&mut self) -> Result<()> {
        let grounds = Grounds::prepare();
        match &grounds {
            Grounds::Cgroup(cgroup) => {
                self.on |= who_bit::WHO_CGROUP.0;
                self.cgroup = cgroup.id;
            }
            Grounds::Tree(why) => {
                eprintln!(
                    "netprobe: there is no cgroup v2 for the command ({why}): its processes are followed by their forks"
                );
                self.only(HashSet::new());
                self.forks = true;
            }
        }
        self.grounds = Some(grounds);
        Ok(())
    }

    pub fn wants(&self) -> WhoWants {
        let processes = who_bit::WHO_PROCESS.0 | who_bit::WHO_COMM.0;
        WhoWants {
            any: self.on != 0,
            processes: self.on & processes != 0,
            forks: self.forks,
        }
    }

    /// Makes room in the maps of src/bpf/common/who.bpf.h. `flows`: how many packets' answers are waited for.
    pub fn prepare<'m, 'a: 'm>(
        &self,
        maps: impl IntoIterator<Item = &'m mut OpenMapMut<'a>>,
        flows: &mut OpenMapMut<'_>,
        entries: u32,
    ) -> Result<()> {
        if self.on == 0 {
            return Ok(());
        }
        for map in maps {
            map.set_max_entries(ENTRIES)
                .context("failed to set the size of a map")?;
        }
        flows
            .set_max_entries(entries.max(ENTRIES))
            .context("failed to set the size of a map")
    }

    /// Tells the attached programs of processes, and of sockets that are older than the run.
    pub fn seed(&self, maps: &Maps<'_>) -> Result<()> {
        if self.on == 0 {
            return Ok(());
        }
        for pid in self.pids.iter().flatten() {
            put(
                maps.tgids,
                &pid.to_ne_bytes(),
                &[who_process::WHO_MEMBER.0 as u8],
            )?;
        }
        if self.grounds.is_some() {
            // What is not running yet has no sockets.
            return self.mark_own(maps);
        }
        let wanted = Wanted {
            uid: (self.on & who_bit::WHO_UID.0 != 0).then_some(self.uid),
            pids: self.pids.as_ref(),
            members: self.members.as_ref(),
            name: self.name.as_deref(),
        };
        let older = wanted.look();
        let mut refused = 0;
        let mut put = |map: &dyn MapCore, key: &[u8], value: &[u8]| {
            refused += usize::from(put(map, key, value).is_err());
        };
        for inode in &older.inodes {
            put(maps.inodes, &inode.to_ne_bytes(), &[1]);
        }
        for (end, count) in &older.ends {
            put(maps.ends, bytes_of(end), &count.to_ne_bytes());
        }
        for flow in &older.flows {
            put(maps.flows, bytes_of(flow), &[1]);
        }
        if refused > 0 {
            eprintln!(
                "netprobe: {refused} older sockets are not known by their addresses: there are more than {ENTRIES}"
            );
        }
        Ok(())
    }

    /// Without a cgroup the command is known as what this process forks.
    fn mark_own(&self, maps: &Maps<'_>) -> Result<()> {
        if self.forks {
            let own = std::process::id().to_ne_bytes();
            put(maps.tgids, &own, &[who_process::WHO_PARENT.0 as u8])?;
        }
        Ok(())
    }

    /// Starts the command, if there is one. `aside`: what it prints goes to stderr.
    pub fn start(&mut self, maps: &Maps<'_>, aside: bool) -> Result<Option<Running>> {
        let Some(grounds) = self.grounds.take() else {
            return Ok(None);
        };
        let running = Running::start(&self.command, grounds, aside)?;
        if self.forks {
            let own = std::process::id().to_ne_bytes();
            let deleted = maps.tgids.delete(&own);
            deleted.context("failed to forget our own process")?;
        }
        Ok(Some(running))
    }
}

/// [`Who::prepare`] of an open skeleton; a macro, since each skeleton has a type of its own for its maps.
macro_rules! prepare {
    ($who:expr, $maps:expr, $entries:expr) => {{
        let maps = &mut *$maps;
        $who.prepare(
            [
                &mut maps.who_ends,
                &mut maps.who_inodes,
                &mut maps.who_tgids,
                &mut maps.who_socks,
                &mut maps.who_binds,
            ],
            &mut maps.who_flows,
            $entries,
        )
    }};
}
pub(crate) use prepare;

/// The [`Maps`] of a loaded skeleton.
macro_rules! maps {
    ($skel:expr) => {
        $crate::tools::who::Maps {
            tgids: &$skel.maps.who_tgids,
            inodes: &$skel.maps.who_inodes,
            ends: &$skel.maps.who_ends,
            flows: &$skel.maps.who_flows,
        }
    };
}
pub(crate) use maps;

/// The maps that user space fills.
pub struct Maps<'a> {
    pub tgids: &'a dyn MapCore,
    pub inodes: &'a dyn MapCore,
    pub ends: &'a dyn MapCore,
    pub flows: &'a dyn MapCore,
}

fn put(map: &dyn MapCore, key: &[u8], value: &[u8]) -> Result<()> {
    map.update(key, value, MapFlags::ANY)
        .context("failed to tell the programs whose packets are meant")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::usage::UsageError;

    fn resolve(args: WhoArgs) -> Result<Who> {
        args.resolve()
    }

    #[test]
    fn all_that_are_given_must_hold() {
        let args = WhoArgs {
            pid: Some(std::process::id()),
            comm: Some("curl".into()),
            uid: Some(0),
            ..WhoArgs::default()
        };
        assert!(!args.is_empty());
        let who = resolve(args).unwrap();
        assert_eq!(who.on, 1 | 4 | 8);
        assert_eq!(&who.comm[0].to_ne_bytes()[..5], b"curl\0");
        assert!(who.wants().any && who.wants().processes && !who.wants().forks);
        let none = resolve(WhoArgs::default()).unwrap();
        assert!(none.on == 0 && !none.wants().any);
    }

    #[test]
    fn wrong_values_are_usage_errors_that_name_them() {
        let bad = [
            (
                WhoArgs {
                    pid: Some(u32::MAX),
                    ..WhoArgs::default()
                },
                "4294967295",
            ),
            (
                WhoArgs {
                    comm: Some("a-name-too-long-x".into()),
                    ..WhoArgs::default()
                },
                "a-name-too-long-x",
            ),
            (
                WhoArgs {
                    container: Some("no such container".into()),
                    ..WhoArgs::default()
                },
                "no such container",
            ),
        ];
        for (args, named) in bad {
            let e = resolve(args).unwrap_err();
            assert!(
                e.is::<UsageError>() && e.to_string().contains(named),
                "{e:#}"
            );
        }
    }
}
