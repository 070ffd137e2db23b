//! The sending side: what became of each request that a process of this machine sent. Pure.

use std::collections::{HashMap, VecDeque};

use super::decode::{self, Event, Key, Times};
use super::stages::begin;

/// A part of a request's way and its reply's, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// sendmsg to the request handed to the driver
    Out,
    /// handed to the driver to the first that was seen of the reply
    Wire,
    /// from there to the socket's queue
    In,
    /// in the socket's queue until its process reads it
    Read,
    /// sendmsg to read
    Total,
}

impl Part {
    pub const ALL: [Self; 5] = [Self::Out, Self::Wire, Self::In, Self::Read, Self::Total];

    pub fn name(self) -> &'static str {
        match self {
            Self::Out => "out",
            Self::Wire => "wire",
            Self::In => "in",
            Self::Read => "read",
            Self::Total => "total",
        }
    }
}

/// This kernel freed a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drop {
    /// the reply, else the request
    pub reply: bool,
    /// 0 where the kernel does not say
    pub reason: u32,
    /// address in the kernel
    pub location: u64,
}

/// A request and what was seen of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// SEND, or XMIT where the sender made the IP header too
    pub event: Event,
    pub late: bool,
    pub start: u64,
    pub xmit: Option<u64>,
    /// the reply's way in
    pub reply: Option<Times>,
    pub delivered: Option<u64>,
    pub read: Option<u64>,
    pub drop: Option<Drop>,
    /// no reply was read in time
    pub lost: bool,
}

/// How a request was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lost {
    /// this kernel dropped the request
    RequestDropped(Drop),
    /// this kernel dropped the reply
    ReplyDropped(Drop),
    /// it was not handed to a driver, and not dropped: it waits for a neighbour or in a queue
    NotSent,
    /// it left; no reply came
    NoReply,
    /// the reply came, and reached no socket
    NotDelivered,
    /// the reply is in a socket's queue
    NotRead,
}

impl Request {
    /// ns of a part; `None` where an end of it was not seen.
    pub fn part(&self, part: Part) -> Option<u64> {
        let back = self
            .reply
            .as_ref()
            .and_then(begin)
            // A softirq that was raised before, for another packet, is not the reply's begin.
            .max(self.xmit.filter(|_| self.reply.is_some()));
        let (from, to) = match part {
            Part::Out => (Some(self.start), self.xmit),
            Part::Wire => (self.xmit, back),
            Part::In => (back, self.delivered),
            Part::Read => (self.delivered, self.read),
            Part::Total => (Some(self.start), self.read),
        };
        Some(to?.saturating_sub(from?))
    }

    /// Place in the order, name and ns of those that were seen.
    pub fn parts(&self) -> impl Iterator<Item = (u8, &'static str, u64)> {
        Part::ALL
            .iter()
            .filter_map(|&p| self.part(p).map(|ns| (p as u8, p.name(), ns)))
    }

    /// How it was lost, where it was.
    pub fn how_lost(&self) -> Option<Lost> {
        if !self.lost {
            return None;
        }
        Some(match (self.drop, &self.reply) {
            _ if self.delivered.is_some() => Lost::NotRead,
            (Some(d), _) if d.reply => Lost::ReplyDropped(d),
            (Some(d), None) => Lost::RequestDropped(d),
            (None, None) if self.xmit.is_none() => Lost::NotSent,
            (None, None) => Lost::NoReply,
            (_, Some(_)) => Lost::NotDelivered,
        })
    }
}

/// Requests on their way.
#[derive(Debug)]
pub struct Requests {
    timeout_ns: u64,
    pending: HashMap<Key, Request>,
    /// by start; what is not pending any more is skipped
    order: VecDeque<(u64, Key)>,
    /// replies that were read after their request had been told as lost
    pub late_replies: u64,
}

impl Requests {
    pub fn new(timeout_ns: u64) -> Self {
        Self {
            timeout_ns,
            pending: HashMap::new(),
            order: VecDeque::new(),
            late_replies: 0,
        }
    }

    /// Takes an event; gives the requests that it completes: one whose reply was read, one that a new one with the same key replaces.
    pub fn event(&mut self, event: Event, late: bool) -> Option<Request> {
        let ts = event.head.ts;
        match event.head.kind {
            decode::KIND_SEND => return self.begin(event, late, None),
            decode::KIND_XMIT => match self.pending.get_mut(&event.key) {
                Some(r) => {
                    r.xmit.get_or_insert(ts);
                }
                None if event.start.is_some() => return self.begin(event, late, Some(ts)),
                None => {}
            },
            kind => {
                let Some(r) = self.pending.get_mut(&event.key) else {
                    self.late_replies += u64::from(kind == decode::KIND_READ);
                    return None;
                };
                match kind {
                    decode::KIND_RETURN => {
                        r.reply.get_or_insert(event.times);
                    }
                    decode::KIND_DELIVER => {
                        r.delivered.get_or_insert(ts);
                    }
                    decode::KIND_DROP => r.dropped(&event),
                    decode::KIND_READ => {
                        r.read = Some(ts);
                        return self.pending.remove(&event.key);
                    }
                    _ => {}
                }
            }
        }
        None
    }

