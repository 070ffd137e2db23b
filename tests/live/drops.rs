//! `netprobe drops`: losses made on purpose, exact to the packet, and balanced against the kernel's counters.

use std::io::{Read, Write};
use std::net::UdpSocket;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::common::{Case, Env, Finished, Netns, Netprobe, Pair, Running, SHORT, case, deadline};

pub fn cases() -> Vec<Case> {
    vec![
        case("drops_udp_no_socket", udp_no_socket)
            .old_and_new()
            .trace(),
        case("drops_firewall_rule", firewall_rule)
            .trace()
            .program("nft"),
        case("drops_receive_buffer", receive_buffer)
            .once_on("5.10")
            .trace(),
        case("drops_accept_queue", accept_queue)
            .once_on("6.1")
            .trace(),
        case("drops_queue_discipline", queue_discipline)
            .once_on("newest")
            .trace()
            .program("tc"),
        case("drops_reverse_path", reverse_path)
            .once_on("6.12")
            .trace()
            .when(|env| no_reasons(env.kernel)),
        case("drops_no_route", no_route)
            .old_and_new()
            .trace()
            .when(|env| no_reasons(env.kernel)),
        case("drops_filtered_is_not_balanced", filtered)
            .once_on("5.10")
            .trace(),
        case("drops_nothing_of_good_traffic", good_traffic).trace(),
        case("drops_burst_from_two_cpus", burst)
            .once_on("newest")
            .trace()
            .limit(900),
        case("drops_memory_does_not_grow", memory)
            .once_on("6.12")
            .trace()
            .program("tc")
            .limit(900 + 90 * soak()),
        case("drops_table_and_its_limits", text)
            .once_on("6.12")
            .trace(),
        case("drops_order_and_offsets", order_and_offsets)
            .once_on("5.10")
            .trace(),
        case("drops_rules_of_a_file", rules_of_a_file)
            .once_on("6.12")
            .trace()
            .when(|env| no_reasons(env.kernel)),
        case("drops_explains_each_reason", explains).trace(),
    ]
}

fn no_reasons(kernel: (u32, u32)) -> Option<String> {
    (kernel < (5, 17)).then(|| "this kernel gives no reasons for drops".to_owned())
}

const SENT: u64 = 50;

fn drops(args: &[&str]) -> Result<Running> {
    Netprobe::new("drops")
        .args(["--output-json", "-i", "3600"])
        .args(args)
        .start()
}

/// The rows of its only table, and that table: every run here ends before the next one.
fn rows(run: Running) -> Result<(Vec<Value>, Value)> {
    let done = run.stop()?;
    done.expect_success()?;
    let mut all = done.json()?;
    let table = all
        .iter()
        .position(|row| row["type"] == "table")
        .with_context(|| format!("no table: {done}"))?;
    let table = all.remove(table);
    ensure!(!all.iter().any(|row| row["type"] == "loss"), "{done}");
    Ok((all, table))
}

/// Packets of the rows of a class in a namespace.
fn packets(rows: &[Value], class: &str, netns: &Netns) -> Result<u64> {
    let inode = netns.inode()?;
    let fits = |row: &&Value| row["class"] == class && row["netns"] == inode;
    let packets = rows.iter().filter(fits).map(|row| row["packets"].as_u64());
    Ok(packets.map(|n| n.unwrap_or(0)).sum())
}

fn send(net: &Pair, port: u16, times: u64) -> Result<()> {
    send_bytes(net, port, times, b"to be lost")
}

fn send_bytes(net: &Pair, port: u16, times: u64, payload: &[u8]) -> Result<()> {
    net.client.enter(|| -> Result<()> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        for _ in 0..times {
            // What comes back as ICMP is an error of the next call.
            let _ = socket.send_to(payload, net.server.v4(port));
        }
        Ok(())
    })?
}

/// A counter of /proc/net/snmp or netstat in a namespace.
fn counter(netns: &Netns, file: &str, group: &str, name: &str) -> Result<u64> {
    let text = netns.cmd(&format!("cat /proc/thread-self/net/{file}"))?;
    let mut lines = text.lines().filter(|line| line.starts_with(group));
    let names = lines.next().context("no such group")?.split(' ');
    let values = lines.next().context("no values")?.split(' ');
    let found = names.zip(values).find(|(n, _)| *n == name);
    Ok(found.context("no such counter")?.1.parse()?)
}

fn expect(rows: &[Value], table: &Value, class: &str, netns: &Netns, want: u64) -> Result<()> {
    let found = packets(rows, class, netns)?;
    ensure!(found == want, "{found} of {want} {class}: {rows:#?}");
    ensure!(table["unexplained"] == 0, "{table}: {rows:#?}");
    Ok(())
}

