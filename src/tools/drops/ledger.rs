//! The ledger: the counters by which this kernel says "lost", read again and again, against the drops that were seen. What grew without a
//! drop that explains it is told, and what was seen without its counter.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::kernel::counters::{self, Id, Source, Values};
use crate::kernel::netns::Netns;

use super::table::{Entry, Seen, table};
use crate::explain::EXPECTED;

/// Namespaces that are watched at most.
const NAMESPACES: usize = 256;

/// A counter that grew by another number than was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// inode; 0: the whole machine
    pub netns: u32,
    /// of the device that it is about; 0: none
    pub ifindex: u32,
    pub source: Source,
    pub name: String,
    pub entry: &'static Entry,
    /// since the start
    pub grew: u64,
    pub seen: u64,
    /// devices, qdiscs, sockets or CPUs, and by how much each grew
    pub parts: Vec<(String, u64)>,
}

impl Difference {
    /// Packets that the counter has and nobody saw.
    pub fn unexplained(&self) -> u64 {
        self.grew.saturating_sub(self.seen)
    }

    /// Packets that were seen and that the counter does not have.
    pub fn uncounted(&self) -> u64 {
        self.seen.saturating_sub(self.grew)
    }
}

/// What a look at the books found.
#[derive(Debug, Clone, Default)]
pub struct Balance {
    pub unexplained: Vec<Difference>,
    /// counters that must have what was seen, and do not
    pub uncounted: Vec<Difference>,
    /// counters that grew and tell of no lost packet by themselves
    pub notes: Vec<Difference>,
    /// packets lost that no counter of the kernel has
    pub in_no_counter: u64,
    /// how many counters were read
    pub counters: usize,
}

impl Balance {
    /// Packets: of counters that count the same ones the largest difference.
    pub fn packets(&self) -> u64 {
        let mut groups: HashMap<(u32, u32, &str), u64> = HashMap::new();
        for d in &self.unexplained {
            let most = groups
                .entry((d.netns, d.ifindex, d.entry.group.as_str()))
                .or_default();
            *most = (*most).max(d.unexplained());
        }
        groups.values().sum()
    }
}

/// What is balanced as one: counters of one name in one place, of several sockets, qdiscs or CPUs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Account {
    netns: u32,
    source: Source,
    name: String,
    ifindex: u32,
    port: u16,
}

impl Account {
    fn of(netns: u32, id: &Id) -> Self {
        Self {
            netns,
            source: id.source,
            name: id.name.clone(),
            ifindex: id.ifindex,
            port: id.port,
        }
    }
}

/// One counter's value, and by how much it has grown. It may begin again at 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Track {
    last: u64,
    grew: u64,
}

/// All counters since the start.
#[derive(Debug, Default)]
pub struct Ledger {
    /// by namespace
    tracks: BTreeMap<u32, BTreeMap<Id, Track>>,
    /// what grew, at the last look
    before: HashMap<Account, u64>,
    /// packets since the start
    seen: HashMap<Seen, u64>,
    /// the same, at the last look
    seen_before: Vec<(Seen, u64)>,
    /// interfaces that are there, by namespace and index
    pub devices: HashMap<(u32, u32), String>,
    /// of namespaces that came later: what was seen before their first look
    late: HashSet<u32>,
    /// namespaces that are not looked at
    pub left_out: usize,
}

impl Ledger {
    /// Reads every counter for the first time, in all namespaces that have a name or a process.
    pub fn begin() -> Self {
        let mut ledger = Self::default();
        ledger.read();
        ledger.late.clear();
        ledger
    }

    /// Reads the counters. What the programs count must be read after this.
    pub fn read(&mut self) {
        let mut namespaces = Netns::all();
        self.left_out = namespaces.len().saturating_sub(NAMESPACES);
        namespaces.truncate(NAMESPACES);
        let wanted = |source, name: &str| table().find(source, name).is_some();
        let mut now = BTreeMap::from([(0, counters::softnet())]);
        for netns in namespaces {
            if let Ok(values) = netns.run(|| counters::read(&wanted)) {
                now.insert(netns.inode, values);
            }
        }
        self.take(now);
    }

