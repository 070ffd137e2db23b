//! `netprobe skb --filter-track-skb` where one packet becomes several, or several one: segments, GRO, fragments;
//! through DNAT; and where a packet's stack ends.

use std::collections::HashSet;
use std::io::Write;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::common::{Case, Env, Finished, Netns, Netprobe, Pair, case, deadline};
use crate::icmp::{cpus, pinned_ping, steer};

pub fn cases() -> Vec<Case> {
    vec![
        case("skb_track_segments", segments).old_and_new().trace(),
        case("skb_track_fragments", fragments)
            .once_on("newest")
            .trace(),
        case("skb_track_dnat", dnat).trace().program("nft"),
        case("skb_track_clones", clones).once_on("newest").trace(),
        case("skb_track_sweep_blinds_nobody", sweep_blinds_nobody)
            .once_on("6.1")
            .trace()
            .program("ping")
            .when(|_| (cpus() < 2).then(|| "needs two CPUs".to_owned())),
        case("skb_track_entries_go", entries_go)
            .once_on("6.12")
            .trace(),
        case("skb_track_stack_ends", stack_ends)
            .once_on("newest")
            .trace()
            .program("nft"),
        case("skb_track_nat_bridge_vxlan", track_path)
            .trace()
            .program("nft")
            .limit(300),
        case("skb_track_full_map", track_full_map)
            .once_on("6.12")
            .trace(),
        case("skb_track_address_reuse", track_reuse)
            .once_on("newest")
            .trace(),
        case("skb_track_by_stack", track_by_stack)
            .once_on("6.1")
            .trace(),
    ]
}

fn text<'a>(row: &'a Value, key: &str) -> &'a str {
    row[key].as_str().unwrap_or_default()
}

/// The events of a run, and the identities that they have.
fn events(done: &Finished) -> Result<(Vec<Value>, HashSet<String>)> {
    done.expect_success()?;
    let mut rows = done.json()?;
    rows.retain(|r| r["type"] == "event");
    let packets = rows.iter().map(|r| text(r, "packet").to_owned());
    let packets = packets.collect();
    Ok((rows, packets))
}

/// Switches a feature of an interface, as `ethtool -K` does.
fn ethtool(netns: &Netns, interface: &str, command: u32, on: bool) -> Result<()> {
    /// struct ethtool_value
    #[repr(C)]
    struct EthtoolValue {
        command: u32,
        data: u32,
    }
    const SIOCETHTOOL: libc::c_ulong = 0x8946;
    let socket = netns.udp_bind("127.0.0.1:0".parse()?)?;
    let mut value = EthtoolValue {
        command,
        data: on.into(),
    };
    // SAFETY: struct ifreq is integers, bytes and pointers: all zeros is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: the request and the value that it points to live through the call.
    let result = unsafe {
        libc::ioctl(
            std::os::fd::AsRawFd::as_raw_fd(&socket),
            SIOCETHTOOL as _,
            &raw mut request,
        )
    };
    let error = std::io::Error::last_os_error();
    ensure!(result == 0, "ethtool command {command:#x}: {error}");
    Ok(())
}

/// ETHTOOL_STSO and ETHTOOL_SGRO, include/uapi/linux/ethtool.h
const STSO: u32 = 0x1f;
const SGRO: u32 = 0x2c;

