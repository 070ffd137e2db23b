//! `netprobe why`: faults that are provoked on purpose, each with the rule, the place and the proof that must be told; packets that are not
//! lost; the command line.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::common::{Case, Netns, Netprobe, Pair, Running, case};

pub fn cases() -> Vec<Case> {
    vec![
        case("why_firewall", firewall)
            .once_on("6.1")
            .trace()
            .program("nft")
            .kernel(5, 17),
        case("why_sockets", sockets).once_on("6.1").trace(),
        case("why_delivered", delivered)
            .old_and_new()
            .trace()
            .program("nft"),
        case("why_flags", flags).once_on("6.12").trace(),
    ]
}

/// A fault, by the port that its packet goes to.
pub struct Fault {
    port: u16,
    end: &'static str,
    /// the rule; empty: any
    rule: &'static str,
    /// one of these functions decided; none: any
    places: &'static [&'static str],
    /// what the sender was told
    told: &'static str,
    /// what is in the text of a proof
    proof: &'static str,
}

impl Fault {
    const LOST: Self = Self {
        port: 0,
        end: "lost",
        rule: "",
        places: &[],
        told: "",
        proof: "",
    };
    const REJECTED: Self = Self {
        end: "rejected",
        ..Self::LOST
    };
}

/// The rows of a run, of packets to this port.
fn row(rows: &[Value], port: u16) -> Result<&Value> {
    let of_port = |r: &&Value| r["type"] == "packet" && r["dport"] == port;
    rows.iter()
        .find(of_port)
        .with_context(|| format!("no row of port {port}"))
}

fn proofs(row: &Value) -> String {
    let proofs = row["proof"].as_array().into_iter().flatten();
    let texts: Vec<&str> = proofs.filter_map(|p| p["text"].as_str()).collect();
    texts.join("; ")
}

fn check(rows: &[Value], fault: &Fault) -> Result<()> {
    let row = row(rows, fault.port)?;
    let drop = &row["drop"];
    ensure!(
        row["end"] == fault.end,
        "port {}: not {}: {row:#}",
        fault.port,
        fault.end
    );
    ensure!(
        fault.rule.is_empty() || drop["rule"] == fault.rule,
        "port {}: not by {}: {row:#}",
        fault.port,
        fault.rule
    );
    let place = drop["place"].as_str().unwrap_or_default();
    ensure!(
        fault.places.is_empty() || fault.places.contains(&place),
        "port {}: not in {:?}: {row:#}",
        fault.port,
        fault.places
    );
    let told = drop["rejected_with"].as_str().unwrap_or_default();
    ensure!(
        told.contains(fault.told),
        "port {}: told {told:?}: {row:#}",
        fault.port
    );
    ensure!(
        proofs(row).contains(fault.proof),
        "port {}: no proof {:?}: {row:#}",
        fault.port,
        fault.proof
    );
    Ok(())
}

/// A run over all namespaces whose rows are looked at afterwards.
fn start(expression: &str) -> Result<Running> {
    Netprobe::new("why")
        .args(["--output-json", expression])
        .start()
}

/// Ends the run and checks all faults; its rows.
pub fn finish(run: Running, faults: &[Fault]) -> Result<Vec<Value>> {
    let done = run.stop()?;
    done.expect_success()?;
    let rows = done.json()?;
    for fault in faults {
        check(&rows, fault).with_context(|| format!("{done}"))?;
    }
    Ok(rows)
}

/// `client` - `server` as a pair has them, and `far` behind the server: 10.78.0.3, which the server (10.78.0.2 there) forwards to.
pub struct Line {
    pub far: Netns,
    pub net: Pair,
}

const FAR: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 3);

