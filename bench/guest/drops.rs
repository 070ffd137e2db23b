//! What a drop costs: with netprobe drops, with dropwatch, with bpftrace's count of one line.

use std::fs;
use std::process::Command;

use anyhow::{Result, ensure};

use crate::child::Tool;
use crate::hooks;
use crate::{Bench, LIMIT, NETPROBE, PACKETS, end, last_program, per, say, tell_programs};

/// Commands of a shell that becomes the tool.
const DROPWATCH: &str = "mkfifo /tmp/words; (echo start; exec sleep 100000) > /tmp/words & exec dropwatch -l kas < /tmp/words";
const BPFTRACE: &str = "mount -t debugfs none /sys/kernel/debug 2>/dev/null; exec bpftrace -e 'tracepoint:skb:kfree_skb { @[args->reason] = count(); }'";

impl Bench {
    /// What a drop costs: a datagram to a socket whose buffer is full.
    pub fn drops(&mut self) -> Result<()> {
        let (from, full) = self.net.sockets()?;
        from.connect(full.local_addr()?)?;
        let lost = || -> Result<()> { Ok(from.send(&[0x55; 64]).map(drop)?) };
        for _ in 0..PACKETS {
            lost()?;
        }
        say("drop.none", per(PACKETS, lost)?);
        let empty = hooks::empty_tracepoints(&[c"kfree_skb"])?;
        say("drop.empty", per(PACKETS, lost)?);
        drop(empty);
        for (name, flags) in [("drops", ""), ("drops-filtered", " --filter-dst-port 1")] {
            let before = last_program();
            let command = format!("{NETPROBE} drops -i 3600{flags}");
            let tool = Tool::with_ready_file(&command, LIMIT)?;
            say(&format!("drop.{name}"), per(PACKETS, lost)?);
            if flags.is_empty() {
                say("start.drops", tool.ready_ns);
                tell_programs(before);
                self.idle("drops", &tool)?;
                say("memory.drops", tool.memory()?.0);
                say("memory.drops.file", tool.file_memory()?);
                say("udp.drops", self.packet()?);
            }
            end(tool)?;
        }
        Ok(())
    }

    /// The same drop with other tools that count by place or by reason.
    pub fn peer_drops(&mut self) -> Result<()> {
        let (from, full) = self.net.sockets()?;
        from.connect(full.local_addr()?)?;
        let lost = || -> Result<()> { Ok(from.send(&[0x55; 64]).map(drop)?) };
        for _ in 0..PACKETS {
            lost()?;
        }
        let none = per(PACKETS, lost)?;
        let _ = Command::new("modprobe").arg("drop_monitor").status();
        for (name, commands) in [("dropwatch", DROPWATCH), ("bpftrace", BPFTRACE)] {
            let script = format!("/tmp/{name}.sh");
            fs::write(&script, commands)?;
            let before = last_program();
            let by_program = name == "bpftrace";
            let tool = Tool::start(&format!("/bin/sh {script}"), LIMIT, || {
                !by_program || last_program() > before
            })?;
            tool.settle()?;
            let cost = per(PACKETS, lost)?;
            ensure!(
                cost > none,
                "{name} counts nothing: {cost}, {none} without it"
            );
            say(&format!("drop.{name}"), cost);
            say(&format!("memory.{name}"), tool.memory()?.0);
            end(tool)?;
        }
        Ok(())
    }
}