/// The filter matches a large TCP packet only, not the segments that it is cut into before the device, nor what GRO makes of them.
fn segments() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    ethtool(&net.client, Pair::IFACE, STSO, false)?;
    // GRO on veth: from 5.13.
    let gro = Env::look().kernel >= (5, 13);
    if gro {
        ethtool(&net.server, Pair::IFACE, SGRO, true)?;
    }
    let server = net.server.tcp_listen(net.server.v4(0))?;
    let port = server.address().port().to_string();
    let mut stream = net.client.tcp_connect(server.address(), deadline())??;
    let probe = Netprobe::new("skb")
        .args([
            "--filter-track-skb",
            "--output-json",
            "--filter-dst-port",
            &port,
        ])
        .args([
            "--filter-func",
            "ip_output|eth_type_trans|ip_rcv|tcp_v4_rcv",
        ])
        // Slow machines begin with segments two by two.
        .arg("tcp and greater 2000")
        .start()?;
    stream.write_all(&[7; 8000])?;
    std::io::Read::read_exact(&mut stream, &mut [0; 8000])?;
    probe.wait_lines("the packet at its end", |text| {
        text.lines()
            .any(|l| l.contains("\"tcp_v4_rcv\""))
            .then_some(())
    })?;
    let done = probe.stop()?;
    let (rows, packets) = events(&done)?;
    let first = &rows[0];
    ensure!(
        first["len"].as_u64() > Some(2000),
        "no large packet:\n{done}"
    );
    let id = text(first, "packet");
    let of_first = |func: &'static str| {
        rows.iter()
            .filter(move |r| r["func"] == func && text(r, "packet") == id)
    };
    // veth hands over one segment after the other; dev_hard_start_xmit gets them as one list.
    let sent: HashSet<&str> = of_first("eth_type_trans").map(|r| text(r, "skb")).collect();
    ensure!(
        sent.len() >= 2,
        "not in segments: {sent:?} of {packets:?}\n{done}"
    );
    ensure!(
        of_first("eth_type_trans").all(|r| r["len"].as_u64() <= Some(1514)),
        "{done}"
    );
    ensure!(
        of_first("tcp_v4_rcv").count() >= 1,
        "not followed to its end:\n{done}"
    );
    // Nothing that the filter does not match has an identity of its own.
    let large: HashSet<&str> = rows
        .iter()
        .filter(|r| r["func"] == "ip_output" && r["len"].as_u64() > Some(2000))
        .map(|r| text(r, "packet"))
        .collect();
    ensure!(
        packets.len() == large.len(),
        "{packets:?}, {large:?}\n{done}"
    );
    if gro {
        ensure!(
            rows.iter()
                .any(|r| r["func"] == "tcp_v4_rcv" && r["len"].as_u64() > Some(1500)),
            "GRO made nothing of the segments:\n{done}"
        );
    }
    Ok(())
}

/// A datagram in fragments, of which only the first has ports, and whole again.
fn fragments() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let socket = net.server.udp_bind(net.server.v4(0))?;
    let to = socket.local_addr()?;
    let probe = Netprobe::new("skb")
        .args(["--filter-track-skb", "--output-json"])
        .args(["--filter-dst-port", &to.port().to_string()])
        .args([
            "--filter-func",
            "ip_output|dev_hard_start_xmit|ip_rcv|udp_rcv",
        ])
        .start()?;
    net.client.udp_send(to, &[7; 4000])?;
    let mut buffer = [0; 5000];
    ensure!(socket.recv_from(&mut buffer)?.0 == 4000);
    probe.wait_line("\"udp_rcv\"")?;
    let done = probe.stop()?;
    let (rows, packets) = events(&done)?;
    ensure!(packets.len() == 1, "{packets:?}\n{done}");
    let of = |func: &'static str| rows.iter().filter(move |r| r["func"] == func);
    let arrived: HashSet<&str> = of("ip_rcv").map(|r| text(r, "skb")).collect();
    ensure!(arrived.len() == 3, "not three fragments:\n{done}");
    ensure!(
        of("ip_rcv").any(|r| r["tuple"]["fragment"] == true && r["tuple"]["dport"] == 0),
        "{done}"
    );
    let whole = of("udp_rcv").next().context("no udp_rcv")?;
    ensure!(whole["len"] == 4008, "not whole: {whole}");
    Ok(())
}

/// Followed through DNAT: the filter matches the address before it only.
fn dnat() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let socket = net.server.udp_bind(net.server.v4(5555))?;
    let before: SocketAddr = "10.77.0.99:5555".parse()?;
    net.client.nft("add table ip n; add chain ip n out { type nat hook output priority -100; }; add rule ip n out ip daddr 10.77.0.99 dnat to 10.77.0.2")?;
    let probe = Netprobe::new("skb")
        .args([
            "--filter-track-skb",
            "--output-json",
            "--filter-dst-ip",
            "10.77.0.99",
        ])
        .args([
            "--filter-func",
            "nf_hook_slow|__ip_local_out|ip_output|ip_rcv|udp_rcv",
        ])
        .start()?;
    net.client.udp_send(before, b"hello")?;
    socket.recv_from(&mut [0; 16])?;
    probe.wait_line("\"udp_rcv\"")?;
    let done = probe.stop()?;
    let (rows, packets) = events(&done)?;
    ensure!(packets.len() == 1, "{packets:?}\n{done}");
    ensure!(rows[0]["tuple"]["daddr"] == "10.77.0.99", "{done}");
    for (func, netns) in [("ip_output", &net.client), ("udp_rcv", &net.server)] {
        let row = rows.iter().find(|r| r["func"] == func).context(func)?;
        ensure!(row["tuple"]["daddr"] == "10.77.0.2", "{row}");
        ensure!(row["netns"].as_u64() == netns.inode().ok(), "{row}");
    }
    Ok(())
}

