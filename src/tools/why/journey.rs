//! Events to journeys: what one packet, with its clones, copies and other forms, went through. A journey has legs, one for each sk_buff.
//! It knows nothing of what a loss means.

use std::collections::VecDeque;

use anyhow::Result;
use rustc_hash::FxHashMap;

use crate::capture::linktype::Linktype;
use crate::event::line::Line;
use crate::event::link::{self, Frame};
use crate::event::tuple::Tuple;
use crate::kernel::process::Process;
use crate::text::escape::escaped;
use crate::tools::skb::columns::ct::Entry;
use crate::tools::skb::event::{Data, Event, Facts};
use crate::tools::skb::netfilter::{Nft, Passed};

use super::dropped::{Dropped, Header};
use super::facts::fact;
use super::hops::Hops;
use super::names::{Names, Place};
use super::seen::Seen;
use super::stages::{Rest, Role, Shows, Stage, Stages, Way};

/// Stages of a journey that are kept.
const STEPS: usize = 64;
/// A journey is over when all of its sk_buffs are gone for this long, ns: a clone may not have been seen yet.
pub const QUIET: u64 = 50_000_000;
/// ... or when it rests where a way may end.
const RESTS: u64 = 1_000_000_000;

/// A stage that the packet reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// monotonic, ns
    pub at: u64,
    pub stage: &'static str,
    pub device: String,
    pub netns: u32,
    pub fact: String,
    /// the nft rule or policy that let it pass, or the rule that translated it
    pub nft: Option<Nft>,
    /// its entry of connection tracking, from here on
    pub ct: Option<Box<Entry>>,
}

/// One sk_buff.
#[derive(Debug, Default)]
pub struct Leg {
    pub stage: Option<&'static Stage>,
    pub device: String,
    pub netns: u32,
    pub tuple: Option<Tuple>,
    pub facts: Option<Facts>,
    pub dropped: Option<Box<Dropped>>,
    /// type and code of an ICMP error that this kernel sent for it
    pub icmp: Option<(u8, u8)>,
    pub reset: bool,
    /// the program was told this errno
    pub errno: Option<i32>,
    /// the function that freed it
    pub freed_by: Option<String>,
    pub gone: bool,
    pub last: u64,
    /// the VLAN that the frame came in with, by this device
    pub vlan: Option<u16>,
    /// the run of a hook that it passed last
    run: u32,
    /// the rule that translated it last
    translated: Option<Nft>,
}

/// What one packet went through.
#[derive(Debug)]
pub struct Journey {
    pub first: u64,
    pub last: u64,
    pub frame: Option<Frame>,
    pub tuple: Option<Tuple>,
    pub netns: u32,
    pub sender: Option<Process>,
    pub receiver: Option<Process>,
    pub steps: Vec<Step>,
    /// stages that there was no room for
    pub cut: u64,
    pub legs: FxHashMap<u64, Leg>,
    /// the packet as it was when it was first seen, where that is kept: device and bytes
    pub seen: Option<Box<Event>>,
    /// each function that it entered, where that is kept
    pub hops: Option<Hops>,
    /// events were lost while it was under way
    pub incomplete: bool,
    /// the namespace and the entry of connection tracking that is shown already
    tracked: Option<(u32, Entry)>,
    /// the IP header was whole when `frame` was read
    whole: bool,
}

impl Journey {
    fn new(event: &Event) -> Self {
        Self {
            first: event.head.ts,
            last: event.head.ts,
            frame: None,
            tuple: None,
            netns: event.meta.as_ref().map_or(0, |m| m.netns),
            sender: None,
            receiver: None,
            steps: Vec::new(),
            cut: 0,
            legs: FxHashMap::default(),
            seen: None,
            hops: None,
            incomplete: false,
            tracked: None,
            whole: false,
        }
    }

