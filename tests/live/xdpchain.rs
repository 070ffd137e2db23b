//! `netprobe xdpchain`, and `netprobe xdpdump` in front of other programs: the chain, its swaps and its way back.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, anyhow, bail, ensure};
use libbpf_rs::{MapCore, MapFlags, MapHandle, Object, ObjectBuilder, Xdp, XdpFlags};

use crate::common::{Case, Netns, Netprobe, Pair, case, wait_for};
use crate::xdp::*;
use netprobe::kernel::xdp::Mode;
use netprobe::tools::xdpdump::probes::{Capture, Options, event_map};

pub fn cases() -> Vec<Case> {
    let cases = vec![
        case("xdpdump_the_source_s_demonstration", demonstration)
            .xdp()
            .program("ping")
            .program("tcpdump"),
        case("xdpdump_in_front_of_netlink", in_front_of_netlink)
            .once_on("newest")
            .xdp(),
        case("xdpdump_in_front_of_link", in_front_of_link)
            .once_on("newest")
            .xdp(),
        case("xdpdump_panic_puts_back", panic_puts_back)
            .once_on("6.12")
            .xdp(),
        case("xdpdump_killed_and_restored", killed_and_restored).xdp(),
        case("xdpdump_swap_under_a_flood_loses_nothing", swap_under_flood)
            .once_on("newest")
            .xdp(),
        case(
            "xdpchain_swap_under_a_flood_loses_nothing",
            slots_under_flood,
        )
        .once_on("6.1")
        .xdp(),
        case("xdpchain_slots_and_statistics", slots_and_statistics)
            .xdp()
            .program("ping"),
        case("xdpchain_outlives_a_killed_capture", chain_outlives_capture)
            .once_on("newest")
            .xdp()
            .program("ping"),
        case("xdpchain_slots_filled_by_hand", filled_by_hand)
            .once_on("6.12")
            .xdp(),
    ];
    cases.into_iter().map(|case| case.limit(900)).collect()
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

    /// Waits until it has counted that many and no more: the kernel may handle the last of a flood after the sender has gone on.
    fn wait_for(&self, place: &str, packets: u64) -> Result<()> {
        wait_for(&format!("{packets} packets {place}"), || {
            Ok((self.packets()? >= packets).then_some(()))
        })?;
        ensure!(self.packets()? == packets, "more packets {place}");
        Ok(())
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

/// A capture that panics takes its program away, and the one that was there is back.
fn panic_puts_back() -> Result<()> {
    let net = quiet_pair()?;
    let mut counter = Counter::load(has_frags())?;
    let id = counter.attach(&net.server, Some(XdpFlags::SKB_MODE))?;
    let during = std::panic::catch_unwind(AssertUnwindSafe(|| {
        net.server.enter(|| -> Result<()> {
            let options = Options {
                snaplen: 64,
                sample: 1,
                filter: None,
                tunnel: None,
            };
            let events = event_map()?;
            let mut storage = std::mem::MaybeUninit::uninit();
            let modes = vec![Mode::Generic];
            let capture = Capture::begin(IFACE, &options, modes, events.as_fd(), &mut storage)?;
            ensure!(capture.before == Some(id) && program_id(&net.server)? != id);
            std::panic::resume_unwind(Box::new(PANIC))
        })
    }));
    let Err(panic) = during else {
        bail!("it did not panic: {during:?}");
    };
    ensure!(panic.downcast_ref() == Some(&PANIC), "another panic");
    ensure!(program_id(&net.server)? == id, "not put back");
    nothing_is_pinned(&net)
}

const PANIC: &str = "as the test wants it";

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
        counter.wait_for("behind a dead capture", before + 50)?;
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

/// The capture's program passes over slots that netprobe knows to be empty, and never over one that is not: filled by `xdpchain
/// add`, through the pinned map, or so behind a killed capture.
fn filled_by_hand() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let count = object(&dir, "xdp_count.o", COUNT)?;
    let net = quiet_pair()?;
    let mut counter = Counter::load(has_frags())?;
    let probe = dump(&net).args(["-w", "/dev/null"]).start()?;
    ensure!(is_known_empty(&net)?, "not known to be empty at first");
    // No packet passes over a program that netprobe itself put in.
    xdpchain(&net, &format!("add {IFACE} {}", count.display()))?;
    ensure!(!is_known_empty(&net)?, "known to be empty, with a program");
    flood(&net, PORT, 30, 64)?;
    wait_for("30 runs of the program", || {
        let list = xdpchain(&net, "list --output-json")?;
        let chains = list.json()?;
        let chain = chains.iter().find(|chain| chain["captured_by"].is_u64());
        let runs = chain.map(|chain| &chain["slots"][0]["runs"]);
        Ok(runs.is_some_and(|runs| *runs == 30).then_some(()))
    })?;
    xdpchain(&net, &format!("remove {IFACE}"))?;
    ensure!(is_known_empty(&net)?, "not known to be empty again");

    put_by_hand(&net, &mut counter, 3)?;
    wait_for("the program put in by hand", || {
        flood(&net, PORT, 1, 64)?;
        Ok((counter.packets()? > 0).then_some(()))
    })?;
    ensure!(!is_known_empty(&net)?, "known to be empty, with a program");
    pinned(&net, "next_prog_map")?.delete(&3u32.to_ne_bytes())?;
    // Only netprobe itself may tell that it is empty: by putting one in and taking it out.
    wait_for("the chain to be known to be empty", || {
        xdpchain(&net, &format!("add {IFACE} {}", count.display()))?;
        xdpchain(&net, &format!("remove {IFACE}"))?;
        Ok(is_known_empty(&net)?.then_some(()))
    })?;

    // What the process knew ends with it. The chain's link has been pinned by then.
    probe.kill9()?;
    ensure!(program_id(&net.server)? != 0, "the chain went with it");
    let before = counter.packets()?;
    put_by_hand(&net, &mut counter, 6)?;
    flood(&net, PORT, 50, 64)?;
    counter.wait_for("behind a killed capture", before + 50)?;
    pinned(&net, "next_prog_map")?.delete(&6u32.to_ne_bytes())?;
    let restore = Netprobe::new("xdpdump").arg("--restore").run()?;
    restore.expect_success()?;
    nothing_is_pinned(&net)
}

/// A map that netprobe pinned for the interface.
fn pinned(net: &Pair, name: &str) -> Result<MapHandle> {
    let base = Path::new("/sys/fs/bpf/netprobe/xdp");
    let own = base.join(format!("{IFACE}@{}", net.server.inode()?));
    let dir = if own.exists() { own } else { base.join(IFACE) };
    Ok(MapHandle::from_pinned_path(dir.join(name))?)
}

/// As `bpftool map update pinned` does it.
fn put_by_hand(net: &Pair, counter: &mut Counter, slot: u32) -> Result<()> {
    let program = counter.object.progs_mut().next().context("no program")?;
    let fd = program.as_fd().as_raw_fd();
    let slots = pinned(net, "next_prog_map")?;
    slots.update(&slot.to_ne_bytes(), &fd.to_ne_bytes(), MapFlags::ANY)?;
    Ok(())
}

/// What the capture's program goes by.
fn is_known_empty(net: &Pair) -> Result<bool> {
    let value = pinned(net, "chain_empty")?.lookup(&0u32.to_ne_bytes(), MapFlags::ANY)?;
    Ok(value == Some(1u32.to_ne_bytes().to_vec()))
}
