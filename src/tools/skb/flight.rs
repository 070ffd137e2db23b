//! The flight recorder (`netprobe record --flight`): the last seconds of a recording in memory, compressed; a trigger writes them into a
//! file, and what follows for a while.

use std::collections::VecDeque;
use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use crossbeam_channel::Receiver;
use serde::{Deserialize, Serialize};

use crate::capture::pcapng::{BLOCK_IDB, BLOCK_SHB};
use crate::filter::expr::Compiled;
use crate::kernel::drop_reason::DropReasons;
use crate::recording::block::{Packed, Packer};
use crate::run::loss::Loss;
use crate::text::escape::printable;

use super::trigger::{Decider, Triggers, read_trigger};

/// The run's losses are noted so often, ns.
const SAMPLE: u64 = 1_000_000_000;

/// What was asked for.
pub struct Options {
    /// kept before a trigger
    pub before: Duration,
    /// recorded after it
    pub after: Duration,
    /// bytes that are kept, at most
    pub memory: usize,
    /// between the beginnings of two files, at least
    pub interval: Duration,
    pub triggers: Triggers,
    pub expression: Option<Compiled>,
    /// messages of SIGUSR1, where that triggers
    pub usr1: Option<Receiver<()>>,
}

/// Makes the files.
pub trait MakeFile {
    /// A new file, and its name.
    fn make(&mut self) -> Result<(Box<dyn Write>, String)>;
    /// The file is complete: older ones may go.
    fn made(&mut self) -> Result<()>;
}

/// In the head of a file: why it is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Triggered {
    /// in words
    pub by: String,
    /// CLOCK_MONOTONIC, ns
    pub at: u64,
    /// how much before it the file has, ns
    pub before: u64,
    /// The memory (--flight-memory) was too small for all that was asked for.
    pub short: bool,
}

impl Triggered {
    /// What a report says of it.
    pub fn words(&self) -> String {
        let short = match self.short {
            true => " (all that its memory held)",
            false => "",
        };
        format!(
            "flight recorder: {}; the file begins {:.1} s before{short}, what came earlier was overwritten",
            printable(&self.by),
            self.before as f64 / 1e9
        )
    }
}

/// A chunk, and the packets of its events for other programs.
struct Part {
    events: Packed,
    /// pcapng blocks: their length, and compressed
    packets: (usize, Vec<u8>),
}

impl Part {
    fn size(&self) -> usize {
        self.events.bytes.len() + self.packets.1.len() + size_of::<Self>()
    }
}

/// A file that is being written.
struct Open {
    to: Box<dyn Write>,
    name: String,
    triggered: Triggered,
    /// bytes of `intro` that are in it
    introduced: usize,
    events: u64,
    last: u64,
    /// what the run had lost before the file's first event
    loss: Loss,
}

pub struct Flight {
    options: Options,
    files: Box<dyn MakeFile>,
    decider: Decider,
    /// pcapng's section and interfaces
    intro: Vec<u8>,
    ring: VecDeque<Part>,
    bytes: usize,
    /// time stamp of the newest event that had to go for want of memory
    squeezed: u64,
    open: Option<Open>,
    /// when the last file began
    begun: Option<Instant>,
    made: u64,
    /// triggers that made no file
    passed_over: u64,
    /// what the run had lost, by time
    losses: VecDeque<(u64, Loss)>,
}

impl Flight {
    pub fn new(options: Options, files: Box<dyn MakeFile>) -> Self {
        let decider = Decider::new(&options.triggers, options.expression.clone());
        Self {
            options,
            files,
            decider,
            intro: Vec::new(),
            ring: VecDeque::new(),
            bytes: 0,
            squeezed: 0,
            open: None,
            begun: None,
            made: 0,
            passed_over: 0,
            losses: VecDeque::new(),
        }
    }

    /// What is armed, for stderr.
    pub fn summary(&self) -> String {
        let triggers: Vec<_> = (self.options.triggers.0.iter())
            .map(ToString::to_string)
            .collect();
        format!(
            "armed: {}; the last {} s are kept, in at most {} MB",
            triggers.join(", "),
            self.options.before.as_secs_f64(),
            self.options.memory / 1_000_000
        )
    }

    /// An event of a trigger's program: `None` if it is another event, else what it triggers.
    pub fn event(&mut self, bytes: &[u8], reasons: &mut DropReasons) -> Option<Option<String>> {
        let trigger = read_trigger(bytes)?;
        Some(self.decider.event(&trigger, reasons))
    }

