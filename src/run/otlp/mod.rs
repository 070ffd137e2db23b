//! `--otlp URL`: rows of JSON go to an OpenTelemetry collector in place of stdout (OTLP over HTTP, protobuf).
//!
//! Whoever prints hands rows over and never waits: a thread of its own makes records of them and sends them in batches.
//! What it has not sent yet is bounded in bytes; rows beyond that, and rows that the collector does not take, are counted
//! and told.

mod rows;
mod send;

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use crossbeam_channel::{Sender, bounded, unbounded};

use send::Shared;
pub use send::{Endpoint, endpoint};

/// Bytes of rows that wait to be sent.
const QUEUE: usize = 8 * 1024 * 1024;
/// How long the end of a run waits for what is not sent yet.
const PATIENCE: Duration = Duration::from_secs(5);

/// Takes whole lines, each a JSON object.
pub struct Sink {
    endpoint: Endpoint,
    shared: Arc<Shared>,
    queue: Option<Sender<Vec<u8>>>,
    /// Dropped: the run is over, and there is no time for a second try.
    patience: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Sink {
    /// `tool`: what the scope of the records is called.
    pub fn new(endpoint: Endpoint, tool: &str) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let (queue, chunks) = unbounded();
        let (patience, over) = bounded(0);
        let sender = send::Sender::new(endpoint.clone(), tool, shared.clone(), over)?;
        let thread = std::thread::Builder::new()
            .name("otlp".to_owned())
            .spawn(move || sender.run(&chunks))
            .context("failed to start a thread")?;
        Ok(Self {
            endpoint,
            shared,
            queue: Some(queue),
            patience: Some(patience),
            thread: Some(thread),
        })
    }
}

impl Write for Sink {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        let queued = &self.shared.queued;
        let fits = queued.load(Ordering::Relaxed) + lines.len() <= QUEUE;
        let queue = self.queue.as_ref().filter(|_| fits);
        // Counted first: the other thread takes it off again.
        queued.fetch_add(lines.len(), Ordering::Relaxed);
        if queue.is_none_or(|queue| queue.send(lines.to_vec()).is_err()) {
            queued.fetch_sub(lines.len(), Ordering::Relaxed);
            let rows = memchr::memchr_iter(b'\n', lines).count() as u64;
            self.shared.undelivered.fetch_add(rows, Ordering::Relaxed);
        }
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Waits for the last batch, a few seconds at most, and tells what was not delivered.
impl Drop for Sink {
    fn drop(&mut self) {
        drop(self.queue.take());
        if let Some(thread) = self.thread.take() {
            let end = std::time::Instant::now() + PATIENCE;
            while !thread.is_finished() && std::time::Instant::now() < end {
                std::thread::park_timeout(Duration::from_millis(5));
            }
            drop(self.patience.take());
            let _ = thread.join();
        }
        let lost = self.shared.undelivered.load(Ordering::Relaxed);
        if lost > 0 {
            let delivered = self.shared.delivered.load(Ordering::Relaxed);
            let _ = writeln!(
                io::stderr(),
                "netprobe: {lost} rows were not delivered to {}, {delivered} were",
                self.endpoint
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_prints_does_not_wait_and_memory_has_a_bound() {
        // Whoever listens there never answers.
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", silent.local_addr().unwrap());
        let mut sink = Sink::new(endpoint(&url).unwrap(), "test").unwrap();
        let line = [vec![b' '; 1000], vec![b'\n']].concat();
        let lines = line.repeat(1000);
        for _ in 0..30 {
            assert_eq!(sink.write(&lines).unwrap(), lines.len());
        }
        let lost = sink.shared.undelivered.load(Ordering::Relaxed);
        assert!((21_000..=22_000).contains(&lost), "{lost}");
        assert!(sink.shared.queued.load(Ordering::Relaxed) <= QUEUE);
        // Its end would wait for the collector.
        std::mem::forget(sink);
    }
}
