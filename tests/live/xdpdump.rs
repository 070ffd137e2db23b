//! `netprobe xdpdump` and `netprobe xdpchain` on veth pairs: capture, files, the chain and its way back.

use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, anyhow, ensure};
use libbpf_rs::{MapCore, MapFlags, Object, ObjectBuilder, Xdp, XdpFlags};

use crate::common::{Case, Finished, Netns, Netprobe, Pair, Running, case, wait_for};

const ECHO: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/xdp_echo.o"));
const DROP_PORT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/xdp_drop_port.o"));
const COUNT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/xdp_count.o"));

const IFACE: &str = Pair::IFACE;
/// The examples' discard port.
const PORT: u16 = 9;
const FRAGS: u32 = 1 << 5;

pub fn cases() -> Vec<Case> {
    let cases = vec![
        case("xdpdump_explains_failed_redirects", failed_redirects).xdp(),
        case("xdpdump_trace_verdicts_and_ids", trace)
            .xdp()
            .fentry()
            .program("ping"),
        case("xdpdump_trace_names", trace_names).xdp().fentry(),
        case("xdpdump_auto_says_which", auto_mode).xdp(),
        case("xdpdump_text_and_limits", text_and_limits)
            .xdp()
            .program("ping"),
        case("xdpdump_the_source_s_demonstration", demonstration)
            .xdp()
            .program("ping")
            .program("tcpdump"),
        case("xdpdump_pcapng_reads_everywhere", pcapng)
            .xdp()
            .program("tshark")
            .program("capinfos")
            .program("tcpdump"),
        case("xdpdump_pcap_is_what_tcpdump_saw", pcap)
            .xdp()
            .program("ping")
            .program("tcpdump"),
        case("xdpdump_in_front_of_netlink", in_front_of_netlink).xdp(),
        case("xdpdump_in_front_of_link", in_front_of_link).xdp(),
        case("xdpdump_killed_and_restored", killed_and_restored).xdp(),
        case("xdpdump_swap_under_a_flood_loses_nothing", swap_under_flood).xdp(),
        case(
            "xdpchain_swap_under_a_flood_loses_nothing",
            slots_under_flood,
        )
        .xdp(),
        case("xdpdump_flood_captured_and_lost_is_sent", flood_to_file).xdp(),
        case("xdpdump_snap_lengths_and_sizes", snap_lengths).xdp(),
        case("xdpdump_packets_of_several_buffers", several_buffers)
            .xdp()
            .kernel(5, 18)
            .program("ping"),
        case("xdpdump_two_interfaces_and_rotation", two_interfaces)
            .xdp()
            .program("ping"),
        case("xdpdump_errors", errors).xdp(),
        case("xdpdump_file_printed_again", printed_again).xdp(),
        case("xdpdump_filter_in_the_kernel", filters).xdp(),
        case("xdpchain_slots_and_statistics", slots_and_statistics)
            .xdp()
            .program("ping"),
        case("xdpchain_outlives_a_killed_capture", chain_outlives_capture)
            .xdp()
            .program("ping"),
    ];
    cases.into_iter().map(|case| case.limit(900)).collect()
}

/// QEMU without hardware behind it.
fn is_emulated() -> bool {
    std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("QEMU"))
}

/// Fewer packets where each takes long.
fn many(count: u32) -> u32 {
    if is_emulated() { count / 20 } else { count }
}

/// A pair without traffic of its own: no IPv6, no ARP.
fn quiet_pair() -> Result<Pair> {
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

fn dump(net: &Pair) -> Netprobe<'_> {
    Netprobe::new("xdpdump")
        .args(["--iface", IFACE])
        .netns(&net.server)
}

/// The same, in front of the program that is there also where it could be traced.
fn chained(net: &Pair) -> Netprobe<'_> {
    dump(net).args(["--mode", "chain"])
}

fn xdpchain(net: &Pair, words: &str) -> Result<Finished> {
    let done = Netprobe::new("xdpchain")
        .args(words.split_whitespace())
        .netns(&net.server)
        .run()?;
    done.expect_success()?;
    Ok(done)
}

