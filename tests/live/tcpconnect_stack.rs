//! `netprobe tcpconnect --output-stack`: who called connect.

use std::os::fd::AsRawFd;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::tcpconnect_outcome::socket;
use crate::common::{Case, Netns, Netprobe, case};

pub fn cases() -> Vec<Case> {
    vec![case("tcpconnect_stack", stack).trace().limit(400)]
}

/// The function that the stacks must name: it calls connect itself.
#[inline(never)]
pub fn the_caller_of_connect(fd: i32, port: u16) -> i32 {
    let address = libc::sockaddr_in {
        sin_family: libc::AF_INET as u16,
        sin_port: port.to_be(),
        sin_addr: libc::in_addr {
            s_addr: u32::from_ne_bytes([127, 0, 0, 1]),
        },
        sin_zero: [0; 8],
    };
    // SAFETY: the address is valid for the call, and its length is given.
    let result = unsafe {
        libc::connect(
            fd,
            (&raw const address).cast(),
            size_of::<libc::sockaddr_in>() as u32,
        )
    };
    // Something to do behind the call, so that it is no jump.
    std::hint::black_box(result)
}

fn stack() -> Result<()> {
    let net = Netns::new("stack")?;
    let run = Netprobe::new("tcpconnect")
        .args(["--output-stack", "--output-json", "-P", "7001,7002"])
        .args(["--netns", net.name()])
        .start()?;
    let open = || socket(libc::AF_INET, libc::SOCK_STREAM, 0);
    let here = net.enter(open)??;
    the_caller_of_connect(here.as_raw_fd(), 7001);
    let first = run.wait_line("\"dport\":7001,")?;
    // A process that has gone before netprobe can look at it.
    let there = net.enter(open)??;
    run.signal(Signal::SIGSTOP)?;
    // SAFETY: the child makes one system call and ends; it takes no lock and allocates nothing.
    match unsafe { libc::fork() } {
        0 => {
            the_caller_of_connect(there.as_raw_fd(), 7002);
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(0) }
        }
        pid => {
            let mut status = 0;
            // SAFETY: a child of ours; status is valid for the call.
            unsafe { libc::waitpid(pid, &mut status, 0) };
        }
    }
    run.signal(Signal::SIGCONT)?;
    let second = run.wait_line("\"dport\":7002,")?;
    run.stop()?.expect_success()?;
    for line in [first, second] {
        let row: Value = serde_json::from_str(&line)?;
        let names = |key: &str| -> Vec<String> {
            row[key]
                .as_array()
                .into_iter()
                .flatten()
                .map(|f| f["name"].as_str().unwrap_or("?").to_owned())
                .collect()
        };
        ensure!(
            names("kernel_stack").iter().any(|n| n.contains("connect")),
            "{row:#}"
        );
        // It begins with the kernel's own functions: none of ours is on top.
        ensure!(
            !names("kernel_stack")
                .iter()
                .any(|n| n == "?" || n.starts_with("bpf_") || n.contains("rethook")),
            "{row:#}"
        );
        let frames = row["user_stack"].as_array().context("no user stack")?;
        let caller = frames
            .iter()
            .find(|f| {
                f["name"]
                    .as_str()
                    .is_some_and(|n| n.contains("the_caller_of_connect"))
            })
            .with_context(|| format!("the caller is not named: {row:#}"))?;
        ensure!(
            caller["file"]
                .as_str()
                .is_some_and(|f| f.ends_with("tcpconnect_stack.rs")),
            "{row:#}"
        );
        ensure!(caller["line"].is_u64(), "{row:#}");
    }
    Ok(())
}
