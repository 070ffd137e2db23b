//! Whose packets: --pid, --comm, --uid, --cgroup, --container and -- COMMAND in why, skb and drops, in both directions. What another
//! process sends comes from this program, started again as a helper (main.rs).

use std::fs;
use std::io::Read;
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::Value;

use crate::common::{Case, Finished, Netns, Netprobe, Pair, binary, case, deadline, wait_for};

pub fn cases() -> Vec<Case> {
    vec![
        case("who_pid", pid).once_on("6.1").trace().program("nft"),
        case("who_uid_and_comm", uid_and_comm)
            .once_on("5.10")
            .trace(),
        case("who_container", container)
            .once_on("6.1")
            .trace()
            .program("ping"),
        case(
            "who_container_of_connects_and_echoes",
            of_connects_and_echoes,
        )
        .once_on("newest")
        .trace()
        .program("busybox")
        .program("ping"),
        case("who_command_skb_and_drops", commands)
            .once_on("6.12")
            .trace()
            .program("ping"),
        case("who_command_tree", tree)
            .once_on("6.12")
            .trace()
            .program("ping")
            .program("unshare"),
        case("who_command_ctrl_c", ctrl_c).once_on("6.12").trace(),
        case("who_wrong", wrong).once_on("6.12"),
    ]
}

/// What a helper does (main.rs): sends a datagram to this address.
pub const HELPER: &str = "NETPROBE_LIVE_SEND";

pub fn help(address: &str) {
    let sent = UdpSocket::bind("0.0.0.0:0").and_then(|s| s.send_to(b"x", address));
    std::process::exit(i32::from(sent.is_err()));
}

/// Another process sends a datagram.
pub fn other_sends(netns: &Netns, to: SocketAddr) -> Result<()> {
    let mut helper = Command::new(std::env::current_exe()?);
    netns.output(helper.env(HELPER, to.to_string())).map(|_| ())
}

fn of_port(rows: &[Value], port: u16) -> Vec<&Value> {
    let of_port = |r: &&Value| r["type"] == "packet" && r["dport"] == port;
    rows.iter().filter(of_port).collect()
}

fn one(rows: &[Value], port: u16) -> Result<&Value> {
    let found = of_port(rows, port);
    ensure!(found.len() == 1, "port {port}: {found:#?} of {rows:#?}");
    Ok(found[0])
}

fn rows(done: &Finished) -> Result<Vec<Value>> {
    done.expect_success()?;
    done.json()
}

fn packets(done: &Finished) -> Result<Vec<Value>> {
    let mut rows = rows(done)?;
    rows.retain(|row| row["type"] == "packet");
    Ok(rows)
}

/// Sockets older than the run and new ones, packets from them and to them, also those that never reach them.
fn pid() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let (client, server) = (&net.client, &net.server);
    server.nft(
        "table ip t { chain i { type filter hook input priority 0; udp dport { 82, 84 } drop; }; }",
    )?;
    let older = server.udp_bind(server.v4(80))?;
    let _hidden = server.udp_bind("0.0.0.0:82".parse()?)?;
    let me = std::process::id().to_string();
    let run = Netprobe::new("why")
        .args(["--output-json", "--pid", &me, "net 10.77.0.0/24 and udp"])
        .start()?;
    let newer = server.udp_bind(server.v4(81))?;
    for port in [80, 81, 82, 83, 84] {
        other_sends(client, server.v4(port))?;
    }
    older.recv(&mut [0; 8])?;
    newer.recv(&mut [0; 8])?;
    drop(newer);
    other_sends(client, server.v4(81))?;
    client.udp_send(server.v4(85), b"x")?;
    let rows = rows(&run.stop()?)?;
    let inode = server.inode()?;
    for port in [80, 81] {
        let row = one(&rows, port)?;
        ensure!(
            row["end"] == "delivered" && row["netns"] == inode,
            "{row:#}"
        );
    }
    let row = one(&rows, 82)?;
    ensure!(row["end"] == "lost" && row["netns"] == inode, "{row:#}");
    for port in [83, 84] {
        ensure!(of_port(&rows, port).is_empty(), "{rows:#?}");
    }
    let row = one(&rows, 85)?;
    ensure!(
        row["end"] == "rejected" && row["netns"] == client.inode()?,
        "{row:#}"
    );
    Ok(())
}

/// A thread of this name, its sockets of this user.
pub fn as_other<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("np-who".into());
        let thread = thread.spawn_scoped(scope, || {
            // SAFETY: takes a number; it is this thread's alone.
            unsafe { libc::syscall(libc::SYS_setfsuid, 1234) };
            work()
        })?;
        thread
            .join()
            .map_err(|_| anyhow::anyhow!("the thread panicked"))
    })
}