impl Line {
    pub fn new() -> Result<Self> {
        let net = Pair::new()?;
        net.fix_neighbours()?;
        let far = Netns::new("far")?;
        let server = &net.server;
        server.ip(&format!(
            "link add veth1 type veth peer name veth1 netns {}",
            far.name()
        ))?;
        server.ip("addr add 10.78.0.2/24 dev veth1")?;
        far.ip("addr add 10.78.0.3/24 dev veth1")?;
        server.ip("link set dev veth1 up")?;
        far.ip("link set dev veth1 up")?;
        server.wait_up("veth1")?;
        far.wait_up("veth1")?;
        for (here, there, address) in [(server, &far, "10.78.0.3"), (&far, server, "10.78.0.2")] {
            let mac = there.mac("veth1")?;
            here.ip(&format!(
                "neigh replace {address} lladdr {mac} dev veth1 nud permanent"
            ))?;
        }
        net.client.ip("route add default via 10.77.0.2")?;
        far.ip("route add default via 10.78.0.2")?;
        server.sysctl("net/ipv4/ip_forward", "1")?;
        Ok(Self { far, net })
    }

    fn far(&self, port: u16) -> SocketAddr {
        (FAR, port).into()
    }
}

/// Each hook, in a chain of a chain, by a verdict map, a set, a policy, a reject: the very rule, with its text.
fn firewall() -> Result<()> {
    let line = Line::new()?;
    let (client, server) = (&line.net.client, &line.net.server);
    client.nft(
        "table inet t { \
         chain sub { udp dport 99 drop; udp dport 11 counter drop comment \"in-sub\"; }; \
         chain out { type filter hook output priority 0; udp dport 10 counter drop; jump sub; udp dport vmap { 12 : drop }; udp dport 14 reject; udp dport 20 counter accept; }; \
         chain post { type filter hook postrouting priority 0; udp dport 15 counter drop; }; }; \
         table ip p { chain o { type filter hook output priority 1; policy drop; udp dport != 13 accept; meta l4proto != udp accept; }; }",
    )?;
    server.nft(
        "table inet s { \
         set bad { type inet_service; elements = { 18, 98 }; }; \
         chain pre { type filter hook prerouting priority -10; udp dport 16 counter drop; }; \
         chain in { type filter hook input priority 0; udp dport 17 counter drop; udp dport @bad drop; }; \
         chain forw { type filter hook forward priority 0; udp dport 19 counter drop; udp dport 21 reject with icmp admin-prohibited; }; }",
    )?;
    let run = start("udp and (host 10.77.0.1 or host 10.77.0.2)")?;
    for port in [10, 11, 12, 13, 14, 15, 16, 17, 18, 20] {
        client.udp_send(line.net.server.v4(port), b"x")?;
    }
    for port in [19, 21] {
        client.udp_send(line.far(port), b"x")?;
    }
    let by_rule = |port, proof| Fault {
        port,
        proof,
        rule: "NETFILTER_DROP",
        places: &["nft_do_chain", "nf_hook_slow"],
        ..Fault::LOST
    };
    let rejected = |port, told, proof| Fault {
        told,
        end: "rejected",
        ..by_rule(port, proof)
    };
    let rows = finish(
        run,
        &[
            by_rule(10, "udp dport 10 counter packets 1"),
            by_rule(11, "in-sub"),
            by_rule(12, "vmap"),
            by_rule(13, "policy drop"),
            rejected(14, "port unreachable", "udp dport 14 reject"),
            by_rule(15, "udp dport 15"),
            by_rule(16, "udp dport 16"),
            by_rule(17, "udp dport 17"),
            by_rule(18, "@bad drop"),
            by_rule(19, "udp dport 19"),
            rejected(21, "administratively prohibited", "udp dport 21 reject"),
        ],
    )?;
    for (port, hook, chain) in [
        (10, "OUTPUT", "out"),
        (11, "OUTPUT", "sub"),
        (15, "POSTROUTING", "post"),
        (16, "PREROUTING", "pre"),
        (17, "INPUT", "in"),
        (19, "FORWARD", "forw"),
    ] {
        let row = row(&rows, port)?;
        let drop = &row["drop"];
        ensure!(
            drop["hook"] == hook && drop["nft"]["chain"] == chain,
            "port {port}: {row:#}"
        );
        let handle = &drop["nft"]["handle"];
        let change = row["change"][0].as_str().unwrap_or_default();
        let ends = format!(" {chain} handle {handle}");
        ensure!(
            change.starts_with("nft delete rule inet ") && change.ends_with(&ends),
            "{row:#}"
        );
    }
    // What let a packet pass is known, too.
    let accepted = row(&rows, 20)?;
    let stages = accepted["stages"].as_array().context("no stages")?;
    let by = |s: &&Value| s["nft"]["chain"] == "out" || s["nft"]["chain"] == "o";
    ensure!(
        stages.iter().any(|s| by(&s)),
        "nothing let it pass: {accepted:#}"
    );
    Ok(())
}

