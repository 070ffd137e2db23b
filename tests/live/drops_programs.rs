//! `netprobe drops --programs`: what XDP, tc and cgroup programs drop, by program, exact to the packet.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};

use anyhow::{Context, Result, ensure};
use libbpf_rs::{Xdp, XdpFlags};
use serde_json::Value;

use crate::common::{Case, Netprobe, Pair, case};
use crate::skb_programs::{Loaded, TC, XDP};
use crate::who::Container;
use crate::xdp::STOP;

const CGROUP: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/cgroup_drop.o"));
/// The examples' discard port.
const DROPPED: u16 = 9;

pub fn cases() -> Vec<Case> {
    vec![
        case("drops_programs", programs)
            .old_and_new()
            .trace()
            .xdp()
            .fentry()
            .program("ping"),
    ]
}

/// What a program of this id dropped.
fn of_program(rows: &[Value], id: u32) -> Result<&Value> {
    let mut found = rows
        .iter()
        .filter(|r| r["type"] == "program" && r["id"] == id);
    let row = found.next().with_context(|| format!("{id}: {rows:#?}"))?;
    ensure!(found.next().is_none(), "{id}: {rows:#?}");
    Ok(row)
}

fn programs() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let (tc, xdp, cgroup) = (Loaded::new(TC)?, Loaded::new(XDP)?, Loaded::new(CGROUP)?);
    tc.attach_tc(&net.client, false)?;
    let ifindex = net.client.ifindex(Pair::IFACE)?;
    let program = xdp.object.progs().next().context("no program")?;
    let program = program.as_fd();
    let attach = || Xdp::new(program).attach(ifindex as i32, XdpFlags::SKB_MODE);
    net.client.enter(attach)??;
    let stop = Loaded::new(STOP)?;
    let at_server = net.server.ifindex(Pair::IFACE)?;
    let program = stop.object.progs().next().context("no program")?;
    let program = program.as_fd();
    let attach = || Xdp::new(program).attach(at_server as i32, XdpFlags::SKB_MODE);
    net.server.enter(attach)??;
    let inside = Container::new("npt-quiet", "c1")?;
    let folder = File::open(&inside.cgroup)?;
    let quiet = cgroup.object.progs_mut().next().context("no program")?;
    let _link = quiet.attach_cgroup(folder.as_raw_fd())?;

    let run = Netprobe::new("drops")
        .args(["--output-json", "-i", "3600", "--programs"])
        .start()?;
    let (client, server) = (net.client.v4(DROPPED), net.server.v4(DROPPED));
    for _ in 0..20 {
        let _ = net.client.udp_send(server, b"to be lost");
    }
    for _ in 0..30 {
        net.server.udp_send(client, b"to be lost")?;
    }
    for _ in 0..7 {
        net.client.udp_send(net.server.v4(10), b"to be aborted")?;
    }
    net.server
        .udp_send(net.client.v4(4000), b"not by a program")?;
    let ping = format!("/bin/ping -c 1 -W 1 {}", server.ip());
    let _ = inside.run(&net.client, &ping);
    let done = run.stop()?;
    done.expect_success()?;
    let rows = done.json()?;
    let netns = net.client.inode()?;
    for (id, kind, name, verdict, packets) in [
        (tc.id, "tc", "tc_drop_port", "TC_ACT_SHOT", 20),
        (xdp.id, "xdp", "xdp_drop_port", "XDP_DROP", 30),
        (cgroup.id, "cgroup", "cgroup_drop", "refused", 1),
    ] {
        let row = of_program(&rows, id)?;
        ensure!(row["kind"] == kind && row["name"] == name, "{row}");
        ensure!(
            row["verdict"] == verdict && row["packets"] == packets,
            "{row}"
        );
        ensure!(row["netns"] == netns && row["ifindex"] == ifindex, "{row}");
    }
    let row = of_program(&rows, stop.id)?;
    ensure!(
        row["verdict"] == "XDP_ABORTED" && row["packets"] == 7,
        "{row}"
    );
    ensure!(row["netns"] == net.server.inode()?, "{row}");
    Ok(())
}
