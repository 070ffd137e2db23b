//! The engine below every tool: pins, perf buffers, merge into time order, loss, signals, and the loop that joins them.
//!
//! It knows no tool: a tool gives it the fds of its maps and a [`session::Consumer`] that takes events as bytes.

pub mod drain;
pub mod log;
pub mod loss;
pub mod merge;
pub mod perf;
pub mod pins;
pub mod progress;
pub mod ringbuf;
pub mod session;
pub mod signals;

use std::fmt;

/// A wrong request of the user: printed without a cause chain, exit code 2.
#[derive(Debug)]
pub struct UsageError(pub String);

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UsageError {}

/// An [`anyhow::Error`] that ends the run with exit code 2.
pub fn usage(message: impl Into<String>) -> anyhow::Error {
    UsageError(message.into()).into()
}
