//! What is an IP packet and what is none, and VLAN tags beside the packet: `netprobe skb` against tcpdump.

use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::common::{Case, Env, Finished, Netns, Netprobe, Pair, case, send_frame, wait_for};
use crate::xdp::{IFACE, end};

pub fn cases() -> Vec<Case> {
    vec![
        case("headers_netlink_is_no_ip", netlink_is_no_ip)
            .once_on("newest")
            .trace(),
        case("headers_unix_is_no_ip", unix_is_no_ip)
            .once_on("6.1")
            .trace(),
        case("headers_llc_and_vendor_frames", llc_and_vendor_frames)
            .once_on("newest")
            .trace(),
        case("headers_outgoing", outgoing)
            .once_on("6.1")
            .trace()
            .program("ping"),
        case("headers_vlan_beside", vlan_beside)
            .once_on("newest")
            .trace()
            .program("tcpdump")
            .when(lacks_vlan),
        case("headers_vlan_in_the_frame", vlan_in_the_frame)
            .once_on("newest")
            .trace()
            .program("tcpdump")
            .when(lacks_vlan),
        case("headers_of_tunnel_devices", tunnel_devices)
            .old_and_new()
            .trace()
            .program("ping")
            .when(crate::tunnels::lacks_tunnels),
    ]
}

fn lacks_vlan(_: &Env) -> Option<String> {
    let made = Netns::new("vlan").and_then(|netns| {
        netns.ip("link add d0 type dummy")?;
        netns.ip("link add link d0 name d0.5 type vlan id 5")
    });
    made.err()
        .map(|error| format!("this kernel has no VLANs: {error:#}"))
}

/// Events whose function is one of these; all functions would take minutes on kernels without kprobe.multi.
fn skb(functions: &str, args: &[&str]) -> Netprobe<'static> {
    Netprobe::new("skb")
        .args(["--filter-func", functions])
        .args(args)
}

fn tuples(done: &Finished) -> usize {
    done.stdout
        .lines()
        .filter(|line| line.contains("->"))
        .count()
}

/// Routes are asked for: their messages look like IP by their first byte.
fn netlink_is_no_ip() -> Result<()> {
    let netns = Netns::new("netlink")?;
    netns.sysctl("net/ipv6/conf/default/disable_ipv6", "1")?;
    let functions = "netlink_unicast|consume_skb|skb_release_data|netlink_trim|kfree_skbmem";
    let talk = || -> Result<()> {
        for i in 1..=6 {
            netns.ip(&format!("link add dummy12345{i} type dummy"))?;
            netns.ip(&format!("route add 10.1.{i}.0/24 dev lo"))?;
            netns.ip("route get 127.0.0.1")?;
            // Answers of 72 and of 76 bytes.
            netns.ip("route add 10.2.0.0/16 dev lo mtu 1400 metric 5")?;
            let (device, near) = (format!("dummy12345{i}"), format!("10.9.{i}"));
            netns.ip(&format!("addr add {near}.1/24 dev {device}"))?;
            netns.ip(&format!("link set {device} up"))?;
            netns.ip(&format!(
                "route add 10.3.0.0/16 via {near}.2 dev {device} src {near}.1 metric 5"
            ))?;
            for to in ["10.2.0.1", "10.3.0.1"] {
                netns.ip(&format!("route get fibmatch {to}"))?;
            }
            netns.ip("route flush root 10.2.0.0/15")?;
            netns.ip("addr show")?;
            netns.ip(&format!("route del 10.1.{i}.0/24 dev lo"))?;
            netns.ip(&format!("link del dummy12345{i}"))?;
        }
        Ok(())
    };
    let probe = skb(functions, &[]).start()?;
    talk()?;
    probe.wait_line("netlink_unicast")?;
    let done = probe.stop()?;
    done.expect_success()?;
    for line in done.lines_with("netlink_unicast") {
        ensure!(!line.contains("->"), "a message is taken for IP: {line}");
    }
    for answer in [" 72 ", " 76 "] {
        let there = done.lines_with("netlink_unicast");
        ensure!(
            there.iter().any(|line| line.contains(answer)),
            "no answer of{answer}bytes:\n{done}"
        );
    }
    let ours = |line: &&str| line.contains(" ip:");
    let taken = done
        .stdout
        .lines()
        .filter(ours)
        .filter(|line| line.contains("->"))
        .count();
    ensure!(taken == 0, "{taken} messages are taken for IP:\n{done}");

    let filters: [&[&str]; 4] = [
        &["ip"],
        &["ip or ip6"],
        &["not tcp"],
        &["--filter-src-ip", "0.0.0.0/0"],
    ];
    for filter in filters {
        let probe = skb("netlink_unicast|netlink_trim", filter).start()?;
        talk()?;
        let done = probe.stop()?;
        done.expect_success()?;
        let lines = done
            .stdout
            .lines()
            .filter(|line| line.starts_with("0x"))
            .count();
        ensure!(lines == 0, "{filter:?} matches {lines} messages:\n{done}");
    }
    Ok(())
}

