//! What sockets say: queues and their limits, who reads, who listens.

use std::fs;

use crate::kernel::netns::Netns;
use crate::kernel::sockets;
use crate::text::escape::escaped;

use super::{Case, Proof};

/// The receive queue when the packet was lost, and what its reader does now.
pub fn queue(case: &Case<'_>) -> Vec<Proof> {
    let facts = case.dropped.and_then(|d| d.facts.as_ref());
    let mut proofs = Vec::new();
    if let Some(s) = facts.and_then(|f| f.socket) {
        let text = format!("the socket held {} of {} bytes", s.rmem, s.rcvbuf);
        proofs.push(
            Proof::then("socket-queue", text)
                .with("rmem", s.rmem)
                .with("rcvbuf", s.rcvbuf),
        );
    }
    proofs.extend(reader(case));
    proofs
}

/// The socket's filter, as it was when the packet was lost.
pub fn filter(case: &Case<'_>) -> Vec<Proof> {
    let Some(facts) = case.dropped.and_then(|d| d.facts.as_ref()) else {
        return Vec::new();
    };
    let mut proofs = Vec::new();
    if facts.socket.is_some() {
        let text = match facts.filter {
            true => "the socket has a filter (SO_ATTACH_FILTER or SO_ATTACH_BPF)",
            false => "the socket has no filter",
        };
        proofs.push(Proof::then("filter", text).with("filter", facts.filter));
    }
    proofs.extend(reader(case));
    proofs
}

/// How much memory the protocol's sockets hold, and how much they may.
pub fn memory(case: &Case<'_>) -> Vec<Proof> {
    let proto = case.dropped.and_then(|d| d.tuple).map(|t| t.proto);
    let (name, limit) = match proto {
        Some(6) => ("TCP:", "tcp_mem"),
        Some(17) => ("UDP:", "udp_mem"),
        _ => return Vec::new(),
    };
    let mut proofs = Vec::new();
    // Of the whole machine: other namespaces than the first do not show it.
    let first = Netns::parse("/proc/1/ns/net").ok();
    let path = format!("/proc/sys/net/ipv4/{limit}");
    let read = || fs::read_to_string(path);
    if let Some(Ok(Ok(text))) = first.map(|netns| netns.run(read)) {
        let value = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let mut proof = Proof::now(
            "memory-limit",
            format!("net.ipv4.{limit} = {value} (pages: low, pressure, most)"),
        )
        .with("value", value);
        proof.change = Some(format!(
            "raise net.ipv4.{limit}, or find the sockets that hold so much (ss -m)"
        ));
        proofs.push(proof);
    }
    let text = fs::read_to_string("/proc/net/sockstat").unwrap_or_default();
    if let Some(pages) = pages(&text, name) {
        let text = format!(
            "sockets of {} hold {pages} pages",
            name.trim_end_matches(':')
        );
        proofs.push(Proof::now("memory", text).with("pages", pages));
    }
    proofs
}

/// `UDP: inuse 3 mem 2`
fn pages(sockstat: &str, name: &str) -> Option<u32> {
    let line = sockstat.lines().find(|l| l.starts_with(name))?;
    let words: Vec<&str> = line.split_whitespace().collect();
    let mem = words.windows(2).find(|w| w[0] == "mem")?;
    mem[1].parse().ok()
}

/// The process that should read, and what it does now.
fn reader(case: &Case<'_>) -> Option<Proof> {
    let process = case.dropped.and_then(|d| d.process.as_ref());
    let process = process.or(case.journey.receiver.as_ref())?;
    let text = format!("{}[{}] {}", process.comm, process.pid, doing(process.pid));
    Some(
        Proof::now("reader", text)
            .with("pid", process.pid)
            .with("comm", process.comm.clone()),
    )
}

/// What a process does: its state, and where it waits in the kernel.
fn doing(pid: u32) -> String {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return "has ended".to_owned();
    };
    // The name in parentheses may hold anything.
    let state = stat
        .rsplit_once(')')
        .and_then(|(_, rest)| rest.split_whitespace().next());
    let state = match state {
        Some("R") => "runs",
        Some("S") => "sleeps",
        Some("D") => "sleeps without interruption",
        Some("T" | "t") => "is stopped",
        Some("Z") => "has ended and waits for its parent",
        _ => "is in an unknown state",
    };
    let at = fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default();
    match at.trim() {
        "" | "0" => state.to_owned(),
        at => format!("{state} in {}", escaped(at.as_bytes())),
    }
}

pub fn listen(case: &Case<'_>) -> Vec<Proof> {
    let mut proofs = Vec::new();
    if let Some(listen) = case.dropped.and_then(|d| d.listen) {
        let text = format!(
            "its queue held {} connections, its limit is {}",
            listen.backlog, listen.limit
        );
        proofs.push(
            Proof::then("listen-queue", text)
                .with("backlog", listen.backlog)
                .with("limit", listen.limit),
        );
    }
    proofs.extend(reader(case));
    if let Some(somaxconn) = case.sysctl("net/core/somaxconn") {
        proofs.push(
            Proof::now("somaxconn", format!("net.core.somaxconn = {somaxconn}"))
                .with("value", somaxconn),
        );
    }
    proofs
}

/// Sockets that are bound to the packet's port now.
pub fn listeners(case: &Case<'_>) -> Vec<Proof> {
    let Some(tuple) = case.dropped.and_then(|d| d.tuple).filter(|t| t.has_ports()) else {
        return Vec::new();
    };
    let (name, file) = match tuple.proto {
        6 => ("TCP", "tcp"),
        17 => ("UDP", "udp"),
        _ => return Vec::new(),
    };
    let port = tuple.dport;
    let tables = [file.to_owned(), format!("{file}6")];
    let read = || {
        tables
            .map(|table| sockets::of(&table, tuple.proto))
            .concat()
    };
    let Some(found) = case.inside(read) else {
        return Vec::new();
    };
    // TCP_LISTEN is 10; an unconnected UDP socket is in 7.
    let state = if tuple.proto == 6 { 0x0a } else { 0x07 };
    let found = found
        .iter()
        .filter(|s| s.state == state && s.local.1 == port);
    let bound: Vec<String> = found.map(|s| s.local.0.to_string()).collect();
    let text = match bound.as_slice() {
        [] => format!("no socket is bound to {name} port {port} in this namespace"),
        at => format!(
            "sockets at {name} port {port} in this namespace are bound to {} only",
            at.join(", ")
        ),
    };
    vec![Proof::now("listeners", text).with("bound", bound)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_sockets() {
        let text = "sockets: used 9\nTCP: inuse 1 orphan 0 tw 0 alloc 2 mem 7\nUDP: inuse 3 mem 2\nUDPLITE: inuse 0\n";
        assert_eq!(pages(text, "TCP:"), Some(7));
        assert_eq!(pages(text, "UDP:"), Some(2));
        assert_eq!(pages(text, "RAW:"), None);
    }

    #[test]
    fn what_we_do() {
        let text = doing(std::process::id());
        assert!(
            text.starts_with("runs") || text.starts_with("sleeps"),
            "{text}"
        );
        assert_eq!(doing(u32::MAX), "has ended");
    }
}
