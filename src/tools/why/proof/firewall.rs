//! The rule that decided, as nft prints it now; connection tracking's table.

use std::process::Command;

use crate::text::escape::escaped;
use crate::tools::skb::netfilter::{Nft, Who};

use super::{Case, Proof};

pub fn rule(case: &Case<'_>) -> Vec<Proof> {
    match case.dropped.and_then(|d| d.who.as_ref()) {
        Some(Who::Nft(nft)) => vec![nft_rule(case, nft)],
        Some(Who::Legacy(legacy)) => {
            let save = match legacy.family {
                "ip6" => "ip6tables-legacy-save",
                "arp" => "arptables-legacy-save",
                _ => "iptables-legacy-save",
            };
            vec![Proof::then(
                "legacy-rule",
                format!(
                    "which of its rules is not known: {save} -c -t {} shows them",
                    legacy.table
                ),
            )]
        }
        _ => Vec::new(),
    }
}

fn nft_rule(case: &Case<'_>, nft: &Nft) -> Proof {
    let name = |text: String| Proof::now("nft-rule", text);
    let Some(chain) = &nft.chain else {
        return name("which of the table's rules is not known".to_owned());
    };
    let mut command = Command::new("nft");
    command.args(["-a", "list", "chain", nft.family, &nft.table, chain]);
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
            let end = format!("# handle {handle}");
            let line = listed.lines().find(|l| l.trim_end().ends_with(&end));
            let Some(line) = line else {
                return name("the rule is not there any more".to_owned());
            };
            let text = line.trim().trim_end_matches(&end).trim_end();
            let text = escaped(text.as_bytes());
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
