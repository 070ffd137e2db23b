//! One end: the packets of a recording, with where each came in, went out, stayed and ended.

use rustc_hash::FxHashMap;

use anyhow::Result;

use crate::recording::chunk::Item;
use crate::run::Flow;
use crate::tools::report::filter::Filter;
use crate::tools::report::input::View;
use crate::tools::report::stats::is_loss;
use crate::tools::skb::event::Event;
use crate::tools::skb::record::{End, Head, identity};
use crate::tools::skb::recorded::Recorded;
use crate::tools::why::stages::{Role, Stages, Way};

use super::wire::Wire;

/// Packets of a recording, at most.
const PACKETS: usize = 2_000_000;
/// Stays of a packet at stages that are kept.
const STAYS: usize = 16;

/// Functions where a packet leaves the host, the last ones first: of those that were probed, the first here counts.
const OUT: [&str; 5] = [
    "dev_hard_start_xmit",
    "__dev_queue_xmit",
    "ip_finish_output2",
    "ip6_finish_output2",
    "ip_output",
];
/// Stages where it comes in.
const IN: [&str; 2] = ["receive", "IP"];

/// Where and when a packet passed the border of the host.
#[derive(Debug, Clone, Copy)]
pub struct Pass {
    pub at: u64,
    /// NUL-padded
    pub device: [u8; 16],
}

/// Why it ended.
#[derive(Debug, Clone)]
pub struct Dropped {
    pub reason: String,
    pub function: String,
}

#[derive(Debug)]
pub struct Packet {
    pub wire: Wire,
    /// The wire is of the border: nothing changes it any more.
    fixed: bool,
    pub first: u64,
    pub last: u64,
    pub came: Option<Pass>,
    pub left: Option<Pass>,
    passes: bool,
    pub dropped: Option<Dropped>,
    /// stages, and when they were reached
    pub stays: Vec<(&'static str, u64)>,
}

impl Packet {
    /// The longest stay at a stage between `from` and `until` (or its end): its name, and how long.
    pub fn longest_stay(&self, from: u64, until: Option<u64>) -> Option<(&'static str, u64)> {
        let until = until.unwrap_or(self.last);
        let ends = self.stays.iter().skip(1).map(|(_, at)| *at);
        let stays = self.stays.iter().zip(ends.chain([self.last]));
        stays
            .map(|((stage, at), end)| (*stage, end.min(until).saturating_sub(from.max(*at))))
            .max_by_key(|(_, took)| *took)
    }
}

/// What a function says of a packet's way.
#[derive(Debug, Clone, Copy, Default)]
struct Part {
    /// index into OUT
    out: Option<usize>,
    comes: bool,
    stage: Option<&'static str>,
}

/// One recording.
pub struct Side {
    pub name: String,
    pub recorded: String,
    filter: Filter,
    of: Option<Recorded>,
    parts: FxHashMap<u64, Part>,
    /// index into OUT: what counts here
    border: Option<usize>,
    index: FxHashMap<(u64, u64), usize>,
    pub packets: Vec<Packet>,
    /// packets that there was no room for
    pub cut: u64,
    pub first: u64,
    pub last: u64,
    /// events that the recording lost; `None`: it has no end
    pub lost: Option<u64>,
    /// its kernel counts the hits of probes that it skips
    pub counts_skipped: bool,
    event: Event,
}

impl Side {
    pub fn new(name: String, filter: Filter) -> Self {
        Self {
            name,
            recorded: String::new(),
            filter,
            of: None,
            parts: FxHashMap::default(),
            border: None,
            index: FxHashMap::default(),
            packets: Vec::new(),
            cut: 0,
            first: u64::MAX,
            last: 0,
            lost: None,
            counts_skipped: true,
            event: Event::default(),
        }
    }

    /// Lets go of what only reading needs.
    pub fn finish(&mut self) {
        self.index = FxHashMap::default();
        for packet in &mut self.packets {
            if packet.passes {
                packet.left = None;
            }
        }
        self.take_in_copies();
    }

    /// What is freed with a reason may have a copy that went on: a program's socket gets a clone of an echo reply, say. Such a packet was
    /// not dropped, and its way ends where that of the copy does. A copy for tcpdump is none.
    fn take_in_copies(&mut self) {
        let mut by_wire: FxHashMap<_, Vec<usize>> = FxHashMap::default();
        for (number, packet) in self.packets.iter().enumerate() {
            if packet.came.is_none() && packet.dropped.is_none() {
                by_wire.entry(packet.wire).or_default().push(number);
            }
        }
        for number in 0..self.packets.len() {
            let packet = &self.packets[number];
            if packet.dropped.is_none() || packet.came.is_none() {
                continue;
            }
            let copies = by_wire.get(&packet.wire).into_iter().flatten();
            let copy = copies.map(|i| &self.packets[*i]).find(|copy| {
                let reaches = |stage: &str| copy.stays.iter().any(|s| s.0 == stage);
                (packet.first..=packet.last).contains(&copy.first)
                    && (reaches("socket") || reaches("read"))
            });
            if let Some((last, stays)) = copy.map(|copy| (copy.last, copy.stays.clone())) {
                let packet = &mut self.packets[number];
                packet.dropped = None;
                packet.last = packet.last.max(last);
                packet.stays.extend(stays);
            }
        }
    }

    fn part(&mut self, event: &Event) -> Part {
        if event.dropped {
            return Part::default();
        }
        if let Some(part) = self.parts.get(&event.func) {
            return *part;
        }
        let name = match &mut self.of {
            Some(of) => of.function(event),
            None => return Part::default(),
        };
        let stage = match Stages::builtin().role(&name) {
            Some(Role::Stage(stage)) => Some(stage),
            _ => None,
        };
        let part = Part {
            out: OUT.iter().position(|f| *f == name),
            comes: stage.is_some_and(|s| s.way != Some(Way::Out) && IN.contains(&s.stage.as_str())),
            stage: stage.map(|s| s.stage.as_str()),
        };
        self.parts.insert(event.func, part);
        part
    }

