//! Why a connection took long, in a sentence (--min-ms): its counters, and what happened to it, weighed. The words are rules
//! (src/explain/delays.toml).

use std::collections::HashMap;
use std::net::SocketAddr;

use serde::Serialize;

use crate::explain::delays::{self, Delay};

use super::connection::{Connection, Role};
use super::happenings::process_name;
use super::notes::{Kind, Note, What};

/// Connections with notes that are remembered, at most.
pub const STORIES: usize = 65_536;

/// What notes told of a connection.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Story {
    /// timeouts of the SYN, ns
    syn: Vec<u64>,
    /// the first drop on this host behind them, in words
    syn_dropped: Option<String>,
    /// timeouts of segments, all together, ns
    rto: u64,
    rtos: u32,
    /// the first drop on this host behind them, in words
    rto_dropped: Option<String>,
    /// sent again by other means
    others: u32,
    /// of the last of them: the first sequence number, and how often it was sent in a row
    last_rto: (u32, u32),
    /// segments that were sent again for nothing, as far as the kernel has found out
    spurious: u32,
    /// with a window of zero of the peer, ns
    shut: u64,
    /// what the peer waits for, whose window is zero
    waits_for: Option<u32>,
    /// who read at last where that window was, if it was on this host
    reader: Option<String>,
}

/// One end of a connection: namespace, local and remote address.
pub type End = (u32, SocketAddr, SocketAddr);

/// The stories of connections that are open.
#[derive(Debug, Default)]
pub struct Stories {
    by_end: HashMap<End, Story>,
    /// who reads where the window is zero, by the sequence number that this end waits for: addresses may be translated, or stand twice
    readers: HashMap<u32, String>,
    /// notes that there was no room for
    pub cut: u64,
}

/// The cause that took most of the time.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Blame {
    /// the rule
    pub rule: &'static str,
    pub ns: u64,
    pub text: String,
    pub change: String,
}

impl Stories {
    /// `dropped`: the drop behind it, in words.
    pub fn learn(&mut self, note: &Note, dropped: Option<String>) {
        if let What::ReadHere { seq, .. } = note.what {
            if self.readers.len() >= STORIES {
                self.readers.clear();
            }
            let (tgid, comm) = &note.current;
            self.readers.insert(seq, process_name(comm, *tgid));
            return;
        }
        let tells = match note.what {
            What::Retransmit { kind, .. } => kind != Kind::SynAck,
            What::PeerShut { .. } | What::PeerOpen(_) | What::Undone | What::Duplicates(_) => true,
            _ => false,
        };
        let end = (note.netns, note.local, note.remote);
        if tells && (self.by_end.len() < STORIES || self.by_end.contains_key(&end)) {
            let story = self.by_end.entry(end).or_default();
            story.learn(note.what, dropped, &mut self.readers);
        } else if tells {
            self.cut += 1;
        }
    }

    /// Why the connection took its time; it has ended. `None`: nothing stands out, or its begin is not known.
    pub fn blame(&mut self, c: &Connection) -> Option<Blame> {
        let story = self.by_end.remove(&(c.netns, c.local, c.remote));
        blame(c, &story.unwrap_or_default())
    }
}

impl Story {
    fn learn(&mut self, what: What, dropped: Option<String>, readers: &mut HashMap<u32, String>) {
        match what {
            What::Retransmit { kind, rto, seq, .. } => {
                let rto = rto.unwrap_or(0);
                match kind {
                    Kind::Syn => {
                        self.syn.push(rto);
                        self.syn_dropped = self.syn_dropped.take().or(dropped);
                    }
                    Kind::Rto => {
                        self.rto += rto;
                        self.rtos += 1;
                        let (last, times) = self.last_rto;
                        let row = if last == seq.0 { times + 1 } else { 1 };
                        self.last_rto = (seq.0, row);
                        self.rto_dropped = self.rto_dropped.take().or(dropped);
                    }
                    Kind::Fast | Kind::Tlp | Kind::SynAck => self.others += 1,
                }
            }
            What::Undone => {
                // The timeouts in a row that it takes back; none where it was a fast retransmit.
                self.spurious += self.last_rto.1.max(1);
                self.last_rto.1 = 0;
            }
            What::Duplicates(segments) => self.spurious += segments,
            What::PeerShut { seq } => self.waits_for = Some(seq),
            What::PeerOpen(ns) => {
                self.shut += ns;
                let reader = self.waits_for.take().and_then(|seq| readers.remove(&seq));
                self.reader = reader.or(self.reader.take());
            }
            _ => {}
        }
    }
}