/// A datagram between two processes, with the bytes of an IP packet in it.
fn unix_is_no_ip() -> Result<()> {
    let (one, two) = UnixDatagram::pair()?;
    let mut text = vec![
        0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 10, 3, 3, 3, 10, 3, 3, 4, 0, 7, 0, 8, 0, 8, 0, 0,
    ];
    text.resize(64, 0);
    for filter in [&[][..], &["ip"], &["--filter-dst-ip", "10.3.3.4"]] {
        let probe = skb(
            "unix_dgram_sendmsg|consume_skb|skb_free_datagram|sock_wfree|unix_destruct_scm",
            filter,
        )
        .start()?;
        for _ in 0..5 {
            one.send(&text)?;
            two.recv(&mut [0; 64])?;
        }
        if filter.is_empty() {
            probe.wait_line("consume_skb")?;
        }
        let done = probe.stop()?;
        done.expect_success()?;
        ensure!(
            !done.stdout.contains("10.3.3.4"),
            "{filter:?}: a message is taken for IP:\n{done}"
        );
    }
    Ok(())
}

/// Frames of 802.2 (spanning tree) and of an EtherType of nobody's, whose payload begins as IP does.
fn llc_and_vendor_frames() -> Result<()> {
    let net = Pair::new()?;
    let mac = [2u8; 6];
    let ip = [
        0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 10, 3, 3, 3, 10, 3, 3, 4, 0, 7, 0, 8, 0, 8, 0, 0,
    ];
    let frame = |kind: [u8; 2]| {
        let mut frame = [&[255u8; 6][..], &mac, &kind, &ip].concat();
        frame.resize(60, 0);
        frame
    };
    let functions = &format!("{RECEIVE}|kfree_skb.*|sk_skb_reason_drop|ip_rcv");
    let probe = skb(
        functions,
        &[
            "--filter-netns",
            net.server.path().to_str().context("a path")?,
        ],
    )
    .start()?;
    for kind in [[0, 38], [0x88, 0xb5], [0x89, 0x99], [8, 0]] {
        net.client.enter(|| send_frame(IFACE, &frame(kind)))??;
    }
    probe.wait_line("10.3.3.4")?;
    let done = probe.stop()?;
    done.expect_success()?;
    for line in done.lines_with("10.3.3.4") {
        ensure!(line.contains(" 0x0800 "), "taken for IP: {line}\n{done}");
    }
    ensure!(
        done.stdout.contains(" 0x88b5 "),
        "the frames have not come:\n{done}"
    );
    Ok(())
}

/// On the way out skb->protocol is set late: the socket's family says that it is IP.
fn outgoing() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let server = net.server.tcp_listen(net.server.v4(8080))?;
    let functions =
        "__ip_local_out|ip_local_out|ip_output|ip6_output|__dev_queue_xmit|dev_hard_start_xmit";
    for filter in ["tcp port 8080", "icmp6"] {
        let probe = skb(
            functions,
            &[
                "--filter-netns",
                net.client.path().to_str().context("a path")?,
                filter,
            ],
        )
        .start()?;
        if filter == "icmp6" {
            ensure!(net.client.ping(net.server.v6(0), 1)?, "no answer");
            probe.wait_line("ip6_output")?;
        } else {
            drop(
                net.client
                    .tcp_connect(server.address(), crate::common::deadline())??,
            );
            probe.wait_line("ip_output")?;
        }
        probe.wait_line("dev_hard_start_xmit")?;
        let done = probe.stop()?;
        done.expect_success()?;
        if filter != "icmp6" {
            ensure!(
                done.stdout.contains("ip_local_out"),
                "before ip_local_out it is no IP:\n{done}"
            );
        }
        let lines = done
            .stdout
            .lines()
            .filter(|line| line.starts_with("0x"))
            .count();
        ensure!(tuples(&done) == lines, "not all have a tuple:\n{done}");
    }
    Ok(())
}

