//! Counters by which the kernel says "lost" or "error", of the calling thread's network namespace: /proc/net, rtnetlink, ethtool, sock_diag.

use std::collections::{BTreeMap, HashMap};
use std::fs;

use serde::Deserialize;

use super::netns::Netns;
use super::{netdev, routing, socket_drops};

/// Where a counter is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// /proc/net/snmp, netstat and snmp6
    Proc,
    /// /proc/net/xfrm_stat
    Xfrm,
    /// /proc/net/softnet_stat, of the whole machine
    Softnet,
    /// /proc/net/stat/nf_conntrack
    Conntrack,
    /// rtnetlink's IFLA_STATS64
    Link,
    /// `ethtool -S`
    Ethtool,
    /// rtnetlink's TCA_STATS2
    Qdisc,
    /// sock_diag's SK_MEMINFO_DROPS
    Socket,
}

/// One counter.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id {
    pub source: Source,
    pub name: String,
    /// 0: of no device
    pub ifindex: u32,
    /// of a socket
    pub port: u16,
    /// the device, qdisc, socket or CPU; empty: of the namespace
    pub part: String,
}

impl Id {
    fn of_namespace(source: Source, name: &str) -> Self {
        Self {
            source,
            name: name.to_owned(),
            ifindex: 0,
            port: 0,
            part: String::new(),
        }
    }
}

/// Values of counters.
pub type Values = BTreeMap<Id, u64>;

/// TC_H_ROOT, TC_H_INGRESS (clsact has it too).
const ROOT: u32 = u32::MAX;
const INGRESS: u32 = 0xffff_fff1;

/// Fields of `struct rtnl_link_stats64`, by place; empty: not of interest.
const LINK_FIELDS: [&str; 24] = [
    "",
    "",
    "",
    "",
    "rx_errors",
    "tx_errors",
    "rx_dropped",
    "tx_dropped",
    "",
    "",
    "rx_length_errors",
    "rx_over_errors",
    "rx_crc_errors",
    "rx_frame_errors",
    "rx_fifo_errors",
    "rx_missed_errors",
    "tx_aborted_errors",
    "tx_carrier_errors",
    "tx_fifo_errors",
    "tx_heartbeat_errors",
    "tx_window_errors",
    "",
    "",
    "rx_nohandler",
];

/// The counters of this thread's namespace that are wanted.
pub fn read(wanted: &dyn Fn(Source, &str) -> bool) -> Values {
    let mut values = Values::new();
    let mut add = |id: Id, value| {
        if wanted(id.source, &id.name) {
            values.insert(id, value);
        }
    };
    proc_net(&mut add);
    conntrack(&file("stat/nf_conntrack"), &mut add);
    links(&mut add);
    qdiscs(&mut add);
    socket_drops::drops(|kind, port, part, drops| {
        let id = Id {
            port,
            part,
            ..Id::of_namespace(Source::Socket, kind)
        };
        add(id, drops);
    });
    values
}

/// The interfaces of this thread's namespace, by index.
pub fn devices() -> Vec<(u32, String)> {
    let links = routing::links().unwrap_or_default();
    links
        .into_iter()
        .map(|link| (link.index, link.name))
        .collect()
}

/// The interfaces of all namespaces, by namespace and index.
pub fn all_devices() -> HashMap<(u32, u32), String> {
    let mut all = HashMap::new();
    for netns in Netns::all() {
        let links = netns.run(devices).unwrap_or_default();
        all.extend(links.into_iter().map(|(i, name)| ((netns.inode, i), name)));
    }
    all
}

/// What the CPUs' input queues refused: of the whole machine.
pub fn softnet() -> Values {
    let text = fs::read_to_string("/proc/net/softnet_stat").unwrap_or_default();
    let mut values = Values::new();
    for (row, line) in text.lines().enumerate() {
        let columns: Vec<u64> = line
            .split_ascii_whitespace()
            .filter_map(|word| u64::from_str_radix(word, 16).ok())
            .collect();
        // The CPU's number stands in the 13th column, from 5.10 on.
        let cpu = columns.get(12).copied().unwrap_or(row as u64);
        for (name, column) in [("dropped", 1), ("flow_limit_count", 10)] {
            let id = Id {
                part: format!("CPU {cpu}"),
                ..Id::of_namespace(Source::Softnet, name)
            };
            values.insert(id, columns.get(column).copied().unwrap_or(0));
        }
    }
    values
}

fn file(name: &str) -> String {
    fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap_or_default()
}

