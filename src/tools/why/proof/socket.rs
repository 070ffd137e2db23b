//! What sockets say: queues and their limits, who reads, who listens.

use std::fs;

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
    fn what_we_do() {
        let text = doing(std::process::id());
        assert!(
            text.starts_with("runs") || text.starts_with("sleeps"),
            "{text}"
        );
        assert_eq!(doing(u32::MAX), "has ended");
    }
}
