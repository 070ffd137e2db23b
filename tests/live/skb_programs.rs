//! `netprobe skb` and BPF programs: tc, tcx, netkit and XDP programs traced with their verdicts, those that are loaded later, and odd
//! ones.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use libbpf_rs::{Object, ObjectBuilder, TC_EGRESS, TC_INGRESS, TcHookBuilder, Xdp, XdpFlags};
use libbpf_sys as sys;

use crate::common::{Case, Finished, Netns, Netprobe, Pair, Running, case};
use crate::xdp::{LOOK, STOP};

pub const TC: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/tc_drop_port.o"));
pub const XDP: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/xdp_drop_port.o"));

/// The examples' discard port.
const DROPPED: u16 = 9;
const PASSED: u16 = 4000;
const EXPRESSION: [&str; 1] = ["udp and (dst port 9 or dst port 4000)"];
/// One function: attaching singly takes long on old kernels.
const FEW: [&str; 2] = ["--filter-func", "ip_output|ip_local_deliver"];

pub fn cases() -> Vec<Case> {
    vec![
        case("skb_tc_programs_and_later_ones", tc).trace().fentry(),
        case("skb_tcx_and_netkit_programs", tcx)
            .once_on("newest")
            .trace()
            .fentry()
            .kernel(6, 7),
        case("skb_xdp_programs_generic", || xdp(XdpFlags::SKB_MODE))
            .once_on("6.12")
            .trace()
            .xdp()
            .fentry(),
        case("skb_xdp_programs_relative_time", relative_time)
            .once_on("5.10")
            .trace()
            .fentry()
            .xdp(),
        case("skb_xdp_programs_native", || xdp(XdpFlags::DRV_MODE))
            .once_on("5.10")
            .trace()
            .xdp()
            .fentry(),
        case("skb_programs_helpers_and_maps", helpers)
            .once_on("newest")
            .trace()
            .fentry(),
        // What freplace has put in: libxdp's dispatcher calls such programs.
        case("skb_xdp_programs_dispatched", dispatched)
            .once_on("newest")
            .trace()
            .xdp()
            .fentry()
            .program("xdp-loader"),
        case("skb_programs_wrong_values", wrong_values)
            .once_on("5.10")
            .trace(),
    ]
}

/// netprobe in the client's namespace.
fn skb<'a>(net: &'a Pair, args: &[&str]) -> Netprobe<'a> {
    Netprobe::new("skb").args(args).netns(&net.client)
}

/// A loaded object of one program.
pub struct Loaded {
    pub object: Object,
    pub id: u32,
}

impl Loaded {
    pub fn new(bytes: &[u8]) -> Result<Self> {
        let object = ObjectBuilder::default().open_memory(bytes)?.load()?;
        let id = id_of(
            object
                .progs()
                .next()
                .context("no program")?
                .as_fd()
                .as_raw_fd(),
        )?;
        Ok(Self { object, id })
    }

    fn fd(&self) -> Result<i32> {
        let program = self.object.progs().next().context("no program")?;
        Ok(program.as_fd().as_raw_fd())
    }

    /// At clsact; it goes with the interface.
    pub fn attach_tc(&self, netns: &Netns, ingress: bool) -> Result<()> {
        let ifindex = netns.ifindex(Pair::IFACE)? as i32;
        let program = self.object.progs().next().context("no program")?;
        let program = program.as_fd();
        netns.enter(|| -> Result<()> {
            let mut hook = TcHookBuilder::new(program)
                .ifindex(ifindex)
                .replace(false)
                .handle(1)
                .priority(1)
                .hook(if ingress { TC_INGRESS } else { TC_EGRESS });
            hook.create()?;
            hook.attach()?;
            Ok(())
        })?
    }

    /// By a link, of an attach type.
    fn attach_link(&self, netns: &Netns, interface: &str, how: u32) -> Result<OwnedFd> {
        let ifindex = netns.ifindex(interface)? as i32;
        let program = self.fd()?;
        // SAFETY: numbers and no options; a positive result is an fd that nobody else owns.
        let fd = netns
            .enter(|| unsafe { sys::bpf_link_create(program, ifindex, how, std::ptr::null()) })?;
        ensure!(fd > 0, "failed to make a link: {fd}");
        // SAFETY: see above.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn name(&self, kind: &str, program: &str) -> String {
        format!("{program}[{kind}:{}]", self.id)
    }
}

