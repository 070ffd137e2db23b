//! The measurements of `make bench`, inside the instruction-counted virtual machine: bench/run starts it there. In such a guest a
//! nanosecond is an instruction, so every time printed here is a count of instructions that repeats.
//!
//! Prints `= NAME VALUE` lines for bench/run, and `! SCENARIO: WHY` for what could not be measured.

mod child;
mod drops;
mod filter;
mod hooks;
mod latency;
mod net;
mod rate;
mod record;
mod why;

use std::ffi::CStr;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use netprobe::engine::batch::Batch;
use netprobe::kernel::functions::address;
use netprobe::kernel::xdp::Mode;
use netprobe::os::monotonic_ns;

use child::Tool;
use hooks::{Empty, Hooks};
use net::Net;

/// Packets in a measurement, and before it.
const PACKETS: u64 = 500;
const WARM_UP: u64 = 50;
/// What a kernel still does by itself after its boot would be in the first figures. Costs nothing: an idle guest's clock leaps.
const AFTER_BOOT: Duration = Duration::from_secs(30);
/// Bursts of packets to be captured, each a bit later after the last than the one before: a tool that looks at its buffers now and
/// then (netprobe four times a second) does so in as many bursts as fall together with that, not in all or none.
const BURSTS: u32 = 10;
const STEP: Duration = Duration::from_millis(23);
const LIMIT: Duration = Duration::from_secs(300);
/// Programs are found by PATH; files are made in the working directory.
const NETPROBE: &str = "netprobe";
const PWRU: &str = "pwru";
/// Where every tool writes what it captures.
const CAPTURE: &str = "captured";
/// libbpf-tools' and bpftrace's for how long packets take.
const LATENCY_PEERS: [(&str, &str); 4] = [
    ("peer-tcprtt", "exec peer-tcprtt"),
    ("peer-softirqs", "exec peer-softirqs -d"),
    (
        "bpftrace-socket",
        "mount -t debugfs none /sys/kernel/debug 2>/dev/null; \
         exec bpftrace -e 'tracepoint:net:netif_receive_skb { @from[args->skbaddr] = nsecs; } \
         tracepoint:skb:skb_copy_datagram_iovec /@from[args->skbaddr]/ { \
         @us = hist((nsecs - @from[args->skbaddr]) / 1000); delete(@from[args->skbaddr]); }'",
    ),
    (
        "bpftrace-tcpretrans",
        "mount -t debugfs none /sys/kernel/debug 2>/dev/null; \
         exec bpftrace -e 'tracepoint:tcp:tcp_retransmit_skb { @[args->dport] = count(); }'",
    ),
];
/// The tracepoints that `netprobe icmp` attaches to.
const ICMP_TRACEPOINTS: [&CStr; 10] = [
    c"irq_handler_entry",
    c"irq_handler_exit",
    c"softirq_raise",
    c"softirq_entry",
    c"softirq_exit",
    c"netif_rx",
    c"netif_receive_skb_entry",
    c"napi_gro_receive_entry",
    c"netif_receive_skb",
    c"net_dev_start_xmit",
];
/// Perf buffers that hold a whole burst while the tool is held.
const LARGE: &str = "--buffer-pages 4096";
const RINGBUF: &str = "--transport ringbuf";

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.iter().any(|a| a == "--bench") || args.is_empty() {
        println!("this runs inside a virtual machine: use bench/run");
        return;
    }
    if let Err(e) = run(&args) {
        println!("! all: {e:#}");
        std::process::exit(1);
    }
}

fn say(name: &str, value: impl std::fmt::Display) {
    println!("= {name} {value}");
}

