//! What has happened to a connection, in words and for JSON (docs/json/tcp.json).

use std::collections::HashMap;

use serde::Serialize;

use crate::explain::Rules;
use crate::kernel::btf::Btf;
use crate::kernel::drop_reason::DropReasons;
use crate::kernel::ksyms::{FewSymbols, is_of_a_probe};
use crate::kernel::netns;
use crate::text::escape::escaped;

use super::connection::state_name;
use super::notes::{Dropped, Kind, Note, What};

/// The running kernel's names of reasons.
#[derive(Debug, Default)]
pub struct Reasons {
    drops: DropReasons,
    /// enum sk_rst_reason; empty before 6.10
    resets: HashMap<u32, String>,
}

impl Reasons {
    pub fn load(btf: &Btf) -> Self {
        let resets = btf.enum_values("sk_rst_reason").into_iter();
        Self {
            drops: DropReasons::load(btf),
            resets: resets.map(|(n, name)| (n as u32, name)).collect(),
        }
    }
}

/// Turns what happened into words.
#[derive(Debug, Default)]
pub struct Words {
    reasons: Reasons,
    symbols: FewSymbols,
    netns: HashMap<u32, String>,
}

/// What a note says. What is not known is missing.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Happening {
    pub happened: &'static str,
    pub text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    how: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seq: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<u32>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    fin: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    segments: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rto_ns: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    waited_ns: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dropped: Option<DroppedJson>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    state: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    to: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    by: Option<By>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    stack: Vec<String>,
}

/// The process in whose system call something happens.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct By {
    pid: u32,
    comm: String,
}

/// Calls of a stack that a line shows.
const CALLS: usize = 6;
/// What a system call begins with, the work at its end, and the end of a process.
const SYSTEM_CALLS: [&str; 5] = [
    "do_syscall_64",
    "entry_SYSCALL_64_after_hwframe",
    "invoke_syscall",
    "el0_svc",
    "do_exit",
];
/// What takes packets in, on the stack of whatever process its CPU runs, or for a process that held the socket when
/// they came.
const TAKES_PACKETS: [&str; 6] = [
    "__do_softirq",
    "handle_softirqs",
    "__napi_poll",
    "net_rx_action",
    "tcp_v4_do_rcv",
    "tcp_v6_do_rcv",
];

#[derive(Debug, PartialEq, Eq, Serialize)]
struct DroppedJson {
    /// `original`, or `ack`
    packet: &'static str,
    class: String,
    what: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    function: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    netns: Option<u32>,
    before_ns: u64,
}

impl Happening {
    /// The drop behind it, in words.
    pub fn lost_by(&self) -> Option<String> {
        let d = self.dropped.as_ref()?;
        Some(format!("{} ({})", d.what, d.function))
    }
}

impl Words {
    pub fn new(reasons: Reasons) -> Self {
        Self {
            reasons,
            ..Self::default()
        }
    }

    /// `stack`: where it happened, innermost call first; empty: not known.
    pub fn of(&mut self, note: &Note, stack: &[u64]) -> Happening {
        let mut happening = self.what(note);
        self.add_stack(&mut happening, note, stack);
        happening
    }

    /// Who was at work.
    fn add_stack(&mut self, happening: &mut Happening, note: &Note, stack: &[u64]) {
        if stack.is_empty() {
            return;
        }
        self.symbols.resolve(stack);
        let ours = |addr: &&u64| {
            let symbol = self.symbols.get(**addr);
            symbol.is_none_or(|s| is_of_a_probe(&s.name))
        };
        let names: Vec<String> = stack
            .iter()
            .skip_while(ours)
            .map(|&addr| match self.symbols.get(addr) {
                Some(symbol) => escaped(symbol.name.as_bytes()),
                None => format!("{addr:#x}"),
            })
            .collect();
        let (tgid, comm) = (note.current.0, &note.current.1);
        let calls = names[..names.len().min(CALLS)].join(" < ");
        if let Some(who) = in_system_call(&names).then(|| process_name(comm, tgid)) {
            happening.text += &format!("; by {who} ({calls})");
            let end = comm.iter().position(|&byte| byte == 0);
            happening.by = Some(By {
                pid: tgid,
                comm: escaped(&comm[..end.unwrap_or(comm.len())]),
            });
        } else if !calls.is_empty() {
            happening.text += &format!("; by {calls}");
        }
        happening.stack = names;
    }