fn id_of(program: i32) -> Result<u32> {
    let mut info = sys::bpf_prog_info::default();
    let mut len = size_of::<sys::bpf_prog_info>() as u32;
    // SAFETY: info is writable for len bytes, and all its pointers are null, so the kernel copies no arrays.
    let code = unsafe { sys::bpf_prog_get_info_by_fd(program, &mut info, &mut len) };
    ensure!(code == 0, "failed to look at a program: {code}");
    Ok(info.id)
}

/// A tc program without BTF: nobody can tell what its function is.
fn without_btf() -> Result<OwnedFd> {
    let insns = [
        sys::bpf_insn {
            code: (sys::BPF_ALU64 | sys::BPF_MOV | sys::BPF_K) as u8,
            ..Default::default()
        },
        sys::bpf_insn {
            code: (sys::BPF_JMP | sys::BPF_EXIT) as u8,
            ..Default::default()
        },
    ];
    // SAFETY: strings and instructions live through the call; no options.
    let fd = unsafe {
        sys::bpf_prog_load(
            sys::BPF_PROG_TYPE_SCHED_CLS,
            c"odd_one".as_ptr(),
            c"GPL".as_ptr(),
            insns.as_ptr(),
            insns.len() as _,
            std::ptr::null_mut(),
        )
    };
    ensure!(fd > 0, "failed to load a program: {fd}");
    // SAFETY: the call just returned this fd, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Waits until a program's end with this verdict is shown.
fn wait_verdict(run: &Running, program: &str, verdict: &str) -> Result<String> {
    run.wait_line(&format!("{program} = {verdict}"))
}

/// The column of the packet's identity.
fn packet(line: &str) -> &str {
    line.split_whitespace().nth(3).unwrap_or("")
}

fn tc() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let first = Loaded::new(TC)?;
    first.attach_tc(&net.client, false)?;
    let first_name = first.name("tc", "tc_drop_port");
    let odd = without_btf()?;
    let args = ["--filter-trace-tc"];
    let run = skb(&net, &[&args[..], &FEW, &EXPRESSION].concat()).start()?;
    run.wait_stderr("and those that are loaded later")?;
    let said = run.wait_stderr("is not traced")?;
    ensure!(
        said.contains("odd_one") && said.contains("no BTF"),
        "{said}"
    );
    net.client
        .udp_send(net.server.v4(5000), b"of no interest")?;
    net.client.udp_send(net.server.v4(DROPPED), b"hello")?;
    net.client.udp_send(net.server.v4(PASSED), b"hello")?;
    wait_verdict(&run, &first_name, "TC_ACT_SHOT")?;
    let line = wait_verdict(&run, &first_name, "TC_ACT_UNSPEC")?;
    // The packet as the program leaves it.
    ensure!(
        line.contains(" 77 ") && line.contains(":4000(udp)"),
        "{line}"
    );

    let second = Loaded::new(TC)?;
    run.wait_stderr(&format!("(id {}) was loaded", second.id))?;
    second.attach_tc(&net.server, true)?;
    let port = net.client.udp_send(net.server.v4(PASSED), b"again")?;
    wait_verdict(&run, &second.name("tc", "tc_drop_port"), "TC_ACT_UNSPEC")?;
    let done = run.stop()?;
    done.expect_success()?;
    ensure!(done.lines_with(":5000").is_empty(), "{done}");
    ensure!(done.stderr.matches("odd_one").count() == 1, "{done}");
    // In at the client's, out of it, in at the server's, out of it.
    let again = done.lines_with(&format!(":{port}->"));
    let of_programs: Vec<_> = again.iter().filter(|l| l.contains("[tc:")).collect();
    ensure!(of_programs.len() == 4, "{of_programs:#?}");
    ensure!(
        of_programs[0].ends_with(&first_name) && of_programs[1].contains(" = "),
        "{of_programs:#?}"
    );
    drop(odd);
    json(&net, &first)
}