fn blame(c: &Connection, story: &Story) -> Option<Blame> {
    let total = c.duration()?;
    let n = &c.counters;
    let handshake = c.handshake().unwrap_or(total);
    let syn: u64 = story.syn.iter().sum::<u64>().min(handshake);
    let sending = c.network_limited();
    let idle = c.application_limited().unwrap_or(0);
    let rto = story.rto.min(sending);
    let asks = c.role == Role::Connect;
    let (rule, ns) = [
        (
            if story.syn_dropped.is_some() {
                "tcp-syn-dropped"
            } else {
                "tcp-syn"
            },
            syn,
        ),
        (
            if story.reader.is_some() {
                "tcp-window-reader"
            } else {
                "tcp-window"
            },
            n.window_limited.max(story.shut),
        ),
        ("tcp-buffer", n.buffer_limited),
        (
            if story.rto_dropped.is_some() {
                "tcp-timeout-dropped"
            } else if story.spurious >= story.rtos {
                "tcp-timeout-spurious"
            } else {
                "tcp-timeout"
            },
            rto,
        ),
        (
            if story.rtos + story.others > 0 {
                "tcp-network-lossy"
            } else {
                "tcp-network"
            },
            sending - rto,
        ),
        (
            if asks {
                "tcp-idle-asks"
            } else {
                "tcp-idle-serves"
            },
            idle,
        ),
    ]
    .into_iter()
    .max_by_key(|(_, ns)| *ns)?;
    if ns == 0 {
        return None;
    }
    let dropped = match rule {
        "tcp-syn-dropped" => &story.syn_dropped,
        _ => &story.rto_dropped,
    };
    let times: Vec<String> = story.syn.iter().map(|ns| seconds(*ns)).collect();
    let words = [
        ("part", seconds(ns)),
        ("total", seconds(total)),
        ("times", times.join(" and ")),
        ("again", (story.rtos + story.others).to_string()),
        ("rtos", story.rtos.to_string()),
        ("rtt", format!("{:.3} ms", f64::from(n.rtt) / 1e3)),
        ("dropped", dropped.clone().unwrap_or_default()),
        ("who", story.reader.clone().unwrap_or_default()),
    ];
    let Delay { text, change } = delays::filled(rule, &words)?;
    Some(Blame {
        rule,
        ns,
        text,
        change,
    })
}