    /// Adds packets that were seen lost.
    pub fn add(&mut self, mut seen: Seen, packets: u64) {
        if !table().asks_for_port(&seen) {
            seen.port = 0;
        }
        *self.seen.entry(seen).or_default() += packets;
    }

    fn take(&mut self, now: BTreeMap<u32, Values>) {
        // Namespaces that have gone take their books along.
        let gone = |netns: &u32| self.tracks.contains_key(netns) && !now.contains_key(netns);
        self.seen.retain(|seen, _| !gone(&seen.netns));
        self.tracks.retain(|netns, _| now.contains_key(netns));
        self.late.retain(|netns| now.contains_key(netns));
        self.devices = devices(&now);
        for (netns, values) in now {
            match self.tracks.get_mut(&netns) {
                Some(tracks) => advance(tracks, values),
                None => {
                    let first = |(id, last)| (id, Track { last, grew: 0 });
                    self.tracks
                        .insert(netns, values.into_iter().map(first).collect());
                    self.late.insert(netns);
                }
            }
        }
    }

    /// Remembers what has grown up to now: all of it has been freed when the programs are paused.
    pub fn settle(&mut self) {
        let all = self.accounts().into_iter();
        self.before = all.map(|(account, parts)| (account, sum(&parts))).collect();
    }

    /// Compares what grew since the start with what was `seen`; `last`: the counters were read once more after the last drop that was seen.
    pub fn balance(&mut self, last: bool) -> Balance {
        let seen: Vec<(Seen, u64)> = self.seen.iter().map(|(s, n)| (s.clone(), *n)).collect();
        let mut balance = Balance {
            counters: self.tracks.values().map(BTreeMap::len).sum(),
            ..Balance::default()
        };
        let now = Drops::of(&seen);
        let settled = if last {
            Drops::of(&seen)
        } else {
            Drops::of(&self.seen_before)
        };
        let mut counted = vec![false; seen.len()];
        let accounts = self.accounts();
        for (account, parts) in &accounts {
            let Some(entry) = table().find(account.source, &account.name) else {
                continue;
            };
            let grew = sum(parts);
            if grew == 0 && !entry.exact {
                continue;
            }
            if grew > 0 {
                now.mark(account, entry, &mut counted);
            }
            let sure = settled.count(account, entry, true);
            let mut found = Difference {
                netns: account.netns,
                ifindex: account.ifindex,
                source: account.source,
                name: account.name.clone(),
                entry,
                // What had grown by the last look has been freed since.
                grew: self.before.get(account).copied().unwrap_or(0),
                // A packet that a queue refused is told to its program, too.
                seen: now
                    .count(account, entry, false)
                    .max(told(&accounts, account, entry)),
                parts: parts.clone(),
            };
            if entry.note {
                found.grew = grew;
                balance.notes.push(found);
            } else if found.unexplained() > 0 {
                balance.unexplained.push(found);
            } else if entry.exact && !self.late.contains(&account.netns) && sure > grew {
                (found.grew, found.seen) = (grew, sure);
                balance.uncounted.push(found);
            }
        }
        let lost = seen.iter().zip(counted);
        let lost = lost.filter(|((seen, _), counted)| !counted && seen.class != EXPECTED);
        balance.in_no_counter = lost.map(|((_, packets), _)| packets).sum();
        self.settle();
        self.seen_before = seen;
        balance
    }

    /// Every account, with what grew of it by parts.
    fn accounts(&self) -> BTreeMap<Account, Vec<(String, u64)>> {
        let mut accounts: BTreeMap<Account, Vec<(String, u64)>> = BTreeMap::new();
        for (netns, tracks) in &self.tracks {
            for (id, track) in tracks {
                let parts = accounts.entry(Account::of(*netns, id)).or_default();
                if track.grew > 0 {
                    parts.push((id.part.clone(), track.grew));
                }
            }
        }
        accounts
    }

