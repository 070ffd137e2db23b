//! What `netprobe why` costs: its start, packets that do not match and packets that do, a burst.

use std::fs;

use anyhow::{Context, Result};

use super::child::{self, Tool};
use super::hooks::{Empty, Hooks};
use super::{
    Bench, LARGE, LIMIT, NETPROBE, all_removed, end, last_program, mean, net, say, tell_loss,
    tell_programs,
};

/// Packets of the burst.
const BURST: u64 = 20_000;

impl Bench {
    pub fn why(&mut self) -> Result<()> {
        let before = last_program();
        let command = format!("{NETPROBE} why tcp port 80 or icmp");
        let tool = Tool::with_ready_file(&command, LIMIT)?;
        say("start.why", tool.ready_ns);
        say("start.why.cpu", tool.ready_cpu_ns);
        tell_programs(before);
        let hooks = Hooks::attached()?;
        say("functions.why", hooks.count());
        say("udp.why", self.packet()?);
        self.idle("why", &tool)?;
        let (peak, buffers) = tool.memory()?;
        say("memory.why", peak);
        say("memory.why.buffers", buffers);
        say("stop.why", tool.stop()?.stop_ns);
        all_removed()?;
        let empty = Empty::attach(&hooks)?;
        say("start.why-empty", empty.attach_ns);
        say("udp.why-empty", self.packet()?);
        empty.detach()?;
        self.matching_why()?;
        self.burst_of_why()
    }

    /// Packets that match, with netprobe held: the kernel's side.
    fn matching_why(&mut self) -> Result<()> {
        let filter = format!("udp dst port {}", net::PORT);
        let tool = Tool::with_ready_file(&format!("{NETPROBE} why {LARGE} {filter}"), LIMIT)?;
        tool.settle()?;
        tool.hold()?;
        say("udp.why.match", self.packet()?);
        tool.go_on()?;
        tool.settle()?;
        end(tool)?;
        tell_loss();
        Ok(())
    }

    /// A burst with the tool running, as in life: each journey is counted in the last line, or events are counted as lost.
    fn burst_of_why(&mut self) -> Result<()> {
        let filter = format!("udp dst port {}", net::PORT);
        let command = format!("{NETPROBE} why --output-json {filter}");
        let tool = Tool::with_ready_file(&command, LIMIT)?;
        tool.settle()?;
        say("burst.why", mean(BURST, || self.net.udp())?);
        tool.settle()?;
        say("burst.why.memory", tool.memory()?.0);
        end(tool)?;
        let text = fs::read_to_string(child::OUT)?;
        let number = |kind: &str, name: &str| {
            let line = text.lines().find(|l| l.contains(kind))?;
            let (_, rest) = line.split_once(&format!("\"{name}\":"))?;
            let digits = rest.split(|c: char| !c.is_ascii_digit()).next();
            digits?.parse::<u64>().ok()
        };
        let packets = number("\"summary\"", "packets").context("no summary")?;
        say("burst.why.journeys", packets);
        say("burst.why.lost", number("\"loss\"", "lost").unwrap_or(0));
        tell_loss();
        Ok(())
    }
}
