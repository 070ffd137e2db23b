//! The field filters that tools share: flags in, `struct np_config` (src/bpf/common/config.h) out.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;

use crate::bpf::skb::types::{np_config, np_config_version, np_field};
use crate::event::tuple::{PROTOCOLS, address_bytes};
use crate::kernel::netns::Netns;
use crate::usage::usage;

/// Of `struct np_config`.
pub const VERSION: u32 = np_config_version::NP_CONFIG_VERSION.0;
/// NP_FIELD_*
pub const MARK: u32 = np_field::NP_FIELD_MARK.0;
pub const NETNS: u32 = np_field::NP_FIELD_NETNS.0;
pub const IFINDEX: u32 = np_field::NP_FIELD_IFINDEX.0;
pub const PROTO: u32 = np_field::NP_FIELD_PROTO.0;
pub const SADDR: u32 = np_field::NP_FIELD_SADDR.0;
pub const DADDR: u32 = np_field::NP_FIELD_DADDR.0;
pub const SPORT: u32 = np_field::NP_FIELD_SPORT.0;
pub const DPORT: u32 = np_field::NP_FIELD_DPORT.0;
/// NP_FIELDS_PACKET: those that a translation of addresses may change, or that stand beside them
pub const PACKET: u32 = PROTO | SADDR | DADDR | SPORT | DPORT;

/// Filters by field, decided in the kernel. All that are given must hold.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Filter (all must hold; decided in the kernel)")]
pub struct FieldArgs {
    #[command(flatten)]
    pub packet: PacketFieldArgs,

    /// In this network namespace: a path such as /proc/PID/ns/net, a name under /run/netns, or inode:N
    #[arg(long, value_name = "NETNS")]
    pub filter_netns: Option<String>,

    /// On this interface, in the namespace of --filter-netns or the current one
    #[arg(long, value_name = "NAME")]
    pub filter_ifname: Option<String>,
}

/// Those that a packet has by itself. Their heading is that of the struct which they are part of.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct PacketFieldArgs {
    /// skb->mark is MARK, decimal or 0x…; with a mask: (mark & MASK) == MARK
    #[arg(long, value_name = "MARK[/MASK]")]
    pub filter_mark: Option<String>,

    /// Protocol above IP: tcp, udp, icmp, icmp6, sctp, … or a number
    #[arg(long, value_name = "PROTO")]
    pub filter_proto: Option<String>,

    /// Source address, IPv4 or IPv6, with an optional prefix length
    #[arg(long, value_name = "ADDR[/LEN]")]
    pub filter_src_ip: Option<String>,

    /// Destination address, IPv4 or IPv6, with an optional prefix length
    #[arg(long, value_name = "ADDR[/LEN]")]
    pub filter_dst_ip: Option<String>,

    /// Source port
    #[arg(long, value_name = "PORT")]
    pub filter_src_port: Option<u16>,

    /// Destination port
    #[arg(long, value_name = "PORT")]
    pub filter_dst_port: Option<u16>,
}

impl FieldArgs {
    /// No filter is given.
    pub fn is_empty(&self) -> bool {
        self.packet.is_empty() && self.filter_netns.is_none() && self.filter_ifname.is_none()
    }

    /// The value of the config map. Looks up namespaces and interfaces.
    pub fn config(&self) -> Result<np_config> {
        let mut c = np_config {
            version: VERSION,
            ..np_config::default()
        };
        self.packet.set(&mut c)?;
        let netns = match &self.filter_netns {
            Some(text) => Some(Netns::parse(text)?),
            None => None,
        };
        if let Some(name) = &self.filter_ifname {
            // An index means something only within its namespace.
            let netns = match &netns {
                Some(n) => n.clone(),
                None => Netns::current()?,
            };
            c.ifindex = netns.ifindex(name)?;
            c.netns = netns.inode;
            c.fields |= IFINDEX | NETNS;
        }
        if let Some(netns) = &netns {
            c.netns = netns.inode;
            c.fields |= NETNS;
        }
        Ok(c)
    }
}

impl PacketFieldArgs {
    fn is_empty(&self) -> bool {
        self.filter_mark.is_none()
            && self.filter_proto.is_none()
            && self.filter_src_ip.is_none()
            && self.filter_dst_ip.is_none()
            && self.filter_src_port.is_none()
            && self.filter_dst_port.is_none()
    }

