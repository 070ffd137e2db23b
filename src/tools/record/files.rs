//! The files of a recording: one, or one after the other, or one at each trigger.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use crossbeam_channel::Receiver;

use crate::filter::expr::Compiled;
use crate::run::rotate::{Names, RotateArgs, Rotating};
use crate::run::stream::Stream;
use crate::tools::skb::flight::{Flight, MakeFile, Options};
use crate::tools::skb::record::{MakeTarget, Sink, Target};
use crate::tools::skb::trigger::Triggers;

/// Which files, and how large they may become; in bytes.
pub struct Files {
    pub path: PathBuf,
    /// of all files together; 0: no limit
    pub max_size: u64,
    /// of one file
    pub rotate_size: Option<u64>,
    /// renamed files that are kept; 0: all
    pub keep: usize,
}

struct Writer {
    file: Rotating,
    name: String,
    max_size: u64,
    rotate_size: u64,
    /// of the file, of all files
    written: (u64, u64),
}

impl MakeTarget for Files {
    fn make(&self, _: Option<&Compiled>) -> Result<Target> {
        let rules = RotateArgs {
            output_file_max_backups: self.keep,
            ..RotateArgs::never()
        };
        Ok(Target::File(Box::new(Writer {
            file: Rotating::create(&self.path, &rules)?,
            name: self.path.display().to_string(),
            max_size: self.max_size,
            rotate_size: self.rotate_size.unwrap_or(u64::MAX),
            written: (0, 0),
        })))
    }
}

impl Sink for Writer {
    fn write(&mut self, blocks: &[u8]) -> Result<()> {
        let written = self.file.write_all(blocks);
        written.with_context(|| format!("failed to write to {}", self.name))?;
        self.written.0 += blocks.len() as u64;
        self.written.1 += blocks.len() as u64;
        Ok(())
    }

    fn is_full(&self) -> bool {
        self.written.0 >= self.rotate_size
    }

    fn begin_anew(&mut self) -> Result<()> {
        self.written.0 = 0;
        let renamed = self.file.rotate();
        renamed.with_context(|| format!("failed to begin a new {}", self.name))
    }

    fn is_over(&self) -> bool {
        self.max_size > 0 && self.written.1 >= self.max_size
    }
}

/// A flight recorder, and its files.
pub struct Flights {
    pub path: PathBuf,
    /// files that are kept; 0: all
    pub keep: usize,
    pub before: Duration,
    pub after: Duration,
    pub interval: Duration,
    pub memory: usize,
    pub triggers: Triggers,
    pub usr1: Option<Receiver<()>>,
}

struct OnTrigger {
    names: Names,
    keep: usize,
}

impl MakeTarget for Flights {
    fn make(&self, expression: Option<&Compiled>) -> Result<Target> {
        let options = Options {
            before: self.before,
            after: self.after,
            memory: self.memory,
            interval: self.interval,
            triggers: self.triggers.clone(),
            expression: expression.cloned(),
            usr1: self.usr1.clone(),
        };
        let files = OnTrigger {
            names: Names::of(&self.path),
            keep: self.keep,
        };
        let flight = Flight::new(options, Box::new(files));
        Ok(Target::Flight(Box::new(flight)))
    }
}

impl MakeFile for OnTrigger {
    fn make(&mut self) -> Result<(Box<dyn Write>, String)> {
        let path = self.names.free();
        let name = path.display().to_string();
        let file = Stream::create(&path).with_context(|| format!("failed to create {name}"))?;
        Ok((Box::new(file), name))
    }

    fn made(&mut self) -> Result<()> {
        let kept = self.names.keep(self.keep);
        kept.context("failed to remove the oldest file")
    }
}
