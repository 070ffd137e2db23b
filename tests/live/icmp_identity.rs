//! `netprobe icmp`: which reply is whose, whatever the network does to addresses, and which drop is the loss of a request.

use std::net::UdpSocket;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::icmp::{collect, pair, records};
use super::tcpconnect_outcome::socket;
use crate::common::{Case, Env, Netns, Netprobe, Running, case};

pub fn cases() -> Vec<Case> {
    vec![
        case("icmp_whose_nat", nat)
            .trace()
            .program("ping")
            .program("nft"),
        case("icmp_whose_containers", containers)
            .once_on("newest")
            .trace()
            .program("ping")
            .limit(400),
        case("icmp_whose_same_addresses", same_addresses)
            .once_on("5.10")
            .trace()
            .program("ping")
            .program("nft"),
        case("icmp_whose_copies", copies)
            .once_on("5.10")
            .trace()
            .program("ping")
            .limit(400),
        case("icmp_whose_duplicates", duplicates)
            .once_on("5.10")
            .trace()
            .program("nft")
            .program("ping")
            .when(lacks_dup),
        case("icmp_whose_full_socket", full_socket)
            .once_on("newest")
            .trace(),
        case("icmp_whose_late_reply", late_reply)
            .once_on("newest")
            .trace()
            .program("ping")
            .program("tc"),
    ]
}

fn sending(timeout: &str) -> Result<Running> {
    Netprobe::new("icmp")
        .args(["--sent", "--timeout", timeout, "--output-json"])
        .start()
}

fn answering() -> Result<Running> {
    Netprobe::new("icmp").arg("--output-json").start()
}

fn is_answered(r: &Value) -> Result<()> {
    ensure!(r["result"] == "reply", "{r}");
    for part in ["out", "wire", "in", "read", "total"] {
        ensure!(r["stages_ns"][part].is_u64(), "no {part}: {r}");
    }
    Ok(())
}

fn is_handled(e: &Value) -> Result<()> {
    for stage in ["wait", "poll", "stack", "reply", "total"] {
        ensure!(e["stages_ns"][stage].is_u64(), "no {stage}: {e}");
    }
    Ok(())
}

fn lost<'a>(requests: &[&'a Value], id: u64) -> Result<&'a Value> {
    let mut found = requests.iter().filter(|r| r["id"] == id);
    let r = found.next().with_context(|| format!("no id {id}"))?;
    ensure!(r["result"] == "lost", "{r}");
    Ok(&r["lost"])
}

/// The sender's own machine translates where the request goes and where it comes from, and the answering one where it ends.
fn nat() -> Result<()> {
    let net = pair()?;
    net.client.nft(
        "add table ip n; add chain ip n o { type nat hook output priority -100; }; \
         add rule ip n o ip daddr 10.96.0.1 dnat to 10.77.0.3; \
         add chain ip n p { type nat hook postrouting priority 100; }; \
         add rule ip n p ip daddr 10.77.0.3 snat to 10.77.0.7; \
         add table ip6 n; add chain ip6 n o { type nat hook output priority -100; }; \
         add rule ip6 n o ip6 daddr fd96::1 dnat to fd77::3",
    )?;
    net.client.ip("addr add 10.77.0.7/24 dev veth0")?;
    net.client.ip("route add 10.96.0.0/16 via 10.77.0.2")?;
    net.client.ip("route add fd96::/64 via fd77::2")?;
    net.server.nft(
        "add table ip n; add chain ip n i { type nat hook prerouting priority -100; }; \
         add rule ip n i ip daddr 10.77.0.3 dnat to 10.77.0.2; \
         add table ip6 n; add chain ip6 n i { type nat hook prerouting priority -100; }; \
         add rule ip6 n i ip6 daddr fd77::3 dnat to fd77::2",
    )?;
    let (mac, there) = (net.server.mac("veth0")?, net.client.mac("veth0")?);
    for to in ["10.77.0.3", "fd77::3"] {
        net.client.ip(&format!(
            "neigh replace {to} lladdr {mac} dev veth0 nud permanent"
        ))?;
    }
    net.server.ip(&format!(
        "neigh replace 10.77.0.7 lladdr {there} dev veth0 nud permanent"
    ))?;
    let (sent, handled) = (sending("60")?, answering()?);
    net.client.cmd("ping -q -i 0.01 -c 3 10.96.0.1")?;
    net.client.cmd("ping -q -i 0.01 -c 3 fd96::1")?;
    let (done, all) = collect(sent, "request", 6)?;
    for (i, r) in records(&all, "request").iter().enumerate() {
        is_answered(r)?;
        ensure!(
            r["daddr"] == ["10.96.0.1", "fd96::1"][i / 3] && r["seq"] == i % 3 + 1,
            "{r}"
        );
    }
    ensure!(records(&all, "summary")[0]["lost"] == 0, "{done}");
    let (done, all) = collect(handled, "echo", 6)?;
    for (i, e) in records(&all, "echo").iter().enumerate() {
        is_handled(e)?;
        ensure!(
            e["saddr"] == ["10.77.0.7", "fd77::1"][i / 3]
                && e["daddr"] == ["10.77.0.2", "fd77::2"][i / 3],
            "{e}"
        );
    }
    ensure!(records(&all, "summary")[0]["replies"] == 6, "{done}");
    Ok(())
}

