//! What a drop means, in plain words: rules as data (reasons.toml, places.toml), compiled in; a file of the user's may add to them or
//! replace them. It knows no tool and asks nothing of the kernel.

pub mod delays;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;

use anyhow::{Context, Result};
use serde::Deserialize;

/// The class of what is no loss.
pub const EXPECTED: &str = "expected";
/// The reason that says nothing; kernels before 5.17 have no other.
pub const NOT_SPECIFIED: &str = "NOT_SPECIFIED";
/// In rules about places: kernels without reasons only.
const NONE: &str = "NONE";

/// What a drop means.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Meaning {
    /// who is to be asked: firewall, route, queue, ...; "expected": it is no loss
    pub class: String,
    /// the cause, as a noun
    pub what: String,
    /// what to change or to look at
    #[serde(default)]
    pub change: String,
    /// the reason that newer kernels give for the same, without SKB_DROP_REASON_; empty where nobody knows
    #[serde(default, skip_deserializing)]
    pub reason: String,
    /// of the rule, where it is not the reason
    #[serde(default, skip_deserializing)]
    pub id: String,
}

impl Meaning {
    /// A name of the rule that stays: the reason, on kernels without reasons too where newer kernels give one.
    pub fn rule(&self) -> &str {
        [&self.id, &self.reason]
            .into_iter()
            .find(|name| !name.is_empty())
            .map_or("UNKNOWN", |name| name)
    }

    /// The packet was freed in the normal course of things.
    pub fn is_expected(&self) -> bool {
        self.class == EXPECTED
    }
}

/// A fact about a dropped packet that a rule may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fact {
    /// its device takes frames for others too
    Promiscuous,
    /// the frame was for another MAC address
    OtherHost,
    Multicast,
    Broadcast,
    /// ICMP or ICMPv6
    EchoReply,
    NoIp,
    /// for a TCP connection in TIME-WAIT
    TimeWait,
    /// a TCP segment without data or SYN
    NoData,
    /// this host has sent an ICMP error for it: its TTL is used up
    TimeExceeded,
    /// the same: it is larger than the way's MTU
    TooBig,
    /// the same: nothing here speaks its protocol
    NoProtocol,
    /// this host has answered with a TCP reset
    Reset,
    Ip,
    /// marked as another host's, though the frame has the device's own address; its VLAN tag was seen
    UnknownVlan,
    /// the same; no tag was seen
    OwnMac,
    /// the frame has another host's address
    OtherMac,
    /// its source or destination is a loopback address
    Loopback,
    /// its source is one that no host has: multicast, broadcast, 0.0.0.0/8
    BadSource,
    /// the same of its destination: 0.0.0.0/8
    BadDestination,
    /// its route refuses it with EINVAL, as a blackhole does
    RouteBlackhole,
    /// the same with EACCES
    RouteProhibits,
    /// the same with EHOSTUNREACH
    RouteUnreachable,
    /// shorter than its IP header says
    CutOff,
    /// its IP header has a wrong checksum
    BadIpSum,
    /// its device does not take IPv6
    Ipv6Off,
}

/// What netprobe why asks the kernel about a loss: each has one function that looks for the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Question {
    /// the text of the nft rule, or the policy
    NftRule,
    /// net.ipv4.conf.*.rp_filter
    RpFilter,
    /// the route back to the sender
    RouteBack,
    /// the route to the destination
    Route,
    /// the state of the next hop
    Neighbour,
    /// a socket's receive queue, and what its reader does
    SocketQueue,
    /// a listening socket's queue
    ListenQueue,
    /// size, MTU and DF
    Mtu,
    /// TTL or hop limit
    Ttl,
    /// the queue discipline and its own counters
    Qdisc,
    /// net.ipv4.ip_forward and the like
    Forwarding,
    /// conntrack's count and limit
    Conntrack,
    /// flags of the device
    Device,
    /// MAC addresses of the frame and the device
    Mac,
    /// who computes checksums
    Checksum,
    /// net.ipv6.conf.*.disable_ipv6
    Ipv6Disabled,
    /// sockets that listen at the packet's port
    Listeners,
    /// net.ipv4.conf.*.log_martians and route_localnet
    Martian,
    /// tc filters of the device
    Tc,
    /// XDP program of the device
    Xdp,
    /// routing rules that the packet fits
    RoutingRules,
    /// the VRF of the device
    Vrf,
    /// policies of IPsec, and its counters
    Xfrm,
    /// a bridge port's state and VLANs
    BridgePort,
    /// VLAN devices on the device
    Vlans,
    /// the packet's protocol, and raw sockets that take it
    Protocol,
    /// the fragment, and how long it may wait
    Fragments,
    /// what the IP header says of its length
    Length,
    /// the socket's filter
    Filter,
    /// BPF programs of the socket's cgroup
    Cgroup,
    /// memory of the protocol, and its limits
    ProtoMem,
    /// forwarding entries of a tunnel device
    Fdb,
}

