//! `netprobe xdpdump --mode trace`: loaded programs watched from outside, and why packets were dropped at XDP.

use std::os::fd::AsFd;

use anyhow::{Context, Result, ensure};
use libbpf_rs::{Object, ObjectBuilder, Xdp, XdpFlags};

use crate::common::{Case, Netprobe, Pair, case};
use crate::xdp::*;

pub fn cases() -> Vec<Case> {
    let cases = vec![
        case("xdpdump_explains_failed_redirects", failed_redirects)
            .once_on("newest")
            .xdp(),
        case("xdpdump_trace_verdicts_and_ids", trace)
            .xdp()
            .fentry()
            .program("ping"),
        case("xdpdump_trace_names", trace_names)
            .once_on("5.10")
            .xdp()
            .fentry(),
        case("xdpdump_dispatcher", dispatcher)
            .once_on("newest")
            .xdp()
            .fentry()
            .program("xdp-loader"),
        case("xdpdump_aborted", aborted).once_on("newest").xdp(),
        case("xdpdump_diff", diff).once_on("5.10").xdp().fentry(),
        case("xdpdump_diff_refused", diff_refused)
            .once_on("5.10")
            .xdp(),
        case("xdpdump_auto_says_which", auto_mode)
            .once_on("5.10")
            .xdp(),
    ];
    cases.into_iter().map(|case| case.limit(900)).collect()
}

/// The filtering example at the interface by itself: drops what goes to its port, passes the rest.
fn dropper(net: &Pair) -> Result<Object> {
    attached(net, DROP_PORT)
}

/// A program at the interface by itself.
fn attached(net: &Pair, bytes: &[u8]) -> Result<Object> {
    let object = ObjectBuilder::default().open_memory(bytes)?.load()?;
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
    // The verdict is a filter too, and so one in N counts among those that have it.
    ensure!(summary(&done)? == [4, 0, 4, 10], "{done}");
    let done = {
        let probe = dump(&net)
            .args(["--action", "drop,pass", "--sample", "2", "udp dst port 9"])
            .start()?;
        flood(&net, PORT, 4, 64)?;
        flood(&net, PORT + 1, 6, 64)?;
        probe.stop()?
    };
    let [captured, lost, matched, seen] = summary(&done)?;
    ensure!((lost, matched, seen) == (0, 4, 10), "{done}");
    // Of each CPU's.
    ensure!(captured <= 2, "{done}");

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

/// Two programs behind libxdp's own dispatcher: listed, each watched by name, all of them with verdicts, and left as they were.
fn dispatcher() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let net = quiet_pair()?;
    let look = object(&dir, "xdp_look.o", LOOK)?;
    let stop = object(&dir, "xdp_stop.o", STOP)?;
    net.server.cmd(&format!(
        "nsenter --net={} xdp-loader load -m skb {IFACE} {} {}",
        net.server.path().display(),
        look.display(),
        stop.display()
    ))?;
    let id = program_id(&net.server)?;
    let listed = Netprobe::new("xdpdump")
        .args(["-D", "--netns", net.server.name()])
        .run()?;
    ensure!(
        listed.lines_with("xdp_dispatcher (id").len() == 1
            && listed.lines_with("dispatched   xdp_look").len() == 1
            && listed.lines_with("dispatched   xdp_stop").len() == 1,
        "{listed}"
    );
    let wrong = dump(&net).args(["-p", "nosuch"]).run()?;
    wrong.expect_code(2)?;
    wrong.expect_stderr("xdp_stop@")?;

    let probe = dump(&net)
        .args(["-p", "all", "--rx-capture", "entry,exit"])
        .start()?;
    flood(&net, 9, 3, 64)?;
    flood(&net, 11, 2, 64)?;
    let done = probe.stop()?;
    for (place, count) in [
        ("xdp_dispatcher()@entry", 5),
        ("xdp_dispatcher()@exit[DROP]", 3),
        ("xdp_dispatcher()@exit[PASS]", 2),
        ("xdp_stop()@exit[DROP]", 3),
        ("xdp_stop()@exit[PASS]", 2),
    ] {
        ensure!(done.lines_with(place).len() == count, "{place}: {done}");
    }
    let one = dump(&net)
        .args(["-p", "xdp_stop", "--action", "drop"])
        .start()?;
    flood(&net, 9, 3, 64)?;
    flood(&net, 11, 2, 64)?;
    let done = one.stop()?;
    ensure!(done.stdout.lines().count() == 3, "{done}");

    // In front of it by a tail call, which kernels from 6.13 on (and corrected older ones) refuse.
    let before = chained(&net).args(["-c", "3"]).start();
    match before {
        Ok(probe) => {
            flood(&net, 9, 3, 64)?;
            let done = probe.stop()?;
            ensure!(summary(&done)?[0] == 3, "{done}");
        }
        Err(error) => {
            let told = format!("{error:#}");
            ensure!(
                told.contains("lets no tail call into such a program: --mode trace works"),
                "{told}"
            );
        }
    }
    ensure!(program_id(&net.server)? == id, "the dispatcher was changed");
    Ok(())
}

