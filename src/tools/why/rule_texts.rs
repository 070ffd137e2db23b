//! The texts of nft rules, as nft prints them now.

use std::collections::HashMap;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::kernel::netns::Netns;
use crate::text::escape::escaped;
use crate::tools::skb::netfilter::Nft;

/// A chain is listed anew after this long.
const FRESH: Duration = Duration::from_secs(2);
/// Chains that are remembered.
const CHAINS: usize = 256;

/// Chains that were listed.
#[derive(Default)]
pub struct RuleTexts {
    listed: HashMap<(u32, Nft), (Instant, Option<String>)>,
}

impl RuleTexts {
    /// The text of a rule in this namespace; `None` where it is not known.
    pub fn of(&mut self, netns: u32, nft: &Nft) -> Option<String> {
        let handle = nft.handle?;
        let chain = Nft {
            handle: None,
            ..nft.clone()
        };
        if self.listed.len() >= CHAINS {
            self.listed.clear();
        }
        let entry = self.listed.entry((netns, chain));
        let (asked, text) = entry.or_insert_with(|| (Instant::now(), list(netns, nft)));
        if asked.elapsed() > FRESH {
            (*asked, *text) = (Instant::now(), list(netns, nft));
        }
        rule(text.as_deref()?, handle)
    }
}

/// The program that lists a rule's chain.
pub fn command(nft: &Nft) -> Option<Command> {
    let mut command = Command::new("nft");
    let chain = nft.chain.as_deref()?;
    command.args(["-a", "list", "chain", nft.family, &nft.table, chain]);
    Some(command)
}

fn list(netns: u32, nft: &Nft) -> Option<String> {
    let mut command = command(nft)?;
    let netns = Netns::parse(&format!("inode:{netns}")).ok()?;
    let output = netns.run(|| command.output()).ok()?.ok()?;
    let listed = output.status.success();
    listed.then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The rule with this handle out of a list.
pub fn rule(listed: &str, handle: u64) -> Option<String> {
    let end = format!("# handle {handle}");
    let line = listed.lines().find(|l| l.trim_end().ends_with(&end))?;
    let text = line.trim().trim_end_matches(&end).trim_end();
    Some(escaped(text.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_of_a_list() {
        let list = "table ip t {\n\tchain o { # handle 2\n\t\tudp dport 1 accept # handle 11\n\t\tudp dport 2 drop # handle 12\n";
        assert_eq!(rule(list, 11).as_deref(), Some("udp dport 1 accept"));
        assert_eq!(rule(list, 3), None);
    }
}
