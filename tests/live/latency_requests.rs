//! `netprobe latency`: requests to a real server whose program takes a known time, and which end serves where no socket
//! tells; the time stamp of a card.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrStorage};
use serde_json::Value;

use super::latency::{count, says, slow, spent, start};
use crate::common::{Case, Netprobe, Pair, case, deadline, wait_for};
use crate::skb_programs::Loaded;

const STAMP: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/tc_stamp.o"));

pub fn cases() -> Vec<Case> {
    vec![
        case("latency_requests_of_httpd", of_httpd)
            .once_on("5.10")
            .trace()
            .program("httpd"),
        case("latency_requests_by_port", by_port)
            .once_on("5.10")
            .trace(),
        // A test run of a program gives the stamp of its context to the packet from 5.16 on.
        case("latency_nic_stamp", nic_stamp)
            .once_on("6.1")
            .trace()
            .kernel(5, 16),
    ]
}

/// What the program behind the server sleeps, ms.
const SLEEPS: u64 = 300;

/// A server with a program, in a folder of its own.
struct Httpd {
    child: Child,
    folder: PathBuf,
}

impl Httpd {
    fn start(net: &Pair, at: SocketAddr) -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("npt-httpd-{}", std::process::id()));
        let programs = folder.join("cgi-bin");
        fs::create_dir_all(&programs)?;
        fs::write(folder.join("index.html"), "fast\n")?;
        let slow = programs.join("slow");
        let script = format!(
            "#!/bin/sh\nbusybox sleep 0.{SLEEPS}\nprintf 'Content-Type: text/plain\\r\\n\\r\\nslow\\n'\n"
        );
        fs::write(&slow, script)?;
        fs::set_permissions(&slow, fs::Permissions::from_mode(0o755))?;
        let mut httpd = Command::new("httpd");
        httpd.args(["-f", "-p", &at.to_string(), "-h"]).arg(&folder);
        httpd.stdin(Stdio::null());
        let child = net.server.enter(|| httpd.spawn())??;
        Ok(Self { child, folder })
    }
}

impl Drop for Httpd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Asks for a page; ms until its first byte.
fn get(net: &Pair, to: SocketAddr, path: &str) -> Result<u64> {
    let mut stream = net.client.tcp_connect(to, deadline())??;
    stream.set_nodelay(true)?;
    let asked = Instant::now();
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
    stream.read_exact(&mut [0; 8])?;
    let took = asked.elapsed().as_millis() as u64;
    let mut rest = String::new();
    stream.read_to_string(&mut rest)?;
    ensure!(rest.contains(" 200 OK"), "{rest}");
    Ok(took)
}

fn of_httpd() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let to = net.server.v4(7047);
    let _httpd = Httpd::start(&net, to)?;
    wait_for("the server", || {
        let connected = net.client.tcp_connect(to, Duration::from_secs(5))?;
        Ok(connected.ok())
    })?;
    let least = (SLEEPS * 1000).to_string();
    let run = start(&[
        "--requests",
        "--min-us",
        &least,
        "-i",
        "100",
        "--filter-dst-port",
        "7047",
    ])?;
    let text = Netprobe::new("latency")
        .args(["--requests", "--min-us", &least, "-i", "100"])
        .start()?;
    get(&net, to, "/index.html")?;
    let took = get(&net, to, "/cgi-bin/slow")?;
    ensure!(took >= SLEEPS, "{took}");
    let served = slow(&run, "serves", 7047, None)?;
    ensure!(served["comm"] == "httpd", "{served}");
    // What the client measured has the network, too.
    let process = spent(&served, "process");
    ensure!((SLEEPS..=took).contains(&process), "of {took} ms: {served}");
    ensure!(served["why"]["rule"] == "requests-served", "{served}");
    says(&served, &format!("the server took {process}."))?;
    let asked = slow(&run, "asks", 7047, None)?;
    let process = spent(&asked, "process") + spent(&asked, "network") + 1;
    ensure!(
        (SLEEPS..=took + 1).contains(&process),
        "of {took} ms: {asked}"
    );
    says(&asked, "the other end took ")?;
    let done = run.stop()?;
    done.expect_success()?;
    for way in ["serves", "asks"] {
        ensure!(count(&done, way, "total")? == 2, "{way}: {done}");
        ensure!(done.json_of("packet")?.len() == 2, "{done}");
    }
    let done = text.stop()?;
    done.expect_stdout("    the server took ")
}