/// Which questions to ask: by rule, else by class.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Questions {
    #[serde(default)]
    rule: BTreeMap<String, Vec<Question>>,
    #[serde(default)]
    class: BTreeMap<String, Vec<Question>>,
}

/// Places.toml's rules.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct PlaceRule {
    #[serde(default)]
    reasons: Vec<String>,
    #[serde(default)]
    functions: Vec<String>,
    when: Option<Fact>,
    class: String,
    what: String,
    #[serde(default)]
    change: String,
    /// the reason that newer kernels give
    #[serde(default, rename = "as")]
    reason: String,
    /// a name for the rule, where the reason is not one
    #[serde(default)]
    id: String,
}

impl PlaceRule {
    /// `reason`: empty where the kernel has none.
    fn fits(&self, reason: &str, function: &str, facts: &[Fact]) -> bool {
        let named = |name: &String| match reason {
            "" => matches!(name.as_str(), NONE | NOT_SPECIFIED),
            reason => name == reason,
        };
        let reason_fits = match self.reasons.is_empty() {
            true => matches!(reason, "" | NOT_SPECIFIED),
            false => self.reasons.iter().any(named),
        };
        let function_fits =
            self.functions.is_empty() || self.functions.iter().any(|f| is_like(f, function));
        reason_fits && function_fits && self.when.is_none_or(|when| facts.contains(&when))
    }
}

/// `pattern` is a name, or one with a `*` at its beginning or end.
fn is_like(pattern: &str, name: &str) -> bool {
    if let Some(start) = pattern.strip_suffix('*') {
        return name.starts_with(start);
    }
    match pattern.strip_prefix('*') {
        Some(end) => name.ends_with(end),
        None => name == pattern,
    }
}

/// The rules.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rules {
    #[serde(default)]
    reason: BTreeMap<String, Meaning>,
    #[serde(default)]
    place: Vec<PlaceRule>,
    #[serde(default)]
    ask: Questions,
}

