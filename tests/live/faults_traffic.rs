//! The traffic of tests/live/faults.toml: lines that the client sends, from the test itself, or from this program started again (as a
//! command, or in a container).
//!
//! ```text
//! udp ADDRESS [from=ADDRESS] [ttl=N] [size=N] [count=N] [df]
//! tcp ADDRESS [count=N]
//! ping ADDRESS
//! frame DEVICE FROM-MAC TO-MAC FROM TO [of the words below]
//! initial KEY VALUE          a sysctl of the first namespace
//! ```

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, setns};

use crate::common::send_frame;

/// The environment variable with the name of a file that has the lines.
pub const HELPER: &str = "NETPROBE_LIVE_TRAFFIC";

/// What a helper does (main.rs).
pub fn help(file: &str) {
    let sent = fs::read_to_string(file)
        .map_err(Into::into)
        .and_then(|text| send_all(&text));
    if let Err(e) = &sent {
        eprintln!("traffic: {e:?}");
    }
    std::process::exit(i32::from(sent.is_err()));
}

/// Sends all lines, from the namespace that it runs in.
pub fn send_all(lines: &str) -> Result<()> {
    for line in lines.lines() {
        send(line).with_context(|| format!("failed to send {line:?}"))?;
    }
    Ok(())
}

fn option<'a>(words: &[&'a str], name: &str) -> Option<&'a str> {
    words
        .iter()
        .find_map(|w| w.strip_prefix(name)?.strip_prefix('='))
}

fn number(words: &[&str], name: &str, without: usize) -> Result<usize> {
    option(words, name).map_or(Ok(without), |text| Ok(text.parse()?))
}

fn send(line: &str) -> Result<()> {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words.as_slice() {
        ["udp", to, options @ ..] => udp(to.parse()?, options),
        ["tcp", to, options @ ..] => {
            for _ in 0..number(options, "count", 1)? {
                // What becomes of it is seen in the trace.
                let _ = TcpStream::connect_timeout(&to.parse()?, Duration::from_millis(200));
            }
            Ok(())
        }
        ["ping", to] => {
            let ping = Command::new("ping")
                .args(["-q", "-c", "1", "-W", "1", to])
                .output();
            ping.map(drop).context("failed to run ping")
        }
        ["frame", device, from_mac, to_mac, from, to, options @ ..] => {
            let macs = [mac(from_mac)?, mac(to_mac)?];
            frame(device, macs, from.parse()?, to.parse()?, options)
        }
        ["initial", key, value @ ..] => initial(key, &value.join(" ")),
        _ => bail!("no such line"),
    }
}

fn udp(to: SocketAddr, options: &[&str]) -> Result<()> {
    let any = if to.is_ipv4() { "0.0.0.0" } else { "::" };
    let from: IpAddr = option(options, "from").unwrap_or(any).parse()?;
    let payload = vec![b'x'; number(options, "size", 1)?];
    let socket = UdpSocket::bind((from, 0))?;
    let set = |level, name, value: libc::c_int| -> Result<()> {
        // SAFETY: the option's value is an int that lives through the call.
        let status = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                level,
                name,
                (&raw const value).cast(),
                size_of_val(&value) as libc::socklen_t,
            )
        };
        ensure!(
            status == 0,
            "setsockopt: {}",
            std::io::Error::last_os_error()
        );
        Ok(())
    };
    if let Some(ttl) = option(options, "ttl") {
        match to.is_ipv4() {
            true => set(libc::IPPROTO_IP, libc::IP_TTL, ttl.parse()?)?,
            false => set(libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, ttl.parse()?)?,
        }
    }
    if options.contains(&"df") {
        set(
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            libc::IP_PMTUDISC_DO,
        )?;
    }
    if options.contains(&"broadcast") {
        socket.set_broadcast(true)?;
    }
    for _ in 0..number(options, "count", 1)? {
        // A filter may refuse it (EPERM), an error of the one before may come.
        let _ = socket.send_to(&payload, to);
    }
    Ok(())
}

fn mac(text: &str) -> Result<[u8; 6]> {
    let bytes: Result<Vec<u8>, _> = text.split(':').map(|b| u8::from_str_radix(b, 16)).collect();
    bytes?.try_into().ok().context("no MAC address")
}

fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2);
    let words = words.map(|w| u32::from(w[0]) << 8 | u32::from(*w.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !(sum as u16)
}

/// A UDP datagram or a TCP segment in an Ethernet frame. Words: `tcp=FLAGS`, `fragment` (the first one of more), `bad-ip-sum`, `bad-sum`,
/// `length=N` (told in the IP header), `proto=N`, `vlan=ID`, `count=N` (each from another port).
fn frame(
    device: &str,
    [from_mac, to_mac]: [[u8; 6]; 2],
    from: Ipv4Addr,
    to: std::net::SocketAddrV4,
    options: &[&str],
) -> Result<()> {
    let flags = option(options, "tcp").map(str::parse::<u8>).transpose()?;
    let proto = number(options, "proto", if flags.is_some() { 6 } else { 17 })? as u8;
    for i in 0..number(options, "count", 1)? {
        let sport = 40_000 + i as u16;
        let mut payload = [sport.to_be_bytes(), to.port().to_be_bytes()].concat();
        match flags {
            Some(flags) => {
                payload.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 4, 0, 0, 0, 0, 0]);
            }
            None => payload.extend_from_slice(&[0, 12, 0, 0, b'x', b'x', b'x', b'x']),
        }
        let at = if flags.is_some() { 16 } else { 6 };
        if !options.contains(&"fragment") {
            let length = (payload.len() as u16).to_be_bytes();
            let pseudo = [
                &from.octets()[..],
                &to.ip().octets(),
                &[0, proto],
                &length,
                &payload,
            ]
            .concat();
            let right = sum(&pseudo) ^ u16::from(options.contains(&"bad-sum"));
            payload[at..at + 2].copy_from_slice(&right.to_be_bytes());
        }
        if options.contains(&"fragment") {
            payload.resize(16, b'x');
        }
        let length = number(options, "length", 20 + payload.len())? as u16;
        let mut header = vec![0x45, 0];
        header.extend_from_slice(&length.to_be_bytes());
        let more = if options.contains(&"fragment") {
            0x20
        } else {
            0
        };
        header.extend_from_slice(&[0, 1, more, 0, 64, proto, 0, 0]);
        header.extend_from_slice(&from.octets());
        header.extend_from_slice(&to.ip().octets());
        let right = sum(&header) ^ u16::from(options.contains(&"bad-ip-sum"));
        header[10..12].copy_from_slice(&right.to_be_bytes());
        let mut bytes = [to_mac, from_mac].concat();
        if let Some(id) = option(options, "vlan") {
            bytes.extend_from_slice(&[0x81, 0]);
            bytes.extend_from_slice(&id.parse::<u16>()?.to_be_bytes());
        }
        bytes.extend_from_slice(&[8, 0]);
        bytes.extend_from_slice(&header);
        bytes.extend_from_slice(&payload);
        send_frame(device, &bytes)?;
    }
    Ok(())
}

/// Limits of the whole machine can be set from the first namespace only.
fn initial(key: &str, value: &str) -> Result<()> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| -> Result<()> {
            setns(fs::File::open("/proc/1/ns/net")?, CloneFlags::CLONE_NEWNET)?;
            Ok(fs::write(format!("/proc/sys/{key}"), value)?)
        });
        thread.join().ok().context("the thread panicked")?
    })
}