/// The ICMP error that a rejected datagram brings about, below the same system call, is of that packet; the datagrams that the same thread
/// sends later are not, though the kernel's stack may begin lower with each system call (CONFIG_RANDOMIZE_KSTACK_OFFSET).
fn stack_ends() -> Result<()> {
    const TIMES: usize = 40;
    let net = Pair::new()?;
    net.fix_neighbours()?;
    net.client.nft("add table ip t; add chain ip t out { type filter hook output priority 0; }; add rule ip t out udp dport 4000 reject")?;
    // As many errors as there are causes.
    net.client.sysctl("net/ipv4/icmp_ratemask", "0")?;
    let probe = Netprobe::new("skb")
        .args(["--filter-track-skb-by-stackid", "--output-json"])
        .args(["--filter-proto", "udp", "--filter-dst-port", "4000"])
        .args(["--filter-func", "__ip_local_out|nf_hook_slow|ip_output"])
        .start()?;
    let socket = net.client.udp_bind(net.client.v4(0))?;
    for _ in 0..TIMES {
        for port in [4000, 4001, 4002] {
            // The one to 4000 is refused, and the next one may be told so.
            while socket.send_to(b"x", net.server.v4(port)).is_err() && port != 4000 {}
        }
    }
    let errors = |text: &str| {
        let of_errors = |l: &&str| l.contains("\"icmp\"") && l.contains("\"ip_output\"");
        text.lines().filter(of_errors).count()
    };
    probe.wait_lines("the errors", |text| (errors(text) >= TIMES).then_some(()))?;
    let done = probe.stop()?;
    let (rows, packets) = events(&done)?;
    ensure!(packets.len() == TIMES, "{} packets\n{done}", packets.len());
    let later = rows.iter().find(|r| {
        let port = &r["tuple"]["dport"];
        *port == 4001 || *port == 4002
    });
    ensure!(later.is_none(), "taken for another packet: {later:?}");
    let with_error: HashSet<&str> = rows
        .iter()
        .filter(|r| r["tuple"]["proto_name"] == "icmp")
        .map(|r| text(r, "packet"))
        .collect();
    ensure!(with_error.len() == TIMES, "{with_error:?}");
    Ok(())
}

/// A datagram to two sockets of a group: the second gets a clone, which is the same packet.
fn clones() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let group = std::net::Ipv4Addr::new(239, 7, 7, 7);
    let std::net::IpAddr::V4(interface) = net.server.v4(0).ip() else {
        anyhow::bail!("not IPv4")
    };
    net.client.ip(&format!("route add {group} dev veth0"))?;
    let join = || -> Result<std::net::UdpSocket> {
        use nix::sys::socket::{
            AddressFamily, SockFlag, SockType, SockaddrIn, bind, setsockopt, socket, sockopt,
        };
        let fd = net.server.enter(|| {
            socket(
                AddressFamily::Inet,
                SockType::Datagram,
                SockFlag::empty(),
                None,
            )
        })??;
        setsockopt(&fd, sockopt::ReuseAddr, &true)?;
        let any = SockaddrIn::new(0, 0, 0, 0, 4000);
        bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &any)?;
        let socket = std::net::UdpSocket::from(fd);
        socket.join_multicast_v4(&group, &interface)?;
        socket.set_read_timeout(Some(deadline()))?;
        Ok(socket)
    };
    let sockets = [join()?, join()?];
    let probe = Netprobe::new("skb")
        .args(["--filter-track-skb", "--output-json"])
        .args(["--filter-dst-ip", &group.to_string()])
        .args([
            "--filter-func",
            "ip_output|ip_rcv|__skb_free_datagram_locked|skb_consume_udp",
        ])
        .start()?;
    net.client.udp_send((group, 4000).into(), b"hello")?;
    for socket in &sockets {
        socket.recv_from(&mut [0; 16])?;
    }
    probe.wait_lines("two ends", |text| {
        (text.matches("\"skb_consume_udp\"").count() >= 2).then_some(())
    })?;
    let done = probe.stop()?;
    let (rows, packets) = events(&done)?;
    ensure!(packets.len() == 1, "{packets:?}\n{done}");
    let ends = rows.iter().filter(|r| r["func"] == "skb_consume_udp");
    let skbs: HashSet<&str> = ends.map(|r| text(r, "skb")).collect();
    ensure!(skbs.len() == 2, "no clone: {skbs:?}\n{done}");
    Ok(())
}

