//! What every subcommand has in common at its end: it tells summary and loss whatever ended it, does not wait for a reader that stalls,
//! and drains CPUs that come online while it runs.

use std::io::Read;
use std::net::UdpSocket;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::common::{Case, Netns, Netprobe, Pair, SHORT, binary, case, wait_for};

pub fn cases() -> Vec<Case> {
    vec![
        case("run_closed_pipe_icmp", || closed_pipe(&ICMP))
            .once_on("6.12")
            .trace(),
        case("run_closed_pipe_tcpconnect", || closed_pipe(&TCPCONNECT))
            .once_on("6.12")
            .trace(),
        case("run_closed_pipe_xdpdump", || closed_pipe(&XDPDUMP))
            .once_on("6.12")
            .xdp(),
        case("run_full_disk_icmp", || full_disk(&ICMP))
            .once_on("6.12")
            .trace(),
        case("run_full_disk_tcpconnect", || full_disk(&TCPCONNECT))
            .once_on("6.12")
            .trace(),
        case("run_full_disk_xdpdump", || full_disk(&XDPDUMP))
            .once_on("6.12")
            .xdp(),
        case("run_stalled_reader", stalled_reader)
            .once_on("6.12")
            .trace(),
        case("run_cpu_comes_online", || cpu_comes_online("perf"))
            .once_on("5.10")
            .trace(),
        case("run_cpu_comes_online_ringbuf", || {
            cpu_comes_online("ringbuf")
        })
        .once_on("6.1")
        .trace(),
    ]
}

/// A subcommand, what makes one line of it (and something to tell at its end), and a part of what it tells then.
struct Tool {
    args: &'static [&'static str],
    /// runs in this namespace of the pair
    server: bool,
    traffic: fn(&Pair) -> Result<()>,
    told: &'static str,
}

const ICMP: Tool = Tool {
    args: &["icmp"],
    server: true,
    traffic: |net| {
        net.client.ping(net.server.v4(0), 1)?;
        Ok(())
    },
    told: "--- echo requests handled",
};

/// A second connect gets no answer.
const TCPCONNECT: Tool = Tool {
    args: &["tcpconnect", "--outcome"],
    server: false,
    traffic: |net| {
        let _ = net.client.tcp_connect(net.server.v4(1), SHORT);
        net.client.enter(|| -> Result<()> {
            use nix::sys::socket::{
                AddressFamily, SockFlag, SockType, SockaddrIn, connect, socket,
            };
            let flags = SockFlag::SOCK_NONBLOCK;
            let fd = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
            let silent = SockaddrIn::new(10, 77, 0, 99, 80);
            let _ = connect(std::os::fd::AsRawFd::as_raw_fd(&fd), &silent);
            // It stays open for as long as the test runs.
            std::mem::forget(fd);
            Ok(())
        })?
    },
    told: "connects were not decided yet",
};

const XDPDUMP: Tool = Tool {
    args: &["xdpdump", "--xdp-mode", "skb", "--iface"],
    server: true,
    traffic: |net| net.client.udp_send(net.server.v4(9), b"hello").map(|_| ()),
    told: "packets captured",
};

impl Tool {
    fn netns<'a>(&self, net: &'a Pair) -> &'a Netns {
        match self.server {
            true => &net.server,
            false => &net.client,
        }
    }

    fn args(&self) -> Vec<String> {
        let mut args: Vec<String> = self.args.iter().map(ToString::to_string).collect();
        if args[0] == "xdpdump" {
            args.push(Pair::IFACE.to_owned());
        }
        args
    }
}

/// A netprobe whose stdout is read by hand.
struct ByHand {
    child: Child,
    _dir: tempfile::TempDir,
}

impl ByHand {
    fn start(netns: &Netns, args: &[String]) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let ready = dir.path().join("ready");
        let child = netns.enter(|| {
            Command::new(binary())
                .args(args)
                .arg("--ready-file")
                .arg(&ready)
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
        })??;
        let run = Self { child, _dir: dir };
        wait_for("the ready file", || Ok(ready.exists().then_some(())))?;
        Ok(run)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        nix::sys::signal::kill(Pid::from_raw(self.child.id() as i32), signal)?;
        Ok(())
    }

    /// Its exit code and stderr.
    fn end(&mut self) -> Result<(Option<i32>, String)> {
        let status = wait_for("its end", || Ok(self.child.try_wait()?))?;
        let mut stderr = String::new();
        let pipe = self.child.stderr.as_mut().context("no stderr")?;
        pipe.read_to_string(&mut stderr)?;
        Ok((status.code(), stderr))
    }
}

impl Drop for ByHand {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `netprobe TOOL | head -1`.
fn closed_pipe(tool: &Tool) -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let mut run = ByHand::start(tool.netns(&net), &tool.args())?;
    (tool.traffic)(&net)?;
    let mut stdout = run.child.stdout.take().context("no stdout")?;
    // The header or the first packet.
    let mut first = [0; 1];
    stdout.read_exact(&mut first)?;
    drop(stdout);
    let (code, stderr) = run.end()?;
    ensure!(code == Some(0), "exit code {code:?}:\n{stderr}");
    ensure!(stderr.contains(tool.told), "{stderr}");
    Ok(())
}

