//! What triggers the flight recorder (`netprobe record --flight`): what was typed, and whether an event of skb_flight.bpf.h is it.

use std::collections::HashMap;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::bpf::read;
use crate::bpf::skb::types::{np_head, skb_kind, skb_trigger, skb_trigger_what as What};
use crate::event::tuple::Tuple;
use crate::filter::expr::Compiled;
use crate::kernel::drop_reason::DropReasons;
use crate::kernel::features::Features;
use crate::tools::expression::ExpressionArgs;
use crate::tools::fields::FieldArgs;
use crate::usage::usage;

use super::columns::tuple::tuple as tuple_of;

/// Connects, and connections that retransmit, that are known at once.
const KNOWN: usize = 65_536;

/// One --trigger.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trigger {
    /// a drop, with this reason where there is one
    Drop(Option<String>),
    /// so many retransmissions of a connection without news of the other end between them
    Retransmit(u32),
    /// a connect that takes longer
    ConnectSlower(Duration),
    /// a TCP reset is sent, or reaches a socket
    Rst,
    Sigusr1,
}

impl FromStr for Trigger {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (word, rest) = match text.split_once(':') {
            Some((word, rest)) => (word, Some(rest)),
            None => (text, None),
        };
        match (word, rest) {
            ("drop", None) => Ok(Self::Drop(None)),
            ("drop", Some(reason)) if !reason.is_empty() => {
                let reason = reason.to_ascii_uppercase();
                Ok(Self::Drop(Some(DropReasons::shortened(&reason).to_owned())))
            }
            ("retransmit", None) => Ok(Self::Retransmit(1)),
            ("retransmit", Some(n)) => match n.parse() {
                Ok(n) if n > 0 => Ok(Self::Retransmit(n)),
                _ => Err("retransmit:N, as retransmit:3".to_owned()),
            },
            ("connect-slower", Some(time)) => Ok(Self::ConnectSlower(duration(time)?)),
            ("rst", None) => Ok(Self::Rst),
            ("SIGUSR1", None) => Ok(Self::Sigusr1),
            _ => Err(
                "drop, drop:REASON, retransmit:N, connect-slower:TIME, rst or SIGUSR1".to_owned(),
            ),
        }
    }
}

impl std::fmt::Display for Trigger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Drop(None) => f.write_str("drop"),
            Self::Drop(Some(reason)) => write!(f, "drop:{reason}"),
            Self::Retransmit(n) => write!(f, "retransmit:{n}"),
            Self::ConnectSlower(time) => write!(f, "connect-slower:{}ms", time.as_millis()),
            Self::Rst => f.write_str("rst"),
            Self::Sigusr1 => f.write_str("SIGUSR1"),
        }
    }
}

/// `30s`, `200ms`, `2m`; a number alone is seconds.
pub fn duration(text: &str) -> Result<Duration, String> {
    let end = text.find(|c: char| !c.is_ascii_digit());
    let (number, unit) = text.split_at(end.unwrap_or(text.len()));
    let number: u64 = number
        .parse()
        .map_err(|_| "a time, as 30s, 200ms or 2m".to_owned())?;
    let ms = match unit {
        "ms" => Some(number),
        "" | "s" => number.checked_mul(1000),
        "m" => number.checked_mul(60_000),
        _ => None,
    };
    match ms {
        Some(ms) if ms <= 86_400_000 => Ok(Duration::from_millis(ms)),
        _ => Err("a time of at most a day, as 30s, 200ms or 2m".to_owned()),
    }
}

/// Which kinds of programs are needed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Kinds {
    pub drops: bool,
    pub retransmits: bool,
    pub connect: bool,
    pub rst: bool,
}

impl Kinds {
    /// Programs at tracepoints.
    pub fn tracepoints(self) -> impl Iterator<Item = (&'static str, &'static str)> {
        let all = [
            (self.drops, "flight_drops", "kfree_skb"),
            (self.retransmits, "flight_retransmit", "tcp_retransmit_skb"),
            (self.connect, "flight_connected", "inet_sock_set_state"),
            (self.rst, "flight_reset_comes", "tcp_receive_reset"),
        ];
        let on = all.into_iter().filter(|(on, ..)| *on);
        on.map(|(_, program, tracepoint)| (program, tracepoint))
    }
}

/// All of a run.
#[derive(Debug, Clone, Default)]
pub struct Triggers(pub Vec<Trigger>);

