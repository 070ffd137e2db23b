//! `netprobe xdpdump` on veth pairs: capture, text, files, filters, limits.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::common::{Case, Netprobe, Pair, case, wait_for};
use crate::xdp::*;

pub fn cases() -> Vec<Case> {
    let cases = vec![
        case("xdpdump_text_and_limits", text_and_limits)
            .once_on("5.10")
            .xdp()
            .program("ping"),
        case("xdpdump_pcapng_reads_everywhere", pcapng)
            .once_on("6.12")
            .xdp()
            .program("tshark")
            .program("capinfos")
            .program("tcpdump"),
        case("xdpdump_pcap_is_what_tcpdump_saw", pcap)
            .once_on("newest")
            .xdp()
            .program("ping")
            .program("tcpdump"),
        case("xdpdump_flood_captured_and_lost_is_sent", flood_to_file)
            .once_on("6.1")
            .xdp(),
        case("xdpdump_snap_lengths_and_sizes", snap_lengths)
            .once_on("5.10")
            .xdp(),
        case("xdpdump_packets_of_several_buffers", several_buffers)
            .once_on("newest")
            .xdp()
            .kernel(5, 18)
            .program("ping"),
        case("xdpdump_two_interfaces_and_rotation", two_interfaces)
            .once_on("5.10")
            .xdp()
            .program("ping"),
        case("xdpdump_rotation_by_time", rotation_by_time)
            .once_on("5.10")
            .xdp(),
        case("xdpdump_promiscuous_meanwhile", promiscuous)
            .once_on("newest")
            .xdp(),
        case("xdpdump_wake_ups", wake_ups).once_on("newest").xdp(),
        case("xdpdump_errors", errors).once_on("5.10").xdp(),
        case("xdpdump_small_receive_buffers", small_receive_buffers)
            .once_on("5.10")
            .xdp()
            .when(|_| {
                let here = (!is_emulated()).then_some("changes a setting of the whole machine");
                here.map(str::to_owned)
            }),
        case("xdpdump_file_printed_again", printed_again)
            .once_on("5.10")
            .xdp(),
        case("xdpdump_filter_in_the_kernel", filters)
            .once_on("newest")
            .xdp(),
    ];
    cases.into_iter().map(|case| case.limit(900)).collect()
}

fn text_and_limits() -> Result<()> {
    let net = quiet_pair()?;
    let probe = dump(&net).args(["-c", "3", "-x"]).start()?;
    ensure!(net.client.ping(net.server.v4(0), 20)?, "no answer");
    let done = probe.wait()?;
    done.expect_success()?;
    let lines = done.stdout.lines().filter(|line| !line.starts_with('\t'));
    ensure!(lines.count() == 3, "not three packets:\n{done}");
    done.expect_stdout("IP 10.77.0.1 > 10.77.0.2: ICMP echo request, id ")?;
    done.expect_stdout("0x0000:  4500 0054")?;
    ensure!(program_id(&net.server)? == 0, "a program is left");
    nothing_is_pinned(&net)?;

    let done = dump(&net)
        .args(["--duration", "0.2", "--output-json"])
        .run()?;
    done.expect_success()?;
    let last = done.json()?.pop().context("no summary record")?;
    ensure!(last["type"] == "summary", "{last}");
    Ok(())
}

fn tool(program: &str, args: &[&str], file: &Path) -> Result<String> {
    let output = Command::new(program).args(args).arg(file).output()?;
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{program}: {stderr}");
    let warned = stderr
        .lines()
        .any(|line| !line.starts_with("Running as user") && !line.starts_with("reading from file"));
    ensure!(!warned, "{program} complains: {stderr}");
    Ok(String::from_utf8(output.stdout)?)
}

