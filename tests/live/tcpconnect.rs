//! `netprobe tcpconnect`: real connects, every column, every filter both ways, every outcome.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::common::{
    Case, Finished, Netns, Netprobe, Pair, Running, TcpServer, case, deadline, wait_for,
};

pub fn cases() -> Vec<Case> {
    vec![
        case("tcpconnect_columns", columns).once_on("6.12").trace(),
        case("tcpconnect_json", json).once_on("6.12").trace(),
        case("tcpconnect_ports", ports).once_on("6.12").trace(),
        case("tcpconnect_family", family).once_on("5.10").trace(),
        case("tcpconnect_addresses", addresses)
            .once_on("6.12")
            .trace(),
        case("tcpconnect_process", process)
            .once_on("6.1")
            .trace()
            .limit(400)
            .program("nc"),
        case("tcpconnect_netns", netns).once_on("5.10").trace(),
        case("tcpconnect_cgroup", cgroup)
            .once_on("6.1")
            .trace()
            .program("nc"),
        case("tcpconnect_maps", maps)
            .once_on("newest")
            .trace()
            .limit(400)
            .program("nc")
            .program("bpftool"),
        case("tcpconnect_count", count).once_on("6.1").trace(),
        case("tcpconnect_count_live", count_live)
            .once_on("6.12")
            .trace(),
        case("tcpconnect_count_full", count_full)
            .once_on("6.12")
            .trace(),
        case("tcpconnect_threads", threads).once_on("6.12").trace(),
        case("tcpconnect_limit", limit).once_on("6.12").trace(),
        case("tcpconnect_usage", usage).once_on("6.12"),
    ]
}

/// Waits for nothing but its own answer.
pub fn connect(net: &Netns, to: SocketAddr) -> Result<TcpStream> {
    net.tcp_connect(to, deadline())?
        .with_context(|| format!("no connection to {to}"))
}

/// Connects in a blocking way, whatever comes of it.
pub fn blocking(net: &Netns, to: SocketAddr) -> Result<io::Result<TcpStream>> {
    net.enter(|| TcpStream::connect(to))
}

/// `nc` in the namespace: a process of its own.
pub fn nc(net: &Netns, to: SocketAddr, prepare: impl FnOnce(&mut Command)) -> Result<u32> {
    let mut command = Command::new("nc");
    command
        .args([to.ip().to_string(), to.port().to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    prepare(&mut command);
    let mut child = net.enter(|| command.spawn())?.context("failed to run nc")?;
    let pid = child.id();
    child.wait()?;
    Ok(pid)
}

pub fn mapped(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(v4) => SocketAddr::from((v4.to_ipv6_mapped(), address.port())),
        IpAddr::V6(_) => address,
    }
}

pub fn me() -> String {
    std::process::id().to_string()
}

/// Stops it, and gives the words of the lines that this process's connects made; the header apart.
fn rows(done: &Finished) -> Vec<Vec<&str>> {
    done.stdout
        .lines()
        .skip(1)
        .map(|l| l.split_whitespace().collect())
        .collect()
}

/// A server with both families, and the client's namespace.
pub fn net() -> Result<(Pair, TcpServer, TcpServer)> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let v4 = net.server.tcp_listen(net.server.v4(80))?;
    let v6 = net.server.tcp_listen(net.server.v6(81))?;
    Ok((net, v4, v6))
}

