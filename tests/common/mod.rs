//! What the live tests share. It knows the tool's command line and Linux, and none of the crate's modules.
//!
//! A test case is a function `fn() -> anyhow::Result<()>` and a line that names it and says what it needs:
//!
//! ```ignore
//! pub fn cases() -> Vec<Case> {
//!     vec![
//!         case("skb_drop_v4", drop_v4).trace().program("iptables"),
//!         case("skb_multi", multi).trace().kprobe_multi(),
//!         case("xdpdump_native", native).xdp().kernel(5, 18),
//!     ]
//! }
//!
//! fn drop_v4() -> Result<()> {
//!     let net = Pair::new()?;                       // two namespaces, one veth pair, v4 and v6 addresses
//!     net.client.ip("link set dev lo mtu 1400")?;   // `ip` inside the namespace
//!     net.client.cmd("iptables -I OUTPUT 1 -p tcp --dst 10.77.0.2/32 -j DROP")?;
//!     let probe = Netprobe::new("skb")
//!         .args(["--filter-dst-ip", "10.77.0.2", "--filter-proto", "tcp"])
//!         .netns(&net.client)
//!         .start()?;                                // returns when the ready file is there
//!     let _ = net.client.tcp_connect(net.server.v4(80), SHORT);
//!     probe.wait_line("kfree_skb")?;                // a signal, not a pause
//!     let done = probe.stop()?;                     // SIGINT, everything printed, exit status
//!     done.expect_success()?;
//!     ensure!(done.stdout.contains("10.77.0.2:80"), "no tuple:\n{done}");
//!     Ok(())
//! }
//! ```
//!
//! - [`case`], [`Case`]: names, needs, time limits; [`run`] turns them into libtest's lines. A case that
//!   cannot run here is *ignored* with the reason printed, never passed.
//! - [`Netns`], [`Pair`]: namespaces of our own, removed when dropped (last made, first removed).
//! - [`Netprobe`], [`Running`], [`Finished`]: the program under test.
//! - traffic: methods of [`Netns`] (`tcp_listen`, `tcp_connect`, `udp_send`, `ping`, ...); `Netns::enter`
//!   runs any closure inside.
//! - [`Env`]: what this machine can do, found out without asking netprobe.
//!
//! Nothing here waits for time: only for a file, a line, a link's state or a child's end, each with a deadline
//! ([`deadline`]; longer under emulation).

// Each test binary uses its own part of this.
#![allow(dead_code, unused_imports)]

pub mod caps;
mod case;
mod env;
mod netns;
mod probe;
mod schema;
mod traffic;

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

pub use case::{Case, case, run, which};
pub use env::{Env, mount_bpffs};
pub use netns::{Netns, Pair};
pub use probe::{Finished, Netprobe, Running, binary};
pub use traffic::{TcpServer, refuse_all, send_frame};

/// A connect that is meant to get no answer gives up after this long.
pub const SHORT: Duration = Duration::from_millis(300);

/// The longest wait for one thing that must happen. Generous: only a failing test ever waits so long.
pub fn deadline() -> Duration {
    let seconds = std::env::var("NETPROBE_LIVE_DEADLINE")
        .ok()
        .and_then(|s| s.parse().ok());
    Duration::from_secs(seconds.unwrap_or(60))
}

/// Looks again and again until `look` gives something; after [`deadline`] an error that names `what`.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if start.elapsed() > deadline() {
            bail!("waited {:?} for {what}", deadline());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
