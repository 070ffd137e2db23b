//! `netprobe icmp --sent`: where the sending side of a ping spent its time, and what became of the request.

use std::fs;
use std::process::Command;

use anyhow::{Result, ensure};

use super::icmp::{collect, cpus, pair, records};
use crate::common::{Case, Netns, Netprobe, case};

pub fn cases() -> Vec<Case> {
    vec![
        case("icmp_sent", sent).trace().program("ping").limit(400),
        case("icmp_sent_lost", sent_lost)
            .once_on("6.1")
            .trace()
            .program("ping")
            .program("iptables")
            .limit(400),
        case("icmp_sent_with_their_own_header", sent_hdrincl)
            .once_on("newest")
            .trace()
            .when(|_| (cpus() < 2).then(|| "needs two CPUs".to_owned())),
        case("icmp_sent_flood", sent_flood)
            .old_and_new()
            .trace()
            .program("ping")
            .limit(400),
    ]
}

fn sent() -> Result<()> {
    let net = pair()?;
    let probe = Netprobe::new("icmp")
        .args(["--sent", "--timeout", "60", "--output-json"])
        .start()?;
    let (v4, v6) = ("10.77.0.2", "fd77::2");
    // Raw sockets, then ping sockets (root's group may have them).
    for range in ["1 0", "0 0"] {
        net.client.sysctl("net/ipv4/ping_group_range", range)?;
        net.client.cmd(&format!("ping -q -i 0.01 -c 2 {v4}"))?;
        net.client
            .cmd(&format!("ping -q -i 0.01 -c 2 -s 100 {v6}"))?;
    }
    let (done, all) = collect(probe, "request", 8)?;
    let requests = records(&all, "request");
    ensure!(requests.len() == 8, "{done}");
    let netns = net.client.inode()?;
    let ifindex = net.client.ifindex("veth0")?;
    for (i, r) in requests.iter().enumerate() {
        let (from, to, len) = if i % 4 < 2 {
            ("10.77.0.1", v4, 84)
        } else {
            ("fd77::1", v6, 148)
        };
        ensure!(r["result"] == "reply" && r["seq"] == i % 2 + 1, "{r}");
        ensure!(
            r["saddr"] == from && r["daddr"] == to && r["len"] == len,
            "{r}"
        );
        ensure!(r["comm"] == "ping" && r["pid"].as_u64() > Some(0), "{r}");
        ensure!(
            r["netns"] == netns && r["iface"] == "veth0" && r["ifindex"] == ifindex,
            "{r}"
        );
        let part = |name: &str| r["stages_ns"][name].as_u64();
        let sum: u64 = ["out", "wire", "in", "read"]
            .into_iter()
            .filter_map(part)
            .sum();
        ensure!(
            ["out", "wire", "in", "read"]
                .iter()
                .all(|n| part(n).is_some()),
            "a part is missing: {r}"
        );
        ensure!(
            part("total") == Some(sum),
            "the parts are not the whole: {r}"
        );
    }
    let summary = records(&all, "summary");
    ensure!(
        summary[0]["side"] == "sent" && summary[0]["requests"] == 8 && summary[0]["replies"] == 8,
        "{done}"
    );
    Ok(())
}

fn sent_lost() -> Result<()> {
    let net = pair()?;
    let probe = Netprobe::new("icmp")
        .args(["--sent", "--timeout", "5", "--output-json"])
        .start()?;
    let has_reasons = fs::read("/sys/kernel/btf/vmlinux")?
        .windows(27)
        .any(|w| w == b"SKB_DROP_REASON_NOT_SPECIFI");
    // Who drops what, and how it is told.
    let rule = "INPUT -p icmp -j DROP";
    let drops = [
        (&net.server, rule, "this kernel dropped the request"),
        (
            &net.client,
            "OUTPUT -p icmp -j DROP",
            "this kernel dropped the request",
        ),
        (&net.client, rule, "this kernel dropped the reply"),
    ];
    for (i, (netns, rule, _)) in drops.iter().enumerate() {
        netns.cmd(&format!("iptables -I {rule}"))?;
        let _ = net
            .client
            .cmd(&format!("ping -q -c 1 -W 0.1 -e {} 10.77.0.2", 100 + i));
        netns.cmd(&format!("iptables -D {rule}"))?;
    }
    // Nobody has this address, and nobody answers for it.
    net.client
        .ip("neigh add 10.77.0.9 lladdr 02:00:00:00:00:09 dev veth0")?;
    let _ = net.client.cmd("ping -q -c 1 -W 0.1 -e 103 10.77.0.9");
    let (done, all) = collect(probe, "request", 4)?;
    let requests = records(&all, "request");
    for (i, (r, (_, _, why))) in requests.iter().zip(&drops).enumerate() {
        ensure!(r["result"] == "lost" && r["id"] == 100 + i, "{r}");
        ensure!(r["lost"]["why"] == *why, "{r}");
        ensure!(
            r["lost"]["location"]
                .as_str()
                .is_some_and(|l| l.contains('+')),
            "{r}"
        );
        if has_reasons {
            ensure!(r["lost"]["reason"] == "NETFILTER_DROP", "{r}");
        } else {
            ensure!(r["lost"]["reason"].is_null(), "{r}");
        }
    }
    ensure!(requests.len() == 4, "{done}");
    // Its packet went to the other end, which is not 10.77.0.9 and throws it away: by the MAC address, before the stack looks.
    ensure!(
        requests[3]["id"] == 103 && requests[3]["result"] == "lost",
        "{done}"
    );
    let summary = records(&all, "summary")[0];
    ensure!(summary["lost"] == 4 && summary["replies"] == 0, "{done}");
    Ok(())
}

