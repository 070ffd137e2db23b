//! Counts of the kernel side to rows: what was lost, where, whose.

use std::cell::LazyCell;

use crate::bpf::drops::types::{drop_example, drop_key};
use crate::explain::{Meaning, NOT_SPECIFIED, Rules};
use crate::kernel::containers::ContainerNames;
use crate::kernel::drop_reason::DropReasons;
use crate::kernel::ksyms::FewSymbols;
use crate::kernel::listen;
use crate::kernel::netns::{self, Netns};
use crate::kernel::process::SocketHolders;
use crate::tools::drop_facts::facts;
use crate::tools::skb::netfilter::Nft;

use super::device;
use super::kernel::{Count, Taken};
use super::nft::RuleNames;
use super::table::Seen;

/// One row of a table.
#[derive(Debug, Clone)]
pub struct Row {
    pub count: Count,
    pub meaning: Meaning,
    /// the kernel's name without SKB_DROP_REASON_, or ours (kernel::listen); empty where there is none
    pub reason: String,
    /// the function that decided; empty where places are not asked for
    pub place: String,
    pub offset: u64,
    pub key: drop_key,
    pub example: Option<drop_example>,
    /// who holds the example's socket now
    pub owner: Option<(u32, String)>,
    /// the container of that socket, else of the namespace; escaped
    pub container: Option<String>,
    /// the handle of the qdisc that dropped, and why in its own words
    pub qdisc: Option<(String, String)>,
    /// the device's transmit queue that timed out
    pub queue: Option<u32>,
    /// the devlink trap: its group and its name, escaped
    pub trap: Option<(String, String)>,
    /// the rule that dropped
    pub nft: Option<Nft>,
}

impl Row {
    /// As the ledger wants it.
    pub fn seen(&self) -> Seen {
        Seen {
            netns: self.key.netns,
            ifindex: self.key.ifindex,
            port: self.key.dport,
            proto: self.key.proto,
            ip: self.key.ip,
            guessed: matches!(self.reason.as_str(), "" | NOT_SPECIFIED),
            reason: self.meaning.reason.clone(),
            rule: self.meaning.rule().to_owned(),
            class: self.meaning.class.clone(),
            place: self.place.clone(),
        }
    }
}

/// What turns counts into rows.
pub struct Names {
    rules: Rules,
    reasons: DropReasons,
    symbols: FewSymbols,
    holders: Option<SocketHolders>,
    containers: ContainerNames,
    /// netprobe's own namespace
    own: u32,
    nft: RuleNames,
}

impl Names {
    pub fn new(rules: Rules, reasons: DropReasons, nft: RuleNames) -> Self {
        Self {
            rules,
            reasons,
            symbols: FewSymbols::default(),
            holders: None,
            containers: ContainerNames::default(),
            own: Netns::current().map_or(0, |netns| netns.inode),
            nft,
        }
    }

    /// The name of a reason without what all of the core's have in common.
    pub fn reason(&mut self, value: u32) -> String {
        if let Some(name) = listen::reason(value).or_else(|| device::reason(value)) {
            return name.to_owned();
        }
        if value == 0 {
            return String::new();
        }
        let name = self.reasons.name(value);
        name.strip_prefix("SKB_DROP_REASON_")
            .map_or(name.clone(), str::to_owned)
    }

    /// Rows of what was taken.
    pub fn rows(&mut self, taken: &[Taken]) -> Vec<Row> {
        self.resolve(taken);
        let mut rows = Vec::new();
        // Who is in the namespaces of this table: looked up once, if at all.
        let processes = LazyCell::new(netns::processes);
        for Taken {
            key,
            count,
            example,
            rule,
        } in taken
        {
            let (place, offset) = self.place(key);
            let reason = self.reason(key.reason);
            let owner = self.owner(example.as_ref().map_or(0, |e| e.inode));
            let pid = owner.as_ref().map_or(0, |(pid, _)| *pid);
            let mut container = match example.as_ref().map_or(0, |e| e.cgroup) {
                0 if pid == 0 => None,
                cgroup => self.containers.of(cgroup, pid),
            };
            if container.is_none() && ![0, self.own].contains(&key.netns) {
                let pid = processes.get(&key.netns).copied();
                container = pid.and_then(|pid| self.containers.of(0, pid));
            }
            if rule.is_none() && reason == "NETFILTER_DROP" {
                self.nft.missed();
            }
            rows.push(Row {
                count: *count,
                meaning: self.rules.explain(&reason, &place, &facts(key.facts)),
                reason,
                place,
                offset,
                key: *key,
                owner,
                container,
                qdisc: self.qdisc(key),
                example: *example,
                queue: device::queue(key),
                trap: rule.as_ref().and_then(|rule| device::trap(key, rule)),
                nft: (!device::is_device(key.reason))
                    .then(|| Some(self.nft.of(rule.as_ref()?)))
                    .flatten(),
            });
        }
        rows
    }

    fn qdisc(&mut self, key: &drop_key) -> Option<(String, String)> {
        if key.qdisc_reason == 0 {
            return None;
        }
        let name = self
            .reasons
            .name(u32::from(key.qdisc_subsys) << 16 | u32::from(key.qdisc_reason));
        let name = name.strip_prefix("QDISC_DROP_").unwrap_or(&name).to_owned();
        Some((format!("{:x}:", key.decider >> 16), name))
    }

    fn owner(&mut self, inode: u64) -> Option<(u32, String)> {
        if inode == 0 {
            return None;
        }
        let holders = self.holders.get_or_insert_with(SocketHolders::look);
        holders.of(inode).map(|p| (p.pid, p.comm.clone()))
    }

    fn resolve(&mut self, taken: &[Taken]) {
        let places = taken.iter().map(|row| row.key.place);
        let places: Vec<u64> = places.filter(|place| *place != 0).collect();
        self.symbols.resolve(&places);
    }

    /// The function that decided, and how far behind its beginning; empty where places are not asked for.
    fn place(&self, key: &drop_key) -> (String, u64) {
        match self.symbols.get(key.place) {
            Some(symbol) => (symbol.name.clone(), symbol.offset),
            None if key.place == 0 => (String::new(), 0),
            None => (format!("{:#x}", key.place), 0),
        }
    }
}
