//! --write: the packets that are followed as a pcapng file, each once, as it was when it was first seen, with what became of it as its
//! comment. The file is also a recording of the run's answers, for `netprobe report`.

use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::kernel::clock::WallClock;
use crate::os::monotonic_ns;
use crate::recording::block::{Kind, Packer};
use crate::recording::chunk::Chunk;
use crate::run::loss::Loss;
use crate::run::stream::Stream;
use crate::text::json;
use crate::tools::skb::capture::Capture;
use crate::tools::skb::members::Members;
use crate::tools::skb::record::{End, Head};
use crate::tools::skb::style::{Style, Timestamp};

use super::ends::Verdict;
use super::journey::Journey;
use super::names::Names;

/// What the head of such a recording says that it is of.
pub const TOOL: &str = "why";
/// A block is written so long after its first answer, ns.
const CLOSE: u64 = 1_000_000_000;

/// What was printed, in both forms, with the proofs that were asked for then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// It counts for a limit of lines: it is no summary.
    pub event: bool,
    pub text: String,
    /// Empty: JSON has none.
    pub json: String,
}

/// A file that is being written.
pub struct File {
    capture: Capture<BufWriter<Stream>>,
    clock: WallClock,
    packer: Packer,
    chunk: Chunk,
    /// of the chunk's first answer
    since: u64,
}

impl File {
    pub fn create(path: &Path, snaplen: u32) -> Result<Self> {
        let style = Style {
            shown: 0,
            snap_len: snaplen,
            timestamp: Timestamp::None,
            drops: false,
            all: false,
            tcp_flags: false,
            netns_names: false,
        };
        let none = Members::default();
        let head = Head {
            tool: TOOL.to_owned(),
            ..Head::new(style, [&none, &none])
        };
        let mut file = Self {
            capture: Capture::create(path, snaplen)?,
            clock: WallClock::new()?,
            packer: Packer::new().context("failed to start zstd")?,
            chunk: Chunk::default(),
            since: 0,
        };
        file.block(Kind::Head, &head)?;
        Ok(file)
    }

    /// A block with one object in it.
    fn block(&mut self, kind: Kind, contents: &impl Serialize) -> Result<()> {
        let mut text = Vec::new();
        json::push(&mut text, contents)?;
        self.push(kind, &text)
    }

    fn push(&mut self, kind: Kind, contents: &[u8]) -> Result<()> {
        let mut block = Vec::new();
        self.packer.push(&mut block, kind, (0, (0, 0)), contents)?;
        let written = self.capture.target().write_all(&block);
        written.context("failed to write the recording")
    }

    /// Keeps an answer.
    pub fn answer(&mut self, answer: &Answer) -> Result<()> {
        if self.chunk.is_empty() {
            self.since = monotonic_ns()?;
        }
        let mut text = Vec::new();
        json::push(&mut text, answer)?;
        self.chunk.news(&text);
        match self.chunk.is_full() {
            true => self.close_chunk(),
            false => Ok(()),
        }
    }

    fn close_chunk(&mut self) -> Result<()> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        let contents = std::mem::take(&mut self.chunk.contents);
        self.push(Kind::Events, &contents)
    }

    pub fn packet(
        &mut self,
        journey: &Journey,
        verdict: &Verdict,
        names: &mut Names,
    ) -> Result<()> {
        let Some(seen) = &journey.seen else {
            return Ok(());
        };
        let wall = self.clock.wall(journey.first);
        let comment = comment(journey, verdict, names);
        self.capture.packet(seen, wall, &comment)
    }

    pub fn flush(&mut self) -> Result<()> {
        self.clock.refresh()?;
        if monotonic_ns()? >= self.since + CLOSE {
            self.close_chunk()?;
        }
        self.capture.flush()
    }

    pub fn finish(mut self, loss: &Loss) -> Result<()> {
        self.close_chunk()?;
        self.capture.statistics(loss.lost)?;
        let end = End {
            goes_on: false,
            until: monotonic_ns()?,
            loss: loss.clone(),
        };
        self.block(Kind::End, &end)?;
        self.capture.flush()
    }
}

/// `LOST firewall rule (NETFILTER_DROP in nft_do_chain, nft inet t o handle 3), netns client, sent by curl[230]`
fn comment(journey: &Journey, verdict: &Verdict, names: &mut Names) -> String {
    let mut text = format!("{} {}", verdict.end.word(), verdict.what);
    let leg = journey.legs.get(&verdict.leg);
    if let Some(dropped) = leg.and_then(|l| l.dropped.as_deref()) {
        text += &format!(" ({})", dropped.decided());
    }
    let end = leg.map_or(0, |l| l.netns);
    text += &format!(", netns {}", names.netns(journey.netns));
    if end != 0 && end != journey.netns {
        text += &format!(", ends in netns {}", names.netns(end));
    }
    if let Some(sender) = &journey.sender {
        text += &format!(", sent by {sender}");
    }
    if let Some(receiver) = &journey.receiver {
        text += &format!(", to {receiver}");
    }
    text
}