    fn set(&self, c: &mut np_config) -> Result<()> {
        if let Some(text) = &self.filter_mark {
            set_mark(c, text)?;
        }
        if let Some(text) = &self.filter_proto {
            set_proto(c, text)?;
        }
        if let Some(text) = &self.filter_src_ip {
            set_saddr(c, text)?;
        }
        if let Some(text) = &self.filter_dst_ip {
            set_daddr(c, text)?;
        }
        if let Some(port) = self.filter_src_port {
            c.sport = port;
            c.fields |= SPORT;
        }
        if let Some(port) = self.filter_dst_port {
            c.dport = port;
            c.fields |= DPORT;
        }
        Ok(())
    }
}

/// `MARK[/MASK]`, each decimal or 0x….
pub fn set_mark(c: &mut np_config, text: &str) -> Result<()> {
    let number = |s: &str| {
        match s.strip_prefix("0x").or_else(|| s.strip_prefix("0X")) {
            Some(hex) => u32::from_str_radix(hex, 16),
            None => s.parse::<u32>(),
        }
        .map_err(|_| {
            usage(format!(
                "mark {text}: {s:?} is no 32-bit number; give MARK or MARK/MASK, decimal or 0x…"
            ))
        })
    };
    let (mark, mask) = match text.split_once('/') {
        Some((mark, mask)) => (number(mark)?, number(mask)?),
        None => (number(text)?, u32::MAX),
    };
    if mark & !mask != 0 {
        return Err(usage(format!(
            "mark {text}: the mark has bits outside of its mask, nothing would match"
        )));
    }
    (c.mark, c.mark_mask) = (mark, mask);
    c.fields |= MARK;
    Ok(())
}

/// A protocol's name or number.
pub fn set_proto(c: &mut np_config, text: &str) -> Result<()> {
    let lower = text.to_ascii_lowercase();
    let known = PROTOCOLS
        .iter()
        .find(|(name, _)| *name == lower || lower == "icmpv6" && *name == "icmp6");
    c.l4_proto = match (known, lower.parse::<u8>()) {
        (Some(&(_, n)), _) | (None, Ok(n)) => n,
        (None, Err(_)) => {
            let names: Vec<&str> = PROTOCOLS.iter().map(|(n, _)| *n).collect();
            return Err(usage(format!(
                "unknown protocol {text}: give one of {} or a number up to 255",
                names.join(", ")
            )));
        }
    };
    c.fields |= PROTO;
    Ok(())
}

/// Source address or prefix.
pub fn set_saddr(c: &mut np_config, text: &str) -> Result<()> {
    (c.saddr, c.saddr_mask) = prefix(text)?;
    c.fields |= SADDR;
    Ok(())
}

/// Destination address or prefix.
pub fn set_daddr(c: &mut np_config, text: &str) -> Result<()> {
    (c.daddr, c.daddr_mask) = prefix(text)?;
    c.fields |= DADDR;
    Ok(())
}

/// `ADDR[/LEN]` as (address & mask, mask), 16 bytes in network order, IPv4 as ::ffff:a.b.c.d.
fn prefix(text: &str) -> Result<([u64; 2], [u64; 2])> {
    let bad = |what: &str| {
        usage(format!(
            "address {text}: {what}; give an IPv4 or IPv6 address, with /LEN for a network"
        ))
    };
    let (addr, len) = match text.split_once('/') {
        Some((a, l)) => (a, Some(l)),
        None => (text, None),
    };
    let addr: IpAddr = addr.parse().map_err(|_| bad("not an IP address"))?;
    let (bits, width) = match addr {
        IpAddr::V4(a) => (u128::from(a.to_ipv6_mapped()), 32),
        IpAddr::V6(a) => (u128::from(a), 128),
    };
    let len = match len {
        Some(l) => l
            .parse::<u32>()
            .ok()
            .filter(|l| *l <= width)
            .ok_or_else(|| bad(&format!("the prefix length must be 0 to {width}")))?,
        None => width,
    };
    // An IPv4 prefix counts behind the 96 bits of ::ffff:0:0.
    let len = len + 128 - width;
    let mask = u128::MAX.checked_shl(128 - len).unwrap_or(0);
    Ok((words(bits & mask), words(mask)))
}

