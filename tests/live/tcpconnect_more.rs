//! `netprobe tcpconnect`: names by DNS, stacks, kinds of sockets, bursts, and the same traffic beside another tool.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::tcpconnect_outcome::socket;
use crate::common::{Case, Netns, Netprobe, Pair, case, deadline};

pub fn cases() -> Vec<Case> {
    vec![
        case("tcpconnect_dns", dns).trace().limit(400).program("nc"),
        case("tcpconnect_stack", stack).trace().limit(400),
        case("tcpconnect_burst", burst).trace().limit(600),
        case("tcpconnect_beside", beside)
            .trace()
            .limit(400)
            .program("peer-tcpconnect"),
    ]
}

fn me() -> String {
    std::process::id().to_string()
}

/// A DNS server's answer to `query`: an alias if the name begins with `www`, and the address.
fn answer(query: &[u8], address: IpAddr) -> Vec<u8> {
    let mut m = query.to_vec();
    m[2] = 0x81;
    m[3] = 0x80;
    let alias = query.len() > 16 && &query[13..16] == b"www";
    m[7] = 1 + u8::from(alias);
    let mut owner = vec![0xc0, 12];
    if alias {
        let target = b"\x03cdn\x04test\0";
        m.extend(&owner);
        m.extend([0, 5, 0, 1, 0, 0, 0, 60, 0, target.len() as u8]);
        owner = vec![0xc0, m.len() as u8];
        m.extend(target);
    }
    m.extend(&owner);
    let bytes = match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    };
    m.extend([0, if bytes.len() == 4 { 1 } else { 28 }, 0, 1]);
    m.extend([0, 0, 0, 60, 0, bytes.len() as u8]);
    m.extend(bytes);
    m
}

fn query(name: &str, v6: bool) -> Vec<u8> {
    let mut m = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        m.push(label.len() as u8);
        m.extend(label.as_bytes());
    }
    m.extend([0, 0, if v6 { 28 } else { 1 }, 0, 1]);
    m
}

/// How a process asks.
#[derive(Clone, Copy)]
enum Way {
    Connected,
    Unconnected,
    Tcp,
}

/// Asks the server on port 53 and reads its answer; `serve` answers in a thread of its own.
fn resolve(net: &Pair, way: Way, server: SocketAddr, name: &str, address: IpAddr) -> Result<()> {
    let question = query(name, address.is_ipv6());
    if let Way::Tcp = way {
        let listener = net.server.enter(|| std::net::TcpListener::bind(server))??;
        let serve = std::thread::spawn(move || -> io::Result<()> {
            let (mut stream, _) = listener.accept()?;
            let mut buffer = [0; 512];
            let len = stream.read(&mut buffer)?;
            let reply = answer(&buffer[2..len], address);
            stream.write_all(&(reply.len() as u16).to_be_bytes())?;
            stream.write_all(&reply)
        });
        let mut stream = net.client.enter(|| TcpStream::connect(server))??;
        let mut wire = (question.len() as u16).to_be_bytes().to_vec();
        wire.extend(&question);
        stream.write_all(&wire)?;
        // The length first, then the rest, as libc does.
        let mut len = [0; 2];
        stream.read_exact(&mut len)?;
        let mut reply = vec![0; usize::from(u16::from_be_bytes(len))];
        stream.read_exact(&mut reply)?;
        serve.join().map_err(|_| io::Error::other("panic"))??;
        return Ok(());
    }
    let socket = net.server.udp_bind(server)?;
    let serve = std::thread::spawn(move || -> io::Result<()> {
        let mut buffer = [0; 512];
        let (len, from) = socket.recv_from(&mut buffer)?;
        socket.send_to(&answer(&buffer[..len], address), from)?;
        Ok(())
    });
    let any = if server.is_ipv4() {
        "0.0.0.0:0"
    } else {
        "[::]:0"
    };
    let socket: UdpSocket = net.client.udp_bind(any.parse()?)?;
    let mut buffer = [0; 512];
    match way {
        Way::Connected => {
            socket.connect(server)?;
            socket.send(&question)?;
            socket.recv(&mut buffer)?;
        }
        _ => {
            socket.send_to(&question, server)?;
            socket.recv_from(&mut buffer)?;
        }
    }
    serve.join().map_err(|_| io::Error::other("panic"))??;
    Ok(())
}

