//! `netprobe skb`: drops and their reasons, each filter both ways, backends, stacks, JSON, the pinned config.

use std::collections::HashSet;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use netprobe::kernel::btf::{self, Btf};
use netprobe::kernel::functions::TraceableSet;

use crate::common::{Case, Finished, Netns, Netprobe, Pair, SHORT, case, deadline};

/// Few enough to attach one by one under emulation; each kernel has some of them.
pub const FUNCS: &str = "ip_output|ip6_output|nf_hook_slow|kfree_skb|kfree_skb_reason|sk_skb_reason_drop|ip_rcv|ipv6_rcv|dev_hard_start_xmit";
const PINS: &str = "/sys/fs/bpf/netprobe";

pub fn cases() -> Vec<Case> {
    let filter = |name, body| case(name, body).once_on("5.10").trace();
    vec![
        case("skb_drop_iptables_v4", || drop_by(Rule::Iptables, false))
            .trace()
            .program("iptables"),
        case("skb_drop_iptables_v6", || drop_by(Rule::Iptables, true))
            .once_on("newest")
            .trace()
            .program("ip6tables"),
        case("skb_drop_nft_v4", || drop_by(Rule::Nft, false))
            .trace()
            .program("nft"),
        case("skb_drop_nft_v6", || drop_by(Rule::Nft, true))
            .once_on("newest")
            .trace()
            .program("nft"),
        case("skb_tcp_before_the_rule", tcp_before_the_rule)
            .once_on("newest")
            .trace(),
        filter("skb_filter_proto", filter_proto),
        filter("skb_filter_addresses_v4", || filter_addresses(false)),
        filter("skb_filter_addresses_v6", || filter_addresses(true)),
        filter("skb_filter_ports", filter_ports),
        filter("skb_filter_mark", filter_mark),
        filter("skb_filter_netns", filter_netns),
        filter("skb_filter_ifname", filter_ifname),
        case("skb_backend_kprobe", || backend("kprobe"))
            .old_and_new()
            .trace(),
        case("skb_backend_kprobe_multi", || backend("kprobe-multi"))
            .once_on("newest")
            .kprobe_multi(),
        case("skb_functions_as_printed", functions_as_printed)
            .once_on("6.12")
            .kprobe_multi()
            .kernel(6, 5),
        case("skb_backend_refused", backend_refused)
            .once_on("5.10")
            .trace()
            .when(|e| {
                e.lacks_kprobe_multi()
                    .is_none()
                    .then(|| "has kprobe.multi".into())
            }),
        case("skb_stack_names_the_callers", stack).trace(),
        case("skb_json_parses_and_keeps_zeros", json)
            .once_on("6.12")
            .trace(),
        case("skb_relative_time_and_order", relative_time)
            .once_on("6.12")
            .trace(),
        case("skb_relative_time_of_one_life", relative_time_of_one_life)
            .once_on("6.12")
            .trace(),
        case("skb_relative_time_of_a_packet", relative_time_of_a_packet)
            .once_on("6.12")
            .trace(),
        case("skb_config_is_pinned", config_is_pinned)
            .once_on("6.12")
            .trace(),
    ]
}

/// What is read out of ftrace's own records is what the kernel prints of them, of each function with an skb.
fn functions_as_printed() -> Result<()> {
    let btf = Btf::vmlinux(None)?;
    let functions = btf.functions_taking("sk_buff", &btf::modules())?;
    let names: HashSet<&str> = functions.iter().map(|f| f.name.as_str()).collect();
    let read = TraceableSet::of_ftrace(&btf, &names)?;
    let printed = TraceableSet::printed(&names);
    let mut places = 0;
    for name in names {
        let [mut read, mut printed] = [&read, &printed].map(|s| s.everywhere(name).to_vec());
        read.sort();
        printed.sort();
        ensure!(read == printed, "{name}: {read:x?}, printed {printed:x?}");
        places += read.len();
    }
    ensure!(places > 1000, "{places} functions");
    Ok(())
}