/// Sends `count` datagrams of `len` bytes to a port.
fn flood(net: &Pair, port: u16, count: u32, len: usize) -> Result<()> {
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
fn object(dir: &tempfile::TempDir, name: &str, bytes: &[u8]) -> Result<PathBuf> {
    let path = dir.path().join(name);
    std::fs::write(&path, bytes)?;
    Ok(path)
}

/// What was said in the summary: captured, lost, matched, seen.
fn summary(done: &Finished) -> Result<[u64; 4]> {
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

fn program_id(netns: &Netns) -> Result<u32> {
    let ifindex = netns.ifindex(IFACE)? as i32;
    netns.enter(|| -> Result<u32> {
        let stdin = std::io::stdin();
        let xdp = Xdp::new(stdin.as_fd());
        Ok(xdp.query_id(ifindex, XdpFlags::NONE).unwrap_or(0))
    })?
}

fn nothing_is_pinned(net: &Pair) -> Result<()> {
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

fn tcpdump(netns: &Netns, file: &Path) -> Result<Child> {
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

fn end(mut child: Child) -> Result<()> {
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT)?;
    child.wait()?;
    Ok(())
}

/// dump on a veth, ping answered; xdp_echo into slot 0: no answer, the request comes back; taken out: answered again.
fn demonstration() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let echo = object(&dir, "xdp_echo.o", ECHO)?;
    let net = quiet_pair()?;
    let probe = dump(&net).start()?;
    ensure!(net.client.ping(net.server.v4(0), 3)?, "no answer at first");
    probe.wait_lines("three requests", |text| {
        (text.matches("ICMP echo request").count() >= 3).then_some(())
    })?;

    let file = dir.path().join("back.pcap");
    let mut back = Command::new("tcpdump");
    back.args([
        "-Z",
        "root",
        "-U",
        "--immediate-mode",
        "-i",
        IFACE,
        "-Q",
        "in",
        "-w",
    ])
    .arg(&file)
    .stderr(Stdio::null());
    let back = net.client.enter(|| back.spawn())??;
    wait_for("tcpdump's file", || {
        Ok(file.metadata().is_ok_and(|m| m.len() >= 24).then_some(()))
    })?;
    xdpchain(&net, &format!("add {IFACE} {} --slot 0", echo.display()))?;
    ensure!(
        !net.client.ping(net.server.v4(0), 2)?,
        "answered in spite of xdp_echo"
    );
    wait_for("the requests to come back", || {
        let text = net
            .client
            .cmd(&format!("tcpdump -Z root -n -r {}", file.display()))?;
        Ok((text.matches("ICMP echo request").count() >= 2).then_some(()))
    })?;
    end(back)?;
    let list = xdpchain(&net, "list")?;
    list.expect_stdout("xdp_echo_prog")?;

    xdpchain(&net, &format!("remove {IFACE} --slot 0"))?;
    ensure!(net.client.ping(net.server.v4(0), 3)?, "no answer at last");
    probe.wait_lines("all eight requests", |text| {
        (text.matches("ICMP echo request").count() >= 8).then_some(())
    })?;
    let done = probe.stop()?;
    done.expect_success()?;
    let [captured, lost, _, seen] = summary(&done)?;
    ensure!(captured == seen && lost == 0, "{done}");
    nothing_is_pinned(&net)
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

/// The counting example, loaded by the test as any other program that netprobe knows nothing of.
struct Counter {
    object: Object,
    link: Option<OwnedFd>,
}

impl Counter {
    fn load(frags: bool) -> Result<Self> {
        let mut open = ObjectBuilder::default().open_memory(COUNT)?;
        for mut program in open.progs_mut() {
            program.set_flags(if frags { FRAGS } else { 0 });
        }
        Ok(Self {
            object: open.load()?,
            link: None,
        })
    }

    fn attach(&mut self, netns: &Netns, how: Option<XdpFlags>) -> Result<u32> {
        let ifindex = netns.ifindex(IFACE)? as i32;
        let program = self.object.progs_mut().next().context("no program")?;
        let program = program.as_fd();
        match how {
            Some(flags) => netns.enter(|| Xdp::new(program).attach(ifindex, flags))??,
            None => {
                // SAFETY: numbers and no options; a positive result is an fd that nobody else owns.
                let fd = netns.enter(|| unsafe {
                    libbpf_sys::bpf_link_create(
                        program.as_raw_fd(),
                        ifindex,
                        libbpf_sys::BPF_XDP,
                        std::ptr::null(),
                    )
                })?;
                ensure!(fd > 0, "failed to make a link: {fd}");
                // SAFETY: see above.
                self.link = Some(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
        program_id(netns)
    }

    /// Packets that it counted on all CPUs.
    fn packets(&self) -> Result<u64> {
        let map = self.object.maps().find(|map| map.name() == "packets");
        let per_cpu = map
            .context("no map")?
            .lookup_percpu(&0u32.to_ne_bytes(), MapFlags::ANY)?
            .unwrap_or_default();
        Ok(per_cpu
            .iter()
            .filter_map(|bytes| Some(u64::from_ne_bytes(bytes.get(..8)?.try_into().ok()?)))
            .sum())
    }
}

fn in_front_of_netlink() -> Result<()> {
    let frags: &[bool] = if has_frags() {
        &[false, true]
    } else {
        &[false]
    };
    for mode in [XdpFlags::SKB_MODE, XdpFlags::DRV_MODE] {
        for frags in frags {
            let net = quiet_pair()?;
            let mut counter = Counter::load(*frags)?;
            let id =
                counter.attach(&net.server, Some(XdpFlags::from_bits_truncate(mode.bits())))?;
            in_front(&net, &counter, id)?;
        }
    }
    Ok(())
}

fn in_front_of_link() -> Result<()> {
    let net = quiet_pair()?;
    let mut counter = Counter::load(false)?;
    let id = counter.attach(&net.server, None)?;
    in_front(&net, &counter, id)?;
    // The link belongs to its maker: with that it ends.
    let probe = chained(&net).start()?;
    counter.link = None;
    ensure!(program_id(&net.server)? == 0, "the capture keeps the link");
    probe.stop()?.expect_success()?;
    nothing_is_pinned(&net)
}

fn has_frags() -> bool {
    Counter::load(true).is_ok()
}

/// A capture in front of `counter`: both see all packets, and `id` is back when it ends.
fn in_front(net: &Pair, counter: &Counter, id: u32) -> Result<()> {
    let probe = chained(net).start()?;
    probe.wait_stderr(&format!("in front of program {id}"))?;
    ensure!(program_id(&net.server)? != id, "nothing was put in front");
    let before = counter.packets()?;
    flood(net, PORT, 100, 64)?;
    let done = probe.stop()?;
    done.expect_success()?;
    ensure!(summary(&done)? == [100, 0, 100, 100], "{done}");
    ensure!(
        counter.packets()? - before == 100,
        "the program missed some"
    );
    ensure!(program_id(&net.server)? == id, "it was not put back");
    nothing_is_pinned(net)
}

fn killed_and_restored() -> Result<()> {
    let net = quiet_pair()?;
    let mut counter = Counter::load(false)?;
    let id = counter.attach(&net.server, Some(XdpFlags::SKB_MODE))?;
    for next in ["start", "restore"] {
        chained(&net).start()?.kill9()?;
        ensure!(
            program_id(&net.server)? != id,
            "put back by a dead process?"
        );
        let before = counter.packets()?;
        flood(&net, PORT, 50, 64)?;
        ensure!(
            counter.packets()? - before == 50,
            "the old program does not run behind the dead capture"
        );
        if next == "start" {
            in_front(&net, &counter, id)?;
        } else {
            let done = Netprobe::new("xdpdump").arg("--restore").run()?;
            done.expect_success()?;
        }
        ensure!(program_id(&net.server)? == id, "{next} did not put it back");
        nothing_is_pinned(&net)?;
    }
    // Without a program before it: nothing remains of a killed capture.
    let bare = quiet_pair()?;
    dump(&bare).start()?.kill9()?;
    ensure!(
        program_id(&bare.server)? == 0,
        "the link outlived its process"
    );
    dump(&bare)
        .args(["--duration", "0.1"])
        .run()?
        .expect_success()?;
    nothing_is_pinned(&bare)
}

fn swap_under_flood() -> Result<()> {
    let net = quiet_pair()?;
    let mut counter = Counter::load(false)?;
    let id = counter.attach(&net.server, Some(XdpFlags::SKB_MODE))?;
    let before = counter.packets()?;
    let sent = during_flood(&net, || {
        for swap in 0..6 {
            let probe = chained(&net).args(["-w", "/dev/null"]).start()?;
            if swap % 3 == 2 {
                probe.kill9()?;
            } else {
                probe.stop()?.expect_success()?;
            }
        }
        Ok(())
    })?;
    let came = counter.packets()? - before;
    ensure!(came == sent, "{came} of {sent} packets came to the program");
    let restore = Netprobe::new("xdpdump").arg("--restore").run()?;
    restore.expect_success()?;
    ensure!(program_id(&net.server)? == id, "it was not put back");
    nothing_is_pinned(&net)
}

/// Runs `work` while datagrams are sent as fast as they go; gives their number.
fn during_flood(net: &Pair, work: impl FnOnce() -> Result<()>) -> Result<u64> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| -> Result<u64> {
            let mut sent = 0;
            while !stop.load(Ordering::Relaxed) {
                flood(net, PORT, 1000, 32)?;
                sent += 1000;
            }
            Ok(sent)
        });
        let worked = work();
        stop.store(true, Ordering::Relaxed);
        let sent = sender.join().map_err(|_| anyhow!("the sender panicked"))?;
        worked?;
        sent
    })
}

fn slots_under_flood() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let count = object(&dir, "xdp_count.o", COUNT)?;
    let net = quiet_pair()?;
    let mut counter = Counter::load(false)?;
    counter.attach(&net.server, Some(XdpFlags::SKB_MODE))?;
    let probe = chained(&net).args(["-w", "/dev/null"]).start()?;
    let before = counter.packets()?;
    let sent = during_flood(&net, || {
        for _ in 0..10 {
            xdpchain(&net, &format!("add {IFACE} {} --slot 2", count.display()))?;
            xdpchain(&net, &format!("remove {IFACE} --slot 2"))?;
        }
        Ok(())
    })?;
    let came = counter.packets()? - before;
    ensure!(came == sent, "{came} of {sent} packets came to the program");
    let done = probe.stop()?;
    done.expect_success()?;
    let [captured, lost, _, seen] = summary(&done)?;
    ensure!(captured + lost == seen && seen == sent, "{sent}: {done}");
    Ok(())
}

fn flood_to_file() -> Result<()> {
    let all = many(200_000);
    let dir = tempfile::tempdir()?;
    let net = quiet_pair()?;
    // One page of buffer, so that some are lost for sure; then the default.
    for pages in ["1", "256"] {
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

fn capture(net: &Pair, args: &[&str], traffic: impl FnOnce() -> Result<()>) -> Result<Finished> {
    let probe: Running = dump(net).args(args).start()?;
    traffic()?;
    let done = probe.stop()?;
    done.expect_success()?;
    Ok(done)
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
    nothing_is_pinned(&net)
}

fn slots_and_statistics() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let drop_port = object(&dir, "xdp_drop_port.o", DROP_PORT)?;
    let count = object(&dir, "xdp_count.o", COUNT)?;
    let net = quiet_pair()?;
    xdpchain(
        &net,
        &format!("add {IFACE} {} --slot 0", drop_port.display()),
    )?;
    xdpchain(
        &net,
        &format!("add {IFACE} {} --slot 4 --name counter", count.display()),
    )?;
    flood(&net, PORT, 30, 64)?;
    flood(&net, PORT + 1, 12, 64)?;
    let list = xdpchain(&net, "list --output-json")?;
    let chain = list
        .json()?
        .into_iter()
        .find(|chain| chain["slots"][1]["name"] == "counter")
        .with_context(|| format!("no chain:\n{list}"))?;
    let slots = &chain["slots"];
    ensure!(slots[0]["runs"] == 42 && slots[1]["runs"] == 12, "{chain}");
    ensure!(slots[0]["verdicts"][1] == 30, "{chain}");
    ensure!(slots[1]["verdicts"][2] == 12, "{chain}");

    let taken = Netprobe::new("xdpchain")
        .args(["add", IFACE])
        .arg(&count)
        .args(["--slot", "0"])
        .netns(&net.server)
        .run()?;
    taken.expect_code(1)?;
    taken.expect_stderr("holds xdp_drop_port already")?;
    xdpchain(&net, &format!("clear {IFACE}"))?;
    ensure!(program_id(&net.server)? == 0, "clear left a program");
    ensure!(net.client.ping(net.server.v4(0), 2)?, "no answer");
    nothing_is_pinned(&net)
}

fn chain_outlives_capture() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let echo = object(&dir, "xdp_echo.o", ECHO)?;
    let net = quiet_pair()?;
    for kill in [false, true] {
        let probe = dump(&net).start()?;
        xdpchain(&net, &format!("add {IFACE} {}", echo.display()))?;
        if kill {
            probe.kill9()?;
        } else {
            probe.stop()?.expect_success()?;
        }
        ensure!(
            !net.client.ping(net.server.v4(0), 1)?,
            "the chain went with the capture (killed: {kill})"
        );
        // A capture that comes later sees the packets of that chain.
        let probe = dump(&net).start()?;
        ensure!(!net.client.ping(net.server.v4(0), 1)?, "answered");
        probe.wait_line("ICMP echo request")?;
        probe.stop()?.expect_success()?;
        xdpchain(&net, &format!("remove {IFACE}"))?;
        ensure!(net.client.ping(net.server.v4(0), 1)?, "no answer");
        nothing_is_pinned(&net)?;
    }
    Ok(())
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
    done.expect_stderr("cut")
}

/// The filtering example at the interface by itself: drops what goes to its port, passes the rest.
fn dropper(net: &Pair) -> Result<Object> {
    let object = ObjectBuilder::default().open_memory(DROP_PORT)?.load()?;
    let ifindex = net.server.ifindex(IFACE)? as i32;
    {
        let program = object.progs_mut().next().context("no program")?;
        let program = program.as_fd();
        net.server
            .enter(|| Xdp::new(program).attach(ifindex, XdpFlags::SKB_MODE))??;
    }
    Ok(object)
}

fn trace() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let net = quiet_pair()?;
    let _program = dropper(&net)?;
    let id = program_id(&net.server)?;
    let probe = dump(&net)
        .args(["--mode", "trace", "--rx-capture", "entry,exit", "-v"])
        .start()?;
    flood(&net, PORT, 5, 64)?;
    flood(&net, PORT + 1, 3, 64)?;
    let done = probe.stop()?;
    done.expect_success()?;
    ensure!(program_id(&net.server)? == id, "the program was changed");
    ensure!(
        done.lines_with("xdp_drop_port()@exit[DROP]").len() == 5,
        "{done}"
    );
    ensure!(
        done.lines_with("xdp_drop_port()@exit[PASS]").len() == 3,
        "{done}"
    );
    let entries = done.lines_with("xdp_drop_port()@entry");
    ensure!(entries.len() == 8, "{done}");
    for entry in entries {
        let number = entry
            .split_whitespace()
            .skip_while(|word| *word != "id")
            .nth(1);
        let number = format!(" id {} ", number.context("no id")?);
        ensure!(
            done.lines_with(&number).len() == 2,
            "{number} has no pair:\n{done}"
        );
    }

    let probe = dump(&net)
        .args(["--rx-capture", "entry,exit", "udp", "dst", "port", "9"])
        .start()?;
    flood(&net, PORT, 5, 64)?;
    flood(&net, PORT + 1, 3, 64)?;
    let done = probe.stop()?;
    ensure!(done.stdout.lines().count() == 10, "{done}");
    ensure!(done.lines_with("@exit[DROP]").len() == 5, "{done}");

    let done = {
        let probe = dump(&net).args(["--action", "drop"]).start()?;
        flood(&net, PORT, 4, 64)?;
        flood(&net, PORT + 1, 6, 64)?;
        probe.stop()?
    };
    done.expect_success()?;
    ensure!(done.stdout.lines().count() == 4, "{done}");

    let file = dir.path().join("t.pcapng");
    let probe = dump(&net)
        .args(["--rx-capture", "entry,exit", "-w"])
        .arg(&file)
        .start()?;
    flood(&net, PORT, 4, 64)?;
    flood(&net, PORT + 1, 6, 64)?;
    probe.stop()?.expect_success()?;
    let done = Netprobe::new("xdpdump")
        .args(["--action", "drop", "-r"])
        .arg(&file)
        .run()?;
    done.expect_success()?;
    ensure!(
        done.lines_with("veth0:xdp_drop_port()@fexit q0[DROP]")
            .len()
            == 4,
        "{done}"
    );
    let all = Netprobe::new("xdpdump").arg("-r").arg(&file).run()?;
    ensure!(all.stdout.lines().count() == 20, "{all}");
    Ok(())
}

