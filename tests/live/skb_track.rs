//! `netprobe skb --filter-track-skb` where one packet becomes several, or several one: segments, GRO, fragments; and through DNAT.

use std::collections::HashSet;
use std::io::Write;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::common::{Case, Env, Finished, Netns, Netprobe, Pair, case, deadline};

pub fn cases() -> Vec<Case> {
    vec![
        case("skb_track_segments", segments).trace(),
        case("skb_track_fragments", fragments).trace(),
        case("skb_track_dnat", dnat).trace().program("nft"),
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