fn proc_net(add: &mut dyn FnMut(Id, u64)) {
    for name in ["snmp", "netstat"] {
        pairs(&file(name), add);
    }
    for (name, source) in [("snmp6", Source::Proc), ("xfrm_stat", Source::Xfrm)] {
        for line in file(name).lines() {
            let mut words = line.split_ascii_whitespace();
            if let (Some(name), Some(Ok(value))) = (words.next(), words.next().map(str::parse)) {
                add(Id::of_namespace(source, name), value);
            }
        }
    }
}

/// Two lines a group: `Udp: InDatagrams NoPorts` and `Udp: 1 2`.
fn pairs(text: &str, add: &mut dyn FnMut(Id, u64)) {
    let lines: Vec<&str> = text.lines().collect();
    for pair in lines.chunks_exact(2) {
        let (mut names, mut numbers) = (pair[0].split(' '), pair[1].split(' '));
        let group = names.next().unwrap_or_default().trim_end_matches(':');
        numbers.next();
        for (name, number) in names.zip(numbers) {
            if let Ok(number) = number.parse() {
                add(
                    Id::of_namespace(Source::Proc, &format!("{group}{name}")),
                    number,
                );
            }
        }
    }
}

/// A line of names and a line of hexadecimal numbers for each CPU.
fn conntrack(text: &str, add: &mut dyn FnMut(Id, u64)) {
    let mut lines = text.lines();
    let names = lines.next().unwrap_or_default().split_ascii_whitespace();
    for (column, name) in names.enumerate() {
        let of_cpu = |line: &str| {
            let word = line.split_ascii_whitespace().nth(column)?;
            u64::from_str_radix(word, 16).ok()
        };
        let sum = lines.clone().filter_map(of_cpu).sum();
        add(Id::of_namespace(Source::Conntrack, name), sum);
    }
}

fn links(add: &mut dyn FnMut(Id, u64)) {
    for link in routing::links().unwrap_or_default() {
        let id = |source, name: &str| Id {
            ifindex: link.index,
            part: link.name.clone(),
            ..Id::of_namespace(source, name)
        };
        let fields = LINK_FIELDS.iter().zip(&link.stats);
        for (name, value) in fields.filter(|(name, _)| !name.is_empty()) {
            add(id(Source::Link, name), *value);
        }
        for (name, value) in netdev::statistics(&link.name) {
            add(id(Source::Ethtool, &name), value);
        }
    }
}

fn qdiscs(add: &mut dyn FnMut(Id, u64)) {
    for (ifindex, qdisc) in routing::all_qdiscs().unwrap_or_default() {
        let device = netdev::name(ifindex).unwrap_or_default();
        let name = match (qdisc.parent, qdisc.kind.as_str()) {
            (ROOT, _) => "drops",
            (INGRESS, "ingress") => "ingress_drops",
            (INGRESS, _) => "clsact_drops",
            _ => "class_drops",
        };
        let id = Id {
            ifindex,
            part: format!("{device} {} {:x}:", qdisc.kind, qdisc.handle >> 16),
            ..Id::of_namespace(Source::Qdisc, name)
        };
        add(id, qdisc.dropped.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn collect(read: impl FnOnce(&mut dyn FnMut(Id, u64))) -> BTreeMap<String, u64> {
        let mut found = BTreeMap::new();
        read(&mut |id, value| {
            found.insert(id.name, value);
        });
        found
    }

    #[test]
    fn pairs_of_lines() {
        let text = "Udp: InDatagrams NoPorts\nUdp: 7 3\nTcpExt: ListenOverflows\nTcpExt: 4\n";
        let found = collect(|add| pairs(text, add));
        assert_eq!(found["UdpNoPorts"], 3);
        assert_eq!(found["TcpExtListenOverflows"], 4);
    }

    #[test]
    fn conntrack_of_all_cpus() {
        let text =
            "entries  searched found insert_failed\n00000001 00000000 0a 03\n1 0 0000000b 10\n";
        let found = collect(|add| conntrack(text, add));
        assert_eq!((found["found"], found["insert_failed"]), (21, 19));
        assert!(collect(|add| conntrack("", add)).is_empty());
    }

    #[test]
    fn this_machine_has_counters_of_each_kind() {
        let values = read(&|_, _| true);
        let has = |source, name: &str| {
            values
                .keys()
                .any(|id| id.source == source && id.name == name)
        };
        assert!(has(Source::Proc, "UdpNoPorts") && has(Source::Link, "rx_dropped"));
        assert!(softnet().keys().all(|id| id.part.starts_with("CPU ")));
    }
}
