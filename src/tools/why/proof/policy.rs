//! Routing by policy, IPsec, cgroups: routing rules, VRFs, policies of xfrm, BPF programs of a cgroup.

use std::net::IpAddr;
use std::process::Command;

use crate::kernel::cgroup::{self, CgroupNames};
use crate::kernel::program;
use crate::text::escape::escaped;

use super::ip::addresses;
use super::{Case, Proof};

/// Lines that are shown.
const MOST: usize = 4;

/// A command's stdout in the namespace of the loss; `None` where the program is missing, or fails.
pub fn output(case: &Case<'_>, program: &str, args: &[&str]) -> Option<String> {
    let mut command = Command::new(program);
    command.args(args);
    let output = case.inside(|| command.output())?.ok()?;
    let done = output.status.success();
    done.then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Routing rules beside the three that each namespace has, as far as the packet's addresses, mark and device fit them.
pub fn rules(case: &Case<'_>) -> Vec<Proof> {
    let Some((from, to)) = addresses(case) else {
        return Vec::new();
    };
    let family = if to.is_ipv6() { "-6" } else { "-4" };
    let Some(listed) = output(case, "ip", &[family, "rule", "show"]) else {
        return Vec::new();
    };
    let packet = Packet {
        from,
        to,
        mark: case.dropped.and_then(|d| d.meta.as_ref()).map(|m| m.mark),
        device: case.device(),
    };
    let lines = listed.lines().map(str::trim);
    let fits = |line: &&str| !is_usual(line) && packet.fits(line) != Some(false);
    let one = |line: &str| {
        let may = match packet.fits(line) {
            Some(true) => "it fits the routing rule",
            _ => "it may fit the routing rule",
        };
        let text = escaped(
            line.split_whitespace()
                .collect::<Vec<_>>()
                .join(" ")
                .as_bytes(),
        );
        Proof::now("routing-rule", format!("{may} {text}")).with("rule", text)
    };
    lines.filter(fits).take(MOST).map(one).collect()
}

fn is_usual(line: &str) -> bool {
    let words: Vec<&str> = line.split_whitespace().skip(1).collect();
    matches!(
        words.as_slice(),
        [
            "from",
            "all",
            "lookup",
            "local" | "main" | "default" | "l3mdev" | "[l3mdev-table]"
        ]
    )
}

/// What a routing rule may ask for.
struct Packet {
    from: IpAddr,
    to: IpAddr,
    mark: Option<u32>,
    device: String,
}

impl Packet {
    /// Whether the packet fits a rule as ip shows it; `None`: it asks for something that is not known.
    fn fits(&self, line: &str) -> Option<bool> {
        let (_, rest) = line.split_once(':')?;
        let words: Vec<&str> = rest.split_whitespace().collect();
        let mut all = Some(true);
        for pair in words.chunks(2) {
            let fits = match pair {
                ["from", "all"] | ["lookup" | "table", _] => Some(true),
                ["blackhole" | "prohibit" | "unreachable", ..] => Some(true),
                ["from", net] => Some(is_in(self.from, net)?),
                ["to", net] => Some(is_in(self.to, net)?),
                ["iif", device] => Some(*device == self.device),
                ["fwmark", mark] => Some(self.has_mark(mark)?),
                _ => None,
            };
            match fits {
                Some(false) => return Some(false),
                None => all = None,
                Some(true) => {}
            }
        }
        all
    }

    fn has_mark(&self, text: &str) -> Option<bool> {
        let number = |t: &str| u32::from_str_radix(t.strip_prefix("0x")?, 16).ok();
        let (value, mask) = match text.split_once('/') {
            Some((value, mask)) => (number(value)?, number(mask)?),
            None => (number(text)?, u32::MAX),
        };
        Some(self.mark? & mask == value)
    }
}

/// `10.0.0.0/8`, `10.0.0.1`
pub fn is_in(address: IpAddr, net: &str) -> Option<bool> {
    let (base, len) = net.split_once('/').unwrap_or((net, ""));
    let base: IpAddr = base.parse().ok()?;
    let bits = |a: IpAddr| match a {
        IpAddr::V4(a) => (u128::from(u32::from(a)) << 96, 32),
        IpAddr::V6(a) => (u128::from(a), 128),
    };
    let ((base_bits, most), (own, width)) = (bits(base), bits(address));
    let len: u32 = if len.is_empty() {
        most
    } else {
        len.parse().ok()?
    };
    let shift = 128 - len.min(128);
    let cut = |v: u128| v.checked_shr(shift).unwrap_or(0);
    Some(most == width && cut(base_bits) == cut(own))
}

/// The VRF of the device, by which routes are looked up in a table of its own.
pub fn vrf(case: &Case<'_>) -> Vec<Proof> {
    let device = case.device();
    let proof = vrf_of(case, &device).map(|(name, table)| {
        let text = match name == device {
            true => format!("{device} is a VRF (table {table})"),
            false => format!("{device} is in the VRF {name} (table {table})"),
        };
        Proof::now("vrf", text)
            .with("vrf", name)
            .with("table", table)
    });
    proof.into_iter().collect()
}

fn vrf_of(case: &Case<'_>, device: &str) -> Option<(String, String)> {
    let link = output(case, "ip", &["-d", "-o", "link", "show", "dev", device])?;
    let words: Vec<&str> = link.split_whitespace().collect();
    // A packet of a VRF may have that device itself.
    let after = |words: &[&str], name: &str| {
        let at = words.iter().position(|w| *w == name)?;
        words.get(at + 1).map(|w| (*w).to_owned())
    };
    let own = after(&words, "vrf").filter(|w| w == "table");
    let name = match own {
        Some(_) => device.to_owned(),
        None => after(&words, "master")?,
    };
    let master = output(case, "ip", &["-d", "-o", "link", "show", "dev", &name])?;
    let words: Vec<&str> = master.split_whitespace().collect();
    let at = words.windows(2).position(|w| w == ["vrf", "table"])?;
    Some((
        escaped(name.as_bytes()),
        escaped(words.get(at + 2)?.as_bytes()),
    ))
}

/// Policies of xfrm whose addresses are the packet's, and the kernel's counters of refusals.
pub fn xfrm(case: &Case<'_>) -> Vec<Proof> {
    let Some((from, to)) = addresses(case) else {
        return Vec::new();
    };
    let mut proofs = Vec::new();
    let listed = output(case, "ip", &["xfrm", "policy", "list"]).unwrap_or_default();
    for policy in policies(&listed)
        .filter(|p| concerns(p, from, to))
        .take(MOST)
    {
        let text = escaped(
            policy
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" ")
                .as_bytes(),
        );
        proofs.push(Proof::now("xfrm-policy", format!("policy {text}")).with("policy", text));
    }
    let counters = case.inside(|| std::fs::read_to_string("/proc/thread-self/net/xfrm_stat"));
    let counters = counters.and_then(Result::ok).unwrap_or_default();
    let counted = counters.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let (name, value) = (words.next()?, words.next()?);
        (value != "0").then(|| format!("{name} {value}"))
    });
    let counted: Vec<String> = counted.collect();
    if !counted.is_empty() {
        let text = format!("this namespace's counters: {}", counted.join(", "));
        proofs.push(Proof::now("xfrm-counters", text));
    }
    proofs
}