/// Interfaces on top of another one, moved to a container: what they get is received in the namespace of the one below.
fn containers() -> Result<()> {
    let net = pair()?;
    net.server
        .ip("link add link veth0 name v5 type vlan id 5")?;
    net.server.ip("link set v5 up")?;
    for (i, kind) in ["macvlan mode bridge", "ipvlan mode l2", "vlan id 5"]
        .into_iter()
        .enumerate()
    {
        let container = Netns::new("container")?;
        net.client.ip(&format!(
            "link add link veth0 name c0 netns {} type {kind}",
            container.name()
        ))?;
        let (here, there) = (format!("10.80.{i}.1"), format!("10.80.{i}.2"));
        container.ip(&format!("addr add {here}/24 dev c0"))?;
        container.ip("link set c0 up")?;
        container.wait_up("c0")?;
        let outside = if kind.starts_with("vlan") {
            "v5"
        } else {
            "veth0"
        };
        net.server
            .ip(&format!("addr add {there}/24 dev {outside}"))?;
        // Neighbours are resolved by then.
        container.cmd(&format!("ping -q -c 1 -W 10 {there}"))?;
        let (sent, handled) = (sending("60")?, answering()?);
        container.cmd(&format!("ping -q -i 0.01 -c 2 -e 21 {there}"))?;
        net.server
            .cmd(&format!("ping -q -i 0.01 -c 2 -e 22 {here}"))?;
        let (done, all) = collect(sent, "request", 4)?;
        let requests = records(&all, "request");
        for r in &requests {
            is_answered(r).with_context(|| kind)?;
        }
        let inode = container.inode()?;
        let own = requests.iter().filter(|r| r["id"] == 21);
        ensure!(
            own.filter(|r| r["netns"] == inode && r["iface"] == "c0")
                .count()
                == 2,
            "{kind}: {done}"
        );
        let (done, all) = collect(handled, "echo", 4)?;
        let echoes = records(&all, "echo");
        for e in &echoes {
            is_handled(e).with_context(|| kind)?;
        }
        let own = echoes.iter().filter(|e| e["id"] == 22);
        ensure!(
            own.filter(|e| e["netns"] == inode && e["iface"] == "c0")
                .count()
                == 2,
            "{kind}: {done}"
        );
    }
    Ok(())
}

/// Two networks with the same addresses, pings with the same id and sequence: one is dropped, the other one answered.
fn same_addresses() -> Result<()> {
    let (first, second) = (pair()?, pair()?);
    first.server.nft(
        "add table inet t; add chain inet t in { type filter hook input priority 0; }; add rule inet t in icmp type echo-request drop",
    )?;
    let probe = sending("4")?;
    let _ = first.client.cmd("ping -q -c 1 -W 0.1 -e 7 10.77.0.2");
    second.client.cmd("ping -q -c 1 -e 7 10.77.0.2")?;
    let (done, all) = collect(probe, "request", 2)?;
    let requests = records(&all, "request");
    ensure!(requests.len() == 2, "{done}");
    let of = |inode: u64| requests.iter().find(|r| r["netns"] == inode);
    let dropped = of(first.client.inode()?).with_context(|| format!("{done}"))?;
    ensure!(
        dropped["lost"]["why"] == "this kernel dropped the request",
        "{dropped}"
    );
    is_answered(of(second.client.inode()?).with_context(|| format!("{done}"))?)
}

