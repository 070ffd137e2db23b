//! `netprobe skb --output-nft`: who in netfilter dropped a packet.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::common::{Case, Netns, Netprobe, Pair, Running, case, deadline};

pub fn cases() -> Vec<Case> {
    let rules = |name, body| case(name, body).trace().program("nft").kernel(5, 17);
    vec![
        rules("skb_netfilter_rules", nft_rules),
        rules("skb_netfilter_chain_of_chains", chain_of_chains).once_on("6.1"),
        rules("skb_netfilter_goto_and_maps", goto_and_maps).once_on("6.1"),
        rules("skb_netfilter_later_hooks", later_hooks).old_and_new(),
        rules(
            "skb_netfilter_not_the_last_packets_rule",
            not_the_last_packets_rule,
        )
        .once_on("newest"),
        rules("skb_netfilter_queue", queue).once_on("newest"),
        rules("skb_netfilter_conntrack_full", conntrack_full).once_on("6.1"),
        rules("skb_netfilter_xt_target", xt_target)
            .once_on("newest")
            .program("iptables")
            .when(|_| {
                let version = Command::new("iptables").arg("--version").output();
                let nft =
                    version.is_ok_and(|o| String::from_utf8_lossy(&o.stdout).contains("nf_tables"));
                (!nft).then(|| "iptables is not that of nft".into())
            }),
        rules("skb_netfilter_legacy", legacy)
            .once_on("newest")
            .program("iptables-legacy")
            .when(|_| {
                // Loads the module, where there is one.
                let listed = Command::new("iptables-legacy").arg("-S").output();
                (!listed.is_ok_and(|o| o.status.success()))
                    .then(|| "this kernel has no iptables of the older kind".into())
            }),
        rules("skb_netfilter_late_expression", late_expression).once_on("6.1"),
        case("skb_netfilter_refused", refused)
            .once_on("5.10")
            .trace()
            .kernel_before(5, 11),
    ]
}

/// The handle of the one rule in `chain` of `netns` that has `with` in it.
pub fn handle(netns: &Netns, chain: &str, with: &str) -> Result<u64> {
    let mut command = Command::new("nft");
    let list = netns.output(command.args(["-a", "list", "chain"]).args(chain.split(' ')))?;
    let line = list.lines().find(|l| l.contains(with));
    line.and_then(|l| l.rsplit(' ').next()?.parse().ok())
        .with_context(|| format!("no rule with {with}:\n{list}"))
}

/// The drops of a namespace, as text.
fn drops(netns: &Netns) -> Result<Running> {
    Netprobe::new("skb")
        .args(["--drops", "--output-nft", "--filter-netns", netns.name()])
        .start()
}

/// The line of the drop of the packet to this port ends so.
fn ends(run: &Running, port: u16, end: &str) -> Result<()> {
    let v4 = run.wait_line(&format!(":{port}(udp)"))?;
    ensure!(v4.ends_with(&format!(" {end}")), "not {end}: {v4}");
    Ok(())
}