fn columns() -> Result<()> {
    let (net, v4, v6) = net()?;
    let run = Netprobe::new("tcpconnect")
        .args(["-t", "-U", "-L", "-p", &me()])
        .start()?;
    let a = connect(&net.client, v4.address())?;
    let b = connect(&net.client, v6.address())?;
    let c = connect(&net.client, mapped(v4.address()))?;
    run.wait_lines("three rows", |t| (t.lines().count() >= 4).then_some(()))?;
    let done = run.stop()?;
    done.expect_success()?;
    ensure!(
        done.stdout.starts_with(
            "TIME(s)  UID   PID     COMM         IP SADDR            LPORT  DADDR            DPORT \n"
        ),
        "{done}"
    );
    let rows = rows(&done);
    ensure!(rows.len() == 3, "{done}");
    for (row, (ip, stream)) in rows.iter().zip([("4", &a), ("6", &b), ("4", &c)]) {
        let (local, peer) = (stream.local_addr()?, stream.peer_addr()?);
        ensure!(row.len() == 9, "{done}");
        ensure!(row[1] == "0" && row[2] == me() && row[4] == ip, "{done}");
        ensure!(row[5] == local.ip().to_canonical().to_string(), "{done}");
        ensure!(row[6] == local.port().to_string(), "{done}");
        ensure!(row[7] == peer.ip().to_canonical().to_string(), "{done}");
        ensure!(row[8] == peer.port().to_string(), "{done}");
    }
    ensure!(rows[0][0] == "0.000", "{done}");
    ensure!(rows[2][0].parse::<f64>()? >= rows[1][0].parse()?, "{done}");
    Ok(())
}

fn json() -> Result<()> {
    let (net, v4, _v6) = net()?;
    let run = Netprobe::new("tcpconnect")
        .args(["--output-json", "-p", &me()])
        .start()?;
    let stream = connect(&net.client, mapped(v4.address()))?;
    run.wait_line("connect")?;
    let done = run.stop()?;
    done.expect_success()?;
    let rows = done.json_of("connect")?;
    ensure!(rows.len() == 1, "{done}");
    let row = &rows[0];
    for (key, value) in [
        ("type", Value::from("connect")),
        ("pid", std::process::id().into()),
        ("uid", 0.into()),
        ("ip", 4.into()),
        ("saddr", "10.77.0.1".into()),
        ("daddr", "10.77.0.2".into()),
        ("lport", stream.local_addr()?.port().into()),
        ("dport", 80.into()),
        ("v4_mapped", true.into()),
        ("mptcp", false.into()),
        ("netns", net.client.inode()?.into()),
    ] {
        ensure!(row[key] == value, "{key}: {row}");
    }
    Ok(())
}

/// Runs with `args`, makes `connects` and then `last`, which must be seen; gives the destinations of all rows.
fn seen(
    args: &[&str],
    last: impl FnOnce() -> Result<()>,
    mark: &str,
    connects: impl FnOnce() -> Result<()>,
) -> Result<Vec<String>> {
    let run = Netprobe::new("tcpconnect").args(args).start()?;
    connects()?;
    last()?;
    run.wait_lines(&format!("the row of {mark}"), |t| {
        t.lines()
            .any(|l| {
                let w: Vec<&str> = l.split_whitespace().collect();
                w.len() > 5 && format!("{}:{}", w[4], w[5]) == mark
            })
            .then_some(())
    })?;
    let done = run.stop()?;
    done.expect_success()?;
    Ok(rows(&done)
        .iter()
        .map(|w| format!("{}:{}", w[4], w[5]))
        .filter(|d| d != mark)
        .collect())
}

fn ports() -> Result<()> {
    let (net, v4, v6) = net()?;
    let third = net.server.tcp_listen(net.server.v4(8080))?;
    let all = || -> Result<()> {
        connect(&net.client, v4.address())?;
        connect(&net.client, v6.address())?;
        connect(&net.client, third.address())?;
        Ok(())
    };
    let last = net.server.tcp_listen(net.server.v4(9000))?;
    let end = || connect(&net.client, last.address()).map(drop);
    let mark = "10.77.0.2:9000";
    let me = me();
    // More ports than other tools take.
    let many: Vec<String> = (9000..9100).map(|p| p.to_string()).collect();
    let many = format!("{},80", many.join(","));
    let got = seen(&["-p", &me, "-P", &many], end, mark, all)?;
    ensure!(got == ["10.77.0.2:80"], "{got:?}");
    let got = seen(&["-p", &me, "-P", "!80,81"], end, mark, all)?;
    ensure!(got == ["10.77.0.2:8080"], "{got:?}");
    Ok(())
}

