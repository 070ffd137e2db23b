//! What decides beside the packet, for netprobe why: the socket's queues, the route. skb shows none of it.

use std::net::IpAddr;

use crate::bpf::read;
use crate::bpf::skb::types::{skb_fact, skb_facts, skb_section};
use crate::tools::skb::event::{Facts, Route, Socket};

use super::column::Column;

pub const SECTION_FACTS: u32 = skb_section::SKB_SECTION_FACTS.0;
const FACT_SOCK: u8 = skb_fact::SKB_FACT_SOCK.0 as u8;
const FACT_ROUTE: u8 = skb_fact::SKB_FACT_ROUTE.0 as u8;
const FACT_TIME_WAIT: u8 = skb_fact::SKB_FACT_TIME_WAIT.0 as u8;
const FACT_PROMISCUOUS: u8 = skb_fact::SKB_FACT_PROMISCUOUS.0 as u8;
const FACT_OWN_MAC: u8 = skb_fact::SKB_FACT_OWN_MAC.0 as u8;
const FACT_OTHER_MAC: u8 = skb_fact::SKB_FACT_OTHER_MAC.0 as u8;
const FACT_IPV6_OFF: u8 = skb_fact::SKB_FACT_IPV6_OFF.0 as u8;
const FACT_FILTER: u8 = skb_fact::SKB_FACT_FILTER.0 as u8;

pub const FACTS: Column = Column::new(SECTION_FACTS, size_of::<skb_facts>(), |event, bytes, _| {
    let (f, rest) = read::<skb_facts>(bytes)?;
    event.facts = Some(Box::new(Facts::new(&f)));
    Some(rest)
});

impl Facts {
    fn new(f: &skb_facts) -> Self {
        let socket = Socket {
            rmem: f.rmem,
            rcvbuf: f.rcvbuf,
            backlog: f.backlog,
            limit: f.limit,
            state: f.state,
        };
        let gateway = match i32::from(f.gateway_family) {
            libc::AF_INET => {
                let [a, b, c, d, ..] = f.gateway;
                Some(IpAddr::from([a, b, c, d]))
            }
            libc::AF_INET6 => Some(IpAddr::from(f.gateway)),
            _ => None,
        };
        let route = Route {
            ifindex: f.ifindex,
            mtu: f.mtu,
            ifname: f.ifname,
            gateway: gateway.filter(|g| !g.is_unspecified()),
            error: f.error,
            kind: f.r#type,
        };
        let has = |fact: u8| f.known & fact != 0;
        let own_mac = has(FACT_OWN_MAC).then_some(true);
        Self {
            socket: has(FACT_SOCK).then_some(socket),
            route: has(FACT_ROUTE).then_some(route),
            pkt_type: f.pkt_type,
            ip_summed: f.ip_summed,
            time_wait: has(FACT_TIME_WAIT),
            promiscuous: has(FACT_PROMISCUOUS),
            own_mac: own_mac.or(has(FACT_OTHER_MAC).then_some(false)),
            ipv6_off: has(FACT_IPV6_OFF),
            filter: has(FACT_FILTER),
        }
    }
}
