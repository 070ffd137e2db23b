//! `netprobe record --flight`: a file at each trigger, with what came before it.

use std::fs;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrStorage};

use crate::common::{Case, Netprobe, Pair, Running, case, deadline, wait_for};

pub fn cases() -> Vec<Case> {
    vec![case("record_flight", flight).once_on("6.12").trace()]
}

/// Functions that a packet to a neighbour passes.
const FUNCTIONS: &str = "ip_output|__dev_queue_xmit|ip_rcv|kfree_skb.*|sk_skb_reason_drop";

fn armed(file: &Path, triggers: &[&str], flags: &[&str]) -> Result<Running> {
    let mut probe = Netprobe::new("record")
        .arg("-o")
        .arg(file)
        .args(["--filter-func", FUNCTIONS, "--flight", "20s"])
        .args(["--flight-memory", "16"])
        .args(flags);
    for trigger in triggers {
        probe = probe.args(["--trigger", trigger]);
    }
    probe.start()
}

/// The file that this trigger made, once it is complete.
fn file_of(probe: &Running, trigger: &str) -> Result<PathBuf> {
    let found = wait_for(&format!("the file of {trigger}"), || {
        let said = probe.stderr();
        let mut lines = said.lines().filter(|l| l.contains(" s before and "));
        Ok(lines.find(|l| l.contains(trigger)).map(str::to_owned))
    });
    let line = found.with_context(|| probe.stderr())?;
    let name = line.strip_prefix("netprobe: ");
    let name = name
        .and_then(|l| l.split_once(": "))
        .context(line.clone())?;
    Ok(PathBuf::from(name.0))
}

fn text(file: &Path) -> Result<String> {
    let done = Netprobe::new("report").arg(file).run()?;
    done.expect_success()?;
    ensure!(!done.stderr.contains("damaged"), "{done}");
    done.expect_stderr("flight recorder: ")?;
    Ok(done.stdout)
}

fn has_reasons() -> Result<bool> {
    Ok(!nix::sys::utsname::uname()?
        .release()
        .to_string_lossy()
        .starts_with("5.10"))
}

fn flight() -> Result<()> {
    let net = Pair::new()?;
    // ARP takes time, too.
    net.fix_neighbours()?;
    let folder = tempfile::tempdir()?;
    let drop = match has_reasons()? {
        true => "drop:NEIGH_FAILED",
        false => "drop",
    };
    let lines_of_udp = folder.path().join("lines");
    let to_lines = lines_of_udp.to_string_lossy();
    let flags = [
        "--after",
        "100ms",
        "--filter-proto",
        "udp",
        "--output-file",
        &to_lines,
    ];
    let udp = armed(&folder.path().join("udp.pcapng"), &[drop], &flags)?;
    let tcp_files = folder.path().join("tcp.pcapng");
    let flags = ["--after", "1ms", "--min-interval", "0s", "--keep", "2"];
    let triggers = ["retransmit", "connect-slower:500ms", "rst", "SIGUSR1"];
    let tcp = armed(&tcp_files, &triggers, &[&flags[..], &["tcp"]].concat())?;
    // Nobody answers for this address; the kernel is to notice that soon.
    net.client
        .sysctl("net/ipv4/neigh/veth0/retrans_time_ms", "50")?;
    let nobody = "10.77.0.99:9".parse()?;
    net.client.udp_send(nobody, b"lost")?;
    let lines = text(&file_of(&udp, drop)?)?;
    let find = |function: &str| {
        let mut lines = lines.lines().enumerate();
        lines.find(|(_, l)| l.contains(function) && l.contains("->10.77.0.99:9(udp)"))
    };
    let (sent, dropped) = (find("ip_output"), find("kfree_skb"));
    let dropped = dropped.or(find("sk_skb_reason_drop"));
    ensure!(
        sent.context("not sent")?.0 < dropped.context("not dropped")?.0,
        "{lines}"
    );
    // Another one, within the interval.
    net.client.udp_send(nobody, b"lost")?;

    // A port that nobody listens at.
    let refused = net.client.tcp_connect(net.server.v4(9), deadline())?;
    ensure!(refused.is_err());
    let reset = text(&file_of(&tcp, "rst 10.77.0.2:9->")?)?;
    ensure!(reset.contains("->10.77.0.2:9(tcp)"), "{reset}");
    // A neighbour that the other end is not.
    net.client
        .ip("neigh replace 10.77.0.98 lladdr 02:00:00:00:00:98 dev veth0 nud permanent")?;
    let hidden = net
        .client
        .enter(|| begin_connect("10.77.0.98:80".parse()?))??;
    let slow = text(&file_of(&tcp, "connect-slower:500ms")?)?;
    ensure!(slow.contains("->10.77.0.98:80(tcp)"), "{slow}");
    let again = text(&file_of(&tcp, "retransmit:1 10.77.0.1:")?)?;
    ensure!(again.matches("ip_output").count() >= 2, "{again}");
    tcp.signal(Signal::SIGUSR1)?;
    file_of(&tcp, "SIGUSR1")?;
    std::mem::drop(hidden);

    let done = tcp.stop()?;
    done.expect_success()?;
    let mut left = Vec::new();
    for entry in fs::read_dir(folder.path())? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        left.extend(name.starts_with("tcp-").then_some(name));
    }
    ensure!(left.len() == 2 && !tcp_files.exists(), "{left:?}\n{done}");
    wait_for("the second drop", || {
        let drops = |l: &&str| l.contains("kfree_skb") || l.contains("sk_skb_reason_drop");
        let live = fs::read_to_string(&lines_of_udp)?;
        Ok((live.lines().filter(drops).count() >= 2).then_some(()))
    })?;
    let done = udp.stop()?;
    done.expect_success()?;
    done.expect_stderr("1 more triggers made no file")?;
    Ok(())
}

/// A connect that does not wait for its end.
fn begin_connect(to: SocketAddr) -> Result<OwnedFd> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket::socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
    match socket::connect(socket.as_raw_fd(), &SockaddrStorage::from(to)) {
        Err(Errno::EINPROGRESS) => Ok(socket),
        other => bail!("connect: {other:?}"),
    }
}