    /// A process looked for a route in vain: there is no packet.
    pub fn without_route(event: &Event, errno: i32, names: &mut Names) -> Self {
        let mut journey = Self::new(event);
        journey.tuple = event.tuple.flatten();
        journey.sender = Some(names.current(&event.head));
        let dropped = Dropped {
            at: event.head.ts,
            reason: "IP_OUTNOROUTES".to_owned(),
            place: Place {
                function: "ip_route_output_key_hash_rcu".to_owned(),
                offset: 0,
            },
            who: None,
            hook: None,
            meta: event.meta.clone(),
            tuple: journey.tuple,
            facts: None,
            frame: None,
            header: Header::default(),
            vlan: None,
            listen: None,
            copy: false,
            process: None,
            cgroup: 0,
        };
        let stage = match Stages::builtin().role("__ip_local_out") {
            Some(Role::Stage(stage)) => Some(stage),
            _ => None,
        };
        let leg = Leg {
            stage,
            netns: journey.netns,
            tuple: journey.tuple,
            dropped: Some(Box::new(dropped)),
            errno: Some(errno),
            gone: true,
            last: event.head.ts,
            ..Leg::default()
        };
        journey.legs.insert(0, leg);
        journey
    }

    /// The packet as tcpdump prints it.
    pub fn line(&self) -> String {
        let frame = self.frame.as_ref().map(|frame| {
            let line = Line {
                frame,
                link: false,
                details: false,
            };
            line.to_string()
        });
        frame
            .or_else(|| self.tuple.map(|t| t.to_string()))
            .unwrap_or_else(|| "a packet that is not IP".to_owned())
    }

    /// Nothing more is to come, or it rests where a way may end.
    fn is_over(&self, now: u64) -> bool {
        let quiet = now.saturating_sub(self.last);
        let over = |leg: &Leg| leg.gone || leg.dropped.is_some();
        let rests = |leg: &Leg| over(leg) || leg.stage.is_some_and(|s| s.end.is_some());
        quiet >= QUIET && self.legs.values().all(over)
            || quiet >= RESTS && self.legs.values().all(rests)
    }

    fn push(&mut self, step: Step) {
        if let Some(last) = self.steps.last_mut() {
            let same =
                (last.stage, &last.device, last.netns) == (step.stage, &step.device, step.netns);
            if same
                && step.nft.is_none()
                && step.ct.is_none()
                && (step.fact == last.fact || step.fact.is_empty())
            {
                return;
            }
            let nameless = last.stage == step.stage && last.device.is_empty();
            if (same || nameless) && last.fact.is_empty() && last.nft.is_none() && last.ct.is_none()
            {
                *last = Step {
                    at: last.at,
                    ..step
                };
                return;
            }
        }
        if self.steps.len() >= STEPS {
            self.cut += 1;
            return;
        }
        self.steps.push(step);
    }

    fn look(&mut self, event: &Event) {
        if self.tuple.is_none() {
            self.tuple = event.tuple.flatten();
        }
        if self.whole {
            return;
        }
        if let Some((frame, whole)) = event.data.as_ref().and_then(frame_of) {
            self.frame = Some(frame);
            self.whole = whole;
        }
    }

    /// Keeps the packet's bytes, as early as its IP header is whole.
    fn keep(&mut self, event: &Event) {
        let Some((data, (_, whole))) = event
            .data
            .as_ref()
            .zip(event.data.as_ref().and_then(frame_of))
        else {
            return;
        };
        if self.seen.is_none() || whole && !self.whole {
            let packet = Event::of_packet(event.meta.clone(), data.clone());
            self.seen = Some(Box::new(packet));
        }
    }
}

/// The headers, and whether they are finished: the length of an own packet is set late.
fn frame_of(data: &Data) -> Option<(Frame, bool)> {
    let linktype = match data.ethernet {
        true => Linktype::ETHERNET,
        false => Linktype::RAW_IP,
    };
    let frame = link::decode(linktype, &data.bytes)?;
    let ip = data.bytes.get(frame.header..).unwrap_or_default();
    let length = match ip.first().map(|b| b >> 4) {
        Some(4) => ip.get(2..4),
        Some(6) => ip.get(4..6),
        _ => return Some((frame, true)),
    };
    let whole = length.is_some_and(|l| l != [0, 0]);
    Some((frame, whole))
}

/// The journeys that are under way.
pub struct Journeys {
    stages: &'static Stages,
    under_way: FxHashMap<u64, Journey>,
    /// in the order in which they began
    order: VecDeque<u64>,
    most: usize,
    /// nft's decisions are seen: they are better than hooks alone
    nft: bool,
    /// journeys that ended early since there were too many
    pub cut: u64,
    pub seen: Seen,
    keep: Keep,
}