/// The rule that dropped: in a base chain, in one jumped to, one that rejects, a verdict map's; and a policy, which is no rule.
fn nft_rules() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let client = &net.client;
    client.nft(
        "table inet t { chain before { udp dport 99 drop; }; \
         chain sub { udp dport 99 drop; udp dport 9 counter drop; }; \
         chain out { type filter hook output priority 0; jump before; udp dport 9 jump sub; udp dport 10 drop; udp dport 11 reject; udp dport vmap { 14 : drop }; }; }; \
         table ip p { chain o { type filter hook output priority 1; policy drop; udp dport != 12 accept; }; }",
    )?;
    let rule = |chain: &str, with: &str| -> Result<_> {
        let handle = handle(client, &format!("inet t {chain}"), with)?;
        Ok(serde_json::json!({ "family": "inet", "table": "t", "chain": chain, "handle": handle }))
    };
    let policy = serde_json::json!({ "family": "ip", "table": "p", "chain": "o", "handle": null, "policy": true });
    let expected = [
        (9, rule("sub", "dport 9 ")?),
        (10, rule("out", "dport 10 ")?),
        (11, rule("out", "reject")?),
        (14, rule("out", "vmap")?),
        (12, policy),
    ];
    let run = Netprobe::new("skb")
        .args(["--drops", "--output-nft", "--output-json"])
        .args(["--filter-proto", "udp", "--filter-netns", client.name()])
        .start()?;
    for (port, _) in &expected {
        client.udp_send(net.server.v4(*port), b"x")?;
    }
    run.wait_line("\"dport\":12,")?;
    let done = run.stop()?;
    done.expect_success()?;
    let rows = done.json()?;
    for (port, right) in &expected {
        let row = rows.iter().find(|r| r["tuple"]["dport"] == *port);
        let said = row.map(|r| &r["nft"]);
        ensure!(said == Some(right), "port {port}: {right}\n{done}");
    }
    // By functions, in text; a packet that nft let pass has no rule.
    let run = Netprobe::new("skb")
        .args(["--output-nft", "--filter-func"])
        .arg("kfree_skb|kfree_skb_reason|sk_skb_reason_drop|nf_hook_slow")
        .args(["--filter-proto", "udp", "--filter-netns", client.name()])
        .start()?;
    client.udp_send("127.0.0.1:13".parse()?, b"nobody listens")?;
    client.udp_send(net.server.v4(10), b"x")?;
    let rule = &expected[1].1["handle"];
    let line = run.wait_line("[nft ")?;
    ensure!(
        line.contains("NETFILTER_DROP")
            && line.ends_with(&format!(" [nft inet t out handle {rule}]")),
        "{line}"
    );
    let done = run.stop()?;
    ensure!(done.lines_with("[nft ").len() == 1, "{done}");
    done.expect_success()
}

/// As container engines write them: many chains, one after the other and within each other, fourteen deep, on the way in, both families.
fn chain_of_chains() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let server = &net.server;
    let mut rules = String::from("table inet fw { chain d14 { udp dport 84 counter drop; }; ");
    for i in (1..14).rev() {
        rules += &format!("chain d{i} {{ jump d{}; udp dport 9{i} return; }}; ", i + 1);
    }
    for i in (1..10).rev() {
        let own = match i {
            8 => "jump c9; udp dport 81 counter drop; ",
            _ => "",
        };
        rules += &format!("chain c{i} {{ {own}udp dport 9{i} return; }}; ");
    }
    rules += "chain in { type filter hook input priority 0; ";
    for i in 1..10 {
        rules += &format!("jump c{i}; ");
    }
    // At the end of a chain the way goes on in the one that it came from.
    server.nft(&(rules + "udp dport 83 jump c7; udp dport 83 drop; udp dport 84 jump d1; }; }"))?;
    let c8 = handle(server, "inet fw c8", "drop")?;
    let base = handle(server, "inet fw in", "dport 83 drop")?;
    let d14 = handle(server, "inet fw d14", "drop")?;
    let run = drops(server)?;
    for (port, end) in [
        (81, format!("[nft inet fw c8 handle {c8}]")),
        (83, format!("[nft inet fw in handle {base}]")),
        (84, format!("[nft inet fw d14 handle {d14}]")),
    ] {
        net.client.udp_send(net.server.v6(port), b"x")?;
        let line = run.wait_line(&format!("[fd77::2]:{port}(udp)"))?;
        ensure!(line.ends_with(&end), "not {end}: {line}");
        net.client.udp_send(net.server.v4(port), b"x")?;
        let line = run.wait_line(&format!("10.77.0.2:{port}(udp)"))?;
        ensure!(line.ends_with(&end), "not {end}: {line}");
    }
    run.stop()?.expect_success()
}