/// `netprobe skb` on [`FUNCS`], inside the client's namespace.
pub fn skb<'a>(net: &'a Pair, args: &[&str]) -> Netprobe<'a> {
    Netprobe::new("skb")
        .args(["--filter-func", FUNCS])
        .args(args)
        .netns(&net.client)
}

enum Rule {
    Iptables,
    Nft,
}

/// The name that a drop by netfilter has in the kernel's own list of reasons; `None` before 5.17.
pub fn netfilter_reason() -> Option<&'static str> {
    let symbols = std::fs::read("/sys/kernel/btf/vmlinux").unwrap_or_default();
    let name = "SKB_DROP_REASON_NETFILTER_DROP";
    symbols
        .windows(name.len())
        .any(|w| w == name.as_bytes())
        .then_some(name)
}

/// The case of the source documents: OUTPUT drops TCP to an address; the trace ends in nf_hook_slow, then kfree_skb.
fn drop_by(rule: Rule, v6: bool) -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let server = net.server.tcp_listen(address(&net.server, v6, 0))?;
    let to = server.address();
    match rule {
        Rule::Iptables => {
            let tool = if v6 { "ip6tables" } else { "iptables" };
            net.client.cmd(&format!(
                "{tool} -t filter -I OUTPUT 1 -m tcp --proto tcp --dst {} -j DROP",
                to.ip()
            ))?;
        }
        Rule::Nft => {
            let family = if v6 { "ip6" } else { "ip" };
            net.client.nft(&format!(
                "table {family} t {{ chain c {{ type filter hook output priority 0; {family} daddr {} drop; }}; }}",
                to.ip()
            ))?;
        }
    }
    let ip = to.ip().to_string();
    let run = skb(&net, &["--filter-dst-ip", &ip, "--filter-proto", "tcp"]).start()?;
    ensure!(
        net.client.tcp_connect(to, SHORT)?.is_err(),
        "the rule does not drop"
    );
    let dropped = match netfilter_reason() {
        Some(reason) => format!("({reason})"),
        None => " kfree_skb".to_string(),
    };
    let line = run.wait_line(&dropped)?;
    ensure!(line.contains(&to.to_string()), "no tuple: {line}");
    let done = run.stop()?;
    done.expect_success()?;
    let skb = line.split_whitespace().next().unwrap_or_default();
    let way: Vec<&str> = done
        .lines_with(skb)
        .iter()
        .filter_map(|l| l.split_whitespace().last())
        .collect();
    let hook = way.iter().position(|f| *f == "nf_hook_slow");
    let free = way
        .iter()
        .position(|f| f.contains("kfree_skb") || f.contains("reason_drop"));
    ensure!(
        hook.is_some() && hook < free,
        "not nf_hook_slow, then kfree_skb: {way:?}\n{done}"
    );
    Ok(())
}

fn address(netns: &Netns, v6: bool, port: u16) -> SocketAddr {
    if v6 { netns.v6(port) } else { netns.v4(port) }
}

/// Without a rule, the same connection goes out through the device.
fn tcp_before_the_rule() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let server = net.server.tcp_listen(net.server.v4(0))?;
    let run = skb(
        &net,
        &["--filter-dst-ip", "10.77.0.2", "--filter-proto", "tcp"],
    )
    .start()?;
    net.client.tcp_connect(server.address(), deadline())??;
    run.wait_line("dev_hard_start_xmit")?;
    let done = run.stop()?;
    done.expect_success()?;
    let to = server.address().to_string();
    ensure!(done.lines_with(&to).len() > 2, "{done}");
    ensure!(
        done.stdout.contains(":3 ") || done.stdout.contains("veth0:"),
        "no interface:\n{done}"
    );
    Ok(())
}

/// One run with one filter: `other` is sent first and must not be seen, `wanted` is sent then and must be.
fn both_ways(
    net: &Pair,
    filter: &[&str],
    other: impl FnOnce() -> Result<String>,
    wanted: impl FnOnce() -> Result<String>,
) -> Result<Finished> {
    let run = skb(net, filter).start()?;
    let other = other()?;
    let wanted = wanted()?;
    run.wait_line(&wanted)?;
    let done = run.stop()?;
    done.expect_success()?;
    ensure!(
        done.lines_with(&other).is_empty(),
        "{filter:?} let {other} through:\n{done}"
    );
    Ok(done)
}

