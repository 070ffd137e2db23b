//! The ledger: the counters by which this kernel says "lost", read again and again, against the drops that were seen. What grew without a
//! drop that explains it is told.

use std::collections::{BTreeMap, HashMap};
use std::fs;

use crate::kernel::netns::Netns;

/// Namespaces that are watched at most.
const NAMESPACES: usize = 64;

/// A counter of /proc/net, and the drops that move it.
#[derive(Debug)]
pub struct Counter {
    /// as nstat(8) names it
    pub name: &'static str,
    /// reasons without SKB_DROP_REASON_
    pub reasons: &'static [&'static str],
    /// IPPROTO_*; 0: any
    proto: u8,
    /// what it counts, for a row of its own
    pub what: &'static str,
}

const fn counter(
    name: &'static str,
    proto: u8,
    reasons: &'static [&'static str],
    what: &'static str,
) -> Counter {
    Counter {
        name,
        reasons,
        proto,
        what,
    }
}

const UDP: u8 = 17;
const FULL: &[&str] = &["ACCEPT_QUEUE_FULL", "TCP_LISTEN_OVERFLOW"];

/// Where each is counted: net/ipv4/{ip_input,udp,tcp_input,tcp_ipv4}.c, net/core/dev.c.
pub const COUNTERS: [Counter; 17] = [
    counter(
        "UdpRcvbufErrors",
        UDP,
        &["SOCKET_RCVBUFF", "PROTO_MEM"],
        "UDP: receive buffer full",
    ),
    counter("UdpNoPorts", UDP, &["NO_SOCKET"], "UDP: no socket"),
    counter("UdpInCsumErrors", UDP, &["UDP_CSUM"], "UDP: wrong checksum"),
    counter(
        "Udp6RcvbufErrors",
        UDP,
        &["SOCKET_RCVBUFF", "PROTO_MEM"],
        "UDP over IPv6: receive buffer full",
    ),
    counter(
        "Udp6NoPorts",
        UDP,
        &["NO_SOCKET"],
        "UDP over IPv6: no socket",
    ),
    counter(
        "IpInAddrErrors",
        0,
        &["IP_INADDRERRORS", "IP_INNOROUTES"],
        "IP: wrong destination",
    ),
    counter(
        "IpInUnknownProtos",
        0,
        &["IP_NOPROTO"],
        "IP: unknown protocol",
    ),
    counter(
        "IpReasmFails",
        0,
        &["FRAG_REASM_TIMEOUT", "FRAG_TOO_FAR", "DUP_FRAG"],
        "IP: fragments that never became complete",
    ),
    counter(
        "TcpExtIPReversePathFilter",
        0,
        &["IP_RPFILTER"],
        "IP: reverse path filter",
    ),
    counter("TcpExtListenOverflows", 6, FULL, "TCP: accept queue full"),
    counter(
        "TcpExtTCPBacklogDrop",
        6,
        &["SOCKET_BACKLOG"],
        "TCP: backlog full",
    ),
    counter(
        "TcpExtTCPMinTTLDrop",
        6,
        &["TCP_MINTTL"],
        "TCP: TTL too small",
    ),
    counter(
        "TcpExtTCPZeroWindowDrop",
        6,
        &["TCP_ZEROWINDOW"],
        "TCP: own window is zero",
    ),
    counter(
        "TcpExtTCPOFODrop",
        6,
        &["TCP_OFO_DROP", "PROTO_MEM"],
        "TCP: no room out of order",
    ),
    counter(
        "TcpExtTCPRcvQDrop",
        6,
        &["PROTO_MEM", "SOCKET_RCVBUFF"],
        "TCP: receive buffer full",
    ),
    counter("TcpInCsumErrors", 6, &["TCP_CSUM"], "TCP: wrong checksum"),
    counter(
        "IcmpInCsumErrors",
        1,
        &["ICMP_CSUM"],
        "ICMP: wrong checksum",
    ),
];

/// The name of softnet_stat's second column, of the whole machine, and what moves it.
pub const SOFTNET: Counter = counter(
    "softnet_dropped",
    0,
    &["CPU_BACKLOG"],
    "a CPU's input queue is full",
);

/// Packets of a namespace that were seen dropped, by reason and protocol.
pub type Seen = HashMap<(u32, String, u8), u64>;

/// A counter that grew by more than was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unexplained {
    /// inode; 0: the whole machine
    pub netns: u32,
    pub name: &'static str,
    pub what: &'static str,
    /// since the start
    pub grew: u64,
    pub seen: u64,
}

impl Unexplained {
    pub fn packets(&self) -> u64 {
        self.grew.saturating_sub(self.seen)
    }
}

/// Values by the counters' names.
type Values = HashMap<String, u64>;

/// All counters since the start.
#[derive(Debug)]
pub struct Ledger {
    namespaces: Vec<Netns>,
    start: BTreeMap<u32, Values>,
    softnet: u64,
    /// what was unexplained at the last look: a drop may lie between its counter and its free
    before: HashMap<(u32, &'static str), u64>,
    last: (BTreeMap<u32, Values>, u64),
}

impl Ledger {
    /// Reads every counter for the first time, in all namespaces that have a name or a process.
    pub fn begin() -> Self {
        let mut namespaces = Netns::all();
        namespaces.truncate(NAMESPACES);
        let mut ledger = Self {
            namespaces,
            start: BTreeMap::new(),
            softnet: softnet(),
            before: HashMap::new(),
            last: (BTreeMap::new(), 0),
        };
        ledger.start = ledger.values();
        ledger.read();
        ledger
    }

