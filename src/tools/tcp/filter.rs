//! Which connections `netprobe tcp` shows, and what happens to which.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use anyhow::Result;

use crate::kernel::cgroup::{self, CgroupNames, Place};
use crate::kernel::netns::Netns;
use crate::kernel::{containers, pods};
use crate::tools::fields;
use crate::tools::tcpconnect::args::{list, number};
use crate::tools::who::comm_words;

use super::args::{FilterArgs, Only};
use super::connection::{Connection, Owner, Role};
use super::ending::{Ending, ending};
use super::notes::Note;

/// `--only slow`, ns.
const SLOW: u64 = 1_000_000_000;

/// Prefix length (of 128) and address, IPv4 as ::ffff:a.b.c.d.
type Network = (u32, [u8; 16]);

/// The flags, looked up.
#[derive(Debug, Default)]
pub struct Filter {
    args: FilterArgs,
    pid: Option<Wanted<u32>>,
    uid: Option<Wanted<u32>>,
    comm: Option<Wanted<String>>,
    ports: Option<Wanted<Vec<u16>>>,
    daddrs: Option<Wanted<Vec<Network>>>,
    netns: Option<Wanted<u32>>,
    /// of --cgroup, --container and --pod
    groups: Vec<Wanted<Group>>,
    cgroups: CgroupNames,
}

/// The value of a flag.
#[derive(Debug)]
struct Wanted<T> {
    value: T,
    /// a ! stood before it: all others
    others: bool,
}

/// Whose connections.
#[derive(Debug)]
enum Group {
    /// a cgroup from the mount on, and the ids of it and of those below it when the run began
    Cgroup(String, HashSet<u64>),
    Processes(HashSet<u32>),
}

/// What a filter looks at.
struct Who<'a> {
    owner: Option<&'a Owner>,
    role: Role,
    local: SocketAddr,
    remote: SocketAddr,
    netns: u32,
}

impl FilterArgs {
    /// Looks up namespaces, cgroups and containers. Values that are none are usage errors.
    pub fn resolve(&self) -> Result<Filter> {
        let folder = |path: &str| Ok(Group::new(Place::Cgroup(cgroup::folder(path)?)));
        let groups = [
            Wanted::new(&self.cgroup, folder)?,
            Wanted::new(&self.container, |name| {
                Ok(Group::new(containers::find(name)?))
            })?,
            Wanted::new(&self.pod, |name| Ok(Group::new(pods::find(name)?)))?,
        ];
        Ok(Filter {
            args: self.clone(),
            pid: Wanted::new(&self.pid, |text| number(text, "-p", "a process id"))?,
            uid: Wanted::new(&self.uid, |text| number(text, "-u", "a user id"))?,
            comm: Wanted::new(&self.comm, |name| comm_words(name).map(|_| name.to_owned()))?,
            ports: Wanted::new(&self.port, |text| {
                let ports = list(text).map(|port| number(port, "-P", "a port, 0 to 65535"));
                ports.collect()
            })?,
            daddrs: Wanted::new(&self.daddr, |text| {
                list(text).map(fields::prefix_bits).collect()
            })?,
            netns: Wanted::new(&self.netns, |text| Ok(Netns::parse(text)?.inode))?,
            groups: groups.into_iter().flatten().collect(),
            cgroups: CgroupNames::default(),
        })
    }
}

impl<T> Wanted<T> {
    fn new(text: &Option<String>, value: impl FnOnce(&str) -> Result<T>) -> Result<Option<Self>> {
        let Some(text) = text else {
            return Ok(None);
        };
        let (others, text) = match text.strip_prefix('!') {
            Some(rest) => (true, rest),
            None => (false, text.as_str()),
        };
        let value = value(text)?;
        Ok(Some(Self { value, others }))
    }

    fn holds(&self, is: impl FnOnce(&T) -> bool) -> bool {
        is(&self.value) != self.others
    }
}

fn holds<T>(wanted: &Option<Wanted<T>>, is: impl FnOnce(&T) -> bool) -> bool {
    wanted.as_ref().is_none_or(|wanted| wanted.holds(is))
}