fn udp_no_socket() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let before = counter(&net.server, "snmp", "Udp:", "NoPorts")?;
    let run = drops(&[])?;
    send(&net, 4321, SENT)?;
    let (rows, table) = rows(run)?;
    let after = counter(&net.server, "snmp", "Udp:", "NoPorts")?;
    ensure!(
        after - before == SENT,
        "the kernel counts {}",
        after - before
    );
    expect(&rows, &table, "socket", &net.server, SENT)?;
    let row = rows
        .iter()
        .find(|row| row["class"] == "socket")
        .context("no row")?;
    ensure!(row["dport"] == 4321 && row["proto"] == 17, "{row}");
    ensure!(
        row["example"]
            .as_str()
            .is_some_and(|e| e.contains("10.77.0.2:4321")),
        "{row}"
    );
    Ok(())
}

fn firewall_rule() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    net.client.nft("add table ip f; add chain ip f o { type filter hook output priority 0; }; add rule ip f o udp dport 4322 counter drop")?;
    let run = drops(&[])?;
    send(&net, 4322, SENT)?;
    let (rows, table) = rows(run)?;
    let rules = net.client.cmd("nft list ruleset")?;
    ensure!(rules.contains(&format!("packets {SENT} ")), "{rules}");
    expect(&rows, &table, "firewall", &net.client, SENT)
}

fn receive_buffer() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    // Nobody reads it.
    let socket = net.server.udp_bind(net.server.v4(4323))?;
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBuf, &4096)?;
    let before = counter(&net.server, "snmp", "Udp:", "RcvbufErrors")?;
    let run = drops(&[])?;
    send(&net, 4323, 4 * SENT)?;
    let (rows, table) = rows(run)?;
    let lost = counter(&net.server, "snmp", "Udp:", "RcvbufErrors")? - before;
    ensure!(lost > 0, "the buffer held it all");
    let found = packets(&rows, "queue", &net.server)?;
    ensure!(found == lost, "{found} of {lost}: {rows:#?}");
    if table["unexplained"] != 0 {
        // Kernels without reasons balance by no reason.
        ensure!(rows.iter().all(|row| row["reason"] == ""), "{table}");
    }
    // From 6.11 the kernel says whose buffer it was.
    let row = rows.iter().find(|row| row["class"] == "queue");
    if !row.is_none_or(|row| row["pid"].is_null()) {
        ensure!(
            row.map(|row| &row["socket"]) == Some(&"10.77.0.2:4323".into()),
            "{row:?}"
        );
    }
    let owner = row.map(|row| row["pid"].clone()).unwrap_or_default();
    ensure!(
        owner.is_null() || owner == u64::from(std::process::id()),
        "{rows:#?}"
    );
    Ok(())
}

fn accept_queue() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let (_listener, to) = net.server.tcp_listen_only(net.server.v4(0), 1)?;
    // Two fit (the limit itself is not yet too many); they stay.
    let _held = net.client.fill_accept_queue(&net.server, to, 2)?;
    let run = drops(&[])?;
    let before = counter(&net.server, "netstat", "TcpExt:", "ListenOverflows")?;
    let _ = net.client.tcp_connect(to, SHORT);
    let overflows = counter(&net.server, "netstat", "TcpExt:", "ListenOverflows")? - before;
    ensure!(overflows > 0, "the queue took them all");
    let (rows, _) = rows(run)?;
    let row = rows
        .iter()
        .find(|row| row["class"] == "listen")
        .with_context(|| format!("no row: {rows:#?}"))?;
    ensure!(row["packets"].as_u64() >= Some(overflows), "{row}");
    ensure!(row["backlog"] == 2 && row["limit"] == 1, "{row}");
    ensure!(row["pid"] == u64::from(std::process::id()), "{row}");
    ensure!(row["socket"] == to.to_string(), "{row}");
    Ok(())
}

fn queue_discipline() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    net.client
        .cmd("tc qdisc add dev veth0 root pfifo limit 0")
        .or_else(|_| {
            net.client
                .cmd("tc qdisc add dev veth0 root tbf rate 8kbit burst 100 limit 1")
        })?;
    let dropped = || -> Result<u64> {
        let text = net.client.cmd("tc -s qdisc show dev veth0")?;
        let number = text
            .split("dropped ")
            .nth(1)
            .and_then(|rest| rest.split(',').next()?.parse().ok());
        number.with_context(|| format!("no drops: {text}"))
    };
    let run = drops(&[])?;
    let before = dropped()?;
    send(&net, 4325, SENT)?;
    let (rows, table) = rows(run)?;
    let lost = dropped()? - before;
    ensure!(lost > 0, "the qdisc took them all");
    expect(&rows, &table, "qdisc", &net.client, lost)?;
    // From 7.x on the qdisc says itself which it is, and why.
    let own = Env::look().has_function("__traceiter_qdisc_drop");
    let row = rows.iter().find(|row| row["class"] == "qdisc");
    let said = row.map(|row| (row["qdisc"].is_string(), row["qdisc_reason"].is_string()));
    ensure!(said == Some((own, own)), "{row:?}");
    Ok(())
}