/// Sends a datagram and gives what its tuple shows.
fn udp(from: &Netns, to: SocketAddr) -> Result<String> {
    from.udp_send(to, b"hello")?;
    Ok(format!("->{to}(udp)"))
}

fn ping(from: &Netns, to: SocketAddr) -> Result<String> {
    ensure!(from.ping(to, 1)?, "no answer from {to}");
    let proto = if to.is_ipv4() { "icmp" } else { "icmp6" };
    Ok(format!("->{}({proto})", to.ip()))
}

fn filter_proto() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let (c, s) = (&net.client, &net.server);
    let udp4 = || udp(c, s.v4(4000));
    both_ways(&net, &["--filter-proto", "icmp"], udp4, || ping(c, s.v4(0)))?;
    both_ways(&net, &["--filter-proto", "udp"], || ping(c, s.v4(0)), udp4)?;
    both_ways(
        &net,
        &["--filter-proto", "icmp6"],
        || ping(c, s.v4(0)),
        || ping(c, s.v6(0)),
    )?;
    both_ways(
        &net,
        &["--filter-proto", "17"],
        || ping(c, s.v6(0)),
        || udp(c, s.v6(4000)),
    )?;
    Ok(())
}

fn filter_addresses(v6: bool) -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let (c, s) = (&net.client, &net.server);
    let (second, prefix) = if v6 {
        ("fd77::3", "fd77::2/127")
    } else {
        ("10.77.0.3", "10.77.0.2/31")
    };
    // The next address up from the server's, in its network: fd77::3 and 10.77.0.3 are within the prefix, the client's are not.
    s.ip(&format!(
        "addr add {second}/{} dev veth0{}",
        if v6 { 64 } else { 24 },
        if v6 { " nodad" } else { "" }
    ))?;
    let mac = s.mac(Pair::IFACE)?;
    c.ip(&format!(
        "neigh replace {second} lladdr {mac} dev veth0 nud permanent"
    ))?;
    let first = address(s, v6, 4000);
    let second = SocketAddr::new(second.parse()?, 4000);
    let first_ip = first.ip().to_string();
    both_ways(
        &net,
        &["--filter-dst-ip", &first_ip, "--filter-proto", "udp"],
        || udp(c, second),
        || udp(c, first),
    )?;
    both_ways(
        &net,
        &["--filter-src-ip", &first_ip],
        || udp(c, second),
        // The answer to a ping comes from there.
        || {
            ensure!(c.ping(first, 1)?);
            Ok(format!("{first_ip}->"))
        },
    )?;
    let done = both_ways(
        &net,
        &["--filter-dst-ip", prefix, "--filter-proto", "udp"],
        || udp(s, address(c, v6, 4000)),
        || {
            udp(c, first)?;
            udp(c, second)
        },
    )?;
    done.expect_stdout(&format!("->{first}"))
}

fn filter_ports() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let (c, s) = (&net.client, &net.server);
    both_ways(
        &net,
        &["--filter-dst-port", "4001"],
        || udp(c, s.v4(4000)),
        || udp(c, s.v4(4001)),
    )?;
    let from = |port: u16, to: SocketAddr| -> Result<String> {
        let socket = c.udp_bind(c.v4(port))?;
        socket.send_to(b"hello", to)?;
        Ok(format!("{}->{to}", c.v4(port)))
    };
    both_ways(
        &net,
        &["--filter-src-port", "5001"],
        || from(5000, s.v4(4000)),
        || from(5001, s.v4(4000)),
    )?;
    Ok(())
}

