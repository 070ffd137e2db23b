//! What made a packet slow: the longest of its stages, and what is known of that time. The sentences are rules
//! (src/explain/delays.toml).

use std::collections::HashMap;

use anyhow::Result;
use serde::Serialize;

use crate::event::tuple::Tuple;
use crate::explain::delays;
use crate::text::columns::us;
use crate::text::escape::escaped;
use crate::tools::icmp::culprit::{Culprits, Names as Softirqs};
use crate::tools::icmp::decode::Message as Softirq;

use super::packet::{Packet, Reader, Sent};
use super::stages::{Stage, Way};

/// Bits of task_struct.__state (include/linux/sched.h of the kernel).
const UNINTERRUPTIBLE: u32 = 2;
const STOPPED: u32 = 4;
const TRACED: u32 = 8;
/// IPPROTO_TCP of include/uapi/linux/in.h
const TCP: u8 = 6;
/// A part of a stage that explains it.
const MOST: u64 = 2;

/// Why a packet was slow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Why {
    /// the rule's name
    pub rule: &'static str,
    pub stage: &'static str,
    pub text: String,
    pub change: String,
    /// of the process that did not read: kernel functions, innermost first
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stack: Vec<String>,
}

/// What was sent about the packets that are to come.
#[derive(Default)]
pub struct Culprit {
    softirqs: Culprits,
    symbols: Softirqs,
    reader: Option<Reader>,
    sent: HashMap<(u32, u32), Sent>,
}