    /// What every counter has grown by since the start.
    pub fn grown(&self) -> impl Iterator<Item = (u32, &Id, u64)> {
        self.tracks
            .iter()
            .flat_map(|(netns, tracks)| tracks.iter().map(|(id, track)| (*netns, id, track.grew)))
    }
}

fn sum(parts: &[(String, u64)]) -> u64 {
    parts.iter().map(|(_, n)| n).sum()
}

/// What programs were told of, which moved the account's counters as well.
fn told(accounts: &BTreeMap<Account, Vec<(String, u64)>>, account: &Account, entry: &Entry) -> u64 {
    let of = |name: &String| {
        let other = Account {
            name: name.clone(),
            ..account.clone()
        };
        accounts.get(&other).map_or(0, |parts| sum(parts))
    };
    entry.told.iter().map(of).sum()
}

fn devices(now: &BTreeMap<u32, Values>) -> HashMap<(u32, u32), String> {
    let all = now.iter().flat_map(|(netns, values)| {
        let links = values.keys().filter(|id| id.source == Source::Link);
        links.map(|id| ((*netns, id.ifindex), id.part.clone()))
    });
    all.collect()
}

fn advance(tracks: &mut BTreeMap<Id, Track>, now: Values) {
    // What has gone keeps what it lost.
    tracks.retain(|id, track| track.grew > 0 || now.contains_key(id));
    for (id, value) in now {
        // A socket began at 0; what another thing had counted before we saw it is not known.
        let first = match id.source {
            Source::Socket => 0,
            _ => value,
        };
        let track = tracks.entry(id).or_insert(Track {
            last: first,
            grew: 0,
        });
        track.grew += match value >= track.last {
            true => value - track.last,
            false => value,
        };
        track.last = value;
    }
}

/// Drops by what an account may ask for.
struct Drops<'a> {
    by_netns: HashMap<u32, Vec<usize>>,
    all: &'a [(Seen, u64)],
}

impl<'a> Drops<'a> {
    fn of(all: &'a [(Seen, u64)]) -> Self {
        let mut by_netns: HashMap<u32, Vec<usize>> = HashMap::new();
        for (at, (seen, _)) in all.iter().enumerate() {
            by_netns.entry(seen.netns).or_default().push(at);
        }
        Self { by_netns, all }
    }

    /// The drops that may have moved the account's counters.
    fn fitting(&self, account: &Account, entry: &Entry) -> Vec<usize> {
        let here = |at: &usize| {
            let seen = &self.all[*at].0;
            let device = account.ifindex == 0 || account.ifindex == seen.ifindex;
            let port = account.port == 0 || account.port == seen.port;
            device && port && entry.fits(seen)
        };
        if !entry.far.is_empty() {
            let near = |at: &usize| self.all[*at].0.netns == account.netns && here(at);
            let all = 0..self.all.len();
            return all
                .filter(|at| entry.fits_from_far(&self.all[*at].0) || near(at))
                .collect();
        }
        match account.netns {
            0 => (0..self.all.len()).filter(here).collect(),
            netns => {
                let of_netns = self.by_netns.get(&netns).into_iter().flatten();
                of_netns.copied().filter(here).collect()
            }
        }
    }

    /// Their packets; `sure`: only those whose reason is the kernel's own.
    fn count(&self, account: &Account, entry: &Entry, sure: bool) -> u64 {
        let fitting = self.fitting(account, entry).into_iter();
        let of = fitting.map(|at| &self.all[at]);
        of.filter(|(seen, _)| !(sure && seen.guessed))
            .map(|(_, packets)| packets)
            .sum()
    }

