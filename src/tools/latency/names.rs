//! What the values of --by and the numbers of a packet are called.

use std::collections::HashMap;
use std::fs;

use crate::kernel::cgroup::CgroupNames;
use crate::kernel::containers::ContainerNames;
use crate::kernel::counters;
use crate::kernel::netns;
use crate::text::escape::escaped;

use super::args::By;

/// Names, looked up when they are asked for.
#[derive(Default)]
pub struct Names {
    containers: ContainerNames,
    cgroups: CgroupNames,
    /// by namespace and ifindex
    devices: HashMap<(u32, u32), String>,
    netns: HashMap<u32, String>,
    processes: HashMap<u32, String>,
}

impl Names {
    /// What has come since the last table is looked up again.
    pub fn refresh(&mut self) {
        self.devices.clear();
    }

    /// A value of --by in words.
    pub fn by(&mut self, by: By, value: u64) -> String {
        match by {
            By::Cpu | By::Port => value.to_string(),
            By::Device => self.device((value >> 32) as u32, value as u32),
            By::Process => self.process(value as u32),
            By::Container => self.container(value),
        }
    }

    /// `eth0`, with its namespace where that has a name.
    pub fn device(&mut self, netns: u32, ifindex: u32) -> String {
        if self.devices.is_empty() {
            self.devices = counters::all_devices();
            self.netns = netns::names();
        }
        let name = match self.devices.get(&(netns, ifindex)) {
            Some(name) => escaped(name.as_bytes()),
            None => format!("if{ifindex}"),
        };
        match self.netns.get(&netns) {
            Some(netns) => format!("{name}@{}", escaped(netns.as_bytes())),
            None => name,
        }
    }

    fn process(&mut self, tgid: u32) -> String {
        if tgid == 0 {
            return "-".to_owned();
        }
        if let Some(name) = self.processes.get(&tgid) {
            return name.clone();
        }
        // A process that has ended has no name any more.
        let comm = fs::read(format!("/proc/{tgid}/comm")).unwrap_or_default();
        let comm = escaped(comm.trim_ascii_end());
        let name = format!("{comm}[{tgid}]");
        if !comm.is_empty() && self.processes.len() < 4096 {
            self.processes.insert(tgid, name.clone());
        }
        name
    }

    /// The container of a process by its cgroup, else the cgroup.
    fn container(&mut self, cgroup: u64) -> String {
        if cgroup == 0 {
            return "-".to_owned();
        }
        if let Some(name) = self.containers.of(cgroup, 0) {
            return name;
        }
        match self.cgroups.get(cgroup) {
            Some(path) => escaped(path.as_bytes()),
            None => format!("cgroup {cgroup}"),
        }
    }

    /// The container of a packet's process.
    pub fn container_of(&mut self, cgroup: u64, tgid: u32) -> Option<String> {
        self.containers.of(cgroup, tgid)
    }
}