/// Thousands of packets through a map of a few: read by a socket, dropped, and TCP's with their clones. None stays in the map.
/// The look for entries that are to go must not keep probes on its CPU from being seen: each request that is handled there is.
fn sweep_blinds_nobody() -> Result<()> {
    const REQUESTS: usize = 200;
    let net = Pair::new()?;
    net.fix_neighbours()?;
    steer(&net.server, "2")?;
    // A large table, so that a look takes long.
    let probe = Netprobe::new("skb")
        .args(["--filter-track-skb", "--track-entries", "500000"])
        .args(["--filter-func", "icmp_rcv", "--output-meta=false"])
        .args(["--filter-netns", net.server.name()])
        .start()?;
    let mut cpu = nix::sched::CpuSet::new();
    cpu.set(1)?;
    for thread in std::fs::read_dir(format!("/proc/{}/task", probe.pid()))? {
        let id = thread?.file_name().to_string_lossy().parse()?;
        nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(id), &cpu)?;
    }
    let count = REQUESTS.to_string();
    net.client
        .output(&mut pinned_ping(&["-i", "0.01", "-c", &count])?)?;
    let done = probe.stop()?;
    done.expect_success()?;
    let seen = done.lines_with(" icmp_rcv").len();
    ensure!(seen == REQUESTS, "{seen} of {REQUESTS}\n{}", done.stderr);
    Ok(())
}

fn entries_go() -> Result<()> {
    const TIMES: usize = 1500;
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let socket = net.server.udp_bind(net.server.v4(0))?;
    let server = net.server.tcp_listen(net.server.v4(0))?;
    let probe = Netprobe::new("skb")
        .args(["--filter-track-skb", "--track-entries", "256"])
        .args(["--filter-func", "ip_rcv", "--output-meta=false"])
        .args(["--filter-netns", net.server.name()])
        .start()?;
    let from = net.client.udp_bind(net.client.v4(0))?;
    let nobody = net.client.udp_bind(net.client.v4(0))?;
    for _ in 0..TIMES {
        from.send_to(b"read", socket.local_addr()?)?;
        socket.recv_from(&mut [0; 16])?;
        let _ = nobody.send_to(b"dropped", net.server.v4(9));
    }
    let mut stream = net.client.tcp_connect(server.address(), deadline())??;
    for _ in 0..TIMES / 5 {
        stream.write_all(&[7; 1000])?;
        std::io::Read::read_exact(&mut stream, &mut [0; 1000])?;
    }
    probe.wait_lines("the packets", |text| {
        (text.matches(" ip_rcv").count() >= 2 * TIMES).then_some(())
    })?;
    let done = probe.stop()?;
    done.expect_success()?;
    ensure!(!done.stderr.contains("full map"), "{}", done.stderr);
    Ok(())
}