/// The first line of a policy begins a line, the others are indented.
fn policies(listed: &str) -> impl Iterator<Item = String> {
    let mut all: Vec<String> = Vec::new();
    for line in listed.lines() {
        match (line.starts_with(char::is_whitespace), all.last_mut()) {
            (true, Some(last)) => *last += line,
            _ => all.push(line.to_owned()),
        }
    }
    all.into_iter()
}

fn concerns(policy: &str, from: IpAddr, to: IpAddr) -> bool {
    let words: Vec<&str> = policy.split_whitespace().collect();
    let of_socket = words.windows(2).any(|w| w[0] == "socket");
    let fits = |name: &str, address: IpAddr| {
        let at = words.iter().position(|w| *w == name);
        let net = at.and_then(|at| words.get(at + 1));
        net.and_then(|net| is_in(address, net)).unwrap_or(false)
    };
    !of_socket && fits("src", from) && fits("dst", to)
}

/// BPF programs that see what the socket's cgroup sends.
pub fn cgroup(case: &Case<'_>) -> Vec<Proof> {
    let id = case.dropped.map_or(0, |d| d.cgroup);
    let mut names = CgroupNames::default();
    let path = names.get(id).unwrap_or("/").to_owned();
    let Some(programs) = cgroup::programs_at_egress(&path) else {
        return Vec::new();
    };
    let named = programs.iter().take(MOST).map(|id| {
        let name = program::open(*id).ok().flatten();
        let name = name.map_or_else(String::new, |p| escaped(p.info.name.as_bytes()));
        format!("{name} (id {id})")
    });
    let named: Vec<String> = named.collect();
    let path = escaped(path.as_bytes());
    let text = match named.as_slice() {
        [] => format!("cgroup {path}: no program at egress"),
        some => format!("cgroup {path}: programs at egress: {}", some.join(", ")),
    };
    let mut proof = Proof::now("cgroup", text).with("programs", named);
    proof.change = Some(format!(
        "bpftool cgroup show /sys/fs/cgroup{path} effective; bpftool prog show"
    ));
    vec![proof]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(from: &str, to: &str, mark: u32) -> Packet {
        Packet {
            from: from.parse().unwrap(),
            to: to.parse().unwrap(),
            mark: Some(mark),
            device: "veth0".into(),
        }
    }

    #[test]
    fn routing_rules_that_a_packet_fits() {
        let p = packet("10.0.0.1", "10.98.0.7", 0x17);
        for (line, fits) in [
            ("100:\tfrom all to 10.98.0.0/24 lookup 200", Some(true)),
            ("100:\tfrom all to 10.99.0.0/24 lookup 200", Some(false)),
            ("100:\tfrom 10.0.0.1 lookup 200", Some(true)),
            ("100:\tfrom all fwmark 0x7/0xf lookup 9", Some(true)),
            ("100:\tfrom all fwmark 0x7 lookup 9", Some(false)),
            ("100:\tfrom all iif eth9 lookup 9", Some(false)),
            ("100:\tfrom all ipproto tcp lookup 9", None),
            ("100:\tfrom all to 10.98.0.0/16 prohibit", Some(true)),
        ] {
            assert_eq!(p.fits(line), fits, "{line}");
        }
        assert!(is_usual("32766:\tfrom all lookup main"));
        assert!(!is_usual("100:\tfrom all lookup 100"));
    }

    #[test]
    fn policies_of_xfrm() {
        let list = "src 10.0.0.0/8 dst 10.1.0.1/32 \n\tdir in priority 0 \n\ttmpl src 0.0.0.0 dst 0.0.0.0\nsrc ::/0 dst ::/0 \n\tsocket in priority 0\n";
        let all: Vec<String> = policies(list).collect();
        assert_eq!(all.len(), 2);
        let (a, b) = ("10.2.0.1".parse().unwrap(), "10.1.0.1".parse().unwrap());
        assert!(concerns(&all[0], a, b) && !concerns(&all[0], b, a));
        assert!(!concerns(
            &all[1],
            "::1".parse().unwrap(),
            "::1".parse().unwrap()
        ));
    }
}
