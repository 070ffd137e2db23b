//! Proof for a loss: what was read when it happened, and what the kernel answers when it is asked now, in the namespace of the loss.
//! Which questions a rule asks is data (src/explain/questions.toml); each question has one function here.

mod bridge;
mod firewall;
mod ip;
mod link;
mod policy;
mod socket;

use std::fs;

use serde::Serialize;

use crate::explain::Question;
use crate::kernel::netns::Netns;

use super::dropped::Dropped;
use super::ends::Verdict;
use super::journey::{Journey, Leg};

/// Evidence as a value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Value {
    Text(String),
    Number(u64),
    Yes(bool),
    List(Vec<String>),
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<u32> for Value {
    fn from(number: u32) -> Self {
        Self::Number(number.into())
    }
}

impl From<bool> for Value {
    fn from(yes: bool) -> Self {
        Self::Yes(yes)
    }
}

impl From<Vec<String>> for Value {
    fn from(list: Vec<String>) -> Self {
        Self::List(list)
    }
}

/// One piece of evidence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Proof {
    /// a stable name
    pub question: &'static str,
    pub text: String,
    /// asked afterwards; else read when it happened
    pub now: bool,
    /// the same as values, where there are some
    #[serde(skip_serializing_if = "Vec::is_empty", serialize_with = "as_map")]
    pub values: Vec<(&'static str, Value)>,
    /// a command that would change it
    #[serde(skip_serializing_if = "Option::is_none")]
    pub change: Option<String>,
}

fn as_map<S: serde::Serializer>(
    values: &[(&'static str, Value)],
    to: S,
) -> Result<S::Ok, S::Error> {
    to.collect_map(values.iter().map(|(k, v)| (*k, v)))
}

impl Proof {
    fn then(question: &'static str, text: impl Into<String>) -> Self {
        Self {
            question,
            text: text.into(),
            now: false,
            values: Vec::new(),
            change: None,
        }
    }

    fn now(question: &'static str, text: impl Into<String>) -> Self {
        Self {
            now: true,
            ..Self::then(question, text)
        }
    }

    fn with(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        self.values.push((name, value.into()));
        self
    }
}

/// A loss that is asked about.
pub struct Case<'a> {
    pub journey: &'a Journey,
    pub leg: &'a Leg,
    pub dropped: Option<&'a Dropped>,
    netns: Option<Netns>,
}

impl<'a> Case<'a> {
    pub fn new(journey: &'a Journey, verdict: &Verdict) -> Option<Self> {
        let leg = journey.legs.get(&verdict.leg)?;
        let dropped = leg.dropped.as_deref();
        let meta = dropped.and_then(|d| d.meta.as_ref());
        let inode = meta.map_or(leg.netns, |m| m.netns);
        Some(Self {
            journey,
            leg,
            dropped,
            netns: Netns::parse(&format!("inode:{inode}")).ok(),
        })
    }

    /// The device at the end.
    fn device(&self) -> String {
        let meta = self.dropped.and_then(|d| d.meta.as_ref());
        let name = meta.map(|m| crate::text::escape::escaped(&m.ifname));
        name.filter(|n| !n.is_empty())
            .unwrap_or_else(|| self.leg.device.clone())
    }

    fn ifindex(&self) -> u32 {
        self.dropped
            .and_then(|d| d.meta.as_ref())
            .map_or(0, |m| m.ifindex)
    }

    /// Asks in the namespace of the loss; `None` where it is gone or cannot be entered.
    fn inside<T: Send>(&self, ask: impl FnOnce() -> T + Send) -> Option<T> {
        self.netns.as_ref()?.run(ask).ok()
    }

    /// A network sysctl of that namespace, by its name with slashes.
    fn sysctl(&self, name: &str) -> Option<String> {
        let path = format!("/proc/sys/{name}");
        let text = self.inside(|| fs::read_to_string(path))?.ok()?;
        Some(text.trim().to_owned())
    }
}

/// The answers to a question; none where nothing is known.
pub fn ask(question: Question, case: &Case<'_>) -> Vec<Proof> {
    match question {
        Question::NftRule => firewall::rule(case),
        Question::Conntrack => firewall::conntrack(case),
        Question::RpFilter => ip::rp_filter(case),
        Question::RouteBack => ip::route_back(case),
        Question::Route => ip::route(case),
        Question::Neighbour => ip::neighbour(case),
        Question::Mtu => ip::mtu(case),
        Question::Ttl => ip::ttl(case),
        Question::Forwarding => ip::forwarding(case),
        Question::Ipv6Disabled => ip::ipv6_disabled(case),
        Question::Martian => ip::martian(case),
        Question::Qdisc => ip::qdisc(case),
        Question::Device => ip::device(case),
        Question::Mac => link::mac(case),
        Question::Vlans => link::vlans(case),
        Question::Fdb => link::fdb(case),
        Question::Length => ip::length(case),
        Question::Protocol => ip::protocol(case),
        Question::Fragments => ip::fragments(case),
        Question::Filter => socket::filter(case),
        Question::ProtoMem => socket::memory(case),
        Question::Cgroup => policy::cgroup(case),
        Question::Checksum => ip::checksum(case),
        Question::Xdp => ip::xdp_of_device(case),
        Question::Tc => ip::tc(case),
        Question::SocketQueue => socket::queue(case),
        Question::ListenQueue => socket::listen(case),
        Question::RoutingRules => policy::rules(case),
        Question::Vrf => policy::vrf(case),
        Question::Xfrm => policy::xfrm(case),
        Question::BridgePort => bridge::port(case),
        Question::Listeners => socket::listeners(case),
    }
}
