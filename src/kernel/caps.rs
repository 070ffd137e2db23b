//! Capabilities of this process (capabilities(7)): those that BPF programs need, and what the absence of others
//! disables.

use std::fs;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

const CAP_DAC_OVERRIDE: u32 = 1;
const CAP_DAC_READ_SEARCH: u32 = 2;
const CAP_NET_ADMIN: u32 = 12;
const CAP_IPC_LOCK: u32 = 14;
const CAP_SYS_PTRACE: u32 = 19;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_SYS_RESOURCE: u32 = 24;
const CAP_SYSLOG: u32 = 34;
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;

/// Without these no BPF program of ours is loaded.
const NEEDED: [(u32, &str); 3] = [
    (CAP_BPF, "CAP_BPF"),
    (CAP_PERFMON, "CAP_PERFMON"),
    (CAP_NET_ADMIN, "CAP_NET_ADMIN"),
];

/// A capability that a run can do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Optional {
    #[serde(skip)]
    bit: u32,
    /// another one that serves as well
    #[serde(skip)]
    or: Option<u32>,
    pub name: &'static str,
    /// what its absence disables
    pub without: &'static str,
    /// runs that trace are told at their start
    #[serde(skip)]
    traces: bool,
}

const OPTIONAL: [Optional; 6] = [
    Optional {
        bit: CAP_SYS_ADMIN,
        or: None,
        name: "CAP_SYS_ADMIN",
        without: "other network namespaces are not entered (their counters, rules, routes and older sockets are unknown)",
        traces: true,
    },
    Optional {
        bit: CAP_SYSLOG,
        or: None,
        name: "CAP_SYSLOG",
        without: "kernel addresses have no names",
        traces: true,
    },
    Optional {
        bit: CAP_SYS_PTRACE,
        or: None,
        name: "CAP_SYS_PTRACE",
        without: "sockets and network namespaces of other users' processes are unknown, if they are older than the run",
        traces: true,
    },
    Optional {
        bit: CAP_DAC_READ_SEARCH,
        or: Some(CAP_DAC_OVERRIDE),
        name: "CAP_DAC_READ_SEARCH",
        without: "files that only root may read are not read (tracefs, names of containers, sockets of processes)",
        traces: true,
    },
    Optional {
        bit: CAP_DAC_OVERRIDE,
        or: None,
        name: "CAP_DAC_OVERRIDE",
        without: "no pins in /sys/fs/bpf unless /sys/fs/bpf/netprobe is this user's: no xdpdump, no xdpchain, no `netprobe ctl`",
        traces: false,
    },
    Optional {
        bit: CAP_IPC_LOCK,
        or: None,
        name: "CAP_IPC_LOCK",
        without: "perf buffers beyond what this user may lock are refused: take --buffer-pages 64 for xdpdump",
        traces: false,
    },
];

/// Capabilities of this process.
fn effective() -> u64 {
    fs::read_to_string("/proc/self/status")
        .unwrap_or_default()
        .lines()
        .find_map(|l| l.strip_prefix("CapEff:"))
        .and_then(|v| u64::from_str_radix(v.trim(), 16).ok())
        .unwrap_or(0)
}

fn has(effective: u64, cap: u32) -> bool {
    effective & (1 << cap) != 0
}

/// Of those that are needed.
pub fn missing() -> Vec<&'static str> {
    missing_of(effective())
}

fn missing_of(caps: u64) -> Vec<&'static str> {
    // CAP_SYS_ADMIN stands for CAP_BPF and CAP_PERFMON (capabilities(7)).
    NEEDED
        .into_iter()
        .filter(|&(cap, _)| !(has(caps, cap) || cap != CAP_NET_ADMIN && has(caps, CAP_SYS_ADMIN)))
        .map(|(_, name)| name)
        .collect()
}

/// The maps of a run would be beyond what this user may lock, on a kernel that counts them so (before 5.11).
pub fn lacks_memlock() -> bool {
    let limit = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(0, |(soft, _)| soft);
    !has(effective(), CAP_SYS_RESOURCE) && limit != RLIM_INFINITY
}

/// Of those that a run can do without.
pub fn missing_optional() -> Vec<Optional> {
    optional_of(effective())
}

fn optional_of(caps: u64) -> Vec<Optional> {
    let missing = |o: &Optional| !has(caps, o.bit) && !o.or.is_some_and(|or| has(caps, or));
    OPTIONAL.into_iter().filter(missing).collect()
}

/// A line for each capability that a run which traces lacks.
pub fn lacking() -> Vec<String> {
    let missing = missing_optional().into_iter().filter(|o| o.traces);
    missing
        .map(|o| format!("without {}: {}", o.name, o.without))
        .collect()
}

/// Why perf_event_open refused.
pub fn why_no_perf() -> String {
    let level = fs::read_to_string("/proc/sys/kernel/perf_event_paranoid").unwrap_or_default();
    format!(
        "perf events are refused, since kernel.perf_event_paranoid is {}: CAP_SYS_ADMIN is missing, or set that to 2",
        level.trim()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing() {
        assert!(missing_of(u64::MAX).is_empty() && optional_of(u64::MAX).is_empty());
        assert_eq!(missing_of(0), ["CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN"]);
        assert_eq!(missing_of(1 << CAP_SYS_ADMIN), ["CAP_NET_ADMIN"]);
        assert_eq!(optional_of(0), OPTIONAL);
        let names = |caps| -> Vec<&str> { optional_of(caps).iter().map(|o| o.name).collect() };
        let rest = [
            "CAP_SYS_ADMIN",
            "CAP_SYSLOG",
            "CAP_SYS_PTRACE",
            "CAP_IPC_LOCK",
        ];
        assert_eq!(names(1 << CAP_DAC_OVERRIDE), rest);
        assert!(names(1 << CAP_DAC_READ_SEARCH).contains(&"CAP_DAC_OVERRIDE"));
    }
}