/// A VLAN 5 over the pair; `inner`: and a VLAN 6 over that.
fn vlans(net: &Pair, inner: bool) -> Result<SocketAddr> {
    for (netns, host) in [(&net.client, 1), (&net.server, 2)] {
        netns.ip("link add link veth0 name v5 type vlan id 5 egress-qos-map 0:3")?;
        netns.ip("link set v5 up")?;
        let mut top = "v5";
        if inner {
            netns.ip("link add link v5 name v6 type vlan id 6")?;
            netns.ip("link set v6 up")?;
            top = "v6";
        }
        netns.ip(&format!("addr add 10.95.0.{host}/24 dev {top}"))?;
        netns.ip(&format!("-6 addr add fd95::{host}/64 dev {top} nodad"))?;
    }
    let to: SocketAddr = "10.95.0.2:0".parse()?;
    ensure!(net.client.ping(to, 1)?, "no answer over the VLAN");
    Ok(to)
}

/// tcpdump of an expression at the server's interface.
fn watch(net: &Pair, expression: &str) -> Result<(Child, tempfile::NamedTempFile)> {
    let out = tempfile::NamedTempFile::new()?;
    let err = tempfile::NamedTempFile::new()?;
    let mut command = Command::new("tcpdump");
    command
        .args([
            "-Z",
            "root",
            "--immediate-mode",
            "-Q",
            "in",
            "-lni",
            IFACE,
            expression,
        ])
        .stdout(Stdio::from(out.reopen()?))
        .stderr(Stdio::from(err.reopen()?));
    let child = net.server.enter(|| command.spawn())??;
    wait_for("tcpdump to listen", || {
        let text = std::fs::read_to_string(err.path())?;
        Ok(text.contains("listening on").then_some(()))
    })?;
    Ok((child, out))
}

/// Functions that receive from the device, by the names of all kernels.
const RECEIVE: &str =
    "netif_rx|__netif_rx|netif_rx_internal|__netif_receive_skb|__netif_receive_skb_one_core";

/// An expression, and whether it matches a ping over VLAN 5 alone; over VLAN 6 inside VLAN 5.
const EXPRESSIONS: [(&str, bool, bool); 10] = [
    ("vlan 5 and icmp", true, false),
    ("vlan 6 and icmp", false, false),
    ("vlan and icmp", true, false),
    ("icmp", true, false),
    ("icmp and not vlan", false, false),
    ("icmp or vlan 6", true, false),
    ("vlan 5 and vlan 6 and icmp", false, true),
    ("vlan and vlan 5", false, false),
    ("not vlan 6 and icmp", true, false),
    ("vlan 5 and host 10.95.0.2", true, false),
];

/// Where tcpdump at the device sees the pings, so does netprobe; where it does not, neither.
fn as_tcpdump(net: &Pair, to: SocketAddr, expression: &str, matches: bool) -> Result<()> {
    let probe = skb(RECEIVE, &["--filter-netns"])
        .arg(net.server.path())
        .args(["--filter-ifname", IFACE, expression])
        .start()?;
    let (tcpdump, out) = watch(net, expression)?;
    let said = || -> Result<usize> {
        Ok(std::fs::read_to_string(out.path())?
            .matches("echo request")
            .count())
    };
    ensure!(net.client.ping(to, 1)?, "no answer");
    if matches {
        wait_for(&format!("tcpdump of '{expression}'"), || {
            Ok((said()? > 0).then_some(()))
        })?;
        probe.wait_line("10.95.0.1->10.95.0.2")?;
    }
    end(tcpdump)?;
    let done = probe.stop()?;
    done.expect_success()?;
    let (seen, requests) = (said()?, done.lines_with("10.95.0.1->10.95.0.2").len());
    ensure!(
        (seen > 0, requests > 0) == (matches, matches),
        "'{expression}': tcpdump has {seen}, netprobe {requests}:\n{done}"
    );
    Ok(())
}