fn filter_mark() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let (c, s) = (&net.client, &net.server);
    let marked = |mark: u32, port: u16| -> Result<String> {
        let socket = c.udp_bind("0.0.0.0:0".parse()?)?;
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Mark, &mark)?;
        socket.send_to(b"hello", s.v4(port))?;
        Ok(format!("->{}", s.v4(port)))
    };
    both_ways(
        &net,
        &["--filter-mark", "0x12"],
        || marked(0x13, 4000),
        || marked(0x12, 4001),
    )?;
    let done = both_ways(
        &net,
        &["--filter-mark", "0x10/0xf0"],
        || marked(0x21, 4000),
        || marked(0x13, 4001),
    )?;
    ensure!(
        done.stdout
            .lines()
            .any(|l| l.split_whitespace().nth(4) == Some("13")),
        "the mark is not shown:\n{done}"
    );
    Ok(())
}

fn filter_netns() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let other = Netns::new("other")?;
    let (c, s) = (&net.client, &net.server);
    let inode = format!("inode:{}", c.inode()?);
    let path = c.path().display().to_string();
    for netns in [path.as_str(), &inode, c.name()] {
        both_ways(
            &net,
            &["--filter-netns", netns],
            || udp(&other, "127.0.0.1:4009".parse()?),
            || udp(c, s.v4(4000)),
        )?;
    }
    let done = Netprobe::new("skb")
        .args(["--filter-netns", "no-such-netns"])
        .run()?;
    done.expect_code(2)?;
    done.expect_stderr("no-such-netns")
}

fn filter_ifname() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let (c, s) = (&net.client, &net.server);
    both_ways(
        &net,
        &["--filter-ifname", "veth0"],
        || udp(c, "127.0.0.1:4009".parse()?),
        || {
            ensure!(c.ping(s.v4(0), 1)?);
            Ok("10.77.0.2->10.77.0.1(icmp)".into())
        },
    )?;
    both_ways(
        &net,
        &["--filter-ifname", "lo"],
        || ping(c, s.v4(0)),
        || udp(c, "127.0.0.1:4009".parse()?),
    )?;
    let done = skb(&net, &["--filter-ifname", "nope0"]).run()?;
    done.expect_code(2)?;
    done.expect_stderr("nope0")?;
    done.expect_stderr("veth0")
}

fn backend(name: &str) -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let (c, s) = (&net.client, &net.server);
    let done = both_ways(
        &net,
        &["--backend", name, "--filter-proto", "udp"],
        || ping(c, s.v4(0)),
        || udp(c, s.v4(4000)),
    )?;
    done.expect_stderr(&format!("by {name}"))?;
    // The function is named right by either way.
    done.expect_stdout(" ip_output\n")
}

fn backend_refused() -> Result<()> {
    let done = Netprobe::new("skb")
        .args(["--backend", "kprobe-multi"])
        .run()?;
    done.expect_code(1)?;
    done.expect_stderr("--backend kprobe")
}

fn stack() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let run = skb(
        &net,
        &[
            "--filter-dst-port",
            "4000",
            "--filter-proto",
            "udp",
            "--output-stack",
        ],
    )
    .start()?;
    net.client.udp_send(net.server.v4(4000), b"hello")?;
    let (outermost, system_call) = match std::env::consts::ARCH {
        "aarch64" => ("el0t_64_sync", "el0_svc+0x"),
        _ => ("entry_SYSCALL_64", "do_syscall_64+0x"),
    };
    run.wait_line(outermost)?;
    let done = run.stop()?;
    done.expect_success()?;
    let lines: Vec<&str> = done.stdout.lines().collect();
    let at = lines
        .iter()
        .position(|l| l.ends_with(" ip_output"))
        .context("no ip_output")?;
    let frames: Vec<&str> = lines[at + 1..]
        .iter()
        .take_while(|l| l.starts_with("    "))
        .map(|l| l.trim())
        .collect();
    ensure!(
        frames
            .first()
            .is_some_and(|f| f.starts_with("ip_output+0x")),
        "{frames:?}"
    );
    // From the function up to the system call, in this order.
    let mut rest = frames.iter();
    for caller in ["udp_sendmsg+0x", "__sys_sendto+0x", system_call] {
        ensure!(
            rest.any(|f| f.starts_with(caller)),
            "no {caller} in its place: {frames:?}"
        );
    }
    Ok(())
}

