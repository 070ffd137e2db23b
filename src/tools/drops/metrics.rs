//! `--metrics-listen`: the counts since the start for Prometheus, each family of a bounded number of series, none of what has gone.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::SocketAddr;

use anyhow::Result;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::kernel::counters;
use crate::kernel::netns::{self, Netns};
use crate::text::escape::escaped;
use crate::tools::metrics::{Exporter, Labels, OVERFLOW, SERIES, Series, metric, of_process};

use super::kernel::Count;
use super::ledger::Ledger;
use super::nft;
use super::present::{Table, source};
use super::rows::Row;

/// The interface or namespace of drops whose own has gone.
const GONE: &str = "gone";

/// What a series of drops is made of.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    class: String,
    rule: String,
    place: String,
    /// the nft rule; empty: none, or not known
    nft: String,
    /// `None`: it has gone
    netns: Option<u32>,
    /// 0: none; `None`: it has gone
    ifindex: Option<u32>,
    /// empty: none, or not known
    container: String,
}

/// The drops since the start, and the page that shows them.
pub struct Metrics {
    exporter: Exporter,
    drops: BTreeMap<Kind, Count>,
    /// drops beyond the last series
    overflow: Count,
    normal: u64,
    examples_left_out: u64,
    tables_delayed: u64,
}

impl Metrics {
    /// Begins to listen.
    pub fn listen(address: SocketAddr) -> Result<Self> {
        Ok(Self {
            exporter: Exporter::listen(address)?,
            drops: BTreeMap::new(),
            overflow: Count::default(),
            normal: 0,
            examples_left_out: 0,
            tables_delayed: 0,
        })
    }

    /// Adds what a table shows, and gives it out. `missed`: drops that netprobe did not see.
    pub fn update(
        &mut self,
        rows: &[Row],
        table: &Table,
        ledger: Option<&Ledger>,
        missed: u64,
    ) -> Result<()> {
        for row in rows {
            self.add(row);
        }
        self.examples_left_out += table.examples_left_out;
        self.tables_delayed += table.delayed;
        let read;
        let devices = match ledger {
            Some(ledger) => &ledger.devices,
            None => {
                read = counters::all_devices();
                &read
            }
        };
        self.forget(devices);
        let snapshot = self.snapshot(table, ledger, devices, missed);
        self.exporter.give_out(snapshot)
    }

    fn add(&mut self, row: &Row) {
        if row.meaning.is_expected() {
            self.normal += row.count.packets;
            return;
        }
        let kind = Kind {
            class: row.meaning.class.clone(),
            rule: row.meaning.rule().to_owned(),
            place: row.place.clone(),
            nft: row.nft.as_ref().map_or_else(String::new, nft::text),
            netns: Some(row.key.netns),
            ifindex: Some(row.key.ifindex),
            container: row.container.clone().unwrap_or_default(),
        };
        let full = self.drops.len() >= SERIES && !self.drops.contains_key(&kind);
        let count = match full {
            true => &mut self.overflow,
            false => self.drops.entry(kind).or_default(),
        };
        count.packets += row.count.packets;
        count.bytes += row.count.bytes;
    }

    /// Drops at an interface or in a namespace that is there no more go into one series, so that no sum gets smaller.
    fn forget(&mut self, devices: &HashMap<(u32, u32), String>) {
        let namespaces: std::collections::HashSet<u32> = devices.keys().map(|(n, _)| *n).collect();
        for (mut kind, count) in std::mem::take(&mut self.drops) {
            if let (Some(netns), Some(ifindex)) = (kind.netns, kind.ifindex)
                && ifindex != 0
                && !devices.contains_key(&(netns, ifindex))
            {
                kind.ifindex = None;
            }
            kind.netns = kind.netns.filter(|n| *n == 0 || namespaces.contains(n));
            if kind.netns.is_none() && !kind.container.is_empty() {
                GONE.clone_into(&mut kind.container);
            }
            let sum = self.drops.entry(kind).or_default();
            sum.packets += count.packets;
            sum.bytes += count.bytes;
        }
    }

    fn snapshot(
        &self,
        table: &Table,
        ledger: Option<&Ledger>,
        devices: &HashMap<(u32, u32), String>,
        missed: u64,
    ) -> Snapshot {
        let names = Names {
            netns: netns::names(),
            devices,
        };
        let (mut packets, mut bytes) = (Vec::new(), Vec::new());
        for (kind, count) in &self.drops {
            let labels = names.labels(kind);
            packets.push((labels.clone(), count.packets));
            bytes.push((labels, count.bytes));
        }
        let other = [
            "class",
            "rule",
            "place",
            "nft",
            "netns",
            "interface",
            "container",
        ];
        let other: Labels = other.iter().map(|l| (*l, OVERFLOW.to_owned())).collect();
        packets.push((other.clone(), self.overflow.packets));
        bytes.push((other, self.overflow.bytes));
        Snapshot {
            packets,
            bytes,
            counters: ledger.map_or_else(Vec::new, |ledger| kernel_counters(ledger, &names)),
            unexplained: table.unexplained(),
            in_no_counter: table.in_no_counter(),
            numbers: vec![
                (
                    "netprobe_normal_frees",
                    "Packets freed in the normal course",
                    self.normal,
                ),
                (
                    "netprobe_missed_drops",
                    "Drops that netprobe itself did not see or had no room for",
                    missed,
                ),
                (
                    "netprobe_examples_left_out",
                    "Rows without an example, by --max-cpu",
                    self.examples_left_out,
                ),
                (
                    "netprobe_tables_delayed",
                    "Tables that came later, by --max-cpu",
                    self.tables_delayed,
                ),
            ],
            started: self.exporter.started,
        }
    }
}