/// Sockets: none, full ones, a filter; who answers.
fn sockets() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let (client, server) = (&net.client, &net.server);
    let full = server.udp_bind(server.v4(43))?;
    let size: libc::c_int = 2048;
    set_receive_buffer(&full, size)?;
    let taken = server.udp_bind(server.v4(44))?;
    let run = start("host 10.77.0.1")?;
    client.udp_send(server.v4(41), b"nobody listens")?;
    let refused = client.tcp_connect(server.v4(42), Duration::from_secs(5))?;
    ensure!(refused.is_err(), "somebody listens at port 42");
    for _ in 0..20 {
        client.udp_send(server.v4(43), &[0; 500])?;
    }
    client.udp_send(server.v4(44), b"x")?;
    taken.recv(&mut [0; 8])?;
    let rows = finish(
        run,
        &[
            Fault {
                port: 41,
                rule: "NO_SOCKET",
                told: "port unreachable",
                proof: "no socket is bound to UDP port 41",
                ..Fault::REJECTED
            },
            Fault {
                port: 42,
                told: "reset",
                proof: "no socket is bound to TCP port 42",
                ..Fault::REJECTED
            },
        ],
    )?;
    let rows_43: Vec<&Value> = rows.iter().filter(|r| r["dport"] == 43).collect();
    let lost = rows_43
        .iter()
        .find(|r| r["end"] == "lost")
        .context("no packet lost at a full socket")?;
    ensure!(lost["drop"]["rule"] == "SOCKET_RCVBUFF", "{lost:#}");
    let delivered = rows_43.iter().find(|r| r["end"] == "delivered");
    let count = |r: &Value| r["count"].as_u64().unwrap_or_default();
    let all = count(lost) + delivered.map_or(0, |r| count(r));
    ensure!(all == 20, "20 packets were sent: {rows_43:#?}");
    let me = std::process::id();
    let reader = lost["proof"].as_array().into_iter().flatten();
    let reader = reader
        .filter(|p| p["question"] == "reader")
        .map(|p| &p["values"]["pid"]);
    ensure!(
        reader.into_iter().any(|pid| *pid == me),
        "who reads too slowly? {lost:#}"
    );
    let row = row(&rows, 44)?;
    ensure!(
        row["end"] == "delivered" && row["receiver"]["pid"] == me,
        "{row:#}"
    );
    Ok(())
}

fn set_receive_buffer(socket: &std::net::UdpSocket, size: libc::c_int) -> Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: the option's value is an int that lives through the call.
    let status = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUF,
            (&raw const size).cast(),
            size_of_val(&size) as libc::socklen_t,
        )
    };
    ensure!(
        status == 0,
        "SO_RCVBUF: {}",
        std::io::Error::last_os_error()
    );
    Ok(())
}