/// What of a journey is kept beside its stages.
#[derive(Debug, Clone, Copy)]
pub struct Keep {
    pub packet: bool,
    pub hops: bool,
}

impl Journeys {
    pub fn new(most: usize, nft: bool, keep: Keep) -> Self {
        Self {
            stages: Stages::builtin(),
            under_way: FxHashMap::default(),
            order: VecDeque::new(),
            most,
            nft,
            cut: 0,
            seen: Seen::default(),
            keep,
        }
    }

    /// Takes an event in. A journey that had to make room is given back.
    pub fn event(&mut self, event: &Event, names: &mut Names) -> Result<Option<Journey>> {
        let Some(packet) = event.packet.filter(|p| p.number != 0) else {
            return Ok(None);
        };
        let id = packet.number << 16 | u64::from(packet.cpu);
        let mut spilled = None;
        if !self.under_way.contains_key(&id) {
            if !self.begins(event, names)? {
                return Ok(None);
            }
            if self.under_way.len() >= self.most {
                spilled = self.oldest();
                self.cut += 1;
            }
            self.seen.add(packet);
            let mut journey = Journey::new(event);
            journey.hops = self.keep.hops.then(Hops::default);
            self.under_way.insert(id, journey);
            self.order.push_back(id);
        }
        if let Some(journey) = self.under_way.get_mut(&id) {
            journey.last = event.head.ts;
            if self.keep.packet {
                journey.keep(event);
            }
            if let Some(icmp) = event.icmp {
                journey.legs.entry(event.skb).or_default().icmp = Some(icmp);
            } else if let Some(value) = event.retval {
                journey
                    .hops
                    .iter_mut()
                    .for_each(|h| h.returned(event, value));
            } else if event.translated {
                journey.translate(event);
            } else if event.dropped {
                journey.look(event);
                journey.drop(event, names)?;
            } else {
                let function = names.function(event.func)?;
                match self.stages.role(&function) {
                    Some(Role::Stage(stage)) => {
                        journey.look(event);
                        journey.hit(event, stage, self.nft, names);
                        if let Some(hops) = &mut journey.hops {
                            hops.entered(event, stage, function);
                        }
                    }
                    Some(role) => journey.end_of_leg(event, role, &function),
                    None => {}
                }
            }
        }
        Ok(spilled)
    }

    /// A journey begins with a stage or a drop; the late end of an sk_buff is of one that is over.
    fn begins(&self, event: &Event, names: &mut Names) -> Result<bool> {
        if event.dropped {
            return Ok(true);
        }
        if event.icmp.is_some() || event.retval.is_some() || event.translated {
            return Ok(false);
        }
        let role = self.stages.role(&names.function(event.func)?);
        Ok(matches!(role, Some(Role::Stage(_))))
    }

    fn oldest(&mut self) -> Option<Journey> {
        while let Some(id) = self.order.pop_front() {
            if let Some(journey) = self.under_way.remove(&id) {
                return Some(journey);
            }
        }
        None
    }

    /// Those that are over at `now`, and with `all` all others too; in order.
    pub fn over(&mut self, now: u64, all: bool) -> Vec<Journey> {
        let mut over = Vec::new();
        let under_way = &mut self.under_way;
        self.order.retain(|id| {
            let done = under_way.get(id).is_none_or(|j| all || j.is_over(now));
            if done {
                over.extend(under_way.remove(id));
            }
            !done
        });
        over
    }

    /// Whether all that is under way rests.
    pub fn is_quiet(&self, now: u64) -> bool {
        self.under_way.values().all(|j| j.is_over(now))
    }
}

impl Leg {
    /// Notes the VLAN of the frame: the kernel takes the tag off before it looks for a device. `self.device`: where it was before.
    fn see_vlan(&mut self, event: &Event) {
        const TAGGED: [u16; 2] = [0x8100, 0x88a8];
        let Some(meta) = &event.meta else {
            return;
        };
        let in_frame = || {
            let data = event.data.as_ref()?;
            let (frame, _) = frame_of(data)?;
            frame.vlans.first().copied()
        };
        let tag = match TAGGED.contains(&meta.protocol) {
            true => in_frame(),
            false => meta.vlan,
        };
        // The id; 0 says a priority alone.
        let id = tag.map(|tag| tag & 0xfff).filter(|id| *id != 0);
        if id.is_some() || self.device != escaped(&meta.ifname) {
            self.vlan = id;
        }
    }
}

