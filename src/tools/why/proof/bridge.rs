//! What a bridge says: a port's state, its VLANs, who filters.

use crate::text::escape::escaped;

use super::policy::output;
use super::{Case, Proof};

/// The port's state (spanning tree), and its VLANs where the bridge filters by them.
pub fn port(case: &Case<'_>) -> Vec<Proof> {
    let device = case.device();
    let show = |args: &[&str]| output(case, "ip", args);
    let Some(link) = show(&["-d", "-o", "link", "show", "dev", &device]) else {
        return Vec::new();
    };
    let words: Vec<&str> = link.split_whitespace().collect();
    let after = |words: &[&str], name: &str| {
        let at = words.iter().position(|w| *w == name)?;
        words.get(at + 1).map(|w| escaped(w.as_bytes()))
    };
    let Some(at) = words.iter().position(|w| *w == "bridge_slave") else {
        return Vec::new();
    };
    let (Some(state), Some(bridge)) = (after(&words[at..], "state"), after(&words, "master"))
    else {
        return Vec::new();
    };
    let text = format!("{device} is a port of the bridge {bridge}, state {state}");
    let mut proofs = vec![
        Proof::now("bridge-port", text)
            .with("bridge", bridge.clone())
            .with("state", state),
    ];
    let master = show(&["-d", "-o", "link", "show", "dev", &bridge]).unwrap_or_default();
    let words: Vec<&str> = master.split_whitespace().collect();
    if after(&words, "vlan_filtering").is_some_and(|on| on == "1") {
        let vlans = output(case, "bridge", &["vlan", "show", "dev", &device]);
        let vlans = vlans.map(|text| vlans_of(&text));
        let vlans = vlans.unwrap_or_else(|| "which the program bridge shows".to_owned());
        let text = format!("{bridge} has vlan_filtering 1; VLANs of {device}: {vlans}");
        proofs.push(Proof::now("bridge-vlan", text).with("vlans", vlans));
    }
    proofs
}

/// The numbers out of `bridge vlan show`: behind the device's name, and on the lines below it.
fn vlans_of(text: &str) -> String {
    let lines = text.lines().skip(1);
    let numbers = lines.filter_map(|line| {
        let words = line.split_whitespace();
        words
            .into_iter()
            .find(|w| w.starts_with(|c: char| c.is_ascii_digit()))
    });
    let all: Vec<String> = numbers.map(|n| escaped(n.as_bytes())).collect();
    match all.is_empty() {
        true => "none".to_owned(),
        false => all.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vlans_of_a_port() {
        let text = "port              vlan-id\ns1                1 PVID Egress Untagged\n                  5-7\n";
        assert_eq!(vlans_of(text), "1, 5-7");
        assert_eq!(vlans_of("port vlan-id\n"), "none");
    }
}