    /// The packet of the event. At the border (`out`, `comes`) a known sk_buff with another packet in it is another packet: an address
    /// that was freed and taken again at once may look the same to the recorder.
    fn packet(&mut self, event: &Event, out: bool, comes: bool) -> Option<usize> {
        let id = identity(event);
        // One packet may be several sk_buffs: its segments.
        let key = id.map(|id| (id, event.packet.map_or(0, |_| event.skb)));
        let known = key.and_then(|key| self.index.get(&key)).copied();
        if let Some((number, packet)) = known.map(|number| (number, &self.packets[number])) {
            let again = out && packet.left.is_some() || comes && packet.came.is_some();
            let wire = event.data.as_ref().filter(|_| again).and_then(Wire::of);
            let same = |wire: Wire| (wire.kind, wire.len) == (packet.wire.kind, packet.wire.len);
            if wire.is_none_or(same) {
                return Some(number);
            }
        }
        let wire = event.data.as_ref().and_then(Wire::of)?;
        if self.packets.len() >= PACKETS {
            self.cut += 1;
            return None;
        }
        let number = self.packets.len();
        self.packets.push(Packet {
            wire,
            fixed: false,
            first: event.head.ts,
            last: event.head.ts,
            came: None,
            left: None,
            passes: false,
            dropped: None,
            stays: Vec::new(),
        });
        if let Some(key) = key {
            self.index.insert(key, number);
        }
        Some(number)
    }

    fn take(&mut self, event: &Event) {
        let ts = event.head.ts;
        if self.packets.is_empty() {
            self.border = self.of.as_ref().and_then(|of| of.first_probed(&OUT));
        }
        self.first = self.first.min(ts);
        self.last = self.last.max(ts);
        let part = self.part(event);
        let border = part.out.is_some() && part.out == self.border;
        let Some(number) = self.packet(event, border, part.comes) else {
            return;
        };
        let dropped = self.dropped(event);
        let packet = &mut self.packets[number];
        packet.last = packet.last.max(ts);
        if let (Some(stage), true) = (part.stage, packet.stays.len() < STAYS) {
            if packet.stays.last().map(|s| s.0) != Some(stage) {
                packet.stays.push((stage, ts));
            }
        }
        packet.dropped = packet.dropped.take().or(dropped);
        let Some(meta) = &event.meta else {
            return;
        };
        if meta.ifname.starts_with(b"lo\0") || !(border || part.comes) {
            return;
        }
        let pass = Pass {
            at: ts,
            device: meta.ifname,
        };
        let wire = event.data.as_ref().and_then(Wire::of);
        if border {
            packet.left = Some(pass);
            packet.passes = false;
        } else if packet.left.is_some() {
            // It came in again: what it left was a namespace of this host.
            packet.passes = true;
            return;
        } else if packet.came.is_none() {
            packet.came = Some(pass);
        } else {
            return;
        }
        if let (Some(wire), true) = (wire, border || !packet.fixed) {
            (packet.wire, packet.fixed) = (wire, true);
        }
    }

    fn dropped(&mut self, event: &Event) -> Option<Dropped> {
        let of = self.of.as_mut()?;
        let reason = match event.dropped || event.reason.is_some() {
            true => of.reason(event),
            false => return None,
        };
        is_loss(event, reason.as_deref()).then(|| Dropped {
            reason: reason.unwrap_or_default(),
            function: of.function(event),
        })
    }
}

/// Whether a kernel counts the hits of kprobes that it skips while another probe runs: bpf_link_info has `missed` from 6.7.
fn counts_skipped(release: &str) -> bool {
    let mut numbers = release.split(['.', '-']).map_while(|n| n.parse().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (6u32, 7u32)
}

impl View for Side {
    fn begin(&mut self, head: Head, _: bool) -> Result<()> {
        self.recorded = format!("netprobe {} on Linux {}", head.netprobe, head.kernel);
        self.counts_skipped = counts_skipped(&head.kernel);
        if head.since > 0 {
            self.first = self.first.min(head.since);
        }
        if self.of.is_none() {
            self.of = Some(Recorded::new(&head, head.style.clone())?);
        }
        Ok(())
    }

    fn item(&mut self, item: Item<'_>) -> Result<Flow> {
        let Some(of) = &mut self.of else {
            return Ok(Flow::Continue);
        };
        let bytes = match item {
            Item::Event { bytes, .. } => bytes,
            Item::News(bytes) => {
                of.learn(bytes);
                return Ok(Flow::Continue);
            }
        };
        let mut event = std::mem::take(&mut self.event);
        if of.decode(&mut event, bytes).is_some() && self.filter.matches(&event, of) {
            self.take(&event);
        }
        self.event = event;
        Ok(Flow::Continue)
    }

    fn end(&mut self, end: &End) -> Result<()> {
        let lost = end.loss.lost + end.loss.missed;
        self.last = self.last.max(end.until);
        self.lost = Some(self.lost.unwrap_or(0).max(lost));
        Ok(())
    }

    fn tick(&mut self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::counts_skipped;

    #[test]
    fn kernels_that_count_skipped_hits() {
        let counts = |release: &&str| counts_skipped(release);
        assert!(
            ["6.7.0", "6.12.57+deb13-amd64", "7.2-rc1"]
                .iter()
                .all(counts)
        );
        assert!(
            !["6.6.9", "5.10.0-46-cloud-amd64", "", "x"]
                .iter()
                .any(counts)
        );
    }
}
