//! Which events of a recording are shown: the filters of `netprobe skb`, evaluated on what was recorded.

use std::net::IpAddr;

use anyhow::Result;
use regex::Regex;

use crate::bpf::skb::types::np_config;
use crate::filter::expr::Compiled;
use crate::tools::fields::{self, FieldArgs};
use crate::tools::skb::capture::Frame;
use crate::tools::skb::event::{Data, Event, Meta};
use crate::tools::skb::recorded::Recorded;
use crate::usage::usage;

use super::args::FilterArgs;

pub struct Filter {
    config: np_config,
    netns: Option<Netns>,
    ifname: Option<String>,
    func: Option<Regex>,
    expression: Option<Compiled>,
    /// events that an expression was asked about, but whose packets' bytes were not recorded
    pub without_bytes: u64,
}

enum Netns {
    Inode(u32),
    Name(String),
}

impl Filter {
    pub fn new(args: &FilterArgs) -> Result<Self> {
        let fields = FieldArgs {
            packet: args.packet.clone(),
            // Names of this machine are not meant.
            ..FieldArgs::default()
        };
        let expression = args.filter.as_ref().map(|text| {
            let compiled = Compiled::new(text);
            compiled.map_err(|e| usage(format!("--filter '{text}': {e:#}")))
        });
        let netns = args.filter_netns.as_ref().map(|text| {
            let number = text.strip_prefix("inode:").unwrap_or(text);
            match number.parse() {
                Ok(inode) => Netns::Inode(inode),
                Err(_) => Netns::Name(text.clone()),
            }
        });
        Ok(Self {
            config: fields.config()?,
            netns,
            ifname: args.filter_ifname.clone(),
            func: function(args.filter_func.as_deref())?,
            expression: expression.transpose()?,
            without_bytes: 0,
        })
    }

    /// Every event is to be shown.
    pub fn is_empty(&self) -> bool {
        self.config.fields == 0
            && self.netns.is_none()
            && self.ifname.is_none()
            && self.func.is_none()
            && self.expression.is_none()
    }

    /// The event is to be shown.
    pub fn matches(&mut self, event: &Event, of: &mut Recorded) -> bool {
        self.device(event.meta.as_ref(), of)
            && self.tuple(event)
            && self.function(event, of)
            && self.expression(event)
    }

    fn device(&self, meta: Option<&Meta>, of: &mut Recorded) -> bool {
        let on = |bit: u32| self.config.fields & bit != 0;
        if !on(fields::MARK) && self.netns.is_none() && self.ifname.is_none() {
            return true;
        }
        let Some(meta) = meta else {
            return false;
        };
        let mark = !on(fields::MARK) || meta.mark & self.config.mark_mask == self.config.mark;
        let netns = match &self.netns {
            None => true,
            Some(Netns::Inode(inode)) => meta.netns == *inode,
            Some(Netns::Name(name)) => of.netns_name(meta.netns) == Some(name),
        };
        let ifname = self.ifname.as_ref().is_none_or(|name| {
            let end = meta.ifname.iter().position(|b| *b == 0);
            meta.ifname[..end.unwrap_or(meta.ifname.len())] == *name.as_bytes()
        });
        mark && netns && ifname
    }

    fn tuple(&self, event: &Event) -> bool {
        let c = &self.config;
        let on = |bit: u32| c.fields & bit != 0;
        let fields = fields::PROTO | fields::SADDR | fields::DADDR | fields::SPORT | fields::DPORT;
        if c.fields & fields == 0 {
            return true;
        }
        let Some(t) = event.tuple.flatten() else {
            return false;
        };
        (!on(fields::PROTO) || t.proto == c.l4_proto)
            && (!on(fields::SADDR) || within(t.saddr, c.saddr, c.saddr_mask))
            && (!on(fields::DADDR) || within(t.daddr, c.daddr, c.daddr_mask))
            && (!on(fields::SPORT) || t.sport == c.sport)
            && (!on(fields::DPORT) || t.dport == c.dport)
    }

    fn function(&self, event: &Event, of: &mut Recorded) -> bool {
        let name = self.func.as_ref().map(|func| (func, of.function(event)));
        name.is_none_or(|(func, name)| func.is_match(&name))
    }

    fn expression(&mut self, event: &Event) -> bool {
        let Some(compiled) = &self.expression else {
            return true;
        };
        let Some(data) = &event.data else {
            self.without_bytes += 1;
            return false;
        };
        runs(compiled, data)
    }
}

/// A function filter, anchored to the whole name.
fn function(text: Option<&str>) -> Result<Option<Regex>> {
    let compile = |text: &str| {
        // Checked alone first: wrapped, an unbalanced pattern could pass.
        let regex = Regex::new(text).and_then(|_| Regex::new(&format!("^(?:{text})$")));
        regex.map_err(|e| usage(format!("--filter-func {text}: {e}")))
    };
    text.map(compile).transpose()
}

/// An expression over recorded bytes: with an Ethernet header, or from the IP header on.
fn runs(compiled: &Compiled, data: &Data) -> bool {
    if !data.ethernet {
        let l3 = compiled.l3.as_ref();
        return l3.is_ok_and(|program| program.run(&data.bytes, data.len) != 0);
    }
    // A tag beside the packet is put where it was on the wire.
    let frame = Frame::of(data, data.bytes.len());
    compiled.l2.run(&frame.bytes, frame.len) != 0
}

/// An address is in a prefix: both as 16 bytes, IPv4 as ::ffff:a.b.c.d.
fn within(addr: IpAddr, prefix: [u64; 2], mask: [u64; 2]) -> bool {
    let bytes = match addr {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    };
    let word = |at: usize| u64::from_ne_bytes(std::array::from_fn(|i| bytes[at + i]));
    [word(0), word(8)]
        .iter()
        .zip(prefix)
        .zip(mask)
        .all(|((word, prefix), mask)| word & mask == prefix)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tools::fields::PacketFieldArgs;

    #[test]
    fn addresses_in_prefixes() {
        let filter = |text: &str| {
            let args = FilterArgs {
                packet: PacketFieldArgs {
                    filter_src_ip: Some(text.to_owned()),
                    ..PacketFieldArgs::default()
                },
                ..FilterArgs::default()
            };
            Filter::new(&args).unwrap().config
        };
        for (text, addr, is_in) in [
            ("10.0.0.0/8", "10.1.2.3", true),
            ("10.0.0.0/8", "11.1.2.3", false),
            ("10.1.2.3", "10.1.2.3", true),
            ("2001:db8::/32", "2001:db8::1", true),
            ("2001:db8::/32", "10.1.2.3", false),
        ] {
            let c = filter(text);
            let addr = addr.parse().unwrap();
            assert_eq!(within(addr, c.saddr, c.saddr_mask), is_in, "{text} {addr}");
        }
    }

    #[test]
    fn expressions_over_recorded_bytes() {
        let compiled = Compiled::new("icmp").unwrap();
        let mut ip = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, 1];
        ip.resize(28, 0);
        let mut data = Data {
            len: 28,
            ethernet: false,
            hatype: 1,
            vlan: None,
            bytes: ip.clone(),
        };
        assert!(runs(&compiled, &data));
        data.ethernet = true;
        data.bytes = [&[2; 12][..], &[8, 0], &ip].concat();
        assert!(runs(&compiled, &data));
        let tagged = Compiled::new("vlan 5 and icmp").unwrap();
        assert!(!runs(&tagged, &data));
        data.vlan = Some((0x8100, 5));
        assert!(runs(&tagged, &data));
    }
}