fn uid_and_comm() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let (client, server) = (&net.client, &net.server);
    let full = as_other(|| server.enter(|| UdpSocket::bind("10.77.0.2:90")))???;
    // The two losses of drops, and one of somebody else.
    let table = |flag: &str, value: &str, work: &dyn Fn() -> Result<()>| -> Result<u64> {
        let run = Netprobe::new("drops")
            .args(["--output-json", "-i", "3600", flag, value, "udp"])
            .start()?;
        work()?;
        let rows = rows(&run.stop()?)?;
        let lost = rows.iter().filter(|r| r["type"] == "drops");
        let lost: Vec<&Value> = lost.collect();
        Ok(lost.iter().filter_map(|r| r["packets"].as_u64()).sum())
    };
    let to_it = || {
        for _ in 0..2 {
            other_sends(client, server.v4(90))?;
        }
        other_sends(client, server.v4(91))
    };
    server.cmd("nft add table ip t").and_then(|_| {
        server.nft("table ip t { chain i { type filter hook input priority 0; udp dport { 90, 91 } drop; }; }")
    })?;
    let lost = table("--uid", "1234", &to_it)?;
    ensure!(lost == 2, "{lost} packets to a socket of the user");
    let by_name = || -> Result<()> {
        as_other(|| client.udp_send(server.v4(91), b"x"))??;
        other_sends(client, server.v4(91))
    };
    // The packet that this thread sent is dropped at the other end of the pair: its socket is still known there.
    let run = Netprobe::new("skb")
        .args([
            "--output-json",
            "--comm",
            "np-who",
            "--filter-func",
            "ip_rcv|ip_output|udp_send_skb.*",
        ])
        .args(["--output-tuple", "--output-owner", "udp"])
        .start()?;
    by_name()?;
    run.wait_lines("a packet of the thread", |text| {
        text.contains("ip_output").then_some(())
    })?;
    let rows = rows(&run.stop()?)?;
    ensure!(!rows.is_empty(), "no packet");
    for row in &rows {
        let owner = &row["owner"]["comm"];
        ensure!(owner == "np-who" || owner.is_null(), "{row:#}");
    }
    drop(full);
    Ok(())
}

/// A cgroup that looks like a container of docker, with the file that gives it its name.
pub struct Container {
    id: String,
    pub cgroup: PathBuf,
    config: PathBuf,
}

impl Container {
    pub fn new(name: &str, digit: &str) -> Result<Self> {
        let id = digit.repeat(32);
        let cgroup = PathBuf::from(format!("/sys/fs/cgroup/docker-{id}.scope"));
        fs::create_dir(&cgroup).context("no cgroup v2 at /sys/fs/cgroup")?;
        let config = PathBuf::from(format!("/var/lib/docker/containers/{id}"));
        fs::create_dir_all(&config)?;
        let text = format!("{{\"ID\":\"{id}\",\"Name\":\"/{name}\"}}");
        fs::write(config.join("config.v2.json"), text)?;
        Ok(Self { id, cgroup, config })
    }

    /// Runs a command in it.
    pub fn run(&self, netns: &Netns, command: &str) -> Result<String> {
        run_in(&self.cgroup, netns, command)
    }
}

/// Runs a command in a cgroup.
pub fn run_in(cgroup: &Path, netns: &Netns, command: &str) -> Result<String> {
    let procs = cgroup.join("cgroup.procs");
    let script = format!("echo 0 > {} && exec {command}", procs.display());
    netns.output(Command::new("/bin/sh").args(["-c", &script]))
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.cgroup);
        let _ = fs::remove_dir_all(&self.config);
    }
}

