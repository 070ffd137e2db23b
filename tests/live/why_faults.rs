//! Faults as data (faults.toml): each is set up, its packet is sent, and netprobe why must name the end, the rule, the place and the
//! proof. All of them stand in one network, and one run sees them all: packets followed by an expression, those of a command, and those
//! of a container.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use libbpf_sys as sys;
use serde::Deserialize;
use serde_json::Value;

use super::faults_traffic::{self, HELPER};
use super::who::Container;
use super::why::Line;
use crate::common::{Case, Env, Finished, Netns, Netprobe, case, refuse_all, wait_for, which};

pub fn cases() -> Vec<Case> {
    let all = |name, body| {
        case(name, body)
            .trace()
            .program("nft")
            .program("tc")
            .program("ping")
            .limit(300)
    };
    vec![
        all("why_faults", || run(&Form::Expression)),
        all("why_faults_of_a_command", || run(&Form::Command))
            .once_on("6.12")
            .when(repeated),
        all("why_faults_of_a_container", || run(&Form::Container))
            .once_on("6.12")
            .when(repeated),
    ]
}

/// The same table again: on one kernel, or where it is asked for.
fn repeated(env: &Env) -> Option<String> {
    let here = (6, 12) == env.kernel || std::env::var_os("NETPROBE_LIVE_FAULTS_ALL").is_some();
    (!here).then(|| {
        "the same faults in this form run on 6.12 (NETPROBE_LIVE_FAULTS_ALL=1: everywhere)"
            .to_owned()
    })
}

/// How the packets are chosen.
enum Form {
    Expression,
    Command,
    Container,
}

/// A packet and what must be said of it. In all texts `{port}` is its port, `{n}` its number.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    pub name: String,
    /// a pair of devices of its own: c{n} at the client, s{n} at the server, 10.90.{n}.1 and .2
    #[serde(default)]
    pair: bool,
    #[serde(default)]
    setup: Vec<String>,
    traffic: Vec<String>,
    /// traffic after that of all others
    #[serde(default)]
    last: Vec<String>,
    /// once the run is over
    #[serde(default)]
    after: Vec<String>,
    end: String,
    /// one of these; by kernel where they differ: reasons are newer than 5.10
    #[serde(default)]
    rule: Vec<String>,
    #[serde(default)]
    place: Vec<String>,
    #[serde(default)]
    proof: String,
    /// in the text of a stage
    #[serde(default)]
    stages: String,
    /// what the sender was told
    #[serde(default)]
    told: String,
    /// its packet has this protocol and destination, where it has no port
    #[serde(default)]
    to: Option<String>,
    /// from this kernel on
    #[serde(default)]
    kernel: Option<(u32, u32)>,
    #[serde(default)]
    program: Option<String>,
    /// the proof needs this kernel
    #[serde(default)]
    proof_kernel: Option<(u32, u32)>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    fault: Vec<Fault>,
}

/// The table, with what stands for numbers put in.
pub fn table() -> Result<Vec<Fault>> {
    let text = match std::env::var_os("NETPROBE_LIVE_FAULTS") {
        Some(file) => std::fs::read_to_string(file)?,
        None => include_str!("faults.toml").to_owned(),
    };
    let table: Table = toml::from_str(&text)?;
    let mut all = table.fault;
    for (i, fault) in all.iter_mut().enumerate() {
        let n = i + 1;
        let put = |text: &mut String| {
            *text = text
                .replace("{n}", &n.to_string())
                .replace("{h}", &format!("{n:02x}"))
                .replace("{port}", &(1000 + n).to_string());
        };
        let lists = [&mut fault.setup, &mut fault.traffic, &mut fault.last];
        lists.into_iter().flatten().for_each(put);
        put(&mut fault.proof);
        fault.to.iter_mut().for_each(put);
    }
    Ok(all)
}

impl Fault {
    /// Why it cannot be provoked here.
    fn lacks(&self, env: &Env) -> Option<String> {
        if let Some((major, minor)) = self.kernel.filter(|k| env.kernel < *k) {
            return Some(format!("needs kernel {major}.{minor}"));
        }
        let program = self.program.as_ref()?;
        which(program)
            .is_none()
            .then(|| format!("needs the program {program}"))
    }