fn family() -> Result<()> {
    let (net, v4, v6) = net()?;
    let both = || -> Result<()> {
        connect(&net.client, v4.address())?;
        connect(&net.client, v6.address())?;
        connect(&net.client, mapped(v4.address()))?;
        Ok(())
    };
    let me = me();
    let last = net.server.tcp_listen(net.server.v4(9000))?;
    let end = || connect(&net.client, last.address()).map(drop);
    let got = seen(&["-4", "-p", &me], end, "10.77.0.2:9000", both)?;
    ensure!(got == ["10.77.0.2:80", "10.77.0.2:80"], "{got:?}");
    let last = net.server.tcp_listen(net.server.v6(9000))?;
    let end = || connect(&net.client, last.address()).map(drop);
    let got = seen(&["-6", "-p", &me], end, "fd77::2:9000", both)?;
    ensure!(got == ["fd77::2:81"], "{got:?}");
    Ok(())
}

fn addresses() -> Result<()> {
    let (net, v4, v6) = net()?;
    net.server.ip("addr add 10.77.0.77/24 dev veth0")?;
    let other = net.server.tcp_listen("10.77.0.77:80".parse()?)?;
    let all = || -> Result<()> {
        connect(&net.client, v4.address())?;
        connect(&net.client, v6.address())?;
        Ok(())
    };
    let end = || connect(&net.client, other.address()).map(drop);
    let me = me();
    let mark = "10.77.0.77:80";
    let got = seen(
        &["-p", &me, "--daddr", "10.77.0.64/26,fd77::/64"],
        end,
        mark,
        all,
    )?;
    ensure!(got == ["fd77::2:81"], "{got:?}");
    let got = seen(
        &["-p", &me, "--daddr", "!fd77::2,10.0.0.0/30"],
        end,
        mark,
        all,
    )?;
    ensure!(got == ["10.77.0.2:80"], "{got:?}");
    Ok(())
}

fn process() -> Result<()> {
    let (net, v4, v6) = net()?;
    let last = net.server.tcp_listen(net.server.v4(9000))?;
    let mark = "10.77.0.2:9000";
    let me = me();
    // A user of its own, from a process of its own; then this process.
    let two = || -> Result<()> {
        nc(&net.client, v4.address(), |c| {
            c.uid(1234);
        })?;
        connect(&net.client, v6.address())?;
        Ok(())
    };
    let by_me = || connect(&net.client, last.address()).map(drop);
    let by_nc = || {
        nc(&net.client, last.address(), |c| {
            c.uid(1234);
        })
        .map(drop)
    };
    for (args, mine) in [
        (&["-p", &me][..], true),
        (&["-p", &format!("!{me}")], false),
        (&["-u", "1234"], false),
        (&["-u", "!1234"], true),
        (&["--comm", "nc"], false),
        (&["--comm", "!nc"], true),
    ] {
        let mut args = args.to_vec();
        // Nothing else of this machine.
        let inode = format!("inode:{}", net.client.inode()?);
        args.extend(["--netns", &inode]);
        let (got, expected) = if mine {
            (seen(&args, by_me, mark, two)?, "fd77::2:81")
        } else {
            (seen(&args, by_nc, mark, two)?, "10.77.0.2:80")
        };
        ensure!(got == [expected], "{args:?}: {got:?}");
    }
    Ok(())
}

fn netns() -> Result<()> {
    let (net, v4, _v6) = net()?;
    let other = Netns::new("other")?;
    let there = other.tcp_listen("127.0.0.1:80".parse()?)?;
    let both = || -> Result<()> {
        connect(&net.client, v4.address())?;
        connect(&other, there.address())?;
        Ok(())
    };
    let last = net.server.tcp_listen(net.server.v4(9000))?;
    let end = || connect(&net.client, last.address()).map(drop);
    let me = me();
    let name = net.client.name();
    let got = seen(&["-p", &me, "--netns", name], end, "10.77.0.2:9000", both)?;
    ensure!(got == ["10.77.0.2:80"], "{got:?}");
    let there_too = other.tcp_listen("127.0.0.1:9000".parse()?)?;
    let end = || connect(&other, there_too.address()).map(drop);
    let not = format!("!{name}");
    let got = seen(&["-p", &me, "--netns", &not], end, "127.0.0.1:9000", both)?;
    ensure!(got == ["127.0.0.1:80"], "{got:?}");
    Ok(())
}