/// A listener whose queue has no length, and a client that is bound to an address alone: the ports decide, and the line says so.
fn by_port() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let run = start(&["--requests", "--min-us", "1", "-i", "100"])?;
    let to = net.server.v4(7048);
    let (listener, to) = net.server.tcp_listen_only(to, 0)?;
    let from = SocketAddr::new(net.client.v4(0).ip(), 0);
    let mut client = net.client.enter(|| -> Result<TcpStream> {
        let fd = socket::socket(
            AddressFamily::Inet,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        socket::bind(fd.as_raw_fd(), &SockaddrStorage::from(from))?;
        socket::connect(fd.as_raw_fd(), &SockaddrStorage::from(to))?;
        Ok(TcpStream::from(fd))
    })??;
    let (mut server, _) = TcpListener::from(listener).accept()?;
    client.write_all(b"GET")?;
    server.read_exact(&mut [0; 3])?;
    server.write_all(b"200")?;
    client.read_exact(&mut [0; 3])?;
    for way in ["serves", "asks"] {
        let request = slow(&run, way, 7048, None)?;
        let port = request["dport"].as_u64().context("no port")?;
        ensure!(request["by_port"] == true && port == 7048, "{request}");
    }
    run.stop()?.expect_success()
}

/// What a card's stamp is before the packet comes to its driver, ms.
const IN_CARD: u64 = 300;

/// A frame that comes by a device with the stamp of a card: as by no device of a virtual machine, so by a test run of a
/// program, which hands it on.
fn stamped(net: &Pair, port: u16, ago_ms: i64) -> Result<()> {
    let mut frame = Vec::new();
    for mac in [net.server.mac(Pair::IFACE)?, net.client.mac(Pair::IFACE)?] {
        let bytes = mac.split(':').map(|byte| u8::from_str_radix(byte, 16));
        frame.extend(bytes.collect::<Result<Vec<u8>, _>>()?);
    }
    // IPv4 to the server, UDP without a checksum, four bytes.
    let mut header = [
        0x45, 0, 0, 32, 0, 1, 0, 0, 64, 17, 0, 0, 10, 77, 0, 1, 10, 77, 0, 2,
    ];
    let words = header
        .chunks(2)
        .map(|w| u32::from(w[0]) << 8 | u32::from(w[1]));
    let sum = words.sum::<u32>();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    frame.extend([8, 0]);
    frame.extend(header);
    frame.extend([0x30, 0x39]);
    frame.extend(port.to_be_bytes());
    frame.extend([0, 12, 0, 0, b'n', b'i', b'c', b'!']);
    // struct __sk_buff: ifindex, hwtstamp
    let mut context = [0; 192];
    let ifindex = net.server.ifindex(Pair::IFACE)?;
    context[40..44].copy_from_slice(&ifindex.to_ne_bytes());
    let code = net.server.enter(|| -> Result<u32> {
        let program = Loaded::new(STAMP)?;
        let mut programs = program.object.progs_mut();
        let program = programs.next().context("no program")?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as i64;
        let stamp = now - ago_ms * 1_000_000;
        context[184..192].copy_from_slice(&stamp.to_ne_bytes());
        let input = libbpf_rs::ProgramInput {
            context_in: Some(&mut context),
            data_in: Some(&frame),
            ..Default::default()
        };
        Ok(program.test_run(input)?.return_value)
    })??;
    ensure!(code == 0, "{code}");
    Ok(())
}

fn nic_stamp() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let run = start(&["--min-us", "1", "--culprit", "udp"])?;
    let read = |port, ago_ms: i64| -> Result<Value> {
        let server = net.server.udp_bind(net.server.v4(port))?;
        stamped(&net, port, ago_ms)?;
        server.recv(&mut [0; 4])?;
        slow(&run, "in", port, None)
    };
    let since = Instant::now();
    let packet = read(7061, IN_CARD as i64)?;
    let here = spent(&packet, "nic");
    let most = IN_CARD + since.elapsed().as_millis() as u64;
    ensure!((IN_CARD..=most).contains(&here), "of {most} ms: {packet}");
    ensure!(packet["why"]["rule"] == "nic-waited", "{packet}");
    // Another clock: the stamp says nothing.
    for (port, ago) in [(7062, -5000), (7063, 5000)] {
        let packet = read(port, ago)?;
        let stages = packet["stages"].as_array().context("no stages")?;
        ensure!(stages.iter().all(|s| s["stage"] != "nic"), "{packet}");
    }
    let done = run.stop()?;
    done.expect_success()?;
    ensure!(count(&done, "in", "nic")? == 1, "{done}");
    Ok(())
}