    fn is_row(&self, port: u16, row: &Value) -> bool {
        let here = match &self.to {
            Some(to) => row["destination"] == to.as_str(),
            None => row["dport"] == port,
        };
        row["type"] == "packet" && here && row["end"] == self.end.as_str()
    }

    /// A row of the table in docs/why.md.
    fn show(&self, port: u16, rows: &[Value]) {
        let Some(row) = rows.iter().find(|r| self.is_row(port, r)) else {
            return;
        };
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let drop = &row["drop"];
        let proofs = row["proof"].as_array().into_iter().flatten();
        let proofs: Vec<String> = proofs.map(|p| text(&p["text"])).collect();
        let told = match text(&drop["rejected_with"]) {
            told if told.is_empty() => told,
            told => format!(", {told}"),
        };
        let change = row["change"].as_array().into_iter().flatten();
        let change: Vec<String> = change.map(text).collect();
        eprintln!(
            "| {} | {}{told} | {} | {} | {} | {} |",
            self.name,
            self.end,
            text(&drop["rule"]),
            text(&drop["place"]),
            proofs.join("; "),
            change.join("; ")
        );
    }

    fn check(&self, port: u16, rows: &[Value], env: &Env) -> Result<(), String> {
        let near: Vec<&Value> = rows
            .iter()
            .filter(|r| {
                r["dport"] == port
                    || self
                        .to
                        .as_ref()
                        .is_some_and(|t| r["destination"] == t.as_str())
            })
            .collect();
        // Some packets of a fault may have another one: those of a full queue arrive at a port without a socket.
        let mut found = rows.iter().filter(|r| self.is_row(port, r));
        let Some(first) = found.next() else {
            return Err(format!("none is {}: {}", self.end, brief(&near)));
        };
        let wrong = self.wrong(first, env);
        if wrong.is_empty() || found.any(|row| self.wrong(row, env).is_empty()) {
            return Ok(());
        }
        Err(format!("{}: {}", wrong.join(", "), brief(&near)))
    }