/// The same in JSON; a mark that the program itself sets, and the packet's identity through it.
fn json(net: &Pair, program: &Loaded) -> Result<()> {
    let args = [
        "--filter-trace-tc",
        "--output-json",
        "--filter-track-skb",
        "--filter-dst-port",
        "4000",
    ];
    let run = skb(net, &[&args[..], &FEW].concat()).start()?;
    net.client.udp_send(net.server.v4(PASSED), b"hello")?;
    run.wait_line("\"func\":\"ip_local_deliver\"")?;
    let done = run.stop()?;
    done.expect_success()?;
    let rows = done.json_of("event")?;
    let of = |at: &str| {
        rows.iter()
            .find(|r| r["program"]["id"] == program.id && r["program"]["at"] == at)
            .with_context(|| format!("no event at {at}:\n{done}"))
    };
    let (entry, exit) = (of("entry")?, of("exit")?);
    ensure!(
        entry["func"] == "tc_drop_port" && entry["program"]["kind"] == "tc",
        "{entry}"
    );
    ensure!(entry["program"].get("verdict").is_none(), "{entry}");
    ensure!(exit["program"]["verdict"] == "TC_ACT_UNSPEC", "{exit}");
    ensure!(entry["mark"] == 0 && exit["mark"] == 0x77, "{entry} {exit}");
    for row in &rows {
        ensure!(row["packet"] == entry["packet"], "{row} is another packet");
    }
    Ok(())
}

fn tcx() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    // The other end gets the first free name of nk0, nk1 and so on.
    net.client.ip("link add prim0 type netkit")?;
    for command in [
        "link set prim0 up",
        "link set nk0 up",
        "addr add 10.78.0.1/24 dev prim0",
    ] {
        net.client.ip(command)?;
    }
    let (tcx, netkit) = (Loaded::new(TC)?, Loaded::new(TC)?);
    let _links = [
        tcx.attach_link(&net.client, Pair::IFACE, sys::BPF_TCX_EGRESS)?,
        netkit.attach_link(&net.client, "prim0", sys::BPF_NETKIT_PRIMARY)?,
    ];
    let args = ["--filter-trace-tc", "--filter-dst-port", "9"];
    let run = skb(&net, &[&args[..], &FEW].concat()).start()?;
    net.client.udp_send(net.server.v4(DROPPED), b"hello")?;
    let line = wait_verdict(&run, &tcx.name("tc", "tc_drop_port"), "TC_ACT_SHOT")?;
    ensure!(line.contains(" veth0:"), "{line}");
    net.client.udp_send("10.78.0.2:9".parse()?, b"hello")?;
    let name = netkit.name("tc", "tc_drop_port");
    let line = run.wait_lines("a verdict of the netkit program", |text| {
        let line = text.lines().find(|l| l.contains(&format!("{name} = ")))?;
        Some(line.to_owned())
    })?;
    // netkit has given the packet to the other end before it runs the program.
    ensure!(line.contains(" nk0:"), "{line}");
    run.stop()?.expect_success()
}

