//! What IP and the devices below it say: routes, neighbours, sizes, sysctls, queue disciplines, addresses of frames.

use std::net::IpAddr;
use std::process::Command;

use crate::event::packet::{Ip, Mac, Net};
use crate::kernel::{program, routing, sockets, xdp};
use crate::text::escape::escaped;

use super::{Case, Proof};

/// NUD_*, include/uapi/linux/neighbour.h
const STATES: [(u16, &str); 8] = [
    (0x01, "INCOMPLETE"),
    (0x02, "REACHABLE"),
    (0x04, "STALE"),
    (0x08, "DELAY"),
    (0x10, "PROBE"),
    (0x20, "FAILED"),
    (0x40, "NOARP"),
    (0x80, "PERMANENT"),
];

pub fn addresses(case: &Case<'_>) -> Option<(IpAddr, IpAddr)> {
    let tuple = case.dropped.and_then(|d| d.tuple).or(case.leg.tuple)?;
    Some((tuple.saddr, tuple.daddr))
}

fn header<'a>(case: &'a Case<'_>) -> Option<&'a Ip> {
    let frame = case.dropped.and_then(|d| d.frame.as_ref());
    match &frame.or(case.journey.frame.as_ref())?.net {
        Net::Ip(ip) => Some(ip),
        _ => None,
    }
}

/// The packet came in by a device.
fn is_received(case: &Case<'_>) -> bool {
    case.leg
        .stage
        .is_none_or(|s| s.way != Some(super::super::stages::Way::Out))
}

/// `dev veth0 via 10.0.0.1 src 10.0.0.2 table 254`, or why there is none.
fn answer(case: &Case<'_>, to: IpAddr, from: Option<IpAddr>, iif: u32) -> Option<String> {
    let asked = case.inside(|| -> anyhow::Result<_> {
        let route = routing::route(to, from, iif)?;
        let name = match &route {
            Ok(route) => routing::device(route.oif)?.map(|d| d.name),
            Err(_) => None,
        };
        Ok((route, name))
    });
    Some(match asked?.ok()? {
        (Err(errno), _) => format!("{} ({errno:?})", errno.desc()),
        (Ok(route), name) => {
            let mut text = match route.kind {
                2 => "local ".to_owned(),
                6 => "blackhole ".to_owned(),
                7 => "unreachable ".to_owned(),
                8 => "prohibit ".to_owned(),
                _ => String::new(),
            };
            if let Some(name) = name {
                text += &format!("dev {} ", escaped(name.as_bytes()));
            }
            if let Some(gateway) = route.gateway {
                text += &format!("via {gateway} ");
            }
            if let Some(source) = route.source {
                text += &format!("src {source} ");
            }
            text + &format!("table {}", table(route.table))
        }
    })
}

fn table(number: u32) -> String {
    match number {
        253 => "default".to_owned(),
        254 => "main".to_owned(),
        255 => "local".to_owned(),
        n => n.to_string(),
    }
}

pub fn route(case: &Case<'_>) -> Vec<Proof> {
    let Some((from, to)) = addresses(case) else {
        return Vec::new();
    };
    let device = case.device();
    let (from, iif) = match is_received(case) {
        true => (Some(from), case.ifindex()),
        false => (None, 0),
    };
    let Some(answer) = answer(case, to, from, iif) else {
        return Vec::new();
    };
    let mut asked = format!("ip route get {to}");
    if let Some(from) = from {
        asked += &format!(" from {from} iif {device}");
    }
    vec![Proof::now("route", format!("{asked}: {answer}")).with("answer", answer)]
}

pub fn route_back(case: &Case<'_>) -> Vec<Proof> {
    let Some((from, _)) = addresses(case) else {
        return Vec::new();
    };
    let Some(answer) = answer(case, from, None, 0) else {
        return Vec::new();
    };
    let text = format!(
        "it came in by {}; the way back to {from}: {answer}",
        case.device()
    );
    vec![Proof::now("route-back", text).with("answer", answer)]
}

