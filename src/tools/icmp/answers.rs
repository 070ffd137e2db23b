//! Joins the handling of a request with its reply's way out, and sees gaps in the sequences. Pure.
//!
//! A request waits for its reply's event at most [`HOLD_NS`]; answers leave in the order in which the requests were handled.

use std::collections::{HashMap, VecDeque};

use super::decode::{Event, Key};
use super::stages::Stages;

/// The longest that a line is held back for the reply. Neighbour resolution can take longer: such a reply is not told.
const HOLD_NS: u64 = 1_000_000_000;
/// Flows whose last sequence is remembered.
const FLOWS: usize = 4096;

/// A request that was handled.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    pub event: Event,
    /// came out of the buffers after a younger event
    pub late: bool,
    /// when the reply was handed to a driver
    pub reply: Option<u64>,
    /// requests missing just before it, by its sequence number
    pub gap: u16,
    pub stages: Stages,
}

/// Requests that wait for their reply.
#[derive(Debug)]
pub struct Answers {
    held: VecDeque<Answer>,
    /// place of the first of `held`
    base: u64,
    /// place of each, by the number of its request
    places: HashMap<u64, u64>,
    sequences: Sequences,
    /// replies are told at all
    with_replies: bool,
}

impl Answers {
    /// Without replies nothing is held back; `all` requests are seen, so that a gap in a sequence means something.
    pub fn new(with_replies: bool, all: bool) -> Self {
        Self {
            held: VecDeque::new(),
            base: 0,
            places: HashMap::new(),
            sequences: Sequences {
                on: all,
                ..Sequences::default()
            },
            with_replies,
        }
    }

    /// A request was handled.
    pub fn echo(&mut self, event: Event, late: bool) {
        let place = self.base + self.held.len() as u64;
        if self.with_replies {
            self.places.insert(event.request, place);
        }
        let gap = self.sequences.next(&event.key);
        self.held.push_back(Answer {
            event,
            late,
            reply: None,
            gap,
            stages: Stages::default(),
        });
    }

    /// A reply was handed to a driver.
    pub fn reply(&mut self, request: u64, ts: u64) {
        let Some(place) = self.places.remove(&request) else {
            return;
        };
        if let Some(answer) = self.held.get_mut((place - self.base) as usize) {
            answer.reply = Some(ts);
        }
    }

    /// The next one that need not wait any longer, at the time `now`.
    pub fn next(&mut self, now: u64) -> Option<Answer> {
        let first = self.held.front()?;
        let ready = !self.with_replies
            || first.reply.is_some()
            || first.event.head.ts.saturating_add(HOLD_NS) <= now;
        if !ready {
            return None;
        }
        let mut answer = self.held.pop_front()?;
        if answer.reply.is_none() {
            self.places.remove(&answer.event.request);
        }
        self.base += 1;
        answer.stages = Stages::of(&answer.event.times, answer.event.head.ts, answer.reply);
        Some(answer)
    }

    /// Requests that by the sequences have not come.
    pub fn missing(&self) -> u64 {
        self.sequences.missing
    }
}

/// The last sequence number of each flow.
#[derive(Debug, Default)]
struct Sequences {
    on: bool,
    last: HashMap<Key, u16>,
    missing: u64,
}

impl Sequences {
    /// How many are missing before this one. One that comes after a higher one makes good for a missing one.
    fn next(&mut self, key: &Key) -> u16 {
        if !self.on {
            return 0;
        }
        if self.last.len() >= FLOWS {
            // Rare, and a forgotten flow only begins anew.
            self.last.clear();
        }
        let flow = Key { seq: 0, ..*key };
        let Some(last) = self.last.get_mut(&flow) else {
            self.last.insert(flow, key.seq);
            return 0;
        };
        let ahead = key.seq.wrapping_sub(*last);
        match ahead {
            // A ping program that begins anew with the same id, or sends always the same number.
            0 => 0,
            1..=0x7fff => {
                *last = key.seq;
                self.missing += u64::from(ahead - 1);
                ahead - 1
            }
            _ if ahead.wrapping_neg() <= 64 => {
                self.missing = self.missing.saturating_sub(1);
                0
            }
            _ => {
                *last = key.seq;
                0
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::decode::test::event;
    use super::*;

    #[test]
    fn lines_leave_in_order_each_with_its_reply() {
        let mut a = Answers::new(true, true);
        a.echo(event(100, 1), false);
        a.echo(event(110, 2), false);
        assert!(a.next(200).is_none());
        a.reply(2, 150);
        assert!(a.next(200).is_none(), "the first one still waits");
        a.reply(1, 160);
        assert_eq!(a.next(200).unwrap().reply, Some(160));
        assert_eq!(a.next(200).unwrap().reply, Some(150));
        assert!(a.next(200).is_none());
    }

    #[test]
    fn a_reply_that_does_not_come_is_waited_for_and_then_blank() {
        let mut a = Answers::new(true, true);
        a.echo(event(100, 1), false);
        assert!(a.next(100 + HOLD_NS - 1).is_none());
        assert_eq!(a.next(100 + HOLD_NS).unwrap().reply, None);
        a.reply(1, 160);
        assert!(a.places.is_empty());
        a.echo(event(300, 1), false);
        a.reply(1, 360);
        assert_eq!(a.next(400).unwrap().reply, Some(360));
    }

    #[test]
    fn without_replies_nothing_is_held_back() {
        let mut a = Answers::new(false, true);
        a.echo(event(100, 1), false);
        assert!(a.next(0).is_some());
    }

    #[test]
    fn gaps_are_told_and_made_good() {
        let mut a = Answers::new(false, true);
        let mut gap = |seq| {
            a.echo(event(1, seq), false);
            a.next(0).map(|answer| answer.gap)
        };
        assert_eq!(gap(0xfffe), Some(0));
        assert_eq!(gap(1), Some(2));
        assert_eq!(gap(0xffff), Some(0), "late, and no new gap");
        assert_eq!(gap(2), Some(0));
        assert_eq!(a.missing(), 1);
    }
}
