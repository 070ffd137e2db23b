//! Events as lines, and as packets of a capture file.

use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use rustc_hash::FxHashSet;

use crate::run::Flow;
use crate::run::loss::Loss;
use crate::run::output::Output;
use crate::run::stream::Stream;
use crate::text::escape::{printable, printable_lines};
use crate::tools::skb::capture::Capture;
use crate::tools::skb::event::Event;
use crate::tools::skb::record::{Head, identity};
use crate::tools::skb::recorded::Recorded;
use crate::tools::why::file::Answer;

/// What becomes of events.
pub trait Show {
    /// The events of a recording follow.
    fn begin(&mut self, of: &Recorded, head: &Head) -> Result<()>;
    fn event(&mut self, of: &mut Recorded, event: &Event, late: bool) -> Result<Flow>;
    /// Answers of why follow; `plain`: no filter and no order is asked for.
    fn begin_answers(&mut self, _plain: bool) -> Result<()> {
        bail!("a recording of why has no events, but answers: --format text or json shows them")
    }
    fn answer(&mut self, _: &Answer) -> Result<Flow> {
        Ok(Flow::Continue)
    }
    /// There are no more of this recording. `loss`: what it says that it lost.
    fn end(&mut self, loss: Option<&Loss>) -> Result<()>;
    fn flush(&mut self) -> Result<()>;
    /// There are no more recordings.
    fn finish(&mut self) -> Result<()> {
        self.flush()
    }
}

/// Text or JSON, byte for byte what the live run has printed.
pub struct Lines(pub Output);

impl Show for Lines {
    fn begin(&mut self, of: &Recorded, _: &Head) -> Result<()> {
        of.header(&mut self.0)
    }

    fn event(&mut self, of: &mut Recorded, event: &Event, late: bool) -> Result<Flow> {
        of.line(&mut self.0, event, late)
    }

    fn begin_answers(&mut self, plain: bool) -> Result<()> {
        match plain {
            true => Ok(()),
            false => {
                bail!("a recording of why has no events: it can be neither filtered nor sorted")
            }
        }
    }

    fn answer(&mut self, answer: &Answer) -> Result<Flow> {
        let text = match self.0.json() {
            true if answer.json.is_empty() => return Ok(Flow::Continue),
            true => printable(&answer.json),
            false => printable_lines(&answer.text),
        };
        match answer.event {
            true => self.0.event(|b| b.extend_from_slice(text.as_bytes())),
            false => {
                self.0.line(|b| b.extend_from_slice(text.as_bytes()))?;
                Ok(Flow::Continue)
            }
        }
    }

    fn end(&mut self, loss: Option<&Loss>) -> Result<()> {
        loss.map_or(Ok(()), |loss| loss.report(&mut self.0))
    }

    fn flush(&mut self) -> Result<()> {
        self.0.flush()
    }
}

/// The most packets that are told apart.
const PACKETS: usize = 1 << 20;

/// A capture file.
pub struct Packets {
    capture: Option<Capture<BufWriter<Stream>>>,
    limit: u64,
    events: u64,
    /// packets that are in the file, where each is to be there once
    seen: Option<FxHashSet<u64>>,
    lost: u64,
    without_bytes: u64,
}

impl Packets {
    pub fn new(file: Option<&Path>, limit: u64, once: bool) -> Result<Self> {
        // Longer than what any recording has of a packet.
        const WHOLE: u32 = 1536;
        let capture = match file {
            Some(path) => Capture::create(path, WHOLE)?,
            None => {
                let stdout = Stream::stdout().context("failed to open stdout")?;
                Capture::begin(BufWriter::new(stdout), "stdout".to_owned(), WHOLE)?
            }
        };
        Ok(Self {
            capture: Some(capture),
            limit,
            events: 0,
            seen: once.then(FxHashSet::default),
            lost: 0,
            without_bytes: 0,
        })
    }

    fn is_new(&mut self, event: &Event) -> bool {
        let (Some(seen), Some(packet)) = (&mut self.seen, identity(event)) else {
            return true;
        };
        if seen.len() >= PACKETS {
            seen.clear();
        }
        seen.insert(packet)
    }
}

impl Show for Packets {
    fn begin(&mut self, _: &Recorded, _: &Head) -> Result<()> {
        if let Some(seen) = &mut self.seen {
            seen.clear();
        }
        Ok(())
    }

    fn event(&mut self, of: &mut Recorded, event: &Event, _: bool) -> Result<Flow> {
        if self.limit > 0 && self.events >= self.limit {
            return Ok(Flow::Stop);
        }
        self.events += 1;
        if event.data.is_none() {
            self.without_bytes += 1;
        } else if self.is_new(event) {
            let comment = of.comment(event)?;
            if let Some(capture) = &mut self.capture {
                capture.packet(event, of.wall(event.head.ts), &comment)?;
            }
        }
        Ok(Flow::Continue)
    }

    fn end(&mut self, loss: Option<&Loss>) -> Result<()> {
        if let Some(loss) = loss {
            loss.tell();
            self.lost += loss.lost;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let capture = self.capture.as_mut();
        capture.map_or(Ok(()), |capture| {
            let flushed = capture.target().flush();
            flushed.context("failed to write the capture file")
        })
    }

    fn finish(&mut self) -> Result<()> {
        if self.without_bytes > 0 {
            eprintln!(
                "netprobe: {} events have no packet's bytes, and are not in the capture file",
                self.without_bytes
            );
        }
        let capture = self.capture.take();
        capture.map_or(Ok(()), |capture| capture.finish(self.lost))
    }
}
