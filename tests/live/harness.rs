//! The harness tests itself: namespaces, traffic and clean-up work where the tests run. It does not start netprobe.

use anyhow::{Result, ensure};

use crate::common::{Case, Netns, Pair, SHORT, case};

pub fn cases() -> Vec<Case> {
    vec![
        case("harness_namespaces_are_removed", namespaces_are_removed).once_on("5.10"),
        case("harness_traffic", traffic)
            .once_on("5.10")
            .program("ping"),
        case("harness_iptables", iptables)
            .once_on("5.10")
            .program("iptables")
            .program("ip6tables"),
        case("harness_nft", nft).once_on("5.10").program("nft"),
    ]
}

fn namespaces_are_removed() -> Result<()> {
    let netns = Netns::new("gone")?;
    let path = netns.path();
    ensure!(path.exists() && netns.inode()? > 0);
    ensure!(netns.ifindex("lo")? == 1);
    drop(netns);
    ensure!(!path.exists(), "{} is still there", path.display());
    Ok(())
}

fn traffic() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    for to in [net.server.v4(0), net.server.v6(0)] {
        let server = net.server.tcp_listen(to)?;
        net.client
            .tcp_connect(server.address(), crate::common::deadline())??;
        let socket = net.server.udp_bind(to)?;
        let port = net.client.udp_send(socket.local_addr()?, b"hello")?;
        let mut buffer = [0; 16];
        let (len, from) = socket.recv_from(&mut buffer)?;
        ensure!(&buffer[..len] == b"hello" && from.port() == port);
        ensure!(net.client.ping(to, 2)?, "no answer from {to}");
    }
    Ok(())
}

fn iptables() -> Result<()> {
    let net = Pair::new()?;
    for (tool, to) in [
        ("iptables", net.server.v4(0)),
        ("ip6tables", net.server.v6(0)),
    ] {
        let server = net.server.tcp_listen(to)?;
        net.client.cmd(&format!(
            "{tool} -t filter -I OUTPUT 1 -m tcp --proto tcp --dst {} -j DROP",
            to.ip()
        ))?;
        ensure!(
            net.client.tcp_connect(server.address(), SHORT)?.is_err(),
            "{tool} did not drop"
        );
    }
    Ok(())
}

fn nft() -> Result<()> {
    let net = Pair::new()?;
    let server = net.server.tcp_listen(net.server.v4(0))?;
    net.client.nft("add table inet t; add chain inet t out { type filter hook output priority 0; }; add rule inet t out tcp dport 1-65535 drop")?;
    ensure!(
        net.client.tcp_connect(server.address(), SHORT)?.is_err(),
        "nft did not drop"
    );
    Ok(())
}
