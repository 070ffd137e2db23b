//! Bytes out of the kernel's buffers, in order of time. Pure but for the buffers: it reads an event's time stamp and length, and
//! knows no tool.

pub mod batch;
pub mod drain;
pub mod heartbeat;
mod hotplug;
pub mod merge;
pub mod perf;
pub mod ringbuf;
