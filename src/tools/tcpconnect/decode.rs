//! Bytes of an event (src/bpf/tcp/tcpconnect.h, dns.h) to an owned value. Pure; short or odd data gives `None`.

use std::net::IpAddr;

use crate::bpf::read;
use crate::bpf::tcpconnect::types::{
    dns_event, dns_kind, tcp_decided, tcp_drop, tcp_event, tcp_exe, tcp_flag, tcp_flow, tcp_kind,
    tcp_outcome,
};
use crate::event::head::Head;
use crate::event::tuple::address;

/// TCP_KIND_*, DNS_KIND_ANSWER
const KIND_CONNECT: u16 = tcp_kind::TCP_KIND_CONNECT.0 as u16;
const KIND_OUTCOME: u16 = tcp_kind::TCP_KIND_OUTCOME.0 as u16;
const KIND_ANSWER: u16 = dns_kind::DNS_KIND_ANSWER.0 as u16;

/// TCP_DECIDED_*
pub const DECIDED_ESTABLISHED: u8 = tcp_decided::TCP_DECIDED_ESTABLISHED.0 as u8;
pub const DECIDED_AT_ONCE: u8 = tcp_decided::TCP_DECIDED_AT_ONCE.0 as u8;

/// TCP_FLAG_*
pub const FLAG_MAPPED: u32 = tcp_flag::TCP_FLAG_MAPPED.0;
pub const FLAG_NONBLOCK: u32 = tcp_flag::TCP_FLAG_NONBLOCK.0;
pub const FLAG_MPTCP: u32 = tcp_flag::TCP_FLAG_MPTCP.0;
pub const FLAG_FASTOPEN: u32 = tcp_flag::TCP_FLAG_FASTOPEN.0;
pub const FLAG_SYN_DATA: u32 = tcp_flag::TCP_FLAG_SYN_DATA.0;
pub const FLAG_DEFERRED: u32 = tcp_flag::TCP_FLAG_DEFERRED.0;
pub const FLAG_EXITING: u32 = tcp_flag::TCP_FLAG_EXITING.0;
pub const FLAG_FLOODED: u32 = tcp_flag::TCP_FLAG_FLOODED.0;
pub const FLAG_SOFT: u32 = tcp_flag::TCP_FLAG_SOFT.0;

/// What the programs send.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// connect has sent its SYN
    Connect(Box<Connect>),
    /// a connect is decided
    Outcome(Box<Connect>),
    Answer(Answer),
}

/// `struct tcp_event`
#[derive(Debug, Clone, PartialEq)]
pub struct Connect {
    pub head: Head,
    pub sock: u64,
    pub start: u64,
    /// 0: no SYN was sent
    pub syn: u64,
    pub cgroup: u64,
    pub saddr: IpAddr,
    pub daddr: IpAddr,
    pub sport: u16,
    pub dport: u16,
    pub version: u8,
    pub netns: u32,
    pub uid: u32,
    pub retransmits: u32,
    pub decided: u8,
    pub error: u32,
    pub flags: u32,
    pub stacks: Option<Stacks>,
    pub fate: Fate,
}

/// What else `struct tcp_outcome` has: what happened until the connect was decided.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Fate {
    pub drop: Option<Drop>,
    /// of packets that a packet socket got, or a host that they were not addressed to
    pub copy: Option<Drop>,
    /// errno; 0: none
    pub soft_error: u32,
    pub soft_at: u64,
}

/// `struct tcp_drop`: packets of the handshake that the kernel dropped, the place and the reason of the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drop {
    pub at: u64,
    pub reason: u32,
    pub packets: u32,
}

impl Connect {
    pub fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// From the SYN, or from the call where none was sent, to the event or to the error that was read; ns.
    pub fn latency(&self) -> u64 {
        let since = if self.syn == 0 { self.start } else { self.syn };
        let until = match self.has(FLAG_SOFT) {
            true => self.fate.soft_at,
            false => self.head.ts,
        };
        until.saturating_sub(since)
    }

    /// The SYN that was answered is the only one that was sent: what the kernel dropped of it was a copy.
    pub fn answered_at_once(&self) -> bool {
        self.decided == DECIDED_ESTABLISHED && self.retransmits == 0
    }
}

/// Addresses, innermost first.
#[derive(Debug, Clone, PartialEq)]
pub struct Stacks {
    pub kernel: Vec<u64>,
    pub user: Vec<u64>,
    /// words on top of the user stack
    pub top: Vec<u64>,
    pub exe: Exe,
}

