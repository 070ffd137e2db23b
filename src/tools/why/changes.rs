//! `--changes`: what processes changed in the network during the run, and what was the last change before a loss. That it came before
//! is all that is said: not that it is the cause.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::Serialize;

use crate::bpf::read;
use crate::bpf::skb::types::{
    np_head, skb_change, skb_change_size, skb_changed, skb_kind, skb_nft_change,
};
use crate::kernel::netns::Netns;
use crate::text::escape::escaped;
use crate::tools::skb::netfilter::{Nft, family};

/// Changes that are kept.
const MOST: usize = 4096;

/// Kinds of changes, as values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    Link,
    Address,
    Route,
    Neighbour,
    Rule,
    Tc,
    Nft,
    Iptables,
    Sysctl,
    Other,
}

/// A change that the kernel has accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// monotonic, ns
    pub at: u64,
    pub netns: u32,
    pub pid: u32,
    pub comm: String,
    pub kind: Kind,
    pub what: String,
    rule: Option<RuleChange>,
}

/// Which rule of nftables a change added or deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
struct RuleChange {
    family: &'static str,
    table: String,
    chain: String,
    handle: u64,
    added: bool,
}

/// Those of the run, in order.
#[derive(Debug, Default)]
pub struct Changes {
    all: VecDeque<Change>,
    devices: HashMap<(u32, u32), String>,
}

impl Changes {
    /// The newest.
    pub fn last(&self) -> Option<&Change> {
        self.all.back()
    }

    /// Takes an event in; `None` where it is none of the network's.
    pub fn event(&mut self, raw: &skb_change) -> Option<&Change> {
        let (kind, what) = self.what(raw)?;
        let change = Change {
            at: raw.event.head.ts,
            netns: raw.netns,
            pid: raw.event.head.tgid,
            comm: text(&raw.event.head.comm),
            kind,
            what,
            rule: rule_of(raw),
        };
        if self.all.len() >= MOST {
            self.all.pop_front();
        }
        self.all.push_back(change);
        self.all.back()
    }

    /// The last change before `at` in one of the namespaces; the one that made the `rule` which decided comes first.
    pub fn before(&self, at: u64, namespaces: &[u32], rule: Option<&Nft>) -> Option<&Change> {
        let before = || {
            let changes = self.all.iter().rev().filter(|c| c.at <= at);
            changes.filter(|c| namespaces.contains(&c.netns))
        };
        let made = rule.and_then(|rule| before().find(|c| c.made(rule)));
        made.or_else(|| before().next())
    }

    fn what(&mut self, raw: &skb_change) -> Option<(Kind, String)> {
        match skb_changed(raw.event.reason) {
            skb_changed::SKB_CHANGED_RTNL => {
                let netns = raw.netns;
                let devices = &mut self.devices;
                let change = rtnl(used(raw), |index| device(devices, netns, index));
                if change.as_ref().is_some_and(|(kind, _)| *kind == Kind::Link) {
                    // It may have another name now.
                    devices.retain(|(of, _), _| *of != netns);
                }
                change
            }
            skb_changed::SKB_CHANGED_NFT => Some((Kind::Nft, nft(&raw.bytes)?)),
            skb_changed::SKB_CHANGED_NFT_SOME => Some((
                Kind::Nft,
                "changed something of nftables (this kernel does not tell what)".to_owned(),
            )),
            skb_changed::SKB_CHANGED_IPTABLES => Some((Kind::Iptables, table("iptables", raw))),
            skb_changed::SKB_CHANGED_IP6TABLES => Some((Kind::Iptables, table("ip6tables", raw))),
            skb_changed::SKB_CHANGED_SYSCTL => Some((Kind::Sysctl, sysctl(&raw.bytes)?)),
            _ => None,
        }
    }
}

impl Change {
    fn made(&self, rule: &Nft) -> bool {
        self.rule.as_ref().is_some_and(|own| {
            own.added
                && own.family == rule.family
                && own.table == rule.table
                && Some(own.chain.as_str()) == rule.chain.as_deref()
                && Some(own.handle) == rule.handle
        })
    }
}