pub fn rp_filter(case: &Case<'_>) -> Vec<Proof> {
    let device = case.device();
    let get = |name: &str| case.sysctl(&format!("net/ipv4/conf/{name}/rp_filter"));
    let (Some(all), Some(own)) = (get("all"), get(&device)) else {
        return Vec::new();
    };
    let text = format!(
        "net.ipv4.conf.all.rp_filter = {all}, net.ipv4.conf.{device}.rp_filter = {own} (the larger one counts)"
    );
    let mut proof = Proof::now("rp-filter", text)
        .with("all", all)
        .with("device", own);
    proof.change = Some(format!(
        "a route back by {device}, or sysctl -w net.ipv4.conf.{device}.rp_filter=2 (loose; .all must not be 1)"
    ));
    vec![proof]
}

pub fn forwarding(case: &Case<'_>) -> Vec<Proof> {
    let device = case.device();
    let v6 = addresses(case).is_some_and(|(_, to)| to.is_ipv6());
    let family = if v6 { "ipv6" } else { "ipv4" };
    let Some(value) = case.sysctl(&format!("net/{family}/conf/{device}/forwarding")) else {
        return Vec::new();
    };
    let name = format!("net.{family}.conf.{device}.forwarding");
    let mut proof =
        Proof::now("forwarding", format!("{name} = {value}")).with("value", value.clone());
    if value == "0" {
        proof.text += ": this host does not forward what comes in by it";
        proof.change = Some(format!("sysctl -w {name}=1"));
    }
    vec![proof]
}

pub fn ipv6_disabled(case: &Case<'_>) -> Vec<Proof> {
    let name = format!("net.ipv6.conf.{}.disable_ipv6", case.device());
    let value = case.sysctl(&format!("net/ipv6/conf/{}/disable_ipv6", case.device()));
    let proof = value.map(|value| {
        let mut proof =
            Proof::now("ipv6-disabled", format!("{name} = {value}")).with("value", value);
        proof.change = Some(format!("sysctl -w {name}=0"));
        proof
    });
    proof.into_iter().collect()
}

pub fn martian(case: &Case<'_>) -> Vec<Proof> {
    let Some((from, to)) = addresses(case) else {
        return Vec::new();
    };
    let device = case.device();
    let mut text = format!("{from} > {to} came in by {device}");
    for (wrong, name) in [(from, "source"), (to, "destination")] {
        if wrong.is_loopback() {
            text += &format!("; its {name} is a loopback address");
        }
    }
    if to.is_loopback() {
        let value = case.sysctl(&format!("net/ipv4/conf/{device}/route_localnet"));
        let value = value.unwrap_or_default();
        text += &format!("; net.ipv4.conf.{device}.route_localnet = {value}");
    }
    if let Some(local) = answer(case, from, None, 0).filter(|a| a.starts_with("local")) {
        text += &format!("; {from} here: {local}");
    }
    vec![Proof::now("martian", text)]
}

pub fn neighbour(case: &Case<'_>) -> Vec<Proof> {
    let Some((_, to)) = addresses(case) else {
        return Vec::new();
    };
    let facts = case
        .dropped
        .and_then(|d| d.facts.as_ref())
        .or(case.leg.facts.as_ref());
    let hop = facts.and_then(|f| f.route.as_ref()?.gateway).unwrap_or(to);
    let Some(Ok(found)) = case.inside(|| routing::neighbours(hop)) else {
        return Vec::new();
    };
    let Some(entry) = found.first() else {
        return vec![Proof::now("neighbour", format!("{hop}: there is no entry"))];
    };
    let state = STATES.iter().find(|(bit, _)| entry.state & bit != 0);
    let state = state.map_or("NONE", |(_, name)| name);
    let mac = entry
        .mac
        .map_or("no MAC address".to_owned(), |m| Mac(m).to_string());
    let text = format!("{hop} dev {}: {state}, {mac}", case.device());
    vec![
        Proof::now("neighbour", text)
            .with("state", state)
            .with("next_hop", hop.to_string()),
    ]
}