fn pcapng() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let net = quiet_pair()?;
    let file = dir.path().join("x.pcapng");
    let probe = dump(&net).arg("-w").arg(&file).start()?;
    let before = std::time::SystemTime::now();
    flood(&net, PORT, 50, 100)?;
    let done = probe.stop()?;
    let after = std::time::SystemTime::now();
    done.expect_success()?;
    ensure!(summary(&done)? == [50, 0, 50, 50], "{done}");

    let info = tool("capinfos", &["-M"], &file)?;
    ensure!(info.contains("Number of packets:   50"), "{info}");
    ensure!(info.contains("nanoseconds (9)"), "{info}");
    ensure!(info.contains(&format!("Name = {IFACE}")), "{info}");
    ensure!(
        info.contains("Number of stat entries = 1"),
        "no statistics: {info}"
    );
    let fields = [
        "-T",
        "fields",
        "-e",
        "frame.time_epoch",
        "-e",
        "frame.interface_name",
        "-e",
        "frame.packet_id",
        "-e",
        "frame.interface_queue",
        "-e",
        "frame.packet_flags_direction",
        "-e",
        "udp.dstport",
        "-r",
    ];
    let rows = tool("tshark", &fields, &file)?;
    ensure!(rows.lines().count() == 50, "{rows}");
    for row in rows.lines() {
        let cells = row.split('\t').collect::<Vec<_>>();
        let time: f64 = cells[0].parse()?;
        let since = |t: std::time::SystemTime| t.duration_since(std::time::UNIX_EPOCH);
        ensure!(
            since(before)?.as_secs_f64() <= time && time <= since(after)?.as_secs_f64(),
            "not the wall clock: {row}"
        );
        ensure!(cells[1] == IFACE && !cells[2].is_empty(), "{row}");
        ensure!(cells[3] == "0" && cells[5] == "9", "{row}");
        ensure!(
            cells[4] == "1" || cells[4] == "0x00000001",
            "direction: {row}"
        );
    }
    Ok(())
}

/// Our file, printed by tcpdump, against the far end's own tcpdump.
fn pcap() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let (ours, theirs) = (dir.path().join("ours.pcap"), dir.path().join("theirs.pcap"));
    let far = tcpdump(&net.client, &theirs)?;
    let probe = dump(&net).args(["--use-pcap", "-w"]).arg(&ours).start()?;
    ensure!(net.client.ping(net.server.v4(0), 5)?, "no answer");
    ensure!(net.client.ping(net.server.v6(0), 5)?, "no answer");
    flood(&net, PORT, 20, 300)?;
    let done = probe.stop()?;
    done.expect_success()?;
    let captured = frames(&ours)?.len();
    wait_for("the far end's tcpdump", || {
        // Cut in the middle of a packet while it is written.
        Ok(frames(&theirs)
            .is_ok_and(|theirs| theirs.len() >= captured)
            .then_some(()))
    })?;
    end(far)?;
    // The order differs between CPUs; what went out before our capture began is in theirs alone.
    let (ours, mut theirs) = (frames(&ours)?, frames(&theirs)?);
    let pings = ours.iter().filter(|frame| frame.contains("echo request"));
    ensure!(pings.count() == 10, "not all: {ours:#?}");
    for frame in ours {
        let at = theirs.iter().position(|other| *other == frame);
        theirs.swap_remove(at.with_context(|| format!("the far end did not send this: {frame}"))?);
    }
    let missed = theirs.iter().filter(|frame| !frame.contains("ICMP6"));
    ensure!(missed.count() == 0, "not captured: {theirs:#?}");
    Ok(())
}

/// The packets of a file as tcpdump prints them, with all bytes.
fn frames(file: &Path) -> Result<Vec<String>> {
    let mut frames: Vec<String> = Vec::new();
    for line in tool(
        "tcpdump",
        &["-Z", "root", "-t", "-n", "-xx", "-e", "-r"],
        file,
    )?
    .lines()
    {
        match frames.last_mut() {
            Some(frame) if line.starts_with('\t') => frame.push_str(line),
            _ => frames.push(line.to_owned()),
        }
    }
    Ok(frames)
}