/// What numbers are called.
struct Names<'a> {
    netns: HashMap<u32, String>,
    devices: &'a HashMap<(u32, u32), String>,
}

impl Names<'_> {
    fn netns(&self, inode: u32) -> String {
        let name = self.netns.get(&inode);
        name.map_or_else(|| inode.to_string(), |name| escaped(name.as_bytes()))
    }

    fn device(&self, netns: u32, ifindex: u32) -> String {
        let name = self.devices.get(&(netns, ifindex));
        name.map_or_else(String::new, |name| escaped(name.as_bytes()))
    }

    fn labels(&self, kind: &Kind) -> Labels {
        let gone = || GONE.to_owned();
        let interface = match (kind.netns, kind.ifindex) {
            (Some(netns), Some(ifindex)) => self.device(netns, ifindex),
            _ => gone(),
        };
        vec![
            ("class", kind.class.clone()),
            ("rule", kind.rule.clone()),
            ("place", escaped(kind.place.as_bytes())),
            ("nft", kind.nft.clone()),
            ("netns", kind.netns.map_or_else(gone, |n| self.netns(n))),
            ("interface", interface),
            ("container", kind.container.clone()),
        ]
    }
}

/// Counters of the kernel: all of netprobe's own namespace, of others those that grew.
fn kernel_counters(ledger: &Ledger, names: &Names<'_>) -> Series<u64> {
    let own = Netns::current().map_or(0, |netns| netns.inode);
    let mut sums: BTreeMap<Labels, u64> = BTreeMap::new();
    for (netns, id, grew) in ledger.grown() {
        let gone = id.ifindex != 0 && !names.devices.contains_key(&(netns, id.ifindex));
        if gone || (grew == 0 && netns != own && netns != 0) {
            continue;
        }
        let labels = vec![
            ("source", source(id.source).to_owned()),
            ("counter", escaped(id.name.as_bytes())),
            (
                "netns",
                if netns == 0 {
                    String::new()
                } else {
                    names.netns(netns)
                },
            ),
            ("interface", names.device(netns, id.ifindex)),
        ];
        let full = sums.len() >= SERIES && !sums.contains_key(&labels);
        let labels = match full {
            true => labels
                .into_iter()
                .map(|(name, _)| (name, OVERFLOW.to_owned()))
                .collect(),
            false => labels,
        };
        *sums.entry(labels).or_default() += grew;
    }
    sums.into_iter().collect()
}

/// All that a scrape gives.
#[derive(Debug)]
struct Snapshot {
    packets: Series<u64>,
    bytes: Series<u64>,
    counters: Series<u64>,
    unexplained: Option<u64>,
    in_no_counter: Option<u64>,
    /// counters without labels: name, help, value
    numbers: Vec<(&'static str, &'static str, u64)>,
    started: f64,
}

impl Collector for Snapshot {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> fmt::Result {
        let families = [
            (
                "netprobe_drops",
                "Packets lost, by cause and place",
                &self.packets,
            ),
            ("netprobe_drop_bytes", "Bytes of packets lost", &self.bytes),
            (
                "netprobe_kernel_counter",
                "By what the kernel's own counters of loss grew",
                &self.counters,
            ),
        ];
        for (name, help, series) in families {
            family(&mut to, name, help, series)?;
        }
        for (name, help, value) in &self.numbers {
            metric(&mut to, name, help, &ConstCounter::new(*value))?;
        }
        let balance = [
            (
                "netprobe_unexplained_packets",
                "Packets in the kernel's counters that nobody saw",
                self.unexplained,
            ),
            (
                "netprobe_uncounted_packets",
                "Packets lost that are in no counter of the kernel",
                self.in_no_counter,
            ),
        ];
        for (name, help, value) in balance {
            // Filtered: nothing is balanced.
            if let Some(value) = value {
                metric(&mut to, name, help, &ConstGauge::new(value as f64))?;
            }
        }
        of_process(&mut to, self.started)
    }
}

fn family(
    to: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    series: &Series<u64>,
) -> fmt::Result {
    let any = ConstCounter::new(0u64);
    let mut encoder = to.encode_descriptor(name, help, None, any.metric_type())?;
    for (labels, value) in series {
        let of_labels = encoder.encode_family(labels)?;
        ConstCounter::new(*value).encode(of_labels)?;
    }
    Ok(())
}
