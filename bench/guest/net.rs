//! The guest's network: two namespaces joined by a veth pair, and traffic between them, sent and received by one thread, so that on
//! one CPU a packet's whole way lies between two readings of the clock. Must not know any tool.

use std::fs::File;
use std::io::ErrorKind;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};

pub const A: &str = "bench-a";
pub const B: &str = "bench-b";
const ADDR_A: &str = "10.9.0.1";
const ADDR_B: &str = "10.9.0.2";
/// The port that the filters which match ask for.
pub const PORT: u16 = 9000;

/// Bytes of the headers of IPv4 and UDP.
pub const HEADERS: usize = 28;

/// Sockets on both sides.
pub struct Net {
    sender: UdpSocket,
    receiver: UdpSocket,
    listener: TcpListener,
    payload: Vec<u8>,
}

fn ip(args: &str) -> Result<()> {
    let status = Command::new("ip")
        .args(args.split_whitespace())
        .status()
        .context("failed to run ip")?;
    if !status.success() {
        bail!("ip {args}: {status}");
    }
    Ok(())
}

/// Runs `work` on this thread inside the namespace `name`.
pub fn inside<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let home = File::open("/proc/thread-self/ns/net")?;
    let there = File::open(format!("/run/netns/{name}"))?;
    setns(&there, CloneFlags::CLONE_NEWNET).context("failed to enter a namespace")?;
    let result = work();
    setns(&home, CloneFlags::CLONE_NEWNET).context("failed to come back from a namespace")?;
    result
}

impl Net {
    /// Makes the namespaces. Neighbours are fixed and IPv6 is off, so that nothing but our packets is sent.
    pub fn new() -> Result<Self> {
        for ns in [A, B] {
            ip(&format!("netns add {ns}"))?;
            inside(ns, || {
                for what in ["all", "default"] {
                    std::fs::write(format!("/proc/sys/net/ipv6/conf/{what}/disable_ipv6"), "1")?;
                }
                Ok(())
            })?;
        }
        ip(&format!(
            "link add va netns {A} address 02:00:00:00:00:0a type veth peer name vb netns {B} address 02:00:00:00:00:0b"
        ))?;
        for (ns, dev, own, peer, mac) in [
            (A, "va", ADDR_A, ADDR_B, "02:00:00:00:00:0b"),
            (B, "vb", ADDR_B, ADDR_A, "02:00:00:00:00:0a"),
        ] {
            ip(&format!("-n {ns} link set lo up"))?;
            ip(&format!("-n {ns} addr add {own}/24 dev {dev}"))?;
            ip(&format!("-n {ns} link set {dev} up"))?;
            ip(&format!(
                "-n {ns} neigh replace {peer} dev {dev} lladdr {mac} nud permanent"
            ))?;
        }
        let sender = inside(A, || Ok(UdpSocket::bind((ADDR_A, 0))?))?;
        let (receiver, listener) = inside(B, || {
            Ok((
                UdpSocket::bind((ADDR_B, PORT))?,
                TcpListener::bind((ADDR_B, PORT))?,
            ))
        })?;
        sender.connect((ADDR_B, PORT))?;
        receiver.set_read_timeout(Some(Duration::from_secs(10)))?;
        Ok(Self {
            sender,
            receiver,
            listener,
            payload: vec![0x55; 64],
        })
    }

    /// Sets the length of the UDP packets' payload.
    pub fn payload(&mut self, len: usize) {
        self.payload = vec![0x55; len];
    }

    /// A UDP socket in A and one in B that nothing else uses.
    pub fn sockets(&self) -> Result<(UdpSocket, UdpSocket)> {
        let bound = |ns, addr| inside(ns, || Ok(UdpSocket::bind((addr, 0))?));
        Ok((bound(A, ADDR_A)?, bound(B, ADDR_B)?))
    }

    /// Packets that A's interface has handed over to B's so far.
    pub fn forwarded(&self) -> Result<u64> {
        // `  va: ` and eight numbers of receiving; bytes, packets and six more of sending
        inside(A, || {
            let text = std::fs::read_to_string("/proc/thread-self/net/dev")?;
            text.lines()
                .find_map(|l| l.trim_start().strip_prefix("va:"))
                .and_then(|l| l.split_ascii_whitespace().nth(9))
                .context("va is not in /proc/net/dev")?
                .parse()
                .context("no number of packets in /proc/net/dev")
        })
    }

    /// One UDP packet from A to B, received.
    pub fn udp(&self) -> Result<()> {
        let mut buffer = [0; 2048];
        self.sender.send(&self.payload)?;
        match self.receiver.recv(&mut buffer) {
            Ok(_) => Ok(()),
            Err(e) if e.kind() == ErrorKind::WouldBlock => bail!("a UDP packet did not arrive"),
            Err(e) => Err(e.into()),
        }
    }

    /// One TCP connection from A to B, accepted and closed.
    pub fn tcp(&self) -> Result<()> {
        inside(A, || {
            let client = TcpStream::connect((ADDR_B, PORT))?;
            let (server, _) = self.listener.accept()?;
            drop(client);
            drop(server);
            Ok(())
        })
    }
}
