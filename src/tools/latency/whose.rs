//! Which processes' packets are timed: flags in, what the programs compare (src/bpf/latency/latency.h, lat_whose) out.

use anyhow::Result;

use crate::bpf::latency::types::lat_whose;
use crate::kernel::cgroup::{self, Place};
use crate::kernel::{containers, pods};
use crate::tools::who::comm_words;
use crate::usage::usage;

/// Packets by the process that has read or written them.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(
    next_help_heading = "Whose packets (the process that reads or writes them; all must hold)"
)]
pub struct WhoseArgs {
    /// This process only
    #[arg(long, value_name = "PID", conflicts_with = "from")]
    pub pid: Option<u32>,

    /// Threads of this name only
    #[arg(long, value_name = "NAME", conflicts_with = "from")]
    pub comm: Option<String>,

    /// This user only
    #[arg(long, value_name = "UID", conflicts_with = "from")]
    pub uid: Option<u32>,

    /// Processes in this cgroup (v2) or below it: a path, from /sys/fs/cgroup on or whole
    #[arg(long, value_name = "PATH", conflicts_with = "from")]
    pub cgroup: Option<String>,

    /// This container only: its name, or the beginning of its id
    #[arg(long, value_name = "NAME|ID", conflicts_with_all = ["cgroup", "from"])]
    pub container: Option<String>,

    /// This pod of Kubernetes on this node only
    #[arg(long, value_name = "NAMESPACE/NAME", conflicts_with_all = ["cgroup", "container", "from"])]
    pub pod: Option<String>,
}

/// The same, looked up.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Whose {
    /// LAT_WHOSE_*; 0: all packets
    pub on: u8,
    pub tgid: u32,
    pub uid: u32,
    /// id
    pub cgroup: u64,
    pub comm: [u64; 2],
}

impl WhoseArgs {
    pub fn resolve(&self) -> Result<Whose> {
        let mut whose = Whose::default();
        if let Some(pid) = self.pid {
            whose.tgid = pid;
            whose.set(lat_whose::LAT_WHOSE_PID);
        }
        if let Some(uid) = self.uid {
            whose.uid = uid;
            whose.set(lat_whose::LAT_WHOSE_UID);
        }
        if let Some(name) = &self.comm {
            whose.comm = comm_words(name)?;
            whose.set(lat_whose::LAT_WHOSE_COMM);
        }
        if let Some(id) = self.cgroup_id()? {
            whose.cgroup = id;
            whose.set(lat_whose::LAT_WHOSE_CGROUP);
        }
        Ok(whose)
    }

    fn cgroup_id(&self) -> Result<Option<u64>> {
        if let Some(path) = &self.cgroup {
            return cgroup::id(path).map(Some);
        }
        let (flag, place) = match (&self.container, &self.pod) {
            (Some(name), _) => (format!("--container {name}"), containers::find(name)?),
            (_, Some(name)) => (format!("--pod {name}"), pods::find(name)?),
            _ => return Ok(None),
        };
        match place {
            Place::Cgroup(folder) => Ok(Some(cgroup::id_of(&folder)?)),
            Place::Processes(_) => Err(usage(format!(
                "{flag}: that needs cgroup v2; --pid takes one process"
            ))),
        }
    }
}

impl Whose {
    fn set(&mut self, bit: lat_whose) {
        self.on |= bit.0 as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_to_what_is_compared() {
        let none = WhoseArgs::default().resolve().unwrap();
        assert_eq!(none, Whose::default());
        let args = WhoseArgs {
            pid: Some(7),
            comm: Some("ab".to_owned()),
            ..WhoseArgs::default()
        };
        let whose = args.resolve().unwrap();
        assert_eq!((whose.on, whose.tgid), (0b1001, 7));
        assert_eq!(whose.comm[0].to_ne_bytes(), *b"ab\0\0\0\0\0\0");
        let long = WhoseArgs {
            comm: Some("a".repeat(16)),
            ..WhoseArgs::default()
        };
        assert!(long.resolve().is_err());
    }
}