fn dns() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    for host in 21..26 {
        net.server
            .ip(&format!("addr add 10.77.0.{host}/24 dev veth0"))?;
    }
    let ns = format!("inode:{}", net.client.inode()?);
    let run = Netprobe::new("tcpconnect")
        .args(["-d", "-P", "80", "--netns", &ns])
        .start()?;
    let listen4 = net.server.tcp_listen("0.0.0.0:80".parse()?)?;
    let listen6 = net.server.tcp_listen(net.server.v6(80))?;
    let (v4, v6) = (net.server.v4(53), net.server.v6(53));
    let go = |address: &str| -> Result<()> {
        let to = SocketAddr::from((address.parse::<IpAddr>()?, 80));
        net.client.tcp_connect(to, deadline())??;
        Ok(())
    };
    for (way, server, name, address) in [
        (Way::Connected, v4, "connected.test", "10.77.0.21"),
        (Way::Unconnected, v4, "unconnected.test", "10.77.0.22"),
        (Way::Connected, v4, "www.alias.test", "10.77.0.23"),
        (Way::Tcp, v4, "stream.test", "10.77.0.24"),
        (Way::Unconnected, v6, "six.test", "fd77::2"),
    ] {
        resolve(&net, way, server, name, address.parse()?)?;
        go(address)?;
    }
    // Never asked for; and asked for by another process.
    go("10.77.0.25")?;
    let mut nc = Command::new("nc");
    nc.args(["10.77.0.21", "80"])
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    net.client.enter(|| nc.status())??;
    run.wait_lines("all rows", |t| (t.lines().count() >= 8).then_some(()))?;
    let done = run.stop()?;
    done.expect_success()?;
    drop((listen4, listen6));
    ensure!(
        done.stdout
            .lines()
            .next()
            .is_some_and(|h| h.ends_with(" QUERY")),
        "{done}"
    );
    let got: Vec<(String, String)> = done
        .stdout
        .lines()
        .skip(1)
        .map(|l| {
            let w: Vec<&str> = l.split_whitespace().collect();
            (w[4].to_owned(), w[6..].join(" "))
        })
        .collect();
    let expected = [
        ("10.77.0.21", "connected.test"),
        ("10.77.0.22", "unconnected.test"),
        ("10.77.0.23", "www.alias.test"),
        ("10.77.0.24", "stream.test"),
        ("fd77::2", "six.test"),
        ("10.77.0.25", "unknown"),
        ("10.77.0.21", "unknown"),
    ]
    .map(|(a, n)| (a.to_owned(), n.to_owned()));
    ensure!(got == expected, "{done}");
    Ok(())
}

/// The function that the stacks must name: it calls connect itself.
#[inline(never)]
pub fn the_caller_of_connect(fd: i32, port: u16) -> i32 {
    let address = libc::sockaddr_in {
        sin_family: libc::AF_INET as u16,
        sin_port: port.to_be(),
        sin_addr: libc::in_addr {
            s_addr: u32::from_ne_bytes([127, 0, 0, 1]),
        },
        sin_zero: [0; 8],
    };
    // SAFETY: the address is valid for the call, and its length is given.
    let result = unsafe {
        libc::connect(
            fd,
            (&raw const address).cast(),
            size_of::<libc::sockaddr_in>() as u32,
        )
    };
    // Something to do behind the call, so that it is no jump.
    std::hint::black_box(result)
}

fn stack() -> Result<()> {
    let net = Netns::new("stack")?;
    let run = Netprobe::new("tcpconnect")
        .args(["--output-stack", "--output-json", "-P", "7001,7002"])
        .args(["--netns", net.name()])
        .start()?;
    let open = || socket(libc::AF_INET, libc::SOCK_STREAM, 0);
    let here = net.enter(open)??;
    the_caller_of_connect(here.as_raw_fd(), 7001);
    let first = run.wait_line("\"dport\":7001,")?;
    // A process that has gone before netprobe can look at it.
    let there = net.enter(open)??;
    run.signal(Signal::SIGSTOP)?;
    // SAFETY: the child makes one system call and ends; it takes no lock and allocates nothing.
    match unsafe { libc::fork() } {
        0 => {
            the_caller_of_connect(there.as_raw_fd(), 7002);
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(0) }
        }
        pid => {
            let mut status = 0;
            // SAFETY: a child of ours; status is valid for the call.
            unsafe { libc::waitpid(pid, &mut status, 0) };
        }
    }
    run.signal(Signal::SIGCONT)?;
    let second = run.wait_line("\"dport\":7002,")?;
    run.stop()?.expect_success()?;
    for line in [first, second] {
        let row: Value = serde_json::from_str(&line)?;
        let names = |key: &str| -> Vec<String> {
            row[key]
                .as_array()
                .into_iter()
                .flatten()
                .map(|f| f["name"].as_str().unwrap_or("?").to_owned())
                .collect()
        };
        ensure!(
            names("kernel_stack").iter().any(|n| n.contains("connect")),
            "{row:#}"
        );
        // It begins with the kernel's own functions: none of ours is on top.
        ensure!(
            !names("kernel_stack")
                .iter()
                .any(|n| n == "?" || n.starts_with("bpf_") || n.contains("rethook")),
            "{row:#}"
        );
        let frames = row["user_stack"].as_array().context("no user stack")?;
        let caller = frames
            .iter()
            .find(|f| {
                f["name"]
                    .as_str()
                    .is_some_and(|n| n.contains("the_caller_of_connect"))
            })
            .with_context(|| format!("the caller is not named: {row:#}"))?;
        ensure!(
            caller["file"]
                .as_str()
                .is_some_and(|f| f.ends_with("tcpconnect_more.rs")),
            "{row:#}"
        );
        ensure!(caller["line"].is_u64(), "{row:#}");
    }
    Ok(())
}

