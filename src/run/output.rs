//! Where a tool's lines go: stdout, a file or a collector, text or JSON lines; the limit and the ready file. It knows no tool.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use serde::Serialize;

use crate::text::json;

use super::Flow;
use super::otlp;
use super::stream::Stream;

/// Bytes gathered before a write; a tick writes what there is.
const BUFFER: usize = 64 * 1024;

/// Flags of every tool that prints events.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Output")]
pub struct OutputArgs {
    /// Print JSON, one object per line
    #[arg(long)]
    pub output_json: bool,

    /// Write to FILE instead of stdout
    #[arg(long, value_name = "FILE")]
    pub output_file: Option<PathBuf>,

    #[command(flatten)]
    pub rotate: super::rotate::RotateArgs,

    /// Send JSON's rows to an OpenTelemetry collector at http://HOST:PORT, and print none
    #[arg(long, value_name = "URL", value_parser = otlp::endpoint, conflicts_with_all = ["output_json", "output_file"])]
    pub otlp: Option<otlp::Endpoint>,

    /// End after N events (0: no limit)
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub output_limit_lines: u64,

    /// Create FILE once everything is attached
    #[arg(long, value_name = "FILE")]
    pub ready_file: Option<PathBuf>,
}

/// A buffered writer of whole lines that counts events against the limit.
pub struct Output {
    to: Box<dyn Write>,
    name: String,
    /// stdout is a pipe whose other end may go away while nothing is printed
    watch_stdout: bool,
    buffer: Vec<u8>,
    json: bool,
    limit: u64,
    events: u64,
    /// a write has failed, which was told: nothing more is tried
    failed: Option<io::ErrorKind>,
    /// lines that were not written for that reason
    unwritten: u64,
}

impl Output {
    pub fn open(args: &OutputArgs) -> Result<Self> {
        let (to, name): (Box<dyn Write>, String) = match (&args.output_file, &args.otlp) {
            (_, Some(endpoint)) => (
                Box::new(otlp::Sink::new(endpoint.clone(), &subcommand())?),
                endpoint.to_string(),
            ),
            (Some(path), None) => (
                Box::new(super::rotate::Rotating::create(path, &args.rotate)?),
                path.display().to_string(),
            ),
            (None, None) => {
                let stdout = Stream::stdout().context("failed to open stdout")?;
                (Box::new(stdout), "stdout".to_string())
            }
        };
        Ok(Self {
            to,
            name,
            watch_stdout: args.output_file.is_none()
                && args.otlp.is_none()
                && !io::stdout().is_terminal(),
            buffer: Vec::with_capacity(BUFFER + 4096),
            json: args.output_json || args.otlp.is_some(),
            limit: args.output_limit_lines,
            events: 0,
            failed: None,
            unwritten: 0,
        })
    }

    /// JSON lines were asked for.
    pub fn json(&self) -> bool {
        self.json
    }

    /// The line of an event: `write` appends it, without the newline. `Flow::Stop` with the last event of the limit, and, without
    /// writing anything, from then on.
    pub fn event(&mut self, write: impl FnOnce(&mut Vec<u8>)) -> Result<Flow> {
        if self.limit > 0 && self.events >= self.limit {
            return Ok(Flow::Stop);
        }
        self.events += 1;
        self.line(write)?;
        Ok(if self.limit > 0 && self.events >= self.limit {
            Flow::Stop
        } else {
            Flow::Continue
        })
    }

    /// An event as one JSON object.
    pub fn json_event(&mut self, value: &impl Serialize) -> Result<Flow> {
        self.json_made(|line| json::push(line, value))
    }

    /// An event as one JSON object, which `make` appends.
    pub fn json_made(
        &mut self,
        make: impl FnOnce(&mut Vec<u8>) -> Result<(), json::Error>,
    ) -> Result<Flow> {
        let mut made = Ok(());
        let flow = self.event(|b| made = make(b))?;
        made.context("failed to write JSON")?;
        Ok(flow)
    }

    /// A line that is no event (a header, a record of loss).
    pub fn line(&mut self, write: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        write(&mut self.buffer);
        self.buffer.push(b'\n');
        if self.buffer.len() >= BUFFER {
            self.flush()?;
        }
        Ok(())
    }