pub fn mtu(case: &Case<'_>) -> Vec<Proof> {
    let facts = case
        .dropped
        .and_then(|d| d.facts.as_ref())
        .or(case.leg.facts.as_ref());
    let route = facts.and_then(|f| f.route.as_ref());
    let Some(ip) = header(case) else {
        return Vec::new();
    };
    let mut text = format!("the packet has {} bytes", ip.len);
    if ip.src.is_ipv4() {
        text += if ip.dont_fragment {
            " and DF"
        } else {
            " and no DF"
        };
    }
    let mut proof = Proof::then("mtu", text)
        .with("length", ip.len as u32)
        .with("df", ip.dont_fragment);
    if let Some(route) = route {
        let device = escaped(&route.ifname);
        proof.text += &format!("; the MTU of {device} is {}", route.mtu);
        proof = proof.with("mtu", route.mtu).with("device", device);
    }
    vec![proof]
}

pub fn ttl(case: &Case<'_>) -> Vec<Proof> {
    let proof = header(case).map(|ip| {
        Proof::then(
            "ttl",
            format!("it came in with a TTL (hop limit) of {}", ip.ttl),
        )
        .with("ttl", u32::from(ip.ttl))
    });
    proof.into_iter().collect()
}

pub fn qdisc(case: &Case<'_>) -> Vec<Proof> {
    let (device, ifindex) = (case.device(), case.ifindex());
    let Some(Ok(all)) = case.inside(|| routing::qdiscs(ifindex)) else {
        return Vec::new();
    };
    let one = |q: &routing::Qdisc| {
        let text = format!(
            "qdisc {} {:x}: of {device}: {} dropped, {} over limits, {} packets and {} bytes queued",
            escaped(q.kind.as_bytes()),
            q.handle >> 16,
            q.dropped,
            q.overlimits,
            q.queued,
            q.backlog
        );
        Proof::now("qdisc", text)
            .with("kind", q.kind.clone())
            .with("dropped", q.dropped)
            .with("queued", q.queued)
    };
    all.iter().map(one).collect()
}

pub fn device(case: &Case<'_>) -> Vec<Proof> {
    let Some(Ok(Some(device))) = case.inside(|| routing::device(case.ifindex())) else {
        return Vec::new();
    };
    let flag = |bit: i32| device.flags & bit as u32 != 0;
    let up = if flag(libc::IFF_UP) { "up" } else { "down" };
    let carrier = if flag(libc::IFF_RUNNING) {
        "has"
    } else {
        "has no"
    };
    let name = escaped(device.name.as_bytes());
    let mut proof = Proof::now("device", format!("{name} is {up} and {carrier} carrier"))
        .with("up", up == "up");
    if up == "down" {
        proof.change = Some(format!("ip link set dev {name} up"));
    }
    vec![proof]
}

/// What the IP header says of the packet's length, and what came.
pub fn length(case: &Case<'_>) -> Vec<Proof> {
    let cut = case.dropped.and_then(|d| d.header.cut);
    let proof = cut.map(|(says, has)| {
        let text = format!("its IP header says {says} bytes, {has} came");
        Proof::then("length", text)
            .with("header", says as u32)
            .with("bytes", has as u32)
    });
    proof.into_iter().collect()
}

/// The packet's protocol, and raw sockets that take it.
pub fn protocol(case: &Case<'_>) -> Vec<Proof> {
    let Some(ip) = header(case) else {
        return Vec::new();
    };
    let (protocol, v6) = (ip.protocol, ip.src.is_ipv6());
    let text = format!("it has the IP protocol {protocol}");
    let mut proofs = vec![Proof::then("protocol", text).with("protocol", u32::from(protocol))];
    let file = if v6 { "raw6" } else { "raw" };
    // The local port of a raw socket is its protocol.
    let count = case.inside(|| {
        let all = sockets::of(file, protocol);
        let takes = |s: &&sockets::Socket| s.local.1 == u16::from(protocol);
        all.iter().filter(takes).count()
    });
    if let Some(count) = count {
        let text = format!("{count} raw sockets take it in this namespace");
        proofs.push(Proof::now("raw-sockets", text).with("count", count as u32));
    }
    proofs
}

