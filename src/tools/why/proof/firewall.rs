//! The rule that decided, as nft prints it now; connection tracking's table.

use std::collections::HashMap;
use std::fs;

use crate::event::tuple::Tuple;
use crate::text::escape::escaped;
use crate::tools::skb::netfilter::{Nft, Who};

use super::super::rule_texts;
use super::{Case, Proof, Value, ip, policy};

/// Rules that are shown.
const MOST: usize = 4;

pub fn rule(case: &Case<'_>) -> Vec<Proof> {
    match case.dropped.and_then(|d| d.who.as_ref()) {
        Some(Who::Nft(nft)) => vec![nft_rule(case, nft)],
        Some(Who::Legacy(legacy)) => vec![legacy_rules(
            case,
            legacy.family,
            &legacy.table,
            Some(legacy.hook),
        )],
        Some(Who::Hook(_)) => Vec::new(),
        None | Some(Who::Unknown) => any_legacy(case),
    }
}

/// Who decided was not seen: rules of any table of the older iptables that may have.
fn any_legacy(case: &Case<'_>) -> Vec<Proof> {
    let v6 = ip::addresses(case).is_some_and(|(from, _)| from.is_ipv6());
    let (family, file) = if v6 {
        ("ip6", "ip6_tables_names")
    } else {
        ("ip", "ip_tables_names")
    };
    let names = case.inside(|| fs::read_to_string(format!("/proc/thread-self/net/{file}")));
    let names = names.and_then(Result::ok).unwrap_or_default();
    let proofs = names
        .lines()
        .map(|table| legacy_rules(case, family, table, None));
    let with_rules = |p: &Proof| {
        p.values
            .iter()
            .any(|(_, v)| matches!(v, Value::List(l) if !l.is_empty()))
    };
    proofs.filter(with_rules).collect()
}

/// The rules of the table that refuse, have counted packets and fit this one, as the older iptables prints them. `hook`: None where that is
/// not known.
fn legacy_rules(case: &Case<'_>, family: &str, table: &str, hook: Option<&str>) -> Proof {
    let program = match family {
        "ip6" => "ip6tables-legacy",
        "arp" => "arptables-legacy",
        _ => "iptables-legacy",
    };
    let Some(listed) = policy::output(case, program, &["-t", table, "-S", "-v"]) else {
        let text =
            format!("which of its rules is not known: {program}-save -c -t {table} shows them");
        return Proof::then("legacy-rule", text);
    };
    let tuple = case.dropped.and_then(|d| d.tuple);
    let found = refusals(&listed, hook, tuple.as_ref());
    let texts: Vec<String> = found.iter().map(ToString::to_string).take(MOST).collect();
    let text = match texts.as_slice() {
        [] => {
            format!("iptables table {table}: no rule that refuses and fits it has counted a packet")
        }
        [one] => format!(
            "iptables table {table}, the only rule that refuses, fits it and has counted packets: {one}"
        ),
        many => format!(
            "iptables table {table}, one of the rules that refuse, fit it and have counted packets: {}",
            many.join("; ")
        ),
    };
    let mut proof = Proof::now("legacy-rule", text).with("rules", texts);
    if let [
        Refusal {
            chain,
            number: Some(number),
            ..
        },
    ] = found.as_slice()
    {
        proof.change = Some(format!("{program} -t {table} -D {chain} {number}"));
    }
    proof
}

/// A rule to DROP or REJECT, or a chain's policy to drop.
#[derive(Debug)]
struct Refusal {
    chain: String,
    /// of the rule in its chain, from 1; None: the policy
    number: Option<u32>,
    text: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.number {
            Some(number) => write!(f, "chain {} rule {number}: {}", self.chain, self.text),
            None => write!(f, "policy of chain {}: {}", self.chain, self.text),
        }
    }
}

/// Out of `iptables -S -v`: what refuses and has counted packets, without rules that this packet does not fit.
fn refusals(listed: &str, hook: Option<&str>, packet: Option<&Tuple>) -> Vec<Refusal> {
    let mut numbers: HashMap<&str, u32> = HashMap::new();
    let mut found = Vec::new();
    for line in listed.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [kind, chain, ..] = words[..] else {
            continue;
        };
        let number = (kind == "-A").then(|| {
            let number = numbers.entry(chain).or_default();
            *number += 1;
            *number
        });
        let pairs = || words.windows(2);
        let counted = pairs().any(|w| w[0] == "-c" && w[1] != "0");
        let refuses = match number {
            Some(_) => pairs().any(|w| w[0] == "-j" && matches!(w[1], "DROP" | "REJECT")),
            None => {
                let here = hook.is_none_or(|hook| chain == hook);
                kind == "-P" && here && words.get(2) == Some(&"DROP")
            }
        };
        if counted && refuses && packet.is_none_or(|p| may_fit(&words, p)) {
            found.push(Refusal {
                chain: escaped(chain.as_bytes()),
                number,
                text: escaped(line.trim().as_bytes()),
            });
        }
    }
    found
}

/// False where a condition that is understood says that the packet is not meant.
fn may_fit(words: &[&str], packet: &Tuple) -> bool {
    let protocol = |name: &str| match name {
        "tcp" => Some(6),
        "udp" => Some(17),
        "icmp" => Some(1),
        "sctp" => Some(132),
        "ipv6-icmp" | "icmpv6" => Some(58),
        number => number.parse().ok(),
    };
    let ports = |text: &str, port: u16| {
        let (from, to) = text.split_once(':').unwrap_or((text, text));
        Some((from.parse::<u16>().ok()?..=to.parse().ok()?).contains(&port))
    };
    let pairs = words.windows(2).enumerate();
    let fits = pairs.map(|(at, pair)| {
        let known = match pair[0] {
            "-p" => protocol(pair[1]).map(|p| p == packet.proto),
            "-s" => policy::is_in(packet.saddr, pair[1]),
            "-d" => policy::is_in(packet.daddr, pair[1]),
            "--dport" if packet.has_ports() => ports(pair[1], packet.dport),
            "--sport" if packet.has_ports() => ports(pair[1], packet.sport),
            _ => None,
        };
        let not = at > 0 && words[at - 1] == "!";
        known.is_none_or(|fits| fits != not)
    });
    fits.into_iter().all(|fits| fits)
}

