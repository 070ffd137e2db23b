//! XDP at tunnel devices: what is shown, matched and written is the packet that the device has received, as tcpdump has it there, with
//! whatever outer headers XDP sees in front of it.

use std::os::fd::AsFd;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use libbpf_rs::{ObjectBuilder, Xdp, XdpFlags};

use crate::common::{Case, Env, Netns, Netprobe, Pair, case};
use crate::xdp::{LOOK, summary};

const DEVICE: &str = "t9";

pub fn cases() -> Vec<Case> {
    let tunnel = |name, body| {
        case(name, body)
            .xdp()
            .program("tcpdump")
            .program("ping")
            .when(lacks_tunnels)
    };
    vec![
        tunnel("tunnels_of_two_ends", of_two_ends).once_on("6.12"),
        tunnel("tunnels_without_a_far_end", without_a_far_end).once_on("6.1"),
        tunnel("tunnels_over_ipv6", over_ipv6),
        tunnel("tunnels_traced_programs", traced)
            .once_on("6.12")
            .fentry(),
        case("tunnels_wireguard", wireguard)
            .once_on("newest")
            .xdp()
            .program("wg")
            .program("tcpdump")
            .program("ping")
            .when(lacks_wireguard),
    ]
}

pub fn lacks_tunnels(_: &Env) -> Option<String> {
    lacks(
        "GRE or IPIP",
        &[
            "gre local 127.0.0.1 remote 127.0.0.2",
            "ipip local 127.0.0.1 remote 127.0.0.2",
        ],
    )
}

fn lacks_wireguard(_: &Env) -> Option<String> {
    lacks("WireGuard", &["wireguard"])
}

fn lacks(what: &str, kinds: &[&str]) -> Option<String> {
    let made = Netns::new("tunnels").and_then(|netns| {
        kinds.iter().try_for_each(|kind| {
            netns.ip(&format!("link add t9 type {kind}"))?;
            netns.ip("link del t9").map(|_| ())
        })
    });
    let error = made.err()?;
    Some(format!("this kernel has no {what}: {error:#}"))
}

/// A pair of namespaces with a tunnel between them; its ends are 10.97.0.1 and 10.97.0.2.
struct Tunnel {
    net: Pair,
}

impl Tunnel {
    /// `kind`: words for `ip link add`, with LOCAL and REMOTE for the addresses below it.
    fn new(client: &str, server: &str) -> Result<Self> {
        let net = Pair::new()?;
        net.fix_neighbours()?;
        let sides = [
            (&net.client, &net.server, client, 1),
            (&net.server, &net.client, server, 2),
        ];
        for (here, there, kind, host) in sides {
            let v6 = kind.contains("6");
            let ip = |side: &Netns| if v6 { side.v6(0).ip() } else { side.v4(0).ip() };
            let (local, remote) = (ip(here), ip(there));
            let words = kind
                .replace("LOCAL", &local.to_string())
                .replace("REMOTE", &remote.to_string());
            here.ip(&format!("link add {DEVICE} type {words}"))?;
            here.ip(&format!("addr add 10.97.0.{host}/24 dev {DEVICE}"))?;
            here.sysctl("net/ipv6/conf/t9/disable_ipv6", "1")?;
            here.ip(&format!("link set {DEVICE} up"))?;
            if words.contains("key") {
                let other = 3 - host;
                here.ip(&format!(
                    "neigh add 10.97.0.{other} lladdr {remote} dev {DEVICE}"
                ))?;
            }
        }
        Ok(Self { net })
    }

    fn dump(&self) -> Netprobe<'_> {
        Netprobe::new("xdpdump")
            .args(["--iface", DEVICE])
            .netns(&self.net.server)
    }

    fn ping(&self, count: u32) -> Result<()> {
        let answered = self.net.client.ping("10.97.0.2:0".parse()?, count)?;
        ensure!(answered, "no answer");
        Ok(())
    }

    /// Text, expression and file. The packets go on as they came: the pings are answered.
    fn inner_packets(&self, kind: &str) -> Result<()> {
        let probe = self.dump().arg("icmp and dst host 10.97.0.2").start()?;
        self.ping(2)?;
        let done = probe.stop()?;
        done.expect_success()?;
        let requests = done.lines_with(" IP 10.97.0.1 > 10.97.0.2: ICMP echo request, id ");
        ensure!(requests.len() == 2, "{kind}:\n{done}");
        ensure!(
            requests[0].ends_with("length 64 (84 bytes)"),
            "{kind}:\n{done}"
        );
        ensure!(summary(&done)?[0] == 2, "{kind}:\n{done}");
        let probe = self
            .dump()
            .arg("udp or ip6 or proto gre or proto 4")
            .start()?;
        self.ping(1)?;
        let done = probe.stop()?;
        ensure!(
            summary(&done)?[0] == 0,
            "{kind}: outer headers match:\n{done}"
        );

        let dir = tempfile::tempdir()?;
        let file = dir.path().join("x.pcapng");
        let probe = self
            .dump()
            .arg("-w")
            .arg(&file)
            .args(["-s", "40"])
            .start()?;
        self.ping(2)?;
        probe.stop()?.expect_success()?;
        let read = Command::new("tcpdump")
            .args(["-Z", "root", "-nr"])
            .arg(&file)
            .output()?;
        let text = String::from_utf8_lossy(&read.stdout);
        let said = String::from_utf8_lossy(&read.stderr);
        ensure!(
            text.matches("IP 10.97.0.1 > 10.97.0.2: ICMP echo request")
                .count()
                == 2
                && text.lines().count() == 2
                && said.contains("RAW"),
            "{kind}: in the file:\n{text}{said}"
        );
        Ok(())
    }
}