fn run(scenarios: &[String]) -> Result<()> {
    std::thread::sleep(AFTER_BOOT);
    let mut bench = Bench {
        net: Net::new()?,
        hooks: None,
        empty_udp: 0,
        hits: 0.0,
    };
    for scenario in scenarios {
        let result = match scenario.as_str() {
            "base" => bench.base(),
            "filter" => filter_cost(),
            "skb" => bench.skb(),
            "match" => bench.matching("perf", ""),
            "user" => bench.user(),
            "pwru" => bench.pwru(),
            "tcpconnect" => bench.tcpconnect(),
            "peer-tcpconnect" => bench.peer_tcpconnect(),
            "icmp" => bench.icmp(),
            "drops" => bench.drops(),
            "peer-drops" => bench.peer_drops(),
            "why" => bench.why(),
            "tcp" => bench.tcp(),
            "latency" => bench.latency(),
            "peer-tcplife" => bench.peers(&[("peer-tcplife", "exec peer-tcplife")]),
            "peer-latency" => bench.peers(&LATENCY_PEERS),
            "flight" => bench.flight(),
            "capture" => bench.capture(),
            "peer-capture" => bench.peer_capture(),
            "rate" => bench.rate("netprobe", netprobe_capture),
            "rate-limit" => bench.rate_limit(),
            "rate-tcpdump" => bench.rate("tcpdump", || tcpdump("udp")),
            "rate-xdp-tools" => bench.rate("xdp-tools", xdp_tools),
            "quiet" => bench.quiet("perf", ""),
            "ringbuf" => bench
                .matching("ringbuf", RINGBUF)
                .and_then(|()| bench.quiet("ringbuf", RINGBUF)),
            "profile" => bench.profile(),
            "record" => record::print(&bench.net),
            other => bail!("unknown scenario {other}"),
        };
        if let Err(e) = result {
            println!("! {scenario}: {e:#}");
        }
    }
    Ok(())
}

struct Bench {
    net: Net,
    /// where netprobe attaches with its default flags
    hooks: Option<Hooks>,
    /// a UDP packet with the empty program there, ns
    empty_udp: u64,
    /// hits of one UDP packet
    hits: f64,
}

impl Bench {
    /// One UDP packet, one TCP connection, ns each.
    fn packet(&self) -> Result<u64> {
        per(PACKETS, || self.net.udp())
    }

    fn connect(&self) -> Result<u64> {
        per(PACKETS / 5, || self.net.tcp())
    }

    fn base(&mut self) -> Result<()> {
        say("udp.none", self.packet()?);
        say("tcp.none", self.connect()?);
        Ok(())
    }

    /// A hit that does not match, all functions; start, stop and memory; the empty program in the same places.
    fn skb(&mut self) -> Result<()> {
        let before = last_program();
        let tool = Tool::with_ready_file(&format!("{NETPROBE} skb --filter-mark 0xdead"), LIMIT)?;
        say("start.netprobe", tool.ready_ns);
        say("start.netprobe.cpu", tool.ready_cpu_ns);
        tell_programs(before);
        let hooks = Hooks::attached()?;
        say("functions", hooks.count());
        say("udp.mark", self.packet()?);
        say("tcp.mark", self.connect()?);
        self.idle("netprobe", &tool)?;
        let (peak, buffers) = tool.memory()?;
        say("memory.netprobe", peak);
        say("memory.netprobe.buffers", buffers);
        say("stop.netprobe", tool.stop()?.stop_ns);
        all_removed()?;

        let empty = Empty::attach(&hooks)?;
        say("start.empty", empty.attach_ns);
        self.empty_udp = self.packet()?;
        say("udp.empty", self.empty_udp);
        say("tcp.empty", self.connect()?);
        {
            let _statistics = hooks::statistics()?;
            let (before, _) = empty.runs();
            for _ in 0..PACKETS {
                self.net.udp()?;
            }
            self.hits = (empty.runs().0 - before) as f64 / PACKETS as f64;
            say("hits.udp", format!("{:.1}", self.hits));
        }
        say("stop.empty", empty.detach()?);
        if let Some(took) = hooks::attach_by_names(&hooks)? {
            say("start.names", took);
        }
        self.hooks = Some(hooks);

        let filters: &[_] = &[
            ("netns", "--filter-netns inode:1"),
            ("proto", "--filter-proto icmp"),
            ("ports", "--filter-dst-ip 10.9.0.3 --filter-dst-port 80"),
            ("pcap", "tcp port 80 or icmp"),
        ];
        for (name, filter) in filters {
            match Tool::with_ready_file(&format!("{NETPROBE} skb {filter}"), LIMIT) {
                Ok(tool) => {
                    say(&format!("udp.{name}"), self.packet()?);
                    end(tool)?;
                }
                Err(e) => println!("! skb {filter}: {e:#}"),
            }
        }
        Ok(())
    }

    /// CPU used while nothing happens, in ppm.
    fn idle(&self, name: &str, tool: &Tool) -> Result<()> {
        tool.settle()?;
        let (cpu, start) = (tool.cpu_ns()?, monotonic_ns()?);
        std::thread::sleep(Duration::from_secs(10));
        let ppm = (tool.cpu_ns()? - cpu) as f64 * 1e6 / (monotonic_ns()? - start) as f64;
        say(&format!("idle.{name}"), format!("{ppm:.0}"));
        Ok(())
    }

