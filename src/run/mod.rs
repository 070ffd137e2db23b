//! A run from its start to its end: signals, pins, libbpf's log, the loop, loss, and where the lines go. It knows no tool.

pub mod log;
pub mod loss;
pub mod output;
pub mod pins;
pub mod progress;
pub mod rotate;
pub mod session;
pub mod signals;
