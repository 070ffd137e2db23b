//! Records what bench/replay.rs replays: the perf buffer of a held `netprobe skb`, as the kernel filled it, and the names of the
//! functions in it. `tests/vm/run 6.12 --icount --file GUEST:/usr/local/bin/guest -- guest record`; bench/data/README says the rest.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};

use super::child::Tool;
use super::net::Net;
use super::{LIMIT, NETPROBE};

/// Where `data_head` is in the first page of a perf buffer (struct perf_event_mmap_page).
const DATA_HEAD: usize = 1024;
/// `func` in struct skb_event, behind the header of a sample (8 bytes), its size (4) and the event's head (40) and skb (8).
const FUNC: usize = 8 + 4 + 40 + 8;

/// Prints the buffer in hexadecimal, and `ADDRESS NAME` of each function.
pub fn print(net: &Net) -> Result<()> {
    let tool = Tool::with_ready_file(&format!("{NETPROBE} skb --buffer-pages 1024"), LIMIT)?;
    tool.settle()?;
    tool.hold()?;
    for _ in 0..4 {
        net.udp()?;
    }
    net.tcp()?;
    dump(&tool)?;
    tool.go_on()?;
    tool.stop()?;
    Ok(())
}

fn dump(tool: &Tool) -> Result<()> {
    let maps = fs::read_to_string(format!("/proc/{}/maps", tool.pid()))?;
    let line = maps
        .lines()
        .find(|l| l.contains("[perf_event]"))
        .context("the tool has no perf buffer")?;
    let start = u64::from_str_radix(line.split('-').next().unwrap_or_default(), 16)?;
    let memory = File::open(format!("/proc/{}/mem", tool.pid()))?;
    let mut page = [0; 4096];
    memory.read_exact_at(&mut page, start)?;
    let head = u64::from_ne_bytes(page[DATA_HEAD..DATA_HEAD + 8].try_into()?);
    let mut data = vec![0; head as usize];
    memory.read_exact_at(&mut data, start + 4096)?;
    for part in data.chunks(256) {
        let hex: String = part.iter().map(|b| format!("{b:02x}")).collect();
        println!("ring {hex}");
    }
    let (mut at, mut functions) = (0, BTreeSet::new());
    while let Some(size) = data.get(at + 6..at + 8) {
        if let Some(func) = data.get(at + FUNC..at + FUNC + 8) {
            functions.insert(u64::from_ne_bytes(func.try_into()?));
        }
        at += usize::from(u16::from_ne_bytes(size.try_into()?)).max(8);
    }
    for line in fs::read_to_string("/proc/kallsyms")?.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(addr), Some("t" | "T"), Some(name)) = (words.next(), words.next(), words.next())
        else {
            continue;
        };
        if functions.contains(&u64::from_str_radix(addr, 16)?) {
            println!("name {addr} {name}");
        }
    }
    Ok(())
}
