//! Capture files of every kind: what netprobe reads is what tcpdump reads, and others read what it writes. Interfaces whose
//! packets are no Ethernet frames.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::common::{Case, Finished, Netns, Netprobe, Pair, case};
use crate::xdp::{IFACE, flood, quiet_pair, summary};

pub fn cases() -> Vec<Case> {
    vec![
        // Some 600 processes, each of which takes 0.2 s to start in an emulated machine.
        case("files_of_each_link_type", each_link_type)
            .once_on("6.12")
            .program("tcpdump")
            .limit(300),
        case("files_damaged", damaged)
            .once_on("5.10")
            .program("tcpdump"),
        case("files_written_by_skb", written_by_skb)
            .once_on("5.10")
            .trace()
            .program("tcpdump")
            .program("ping"),
        case("files_of_bare_packets", bare_packets)
            .once_on("5.10")
            .xdp()
            .program("tcpdump"),
        case("files_vlan_note", vlan_note).once_on("5.10").xdp(),
    ]
}

/// Words of a file in one byte order.
fn words(big: bool, words: &[u32]) -> Vec<u8> {
    let bytes = |word: &u32| {
        if big {
            word.to_be_bytes()
        } else {
            word.to_le_bytes()
        }
    };
    words.iter().flat_map(bytes).collect()
}

fn pcap(big: bool, linktype: u32, packets: &[Vec<u8>]) -> Vec<u8> {
    let version = if big { 0x0002_0004 } else { 0x0004_0002 };
    let mut file = words(big, &[0xa1b2_c3d4, version, 0, 0, 65_535, linktype]);
    for (at, packet) in packets.iter().enumerate() {
        let len = packet.len() as u32;
        file.extend(words(big, &[1_700_000_000, at as u32, len, len]));
        file.extend(packet);
    }
    file
}

fn block(kind: u32, body: &[u8]) -> Vec<u8> {
    let mut body = body.to_vec();
    body.resize(body.len().next_multiple_of(4), 0);
    let len = 12 + body.len() as u32;
    [words(false, &[kind, len]), body, words(false, &[len])].concat()
}

/// pcapng: interfaces of these link types, and the packets in obsolete packet blocks, enhanced and simple ones by turns.
fn pcapng(linktypes: &[u32], packets: &[Vec<u8>]) -> Vec<u8> {
    let mut file = block(0x0a0d_0d0a, &words(false, &[0x1a2b_3c4d, 1, !0, !0]));
    for linktype in linktypes {
        file.extend(block(1, &words(false, &[*linktype, 0])));
    }
    for (at, packet) in packets.iter().enumerate() {
        let len = packet.len() as u32;
        let head = match at % 3 {
            0 => (
                2,
                words(false, &[0xffff_0000, 0x0006_0a24, at as u32, len, len]),
            ),
            1 => (6, words(false, &[0, 0x0006_0a24, at as u32, len, len])),
            _ => (3, words(false, &[len])),
        };
        file.extend(block(head.0, &[head.1, packet.clone()].concat()));
    }
    file
}

fn ipv4(protocol: u8, to: [u8; 4], rest: &[u8]) -> Vec<u8> {
    let mut header = vec![
        0x45,
        0,
        0,
        20 + rest.len() as u8,
        0,
        7,
        0,
        0,
        64,
        protocol,
        0,
        0,
        10,
        1,
        0,
        1,
    ];
    header.extend(to);
    [header, rest.to_vec()].concat()
}

fn udp(port: u8) -> Vec<u8> {
    vec![0x9c, 0x40, 0, port, 0, 8, 0, 0]
}

/// IP packets: UDP, ICMP, a broadcast; IPv6 TCP.
fn ip_packets() -> Vec<(bool, Vec<u8>)> {
    let mut v6 = vec![0x60, 0, 0, 0, 0, 20, 6, 64];
    v6.extend([[0xfd; 16], [0xfe; 16]].concat());
    v6.extend([
        0, 9, 1, 0xbb, 0, 0, 3, 0xe8, 0, 0, 0, 0, 0x50, 2, 16, 0, 0, 0, 0, 0,
    ]);
    vec![
        (false, ipv4(17, [10, 1, 0, 2], &udp(53))),
        (false, ipv4(1, [10, 1, 0, 2], &[8, 0, 0, 0, 0, 1, 0, 1])),
        (false, ipv4(17, [255; 4], &udp(9))),
        (true, v6),
    ]
}

/// Each packet behind a header; `v4` and `v6`: the headers.
fn behind(v4: &[u8], v6: &[u8]) -> Vec<Vec<u8>> {
    let framed = |(is_v6, packet): (bool, Vec<u8>)| {
        let header = if is_v6 { v6 } else { v4 };
        [header, &packet].concat()
    };
    ip_packets().into_iter().map(framed).collect()
}