impl Triggers {
    pub fn kinds(&self) -> Kinds {
        let has = |is: fn(&Trigger) -> bool| self.0.iter().any(is);
        Kinds {
            drops: has(|t| matches!(t, Trigger::Drop(_))),
            retransmits: has(|t| matches!(t, Trigger::Retransmit(_))),
            connect: has(|t| matches!(t, Trigger::ConnectSlower(_))),
            rst: has(|t| matches!(t, Trigger::Rst)),
        }
    }

    /// Flags whose answer depends on more than a socket's packet has. `expression`: of the run.
    pub fn check(
        &self,
        fields: &FieldArgs,
        typed: &ExpressionArgs,
        expression: Option<&Compiled>,
    ) -> Result<()> {
        let of_sockets = Kinds {
            drops: false,
            ..self.kinds()
        };
        if of_sockets == Kinds::default() {
            return Ok(());
        }
        let given = |flag: &Option<String>| flag.is_some();
        let by_packet = [
            ("--filter-ifname", given(&fields.filter_ifname)),
            (
                "--filter-tunnel-pcap-l2",
                given(&typed.filter_tunnel_pcap_l2),
            ),
            (
                "--filter-tunnel-pcap-l3",
                given(&typed.filter_tunnel_pcap_l3),
            ),
            ("--filter-skb-expr", given(&typed.filter_skb_expr)),
        ];
        if let Some((flag, _)) = by_packet.iter().find(|(_, given)| *given) {
            return Err(usage(format!(
                "{flag}: of retransmit, connect-slower and rst a socket's addresses alone are known; use --trigger drop with it"
            )));
        }
        match expression.map(|e| &e.l3) {
            Some(Err(why)) => Err(usage(format!(
                "the expression needs the link header ({why}): it cannot decide about retransmit, connect-slower and rst"
            ))),
            _ => Ok(()),
        }
    }

    /// The numbers of the drop reasons; none where each drop triggers.
    pub fn reasons(&self, reasons: &DropReasons, features: &Features) -> Result<Vec<u32>> {
        let mut numbers = Vec::new();
        for trigger in &self.0 {
            match trigger {
                Trigger::Drop(None) => return Ok(Vec::new()),
                Trigger::Drop(Some(reason)) if !features.drop_reasons => bail!(
                    "--trigger drop:{reason}: kernel {} gives no drop reasons (5.17 does): use --trigger drop",
                    features.release
                ),
                Trigger::Drop(Some(reason)) => match reasons.number(reason) {
                    Some(number) => numbers.push(number),
                    None => {
                        return Err(usage(format!(
                            "--trigger drop:{reason}: this kernel has no such reason (netprobe why --explain all names all)"
                        )));
                    }
                },
                _ => {}
            }
        }
        if numbers.len() > What::SKB_TRIGGER_REASONS.0 as usize {
            return Err(usage(format!(
                "--trigger drop:REASON: {} reasons at most, or drop",
                What::SKB_TRIGGER_REASONS.0
            )));
        }
        Ok(numbers)
    }
}

/// The event is one of skb_flight.bpf.h.
pub fn read_trigger(bytes: &[u8]) -> Option<skb_trigger> {
    let (head, _) = read::<np_head>(bytes)?;
    if u32::from(head.kind) != skb_kind::SKB_KIND_TRIGGER.0 {
        return None;
    }
    read(bytes).map(|(trigger, _)| trigger)
}

/// A connect that has not ended.
struct Connect {
    since: u64,
    tuple: Option<Tuple>,
}

/// Decides.
pub struct Decider {
    triggers: Vec<Trigger>,
    expression: Option<Compiled>,
    /// by socket
    connects: HashMap<u64, Connect>,
    /// by socket: the first byte that is not acknowledged, and retransmissions since
    retransmits: HashMap<u64, (u32, u32)>,
}

impl Decider {
    pub fn new(triggers: &Triggers, expression: Option<Compiled>) -> Self {
        Self {
            triggers: triggers.0.clone(),
            expression,
            connects: HashMap::new(),
            retransmits: HashMap::new(),
        }
    }

