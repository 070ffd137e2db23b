//! Bytes of lines: numbers, escapes, columns, histograms, JSON. It knows nothing of netprobe.

pub mod columns;
pub mod escape;
pub mod format;
pub mod histogram;
pub mod json;