/// The server has no way back to the sender.
fn reverse_path() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    net.client.ip("address add 10.99.0.1/32 dev veth0")?;
    for dev in ["all", "veth0"] {
        net.server
            .sysctl(&format!("net/ipv4/conf/{dev}/rp_filter"), "1")?;
    }
    let run = drops(&[])?;
    net.client.enter(|| -> Result<()> {
        let socket = UdpSocket::bind("10.99.0.1:0")?;
        for _ in 0..SENT {
            socket.send_to(b"from nowhere", net.server.v4(4326))?;
        }
        Ok(())
    })??;
    let (rows, table) = rows(run)?;
    let counted = counter(&net.server, "netstat", "TcpExt:", "IPReversePathFilter")?;
    ensure!(counted == SENT, "the kernel counts {counted}");
    expect(&rows, &table, "route", &net.server, SENT)?;
    ensure!(
        rows.iter().any(|row| row["reason"] == "IP_RPFILTER"),
        "{rows:#?}"
    );
    Ok(())
}

/// The server forwards, and knows no way on.
fn no_route() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    net.server.sysctl("net/ipv4/ip_forward", "1")?;
    net.client.ip("route add 10.98.0.0/24 via 10.77.0.2")?;
    let run = drops(&[])?;
    net.client.enter(|| -> Result<()> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        for _ in 0..SENT {
            let _ = socket.send_to(b"to nowhere", "10.98.0.9:9");
        }
        Ok(())
    })??;
    let (rows, table) = rows(run)?;
    expect(&rows, &table, "route", &net.server, SENT)
}

fn filtered() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    for args in [&["--filter-dst-port", "4327"][..], &["udp", "port", "4327"]] {
        let run = drops(args)?;
        send(&net, 4327, SENT)?;
        send(&net, 4328, SENT)?;
        let (rows, table) = rows(run)?;
        let found = packets(&rows, "socket", &net.server)?;
        ensure!(found == SENT, "{found}: {rows:#?}");
        ensure!(table["unexplained"].is_null(), "{table}");
    }
    Ok(())
}

/// Answered pings, datagrams that are read, connections that are opened and closed: no row.
fn good_traffic() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let server = net.server.tcp_listen(net.server.v4(4329))?;
    let udp = net.server.udp_bind(net.server.v4(4330))?;
    let run = drops(&[])?;
    for _ in 0..1000 {
        let mut stream = net.client.tcp_connect(server.address(), deadline())??;
        // The answer: the server has accepted it, and its queue is empty again.
        stream.write_all(b"x")?;
        stream.read_exact(&mut [0])?;
        net.client.udp_send(net.server.v4(4330), b"hello")?;
        let mut buffer = [0; 16];
        udp.recv(&mut buffer)?;
    }
    ensure!(net.client.ping(net.server.v4(0), 20)?);
    let done = run.stop()?;
    done.expect_success()?;
    let ours = [net.client.inode()?, net.server.inode()?];
    let rows: Vec<Value> = done.json()?;
    let lost: Vec<&Value> = rows
        .iter()
        .filter(|row| row["type"] == "drops" && ours.iter().any(|n| row["netns"] == *n))
        .collect();
    ensure!(lost.is_empty(), "{lost:#?}");
    Ok(())
}

/// `make soak`: the long forms. So many minutes of random loss; 0: the short forms.
fn soak() -> u64 {
    let minutes = std::env::var("NETPROBE_SOAK").unwrap_or_default();
    minutes.parse().unwrap_or(0)
}

/// From each of two threads.
const BURST: u64 = 100_000;
const LONG_BURST: u64 = 500_000;

fn burst() -> Result<()> {
    let burst = if soak() > 0 { LONG_BURST } else { BURST };
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let run = drops(&[])?;
    std::thread::scope(|scope| {
        let threads: Vec<_> = [4331, 4332]
            .map(|port| {
                let net = &net;
                scope.spawn(move || send(net, port, burst))
            })
            .into_iter()
            .collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().expect("a sender panicked"))
    })?;
    let lost = counter(&net.server, "snmp", "Udp:", "NoPorts")?;
    let (rows, table) = rows(run)?;
    let found = packets(&rows, "socket", &net.server)?;
    ensure!(found == lost, "{found} of {lost}");
    ensure!(lost > burst, "{lost}");
    ensure!(table["lost"].as_u64() >= Some(lost), "{table}");
    Ok(())
}

