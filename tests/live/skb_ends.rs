//! How a run of `netprobe skb` ends, what it leaves behind, what it refuses, and what it says of loss and of this kernel.

use std::collections::HashSet;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::common::{Case, Env, Finished, Netprobe, Pair, binary, case, wait_for};
use crate::skb::{FUNCS, netfilter_reason, pins_of, skb};

pub fn cases() -> Vec<Case> {
    vec![
        case("skb_flood_seen_and_lost", flood).trace(),
        case("skb_flood_ringbuf", flood_ringbuf).trace(),
        // Kernels count such misses from 6.7 on.
        case("skb_missed_is_told", missed).trace().kernel(6, 7),
        case("skb_limit_ends_the_run", limit).trace(),
        case("skb_pins_after_each_end", pins_after_each_end).trace(),
        case("skb_stdout_closed", stdout_closed).trace(),
        case("skb_without_bpffs", without_bpffs)
            .trace()
            .program("unshare"),
        case("skb_without_btf", without_btf)
            .trace()
            .program("unshare"),
        case("skb_no_function_matches", no_function_matches).trace(),
        case("skb_all_functions", all_functions).trace().limit(600),
        case("skb_not_root", not_root),
        case("features_agree_with_the_kernel", features),
    ]
}

/// Packets of the flood.
const FLOOD: u64 = 100_000;

/// Through a buffer of one page: what is printed and what is lost add up to what the kernel sent.
fn flood() -> Result<()> {
    flood_by("perf")
}

/// The same of ring buffers, and that a lone line does not wait for others.
fn flood_ringbuf() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let run = Netprobe::new("skb")
        .args(["--filter-func", "ip_output", "--filter-dst-port", "4000"])
        .args(["--transport", "ringbuf"])
        .start()?;
    for lines in 2..4 {
        net.client.udp_send(net.server.v4(4000), b"hello")?;
        run.wait_lines("a lone line", |text| {
            (text.lines().count() == lines).then_some(())
        })?;
    }
    run.stop()?.expect_success()?;
    let usage = Netprobe::new("skb")
        .args(["--transport", "ringbuf", "--perf-wakeup", "1"])
        .run()?;
    usage.expect_code(2)?;
    flood_by("ringbuf")
}

fn flood_by(transport: &str) -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let run = Netprobe::new("skb")
        .args(["--filter-func", "ip_output", "--filter-dst-port", "4000"])
        .args(["--output-json", "--buffer-pages", "1"])
        .args(["--drain-threads", "2"])
        .args(["--transport", transport])
        .start()?;
    net.client.enter(|| -> Result<()> {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
        for _ in 0..FLOOD {
            let _ = socket.send_to(b"flood", net.server.v4(4000));
        }
        Ok(())
    })??;
    let done = run.stop()?;
    done.expect_success()?;
    let rows = done.json()?;
    let number = |row: &Value, field: &str| row[field].as_u64().unwrap_or(u64::MAX);
    let printed = rows.iter().filter(|r| r["type"] == "event").count() as u64;
    let loss = rows
        .iter()
        .find(|r| r["type"] == "loss")
        .with_context(|| format!("no record of loss among {} rows", rows.len()))?;
    ensure!(number(loss, "lost") > 0, "{loss}");
    ensure!(
        printed == number(loss, "received"),
        "{printed} printed: {loss}"
    );
    ensure!(
        printed + number(loss, "lost") == number(loss, "sent"),
        "{printed} printed: {loss}"
    );
    // ip_output of each packet.
    ensure!(
        number(loss, "sent") + number(loss, "missed") >= FLOOD,
        "{loss}"
    );
    done.expect_stderr("the buffers were full")?;
    done.expect_stderr("cpu ")
}