    fn begin(&mut self, event: Event, late: bool, xmit: Option<u64>) -> Option<Request> {
        let start = event.start.unwrap_or(event.head.ts);
        self.order.push_back((start, event.key));
        let request = Request {
            start,
            xmit,
            late,
            reply: None,
            delivered: None,
            read: None,
            drop: None,
            lost: false,
            event,
        };
        // A sequence that has gone around.
        self.pending
            .insert(request.event.key, request)
            .map(|old| Request { lost: true, ..old })
    }

    /// The next request that has waited too long at the time `now`.
    pub fn expired(&mut self, now: u64) -> Option<Request> {
        while let Some(&(start, key)) = self.order.front() {
            let current = self.pending.get(&key).is_some_and(|r| r.start == start);
            if current && start.saturating_add(self.timeout_ns) > now {
                return None;
            }
            self.order.pop_front();
            if current {
                return self
                    .pending
                    .remove(&key)
                    .map(|r| Request { lost: true, ..r });
            }
        }
        None
    }

    /// At the end: those that this kernel dropped are lost; how many others are still without a reply.
    pub fn finish(&mut self) -> (Vec<Request>, u64) {
        let mut lost: Vec<Request> = Vec::new();
        let mut open = 0;
        for (_, r) in self.pending.drain() {
            if r.drop.is_some() && r.delivered.is_none() {
                lost.push(Request { lost: true, ..r });
            } else {
                open += 1;
            }
        }
        lost.sort_by_key(|r| r.start);
        (lost, open)
    }
}

impl Request {
    /// The first drop counts; of a reply the last, since the kernel also frees what it has given to a raw socket as a copy.
    fn dropped(&mut self, event: &Event) {
        if event.reply || self.drop.is_none() {
            self.drop = Some(Drop {
                reply: event.reply,
                reason: event.reason,
                location: event.location,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::decode::test::of_kind;
    use super::super::decode::{
        KIND_DELIVER, KIND_DROP, KIND_READ, KIND_RETURN, KIND_SEND, KIND_XMIT,
    };
    use super::*;

    fn send(r: &mut Requests, ts: u64, seq: u16) {
        let mut e = of_kind(KIND_SEND, ts, seq);
        e.start = Some(ts - 10);
        assert_eq!(r.event(e, false), None);
    }

    #[test]
    fn the_parts_of_a_ping() {
        let mut r = Requests::new(1000);
        send(&mut r, 110, 1);
        r.event(of_kind(KIND_XMIT, 130, 1), false);
        // Seen again at a lower device.
        r.event(of_kind(KIND_XMIT, 140, 1), false);
        let mut back = of_kind(KIND_RETURN, 500, 1);
        back.times.queued = Some(480);
        back.times.backlog = true;
        r.event(back, false);
        r.event(of_kind(KIND_DELIVER, 520, 1), false);
        let done = r.event(of_kind(KIND_READ, 600, 1), false).unwrap();
        let parts: Vec<u64> = done.parts().map(|(_, _, ns)| ns).collect();
        assert_eq!(parts, [30, 350, 40, 80, 500]);
        assert_eq!(done.how_lost(), None);
        assert!(r.expired(u64::MAX).is_none());
    }

    #[test]
    fn how_a_request_is_lost() {
        let mut r = Requests::new(1000);
        let dropped = |seq, reply| {
            let mut e = of_kind(KIND_DROP, 150, seq);
            e.reply = reply;
            e.reason = 9;
            e
        };
        for seq in 1..=6 {
            send(&mut r, 110, seq);
        }
        r.event(dropped(1, false), false);
        for seq in [3, 4, 5, 6] {
            r.event(of_kind(KIND_XMIT, 130, seq), false);
        }
        for seq in [4, 5, 6] {
            r.event(of_kind(KIND_RETURN, 140, seq), false);
        }
        r.event(dropped(5, true), false);
        r.event(of_kind(KIND_DELIVER, 160, 6), false);
        r.event(dropped(6, true), false);
        assert!(r.expired(1099).is_none());
        let how: Vec<Lost> = std::iter::from_fn(|| r.expired(1100))
            .filter_map(|q| q.how_lost())
            .collect();
        let d = |reply| Drop {
            reply,
            reason: 9,
            location: 0,
        };
        assert_eq!(
            how,
            [
                Lost::RequestDropped(d(false)),
                Lost::NotSent,
                Lost::NoReply,
                Lost::NotDelivered,
                Lost::ReplyDropped(d(true)),
                Lost::NotRead
            ]
        );
        r.event(of_kind(KIND_READ, 2000, 3), false);
        assert_eq!(r.late_replies, 1);
    }

    #[test]
    fn the_end_tells_the_lost_from_the_open() {
        let mut r = Requests::new(1000);
        send(&mut r, 110, 1);
        send(&mut r, 120, 2);
        r.event(of_kind(KIND_DROP, 150, 2), false);
        let (lost, open) = r.finish();
        assert_eq!((lost.len(), open), (1, 1));
        assert_eq!(lost[0].event.key.seq, 2);
    }

    #[test]
    fn a_key_used_again_ends_the_first() {
        let mut r = Requests::new(1000);
        send(&mut r, 110, 1);
        let mut e = of_kind(KIND_SEND, 210, 1);
        e.start = Some(200);
        let old = r.event(e, false).unwrap();
        assert!(old.lost && old.start == 100);
        assert_eq!(r.expired(5000).unwrap().start, 200);
        assert!(r.expired(5000).is_none());
    }
}