    fn what(&mut self, note: &Note) -> Happening {
        match note.what {
            What::Retransmit {
                kind,
                state,
                seq,
                fin,
                rto,
                dropped,
            } => Happening {
                state: (state != 0).then(|| state_name(state)),
                ..self.again(note, kind, (seq, fin), rto, dropped)
            },
            What::Undone => Happening {
                happened: "spurious",
                text: "nothing was lost: what was sent again had arrived; the kernel takes its reaction back".into(),
                how: Some("undo"),
                ..Happening::default()
            },
            What::Duplicates(segments) => Happening {
                happened: "spurious",
                text: format!("nothing was lost: the peer has {segments} segment{} twice (DSACK)", if segments == 1 { "" } else { "s" }),
                how: Some("dsack"),
                segments: Some(segments),
                ..Happening::default()
            },
            What::ResetSent { state, reason } => self.reset(state, reason),
            What::ResetReceived { state } => Happening {
                happened: "reset-received",
                text: format!("RST received in {}", state_name(state)),
                state: Some(state_name(state)),
                ..Happening::default()
            },
            What::PeerShut { .. } => Happening {
                happened: "peer-window-zero",
                text: "the peer's window is zero".into(),
                ..Happening::default()
            },
            What::PeerOpen(ns) => Happening {
                happened: "peer-window-open",
                text: format!("the peer's window is open again after {} ms", ms(ns)),
                waited_ns: Some(ns),
                ..Happening::default()
            },
            What::ReadHere { ns, .. } => Happening {
                happened: "window-zero-until-read",
                text: format!(
                    "{} reads; the window of this end was zero, nothing came for {} ms",
                    process_name(&note.current.1, note.current.0),
                    ms(ns)
                ),
                waited_ns: Some(ns),
                ..Happening::default()
            },
            What::Pressure => Happening {
                happened: "memory-pressure",
                text: "TCP is short of memory (net.ipv4.tcp_mem)".into(),
                ..Happening::default()
            },
            What::Relief => Happening {
                happened: "memory-relief",
                text: "TCP has enough memory again".into(),
                ..Happening::default()
            },
            What::State { from, to } => Happening {
                happened: "state",
                text: format!("{} -> {}", state_name(from), state_name(to)),
                state: Some(state_name(from)),
                to: Some(state_name(to)),
                ..Happening::default()
            },
        }
    }

    fn again(
        &mut self,
        note: &Note,
        kind: Kind,
        (seq, fin): ((u32, u32), bool),
        rto: Option<u64>,
        dropped: Option<Dropped>,
    ) -> Happening {
        let dropped = dropped.map(|d| self.dropped(note, &d));
        let bytes = seq.1.wrapping_sub(seq.0).wrapping_sub(fin.into());
        let after = rto.map_or(String::new(), |ns| format!(", after {} ms", ms(ns)));
        let mut text = match kind {
            Kind::Syn => format!("SYN sent again{after}"),
            Kind::SynAck => "SYN-ACK sent again".to_owned(),
            _ if fin && bytes == 0 => format!("FIN sent again by {}{after}", words(kind)),
            _ => format!(
                "sent again by {}{after}: seq {}:{} ({bytes} bytes{})",
                words(kind),
                seq.0,
                seq.1,
                if fin { " and the FIN" } else { "" }
            ),
        };
        // What was freed in the normal course says nothing.
        let dropped = dropped.filter(|(_, expected)| !expected);
        if let Some((d, _)) = &dropped {
            let which = match d.packet {
                "ack" => "its acknowledgement",
                _ => "it",
            };
            let reason = d
                .reason
                .as_deref()
                .map_or(String::new(), |r| format!("{r}, "));
            let netns = d.netns.map_or(String::new(), |netns| {
                format!(" in netns {}", self.netns(netns))
            });
            text += &format!(
                "; {which} was dropped here {} ms before: {} ({reason}{}){netns}",
                ms(d.before_ns),
                d.what,
                d.function
            );
        }
        Happening {
            happened: "retransmit",
            text,
            how: Some(id(kind)),
            seq: Some(seq.0),
            fin,
            bytes: (!matches!(kind, Kind::Syn | Kind::SynAck)).then_some(bytes),
            rto_ns: rto,
            dropped: dropped.map(|(d, _)| d),
            ..Happening::default()
        }
    }