/// A device's name now: by the time that one asks it may have gone, or be another's.
fn device(known: &mut HashMap<(u32, u32), String>, netns: u32, index: u32) -> String {
    let name = known.entry((netns, index)).or_insert_with(|| {
        let inside = Netns::parse(&format!("inode:{netns}"));
        let name = inside.and_then(|n| {
            n.run(|| nix::net::if_::if_indextoname(index).map(|name| escaped(name.to_bytes())))
        });
        match name {
            Ok(Ok(name)) => name,
            _ => format!("with index {index}"),
        }
    });
    name.clone()
}

/// A change, where this is the event of one.
pub fn read_change(bytes: &[u8]) -> Option<skb_change> {
    let (head, _) = read::<np_head>(bytes)?;
    if u32::from(head.kind) != skb_kind::SKB_KIND_CHANGE.0 {
        return None;
    }
    Some(read::<skb_change>(bytes)?.0)
}

fn used(raw: &skb_change) -> &[u8] {
    raw.bytes.get(..raw.len as usize).unwrap_or_default()
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    escaped(bytes[..end].trim_ascii_end())
}

fn table(tool: &str, raw: &skb_change) -> String {
    let name = raw.bytes.get(..skb_change_size::SKB_CHANGE_NAME.0 as usize);
    format!(
        "replaced the table {} of {tool}",
        text(name.unwrap_or_default())
    )
}

/// `net.ipv4.ip_forward = 1`; `None`: it is not of the network.
fn sysctl(bytes: &[u8]) -> Option<String> {
    let value = bytes.get(..skb_change_size::SKB_CHANGE_VALUE.0 as usize)?;
    let names = bytes.get(value.len()..)?;
    let names = names.chunks(skb_change_size::SKB_CHANGE_NAME.0 as usize);
    let mut names: Vec<String> = names
        .map(text)
        .take_while(|n| !n.is_empty() && n != "sys")
        .collect();
    names.reverse();
    if names.first().is_none_or(|n| n != "net") {
        return None;
    }
    let value = text(value.split(|b| *b == b'\n').next()?);
    Some(format!("set {} = {value}", names.join(".")))
}

fn rule_of(raw: &skb_change) -> Option<RuleChange> {
    if skb_changed(raw.event.reason) != skb_changed::SKB_CHANGED_NFT {
        return None;
    }
    let (n, _) = read::<skb_nft_change>(&raw.bytes)?;
    (n.handle != 0).then(|| RuleChange {
        family: family(n.family),
        table: text(&n.table),
        chain: text(&n.part),
        handle: n.handle,
        added: n.msg == NEW_RULE,
    })
}

/// NFT_MSG_NEWRULE
const NEW_RULE: u32 = 6;

/// NFT_MSG_*, include/uapi/linux/netfilter/nf_tables.h: NEW is even, then GET and DEL follow.
fn nft(bytes: &[u8]) -> Option<String> {
    let (n, _) = read::<skb_nft_change>(bytes)?;
    let (verb, what) = match n.msg {
        0 => ("added", "table"),
        2 => ("deleted", "table"),
        3 => ("added", "chain"),
        5 => ("deleted", "chain"),
        6 => ("added", "rule"),
        8 => ("deleted", "rule"),
        12 => ("added an element to", "set"),
        14 => ("deleted an element of", "set"),
        _ => return None,
    };
    let (family, table, part) = (family(n.family), text(&n.table), text(&n.part));
    Some(match what {
        "table" => format!("{verb} nft table {family} {table}"),
        "rule" => format!(
            "{verb} nft rule handle {} of {family} {table} {part}",
            n.handle
        ),
        what => format!("{verb} nft {what} {family} {table} {part}"),
    })
}

/// Attributes of a message of rtnetlink, by number.
struct Attributes<'a>(HashMap<u16, &'a [u8]>);