/// A cgroup (v2) of the test's own.
struct Group(std::path::PathBuf);

impl Group {
    fn new(name: &str) -> Result<Self> {
        let path = std::path::Path::new("/sys/fs/cgroup").join(name);
        std::fs::create_dir_all(&path)
            .with_context(|| format!("failed to make {}", path.display()))?;
        Ok(Self(path))
    }

    /// Makes `command` start inside.
    fn put(&self, command: &mut Command) {
        let file = self.0.join("cgroup.procs");
        // SAFETY: the child writes one file before exec; no lock of this process is taken (the path is ready).
        unsafe {
            command.pre_exec(move || std::fs::write(&file, "0"));
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Empty once its processes have been reaped.
        let gone = wait_for("the cgroup to go", || {
            Ok(std::fs::remove_dir(&self.0).is_ok().then_some(()))
        });
        if let Err(error) = gone {
            eprintln!("live: {error:?}");
        }
    }
}

fn cgroup() -> Result<()> {
    let (net, v4, v6) = net()?;
    let outer = Group::new(&format!("npt-{}", std::process::id()))?;
    let inner = Group::new(&format!("npt-{}/inner", std::process::id()))?;
    let both = || -> Result<()> {
        nc(&net.client, v4.address(), |c| inner.put(c))?;
        connect(&net.client, v6.address())?;
        Ok(())
    };
    let last = net.server.tcp_listen(net.server.v4(9000))?;
    let mark = "10.77.0.2:9000";
    let ns = format!("inode:{}", net.client.inode()?);
    let path = outer.0.to_str().context("path")?.to_owned();
    let end = || nc(&net.client, last.address(), |c| outer.put(c)).map(drop);
    let got = seen(&["--netns", &ns, "--cgroup", &path], end, mark, both)?;
    ensure!(got == ["10.77.0.2:80"], "{got:?}");
    let end = || connect(&net.client, last.address()).map(drop);
    let not = format!("!{}", path.trim_start_matches("/sys/fs/cgroup"));
    let got = seen(&["--netns", &ns, "--cgroup", &not], end, mark, both)?;
    ensure!(got == ["fd77::2:81"], "{got:?}");

    let run = Netprobe::new("tcpconnect")
        .args(["--netns", &ns, "--cgroup-name"])
        .start()?;
    nc(&net.client, v4.address(), |c| inner.put(c))?;
    let line = run.wait_line("10.77.0.2")?;
    let shown = inner.0.to_str().context("path")?;
    ensure!(
        line.trim_end()
            .ends_with(shown.trim_start_matches("/sys/fs/cgroup")),
        "{line}"
    );
    run.stop()?.expect_success()
}

/// A map pinned by bpftool, removed at the end.
struct PinnedMap(String);

impl PinnedMap {
    fn new(name: &str, value_size: usize, keys: &[u64]) -> Result<Self> {
        let path = format!("/sys/fs/bpf/npt-{}-{name}", std::process::id());
        let bytes = |b: &[u8]| {
            b.iter()
                .map(|b| format!("{b}"))
                .collect::<Vec<_>>()
                .join(" ")
        };
        let run = |words: &str| -> Result<()> {
            let out = Command::new("bpftool")
                .args(words.split_whitespace())
                .output()?;
            ensure!(
                out.status.success(),
                "bpftool {words}: {}{}",
                String::from_utf8_lossy(&out.stdout),
                String::from_utf8_lossy(&out.stderr)
            );
            Ok(())
        };
        run(&format!(
            "map create {path} type hash key 8 value {value_size} entries 64 name {name}"
        ))?;
        let map = Self(path);
        for key in keys {
            run(&format!(
                "map update pinned {} key {} value {}",
                map.0,
                bytes(&key.to_ne_bytes()),
                bytes(&vec![1; value_size])
            ))?;
        }
        Ok(map)
    }
}

impl Drop for PinnedMap {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            eprintln!("live: {}: {error}", self.0);
        }
    }
}