    /// And whether that is no loss.
    fn dropped(&mut self, note: &Note, d: &Dropped) -> (DroppedJson, bool) {
        self.symbols.resolve(&[d.at]);
        let function = match self.symbols.get(d.at) {
            Some(symbol) => escaped(symbol.name.as_bytes()),
            None => format!("{:#x}", d.at),
        };
        let reason = match d.reason {
            0 => None,
            reason => Some(self.reasons.drops.short(reason)),
        };
        let meaning =
            Rules::builtin().explain(reason.as_deref().unwrap_or_default(), &function, &[]);
        let expected = meaning.is_expected();
        let dropped = DroppedJson {
            packet: if d.acknowledges { "ack" } else { "original" },
            class: meaning.class,
            what: meaning.what,
            reason,
            function,
            netns: (d.netns != 0).then_some(d.netns),
            before_ns: note.ts.saturating_sub(d.ts),
        };
        (dropped, expected)
    }

    fn reset(&self, state: u8, reason: u32) -> Happening {
        let reason = self.reasons.resets.get(&reason).cloned();
        let meaning = reason.as_deref().and_then(|r| Rules::builtin().reason(r));
        let known = |_: &&_| reason.as_deref() != Some("SK_RST_REASON_NOT_SPECIFIED");
        let why = meaning
            .filter(known)
            .map_or(String::new(), |m| format!(": {}", m.what));
        // Without a socket there is no state.
        let state = (state != 0).then(|| state_name(state));
        let within = state.map_or(String::new(), |state| format!(" in {state}"));
        Happening {
            happened: "reset-sent",
            text: format!("RST sent{within}{why}"),
            reason,
            state,
            ..Happening::default()
        }
    }

    /// The name that `ip netns` knows, or the inode.
    fn netns(&mut self, inode: u32) -> String {
        if !self.netns.contains_key(&inode) {
            self.netns = netns::names();
        }
        let name = self.netns.get(&inode);
        name.map_or_else(|| inode.to_string(), |name| escaped(name.as_bytes()))
    }
}

/// A process asked for it: its stack ends in a system call, and nothing on it takes a packet in.
fn in_system_call(stack: &[String]) -> bool {
    let is = |name: &String, list: &[&str]| list.contains(&name.as_str());
    !stack.iter().any(|name| is(name, &TAKES_PACKETS))
        && stack.iter().any(|name| is(name, &SYSTEM_CALLS))
}

fn id(kind: Kind) -> &'static str {
    match kind {
        Kind::Syn => "syn",
        Kind::SynAck => "syn-ack",
        Kind::Rto => "rto",
        Kind::Fast => "fast",
        Kind::Tlp => "tlp",
    }
}

fn words(kind: Kind) -> &'static str {
    match kind {
        Kind::Syn | Kind::SynAck => "the handshake",
        Kind::Rto => "timeout (RTO)",
        Kind::Fast => "fast retransmit",
        Kind::Tlp => "tail-loss probe",
    }
}

fn ms(ns: u64) -> String {
    format!("{:.3}", ns as f64 / 1e6)
}

/// A process as lines show it.
pub fn process_name(comm: &[u8; 16], tgid: u32) -> String {
    let end = comm.iter().position(|&byte| byte == 0);
    let name = escaped(&comm[..end.unwrap_or(comm.len())]);
    format!("{name}[{tgid}]")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_at_work() {
        let named = |names: &[&str]| {
            names
                .iter()
                .map(|&name| name.to_owned())
                .collect::<Vec<_>>()
        };
        let close = ["tcp_send_active_reset", "tcp_close", "do_syscall_64"];
        assert!(in_system_call(&named(&close)));
        // A packet comes while the process is in a system call.
        let comes = [
            "tcp_reset",
            "net_rx_action",
            "handle_softirqs",
            "do_syscall_64",
        ];
        assert!(!in_system_call(&named(&comes)));
        let held = [
            "tcp_reset",
            "tcp_v4_do_rcv",
            "__release_sock",
            "do_syscall_64",
        ];
        assert!(!in_system_call(&named(&held)));
        assert!(!in_system_call(&named(&["tcp_reset"])) && !in_system_call(&[]));
    }
}