/// Files by name.
fn files() -> Vec<(&'static str, Vec<u8>)> {
    let mac = [2; 12];
    let ethernet = |kind: &[u8]| [&mac, kind].concat();
    let frames = behind(&ethernet(&[8, 0]), &ethernet(&[0x86, 0xdd]));
    let tagged = behind(
        &ethernet(&[0x81, 0, 0, 5, 8, 0]),
        &ethernet(&[0x88, 0xa8, 0, 6, 0x81, 0, 0, 5, 0x86, 0xdd]),
    );
    let cooked = |kind: [u8; 2]| [&[0, 0, 0, 1, 0, 6][..], &[2; 6], &[0, 0], &kind].concat();
    let cooked2 = |kind: [u8; 2]| [&kind[..], &[0; 18]].concat();
    let family = |family: u8| [family, 0, 0, 0];
    let family_be = |family: u8| [0, 0, 0, family];
    let mut bsd = Vec::new();
    for v6 in [24, 28, 30, 10] {
        bsd.extend(behind(&family(2), &family(v6)));
    }
    vec![
        ("ethernet", pcap(false, 1, &frames)),
        ("fcs", pcap(false, 0x1400_0001, &frames)),
        ("tagged", pcap(true, 1, &tagged)),
        ("pcapng", pcapng(&[1], &frames)),
        ("null", pcap(false, 0, &bsd)),
        (
            "null-be",
            pcap(true, 0, &behind(&family_be(2), &family_be(28))),
        ),
        (
            "loop",
            pcap(false, 108, &behind(&family_be(2), &family_be(24))),
        ),
        ("raw", pcap(false, 101, &behind(&[], &[]))),
        ("raw-ng", pcapng(&[101], &behind(&[], &[]))),
        ("ipv4", pcap(false, 228, &behind(&[], &[])[..3])),
        (
            "sll",
            pcap(false, 113, &behind(&cooked([8, 0]), &cooked([0x86, 0xdd]))),
        ),
        (
            "sll2",
            pcap(
                false,
                276,
                &behind(&cooked2([8, 0]), &cooked2([0x86, 0xdd])),
            ),
        ),
        ("ppp", pcap(false, 9, &behind(&[0, 0x21], &[0, 0x57]))),
        (
            "hdlc",
            pcap(false, 104, &behind(&[15, 0, 8, 0], &[15, 0, 0x86, 0xdd])),
        ),
        ("wifi", pcap(false, 105, &frames)),
    ]
}

/// The lines of `tcpdump -r`, or its error.
fn by_tcpdump(file: &Path, expression: &str) -> Result<Result<usize, String>> {
    let output = Command::new("tcpdump")
        .args(["-Z", "root", "-n", "-t", "-q", "-r"])
        .arg(file)
        .arg(expression)
        .output()?;
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    if !output.status.success() {
        let last = stderr.lines().last().unwrap_or_default();
        let said = last
            .trim_start_matches("tcpdump: ")
            .trim_start_matches("pcap_loop: ");
        return Ok(Err(said.to_owned()));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    // Packets that tcpdump does not know are shown in hex below their line.
    Ok(Ok(text
        .lines()
        .filter(|line| !line.starts_with('\t'))
        .count()))
}

fn read(tool: &str, file: &Path, expression: &str) -> Result<Finished> {
    Netprobe::new(tool)
        .arg("-r")
        .arg(file)
        .arg(expression)
        .run()
}

/// Both commands and tcpdump agree on every file and expression, and on what is written again.
fn each_link_type() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let again = folder.path().join("again.pcap");
    for (name, bytes) in files() {
        let path = folder.path().join(name);
        fs::write(&path, &bytes)?;
        for expression in [
            "",
            "ip",
            "ip6",
            "tcp",
            "udp port 53",
            "ip broadcast",
            "vlan 5 and ip",
            "not icmp",
        ] {
            let what = format!("{name}, '{expression}'");
            let shown = read("xdpdump", &path, expression)?;
            let matched = Netprobe::new("filter")
                .arg("-r")
                .arg(&path)
                .arg("-w")
                .arg(&again)
                .arg(expression)
                .run()?;
            let count = match by_tcpdump(&path, expression)? {
                // The link type has no such packets.
                Err(_) => {
                    shown.expect_code(2)?;
                    matched.expect_code(2)?;
                    continue;
                }
                Ok(count) => count,
            };
            shown.expect_success()?;
            matched.expect_success()?;
            ensure!(
                shown.stdout.lines().count() == count,
                "{what}: tcpdump has {count}:\n{shown}"
            );
            ensure!(
                matched.stdout.starts_with(&format!("{count} of ")),
                "{what}: tcpdump has {count}:\n{matched}"
            );
            let rest = read("filter", &again, expression)?;
            ensure!(
                rest.stdout.starts_with(&format!("{count} of {count} ")),
                "{what}, again:\n{rest}"
            );
            if name == "fcs" {
                ensure!(
                    fs::read(&again)?[20..24] == bytes[20..24],
                    "{what}: the FCS bits are gone"
                );
            }
        }
    }
    // What has no decoder is named.
    let done = read("xdpdump", &folder.path().join("wifi"), "")?;
    done.expect_stdout(" IEEE802_11, length 42 (42 bytes)")?;
    let done = Netprobe::new("xdpdump")
        .args(["--output-json", "-r"])
        .arg(folder.path().join("loop"))
        .run()?;
    let rows = done.json()?;
    ensure!(
        rows[0]["linktype"] == "LOOP" && rows[0]["dport"] == 53,
        "{}",
        rows[0]
    );
    ensure!(rows[0].get("src_mac").is_none(), "{}", rows[0]);
    Ok(())
}