    /// A hit that matches: the kernel's side, with netprobe held; then its own side, when it goes on.
    fn matching(&mut self, name: &str, flags: &str) -> Result<()> {
        let filter = format!("--filter-proto udp --filter-dst-port {}", net::PORT);
        for (form, output) in [("text", ""), ("json", "--output-json")] {
            let tool = Tool::with_ready_file(
                &format!("{NETPROBE} skb {filter} {LARGE} {flags} {output}"),
                LIMIT,
            )?;
            tool.settle()?;
            let lines = child::lines()?;
            tool.hold()?;
            let packet = self.packet()?;
            let syscalls = tool.count_syscalls()?;
            let cpu = tool.cpu_ns()?;
            tool.go_on()?;
            tool.settle()?;
            let cpu = tool.cpu_ns()? - cpu;
            let calls = syscalls.count()?;
            let events = child::lines()? - lines;
            say(&format!("events.{name}.{form}"), events);
            if form == "text" {
                say(&format!("udp.match.{name}"), packet);
                if self.hits > 0.0 {
                    let over = (packet as f64 - self.empty_udp as f64) / self.hits;
                    say(&format!("hit.match.{name}"), format!("{over:.0}"));
                }
            }
            say(&format!("user.{name}.{form}"), cpu / events.max(1));
            say(
                &format!("syscalls.{name}.{form}"),
                format!("{:.3}", calls as f64 / events.max(1) as f64),
            );
            end(tool)?;
            tell_loss();
        }
        Ok(())
    }

    /// A burst with the tool running, as in life: how many of the events were printed, and the cost of a packet in all.
    fn user(&mut self) -> Result<()> {
        let tool = Tool::with_ready_file(
            &format!(
                "{NETPROBE} skb --filter-proto udp --filter-dst-port {}",
                net::PORT
            ),
            LIMIT,
        )?;
        tool.settle()?;
        let lines = child::lines()?;
        say("burst.udp", mean(2000, || self.net.udp())?);
        tool.settle()?;
        say("burst.lines", child::lines()? - lines);
        end(tool)?;
        tell_loss();
        Ok(())
    }

    /// From a lone packet on a quiet system to its line.
    fn quiet(&mut self, name: &str, flags: &str) -> Result<()> {
        let tool = Tool::with_ready_file(
            &format!(
                "{NETPROBE} skb --filter-proto udp --filter-dst-port {} {flags}",
                net::PORT
            ),
            LIMIT,
        )?;
        let mut worst = 0;
        for _ in 0..20 {
            tool.settle()?;
            let size = fs::metadata(child::OUT)?.len();
            let start = monotonic_ns()?;
            self.net.udp()?;
            while fs::metadata(child::OUT)?.len() == size {
                std::thread::sleep(Duration::from_millis(1));
            }
            worst = worst.max(monotonic_ns()? - start);
        }
        say(&format!("quiet.{name}"), worst);
        end(tool)?;
        Ok(())
    }

    /// The peer: a filter that matches nothing; start, stop, idle, memory; a burst that matches.
    fn pwru(&mut self) -> Result<()> {
        let tool = Tool::with_ready_file(&format!("{PWRU} --filter-mark 57005"), LIMIT)?;
        say("start.pwru", tool.ready_ns);
        say("start.pwru.cpu", tool.ready_cpu_ns);
        say("udp.pwru.mark", self.packet()?);
        self.idle("pwru", &tool)?;
        say("memory.pwru", tool.memory()?.0);
        say("stop.pwru", tool.stop()?.stop_ns);
        let tool = Tool::with_ready_file(&format!("{PWRU} tcp port 80 or icmp"), LIMIT)?;
        say("udp.pwru.pcap", self.packet()?);
        say("tcp.pwru.pcap", self.connect()?);
        end(tool)?;
        let tool = Tool::with_ready_file(&format!("{PWRU} udp dst port {}", net::PORT), LIMIT)?;
        let lines = child::lines()?;
        say("burst.pwru", mean(2000, || self.net.udp())?);
        std::thread::sleep(Duration::from_secs(5));
        say("burst.pwru.lines", child::lines()?.saturating_sub(lines));
        end(tool)?;
        Ok(())
    }