    /// A record that is no event, as one JSON object.
    pub fn json_line(&mut self, value: &impl Serialize) -> Result<()> {
        let mut made = Ok(());
        self.line(|b| made = json::push(b, value))?;
        made.context("failed to write JSON")
    }

    /// Writes what is gathered. Fails with a broken pipe where stdout's reader has gone, even when there is nothing to write. After a
    /// failure, which is told once, lines are only counted.
    pub fn flush(&mut self) -> Result<()> {
        if self.failed.is_some() {
            self.unwritten += lines(&self.buffer);
            self.buffer.clear();
            return Ok(());
        }
        let result = if self.buffer.is_empty() {
            match self.watch_stdout && reader_gone() {
                true => Err(io::Error::from(io::ErrorKind::BrokenPipe)),
                false => Ok(()),
            }
        } else {
            self.write()
        };
        self.buffer.clear();
        result.map_err(|e| {
            self.failed = Some(e.kind());
            anyhow::Error::new(e).context(format!("failed to write to {}", self.name))
        })
    }

    fn write(&mut self) -> io::Result<()> {
        let mut rest = &self.buffer[..];
        while !rest.is_empty() {
            match self.to.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => rest = &rest[n..],
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    self.unwritten += lines(rest);
                    return Err(e);
                }
            }
        }
        Ok(())
    }

    /// Says on stderr how many lines a failed write has cost. A reader that went away wanted no more.
    pub fn report_unwritten(&self) {
        if self.unwritten > 0 && self.failed != Some(io::ErrorKind::BrokenPipe) {
            let line = format!(
                "netprobe: {} lines were not written to {}\n",
                self.unwritten, self.name
            );
            let _ = io::stderr().write_all(line.as_bytes());
        }
    }
}

/// The tool of this run, as the command line names it.
fn subcommand() -> String {
    let mut words = std::env::args().skip(1);
    words.find(|w| !w.starts_with('-')).unwrap_or_default()
}

fn lines(bytes: &[u8]) -> u64 {
    memchr::memchr_iter(b'\n', bytes).count() as u64
}

/// The reading end of the pipe behind stdout is closed.
fn reader_gone() -> bool {
    let stdout = io::stdout();
    let mut fds = [PollFd::new(stdout.as_fd(), PollFlags::empty())];
    nix::poll::poll(&mut fds, PollTimeout::ZERO).is_ok()
        && fds[0]
            .revents()
            .is_some_and(|r| r.contains(PollFlags::POLLERR))
}

/// Creates the ready file, where one was asked for.
pub fn ready(path: Option<&Path>) -> Result<()> {
    match path {
        Some(path) => File::create(path)
            .map(|_| ())
            .with_context(|| format!("failed to create the ready file {}", path.display())),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_counts_events_and_not_headers() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let args = OutputArgs {
            output_file: Some(file.path().to_path_buf()),
            output_limit_lines: 2,
            ..OutputArgs::default()
        };
        let mut out = Output::open(&args).unwrap();
        out.line(|b| b.extend_from_slice(b"HEAD")).unwrap();
        assert_eq!(out.event(|b| b.push(b'1')).unwrap(), Flow::Continue);
        assert_eq!(out.event(|b| b.push(b'2')).unwrap(), Flow::Stop);
        assert_eq!(out.event(|b| b.push(b'3')).unwrap(), Flow::Stop);
        out.flush().unwrap();
        assert_eq!(
            std::fs::read_to_string(file.path()).unwrap(),
            "HEAD\n1\n2\n"
        );
    }

    #[test]
    fn a_full_disk_is_an_error() {
        let args = OutputArgs {
            output_file: Some("/dev/full".into()),
            ..OutputArgs::default()
        };
        let mut out = Output::open(&args).unwrap();
        out.event(|b| b.push(b'x')).unwrap();
        let e = out.flush().unwrap_err();
        assert!(format!("{e:#}").contains("/dev/full"), "{e:#}");
        // It is told once; what comes then is counted.
        out.event(|b| b.push(b'x')).unwrap();
        out.flush().unwrap();
        assert_eq!(out.unwritten, 2);
    }
}
