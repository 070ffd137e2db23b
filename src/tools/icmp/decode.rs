//! Bytes of an event (src/bpf/icmp/icmp.h) to an owned value. Pure; short or odd data gives `None`.

use std::net::IpAddr;

use crate::bpf::icmp::types::{
    icmp_context, icmp_drop, icmp_event, icmp_gap, icmp_key, icmp_kind, icmp_softirq, np_head,
};
use crate::bpf::read;
use crate::event::head::Head;
use crate::event::tuple::address;

/// ICMP_KIND_*
pub const KIND_ECHO: u16 = icmp_kind::ICMP_KIND_ECHO.0 as u16;
pub const KIND_REPLY: u16 = icmp_kind::ICMP_KIND_REPLY.0 as u16;
pub const KIND_SEND: u16 = icmp_kind::ICMP_KIND_SEND.0 as u16;
pub const KIND_XMIT: u16 = icmp_kind::ICMP_KIND_XMIT.0 as u16;
pub const KIND_RETURN: u16 = icmp_kind::ICMP_KIND_RETURN.0 as u16;
pub const KIND_READ: u16 = icmp_kind::ICMP_KIND_READ.0 as u16;
pub const KIND_DROP: u16 = icmp_kind::ICMP_KIND_DROP.0 as u16;
pub const KIND_DELIVER: u16 = icmp_kind::ICMP_KIND_DELIVER.0 as u16;
/// ICMP_DROP_*
const DROP_COPY: u8 = icmp_drop::ICMP_DROP_COPY.0 as u8;
const DROP_UNQUEUED: u8 = icmp_drop::ICMP_DROP_UNQUEUED.0 as u8;
const KIND_GAP: u16 = icmp_kind::ICMP_KIND_GAP.0 as u16;
const KIND_SAMPLE: u16 = icmp_kind::ICMP_KIND_SAMPLE.0 as u16;

/// An event of any kind. Most are the large one.
#[allow(clippy::large_enum_variant, reason = "short-lived, never stored")]
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    Event(Event),
    Gap(Gap),
    Sample(Sample),
}

/// `struct icmp_gap`: a NET_RX softirq waited on a CPU.
#[derive(Debug, Clone, PartialEq)]
pub struct Gap {
    pub cpu: u16,
    pub raise: u64,
    pub entry: u64,
    pub runs: Vec<Run>,
}

/// `struct icmp_run`: a task that ran meanwhile.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    pub ns: u64,
    pub cgroup: u64,
    pub tgid: u32,
    pub pid: u32,
    /// NUL-padded
    pub comm: [u8; 16],
}

/// `struct icmp_sample`: what it did at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    pub head: Head,
    pub raise: u64,
    /// addresses, innermost first
    pub stack: Vec<u64>,
}

/// An echo, always as its request has it: `saddr` is who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    pub saddr: IpAddr,
    pub daddr: IpAddr,
    pub netns: u32,
    pub id: u16,
    pub seq: u16,
}

/// `struct icmp_softirq`: one NET_RX softirq; `None` where it was not seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Softirq {
    pub irq: Option<u64>,
    pub raise: Option<u64>,
    pub entry: Option<u64>,
}

/// `struct icmp_times`: a request's way in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Times {
    pub queued: Option<u64>,
    pub receive: Option<u64>,
    pub first: Softirq,
    pub last: Softirq,
    pub queued_cpu: u16,
    pub receive_cpu: u16,
    pub backlog: bool,
}

/// Who was current.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Context {
    Task,
    Idle,
    Ksoftirqd,
}

impl Context {
    pub fn name(self) -> &'static str {
        match self {
            Self::Task => "task",
            Self::Idle => "idle",
            Self::Ksoftirqd => "ksoftirqd",
        }
    }
}

/// `struct icmp_event`
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    pub head: Head,
    /// number of the echo in this run
    pub request: u64,
    pub key: Key,
    pub times: Times,
    pub icmp_type: u8,
    pub context: Context,
    pub ifindex: u32,
    /// NUL-padded
    pub ifname: [u8; 16],
    /// bytes of the IP packet
    pub len: u32,
    /// SEND, XMIT: entry of sendmsg
    pub start: Option<u64>,
    /// DROP: address in the kernel, value of enum skb_drop_reason, of the reply (else of the request)
    pub location: u64,
    pub reason: u32,
    pub reply: bool,
    /// DROP: another copy of the packet has not been dropped
    pub copy: bool,
    /// DROP: its socket had no room for it
    pub unqueued: bool,
}

/// Decodes one event, without the padding that perf adds.
pub fn decode(bytes: &[u8]) -> Option<Message> {
    let (h, rest) = read::<np_head>(bytes)?;
    match h.kind {
        KIND_GAP => gap(bytes).map(Message::Gap),
        KIND_SAMPLE => {
            let mut words = rest
                .chunks_exact(8)
                .filter_map(|c| c.try_into().ok().map(u64::from_ne_bytes));
            Some(Message::Sample(Sample {
                head: head(&h),
                raise: words.next()?,
                stack: words.collect(),
            }))
        }
        _ => event(bytes).map(Message::Event),
    }
}

fn head(h: &np_head) -> Head {
    Head {
        ts: h.ts,
        kind: h.kind,
        cpu: h.cpu,
        tgid: h.tgid,
        pid: h.pid,
        comm: h.comm,
    }
}

fn gap(bytes: &[u8]) -> Option<Gap> {
    let (g, _) = read::<icmp_gap>(bytes)?;
    Some(Gap {
        cpu: g.head.cpu,
        raise: g.raise,
        entry: g.entry,
        runs: g
            .run
            .iter()
            .take(g.runs as usize)
            .map(|r| Run {
                ns: r.ns,
                cgroup: r.cgroup,
                tgid: r.tgid,
                pid: r.pid,
                comm: r.comm,
            })
            .collect(),
    })
}

