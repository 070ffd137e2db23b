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
        Self {
            socket: (f.known & FACT_SOCK != 0).then_some(socket),
            route: (f.known & FACT_ROUTE != 0).then_some(route),
            pkt_type: f.pkt_type,
            ip_summed: f.ip_summed,
            time_wait: f.known & FACT_TIME_WAIT != 0,
            promiscuous: f.known & FACT_PROMISCUOUS != 0,
        }
    }
}