fn flood_to_file() -> Result<()> {
    let all = many(200_000);
    let dir = tempfile::tempdir()?;
    let net = quiet_pair()?;
    // One page of buffer, so that some are lost for sure; then the default.
    for pages in ["1", "2048"] {
        let file = dir.path().join(format!("{pages}.pcapng"));
        let probe = dump(&net)
            .args(["--buffer-pages", pages, "-w"])
            .arg(&file)
            .start()?;
        flood(&net, PORT, all, 512)?;
        let done = probe.stop()?;
        done.expect_success()?;
        let [captured, lost, matched, seen] = summary(&done)?;
        ensure!(seen == u64::from(all) && matched == seen, "{done}");
        ensure!(captured + lost == seen, "{done}");
        let length = std::fs::metadata(&file)?.len();
        ensure!(length > captured * (512 + 42), "{length} bytes:\n{done}");
    }
    Ok(())
}

fn snap_lengths() -> Result<()> {
    let net = quiet_pair()?;
    let all = many(20_000);
    for snaplen in [16, 21] {
        let done = capture(&net, &["-s", &snaplen.to_string()], || {
            flood(&net, PORT, 3, 100)
        })?;
        let lines = done.lines_with(&format!("(142 bytes, {snaplen} captured)"));
        ensure!(lines.len() == 3, "{done}");
    }
    // 56, 512 and 1,500 bytes on the wire, link header included.
    for (payload, len) in [(14, 56), (470, 512), (1458, 1500)] {
        let done = capture(&net, &["-s", "64"], || flood(&net, PORT, all, payload))?;
        let [captured, lost, _, seen] = summary(&done)?;
        ensure!(
            captured + lost == seen && seen == u64::from(all),
            "{len}: {:?}",
            summary(&done)?
        );
        ensure!(
            done.stdout.contains(&format!("({len} bytes")),
            "no packet of {len}"
        );
    }
    Ok(())
}

fn several_buffers() -> Result<()> {
    for mode in ["native", "skb"] {
        let net = quiet_pair()?;
        for netns in [&net.client, &net.server] {
            netns.ip("link set veth0 mtu 9000")?;
        }
        let probe = dump(&net)
            .args(["--xdp-mode", mode, "-xx", "-c", "1"])
            .start()?;
        net.client.cmd(&format!(
            "ping -c 1 -W 2 -s 8000 -p a5 {}",
            net.server.v4(0).ip()
        ))?;
        let done = probe.wait()?;
        done.expect_success()?;
        done.expect_stdout("length 8008 (8042 bytes)")?;
        let dumped = done
            .stdout
            .lines()
            .filter(|line| line.starts_with('\t'))
            .count();
        ensure!(dumped == 8042usize.div_ceil(16), "{dumped} lines of hex");
        done.expect_stdout("0x1f60:  a5a5 a5a5 a5a5 a5a5 a5a5")?;
    }
    Ok(())
}

fn two_interfaces() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let net = quiet_pair()?;
    let both = Netprobe::new("xdpdump")
        .args(["--netns", net.server.name(), "--iface", "veth0,lo"])
        .start()?;
    ensure!(net.client.ping(net.server.v4(0), 2)?, "no answer");
    net.server.cmd("ping -c 1 127.0.0.1")?;
    both.wait_line(" veth0 q0 IP 10.77.0.1 > 10.77.0.2")?;
    both.wait_line(" lo q0 IP 127.0.0.1 > 127.0.0.1")?;
    both.stop()?.expect_success()?;

    let file = dir.path().join("r.pcapng");
    let probe = dump(&net)
        .args(["--rotate-size", "1", "--rotate-files", "2", "-w"])
        .arg(&file)
        .start()?;
    flood(&net, PORT, 5_000, 1000)?;
    probe.stop()?.expect_success()?;
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir.path())? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    ensure!(names.len() == 2, "{names:?}");
    Ok(())
}

/// Another file after a second: the packet that comes then begins it.
fn rotation_by_time() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let net = quiet_pair()?;
    let probe = dump(&net)
        .args(["--rotate-seconds", "1", "-w"])
        .arg(dir.path().join("t.pcapng"))
        .start()?;
    wait_for("a second file", || {
        flood(&net, PORT, 1, 64)?;
        Ok((std::fs::read_dir(dir.path())?.count() >= 2).then_some(()))
    })?;
    let done = probe.stop()?;
    let mut packets = 0;
    for entry in std::fs::read_dir(dir.path())? {
        let read = Netprobe::new("xdpdump")
            .arg("-r")
            .arg(entry?.path())
            .run()?;
        read.expect_success()?;
        packets += read.stdout.lines().count() as u64;
    }
    ensure!(packets == summary(&done)?[0], "{packets} packets: {done}");
    Ok(())
}

