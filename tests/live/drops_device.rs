//! `netprobe drops`: what devices tell of losses.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::common::{Case, Env, Netns, Netprobe, case, wait_for};
use crate::icmp_culprit::{Cards, no_cards};

pub fn cases() -> Vec<Case> {
    vec![
        // From there on the cards' driver tells time-outs.
        case("drops_tx_timeout", tx_timeout)
            .once_on("6.1")
            .trace()
            .kernel(5, 17)
            .when(no_cards),
        case("drops_devlink_trap", devlink_trap)
            .once_on("6.12")
            .trace()
            .program("devlink")
            .when(no_netdevsim),
    ]
}

fn no_netdevsim(_: &Env) -> Option<String> {
    let _ = Command::new("modprobe").args(["-q", "netdevsim"]).status();
    (!Path::new("/sys/bus/netdevsim").exists())
        .then(|| "needs the module netdevsim, the one device here with traps".to_owned())
}

/// The row with this in `field`, and the table.
fn row(rows: &[Value], field: &str, value: &Value) -> Result<Value> {
    let mut found = rows.iter().filter(|row| row[field] == *value);
    let row = found
        .next()
        .with_context(|| format!("no {field} {value}: {rows:#?}"))?;
    ensure!(found.next().is_none(), "{rows:#?}");
    Ok(row.clone())
}

/// The card at the other end takes nothing: the queue fills up, and times out. What is sent fits into the sockets.
fn tx_timeout() -> Result<()> {
    let cards = Cards::new()?;
    let net = Netns::new("nict")?;
    cards.give("52:54:00:6e:70:01", &net, "10.78.0.1/24")?;
    net.ip("neigh add 10.78.0.2 lladdr 02:00:00:00:00:01 dev nic0")?;
    let run = Netprobe::new("drops")
        .args(["--output-json", "-i", "3600"])
        .start()?;
    let sockets = net.enter(|| -> Result<Vec<_>> {
        let mut sockets = Vec::new();
        for _ in 0..8 {
            let socket = std::net::UdpSocket::bind("10.78.0.1:0")?;
            socket.set_nonblocking(true)?;
            for _ in 0..200 {
                let _ = socket.send_to(b"to be lost", "10.78.0.2:9");
            }
            sockets.push(socket);
        }
        Ok(sockets)
    })??;
    // The driver counts each as an error.
    let timeouts = || -> Result<u64> {
        let json: Value = serde_json::from_str(&net.ip("-s -j link show dev nic0")?)?;
        let errors = json.pointer("/0/stats64/tx/errors").and_then(Value::as_u64);
        errors.with_context(|| json.to_string())
    };
    let before = wait_for("a time-out", || Ok(Some(timeouts()?).filter(|n| *n > 0)))?;
    let done = run.stop()?;
    let after = timeouts()?;
    drop(sockets);
    done.expect_success()?;
    let rows = done.json()?;
    let row = row(&rows, "reason", &"TX_TIMEOUT".into())?;
    let packets = row["packets"].as_u64().unwrap_or(0);
    ensure!(
        (before..=after).contains(&packets),
        "{before} to {after}: {row}"
    );
    ensure!(row["queue"] == 0 && row["iface"] == "nic0", "{row}");
    ensure!(
        row["netns"] == net.inode()? && row["class"] == "device",
        "{row}"
    );
    let table = rows.iter().find(|row| row["type"] == "table");
    ensure!(table.is_some_and(|t| t["unexplained"] == 0), "{done}");
    Ok(())
}

/// netdevsim makes packets for the traps that are on.
fn devlink_trap() -> Result<()> {
    const DEVICE: &str = "netdevsim/netdevsim77";
    struct Device;
    impl Drop for Device {
        fn drop(&mut self) {
            let _ = fs::write("/sys/bus/netdevsim/del_device", "77");
        }
    }
    fs::write("/sys/bus/netdevsim/new_device", "77 1")?;
    let _device = Device;
    let devlink = |line: &str| -> Result<String> {
        let output = Command::new("devlink").args(line.split(' ')).output()?;
        ensure!(output.status.success(), "devlink {line}: {output:?}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let name = wait_for("its interface", || {
        let mut names = fs::read_dir("/sys/bus/netdevsim/devices/netdevsim77/net")?;
        Ok(names.next().transpose()?.map(|entry| entry.file_name()))
    })?;
    let name = name.to_string_lossy().into_owned();
    let run = Netprobe::new("drops")
        .args(["--output-json", "-i", "3600"])
        .start()?;
    devlink(&format!(
        "trap set {DEVICE} trap source_mac_is_multicast action trap"
    ))?;
    let up = Command::new("ip")
        .args(["link", "set", &name, "up"])
        .status()?;
    ensure!(up.success(), "ip link set {name} up: {up}");
    let counted = || -> Result<u64> {
        let text = devlink(&format!(
            "-s -j trap show {DEVICE} trap source_mac_is_multicast"
        ))?;
        let json: Value = serde_json::from_str(&text)?;
        let packets = json.pointer("/trap/netdevsim~1netdevsim77/0/stats/rx/packets");
        packets.and_then(Value::as_u64).with_context(|| text)
    };
    wait_for("packets of the trap", || {
        Ok(Some(counted()?).filter(|n| *n >= 3))
    })?;
    devlink(&format!(
        "trap set {DEVICE} trap source_mac_is_multicast action drop"
    ))?;
    let counted = counted()?;
    let done = run.stop()?;
    done.expect_success()?;
    let row = row(&done.json()?, "trap", &"source_mac_is_multicast".into())?;
    ensure!(row["packets"] == counted, "{counted}: {row}");
    ensure!(
        row["trap_group"] == "l2_drops" && row["iface"] == name,
        "{row}"
    );
    ensure!(
        row["class"] == "device" && row["reason"] == "DEVLINK_TRAP",
        "{row}"
    );
    Ok(())
}