/// The words of a rule.
type Words = Vec<(&'static str, String)>;

impl Culprit {
    pub fn softirq(&mut self, message: Softirq) {
        match message {
            Softirq::Gap(gap) => self.softirqs.gap(gap),
            Softirq::Sample(sample) => self.softirqs.sample(sample),
            Softirq::Event(_) => {}
        }
    }

    pub fn reader(&mut self, reader: Reader) {
        self.reader = Some(reader);
    }

    pub fn sent(&mut self, sent: Sent) {
        self.sent.insert((sent.netns, sent.ifindex), sent);
    }

    /// What is known of the longest stage. `device`: the packet's, by name.
    pub fn of(&mut self, p: &Packet, device: &str) -> Result<Option<Why>> {
        let Some((stage, ns)) = p.stages.iter().copied().max_by_key(|(_, ns)| *ns) else {
            return Ok(None);
        };
        let mut words: Words = vec![
            ("part", time(ns)),
            ("total", time(p.total)),
            ("cpu", p.cpu.to_string()),
            ("device", device.to_owned()),
        ];
        if let Some(owner) = &p.owner {
            words.push(("who", format!("{}[{}]", escaped(owner.comm()), owner.tgid)));
            words.push(("pid", owner.tgid.to_string()));
        }
        let mut stack = Vec::new();
        let rule = match stage {
            Stage::SOFTIRQ => self.of_softirq(p, ns, &mut words)?,
            Stage::NIC => "nic-waited",
            Stage::QUEUE => "queue-held",
            Stage::SOCKET => self.of_reader(p, ns, &mut words, &mut stack)?,
            Stage::QDISC => self.of_qdisc(p, &mut words),
            Stage::WRITE => of_write(p),
            Stage::NETWORK | Stage::PROCESS | Stage::UNREAD => {
                for (word, stage) in [
                    ("process", Stage::PROCESS),
                    ("network", Stage::NETWORK),
                    ("unread", Stage::UNREAD),
                ] {
                    words.push((word, time(p.spent(stage).unwrap_or(0))));
                }
                match p.way {
                    Way::ASKS => "requests-asked",
                    _ => "requests-served",
                }
            }
            _ => return Ok(None),
        };
        // Later words first: they say it more exactly.
        words.reverse();
        Ok(delays::filled(rule, &words).map(|delay| Why {
            rule,
            stage: stage.name(),
            text: delay.text,
            change: delay.change,
            stack,
        }))
    }

    fn of_softirq(&mut self, p: &Packet, ns: u64, words: &mut Words) -> Result<&'static str> {
        // The stage is the first one of its way, but for the card's.
        let first = p.ts.saturating_sub(p.total) + p.spent(Stage::NIC).unwrap_or(0);
        let Some(waited) = self.softirqs.within(p.cpu, first, first + ns) else {
            return Ok("softirq-busy");
        };
        let Some(culprit) = self.symbols.culprit(waited)? else {
            return Ok("softirq-busy");
        };
        words.push(("part", time(culprit.ran())));
        words.push(("who", culprit.who()));
        Ok(match culprit.is_idle() {
            true => "softirq-idle",
            false => "softirq-task",
        })
    }

    fn of_reader(
        &mut self,
        p: &Packet,
        ns: u64,
        words: &mut Words,
        stack: &mut Vec<String>,
    ) -> Result<&'static str> {
        let reader = self.reader.take().filter(|r| r.packet == p.ts);
        if p.hole {
            return Ok("socket-hole");
        }
        let Some(reader) = reader else {
            return Ok("reader-unknown");
        };
        // The stage is the last one: what lies before it does not count.
        let queued = p.ts.saturating_sub(ns);
        let off = reader.off.1.saturating_sub(reader.off.0.max(queued));
        // What was before the packet came, at most.
        let before = queued.saturating_sub(reader.since);
        let inside = |ns: u64| ns.saturating_sub(before);
        let sleeps = off >= ns / MOST;
        if !sleeps && inside(reader.ran) >= ns / MOST {
            return Ok("reader-ran");
        }
        if inside(reader.waited) >= ns / MOST {
            return Ok("reader-waited");
        }
        for addr in &reader.stack {
            let frame = self.symbols.place(*addr)?;
            if !stack.is_empty() || !is_tracer(&frame) {
                stack.push(frame);
            }
        }
        words.push(("place", place(stack)));
        if !sleeps {
            words.push(("ran", time(reader.ran)));
            words.push(("waited", time(reader.waited)));
            words.push(("off", time(off)));
            words.push(("ago", time(p.ts.saturating_sub(reader.since))));
            return Ok("reader-unsure");
        }
        words.push(("part", time(off)));
        Ok(rule_of_state(reader.state))
    }

    fn of_qdisc(&mut self, p: &Packet, words: &mut Words) -> &'static str {
        let end = p
            .qdisc
            .iter()
            .position(|b| *b == 0)
            .unwrap_or(p.qdisc.len());
        words.push(("qdisc", escaped(&p.qdisc[..end])));
        words.push(("backlog", p.backlog.to_string()));
        if p.backlog == 0 {
            return "qdisc-delays";
        }
        let sent = self.sent.get(&(p.netns, p.ifindex));
        let Some((flow, share)) = sent.and_then(|sent| top_flow(sent, p.queued, p.ts)) else {
            return "qdisc-full";
        };
        words.push(("flow", flow.to_string()));
        words.push(("share", share.to_string()));
        "qdisc-flow"
    }
}

/// `180.2 ms`, `35.1 us`.
fn time(ns: u64) -> String {
    match ns {
        0..1_000_000 => format!("{} us", us(ns)),
        _ => format!("{}.{} ms", ns / 1_000_000, ns % 1_000_000 / 100_000),
    }
}

/// The way from the tracepoint to our program.
fn is_tracer(frame: &str) -> bool {
    ["bpf_", "__bpf_", "__traceiter_"]
        .iter()
        .any(|name| frame.starts_with(name))
}

/// The first function that is not one of the scheduler.
fn place(stack: &[String]) -> String {
    let name = |frame: &String| frame.split('+').next().unwrap_or_default().to_owned();
    let mut all = stack.iter().map(name);
    let found = all.find(|name| {
        let scheduler = [
            "__schedule",
            "schedule",
            "preempt_schedule",
            "__cond_resched",
        ];
        !scheduler.iter().any(|s| name.starts_with(s))
    });
    found.unwrap_or_else(|| "the scheduler".to_owned())
}