fn promiscuous() -> Result<()> {
    let net = quiet_pair()?;
    let is_promiscuous = || -> Result<bool> {
        let link = net.server.ip(&format!("-d link show {IFACE}"))?;
        Ok(link.contains("promiscuity 1"))
    };
    ensure!(!is_promiscuous()?);
    let probe = dump(&net).arg("-P").start()?;
    ensure!(is_promiscuous()?, "not promiscuous");
    probe.stop()?.expect_success()?;
    ensure!(!is_promiscuous()?, "still promiscuous");
    Ok(())
}

/// However often the reader is woken, every packet is captured or counted.
fn wake_ups() -> Result<()> {
    let net = quiet_pair()?;
    for wakeup in ["1", "100000"] {
        let probe = dump(&net).args(["--perf-wakeup", wakeup]).start()?;
        flood(&net, PORT, 500, 64)?;
        let done = probe.stop()?;
        let [captured, lost, matched, _] = summary(&done)?;
        ensure!(captured + lost == 500 && matched == 500, "{done}");
    }
    dump(&net)
        .args(["--perf-wakeup", "0"])
        .run()?
        .expect_code(2)
}

fn errors() -> Result<()> {
    let net = quiet_pair()?;
    let run = |args: &[&str]| Netprobe::new("xdpdump").args(args).netns(&net.server).run();
    run(&[])?.expect_code(2)?;
    let done = run(&["--iface", "nosuchif0"])?;
    done.expect_code(2)?;
    // Loaded tunnel modules put devices of their own into each namespace.
    done.expect_stderr("there are: lo, ")?;
    done.expect_stderr("veth0")?;
    run(&["--iface", IFACE, "-c", "x"])?.expect_code(2)?;
    run(&["--iface", IFACE, "--xdp-mode", "hw"])?.expect_code(2)?;
    run(&["--iface", IFACE, "-w", "/nonexistent/file"])?.expect_code(1)?;
    let probe = dump(&net).start()?;
    let done = run(&["--iface", IFACE])?;
    done.expect_code(1)?;
    done.expect_stderr(&format!("captured by process {} already", probe.pid()))?;
    probe.signal(nix::sys::signal::Signal::SIGTERM)?;
    probe.wait()?.expect_success()?;
    ensure!(program_id(&net.server)? == 0, "SIGTERM left a program");
    let probe = dump(&net).start()?;
    // The kernel tells a process of a terminal that has gone, and then its shell does.
    for _ in 0..2 {
        probe.signal(nix::sys::signal::Signal::SIGHUP)?;
    }
    probe.wait()?.expect_success()?;
    ensure!(program_id(&net.server)? == 0, "SIGHUP left a program");
    nothing_is_pinned(&net)
}

/// A capture file printed again by -r: the same lines, packet for packet.
fn printed_again() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let net = quiet_pair()?;
    for (name, classic) in [("x.pcapng", false), ("x.pcap", true)] {
        let file = dir.path().join(name);
        let mut probe = dump(&net).arg("-w").arg(&file);
        if classic {
            probe = probe.arg("--use-pcap");
        }
        let probe = probe.start()?;
        flood(&net, PORT, 20, 100)?;
        flood(&net, PORT + 1, 10, 50)?;
        probe.stop()?.expect_success()?;
        let done = Netprobe::new("xdpdump").arg("-r").arg(&file).run()?;
        done.expect_success()?;
        ensure!(done.stdout.lines().count() == 30, "{done}");
        ensure!(
            done.lines_with(".9: UDP, length 100 (142 bytes)").len() == 20,
            "{done}"
        );
        let limited = Netprobe::new("xdpdump")
            .args(["-c", "3", "-r"])
            .arg(&file)
            .run()?;
        ensure!(limited.stdout.lines().count() == 3, "{limited}");
    }
    let cut = dir.path().join("cut.pcapng");
    let whole = std::fs::read(dir.path().join("x.pcapng"))?;
    std::fs::write(&cut, &whole[..whole.len() / 2])?;
    let done = Netprobe::new("xdpdump").arg("-r").arg(&cut).run()?;
    done.expect_code(1)?;
    done.expect_stdout("UDP, length 100")?;
    done.expect_stderr("truncated pcapng dump file")
}

