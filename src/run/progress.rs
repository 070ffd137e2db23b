//! Progress of long work (attaching, building an index) as one line on a terminal; silent in a pipe.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// One line that is written over as the work goes on, and removed at its end.
#[derive(Debug)]
pub struct Progress(ProgressBar);

impl Progress {
    pub fn new(what: &'static str, total: usize) -> Self {
        // Draws nothing where stderr is no terminal.
        let target = ProgressDrawTarget::stderr_with_hz(10);
        let bar = ProgressBar::with_draw_target(Some(total as u64), target).with_message(what);
        let style = ProgressStyle::with_template("{msg} {pos}/{len}");
        Self(bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())))
    }

    /// Shows `done` of the total, at most ten times a second.
    pub fn at(&mut self, done: usize) {
        self.0.set_position(done as u64);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
