//! `netprobe extcap`: netprobe as an interface of tshark, and what it writes into Wireshark's pipe.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::stat::Mode;

use crate::common::{Case, Finished, Netprobe, Pair, binary, case, wait_for};
use crate::xdp::{IFACE, PORT, flood, quiet_pair};

pub fn cases() -> Vec<Case> {
    vec![
        case("extcap_xdp_in_tshark", in_tshark)
            .once_on("6.12")
            .xdp()
            .program("tshark")
            .program("unshare"),
        case("extcap_drops_and_skb", drops_and_skb)
            .once_on("6.12")
            .trace(),
    ]
}

/// tshark lists the interfaces, and captures at one of them with a capture filter and an option of its dialog.
fn in_tshark() -> Result<()> {
    let net = quiet_pair()?;
    let dir = tempfile::tempdir()?;
    symlink(binary(), dir.path().join("netprobe-extcap"))?;
    let folders = Command::new("tshark").args(["-G", "folders"]).output()?;
    let folders = String::from_utf8_lossy(&folders.stdout).into_owned();
    let folder = folders.lines().find_map(|line| {
        let path = line.strip_prefix("Extcap path:")?;
        Some(path.trim().to_owned())
    });
    let folder = folder.with_context(|| format!("no extcap folder in {folders}"))?;
    // The link stands in tshark's own folder for this one process alone.
    let tshark = |words: &str| -> Result<Command> {
        let script = format!(
            "mount --bind {} {folder} && exec tshark {words}",
            dir.path().display()
        );
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-c", &script]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(command)
    };
    let listed = net
        .server
        .enter(|| tshark("-D")?.output().context("tshark"))??;
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    for name in [
        "netprobe: drops".to_owned(),
        "netprobe: skb".to_owned(),
        format!("netprobe: XDP on {IFACE}"),
    ] {
        ensure!(listed.contains(&name), "{name} in {listed}");
    }
    let mut capture = tshark(&format!(
        "-n -i netprobe-xdp-{IFACE} -f 'udp port {PORT}' -o extcap.netprobe_xdp_{IFACE}.snaplen:64 -c 3 \
         -T fields -e frame.interface_name -e udp.dstport -e frame.len -e frame.cap_len"
    ))?;
    let mut capture = net.server.enter(move || capture.spawn())??;
    // tshark says nothing when its interface is attached: packets come until it has three.
    let seen = wait_for("three packets in tshark", || {
        flood(&net, PORT + 1, 1, 200)?;
        flood(&net, PORT, 1, 200)?;
        Ok(capture.try_wait()?.map(|_| ()))
    });
    if seen.is_err() {
        capture.kill()?;
    }
    let done = capture.wait_with_output()?;
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    ensure!(done.status.success(), "{said}");
    ensure!(!said.contains("rror"), "{said}");
    seen?;
    let rows = String::from_utf8(done.stdout)?;
    let row = format!("{IFACE}\t{PORT}\t242\t64\n");
    ensure!(rows == row.repeat(3), "{rows}");
    Ok(())
}

/// Drops and functions in a capture, without a word on stderr but of loss; it ends with a signal, or when the pipe's reader goes.
fn drops_and_skb() -> Result<()> {
    let net = Pair::new()?;
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("drops.pcapng");
    let extcap = |interface: &str| {
        Netprobe::new("extcap")
            .args(["--extcap-interface", interface, "--capture"])
            .args(["--extcap-capture-filter", "udp port 9", "--fifo"])
    };
    // Only what the kernel skipped of the probes' hits may be told, and another run is to be whole.
    let mut attempts = 5;
    loop {
        attempts -= 1;
        let run = extcap("netprobe-drops").arg(&file).start()?;
        for _ in 0..5 {
            net.client.udp_send(net.server.v4(9), b"nobody")?;
            net.client.udp_send(net.server.v4(10), b"of another port")?;
        }
        let done = run.stop()?;
        done.expect_success()?;
        ensure!(done.stdout.is_empty() && only_skips(&done), "{done}");
        let shown = Netprobe::new("xdpdump").arg("-r").arg(&file).run()?;
        let rows = shown.lines_with(" udp_").len() + shown.lines_with(" __udp4_").len();
        if rows == 5 && shown.lines_with(".9: UDP").len() == 5 {
            break;
        }
        ensure!(attempts > 0 && !done.stderr.is_empty(), "{done}\n{shown}");
    }

    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, Mode::S_IRWXU)?;
    let reader = fifo.clone();
    let reader = std::thread::spawn(move || -> std::io::Result<[u8; 4096]> {
        let mut head = [0; 4096];
        File::open(reader)?.read_exact(&mut head)?;
        Ok(head)
    });
    let run = extcap("netprobe-skb").arg(&fifo).args([
        "--filter-func",
        "ip_rcv|udp_rcv|kfree_skb.*|sk_skb_reason_drop",
    ]);
    let run = run.start()?;
    wait_for("a reader with enough", || {
        net.client.udp_send(net.server.v4(9), b"nobody")?;
        Ok((reader.is_finished() || run.has_ended()?).then_some(()))
    })?;
    let head = reader.join().expect("the reader ends")?;
    ensure!(head.starts_with(&[0x0a, 0x0d, 0x0d, 0x0a]), "{head:?}");
    let text = String::from_utf8_lossy(&head).into_owned();
    ensure!(text.contains("ip_rcv skb 0x"), "{text}");
    wait_for("an end without the reader", || {
        net.client.udp_send(net.server.v4(9), b"nobody")?;
        Ok(run.has_ended()?.then_some(()))
    })?;
    let done = run.wait()?;
    done.expect_success()?;
    ensure!(only_skips(&done), "{done}");
    fs::remove_file(fifo)?;
    Ok(())
}

/// Nothing is on stderr but the count of hits that the kernel skipped.
fn only_skips(done: &Finished) -> bool {
    let mut lines = done.stderr.lines();
    lines.all(|l| l.starts_with("netprobe: missed ") && l.contains("the kernel skips a probe"))
}