/// goto, whose chain does not come back; maps of verdicts, jumps among them, as kube-proxy's nft mode has; a set.
fn goto_and_maps() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let client = &net.client;
    client.nft(
        "table ip m { set banned { type ipv4_addr; elements = { 10.77.0.2 } ; }; \
         map svc { type inet_proto . inet_service : verdict; }; \
         chain last { udp dport 22 counter drop; udp dport 23 return; udp dport 24 ip daddr @banned drop; }; \
         chain leave { udp dport 21 drop; }; \
         chain mid { udp dport 20-21 goto leave; jump last; udp dport 20-23 drop; }; \
         chain out { type filter hook output priority 0; meta l4proto . udp dport vmap @svc; udp dport 20 drop; }; }; \
         add element ip m svc { udp . 20 : jump mid, udp . 21 : jump mid, udp . 22 : goto mid, udp . 23 : jump mid, udp . 24 : jump last, udp . 25 : drop }",
    )?;
    let h = |chain: &str, with: &str| handle(client, &format!("ip m {chain}"), with);
    let run = drops(client)?;
    for (port, end) in [
        // leave ends without a verdict: back in out, not in mid.
        (
            20,
            format!("[nft ip m out handle {}]", h("out", "dport 20 drop")?),
        ),
        (
            21,
            format!("[nft ip m leave handle {}]", h("leave", "drop")?),
        ),
        (
            22,
            format!("[nft ip m last handle {}]", h("last", "dport 22")?),
        ),
        (
            23,
            format!("[nft ip m mid handle {}]", h("mid", "20-23 drop")?),
        ),
        (
            24,
            format!("[nft ip m last handle {}]", h("last", "@banned")?),
        ),
        (25, format!("[nft ip m out handle {}]", h("out", "vmap")?)),
    ] {
        client.udp_send(net.server.v4(port), b"x")?;
        ends(&run, port, &end)?;
    }
    run.stop()?.expect_success()
}

/// Tables that accept, or have no rules, come before the one that drops; and after it comes one that is never asked.
fn later_hooks() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let client = &net.client;
    client.nft(
        "table ip a { chain o { type filter hook output priority -10; udp dport 30 accept; }; }; \
         table ip e { chain o { type filter hook output priority -5; }; }; \
         table ip z { chain o { type filter hook output priority 5; policy drop; udp dport != 30 accept; }; }; \
         table ip n { chain o { type filter hook output priority 9; udp dport 30 drop; }; }; \
         table inet q { chain p { type filter hook postrouting priority 0; udp dport 31 reject with icmpx admin-prohibited; udp dport 31 drop; }; }",
    )
    .or_else(|_| {
        // No reject after routing.
        client.nft(
            "table ip a { chain o { type filter hook output priority -10; udp dport 30 accept; }; }; \
             table ip e { chain o { type filter hook output priority -5; }; }; \
             table ip z { chain o { type filter hook output priority 5; policy drop; udp dport != 30 accept; }; }; \
             table ip n { chain o { type filter hook output priority 9; udp dport 30 drop; }; }; \
             table inet q { chain p { type filter hook postrouting priority 0; udp dport 31 drop; }; }",
        )
    })?;
    let p = handle(client, "inet q p", "dport 31")?;
    let run = drops(client)?;
    client.udp_send(net.server.v4(30), b"x")?;
    ends(&run, 30, "[nft ip z o policy]")?;
    client.udp_send(net.server.v4(31), b"x")?;
    ends(&run, 31, &format!("[nft inet q p handle {p}]"))?;
    run.stop()?.expect_success()
}

/// A packet that no rule saw, at the address of one that a rule dropped just before, is not laid to that rule.
fn not_the_last_packets_rule() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    net.client
        .nft("table ip t { chain o { type filter hook output priority 0; udp dport 99 counter drop; }; }")?;
    let h = handle(&net.client, "ip t o", "drop")?;
    let run = Netprobe::new("skb")
        .args(["--drops", "--output-nft", "--filter-proto", "udp"])
        .start()?;
    for _ in 0..10 {
        net.client.udp_send(net.server.v4(99), b"x")?;
        // Nobody listens there.
        net.server.udp_send(net.client.v4(1234), b"x")?;
    }
    let count = |text: &str, what: &str| text.lines().filter(|l| l.contains(what)).count();
    let end = format!("[nft ip t o handle {h}]");
    run.wait_lines("all drops", |text| {
        (count(text, ":99(udp)") == 10 && count(text, ":1234(udp)") == 10).then_some(())
    })?;
    let done = run.stop()?;
    ensure!(
        done.lines_with(&end).len() == 10,
        "not 10 by the rule:\n{done}"
    );
    ensure!(
        done.lines_with(":1234(udp)")
            .iter()
            .all(|l| !l.contains('[')),
        "a rule that never saw the packet:\n{done}"
    );
    done.expect_success()
}