/// veth keeps the tag beside the packet.
fn vlan_beside() -> Result<()> {
    let net = Pair::new()?;
    let to = vlans(&net, false)?;
    for (expression, matches, _) in EXPRESSIONS {
        as_tcpdump(&net, to, expression, matches)?;
    }
    // It is shown, and written into the frames of a file. At the VLAN's own interface there is no tag any more.
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("tags.pcapng");
    let probe = skb(&format!("{RECEIVE}|icmp_rcv"), &["icmp", "--filter-netns"])
        .arg(net.server.path())
        .arg("-w")
        .arg(&file)
        .start()?;
    ensure!(net.client.ping(to, 1)?, "no answer");
    probe.wait_line(" icmp_rcv")?;
    let done = probe.stop()?;
    ensure!(
        !done.lines_with(" vlan=5,p=3").is_empty(),
        "no tag is shown:\n{done}"
    );
    ensure!(
        !done.lines_with("icmp_rcv")[0].contains("vlan="),
        "a tag that has been taken away:\n{done}"
    );
    let tagged = Command::new("tcpdump")
        .args(["-Z", "root", "-nr"])
        .arg(&file)
        .arg("vlan 5 and icmp")
        .output()?;
    ensure!(!tagged.stdout.is_empty(), "no tag in the file:\n{done}");
    Ok(())
}

/// The sender puts the outer tag into the frame itself; or there are two tags, one of them in the frame.
fn vlan_in_the_frame() -> Result<()> {
    let net = Pair::new()?;
    let to = vlans(&net, true)?;
    for (expression, _, matches) in EXPRESSIONS {
        as_tcpdump(&net, to, expression, matches)?;
    }
    let net = Pair::new()?;
    let to = vlans(&net, false)?;
    for (netns, words) in [(&net.client, TXVLAN), (&net.server, RXVLAN)] {
        switch_off(netns, words)?;
    }
    as_tcpdump(&net, to, "vlan 5 and icmp", true)?;
    as_tcpdump(&net, to, "vlan 6 and icmp", false)
}

const TXVLAN: u32 = 1 << 7;
const RXVLAN: u32 = 1 << 8;

/// As `ethtool -K veth0 txvlan off`.
fn switch_off(netns: &Netns, flag: u32) -> Result<()> {
    const SIOCETHTOOL: u64 = 0x8946;
    const ETHTOOL_GFLAGS: u32 = 0x25;
    const ETHTOOL_SFLAGS: u32 = 0x26;
    netns.enter(|| -> Result<()> {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
        let mut value = [ETHTOOL_GFLAGS, 0u32];
        for command in [ETHTOOL_GFLAGS, ETHTOOL_SFLAGS] {
            value[0] = command;
            if command == ETHTOOL_SFLAGS {
                value[1] &= !flag;
            }
            // SAFETY: ifreq is integers, arrays and a pointer: all zeros is a value.
            let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
            for (to, from) in request.ifr_name.iter_mut().zip(IFACE.bytes()) {
                *to = from as libc::c_char;
            }
            request.ifr_ifru.ifru_data = value.as_mut_ptr().cast();
            // SAFETY: the request, and the two numbers that it points to, live through the call.
            let done =
                unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL as _, &raw mut request) };
            ensure!(done == 0, "ethtool: {}", std::io::Error::last_os_error());
        }
        Ok(())
    })?
}

/// What has come out of a tunnel begins with IP, whatever lies before it.
fn tunnel_devices() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    for (kind, options) in [("gre", "remote"), ("ipip", "remote"), ("gre", "key 5")] {
        for (here, there, host) in [(&net.client, &net.server, 1), (&net.server, &net.client, 2)] {
            let (local, remote) = (here.v4(0).ip(), there.v4(0).ip());
            let ends = if options == "remote" {
                format!("remote {remote}")
            } else {
                options.to_owned()
            };
            here.ip(&format!("link add t9 type {kind} local {local} {ends}"))?;
            here.ip(&format!("addr add 10.97.0.{host}/24 dev t9"))?;
            here.ip("link set t9 up")?;
            if options != "remote" {
                here.ip(&format!(
                    "neigh add 10.97.0.{} lladdr {remote} dev t9",
                    3 - host
                ))?;
            }
        }
        let to: SocketAddr = "10.97.0.2:0".parse()?;
        let probe = skb(
            "gro_cells_receive|icmp_rcv|dev_hard_start_xmit",
            &["--filter-netns"],
        )
        .arg(net.server.path())
        .args(["--filter-ifname", "t9", "icmp and host 10.97.0.1"])
        .start()?;
        ensure!(net.client.ping(to, 1)?, "no answer");
        probe.wait_line("dev_hard_start_xmit")?;
        let done = probe.stop()?;
        done.expect_success()?;
        for function in ["gro_cells_receive", "icmp_rcv"] {
            ensure!(
                !done.lines_with(function).is_empty(),
                "{kind} {options}: nothing in {function}:\n{done}"
            );
        }
        for netns in [&net.client, &net.server] {
            netns.ip("link del t9")?;
        }
    }
    Ok(())
}