/// client -veth- router: SNAT, a bridge with VXLAN on it, -veth- far: decapsulated. The filter matches the first form only.
fn track_path() -> Result<()> {
    // client 10.1.0.2 -> router (SNAT to 10.2.0.1) -> br0 -> vxlan over 10.77.0.0/24 -> server vx0 10.2.0.2
    let net = Pair::new()?;
    let (router, far) = (&net.client, &net.server);
    let client = Netns::new("inner")?;
    client.ip(&format!(
        "link add eth0 type veth peer name down0 netns {}",
        router.name()
    ))?;
    client.ip("addr add 10.1.0.2/24 dev eth0")?;
    client.ip("link set eth0 up")?;
    router.ip("addr add 10.1.0.1/24 dev down0")?;
    router.ip("link set down0 up")?;
    client.ip("route add default via 10.1.0.1")?;
    router.sysctl("net/ipv4/ip_forward", "1")?;
    router.ip("link add br0 type bridge")?;
    router.ip(
        "link add vx0 type vxlan id 7 remote 10.77.0.2 local 10.77.0.1 dstport 4789 dev veth0",
    )?;
    router.ip("link set vx0 master br0")?;
    router.ip("addr add 10.2.0.1/24 dev br0")?;
    router.ip("link set vx0 up")?;
    router.ip("link set br0 up")?;
    far.ip("link add vx0 type vxlan id 7 remote 10.77.0.1 local 10.77.0.2 dstport 4789 dev veth0")?;
    far.ip("addr add 10.2.0.2/24 dev vx0")?;
    far.ip("link set vx0 up")?;
    router.nft("add table ip n; add chain ip n post { type nat hook postrouting priority 100; }; add rule ip n post ip saddr 10.1.0.2 oif br0 snat to 10.2.0.1")?;
    let socket = far.udp_bind("10.2.0.2:5555".parse()?)?;
    // Neighbours are resolved by a first packet that nobody looks at.
    let to: SocketAddr = "10.2.0.2:5555".parse()?;
    client.udp_send(to, b"first")?;
    let mut buffer = [0; 64];
    socket.recv_from(&mut buffer)?;

    // All functions, where attaching to them takes no minute.
    let few = [
        "--filter-func",
        "ip_output|ip_forward|ip_finish_output|br_dev_xmit|br_handle_frame|vxlan_xmit|udp_rcv|udp_queue_rcv_skb|ip_rcv|ip_send_skb|vxlan_rcv|veth_xmit|__netif_receive_skb_core.*|dev_hard_start_xmit|consume_skb|skb_consume_udp|netif_rx.*",
    ];
    let all = Env::look().lacks_kprobe_multi().is_none();
    let probe = Netprobe::new("skb")
        .args(["--filter-track-skb", "--output-json"])
        .args(["--filter-src-ip", "10.1.0.2", "--filter-dst-port", "5555"])
        .args(if all { &few[..0] } else { &few[..] })
        .start()?;
    client.udp_send(to, b"second")?;
    let (_, from) = socket.recv_from(&mut buffer)?;
    ensure!(from.ip().to_string() == "10.2.0.1", "no SNAT: {from}");
    probe.wait_lines("the packet at its end", |text| {
        text.lines()
            .any(|l| l.contains("\"skb_consume_udp\"") || l.contains("\"udp_queue_rcv_skb\""))
            .then_some(())
    })?;
    let done = probe.stop()?;
    done.expect_success()?;
    let rows = done.json()?;
    let rows: Vec<&Value> = rows.iter().filter(|r| r["type"] == "event").collect();
    let first = text(rows[0], "packet");
    ensure!(!first.is_empty(), "{done}");
    ensure!(
        rows.iter().all(|r| text(r, "packet") == first),
        "more than one identity:\n{done}"
    );
    let seen = |what: &str, is: &dyn Fn(&Value) -> bool| {
        ensure!(rows.iter().any(|r| is(r)), "not seen: {what}\n{done}");
        Ok(())
    };
    let in_netns = |r: &Value, netns: &Netns| r["netns"].as_u64() == netns.inode().ok();
    let (inner, snat) = ("10.1.0.2", "10.2.0.1");
    seen("in the client", &|r| {
        in_netns(r, &client) && r["tuple"]["saddr"] == inner
    })?;
    seen("in the router", &|r| {
        in_netns(r, router) && r["tuple"]["saddr"] == inner
    })?;
    seen("after SNAT", &|r| {
        in_netns(r, router) && r["tuple"]["saddr"] == snat
    })?;
    seen("on the bridge", &|r| text(r, "iface") == "br0")?;
    seen("encapsulated", &|r| {
        in_netns(r, router) && r["tuple"]["dport"] == 4789
    })?;
    seen("arrived, encapsulated", &|r| {
        in_netns(r, far) && r["tuple"]["dport"] == 4789
    })?;
    seen("decapsulated", &|r| {
        in_netns(r, far) && text(r, "iface") == "vx0" && r["tuple"]["dport"] == 5555
    })
}

