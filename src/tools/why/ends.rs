//! What became of a packet: out of its legs, by the rules of `explain`. Where nothing is known the end is unknown.

use serde::Serialize;

use crate::explain::{EXPECTED, Fact, Meaning, Rules};

use super::dropped::{Dropped, Told, mac_fact};
use super::journey::{Journey, Leg};
use super::stages::{Rest, Stage};

/// What became of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum End {
    /// dropped, and nobody was told
    Lost,
    /// dropped, and the sender was told by ICMP or RST
    Rejected,
    /// to a socket
    Delivered,
    /// the kernel has answered it itself
    Answered,
    /// out of a device
    Sent,
    /// by the kernel's own protocols
    Taken,
    /// in a queue
    Here,
    /// freed in the normal course of things
    Expected,
    Unknown,
}

impl End {
    /// In capitals, as blocks have it.
    pub fn word(self) -> &'static str {
        match self {
            End::Lost => "LOST",
            End::Rejected => "REJECTED",
            End::Delivered => "DELIVERED",
            End::Answered => "ANSWERED",
            End::Sent => "SENT",
            End::Taken => "TAKEN",
            End::Here => "STILL HERE",
            End::Expected => "EXPECTED",
            End::Unknown => "UNKNOWN",
        }
    }

    /// In the last line.
    pub fn counted(self) -> &'static str {
        match self {
            End::Lost => "lost",
            End::Rejected => "rejected",
            End::Delivered => "delivered",
            End::Answered => "answered by this kernel",
            End::Sent => "sent",
            End::Taken => "taken by this kernel",
            End::Here => "still here",
            End::Expected => "freed in the normal course",
            End::Unknown => "unknown",
        }
    }

    /// The packet got where it should.
    pub fn is_good(self) -> bool {
        !matches!(self, End::Lost | End::Rejected | End::Here | End::Unknown)
    }
}

/// What became of one leg, and of the whole journey.
#[derive(Debug, Clone)]
pub struct Verdict {
    pub end: End,
    /// the end in words, where it is no drop
    pub what: String,
    /// what a drop means
    pub meaning: Option<Meaning>,
    /// the leg that decided
    pub leg: u64,
    /// when, monotonic, ns
    pub at: u64,
}

/// What became of a journey. `last`: nothing more is heard of it, since the run ends.
pub fn judge(journey: &Journey, rules: &Rules) -> Verdict {
    let time_wait = journey
        .legs
        .values()
        .any(|l| l.stage.is_some_and(|s| s.what.ends_with("TIME-WAIT")));
    let legs = journey.legs.iter();
    let verdicts = legs.map(|(skb, leg)| of_leg(journey, *skb, leg, rules, time_wait));
    // Of two legs with the same end the first one counts.
    let first = verdicts.flatten().min_by_key(|v| (v.end, v.at));
    first.unwrap_or(Verdict {
        end: End::Unknown,
        what: "nothing more was seen of it".to_owned(),
        meaning: None,
        leg: 0,
        at: journey.last,
    })
}

/// None: the leg is a copy that says nothing about the packet.
fn of_leg(
    journey: &Journey,
    skb: u64,
    leg: &Leg,
    rules: &Rules,
    time_wait: bool,
) -> Option<Verdict> {
    let verdict = |end, what: String| Verdict {
        end,
        what,
        meaning: None,
        leg: skb,
        at: leg.last,
    };
    if let Some(dropped) = &leg.dropped {
        return Some(of_drop(skb, leg, dropped, rules, time_wait));
    }
    let over = leg.gone || leg.freed_by.is_some();
    let stage = leg.stage?;
    if let Some(ignored) = ignored(leg, stage, rules) {
        return Some(Verdict {
            end: if ignored.is_expected() {
                End::Expected
            } else {
                End::Lost
            },
            what: ignored.what.clone(),
            meaning: Some(ignored),
            leg: skb,
            at: leg.last,
        });
    }
    let rest = stage.end.map(|rest| {
        let what = stage.what.clone();
        match rest {
            Rest::Delivered => verdict(End::Delivered, what),
            Rest::Answered => verdict(End::Answered, what),
            Rest::Sent => verdict(End::Sent, format!("out of {}", leg.device)),
            Rest::Taken => verdict(End::Taken, what),
            Rest::Merged | Rest::Copied => verdict(End::Expected, format!("copied {what}")),
        }
    });
    if rest.is_some() {
        return rest;
    }
    if !over {
        let place = stage.queued.clone();
        let place = place.unwrap_or_else(|| format!("last seen at the stage {}", stage.stage));
        return Some(verdict(End::Here, place));
    }
    // What it became goes on: a fragment, a segment, a copy with more room.
    let goes_on = journey
        .legs
        .iter()
        .any(|(other, l)| *other != skb && l.last >= leg.last);
    if goes_on {
        return None;
    }
    let by = leg.freed_by.as_deref().unwrap_or("the kernel");
    let what = format!(
        "freed by {by} after the stage {}, not as a drop",
        stage.stage
    );
    Some(verdict(End::Unknown, what))
}

/// The kernel's own protocols free a frame for another host as if they had taken it.
fn ignored(leg: &Leg, stage: &Stage, rules: &Rules) -> Option<Meaning> {
    let taken = stage.end == Some(Rest::Taken);
    let facts = leg.facts.as_ref().filter(|_| taken)?;
    let fact = mac_fact(facts, leg.vlan)?;
    let promiscuous = facts.promiscuous.then_some(Fact::Promiscuous);
    let all: Vec<Fact> = [fact].into_iter().chain(promiscuous).collect();
    let mut meaning = rules.explain("OTHERHOST", &stage.stage, &all);
    if fact == Fact::OtherMac {
        // Neighbours are asked by broadcasts; a frame for another one is no loss here.
        meaning.class = EXPECTED.to_owned();
    }
    Some(meaning)
}

fn of_drop(skb: u64, leg: &Leg, dropped: &Dropped, rules: &Rules, time_wait: bool) -> Verdict {
    let told = Told {
        icmp: leg.icmp,
        reset: leg.reset,
    };
    let facts = dropped.rule_facts(told, time_wait);
    let mut meaning = rules.explain(&dropped.reason, &dropped.place.function, &facts);
    let end = if meaning.is_expected() || dropped.copy {
        End::Expected
    } else if leg.icmp.is_some() || leg.reset || leg.errno.is_some() {
        End::Rejected
    } else {
        End::Lost
    };
    if dropped.copy && !meaning.is_expected() {
        meaning.what = format!("a copy of it ({})", meaning.what);
    }
    Verdict {
        end,
        what: meaning.what.clone(),
        meaning: Some(meaning),
        leg: skb,
        at: dropped.at,
    }
}
