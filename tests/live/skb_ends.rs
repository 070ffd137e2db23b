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
        case("skb_flood_seen_and_lost", flood)
            .once_on("6.1")
            .trace(),
        case("skb_flood_ringbuf", flood_ringbuf)
            .once_on("6.1")
            .trace(),
        // Kernels count such misses from 6.7 on.
        case("skb_missed_is_told", missed)
            .once_on("newest")
            .trace()
            .kernel(6, 7),
        case("skb_limit_ends_the_run", limit)
            .once_on("6.12")
            .trace(),
        case("skb_pins_after_each_end", pins_after_each_end)
            .once_on("5.10")
            .trace(),
        case("skb_stdout_closed", stdout_closed)
            .once_on("6.12")
            .trace(),
        case("skb_ends_leave_kprobes_to_a_child", left_to_a_child)
            .once_on("newest")
            .trace()
            .limit(300),
        case("skb_runs_on_under_nohup", under_nohup)
            .once_on("6.12")
            .trace(),
        case("skb_write_is_created_first", write_first)
            .once_on("6.12")
            .trace(),
        case("skb_kernel_btf_of_a_condition", kernel_btf_of_a_condition).trace(),
        case("kernel_btf_of_each_tool", kernel_btf_of_each_tool)
            .once_on("6.1")
            .trace(),
        case("skb_without_bpffs", without_bpffs)
            .once_on("6.12")
            .trace()
            .program("unshare"),
        case("skb_without_btf", without_btf)
            .trace()
            .program("unshare"),
        case("skb_no_function_matches", no_function_matches)
            .once_on("6.12")
            .trace(),
        case("skb_not_root", not_root).once_on("6.12"),
        case("features_agree_with_the_kernel", features),
    ]
}

/// To run behind all others: a kernel without kprobe.multi is busy for a minute afterwards, removing what this has put there.
pub fn last() -> Vec<Case> {
    vec![
        case("skb_all_functions", all_functions)
            .once_on("6.1")
            .trace()
            .limit(600),
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
            .args(["--filter-non-skb-funcs", "bpf_get_current_pid_tgid"])
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
    // The terminal that goes away (an ssh session that breaks off) is an end as any other.
    for signal in [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGQUIT,
        Signal::SIGHUP,
    ] {
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

/// Under nohup a terminal that goes away is no end.
fn under_nohup() -> Result<()> {
    let net = Pair::new()?;
    let dir = tempfile::tempdir()?;
    let ready = dir.path().join("ready");
    let lines = dir.path().join("lines");
    let mut child = net.client.enter(|| {
        Command::new("sh")
            .args(["-c", "trap '' HUP; exec \"$@\"", "sh"])
            .arg(binary())
            .args(["skb", "--filter-func", "ip_output", "--filter-proto", "udp"])
            .arg("--ready-file")
            .arg(&ready)
            .arg("--output-file")
            .arg(&lines)
            .stderr(std::process::Stdio::null())
            .spawn()
    })??;
    wait_for("the ready file", || Ok(ready.exists().then_some(())))?;
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(pid, Signal::SIGHUP)?;
    net.client.udp_send(net.server.v4(9), b"hello")?;
    let line = wait_for("a line after SIGHUP", || {
        let text = std::fs::read_to_string(&lines)?;
        Ok(text.contains(" ip_output").then_some(()))
    });
    nix::sys::signal::kill(pid, Signal::SIGINT)?;
    let status = child.wait()?;
    line?;
    ensure!(status.code() == Some(0), "{status}");
    Ok(())
}

/// A netprobe under a name of its own, whose orphans become this process's.
struct Apart {
    dir: tempfile::TempDir,
    name: &'static str,
}

impl Apart {
    fn new(name: &'static str) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        std::fs::copy(binary(), dir.path().join(name))?;
        // SAFETY: plain numbers; it says who gets this process's orphans.
        let status = unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
        ensure!(status == 0, "prctl: {}", std::io::Error::last_os_error());
        Ok(Self { dir, name })
    }

    fn skb(&self, args: &[&str]) -> Result<std::process::Child> {
        let mut command = Command::new(self.dir.path().join(self.name));
        command.args(["skb", "--backend", "kprobe"]).args(args);
        let child = command
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()?;
        Ok(child)
    }

    /// Waits for its end, for what it said, and for the child that it must have left with the links.
    fn end(&self, mut child: std::process::Child) -> Result<(std::process::ExitStatus, String)> {
        let status = wait_for("its end", || Ok(child.try_wait()?));
        if status.is_err() {
            child.kill()?;
        }
        let mut stderr = String::new();
        if let Some(mut pipe) = child.stderr.take() {
            std::io::Read::read_to_string(&mut pipe, &mut stderr)?;
        }
        let pins = pins_of(child.id());
        ensure!(!std::path::Path::new(&pins).exists(), "{pins} is left");
        let mut left = None;
        for entry in std::fs::read_dir("/proc")?.flatten() {
            let comm = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            if comm.trim() == self.name {
                left = entry.file_name().to_string_lossy().parse::<i32>().ok();
            }
        }
        let left = left.with_context(|| format!("no child was left with the links:\n{stderr}"))?;
        let pid = nix::unistd::Pid::from_raw(left);
        nix::sys::wait::waitpid(pid, None).context("the child is not ours")?;
        Ok((status?, stderr))
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 0) };
    }
}

/// Whatever ends a run that holds many single kprobes: the user does not wait for their removal.
fn left_to_a_child() -> Result<()> {
    let some = "ip_[f-o].*";
    let apart = Apart::new("np-apart")?;
    let ready = apart.dir.path().join("ready");
    let ready_file = ready.display().to_string();

    let mut child = apart.skb(&["--filter-func", some, "--ready-file", &ready_file])?;
    wait_for("the ready file", || Ok(ready.exists().then_some(())))?;
    drop(child.stdout.take());
    let (status, stderr) = apart.end(child)?;
    ensure!(
        status.code() == Some(0),
        "a closed pipe: {status}\n{stderr}"
    );

    let full = ["--filter-func", some, "--output-file", "/dev/full"];
    let (status, stderr) = apart.end(apart.skb(&full)?)?;
    ensure!(
        status.code() == Some(1) && stderr.contains("/dev/full"),
        "a full disk: {status}\n{stderr}"
    );

    // All functions: the signal comes long before they are attached.
    let child = apart.skb(&[])?;
    let fds = format!("/proc/{}/fd", child.id());
    wait_for("some kprobes", || {
        let perf_events = std::fs::read_dir(&fds)?
            .flatten()
            .filter_map(|e| std::fs::read_link(e.path()).ok())
            .filter(|to| to.to_string_lossy().contains("perf_event"));
        Ok((perf_events.count() > 30).then_some(()))
    })?;
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(child.id() as i32),
        Signal::SIGINT,
    )?;
    let (status, stderr) = apart.end(child)?;
    ensure!(
        status.code() == Some(1) && stderr.contains("SIGINT while attaching"),
        "Ctrl-C while attaching: {status}\n{stderr}"
    );
    Ok(())
}