    /// What `netprobe tcpconnect` adds to a connect; its start and memory.
    fn tcpconnect(&mut self) -> Result<()> {
        let functions = [c"tcp_v4_connect", c"tcp_v6_connect"];
        say("limit.tcpconnect", hooks::empty_trampolines(&functions)?);
        let before = last_program();
        let tool = Tool::with_ready_file(&format!("{NETPROBE} tcpconnect"), LIMIT)?;
        say("start.tcpconnect", tool.ready_ns);
        tell_programs(before);
        say("tcp.tcpconnect", self.connect()?);
        self.idle("tcpconnect", &tool)?;
        say("memory.tcpconnect", tool.memory()?.0);
        say("memory.tcpconnect.file", tool.file_memory()?);
        let btf = fs::metadata("/sys/kernel/btf/vmlinux")?.len();
        say("memory.btf", btf / 1024);
        say("stop.tcpconnect", tool.stop()?.stop_ns);
        all_removed()?;
        Ok(())
    }

    /// The same of libbpf-tools' tcpconnect: ready when its four kprobes are there.
    fn peer_tcpconnect(&mut self) -> Result<()> {
        let tool = Tool::start("peer-tcpconnect", LIMIT, || {
            fs::read_to_string("/sys/kernel/debug/kprobes/list")
                .is_ok_and(|l| l.matches("tcp_v").count() >= 4)
        })?;
        say("start.peer-tcpconnect", tool.ready_ns);
        say("tcp.peer-tcpconnect", self.connect()?);
        say("memory.peer-tcpconnect", tool.memory()?.0);
        end(tool)?;
        Ok(())
    }

    /// What `netprobe tcp` costs a connection, and its start and memory.
    fn tcp(&mut self) -> Result<()> {
        let before = last_program();
        let tool = Tool::with_ready_file(&format!("{NETPROBE} tcp"), LIMIT)?;
        say("start.tcp", tool.ready_ns);
        tell_programs(before);
        say("tcp.tcp", self.connect()?);
        self.idle("tcp", &tool)?;
        say("memory.tcp", tool.memory()?.0);
        say("memory.tcp.file", tool.file_memory()?);
        end(tool)
    }

    /// What other tools for the same questions cost a connection, or a UDP packet: ready when their programs are there.
    fn peers(&mut self, peers: &[(&str, &str)]) -> Result<()> {
        for (name, command) in peers {
            let script = format!("/tmp/{name}.sh");
            fs::write(&script, command)?;
            let before = last_program();
            let tool = Tool::start(&format!("/bin/sh {script}"), LIMIT, || {
                last_program() > before
            })?;
            tool.settle()?;
            say(&format!("tcp.{name}"), self.connect()?);
            say(&format!("udp.{name}"), self.packet()?);
            say(&format!("memory.{name}"), tool.memory()?.0);
            end(tool)?;
        }
        Ok(())
    }

    /// A burst while a recording runs, and while a flight recorder is armed whose trigger never comes: a packet in all.
    fn flight(&mut self) -> Result<()> {
        let filter = format!("--filter-proto udp --filter-dst-port {}", net::PORT);
        for (name, flags) in [
            ("record", ""),
            ("flight", " --flight 30s --trigger retransmit:99"),
        ] {
            let command = format!("{NETPROBE} record -o {name}.pcapng {filter}{flags}");
            let tool = Tool::with_ready_file(&command, LIMIT)?;
            tool.settle()?;
            say(&format!("burst.{name}"), mean(2000, || self.net.udp())?);
            self.idle(name, &tool)?;
            say(&format!("memory.{name}"), tool.memory()?.0);
            end(tool)?;
        }
        Ok(())
    }

    /// What `netprobe icmp` costs where no echo arrives; its start and memory.
    fn icmp(&mut self) -> Result<()> {
        let kprobes = ["icmp_echo", "icmpv6_echo_reply"].map(address).to_vec();
        let start = monotonic_ns()?;
        let empty = hooks::empty_tracepoints(&ICMP_TRACEPOINTS)?;
        let kprobes = Empty::attach(&Hooks::Single(kprobes))?;
        say("limit.icmp", monotonic_ns()? - start);
        kprobes.detach()?;
        say("udp.icmp-empty", self.packet()?);
        drop(empty);
        let before = last_program();
        let tool = Tool::with_ready_file(&format!("{NETPROBE} icmp"), LIMIT)?;
        say("start.icmp", tool.ready_ns);
        tell_programs(before);
        say("udp.icmp", self.packet()?);
        say("tcp.icmp", self.connect()?);
        self.idle("icmp", &tool)?;
        say("memory.icmp", tool.memory()?.0);
        say("memory.icmp.file", tool.file_memory()?);
        end(tool)?;
        Ok(())
    }