    /// What a signal triggers, or time alone, and when. All events up to `reached` have come: a connect whose end is
    /// still in a buffer is not overdue.
    pub fn now_triggers(&mut self, now: u64, reached: u64) -> Option<(String, u64)> {
        let usr1 = self.options.usr1.as_ref();
        match usr1.is_some_and(|usr1| usr1.try_recv().is_ok()) {
            true => Some(("SIGUSR1".to_owned(), now)),
            false => self.decider.overdue(reached).map(|by| (by, reached)),
        }
    }

    /// A file may begin; if not, the trigger is counted.
    pub fn may_begin(&mut self) -> bool {
        let soon = |begun: Instant| begun.elapsed() < self.options.interval;
        let may = self.open.is_none() && !self.begun.is_some_and(soon);
        self.passed_over += u64::from(!may);
        may
    }

    /// The blocks of the section and of interfaces stand in front of each file: they are taken out of `packets`.
    pub fn introduce(&mut self, packets: &mut Vec<u8>) {
        let (mut at, mut rest) = (0, Vec::with_capacity(packets.len()));
        while let Some(len) = block_len(&packets[at..]) {
            let block = &packets[at..at + len];
            let kind = u32::from_le_bytes([block[0], block[1], block[2], block[3]]);
            match kind {
                BLOCK_SHB | BLOCK_IDB => self.intro.extend_from_slice(block),
                _ => rest.extend_from_slice(block),
            }
            at += len;
        }
        *packets = rest;
    }

    /// Keeps a chunk and its packets, and writes them, if a file is open.
    pub fn keep(&mut self, packer: &mut Packer, events: Packed, packets: &[u8]) -> Result<()> {
        let packed = packer.compress(packets).context("failed to compress")?;
        let part = Part {
            events,
            packets: (packets.len(), packed),
        };
        if self.open.is_some() {
            self.write(packer, packets, &part.events);
        }
        self.bytes += part.size();
        self.ring.push_back(part);
        while self.bytes > self.options.memory && self.ring.len() > 1 {
            self.squeezed = self.pop().max(self.squeezed);
        }
        Ok(())
    }

    fn pop(&mut self) -> u64 {
        let part = self.ring.pop_front();
        self.bytes -= part.as_ref().map_or(0, Part::size);
        part.map_or(0, |part| part.events.times.1)
    }

    /// Lets go of what is older than has to be kept.
    pub fn forget(&mut self, now: u64) {
        let oldest = self.oldest(now);
        while self.ring.front().is_some_and(|p| p.events.times.1 < oldest) {
            self.pop();
        }
        while self.losses.get(1).is_some_and(|(at, _)| *at <= oldest) {
            self.losses.pop_front();
        }
    }

    fn oldest(&self, now: u64) -> u64 {
        now.saturating_sub(self.options.before.as_nanos() as u64)
    }

    /// Begins a file: `head` makes the contents of its first blocks.
    pub fn begin(
        &mut self,
        packer: &mut Packer,
        (by, at): (String, u64),
        head: impl FnOnce(&mut Packer, &Triggered) -> Result<Vec<u8>>,
    ) -> Result<()> {
        self.forget(at);
        let first = self.ring.iter().map(|p| p.events.times.0).min();
        let triggered = Triggered {
            by,
            at,
            before: at.saturating_sub(first.unwrap_or(at)),
            short: self.squeezed > self.oldest(at),
        };
        self.begun = Some(Instant::now());
        let (to, name) = match self.files.make() {
            Ok(made) => made,
            Err(e) => {
                self.passed_over += 1;
                eprintln!(
                    "netprobe: {}: {e:#}; the recorder stays armed",
                    triggered.by
                );
                return Ok(());
            }
        };
        packer.restart();
        let head = head(packer, &triggered)?;
        eprintln!("netprobe: {}: writing {name}", triggered.by);
        let loss = self.losses.front().map(|(_, loss)| loss.clone());
        self.open = Some(Open {
            to,
            name,
            triggered,
            introduced: 0,
            events: 0,
            last: at,
            loss: loss.unwrap_or_default(),
        });
        // The section comes first.
        self.write_bytes(&[]);
        self.write_bytes(&head);
        let ring = std::mem::take(&mut self.ring);
        for part in &ring {
            let packets = unpacked(&part.packets)?;
            self.write(packer, &packets, &part.events);
        }
        self.ring = ring;
        Ok(())
    }

