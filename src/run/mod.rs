//! A run from its start to its end: signals, pins, libbpf's log, the loop, loss, and where the lines go. It knows no tool.

pub mod build;
pub mod config;
pub mod heartbeat;
pub mod http;
pub mod log;
pub mod loss;
pub mod object;
pub mod otlp;
pub mod output;
pub mod pins;
pub mod programs;
pub mod progress;
pub mod rotate;
pub mod session;
pub mod signals;
pub mod stream;

/// Whether the run goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    Continue,
    /// a limit is reached
    Stop,
}