    /// A packet of each size while something captures on the receiver's side, in the middle one of some bursts: with a tool's writer
    /// where its turn comes in most of them. And the tool's own CPU time a packet. `between` bursts, buffers that nobody else reads are emptied.
    fn bursts(&mut self, name: &str, tool: Option<&Tool>, mut between: impl FnMut()) -> Result<()> {
        let cpu_ns = || tool.map_or(Ok(0), Tool::cpu_ns);
        for size in [64, 512, 1500] {
            self.net.payload(size - net::HEADERS);
            let (mut packets, mut cpu) = (Vec::new(), 0);
            for burst in 0..BURSTS {
                if let Some(tool) = tool {
                    tool.settle()?;
                }
                between();
                let start = cpu_ns()?;
                std::thread::sleep(rate::GATHER + STEP * burst);
                let quiet = cpu_ns()?;
                packets.push(mean(PACKETS, || self.net.udp())?);
                std::thread::sleep(rate::GATHER + STEP * burst);
                cpu += (cpu_ns()? - quiet).saturating_sub(quiet - start);
            }
            packets.sort_unstable();
            let middle = packets.len() / 2;
            let packet = (packets[middle - 1] + packets[middle]) / 2;
            say(&format!("capture.{name}.{size}"), packet);
            if tool.is_some() {
                cpu /= u64::from(BURSTS) * (PACKETS + WARM_UP);
                say(&format!("capture.{name}.{size}.user"), cpu);
            }
        }
        self.net.payload(64);
        Ok(())
    }

    fn captured(&mut self, name: &str, tool: Tool) -> Result<()> {
        self.bursts(name, Some(&tool), || {})?;
        end(tool)
    }

    fn capture(&mut self) -> Result<()> {
        self.bursts("none", None, || {})?;
        for mode in [Mode::Native, Mode::Generic] {
            let _empty = net::inside(net::B, || hooks::empty_xdp("vb", mode))?;
            self.bursts(&format!("empty-{}", mode.name()), None, || {})?;
        }
        let (mut buffers, programs) = net::inside(net::B, || hooks::handing_xdp("vb"))?;
        let mut batch = Batch::default();
        self.bursts("handing", None, || {
            batch.data.clear();
            batch.records.clear();
            buffers.consume(&mut batch);
        })?;
        drop((buffers, programs));
        let before = last_program();
        let tool = netprobe_capture()?;
        say("start.xdpdump", tool.ready_ns);
        tell_programs(before);
        self.captured("netprobe", tool)?;
        self.captured(
            "netprobe-rejects",
            Tool::with_ready_file(&format!("{} tcp port 80 or icmp", capture_command()), LIMIT)?,
        )
    }

    /// tcpdump: captures, and rejects in the kernel's socket filter. xdp-tools' xdpdump with a program of its own.
    fn peer_capture(&mut self) -> Result<()> {
        self.captured("tcpdump", tcpdump("udp")?)?;
        self.captured("tcpdump-rejects", tcpdump("tcp port 80 or icmp")?)?;
        self.captured("xdp-tools", xdp_tools()?)
    }

    /// The highest rate of packets that a tool writes to a file without loss.
    fn rate(&mut self, name: &str, start: fn() -> Result<Tool>) -> Result<()> {
        for size in [64, 1500] {
            let (rate, sender) = rate::highest(&self.net, size, CAPTURE, &start)?;
            let why = if sender { " sender" } else { "" };
            say(&format!("rate.{name}.{size}"), format!("{rate:.0}{why}"));
        }
        Ok(())
    }