    fn write(&mut self, packer: &mut Packer, packets: &[u8], events: &Packed) {
        let mut blocks = packets.to_vec();
        packer.frame(&mut blocks, events);
        if let Some(open) = &mut self.open {
            open.events += u64::from(events.events);
            open.last = open.last.max(events.times.1);
        }
        self.write_bytes(&blocks);
    }

    /// Interfaces that are new, then `blocks`. A file that cannot be written is given up.
    fn write_bytes(&mut self, blocks: &[u8]) {
        let Some(open) = &mut self.open else {
            return;
        };
        let new = &self.intro[open.introduced..];
        let written = open
            .to
            .write_all(new)
            .and_then(|()| open.to.write_all(blocks));
        open.introduced = self.intro.len();
        if let Err(e) = written {
            eprintln!(
                "netprobe: failed to write {}: {e}; the recorder stays armed",
                open.name
            );
            self.open = None;
        }
    }

    /// The run's losses are to be told now.
    pub fn wants_loss(&self, now: u64, reached: u64) -> bool {
        let last = self.losses.back().map_or(0, |(at, _)| *at);
        now >= last + SAMPLE || self.is_complete(reached)
    }

    pub fn loss(&mut self, now: u64, loss: Loss) {
        self.losses.push_back((now, loss));
    }

    /// The file at hand has all that was asked for: all events up to `reached` have come.
    pub fn is_complete(&self, reached: u64) -> bool {
        let after = self.options.after.as_nanos() as u64;
        let open = self.open.as_ref();
        open.is_some_and(|open| reached >= open.triggered.at + after)
    }

    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// What the run lost while the events of the file at hand came.
    pub fn lost(&self) -> Loss {
        let now = self.losses.back().map(|(_, loss)| loss.clone());
        let before = self.open.as_ref().map(|open| &open.loss);
        now.unwrap_or_default()
            .since(before.unwrap_or(&Loss::default()))
    }

    /// `end`: the last block of the file at hand.
    pub fn finish(&mut self, end: &[u8]) -> Result<()> {
        self.write_bytes(end);
        let Some(open) = self.open.take() else {
            return Ok(());
        };
        drop(open.to);
        self.made += 1;
        let seconds = |ns: u64| ns as f64 / 1e9;
        let t = &open.triggered;
        let more = match std::mem::take(&mut self.passed_over) {
            0 => String::new(),
            n => format!("; {n} more triggers"),
        };
        let short = match t.short {
            true => "; older events were overwritten (--flight-memory)",
            false => "",
        };
        eprintln!(
            "netprobe: {}: {} events, {:.1} s before and {:.1} s after {}{more}{short}",
            open.name,
            open.events,
            seconds(t.before),
            seconds(open.last - t.at),
            t.by
        );
        self.files.made()
    }

    /// The end of the run: how it went.
    pub fn tell(&self) {
        if self.made == 0 {
            eprintln!("netprobe: nothing has triggered: there is no file");
        } else if self.passed_over > 0 {
            eprintln!(
                "netprobe: {} more triggers made no file (--min-interval)",
                self.passed_over
            );
        }
    }
}

fn unpacked((len, packed): &(usize, Vec<u8>)) -> Result<Vec<u8>> {
    zstd::bulk::decompress(packed, *len).context("failed to decompress")
}