    /// What the event triggers, in words.
    pub fn event(&mut self, e: &skb_trigger, reasons: &mut DropReasons) -> Option<String> {
        let tuple = tuple_of(&e.tuple);
        let socket = e.what != What::SKB_TRIGGER_DROP.0;
        if socket && !self.matches(tuple.as_ref()) {
            return None;
        }
        let (trigger, more) = match What(e.what) {
            What::SKB_TRIGGER_DROP => (self.drop(e.value, reasons)?, None),
            What::SKB_TRIGGER_RETRANSMIT => (self.retransmit(e)?, None),
            What::SKB_TRIGGER_RST_SENT => (Trigger::Rst, Some("sent".to_owned())),
            What::SKB_TRIGGER_RST_RECEIVED => (Trigger::Rst, Some("received".to_owned())),
            What::SKB_TRIGGER_CONNECT_BEGIN => {
                if self.connects.len() < KNOWN {
                    let since = e.head.ts;
                    self.connects.insert(e.sk, Connect { since, tuple });
                }
                return None;
            }
            What::SKB_TRIGGER_CONNECT_END => {
                let (trigger, took) = self.connected(e)?;
                let how = match e.value {
                    0 => "it failed after",
                    _ => "it took",
                };
                (trigger, Some(format!("{how} {}", ms(took))))
            }
            _ => return None,
        };
        Some(words(&trigger, tuple.as_ref(), more))
    }

    fn drop(&self, reason: u32, reasons: &mut DropReasons) -> Option<Trigger> {
        let name = reasons.any().then(|| reasons.short(reason));
        let any = self.triggers.contains(&Trigger::Drop(None));
        let by_name = name.as_ref().map(|name| Trigger::Drop(Some(name.clone())));
        let by_name = by_name.filter(|t| any || self.triggers.contains(t));
        by_name.or(any.then_some(Trigger::Drop(None)))
    }

    fn retransmit(&mut self, e: &skb_trigger) -> Option<Trigger> {
        if self.retransmits.len() >= KNOWN && !self.retransmits.contains_key(&e.sk) {
            self.retransmits.clear();
        }
        let (una, count) = self.retransmits.entry(e.sk).or_insert((e.value, 0));
        if *una != e.value {
            (*una, *count) = (e.value, 0);
        }
        *count += 1;
        let count = *count;
        let at = |t: &&Trigger| matches!(t, Trigger::Retransmit(n) if *n == count);
        self.triggers.iter().find(at).cloned()
    }

    fn connected(&mut self, e: &skb_trigger) -> Option<(Trigger, u64)> {
        let connect = self.connects.remove(&e.sk)?;
        let took = e.head.ts.saturating_sub(connect.since);
        Some((self.slower(took)?, took))
    }

    /// The longest time that a connect may take and `took` is longer than.
    fn slower(&self, took: u64) -> Option<Trigger> {
        let mut times: Vec<_> = self.triggers.iter().collect();
        times.retain(|t| matches!(t, Trigger::ConnectSlower(d) if d.as_nanos() < u128::from(took)));
        times.first().map(|t| (*t).clone())
    }

    /// A connect that has taken too long already, though it has not ended.
    pub fn overdue(&mut self, now: u64) -> Option<String> {
        let over = self.connects.iter().find_map(|(sk, connect)| {
            let took = now.saturating_sub(connect.since);
            Some((*sk, took, self.slower(took)?))
        });
        let (sk, took, trigger) = over?;
        let connect = self.connects.remove(&sk)?;
        let more = format!("it has not ended after {}", ms(took));
        Some(words(&trigger, connect.tuple.as_ref(), Some(more)))
    }

    /// The run's expression holds for a packet with these addresses and ports.
    fn matches(&self, tuple: Option<&Tuple>) -> bool {
        let Some(Ok(program)) = self.expression.as_ref().map(|e| &e.l3) else {
            return true;
        };
        let Some(tuple) = tuple else {
            return false;
        };
        let packet = made_up(tuple);
        program.run(&packet, packet.len() as u32) != 0
    }
}

fn ms(ns: u64) -> String {
    format!("{}.{} ms", ns / 1_000_000, ns / 100_000 % 10)
}

fn words(trigger: &Trigger, tuple: Option<&Tuple>, more: Option<String>) -> String {
    let mut text = trigger.to_string();
    if let Some(tuple) = tuple {
        text += &format!(" {tuple}");
    }
    if let Some(more) = more {
        text += &format!(", {more}");
    }
    text
}

