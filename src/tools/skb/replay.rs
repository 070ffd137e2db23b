//! Recorded perf buffers through everything that happens to events in user space, for bench/replay.rs and the tests: merge, decoding,
//! presentation, output. No kernel is asked for anything.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use clap::Parser;

use crate::engine::batch::Batch;
use crate::engine::merge::Merge;
use crate::kernel::drop_reason::DropReasons;
use crate::run::loss::Loss;
use crate::run::output::Output;
use crate::run::session::Consumer;

use super::Lines;
use super::args::Args;
use super::members::Members;
use super::present::Presenter;
use super::record::{Head, Options, Recorder, Sink, Target};

#[derive(Debug, Parser)]
struct CommandLine {
    #[command(flatten)]
    args: Args,
}

/// A `netprobe skb` without its kernel side, or, with [`Replay::record`], a `netprobe record`.
pub struct Replay {
    presenter: Presenter,
    out: Output,
    snap_len: usize,
    recorder: Option<Recorder>,
    late: u64,
}

/// One file, or one after the other: the next is begun at a size, by `FILE.1` and so on.
struct Files {
    path: PathBuf,
    file: File,
    written: u64,
    most: u64,
    number: u32,
}

impl Sink for Files {
    fn write(&mut self, blocks: &[u8]) -> Result<()> {
        self.written += blocks.len() as u64;
        Ok(self.file.write_all(blocks)?)
    }

    fn is_full(&self) -> bool {
        self.written >= self.most
    }

    fn begin_anew(&mut self) -> Result<()> {
        self.number += 1;
        let name = format!("{}.{}", self.path.display(), self.number);
        self.file = File::create(name)?;
        self.written = 0;
        Ok(())
    }

    fn is_over(&self) -> bool {
        false
    }
}

impl Replay {
    /// `flags`: those of `netprobe skb`; `names`: lines `ADDRESS FUNCTION`.
    pub fn new(flags: &[&str], file: &Path, names: &str) -> Result<Self> {
        let file = file.to_string_lossy();
        let first = ["replay", "--output-file", &file];
        let args = CommandLine::try_parse_from(first.iter().chain(flags))?.args;
        let name = |line: &str| {
            let (addr, name) = line.split_once(' ')?;
            Some((u64::from_str_radix(addr, 16).ok()?, name.to_owned()))
        };
        let names = names.lines().filter_map(name).collect();
        Ok(Self {
            presenter: Presenter::new(&args, names, DropReasons::default(), Default::default())?,
            out: Output::open(&args.output)?,
            snap_len: args.snap_len() as usize,
            recorder: None,
            late: 0,
        })
    }

    /// Records, too: the lines go beside it, if `lines`; a new file begins at `most` bytes. Only flags without further sections: the
    /// events have what they have.
    pub fn record(mut self, flags: &[&str], path: &Path, lines: bool, most: u64) -> Result<Self> {
        let args = CommandLine::try_parse_from(["replay"].iter().chain(flags))?.args;
        let files = Files {
            path: path.to_path_buf(),
            file: File::create(path)?,
            written: 0,
            most,
            number: 0,
        };
        let none = Members::default();
        let head = Head::new(args.style(), [&none, &none]);
        let options = Options {
            snaplen: args.snaplen,
            lines,
            limit: 0,
        };
        if lines {
            self.presenter.header(&mut self.out)?;
        }
        let to = Target::File(Box::new(files));
        self.recorder = Some(Recorder::new(to, head, &mut self.presenter, &options)?);
        Ok(self)
    }

    /// The end of a recording.
    pub fn close(&mut self) -> Result<()> {
        let loss = Loss {
            late: self.late,
            ..Loss::default()
        };
        match &mut self.recorder {
            Some(recorder) => recorder.close(&mut self.presenter, &loss),
            None => Ok(()),
        }
    }

    /// Takes all events of a batch, which is given back.
    pub fn batch(&mut self, mut batch: Batch) -> Result<Batch> {
        let mut lines = Lines {
            presenter: &mut self.presenter,
            capture: None,
            out: &mut self.out,
            sweeper: None,
            snap_len: self.snap_len,
            programs: None,
            undecodable: 0,
            event: super::event::Event::default(),
        };
        let mut merge = Merge::new(1);
        batch.watermark = u64::MAX;
        merge.push(batch);
        let recorder = &mut self.recorder;
        merge.drain(|record| match recorder {
            Some(recorder) => recorder.event(record, &mut lines).map(|_| ()),
            None => lines.event(record).map(|_| ()),
        })?;
        lines.tick()?;
        let undecodable = lines.undecodable;
        self.late += merge.late;
        let batch = merge.spent().next();
        batch
            .filter(|b| undecodable + b.short == 0)
            .ok_or_else(|| anyhow!("{undecodable} events could not be decoded"))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read;

    use flate2::Compression;
    use flate2::read::GzDecoder;
    use flate2::write::GzEncoder;

    use super::*;
    use crate::engine::perf::note_records;

    fn data(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("bench/data")
            .join(name)
    }

    fn unzipped(name: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        let file = File::open(data(name)).unwrap();
        GzDecoder::new(file).read_to_end(&mut bytes).unwrap();
        bytes
    }

    /// The lines that the recorded buffer gives.
    fn lines(flags: &[&str]) -> String {
        let names = fs::read_to_string(data("skb-6.12.names")).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut batch = Batch {
            data: unzipped("skb-6.12.ring.gz"),
            ..Batch::default()
        };
        note_records(&mut batch, 0, 0);
        let mut replay = Replay::new(flags, file.path(), &names).unwrap();
        replay.batch(batch).unwrap();
        fs::read_to_string(file.path()).unwrap()
    }

    /// NETPROBE_WRITE_LINES=1 takes the lines as they are for the right ones: look at the difference.
    #[test]
    fn the_lines_of_a_recording_stay_as_they_are() {
        let wall = regex::Regex::new(r#""wall_ns":\d+"#).unwrap();
        for (name, flags) in [
            ("skb-6.12.text.gz", &["--timestamp=current"][..]),
            (
                "skb-6.12.json.gz",
                &["--output-json", "--output-relative-timestamp"][..],
            ),
        ] {
            let now = wall
                .replace_all(&lines(flags), r#""wall_ns":0"#)
                .into_owned();
            if std::env::var_os("NETPROBE_WRITE_LINES").is_some() {
                let mut gz = GzEncoder::new(File::create(data(name)).unwrap(), Compression::best());
                gz.write_all(now.as_bytes()).unwrap();
                gz.finish().unwrap();
            }
            let then = String::from_utf8(unzipped(name)).unwrap();
            for (then, now) in then.lines().zip(now.lines()) {
                assert_eq!(then, now);
            }
            assert_eq!(then.len(), now.len());
        }
    }
}