fn xdp(mode: XdpFlags) -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let program = Loaded::new(XDP)?;
    let ifindex = net.server.ifindex(Pair::IFACE)? as i32;
    let fd = program.object.progs().next().context("no program")?;
    let fd = fd.as_fd();
    net.server.enter(|| Xdp::new(fd).attach(ifindex, mode))??;
    let name = program.name("xdp", "xdp_drop_port");

    let args = ["--filter-trace-xdp", "--filter-track-skb"];
    let run = skb(&net, &[&args[..], &FEW, &EXPRESSION].concat()).start()?;
    net.client
        .udp_send(net.server.v4(5000), b"of no interest")?;
    net.client.udp_send(net.server.v4(DROPPED), b"hello")?;
    let port = net.client.udp_send(net.server.v4(PASSED), b"hello")?;
    wait_verdict(&run, &name, "XDP_DROP")?;
    wait_verdict(&run, &name, "XDP_PASS")?;
    run.wait_lines("both functions with the packet that passed", |text| {
        let mut lines = text.lines().filter(|l| l.contains(&format!(":{port}->")));
        lines
            .any(|l| l.ends_with(" ip_local_deliver"))
            .then_some(())
    })?;
    let done = run.stop()?;
    done.expect_success()?;
    ensure!(done.lines_with(":5000").is_empty(), "{done}");
    let passed = done.lines_with(&format!(":{port}->"));
    let dropped = done.lines_with(":9(udp)");
    ensure!(passed.len() == 4 && dropped.len() == 3, "{done}");
    let inode = net.server.inode()?.to_string();
    let entry = passed
        .iter()
        .find(|l| l.ends_with(&name))
        .with_context(|| format!("no entry:\n{done}"))?;
    ensure!(
        entry.contains(&inode) && entry.contains(" veth0:") && entry.contains("0x0800 1500"),
        "{entry}"
    );
    one_identity(&done, &passed)?;
    one_identity(&done, &dropped)?;
    ensure!(packet(passed[0]) != packet(dropped[0]), "{done}");

    // Conditions on the xdp_buff; fields that an XDP packet has; a mark, which it does not have.
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("xdp.pcapng");
    let expr = format!("xdp->rxq->dev->ifindex == {ifindex}");
    // What an XDP packet does not have (an owner, skb->cb) is left out; what follows it is read right.
    let paths = "xdp->rxq->queue_index,xdp->rxq->dev->ifindex";
    let run = skb(&net, &["--filter-trace-xdp", "--filter-dst-port", "9"])
        .args(["--output-xdp-metadata", paths, "--output-owner"])
        .args(["--output-skb-cb", "--output-skb-metadata", "skb->len"])
        .args(["--output-tunnel"])
        .args(["--filter-xdp-expr", &expr, "--output-json", "-w"])
        .arg(&file)
        .args(FEW)
        .start()?;
    net.client.udp_send(net.server.v4(DROPPED), b"hello")?;
    run.wait_line("\"verdict\":\"XDP_DROP\"")?;
    let done = run.stop()?;
    done.expect_success()?;
    for row in done
        .json()?
        .iter()
        .filter(|r| r["program"]["id"] == program.id)
    {
        ensure!(row["program"]["kind"] == "xdp" && row["mark"] == 0, "{row}");
        ensure!(row["tuple"]["dport"] == 9 && row["len"] == 14 + 33, "{row}");
        let members = &row["xdp_metadata"];
        ensure!(members["xdp->rxq->queue_index"] == 0, "{row}");
        ensure!(members["xdp->rxq->dev->ifindex"] == ifindex, "{row}");
        ensure!(
            row.get("owner").is_none() && row.get("cb").is_none(),
            "{row}"
        );
    }
    let bytes = std::fs::read(&file)?;
    for text in [&format!("{name} = XDP_DROP")[..], "hello"] {
        ensure!(
            bytes.windows(text.len()).any(|w| w == text.as_bytes()),
            "{text} is not in the capture"
        );
    }
    let expr = format!("xdp->rxq->dev->ifindex != {ifindex}");
    let run = skb(&net, &["--filter-trace-xdp", "--filter-xdp-expr", &expr])
        .args(FEW)
        .start()?;
    net.client.udp_send(net.server.v4(PASSED), b"hello")?;
    run.wait_line(" ip_local_deliver")?;
    let done = run.stop()?;
    ensure!(done.lines_with("[xdp:").is_empty(), "{done}");
    Ok(())
}

/// Programs behind libxdp's dispatcher (freplace): each is traced, and the dispatcher too; one packet all the way.
fn dispatched() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let dir = tempfile::tempdir()?;
    let mut files = Vec::new();
    for (name, bytes) in [("xdp_look.o", LOOK), ("xdp_stop.o", STOP)] {
        let file = dir.path().join(name);
        std::fs::write(&file, bytes)?;
        files.push(file.display().to_string());
    }
    net.server.cmd(&format!(
        "nsenter --net={} xdp-loader load -m skb {} {}",
        net.server.path().display(),
        Pair::IFACE,
        files.join(" ")
    ))?;
    let run = skb(&net, &["--filter-trace-xdp", "--filter-track-skb"])
        .args(FEW)
        .args(["--filter-dst-port", "9"])
        .start()?;
    net.client.udp_send(net.server.v4(DROPPED), b"hello")?;
    let dispatcher =
        |line: &str, end: &str| line.contains(" xdp_dispatcher[xdp:") && line.ends_with(end);
    run.wait_lines("the dispatcher's verdict", |text| {
        text.lines()
            .any(|l| dispatcher(l, " = XDP_DROP"))
            .then_some(())
    })?;
    let done = run.stop()?;
    done.expect_success()?;
    for program in [" xdp_look[xdp:", " xdp_stop[xdp:"] {
        ensure!(done.lines_with(program).len() == 2, "{program}\n{done}");
    }
    let stop = done.lines_with(" xdp_stop[xdp:");
    ensure!(stop[1].ends_with(" = XDP_DROP"), "{done}");
    one_identity(&done, &done.lines_with("[xdp:"))
}

/// All lines are of one packet.
fn one_identity(done: &Finished, lines: &[&str]) -> Result<()> {
    for line in lines {
        ensure!(
            packet(line) == packet(lines[0]),
            "{line}\nis another packet:\n{done}"
        );
    }
    Ok(())
}