/// The Internet checksum.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes
        .chunks(2)
        .map(|w| u32::from(w[0]) << 8 | u32::from(w[1]));
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    (!((sum + (sum >> 16)) as u16)).to_be_bytes()
}

/// An echo request with the IP header that its sender made (IP_HDRINCL), sent on a CPU.
fn send_with_header(netns: &Netns, cpu: usize, id: u8) -> Result<()> {
    let mut echo = [8, 0, 0, 0, 0, id, 0, 1];
    let sum = checksum(&echo);
    echo[2..4].copy_from_slice(&sum);
    // The kernel fills in length and checksum.
    let mut packet = vec![
        0x45, 0, 0, 0, 0, 0, 0, 0, 64, 1, 0, 0, 10, 77, 0, 1, 10, 77, 0, 2,
    ];
    packet.extend(echo);
    netns.enter(|| -> Result<()> {
        let mut set = nix::sched::CpuSet::new();
        set.set(cpu)?;
        nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set)?;
        // SAFETY: plain numbers; gives an fd or a negative number.
        let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_RAW) };
        ensure!(fd >= 0, "socket: {}", std::io::Error::last_os_error());
        // SAFETY: a fresh fd that nothing else owns. send_to and the like are the same for each kind of socket.
        let socket: std::net::UdpSocket = unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) };
        socket.send_to(&packet, "10.77.0.2:0")?;
        Ok(())
    })?
}

/// Requests of which the kernel makes no header come past the hook of the others: the filters hold for them too.
fn sent_hdrincl() -> Result<()> {
    let net = pair()?;
    let probe = Netprobe::new("icmp")
        .args(["--sent", "--timeout", "1", "--output-json"])
        .args(["--filter-cpu", "1", "icmp[4:2] != 7"])
        .start()?;
    for (cpu, id) in [(1, 7), (0, 8), (1, 9)] {
        send_with_header(&net.client, cpu, id)?;
    }
    // Nobody reads the replies.
    let (done, all) = collect(probe, "request", 1)?;
    let requests = records(&all, "request");
    ensure!(requests.len() == 1, "{done}");
    let r = requests[0];
    ensure!(r["id"] == 9 && r["cpu"] == 1, "{done}");
    ensure!(
        r["saddr"] == "10.77.0.1" && r["daddr"] == "10.77.0.2",
        "{done}"
    );
    Ok(())
}

fn sent_flood() -> Result<()> {
    const COUNT: u64 = 1000;
    let net = pair()?;
    // Every third request does not arrive.
    net.server.nft(
        "add table netdev t; add chain netdev t in { type filter hook ingress device veth0 priority 0; }; add rule netdev t in icmp type echo-request icmp sequence & 3 == 3 drop",
    )?;
    let probe = Netprobe::new("icmp")
        .args(["--sent", "--output-json", "--timeout", "60"])
        .start()?;
    let told = net.client.output(Command::new("sh").args([
        "-c",
        &format!("ping -q -f -c {COUNT} -W 1 10.77.0.2 || true"),
    ]))?;
    let done = probe.stop()?;
    done.expect_success()?;
    let all = done.json()?;
    let summary = records(&all, "summary")[0];
    let n = |name: &str| summary[name].as_u64().unwrap_or(0);
    ensure!(n("requests") == COUNT, "{summary}\n{told}");
    ensure!(n("replies") + n("lost") + n("open") == COUNT, "{summary}");
    // The kernel says which: nothing but those that were dropped is lost.
    ensure!(
        told.contains(&format!("{} received", n("replies"))),
        "{summary}\n{told}"
    );
    // What came late is there all the same.
    for loss in records(&all, "loss") {
        ensure!(loss["lost"] == 0 && loss["missed"] == 0, "{loss}");
    }
    Ok(())
}