/// Machines on a switch that sends everything everywhere.
struct Hub {
    // Dropped in this order.
    hosts: Vec<Netns>,
    _switch: Netns,
}

impl Hub {
    fn new(count: usize) -> Result<Self> {
        let switch = Netns::new("hub")?;
        // As long as no address is learnt, and here none is.
        switch.ip("link add br0 type bridge ageing_time 0 mcast_snooping 0")?;
        switch.ip("link set br0 up")?;
        let mut hosts = Vec::new();
        for i in 1..=count {
            let host = Netns::new("host")?;
            switch.ip(&format!(
                "link add p{i} type veth peer name veth0 netns {}",
                host.name()
            ))?;
            switch.ip(&format!("link set p{i} master br0 up"))?;
            host.ip(&format!("addr add 10.78.0.{i}/24 brd + dev veth0"))?;
            host.ip("link set veth0 up")?;
            host.wait_up("veth0")?;
            hosts.push(host);
        }
        for (here, there) in [(0, 1), (1, 0)] {
            let mac = hosts[there].mac("veth0")?;
            hosts[here].ip(&format!(
                "neigh replace 10.78.0.{} lladdr {mac} dev veth0 nud permanent",
                there + 1
            ))?;
        }
        Ok(Self {
            hosts,
            _switch: switch,
        })
    }
}

/// What others drop of a request that goes to all is not its loss; groups and broadcasts are answered by other addresses.
fn copies() -> Result<()> {
    let hub = Hub::new(3)?;
    let (asks, answers) = (&hub.hosts[0], &hub.hosts[1]);
    for host in &hub.hosts {
        host.sysctl("net/ipv4/icmp_echo_ignore_broadcasts", "0")?;
    }
    let probe = sending("2")?;
    asks.cmd("ping -q -c 1 -e 31 10.78.0.2")?;
    asks.cmd("ping -q -c 1 -e 32 -b 10.78.0.255")?;
    asks.cmd("ping -q -c 1 -e 33 ff02::1%veth0")?;
    // The second takes it in and passes it on to nowhere: it is gone without a drop. The third drops its copy.
    answers.ip("link add d0 type dummy")?;
    answers.ip("link set d0 up")?;
    answers.sysctl("net/ipv4/ip_forward", "1")?;
    answers.ip("addr del 10.78.0.2/24 dev veth0")?;
    answers.ip("neigh add 10.99.0.2 lladdr 02:00:00:00:00:09 dev d0")?;
    answers.ip("route add 10.78.0.2/32 via 10.99.0.2 dev d0 onlink")?;
    let _ = asks.cmd("ping -q -c 1 -W 0.1 -e 34 10.78.0.2");
    let (done, all) = collect(probe, "request", 4)?;
    let requests = records(&all, "request");
    ensure!(requests.len() == 4, "{done}");
    for id in [31, 32, 33] {
        let r = requests.iter().find(|r| r["id"] == id);
        is_answered(r.with_context(|| format!("no id {id}: {done}"))?)?;
    }
    let gone = lost(&requests, 34)?;
    ensure!(
        gone["why"] == "no reply came back" && gone["reason"].is_null(),
        "{gone}"
    );
    ensure!(
        gone["copy"]["location"]
            .as_str()
            .is_some_and(|l| l.starts_with("ip_rcv")),
        "{gone}"
    );
    let summary = records(&all, "summary")[0];
    ensure!(
        summary["lost"] == 1 && summary["dropped"] == 0 && summary["replies"] == 3,
        "{summary}"
    );
    Ok(())
}