impl<'a> Attributes<'a> {
    fn new(mut bytes: &'a [u8]) -> Self {
        let mut all = HashMap::new();
        while let (Some(len), Some(kind)) = (u16_at(bytes, 0), u16_at(bytes, 2)) {
            let Some(value) = bytes.get(4..usize::from(len)) else {
                break;
            };
            all.entry(kind & 0x3fff).or_insert(value);
            let next = usize::from(len).next_multiple_of(4);
            bytes = bytes.get(next..).unwrap_or_default();
        }
        Self(all)
    }

    fn address(&self, kind: u16) -> Option<IpAddr> {
        let bytes = *self.0.get(&kind)?;
        if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
            return Some(Ipv4Addr::from(v4).into());
        }
        let v6 = <[u8; 16]>::try_from(bytes).ok()?;
        Some(Ipv6Addr::from(v6).into())
    }

    fn number(&self, kind: u16) -> Option<u32> {
        u32_at(self.0.get(&kind)?, 0)
    }

    fn text(&self, kind: u16) -> Option<String> {
        self.0.get(&kind).map(|bytes| text(bytes))
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// A request of rtnetlink, from its header on, in words. `device`: a device's name by its index.
fn rtnl(bytes: &[u8], device: impl FnMut(u32) -> String) -> Option<(Kind, String)> {
    const HEADER: usize = 16;
    const CREATE: u16 = 0x400;
    let (kind, flags) = (u16_at(bytes, 4)?, u16_at(bytes, 6)?);
    let body = bytes.get(HEADER..)?;
    let verb = match (kind & 3, flags & CREATE != 0) {
        (0, true) => "added",
        (1, _) => "deleted",
        _ => "changed",
    };
    // Each kind has a fixed part in front of its attributes.
    let parts = |len: usize| Some((body.get(..len)?, Attributes::new(body.get(len..)?)));
    match kind {
        16 | 17 | 19 => link(verb, parts(16)?, device).map(|w| (Kind::Link, w)),
        20 | 21 => address(verb, parts(8)?, device).map(|w| (Kind::Address, w)),
        24 | 25 => route(verb, parts(12)?, device).map(|w| (Kind::Route, w)),
        28 | 29 => neighbour(verb, parts(12)?, device).map(|w| (Kind::Neighbour, w)),
        32 | 33 => rule(verb, &parts(12)?).map(|w| (Kind::Rule, w)),
        36 | 37 => tc(verb, "queue discipline", parts(20)?, device),
        40 | 41 => tc(verb, "traffic class", parts(20)?, device),
        44 | 45 => tc(verb, "tc filter", parts(20)?, device),
        kind => Some((
            Kind::Other,
            format!("{verb} something by rtnetlink (message {kind})"),
        )),
    }
}

type Parts<'a> = (&'a [u8], Attributes<'a>);

/// struct ifinfomsg: family, type, index, flags, change
fn link(
    verb: &str,
    (fixed, attributes): Parts<'_>,
    mut device: impl FnMut(u32) -> String,
) -> Option<String> {
    const UP: u32 = 1;
    let (index, flags, change) = (u32_at(fixed, 4)?, u32_at(fixed, 8)?, u32_at(fixed, 12)?);
    let name = attributes
        .text(3)
        .filter(|_| index == 0 || verb == "deleted");
    let name = name.unwrap_or_else(|| device(index));
    let mut text = format!("{verb} the link {name}");
    if change & UP != 0 && verb != "deleted" {
        text += if flags & UP != 0 { ", up" } else { ", down" };
    }
    if let Some(mtu) = attributes.number(4) {
        text += &format!(", mtu {mtu}");
    }
    match attributes.number(10) {
        Some(0) => text += ", without a master",
        Some(master) => text += &format!(", master {}", device(master)),
        None => {}
    }
    Some(text)
}

/// struct ifaddrmsg: family, length, flags, scope, index
fn address(
    verb: &str,
    (fixed, attributes): Parts<'_>,
    mut device: impl FnMut(u32) -> String,
) -> Option<String> {
    let (length, index) = (fixed.get(1)?, u32_at(fixed, 4)?);
    let address = attributes.address(2).or_else(|| attributes.address(1))?;
    Some(format!(
        "{verb} the address {address}/{length} of {}",
        device(index)
    ))
}

/// struct rtmsg: family, lengths of destination and source, tos, table, protocol, scope, type
fn route(
    verb: &str,
    (fixed, attributes): Parts<'_>,
    mut device: impl FnMut(u32) -> String,
) -> Option<String> {
    let (length, table, kind) = (fixed.get(1)?, *fixed.get(4)?, fixed.get(7)?);
    let mut text = match kind {
        6 => format!("{verb} the blackhole route "),
        7 => format!("{verb} the unreachable route "),
        8 => format!("{verb} the prohibit route "),
        _ => format!("{verb} the route "),
    };
    text += &match attributes.address(1) {
        Some(address) => format!("{address}/{length}"),
        None => "default".to_owned(),
    };
    if let Some(gateway) = attributes.address(5) {
        text += &format!(" via {gateway}");
    }
    if let Some(index) = attributes.number(4) {
        text += &format!(" dev {}", device(index));
    }
    match attributes.number(15).unwrap_or(table.into()) {
        0 | 254 => {}
        table => text += &format!(" in table {table}"),
    }
    Some(text)
}

/// struct ndmsg: family, padding, index, state, flags, type
fn neighbour(
    verb: &str,
    (fixed, attributes): Parts<'_>,
    mut device: impl FnMut(u32) -> String,
) -> Option<String> {
    let index = u32_at(fixed, 4)?;
    let mac = attributes.0.get(&2).map(|mac| {
        let bytes: Vec<String> = mac.iter().map(|b| format!("{b:02x}")).collect();
        bytes.join(":")
    });
    let at = mac.map_or_else(String::new, |mac| format!(" at {mac}"));
    Some(match attributes.address(1) {
        Some(address) => format!("{verb} the neighbour {address}{at} of {}", device(index)),
        None => format!("{verb} a forwarding entry{at} of {}", device(index)),
    })
}

/// struct fib_rule_hdr: family, lengths of destination and source, tos, table, two reserved, action, flags
fn rule(verb: &str, (fixed, attributes): &Parts<'_>) -> Option<String> {
    let mut text = format!("{verb} the routing rule");
    if let Some(priority) = attributes.number(6) {
        text += &format!(" {priority}");
    }
    for (word, kind, at) in [("from", 2, 2), ("to", 1, 1)] {
        if let Some(address) = attributes.address(kind) {
            text += &format!(" {word} {address}/{}", fixed.get(at)?);
        }
    }
    if let Some(mark) = attributes.number(10) {
        text += &format!(" with mark {mark:#x}");
    }
    text += &match (
        fixed.get(7)?,
        attributes.number(15).unwrap_or((*fixed.get(4)?).into()),
    ) {
        (6, _) => ": blackhole".to_owned(),
        (7, _) => ": unreachable".to_owned(),
        (8, _) => ": prohibit".to_owned(),
        (_, table) => format!(": table {table}"),
    };
    Some(text)
}

/// struct tcmsg: family, padding, index, handle, parent, info
fn tc(
    verb: &str,
    what: &str,
    (fixed, attributes): Parts<'_>,
    mut device: impl FnMut(u32) -> String,
) -> Option<(Kind, String)> {
    let kind = attributes
        .text(1)
        .map_or_else(String::new, |kind| format!("{kind} "));
    let device = device(u32_at(fixed, 4)?);
    Some((Kind::Tc, format!("{verb} the {what} {kind}of {device}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(kind: u16, flags: u16, fixed: &[u8], attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut body = fixed.to_vec();
        for (kind, value) in attributes {
            body.extend((4 + value.len() as u16).to_ne_bytes());
            body.extend(kind.to_ne_bytes());
            body.extend(*value);
            body.resize(body.len().next_multiple_of(4), 0);
        }
        let mut bytes = (16 + body.len() as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(body);
        bytes
    }

    fn words(bytes: &[u8]) -> String {
        rtnl(bytes, |index| format!("eth{index}")).unwrap().1
    }

    #[test]
    fn requests_of_rtnetlink() {
        let two = 2u32.to_ne_bytes();
        let fixed = [2, 24, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0];
        let route = message(
            24,
            0x405,
            &fixed,
            &[(1, &[10, 9, 0, 0]), (5, &[10, 7, 0, 1]), (4, &two)],
        );
        assert_eq!(
            words(&route),
            "added the route 10.9.0.0/24 via 10.7.0.1 dev eth2"
        );
        let fixed = [2, 0, 0, 0, 100, 3, 0, 6, 0, 0, 0, 0];
        assert_eq!(
            words(&message(25, 5, &fixed, &[])),
            "deleted the blackhole route default in table 100"
        );
        let mut fixed = [0; 16];
        fixed[4] = 2;
        fixed[12] = 1;
        assert_eq!(
            words(&message(16, 5, &fixed, &[])),
            "changed the link eth2, down"
        );
        let mtu = 600u32.to_ne_bytes();
        assert_eq!(
            words(&message(19, 5, &[0; 16], &[(3, b"small\0"), (4, &mtu)])),
            "changed the link small, mtu 600"
        );
        let fixed = [2, 32, 0, 0, 2, 0, 0, 0];
        assert_eq!(
            words(&message(21, 5, &fixed, &[(2, &[10, 0, 0, 1])])),
            "deleted the address 10.0.0.1/32 of eth2"
        );
        let mut fixed = [0; 20];
        fixed[4] = 2;
        assert_eq!(
            words(&message(36, 0x405, &fixed, &[(1, b"netem\0")])),
            "added the queue discipline netem of eth2"
        );
        let fixed = [2, 0, 24, 0, 0, 0, 0, 1, 0, 0, 0, 0];
        let rule = message(
            32,
            0x405,
            &fixed,
            &[(2, &[10, 1, 0, 0]), (15, &100u32.to_ne_bytes())],
        );
        assert_eq!(
            words(&rule),
            "added the routing rule from 10.1.0.0/24: table 100"
        );
    }

    #[test]
    fn sysctls_of_the_network() {
        let with = |names: &[&str]| {
            let mut bytes = vec![0; 256];
            bytes[..4].copy_from_slice(b"1\nxx");
            for (i, name) in names.iter().enumerate() {
                bytes[64 + i * 32..][..name.len()].copy_from_slice(name.as_bytes());
            }
            sysctl(&bytes)
        };
        assert_eq!(
            with(&["ip_forward", "ipv4", "net", "sys"]).unwrap(),
            "set net.ipv4.ip_forward = 1"
        );
        assert_eq!(with(&["swappiness", "vm", "sys"]), None);
    }

    fn change(at: u64, netns: u32) -> Change {
        Change {
            at,
            netns,
            pid: 1,
            comm: "ip".into(),
            kind: Kind::Route,
            what: format!("at {at}"),
            rule: None,
        }
    }

    #[test]
    fn the_change_before_a_loss() {
        let mut changes = Changes::default();
        changes
            .all
            .extend([change(1, 7), change(2, 8), change(3, 7), change(9, 7)]);
        let before = |namespaces: &[u32], rule| changes.before(5, namespaces, rule).map(|c| c.at);
        assert_eq!(before(&[7], None), Some(3));
        assert_eq!(before(&[8], None), Some(2));
        assert_eq!(before(&[6], None), None);
    }

    proptest! {
        #[test]
        fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..260), kind in 16u16..50) {
            let mut bytes = bytes;
            if let Some(at) = bytes.get_mut(4..6) {
                at.copy_from_slice(&kind.to_ne_bytes());
            }
            let _ = rtnl(&bytes, |_| String::new());
            let (_, _) = (nft(&bytes), sysctl(&bytes));
        }
    }
}