impl Group {
    fn new(place: Place) -> Self {
        let folder = match place {
            Place::Processes(pids) => return Self::Processes(pids),
            Place::Cgroup(folder) => folder,
        };
        let root = cgroup::mount().unwrap_or(Path::new("/"));
        let path = folder.strip_prefix(root).unwrap_or(&folder);
        let path = Path::new("/").join(path).display().to_string();
        let all = cgroup::below(&folder);
        let ids = all.iter().filter_map(|f| cgroup::id_of(f).ok());
        Self::Cgroup(path, ids.collect())
    }

    fn has(&self, owner: &Owner, cgroups: &mut CgroupNames) -> bool {
        match self {
            Self::Processes(pids) => pids.contains(&owner.tgid),
            Self::Cgroup(_, ids) if ids.contains(&owner.cgroup) => true,
            // It may have been made since.
            Self::Cgroup(path, _) => cgroups
                .get(owner.cgroup)
                .is_some_and(|at| Path::new(at).starts_with(path)),
        }
    }
}

impl Filter {
    pub fn takes(&mut self, c: &Connection) -> bool {
        let long = self.args.min_ms.map(|ms| ms.saturating_mul(1_000_000));
        let only = &self.args.only;
        long.is_none_or(|ns| c.duration() >= Some(ns))
            && (only.is_empty() || only.iter().any(|&only| is_kind(c, only)))
            && self.has(&Who {
                owner: c.owner.as_ref(),
                role: c.role,
                local: c.local,
                remote: c.remote,
                netns: c.netns,
            })
    }

    /// What happens to a connection is shown whatever its duration and its end will be.
    pub fn takes_note(&mut self, n: &Note) -> bool {
        self.has(&Who {
            owner: n.owner.as_ref(),
            role: n.role,
            local: n.local,
            remote: n.remote,
            netns: n.netns,
        })
    }

    fn has(&mut self, who: &Who<'_>) -> bool {
        let owner = who.owner;
        let v4 = who.remote.ip().to_canonical().is_ipv4();
        let port = |ports: &Vec<u16>| who.services().any(|at| ports.contains(&at.port()));
        let within = |nets: &Vec<Network>| {
            let mut pairs = who
                .services()
                .flat_map(|at| nets.iter().map(move |n| (at, n)));
            pairs.any(|(at, net)| lies_in(at.ip(), *net))
        };
        let named = |name: &String| owner.is_some_and(|o| o.comm() == name.as_bytes());
        holds(&self.pid, |pid| owner.is_some_and(|o| o.tgid == *pid))
            && holds(&self.uid, |uid| owner.is_some_and(|o| o.uid == *uid))
            && holds(&self.comm, named)
            && holds(&self.netns, |netns| who.netns == *netns)
            && holds(&self.ports, port)
            && holds(&self.daddrs, within)
            && (!self.args.ipv4 || v4)
            && (!self.args.ipv6 || !v4)
            && self.groups.iter().all(|wanted| {
                wanted.holds(|group| owner.is_some_and(|o| group.has(o, &mut self.cgroups)))
            })
    }
}

impl Who<'_> {
    /// The end that was connected to; of a connection whose role is not known, it may be either.
    fn services(&self) -> impl Iterator<Item = SocketAddr> {
        let remote = (self.role != Role::Accept).then_some(self.remote);
        let local = (self.role != Role::Connect).then_some(self.local);
        remote.into_iter().chain(local)
    }
}

fn lies_in(at: IpAddr, (len, net): Network) -> bool {
    let at = match at {
        IpAddr::V4(at) => at.to_ipv6_mapped(),
        IpAddr::V6(at) => at,
    };
    (u128::from(at) ^ u128::from_be_bytes(net)).leading_zeros() >= len
}

