//! Packet expressions in the kernel: `netprobe skb EXPRESSION`, tunnels, `netprobe filter -r`, `netprobe ctl`.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use anyhow::{Result, ensure};

use crate::common::{Case, Finished, Netns, Netprobe, Pair, Running, case};

pub fn cases() -> Vec<Case> {
    vec![
        case("filter_tcp_syn", tcp_syn).trace(),
        case("filter_ip6_syn", ip6_syn).once_on("newest").trace(),
        case("filter_scratch_memory", scratch_memory)
            .once_on("newest")
            .trace(),
        case("filter_payload_in_fragments", payload_in_fragments).trace(),
        case("filter_arp", arp).once_on("5.10").trace(),
        case("filter_with_fields", with_fields)
            .once_on("5.10")
            .trace(),
        case("filter_many_hosts", many_hosts)
            .once_on("5.10")
            .trace(),
        case("filter_vxlan", vxlan).trace(),
        case("filter_geneve", geneve).once_on("newest").trace(),
        case("filter_ipip", ipip).once_on("newest").trace(),
        case("filter_ctl", ctl).once_on("newest").trace(),
        case("filter_wrong_expression", wrong_expression).once_on("5.10"),
        case("filter_file", file).once_on("5.10"),
        case("filter_listing", listing).once_on("5.10"),
    ]
}

/// Functions that packets sent and received pass, and that have the same names on every kernel.
const SENT: &str = "ip_output|ip6_output|__dev_queue_xmit";
const RECEIVED: &str = "ip_rcv|ipv6_rcv|ip_local_deliver|ip6_input";

fn skb(functions: &str, netns: &Netns, filter: &[&str]) -> Result<Running> {
    Netprobe::new("skb")
        .args(["--filter-func", functions, "--filter-netns"])
        .arg(netns.path())
        .args(filter)
        .start()
}

/// TCP with an answer, so that each kind of segment was there.
fn talk(from: &Netns, to: SocketAddr, text: &[u8]) -> Result<()> {
    let mut stream: TcpStream = from.tcp_connect(to, crate::common::deadline())??;
    stream.write_all(text)?;
    let mut answer = vec![0; text.len()];
    stream.read_exact(&mut answer)?;
    Ok(())
}

fn pair() -> Result<Pair> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    Ok(net)
}

/// What must not be in the output, whatever else is.
fn lacks(done: &Finished, text: &str) -> Result<()> {
    ensure!(
        !done.stdout.contains(text),
        "{text:?} should not match:\n{done}"
    );
    Ok(())
}

/// A SYN comes from the client only; an answer never is one alone.
fn only_syns(to: impl Fn(&Netns) -> SocketAddr, filter: &[&str]) -> Result<()> {
    let net = pair()?;
    let server = net.server.tcp_listen(to(&net.server))?;
    let probe = skb(&format!("{SENT}|{RECEIVED}"), &net.client, filter)?;
    talk(&net.client, server.address(), b"hello")?;
    probe.wait_line("->")?;
    let done = probe.stop()?;
    done.expect_success()?;
    lacks(&done, ":8080->")
}

fn tcp_syn() -> Result<()> {
    only_syns(|server| server.v4(8080), &["tcp[tcpflags] = tcp-syn"])
}

fn ip6_syn() -> Result<()> {
    only_syns(
        |server| server.v6(8080),
        &["ip6[53]", "&", "0x3f", "=", "0x2"],
    )
}

/// Only segments with payload; the expression needs scratch memory.
fn scratch_memory() -> Result<()> {
    let net = pair()?;
    let silent = net.server.tcp_listen(net.server.v4(8080))?;
    let server = net.server.tcp_listen(net.server.v4(8081))?;
    let filter = "(((ip[2:2] - ((ip[0]&0xf)<<2)) - ((tcp[12]&0xf0)>>2)) != 0)";
    let probe = skb(RECEIVED, &net.server, &[filter])?;
    drop(
        net.client
            .tcp_connect(silent.address(), crate::common::deadline())??,
    );
    talk(&net.client, server.address(), b"hello")?;
    probe.wait_line(":8081")?;
    let done = probe.stop()?;
    done.expect_success()?;
    lacks(&done, ":8080")
}

