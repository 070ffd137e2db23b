//! The files of a recording: one, or one after the other.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::run::rotate::{RotateArgs, Rotating};
use crate::tools::skb::record::{MakeSink, Sink};

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

impl MakeSink for Files {
    fn make(&self) -> Result<Box<dyn Sink>> {
        let rules = RotateArgs {
            output_file_max_backups: self.keep,
            ..RotateArgs::never()
        };
        Ok(Box::new(Writer {
            file: Rotating::create(&self.path, &rules)?,
            name: self.path.display().to_string(),
            max_size: self.max_size,
            rotate_size: self.rotate_size.unwrap_or(u64::MAX),
            written: (0, 0),
        }))
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