impl Rules {
    /// Those that are compiled in.
    pub fn builtin() -> &'static Self {
        static RULES: OnceLock<Rules> = OnceLock::new();
        RULES.get_or_init(|| {
            let parts = [
                include_str!("reasons.toml"),
                include_str!("places.toml"),
                include_str!("questions.toml"),
            ];
            let mut rules = Rules::default();
            for part in parts {
                // A unit test reads them all.
                rules.add(toml::from_str(part).unwrap_or_default());
            }
            rules
        })
    }

    /// The compiled in ones with those of a file before them.
    pub fn with(path: &Path) -> Result<Self> {
        let name = path.display();
        let text =
            std::fs::read_to_string(path).with_context(|| format!("failed to read {name}"))?;
        let own: Self =
            toml::from_str(&text).with_context(|| format!("{name} is no file of rules"))?;
        let mut rules = Self::builtin().clone();
        rules.reason.extend(own.reason);
        rules.place.splice(0..0, own.place);
        rules.ask.rule.extend(own.ask.rule);
        rules.ask.class.extend(own.ask.class);
        Ok(rules)
    }

    fn add(&mut self, more: Self) {
        self.reason.extend(more.reason);
        self.place.extend(more.place);
        self.ask.rule.extend(more.ask.rule);
        self.ask.class.extend(more.ask.class);
    }

    /// What to ask the kernel about a loss with this meaning.
    pub fn questions(&self, meaning: &Meaning) -> &[Question] {
        let by_rule = self.ask.rule.get(meaning.rule());
        by_rule
            .or_else(|| self.ask.class.get(&meaning.class))
            .map_or(&[], Vec::as_slice)
    }

    /// Names of all reasons that have a rule.
    pub fn reasons(&self) -> impl Iterator<Item = &str> {
        self.reason.keys().map(String::as_str)
    }

    /// All classes, each once.
    pub fn classes(&self) -> Vec<String> {
        let by_reason = self.reason.values().map(|meaning| &meaning.class);
        let all = by_reason.chain(self.place.iter().map(|rule| &rule.class));
        let classes: std::collections::BTreeSet<&String> = all.collect();
        classes.into_iter().cloned().collect()
    }

    /// A rule has this name.
    pub fn knows(&self, rule: &str) -> bool {
        let mut places = self.place.iter();
        self.reason.contains_key(rule)
            || places.any(|place| place.id == rule || place.reason == rule)
    }

    /// The rule of a reason, by its name without SKB_DROP_REASON_.
    pub fn reason(&self, name: &str) -> Option<&Meaning> {
        self.reason.get(name)
    }

    /// What a drop means. `reason`: the kernel's name without SKB_DROP_REASON_; empty where it has none. `function`: the one that decided.
    pub fn explain(&self, reason: &str, function: &str, facts: &[Fact]) -> Meaning {
        let by_place = self
            .place
            .iter()
            .find(|rule| rule.fits(reason, function, facts));
        let reason = match reason {
            "" => NOT_SPECIFIED,
            reason => reason,
        };
        if let Some(rule) = by_place {
            return Meaning {
                class: rule.class.clone(),
                what: rule.what.clone(),
                change: rule.change.clone(),
                reason: match reason {
                    NOT_SPECIFIED => rule.reason.clone(),
                    given => given.to_owned(),
                },
                id: rule.id.clone(),
            };
        }
        let mut meaning = self.reason.get(reason).cloned().unwrap_or(Meaning {
            class: "unknown".into(),
            what: reason.to_owned(),
            change: String::new(),
            reason: String::new(),
            id: String::new(),
        });
        if reason != NOT_SPECIFIED {
            meaning.reason = reason.to_owned();
        }
        meaning
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rules_that_are_compiled_in_can_be_read() {
        let reasons: Rules = toml::from_str(include_str!("reasons.toml")).unwrap();
        let places: Rules = toml::from_str(include_str!("places.toml")).unwrap();
        let questions: Rules = toml::from_str(include_str!("questions.toml")).unwrap();
        assert!(questions.ask.class.len() > 8 && questions.ask.rule.len() > 4);
        assert!(reasons.reason.len() > 130 && places.place.len() > 15);
        for (name, meaning) in &reasons.reason {
            assert!(
                meaning.is_expected() || !meaning.change.is_empty(),
                "{name}: what is to be changed?"
            );
        }
    }

    #[test]
    fn the_place_decides_where_the_reason_does_not() {
        let rules = Rules::builtin();
        let what = |reason, function, facts: &[Fact]| rules.explain(reason, function, facts);
        assert_eq!(
            what("NETFILTER_DROP", "nft_do_chain", &[]).class,
            "firewall"
        );
        assert_eq!(what("", "nf_hook_slow", &[]).class, "firewall");
        assert_eq!(what("", "__udp4_lib_rcv", &[]).reason, "NO_SOCKET");
        assert_eq!(what("", "some_driver_xmit", &[]).reason, "");
        assert_eq!(what("", "some_driver_xmit", &[]).rule(), "UNKNOWN");
        for reason in ["", "IP_INHDR"] {
            assert_eq!(
                what(reason, "ip_forward", &[Fact::TimeExceeded]).rule(),
                "TTL_EXPIRED"
            );
        }
        assert!(what("NOT_SPECIFIED", "netlink_broadcast_filtered", &[]).is_expected());
        assert!(!what("OTHERHOST", "ip_rcv_core", &[Fact::OtherHost]).is_expected());
        assert!(what("OTHERHOST", "ip_rcv_core", &[Fact::Promiscuous]).is_expected());
        let tagged = [Fact::OtherHost, Fact::Promiscuous, Fact::UnknownVlan];
        assert_eq!(
            what("OTHERHOST", "ip_rcv_core", &tagged).rule(),
            "VLAN_UNKNOWN"
        );
        // What kernels without reasons do not tell may not be taken for one cause of several.
        for (reason, rule) in [("", "SOURCE_REFUSED"), ("NOT_SPECIFIED", "IP_LOCAL_SOURCE")] {
            assert_eq!(
                what(reason, "ip_rcv_finish_core.constprop.0", &[]).rule(),
                rule
            );
        }
        assert_eq!(
            what("", "udp_queue_rcv_one_skb", &[]).rule(),
            "SOCKET_REFUSED"
        );
        assert!(what("NO_SOCKET", "ping_rcv", &[Fact::EchoReply]).is_expected());
        assert!(!what("NO_SOCKET", "__udp4_lib_rcv", &[]).is_expected());
        assert!(what("TCP_CLOSE", "tcp_rcv_state_process", &[Fact::NoData]).is_expected());
        for old in ["TCP_RFC7323_PAWS", "TCP_INVALID_SEQUENCE"] {
            assert!(what(old, "tcp_validate_incoming", &[Fact::NoData]).is_expected());
            assert!(!what(old, "tcp_validate_incoming", &[]).is_expected());
        }
        assert!(!what("TCP_CLOSE", "tcp_rcv_state_process", &[]).is_expected());
        assert!(what("NO_SOCKET", "__udp4_lib_rcv", &[Fact::Multicast]).is_expected());
        assert_eq!(
            what("NOT_SPECIFIED", "some_driver_xmit", &[]).class,
            "unknown"
        );
        assert_eq!(what("OF_NEXT_YEAR", "f", &[]).what, "OF_NEXT_YEAR");
    }

    #[test]
    fn rules_of_a_file_come_first() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = "[reason.NO_SOCKET]\nclass = \"expected\"\nwhat = \"a port scan\"\n";
        std::fs::write(file.path(), text).unwrap();
        let rules = Rules::with(file.path()).unwrap();
        assert_eq!(rules.explain("NO_SOCKET", "f", &[]).what, "a port scan");
        assert_eq!(rules.explain("XDP", "f", &[]).class, "xdp");
        std::fs::write(file.path(), "[reason.X]\nclas = 1\n").unwrap();
        let error = format!("{:#}", Rules::with(file.path()).unwrap_err());
        assert!(error.contains("is no file of rules"), "{error}");
    }
}