/// TCP keeps what is sent in page fragments, behind a linear part of headers only.
fn payload_in_fragments() -> Result<()> {
    let net = pair()?;
    let one = net.server.tcp_listen(net.server.v4(8080))?;
    let two = net.server.tcp_listen(net.server.v4(8081))?;
    let filter = "tcp[((tcp[12]&0xf0)>>2)+5:4] = 0x6d61726b";
    let probe = skb(SENT, &net.client, &[filter])?;
    talk(&net.client, one.address(), b"other payload")?;
    talk(&net.client, two.address(), b"with mark in it")?;
    probe.wait_line("ip_output")?;
    let done = probe.stop()?;
    done.expect_success()?;
    lacks(&done, ":8080")
}

fn arp() -> Result<()> {
    let net = Pair::new()?;
    let probe = skb("arp_rcv|ip_rcv", &net.server, &["arp"])?;
    ensure!(net.client.ping(net.server.v4(0), 1)?);
    probe.wait_line("arp_rcv")?;
    let done = probe.stop()?;
    done.expect_success()?;
    done.expect_stderr("needs the link header")?;
    lacks(&done, "ip_rcv")
}

/// Field filters and the expression hold together.
fn with_fields() -> Result<()> {
    let net = pair()?;
    let one = net.server.tcp_listen(net.server.v4(8080))?;
    let two = net.server.tcp_listen(net.server.v4(8081))?;
    let probe = skb(
        RECEIVED,
        &net.server,
        &["--filter-dst-port", "8081", "tcp[tcpflags] & tcp-syn != 0"],
    )?;
    talk(&net.client, one.address(), b"hello")?;
    talk(&net.client, two.address(), b"hello")?;
    probe.wait_line(":8081")?;
    let done = probe.stop()?;
    done.expect_success()?;
    lacks(&done, ":8080")
}

/// More hosts than any jump of 255 instructions reaches over (several hundred load too, see src/filter/tests/objects.rs: libpcap's
/// optimizer takes minutes for them under emulation).
fn many_hosts() -> Result<()> {
    let net = pair()?;
    let server = net.server.tcp_listen(net.server.v4(8080))?;
    let mut hosts: Vec<String> = (0..99).map(|i| format!("host 10.100.{i}.9")).collect();
    hosts.push(format!("host {}", net.client.v4(0).ip()));
    let local = net.server.tcp_listen("127.0.0.1:8081".parse()?)?;
    let probe = skb(RECEIVED, &net.server, &[&hosts.join(" or ")])?;
    // No host of the list takes part in the first.
    talk(&net.server, local.address(), b"hello")?;
    talk(&net.client, server.address(), b"hello")?;
    probe.wait_line(":8080")?;
    let done = probe.stop()?;
    done.expect_success()?;
    lacks(&done, ":8081")
}

/// Both ends of a tunnel over the pair, and addresses inside it.
fn tunnel(net: &Pair, kind: &str) -> Result<()> {
    for (here, there, inner) in [
        (&net.client, &net.server, "192.168.77.1/24"),
        (&net.server, &net.client, "192.168.77.2/24"),
    ] {
        let (local, remote) = (here.v4(0).ip(), there.v4(0).ip());
        let options = match kind {
            "vxlan" => format!("vxlan id 42 local {local} remote {remote} dstport 4789"),
            "geneve" => format!("geneve id 42 remote {remote}"),
            _ => format!("ipip local {local} remote {remote}"),
        };
        here.ip(&format!("link add tun9 type {options}"))?;
        here.ip(&format!("addr add {inner} dev tun9"))?;
        here.ip("link set tun9 up")?;
    }
    Ok(())
}