fn nft_rule(case: &Case<'_>, nft: &Nft) -> Proof {
    let name = |text: String| Proof::now("nft-rule", text);
    let (Some(chain), Some(mut command)) = (&nft.chain, rule_texts::command(nft)) else {
        return name("which of the table's rules is not known".to_owned());
    };
    let listed = match case.inside(|| command.output()) {
        Some(Ok(output)) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).into_owned()
        }
        Some(Ok(output)) => {
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            let error = error.lines().next().unwrap_or("no answer").to_owned();
            return name(format!(
                "nft cannot list the chain: {}",
                escaped(error.as_bytes())
            ));
        }
        Some(Err(e)) => return name(format!("its text needs the program nft ({e})")),
        None => return name("its namespace is gone".to_owned()),
    };
    match nft.handle {
        Some(handle) => {
            let Some(text) = rule_texts::rule(&listed, handle) else {
                return name("the rule is not there any more".to_owned());
            };
            let mut proof = Proof::now("nft-rule", text.clone()).with("rule", text);
            proof.change = Some(format!(
                "nft delete rule {} {} {chain} handle {handle}",
                nft.family, nft.table
            ));
            proof
        }
        None if nft.policy => {
            let line = listed
                .lines()
                .find(|l| l.contains("policy "))
                .unwrap_or_default();
            let text = escaped(line.trim().as_bytes());
            let mut proof = Proof::now(
                "nft-policy",
                format!("no rule of it accepts the packet; its chain: {text}"),
            )
            .with("chain", text);
            proof.change = Some(format!(
                "accept it by a rule: nft add rule {} {} {chain} ... accept",
                nft.family, nft.table
            ));
            proof
        }
        None => name("which of the chain's rules is not known".to_owned()),
    }
}

/// The table of connections, where connection tracking dropped the packet.
pub fn conntrack(case: &Case<'_>) -> Vec<Proof> {
    let who = case.dropped.and_then(|d| d.who.as_ref());
    let tracks = matches!(who, Some(Who::Hook(hook)) if hook.what == Some("connection tracking"));
    if !tracks {
        return Vec::new();
    }
    let count = case.sysctl("net/netfilter/nf_conntrack_count");
    let max = case.sysctl("net/netfilter/nf_conntrack_max");
    let (Some(count), Some(max)) = (count, max) else {
        return Vec::new();
    };
    let mut proof = Proof::now(
        "conntrack",
        format!("{count} of {max} connections are tracked"),
    )
    .with("count", count.clone())
    .with("max", max.clone());
    let (count, max): (u64, u64) = (count.parse().unwrap_or(0), max.parse().unwrap_or(u64::MAX));
    if count >= max {
        proof.text += ": the table is full";
        proof.change = Some(
            "raise net.netfilter.nf_conntrack_max, or find out who opens so many connections"
                .to_owned(),
        );
    }
    vec![proof]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_that_refuse() {
        let list = "-P INPUT ACCEPT -c 5 300\n-P FORWARD DROP -c 2 9\n-A INPUT -p udp -m udp --dport 7 -c 1 29 -j DROP\n\
                    -A INPUT -p udp -m udp --dport 8 -c 0 0 -j DROP\n-A INPUT -p udp -m udp --dport 9 -c 3 29 -j ACCEPT\n";
        let found = refusals(list, Some("INPUT"), None);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!((&*found[0].chain, found[0].number), ("INPUT", Some(1)));
        assert!(found[0].text.contains("--dport 7"));
        assert_eq!(refusals(list, Some("FORWARD"), None).len(), 2);
        assert_eq!(refusals(list, None, None).len(), 2);
    }

    #[test]
    fn rules_that_do_not_fit_are_left_out() {
        let packet = Tuple {
            saddr: "10.0.0.1".parse().unwrap(),
            daddr: "10.0.0.2".parse().unwrap(),
            sport: 40_000,
            dport: 7,
            proto: 17,
            tcp_flags: 0,
            icmp_type: 0,
            icmp_code: 0,
            fragment: false,
        };
        for (rule, fits) in [
            ("-A INPUT -p udp -m udp --dport 7 -c 1 29 -j DROP", true),
            ("-A INPUT -p udp -m udp --dport 8 -c 1 29 -j DROP", false),
            ("-A INPUT -p udp -m udp --dport 1:10 -c 1 29 -j DROP", true),
            ("-A INPUT -p tcp -c 1 29 -j DROP", false),
            ("-A INPUT ! -p tcp -c 1 29 -j DROP", true),
            ("-A INPUT -s 10.0.0.0/24 -c 1 29 -j DROP", true),
            ("-A INPUT ! -s 10.0.0.0/24 -c 1 29 -j DROP", false),
            ("-A INPUT -d 10.0.1.0/24 -c 1 29 -j DROP", false),
            ("-A INPUT -m set --match-set bad src -c 1 29 -j DROP", true),
        ] {
            assert_eq!(
                refusals(rule, None, Some(&packet)).len(),
                usize::from(fits),
                "{rule}"
            );
        }
    }
}