/// `struct tcp_exe`
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Exe {
    pub start_code: u64,
    pub end_code: u64,
    /// empty where it has more parts than fit
    pub path: Vec<u8>,
}

/// `struct dns_event`
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    pub head: Head,
    pub sock: u64,
    pub stream: bool,
    pub cut: bool,
    pub data: Vec<u8>,
}

/// A flow that was counted.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct CountedFlow {
    pub saddr: IpAddr,
    pub daddr: IpAddr,
    pub dport: u16,
    pub lport: u16,
}

/// Decodes one event, without the padding that perf adds.
pub fn decode(bytes: &[u8]) -> Option<Event> {
    let (h, _) = read::<crate::bpf::tcpconnect::types::np_head>(bytes)?;
    let head = Head {
        ts: h.ts,
        kind: h.kind,
        cpu: h.cpu,
        tgid: h.tgid,
        pid: h.pid,
        comm: h.comm,
    };
    match head.kind {
        KIND_CONNECT => connect(head, bytes).map(Event::Connect),
        KIND_OUTCOME => outcome(head, bytes).map(Event::Outcome),
        KIND_ANSWER => answer(head, bytes).map(Event::Answer),
        _ => None,
    }
}

fn connect(head: Head, bytes: &[u8]) -> Option<Box<Connect>> {
    let (e, rest) = read::<tcp_event>(bytes)?;
    let stacks = match rest.is_empty() {
        true => None,
        false => Some(stacks(&e, rest)?),
    };
    let c = of_event(head, &e)?;
    Some(Box::new(Connect { stacks, ..c }))
}

fn outcome(head: Head, bytes: &[u8]) -> Option<Box<Connect>> {
    let (o, _) = read::<tcp_outcome>(bytes)?;
    let drop = |d: tcp_drop| {
        (d.packets != 0).then_some(Drop {
            at: d.at,
            reason: d.reason,
            packets: d.packets,
        })
    };
    let fate = Fate {
        drop: drop(o.drop),
        copy: drop(o.copy),
        soft_error: o.soft_error,
        soft_at: o.soft_at,
    };
    let c = of_event(head, &o.connect)?;
    Some(Box::new(Connect { fate, ..c }))
}

fn of_event(head: Head, e: &tcp_event) -> Option<Connect> {
    matches!(e.version, 4 | 6).then(|| Connect {
        head,
        sock: e.sock,
        start: e.start,
        syn: e.syn,
        cgroup: e.cgroup,
        saddr: address(e.saddr, e.version),
        daddr: address(e.daddr, e.version),
        sport: e.sport,
        dport: e.dport,
        version: e.version,
        netns: e.netns,
        uid: e.uid,
        retransmits: e.retransmits,
        decided: e.decided,
        error: e.error,
        flags: e.flags,
        stacks: None,
        fate: Fate::default(),
    })
}

fn stacks(e: &tcp_event, rest: &[u8]) -> Option<Stacks> {
    let (kernel, rest) = rest.split_at_checked(usize::from(e.stack_kernel))?;
    let (user, rest) = rest.split_at_checked(usize::from(e.stack_user))?;
    let (exe, _) = read::<tcp_exe>(rest)?;
    Some(Stacks {
        kernel: addresses(kernel),
        user: addresses(user),
        top: exe.top.to_vec(),
        exe: Exe {
            start_code: exe.start_code,
            end_code: exe.end_code,
            path: path(&exe.names),
        },
    })
}

/// `/a/b/c` of `c`, `b`, `a`; nothing where the last place is taken (the path may go on) or a name may be cut.
fn path<const N: usize, const L: usize>(names: &[[u8; L]; N]) -> Vec<u8> {
    let name = |n: &[u8; L]| n.split(|&b| b == 0).next().unwrap_or_default().to_vec();
    let mut path = Vec::new();
    let cut = names.iter().any(|n| name(n).len() + 1 >= L);
    if N == 0 || cut || !name(&names[N - 1]).is_empty() {
        return path;
    }
    for part in names.iter().rev().map(name).filter(|n| !n.is_empty()) {
        path.push(b'/');
        path.extend(part);
    }
    path
}

fn addresses(bytes: &[u8]) -> Vec<u64> {
    bytes
        .chunks_exact(8)
        .filter_map(|c| c.try_into().ok().map(u64::from_ne_bytes))
        .collect()
}