/// 20,000 connects as fast as they come: each is printed, or counted as lost.
fn burst() -> Result<()> {
    const THREADS: u64 = 4;
    const EACH: u64 = 5_000;
    let net = Netns::new("burst")?;
    let run = Netprobe::new("tcpconnect")
        .args(["--output-json", "-p", &me(), "--netns", net.name()])
        .start()?;
    net.enter(|| {
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    // Nothing listens: a connect all the same.
                    for _ in 0..EACH {
                        let _ = TcpStream::connect("127.0.0.1:9");
                    }
                });
            }
        });
    })?;
    let done = run.stop()?;
    done.expect_success()?;
    let rows = done.json()?;
    let printed = rows.iter().filter(|r| r["type"] == "connect").count() as u64;
    let loss = rows.iter().find(|r| r["type"] == "loss");
    let count = |key: &str| loss.and_then(|l| l[key].as_u64()).unwrap_or(0);
    let lost = count("lost") + count("missed") + count("unreturned") + count("map_full");
    eprintln!("tcpconnect_burst: {printed} printed, {lost} counted as lost");
    ensure!(
        printed + lost == THREADS * EACH,
        "{printed} printed, {lost} lost of {}: {loss:?}",
        THREADS * EACH
    );
    Ok(())
}

/// The same traffic beside libbpf-tools' tcpconnect: every row of it is one of ours.
fn beside() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let v4 = net.server.tcp_listen(net.server.v4(80))?;
    let v6 = net.server.tcp_listen(net.server.v6(81))?;
    let run = Netprobe::new("tcpconnect")
        .args(["-s", "-p", &me()])
        .start()?;
    // Into a pipe it would write nothing before its end.
    let (ours, terminal) = terminal()?;
    let mut peer = Command::new("peer-tcpconnect")
        .args(["-s", "-p", &me()])
        .stdout(terminal)
        .stderr(Stdio::null())
        .spawn()?;
    let mut out = io::BufReader::new(std::fs::File::from(ours));
    let mut header = String::new();
    // Printed once it has attached.
    io::BufRead::read_line(&mut out, &mut header)?;
    let mut open = Vec::new();
    for _ in 0..20 {
        for to in [v4.address(), v6.address(), net.server.v4(99)] {
            open.extend(net.client.tcp_connect(to, deadline())?.ok());
        }
    }
    run.wait_lines("60 rows", |t| (t.lines().count() > 60).then_some(()))?;
    // Its rows come in batches; its local port stands behind the address, where bcc's stands before it.
    let mut theirs = BTreeMap::new();
    while theirs.values().sum::<usize>() < 60 {
        let mut line = String::new();
        ensure!(
            io::BufRead::read_line(&mut out, &mut line)? > 0,
            "the peer ended"
        );
        *theirs.entry(key(&line, [0, 2, 3, 5, 4, 6])).or_insert(0) += 1;
    }
    peer.kill()?;
    peer.wait()?;
    let done = run.stop()?;
    done.expect_success()?;
    let mut ours = BTreeMap::new();
    for line in done.stdout.lines().skip(1) {
        *ours.entry(key(line, [0, 2, 3, 4, 5, 6])).or_insert(0) += 1;
    }
    ensure!(ours == theirs, "theirs: {theirs:?}\n{done}");
    Ok(())
}

/// A pseudo terminal: the end to read from, and the terminal.
fn terminal() -> Result<(OwnedFd, OwnedFd)> {
    let (mut ours, mut terminal) = (-1, -1);
    // SAFETY: both numbers are valid for the call; no name, settings or size are given.
    let err = unsafe {
        libc::openpty(
            &mut ours,
            &mut terminal,
            std::ptr::null_mut(),
            std::ptr::null(),
            std::ptr::null(),
        )
    };
    ensure!(err == 0, "no terminal: {}", io::Error::last_os_error());
    // SAFETY: fresh fds that nothing else owns.
    unsafe { Ok((OwnedFd::from_raw_fd(ours), OwnedFd::from_raw_fd(terminal))) }
}

/// The words of a row but the name, which the two cut at different places, in the order of these places.
fn key(line: &str, order: [usize; 6]) -> Vec<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    order
        .iter()
        .map(|&i| words.get(i).unwrap_or(&"").to_string())
        .collect()
}