impl Journey {
    fn hit(&mut self, event: &Event, stage: &'static Stage, nft: bool, names: &mut Names) {
        let leg = self.legs.entry(event.skb).or_default();
        if leg.gone {
            // Another sk_buff of the same packet, at the same address.
            *leg = Leg::default();
        }
        let before = leg.tuple.or(self.tuple);
        let mut steps = Vec::new();
        let meta = event.meta.as_ref();
        let device = meta.map_or_else(String::new, |m| escaped(&m.ifname));
        let netns = meta.map_or(0, |m| m.netns);
        let step = |stage: &'static str, fact: String, nft: Option<Nft>| Step {
            at: event.head.ts,
            stage,
            device: device.clone(),
            netns,
            fact,
            nft,
            ct: None,
        };
        let passed = event.nft.as_ref().and_then(|n| n.passed());
        if let Some(passed) = passed.filter(|p| p.run != leg.run) {
            leg.run = passed.run;
            if let Some(hops) = &mut self.hops {
                hops.passed(event.skb, &passed);
            }
            if passed.nft.is_some() && passed.nft != leg.translated {
                steps.push(step("netfilter", passed.to_string(), passed.nft.clone()));
            }
            if !passed.tables.is_empty() {
                let (hook, tables) = (passed.hook, passed.tables.join(", "));
                let v6 = event.tuple.flatten().is_some_and(|t| t.saddr.is_ipv6());
                let family = if v6 { "ip6" } else { "ip" };
                let fact = format!(
                    "{hook}: iptables {family} {tables} let it pass, by which rule is not known"
                );
                steps.push(step("netfilter", fact, None));
            }
        }
        let now = event.tuple.flatten();
        if let (Some(before), Some(now)) = (before, now) {
            if let Some(change) = change(&before, &now) {
                steps.push(step(change.0, change.1, None));
            }
        }
        if let Some(entry) = Entry::of(event) {
            let shown = self.tracked.as_ref();
            if shown.is_none_or(|(n, e)| *n != netns || !e.is_like(&entry)) {
                let mut found = step("conntrack", entry.to_string(), None);
                found.ct = Some(Box::new(entry.clone()));
                steps.push(found);
                self.tracked = Some((netns, entry));
            }
        }
        if stage.stage == "reset" {
            // A reset is never answered by one.
            leg.reset = now.is_none_or(|t| t.tcp_flags & 4 == 0);
            return;
        }
        if !(nft && stage.shows == Some(Shows::Hook)) {
            steps.push(step(&stage.stage, fact(stage, event, &device), None));
        }
        leg.tuple = now.or(leg.tuple);
        leg.see_vlan(event);
        // Who reads says nothing new about where it was delivered to.
        let reads = stage.shows == Some(Shows::Reader);
        if !(reads && leg.stage.is_some_and(|s| s.end == Some(Rest::Delivered))) {
            leg.stage = Some(stage);
        }
        leg.device = device;
        leg.netns = netns;
        leg.facts = event.facts.as_deref().cloned();
        leg.last = event.head.ts;
        for step in steps {
            self.push(step);
        }
        self.owner(event, stage, names);
        if reads && self.receiver.is_none() {
            self.receiver = Some(names.current(&event.head));
        }
    }

    /// Whose socket it is: until it comes to transport, an sk_buff may still have that of its sender.
    fn owner(&mut self, event: &Event, stage: &Stage, names: &mut Names) {
        let Some(owner) = event.owner.as_ref().and_then(Option::as_ref) else {
            return;
        };
        let arrives = stage.shows == Some(Shows::Queue) || matches!(&*stage.stage, "TCP" | "UDP");
        match stage.way {
            Some(Way::Out) if self.sender.is_none() => self.sender = names.process(owner),
            Some(Way::In) if arrives && self.receiver.is_none() => {
                self.receiver = names.process(owner);
            }
            _ => {}
        }
    }

    /// A rule of nft has translated it.
    fn translate(&mut self, event: &Event) {
        let Some((nft, hook)) = event.nft.as_ref().and_then(|n| Some((n.rule()?, n.at()))) else {
            return;
        };
        if let Some(hops) = &mut self.hops {
            hops.translated(event.skb, hook, &nft);
        }
        let leg = self.legs.entry(event.skb).or_default();
        leg.last = event.head.ts;
        leg.translated = Some(nft.clone());
        let chain = nft.chain.as_deref().unwrap_or_default();
        let handle = nft.handle.unwrap_or_default();
        let step = Step {
            at: event.head.ts,
            stage: "netfilter",
            device: leg.device.clone(),
            netns: leg.netns,
            fact: format!(
                "{hook}: nft {} {} {chain} handle {handle} translates it",
                nft.family, nft.table
            ),
            nft: Some(nft),
            ct: None,
        };
        self.push(step);
    }

    fn end_of_leg(&mut self, event: &Event, role: Role, function: &str) {
        let leg = self.legs.entry(event.skb).or_default();
        leg.last = event.head.ts;
        match role {
            Role::Gone => leg.gone = true,
            _ => leg.freed_by = Some(function.to_owned()),
        }
    }

    fn drop(&mut self, event: &Event, names: &mut Names) -> Result<()> {
        let place = names.place(event)?;
        let reason = names.reason(event, &place);
        let who = names.who(event, &place)?;
        let drop = event.drop.as_ref();
        let copies = drop.and_then(|d| d.copies(&place.function));
        let copy = copies.is_some_and(|c| matches!(c.why, "shared" | "packet socket" | "loopback"));
        let owner = event.owner.as_ref().and_then(Option::as_ref);
        let data = event.data.as_ref();
        let frame = data.and_then(frame_of).map(|(frame, _)| frame);
        let header = frame.as_ref().zip(data);
        let header = header.map(|(frame, d)| Header::new(frame, &d.bytes, d.len as usize));
        let dropped = Dropped {
            at: event.head.ts,
            reason,
            hook: who.as_ref().and(event.nft.as_ref()).map(|n| n.at()),
            who,
            meta: event.meta.clone(),
            tuple: event.tuple.flatten(),
            facts: event.facts.as_deref().cloned(),
            frame,
            header: header.unwrap_or_default(),
            vlan: None,
            listen: drop.and_then(|d| d.listen()),
            copy,
            process: owner.and_then(|o| names.process(o)),
            cgroup: owner.map_or(0, |o| o.cgroup),
            place,
        };
        if let (Some(who), Some(hook)) = (&dropped.who, dropped.hook) {
            let meta = dropped.meta.as_ref();
            self.push(Step {
                at: dropped.at,
                stage: "netfilter",
                device: meta.map_or_else(String::new, |m| escaped(&m.ifname)),
                netns: meta.map_or(0, |m| m.netns),
                fact: format!(
                    "{hook}: dropped by {}",
                    who.to_string().trim_matches(['[', ']'])
                ),
                nft: None,
                ct: None,
            });
        }
        if let Some(hops) = &mut self.hops {
            hops.dropped(event.skb, &dropped);
        }
        if let Some(stage) = self.legs.get(&event.skb).and_then(|l| l.stage) {
            self.owner(event, stage, names);
        }
        let leg = self.legs.entry(event.skb).or_default();
        leg.last = event.head.ts;
        leg.see_vlan(event);
        let dropped = Dropped {
            vlan: leg.vlan,
            ..dropped
        };
        leg.dropped = Some(Box::new(dropped));
        Ok(())
    }
}

/// What became of the addresses, in words: translated, or another header.
fn change(before: &Tuple, now: &Tuple) -> Option<(&'static str, String)> {
    if before.fragment || now.fragment {
        return None;
    }
    let ends = |t: &Tuple| (t.saddr, t.daddr, t.sport, t.dport);
    if before.proto != now.proto {
        return Some(("tunnel", format!("now {now}")));
    }
    (ends(before) != ends(now)).then(|| ("translated", format!("now {now}")))
}

impl std::fmt::Display for Passed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.hook)?;
        let Some(nft) = &self.nft else {
            return f.write_str(": passed");
        };
        let chain = nft.chain.as_deref().unwrap_or_default();
        write!(f, ": nft {} {} {chain}", nft.family, nft.table)?;
        match nft.handle {
            Some(handle) => write!(f, " handle {handle} accepted"),
            None => f.write_str(" let it pass"),
        }
    }
}