/// Packets to two ports go through the tunnel; those to one of them match inside, at the tunnel's receiving end.
fn inside_tunnel(kind: &str, flag: &str, outer: &str) -> Result<()> {
    let net = pair()?;
    tunnel(&net, kind)?;
    let probe = skb("ip_rcv", &net.server, &[flag, "udp dst port 7001", outer])?;
    for port in [7000, 7001, 7000] {
        net.client
            .udp_send(SocketAddr::from(([192, 168, 77, 2], port)), b"hello")?;
    }
    probe.wait_line("ip_rcv")?;
    // A later packet that passes shows that those before it have been decided.
    net.client
        .udp_send(SocketAddr::from(([192, 168, 77, 2], 7001)), b"hello")?;
    // ARP inside (78 bytes with its tunnel) is no IP packet, so the inner filter has no say on it.
    let outer = |text: &str| {
        text.lines()
            .filter(|line| line.contains("ip_rcv") && !line.contains(" 78 "))
            .count()
    };
    probe.wait_lines("two tunnelled packets", |text| {
        (outer(text) >= 2).then_some(())
    })?;
    let done = probe.stop()?;
    done.expect_success()?;
    ensure!(
        outer(&done.stdout) == 2,
        "{} outer packets:\n{done}",
        outer(&done.stdout)
    );
    Ok(())
}

fn vxlan() -> Result<()> {
    inside_tunnel("vxlan", "--filter-tunnel-pcap-l2", "udp dst port 4789")
}

fn geneve() -> Result<()> {
    inside_tunnel("geneve", "--filter-tunnel-pcap-l3", "udp dst port 6081")
}

fn ipip() -> Result<()> {
    inside_tunnel("ipip", "--filter-tunnel-pcap-l3", "ip proto 4")
}

/// What a running trace prints is changed from another process.
fn ctl() -> Result<()> {
    let net = pair()?;
    let one = net.server.tcp_listen(net.server.v4(8080))?;
    let two = net.server.tcp_listen(net.server.v4(8081))?;
    let probe = skb("ip_rcv", &net.server, &["--filter-dst-port", "8080", "tcp"])?;
    let session = format!("skb-{}", probe.pid());
    let ctl = |args: &[&str]| Netprobe::new("ctl").args(args).run();

    let done = ctl(&["list"])?;
    done.expect_success()?;
    ensure!(done.lines_with(&session).len() == 1, "{done}");
    ctl(&["show", &session])?.expect_stdout("dst-port=8080")?;
    talk(&net.client, two.address(), b"hello")?;
    talk(&net.client, one.address(), b"hello")?;
    probe.wait_line(":8080")?;

    let done = ctl(&["set", &session, "dst-port=8081"])?;
    done.expect_success()?;
    done.expect_stdout("dst-port=8081")?;
    let before = probe.stdout();
    ensure!(!before.contains(":8081"), "{before}");
    talk(&net.client, one.address(), b"hello")?;
    talk(&net.client, two.address(), b"hello")?;
    probe.wait_line(":8081")?;
    let pid = probe.pid().to_string();
    ctl(&["set", &pid, "dst-port=80x"])?.expect_code(2)?;
    ctl(&["set", "skb-1", "dst-port=80"])?.expect_code(2)?;
    let done = probe.stop()?;
    done.expect_success()?;
    let after = done.stdout.split_at(before.len()).1;
    ensure!(!after.contains(":8080"), "still the old port:\n{done}");
    Ok(())
}

fn wrong_expression() -> Result<()> {
    let done = Netprobe::new("skb").args(["tcp", "prot", "80"]).run()?;
    done.expect_code(2)?;
    done.expect_stderr("invalid filter expression 'tcp prot 80'")?;
    let done = Netprobe::new("skb").args(["ip6 protochain 6"]).run()?;
    done.expect_code(2)?;
    done.expect_stderr("jumps backward")
}