fn answer(head: Head, bytes: &[u8]) -> Option<Answer> {
    let (e, rest) = read::<dns_event>(bytes)?;
    Some(Answer {
        head,
        sock: e.sock,
        stream: e.stream != 0,
        cut: e.cut != 0,
        data: rest.get(..e.size as usize)?.to_vec(),
    })
}

/// Decodes a key of the map counts.
pub fn flow(bytes: &[u8]) -> Option<CountedFlow> {
    let (k, _) = read::<tcp_flow>(bytes)?;
    Some(CountedFlow {
        saddr: address(k.saddr, k.version),
        daddr: address(k.daddr, k.version),
        dport: k.dport,
        lport: k.lport,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes<T: plain::Plain>(v: &T) -> &[u8] {
        // SAFETY: Plain types are their bytes.
        unsafe { plain::as_bytes(v) }
    }

    fn sample() -> tcp_event {
        let mut e = tcp_event {
            version: 4,
            dport: 80,
            start: 10,
            error: 111,
            decided: 3,
            ..tcp_event::default()
        };
        e.head.kind = KIND_OUTCOME;
        e.head.ts = 110;
        e.daddr[1] = u64::from_ne_bytes([0, 0, 0xff, 0xff, 10, 0, 0, 2]);
        e
    }

    #[test]
    fn an_outcome_and_every_cut_of_it() {
        let mut o = tcp_outcome {
            connect: sample(),
            ..tcp_outcome::default()
        };
        o.drop = tcp_drop {
            at: 7,
            reason: 8,
            packets: 2,
        };
        o.soft_at = 60;
        let Some(Event::Outcome(mut c)) = decode(bytes(&o)) else {
            panic!("no outcome");
        };
        assert_eq!(c.daddr.to_string(), "10.0.0.2");
        assert_eq!((c.dport, c.error, c.latency()), (80, 111, 100));
        let drop = c.fate.drop.unwrap();
        assert_eq!((drop.at, drop.reason, drop.packets), (7, 8, 2));
        assert_eq!(c.fate.copy, None);
        c.flags |= FLAG_SOFT;
        assert_eq!(c.latency(), 50, "to the error that the program read");
        for cut in 0..bytes(&o).len() {
            assert_eq!(decode(&bytes(&o)[..cut]), None, "{cut}");
        }
    }

    #[test]
    fn stacks_and_the_path_of_the_program() {
        let mut e = sample();
        e.head.kind = KIND_CONNECT;
        e.stack_kernel = 8;
        e.stack_user = 16;
        let mut exe = tcp_exe::default();
        exe.names[0][..4].copy_from_slice(b"curl");
        exe.names[1][..3].copy_from_slice(b"bin");
        let mut b = bytes(&e).to_vec();
        for a in [1u64, 2, 3] {
            b.extend(a.to_ne_bytes());
        }
        b.extend(bytes(&exe));
        let Some(Event::Connect(c)) = decode(&b) else {
            panic!("no connect");
        };
        let s = c.stacks.unwrap();
        assert_eq!((s.kernel, s.user), (vec![1], vec![2, 3]));
        assert_eq!(s.exe.path, b"/bin/curl");
        for name in &mut exe.names {
            name[0] = b'x';
        }
        assert!(path(&exe.names).is_empty(), "a path that may be longer");
    }

    #[test]
    fn an_answer_may_not_be_longer_than_its_event() {
        let mut e = dns_event {
            size: 3,
            ..dns_event::default()
        };
        e.head.kind = KIND_ANSWER;
        let mut b = bytes(&e).to_vec();
        b.extend(*b"abc");
        assert!(matches!(decode(&b), Some(Event::Answer(a)) if a.data == b"abc"));
        b.pop();
        assert_eq!(decode(&b), None);
    }

    proptest! {
        #[test]
        fn odd_bytes_never_panic(b in prop::collection::vec(any::<u8>(), 0..900)) {
            let _ = decode(&b);
            let _ = flow(&b);
        }

        #[test]
        fn odd_sections_never_panic(kind in 1u16..4, rest in prop::collection::vec(any::<u8>(), 0..900)) {
            let mut e = sample();
            e.head.kind = kind;
            e.stack_kernel = u16::from_ne_bytes([rest.first().copied().unwrap_or(0), 0]);
            let mut b = bytes(&e).to_vec();
            b.extend(rest);
            let _ = decode(&b);
        }
    }
}
