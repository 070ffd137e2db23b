//! From time stamps to the stages of an echo. Pure.

use super::decode::Times;

/// A part of a request's way, in the order of the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// start of the hard interrupt to the raise
    Irq,
    /// queued by one CPU to the raise on another
    Rps,
    /// raise to softirq entry
    Wait,
    /// softirq entry to netif_receive_skb
    Poll,
    /// netif_receive_skb to icmp_echo
    Stack,
    /// icmp_echo to the reply handed to the driver
    Reply,
    /// the first that was seen to the last
    Total,
}

impl Stage {
    pub const ALL: [Self; 7] = [
        Self::Irq,
        Self::Rps,
        Self::Wait,
        Self::Poll,
        Self::Stack,
        Self::Reply,
        Self::Total,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Irq => "irq",
            Self::Rps => "rps",
            Self::Wait => "wait",
            Self::Poll => "poll",
            Self::Stack => "stack",
            Self::Reply => "reply",
            Self::Total => "total",
        }
    }
}

/// ns of each stage; `None` where it was not seen or the packet did not have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stages([Option<u64>; 7]);

impl Stages {
    pub fn get(&self, stage: Stage) -> Option<u64> {
        self.0[stage as usize]
    }

    /// Place in the order, name and ns of those that were seen.
    pub fn parts(&self) -> impl Iterator<Item = (u8, &'static str, u64)> {
        Stage::ALL
            .iter()
            .filter_map(|&s| self.get(s).map(|ns| (s as u8, s.name(), ns)))
    }

    fn set(&mut self, stage: Stage, from: Option<u64>, to: Option<u64>) {
        if let (Some(from), Some(to)) = (from, to) {
            self.0[stage as usize] = Some(to.saturating_sub(from));
        }
    }

    /// The stages of a request handled at `echo`, its reply handed to a driver at `reply`.
    pub fn of(t: &Times, echo: u64, reply: Option<u64>) -> Self {
        let mut s = Self::default();
        let steered = is_steered(t);
        // Put on a CPU's backlog; then its time begins there. A driver that polls hands packets over after the softirq's entry: then it
        // begins with the interrupt.
        let backlog = t.backlog || steered;
        let after_queued = |ts: Option<u64>| {
            if backlog {
                ts.max(t.queued.filter(|_| ts.is_some()))
            } else {
                ts
            }
        };
        let raised_by = if steered { &t.first } else { &t.last };
        if !t.backlog {
            s.set(Stage::Irq, raised_by.irq, raised_by.raise);
        }
        if steered {
            s.set(Stage::Rps, t.queued, t.last.raise);
        }
        s.set(Stage::Wait, after_queued(t.last.raise), t.last.entry);
        s.set(
            Stage::Poll,
            after_queued(t.last.entry).or(t.queued),
            t.receive,
        );
        s.set(Stage::Stack, t.receive, Some(echo));
        s.set(Stage::Reply, Some(echo), reply);
        s.set(Stage::Total, begin(t), Some(reply.unwrap_or(echo)));
        s
    }
}

/// Another CPU than the one that took the packet in handled it (RPS).
pub fn is_steered(t: &Times) -> bool {
    t.queued.is_some() && t.receive.is_some() && t.queued_cpu != t.receive_cpu
}

/// The first that is known of the packet.
pub fn begin(t: &Times) -> Option<u64> {
    if t.backlog {
        return t.queued;
    }
    let s = if is_steered(t) { &t.first } else { &t.last };
    s.irq.or(s.raise).or(t.queued).or(t.receive)
}

#[cfg(test)]
mod tests {
    use super::super::decode::Softirq;
    use super::*;

    fn softirq(irq: u64, raise: u64, entry: u64) -> Softirq {
        Softirq {
            irq: (irq > 0).then_some(irq),
            raise: (raise > 0).then_some(raise),
            entry: (entry > 0).then_some(entry),
        }
    }

    fn values(s: &Stages) -> Vec<Option<u64>> {
        Stage::ALL.iter().map(|&stage| s.get(stage)).collect()
    }

    #[test]
    fn a_network_card_that_polls() {
        let t = Times {
            queued: Some(140),
            receive: Some(150),
            first: softirq(100, 110, 130),
            last: softirq(100, 110, 130),
            ..Times::default()
        };
        let s = Stages::of(&t, 160, Some(170));
        assert_eq!(
            values(&s),
            [
                Some(10),
                None,
                Some(20),
                Some(20),
                Some(10),
                Some(10),
                Some(70)
            ]
        );
    }

    #[test]
    fn a_backlog_begins_when_the_packet_is_queued() {
        let mut t = Times {
            queued: Some(100),
            receive: Some(150),
            last: softirq(0, 105, 130),
            backlog: true,
            ..Times::default()
        };
        let s = Stages::of(&t, 160, None);
        assert_eq!(
            values(&s),
            [None, None, Some(25), Some(20), Some(10), None, Some(60)]
        );
        // The softirq was raised, for another packet, before this one came.
        t.last = softirq(0, 50, 130);
        assert_eq!(Stages::of(&t, 160, None).get(Stage::Wait), Some(30));
        // It ran already.
        t.last = softirq(0, 50, 60);
        let s = Stages::of(&t, 160, None);
        assert_eq!(s.get(Stage::Wait), Some(0));
        assert_eq!(s.get(Stage::Poll), Some(50));
    }

    #[test]
    fn steered_to_another_cpu() {
        let t = Times {
            queued: Some(140),
            queued_cpu: 0,
            receive: Some(300),
            receive_cpu: 1,
            first: softirq(100, 110, 130),
            last: softirq(0, 160, 280),
            ..Times::default()
        };
        let s = Stages::of(&t, 310, Some(330));
        assert_eq!(
            values(&s),
            [
                Some(10),
                Some(20),
                Some(120),
                Some(20),
                Some(10),
                Some(20),
                Some(230)
            ]
        );
    }

    #[test]
    fn nothing_seen_is_nothing_told() {
        let s = Stages::of(&Times::default(), 100, None);
        assert_eq!(values(&s), [None; 7]);
    }
}