    /// What is not as it must be in this row.
    fn wrong(&self, row: &Value, env: &Env) -> Vec<String> {
        let drop = &row["drop"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let is_one =
            |list: &[String], found: &str| list.is_empty() || list.iter().any(|l| l == found);
        let (rule, place) = (text(&drop["rule"]), text(&drop["place"]));
        let plain = place.split('.').next().unwrap_or_default();
        let told = text(&drop["rejected_with"]);
        let proofs = row["proof"].as_array().into_iter().flatten();
        let proofs: Vec<String> = proofs.map(|p| text(&p["text"])).collect();
        let proofs = proofs.join("; ");
        let good = matches!(&*self.end, "delivered" | "answered" | "sent" | "here");
        let unchanged = !good && row["change"].as_array().is_none_or(Vec::is_empty);
        let stages = row["stages"].as_array().into_iter().flatten();
        let stages: Vec<String> = stages.map(|s| text(&s["fact"])).collect();
        let old = self.proof_kernel.is_some_and(|k| env.kernel < k);
        let passed = old || stages.iter().any(|s| s.contains(&self.stages));
        let proved = old || proofs.contains(&self.proof);
        let wrong = [
            (!passed, format!("stages {stages:?}")),
            (unchanged, "nothing is said to change".to_owned()),
            (!is_one(&self.rule, &rule), format!("rule {rule}")),
            (!is_one(&self.place, plain), format!("place {plain}")),
            (!told.contains(&self.told), format!("told {told:?}")),
            (!proved, format!("proof {proofs:?}")),
        ];
        wrong.into_iter().filter(|w| w.0).map(|w| w.1).collect()
    }
}

/// The rows that are near, short.
fn brief(rows: &[&Value]) -> String {
    let one = |row: &&Value| {
        let drop = &row["drop"];
        let stages = row["stages"].as_array().into_iter().flatten();
        let stages: Vec<&str> = stages.filter_map(|s| s["stage"].as_str()).collect();
        let proofs = row["proof"].as_array().into_iter().flatten();
        let proofs: Vec<String> = proofs.map(|p| p["text"].to_string()).collect();
        format!(
            "\n      [{} {} {} in {} dev {} told {} netfilter {}; {}; {}; {}]",
            row["end"],
            row["what"],
            drop["rule"],
            drop["place"],
            drop["device"],
            drop["rejected_with"],
            drop["netfilter"],
            stages.join(" "),
            proofs.join("; "),
            row["packet"]
        )
    };
    rows.iter().map(one).collect()
}

/// What a set-up holds until the run is over.
#[derive(Default)]
struct Held {
    udp: Vec<std::net::UdpSocket>,
    tcp: Vec<OwnedFd>,
    servers: Vec<crate::common::TcpServer>,
    connected: Vec<Vec<std::net::TcpStream>>,
    programs: Vec<OwnedFd>,
}

/// Lines for one program, in a namespace.
#[derive(Default)]
struct Batches(BTreeMap<(usize, &'static str), String>);

/// `ip` and `tc` read theirs from stdin, nft in one go.
fn batch(netns: &Netns, tool: &str, lines: &str) -> Result<()> {
    if tool == "nft" {
        return netns.nft(lines).map(drop);
    }
    let mut command = Command::new(tool);
    command.args(["-batch", "-"]).stdin(Stdio::piped());
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = netns.enter(|| command.spawn())??;
    let mut stdin = child.stdin.take().context("no stdin")?;
    stdin.write_all(lines.as_bytes())?;
    drop(stdin);
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{tool}: {said}{lines}");
    Ok(())
}

/// The network of all faults.
struct Network {
    line: Line,
    held: Held,
}

impl Network {
    fn new(faults: &[(u16, Fault)]) -> Result<Self> {
        let mut network = Self {
            line: Line::new()?,
            held: Held::default(),
        };
        network.pairs(faults)?;
        let mut batches = Batches::default();
        let mut others = Vec::new();
        for (port, fault) in faults {
            for line in &fault.setup {
                let words: Vec<&str> = line.splitn(3, ' ').collect();
                let [place, tool, rest] = words[..] else {
                    bail!("{}: {line:?}", fault.name);
                };
                let tool = match tool {
                    "ip" => "ip",
                    "tc" => "tc",
                    "nft" => "nft",
                    _ => {
                        others.push((
                            *port,
                            place.to_owned(),
                            tool.to_owned(),
                            rest.to_owned(),
                            &fault.name,
                        ));
                        continue;
                    }
                };
                let lines = batches.0.entry((place_of(place)?, tool)).or_default();
                *lines += &format!("{rest}\n");
            }
        }
        for ((place, tool), lines) in &batches.0 {
            batch(network.place(*place), tool, lines)?;
        }
        for (port, place, tool, rest, name) in others {
            let done = network.set(place_of(&place)?, &tool, &rest, port);
            done.with_context(|| format!("{name}: {tool} {rest}"))?;
        }
        Ok(network)
    }

    fn place(&self, place: usize) -> &Netns {
        [&self.line.net.client, &self.line.net.server, &self.line.far][place]
    }

    /// The pairs of devices of single faults.
    fn pairs(&self, faults: &[(u16, Fault)]) -> Result<()> {
        let (client, server) = (self.place(0), self.place(1));
        let (mut here, mut there) = (String::new(), String::new());
        for (port, _) in faults.iter().filter(|(_, f)| f.pair) {
            let n = port - 1000;
            let peer = server.name();
            here += &format!(
                "link add c{n} address 02:00:00:00:{n:02x}:01 type veth peer name s{n} address 02:00:00:00:{n:02x}:02 netns {peer}\n"
            );
            for (lines, dev, own, other) in [(&mut here, 'c', 1, 2), (&mut there, 's', 2, 1)] {
                *lines += &format!(
                    "addr add 10.90.{n}.{own}/24 dev {dev}{n}\naddr add fd90:{n}::{own}/64 dev {dev}{n} nodad\nlink set {dev}{n} up\n\
                     neigh replace 10.90.{n}.{other} lladdr 02:00:00:00:{n:02x}:0{other} dev {dev}{n} nud permanent\n\
                     neigh replace fd90:{n}::{other} lladdr 02:00:00:00:{n:02x}:0{other} dev {dev}{n} nud permanent\n"
                );
            }
        }
        batch(client, "ip", &here)?;
        batch(server, "ip", &there)
    }

    /// A line of a set-up that is no batch's.
    fn set(&mut self, place: usize, tool: &str, rest: &str, port: u16) -> Result<()> {
        let words: Vec<&str> = rest.split_whitespace().collect();
        let option = |name: &str| {
            words
                .iter()
                .find_map(|w| w.strip_prefix(name)?.strip_prefix('='))
        };
        match (tool, words.as_slice()) {
            ("sysctl", [key, value @ ..]) => self.place(place).sysctl(key, &value.join(" "))?,
            ("cmd", _) => drop(self.place(place).cmd(rest)?),
            ("udp", [address, ..]) => {
                let socket = self.place(place).udp_bind(address.parse()?)?;
                if let Some(size) = option("rcvbuf") {
                    nix::sys::socket::setsockopt(
                        &socket,
                        nix::sys::socket::sockopt::RcvBufForce,
                        &size.parse()?,
                    )?;
                }
                if words.contains(&"filter") {
                    refuse_all(&socket)?;
                }
                self.held.udp.push(socket);
            }
            ("tcp", [address, ..]) => match option("backlog") {
                None => self
                    .held
                    .servers
                    .push(self.place(place).tcp_listen(address.parse()?)?),
                Some(backlog) => {
                    let (fd, to) = self
                        .place(place)
                        .tcp_listen_only(address.parse()?, backlog.parse()?)?;
                    if let Some(count) = option("fill") {
                        let (from, server) = (self.place(0), self.place(place));
                        let full = from.fill_accept_queue(server, to, count.parse()?)?;
                        self.held.connected.push(full);
                    }
                    self.held.tcp.push(fd);
                }
            },
            // A port's state, as user space's STP sets it: once the device is up.
            ("port", [device, state]) => wait_for("a port that is up", || {
                let set = format!("bridge link set dev {device} state {state}");
                Ok(self.place(place).cmd(&set).ok().map(drop))
            })?,
            ("xdp", [device, mode]) => self.xdp(place, device, mode)?,
            ("tcbpf", [device, way]) => self.tc(place, device, way)?,
            ("cgroup", ["egress"]) => self.cgroup(port)?,
            _ => bail!("no such line"),
        }
        Ok(())
    }

    /// An XDP program that drops everything.
    fn xdp(&mut self, place: usize, device: &str, mode: &str) -> Result<()> {
        let program = load(sys::BPF_PROG_TYPE_XDP, c"why_xdp", &returns(1))?;
        let index = self.place(place).ifindex(device)? as i32;
        let flags = if mode == "native" { 1 << 2 } else { 1 << 1 };
        let fd = program.as_raw_fd();
        // SAFETY: numbers and no options.
        let code = self
            .place(place)
            .enter(|| unsafe { sys::bpf_xdp_attach(index, fd, flags, std::ptr::null()) })?;
        ensure!(code == 0, "failed to attach: {code}");
        self.held.programs.push(program);
        Ok(())
    }

    /// A tc program that drops everything.
    fn tc(&mut self, place: usize, device: &str, way: &str) -> Result<()> {
        let program = load(sys::BPF_PROG_TYPE_SCHED_CLS, c"why_tc", &returns(2))?;
        let path = format!("/sys/fs/bpf/npt-why-{}", program.as_raw_fd());
        let name = std::ffi::CString::new(path.clone())?;
        // SAFETY: the path lives through the call.
        let code = unsafe { sys::bpf_obj_pin(program.as_raw_fd(), name.as_ptr()) };
        ensure!(code == 0, "failed to pin: {code}");
        let netns = self.place(place);
        netns.cmd(&format!("tc qdisc add dev {device} clsact"))?;
        let added = netns.cmd(&format!(
            "tc filter add dev {device} {way} bpf da object-pinned {path}"
        ));
        std::fs::remove_file(&path)?;
        added?;
        self.held.programs.push(program);
        Ok(())
    }

    /// A program of the first cgroup that refuses UDP to a port.
    fn cgroup(&mut self, port: u16) -> Result<()> {
        let insn = |code: u32, dst: u8, src: u8, off: i16, imm: i32| {
            let mut insn = sys::bpf_insn {
                code: code as u8,
                off,
                imm,
                ..Default::default()
            };
            insn.set_dst_reg(dst);
            insn.set_src_reg(src);
            insn
        };
        let load_word = sys::BPF_LDX | sys::BPF_MEM | sys::BPF_W;
        let wanted = i32::from(port.to_be());
        // The destination port behind an IPv4 header, between data and data_end of struct __sk_buff.
        let code = [
            insn(load_word, 2, 1, 76, 0),
            insn(load_word, 3, 1, 80, 0),
            insn(sys::BPF_ALU64 | sys::BPF_MOV | sys::BPF_X, 4, 2, 0, 0),
            insn(sys::BPF_ALU64 | sys::BPF_ADD | sys::BPF_K, 4, 0, 0, 24),
            insn(sys::BPF_JMP | sys::BPF_JGT | sys::BPF_X, 4, 3, 2, 0),
            insn(sys::BPF_LDX | sys::BPF_MEM | sys::BPF_H, 0, 2, 22, 0),
            insn(sys::BPF_JMP | sys::BPF_JEQ | sys::BPF_K, 0, 0, 2, wanted),
            insn(sys::BPF_ALU64 | sys::BPF_MOV | sys::BPF_K, 0, 0, 0, 1),
            insn(sys::BPF_JMP | sys::BPF_EXIT, 0, 0, 0, 0),
            insn(sys::BPF_ALU64 | sys::BPF_MOV | sys::BPF_K, 0, 0, 0, 0),
            insn(sys::BPF_JMP | sys::BPF_EXIT, 0, 0, 0, 0),
        ];
        let program = load(sys::BPF_PROG_TYPE_CGROUP_SKB, c"why_cgroup", &code)?;
        let group = std::fs::File::open("/sys/fs/cgroup")?;
        // SAFETY: file descriptors that are open, and numbers. BPF_F_ALLOW_MULTI is 2.
        let code = unsafe {
            sys::bpf_prog_attach(
                program.as_raw_fd(),
                group.as_raw_fd(),
                sys::BPF_CGROUP_INET_EGRESS,
                2,
            )
        };
        ensure!(code == 0, "failed to attach: {code}");
        self.held.programs.push(program);
        Ok(())
    }

    fn detach(&self) {
        let Ok(group) = std::fs::File::open("/sys/fs/cgroup") else {
            return;
        };
        for program in &self.held.programs {
            // SAFETY: file descriptors that are open; one that is not attached there is refused.
            unsafe {
                sys::bpf_prog_detach2(
                    program.as_raw_fd(),
                    group.as_raw_fd(),
                    sys::BPF_CGROUP_INET_EGRESS,
                );
            }
        }
    }

    /// What comes late: fragments that wait for others, a neighbour that does not answer.
    fn settle(&self) -> Result<()> {
        // A file is read, and no question asked by netlink: a timer that fires while a probe runs is not seen.
        wait_for("a fragment that is given up", || {
            let snmp = self
                .place(1)
                .enter(|| std::fs::read_to_string("/proc/thread-self/net/snmp"))??;
            let mut lines = snmp.lines().filter(|l| l.starts_with("Ip:"));
            let names = lines.next().unwrap_or_default().split(' ');
            let values = lines.next().unwrap_or_default().split(' ');
            let given_up = names
                .zip(values)
                .any(|(n, v)| n == "ReasmTimeout" && v != "0");
            Ok(given_up.then_some(()))
        })?;
        wait_for("a neighbour that fails", || {
            let neighbours = self.place(1).ip("neigh show 10.78.0.77")?;
            // Of more than 128 neighbours the kernel soon forgets those that failed.
            let failed = neighbours.contains("FAILED") || neighbours.trim().is_empty();
            Ok(failed.then_some(()))
        })
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.detach();
    }
}

fn place_of(name: &str) -> Result<usize> {
    let places = ["client", "server", "far"];
    let found = places.iter().position(|p| *p == name);
    found.with_context(|| format!("no place {name:?}"))
}

/// A program that returns a number.
fn returns(value: i32) -> [sys::bpf_insn; 2] {
    let mov = sys::bpf_insn {
        code: (sys::BPF_ALU64 | sys::BPF_MOV | sys::BPF_K) as u8,
        imm: value,
        ..Default::default()
    };
    let exit = sys::bpf_insn {
        code: (sys::BPF_JMP | sys::BPF_EXIT) as u8,
        ..Default::default()
    };
    [mov, exit]
}

fn load(kind: u32, name: &std::ffi::CStr, code: &[sys::bpf_insn]) -> Result<OwnedFd> {
    // SAFETY: strings and instructions live through the call; no options.
    let fd = unsafe {
        sys::bpf_prog_load(
            kind,
            name.as_ptr(),
            c"GPL".as_ptr(),
            code.as_ptr(),
            code.len() as _,
            std::ptr::null_mut(),
        )
    };
    ensure!(fd > 0, "failed to load a program: {fd}");
    // SAFETY: the call just returned this fd, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn run(form: &Form) -> Result<()> {
    let env = Env::look();
    let numbered = (1001u16..).zip(table()?);
    let (all, lacking): (Vec<_>, Vec<_>) = numbered.partition(|(_, f)| f.lacks(&env).is_none());
    for (_, fault) in &lacking {
        let why = fault.lacks(&env).unwrap_or_default();
        eprintln!("why_faults: {}: {why}", fault.name);
    }
    let network = Network::new(&all)?;
    let first = all.iter().flat_map(|(_, f)| &f.traffic);
    let last = all.iter().flat_map(|(_, f)| &f.last);
    let lines: Vec<&str> = first.chain(last).map(String::as_str).collect();
    let lines = lines.join("\n");
    let done = match form {
        Form::Expression => by_expression(&network, &lines),
        Form::Command => by_command(&network, &lines),
        Form::Container => by_container(&network, &lines),
    };
    for line in all.iter().flat_map(|(_, f)| &f.after) {
        faults_traffic::send_all(line)?;
    }
    let done = done?;
    done.expect_success()?;
    let rows = done.json()?;
    let mut wrong = Vec::new();
    for (port, fault) in &all {
        if std::env::var_os("NETPROBE_LIVE_FAULTS_SHOW").is_some() {
            fault.show(*port, &rows);
        }
        if let Err(what) = fault.check(*port, &rows, &env) {
            wrong.push(format!("  {} ({port}): {what}", fault.name));
        }
    }
    ensure!(
        wrong.is_empty(),
        "{} of {}:\n{}\n{}",
        wrong.len(),
        all.len(),
        wrong.join("\n"),
        done.stderr
    );
    // A probe that is hit while another one runs is skipped, which netprobe says; no event may be lost.
    let loss = rows.iter().find(|r| r["type"] == "loss");
    ensure!(
        loss.is_none_or(|l| l["lost"] == 0 && l["undecodable"] == 0),
        "{loss:?}"
    );
    Ok(())
}

fn by_expression(network: &Network, lines: &str) -> Result<Finished> {
    let run = Netprobe::new("why").arg("--output-json").start()?;
    network
        .place(0)
        .enter(|| faults_traffic::send_all(lines))??;
    network.settle()?;
    run.stop()
}

/// The file with the traffic, and the helper that sends it.
fn helper(lines: &str) -> Result<(tempfile::NamedTempFile, String)> {
    let mut file = tempfile::NamedTempFile::new()?;
    file.write_all(lines.as_bytes())?;
    let program = std::env::current_exe()?.display().to_string();
    Ok((file, program))
}

fn by_command(network: &Network, lines: &str) -> Result<Finished> {
    let (file, program) = helper(lines)?;
    let path = file.path().display().to_string();
    // A child that lives until all is over: the run ends with its command.
    let script = format!("{HELPER}={path} {program}; ok=$?; read -r end < {path}.go; exit $ok");
    let go = format!("{path}.go");
    nix::unistd::mkfifo(go.as_str(), nix::sys::stat::Mode::S_IRWXU)?;
    let run = Netprobe::new("why")
        .args(["--output-json", "--", "/bin/sh", "-c", &script])
        .netns(network.place(0))
        .spawn()?;
    // The FIFO can be opened once the helper is done.
    let opened = wait_for("the end of the traffic", || {
        ensure!(!run.has_ended()?, "ended early: {}", run.stderr());
        let mut to = std::fs::OpenOptions::new();
        let opened = to.write(true).custom_flags(nix::libc::O_NONBLOCK).open(&go);
        Ok(opened.ok())
    });
    let settled = network.settle();
    drop(opened?.write_all(b"end\n"));
    std::fs::remove_file(&go)?;
    settled?;
    run.wait()
}

fn by_container(network: &Network, lines: &str) -> Result<Finished> {
    let (file, program) = helper(lines)?;
    let container = Container::new("npt-faults", "b7")?;
    let run = Netprobe::new("why")
        .args(["--output-json", "--container", "npt-faults"])
        .start()?;
    let path = file.path().display();
    container.run(network.place(0), &format!("env {HELPER}={path} {program}"))?;
    network.settle()?;
    run.stop()
}