/// A ping socket that nobody reads from, with room for a few replies: the others are dropped, and are not in its queue.
fn full_socket() -> Result<()> {
    const COUNT: usize = 8;
    let net = pair()?;
    net.client.sysctl("net/ipv4/ping_group_range", "0 0")?;
    let probe = sending("1")?;
    let socket = net.client.enter(|| -> Result<UdpSocket> {
        let fd = socket(libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_ICMP)?;
        nix::sys::socket::setsockopt(&fd, nix::sys::socket::sockopt::RcvBuf, &1)?;
        // send_to and the like are the same for each kind of socket.
        let socket = UdpSocket::from(fd);
        for seq in 1..=COUNT {
            let mut echo = vec![8, 0, 0, 0, 0, 0, 0, seq as u8];
            echo.resize(900, 0);
            socket.send_to(&echo, "10.77.0.2:0")?;
        }
        Ok(socket)
    })??;
    let (done, all) = collect(probe, "request", COUNT)?;
    drop(socket);
    let requests = records(&all, "request");
    let why = |text: &str| {
        let lost = requests.iter().filter(|r| r["lost"]["why"] == text);
        lost.count()
    };
    let dropped = why("this kernel dropped the reply");
    let queued = why("the reply is in the socket's queue, its process has not read it");
    ensure!(
        dropped > 0 && queued > 0 && dropped + queued == COUNT,
        "{dropped} dropped, {queued} in the queue:\n{done}"
    );
    ensure!(records(&all, "summary")[0]["dropped"] == dropped, "{done}");
    Ok(())
}

/// A reply that comes just behind the time limit has not "reached no socket".
fn late_reply() -> Result<()> {
    let net = pair()?;
    net.server
        .cmd("tc qdisc add dev veth0 root netem delay 1300ms")?;
    let probe = sending("1")?;
    net.client.cmd("ping -q -c 1 -W 10 -e 41 10.77.0.2")?;
    let (done, all) = collect(probe, "request", 1)?;
    let gone = lost(&records(&all, "request"), 41)?;
    ensure!(gone["why"] == "no reply came back", "{done}");
    let summary = records(&all, "summary")[0];
    ensure!(
        summary["lost"] == 1 && summary["late_replies"] == 1,
        "{summary}"
    );
    Ok(())
}

fn lacks_dup(_: &Env) -> Option<String> {
    let error = Netns::new("dup")
        .and_then(|netns| duplicate(&netns))
        .err()?;
    Some(format!("this kernel has no dup of nft: {error:#}"))
}

/// What goes to the second host goes to the third too, with data of its own.
fn duplicate(asks: &Netns) -> Result<()> {
    asks.nft(
        "add table ip t; add chain ip t out { type filter hook output priority 0; }; \
         add rule ip t out ip daddr 10.78.0.2 icmp type echo-request dup to 10.78.0.3",
    )
    .map(|_| ())
}

/// The third host drops its duplicate: of an answered request nothing is lost, and one that is ignored was not dropped.
fn duplicates() -> Result<()> {
    let hub = Hub::new(3)?;
    let (asks, answers) = (&hub.hosts[0], &hub.hosts[1]);
    for host in ["10.78.0.2", "10.78.0.3"] {
        asks.cmd(&format!("ping -q -c 1 {host}"))?;
    }
    duplicate(asks)?;
    let probe = sending("2")?;
    asks.cmd("ping -q -c 1 -e 41 10.78.0.2")?;
    answers.sysctl("net/ipv4/icmp_echo_ignore_all", "1")?;
    let _ = asks.cmd("ping -q -c 1 -W 0.1 -e 42 10.78.0.2");
    let (done, all) = collect(probe, "request", 2)?;
    let requests = records(&all, "request");
    let answered = requests.iter().find(|r| r["id"] == 41);
    is_answered(answered.with_context(|| format!("no id 41: {done}"))?)?;
    let gone = lost(&requests, 42)?;
    ensure!(
        gone["why"] == "no reply came back" && !gone["copy"].is_null(),
        "{gone}"
    );
    let summary = records(&all, "summary")[0];
    ensure!(summary["lost"] == 1 && summary["dropped"] == 0, "{summary}");
    Ok(())
}