fn seconds(ns: u64) -> String {
    match ns {
        0..1_000_000_000 => format!("{:.1} ms", ns as f64 / 1e6),
        _ => format!("{:.2} s", ns as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tools::tcp::connection::Counters;

    const S: u64 = 1_000_000_000;

    fn connection(handshake: u64, total: u64, counters: Counters) -> Connection {
        let any = "10.0.0.1:1".parse().unwrap();
        Connection {
            start: Some(S),
            established: Some(S + handshake),
            end: S + total,
            counters,
            ..Connection::nothing(any, any)
        }
    }

    #[test]
    fn each_cause_has_its_sentence() {
        let busy = |busy, window_limited, buffer_limited| Counters {
            busy,
            window_limited,
            buffer_limited,
            rtt: 80_000,
            ..Counters::default()
        };
        let story = Story::default;
        let drop = || Some("firewall rule (nft_do_chain)".to_owned());
        for (c, story, wanted) in [
            (
                connection(3 * S, 3 * S + S / 5, Counters::default()),
                Story {
                    syn: vec![S, 2 * S],
                    syn_dropped: drop(),
                    ..story()
                },
                "3.00 s of 3.20 s: the SYN, or its answer, was dropped here: firewall rule (nft_do_chain); it was repeated after 1.00 s and 2.00 s",
            ),
            (
                connection(S, S + S / 5, Counters::default()),
                Story {
                    syn: vec![S],
                    ..story()
                },
                "1.00 s of 1.20 s: nobody answered the SYN, and it was repeated after 1.00 s",
            ),
            (
                connection(0, S, busy(S - 1, S / 2 + 1, 0)),
                Story {
                    shut: S / 4,
                    reader: Some("redis[88]".to_owned()),
                    ..story()
                },
                "500.0 ms of 1.00 s: the peer's window was shut: redis[88] did not read",
            ),
            (
                connection(0, S, busy(S - 1, S / 2 + 1, 0)),
                story(),
                "500.0 ms of 1.00 s: the peer's window was full or shut: its process did not read fast enough",
            ),
            (
                connection(0, S, busy(S - 1, 0, S / 2 + 1)),
                story(),
                "500.0 ms of 1.00 s: the send buffer was full",
            ),
            (
                connection(0, S, busy(S, 0, 0)),
                Story {
                    rto: S / 5 * 3,
                    rtos: 2,
                    ..story()
                },
                "600.0 ms of 1.00 s: 2 times a segment, or its acknowledgement, was lost, and sent again after a timeout",
            ),
            (
                connection(0, S, busy(S, 0, 0)),
                Story {
                    rto: S / 5 * 3,
                    rtos: 1,
                    rto_dropped: drop(),
                    ..story()
                },
                "600.0 ms of 1.00 s: 1 times a segment, or its acknowledgement, was lost, and sent again after a timeout; the first was dropped here: firewall rule (nft_do_chain)",
            ),
            (
                connection(0, S, busy(S, 0, 0)),
                Story {
                    rto: S / 5 * 3,
                    rtos: 1,
                    spurious: 1,
                    ..story()
                },
                "600.0 ms of 1.00 s: 1 times a timeout (RTO) passed, though nothing was lost: what was sent again had arrived",
            ),
            (
                connection(0, S, busy(S, 0, 0)),
                Story {
                    others: 3,
                    ..story()
                },
                "1.00 s of 1.00 s: the network: a round trip of 80.000 ms, 3 segments sent again, 0 of them by timeout (RTO)",
            ),
            (
                connection(0, S, busy(S, 0, 0)),
                story(),
                "1.00 s of 1.00 s: the network: a round trip of 80.000 ms",
            ),
        ] {
            assert_eq!(blame(&c, &story).unwrap().text, wanted);
        }
        let idle = connection(0, S, Counters::default());
        let asks = blame(
            &Connection {
                role: Role::Connect,
                ..idle.clone()
            },
            &story(),
        );
        assert_eq!(asks.unwrap().rule, "tcp-idle-asks");
        assert_eq!(blame(&idle, &story()).unwrap().rule, "tcp-idle-serves");
    }

    #[test]
    fn who_reads_is_known_by_the_number_that_both_ends_wait_for() {
        let at = |text: &str| text.parse().unwrap();
        let note = |netns, local: &str, remote: &str, what| Note {
            ts: 1,
            current: (88, *b"redis\0\0\0\0\0\0\0\0\0\0\0"),
            owner: None,
            role: Role::Unknown,
            local: at(local),
            remote: at(remote),
            netns,
            sock: 1,
            stack: None,
            what,
        };
        let (client, server, nat) = ("10.0.0.1:40000", "10.0.0.2:80", "10.9.0.1:50000");
        let told = |seq| {
            let mut stories = Stories::default();
            let reads = What::ReadHere { seq, ns: 1 };
            for (netns, local, remote, what) in [
                (1, client, server, What::PeerShut { seq: 7 }),
                // The server sees another address.
                (2, server, nat, reads),
                (1, client, server, What::PeerOpen(S)),
            ] {
                stories.learn(&note(netns, local, remote, what), None);
            }
            let counters = Counters {
                busy: S,
                window_limited: S,
                ..Counters::default()
            };
            let c = Connection {
                netns: 1,
                local: at(client),
                remote: at(server),
                ..connection(0, S, counters)
            };
            (stories.blame(&c).unwrap().rule, stories.by_end.len())
        };
        assert_eq!(told(7), ("tcp-window-reader", 0));
        // Another connection, maybe of the same addresses.
        assert_eq!(told(8), ("tcp-window", 0));
    }

    #[test]
    fn a_lost_segment_says_nothing_of_the_syn() {
        let mut story = Story::default();
        let again = |kind| What::Retransmit {
            kind,
            state: 1,
            seq: (1, 2),
            fin: false,
            rto: Some(S),
            dropped: None,
        };
        let mut readers = HashMap::new();
        story.learn(again(Kind::Syn), None, &mut readers);
        story.learn(again(Kind::Rto), Some("a queue".to_owned()), &mut readers);
        let rule = |c: &Connection| blame(c, &story).unwrap().rule;
        assert_eq!(
            rule(&connection(S, S + S / 5, Counters::default())),
            "tcp-syn"
        );
    }
}