fn rule_of_state(state: u32) -> &'static str {
    match state {
        0 => "reader-waited",
        s if s & (STOPPED | TRACED) != 0 => "reader-stopped",
        s if s & UNINTERRUPTIBLE != 0 => "reader-blocked",
        _ => "reader-slept",
    }
}

fn of_write(p: &Packet) -> &'static str {
    match p.limited {
        _ if p.tuple.is_some_and(|t| t.proto != TCP) => "write-datagram",
        _ if p.again => "write-again",
        Some((window, buffer)) if window * MOST >= 1000 && window >= buffer => "write-window",
        Some((_, buffer)) if buffer * MOST >= 1000 => "write-buffer",
        _ => "write-tcp",
    }
}

/// The flow of most bytes that left a device in this time, and its part of 100.
fn top_flow(sent: &Sent, from: u64, to: u64) -> Option<(Tuple, u64)> {
    let mut flows: HashMap<Tuple, u64> = HashMap::new();
    let mut all = 0;
    for (ts, len, tuple) in &sent.frames {
        if (from..to).contains(ts) {
            all += u64::from(*len);
            if let Some(tuple) = tuple {
                // A flow, whatever the flags of its segments.
                let flow = Tuple {
                    tcp_flags: 0,
                    ..*tuple
                };
                *flows.entry(flow).or_default() += u64::from(*len);
            }
        }
    }
    let (flow, bytes) = flows.into_iter().max_by_key(|(_, bytes)| *bytes)?;
    Some((flow, bytes * 100 / all.max(1)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpf::bytes_of;
    use crate::bpf::latency::types::lat_packet;

    /// A packet that spent most of its time in a stage.
    fn packet(stage: Stage) -> Packet {
        let mut raw = lat_packet {
            first: 1_000,
            last: 10_001_000,
            seen: 1 << stage.0,
            tgid: 88,
            cpu: 1,
            comm: *b"redis\0\0\0\0\0\0\0\0\0\0\0",
            qdisc: *b"pfifo\0\0\0\0\0\0\0\0\0\0\0",
            ..lat_packet::default()
        };
        raw.head.kind = crate::bpf::latency::types::lat_kind::LAT_KIND_PACKET.0 as u16;
        raw.stage[stage.0 as usize] = 10_000_000;
        match super::super::packet::decode(bytes_of(&raw)) {
            Some(super::super::packet::Message::Packet(packet)) => packet,
            _ => panic!("no packet"),
        }
    }

    fn udp(port: u16) -> Tuple {
        Tuple {
            saddr: "10.0.0.1".parse().unwrap(),
            daddr: "10.0.0.2".parse().unwrap(),
            sport: port,
            dport: 80,
            proto: 17,
            tcp_flags: 0,
            icmp_type: 0,
            icmp_code: 0,
            fragment: false,
        }
    }

    fn rule(culprit: &mut Culprit, p: &Packet) -> (&'static str, String) {
        let why = culprit.of(p, "eth0").unwrap().unwrap();
        assert!(!why.text.contains('{'), "{}", why.text);
        (why.rule, why.text)
    }

    fn reader(off: (u64, u64), ran: u64, state: u32) -> Reader {
        Reader {
            packet: 10_001_000,
            since: 0,
            off,
            ran,
            waited: 0,
            state,
            stack: Vec::new(),
        }
    }

    #[test]
    fn readers() {
        let p = packet(Stage::SOCKET);
        let mut c = Culprit::default();
        assert_eq!(rule(&mut c, &p).0, "reader-unknown");
        for (off, ran, state, name) in [
            ((0, 9_001_000), 0, 1, "reader-slept"),
            ((0, 9_001_000), 0, 2, "reader-blocked"),
            ((0, 9_001_000), 0, 4, "reader-stopped"),
            ((0, 9_001_000), 0, 8, "reader-stopped"),
            ((0, 9_001_000), 0, 0, "reader-waited"),
            ((0, 100), 9_000_000, 1, "reader-ran"),
            ((0, 100), 1_000, 1, "reader-unsure"),
        ] {
            c.reader(reader(off, ran, state));
            let (rule, text) = rule(&mut c, &p);
            assert_eq!(rule, name, "{text}");
            assert!(text.contains("redis[88]"), "{text}");
        }
        // It wanted to run all the time.
        c.reader(Reader {
            waited: 9_000_000,
            ..reader((0, 9_001_000), 1_000, 1)
        });
        assert_eq!(rule(&mut c, &p).0, "reader-waited");
        // It ran, but before the packet came: it read last a second ago.
        let mut later = packet(Stage::SOCKET);
        later.ts += 1_000_000_000;
        c.reader(Reader {
            packet: later.ts,
            ..reader((0, 100), 900_000_000, 1)
        });
        assert_eq!(rule(&mut c, &later).0, "reader-unsure");
        // What TCP could not give it is not late by the process.
        let mut hole = packet(Stage::SOCKET);
        hole.hole = true;
        c.reader(reader((0, 9_001_000), 0, 1));
        assert_eq!(rule(&mut c, &hole).0, "socket-hole");
        // Another packet's.
        c.reader(Reader {
            packet: 7,
            ..reader((0, 9_001_000), 0, 1)
        });
        assert_eq!(rule(&mut c, &p).0, "reader-unknown");
    }

    #[test]
    fn queues_of_devices() {
        let mut p = packet(Stage::QDISC);
        let mut c = Culprit::default();
        assert_eq!(rule(&mut c, &p).0, "qdisc-delays");
        p.backlog = 7;
        p.queued = 1_000;
        assert_eq!(rule(&mut c, &p).0, "qdisc-full");
        let flow = |port| Some(udp(port));
        let frames = vec![
            (500, 5000, flow(9)),
            (2_000, 100, flow(1)),
            (3_000, 900, flow(2)),
        ];
        c.sent(Sent {
            netns: 0,
            ifindex: 0,
            frames,
        });
        let (rule, text) = rule(&mut c, &p);
        assert_eq!(rule, "qdisc-flow");
        assert!(
            text.contains("7 packets were in the queue pfifo of eth0")
                && text.contains("90 % of the bytes")
                && text.contains("10.0.0.1:2->10.0.0.2:80(udp)"),
            "{text}"
        );
    }

    #[test]
    fn writes_and_others() {
        let mut p = packet(Stage::WRITE);
        let mut c = Culprit::default();
        assert_eq!(rule(&mut c, &p).0, "write-tcp");
        p.limited = Some((900, 50));
        assert_eq!(rule(&mut c, &p).0, "write-window");
        p.limited = Some((100, 800));
        assert_eq!(rule(&mut c, &p).0, "write-buffer");
        p.again = true;
        assert_eq!(rule(&mut c, &p).0, "write-again");
        p.tuple = Some(udp(1));
        assert_eq!(rule(&mut c, &p).0, "write-datagram");
        assert_eq!(rule(&mut c, &packet(Stage::NIC)).0, "nic-waited");
        assert_eq!(rule(&mut c, &packet(Stage::QUEUE)).0, "queue-held");
        assert_eq!(rule(&mut c, &packet(Stage::SOFTIRQ)).0, "softirq-busy");
        let (rule, text) = rule(&mut c, &packet(Stage::PROCESS));
        assert_eq!(rule, "requests-served");
        assert!(text.starts_with("the server took 10.0 ms"), "{text}");
        let mut p = packet(Stage::PROCESS);
        p.way = Way::ASKS;
        let why = c.of(&p, "").unwrap().unwrap();
        assert_eq!(why.rule, "requests-asked");
    }

    #[test]
    fn where_a_process_sleeps() {
        let stack = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        let names = ["__schedule+0x1", "schedule_timeout+0x2", "futex_wait+0x3"];
        assert_eq!(place(&stack(&names)), "futex_wait");
        assert_eq!(place(&[]), "the scheduler");
        assert!(is_tracer("__traceiter_sched_switch+0x41") && !is_tracer("futex_wait+0x3"));
    }
}