fn is_kind(c: &Connection, only: Only) -> bool {
    match only {
        Only::Failed => !matches!(
            ending(c),
            Ending::ClosedHere | Ending::ClosedByPeer | Ending::Open
        ),
        Only::Resets => c.reset_sent || c.reset_received,
        Only::Retransmits => c.counters.retransmitted > 0 || c.counters.lost > 0,
        Only::Slow => c.duration() >= Some(SLOW),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(set: impl FnOnce(&mut FilterArgs)) -> Result<Filter> {
        let mut args = FilterArgs::default();
        set(&mut args);
        args.resolve()
    }

    fn who(role: Role, owner: Option<&Owner>) -> Who<'_> {
        Who {
            owner,
            role,
            local: "10.0.0.1:4000".parse().unwrap(),
            remote: "[::ffff:10.9.0.2]:80".parse().unwrap(),
            netns: 7,
        }
    }

    #[test]
    fn each_value_and_all_others() {
        type Set = fn(&mut FilterArgs, String);
        let of_service: [(Set, &str, &str); 2] = [
            (|a, v| a.port = Some(v), "22,80", "4000"),
            (
                |a, v| a.daddr = Some(v),
                "fd00::1,10.9.0.0/24",
                "10.0.0.0/16",
            ),
        ];
        for (set, remote, local) in of_service {
            for (role, text, takes) in [
                (Role::Connect, remote, true),
                (Role::Connect, local, false),
                (Role::Accept, remote, false),
                (Role::Accept, local, true),
                (Role::Unknown, remote, true),
                (Role::Unknown, local, true),
            ] {
                let mut plain = filter(|a| set(a, text.into())).unwrap();
                assert_eq!(plain.has(&who(role, None)), takes, "{role:?} {text}");
                let mut others = filter(|a| set(a, format!("!{text}"))).unwrap();
                assert_eq!(others.has(&who(role, None)), !takes, "{role:?} !{text}");
            }
        }
        let owner = Owner::new(99, 33, 5, b"curl");
        let of_owner: [(Set, &str, &str); 3] = [
            (|a, v| a.pid = Some(v), "99", "98"),
            (|a, v| a.uid = Some(v), "33", "0"),
            (|a, v| a.comm = Some(v), "curl", "cur"),
        ];
        for (set, right, wrong) in of_owner {
            for (text, takes, of_nobody) in [
                (right.to_owned(), true, false),
                (wrong.to_owned(), false, false),
                (format!("!{right}"), false, true),
                (format!("!{wrong}"), true, true),
            ] {
                let mut filter = filter(|a| set(a, text.clone())).unwrap();
                assert_eq!(
                    filter.has(&who(Role::Connect, Some(&owner))),
                    takes,
                    "{text}"
                );
                assert_eq!(filter.has(&who(Role::Connect, None)), of_nobody, "{text}");
            }
        }
        assert!(
            filter(|a| a.ipv4 = true)
                .unwrap()
                .has(&who(Role::Connect, None))
        );
        assert!(
            !filter(|a| a.ipv6 = true)
                .unwrap()
                .has(&who(Role::Connect, None))
        );
    }

    #[test]
    fn groups_are_cgroups_or_processes() {
        let mut names = CgroupNames::default();
        let of_cgroup = Group::Cgroup("/no/such".into(), HashSet::from([5, 6]));
        let of_processes = Group::Processes(HashSet::from([99]));
        for (owner, cgroup, process) in [
            (Owner::new(99, 0, 6, b"a"), true, true),
            (Owner::new(98, 0, u64::MAX, b"b"), false, false),
        ] {
            assert_eq!(of_cgroup.has(&owner, &mut names), cgroup);
            assert_eq!(of_processes.has(&owner, &mut names), process);
        }
    }

    #[test]
    fn wrong_values_are_named() {
        type Set = fn(&mut FilterArgs, String);
        let cases: [(Set, &str); 6] = [
            (|a, v| a.pid = Some(v), "!x"),
            (|a, v| a.port = Some(v), "80,70000"),
            (|a, v| a.daddr = Some(v), "10.0.0.0/33"),
            (|a, v| a.comm = Some(v), "longer-than-the-kernel's"),
            (|a, v| a.cgroup = Some(v), "/no/such/group"),
            (|a, v| a.netns = Some(v), "no-such-namespace"),
        ];
        for (set, text) in cases {
            let e = format!("{:#}", filter(|a| set(a, text.into())).unwrap_err());
            let named = text.trim_start_matches('!').rsplit(',').next().unwrap();
            assert!(e.contains(named), "{text}: {e}");
        }
    }
}