/// What is not lost is called what it is: delivered, answered, translated, sent.
fn delivered() -> Result<()> {
    let line = Line::new()?;
    let (client, server) = (&line.net.client, &line.net.server);
    server.nft("table ip n { chain pre { type nat hook prerouting priority dstnat; udp dport 60 dnat to 10.78.0.3:61; }; }")?;
    let socket = line.far.udp_bind((FAR, 61).into())?;
    let listener = line.far.tcp_listen((FAR, 62).into())?;
    let run = start("net 10.0.0.0/8 and (udp or tcp or icmp)")?;
    client.udp_send(server.v4(60), b"x")?;
    socket.recv(&mut [0; 8])?;
    drop(client.tcp_connect(listener.address(), Duration::from_secs(10))??);
    ensure!(client.ping(line.far(0), 1)?, "no answer to a ping");
    let done = run.stop()?;
    done.expect_success()?;
    let rows = done.json()?;
    let translated = row(&rows, 60)?;
    ensure!(translated["end"] == "delivered", "{translated:#}");
    let stages = translated["stages"].as_array().context("no stages")?;
    let fact = |stage: &str| {
        stages
            .iter()
            .find(|s| s["stage"] == stage)
            .map(|s| s["fact"].to_string())
    };
    let change = fact("translated").context("not translated")?;
    ensure!(change.contains("10.78.0.3:61"), "{change}");
    ensure!(fact("forward").is_some(), "not forwarded: {translated:#}");
    let syn = row(&rows, 62)?;
    ensure!(
        syn["end"] == "delivered" && syn["sender"]["pid"] == std::process::id(),
        "{syn:#}"
    );
    let pings: Vec<&Value> = rows.iter().filter(|r| r["proto"] == 1).collect();
    let ends: Vec<&str> = pings.iter().filter_map(|r| r["end"].as_str()).collect();
    ensure!(
        ends.contains(&"answered") && ends.contains(&"delivered"),
        "{pings:#?}"
    );
    let lost = rows
        .iter()
        .filter(|r| r["end"] == "lost" || r["end"] == "unknown");
    let lost: Vec<&Value> = lost.collect();
    ensure!(lost.is_empty(), "{lost:#?}");
    Ok(())
}

/// --only, --min-ms, --duration, --details, --explain, --rules, --backend, --track-entries and the filters.
fn flags() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let (client, server) = (&net.client, &net.server);
    let socket = server.udp_bind(server.v4(70))?;
    let send = |port: u16| client.udp_send(server.v4(port), b"x");
    let run = Netprobe::new("why")
        .args([
            "--only",
            "lost",
            "--backend",
            "kprobe",
            "--track-entries",
            "1000",
        ])
        .args(["--filter-proto", "udp", "--filter-dst-ip", "10.77.0.2"])
        .start()?;
    send(70)?;
    socket.recv(&mut [0; 8])?;
    send(71)?;
    let done = run.stop()?;
    done.expect_success()?;
    done.expect_stdout("REJECTED")?;
    ensure!(!done.stdout.contains("DELIVERED"), "{done}");
    done.expect_stdout(
        "2 packets in 2 flows: 1 rejected (no socket listens here 1), 1 delivered.",
    )?;
    let rules = tempfile::NamedTempFile::new()?;
    std::fs::write(
        rules.path(),
        "[reason.NO_SOCKET]\nclass = \"socket\"\nwhat = \"a port scan\"\nchange = \"Nothing.\"\n\
         [[place]]\nfunctions = [\"__udp4_lib_rcv\", \"udp_rcv\"]\nclass = \"socket\"\nas = \"NO_SOCKET\"\nwhat = \"a port scan\"\n",
    )?;
    let done = Netprobe::new("why")
        .args(["--explain", "NO_SOCKET", "--rules"])
        .arg(rules.path())
        .run()?;
    done.expect_success()?;
    done.expect_stdout("NO_SOCKET: a port scan (socket). Nothing.")?;
    let run = Netprobe::new("why")
        .args([
            "--only",
            "slow",
            "--min-ms",
            "0",
            "--details",
            "--duration",
            "2",
            "--rules",
        ])
        .arg(rules.path())
        .args(["udp", "dst", "port", "72"])
        .start()?;
    send(72)?;
    let done = run.wait()?;
    done.expect_success()?;
    done.expect_stdout("a port scan (")?;
    let done = Netprobe::new("why").args(["--expect", "nothing"]).run()?;
    done.expect_code(2)
}