/// An aborted packet is explained, captured in front of the program that did it.
fn aborted() -> Result<()> {
    let net = quiet_pair()?;
    let _program = attached(&net, STOP)?;
    let probe = chained(&net).start()?;
    flood(&net, 10, 2, 64)?;
    let line = probe.wait_line(" xdp_exception: ")?;
    ensure!(line.contains("aborted"), "{line}");
    let done = probe.stop()?;
    ensure!(summary(&done)?[0] == 2, "{done}");
    ensure!(done.lines_with(" xdp_exception: ").len() == 2, "{done}");
    Ok(())
}

/// What tests/data/xdp_rewrite.bpf.c does to each port, told.
fn diff() -> Result<()> {
    let net = quiet_pair()?;
    let _program = attached(&net, REWRITE)?;
    let probe = dump(&net).arg("--diff").start()?;
    for port in [9, 10, 12, 13] {
        flood(&net, port, 1, 64)?;
    }
    let done = probe.stop()?;
    done.expect_success()?;
    // The kernel has put out a checksum of its own meanwhile or not: only what the program does is looked for.
    let told = done
        .stdout
        .split("\n1")
        .flat_map(|packet| packet.lines())
        .filter(|line| line.starts_with('\t'))
        .map(str::trim_start)
        .collect::<Vec<_>>();
    ensure!(
        told == [
            "+0x000c 4 bytes inserted: 81000064",
            "~0x0016 IP time to live: 64 -> 7",
            "~0x0024 UDP destination port: 10 -> 11",
            "-0x005a 16 bytes removed: 55555555555555555555555555555555",
            "=      unchanged",
        ],
        "{told:?}\n{done}"
    );
    ensure!(
        done.lines_with("xdp_rewrite()@exit[PASS]").len() == 4,
        "{done}"
    );
    ensure!(done.lines_with("vlan 100").len() == 1, "{done}");
    ensure!(summary(&done)?[0] == 4, "{done}");

    let probe = dump(&net)
        .args(["--diff", "--output-json", "udp", "port", "10"])
        .start()?;
    flood(&net, 9, 1, 64)?;
    flood(&net, 10, 1, 64)?;
    let done = probe.stop()?;
    let rows = done.json()?;
    let packets = rows.iter().filter(|row| row["type"] == "packet");
    let packets = packets.collect::<Vec<_>>();
    ensure!(packets.len() == 1, "{done}");
    let ttl = &packets[0]["changes"][0];
    ensure!(
        ttl["kind"] == "replaced"
            && ttl["offset"] == 22
            && ttl["old"] == "40"
            && ttl["new"] == "07"
            && ttl["field"] == "IP time to live",
        "{done}"
    );
    Ok(())
}

/// Without a program there is nothing to compare, and a capture file has both ends.
fn diff_refused() -> Result<()> {
    let net = quiet_pair()?;
    let none = dump(&net).arg("--diff").run()?;
    none.expect_code(2)?;
    none.expect_stderr("--diff need an XDP program that can be traced")?;
    let chain = chained(&net).arg("--diff").run()?;
    chain.expect_code(2)?;
    chain.expect_stderr("need --mode trace")?;
    let file = dump(&net).args(["--diff", "-w", "x.pcapng"]).run()?;
    file.expect_code(2)
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
