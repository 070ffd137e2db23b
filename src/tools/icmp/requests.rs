//! The sending side: what became of each request that a process of this machine sent. Pure.

use std::collections::{HashMap, VecDeque};

use super::decode::{self, Event, Times};
use super::stages::begin;

/// The longest that a reply takes from the device to the socket: one that has come in is waited for beyond the limit.
const COMING_IN_NS: u64 = 100_000_000;

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
    /// of the request, while another copy of it went on
    pub copy: Option<Drop>,
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

    /// This kernel freed the request or its reply.
    pub fn is_dropped(&self) -> bool {
        matches!(
            self.how_lost(),
            Some(Lost::RequestDropped(_) | Lost::ReplyDropped(_))
        )
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
    /// by number
    pending: HashMap<u64, Request>,
    /// start and number; what is not pending any more is skipped
    order: VecDeque<(u64, u64)>,
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

    /// Takes an event; gives the request whose reply was read.
    pub fn event(&mut self, event: Event, late: bool) -> Option<Request> {
        let ts = event.head.ts;
        match event.head.kind {
            decode::KIND_SEND => self.begin(event, late, None),
            decode::KIND_XMIT => match self.pending.get_mut(&event.request) {
                Some(r) => {
                    r.xmit.get_or_insert(ts);
                }
                None if event.start.is_some() => self.begin(event, late, Some(ts)),
                None => {}
            },
            kind => {
                let Some(r) = self.pending.get_mut(&event.request) else {
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
                        return self.pending.remove(&event.request);
                    }
                    _ => {}
                }
            }
        }
        None
    }

    fn begin(&mut self, event: Event, late: bool, xmit: Option<u64>) {
        let start = event.start.unwrap_or(event.head.ts);
        self.order.push_back((start, event.request));
        let request = Request {
            start,
            xmit,
            late,
            reply: None,
            delivered: None,
            read: None,
            drop: None,
            copy: None,
            lost: false,
            event,
        };
        self.pending.insert(request.event.request, request);
    }

    /// The next request that has waited too long at the time `now`.
    pub fn expired(&mut self, now: u64) -> Option<Request> {
        while let Some(&(start, number)) = self.order.front() {
            if let Some(r) = self.pending.get(&number) {
                let mut until = start.saturating_add(self.timeout_ns);
                if r.is_coming_in(until) {
                    until = until.saturating_add(COMING_IN_NS);
                }
                if until > now {
                    return None;
                }
            }
            self.order.pop_front();
            if let Some(r) = self.pending.remove(&number) {
                return Some(Request { lost: true, ..r });
            }
        }
        None
    }

    /// At the end: those that this kernel dropped are lost; how many others are still without a reply.
    pub fn finish(&mut self) -> (Vec<Request>, u64) {
        let mut lost: Vec<Request> = Vec::new();
        let mut open = 0;
        for (_, r) in self.pending.drain() {
            let r = Request { lost: true, ..r };
            if r.is_dropped() {
                lost.push(r);
            } else {
                open += 1;
            }
        }
        lost.sort_by_key(|r| r.start);
        (lost, open)
    }
}

impl Request {
    /// Its reply has come in just before this time, and is on its way to the socket.
    fn is_coming_in(&self, until: u64) -> bool {
        let received = self.reply.as_ref().and_then(|t| t.receive);
        self.delivered.is_none()
            && self.drop.is_none()
            && received.is_some_and(|ts| ts.saturating_add(COMING_IN_NS) > until)
    }

    /// The first drop counts; of a reply the last, since the kernel also frees what it has given to a raw socket as a copy.
    fn dropped(&mut self, event: &Event) {
        let drop = Some(Drop {
            reply: event.reply,
            reason: event.reason,
            location: event.location,
        });
        if event.unqueued {
            // It was not put into the socket's queue after all.
            self.delivered = None;
            self.drop = drop;
        } else if event.copy {
            if !event.reply {
                self.copy = drop;
            }
        } else if event.reply || self.drop.is_none() {
            self.drop = drop;
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
        let how: Vec<Lost> = std::iter::from_fn(|| r.expired(1100 + COMING_IN_NS))
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
    fn a_reply_behind_the_time_limit() {
        let mut r = Requests::new(1000);
        send(&mut r, 110, 1);
        r.event(of_kind(KIND_XMIT, 130, 1), false);
        // The limit is looked at before an event: this one is too late.
        let lost = r.expired(1200).unwrap();
        assert_eq!(lost.how_lost(), Some(Lost::NoReply));
        r.event(of_kind(KIND_RETURN, 1200, 1), false);
        r.event(of_kind(KIND_DELIVER, 1210, 1), false);
        assert_eq!(r.event(of_kind(KIND_READ, 1220, 1), false), None);
        assert_eq!(r.late_replies, 1);
        // It came in just before, and its socket gets it just behind.
        send(&mut r, 2000, 2);
        let mut back = of_kind(KIND_RETURN, 2980, 2);
        back.times.receive = Some(2980);
        r.event(back, false);
        assert!(r.expired(3000).is_none());
        r.event(of_kind(KIND_DELIVER, 3010, 2), false);
        let lost = r.expired(3020).unwrap();
        assert_eq!(lost.how_lost(), Some(Lost::NotRead));
    }

    #[test]
    fn the_drop_of_a_copy_is_not_the_requests() {
        let mut r = Requests::new(1000);
        let dropped = |seq, copy| {
            let mut e = of_kind(KIND_DROP, 150, seq);
            e.copy = copy;
            e
        };
        for seq in [1, 2] {
            send(&mut r, 110, seq);
            r.event(of_kind(KIND_XMIT, 130, seq), false);
            r.event(dropped(seq, true), false);
        }
        r.event(dropped(2, false), false);
        let (first, second) = (r.expired(5000).unwrap(), r.expired(5000).unwrap());
        assert_eq!(first.how_lost(), Some(Lost::NoReply));
        assert!(first.copy.is_some() && !first.is_dropped());
        assert!(second.is_dropped());
    }

    #[test]
    fn a_socket_without_room_has_not_got_its_reply() {
        let mut r = Requests::new(1000);
        send(&mut r, 110, 1);
        r.event(of_kind(KIND_RETURN, 140, 1), false);
        r.event(of_kind(KIND_DELIVER, 150, 1), false);
        let mut e = of_kind(KIND_DROP, 151, 1);
        (e.reply, e.unqueued) = (true, true);
        r.event(e, false);
        assert!(matches!(
            r.expired(5000).unwrap().how_lost(),
            Some(Lost::ReplyDropped(_))
        ));
    }
}
