//! Filters against real packets beyond the expression alone: members of the sk_buff, NAT and tracking, ARP over a veth pair.

use std::net::SocketAddr;

use anyhow::{Result, ensure};

use crate::common::{Case, Finished, Netprobe, Pair, case};

pub fn cases() -> Vec<Case> {
    vec![
        case("filter_members_all_hold", members_all_hold)
            .once_on("newest")
            .trace(),
        case("filter_members_any_holds", members_any_holds)
            .once_on("newest")
            .trace(),
        case("filter_members_refused", members_refused).once_on("5.10"),
        case("filter_dnat_and_track", dnat_and_track)
            .once_on("newest")
            .trace()
            .program("nft"),
    ]
}

/// Payload of the packets that are to be shown, and of the others; an IPv4 packet has 28 bytes of headers more.
const SHOWN: usize = 50;
const OTHER: usize = 40;

/// `ip_rcv` at the server with this condition: `SHOWN` must be there, and nothing else.
fn only_shown(net: &Pair, condition: &str) -> Result<()> {
    let probe = Netprobe::new("skb")
        .args(["--filter-func", "ip_rcv", "--filter-skb-expr", condition])
        .args(["--output-json", "udp dst port 9000"])
        .start()?;
    let to = net.server.v4(9000);
    for len in [OTHER, SHOWN, OTHER, SHOWN] {
        net.client.udp_send(to, &vec![0; len])?;
    }
    probe.wait_lines("two packets", |text| {
        (text.matches("\"ip_rcv\"").count() >= 2).then_some(())
    })?;
    let done = probe.stop()?;
    done.expect_success()?;
    let rows: Vec<_> = done.json()?;
    let lengths: Vec<_> = rows
        .iter()
        .filter(|row| row["type"] == "event")
        .map(|row| row["len"].as_u64().unwrap_or(0) as usize)
        .collect();
    ensure!(lengths == [SHOWN + 28; 2], "{lengths:?}:\n{done}");
    Ok(())
}

/// A pointer's member, a bit field, an enum's constant in a bit field, three pointers deep, a mask, an array's element,
/// bytes in network order: each true, and the length only of some.
fn members_all_hold() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let server = &net.server;
    only_shown(
        &net,
        &format!(
            "skb->dev->ifindex == {} && skb->pkt_type == 0 && skb->dev->reg_state == NETREG_REGISTERED && \
             skb->dev->nd_net.net->ns.inum == {} && (skb->dev->flags & 1) == 1 && skb->dev->name[0] == 118 && \
             skb->protocol == htons(0x0800) && !skb->mark && skb->len > {}",
            server.ifindex(Pair::IFACE)?,
            server.inode()?,
            OTHER + 28,
        ),
    )
}

/// Each of these is false but the last: were one of them taken for true, all packets would be shown.
fn members_any_holds() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let server = &net.server;
    only_shown(
        &net,
        &format!(
            "skb->dev->ifindex == {} || skb->pkt_type != 0 || skb->dev->reg_state == NETREG_UNREGISTERED || \
             skb->dev->nd_net.net->ns.inum != {} || (skb->dev->flags & 1) == 0 || skb->dev->name[1] == 118 || \
             skb->protocol == htons(0x86dd) || skb->mark || skb->dev->ip_ptr == NULL || skb->len == {}",
            server.ifindex(Pair::IFACE)? + 1000,
            server.inode()?,
            SHOWN + 28,
        ),
    )
}

/// What has no such member or constant is refused before anything is attached, with names that are close.
fn members_refused() -> Result<()> {
    for (condition, words) in [
        ("skb->dev->ifindx == 1", "did you mean ifindex"),
        (
            "skb->dev->reg_state == NETREG_REGISTRED",
            "NETREG_REGISTERED",
        ),
        ("skb->pkt_type == 8", "does not fit"),
    ] {
        let done = Netprobe::new("skb")
            .args(["--filter-skb-expr", condition])
            .run()?;
        done.expect_code(2)?;
        done.expect_stderr(words)?;
    }
    Ok(())
}

/// An address that nobody has becomes the server's on the way out. The expression names the first: without tracking the
/// packet is lost from sight behind the translation, with it the packet is shown with the new address too.
fn dnat_and_track() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let mac = net.server.mac(Pair::IFACE)?;
    net.client.ip(&format!(
        "neigh replace 10.77.0.9 lladdr {mac} dev veth0 nud permanent"
    ))?;
    let server = net.server.v4(0).ip();
    net.client.nft(&format!(
        "add table ip n; add chain ip n out {{ type nat hook output priority -100; }}; \
         add rule ip n out ip daddr 10.77.0.9 dnat to {server}"
    ))?;
    let socket = net.server.udp_bind(net.server.v4(9000))?;
    let to = SocketAddr::from(([10, 77, 0, 9], 9000));
    let trace = |track: &[&str]| -> Result<Finished> {
        let probe = Netprobe::new("skb")
            .args(["--filter-func", "__ip_local_out|ip_output|ip_rcv"])
            .args(track)
            .arg("udp and dst host 10.77.0.9")
            .start()?;
        net.client.udp_send(to, b"hello")?;
        socket.recv_from(&mut [0; 64])?;
        probe.wait_line("__ip_local_out")?;
        if !track.is_empty() {
            probe.wait_line("ip_rcv")?;
        }
        let done = probe.stop()?;
        done.expect_success()?;
        done.expect_stdout("->10.77.0.9:9000")?;
        Ok(done)
    };
    let done = trace(&[])?;
    ensure!(
        done.lines_with(&format!("->{server}:9000")).is_empty(),
        "seen behind the translation without tracking:\n{done}"
    );
    let done = trace(&["--filter-track-skb"])?;
    for function in ["ip_output", "ip_rcv"] {
        let lines = done.lines_with(function);
        ensure!(
            lines
                .iter()
                .any(|line| line.contains(&format!("->{server}:9000"))),
            "{function} is not shown with the new address:\n{done}"
        );
    }
    Ok(())
}