fn filters() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let net = quiet_pair()?;
    for (expression, wanted) in [
        ("udp dst port 9", 5),
        ("udp and not dst port 9", 3),
        ("udp[8] = 0x55 and greater 100", 8),
        (
            "ether[12:2] = 0x0800 and ip[6:2] & 0x1fff = 0 and dst host 10.77.0.2",
            8,
        ),
        ("ip6 or vlan 5", 0),
    ] {
        let words = expression.split_whitespace().collect::<Vec<_>>();
        let probe = dump(&net).args(&words).start()?;
        flood(&net, PORT, 5, 64)?;
        flood(&net, PORT + 1, 3, 64)?;
        let done = probe.stop()?;
        done.expect_success()?;
        ensure!(
            summary(&done)? == [wanted, 0, wanted, 8],
            "{expression}: {done}"
        );
        ensure!(
            done.stdout.lines().count() as u64 == wanted,
            "{expression}: {done}"
        );
    }
    // The same decision on a file; and the expression is in it.
    let file = dir.path().join("f.pcapng");
    let probe = dump(&net)
        .arg("-w")
        .arg(&file)
        .args(["udp", "dst", "portrange", "9-10"])
        .start()?;
    flood(&net, PORT, 5, 64)?;
    flood(&net, PORT + 1, 3, 64)?;
    flood(&net, PORT + 2, 2, 64)?;
    let done = probe.stop()?;
    ensure!(summary(&done)? == [8, 0, 8, 10], "{done}");
    let bytes = std::fs::read(&file)?;
    let text = b"udp dst portrange 9-10";
    ensure!(
        bytes.windows(text.len()).any(|window| window == text),
        "no filter in the file"
    );
    let done = Netprobe::new("xdpdump")
        .arg("-r")
        .arg(&file)
        .args(["port", "10"])
        .run()?;
    ensure!(done.stdout.lines().count() == 3, "{done}");
    let sampled = {
        let probe = dump(&net)
            .args(["--sample", "10", "udp", "port", "9"])
            .start()?;
        flood(&net, PORT, 1000, 64)?;
        probe.stop()?
    };
    let [captured, lost, matched, _] = summary(&sampled)?;
    ensure!(
        matched == 1000 && (90..=110).contains(&(captured + lost)),
        "{sampled}"
    );
    dump(&net)
        .args(["tcp", "portt", "80"])
        .run()?
        .expect_code(2)
}

/// A list of all links does not fit into a small buffer: one link does.
fn small_receive_buffers() -> Result<()> {
    const DEFAULT: &str = "/proc/sys/net/core/rmem_default";
    /// Puts the setting back.
    struct Before(String);
    impl Drop for Before {
        fn drop(&mut self) {
            let _ = std::fs::write(DEFAULT, &self.0);
        }
    }
    let net = quiet_pair()?;
    let _before = Before(std::fs::read_to_string(DEFAULT)?);
    std::fs::write(DEFAULT, "3000")?;
    let probe = dump(&net).start()?;
    flood(&net, PORT, 3, 10)?;
    let done = probe.stop()?;
    ensure!(summary(&done)?[0] == 3, "{done}");
    let listed = Netprobe::new("xdpdump")
        .args(["-D", "--netns", net.server.name()])
        .run()?;
    listed.expect_stdout(IFACE)?;
    let refused = dump(&net).arg("--diff").run()?;
    refused.expect_stderr("need an XDP program that can be traced")?;
    xdpchain(&net, "list").map(|_| ())
}