    fn values(&self) -> BTreeMap<u32, Values> {
        let read = |netns: &Netns| Some((netns.inode, netns.run(values).ok()?));
        self.namespaces.iter().filter_map(read).collect()
    }

    /// Reads the counters. What the programs count must be read after this.
    pub fn read(&mut self) {
        self.last = (self.values(), softnet());
    }

    /// What grew since the start by more than `seen`; `last`: nothing may be on its way any more.
    pub fn balance(&mut self, seen: &Seen, last: bool) -> Vec<Unexplained> {
        let mut found = Vec::new();
        let (now, softnet) = &self.last;
        for (netns, now) in now {
            let start = self.start.get(netns);
            for counter in &COUNTERS {
                let value = |of: &Values| of.get(counter.name).copied().unwrap_or(0);
                let grew = value(now).saturating_sub(start.map_or(0, value));
                found.push(Unexplained {
                    netns: *netns,
                    name: counter.name,
                    what: counter.what,
                    grew,
                    seen: count(seen, Some(*netns), counter),
                });
            }
        }
        found.push(Unexplained {
            netns: 0,
            name: SOFTNET.name,
            what: SOFTNET.what,
            grew: softnet.saturating_sub(self.softnet),
            seen: count(seen, None, &SOFTNET),
        });
        found.retain(|u| u.packets() > 0);
        let before = std::mem::take(&mut self.before);
        self.before = found
            .iter()
            .map(|u| ((u.netns, u.name), u.packets()))
            .collect();
        found.retain(|u| last || before.contains_key(&(u.netns, u.name)));
        found
    }
}

fn count(seen: &Seen, netns: Option<u32>, counter: &Counter) -> u64 {
    let fits = |(of, reason, proto): &(u32, String, u8)| {
        netns.is_none_or(|netns| netns == *of)
            && (counter.proto == 0 || counter.proto == *proto)
            && counter.reasons.contains(&reason.as_str())
    };
    seen.iter()
        .filter(|(key, _)| fits(key))
        .map(|(_, n)| n)
        .sum()
}

/// The counters of this thread's namespace.
fn values() -> Values {
    let mut values = Values::new();
    for file in ["snmp", "netstat"] {
        let path = format!("/proc/thread-self/net/{file}");
        pairs(&fs::read_to_string(path).unwrap_or_default(), &mut values);
    }
    let text = fs::read_to_string("/proc/thread-self/net/snmp6").unwrap_or_default();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        if let (Some(name), Some(Ok(value))) = (words.next(), words.next().map(str::parse)) {
            values.insert(name.to_owned(), value);
        }
    }
    values
}

/// Two lines a group: `Udp: InDatagrams NoPorts` and `Udp: 1 2`.
fn pairs(text: &str, values: &mut Values) {
    let lines: Vec<&str> = text.lines().collect();
    for pair in lines.chunks_exact(2) {
        let (mut names, mut numbers) = (pair[0].split(' '), pair[1].split(' '));
        let group = names.next().unwrap_or_default().trim_end_matches(':');
        numbers.next();
        for (name, number) in names.zip(numbers) {
            if let Ok(number) = number.parse() {
                values.insert(format!("{group}{name}"), number);
            }
        }
    }
}

/// Frames that a full backlog of a CPU refused, of all CPUs (a row each, columns in hex).
fn softnet() -> u64 {
    let text = fs::read_to_string("/proc/net/softnet_stat").unwrap_or_default();
    let second = |line: &str| u64::from_str_radix(line.split_ascii_whitespace().nth(1)?, 16).ok();
    text.lines().filter_map(second).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_of_lines() {
        let mut values = Values::new();
        let text = "Udp: InDatagrams NoPorts\nUdp: 7 3\nTcpExt: ListenOverflows\nTcpExt: 4\n";
        pairs(text, &mut values);
        assert_eq!(values["UdpNoPorts"], 3);
        assert_eq!(values["TcpExtListenOverflows"], 4);
    }

    #[test]
    fn what_grew_without_a_drop_is_told_at_the_second_look() {
        let values = |n| BTreeMap::from([(9, Values::from([("UdpNoPorts".to_owned(), n)]))]);
        let mut ledger = Ledger {
            namespaces: Vec::new(),
            start: values(10),
            softnet: 0,
            before: HashMap::new(),
            last: (values(15), 0),
        };
        let seen = |n| Seen::from([((9, "NO_SOCKET".to_owned(), UDP), n)]);
        assert_eq!(ledger.balance(&seen(5), false), []);
        assert_eq!(ledger.balance(&seen(3), false), []);
        let found = ledger.balance(&seen(3), false);
        assert_eq!((found.len(), found[0].packets()), (1, 2));
        // Drops of another protocol or namespace explain nothing.
        let other = Seen::from([((8, "NO_SOCKET".to_owned(), UDP), 5)]);
        assert_eq!(ledger.balance(&other, true)[0].packets(), 5);
    }

    #[test]
    fn this_kernel_has_the_counters() {
        let values = values();
        for counter in COUNTERS.iter().filter(|c| !c.name.contains('6')) {
            assert!(values.contains_key(counter.name), "{}", counter.name);
        }
    }
}
