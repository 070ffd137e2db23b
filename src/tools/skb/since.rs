//! Relative time: how long ago a packet, or the life of an sk_buff, was seen last.

use std::collections::HashMap;

use super::event::{Event, Point};

/// Packets or skbs whose last event is remembered.
const REMEMBERED: usize = 65_536;

/// By packet or by address of the skb: its life, and when it was seen.
#[derive(Debug, Default)]
pub struct LastSeen(HashMap<u64, (u64, u64)>);

impl LastSeen {
    /// ns since the last event of the same packet, where packets are tracked, else of the same life of an skb; 0 with its first. `xdp`: the
    /// event is of an XDP program.
    pub fn since(&mut self, event: &Event, xdp: bool) -> u64 {
        if event.dropped {
            // One event a packet.
            return 0;
        }
        self.forget();
        if event.packet.is_none() && xdp && event.program == Some(Point::Enter) {
            // The memory of an xdp_buff is used for one packet after the other.
            self.0.remove(&event.skb);
        }
        let key = match event.packet {
            Some(p) => p.number << 16 | u64::from(p.cpu),
            None => event.skb,
        };
        let last = self.0.get(&key).copied();
        // Returns of functions have no number: they are of the life that was seen last.
        let life = event.life.or(last.map(|(life, _)| life)).unwrap_or(0);
        self.0.insert(key, (life, event.head.ts));
        let since = last.filter(|(then, _)| *then == life);
        since.map_or(0, |(_, t)| event.head.ts.saturating_sub(t))
    }

    /// The oldest half goes, when there are too many.
    fn forget(&mut self) {
        if self.0.len() < REMEMBERED {
            return;
        }
        let mut times: Vec<u64> = self.0.values().map(|(_, t)| *t).collect();
        times.sort_unstable();
        let middle = times[times.len() / 2];
        self.0.retain(|_, (_, t)| *t > middle);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::head::Head;

    fn event(skb: u64, life: Option<u64>, ts: u64) -> Event {
        Event {
            head: Head {
                ts,
                ..Head::default()
            },
            skb,
            life,
            ..Event::default()
        }
    }

    #[test]
    fn a_new_life_has_no_past() {
        let mut seen = LastSeen::default();
        assert_eq!(seen.since(&event(1, Some(1), 10), false), 0);
        assert_eq!(seen.since(&event(1, Some(1), 15), false), 5);
        // A return, which has no number.
        assert_eq!(seen.since(&event(1, None, 17), false), 2);
        assert_eq!(seen.since(&event(1, Some(2), 1000), false), 0);
        assert_eq!(seen.since(&event(1, Some(2), 1001), false), 1);
    }
}