fn container() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let client = &net.client;
    let server = net.server.v4(0);
    let web = Container::new("npt-web", "a1")?;
    let _second = Container::new("npt-db", "a2")?;
    let ping = format!("/bin/ping -c 1 -W 5 {}", server.ip());
    let why = |flag: &str, value: &str| {
        Netprobe::new("why")
            .args(["--output-json", flag, value])
            .start()
    };
    let run = why("--container", "npt-web")?;
    ensure!(client.ping(server, 1)?, "no answer");
    web.run(client, &ping)?;
    let told = packets(&run.stop()?)?;
    ensure!(told.len() == 2, "{told:#?}");
    let request = told.iter().find(|r| r["end"] == "answered");
    let request = request.with_context(|| format!("{told:#?}"))?;
    ensure!(request["sender"]["comm"] == "ping", "{request:#}");
    let name = &request["sender"]["container"];
    ensure!(name == "npt-web", "{name}: {request:#}");
    // Other ways to name it, by the tool that starts sooner.
    let path = web.cgroup.to_string_lossy().into_owned();
    for (flag, value) in [("--container", "a1a"), ("--cgroup", &*path)] {
        let run = Netprobe::new("skb")
            .args(["--filter-func", "ip_output|ip_rcv", flag, value])
            .start()?;
        ensure!(client.ping(server, 1)?, "no answer");
        web.run(client, &ping)?;
        let done = run.stop()?;
        let hits = done.stdout.lines().filter(|l| l.contains(" ip_rcv"));
        let hits = hits.count();
        ensure!(hits == 2, "a request and its reply: {done}");
    }
    for (value, says) in [("a", "a1a1a1a1a1a1"), ("npt-none", "npt-db")] {
        let done = Netprobe::new("why").args(["--container", value]).run()?;
        done.expect_code(2)?;
        done.expect_stderr(value)?;
        done.expect_stderr(says)?;
    }
    ensure!(web.id.len() == 64, "an id");
    let pod = Pod::new("npt", "web-1", "0b3c1d52-4a7e-4f0e-9d5f-2f6c1d0e7a11")?;
    // The pod that had the name before has left its logs.
    let before = Path::new("/var/log/pods/npt_web-1_1b3c1d52-4a7e-4f0e-9d5f-2f6c1d0e7a11");
    fs::create_dir(before)?;
    let run = why("--pod", "npt/web-1");
    fs::remove_dir(before)?;
    let run = run?;
    ensure!(client.ping(server, 1)?, "no answer");
    let procs = pod.container.join("cgroup.procs");
    let script = format!("echo 0 > {} && exec {ping}", procs.display());
    client.output(Command::new("/bin/sh").args(["-c", &script]))?;
    let told = packets(&run.stop()?)?;
    ensure!(told.len() == 2, "--pod: {told:#?}");
    let request = told.iter().find(|r| r["end"] == "answered");
    let name = &request.with_context(|| format!("{told:#?}"))?["sender"]["container"];
    ensure!(name == "npt/web-1/cccccccccccc", "{name}");
    for (value, says) in [
        ("npt/web-2", "there are npt/web-1"),
        ("web-1", "NAMESPACE/NAME"),
    ] {
        let done = Netprobe::new("why").args(["--pod", value]).run()?;
        done.expect_code(2)?;
        done.expect_stderr(says)?;
    }
    Ok(())
}

/// A pod as kubelet and containerd make one: cgroups by systemd, and a folder of logs.
pub struct Pod {
    slice: PathBuf,
    pub container: PathBuf,
    logs: PathBuf,
}

impl Pod {
    pub fn new(space: &str, name: &str, uid: &str) -> Result<Self> {
        let unit = format!("kubepods-besteffort-pod{}.slice", uid.replace('-', "_"));
        let slice = Path::new("/sys/fs/cgroup/kubepods.slice").join(unit);
        let container = slice.join(format!("cri-containerd-{}.scope", "c".repeat(64)));
        fs::create_dir_all(&container)?;
        let logs = PathBuf::from(format!("/var/log/pods/{space}_{name}_{uid}"));
        fs::create_dir_all(logs.join("nginx"))?;
        Ok(Self {
            slice,
            container,
            logs,
        })
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.container);
        let _ = fs::remove_dir(&self.slice);
        let _ = self.slice.parent().map(fs::remove_dir);
        let _ = fs::remove_dir_all(&self.logs);
    }
}

/// tcpconnect knows a container and a pod by their cgroups, icmp by the network namespace of what runs there.
fn of_connects_and_echoes() -> Result<()> {
    let net = Pair::new()?;
    let web = Container::new("npt-both", "a5")?;
    let pod = Pod::new("npt", "both-1", "4c0f5d7e-93a1-4d0b-8a52-6a1b9c3d7e10")?;
    let flags = [["--container", "npt-both"], ["--pod", "npt/both-1"]];
    let start = |tool: &str, flag: &[&str; 2]| {
        let run = Netprobe::new(tool).args(flag);
        run.arg("--output-json").start()
    };
    let empty = Netprobe::new("icmp").args(flags[0]).run()?;
    empty.expect_code(2)?;
    empty.expect_stderr("npt-both: no process runs in it")?;

    let mut held = Vec::new();
    for cgroup in [&web.cgroup, &pod.container] {
        let script = format!(
            "echo 0 > {}/cgroup.procs && echo in && exec cat",
            cgroup.display()
        );
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &script]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = net.server.enter(|| command.spawn())??;
        child
            .stdout
            .as_mut()
            .context("no stdout")?
            .read_exact(&mut [0; 3])?;
        held.push(child);
    }
    let icmp = flags.iter().map(|flag| start("icmp", flag));
    let icmp: Vec<_> = icmp.collect::<Result<_>>()?;
    let connects = flags.iter().map(|flag| start("tcpconnect", flag));
    let connects: Vec<_> = connects.collect::<Result<_>>()?;
    ensure!(net.client.ping(net.server.v4(0), 1)?, "ping");
    ensure!(net.server.ping(net.client.v4(0), 1)?, "ping back");
    let to = net.server.v4(0).ip();
    for (cgroup, port) in [(&web.cgroup, 71), (&pod.container, 72)] {
        // Nobody listens: it was a connect all the same.
        let nc = format!("busybox nc {to} {port}");
        ensure!(run_in(cgroup, &net.client, &nc).is_err());
    }
    for run in icmp {
        let done = run.stop()?;
        let rows = done.json_of("echo")?;
        ensure!(rows.len() == 1, "{done}");
        ensure!(rows[0]["netns"] == net.server.inode()?, "{done}");
    }
    for (run, port) in connects.into_iter().zip([71, 72]) {
        let done = run.stop()?;
        let rows = done.json_of("connect")?;
        ensure!(rows.len() == 1 && rows[0]["dport"] == port, "{done}");
    }
    for mut child in held {
        drop(child.stdin.take());
        child.wait()?;
    }
    Ok(())
}