fn helpers() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let program = Loaded::new(TC)?;
    program.attach_tc(&net.client, false)?;
    let name = program.name("tc", "tc_drop_port");
    let args = [
        "--filter-trace-tc",
        "--filter-track-bpf-helpers",
        "--output-bpfmap",
        "--filter-dst-port",
        "4000",
    ];
    let run = skb(&net, &[&args[..], &FEW].concat()).start()?;
    run.wait_stderr("functions that they call")?;
    // Of no interest, though its program runs: nothing of it is shown.
    net.client.udp_send(net.server.v4(DROPPED), b"hello")?;
    // The example counts by port: made by the first packet, found by the second.
    for _ in 0..2 {
        net.client.udp_send(net.server.v4(PASSED), b"hello")?;
    }
    run.wait_lines("two runs of the program", |text| {
        (text.matches(&format!("{name} = ")).count() >= 2).then_some(())
    })?;
    let done = run.stop()?;
    done.expect_success()?;
    // Within the program's run, and in the order of its calls.
    let lines: Vec<&str> = done.stdout.lines().collect();
    let begin = lines
        .iter()
        .position(|l| l.ends_with(&name))
        .with_context(|| format!("no entry:\n{done}"))?;
    let end = lines
        .iter()
        .position(|l| l.contains(&format!("{name} = ")))
        .with_context(|| format!("no exit:\n{done}"))?;
    let mut rest = lines[begin..end].iter();
    for word in [
        "bpf_skb_load_bytes",
        "map_lookup_elem",
        "ports: key 0fa0 value -",
        "map_update_elem",
        "ports: key 0fa0 value 0100000000000000",
    ] {
        ensure!(
            rest.any(|l| l.contains(word)),
            "no {word} in its place:\n{done}"
        );
    }
    // The second packet's look-up.
    ensure!(
        lines[end..]
            .iter()
            .any(|l| l.contains("ports: key 0fa0 value 0100000000000000")),
        "{done}"
    );
    ensure!(done.lines_with("key 0009").is_empty(), "{done}");
    ensure!(!done.stderr.contains("missed"), "{done}");
    Ok(())
}

fn wrong_values() -> Result<()> {
    let net = Pair::new()?;
    for (args, word) in [
        (
            &["--filter-trace-xdp", "--filter-xdp-expr", "xdp->nothing"][..],
            "nothing",
        ),
        (
            &["--filter-trace-xdp", "--filter-xdp-expr", "skb->mark == 1"],
            "xdp",
        ),
        (
            &["--filter-xdp-expr", "xdp->frame_sz == 1"],
            "--filter-trace-xdp",
        ),
        (&["--filter-trace-tc", "--drops"], "--drops"),
        (&["--output-bpfmap"], "--filter-track-bpf-helpers"),
    ] {
        let done = skb(&net, args).run()?;
        done.expect_code(2)?;
        done.expect_stderr(word)?;
    }
    Ok(())
}

/// The memory of an xdp_buff serves one packet after the other: each begins at 0, and its verdict comes later.
fn relative_time() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let program = Loaded::new(LOOK)?;
    let ifindex = net.server.ifindex(Pair::IFACE)? as i32;
    let fd = program.object.progs().next().context("no program")?;
    let fd = fd.as_fd();
    net.server
        .enter(|| Xdp::new(fd).attach(ifindex, XdpFlags::SKB_MODE))??;
    let run = Netprobe::new("skb")
        .args(["--filter-trace-xdp", "--filter-func", "icmp_rcv"])
        .args(["--timestamp", "relative", "--output-json"])
        .args(["--filter-dst-port", "3", "--filter-proto", "udp"])
        .start()?;
    for _ in 0..5 {
        net.client.udp_send(net.server.v4(3), b"x")?;
    }
    let times = run.wait_lines("five verdicts", |text| {
        let rows = text.lines().filter(|line| line.contains("xdp_look"));
        let rows = rows.filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let times = rows.map(|row| row["since_ns"].as_u64());
        let times = times.collect::<Vec<_>>();
        (times.len() >= 10).then_some(times)
    })?;
    let done = run.stop()?;
    done.expect_success()?;
    for pair in times.chunks(2) {
        ensure!(
            pair[0] == Some(0) && pair[1] > Some(0),
            "{times:?}:\n{done}"
        );
    }
    Ok(())
}
