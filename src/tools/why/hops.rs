//! A journey function by function, for --compare: where the packet was, and what decided about its way from there.

use std::net::IpAddr;

use crate::event::tuple::Tuple;
use crate::text::escape::escaped;
use crate::tools::skb::event::Event;
use crate::tools::skb::netfilter::{Nft, Passed, Who};

use super::dropped::Dropped;
use super::facts;
use super::stages::{Shows, Stage};

/// Functions of a journey that are kept.
const HOPS: usize = 256;
/// The stage of a drop.
pub const DROP: &str = "dropped";

/// What a rule did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    Passed,
    Translated,
    Dropped,
}

impl Deed {
    pub fn word(self) -> &'static str {
        match self {
            Deed::Passed => "let it pass",
            Deed::Translated => "translated it",
            Deed::Dropped => "dropped it",
        }
    }
}

/// The addresses and the destination port that were changed on the way to a function.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Changed {
    pub source: Option<IpAddr>,
    pub destination: Option<IpAddr>,
    pub dport: Option<u16>,
}

/// A function that the packet entered, or the drop that ended its way.
#[derive(Debug, Clone)]
pub struct Hop {
    skb: u64,
    func: u64,
    pub function: String,
    pub stage: &'static str,
    /// of netfilter
    pub hook: Option<&'static str>,
    pub device: String,
    pub netns: u32,
    pub mark: u32,
    pub route: String,
    pub rules: Vec<(Deed, Nft)>,
    pub changed: Changed,
    /// what the function returned, where nothing else of the packet was seen before
    pub returned: Option<i32>,
    /// of a drop: the reason and who decided
    pub reason: String,
    /// the place in the way where packets may differ without any meaning: a neighbour's address that is not known yet, a reader
    pub incidental: bool,
}

/// A journey's hops, in the order of time.
#[derive(Debug, Clone, Default)]
pub struct Hops {
    all: Vec<Hop>,
    tuple: Option<Tuple>,
}

impl Hops {
    /// Those that tell one way from another.
    pub fn way(&self) -> Vec<Hop> {
        let all = self.all.iter();
        all.filter(|h| !h.incidental).cloned().collect()
    }

    fn push(&mut self, hop: Hop) {
        if self.all.len() < HOPS {
            self.all.push(hop);
        }
    }

    pub fn entered(&mut self, event: &Event, stage: &'static Stage, function: String) {
        let meta = event.meta.as_ref();
        let now = event.tuple.flatten();
        let changed = changed(self.tuple, now);
        self.tuple = now.or(self.tuple);
        let known = event.facts.as_deref();
        self.push(Hop {
            skb: event.skb,
            func: event.func,
            function,
            stage: &stage.stage,
            hook: None,
            device: meta.map_or_else(String::new, |m| escaped(&m.ifname)),
            netns: meta.map_or(0, |m| m.netns),
            mark: meta.map_or(0, |m| m.mark),
            route: known.map_or_else(String::new, facts::route),
            rules: Vec::new(),
            changed,
            returned: None,
            reason: String::new(),
            incidental: stage.stage == "neighbour" || stage.shows == Some(Shows::Reader),
        });
    }

    pub fn returned(&mut self, event: &Event, value: i32) {
        let last = self.all.last_mut();
        if let Some(hop) = last.filter(|h| (h.skb, h.func) == (event.skb, event.func)) {
            hop.returned = Some(value);
        }
    }

    /// The hop of the hook that the packet is in, or came out of.
    fn hook(&mut self, skb: u64) -> Option<&mut Hop> {
        let mut back = self.all.iter_mut().rev();
        back.find(|h| h.skb == skb && h.stage == "netfilter")
    }

    fn decided(&mut self, skb: u64, hook: &'static str, rule: Option<(Deed, &Nft)>) {
        let Some(hop) = self.hook(skb) else {
            return;
        };
        hop.hook = Some(hook);
        if let Some((deed, nft)) = rule {
            if !hop.rules.iter().any(|(_, n)| n == nft) {
                hop.rules.push((deed, nft.clone()));
            }
        }
    }

    pub fn passed(&mut self, skb: u64, passed: &Passed) {
        let rule = passed.nft.as_ref().map(|nft| (Deed::Passed, nft));
        self.decided(skb, passed.hook, rule);
    }

    pub fn translated(&mut self, skb: u64, hook: &'static str, nft: &Nft) {
        self.decided(skb, hook, Some((Deed::Translated, nft)));
    }

    pub fn dropped(&mut self, skb: u64, dropped: &Dropped) {
        if let (Some(Who::Nft(nft)), Some(hook)) = (&dropped.who, dropped.hook) {
            self.decided(skb, hook, Some((Deed::Dropped, nft)));
        }
        let meta = dropped.meta.as_ref();
        self.push(Hop {
            skb,
            func: 0,
            function: dropped.place.function.clone(),
            stage: DROP,
            hook: dropped.hook,
            device: meta.map_or_else(String::new, |m| escaped(&m.ifname)),
            netns: meta.map_or(0, |m| m.netns),
            mark: meta.map_or(0, |m| m.mark),
            route: String::new(),
            rules: Vec::new(),
            changed: Changed::default(),
            returned: None,
            reason: dropped.decided(),
            incidental: false,
        });
    }
}

fn changed(before: Option<Tuple>, now: Option<Tuple>) -> Changed {
    let (Some(b), Some(n)) = (before, now) else {
        return Changed::default();
    };
    if b.fragment || n.fragment {
        return Changed::default();
    }
    Changed {
        source: (b.saddr != n.saddr).then_some(n.saddr),
        destination: (b.daddr != n.daddr).then_some(n.daddr),
        dport: (b.dport != n.dport).then_some(n.dport),
    }
}