/// Queues that no program reads: the kernel drops what a rule gives to them.
fn queue() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    net.client.nft(
        "table ip t { chain o { type filter hook output priority 0; udp dport 99 queue num 5; }; }",
    )?;
    let h = handle(&net.client, "ip t o", "queue")?;
    let run = drops(&net.client)?;
    net.client.udp_send(net.server.v4(99), b"x")?;
    ends(&run, 99, &format!("[nft ip t o handle {h} queue]"))?;
    run.stop()?.expect_success()
}

/// Sets the limit of connections that are tracked, and what it was before when it is dropped.
struct Limit(String);

impl Limit {
    const FILE: &str = "/proc/sys/net/nf_conntrack_max";

    fn set(value: &str) -> Result<Self> {
        let before = std::fs::read_to_string(Self::FILE)?;
        std::fs::write(Self::FILE, value)?;
        Ok(Self(before))
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        let _ = std::fs::write(Self::FILE, &self.0);
    }
}

/// Connection tracking drops when its table is full: no rule did, whatever chains there are.
fn conntrack_full() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    net.client.nft(
        "table ip t { chain raw { type filter hook output priority -300; }; \
         chain o { type filter hook output priority 0; ct state invalid drop; udp dport 99 drop; }; }",
    )?;
    // An entry that is not given up for another: a connection that is established.
    let server = net.server.tcp_listen(net.server.v4(0))?;
    let _held = net.client.tcp_connect(server.address(), deadline())??;
    let limit = Limit::set("1")?;
    let run = drops(&net.client)?;
    net.client.udp_send(net.server.v4(99), b"x")?;
    ends(
        &run,
        99,
        "[netfilter ipv4_conntrack_local: connection tracking]",
    )?;
    drop(limit);
    run.stop()?.expect_success()
}

/// What iptables-nft keeps as a target of the older kind within an nft rule.
fn xt_target() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let client = &net.client;
    client.cmd("iptables -A OUTPUT -p udp --dport 40 -j LOG")?;
    client.cmd(
        "iptables -A OUTPUT -p udp --dport 40 -j REJECT --reject-with icmp-admin-prohibited",
    )?;
    let h = handle(client, "ip filter OUTPUT", "eject")?;
    let run = drops(client)?;
    client.udp_send(net.server.v4(40), b"x")?;
    ends(&run, 40, &format!("[nft ip filter OUTPUT handle {h}]"))?;
    run.stop()?.expect_success()
}

/// The table of the older iptables and its hook; a jump may have led to any of its chains.
fn legacy() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let client = &net.client;
    client.cmd("iptables-legacy -N OTHER")?;
    client.cmd("iptables-legacy -A OUTPUT -p udp -j OTHER")?;
    client.cmd("iptables-legacy -A OTHER -p udp --dport 10 -j DROP")?;
    // nft lets it pass first, or would drop it later.
    client.nft(
        "table ip t { chain o { type filter hook output priority -200; }; \
         chain late { type filter hook output priority 200; udp dport 10 drop; }; }",
    )?;
    let run = drops(client)?;
    client.udp_send(net.server.v4(10), b"x")?;
    let line = run.wait_line(":10(udp)")?;
    ensure!(
        line.contains("NETFILTER_DROP")
            && line.ends_with(
                " [iptables ip filter, hook OUTPUT, chain and rule unknown: legacy tables do not show them]"
            ),
        "{line}"
    );
    run.stop()?.expect_success()
}

/// A rule whose expression may be in a module that is loaded during the run: its verdict is not the policy's.
fn late_expression() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let client = &net.client;
    let table = "table inet t { chain o { type filter hook output priority 0; policy drop; }; }";
    client.nft(table)?;
    let run = drops(client)?;
    client.nft("add rule inet t o udp dport 10 reject")?;
    client.udp_send(net.server.v4(10), b"x").ok();
    let line = run.wait_line(":10(udp)")?;
    let handle = handle(client, "inet t o", "reject")?;
    let known = format!("[nft inet t o handle {handle}]");
    ensure!(
        line.ends_with(&known)
            || line.ends_with("[nft inet t, chain and rule unknown: what decided was not seen]"),
        "not {known}, and not unknown: {line}"
    );
    run.stop()?.expect_success()
}

fn refused() -> Result<()> {
    let done = Netprobe::new("skb").arg("--output-nft").run()?;
    done.expect_code(1)?;
    done.expect_stderr("5.11")
}