fn event(bytes: &[u8]) -> Option<Event> {
    let (e, _) = read::<icmp_event>(bytes)?;
    Some(Event {
        head: head(&e.head),
        request: e.request,
        key: key(&e.key)?,
        times: Times {
            queued: seen(e.times.queued),
            receive: seen(e.times.receive),
            first: softirq(&e.times.first),
            last: softirq(&e.times.last),
            queued_cpu: e.times.queued_cpu,
            receive_cpu: e.times.receive_cpu,
            backlog: e.times.backlog != 0,
        },
        icmp_type: e.icmp_type,
        context: match icmp_context(e.context.into()) {
            icmp_context::ICMP_CONTEXT_TASK => Context::Task,
            icmp_context::ICMP_CONTEXT_IDLE => Context::Idle,
            icmp_context::ICMP_CONTEXT_KSOFTIRQD => Context::Ksoftirqd,
            _ => return None,
        },
        ifindex: e.ifindex,
        ifname: e.ifname,
        len: e.len,
        start: seen(e.start),
        location: e.location,
        reason: e.reason,
        reply: e.reply != 0,
        copy: e.drop & DROP_COPY != 0,
        unqueued: e.drop & DROP_UNQUEUED != 0,
    })
}

fn seen(ts: u64) -> Option<u64> {
    (ts != 0).then_some(ts)
}

fn softirq(s: &icmp_softirq) -> Softirq {
    Softirq {
        irq: seen(s.irq),
        raise: seen(s.raise),
        entry: seen(s.entry),
    }
}

fn key(k: &icmp_key) -> Option<Key> {
    matches!(k.version, 4 | 6).then(|| Key {
        saddr: address(k.saddr, k.version),
        daddr: address(k.daddr, k.version),
        netns: k.netns,
        id: k.id,
        seq: k.seq,
    })
}

/// Events for the tests of this folder.
#[cfg(test)]
pub mod test {
    use super::*;

    /// The same of another kind.
    pub fn of_kind(kind: u16, ts: u64, seq: u16) -> Event {
        let mut e = event(ts, seq);
        e.head.kind = kind;
        e
    }

    /// A request from 10.0.0.1 to 10.0.0.2.
    pub fn event(ts: u64, seq: u16) -> Event {
        let mut e = raw();
        e.head.ts = ts;
        e.key.seq = seq;
        e.request = seq.into();
        super::event(crate::bpf::bytes_of(&e)).unwrap()
    }

    pub fn raw() -> icmp_event {
        let mut e = icmp_event::default();
        e.head.ts = 1000;
        e.head.kind = KIND_ECHO;
        e.key.version = 4;
        e.key.saddr = [0, u64::from_ne_bytes([0, 0, 0xff, 0xff, 10, 0, 0, 1])];
        e.key.daddr = [0, u64::from_ne_bytes([0, 0, 0xff, 0xff, 10, 0, 0, 2])];
        e.key.id = 7;
        e.key.seq = 1;
        e.times.receive = 900;
        e
    }
}

#[cfg(test)]
mod tests {
    use super::test::raw;
    use super::*;
    use proptest::prelude::*;

    fn bytes(e: &icmp_event) -> Vec<u8> {
        crate::bpf::bytes_of(e).to_vec()
    }

    #[test]
    fn a_request() {
        let Some(Message::Event(e)) = decode(&bytes(&raw())) else {
            panic!("no event");
        };
        assert_eq!(e.key.saddr.to_string(), "10.0.0.1");
        assert_eq!((e.key.id, e.key.seq), (7, 1));
        assert_eq!(e.times.receive, Some(900));
        assert_eq!(e.times.queued, None);
        assert_eq!(e.context, Context::Task);
    }

    #[test]
    fn odd_data_is_refused() {
        let good = bytes(&raw());
        assert!(decode(&good[..good.len() - 1]).is_none());
        let mut e = raw();
        e.key.version = 5;
        assert!(decode(&bytes(&e)).is_none());
        let mut e = raw();
        e.context = 9;
        assert!(decode(&bytes(&e)).is_none());
    }

    #[test]
    fn a_gap_and_a_sample() {
        let mut g = icmp_gap::default();
        g.head.kind = KIND_GAP;
        g.head.cpu = 3;
        g.raise = 10;
        g.entry = 30;
        g.runs = 1;
        g.run[0].ns = 20;
        g.run[0].pid = 7;
        let Some(Message::Gap(gap)) = decode(crate::bpf::bytes_of(&g)) else {
            panic!("no gap");
        };
        assert_eq!((gap.cpu, gap.raise, gap.entry), (3, 10, 30));
        assert_eq!(gap.runs.len(), 1);
        assert_eq!((gap.runs[0].ns, gap.runs[0].pid), (20, 7));
        // More than there is room for.
        g.runs = 99;
        let Some(Message::Gap(gap)) = decode(crate::bpf::bytes_of(&g)) else {
            panic!("no gap");
        };
        assert_eq!(gap.runs.len(), 6);

        g.head.kind = KIND_SAMPLE;
        let mut sample = crate::bpf::bytes_of(&g.head).to_vec();
        assert!(decode(&sample).is_none());
        for word in [10u64, 0x1000, 0x2000] {
            sample.extend_from_slice(&word.to_ne_bytes());
        }
        let Some(Message::Sample(s)) = decode(&sample) else {
            panic!("no sample");
        };
        assert_eq!((s.raise, s.stack), (10, vec![0x1000, 0x2000]));
    }

    proptest! {
        #[test]
        fn any_bytes_do_no_harm(data in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&data);
        }
    }
}
