//! Progress of long work (attaching, building an index) as one line on a terminal; silent in a pipe.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// One line that is written over as the work goes on.
#[derive(Debug)]
pub struct Progress {
    what: &'static str,
    total: usize,
    on: bool,
    shown: Option<Instant>,
}

impl Progress {
    pub fn new(what: &'static str, total: usize) -> Self {
        Self {
            what,
            total,
            on: std::io::stderr().is_terminal(),
            shown: None,
        }
    }

    /// Shows `done` of the total, at most ten times a second.
    pub fn at(&mut self, done: usize) {
        if self.on
            && self
                .shown
                .is_none_or(|t| t.elapsed() >= Duration::from_millis(100))
        {
            self.shown = Some(Instant::now());
            let _ = write!(
                std::io::stderr(),
                "\r{} {done}/{}\x1b[K",
                self.what,
                self.total
            );
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown.is_some() {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}