/// What is wrong with a file is said in tcpdump's words, behind the packets before it; exit code 1.
fn damaged() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("damaged");
    let frames = behind(
        &[&[2; 12][..], &[8, 0]].concat(),
        &[&[2; 12][..], &[0x86, 0xdd]].concat(),
    );
    let (classic, ng) = (pcap(false, 1, &frames), pcapng(&[1], &frames));
    let mut wrong_block = ng.clone();
    wrong_block[32] = 7;
    let mut long = classic.clone();
    long[24 + 8..24 + 12].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    for (name, bytes) in [
        ("cut in a packet", &classic[..classic.len() - 5]),
        ("cut in a packet's head", &classic[..24 + 16 + 42 + 3]),
        ("cut in a block", &ng[..ng.len() - 5]),
        ("two link types", &pcapng(&[1, 101], &frames)[..]),
        ("a block of a wrong length", &wrong_block),
        ("an impossible length", &long),
        ("no capture file", b"hello, this is a text and no capture"),
        ("nothing", b""),
    ] {
        fs::write(&path, bytes)?;
        let said = by_tcpdump(&path, "")?.err();
        let said = said.with_context(|| format!("{name}: tcpdump reads it"))?;
        for tool in ["xdpdump", "filter"] {
            let done = read(tool, &path, "")?;
            done.expect_code(1)?;
            done.expect_stderr(&said).context(name)?;
        }
    }
    fs::write(&path, &classic[..classic.len() - 5])?;
    let done = read("xdpdump", &path, "")?;
    ensure!(
        done.stdout.lines().count() == 3,
        "not the packets before the cut:\n{done}"
    );
    Ok(())
}

/// A trace's file, with packets that had an Ethernet header and packets that had none, read by all.
fn written_by_skb() -> Result<()> {
    let net = Pair::new()?;
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("trace.pcapng");
    let probe = Netprobe::new("skb")
        .arg("-w")
        .arg(&file)
        .args([
            "--filter-func",
            "ip_output|ip6_output|dev_hard_start_xmit|icmp_rcv|icmpv6_rcv",
        ])
        .arg("icmp or icmp6")
        .start()?;
    for address in [net.server.v4(0), net.server.v6(0)] {
        ensure!(net.client.ping(address, 2)?, "no answer");
    }
    probe.wait_lines("both kinds", |text| {
        let all =
            text.matches(" icmp_rcv").count() >= 4 && text.matches(" icmpv6_rcv").count() >= 4;
        all.then_some(())
    })?;
    let done = probe.stop()?;
    done.expect_success()?;
    let events = done
        .stdout
        .lines()
        .filter(|line| line.starts_with("0x"))
        .count();
    ensure!(
        by_tcpdump(&file, "icmp or icmp6")? == Ok(events),
        "not {events} packets in tcpdump:\n{done}"
    );
    let shown = read("xdpdump", &file, "icmp or icmp6")?;
    shown.expect_success()?;
    ensure!(
        shown.stdout.lines().count() == events,
        "not {events} packets:\n{shown}"
    );
    let made_up = shown.lines_with("(made-up Ethernet header)");
    let outgoing = |line: &&&str| line.contains("# ip_output ") || line.contains("# ip6_output ");
    ensure!(
        made_up.iter().filter(outgoing).count() >= 8,
        "what had no header is not marked:\n{shown}"
    );
    let had_one = shown.stdout.lines().count() - made_up.len();
    ensure!(had_one > 0, "all headers are made up:\n{shown}");
    let matched = read("filter", &file, "icmp or icmp6")?;
    matched.expect_stdout(&format!("{events} of {events} packets match (EN10MB)"))?;
    if let Ok(tshark) = Command::new("tshark").arg("-r").arg(&file).output() {
        let lines = String::from_utf8_lossy(&tshark.stdout)
            .matches("ICMP")
            .count();
        ensure!(lines >= events, "{lines} of {events} in tshark");
    }
    Ok(())
}