/// `ADDR[/LEN]` as a prefix length of 128 and an address in network order, IPv4 as ::ffff:a.b.c.d: the key of an LPM trie.
pub fn prefix_bits(text: &str) -> Result<(u32, [u8; 16])> {
    let (addr, mask) = prefix(text)?;
    let len = mask[0].count_ones() + mask[1].count_ones();
    Ok((len, address_bytes(addr)))
}

/// Two words as they stand in memory for 16 bytes in network order.
fn words(v: u128) -> [u64; 2] {
    let b = v.to_be_bytes();
    let word = |i: usize| u64::from_ne_bytes(std::array::from_fn(|k| b[i + k]));
    [word(0), word(8)]
}

/// An address and prefix length as [`prefix`] was given them.
pub fn show_prefix(addr: [u64; 2], mask: [u64; 2]) -> String {
    let bytes = |words| u128::from_be_bytes(address_bytes(words));
    let len = bytes(mask).leading_ones();
    let v6 = Ipv6Addr::from(bytes(addr));
    match v6.to_ipv4_mapped().filter(|_| len >= 96) {
        Some(v4) => show_with_len::<Ipv4Addr>(v4, len - 96, 32),
        None => show_with_len(v6, len, 128),
    }
}

fn show_with_len<A: std::fmt::Display>(addr: A, len: u32, width: u32) -> String {
    if len == width {
        addr.to_string()
    } else {
        format!("{addr}/{len}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::usage::UsageError;

    fn config(args: FieldArgs) -> Result<np_config> {
        args.config()
    }

    #[test]
    fn marks() {
        let mut c = np_config::default();
        set_mark(&mut c, "0x10/0xf0").unwrap();
        assert_eq!((c.mark, c.mark_mask, c.fields), (0x10, 0xf0, MARK));
        set_mark(&mut c, "7").unwrap();
        assert_eq!((c.mark, c.mark_mask), (7, u32::MAX));
        for bad in ["", "x", "1/", "0x1ffffffff", "-1", "1/0", "3/1/1"] {
            let e = set_mark(&mut c, bad).unwrap_err();
            assert!(e.is::<UsageError>() && e.to_string().contains(bad), "{bad}");
        }
    }

    #[test]
    fn addresses_and_prefixes() {
        for (text, shown) in [
            ("10.1.2.3", "10.1.2.3"),
            ("10.1.2.3/8", "10.0.0.0/8"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("2001:db8::1", "2001:db8::1"),
            ("2001:db8::1/32", "2001:db8::/32"),
            ("::/0", "::/0"),
        ] {
            let (addr, mask) = prefix(text).unwrap();
            assert_eq!(show_prefix(addr, mask), shown, "{text}");
        }
        for bad in ["10.1.2", "10.1.2.3/33", "::1/129", "host", "1.2.3.4/x", ""] {
            let e = prefix(bad).unwrap_err();
            assert!(e.is::<UsageError>() && e.to_string().contains(bad), "{bad}");
        }
    }

    #[test]
    fn memory_order_is_network_order() {
        let (addr, _) = prefix("1.2.3.4").unwrap();
        assert_eq!(addr[0], 0);
        assert_eq!(addr[1].to_ne_bytes(), [0, 0, 0xff, 0xff, 1, 2, 3, 4]);
    }

    #[test]
    fn protocols() {
        let mut c = np_config::default();
        for (text, n) in [("TCP", 6), ("icmp6", 58), ("icmpv6", 58), ("89", 89)] {
            set_proto(&mut c, text).unwrap();
            assert_eq!(c.l4_proto, n);
        }
        assert!(set_proto(&mut c, "256").unwrap_err().is::<UsageError>());
        assert!(
            set_proto(&mut c, "tcpp")
                .unwrap_err()
                .to_string()
                .contains("tcpp")
        );
    }

    #[test]
    fn an_interface_brings_its_namespace() {
        let c = config(FieldArgs {
            filter_ifname: Some("lo".into()),
            ..FieldArgs::default()
        })
        .unwrap();
        assert_eq!(c.fields, IFINDEX | NETNS);
        assert_eq!(c.ifindex, 1);
        let e = config(FieldArgs {
            filter_ifname: Some("nope0".into()),
            ..FieldArgs::default()
        })
        .unwrap_err();
        assert!(e.to_string().contains("nope0") && e.to_string().contains("lo"));
    }
}