/// A map too small for the packets in flight: counted and told.
fn track_full_map() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let socket = net.server.udp_bind(net.server.v4(0))?;
    let to = socket.local_addr()?;
    let probe = Netprobe::new("skb")
        .args(["--filter-track-skb", "--track-entries", "4"])
        .args(["--filter-dst-port", &to.port().to_string()])
        .args(["--filter-func", "ip_rcv|ip_output"])
        .start()?;
    // Nobody reads: they stay in the socket's queue.
    for _ in 0..200 {
        net.client.udp_send(to, b"x")?;
    }
    probe.wait_lines("200 packets", |text| {
        (text.lines().filter(|l| l.contains("ip_rcv")).count() >= 200).then_some(())
    })?;
    let done = probe.stop()?;
    done.expect_success()?;
    done.expect_stderr("full map refused")
}

/// Many packets one after the other use the same few addresses: each has an identity of its own.
fn track_reuse() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let socket = net.server.udp_bind(net.server.v4(0))?;
    let to = socket.local_addr()?;
    let probe = Netprobe::new("skb")
        .args(["--filter-track-skb", "--output-json"])
        .args(["--filter-dst-port", &to.port().to_string()])
        .args(["--filter-func", "ip_rcv|ip_output|skb_consume_udp"])
        .start()?;
    let mut buffer = [0; 64];
    for n in 0..100u32 {
        net.client.udp_send(to, &n.to_ne_bytes())?;
        socket.recv_from(&mut buffer)?;
        // Others in between, which the filter does not match.
        net.client.udp_send(net.server.v4(9), b"other")?;
    }
    let count = |text: &str, what: &str| text.lines().filter(|l| l.contains(what)).count();
    probe.wait_lines("100 packets", |text| {
        (count(text, "\"skb_consume_udp\"") >= 100).then_some(())
    })?;
    let done = probe.stop()?;
    done.expect_success()?;
    let rows = done.json()?;
    let sent: Vec<&str> = rows
        .iter()
        .filter(|r| r["func"] == "ip_output")
        .map(|r| text(r, "packet"))
        .collect();
    let distinct: std::collections::HashSet<&&str> = sent.iter().collect();
    ensure!(sent.len() == 100 && distinct.len() == 100, "{done}");
    ensure!(
        rows.iter()
            .all(|r| r["type"] != "event" || r["tuple"]["dport"] == to.port()),
        "another packet was taken for one of them:\n{done}"
    );
    Ok(())
}

/// An echo reply is a new skb, made below the function that handles the request.
fn track_by_stack() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let args = |flag: &'static str| {
        Netprobe::new("skb")
            .args([flag, "--output-json", "--filter-proto", "icmp"])
            .args(["--filter-src-ip", "10.77.0.1"])
            .args([
                "--filter-func",
                "icmp_rcv|ip_rcv|ip_output|ip_send_skb|__ip_local_out|ip_local_deliver",
            ])
    };
    for (flag, rebuilt) in [
        ("--filter-track-skb", false),
        ("--filter-track-skb-by-stackid", true),
    ] {
        // Probes of returns put an address of their own on the stack in the place of the caller's.
        let returns = rebuilt && Env::look().kernel >= (5, 16);
        let probe = args(flag)
            .args(returns.then_some("--output-retval"))
            .start()?;
        ensure!(net.client.ping(net.server.v4(0), 1)?);
        probe.wait_line("icmp_rcv")?;
        let done = probe.stop()?;
        let rows = done.json()?;
        let reply = rows.iter().find(|r| r["tuple"]["saddr"] == "10.77.0.2");
        ensure!(reply.is_some() == rebuilt, "{flag}:\n{done}");
        if let Some(reply) = reply {
            let request = rows
                .iter()
                .find(|r| r["func"] == "icmp_rcv")
                .context("no request")?;
            ensure!(reply["packet"] == request["packet"], "{done}");
            ensure!(reply["skb"] != request["skb"], "{done}");
        }
    }
    Ok(())
}