/// A function that netprobe's own program calls, within its probe: the kernel skips such hits, and that is told.
fn missed() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    for backend in ["kprobe", "kprobe-multi"] {
        let run = Netprobe::new("skb")
            .args(["--filter-func", "ip_rcv", "--filter-dst-port", "9"])
            .args(["--filter-non-skb-funcs", "bpf_get_current_comm"])
            .args(["--output-json", "--backend", backend])
            .start()?;
        for _ in 0..3 {
            net.client.udp_send(net.server.v4(9), b"hello")?;
        }
        run.wait_lines("three packets", |text| {
            (text.matches("\"ip_rcv\"").count() >= 3).then_some(())
        })?;
        let done = run.stop()?;
        done.expect_success()?;
        done.expect_stderr("hits: the kernel skips a probe")?;
        let rows = done.json()?;
        let loss = rows.iter().find(|r| r["type"] == "loss");
        ensure!(
            loss.is_some_and(|l| l["missed"].as_u64() >= Some(3) && l["lost"] == 0),
            "{done}"
        );
    }
    Ok(())
}

fn limit() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let run = skb(
        &net,
        &["--filter-proto", "icmp", "--output-limit-lines", "3"],
    )
    .start()?;
    ensure!(net.client.ping(net.server.v4(0), 3)?);
    let done = run.wait()?;
    done.expect_success()?;
    // The header and three events.
    ensure!(done.stdout.lines().count() == 4, "{done}");
    Ok(())
}

fn pins_after_each_end() -> Result<()> {
    let net = Pair::new()?;
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let run = skb(&net, &[]).start()?;
        let pins = pins_of(run.pid());
        ensure!(std::path::Path::new(&pins).exists(), "{pins} is missing");
        run.signal(signal)?;
        run.wait()?.expect_success()?;
        ensure!(
            !std::path::Path::new(&pins).exists(),
            "{pins} after {signal}"
        );
    }
    let run = skb(&net, &[]).start()?;
    let left = pins_of(run.pid());
    run.kill9()?;
    ensure!(
        std::path::Path::new(&left).exists(),
        "{left} is gone already"
    );
    let next = skb(&net, &[]).start()?;
    ensure!(
        !std::path::Path::new(&left).exists(),
        "{left} after the next start"
    );
    next.stop()?.expect_success()
}

fn stdout_closed() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let dir = tempfile::tempdir()?;
    let ready = dir.path().join("ready");
    let mut child = net.client.enter(|| {
        Command::new(binary())
            .args(["skb", "--filter-func", FUNCS, "--filter-proto", "icmp"])
            .arg("--ready-file")
            .arg(&ready)
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::null())
            .spawn()
    })??;
    wait_for("the ready file", || Ok(ready.exists().then_some(())))?;
    // The reader goes away, as `| head` does; netprobe notices even when nothing is printed.
    drop(child.stdout.take());
    let status = wait_for("its end", || Ok(child.try_wait()?));
    if status.is_err() {
        child.kill()?;
    }
    let status = status?;
    ensure!(status.code() == Some(0), "{status}");
    Ok(())
}

