//! Network namespaces of the tests' own, and pairs of them. It knows Linux and iproute2, nothing of netprobe.

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, setns};

use super::wait_for;

/// A named namespace (under /run/netns, so that `ip -n NAME` and `--filter-netns` find it), deleted on drop.
pub struct Netns {
    name: String,
    file: File,
    pub v4: Ipv4Addr,
    v6: Ipv6Addr,
}

impl Netns {
    /// A new namespace with its loopback up. `tag` becomes part of its name.
    pub fn new(tag: &str) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("npt-{}-{number}-{tag}", std::process::id());
        output(Command::new("ip").args(["netns", "add", &name]))?;
        let path = format!("/run/netns/{name}");
        let file = File::open(&path).with_context(|| format!("failed to open {path}"))?;
        let netns = Self {
            name,
            file,
            v4: Ipv4Addr::LOCALHOST,
            v6: Ipv6Addr::LOCALHOST,
        };
        // No duplicate address detection and no router solicitations: nothing but the test's own traffic, at once.
        for (key, value) in [
            ("default/accept_dad", "0"),
            ("default/router_solicitations", "0"),
        ] {
            netns.sysctl(&format!("net/ipv6/conf/{key}"), value)?;
        }
        netns.ip("link set dev lo up")?;
        Ok(netns)
    }

    /// Its name under /run/netns.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its file, as `--filter-netns` takes it.
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// Its inode number, as netprobe prints it.
    pub fn inode(&self) -> Result<u64> {
        Ok(self.file.metadata()?.ino())
    }

    /// Its IPv4 address with a port (loopback unless it belongs to a [`Pair`]).
    pub fn v4(&self, port: u16) -> SocketAddr {
        SocketAddr::from((self.v4, port))
    }

    /// Its IPv6 address with a port (loopback unless it belongs to a [`Pair`]).
    pub fn v6(&self, port: u16) -> SocketAddr {
        SocketAddr::from((self.v6, port))
    }

    /// Runs a closure in a thread inside the namespace. Sockets and processes made there belong to it for good.
    pub fn enter<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&self.file, CloneFlags::CLONE_NEWNET)?;
                Ok(inside())
            });
            match thread.join() {
                Ok(result) => result.map_err(|error: nix::Error| {
                    anyhow::anyhow!("failed to enter {}: {error}", self.name)
                }),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// A command, its words split at blanks, inside the namespace; an error unless it exits with 0. Its stdout.
    pub fn cmd(&self, line: &str) -> Result<String> {
        let mut words = line.split_whitespace();
        let program = words.next().context("empty command")?;
        self.output(Command::new(program).args(words))
    }

    /// `ip` with these arguments inside the namespace, as [`Netns::cmd`].
    pub fn ip(&self, line: &str) -> Result<String> {
        self.cmd(&format!("ip {line}"))
    }

    /// nft's rules from a text, inside the namespace.
    pub fn nft(&self, rules: &str) -> Result<String> {
        self.output(Command::new("nft").arg(rules))
    }

    /// Runs a prepared command inside the namespace; an error unless it exits with 0. Its stdout.
    pub fn output(&self, command: &mut Command) -> Result<String> {
        let text = self.enter(|| output(command))??;
        Ok(text)
    }

    /// Sets a network sysctl of this namespace, its name with slashes (`net/ipv4/ip_forward`).
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/{key}");
        self.enter(|| fs::write(&path, value))?
            .with_context(|| format!("failed to write {value} to {path}"))
    }

    /// The index of an interface of this namespace.
    pub fn ifindex(&self, interface: &str) -> Result<u32> {
        let index = self.enter(|| nix::net::if_::if_nametoindex(interface))?;
        index.with_context(|| format!("no interface {interface} in {}", self.name))
    }

    /// The MAC address of an interface of this namespace.
    pub fn mac(&self, interface: &str) -> Result<String> {
        let text = self.ip(&format!("-o link show dev {interface}"))?;
        let mac = text
            .split_whitespace()
            .skip_while(|word| *word != "link/ether")
            .nth(1);
        Ok(mac
            .with_context(|| format!("no MAC address in {text:?}"))?
            .to_owned())
    }

    /// Waits until an interface has its carrier and is in use.
    pub fn wait_up(&self, interface: &str) -> Result<()> {
        wait_for(&format!("{interface} to come up"), || {
            let text = self.ip(&format!("-o link show dev {interface}"))?;
            Ok(text.contains("LOWER_UP").then_some(()))
        })
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        // Interfaces inside go with it; a veth's other end too.
        if let Err(error) = output(Command::new("ip").args(["netns", "del", &self.name])) {
            eprintln!("live: {error:?}");
        }
    }
}

/// Two namespaces joined by a veth pair: `client` has `veth0` with 10.77.0.1 and fd77::1, `server` has `veth0` with
/// 10.77.0.2 and fd77::2. Both are up, neighbours are resolved as usual.
pub struct Pair {
    // Dropped in this order: the one made last goes first.
    pub server: Netns,
    pub client: Netns,
}

impl Pair {
    /// The interface's name at both ends.
    pub const IFACE: &'static str = "veth0";

    pub fn new() -> Result<Self> {
        let mut client = Netns::new("client")?;
        let mut server = Netns::new("server")?;
        client.ip(&format!(
            "link add veth0 type veth peer name veth0 netns {}",
            server.name()
        ))?;
        for (netns, host) in [(&mut client, 1), (&mut server, 2)] {
            netns.v4 = Ipv4Addr::new(10, 77, 0, host);
            netns.v6 = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, host.into());
            netns.ip(&format!("addr add {}/24 dev veth0", netns.v4))?;
            netns.ip(&format!("addr add {}/64 dev veth0 nodad", netns.v6))?;
            netns.ip("link set dev veth0 up")?;
        }
        client.wait_up("veth0")?;
        server.wait_up("veth0")?;
        Ok(Self { server, client })
    }

    /// Fixed neighbour entries at both ends: no ARP and no neighbour discovery gets in between.
    pub fn fix_neighbours(&self) -> Result<()> {
        for (here, there) in [(&self.client, &self.server), (&self.server, &self.client)] {
            let mac = there.mac(Self::IFACE)?;
            for address in [IpAddr::from(there.v4), IpAddr::from(there.v6)] {
                here.ip(&format!(
                    "neigh replace {address} lladdr {mac} dev veth0 nud permanent"
                ))?;
            }
        }
        Ok(())
    }
}

/// Runs a command to its end; an error with its stderr unless it exits with 0. Its stdout.
fn output(command: &mut Command) -> Result<String> {
    let Output {
        status,
        stdout,
        stderr,
    } = command
        .output()
        .with_context(|| format!("failed to run {command:?}"))?;
    if !status.success() {
        bail!(
            "{command:?}: {status}: {}",
            String::from_utf8_lossy(&stderr).trim_end()
        );
    }
    String::from_utf8(stdout).context("output is not UTF-8")
}