/// A file system with room for one page.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let none = MsFlags::empty();
        mount(
            Some("small"),
            dir.path(),
            Some("tmpfs"),
            none,
            Some("size=4k"),
        )?;
        Ok(Self(dir))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

fn full_disk(tool: &Tool) -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let disk = SmallDisk::new()?;
    let mut args = tool.args();
    let file = disk.0.path().join("lines").display().to_string();
    args.extend(["--output-file".to_owned(), file.clone()]);
    let mut run = ByHand::start(tool.netns(&net), &args)?;
    wait_for("its end", || {
        (tool.traffic)(&net)?;
        Ok(run.child.try_wait()?)
    })?;
    let (code, stderr) = run.end()?;
    ensure!(code == Some(1), "exit code {code:?}:\n{stderr}");
    ensure!(stderr.contains(tool.told), "{stderr}");
    ensure!(stderr.contains(&file), "{stderr}");
    ensure!(stderr.contains("lines were not written"), "{stderr}");
    Ok(())
}

/// Datagrams sent to a port that is filtered for; each is one line.
const SENT: usize = 3000;

/// A pager that nobody scrolls: Ctrl-C ends the run all the same, and each line was read or is counted.
fn stalled_reader() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let args = [
        "skb",
        "--filter-func",
        "ip_output",
        "--filter-dst-port",
        "4000",
    ];
    let mut run = ByHand::start(&net.client, &args.map(str::to_owned))?;
    net.client.enter(|| -> Result<()> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        for _ in 0..SENT {
            socket.send_to(b"stall", net.server.v4(4000))?;
        }
        Ok(())
    })??;
    // Its pipe is full when it cannot take another byte.
    run.signal(Signal::SIGINT)?;
    let (code, stderr) = run.end()?;
    ensure!(code == Some(1), "exit code {code:?}:\n{stderr}");
    let unwritten = stderr
        .lines()
        .find_map(|line| line.strip_suffix(" lines were not written to stdout"))
        .and_then(|line| line.rsplit(' ').next()?.parse::<usize>().ok())
        .with_context(|| format!("nothing said of lines:\n{stderr}"))?;
    let mut stdout = Vec::new();
    let pipe = run.child.stdout.as_mut().context("no stdout")?;
    pipe.read_to_end(&mut stdout)?;
    let read = stdout.iter().filter(|&&b| b == b'\n').count();
    ensure!(read > 0 && unwritten > 0, "{read} read, {unwritten} not");
    // The header is a line too.
    ensure!(
        read + unwritten == SENT + 1,
        "{read} read and {unwritten} not written of {SENT}:\n{stderr}"
    );
    Ok(())
}

const CPU_1: &str = "/sys/devices/system/cpu/cpu1/online";

/// Takes a CPU away, and gives it back at the latest when dropped.
pub struct Offline;

impl Offline {
    pub fn take() -> Result<Self> {
        ensure!(Path::new(CPU_1).exists(), "CPU 1 cannot go offline here");
        std::fs::write(CPU_1, "0").context("failed to take CPU 1 offline")?;
        Ok(Self)
    }
}

impl Drop for Offline {
    fn drop(&mut self) {
        let _ = std::fs::write(CPU_1, "1");
    }
}

fn cpu_comes_online(transport: &str) -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let offline = Offline::take()?;
    let run = Netprobe::new("skb")
        .args(["--filter-func", "ip_output", "--filter-dst-port", "4000"])
        .args(["--transport", transport, "--output-json"])
        .start()?;
    let (mut sent, mut before) = (0, 0);
    for _ in 0..2 {
        std::fs::write(CPU_1, "1").context("failed to bring CPU 1 online")?;
        // Until its buffer is there, events of this CPU are lost, and counted.
        wait_for("a line of CPU 1", || {
            net.client.enter(|| -> Result<()> {
                let mut one = CpuSet::new();
                one.set(1)?;
                sched_setaffinity(Pid::from_raw(0), &one)?;
                UdpSocket::bind("0.0.0.0:0")?.send_to(b"from CPU 1", net.server.v4(4000))?;
                Ok(())
            })??;
            sent += 1;
            let text = run.stdout();
            let seen = text
                .lines()
                .filter(|line| line.contains("\"cpu\":1,"))
                .count();
            Ok((seen > before).then(|| before = seen))
        })?;
        // ... and once more: its buffer has to be opened anew.
        std::fs::write(CPU_1, "0").context("failed to take CPU 1 offline")?;
    }
    drop(offline);
    let done = run.stop()?;
    done.expect_success()?;
    let rows = done.json()?;
    let printed = rows.iter().filter(|row| row["type"] == "event").count() as u64;
    let loss = rows.iter().find(|row| row["type"] == "loss");
    let lost = loss.map_or(0, |loss| loss["lost"].as_u64().unwrap_or(0));
    ensure!(
        printed + lost == sent,
        "{printed} + {lost} of {sent}: {done}"
    );
    Ok(())
}