    fn mark(&self, account: &Account, entry: &Entry, counted: &mut [bool]) {
        for at in self.fitting(account, entry) {
            counted[at] = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn udp(netns: u32) -> Seen {
        Seen {
            netns,
            ifindex: 2,
            port: 53,
            proto: 17,
            ip: 4,
            guessed: false,
            reason: "NO_SOCKET".into(),
            rule: "NO_SOCKET".into(),
            class: "socket".into(),
            place: "__udp4_lib_rcv".into(),
        }
    }

    fn values(name: &str, value: u64) -> BTreeMap<u32, Values> {
        let id = Id {
            source: Source::Proc,
            name: name.into(),
            ifindex: 0,
            port: 0,
            part: String::new(),
        };
        BTreeMap::from([(9, Values::from([(id, value)]))])
    }

    fn begun(name: &str) -> Ledger {
        let mut ledger = Ledger::default();
        ledger.take(values(name, 10));
        ledger.late.clear();
        ledger
    }

    #[test]
    fn what_grew_without_a_drop_is_told_at_the_second_look() {
        let mut ledger = begun("UdpNoPorts");
        ledger.take(values("UdpNoPorts", 15));
        ledger.add(udp(9), 3);
        assert!(ledger.balance(false).unexplained.is_empty());
        // Drops of another namespace explain nothing.
        ledger.add(udp(8), 5);
        let found = ledger.balance(false);
        assert_eq!((found.unexplained.len(), found.packets()), (1, 2));
        ledger.add(udp(9), 2);
        assert!(ledger.balance(false).unexplained.is_empty());
    }

    #[test]
    fn what_was_seen_without_its_counter() {
        let mut ledger = begun("UdpNoPorts");
        ledger.take(values("UdpNoPorts", 12));
        ledger.add(udp(9), 4);
        // It may be counted a moment later.
        assert!(ledger.balance(false).uncounted.is_empty());
        let found = ledger.balance(false);
        assert_eq!(found.uncounted[0].uncounted(), 2);
        assert_eq!(found.packets(), 0);
    }

    #[test]
    fn a_counter_that_begins_again() {
        let mut ledger = begun("UdpNoPorts");
        ledger.take(values("UdpNoPorts", 12));
        ledger.take(values("UdpNoPorts", 3));
        ledger.settle();
        assert_eq!(ledger.balance(true).packets(), 5);
    }

    #[test]
    fn counters_of_one_group_count_once() {
        let mut ledger = Ledger::default();
        let both = |n| {
            let mut all = values("UdpRcvbufErrors", n);
            let more = values("UdpInErrors", n).remove(&9).unwrap();
            all.get_mut(&9).unwrap().extend(more);
            all
        };
        ledger.take(both(0));
        ledger.take(both(7));
        ledger.settle();
        let found = ledger.balance(true);
        assert_eq!((found.unexplained.len(), found.packets()), (2, 7));
    }

    #[test]
    fn what_a_program_was_told_of_is_no_loss_of_a_packet() {
        let mut ledger = Ledger::default();
        let both = |discards, told| {
            let mut all = values("IpOutDiscards", discards);
            let more = values("UdpSndbufErrors", told).remove(&9).unwrap();
            all.get_mut(&9).unwrap().extend(more);
            all
        };
        ledger.take(both(0, 0));
        ledger.take(both(7, 5));
        ledger.settle();
        let found = ledger.balance(true);
        assert_eq!((found.packets(), found.notes.len()), (2, 1));
    }

    #[test]
    fn a_namespace_that_came_later_begins_with_what_it_has() {
        let mut ledger = begun("UdpNoPorts");
        let mut now = values("UdpNoPorts", 10);
        let fresh = values("UdpNoPorts", 100).remove(&9).unwrap();
        now.insert(11, fresh);
        ledger.take(now);
        ledger.add(udp(11), 4);
        let found = ledger.balance(true);
        assert_eq!((found.packets(), found.uncounted.len()), (0, 0));
    }
}
