//! What the live tests of XDP share: quiet veth pairs, floods, programs, what a run said at its end.

use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, anyhow, ensure};
use libbpf_rs::{Xdp, XdpFlags};

use crate::common::{Finished, Netns, Netprobe, Pair, Running, wait_for};

pub const ECHO: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/xdp_echo.o"));
pub const DROP_PORT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/xdp_drop_port.o"));
pub const REWRITE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/xdp_rewrite.o"));
pub const LOOK: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/xdp_look.o"));
pub const STOP: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/xdp_stop.o"));
pub const COUNT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/xdp_count.o"));
pub const IFACE: &str = Pair::IFACE;
/// The examples' discard port.
pub const PORT: u16 = 9;
pub const FRAGS: u32 = 1 << 5;

/// QEMU without hardware behind it.
pub fn is_emulated() -> bool {
    std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("QEMU"))
}

/// Fewer packets where each takes long.
pub fn many(count: u32) -> u32 {
    if is_emulated() { count / 20 } else { count }
}

/// A pair without traffic of its own: no IPv6, no ARP.
pub fn quiet_pair() -> Result<Pair> {
    let net = Pair::new()?;
    for netns in [&net.client, &net.server] {
        netns.sysctl("net/ipv6/conf/veth0/disable_ipv6", "1")?;
    }
    let mac = net.server.mac(IFACE)?;
    let ip = net.server.v4(0).ip();
    net.client.ip(&format!(
        "neigh replace {ip} lladdr {mac} dev veth0 nud permanent"
    ))?;
    let mac = net.client.mac(IFACE)?;
    let ip = net.client.v4(0).ip();
    net.server.ip(&format!(
        "neigh replace {ip} lladdr {mac} dev veth0 nud permanent"
    ))?;
    Ok(net)
}

pub fn dump(net: &Pair) -> Netprobe<'_> {
    Netprobe::new("xdpdump")
        .args(["--iface", IFACE])
        .netns(&net.server)
}

/// The same, in front of the program that is there also where it could be traced.
pub fn chained(net: &Pair) -> Netprobe<'_> {
    dump(net).args(["--mode", "chain"])
}

pub fn xdpchain(net: &Pair, words: &str) -> Result<Finished> {
    let done = Netprobe::new("xdpchain")
        .args(words.split_whitespace())
        .netns(&net.server)
        .run()?;
    done.expect_success()?;
    Ok(done)
}

/// Sends `count` datagrams of `len` bytes to a port.
pub fn flood(net: &Pair, port: u16, count: u32, len: usize) -> Result<()> {
    let socket: UdpSocket = net.client.udp_bind(net.client.v4(0))?;
    let payload = vec![0x55; len];
    let to = net.server.v4(port);
    for _ in 0..count {
        // Port unreachable comes back on this socket as an error of the next send.
        while socket.send_to(&payload, to).is_err() {}
    }
    Ok(())
}

/// An object file of the examples, written down.
pub fn object(dir: &tempfile::TempDir, name: &str, bytes: &[u8]) -> Result<PathBuf> {
    let path = dir.path().join(name);
    std::fs::write(&path, bytes)?;
    Ok(path)
}

/// What was said in the summary: captured, lost, matched, seen.
pub fn summary(done: &Finished) -> Result<[u64; 4]> {
    let line = done
        .stderr
        .lines()
        .find(|line| line.contains("packets captured"))
        .with_context(|| format!("no summary:\n{done}"))?;
    let numbers = line
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|word| word.parse().ok())
        .collect::<Vec<u64>>();
    <[u64; 4]>::try_from(numbers).map_err(|_| anyhow!("unexpected summary: {line}"))
}

pub fn program_id(netns: &Netns) -> Result<u32> {
    let ifindex = netns.ifindex(IFACE)? as i32;
    netns.enter(|| -> Result<u32> {
        let stdin = std::io::stdin();
        let xdp = Xdp::new(stdin.as_fd());
        Ok(xdp.query_id(ifindex, XdpFlags::NONE).unwrap_or(0))
    })?
}

pub fn tcpdump(netns: &Netns, file: &Path) -> Result<Child> {
    let mut command = Command::new("tcpdump");
    command
        .args([
            "-Z",
            "root",
            "-U",
            "--immediate-mode",
            "-i",
            IFACE,
            "-Q",
            "out",
            "-w",
        ])
        .arg(file)
        .stderr(Stdio::null());
    let child = netns.enter(|| command.spawn())??;
    wait_for("tcpdump's file", || {
        Ok(std::fs::metadata(file)
            .is_ok_and(|meta| meta.len() >= 24)
            .then_some(()))
    })?;
    Ok(child)
}

pub fn end(mut child: Child) -> Result<()> {
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT)?;
    child.wait()?;
    Ok(())
}

pub fn capture(
    net: &Pair,
    args: &[&str],
    traffic: impl FnOnce() -> Result<()>,
) -> Result<Finished> {
    let probe: Running = dump(net).args(args).start()?;
    traffic()?;
    let done = probe.stop()?;
    done.expect_success()?;
    Ok(done)
}

pub fn nothing_is_pinned(net: &Pair) -> Result<()> {
    let inode = net.server.inode()?;
    for entry in std::fs::read_dir("/sys/fs/bpf/netprobe/xdp")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        ensure!(
            name != IFACE && name != format!("{IFACE}@{inode}"),
            "{name} is still pinned"
        );
    }
    Ok(())
}