/// Random loss at ports that change, so that each table has other rows: memory stays what it was after the first tables.
fn memory() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    net.client
        .cmd("tc qdisc add dev veth0 root netem loss 50%")?;
    let run = Netprobe::new("drops")
        .args(["--output-json", "-i", "1", "--max-cpu", "80"])
        .start()?;
    let tables = (60 * soak()).max(6) as usize;
    let memory = || -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", run.pid()))?;
        let line = status.lines().find(|l| l.starts_with("VmRSS:"));
        let number = line.and_then(|l| l.split_whitespace().nth(1));
        Ok(number.context("no memory")?.parse()?)
    };
    let mut port = 10_000;
    let mut until = |count: usize| -> Result<u64> {
        while run.stdout().matches("\"table\"").count() < count {
            send(&net, port, 20)?;
            port = 10_000 + (port + 1) % 50_000;
        }
        memory()
    };
    // The first full tables take what the allocator then keeps: on the newest kernel 15.9 MB became 17.0 once, and stayed.
    until(3)?;
    let before = until(6)?;
    let after = until(6 + tables)?;
    run.stop()?.expect_success()?;
    ensure!(after <= before + 1024, "{before} kB, then {after} kB");
    Ok(())
}

/// The table as text, one interval after the other, --once, --top and --by.
fn text() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let run = Netprobe::new("drops").args(["-i", "1"]).start()?;
    send(&net, 4333, SENT)?;
    run.wait_line("no socket listens here")?;
    let done: Finished = run.stop()?;
    done.expect_success()?;
    done.expect_stderr("packets lost")?;
    ensure!(done.stdout.contains("netprobe drops  "), "{done}");
    ensure!(done.stdout.contains("LOST"), "{done}");
    let once = Netprobe::new("drops")
        .args(["--once", "-i", "1", "--top", "1", "--by", "reason,netns"])
        .run()?;
    once.expect_success()?;
    ensure!(once.stdout.matches("netprobe drops").count() == 1, "{once}");
    Netprobe::new("drops")
        .args(["--by", "colour"])
        .run()?
        .expect_code(2)
}

/// Few large packets and many small ones: which comes first depends on --sort. Places have their offset by --offsets.
fn order_and_offsets() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let filter = ["--filter-proto", "udp", "--filter-netns", net.server.name()];
    for (sort, ports) in [("lost", [4401, 4402]), ("bytes", [4402, 4401])] {
        let run = drops(&[&["--sort", sort][..], &filter].concat())?;
        send_bytes(&net, 4401, 5, b"small")?;
        send_bytes(&net, 4402, 3, &[0; 1000])?;
        let (rows, _) = rows(run)?;
        let lost: Vec<&Value> = rows.iter().filter(|r| r["class"] == "socket").collect();
        let order: Vec<_> = lost.iter().map(|r| r["dport"].as_u64()).collect();
        ensure!(order == ports.map(Some), "{sort}: {rows:#?}");
    }
    let run = Netprobe::new("drops")
        .arg("--offsets")
        .args(filter)
        .start()?;
    send(&net, 4401, SENT)?;
    let done = run.stop()?;
    done.expect_success()?;
    let row = done.stdout.lines().find(|line| line.contains(":4401"));
    ensure!(row.is_some_and(|row| row.contains("+0x")), "{done}");
    Ok(())
}

/// A rule of the user's own takes precedence: what is normal here is hidden and counted, and --all shows it.
fn rules_of_a_file() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let file = tempfile::NamedTempFile::new()?;
    let rule = "[reason.NO_SOCKET]\nclass = \"expected\"\nwhat = \"a scan, as every day\"\n";
    std::fs::write(file.path(), rule)?;
    let path = file.path().display().to_string();
    let filter = ["--filter-proto", "udp", "--filter-netns", net.server.name()];
    for all in [&[][..], &["--all"]] {
        let run = drops(&[&["--rules", &path][..], &filter, all].concat())?;
        send(&net, 4403, SENT)?;
        let (rows, table) = rows(run)?;
        let shown = rows.iter().any(|r| r["what"] == "a scan, as every day");
        ensure!(shown != all.is_empty(), "{rows:#?}");
        ensure!(table["expected"] == SENT && table["lost"] == 0, "{table}");
    }
    std::fs::write(file.path(), "[reason.NO_SOCKET]\nclas = 1\n")?;
    let refused = Netprobe::new("drops").args(["--rules", &path]).run()?;
    refused.expect_code(1)?;
    refused.expect_stderr(&path)
}

fn explains() -> Result<()> {
    let all = Netprobe::new("drops").args(["--explain", "all"]).run()?;
    all.expect_success()?;
    let one = Netprobe::new("drops")
        .args(["--explain", "IP_RPFILTER"])
        .run()?;
    one.expect_success()?;
    ensure!(one.stdout.contains("rp_filter"), "{one}");
    let none = Netprobe::new("drops")
        .args(["--explain", "NO_SUCH"])
        .run()?;
    none.expect_code(2)?;
    none.expect_stderr("NO_SUCH")
}