fn unshared(script: &str) -> Result<Finished> {
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", script])
        .env("NETPROBE", binary())
        .output()?;
    Ok(Finished {
        command: script.to_string(),
        status: output.status,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

fn without_bpffs() -> Result<()> {
    let done = unshared(
        "umount /sys/fs/bpf; \"$NETPROBE\" skb --filter-func ip_rcv --output-limit-lines 1 --filter-proto icmp & \
         pid=$!; while kill -0 $pid 2>/dev/null; do ping -q -c 1 -W 1 127.0.0.1 >/dev/null; done; wait $pid",
    )?;
    done.expect_success()?;
    done.expect_stderr("bpffs is not mounted")?;
    done.expect_stdout("ip_rcv")
}

fn without_btf() -> Result<()> {
    let done = unshared("mount -t tmpfs none /sys/kernel/btf && \"$NETPROBE\" skb")?;
    done.expect_code(1)?;
    done.expect_stderr("CONFIG_DEBUG_INFO_BTF")
}

fn no_function_matches() -> Result<()> {
    let done = Netprobe::new("skb")
        .args(["--filter-func", "no_such_function_.*"])
        .run()?;
    done.expect_code(2)?;
    done.expect_stderr("no_such_function_")
}

/// All of them: ready, a whole way from send to receive, and back within seconds even where detaching takes minutes.
fn all_functions() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let run = Netprobe::new("skb")
        .args(["--filter-proto", "udp", "--filter-dst-port", "4000"])
        .netns(&net.client)
        .start()?;
    let receiver = net.server.udp_bind(net.server.v4(4000))?;
    net.client.udp_send(net.server.v4(4000), b"hello")?;
    receiver.recv(&mut [0; 16])?;
    run.wait_line("udp_rcv")?;
    let done = run.stop()?;
    done.expect_success()?;
    let functions: HashSet<&str> = done
        .lines_with("(udp)")
        .iter()
        .filter_map(|l| l.split_whitespace().last())
        .collect();
    ensure!(functions.len() > 25, "{functions:?}");
    // veth is a module, and 5.10 has no BTF of modules.
    let of_module = (Env::look().kernel >= (5, 11)).then_some("veth_xmit");
    for name in ["ip_output", "dev_hard_start_xmit", "ip_rcv"]
        .into_iter()
        .chain(of_module)
    {
        ensure!(functions.contains(name), "no {name}: {functions:?}");
    }
    let traced: usize = done
        .stderr
        .lines()
        .find_map(|l| l.split("tracing ").nth(1)?.split(' ').next()?.parse().ok())
        .context("no count of functions")?;
    ensure!(traced > 1000, "{traced}");
    // Columns line up at 160: the function's column starts before it.
    let header = done.stdout.lines().next().unwrap_or_default();
    ensure!(header.find("FUNC").is_some_and(|at| at < 140), "{header}");
    Ok(())
}

fn not_root() -> Result<()> {
    // A copy that anybody may run.
    let dir = tempfile::tempdir()?;
    let copy = dir.path().join("netprobe");
    std::fs::copy(binary(), &copy)?;
    for path in [dir.path(), copy.as_path()] {
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    }
    let mut command = Command::new(&copy);
    command.arg("skb");
    std::os::unix::process::CommandExt::uid(&mut command, 65534);
    let output = command.output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1), "{stderr}");
    ensure!(
        stderr.contains("CAP_BPF") && stderr.contains("root"),
        "{stderr}"
    );
    ensure!(stderr.lines().count() == 1, "{stderr}");
    Ok(())
}

/// The preflight against what the test finds out in its own ways.
fn features() -> Result<()> {
    let done = Netprobe::new("features").arg("--output-json").run()?;
    done.expect_success()?;
    let rows = done.json()?;
    let f = rows.first().context("no object")?;
    let env = Env::look();
    ensure!(f["release"] == env.release.as_str(), "{f}");
    let expect = |field: &str, yes: bool| {
        if f[field] == yes {
            Ok(())
        } else {
            bail!("{field} should be {yes}: {f}")
        }
    };
    expect("kprobe_multi", env.lacks_kprobe_multi().is_none())?;
    if env.lacks_tracing().is_none() {
        expect("kprobe", true)?;
        expect("rdonly_cast", env.kernel >= (6, 2))?;
        expect("typed_filter", env.kernel >= (6, 2))?;
        expect("func_ip", env.kernel >= (5, 15))?;
        expect("drop_reasons", netfilter_reason().is_some())?;
        expect("module_btf", env.kernel >= (5, 11))?;
    }
    let text = Netprobe::new("features").run()?;
    for tool in ["skb", "tcpconnect", "icmp", "xdpdump"] {
        ensure!(
            text.lines_with(tool).iter().any(|l| l.contains("here")),
            "{text}"
        );
    }
    Ok(())
}
