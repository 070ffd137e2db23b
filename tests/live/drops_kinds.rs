//! Kinds of loss, each of exactly so many packets, and books that balance: all kinds of a group in one run of netprobe, each in namespaces
//! of its own.

use std::net::{SocketAddr, UdpSocket};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::common::{Case, Env, Netprobe, Pair, case, refuse_all, send_frame, wait_for};

pub fn cases() -> Vec<Case> {
    vec![
        case("drops_kinds_of_sockets", || run(&SOCKETS))
            .old_and_new()
            .trace(),
        case("drops_kinds_of_headers", || run(&HEADERS))
            .once_on("newest")
            .trace()
            .when(no_reasons),
        case("drops_kinds_of_routes", || run(&ROUTES))
            .once_on("newest")
            .trace()
            .when(no_reasons),
        case("drops_kinds_of_rules", || run(&RULES))
            .trace()
            .program("nft")
            .program("tc"),
    ]
}

fn no_reasons(env: &Env) -> Option<String> {
    (env.kernel < (5, 17)).then(|| "this kernel gives no reasons for drops".to_owned())
}

/// Where the loss happens.
#[derive(Clone, Copy, PartialEq)]
enum At {
    Client,
    Server,
}
use At::{Client, Server};

/// One kind of loss.
struct Kind {
    name: &'static str,
    class: &'static str,
    /// of which packets are lost
    at: At,
    prepare: fn(&Pair) -> Result<()>,
    /// loses so many packets
    lose: fn(&Pair, u64) -> Result<()>,
}

const fn kind(
    name: &'static str,
    class: &'static str,
    at: At,
    prepare: fn(&Pair) -> Result<()>,
    lose: fn(&Pair, u64) -> Result<()>,
) -> Kind {
    Kind {
        name,
        class,
        at,
        prepare,
        lose,
    }
}

static SOCKETS: [Kind; 4] = [
    kind("no UDP socket", "socket", Server, nothing, |net, n| {
        udp(net, net.server.v4(7), n)
    }),
    kind(
        "no UDP socket, IPv6",
        "socket",
        Server,
        nothing,
        |net, n| udp(net, net.server.v6(7), n),
    ),
    kind(
        "filter of a socket",
        "policy",
        Server,
        nothing,
        socket_filter,
    ),
    kind("receive buffer", "queue", Server, nothing, receive_buffer),
];

static HEADERS: [Kind; 8] = [
    kind("IP checksum", "checksum", Server, nothing, |net, n| {
        frames(net, n, |ip| ip.header[10] ^= 1)
    }),
    kind("IP version", "header", Server, nothing, |net, n| {
        frames(net, n, |ip| ip.header[0] = 0x65)
    }),
    kind("UDP checksum", "checksum", Server, nothing, |net, n| {
        frames(net, n, |ip| ip.payload[6..8].copy_from_slice(&[0xde, 0xad]))
    }),
    kind("ICMP checksum", "checksum", Server, nothing, |net, n| {
        frames(net, n, |ip| {
            ip.protocol(1);
            ip.payload = [8, 0, 1, 1, 0, 1, 0, 1].to_vec();
        })
    }),
    kind("TCP checksum", "checksum", Server, nothing, |net, n| {
        let listener = net.server.tcp_listen(net.server.v4(7))?;
        let result = frames(net, n, |ip| {
            ip.protocol(6);
            ip.payload = tcp_syn(7);
        });
        drop(listener);
        result
    }),
    kind("unknown protocol", "socket", Server, nothing, |net, n| {
        frames(net, n, |ip| ip.protocol(253))
    }),
    kind("another MAC address", "link", Server, nothing, |net, n| {
        frames(net, n, |ip| ip.to_mac = [2, 0, 0, 0, 0, 0x77])
    }),
    kind("cut header", "header", Server, nothing, |net, n| {
        frames(net, n, |ip| ip.total_length = 200)
    }),
];

