//! `netprobe tcpconnect --dns`: names from the answers that this machine received.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};

use crate::common::{Case, Netprobe, Pair, case, deadline};

pub fn cases() -> Vec<Case> {
    vec![case("tcpconnect_dns", dns).trace().limit(400).program("nc")]
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