fn trace_names() -> Result<()> {
    let net = quiet_pair()?;
    let none = dump(&net).args(["--mode", "trace"]).run()?;
    none.expect_code(1)?;
    none.expect_stderr("has no XDP program to trace")?;
    let _program = dropper(&net)?;
    let id = program_id(&net.server)?;
    let wrong = dump(&net).args(["-p", "nosuch"]).run()?;
    wrong.expect_code(2)?;
    wrong.expect_stderr(&format!("there are: xdp_drop_port@{id}"))?;
    for name in [
        "xdp_drop_port".to_owned(),
        format!("xdp_drop_port@{id}"),
        id.to_string(),
        "all".to_owned(),
    ] {
        let probe = dump(&net).args(["-p", &name]).start()?;
        flood(&net, PORT, 3, 64)?;
        let done = probe.stop()?;
        ensure!(
            done.lines_with("xdp_drop_port()@entry").len() == 3,
            "{name}: {done}"
        );
    }
    Ok(())
}

fn auto_mode() -> Result<()> {
    let net = quiet_pair()?;
    let _program = dropper(&net)?;
    let probe = dump(&net).start()?;
    flood(&net, PORT, 3, 64)?;
    let done = probe.stop()?;
    done.expect_success()?;
    ensure!(done.lines_with(".9: UDP").len() == 3, "{done}");
    let traced = done.stderr.contains("tracing xdp_drop_port@");
    let chained = done.stderr.contains("by tail call");
    ensure!(traced != chained, "{done}");
    ensure!(
        !chained || done.stderr.contains("cannot trace xdp_drop_port@"),
        "{done}"
    );
    Ok(())
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

/// A native program on veth cannot send back to a peer without NAPI: the kernel drops the packet, and netprobe says why.
fn failed_redirects() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let echo = object(&dir, "xdp_echo.o", ECHO)?;
    let net = quiet_pair()?;
    let probe = dump(&net).args(["--xdp-mode", "native"]).start()?;
    xdpchain(&net, &format!("add {IFACE} {}", echo.display()))?;
    flood(&net, PORT, 3, 64)?;
    let line = probe.wait_line(" xdp_")?;
    ensure!(line.contains("the target cannot take XDP frames"), "{line}");
    let done = probe.stop()?;
    done.expect_success()?;
    let [captured, lost, matched, _] = summary(&done)?;
    ensure!(
        captured + lost == matched,
        "an error was counted as a packet: {done}"
    );
    xdpchain(&net, &format!("clear {IFACE}"))?;
    nothing_is_pinned(&net)
}