    /// The sender's highest rate with nothing attached, and with programs in generic mode that do nothing, or only hand packets
    /// to perf buffers, whose reader throws them away: what a capture at XDP cannot exceed.
    fn rate_limit(&self) -> Result<()> {
        let tell = |name: &str| -> Result<()> {
            for size in [64, 1500] {
                // The best of some: everything that happens beside it only makes it slower.
                let mut rate = 0.0;
                for _ in 0..5 {
                    rate = rate::sender(&self.net, size)?.max(rate);
                }
                say(&format!("rate.{name}.{size}"), format!("{rate:.0}"));
            }
            Ok(())
        };
        tell("none")?;
        {
            let _empty = net::inside(net::B, || hooks::empty_xdp("vb", Mode::Generic))?;
            tell("empty")?;
        }
        let (mut buffers, _programs) = net::inside(net::B, || hooks::handing_xdp("vb"))?;
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut batch = Batch::default();
                while !done.load(Ordering::Relaxed) && buffers.wait(&[]).is_ok() {
                    batch.data.clear();
                    batch.records.clear();
                    buffers.consume(&mut batch);
                }
            });
            let told = tell("handing");
            done.store(true, Ordering::Relaxed);
            told
        })
    }

    /// For work on one thing: what the programs of a matching run cost by the kernel's own statistics.
    fn profile(&mut self) -> Result<()> {
        let before = last_program();
        let tool = Tool::with_ready_file(
            &format!(
                "{NETPROBE} skb --filter-proto udp --filter-dst-port {} {LARGE}",
                net::PORT
            ),
            LIMIT,
        )?;
        tool.hold()?;
        let _statistics = hooks::statistics()?;
        for _ in 0..PACKETS {
            self.net.udp()?;
        }
        for p in hooks::programs(before).iter().filter(|p| p.run_cnt > 0) {
            say(
                &format!("profile.{}", p.name),
                format!("{} runs of {} ns", p.run_cnt, p.run_ns / p.run_cnt),
            );
        }
        tool.go_on()?;
        end(tool)?;
        Ok(())
    }
}

fn capture_command() -> String {
    format!("{NETPROBE} xdpdump --netns {} -i vb -w {CAPTURE}", net::B)
}

fn netprobe_capture() -> Result<Tool> {
    Tool::with_ready_file(&capture_command(), LIMIT)
}

/// A peer that says when it listens.
fn listening(command: &str) -> Result<Tool> {
    Tool::start(
        &format!("nsenter --net=/run/netns/{} {command}", net::B),
        LIMIT,
        || fs::read_to_string(child::ERR).is_ok_and(|t| t.contains("listening on")),
    )
}

fn tcpdump(filter: &str) -> Result<Tool> {
    listening(&format!("tcpdump -Z root -i vb -w {CAPTURE} {filter}"))
}

fn xdp_tools() -> Result<Tool> {
    listening(&format!(
        "peer-xdpdump -i vb --load-xdp-program --load-xdp-mode skb -w {CAPTURE}"
    ))
}

/// The expression alone, in each way, beside the kernel's own JIT.
fn filter_cost() -> Result<()> {
    for (name, value) in filter::measure()? {
        say(&format!("filter.{name}"), format!("{value:.0}"));
    }
    Ok(())
}

/// Time of one of `count` calls, ns, after a few that warm up: in ten parts.
fn parts(count: u64, mut work: impl FnMut() -> Result<()>) -> Result<[u64; 10]> {
    for _ in 0..WARM_UP {
        work()?;
    }
    let mut parts = [0; 10];
    let calls = count / parts.len() as u64;
    for part in &mut parts {
        let start = monotonic_ns()?;
        for _ in 0..calls {
            work()?;
        }
        *part = (monotonic_ns()? - start) / calls;
    }
    Ok(parts)
}

/// The median of the parts: what the kernel does by itself now and then falls into one of them.
fn per(count: u64, work: impl FnMut() -> Result<()>) -> Result<u64> {
    let mut parts = parts(count, work)?;
    parts.sort_unstable();
    Ok((parts[4] + parts[5]) / 2)
}

/// The mean, where a tool's own work for many packets at a time belongs to the figure.
fn mean(count: u64, work: impl FnMut() -> Result<()>) -> Result<u64> {
    let parts = parts(count, work)?;
    Ok(parts.iter().sum::<u64>() / parts.len() as u64)
}

/// Ends a tool, and its probes.
fn end(tool: Tool) -> Result<()> {
    tool.stop()?;
    all_removed()
}

/// Waits until the kernel has no probes left of a tool that has ended: it goes on removing single ones after the command has returned.
fn all_removed() -> Result<()> {
    while Hooks::attached()?.count() > 0 {
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// What the verifier said of the programs after `before`, those of the tool that has just started.
fn tell_programs(before: u32) {
    // np_ahead is gone when the kernel has taken it away (src/kernel/trampoline.rs).
    for p in hooks::programs(before)
        .iter()
        .filter(|p| p.name != "np_ahead")
    {
        say(
            &format!("verifier.{}", p.name),
            format!("{} {}", p.verified, p.jited),
        );
    }
}

fn last_program() -> u32 {
    hooks::programs(0).last().map_or(0, |p| p.id)
}

/// What the tool said at its end about loss.
fn tell_loss() {
    for line in fs::read_to_string(child::ERR)
        .context("no stderr")
        .unwrap_or_default()
        .lines()
        .filter(|l| !l.contains("tracing "))
    {
        println!("! {line}");
    }
}