fn maps() -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let (net, v4, v6) = net()?;
    let group = Group::new(&format!("npt-maps-{}", std::process::id()))?;
    let cgroups = PinnedMap::new("cg", 8, &[std::fs::metadata(&group.0)?.ino()])?;
    let mine = std::fs::metadata("/proc/self/ns/mnt")?.ino();
    let mounts = PinnedMap::new("mnt", 4, &[mine])?;
    let wrong = PinnedMap::new("wrong", 4, &[])?;
    let ns = format!("inode:{}", net.client.inode()?);
    let last = net.server.tcp_listen(net.server.v4(9000))?;
    let mark = "10.77.0.2:9000";
    let inside = |to| nc(&net.client, to, |c| group.put(c)).map(drop);
    let unshared = |to: SocketAddr| -> Result<()> {
        let mut command = Command::new("unshare");
        command.args(["-m", "nc", &to.ip().to_string(), &to.port().to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        net.client.enter(|| command.status())??;
        Ok(())
    };

    let both = || inside(v4.address()).and_then(|()| connect(&net.client, v6.address()).map(drop));
    let end = || inside(last.address());
    let got = seen(
        &["--netns", &ns, "--cgroupmap", &cgroups.0],
        end,
        mark,
        both,
    )?;
    ensure!(got == ["10.77.0.2:80"], "{got:?}");

    let both =
        || unshared(v4.address()).and_then(|()| connect(&net.client, v6.address()).map(drop));
    let end = || connect(&net.client, last.address()).map(drop);
    let got = seen(&["--netns", &ns, "--mntnsmap", &mounts.0], end, mark, both)?;
    ensure!(got == ["fd77::2:81"], "{got:?}");

    // Both: in the cgroup and in the mount namespace.
    let all = || {
        inside(v4.address())?;
        unshared(v4.address())?;
        connect(&net.client, v6.address()).map(drop)
    };
    let args = [
        "--netns",
        &ns,
        "--mntnsmap",
        &mounts.0,
        "--cgroupmap",
        &cgroups.0,
    ];
    let got = seen(&args, || inside(last.address()), mark, all)?;
    ensure!(got == ["10.77.0.2:80"], "{got:?}");

    let done = Netprobe::new("tcpconnect")
        .args(["--cgroupmap", &wrong.0])
        .run()?;
    done.expect_code(2)?;
    done.expect_stderr("values of 4 bytes")
}

fn count() -> Result<()> {
    let (net, v4, v6) = net()?;
    let run = Netprobe::new("tcpconnect")
        .args(["-c", "-p", &me()])
        .start()?;
    for _ in 0..3 {
        connect(&net.client, v6.address())?;
    }
    for _ in 0..5 {
        connect(&net.client, v4.address())?;
    }
    let done = run.stop()?;
    done.expect_success()?;
    let lines: Vec<Vec<&str>> = done
        .stdout
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    let expected = [
        vec!["LADDR", "RADDR", "RPORT", "CONNECTS"],
        vec!["10.77.0.1", "10.77.0.2", "80", "5"],
        vec!["fd77::1", "fd77::2", "81", "3"],
    ];
    ensure!(lines == expected, "{done}");

    let run = Netprobe::new("tcpconnect")
        .args(["-c", "-L", "-p", &me(), "--output-json"])
        .start()?;
    let a = connect(&net.client, v4.address())?;
    let b = connect(&net.client, v4.address())?;
    let done = run.stop()?;
    done.expect_success()?;
    let rows = done.json_of("count")?;
    let mut got: Vec<Value> = rows.iter().map(|r| r["lport"].clone()).collect();
    let mut ports: Vec<Value> = Vec::new();
    for s in [a, b] {
        ports.push(s.local_addr()?.port().into());
    }
    got.sort_by_key(Value::as_u64);
    ports.sort_by_key(Value::as_u64);
    ensure!(got == ports, "{done}");
    Ok(())
}

fn count_live() -> Result<()> {
    let (net, v4, v6) = net()?;
    let run = Netprobe::new("tcpconnect")
        .args(["-c", "-i", "1", "--top", "1", "-p", &me()])
        .start()?;
    connect(&net.client, v4.address())?;
    connect(&net.client, v4.address())?;
    connect(&net.client, v6.address())?;
    run.wait_lines("a table while it runs", |t| {
        t.lines()
            .any(|l| {
                l.split_whitespace()
                    .eq(["10.77.0.1", "10.77.0.2", "80", "2"])
            })
            .then_some(())
    })?;
    let done = run.stop()?;
    done.expect_success()?;
    ensure!(!done.stdout.contains("fd77"), "--top 1: {done}");
    Ok(())
}

fn count_full() -> Result<()> {
    let (net, v4, v6) = net()?;
    let run = Netprobe::new("tcpconnect")
        .args(["-c", "--max-flows", "1", "-p", &me()])
        .start()?;
    connect(&net.client, v4.address())?;
    connect(&net.client, v6.address())?;
    connect(&net.client, v4.address())?;
    let done = run.stop()?;
    done.expect_success()?;
    ensure!(done.lines_with("10.77.0.2").len() == 1, "{done}");
    done.expect_stderr("1 insertions into a full map refused")
}

fn threads() -> Result<()> {
    const THREADS: usize = 100;
    let (net, v4, _v6) = net()?;
    let run = Netprobe::new("tcpconnect")
        .args(["-L", "-p", &me()])
        .start()?;
    let mut ports = net.client.enter(|| {
        std::thread::scope(|scope| {
            let to = v4.address();
            let threads: Vec<_> = (0..THREADS)
                .map(|_| scope.spawn(move || TcpStream::connect(to)?.local_addr()))
                .collect();
            threads
                .into_iter()
                .map(|t| Ok(t.join().map_err(|_| io::Error::other("panic"))??.port()))
                .collect::<io::Result<Vec<u16>>>()
        })
    })??;
    let done = stop_after(run, THREADS)?;
    let mut got: Vec<u16> = rows(&done)
        .iter()
        .map(|w| w[4].parse())
        .collect::<Result<_, _>>()?;
    got.sort_unstable();
    ports.sort_unstable();
    ensure!(got == ports, "{done}");
    ensure!(!done.stderr.contains("missed"), "{done}");
    Ok(())
}

/// Stops it when it has printed this many rows.
fn stop_after(run: Running, count: usize) -> Result<Finished> {
    run.wait_lines(&format!("{count} rows"), |t| {
        (t.lines().count() > count).then_some(())
    })?;
    let done = run.stop()?;
    done.expect_success()?;
    Ok(done)
}

fn limit() -> Result<()> {
    let (net, v4, v6) = net()?;
    let file = tempfile::NamedTempFile::new()?;
    let path = file.path().to_str().context("path")?;
    let run = Netprobe::new("tcpconnect")
        .args([
            "--output-file",
            path,
            "--output-limit-lines",
            "2",
            "-p",
            &me(),
            // Events come by ring buffers in the same way.
            "--transport",
            "ringbuf",
        ])
        .start()?;
    for _ in 0..2 {
        connect(&net.client, v4.address())?;
        connect(&net.client, v6.address())?;
    }
    let done = run.wait()?;
    done.expect_success()?;
    ensure!(done.stdout.is_empty(), "{done}");
    let text = std::fs::read_to_string(path)?;
    ensure!(text.lines().count() == 3, "{text}");
    Ok(())
}

/// Wrong usage ends with 2 and names what was wrong, without any privilege.
fn usage() -> Result<()> {
    for (args, named) in [
        (&["-P", "80,http"][..], "http"),
        (&["-p", "x"], "x"),
        (&["--daddr", "10.0.0.0/40"], "10.0.0.0/40"),
        (&["-c", "-d"], "--dns"),
        (&["-4", "-6"], "--ipv6"),
    ] {
        let done = Netprobe::new("tcpconnect").args(args).run()?;
        done.expect_code(2)?;
        done.expect_stderr(named)?;
    }
    Ok(())
}