/// The form with a command of the other two tools.
fn commands() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let (client, server) = (&net.client, &net.server);
    let to = server.v4(0).ip().to_string();
    let ping = ["--", "ping", "-c", "1", "-W", "5", &to];
    let done = Netprobe::new("skb")
        .args(["--filter-func", "ip_output|ip_rcv"])
        .args(ping)
        .netns(client)
        .run()?;
    done.expect_success()?;
    done.expect_stderr("netprobe: ping ended with exit status 0")?;
    let hits = done.stdout.lines().filter(|l| l.contains(" ip_rcv"));
    let hits = hits.count();
    ensure!(hits == 2, "a request and its reply: {done}");
    server.sysctl("net/ipv4/icmp_echo_ignore_all", "1")?;
    client.cmd("ip route add blackhole 10.99.0.0/24")?;
    let done = Netprobe::new("drops")
        .args(["-i", "3600", "--", "ping", "-c", "1", "-W", "1", &to])
        .netns(client)
        .run()?;
    done.expect_success()?;
    done.expect_stderr("netprobe: ping ended with exit status 1")
}

/// Without a cgroup v2 a command is known by its processes: the shell's child is one of them.
fn tree() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let to = net.server.v4(0).ip().to_string();
    // /run cannot be written to: there is no place to mount one.
    let script = format!(
        "umount /sys/fs/cgroup && mount -t tmpfs -o ro none /run && exec {} why -- /bin/sh -c '/bin/ping -c 1 -W 5 {to}; true'",
        binary().display()
    );
    let unshare = ["-m", "/bin/sh", "-c", &script];
    let output = net
        .client
        .enter(|| Command::new("unshare").args(unshare).output())??;
    let stderr = String::from_utf8_lossy(&output.stderr);
    let stdout = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{stdout}{stderr}");
    ensure!(
        stderr.contains("there is no cgroup v2 for the command"),
        "{stderr}"
    );
    ensure!(
        stdout.contains("1 delivered, 1 answered by this kernel."),
        "{stdout}{stderr}"
    );
    Ok(())
}

/// Ctrl-C at a terminal reaches the command and netprobe, and both end.
fn ctrl_c() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let ready = dir.path().join("ready");
    let mark = dir.path().join("mark");
    let script = format!("echo > {}; exec sleep 1000", mark.display());
    let mut child = Command::new(binary())
        .args(["why", "--ready-file"])
        .arg(&ready)
        .args(["--", "/bin/sh", "-c", &script])
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    wait_for("the command to run", || Ok(mark.exists().then_some(())))?;
    killpg(Pid::from_raw(child.id() as i32), Signal::SIGINT)?;
    let status = wait_for("the end of netprobe", || Ok(child.try_wait()?))?;
    let mut stderr = String::new();
    child
        .stderr
        .take()
        .context("no stderr")?
        .read_to_string(&mut stderr)?;
    ensure!(status.success(), "{status}: {stderr}");
    ensure!(stderr.contains("/bin/sh was ended by SIGINT"), "{stderr}");
    ensure!(deadline().as_secs() < 1000, "it would end by itself");
    Ok(())
}

/// One clear line, and exit status 2.
fn wrong() -> Result<()> {
    for (flag, value) in [
        ("--pid", "4194999"),
        ("--comm", "a-name-too-long-x"),
        ("--cgroup", "/no/such/group"),
        ("--container", "npt-nobody"),
    ] {
        for tool in ["why", "skb", "drops"] {
            let done = Netprobe::new(tool).args([flag, value]).run()?;
            done.expect_code(2)?;
            done.expect_stderr(value)?;
        }
    }
    let done = Netprobe::new("skb")
        .args(["--filter-trace-tc", "--uid", "0"])
        .run()?;
    done.expect_code(2)
}