fn json() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let run = skb(
        &net,
        &[
            "--filter-dst-port",
            "4000",
            "--output-json",
            "--output-stack",
        ],
    )
    .start()?;
    net.client.udp_send(net.server.v4(4000), b"hello")?;
    run.wait_line("dev_hard_start_xmit")?;
    let done = run.stop()?;
    done.expect_success()?;
    let rows = done.json()?;
    let row = rows
        .iter()
        .find(|r| r["func"] == "ip_output")
        .context("no ip_output")?;
    // Zeros are values.
    for field in ["mark", "mtu", "ifindex"] {
        ensure!(row[field] == 0, "{field} of {row}");
    }
    ensure!(row["tuple"]["tcp_flags"] == 0, "{row}");
    ensure!(
        row["tuple"]["dport"] == 4000 && row["tuple"]["proto_name"] == "udp",
        "{row}"
    );
    ensure!(row["netns"] == net.client.inode()?, "{row}");
    ensure!(
        row["len"] == 33,
        "20 bytes of IP, 8 of UDP, 5 of payload: {row}"
    );
    ensure!(row["stack"][0]["name"] == "ip_output", "{row}");
    ensure!(
        row["skb"].as_str().is_some_and(|s| s.starts_with("0x")),
        "{row}"
    );
    let sent = rows
        .iter()
        .find(|r| r["func"] == "dev_hard_start_xmit")
        .context("no dev_hard_start_xmit")?;
    ensure!(sent["iface"] == "veth0" && sent["mtu"] == 1500, "{sent}");
    ensure!(sent["protocol"] == 0x0800, "{sent}");
    Ok(())
}

fn relative_time() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let run = skb(
        &net,
        &[
            "--filter-proto",
            "icmp",
            "--output-json",
            "--output-relative-timestamp",
        ],
    )
    .start()?;
    ensure!(net.client.ping(net.server.v4(0), 20)?);
    run.wait_lines("20 echo requests", |text| {
        (text.matches("dev_hard_start_xmit").count() >= 40).then_some(())
    })?;
    let done = run.stop()?;
    let rows = done.json_of("event")?;
    let mut last = 0;
    let mut seen = HashSet::new();
    for row in &rows {
        let ts = row["ts_ns"].as_u64().context("no ts_ns")?;
        ensure!(ts >= last, "out of order: {row}");
        last = ts;
        let since = row["since_ns"].as_u64().context("no since_ns")?;
        let first = seen.insert(row["skb"].to_string());
        ensure!(!first || since == 0, "first event of an skb: {row}");
    }
    ensure!(
        rows.iter().any(|r| r["since_ns"].as_u64() > Some(0)),
        "no time passed at all"
    );
    Ok(())
}

/// Rows of a run with relative time, and how long ago the same skb was seen before, in a run that forgets nothing.
fn relative_rows(
    net: &Pair,
    filter: &str,
    args: &[&str],
    traffic: &dyn Fn() -> Result<()>,
) -> Result<Vec<serde_json::Value>> {
    let run = Netprobe::new("skb")
        .args(["--timestamp", "relative", "--output-json"])
        .args(["--filter-func", filter])
        .args(args)
        .start()?;
    traffic()?;
    // A packet that ends the run: all others have come by then.
    net.client.udp_send(net.server.v4(4), b"last")?;
    run.wait_line("\"dport\":4,")?;
    let done = run.stop()?;
    done.expect_success()?;
    done.json_of("event")
}