/// The IP and TCP headers of a packet without data.
fn made_up(tuple: &Tuple) -> Vec<u8> {
    let mut packet = match (tuple.saddr, tuple.daddr) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let mut ip = vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, tuple.proto, 0, 0];
            ip.extend(from.octets());
            ip.extend(to.octets());
            ip
        }
        (from, to) => {
            let octets = |addr| match addr {
                IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
                IpAddr::V6(v6) => v6.octets(),
            };
            let mut ip = vec![0x60, 0, 0, 0, 0, 20, tuple.proto, 64];
            ip.extend(octets(from));
            ip.extend(octets(to));
            ip
        }
    };
    packet.extend(tuple.sport.to_be_bytes());
    packet.extend(tuple.dport.to_be_bytes());
    packet.extend([0; 8]);
    packet.extend([0x50, tuple.tcp_flags, 0, 0, 0, 0, 0, 0]);
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn triggers_and_times_as_typed() {
        for (text, trigger) in [
            ("drop", Trigger::Drop(None)),
            (
                "drop:neigh_failed",
                Trigger::Drop(Some("NEIGH_FAILED".to_owned())),
            ),
            (
                "drop:SKB_DROP_REASON_NO_SOCKET",
                Trigger::Drop(Some("NO_SOCKET".to_owned())),
            ),
            ("retransmit:3", Trigger::Retransmit(3)),
            ("rst", Trigger::Rst),
            ("SIGUSR1", Trigger::Sigusr1),
            (
                "connect-slower:200ms",
                Trigger::ConnectSlower(Duration::from_millis(200)),
            ),
        ] {
            assert_eq!(text.parse(), Ok(trigger), "{text}");
        }
        for text in [
            "drop:",
            "retransmit:0",
            "retransmit:x",
            "connect-slower",
            "connect-slower:1h",
            "rst:1",
            "sigusr2",
        ] {
            assert!(text.parse::<Trigger>().is_err(), "{text}");
        }
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(duration("5"), Ok(Duration::from_secs(5)));
        assert!(duration("99999999999999999999s").is_err());
    }

    fn event(what: What, sk: u64, ts: u64, value: u32) -> skb_trigger {
        let mut e = skb_trigger {
            sk,
            what: what.0,
            value,
            ..skb_trigger::default()
        };
        e.head.ts = ts;
        e.tuple.l3_version = 4;
        e.tuple.l4_proto = 6;
        e.tuple.sport = 5;
        e.tuple.dport = 80;
        e
    }

    fn decider(texts: &[&str], expression: Option<&str>) -> Decider {
        let triggers = texts.iter().map(|t| t.parse().unwrap()).collect();
        let expression = expression.map(|text| Compiled::new(text).unwrap());
        Decider::new(&Triggers(triggers), expression)
    }

    #[test]
    fn retransmissions_in_a_row() {
        let mut decider = decider(&["retransmit:2"], None);
        let mut ask = |sk, una| {
            let e = event(What::SKB_TRIGGER_RETRANSMIT, sk, 1, una);
            decider.event(&e, &mut DropReasons::default()).is_some()
        };
        assert!(!ask(1, 100) && !ask(2, 100), "one of each");
        assert!(!ask(1, 200), "the other end has acknowledged");
        assert!(ask(1, 200) && ask(2, 100));
        assert!(!ask(1, 200), "once");
    }

    #[test]
    fn connects_that_end_late_or_not_at_all() {
        let mut decider = decider(&["connect-slower:200ms"], Some("tcp dst port 80"));
        let none = &mut DropReasons::default();
        let begin = |sk, ts| event(What::SKB_TRIGGER_CONNECT_BEGIN, sk, ts, 0);
        let end = |sk, ts| event(What::SKB_TRIGGER_CONNECT_END, sk, ts, 1);
        decider.event(&begin(1, 0), none);
        assert_eq!(decider.event(&end(1, 100_000_000), none), None);
        decider.event(&begin(1, 0), none);
        let said = decider.event(&end(1, 300_000_000), none).unwrap();
        assert!(said.ends_with("it took 300.0 ms"), "{said}");
        decider.event(&begin(2, 0), none);
        assert_eq!(decider.overdue(200_000_000), None);
        assert!(decider.overdue(200_000_001).is_some());
        assert_eq!(decider.overdue(200_000_001), None, "once");
        let mut other = begin(3, 0);
        other.tuple.dport = 81;
        decider.event(&other, none);
        assert_eq!(decider.overdue(u64::MAX), None, "the expression");
    }
}
