//! Events to journeys: what one packet, with its clones, copies and other forms, went through. A journey has legs, one for each sk_buff.
//! It knows nothing of what a loss means.

use std::collections::VecDeque;

use anyhow::Result;
use rustc_hash::FxHashMap;

use crate::capture::linktype::Linktype;
use crate::event::line::Line;
use crate::event::link::{self, Frame};
use crate::event::packet::{Net, Transport};
use crate::event::tuple::Tuple;
use crate::explain::Fact;
use crate::kernel::process::Process;
use crate::text::escape::escaped;
use crate::tools::skb::drops::Listen;
use crate::tools::skb::event::{Data, Event, Facts, Meta};
use crate::tools::skb::netfilter::{Nft, Passed, Who};

use super::names::{Names, Place};
use super::stages::{Rest, Role, Shows, Stage, Stages, Way};

/// Stages of a journey that are kept.
const STEPS: usize = 64;
/// A journey is over when all of its sk_buffs are gone for this long, ns: a clone may not have been seen yet.
const QUIET: u64 = 50_000_000;
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
    /// the nft rule or policy that let it pass
    pub nft: Option<Nft>,
}

/// A drop of one of its sk_buffs.
#[derive(Debug, Clone)]
pub struct Dropped {
    pub at: u64,
    /// without SKB_DROP_REASON_; empty where the kernel gives none
    pub reason: String,
    pub place: Place,
    pub who: Option<Who>,
    /// the hook of netfilter that it was in, where that decided
    pub hook: Option<&'static str>,
    pub meta: Option<Meta>,
    pub tuple: Option<Tuple>,
    pub facts: Option<Facts>,
    pub frame: Option<Frame>,
    pub listen: Option<Listen>,
    /// another sk_buff has the packet
    pub copy: bool,
    pub process: Option<Process>,
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
    /// the run of a hook that it passed last
    run: u32,
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
            listen: None,
            copy: false,
            process: None,
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
            if same && step.nft.is_none() && (step.fact == last.fact || step.fact.is_empty()) {
                return;
            }
            let nameless = last.stage == step.stage && last.device.is_empty();
            if (same || nameless) && last.fact.is_empty() && last.nft.is_none() {
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
}

impl Journeys {
    pub fn new(most: usize, nft: bool) -> Self {
        Self {
            stages: Stages::builtin(),
            under_way: FxHashMap::default(),
            order: VecDeque::new(),
            most,
            nft,
            cut: 0,
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
            if self.under_way.len() >= self.most {
                spilled = self.oldest();
                self.cut += 1;
            }
            self.under_way.insert(id, Journey::new(event));
            self.order.push_back(id);
        }
        if let Some(journey) = self.under_way.get_mut(&id) {
            journey.last = event.head.ts;
            if let Some(icmp) = event.icmp {
                journey.legs.entry(event.skb).or_default().icmp = Some(icmp);
            } else if event.dropped {
                journey.look(event);
                journey.drop(event, names)?;
            } else {
                let function = names.function(event.func)?;
                match self.stages.role(&function) {
                    Some(Role::Stage(stage)) => {
                        journey.look(event);
                        journey.hit(event, stage, self.nft, names);
                    }
                    Some(role) => journey.end_of_leg(event, role, &function),
                    None => {}
                }
            }
        }
        Ok(spilled)
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
        };
        let passed = event.nft.as_ref().and_then(|n| n.passed());
        if let Some(passed) = passed.filter(|p| p.run != leg.run) {
            leg.run = passed.run;
            if passed.nft.is_some() {
                steps.push(step("netfilter", passed.to_string(), passed.nft));
            }
        }
        let now = event.tuple.flatten();
        if let (Some(before), Some(now)) = (before, now) {
            if let Some(change) = change(&before, &now) {
                steps.push(step(change.0, change.1, None));
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
        let dropped = Dropped {
            at: event.head.ts,
            reason,
            hook: who.as_ref().and(event.nft.as_ref()).map(|n| n.at()),
            who,
            meta: event.meta.clone(),
            tuple: event.tuple.flatten(),
            facts: event.facts.as_deref().cloned(),
            frame: data.and_then(frame_of).map(|(frame, _)| frame),
            listen: drop.and_then(|d| d.listen()),
            copy,
            process: owner.and_then(|o| names.process(o)),
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
            });
        }
        if let Some(stage) = self.legs.get(&event.skb).and_then(|l| l.stage) {
            self.owner(event, stage, names);
        }
        let leg = self.legs.entry(event.skb).or_default();
        leg.last = event.head.ts;
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

/// The fact that matters at a stage.
fn fact(stage: &Stage, event: &Event, device: &str) -> String {
    let facts = event.facts.as_deref();
    match stage.shows {
        Some(Shows::Route) => facts.map_or_else(String::new, route),
        Some(Shows::Device) if !device.is_empty() => format!("dev {device}"),
        Some(Shows::NextHop) => facts.map_or_else(String::new, |f| next_hop(f, event)),
        Some(Shows::Queue) => facts.map_or_else(String::new, queue),
        Some(Shows::Reader) => format!("{}[{}]", escaped(&event.head.comm), event.head.tgid),
        _ => String::new(),
    }
}

fn route(facts: &Facts) -> String {
    let Some(route) = &facts.route else {
        return String::new();
    };
    let mut text = format!("dev {}", escaped(&route.ifname));
    if let Some(gateway) = route.gateway {
        text += &format!(" via {gateway}");
    }
    text += match route.kind {
        2 => ", local",
        3 => ", broadcast",
        5 => ", multicast",
        _ => "",
    };
    if route.error != 0 {
        let errno = nix::errno::Errno::from_raw(-i32::from(route.error));
        text += &format!(", refuses ({errno})");
    }
    text
}

fn next_hop(facts: &Facts, event: &Event) -> String {
    let route = facts.route.as_ref();
    let hop = route
        .and_then(|r| r.gateway)
        .or_else(|| event.tuple.flatten().map(|t| t.daddr));
    hop.map_or_else(String::new, |hop| format!("of {hop}"))
}

fn queue(facts: &Facts) -> String {
    const LISTEN: u8 = 10;
    match facts.socket {
        Some(s) if s.state == LISTEN => {
            format!("listening, {} of {} wait for accept()", s.backlog, s.limit)
        }
        Some(s) => format!("holds {} of {} bytes", s.rmem, s.rcvbuf),
        None => String::new(),
    }
}

impl Dropped {
    /// What rules may ask about it.
    pub fn rule_facts(&self, icmp: Option<(u8, u8)>, time_wait: bool) -> Vec<Fact> {
        let mut facts = Vec::new();
        let mut add = |is: bool, fact| {
            if is {
                facts.push(fact);
            }
        };
        let pkt_type = self.facts.as_ref().map_or(0, |f| f.pkt_type);
        let v6 = self.tuple.is_some_and(|t| t.saddr.is_ipv6());
        add(pkt_type == 1, Fact::Broadcast);
        add(pkt_type == 2, Fact::Multicast);
        add(pkt_type == 3, Fact::OtherHost);
        let promiscuous = self.facts.as_ref().is_some_and(|f| f.promiscuous);
        add(promiscuous, Fact::Promiscuous);
        add(self.tuple.is_none(), Fact::NoIp);
        let reply =
            |t: Tuple| (t.proto, t.icmp_type) == (1, 0) || (t.proto, t.icmp_type) == (58, 129);
        add(self.tuple.is_some_and(reply), Fact::EchoReply);
        let waits = time_wait || self.facts.as_ref().is_some_and(|f| f.time_wait);
        add(waits, Fact::TimeWait);
        add(self.has_no_data(), Fact::NoData);
        let time = if v6 { 3 } else { 11 };
        add(icmp.is_some_and(|i| i.0 == time), Fact::TimeExceeded);
        let too_big = |i: (u8, u8)| if v6 { i.0 == 2 } else { i == (3, 4) };
        add(icmp.is_some_and(too_big), Fact::TooBig);
        facts
    }

    fn has_no_data(&self) -> bool {
        const SYN: u8 = 2;
        let Some(Net::Ip(ip)) = self.frame.as_ref().map(|f| &f.net) else {
            return false;
        };
        matches!(&ip.transport, Transport::Tcp(tcp) if tcp.len == 0 && tcp.flags & SYN == 0)
    }
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