/// A tun device: what is written to it, the kernel receives.
fn tun(netns: &Netns, name: &str) -> Result<File> {
    const TUNSETIFF: u64 = 0x4004_54ca;
    const IFF_TUN_NO_PI: libc::c_short = 0x1001;
    // Where it is a module, the guest has loaded none as yet; elsewhere there may be no modprobe.
    let _ = Command::new("modprobe").arg("tun").output();
    let file = netns.enter(|| -> Result<File> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun")?;
        // SAFETY: ifreq is integers, arrays and a pointer: all zeros is a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = IFF_TUN_NO_PI;
        // SAFETY: the request lives through the call.
        let done = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF as _, &raw mut request) };
        ensure!(done == 0, "TUNSETIFF: {}", std::io::Error::last_os_error());
        Ok(file)
    })??;
    netns.ip(&format!("link set {name} up"))?;
    Ok(file)
}

/// XDP on an interface without a link header: text, expression, file; and in one file with an Ethernet interface.
fn bare_packets() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let net = quiet_pair()?;
    net.server.sysctl("net/ipv6/conf/all/disable_ipv6", "1")?;
    let mut tun = tun(&net.server, "tun9")?;
    let mut send = || -> Result<()> {
        for (_, packet) in ip_packets() {
            tun.write_all(&packet)?;
        }
        Ok(())
    };
    let dump = |iface: &str| {
        Netprobe::new("xdpdump")
            .args(["--iface", iface])
            .netns(&net.server)
    };
    let probe = dump("tun9").arg("udp port 53 or tcp").start()?;
    send()?;
    probe.wait_line("443")?;
    let done = probe.stop()?;
    done.expect_stdout(" IP 10.1.0.1.40000 > 10.1.0.2.53: UDP, length 0 (28 bytes)")?;
    ensure!(summary(&done)? == [2, 0, 2, 4], "{done}");

    for (ifaces, linktype, flag) in [
        ("tun9", "RAW", ""),
        ("tun9", "RAW", "--use-pcap"),
        (&*format!("{IFACE},tun9"), "EN10MB", ""),
    ] {
        let file = dir.path().join("x");
        let mut probe = dump(ifaces).arg("-w").arg(&file);
        if !flag.is_empty() {
            probe = probe.arg(flag);
        }
        let probe = probe.start()?;
        send()?;
        let more = if ifaces == "tun9" { 0 } else { 1 };
        flood(&net, 53, more, 10)?;
        let done = probe.stop()?;
        done.expect_success()?;
        ensure!(summary(&done)?[0] == 4 + u64::from(more), "{done}");
        let count = 1 + more as usize;
        ensure!(
            by_tcpdump(&file, "udp port 53")? == Ok(count),
            "{ifaces} {flag}: not {count} in tcpdump:\n{done}"
        );
        let matched = read("filter", &file, "udp port 53")?;
        matched.expect_stdout(&format!(
            "{count} of {} packets match ({linktype})",
            4 + more
        ))?;
        let made_up = read("xdpdump", &file, "")?
            .lines_with("# made-up Ethernet header")
            .len();
        ensure!(made_up == 4 * more as usize, "{made_up} headers made up");
    }
    // There is no ARP on it, says libpcap.
    let done = dump("tun9").arg("arp").run()?;
    done.expect_code(2)?;
    done.expect_stderr("tun9 (RAW)")
}

/// Where the driver has taken the tag off, it is said, once, where tags are asked for.
fn vlan_note() -> Result<()> {
    let net = quiet_pair()?;
    let note = "takes VLAN tags off before XDP";
    for (expression, times) in [
        ("vlan 5 and icmp", 1),
        ("icmp", 0),
        ("host 10.0.0.5 and not vlan", 1),
    ] {
        let done = Netprobe::new("xdpdump")
            .args(["--iface", IFACE, "--duration", "0", expression])
            .netns(&net.server)
            .run()?;
        done.expect_success()?;
        let said = done.stderr.matches(note).count();
        ensure!(said == times, "'{expression}': said {said} times:\n{done}");
    }
    Ok(())
}