/// The length of the pcapng block that `bytes` begin with.
fn block_len(bytes: &[u8]) -> Option<usize> {
    let len = u32::from_le_bytes(*bytes.get(4..)?.first_chunk()?) as usize;
    (len >= 12 && len <= bytes.len()).then_some(len)
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::bpf::skb::types::{skb_trigger, skb_trigger_what as What};
    use crate::recording::block::Kind;

    #[derive(Clone, Default)]
    struct Files(Arc<Mutex<Vec<Vec<u8>>>>);

    impl Write for Files {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut files = self.0.lock().unwrap();
            files.last_mut().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl MakeFile for Files {
        fn make(&mut self) -> Result<(Box<dyn Write>, String)> {
            self.0.lock().unwrap().push(Vec::new());
            Ok((Box::new(self.clone()), "file".to_owned()))
        }

        fn made(&mut self) -> Result<()> {
            Ok(())
        }
    }

    fn flight(memory: usize, files: &Files) -> Flight {
        let options = Options {
            before: Duration::from_secs(10),
            after: Duration::from_secs(2),
            memory,
            interval: Duration::from_secs(3600),
            triggers: Triggers(Vec::new()),
            expression: None,
            usr1: None,
        };
        Flight::new(options, Box::new(files.clone()))
    }

    /// A block of packets, or of an interface.
    fn block(kind: u32, word: u32) -> Vec<u8> {
        [kind, 16, word, 16]
            .iter()
            .flat_map(|w| w.to_le_bytes())
            .collect()
    }

    fn keep(flight: &mut Flight, packer: &mut Packer, second: u64, contents: &[u8]) {
        let at = second * 1_000_000_000;
        let events = packer.pack(Kind::Events, (1, (at, at)), contents).unwrap();
        flight
            .keep(packer, events, &block(6, second as u32))
            .unwrap();
    }

    fn begin(flight: &mut Flight, packer: &mut Packer, second: u64) {
        assert!(flight.may_begin());
        let at = ("rst".to_owned(), second * 1_000_000_000);
        flight
            .begin(packer, at, |_, _| Ok(b"head".to_vec()))
            .unwrap();
    }

    #[test]
    fn a_file_has_the_seconds_before_and_what_follows() {
        let files = Files::default();
        let (mut flight, mut packer) = (flight(1 << 20, &files), Packer::new().unwrap());
        let mut packets = [block(BLOCK_SHB, 0), block(BLOCK_IDB, 1), block(6, 7)].concat();
        flight.introduce(&mut packets);
        assert_eq!(packets, block(6, 7));
        for second in 1..=20 {
            keep(&mut flight, &mut packer, second, b"x");
        }
        begin(&mut flight, &mut packer, 20);
        let mut interface = block(BLOCK_IDB, 2);
        flight.introduce(&mut interface);
        keep(&mut flight, &mut packer, 21, b"x");
        assert!(!flight.is_complete(21_999_999_999) && flight.is_complete(22_000_000_000));
        flight.finish(b"end").unwrap();
        keep(&mut flight, &mut packer, 30, b"x");
        assert!(!flight.may_begin(), "too soon");
        let file = files.0.lock().unwrap()[0].clone();
        let head = [block(BLOCK_SHB, 0), block(BLOCK_IDB, 1), b"head".to_vec()].concat();
        assert!(file.starts_with(&head) && file.ends_with(b"end"));
        let has = |bytes: &[u8]| memchr::memmem::find(&file, bytes);
        for second in 1..=30 {
            let is_in = (10..=21).contains(&second);
            assert_eq!(has(&block(6, second)).is_some(), is_in, "{second}");
        }
        assert!(has(&block(BLOCK_IDB, 2)) < has(&block(6, 21)));
    }

    #[test]
    fn memory_is_bounded_and_what_it_lacks_is_told() {
        let files = Files::default();
        let (mut flight, mut packer) = (flight(4000, &files), Packer::new().unwrap());
        let mut seed = 1u64;
        for ms in 1..100 {
            let noise: Vec<u8> = (0..500)
                .map(|_| {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (seed >> 56) as u8
                })
                .collect();
            let events = packer.pack(Kind::Events, (1, (ms, ms)), &noise).unwrap();
            flight.keep(&mut packer, events, &[]).unwrap();
            assert!(flight.bytes <= 4000);
        }
        begin(&mut flight, &mut packer, 0);
        assert!(flight.open.as_ref().unwrap().triggered.short);
    }

    #[test]
    fn a_connect_is_overdue_by_the_time_of_the_events_that_have_come() {
        let mut flight = flight(1 << 20, &Files::default());
        let triggers = Triggers(vec!["connect-slower:200ms".parse().unwrap()]);
        flight.decider = Decider::new(&triggers, None);
        let mut begin = skb_trigger {
            what: What::SKB_TRIGGER_CONNECT_BEGIN.0,
            ..skb_trigger::default()
        };
        begin.tuple.l3_version = 4;
        flight.decider.event(&begin, &mut DropReasons::default());
        // The events of the last 800 ms are still in the buffers: the connect's end may be there.
        assert_eq!(flight.now_triggers(1_000_000_000, 200_000_000), None);
        let (by, at) = flight.now_triggers(1_000_000_000, 300_000_000).unwrap();
        assert!(by.ends_with("it has not ended after 300.0 ms"), "{by}");
        assert_eq!(at, 300_000_000);
    }
}