/// An sk_buff that uses the address of one that was freed has no past, whether its free is shown or not, v4 and v6, and one received
/// on another CPU, too.
fn relative_time_of_one_life() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let traffic = || {
        for _ in 0..30 {
            ensure!(net.client.ping(net.server.v4(0), 1)?);
            ensure!(net.client.ping(net.server.v6(0), 1)?);
            net.client.udp_send(net.server.v4(3), b"x")?;
        }
        Ok(())
    };
    let first = "__ip_local_out|ip6_output";
    for filter in [
        "__ip_local_out|ip_rcv|icmp_rcv|ip6_output|ipv6_rcv",
        "__ip_local_out|ip_rcv|icmp_rcv|ip6_output|ipv6_rcv|consume_skb|kfree_skbmem|kfree_skb_reason|kfree_skb",
    ] {
        let rows = relative_rows(&net, filter, &[], &traffic)?;
        let mut again = 0;
        let mut seen = HashSet::new();
        for row in &rows {
            let func = row["func"].as_str().unwrap_or_default();
            let new = seen.insert(row["skb"].to_string());
            if first.split('|').any(|f| f == func) {
                again += usize::from(!new);
                ensure!(
                    row["since_ns"] == 0,
                    "a packet that begins has a past: {row}"
                );
            }
        }
        ensure!(again > 0, "no address was used twice");
        // Received where it was sent: one life across the veth pair.
        let received = rows.iter().filter(|r| r["func"] == "ip_rcv");
        ensure!(received.clone().count() > 0);
        for row in received {
            ensure!(row["since_ns"].as_u64() > Some(0), "no past: {row}");
        }
    }
    Ok(())
}

/// With tracking time goes on with the packet: from the sk_buff that was sent to its clone that a packet socket gets.
fn relative_time_of_a_packet() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let traffic = || {
        for _ in 0..20 {
            net.client.udp_send(net.server.v4(3), b"x")?;
        }
        Ok(())
    };
    let filter = "__ip_local_out|ip_rcv|udp_rcv";
    let rows = relative_rows(&net, filter, &["--filter-track-skb"], &traffic)?;
    let mut seen = HashSet::new();
    for row in &rows {
        let new = seen.insert(row["packet"].to_string());
        let since = row["since_ns"].as_u64().context("no since_ns")?;
        ensure!(new == (since == 0), "{row}");
    }
    ensure!(seen.len() > 20, "{} packets", seen.len());
    Ok(())
}

/// The folder of a run's pins.
pub fn pins_of(pid: u32) -> String {
    format!("{PINS}/skb-{pid}")
}

fn config_is_pinned() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let run = skb(&net, &["--filter-dst-port", "4000", "--filter-mark", "7"]).start()?;
    let path = format!("{}/config", pins_of(run.pid()));
    let map = MapHandle::from_pinned_path(&path).with_context(|| path.clone())?;
    let value = map
        .lookup(&0u32.to_ne_bytes(), MapFlags::ANY)?
        .context("no value")?;
    let word = |at: usize| u32::from_ne_bytes(value[at..at + 4].try_into().unwrap_or_default());
    // struct np_config: version, fields, mark, mark_mask, …, dport at 90.
    ensure!(
        word(0) == 1 && word(8) == 7 && word(12) == u32::MAX,
        "{value:?}"
    );
    ensure!(value[90..92] == 4000u16.to_ne_bytes(), "{value:?}");
    // A second program changes it while the probes stay attached: no filter but the port.
    let mut wider = value.clone();
    wider[4..8].copy_from_slice(&(1u32 << 7).to_ne_bytes());
    net.client.udp_send(net.server.v4(4000), b"unmarked")?;
    map.update(&0u32.to_ne_bytes(), &wider, MapFlags::ANY)?;
    let port = net.client.udp_send(net.server.v4(4000), b"seen")?;
    run.wait_line(&format!(":{port}->"))?;
    let mode = std::fs::metadata(pins_of(run.pid()))?;
    ensure!(
        std::os::unix::fs::PermissionsExt::mode(&mode.permissions()) & 0o777 == 0o700,
        "the folder is open to others"
    );
    let done = run.stop()?;
    let ports: HashSet<&str> = done
        .lines_with("->10.77.0.2:4000")
        .iter()
        .filter_map(|l| l.split("->").next()?.rsplit(':').next())
        .collect();
    ensure!(ports.len() == 1, "the unmarked one was seen too:\n{done}");
    Ok(())
}