/// Ethernet frames: UDP to port 53, ARP, a TCP segment to port 80.
fn frames() -> Vec<Vec<u8>> {
    let ethernet = |kind: [u8; 2], rest: &[u8]| [&[2; 12][..], &kind, rest].concat();
    let ip = |protocol: u8, rest: &[u8]| {
        let mut header = vec![
            0x45, 0, 0, 60, 0, 0, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ];
        header.extend(rest);
        header
    };
    let ports = |to: u8| [&[0x9c, 0x40, 0, to][..], &[0; 20]].concat();
    vec![
        ethernet([8, 0], &ip(17, &ports(53))),
        ethernet([8, 6], &[0; 28]),
        ethernet([8, 0], &ip(6, &ports(80))),
    ]
}

fn pcap(frames: &[Vec<u8>]) -> Vec<u8> {
    let mut file = Vec::new();
    for word in [0xa1b2_c3d4u32, 0x0004_0002, 0, 0, 65535, 1] {
        file.extend(word.to_le_bytes());
    }
    for (at, frame) in frames.iter().enumerate() {
        for word in [1, at as u32, frame.len() as u32, frame.len() as u32] {
            file.extend(word.to_le_bytes());
        }
        file.extend(frame);
    }
    file
}

fn pcapng(frames: &[Vec<u8>]) -> Vec<u8> {
    let mut file = Vec::new();
    let mut block = |kind: u32, body: &[u8]| {
        let len = (12 + body.len()) as u32;
        for part in [
            &kind.to_le_bytes()[..],
            &len.to_le_bytes(),
            body,
            &len.to_le_bytes(),
        ] {
            file.extend(part);
        }
    };
    block(
        0x0a0d_0d0a,
        &[
            0x4d, 0x3c, 0x2b, 0x1a, 1, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255,
        ],
    );
    block(1, &[1, 0, 0, 0, 0, 0, 4, 0]);
    for frame in frames {
        let len = (frame.len() as u32).to_le_bytes();
        let mut body = [&[0; 12][..], &len, &len, frame].concat();
        body.resize(body.len().next_multiple_of(4), 0);
        block(6, &body);
    }
    file
}

/// The packets of a file through the translated filter in this kernel.
fn file() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for (name, bytes) in [("a.pcap", pcap(&frames())), ("a.pcapng", pcapng(&frames()))] {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes)?;
        let matched = folder.path().join("matched.pcap");
        for (expression, count) in [("udp port 53 or arp", 2), ("tcp", 1), ("ip6", 0), ("", 3)] {
            let done = Netprobe::new("filter")
                .arg("-r")
                .arg(&path)
                .arg("-w")
                .arg(&matched)
                .arg(expression)
                .run()?;
            done.expect_success()?;
            done.expect_stdout(&format!("{count} of 3 packets match"))?;
            // What was written matches whole.
            let done = Netprobe::new("filter")
                .arg("-r")
                .arg(&matched)
                .arg(expression)
                .run()?;
            done.expect_stdout(&format!("{count} of {count} packets match"))?;
        }
    }
    let done = Netprobe::new("filter")
        .args(["-r", "/nonexistent", "tcp"])
        .run()?;
    done.expect_code(1)?;
    done.expect_stderr("/nonexistent")
}

fn listing() -> Result<()> {
    let done = Netprobe::new("filter").args(["icmp"]).run()?;
    done.expect_success()?;
    let expected = "(000) ldh      [12]\n(001) jeq      #0x800           jt 2\tjf 5\n(002) ldb      [23]\n\
                    (003) jeq      #0x1             jt 4\tjf 5\n(004) ret      #262144\n(005) ret      #0\n";
    ensure!(done.stdout == expected, "{done}");
    let done = Netprobe::new("filter")
        .args(["--linktype", "RAW", "arp"])
        .run()?;
    done.expect_code(2)?;
    Netprobe::new("filter")
        .args(["--ebpf", "icmp"])
        .run()?
        .expect_stdout("exit")?;
    let done = Netprobe::new("filter")
        .args(["--ebpf", "--program", "xdp", "icmp"])
        .run()?;
    done.expect_stdout("call bpf_xdp_load_bytes")
}