/// The fragment that waited, and how long it may.
pub fn fragments(case: &Case<'_>) -> Vec<Proof> {
    let mut proofs = Vec::new();
    let own = header(case).filter(|ip| ip.more_fragments || ip.offset != 0);
    if let Some(ip) = own {
        let more = if ip.more_fragments {
            "more follow"
        } else {
            "it is the last"
        };
        let text = format!(
            "the fragment begins at byte {} of packet id {}; {more}",
            ip.offset, ip.id
        );
        proofs.push(
            Proof::then("fragment", text)
                .with("offset", ip.offset)
                .with("id", ip.id)
                .with("more", ip.more_fragments),
        );
    }
    let v6 = addresses(case).is_some_and(|(from, _)| from.is_ipv6());
    let name = if v6 {
        "ipv6/ip6frag_time"
    } else {
        "ipv4/ipfrag_time"
    };
    if let Some(seconds) = case.sysctl(&format!("net/{name}")) {
        let text = format!("net.{} = {seconds} s", name.replace('/', "."));
        proofs.push(Proof::now("fragment-time", text).with("seconds", seconds));
    }
    proofs
}

pub fn checksum(case: &Case<'_>) -> Vec<Proof> {
    let summed = case
        .dropped
        .and_then(|d| d.facts.as_ref())
        .map(|f| f.ip_summed);
    // CHECKSUM_NONE and so on, include/linux/skbuff.h
    let text = match summed {
        Some(0) => "the device has not looked at the checksum, this kernel has",
        Some(1) => "the device calls a checksum right",
        Some(2) => "the device has summed the bytes, this kernel compared",
        Some(3) => "the sender left the checksum to a device (offload), which did not compute it",
        _ => return Vec::new(),
    };
    vec![Proof::then(
        "checksum",
        format!("{} at {}", text, case.device()),
    )]
}

pub fn xdp_of_device(case: &Case<'_>) -> Vec<Proof> {
    let Some(Ok(Some(device))) = case.inside(|| routing::device(case.ifindex())) else {
        return Vec::new();
    };
    let name = escaped(device.name.as_bytes());
    let (ifindex, attached) = (case.ifindex(), xdp_program);
    let Some(Some((id, mode, program))) = case.inside(|| attached(ifindex)) else {
        return Vec::new();
    };
    let program = program.map_or(String::new(), |p| format!(" {}", escaped(p.as_bytes())));
    let text = format!("{name} has the XDP program{program} (id {id}), attached as {mode}");
    let mut proof = Proof::now("xdp", text)
        .with("program", id)
        .with("name", program.trim().to_owned())
        .with("attached", mode);
    proof.change = Some(format!(
        "bpftool prog show id {id}; ip link set dev {name} xdp off removes it"
    ));
    vec![proof]
}

/// A device's XDP program: its id, how it is attached, its name.
fn xdp_program(ifindex: u32) -> Option<(u32, &'static str, Option<String>)> {
    let attached = xdp::query(ifindex).ok()??;
    let name = program::open(attached.program);
    let name = name.ok().flatten().map(|p| p.info.name.clone());
    Some((attached.program, attached.mode.name(), name))
}

pub fn tc(case: &Case<'_>) -> Vec<Proof> {
    let device = case.device();
    let dropped = case.dropped;
    let reason = dropped.map_or("", |d| &d.reason);
    let place = dropped.map_or("", |d| &d.place.function);
    let out = case.leg.stage.and_then(|s| s.way) == Some(super::super::stages::Way::Out);
    let side = match (reason, place) {
        ("TC_EGRESS", _) | (_, "__dev_queue_xmit" | "sch_handle_egress") => "egress",
        ("TC_INGRESS", _) => "ingress",
        _ if out => "egress",
        _ => "ingress",
    };
    let mut command = Command::new("tc");
    command.args(["filter", "show", "dev", &device, side]);
    let Some(Ok(output)) = case.inside(|| command.output()) else {
        return Vec::new();
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let lines = text.lines().filter(|l| !l.trim().is_empty()).take(4);
    lines
        .map(|line| {
            Proof::now(
                "tc",
                format!("{device} {side}: {}", escaped(line.trim().as_bytes())),
            )
        })
        .collect()
}