/// Before 5.14 XDP sees the outer IP header of GRE, and the outer Ethernet header of the others.
fn of_two_ends() -> Result<()> {
    for kind in ["gre", "ipip", "sit mode ipip"] {
        let words = format!("{kind} local LOCAL remote REMOTE");
        Tunnel::new(&words, &words)?.inner_packets(kind)?;
    }
    Ok(())
}

/// Multipoint GRE shows the outer IP header on each kernel.
fn without_a_far_end() -> Result<()> {
    for options in ["key 5", "csum seq key 5"] {
        let words = format!("gre local LOCAL {options}");
        Tunnel::new(&words, &words)?.inner_packets(&words)?;
    }
    let group = "gre local LOCAL remote 239.1.1.1 dev veth0";
    Tunnel::new(group, group)?.inner_packets(group)?;
    // Its answers have no way, and need none.
    let words = "ipip local LOCAL remote REMOTE";
    let tunnel = Tunnel::new(words, "ipip local LOCAL")?;
    let probe = tunnel.dump().args(["-c", "1", "icmp"]).start()?;
    tunnel.net.client.ping("10.97.0.2:0".parse()?, 1)?;
    let done = probe.wait()?;
    done.expect_stdout(" IP 10.97.0.1 > 10.97.0.2: ICMP echo request, id ")
}

fn over_ipv6() -> Result<()> {
    for kind in ["ip6gre", "ip6tnl mode ipip6"] {
        let words = format!("{kind} local LOCAL remote REMOTE");
        Tunnel::new(&words, &words)?.inner_packets(kind)?;
    }
    Ok(())
}

/// A program at the device, watched by xdpdump and by skb.
fn traced() -> Result<()> {
    let words = "gre local LOCAL key 5";
    let tunnel = Tunnel::new(words, words)?;
    let server = &tunnel.net.server;
    let object = ObjectBuilder::default().open_memory(LOOK)?.load()?;
    let program = object.progs().next().context("no program")?;
    let index = server.ifindex(DEVICE)? as i32;
    let program = program.as_fd();
    server.enter(|| Xdp::new(program).attach(index, XdpFlags::SKB_MODE))??;

    let probe = tunnel
        .dump()
        .args(["--mode", "trace", "--rx-capture", "entry,exit", "icmp"])
        .start()?;
    tunnel.ping(2)?;
    let done = probe.stop()?;
    done.expect_success()?;
    let request = "IP 10.97.0.1 > 10.97.0.2: ICMP echo request, id ";
    for end in ["entry", "exit[PASS]"] {
        let lines = done.lines_with(&format!("xdp_look()@{end} {request}"));
        ensure!(lines.len() == 2, "{end}:\n{done}");
        ensure!(lines[0].ends_with("(84 bytes)"), "{done}");
    }
    let probe = tunnel.dump().args(["--mode", "trace", "--diff"]).start()?;
    tunnel.ping(1)?;
    let done = probe.stop()?;
    ensure!(
        done.lines_with(request).len() == 1 && !done.stdout.contains('~'),
        "{done}"
    );

    let run = Netprobe::new("skb")
        .args(["--filter-trace-xdp", "--filter-func", "icmp_rcv"])
        .args(["--filter-netns"])
        .arg(server.path())
        .arg("icmp and src host 10.97.0.1")
        .start()?;
    tunnel.ping(1)?;
    run.wait_line(" icmp_rcv")?;
    let done = run.stop()?;
    let lines = done.lines_with(" xdp_look[xdp:");
    ensure!(
        lines.len() == 2
            && lines
                .iter()
                .all(|line| line.contains("10.97.0.1->10.97.0.2(icmp)")),
        "{done}"
    );
    Ok(())
}

fn wireguard() -> Result<()> {
    // Two key pairs, made once by `wg genkey` and `wg pubkey`.
    const KEYS: [(&str, &str); 2] = [
        (
            "2IR7MvN4euWiHcyuMAJqhcFUhyKgoBvID4O1NvjSwUs=",
            "YSfjN2FQGaAZc69Vx6VeoYXRRNvzNn+iVhIA2IsJGiA=",
        ),
        (
            "CElyGkAV7TH8OKXgyZFA+u9Ih16d9aPTPp3nk70JmHk=",
            "Y/wYe6hJ+HOmKJkpnUwM46WM89fjSZ2XtBw8EOuIz0I=",
        ),
    ];
    let tunnel = Tunnel::new("wireguard", "wireguard")?;
    let dir = tempfile::tempdir()?;
    let net = &tunnel.net;
    for (own, other, here, there) in [
        (KEYS[0], KEYS[1], &net.client, &net.server),
        (KEYS[1], KEYS[0], &net.server, &net.client),
    ] {
        let file = dir.path().join("key");
        std::fs::write(&file, own.0)?;
        let endpoint = there.v4(51820);
        here.cmd(&format!(
            "wg set {DEVICE} listen-port 51820 private-key {} peer {} allowed-ips 0.0.0.0/0 endpoint {endpoint}",
            file.display(),
            other.1
        ))?;
    }
    tunnel.inner_packets("wireguard")
}
