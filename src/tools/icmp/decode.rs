//! Bytes of an event (src/bpf/icmp.h) to an owned value. Pure; short or odd data gives `None`.

use std::net::IpAddr;

use crate::bpf::icmp::types::{icmp_event, icmp_key, icmp_softirq};
use crate::bpf::read;
use crate::event::head::Head;
use crate::event::tuple::address;

/// ICMP_KIND_*
pub const KIND_ECHO: u16 = 1;
pub const KIND_REPLY: u16 = 2;

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
    pub key: Key,
    pub times: Times,
    pub icmp_type: u8,
    pub context: Context,
    pub ifindex: u32,
    /// NUL-padded
    pub ifname: [u8; 16],
    /// bytes of the IP packet
    pub len: u32,
}

/// Decodes one event, without the padding that perf adds.
pub fn decode(bytes: &[u8]) -> Option<Event> {
    let (e, _) = read::<icmp_event>(bytes)?;
    Some(Event {
        head: Head {
            ts: e.head.ts,
            kind: e.head.kind,
            cpu: e.head.cpu,
            tgid: e.head.tgid,
            pid: e.head.pid,
            comm: e.head.comm,
        },
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
        context: match e.context {
            0 => Context::Task,
            1 => Context::Idle,
            2 => Context::Ksoftirqd,
            _ => return None,
        },
        ifindex: e.ifindex,
        ifname: e.ifname,
        len: e.len,
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
    let bytes = |w: [u64; 2]| {
        let mut b = [0; 16];
        b[..8].copy_from_slice(&w[0].to_ne_bytes());
        b[8..].copy_from_slice(&w[1].to_ne_bytes());
        b
    };
    matches!(k.version, 4 | 6).then(|| Key {
        saddr: address(bytes(k.saddr), k.version),
        daddr: address(bytes(k.daddr), k.version),
        netns: k.netns,
        id: k.id,
        seq: k.seq,
    })
}

/// Events for the tests of this folder.
#[cfg(test)]
pub mod test {
    use super::*;

    /// A request from 10.0.0.1 to 10.0.0.2.
    pub fn event(ts: u64, seq: u16) -> Event {
        let mut e = raw();
        e.head.ts = ts;
        e.key.seq = seq;
        decode(crate::bpf::bytes_of(&e)).unwrap()
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
        let e = decode(&bytes(&raw())).unwrap();
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

    proptest! {
        #[test]
        fn any_bytes_do_no_harm(data in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&data);
        }
    }
}