static ROUTES: [Kind; 8] = [
    kind("no route", "route", Server, forward, |net, n| {
        udp(net, "10.98.0.9:9".parse()?, n)
    }),
    kind("not forwarding", "route", Server, way_there, |net, n| {
        udp(net, "10.98.0.9:9".parse()?, n)
    }),
    kind("reverse path", "route", Server, strict, |net, n| {
        udp_by(net, "10.99.0.1:0", net.server.v4(9), n, |_| Ok(()))
    }),
    kind("TTL used up", "route", Server, on_to_dummy, |net, n| {
        udp_by(net, "0.0.0.0:0", "10.98.0.9:9".parse()?, n, |socket| {
            Ok(socket.set_ttl(1)?)
        })
    }),
    kind("MTU", "mtu", Server, small_mtu, |net, n| {
        frames(net, n, |ip| {
            ip.header[6] = 0x40;
            ip.header[16..20].copy_from_slice(&[10, 98, 0, 9]);
            ip.payload.resize(1000, 0);
        })
    }),
    kind("IPv6 switched off", "route", Server, no_ipv6, |net, n| {
        udp(net, net.server.v6(9), n)
    }),
    kind(
        "neighbour",
        "neighbour",
        Client,
        quick_neighbours,
        |net, _| {
            // The kernel keeps more than these while it asks for the address.
            udp(net, "10.77.0.77:9".parse()?, NEIGHBOUR)
        },
    ),
    kind("martian source", "route", Server, nothing, |net, n| {
        frames(net, n, |ip| {
            ip.header[12..16].copy_from_slice(&[224, 0, 0, 9])
        })
    }),
];

static RULES: [Kind; 7] = [
    kind("nft at input", "firewall", Server, nft_input, |net, n| {
        udp(net, net.server.v4(7), n)
    }),
    kind("nft at output", "firewall", Client, nft_output, |net, n| {
        udp(net, net.server.v4(7), n)
    }),
    kind(
        "nft at ingress",
        "firewall",
        Server,
        nft_ingress,
        |net, n| udp(net, net.server.v4(7), n),
    ),
    kind(
        "qdisc that is full",
        "qdisc",
        Client,
        full_qdisc,
        |net, n| udp(net, net.server.v4(7), n),
    ),
    kind("netem", "qdisc", Client, netem, |net, n| {
        udp(net, net.server.v4(7), n)
    }),
    kind("tc at ingress", "tc", Server, tc_ingress, |net, n| {
        udp(net, net.server.v4(7), n)
    }),
    kind("tc at egress", "tc", Client, tc_egress, |net, n| {
        udp(net, net.server.v4(7), n)
    }),
];

/// Packets that wait for a neighbour's address.
const NEIGHBOUR: u64 = 5;

fn nothing(_: &Pair) -> Result<()> {
    Ok(())
}