/// A file that cannot be made is told before anything is attached.
fn write_first() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let ready = dir.path().join("ready");
    let done = Netprobe::new("skb")
        .args(["--filter-func", "ip_rcv", "-w", "/no/such/folder/x.pcapng"])
        .arg("--ready-file")
        .arg(&ready)
        .run()?;
    done.expect_code(1)?;
    done.expect_stderr("/no/such/folder/x.pcapng")?;
    ensure!(!done.stderr.contains("tracing"), "{done}");
    ensure!(!ready.exists(), "it said that it was ready");
    Ok(())
}

/// A condition is about the types in the file: there a member has another name.
fn kernel_btf_of_a_condition() -> Result<()> {
    let net = Pair::new()?;
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("types.btf");
    let mut types = std::fs::read("/sys/kernel/btf/vmlinux")?;
    let name = b"\0queue_mapping\0";
    let at = types
        .windows(name.len())
        .position(|w| w == name)
        .context("no such name")?;
    types[at + name.len() - 2] = b'X';
    std::fs::write(&file, types)?;
    let probe = Netprobe::new("skb")
        .args(["--filter-func", "ip_rcv", "--filter-dst-port", "9"])
        .args(["--filter-skb-expr", "skb->queue_mappinX >= 0"])
        .arg("--kernel-btf")
        .arg(&file)
        .start()?;
    net.client.udp_send(net.server.v4(9), b"hello")?;
    probe.wait_line(" ip_rcv")?;
    probe.stop()?.expect_success()
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

/// The kernel's types are in a file alone. Each tool goes on until it has seen a ping, or a connect to a closed port.
fn kernel_btf_of_each_tool() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("types.btf");
    std::fs::copy("/sys/kernel/btf/vmlinux", &file)?;
    let line = "--output-limit-lines 1";
    for (tool, more, wanted) in [
        (
            "skb",
            &*format!("--filter-func ip_rcv {line} icmp"),
            "ip_rcv",
        ),
        ("icmp", line, "127.0.0.1"),
        ("tcpconnect", &format!("-P 9 {line}"), " 9"),
        ("tcp", line, "127.0.0.1:9"),
        ("drops", "--once -i 1", "LOST"),
        ("latency", "--once -i 1 icmp", "STAGE"),
        ("why", "-- ping -c 1 127.0.0.1", "127.0.0.1"),
    ] {
        let done = unshared(&format!(
            "mount -t tmpfs none /sys/kernel/btf && {{ \"$NETPROBE\" {tool} --kernel-btf {} {more} & }}; \
             pid=$!; while kill -0 $pid 2>/dev/null; do ping -q -c 1 127.0.0.1 >&2; busybox nc 127.0.0.1 9 </dev/null; done; wait $pid",
            file.display()
        ))?;
        done.expect_success()?;
        done.expect_stdout(wanted)?;
    }
    Ok(())
}

fn without_btf() -> Result<()> {
    let done = unshared("mount -t tmpfs none /sys/kernel/btf && \"$NETPROBE\" skb")?;
    done.expect_code(1)?;
    done.expect_stderr("CONFIG_DEBUG_INFO_BTF")?;
    done.expect_stderr("--kernel-btf FILE")
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