fn run(kinds: &[Kind]) -> Result<()> {
    let mut pairs = Vec::new();
    for kind in kinds {
        let net = Pair::new()?;
        net.fix_neighbours()?;
        (kind.prepare)(&net).with_context(|| kind.name)?;
        pairs.push(net);
    }
    let run = Netprobe::new("drops")
        .args(["--output-json", "--all", "-i", "3600"])
        .start()?;
    let mut wants = Vec::new();
    for (i, (kind, net)) in kinds.iter().zip(&pairs).enumerate() {
        let want = match kind.class {
            "neighbour" => NEIGHBOUR,
            _ => 20 + i as u64,
        };
        (kind.lose)(net, want).with_context(|| kind.name)?;
        wants.push(want);
    }
    if let Some(at) = kinds.iter().position(|k| k.class == "neighbour") {
        neighbour_failed(&pairs[at])?;
    }
    let done = run.stop()?;
    done.expect_success()?;
    let lines = done.json()?;
    let mut wrong = Vec::new();
    for ((kind, net), mut want) in kinds.iter().zip(&pairs).zip(wants) {
        let inode = match kind.at {
            Client => net.client.inode()?,
            Server => net.server.inode()?,
        };
        if kind.class == "queue" {
            want = counter(net, "RcvbufErrors")?;
        }
        let here = |line: &&Value| line["netns"] == inode;
        let lost = lines.iter().filter(here).filter(|l| l["type"] == "drops");
        let lost: Vec<&Value> = lost.filter(|l| l["class"] != "expected").collect();
        let found: u64 = lost.iter().filter_map(|l| l["packets"].as_u64()).sum();
        let is_it = lost.iter().all(|l| l["class"] == kind.class || is_vague(l));
        let odd = |l: &&Value| l["type"] == "unexplained" || l["type"] == "uncounted";
        let odd: Vec<&Value> = lines.iter().filter(here).filter(odd).collect();
        if found != want || !is_it || !odd.is_empty() {
            wrong.push(format!(
                "{}: {found} of {want}: {lost:#?} {odd:#?}",
                kind.name
            ));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    let table = lines.iter().find(|l| l["type"] == "table");
    let table = table.context("no table")?;
    ensure!(table["unexplained"] == 0, "{done}");
    ensure!(!lines.iter().any(|l| l["type"] == "loss"), "{done}");
    Ok(())
}

/// A kernel that gives no reason may leave two kinds in one place.
fn is_vague(line: &Value) -> bool {
    line["reason"] == ""
        && ["queue", "qdisc", "tc", "unknown"]
            .iter()
            .any(|c| line["class"] == *c)
}

fn udp(net: &Pair, to: SocketAddr, n: u64) -> Result<()> {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    udp_by(net, any, to, n, |_| Ok(()))
}

/// Each from a socket of its own: no error of one keeps the next from being sent.
fn udp_by(
    net: &Pair,
    from: &str,
    to: SocketAddr,
    n: u64,
    set: impl Fn(&UdpSocket) -> Result<()> + Sync,
) -> Result<()> {
    net.client.enter(|| -> Result<()> {
        for _ in 0..n {
            let socket = UdpSocket::bind(from)?;
            set(&socket)?;
            let _ = socket.send_to(b"to be lost", to);
        }
        Ok(())
    })?
}

/// A frame that the client sends, to be spoilt.
struct Frame {
    to_mac: [u8; 6],
    header: Vec<u8>,
    payload: Vec<u8>,
    /// that the header tells; 0: the real one
    total_length: u16,
    from: [u8; 6],
}

impl Frame {
    fn protocol(&mut self, number: u8) {
        self.header[9] = number;
    }
}

fn bytes_of_mac(text: &str) -> Result<[u8; 6]> {
    let bytes: Result<Vec<u8>, _> = text.split(':').map(|b| u8::from_str_radix(b, 16)).collect();
    bytes?.try_into().ok().context("no MAC address")
}

fn sum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|w| u32::from(w[0]) << 8 | u32::from(*w.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !(sum as u16)
}

/// A header without options or data, its checksum wrong.
fn tcp_syn(port: u16) -> Vec<u8> {
    let mut tcp = vec![0; 20];
    tcp[..2].copy_from_slice(&40000u16.to_be_bytes());
    tcp[2..4].copy_from_slice(&port.to_be_bytes());
    tcp[12..14].copy_from_slice(&[0x50, 2]);
    tcp[16..18].copy_from_slice(&[0xde, 0xad]);
    tcp
}

/// Sends so many UDP datagrams to port 7 of the server, as `spoil` makes them.
fn frames(net: &Pair, n: u64, spoil: impl Fn(&mut Frame)) -> Result<()> {
    let mut udp = vec![0; 18];
    udp[..8].copy_from_slice(&[0x9c, 0x40, 0, 7, 0, 18, 0, 0]);
    let mut header = vec![0x45, 0, 0, 0, 0, 1, 0, 0, 64, 17, 0, 0];
    for end in [net.client.v4(0), net.server.v4(0)] {
        if let SocketAddr::V4(end) = end {
            header.extend_from_slice(&end.ip().octets());
        }
    }
    let mut frame = Frame {
        to_mac: bytes_of_mac(&net.server.mac("veth0")?)?,
        from: bytes_of_mac(&net.client.mac("veth0")?)?,
        header,
        payload: udp,
        total_length: 0,
    };
    // Twice: the first time tells what the right checksum is, which `spoil` may change the second time.
    let plain = frame.header.clone();
    spoil(&mut frame);
    let len = match frame.total_length {
        0 => (frame.header.len() + frame.payload.len()) as u16,
        told => told,
    };
    frame.header[2..4].copy_from_slice(&len.to_be_bytes());
    frame.header[10..12].copy_from_slice(&[0, 0]);
    let right = sum(&frame.header).to_be_bytes();
    frame.header = plain;
    frame.header[2..4].copy_from_slice(&len.to_be_bytes());
    frame.header[10..12].copy_from_slice(&right);
    spoil(&mut frame);
    let mut bytes = [&frame.to_mac[..], &frame.from, &[8, 0]].concat();
    bytes.extend_from_slice(&frame.header);
    bytes.extend_from_slice(&frame.payload);
    net.client
        .enter(|| (0..n).try_for_each(|_| send_frame("veth0", &bytes)))?
}

fn socket_filter(net: &Pair, n: u64) -> Result<()> {
    let socket = net.server.udp_bind(net.server.v4(7))?;
    refuse_all(&socket)?;
    udp(net, net.server.v4(7), n)
}

/// Until the buffer has refused so many.
fn receive_buffer(net: &Pair, n: u64) -> Result<()> {
    let socket = net.server.udp_bind(net.server.v4(7))?;
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBuf, &2304)?;
    let lost = || counter(net, "RcvbufErrors");
    let from = net.client.udp_bind(net.client.v4(0))?;
    while lost()? < n {
        from.send_to(&[7; 512], net.server.v4(7))?;
    }
    Ok(())
}

/// A counter of the server's UDP.
fn counter(net: &Pair, name: &str) -> Result<u64> {
    let text = net
        .server
        .enter(|| std::fs::read_to_string("/proc/thread-self/net/snmp"))??;
    let mut lines = text.lines().filter(|line| line.starts_with("Udp:"));
    let names = lines.next().context("no such group")?.split(' ');
    let values = lines.next().context("no values")?.split(' ');
    let found = names.zip(values).find(|(n, _)| *n == name);
    Ok(found.context("no such counter")?.1.parse()?)
}

fn way_there(net: &Pair) -> Result<()> {
    net.server.sysctl("net/ipv4/ip_forward", "0")?;
    net.client
        .ip("route add 10.98.0.0/24 via 10.77.0.2")
        .map(drop)
}

fn forward(net: &Pair) -> Result<()> {
    way_there(net)?;
    net.server.sysctl("net/ipv4/ip_forward", "1")
}

/// The server forwards to a device that loses all without a word.
fn on_to_dummy(net: &Pair) -> Result<()> {
    forward(net)?;
    net.server.ip("link add dummy0 type dummy")?;
    net.server.ip("addr add 10.98.0.1/24 dev dummy0")?;
    net.server.ip("link set dummy0 up").map(drop)
}

fn small_mtu(net: &Pair) -> Result<()> {
    on_to_dummy(net)?;
    net.server.ip("link set dummy0 mtu 600").map(drop)
}

fn strict(net: &Pair) -> Result<()> {
    net.client.ip("address add 10.99.0.1/32 dev veth0")?;
    for dev in ["all", "veth0"] {
        net.server
            .sysctl(&format!("net/ipv4/conf/{dev}/rp_filter"), "1")?;
    }
    Ok(())
}

fn no_ipv6(net: &Pair) -> Result<()> {
    net.server.sysctl("net/ipv6/conf/veth0/disable_ipv6", "1")
}

fn quick_neighbours(net: &Pair) -> Result<()> {
    let folder = "net/ipv4/neigh/veth0";
    net.client.sysctl(&format!("{folder}/mcast_solicit"), "1")?;
    net.client
        .sysctl(&format!("{folder}/retrans_time_ms"), "50")
}

fn neighbour_failed(net: &Pair) -> Result<()> {
    wait_for("the neighbour to fail", || {
        let text = net.client.ip("neigh show 10.77.0.77")?;
        Ok(text.contains("FAILED").then_some(()))
    })
}

fn nft(net: &crate::common::Netns, hook: &str) -> Result<()> {
    let family = if hook.contains("device") {
        "netdev"
    } else {
        "ip"
    };
    let rules = format!(
        "add table {family} t; add chain {family} t c {{ type filter hook {hook} priority 0; }}; add rule {family} t c udp dport 7 drop"
    );
    net.nft(&rules).map(drop)
}

fn nft_input(net: &Pair) -> Result<()> {
    nft(&net.server, "input")
}

fn nft_output(net: &Pair) -> Result<()> {
    nft(&net.client, "output")
}

fn nft_ingress(net: &Pair) -> Result<()> {
    nft(&net.server, "ingress device veth0")
}

/// Its rate lets no packet pass, and nothing may wait.
fn full_qdisc(net: &Pair) -> Result<()> {
    let pfifo = net
        .client
        .cmd("tc qdisc add dev veth0 root handle 7: pfifo limit 0");
    pfifo.map(drop)
}

fn netem(net: &Pair) -> Result<()> {
    let line = "tc qdisc add dev veth0 root handle 8: netem loss 100%";
    net.client.cmd(line).map(drop)
}

fn tc(net: &crate::common::Netns, way: &str) -> Result<()> {
    net.cmd("tc qdisc add dev veth0 clsact")?;
    let line = format!(
        "tc filter add dev veth0 {way} protocol ip u32 match ip protocol 17 0xff action drop"
    );
    net.cmd(&line).map(drop)
}

fn tc_ingress(net: &Pair) -> Result<()> {
    tc(&net.server, "ingress")
}

fn tc_egress(net: &Pair) -> Result<()> {
    tc(&net.client, "egress")
}
